"""Every setting of this package and its source. Nothing else reads the environment.

A value given to `install()` wins over the environment, the environment over Megatron's configuration, and that over the
default. `Settings.sources` names the source that won, for the log and for `status()`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.wire.formats import DISPATCH_DTYPES, NOT_CARRIED

PREFIX = "MCORE_DEEPEP_V2_"
TESTS_PREFIX = PREFIX + "TEST_"  # read by this package's own tests
AUTO = PREFIX + "AUTO"  # read when an interpreter starts, by the file that `auto enable` writes; see `automatic`
_SHOWN = re.compile(
    rf"(EP|DJ|NCCL|OFI_NCCL|FI|NVSHMEM|{PREFIX.rstrip('_')})_.+|CUDA_(HOME|PATH|VISIBLE_DEVICES|DEVICE_MAX_CONNECTIONS)"
)


def _setting(
    default: Any, doc: str, *, variable: str | None = None, choices: tuple[str, ...] = (), note: str = ""
) -> Any:
    return field(default=default, metadata={"doc": doc, "variable": variable, "choices": choices, "note": note})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Immutable settings. The environment variable of a field is MCORE_DEEPEP_V2_ and its name in capitals. For
    `num_max_tokens_per_rank` it is the name that upstream's pull request introduced; the regular one is also accepted.

    Raises:
        SettingsError: A value has the wrong type or is not one of the choices; the message names its source.
    """

    buffer: str = _setting("auto", "what carries the tokens", choices=("auto", *CARRIERS))
    layout: str = _setting("auto", "layout of the rows that the experts get", choices=("auto", "compact", "expanded"))
    dispatch_dtype: str = _setting(
        "auto", "what rows travel as to the experts", choices=DISPATCH_DTYPES, note=f" ({NOT_CARRIED})"
    )
    grad_dispatch_dtype: str = _setting(
        "auto", "what gradients of rows travel as to the experts", choices=DISPATCH_DTYPES, note=f" ({NOT_CARRIED})"
    )
    num_max_tokens_per_rank: int = _setting(
        0, "most tokens that a rank may dispatch; 0 = agreed by the group", variable="MAX_TOKENS_PER_RANK"
    )
    experts: str = _setting(
        "megatron",
        "which experts MoE layers are built with",
        choices=("megatron", "grouped", "deepgemm", "sequential"),
    )
    expert_alignment: int = _setting(0, "pad an expert's expanded rows to a multiple of it; 0 = as fp8_recipe needs")
    num_sms: int = _setting(0, "SMs of a dispatch or combine; 0 = the library's analytic choice")
    num_qps: int = _setting(0, "RDMA queue pairs to allocate; 0 = the library's choice; fabrics such as EFA need a cap")
    gin: str = _setting("auto", "NCCL's device-side RDMA; off = one NVLink host", choices=("auto", "on", "off"))
    allow_hybrid_mode: bool = _setting(True, "two hops: RDMA between hosts, NVLink inside")
    allow_multiple_reduction: bool = _setting(True, "reduce on the way back; off = once, at the end, in more bytes")
    prefer_overlap_with_compute: bool = _setting(True, "take fewer SMs, to leave some to concurrent compute")
    sync_free: bool = _setting(False, "dispatch without a wait on the host; needs grouped experts")
    sync_free_rows_percent: int = _setting(
        200, "room for expert rows, in % of an even share; 0 = all that could arrive"
    )
    redundant_experts: int = _setting(0, "replica slots of each rank, for copies of busy experts; 0 = none")
    balance_min_rows: int = _setting(1024, "the fewest rows for which a redundant expert is planned; 1 or more")
    balance_from_percent: int = _setting(
        110, "of the ranks' mean: with fewer rows on the busiest rank no redundant expert is planned; 100 or more"
    )
    deterministic: bool = _setting(False, "bit-identical repeats: rows and sums in a fixed order")
    reuse_recompute_handle: bool = _setting(True, "a recomputed dispatch repeats the routing of the first")
    reference_strict: bool = _setting(True, "the reference buffer refuses what DeepEP would refuse on GPUs")
    sl_idx: int = _setting(3, "RDMA service level")
    num_cpu_timeout_secs: int = _setting(300, "seconds until a host wait gives up")
    num_gpu_timeout_secs: int = _setting(100, "seconds until a kernel's wait gives up")
    watchdog_secs: int = _setting(10, "seconds until an unfinished dispatch or combine is reported; 0 = no watchdog")
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name != "sources":
                self._check(item.name, item.metadata)

    def _check(self, name: str, metadata: Mapping[str, Any]) -> None:
        value, choices = getattr(self, name), metadata["choices"]
        if choices:
            good, needed = value in choices, "one of " + ", ".join(choices) + metadata["note"]
        elif isinstance(_DEFAULTS[name], bool):
            good, needed = isinstance(value, bool), "true or false"
        else:
            good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            needed = "a whole number of 0 or more"
        if not good:
            raise SettingsError(
                f"the setting {name} ({metadata['doc']}) cannot be {value!r}",
                found=f"{value!r} from {self.source(name)}",
                needed=needed,
                fix=f"correct it where it was set, or unset {self._variable(name)}",
            )

    def _variable(self, name: str) -> str:
        """Return the variable that set the field, else the first of `variables(name)`."""
        source = self.source(name)
        return source if source in variables(name) else variable(name)

    def source(self, name: str) -> str:
        """Source of a field's value: "install()", a variable's name, "Megatron's ..." or "default"."""
        return self.sources.get(name, "default")

    def describe(self) -> dict[str, str]:
        """Field -> "value (source)"."""
        return {name: f"{getattr(self, name)} ({self.source(name)})" for name in _DEFAULTS}


