"""`install()` where Megatron-Core's side of it is not as expected: refused by name, and nothing bound."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core import __version__ as megatron_version
from megatron.core import full_cuda_graph
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel.random import CheckpointFunction
from megatron.core.transformer.moe import fused_a2a, moe_utils, token_dispatcher

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.errors import SeamError
from megatron_ep_v2.megatron.symbols import TE_CHECKPOINT
from megatron_ep_v2.recompute import Replayed
from tests.helpers.megatron_names import CALLS, MANAGER, SCHEDULE_MODULE, clean, names, rebound

__all__ = ["clean"]  # a fixture

pytestmark = pytest.mark.usefixtures("clean")

A2A, DISPATCHER = fused_a2a.__name__, token_dispatcher.__name__


def other_parameters(self: Any, hidden: Any, plan: Any) -> None: ...


# what has moved -> (the object that holds it, its name there, what replaces it, None for nothing)
DELETED = {
    f"{DISPATCHER}._DeepepManager": (token_dispatcher, "_DeepepManager"),
    f"{DISPATCHER}.MoEFlexTokenDispatcher": (token_dispatcher, "MoEFlexTokenDispatcher"),
    f"{DISPATCHER}.MoETokenDispatcher": (token_dispatcher, "MoETokenDispatcher"),
    **{f"{DISPATCHER}.{name}": (token_dispatcher, name) for name in CALLS},
    **{f"{A2A}.{name}": (fused_a2a, name) for name in (*CALLS, "HAVE_DEEP_EP", "FusedDispatch", "FusedCombine")},
    f"{DISPATCHER}._DeepepManager.combine": (MANAGER, "combine"),
}
CHANGED = {
    f"{A2A}.FusedDispatch.forward": (fused_a2a.FusedDispatch, "forward"),
    f"{A2A}.FusedCombine.forward": (fused_a2a.FusedCombine, "forward"),
    f"{CheckpointFunction.__module__}.CheckpointFunction.forward": (CheckpointFunction, "forward"),
    **{
        f"{DISPATCHER}._DeepepManager.{name}": (MANAGER, name)
        for name in (
            "__init__",
            "setup_metadata",
            "dispatch",
            "combine",
            "get_permuted_hidden_states_by_experts",
            "get_restored_hidden_states_by_experts",
            "get_number_of_tokens_per_expert",
        )
    },
}


def assert_refused(symbol: str) -> SeamError:
    """`install()` names the symbol and the version, and nothing is bound, not even a setting."""
    before = names()
    with pytest.raises(SeamError) as caught:
        megatron_ep_v2.install(num_sms=24, layout="expanded")
    message = str(caught.value)
    assert f"megatron-core {megatron_version}: {symbol}" in message
    assert "\n  found: " in message and "\n  needed: " in message and "\n  fix: " in message
    assert not rebound(before), "half-applied"
    assert megatron_ep_v2.status()["installed"] is False
    assert settings.active().num_sms == 0
    return caught.value


REPEATS = [(schedules, name) for name in vars(schedules) if name.startswith("forward_backward_")]
REPEATS += [(full_cuda_graph.FullCudaGraphWrapper, "curr_iter"), (full_cuda_graph.StaticBufferLoader, "static_buffers")]


@pytest.mark.parametrize(("owner", "name"), REPEATS)
def test_what_repeats_a_step_is_needed_and_bound_in_sync_free_mode_alone(
    owner: Any, name: str, clean: pytest.MonkeyPatch
) -> None:
    theirs, before = getattr(owner, name), names()
    with clean.context() as missing:
        missing.delattr(owner, name)
        with pytest.raises(SeamError, match=name):
            megatron_ep_v2.install(buffer="reference", sync_free=True)
        assert not rebound(before), "half-applied"
        megatron_ep_v2.install(buffer="reference")
    assert getattr(owner, name) is theirs
    megatron_ep_v2.install(buffer="reference", sync_free=True)
    assert (getattr(owner, name) is not theirs) == (owner is schedules)
    megatron_ep_v2.uninstall()
    assert getattr(owner, name) is theirs


def checkpoint_of_te(ctx: Any, run_function: Any, distribute_saved_activations: bool, *args: Any) -> Any:
    return run_function


@pytest.mark.parametrize("forward", [checkpoint_of_te, other_parameters], ids=["as known", "as unknown"])
def test_transformer_engines_checkpoint_is_bound_where_it_is_as_known(clean: pytest.MonkeyPatch, forward: Any) -> None:
    function = type("_CheckpointFunction", (), {"forward": staticmethod(forward)})
    clean.setitem(sys.modules, TE_CHECKPOINT, SimpleNamespace(_CheckpointFunction=function))
    megatron_ep_v2.install()
    assert (function.forward is not forward) == (forward is checkpoint_of_te)
    if forward is checkpoint_of_te:
        assert isinstance(function.forward(None, len, False), Replayed)
    megatron_ep_v2.uninstall()
    assert function.forward is forward


@pytest.mark.parametrize("symbol", DELETED)
def test_a_missing_symbol(symbol: str, clean: pytest.MonkeyPatch) -> None:
    clean.delattr(*DELETED[symbol])
    error = assert_refused(symbol)
    assert error.found and error.needed


@pytest.mark.parametrize("symbol", CHANGED)
def test_a_changed_signature(symbol: str, clean: pytest.MonkeyPatch) -> None:
    clean.setattr(*CHANGED[symbol], other_parameters)
    error = assert_refused(symbol)
    assert error.found == "its parameters are (hidden, plan)"
    assert error.needed and error.needed.startswith("parameters (")


def test_one_more_parameter_is_a_change(clean: pytest.MonkeyPatch) -> None:
    def dispatch(
        self: Any,
        hidden_states: Any,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        num_sms: int = 0,
    ) -> None: ...

    clean.setattr(MANAGER, "dispatch", dispatch)
    assert_refused(f"{DISPATCHER}._DeepepManager.dispatch")


def test_a_symbol_that_is_no_longer_a_function(clean: pytest.MonkeyPatch) -> None:
    clean.setattr(MANAGER, "dispatch", None)
    assert_refused(f"{DISPATCHER}._DeepepManager.dispatch")


def test_a_helper_of_the_expanded_manager_has_moved(clean: pytest.MonkeyPatch) -> None:
    """The manager's own module is imported by `install()`, and only then is this helper looked for."""
    clean.delattr(moe_utils, "get_align_size_for_quantization")
    clean.delattr(token_dispatcher, "get_align_size_for_quantization")
    clean.delitem(sys.modules, "megatron_ep_v2.megatron.managers", raising=False)
    before = names()
    with pytest.raises(SeamError, match="get_align_size_for_quantization") as caught:
        megatron_ep_v2.install(num_sms=24, layout="expanded")
    assert megatron_version in str(caught.value)
    assert not rebound(before) and settings.active().num_sms == 0


