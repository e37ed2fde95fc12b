"""The experts inside Megatron's MoE layer, on both layouts, against Megatron's own; and in distributed checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import mapping
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

import megatron_ep_v2
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.megatron.experts import EXPERTS, Experts
from tests.helpers.compare import relative_errors
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups, step
from tests.helpers.shapes import CPU

NAN = float("nan")


def replaced(layer: Any, backend: str) -> Experts:
    """Put experts of this kind, with the same weights, instead of Megatron's."""
    theirs = layer.experts.local_experts
    ours = EXPERTS[backend](len(theirs), layer.config, pg_collection=get_default_pg_collection())
    with torch.no_grad():
        for name in ("linear_fc1", "linear_fc2"):
            getattr(ours, name).weight.copy_(torch.stack([getattr(expert, name).weight for expert in theirs]))
    layer.experts = ours
    return ours


def compare(group: Any, layouts: list[str], backends: list[str]) -> dict[str, float]:
    """Relative L2 of the output and of each gradient."""
    errors = {}
    with process_groups():
        for layout in layouts:
            hidden = hidden_states(CPU, CPU.tokens - 3 * group.rank(), 1)
            theirs = step(make_layer(CPU, "flex", layout), hidden)
            for name in ("linear_fc1", "linear_fc2"):
                parts = [theirs.pop(key) for key in sorted(theirs) if key.endswith(f"{name}.weight")]
                theirs[f"experts.{name}.weight"] = torch.stack(parts)
            for backend in backends:
                layer = make_layer(CPU, "flex", layout)
                experts = replaced(layer, backend)
                assert all(p.allreduce is False for p in experts.parameters())
                ours = step(layer, hidden)
                for name, error in relative_errors(ours, theirs).items():
                    errors[f"{layout}, {backend}, {name}"] = error
                megatron_ep_v2.destroy_buffers()
    return errors


def test_the_layer_agrees_with_megatrons_own_experts() -> None:
    for errors in run_ranks(2, compare, ["compact", "expanded"], ["grouped", "sequential"]):
        assert len(errors) == 2 * 2 * 5
        for name, error in errors.items():
            assert error < 2e-6, f"{name}: relative L2 {error:.1e}"


def counts(group: Any) -> list[int]:
    """The counts that the experts get, and after them how many rows."""
    with process_groups():
        layer = make_layer(CPU, "flex", "expanded")
        experts, given = replaced(layer, "grouped"), []
        experts.register_forward_pre_hook(lambda _, args: given.extend([*args[1].tolist(), len(args[0])]))
        layer(hidden_states(CPU, CPU.tokens, 1))
        return given


def test_a_dispatch_pads_as_the_setting_says() -> None:
    """So that DeepGEMM's experts take the rows as they come."""
    for *sizes, rows in run_ranks(2, counts, env={"MCORE_DEEPEP_V2_EXPERT_ALIGNMENT": "128"}):
        assert sum(sizes) == rows and all(size % 128 == 0 for size in sizes) and any(sizes)
    assert any(size % 128 for sizes in run_ranks(2, counts) for size in sizes)


def global_tensors(experts: Any, single: bool) -> dict[str, tuple[torch.Tensor, Any]]:
    """Key in the checkpoint -> what this rank writes of the whole tensor, NaN elsewhere; and which replica it is."""
    state = experts.sharded_state_dict("mlp.experts.", (), {"singleton_local_shards": single})
    mapping.apply_factories(state)
    whole: dict[str, tuple[torch.Tensor, Any]] = {}
    shards: list[Any] = []
    nested_values(state, shards)
    for shard in shards:
        if not isinstance(shard, mapping.ShardedTensor):
            continue
        new = (torch.full(shard.global_shape, NAN), shard.replica_id)
        tensor, replica = whole.setdefault(shard.key, new)
        assert replica == shard.replica_id and tensor.shape == shard.global_shape
        data = shard.data.view(*[1] * shard.prepend_axis_num, *shard.data.shape)
        shard_of = tuple(slice(at, at + size) for at, size in zip(shard.global_offset, data.shape, strict=True))
        assert tensor[shard_of].isnan().all(), "written twice"
        tensor[shard_of] = data
    return whole


