"""Megatron's token dispatchers without a model, for the bench and the doctor."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import fused_a2a, token_dispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.megatron.symbols import Binding

__all__ = [
    "Dispatcher",
    "begin_again",
    "ensure_global_memory_buffer",
    "fused_a2a",
    "make_dispatchers",
    "model_parallel",
    "on_cpu",
    "sms_field",
    "splits_as_lists",
    "token_dispatcher",
]


class Dispatcher(Protocol):
    """What is called of Megatron's MoETokenDispatcher, in this order around the experts."""

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    def token_dispatch(self, rows: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def dispatch_postprocess(
        self, rows: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
    def combine_preprocess(self, rows: torch.Tensor) -> torch.Tensor: ...
    def token_combine(self, rows: torch.Tensor) -> torch.Tensor: ...
    def combine_postprocess(self, rows: torch.Tensor) -> torch.Tensor: ...
    def set_shared_experts(self, shared_experts: torch.nn.Module) -> None: ...


def make_dispatchers(
    kind: str,
    backend: str,
    count: int,
    group: ProcessGroup,
    alone: ProcessGroup,
    *,
    hidden: int,
    experts: int,
    topk: int,
    dtype: torch.dtype,
    **config: object,
) -> list[Dispatcher]:
    """Build token dispatchers of one layer shape, with Megatron's symbols as they are bound now.

    Args:
        kind: `moe_token_dispatcher_type`: allgather, alltoall or flex.
        backend: `moe_flex_dispatcher_backend`.
        count: Number of dispatchers.
        group: Process group of the experts.
        alone: Process group of this rank alone, for tensor parallelism.
        hidden: H.
        experts: In the whole group.
        topk: K.
        dtype: dtype of the rows.
        **config: More fields of TransformerConfig.

    Raises:
        EPError, ImportError, ValueError, AssertionError: Not available in this environment.
    """
    known = {item.name: item for item in dataclasses.fields(TransformerConfig)}
    backends = typing.get_args(known["moe_flex_dispatcher_backend"].type)
    if kind == "flex" and backend not in backends:
        raise UnavailableError(
            f"this megatron-core has no backend {backend}",
            found=", ".join(backends) or "no list of backends",
            fix="measure it with a Megatron-Core that has it",
        )
    if missing := sorted(set(config) - set(known)):
        raise UnavailableError(
            f"this megatron-core has no {missing[0]}", fix="measure it with a Megatron-Core that has it"
        )
    classes: dict[str, Callable[..., Dispatcher]] = {
        "allgather": token_dispatcher.MoEAllGatherTokenDispatcher,
        "alltoall": token_dispatcher.MoEAlltoAllTokenDispatcher,
        "flex": token_dispatcher.MoEFlexTokenDispatcher,
    }
    values = {
        "num_layers": 1,
        "hidden_size": hidden,
        "num_attention_heads": 8,
        "num_moe_experts": experts,
        "moe_router_topk": topk,
        "moe_token_dispatcher_type": kind,
        "moe_flex_dispatcher_backend": backend,
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": group.size(),
        "use_cpu_initialization": not torch.cuda.is_available(),
        "add_bias_linear": False,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    }
    num_local = experts // group.size()
    local = list(range(group.rank() * num_local, (group.rank() + 1) * num_local))
    groups = ProcessGroupCollection()
    groups.ep = groups.tp_ep = group
    groups.tp = groups.expt_tp = alone
    return [classes[kind](num_local, local, TransformerConfig(**values | config), groups) for _ in range(count)]


def begin_again(shared_experts: torch.nn.Module) -> None:
    """Let Megatron's shared experts run next to communication after a forward that has raised in between: forget how
    far that was (0.19 asks for it at each step of the next one), and its tensors."""
    own = vars(shared_experts)
    own.update({name: None for name in own if name.startswith("cached_")})
    if "_overlap_state" in own:
        own["_overlap_state"] = type(own["_overlap_state"]).IDLE


def sms_field(backend: str) -> str:
    """The field of TransformerConfig with the SM count of one of Megatron's own backends."""
    names = {item.name for item in dataclasses.fields(TransformerConfig)}
    return "moe_flex_dispatcher_num_sms" if "moe_flex_dispatcher_num_sms" in names else f"moe_{backend}_num_sms"


def ensure_global_memory_buffer() -> None:
    """Create the buffer into which the allgather dispatcher receives; Megatron creates it with its parallel state."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


@contextlib.contextmanager
def model_parallel(expert_parallel: int, seed: int) -> Iterator[None]:
    """Megatron's process groups for TP = PP = 1 and its random numbers; nothing of the groups is left afterwards.

    Args:
        expert_parallel: Ranks that share the experts of a layer.
        seed: Of Megatron's CUDA generators.
    """
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel, expert_tensor_parallel_size=1)
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Let Megatron-Core's allgather and alltoall dispatchers run on a machine without CUDA inside the block.

    They take the device of their collectives from torch.cuda (replaced by the CPU), and alltoall copies its counts to
    the host on a CUDA stream (replaced: they are on the host already).
    """
    patches: list[Binding] = [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (
            token_dispatcher.MoEAlltoAllTokenDispatcher,
            "cuda_dtoh_stream",
            "none",
        ),  # not None, so that the constructor creates no stream
        (token_dispatcher.MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", splits_as_lists),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        with torch.compiler.set_stance("force_eager"):  # Megatron compiles small functions; that needs a C++ compiler
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def splits_as_lists(
    self: token_dispatcher.MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: torch.Tensor | None = None
) -> torch.Tensor | None:
    """`MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize` where nothing has to be copied to the host: only the
    split sizes take the form that collectives want."""
    if point == self.cuda_dtoh_point:
        self.input_splits, self.output_splits, self.output_splits_tp = (
            None if splits is None else splits.tolist()
            for splits in (self.input_splits, self.output_splits, self.output_splits_tp)
        )
    return tokens_per_expert
