"""What Megatron-Core needs substituted on a machine without CUDA, and rows in bf16 where the model computes in fp32.

Three modules, placed where Megatron lets a model choose them (layer spec, `MoESubmodules.router`,
`model.rotary_pos_emb`). The flex dispatcher needs nothing; the alltoall dispatcher, which is here to compare with, asks
`torch.cuda` where its two collectives should write and for a stream to copy to the host on.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

from megatron_ep_v2.gradients import Context, InputGrads
from megatron_ep_v2.megatron.standalone import splits_as_lists

ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class CpuRotaryEmbedding(RotaryEmbedding):
    """Megatron's moves its frequencies to the GPU on first use."""

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles [S, 1, 1, D] of positions offset to offset + S."""
        angles = self.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class CpuCoreAttention(torch.nn.Module):
    """Causal attention; Megatron's own takes its work space from the GPU."""

    def __init__(self, *, softmax_scale: float | None = None, **_: object):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
    ) -> torch.Tensor:
        """query [S, B, heads, D], key and value [S, B, groups, D] -> [S, B, heads * D]."""
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)


class CpuRouter(TopKRouter):
    """Megatron's moves its weight to the GPU on first use."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        dtype = ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype))


def send_rows_as(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let the rows that go to experts and come back be of this dtype, and the layers compute in fp32 as before.

    DeepEP carries bf16 and nothing wider; but CPUs without bf16 instructions take nine times as long to multiply it.
    """
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))
            layer.experts.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
            layer.experts.register_forward_hook(lambda _, args, output: (output[0].to(dtype), *output[1:]))
            layer.register_forward_hook(lambda _, args, output: (output[0].float(), *output[1:]))


def substitute_alltoall_dispatcher() -> None:
    """Let `MoEAlltoAllTokenDispatcher` run on host tensors. Doing it twice is harmless."""
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = "none"  # anything but None: the constructor then makes no torch.cuda.Stream
    dispatcher._maybe_dtoh_and_synchronize = splits_as_lists
    token_dispatcher.all_to_all = _all_to_all
    token_dispatcher.gather_from_sequence_parallel_region = _gather_counts


def _gather_counts(counts: torch.Tensor, *, group: dist.ProcessGroup) -> torch.Tensor:
    """[E] of each rank -> [ranks * E]."""
    gathered = counts.new_empty(group.size() * counts.numel())
    dist.all_gather(list(gathered.chunk(group.size())), counts.contiguous(), group=group)
    return gathered


def _all_to_all(
    group: dist.ProcessGroup, rows: torch.Tensor, received: list[int], sent: list[int], use_nccl_stream: bool = False
) -> torch.Tensor:
    """Rows [sum(sent), ...] by destination rank -> rows [sum(received), ...] by source rank."""
    return rows if group.size() == 1 else _AllToAll.apply(rows, received, sent, group)


class _AllToAllContext(Context, Protocol):
    received: list[int]
    sent: list[int]
    group: dist.ProcessGroup


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _AllToAllContext, rows: torch.Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        output = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
        return output

    @staticmethod
    def backward(ctx: _AllToAllContext, grad: torch.Tensor) -> InputGrads:
        return _AllToAll.apply(grad, ctx.sent, ctx.received, ctx.group), None, None, None