_DEFAULTS = {item.name: item.default for item in fields(Settings) if item.name != "sources"}
_METADATA = {item.name: item.metadata for item in fields(Settings) if item.name != "sources"}
NAMES = tuple(_DEFAULTS)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + (_METADATA[name]["variable"] or name.upper())


def variables(name: str) -> tuple[str, ...]:
    """All variables that are read for a setting, `variable(name)` first."""
    return tuple(dict.fromkeys((variable(name), PREFIX + name.upper())))


def resolve(environ: Mapping[str, str] | None = None, **explicit: Any) -> Settings:
    """Settings from explicit values, then the environment, then defaults.

    Args:
        environ: Instead of os.environ.
        **explicit: Fields by name; None counts as not given.

    Raises:
        SettingsError: An unknown field or variable, a value that cannot be used, or two variables of one setting with
            different values.
    """
    environ = os.environ if environ is None else environ
    _refuse_unknown(environ, explicit)
    automatic(environ)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name in _DEFAULTS:
        if explicit.get(name) is not None:
            values[name], sources[name] = explicit[name], "install()"
            continue
        given = {each: _parse(name, text) for each in variables(name) if (text := environ.get(each, "").strip())}
        if len(set(given.values())) > 1:
            raise SettingsError(
                f"two variables of the setting {name} have different values",
                found=", ".join(f"{each}={environ[each].strip()}" for each in given),
                needed="one of them, or the same value in both",
                fix=f"unset {list(given)[-1]}",
            )
        if given:
            sources[name], values[name] = next(iter(given.items()))
    return Settings(**values, sources=sources)


def _refuse_unknown(environ: Iterable[str], explicit: Iterable[str]) -> None:
    """Raise for an unknown name: a misspelt one would silently have no effect."""
    for name in sorted(set(explicit) - set(_DEFAULTS)):
        needed, fix = _nearest(name, list(_DEFAULTS))
        raise SettingsError(f"unknown setting {name!r}", needed=needed, fix=fix)
    known = [*(each for name in _DEFAULTS for each in variables(name)), AUTO]
    for name in sorted(environ):
        if name.startswith(PREFIX) and not name.startswith(TESTS_PREFIX) and name not in known:
            needed, fix = _nearest(name, known)
            raise SettingsError(f"unknown variable {name} in the environment", needed=needed, fix=fix)


def _nearest(name: str, known: list[str]) -> tuple[str, str]:
    """`(needed, fix)` of an error: the nearest known name, compared without the prefix; all names if none is near."""
    short = {each.removeprefix(PREFIX).upper(): each for each in known}
    nearest = difflib.get_close_matches(name.removeprefix(PREFIX).upper(), short, 1)
    if nearest:
        return short[nearest[0]], "correct the spelling"
    return "one of " + ", ".join(known), "correct the spelling, or leave it out"


_SWITCH = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}


