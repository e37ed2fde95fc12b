"""Layout kernels and their references on the same inputs: in Triton's interpreter on a CPU, and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_ep_v2.kernels import move, places, swiglu
from tests.helpers.compare import same_bits
from tests.helpers.layout_oracle import KINDS, NAN, Routing, routing

Case = tuple[str, Any, Any]  # name, ours, the reference's

SIZES: list[tuple[str, tuple[int, ...]]] = [
    ("place", (256, 16)),
    ("place", (32, 8)),
    ("place", (0, 8)),
    ("place", (333, 1)),
    ("place_masked", (40,)),
    ("place_masked", (3,)),
]
# Rows that fill a tile, that do not, that divide into no tile; K of one and of many.
SHAPES = [(1, 3), (24, 8), (2051, 2)]


def slot_cases(kernels: Any, device: str, seed: int = 0, many: int = 400) -> Iterator[Case]:
    """Every kind of routing, one of several blocks of selections (of `many` rows), and one for a single expert."""
    routings = [(kind, routing(kind, seed=seed)) for kind in KINDS]
    routings += [("many", routing("random", rows=many, topk=7, num_experts=33, seed=seed))]
    routings += [("single", routing("random", topk=1, num_experts=1, seed=seed))]
    for kind, r in routings:
        topk_idx = r.topk_idx.to(device)
        for num_recv in (torch.tensor(r.num_recv, dtype=torch.int32, device=device), None):
            known = topk_idx if num_recv is not None else real(r).to(device)
            for function, sizes in SIZES:
                arguments = (known, num_recv, r.num_experts, *sizes)
                pair = (getattr(kernels, function)(*arguments), getattr(places, function)(*arguments))
                yield f"{function}{sizes} {kind} {num_recv is None}", *pair


def tally_cases(kernels: Any, device: str) -> Iterator[Case]:
    """Numbers that fit and that do not, each with the numbers of the layout before it."""
    for experts, with_most, with_load in itertools.product((1, 5, 33), (True, False), (True, False)):
        pair = [
            (
                torch.zeros(1, dtype=torch.int32, device=device),
                torch.full((1,), 7, dtype=torch.int32, device=device),
                torch.arange(experts, device=device) + (1 << 40),
            )
            for _ in range(2)
        ]
        for rows in (experts + 90, 3):
            counts = torch.arange(experts, dtype=torch.int32, device=device)
            needed = torch.tensor(rows, dtype=torch.int32, device=device)
            for tally, (excess, most, load) in zip((kernels.tally, places.tally), pair, strict=True):
                tally(counts, needed, 64, 9, excess, most if with_most else None, load if with_load else None)
            yield f"tally {experts} {rows} {with_most} {with_load}", *pair


def real(r: Routing) -> torch.Tensor:
    """Selections without the garbage after them."""
    return r.topk_idx[: r.num_recv].contiguous()


def move_cases(
    kernels: Any,
    device: str,
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    only_moved: Sequence[torch.dtype],
) -> Iterator[Case]:
    """All functions for `dtypes`, and the one that moves rows as they are for `only_moved`."""
    for (hidden, topk), dtype in itertools.product(shapes, [*dtypes, *only_moved]):
        r = routing("random", rows=21, topk=topk, num_experts=9)
        found = places.place(r.topk_idx, torch.tensor(r.num_recv, dtype=torch.int32), r.num_experts, 96, 4)
        slots, rows, sources, *_ = [tensor.to(device) for tensor in found]
        name = f"{hidden} {topk} {dtype}"
        generator = torch.Generator().manual_seed(hidden)

        def normal(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        x, y = normal(21, hidden), normal(96, hidden)
        x[r.num_recv :], y[rows < 0] = NAN, NAN
        x, y = x.to(dtype), y.to(dtype)
        weights = normal(21, topk).masked_fill(slots < 0, NAN)
        yield f"gather {name}", kernels.gather(x, rows), move.gather(x, rows)
        if dtype in only_moved:
            continue
        yield f"take {name}", kernels.take(weights, sources), move.take(weights, sources)
        yield f"take back {name}", kernels.take(y[:, 0].contiguous(), slots), move.take(y[:, 0], slots)
        both = (x, weights, rows, sources)
        yield f"gather both {name}", kernels.gather_with_weights(*both), move.gather_with_weights(*both)
        both = (y, y[:, 0].contiguous(), slots)
        yield f"reduce both {name}", kernels.reduce_with_weights(*both), move.reduce_with_weights(*both)
        yield f"reduce {name}", kernels.reduce(y, slots, None), move.reduce(y, slots, None)
        yield f"weighted {name}", kernels.reduce(y, slots, weights), move.reduce(y, slots, weights)
        ours, theirs = kernels.spread(x, y, rows, sources, weights), move.spread(x, y, rows, sources, weights)
        yield f"spread {name}", ours[0], theirs[0]
        # Terms of a dot product in another order: as close as fp32 sums of so many terms are.
        scale = (x.double().nan_to_num().norm(dim=1, keepdim=True) * y.double().nan_to_num().norm(dim=1).max()).clamp(1)
        error = ((ours[1].double() - theirs[1].double()) / scale).abs().max()
        yield f"dots {name}", bool(error < 1e-6) and bool(theirs[1].any()), True


def column_cases(kernels: Any, device: str) -> Iterator[Case]:
    for num_scales in (1, 3, 16, 57):
        r = routing("random", rows=70, topk=4)
        for group, (function, sizes) in ((96, ("place", (96, 4))), (13, ("place_masked", (13,)))):
            count = torch.tensor(r.num_recv, dtype=torch.int32)
            rows = getattr(places, function)(r.topk_idx, count, r.num_experts, *sizes)[1].to(device)
            scales = (torch.randint(1, 255, (70, num_scales), dtype=torch.int32) << 23).view(torch.float32).to(device)
            for pack in (False, True):
                arguments = (scales, rows, group, -(-group // 4) * 4, pack)
                name = f"columns {num_scales} {group} {pack}"
                yield name, kernels.gather_columns(*arguments), move.gather_columns(*arguments)


def swiglu_cases(kernels: Any, device: str, dtypes: Sequence[torch.dtype], columns: Sequence[int]) -> Iterator[Case]:
    """As close as exp and sums in another order are; and zeros, bit by bit, from `used` on, whatever was there."""
    for dtype, width, end in itertools.product(dtypes, columns, (None, 0, 5, 11)):
        generator = torch.Generator().manual_seed(width)
        h = torch.randn(11, 2 * width, generator=generator).to(device)
        probs, grad = torch.rand(11, generator=generator).to(device), torch.randn(11, width, generator=generator)
        grad, used = grad.to(device), None
        if end is not None:
            used = torch.tensor(end, dtype=torch.int32, device=device)
            h[end:], probs[end:], grad[end:] = NAN, NAN, NAN
        h, grad = h.to(dtype), grad.to(dtype)
        most = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        inputs = (h, probs.to(torch.float64 if dtype == torch.float64 else torch.float32), used)
        pairs = [(kernels.forward(*inputs), swiglu.forward(*inputs))]
        pairs += zip(kernels.backward(grad, *inputs), swiglu.backward(grad, *inputs), strict=True)
        for name, (ours, theirs) in zip(("forward", "grad h", "grad probs"), pairs, strict=True):
            same = ours.dtype == theirs.dtype and torch.allclose(ours, theirs, rtol=most, atol=most)
            zero = not ours[end:].any() if end is not None else bool(ours.any())
            yield f"swiglu {name} {dtype} {width} {end}", (same, zero), (True, True)
        rows = h.clone()
        theirs = rows.clone() if end is None else torch.cat([rows[:end], torch.zeros_like(rows[end:])])
        yield f"zero {dtype} {width} {end}", kernels.zero_tail_(rows, used), theirs


def differences(cases: Iterator[Case]) -> list[str]:
    """Names of the cases whose bits differ."""
    return [name for name, ours, theirs in cases if not same_bits(ours, theirs)]