def nested_values(state: Any, found: list[Any]) -> None:
    for value in state.values() if isinstance(state, dict) else state:
        if isinstance(value, dict | list):
            nested_values(value, found)
        else:
            found.append(value)


def checkpoint(group: Any) -> list[str]:
    """Keys in which what a rank writes differs from Megatron's own, and "reading" if it does not read that."""
    wrong = []
    with process_groups():
        for single in (False, True):
            layer = make_layer(CPU, "flex")
            theirs = layer.experts
            ours = replaced(layer, "grouped")
            wanted, found = global_tensors(theirs, single), global_tensors(ours, single)
            if len(found) != (3 * 4 if single else 2) or wanted.keys() != found.keys():
                wrong.append(f"keys {sorted(wanted)} and {sorted(found)}")
            for key, (tensor, replica) in wanted.items():
                same = torch.equal(tensor.nan_to_num(-7), found[key][0].nan_to_num(-7))
                if not same or replica != found[key][1] or not tensor.isfinite().any():
                    wrong.append(key)

            state = ours.sharded_state_dict("mlp.experts.", (), {"singleton_local_shards": single})
            state = {name: value for name, value in state.items() if hasattr(value, "build")}
            read = {name: [shard.data * 2 for shard in value.build()] for name, value in state.items()}
            merged = mapping.apply_factory_merges(read, state)
            before = ours.linear_fc1.weight.detach().clone()
            ours.load_state_dict({name.removeprefix("mlp.experts."): value for name, value in merged.items()})
            if not torch.equal(ours.linear_fc1.weight, before * 2):
                wrong.append("reading")
    return wrong


def test_distributed_checkpoints_are_those_of_megatrons_experts() -> None:
    assert run_ranks(2, checkpoint) == [[], []]


def initial(group: Any) -> tuple[torch.Tensor, list[str]]:
    with process_groups():
        layer = make_layer(CPU, "flex")
        groups = get_default_pg_collection()
        torch.manual_seed(5)
        weight = EXPERTS["grouped"](4, layer.config, pg_collection=groups).linear_fc1.weight.detach().clone()
        refused = []
        for change in ({"add_bias_linear": True}, {"gated_linear_unit": False}, {"moe_apply_probs_on_input": True}):
            for name, value in change.items():
                setattr(layer.config, name, value)
                with pytest.raises(SettingsError, match="plain SwiGLU") as raised:
                    EXPERTS["grouped"](4, layer.config, pg_collection=groups)
                refused.append(f"{name}={value}" in str(raised.value))
                setattr(layer.config, name, not value)
        assert parallel_state.get_expert_model_parallel_world_size() == 2
        return weight, refused


def test_each_rank_starts_with_experts_of_its_own_and_other_kinds_are_refused() -> None:
    (first, refused), (second, _) = run_ranks(2, initial)
    assert all(refused) and len(refused) == 3
    whole = torch.cat([first, second])
    assert 0.015 < whole.std() < 0.025
    flat = whole.flatten(1)
    assert (torch.cdist(flat, flat) + torch.eye(8) > 0).all(), "no two experts are alike"


def counted_in_the_norm(group: Any) -> bool:
    """Whether Megatron counts the experts of the tensor-parallel group's second rank, which are no copies."""
    second = SimpleNamespace(rank=lambda: 1)
    with process_groups():
        experts = replaced(make_layer(CPU, "flex"), "grouped")
        return all(param_is_not_tensor_parallel_duplicate(weight, second) for weight in experts.parameters())


def test_the_gradient_norm_counts_every_ranks_experts() -> None:
    assert run_ranks(2, counted_in_the_norm) == [True, True]