def automatic(environ: Mapping[str, str] | None = None) -> bool:
    """Whether AUTO is on. It is no setting: it says that `install()` is called, not how.

    Raises:
        SettingsError: Its value is neither on nor off.
    """
    text = (os.environ if environ is None else environ).get(AUTO, "").strip()
    value = _SWITCH.get(text.lower()) if text else False
    if value is None:
        raise SettingsError(
            f"{AUTO} (whether processes bind Megatron by themselves) cannot be {text!r}",
            needed=f"one of {', '.join(_SWITCH)}",
            fix=f"correct it where it was set, or unset {AUTO}",
        )
    return value


def _parse(name: str, text: str) -> Any:
    default = _DEFAULTS[name]
    if isinstance(default, bool):
        return _SWITCH.get(text.lower(), text)
    if isinstance(default, int):
        with contextlib.suppress(ValueError):
            return int(text)
        return text
    return text.lower()


_active: Settings | None = None


def active() -> Settings:
    """The settings in force: those of the last `activate()`, else those of the environment."""
    global _active
    if _active is None:
        _active = resolve()
    return _active


def activate(settings: Settings | None) -> None:
    """Put settings in force; None = read the environment again at next use."""
    global _active
    _active = settings


def offer(name: str, value: Any, source: str) -> None:
    """Take a value from Megatron's configuration unless the user gave one by name or by variable."""
    global _active
    current = active()
    if current.source(name) in ("default", source) and value != getattr(current, name):
        _active = replace(current, **{name: value}, sources={**current.sources, name: source})


def settle_dispatch_dtypes(dtype: str, reason: str) -> None:
    """Give each dispatch dtype that is still "auto" its final value.

    Args:
        dtype: Follows from the model's fp8_recipe, for both directions.
        reason: Becomes the source, as "auto: reason".

    Raises:
        SettingsError: "auto" got another value before.
    """
    for name in ("dispatch_dtype", "grad_dispatch_dtype"):
        current = active()
        if getattr(current, name) == "auto":
            value: dict[str, Any] = {name: dtype}
            activate(replace(current, **value, sources={**current.sources, name: f"auto: {reason}"}))
        elif current.source(name).startswith("auto: ") and getattr(current, name) != dtype:
            raise SettingsError(
                f"{name}=auto cannot follow two models of one process that differ",
                found=f"{current.describe()[name]}, and now {dtype} (auto: {reason})",
                needed="one value for the whole process",
                fix=f"set {variable(name)} to one of " + ", ".join(DISPATCH_DTYPES[1:]),
            )


def keep_offers(new: Settings, before: Settings) -> Settings:
    """Return `new` with the values that models decided in `before`, for fields that `new` leaves default or "auto"."""
    kept: dict[str, Any] = {}
    for name in NAMES:
        by_model = before.source(name).startswith(("Megatron's ", "auto: the model"))
        if by_model and (new.source(name) == "default" or getattr(new, name) == "auto"):
            kept[name] = getattr(before, name)
    return replace(new, **kept, sources={**new.sources, **{name: before.source(name) for name in kept}})


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for the duration of a block; restores the previous values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def export(name: str, value: str, *, keep: bool = False) -> None:
    """Set an environment variable of this process and of those that it starts; with `keep`, unless it has a value."""
    if not (keep and os.environ.get(name)):
        os.environ[name] = value


def gin_disabled_by_user() -> bool:
    """Whether DeepEP's own EP_DISABLE_GIN was set when the job started."""
    return os.environ.get("EP_DISABLE_GIN", "0") not in ("", "0")


def ranks_share_gpus() -> bool:
    """Whether NCCL's own NCCL_MULTI_RANK_GPU_ENABLE allows several ranks on one GPU."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") not in ("", "0")


def shown_environment() -> dict[str, str]:
    """Environment variables that affect expert parallelism, and no others: people publish the reports with them."""
    return {name: value for name, value in sorted(os.environ.items()) if _SHOWN.fullmatch(name)}


def is_first_rank() -> bool:
    """Whether this process logs: rank 0 of a torchrun job, or any process outside one."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Launch:
    """Rank and size of the job that this process belongs to, from torchrun's variables.

    Attributes:
        store: File of the ranks' rendezvous, where `bench` started them itself; else "".
    """

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    store: str


def launch() -> Launch | None:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; None if this process was not launched as a rank."""
    if "RANK" not in os.environ:
        return None
    rank, ranks = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_ranks = os.environ.get("LOCAL_RANK", rank), os.environ.get("LOCAL_WORLD_SIZE", ranks)
    return Launch(rank, ranks, int(local_rank), int(local_ranks), os.environ.get("EP_BENCH_STORE", ""))
