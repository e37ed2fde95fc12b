"""Every error that this package raises for its users.

An error says what happened, what was found, what is needed and how to fix it; `str(error)` prints them as lines:

    TokenCapacityError: rank 3 has 5120 tokens to dispatch; its group agreed on num_max_tokens_per_rank=4096
      fix: set MCORE_DEEPEP_V2_MAX_TOKENS_PER_RANK=5120 (the same on every rank)

Assertions are for this package's own invariants only, never for something that a user can cause.
"""

from __future__ import annotations


class EPError(RuntimeError):
    """Base of all errors of this package.

    Args:
        what: One sentence: what happened, and on which rank where that matters.
        found: What was there.
        needed: What should have been there.
        fix: What the reader can do about it.
    """

    def __init__(self, what: str, *, found: str | None = None, needed: str | None = None, fix: str | None = None):
        self.what, self.found, self.needed, self.fix = what, found, needed, fix
        parts = (("found", found), ("needed", needed), ("fix", fix))
        super().__init__("\n".join([what, *(f"  {name}: {text}" for name, text in parts if text)]))


class SettingsError(EPError, ValueError):
    """A setting has an invalid value."""


class UnavailableError(EPError):
    """No buffer can carry tokens here: deep_ep is missing or unusable, and the reference was not asked for."""


class SeamError(EPError):
    """Megatron-Core lacks a symbol that `install()` binds, or the symbol has another signature."""


class InputError(EPError, ValueError):
    """A tensor or number passed to a dispatch or combine violates the contract."""


class TokenCapacityError(InputError):
    """A rank has more tokens than `num_max_tokens_per_rank`."""


class LayoutOverflowError(InputError):
    """More selections arrived for this rank's experts than a layout of fixed size has slots."""


class CaptureError(EPError):
    """A training step cannot be captured in a CUDA graph. CUDA and torch's generators are left in the middle of the
    capture: nothing more can run in this process."""


class EvaluationOverflowError(LayoutOverflowError):
    """The same in an evaluation that was replayed from a CUDA graph: its result is wrong, and training is not
    affected."""


class PeerError(EPError):
    """Another rank of the group refused its input to this call. Raised so that this rank does not wait for it."""


class GroupMismatchError(EPError):
    """A value that must be equal on all ranks of the group is not."""


class RoutingChangedError(EPError):
    """A recomputed forward chose other experts than the first one."""


class ClosedError(EPError):
    """The process group or the buffer was already destroyed."""
