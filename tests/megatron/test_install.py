"""`install()` and `uninstall()` on the installed Megatron-Core: every name or none, and back again."""

from __future__ import annotations

import inspect
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core.optimizer import muon
from megatron.core.transformer.moe import fused_a2a, token_dispatcher

import megatron_ep_v2
from megatron_ep_v2 import fused_a2a as ours
from megatron_ep_v2 import settings
from megatron_ep_v2.errors import SettingsError, UnavailableError
from tests.helpers.megatron_names import (
    CALLS,
    FLEX,
    MANAGER,
    SCHEDULE_MODULE,
    STEPS,
    clean,
    names,
    rebound,
    set_cuda,
    set_deep_ep,
)

__all__ = ["clean"]  # a fixture

BOUND = {
    *((module, name) for module in ("fused_a2a", "token_dispatcher") for name in CALLS),
    *(("fused_a2a", name) for name in ("FusedDispatch", "FusedCombine")),
    *((module, "destroy_process_group") for module in ("distributed", "distributed_c10d")),
    ("MoEFlexTokenDispatcher", "dispatch_preprocess"),
    ("MoEFlexTokenDispatcher", "combine_postprocess"),
    ("MoETokenDispatcher", "__init__"),
    ("CheckpointFunction", "forward"),
    *((owner.__name__, name) for owner, name in STEPS),
    ("token_dispatcher", "_DeepepManager"),
    # What would take stacked experts for something else.
    ("DistributedOptimizer", "sharded_param_state_dp_reshardable"),
    ("DistributedOptimizer", "sharded_param_state_dp_zero"),
    ("dist_checkpointing", "load"),
    ("muon", "_get_param_groups")
    if hasattr(muon, "_get_param_groups")
    else ("optimizer", "_get_megatron_emerging_optimizer"),
    *((module, "extract_param_metadata") for module in ("planner", "utils")),
}
BOUND_EXPANDED = BOUND | {(SCHEDULE_MODULE.__name__.rpartition(".")[2], "should_free_input")}

pytestmark = pytest.mark.usefixtures("clean")


# ------------------------------------------------------------------------------------------------ binding and undoing


def test_the_compact_layout_leaves_the_work_to_megatrons_manager() -> None:
    before = names()
    status = megatron_ep_v2.install(layout="compact")
    assert rebound(before) == BOUND
    manager = token_dispatcher._DeepepManager
    assert manager.__name__ == "CompactManager"
    for name in ("get_permuted_hidden_states_by_experts", "get_restored_hidden_states_by_experts"):
        assert getattr(manager, name) is getattr(MANAGER, name)
    assert status["layout"] == "compact" and status["layout_reason"] == "asked for by install()"


@pytest.mark.parametrize("layout", [{"layout": "expanded"}, {}], ids=["asked for", "by default"])
def test_the_expanded_layout_has_a_manager_of_its_own(layout: dict[str, str]) -> None:
    before = names()
    status = megatron_ep_v2.install(**layout)
    assert rebound(before) == BOUND_EXPANDED
    manager = token_dispatcher._DeepepManager
    assert manager.__name__ == "ExpandedManager" and issubclass(manager, MANAGER)
    assert status["layout"] == "expanded" and status["layout_reason"]


def test_the_names_are_this_packages_in_both_modules() -> None:
    megatron_ep_v2.install()
    for module in (fused_a2a, token_dispatcher):
        for name in CALLS:
            assert getattr(module, name) is getattr(ours, name), f"{module.__name__}.{name}"
    assert fused_a2a.FusedDispatch is ours.FusedDispatch and fused_a2a.FusedCombine is ours.FusedCombine


