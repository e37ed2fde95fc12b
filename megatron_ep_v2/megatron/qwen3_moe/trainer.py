"""One training step, one evaluation, and what they measured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_ep_v2.balance.planner import overload
from megatron_ep_v2.device_checks import read_all
from megatron_ep_v2.errors import EPError, InputError
from megatron_ep_v2.megatron.expert_load import DISPATCHES, ExpertLoad
from megatron_ep_v2.megatron.experts import EXPERTS
from megatron_ep_v2.megatron.qwen3_moe.model import build_model, named_parameters
from megatron_ep_v2.megatron.qwen3_moe.optimizer import Gradients, Optimizer, OptimizerState, learning_rate
from megatron_ep_v2.megatron.qwen3_moe.options import TrainerOptions
from megatron_ep_v2.megatron.qwen3_moe.step_graph import StepGraph


class DivergedError(EPError):
    """The loss or the gradient is no longer finite. Every rank meets this at the same step."""


@dataclass(frozen=True)
class StepStats:
    """One step, over all ranks.

    Attributes:
        loss: Mean over the tokens of the global batch, in nats. The load-balancing loss is not in it.
        grad_norm: L2 norm of the whole gradient before clipping; dense parameters once, experts of all ranks.
        expert_load: [micro-batches, layers, ranks, experts of a rank] int64, tokens that each expert was sent.
        moved: [micro-batches, layers, ranks] int64, rows that a rank received for replicas less those that it gave
            away.
        stop: Whether any rank was asked to stop.
    """

    loss: float
    grad_norm: float
    expert_load: torch.Tensor
    moved: torch.Tensor
    stop: bool

    @property
    def expert_balance(self) -> float:
        """Busiest expert over the mean, averaged over layers: 1 is even, `num_experts / topk` the worst."""
        load = self.expert_load.sum(dim=0).flatten(1).double()
        return (load.amax(dim=1) / load.mean(dim=1).clamp(min=1.0)).mean().item()

    @property
    def overload(self) -> torch.Tensor:
        """[micro-batches, layers] fp64: rows of the busiest rank over the mean; 1 is even, the number of ranks the
        worst."""
        return overload(self.expert_load.sum(dim=3) + self.moved)


class TrainerState(TypedDict):
    """What goes into a checkpoint."""

    step: int
    optimizer: OptimizerState


class Trainer:
    """The model, its optimiser and its step count on one rank.

    Micro-batches are [micro-batch size, seq_length + 1] int64 on the host; every rank gives the same number of them, of
    the same size.

    Args:
        with_optimizer: Without, no masters and moments take memory, and a step changes no parameter.

    Attributes:
        graph: What replays forward, backward and their reduction in one CUDA graph; None = they run eagerly.
    """

    def __init__(self, options: TrainerOptions, device: torch.device, with_optimizer: bool = True):
        self.options, self.device = options, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model = build_model(options, device, self.rank, self.world)
        parameters = named_parameters(self.model, self.rank, options.shape.num_experts // self.world)
        self._local_experts = options.shape.num_experts // self.world
        self.gradients = Gradients(parameters, device)
        self.gradients.experts.replaced = options.experts in EXPERTS
        self.optimizer = Optimizer(parameters, self.gradients, options.recipe) if with_optimizer else None
        self.step_number = 0
        self._load_shape = (options.shape.num_layers, self.world, self._local_experts)
        self._expert_load = torch.zeros(0, *self._load_shape, device=device)  # as in StepStats; what this rank counts
        self._micro_batch = 0
        self._stop = torch.zeros((), dtype=torch.float64, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph = StepGraph(self.accumulate, device) if options.cuda_graph else None
        self.moe_layers = [module for module in self.model.modules() if isinstance(module, MoELayer)]
        for number, layer in enumerate(self.moe_layers):
            layer.router.register_forward_hook(self._load_counter(number))

    def step(self, micro_batches: Sequence[torch.Tensor], stop: bool = False) -> StepStats:
        """Forward, backward and update. `stop` of any rank comes back to all.

        Raises:
            LayoutOverflowError: Before the update, on every rank: the step can be repeated with more room for rows.
        """
        stats = self.backward(micro_batches, stop)
        if self.optimizer is None:
            read_all()  # which an optimizer's step does
        else:
            self.optimizer.step(learning_rate(self.options.recipe, self.step_number + 1), stats.grad_norm)
        self.step_number += 1
        return stats

    def backward(self, micro_batches: Sequence[torch.Tensor], stop: bool = False) -> StepStats:
        """Leave the gradient of the global batch's mean loss in `named_gradients()`, without an update."""
        for tokens in micro_batches:
            check_token_ids(tokens, self.options.shape.vocab_size)
        self.model.train()
        self._stop.fill_(stop)
        # Megatron's router adds the gradient of each micro-batch's load-balancing loss by itself, at this scale.
        aux_scale = 1.0 / (self.world * len(micro_batches))
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(aux_scale, device=self.device))
        with self._own_stream():
            if self.graph is not None:
                sums = self.graph.run(micro_batches)
            else:
                sums = self.accumulate([tokens.to(self.device, non_blocking=True) for tokens in micro_batches])
        return self._to_stats(sums)

    def accumulate(self, micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Zero the gradients, run all micro-batches forward and backward, and add up over the ranks. The host waits for
        nothing that a layer does not wait for: in sync-free mode a CUDA graph can capture it.

        Args:
            micro_batches: As for `step`, but on the device.

        Returns:
            fp64, over all ranks: loss, gradient norm, ranks that were asked to stop, rows moved and the expert load,
            flat.
        """
        self.gradients.zero()
        self._expert_load = torch.zeros(len(micro_batches), *self._load_shape, dtype=torch.float64, device=self.device)
        moved = torch.zeros(self._expert_load.shape[:3], dtype=torch.float64, device=self.device)
        loads, taken = self._loads(), 0
        for load in loads.values():
            load.clear()  # of what an evaluation has left
        num_tokens = self.world * len(micro_batches) * micro_batches[0][:, 1:].numel()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for self._micro_batch, tokens in enumerate(micro_batches):
            micro_loss = self._token_losses(tokens).sum() / num_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
            done = self._micro_batch + 1
            if done == len(micro_batches) or done - taken == DISPATCHES:
                for number, load in loads.items():
                    moved[taken:done, number, self.rank] = load.moved_by_dispatch(done - taken, self.device).to(moved)
                    counts = load.take_by_dispatch(done - taken, self.device)
                    self._expert_load[taken:done, number, self.rank] = counts.to(self._expert_load)
                taken = done
        self.gradients.reduce()
        head = torch.stack((loss, self.gradients.experts.square_sum(), self._stop))
        sums = torch.cat((head, moved.flatten(), self._expert_load.flatten()))
        dist.all_reduce(sums)  # everything that the ranks have to add up, in one collective
        sums[1] = (self.gradients.dense.square_sum() + sums[1]).sqrt()
        return sums

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """One stream for steps that run eagerly and for those that are captured, in which nothing may run in another.
        Autograd runs the end of each parameter's gradient in the stream of its first backward, as long as something
        keeps that backward's graph, as Megatron's own dispatchers do."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Mean loss in nats over (tokens, weight [micro-batch size]) of all ranks; weight 0 marks a filler.

        Raises:
            LayoutOverflowError: On every rank: as `step`.
        """
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for tokens, weight in micro_batches:
            check_token_ids(tokens, self.options.shape.vocab_size)
            losses = self._token_losses(tokens.to(self.device, non_blocking=True)).double().mean(dim=1)
            sums += torch.stack((losses @ weight.to(losses), weight.sum().to(losses)))
        dist.all_reduce(sums)
        read_all()  # no optimizer steps here, which would do it
        return (sums[0] / sums[1]).item()

    def named_gradients(self) -> dict[str, torch.Tensor]:
        """This rank's fp32 gradients: all dense parameters, and its own experts by their global number. They are of the
        last step that ran through: after one that raised, they are of no step."""
        return self.gradients.by_name

    def num_parameters(self) -> tuple[int, int]:
        """(in the whole model, used by one token)."""
        dense, experts = self.gradients.dense.buffer.numel(), self.gradients.experts.buffer.numel() * self.world
        shape = self.options.shape
        return dense + experts, dense + experts * shape.topk // shape.num_experts

    def state_dict(self) -> TrainerState:
        assert self.optimizer is not None  # without one there is nothing to go on with
        return {"step": self.step_number, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: TrainerState) -> None:
        assert self.optimizer is not None
        self.step_number = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _token_losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, S + 1] token ids on the device -> [B, S] cross-entropy of each next token."""
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        positions = torch.arange(inputs.shape[1], device=self.device).expand_as(inputs)
        return self.model(inputs, positions, attention_mask=None, labels=labels)

    def _to_stats(self, sums: torch.Tensor) -> StepStats:
        """From what `accumulate` has returned. Waits for the device."""
        sums = sums.cpu()
        loss, norm, stops = sums[:3].tolist()
        if not math.isfinite(norm):
            raise DivergedError(
                f"training diverged at step {self.step_number + 1}",
                found=f"loss {loss}, gradient norm {norm}",
                fix="a smaller --lr or a longer --warmup-steps",
            )
        # A micro-batch has one number of rows moved for so many of expert load.
        micro_batches = len(sums[3:]) // (math.prod(self._load_shape) + math.prod(self._load_shape[:2]))
        moved = sums[3 : 3 + micro_batches * math.prod(self._load_shape[:2])].view(-1, *self._load_shape[:2])
        expert_load = sums[3 + moved.numel() :].view(-1, *self._load_shape)
        return StepStats(loss, norm, expert_load.long(), moved.long(), stops > 0)

    def _load_of(self, number: int) -> ExpertLoad | None:
        """What counts the tokens of this rank's experts in a layer, where this package's dispatcher does."""
        return getattr(getattr(self.moe_layers[number].token_dispatcher, "_comm_manager", None), "expert_load", None)

    def _loads(self) -> dict[int, ExpertLoad]:
        """By layer, where this package's dispatcher counts."""
        loads = {number: self._load_of(number) for number in range(len(self.moe_layers))}
        return {number: load for number, load in loads.items() if load is not None}

    def _load_counter(self, number: int) -> Callable[..., None]:
        """For Megatron's own dispatchers: counts what the router says."""

        def count(router: torch.nn.Module, _: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            # With recomputation the first forward runs without gradients; it would count twice.
            if self._load_of(number) is None and router.training and torch.is_grad_enabled():
                counts = output[1].sum(dim=0)  # of the routing map, [tokens, experts] bool
                self._expert_load[self._micro_batch, number] += counts.view(self.world, -1)

        return count


def check_token_ids(tokens: torch.Tensor, vocab_size: int) -> None:
    """Refuse ids that the embedding has no row for.

    Args:
        tokens: Ids, int64, on the host.

    Raises:
        InputError: There is one.
    """
    highest = int(tokens.max())
    if highest >= vocab_size:
        raise InputError(
            "a token id is outside the vocabulary",
            found=f"id {highest}",
            needed=f"less than --vocab-size {vocab_size}",
            fix="--vocab-size as in the tokenizer that wrote the data",
        )
