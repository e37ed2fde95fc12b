"""The MLP of `mlp` on rows of which the last belong to replicas: copies of other ranks' experts, in the buffer's slots.

A dispatch to physical ids brings the rows of this rank's L own experts (masters) first, then those of its R replica
slots. Each linear is two grouped GEMMs, one on each range of rows; the weights are never copied into one stack.

    forward    prefetch begins -> masters' rows -> wait -> replicas' rows
    backward   prefetch, unless the slots still hold this plan; the replicas' weight gradients into their slots; the
               transfer home begins; gradients of the rows; waits; the masters' weight gradient is returned

What comes home is added to the parameter's `main_grad`, or to the gradient that autograd gets, before the latter is
returned. So Megatron's DDP, whose hook runs then, counts the parameter once, with its whole gradient.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from megatron_ep_v2.buffers.contract import Slots, Transfer
from megatron_ep_v2.buffers.redundancy import is_aligned
from megatron_ep_v2.errors import InputError, SettingsError
from megatron_ep_v2.experts.counts import Replicas
from megatron_ep_v2.experts.gemm import Gemm, gemm
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import Linear, WeightedSwiglu, mark_added, overwrites
from megatron_ep_v2.gradients import Context, InputGrads, first_order
from megatron_ep_v2.kernels import swiglu, wgrad
from megatron_ep_v2.kernels.select import kernels_for


class _Fetched:
    """The weights of one layer's replicas in the slots, which all layers share.

    Args:
        replicas: Of the dispatch.
        layer: The linears, compared by identity.
        weights: Of the linears, [L, N, K] each.
    """

    def __init__(self, replicas: Replicas, layer: tuple[Linear[ReplicaRows], ...], weights: tuple[torch.Tensor, ...]):
        self.replicas, self.weights = replicas, weights
        self.slots: Slots = replicas.buffer.slots()
        self._layer = weakref.ref(layer[0])

    def of_run(self, mapping: torch.Tensor) -> _Fetched:
        """The same for the plan that was saved with the rows of a backward; see `Groups.of_run`."""
        if mapping is self.replicas.mapping:
            return self
        other = object.__new__(_Fetched)
        vars(other).update(vars(self), replicas=replace(self.replicas, mapping=mapping))
        return other

    def begin(self) -> None:
        """Begin a prefetch. Collective."""
        self.wait()
        self.slots.holds = None
        self.slots.pending = self.replicas.buffer.prefetch_weights(self.slots, self.weights, self.replicas.mapping)
        self.slots.holds = self._layer, self.replicas.mapping.tolist()

    def begin_again(self) -> None:
        """Begin a prefetch unless the last one was of these weights. The same on all ranks, which have run the same
        layers with the same plans."""
        if self.slots.holds != (self._layer, self.replicas.mapping.tolist()):
            self.begin()

    def wait(self) -> None:
        """Wait for the prefetch that has begun, if any."""
        pending, self.slots.pending = self.slots.pending, None
        if pending is not None:
            pending.wait()

    def return_grads(self, number: int, grads: torch.Tensor) -> Transfer:
        """Begin to add what is in the slots of a linear to its home's [L, N, K]. Collective."""
        return self.replicas.buffer.reduce_grads(self.slots.grads[number], grads, self.replicas.mapping)

    def is_home(self) -> bool:
        """Whether another rank has a replica of one of this rank's experts."""
        local, rank = len(self.weights[0]), self.replicas.buffer.group.rank()
        mapping = self.replicas.mapping
        return bool(((mapping >= 0) & (mapping.div(local, rounding_mode="floor") == rank)).any())


@dataclass(frozen=True)
class ReplicaRows:
    """Rows of masters and of replicas, for one linear.

    Attributes:
        groups: Of all rows [P], L + R groups.
        masters: L groups; num_rows is P, the replicas' rows being unowned here.
        first: The first row of a replica.
        replicas: R groups of rows `first` to P.
        fetched: The replicas' weights.
        number: Of the linear: 0 or 1.
    """

    groups: Groups
    masters: Groups
    first: int
    replicas: Groups
    fetched: _Fetched
    number: int

    @classmethod
    def of(cls, groups: Groups, fetched: _Fetched, number: int) -> ReplicaRows:
        sizes, ends, local = groups.host_sizes, groups.ends, len(fetched.weights[0])
        first = sum(sizes[:local])
        masters = replace(groups, ends=ends[:local], sizes=sizes[:local], used=ends[local - 1])
        replicas = replace(groups, ends=ends[local:] - first, sizes=sizes[local:], num_rows=groups.num_rows - first)
        return cls(groups, masters, first, replicas, fetched, number)

    def of_run(self, ends: torch.Tensor, mapping: torch.Tensor) -> ReplicaRows:
        """The same for what was saved with the rows of a backward; see `Groups.of_run`."""
        groups, fetched = self.groups.of_run(ends), self.fetched.of_run(mapping)
        same = groups is self.groups and fetched is self.fetched
        return self if same else ReplicaRows.of(groups, fetched, self.number)


