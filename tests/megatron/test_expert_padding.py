"""Experts that leave the padding of their rows to the dispatcher, as those on grouped tensors do on Megatron's main.
With stand-ins for its two functions, on which the released versions say otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils, token_dispatcher

import megatron_ep_v2
from megatron_ep_v2.device_checks import read_all
from tests.helpers.compare import relative_error
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import FlexLayer, hidden_states, installed
from tests.helpers.shapes import CPU, Split

ALIGNMENT = 32  # on main 256
EP2 = Split(1, 2)


def pads_before(config: Any) -> bool:
    return bool(getattr(config, "moe_use_grouped_tensor", False))


def run_layer(group: Any, mode: dict[str, Any], grouped_tensors: bool) -> dict[str, Any]:
    """A layer whose experts look at each row; alignment 0 is what Megatron says where nothing is quantised."""
    with pytest.MonkeyPatch.context() as patch, installed(EP2, **mode):
        patch.setattr(moe_utils, "skip_routed_expert_padding", pads_before, raising=False)
        align = lambda config: ALIGNMENT if pads_before(config) else 0  # noqa: E731
        patch.setattr(token_dispatcher, "get_align_size_for_quantization", align)
        layer = FlexLayer(CPU, EP2)
        layer.config.moe_use_grouped_tensor = grouped_tensors
        hidden, grad = hidden_states(CPU, 20).requires_grad_(), hidden_states(CPU, 20, seed=1)
        probs, routing_map = layer.router(hidden.detach())
        probs = probs.detach().requires_grad_()
        rows, counts, row_probs = layer.dispatch(hidden, probs, routing_map)
        real = routing_map.sum(dim=0)
        dist.all_reduce(real)
        real = real[layer.local_experts]
        aligned = ALIGNMENT if grouped_tensors else 1
        wanted = -(-real // aligned) * aligned
        assert torch.as_tensor(counts).long().equal(wanted), (counts, wanted)
        number = int(wanted.sum())
        assert len(rows) == len(row_probs) and (len(rows) == number or mode.get("sync_free"))
        first = wanted.cumsum(0) - wanted
        padding = torch.ones(number, dtype=torch.bool)
        for begin, length in zip(first.tolist(), real.tolist(), strict=True):
            padding[begin : begin + length] = False
        assert padding.sum() == number - real.sum() and bool(padding.any()) is grouped_tensors
        assert not rows[:number][padding].any() and not row_probs[:number][padding].any()
        assert rows[:number][~padding].any(dim=1).all() and row_probs[:number][~padding].all()
        weights = row_probs[:number] * layer.local_factors.repeat_interleave(wanted)
        output = layer.combine(torch.cat([rows[:number] * weights[:, None], rows[number:]]))
        output.backward(grad)
        factors = layer.factors.sum(dim=1)
        weighted = (probs.detach() @ factors)[:, None]
        read_all()
        return {
            "output": relative_error(output, hidden * weighted),
            "gradient": relative_error(hidden.grad, grad * weighted),
            "gradient of the probabilities": relative_error(
                probs.grad, (hidden * grad).sum(dim=1, keepdim=True) * factors * routing_map
            ),
            "counted": megatron_ep_v2.expert_load()[-1][layer.local_experts].equal(real),
        }


def run_layers(group: Any) -> dict[str, dict[str, Any]]:
    return {
        f"{name}, grouped tensors: {grouped_tensors}": run_layer(group, mode, grouped_tensors)
        for name, mode in {"expanded": {"layout": "expanded"}, "sync-free": {"sync_free": True}}.items()
        for grouped_tensors in (True, False)
    }


def test_rows_arrive_padded_where_the_experts_do_not_pad() -> None:
    """Not so in the compact layout, where Megatron's own permutation pads after the dispatch."""
    for by_case in run_ranks(2, run_layers):
        assert len(by_case) == 4
        for case, found in by_case.items():
            assert found.pop("counted"), f"{case}: padding was counted"
            for tensor, error in found.items():
                assert error <= 5e-6, f"{case}, {tensor}: relative L2 error {error:.3g}"
