"""What redundant experts cost a layer, call by call, and what a whole run says of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep_v2.balance import planner
from megatron_ep_v2.bench import timing
from megatron_ep_v2.bench.dispatchers import DispatcherSet
from megatron_ep_v2.bench.report import aligned, or_dash
from megatron_ep_v2.bench.rows import Row, spread
from megatron_ep_v2.buffers.contract import RedundantBuffer
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer

# Fields of a row: NAME_us, NAME_p20_us, NAME_p80_us; of one layer and micro-batch.
CALLS = {
    "counts": "counts and their all-gather",
    "plan": "plan",
    "map": "selections to physical ids",
    "prefetch": "weights of replicas",
    "return": "gradients of replicas",
}


def cost_of_calls(
    dispatchers: DispatcherSet, trainer: Trainer, step: Callable[[], object], repeats: int, device: torch.device
) -> Row:
    """Time what a layer with redundant experts does more than one without, each call by itself with the wait for what
    it moves, on the first layer's routing. In a step the weights and gradients move while experts compute. Collective.

    Args:
        dispatchers: Of a variant with replica slots, in force.
        trainer: Of the model.
        step: A step with them.

    Returns:
        Fields of a row: microseconds of each of `CALLS` (see `rows.spread`), for what moves None where nothing is
        planned; "replicas", the slots in use on all ranks.
    """
    layer: Any = trainer.moe_layers[0]
    manager: Any = vars(dispatchers.dispatchers[0])["_comm_manager"]
    seen: list[torch.Tensor] = []
    hook = layer.router.register_forward_hook(lambda *of: seen.append(of[2][0]))  # probabilities [T, E]
    step()
    hook.remove()
    topk_idx = seen[0].detach().topk(layer.config.moe_router_topk, dim=1).indices
    buffer: Any = dispatchers.ours and dispatchers.ours.live
    active, group = dispatchers.settings, manager.group
    ranks, num_experts = group.size(), manager.num_experts
    mine = planner.count(topk_idx, num_experts)
    counts = mine.new_empty(ranks, num_experts)

    def count() -> None:
        dist.all_gather_into_tensor(counts.view(-1), planner.count(topk_idx, num_experts), group=group)

    count()
    limits = manager.num_slots, active.balance_min_rows, active.balance_from_percent
    plan = planner.plan(counts, *limits)
    runs: dict[str, timing.Run] = {
        "counts": count,
        "plan": lambda: planner.plan(counts, *limits),
        "map": lambda: planner.map_selections(topk_idx, plan, group.rank()),
    }
    mapping = plan.experts.to(torch.int32).cpu()
    planned = bool((mapping >= 0).any())
    if planned:
        linears = layer.experts.linear_fc1, layer.experts.linear_fc2
        runs |= moves(buffer, [linear.weight.detach() for linear in linears], mapping)
    kinds = {"each": timing.IN_A_ROW if device.type == "cuda" else 1}
    times = timing.time_runs(runs, repeats, device, kinds, warmup=2)
    row: Row = {"replicas": int((mapping >= 0).sum())}
    for name in CALLS:
        row |= spread(name, times[name]["each"]) if name in times else {f"{name}_us": None}
    return row


def moves(buffer: RedundantBuffer, weights: list[torch.Tensor], mapping: torch.Tensor) -> dict[str, Callable[[], None]]:
    """The transfers of one layer, both linears, each with its wait; gradients are added to memory of their own."""
    slots = buffer.slots()
    grads = [torch.zeros(w.shape, dtype=g.dtype, device=g.device) for w, g in zip(weights, slots.grads, strict=True)]

    def prefetch() -> None:
        slots.holds = None  # of a step: these weights replace them
        buffer.prefetch_weights(slots, weights, mapping).wait()

    def give_back() -> None:
        for transfer in [buffer.reduce_grads(*pair, mapping) for pair in zip(slots.grads, grads, strict=True)]:
            transfer.wait()

    return {"prefetch": prefetch, "return": give_back}


def what_replicas_give(rows: Sequence[Row]) -> str:
    """A table over overloads and numbers of replica slots; the overload from which they pay, and the part of the lost
    time that comes back. "" without rows that have slots.

    Args:
        rows: Of whole steps in one run, with their `overload` (None = the router's own).
    """
    timed = [row for row in rows if "step_ms" in row]
    text = []
    for key in dict.fromkeys(_key(row) for row in timed if row["redundant_experts"]):
        by_slots: dict[int, dict[float | None, Row]] = {}
        for row in timed:
            if _key(row) == key:
                by_slots.setdefault(row["redundant_experts"], {})[row["overload"]] = row
        plain = by_slots.pop(0, {})
        text.append(f"redundant experts, {', '.join(key)}:")
        text += aligned(
            {
                "overload": lambda row: or_dash(row["overload"], "g"),
                "slots": lambda row: str(row["redundant_experts"]),
                "received": lambda row: or_dash(row["received_overload"], ".3f"),
                "replicas": lambda row: or_dash(row.get("replicas"), "d"),
                "MiB": lambda row: f"{row['replica_slots_mib']:.1f}",
                "step ms": lambda row: f"{row['step_ms']:.2f}",
                "/0 slots": functools.partial(_ratio, plain),
                "time back %": functools.partial(_back, plain),
                **{f"{name} us": functools.partial(_call, name) for name in CALLS},
                "": lambda row: "noisy" if row["noise"] else "",
            },
            sorted(
                (row for of in (plain, *by_slots.values()) for row in of.values()),
                key=lambda row: (row["overload"] or 0.0, row["redundant_experts"]),
            ),
        )
        for slots, of in sorted(by_slots.items()):
            text.append(f"  {slots} slot{'s' * (slots > 1)}: {_verdict(plain, of)}")
    return "\n".join(text)


def _key(row: Row) -> tuple[str, str, str]:
    variant = row["variant"].partition("+redundant-")[0]
    return row["shape"], variant, f"{row['expert_backend']} experts"


def _ratio(plain: dict[float | None, Row], row: Row) -> str:
    base = plain.get(row["overload"]) if row["redundant_experts"] else None
    return f"{row['step_ms'] / base['step_ms']:.3f}" if base else "-"


def _back(plain: dict[float | None, Row], row: Row) -> str:
    part = time_back(plain, row)
    return "-" if part is None or not row["redundant_experts"] else f"{100 * part:.0f}"


def _call(name: str, row: Row) -> str:
    return or_dash(row.get(f"{name}_us"), ".0f")


def time_back(plain: dict[float | None, Row], row: Row) -> float | None:
    """The part of the time lost to overload that comes back: (t_x(0) - t_x(R)) / (t_x(0) - t_1(0)), where t_x(R) is a
    step at overload x with R slots.

    Args:
        plain: Rows without slots by overload.

    Returns:
        None where overload 1 was not measured, or nothing was lost.
    """
    even, base = plain.get(1.0), plain.get(row["overload"])
    if even is None or base is None or base is even or base["step_ms"] <= even["step_ms"]:
        return None
    return float((base["step_ms"] - row["step_ms"]) / (base["step_ms"] - even["step_ms"]))


def break_even(plain: dict[float | None, Row], with_slots: dict[float | None, Row]) -> float | None:
    """The overload at which a step with slots takes as long as one without, on a straight line between the measured
    ones; the smallest measured one if they pay there already, infinite if nowhere; None with fewer than two.
    """
    gains = {x: plain[x]["step_ms"] - row["step_ms"] for x, row in with_slots.items() if x is not None and x in plain}
    points = sorted(gains.items())
    if len(points) < 2:
        return None
    if all(gain >= 0 for _, gain in points):
        return points[0][0]
    # From the largest that was measured down to where they stop to pay.
    for (x, gain), (next_x, next_gain) in reversed(list(itertools.pairwise(points))):
        if gain < 0 <= next_gain:
            return x + (next_x - x) * -gain / (next_gain - gain)
        if next_gain < 0:
            break
    return float("inf")


def _verdict(plain: dict[float | None, Row], with_slots: dict[float | None, Row]) -> str:
    limit = break_even(plain, with_slots)
    if limit is None:
        return "two values of --overload say from which they pay"
    measured = sorted(x for x in with_slots if x is not None)
    if limit == float("inf"):
        return f"do not pay at overload {measured[-1]:g}, the largest here"
    if limit == measured[0]:
        return f"pay at each overload here, from {limit:g}"
    return f"pay from an overload of {limit:.2f}, between those measured"
