"""Megatron's MoE layer in sync-free mode on the CPU, with grouped experts: against the expanded layout, which other
tests compare with alltoall; and what it says where it cannot run."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch

import megatron_ep_v2
from megatron_ep_v2.device_checks import read_all
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.experts.counts import row_info
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.megatron import expert_load
from tests.helpers.compare import relative_errors
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import build_layer, hidden_states, make_layer, process_groups, step
from tests.helpers.moe_features import FEATURES, batch_of
from tests.helpers.reports import Report, assert_report, attempt
from tests.helpers.shapes import CPU


def compare(group: Any) -> dict[str, dict[str, float]]:
    """Feature -> tensor -> relative L2 distance."""
    found = {}
    with process_groups():
        for name, feature in FEATURES.items():
            hidden, micro_batches, fields = batch_of(group, CPU, feature)
            by_layout, loads = {}, {}
            for layout in ("expanded", "sync-free"):
                layer = make_layer(CPU, "flex", layout, "grouped", **fields)
                expert_load.local_expert_load()
                by_layout[layout] = step(layer, hidden, micro_batches)
                loads[layout] = [counts.tolist() for counts in expert_load.local_expert_load()][-1:]
                with torch.no_grad():
                    by_layout[layout]["eval"] = layer.eval()(hidden)[0]
                read_all()
                megatron_ep_v2.destroy_buffers()
            theirs, ours = by_layout["expanded"], by_layout["sync-free"]
            assert loads["sync-free"] == loads["expanded"] != [[0] * 2]
            found[name] = relative_errors(ours, theirs)
    return found


@pytest.mark.slow
def test_outputs_gradients_and_loads_are_those_of_the_expanded_layout() -> None:
    for rank, by_feature in enumerate(run_ranks(4, compare)):
        for name, errors in by_feature.items():
            for tensor, error in errors.items():
                assert error < 2e-6, f"rank {rank}, {name}, {tensor}: relative L2 {error:.1e}"


class Marked(torch.autograd.Function):
    """Identity, a part of the graph whose life can be watched."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seen: list[Any]) -> torch.Tensor:
        seen.append(weakref.ref(ctx))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def outlived(group: Any) -> dict[str, bool]:
    """Layout -> whether a step's graph is still there after it."""
    found = {}
    with process_groups():
        for layout in ("expanded", "sync-free"):
            layer, seen = make_layer(CPU, "flex", layout, "grouped"), []
            x = hidden_states(CPU, 8, 1).requires_grad_()
            layer(Marked.apply(x, seen))[0].sum().backward()
            gc.collect()
            found[layout] = seen[0]() is not None
            read_all()
            megatron_ep_v2.destroy_buffers()
    return found


@pytest.mark.slow
def test_no_graph_outlives_its_step() -> None:
    """It would belong to the stream of an eager step, and what is captured later may not depend on that."""
    assert run_ranks(2, outlived) == [{"expanded": False, "sync-free": False}] * 2


class OnDevice(torch.Tensor):
    """Rows that say they are on a GPU."""

    is_cpu = False


def groups_known(group: Any) -> tuple[list[int], int, list[int]]:
    """The counts that the experts get; the padding and the ends that they take from them where rows are on a GPU."""
    with process_groups():
        layer = make_layer(CPU, "flex", "sync-free", "grouped")
        given: list[Any] = []
        layer.experts.register_forward_pre_hook(lambda _, args: given.extend(args[:2]))
        layer(hidden_states(CPU, CPU.tokens, 1))
        rows, counts = given
        groups = Groups.from_counts(counts, rows.detach().as_subclass(OnDevice))
        assert groups.ends is row_info(counts).ends, "computed a second time"
        return counts.long().tolist(), groups.alignment, groups.ends.tolist()


def test_experts_know_that_their_rows_are_padded_and_where_they_end() -> None:
    """So that DeepGEMM's do not move them apart a second time."""
    for counts, alignment, ends in run_ranks(2, groups_known, env={"MCORE_DEEPEP_V2_EXPERT_ALIGNMENT": "128"}):
        assert alignment == 128 and any(counts) and all(count % 128 == 0 for count in counts)
        assert ends == list(itertools.accumulate(counts))
    for counts, alignment, ends in run_ranks(2, groups_known):
        assert alignment == 1 and any(count % 128 for count in counts)
        assert ends == list(itertools.accumulate(counts))


def by_setting(group: Any) -> dict[str, bool]:
    """Whether each tensor of a step is the same with experts of the layer's spec and with those of install()."""
    with process_groups():
        hidden = hidden_states(CPU, CPU.tokens, 1)
        by_spec = step(make_layer(CPU, "flex", "sync-free", "grouped"), hidden)
        read_all()
        megatron_ep_v2.install(
            buffer="reference", num_max_tokens_per_rank=CPU.tokens, sync_free=True, experts="grouped"
        )
        by_install = step(build_layer(CPU, "flex"), hidden)
        read_all()
        assert by_spec.keys() == by_install.keys()
        return {name: torch.equal(tensor, by_install[name]) for name, tensor in by_spec.items()}


def test_the_setting_is_enough() -> None:
    """No layer spec is touched: Megatron's own experts would be refused, as below."""
    for same in run_ranks(2, by_setting):
        assert len(same) == 5 and all(same.values()), same


def own_experts(group: Any) -> Report | None:
    with process_groups():
        layer = make_layer(CPU, "flex", "sync-free")
        return attempt(lambda: layer(hidden_states(CPU, 4, 1)))


def test_experts_that_would_wait_are_refused() -> None:
    for report in run_ranks(2, own_experts):
        assert_report(report, SettingsError, "tokens_per_expert on the host", "EXPERTS=grouped", "SYNC_FREE off")


@pytest.mark.parametrize("wanted", [{"layout": "compact"}, {"buffer": "legacy"}], ids=str)
def test_what_cannot_be_sync_free_is_refused_at_once(wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ep_v2.megatron import binding
    from megatron_ep_v2.probe import Choice

    kind = wanted.get("buffer", "reference")
    monkeypatch.setattr(binding, "choose", lambda *_: Choice(kind, "asked for"))
    report = attempt(lambda: megatron_ep_v2.install(sync_free=True, **wanted))
    assert_report(report, SettingsError, "sync-free mode needs", f"the {kind} buffer", "MCORE_DEEPEP_V2_SYNC_FREE")
    assert not megatron_ep_v2.status()["installed"]