def run_with_replicas(
    x: torch.Tensor,
    probs: torch.Tensor,
    fc1: Linear[ReplicaRows],
    fc2: Linear[ReplicaRows],
    groups: Groups,
    replicas: Replicas,
    backend: str,
    recompute_activation: bool = False,
) -> torch.Tensor:
    """`mlp.run_experts` on rows of masters and replicas. Collective over the buffer's group: all ranks run it for a
    dispatch with a replica anywhere.

    The weights must be whole when this is called: they are sent to other ranks at once.

    Args:
        x: [P, H], by physical expert: L masters, then R replica slots.
        probs: [P].
        fc1, fc2: Of the masters, [L, 2 * F, H] and [L, H, F].
        groups: Of the rows: L + R, none unowned.
        replicas: Of the dispatch.
        backend: `grouped` or `sequential`.
        recompute_activation: See `mlp.run_experts`.

    Returns:
        [P, H].

    Raises:
        InputError: Rows, weights and groups do not fit; or see `contract.RedundantBuffer`.
        SettingsError: The backend needs padded rows, and these are not.
    """
    w1, w2, number = fc1.weight, fc2.weight, groups.ends.shape[0]
    local = number - replicas.mapping.shape[1]
    fits = x.dim() == 2 and probs.shape == x.shape[:1] and groups.used is None and w2.shape[:2] == (local, x.shape[1])
    if not fits or w1.shape != (local, 2 * w2.shape[2], x.shape[1]):
        raise InputError(
            "these are not the rows and weights of SwiGLU experts with replicas",
            found=f"rows {tuple(x.shape)}, probs {tuple(probs.shape)}, weights {tuple(w1.shape)} and "
            f"{tuple(w2.shape)}, {number} groups with {replicas.mapping.shape[1]} replica slots",
            needed="[P, H], [P], [L, 2 * F, H], [L, H, F], L + R groups of all P rows",
            fix="pass the rows and probabilities of one dispatch, its groups, and this rank's own experts",
        )
    chosen = gemm(backend)
    chosen.check(x, w1)
    chosen.check(x, w2)
    if groups.alignment % chosen.alignment:
        raise SettingsError(
            f"the {backend} experts do not take replicas whose rows are not padded",
            found=f"rows padded to multiples of {groups.alignment}",
            needed=f"a multiple of {chosen.alignment}",
            fix="set MCORE_DEEPEP_V2_EXPERTS=grouped, or sequential",
        )
    rows = ReplicaRows.of(groups, _Fetched(replicas, (fc1, fc2), (w1, w2)), 0)
    rows.fetched.begin()
    replicas.ran = True
    h = fc1(x, rows, chosen, False)
    activated = WeightedSwiglu.apply(h, probs, None)
    return fc2(activated, replace(rows, number=1), chosen, True, (h, probs) if recompute_activation else None)


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    rows: ReplicaRows,
    multiply: Gemm,
    activation: tuple[torch.Tensor, torch.Tensor] | None,
    main_grad: torch.Tensor | None,
) -> torch.Tensor:
    """`mlp.linear` for rows of masters, whose weights are `w`, and of replicas. Without `main_grad`, what other ranks'
    replicas add goes to the parameter's own `main_grad` if it has one of the slots' dtype, and the rest to autograd."""
    return _RedundantLinear.apply(x, w, rows, multiply, main_grad, *(activation or ()))


class _LinearContext(Context, Protocol):
    gemm: Gemm
    parameter: torch.Tensor
    fused: torch.Tensor | None  # main_grad
    rows: ReplicaRows