def test_a_changed_rule_of_who_pads_rows(clean: pytest.MonkeyPatch) -> None:
    """Asked at each dispatch, where Megatron has it."""
    clean.setattr(moe_utils, "skip_routed_expert_padding", other_parameters, raising=False)
    assert_refused(f"{moe_utils.__name__}.skip_routed_expert_padding")


def test_the_rule_of_the_1f1b_schedule_has_moved(clean: pytest.MonkeyPatch) -> None:
    clean.delattr(SCHEDULE_MODULE, "should_free_input")
    assert_refused("megatron.core.models.gpt.fine_grained_callables.should_free_input")
    clean.setattr(SCHEDULE_MODULE, "should_free_input", lambda node, config: True, raising=False)
    assert_refused(f"{SCHEDULE_MODULE.__name__}.should_free_input")


def test_a_schedule_that_cannot_be_imported(clean: pytest.MonkeyPatch) -> None:
    def fail(name: str, theirs: Any = importlib.import_module) -> Any:
        if name == SCHEDULE_MODULE.__name__:
            raise ImportError("it needs something that is not here")
        return theirs(name)

    clean.setattr(importlib, "import_module", fail)
    with pytest.raises(SeamError, match=f"{SCHEDULE_MODULE.__name__} cannot be imported: ImportError: it needs"):
        megatron_ep_v2.install()


def test_a_missing_megatron(clean: pytest.MonkeyPatch) -> None:
    clean.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(SeamError, match=r"megatron\.core cannot be imported") as caught:
        megatron_ep_v2.install()
    assert caught.value.fix and "pip install megatron-core" in caught.value.fix
    assert megatron_ep_v2.status()["installed"] is False


def test_a_megatron_whose_modules_have_moved(clean: pytest.MonkeyPatch) -> None:
    clean.setitem(sys.modules, A2A, None)
    with pytest.raises(SeamError, match="fused_a2a cannot be imported"):
        megatron_ep_v2.install()


def test_a_symbol_that_moved_back_is_accepted(clean: pytest.MonkeyPatch) -> None:
    with clean.context() as moved:
        moved.delattr(token_dispatcher, "_DeepepManager")
        with pytest.raises(SeamError):
            megatron_ep_v2.install()
    before = names()
    megatron_ep_v2.install()
    assert ("token_dispatcher", "_DeepepManager") in rebound(before)