def test_nothing_of_the_dispatcher_is_compiled() -> None:
    """Megatron's own is, once for each layer: that is what the first half sees."""
    flex = FLEX.__new__(FLEX)
    flex.tp_size, flex.ep_size, flex.num_local_experts = 1, 2, 2
    arguments = torch.zeros(3, 1, 8), torch.ones(3, 4, dtype=torch.bool), torch.rand(3, 4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for layout in (None, "compact", "expanded"):
            if layout:
                megatron_ep_v2.install(layout=layout)
            kind = token_dispatcher._DeepepManager
            flex._comm_manager = manager = kind.__new__(kind)
            manager.num_experts, manager.router_topk, manager.capacity_factor = 4, 2, None
            if not layout:
                with pytest.raises(RuntimeError, match="recompile"):
                    flex.dispatch_preprocess(*arguments)
                continue
            hidden, probs = flex.dispatch_preprocess(*arguments)
            assert hidden.shape == (3, 8) and flex.hidden_shape == (3, 1, 8)
            assert probs.sort(descending=True).values.equal(arguments[2].topk(2).values)
            assert arguments[2].gather(1, manager.token_indices).equal(probs)


def test_the_manager_of_another_backend_is_preprocessed_as_ever(clean: pytest.MonkeyPatch) -> None:
    clean.setattr(FLEX, "dispatch_preprocess", lambda self, hidden_states, routing_map, probs: (self, probs))
    megatron_ep_v2.install()
    flex = FLEX.__new__(FLEX)
    flex._comm_manager = object()
    assert flex.dispatch_preprocess("hidden", "map", "probs") == (flex, "probs")


def test_rows_that_experts_have_saved_are_not_freed_by_the_1f1b_schedule() -> None:
    """Megatron frees the experts' input after their forward, since its own path has permuted it into a copy by then."""
    flex = SimpleNamespace(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep", fp8=None, fp4=None)
    flex.cuda_graph_modules = flex.cuda_graph_scope = []
    alltoall = SimpleNamespace(**vars(flex) | {"moe_token_dispatcher_type": "alltoall"})
    fp8 = SimpleNamespace(**vars(flex) | {"fp8": "hybrid"})  # some layers may stay in bf16, and save their rows

    def freed(config: Any) -> dict[str, bool]:
        ask = SCHEDULE_MODULE.should_free_input
        more = [4][: len(inspect.signature(ask).parameters) - 3]  # local experts, from 0.17 on
        return {name: ask(name, True, config, *more) for name in ("moe_dispatch", "mlp", "moe_combine")}

    megatrons = freed(flex), freed(alltoall)
    assert megatrons[0] == {"moe_dispatch": False, "mlp": True, "moe_combine": True}
    megatron_ep_v2.install(layout="compact")
    assert (freed(flex), freed(alltoall)) == megatrons
    megatron_ep_v2.install(layout="expanded")
    assert freed(flex) == freed(fp8) == {"moe_dispatch": False, "mlp": False, "moe_combine": True}
    assert freed(alltoall) == megatrons[1]
    megatron_ep_v2.uninstall()
    assert freed(flex) == megatrons[0]


def test_what_is_bound_can_be_called_as_megatron_calls_it() -> None:
    """The parameters of Megatron's own functions, in order, and no further one without a default."""
    megatron_ep_v2.install()
    calls = {
        "fused_dispatch": ["x", "token_indices", "token_probs", "num_experts", "group"],
        "fused_combine": ["x", "group", "handle"],
    }
    for name, leading in calls.items():
        parameters = inspect.signature(getattr(token_dispatcher, name)).parameters
        assert list(parameters)[: len(leading) + 2] == [*leading, "async_finish", "allocate_on_comm_stream"]
        assert all(parameter.default is not parameter.empty for parameter in list(parameters.values())[len(leading) :])


def test_installing_twice_is_harmless(clean: pytest.MonkeyPatch) -> None:
    before = names()
    first = megatron_ep_v2.install(layout="compact", num_sms=24)
    after_first = names()
    clean.setenv("MCORE_DEEPEP_V2_LAYOUT", "expanded")
    assert megatron_ep_v2.install() == first == megatron_ep_v2.status(), "without arguments it changes nothing"
    assert not rebound(after_first)
    megatron_ep_v2.uninstall()
    assert not rebound(before), "one uninstall() undoes both"


def test_installing_again_with_arguments_replaces_the_first() -> None:
    before = names()
    megatron_ep_v2.install(layout="expanded", num_sms=24)
    status = megatron_ep_v2.install(layout="compact")
    assert rebound(before) == BOUND
    assert status["settings"]["num_sms"] == "0 (default)"
    megatron_ep_v2.uninstall()
    assert not rebound(before)


def test_uninstall_restores_megatrons_own_objects() -> None:
    before = names()
    megatron_ep_v2.install(num_sms=24)
    megatron_ep_v2.uninstall()
    assert not rebound(before)
    assert megatron_ep_v2.status()["installed"] is False
    assert settings.active().num_sms == 0
    megatron_ep_v2.uninstall()
    assert not rebound(before), "a second time it does nothing"


def test_uninstall_leaves_what_was_rebound_after_it(caplog: pytest.LogCaptureFixture) -> None:
    before = names()
    megatron_ep_v2.install()

    def another(*_: Any) -> None: ...

    token_dispatcher.fused_combine = dist.destroy_process_group = another
    with caplog.at_level(logging.WARNING, "megatron_ep_v2"):
        megatron_ep_v2.uninstall()
    left = {("token_dispatcher", "fused_combine"), ("distributed", "destroy_process_group")}
    assert rebound(before) == left
    assert token_dispatcher.fused_combine is another and dist.destroy_process_group is another
    complaints = [message for message in caplog.messages if "was rebound after install()" in message]
    assert len(complaints) == 2 and "token_dispatcher.fused_combine" in " ".join(complaints)


def test_status_is_json_and_says_what_is_active(caplog: pytest.LogCaptureFixture) -> None:
    assert megatron_ep_v2.status()["installed"] is False
    with caplog.at_level(logging.INFO, "megatron_ep_v2"):
        status = megatron_ep_v2.install(buffer="reference", layout="compact", num_sms=24)
    assert json.loads(json.dumps(status)) == status == megatron_ep_v2.status()
    assert status["installed"] is True
    assert status["megatron_core"] == megatron_version
    assert (status["buffer"], status["buffer_reason"]) == ("reference", "asked for by install()")
    assert status["settings"]["num_sms"] == "24 (install())"
    assert status["settings"]["layout"] == "compact (install())"
    assert status["buffers"] == []
    probed, line = caplog.messages
    assert probed.startswith("HAVE_DEEP_EP=")
    for part in (megatron_version, "the reference buffer (asked for by install())", "compact layout"):
        assert part in line


# ------------------------------------------------------------------------------- a second install() that cannot be done


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"layout": "sorted"}, SettingsError), ({"buffer": "elastic"}, UnavailableError)],
    ids=["a wrong setting", "a buffer that is not here"],
)
def test_a_refused_second_install_leaves_the_first(arguments: dict[str, str], error: type[Exception]) -> None:
    first = megatron_ep_v2.install(layout="compact", num_sms=24)
    before = names()
    with pytest.raises(error):
        megatron_ep_v2.install(**arguments)
    assert not rebound(before)
    assert megatron_ep_v2.status() == first


@pytest.mark.parametrize("arguments", [{"layout": "sorted"}, {"num_sm": 24}, {"num_sms": -1}], ids=str)
def test_a_wrong_setting_binds_nothing(arguments: dict[str, Any]) -> None:
    before = names()
    with pytest.raises(SettingsError):
        megatron_ep_v2.install(**arguments)
    assert not rebound(before)
    assert megatron_ep_v2.status()["installed"] is False


def test_no_buffer_binds_nothing(clean: pytest.MonkeyPatch) -> None:
    set_cuda(clean, True)
    set_deep_ep(clean)
    before = names()
    with pytest.raises(UnavailableError):
        megatron_ep_v2.install()
    assert not rebound(before)
    assert megatron_ep_v2.status()["installed"] is False