class _RedundantLinear(torch.autograd.Function):
    """As `mlp._Linear`, without unowned rows."""

    @staticmethod
    def forward(
        ctx: _LinearContext,
        x: torch.Tensor,
        w: torch.Tensor,
        rows: ReplicaRows,
        multiply: Gemm,
        main_grad: torch.Tensor | None,
        *activation: torch.Tensor,
    ) -> torch.Tensor:
        x, fetched = x.contiguous(), rows.fetched
        ctx.save_for_backward(w, rows.groups.ends, fetched.replicas.mapping, *(activation or (x,)))
        ctx.gemm, ctx.parameter, ctx.rows, ctx.fused = multiply, w, rows, main_grad
        y = multiply.forward(x, w, rows.masters)
        fetched.wait()
        if rows.first < len(x):
            weights = fetched.slots.weights[rows.number]
            y[rows.first :] = multiply.forward(x[rows.first :], weights, rows.replicas)
        return y

    @staticmethod
    @first_order()
    def backward(ctx: _LinearContext, grad: torch.Tensor) -> InputGrads:
        w, ends, mapping, *kept = ctx.saved_tensors
        rows = ctx.rows.of_run(ends, mapping)
        fetched, first = rows.fetched, rows.first
        grad, grad_x, grad_w = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            fetched.begin_again()
        home = None
        try:
            if ctx.needs_input_grad[1]:
                x = kept[0] if len(kept) == 1 else kernels_for(grad, swiglu, "experts").forward(*kept, None)
                slot_grads = fetched.slots.grads[rows.number]
                wgrad.add_(slot_grads, grad[first:], x[first:], rows.replicas.ends, overwrite=True)
                if ctx.fused is not None:  # before the transfer, which adds to the same numbers
                    wgrad.add_(ctx.fused, grad, x, rows.masters.ends, overwrites(ctx.parameter))
                home = _Home(fetched, rows.number, ctx.parameter, ctx.fused is not None)
                if ctx.fused is None:
                    grad_w = ctx.gemm.wgrad(grad, x, rows.masters)
            if ctx.needs_input_grad[0]:
                grad_x = ctx.gemm.dgrad(grad, w, rows.masters)
                fetched.wait()
                if first < len(grad):
                    weights = fetched.slots.weights[rows.number]
                    grad_x[first:] = ctx.gemm.dgrad(grad[first:], weights, rows.replicas)
        finally:
            if home is not None:
                home.wait()  # after an error, too: else it adds to gradients that are zeroed for the next step
        if home is not None:
            grad_w = home.add_to(grad_w)
            if ctx.fused is not None:
                grad_w = mark_added(ctx.parameter)
        return (
            grad_x,  # x
            grad_w,  # w
            *[None] * 3,  # rows, multiply, main_grad
            *[None] * (len(kept) if len(kept) > 1 else 0),  # activation: its gradient flows through x
        )


class _Home:
    """Gradients of replicas on their way to their masters' gradient; begins the transfer.

    Args:
        fetched: Of the layer.
        number: Of the linear.
        parameter: Its weight [L, N, K].
        fused: The masters' gradient is in `main_grad` already.
    """

    def __init__(self, fetched: _Fetched, number: int, parameter: torch.Tensor, fused: bool):
        slot_grads, self._is_home = fetched.slots.grads[number], fetched.is_home()
        main_grad: torch.Tensor | None = getattr(parameter, "main_grad", None)
        if main_grad is not None and not fused and overwrites(parameter):
            main_grad = None  # the hook that replaces it next would lose what is added now
        self._fused_into = main_grad if fused else None
        self._apart: torch.Tensor | None = None  # what arrives, if not added to main_grad
        # Megatron's DDP aligns gradients for its distributed optimizer alone.
        fits = main_grad is not None and main_grad.dtype == slot_grads.dtype and main_grad.is_contiguous()
        if main_grad is not None and fits and is_aligned(main_grad):
            target = main_grad.view(parameter.shape)
        else:
            make = torch.zeros if self._is_home else torch.empty  # nothing arrives on other ranks
            target = self._apart = make(parameter.shape, dtype=slot_grads.dtype, device=slot_grads.device)
        self._transfer = fetched.return_grads(number, target)

    def wait(self) -> None:
        """Wait for the transfer."""
        self._transfer.wait()

    def add_to(self, grad: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient for autograd, with what has arrived if that is not in `main_grad`. After `wait`."""
        if self._apart is None or not self._is_home:
            return grad
        if self._fused_into is not None:
            self._fused_into.add_(self._apart)
            return grad
        assert grad is not None
        return self._apart.add_(grad).to(grad.dtype)
