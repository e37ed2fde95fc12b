"""`import megatron_ep_v2.auto`: `install()` by itself, as soon as Megatron's dispatcher has been imported.

For processes that are not started through `run`: actors of Ray, workers of a framework, a notebook. It may be imported
long before Megatron, and by processes that never import Megatron, where nothing happens: no torch, no Megatron, no
deep_ep. With `python -m megatron_ep_v2 auto enable`, an interpreter imports it at its start if MCORE_DEEPEP_V2_AUTO is
on.

A finder in front of `sys.meta_path` lets the other finders find Megatron-Core's modules and wraps their loaders.
`install()` needs whole modules, and the dispatcher's is imported by others, which are then half executed. So it is
called when the outermost import of such a module, on this thread, has ended. Looking for a module without executing it
changes nothing. What `install()` raises comes out of that `import` statement, and again out of later ones.
"""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

from megatron_ep_v2.errors import EPError, SeamError, UnavailableError

MEGATRON = "megatron.core"
DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"  # as in megatron.symbols, which is slow to import

by = "import megatron_ep_v2.auto"  # what asked for it, for status(); the file of `auto enable` changes it


class _Thread(threading.local):
    """What one thread is importing."""

    def __init__(self) -> None:
        self.searched: set[str] = set()
        self.depth = 0  # modules of Megatron-Core that are being executed, inside one another
        self.executed: list[str] = []  # those that have been, since depth was last 0


_thread = _Thread()
_binding = threading.Lock()


class _Finder:
    """Finds modules of Megatron-Core with the other finders."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find a module's spec, its loader wrapped. None for others' modules."""
        # Other packages' hooks also ask all finders, and so this one again, which must then stay out of it.
        if not (name + ".").startswith(MEGATRON + ".") or name in _thread.searched:
            return None
        _thread.searched.add(name)
        try:
            finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            spec = next((found for finder in finders if (found := finder.find_spec(name, path, target))), None)
        finally:
            _thread.searched.discard(name)
        if hasattr(getattr(spec, "loader", None), "exec_module"):
            spec.loader = _Loader(spec.loader)  # type: ignore[union-attr]
        return spec


class _Loader:
    """Another loader, which the module gets back before it is executed."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_loader"), name)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module; after the outermost one, bind."""
        for owner, name in ((module, "__loader__"), (module.__spec__, "loader")):
            if getattr(owner, name, None) is self:
                setattr(owner, name, self._loader)
        if _thread.depth == 0:
            from megatron_ep_v2 import cuda_toolkit

            cuda_toolkit.provide()  # Megatron imports deep_ep, which looks for a compiler at once
        _thread.depth += 1
        try:
            self._loader.exec_module(module)
            if sys.modules.get(module.__name__) is module:  # else it is a private copy
                _thread.executed.append(module.__name__)
        finally:
            _thread.depth -= 1
            if _thread.depth == 0:
                executed, _thread.executed = _thread.executed, []
        if _thread.depth == 0:
            _bind(executed)


def _bind(executed: list[str]) -> None:
    """Bind once the dispatcher's module is there.

    Raises:
        EPError: From `install()`. Never an ImportError: frameworks catch those, and would go on without this package.
    """
    there = DISPATCHER in executed or _imported(DISPATCHER)
    # install() imports modules of Megatron, too. A second thread does not wait for the first, which may wait for its
    # modules; so threads that import Megatron at one time may return a moment before it is bound.
    if not there or not _binding.acquire(blocking=False):
        return
    try:
        from megatron_ep_v2.megatron import binding

        binding.install_automatically(by, executed)
    except ImportError as error:
        raise UnavailableError(
            f"megatron_ep_v2 cannot be imported, so Megatron cannot be bound to it: {error}",
            found=f"asked for by {by}",
            fix="install megatron_ep_v2 and what it needs again, or take back what asked for it",
        ) from error
    except EPError as error:
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"  install() was called by {by}")
        raise
    finally:
        _binding.release()


def _imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def init(args: object = None) -> None:
    """For frameworks that call a function by its name at start-up, as slime does with `--custom-megatron-init-path
    megatron_ep_v2.auto.init`. The import of this module has bound Megatron by then, and nothing more is done.

    Args:
        args: The framework's arguments. They decide nothing: settings come from the environment, as without a call.

    Raises:
        EPError: See `_start`.
    """
    _start()


def _start() -> None:
    """Wait for Megatron's dispatcher, or bind at once if it is there. A second call changes nothing.

    Raises:
        SeamError: An import of Megatron has begun and not ended: its end could not be seen.
        EPError: From `install()`.
    """
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        for name, module in list(sys.modules.items()):
            if (name + ".").startswith(MEGATRON + ".") and module is not None and not _imported(name):
                raise SeamError(
                    "megatron_ep_v2.auto is imported while Megatron is being imported",
                    found=f"{name} has not been executed to its end",
                    fix="import megatron_ep_v2.auto before Megatron, or after it",
                )
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
    _bind([])


_start()
