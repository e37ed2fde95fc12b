"""Stacked experts in Megatron's distributed checkpoints.

Weights, and optimizer state in formats with one entry per parameter (`fully_reshardable`, and that of optimizers which
are not distributed), are saved expert by expert under the keys and shapes of Megatron's own experts, so each kind reads
the other's, across expert-parallel sizes.

`dp_reshardable`, Megatron's default, saves the optimizer's buffers as they lie in memory, by number. There, stacked
experts are one range in ascending order and Megatron's are many, in descending order. The sizes are equal, so a mix-up
would raise nothing. So buffers with stacked experts get other keys, and loading one kind into the other raises.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ep_v2.errors import SettingsError

R = TypeVar("R")
Offset: TypeAlias = tuple[int, int, int]  # axis, position on it, positions

_RAW = "dp_reshardable"
_RAW_WHOLE = "dp_zero_gather_scatter"  # the same in one piece; an old format that Megatron still supports
_BUCKET = ".gbuf_idx_"  # in the key of a raw buffer (megatron/core/optimizer/distrib_optimizer.py)
_STACKED = ".stacked_experts"  # inserted before _BUCKET if the buffer holds stacked experts
_REMEDY = (
    "load it with the kind of experts that wrote it, save with --dist-ckpt-optim-fully-reshardable, and load that; "
    "or load weights alone (--no-load-optim)"
)


@dataclass(frozen=True, kw_only=True)
class ExpertShards:
    """Position of a rank's experts among all experts, and their keys in the checkpoint.

    Attributes:
        first: Global number of this rank's first expert.
        local: Experts of this rank.
        number: Experts of all ranks.
        offsets: Megatron's offsets of the axes before the expert axis.
        by_name: Each expert has its own key, with separate keys for gate and up (Megatron's `singleton_local_shards`);
            else all are one tensor with an expert axis.
    """

    first: int
    local: int
    number: int
    offsets: tuple[Offset, ...]
    by_name: bool

    def factory(
        self, prefix: str, name: str, weight: torch.Tensor, replica_id: tuple[int, int, int]
    ) -> ShardedTensorFactory:
        """Factory with which Megatron splits a stacked weight into shards on save and merges them on load; also for the
        weight's optimizer state, whose keys begin with `optimizer.state.exp_avg.` and the like.

        Args:
            prefix: Key prefix of the experts' module.
            name: `linear_fc1` or `linear_fc2`.
            weight: [L, out, in].
            replica_id: (pipeline, tensor, expert data parallel); the replica of zeros writes.
        """
        halves = ("_w", "_v") if self.by_name and name == "linear_fc1" else ("",)

        # Megatron changes the key after this: it removes the layer's number, and prepends an optimizer's name.
        def build(
            key: str, stacked: torch.Tensor, replica: tuple[int, ...], flattened_range: slice | None
        ) -> list[ShardedTensor]:
            if flattened_range is not None:
                raise SettingsError(
                    "stacked experts cannot be saved or loaded in flattened pieces",
                    found="an optimizer state in the format fully_sharded_model_space",
                    fix="--dist-ckpt-optim-fully-reshardable to save; --no-load-optim to load an older checkpoint",
                )
            before = key.removesuffix(f"{name}.weight")
            return [
                self._shard(self._key(before, f"{name}.weight{half}", i), i, part, replica)
                for i, expert in enumerate(stacked.unbind())
                for half, part in zip(halves, expert.chunk(len(halves)), strict=True)
            ]

        def merge(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(parts).view(weight.shape)

        return ShardedTensorFactory(f"{prefix}experts.{name}.weight", weight, build, merge, replica_id)

    def extra_states(self, prefix: str, name: str, replica_id: tuple[int, int, int]) -> dict[str, ShardedObject]:
        """The extra state that Megatron's linears save next to each expert's weight, which a strict load requires:
        TransformerEngine's FP8 state, here an empty tensor as in a model without FP8. Loading drops it."""
        return {
            f"{prefix}{name}._extra_state{i or ''}": make_sharded_object_for_checkpoint(
                torch.empty(0, dtype=torch.uint8, device="cpu"),
                self._key(f"{prefix}experts.", f"{name}._extra_state", i),
                self._axes(i),
                replica_id,
            )
            for i in range(self.local)
        }

    def _key(self, before: str, name: str, local_expert: int) -> str:
        return f"{before}{self.first + local_expert}.{name}" if self.by_name else f"{before}{name}"

    def _axes(self, local_expert: int) -> tuple[Offset, ...]:
        """Megatron's offsets, with the expert axis if there is one."""
        if self.by_name:
            return self.offsets
        return (*self.offsets, (len(self.offsets), self.first + local_expert, self.number))

    def _shard(self, key: str, local_expert: int, part: torch.Tensor, replica_id: tuple[int, ...]) -> ShardedTensor:
        axes = self._axes(local_expert)
        return ShardedTensor.from_rank_offsets(key, part, *axes, replica_id=replica_id, prepend_axis_num=len(axes))


def drop_extra_states(_module: torch.nn.Module, state: dict[str, object], prefix: str, *_: object) -> None:
    """Drop the extra states before a StackedLinear loads, which has none."""
    for name in [name for name in state if name.startswith(f"{prefix}_extra_state")]:
        del state[name]


# ------------------------------------------------------------------------------------- buffers that are saved by number


def check_format(metadata: Mapping[str, object]) -> None:
    """Check that a checkpoint's format supports stacked experts.

    Args:
        metadata: Megatron's, of the checkpoint that is saved or loaded.

    Raises:
        SettingsError: The optimizer's buffers are saved by number, and could be mistaken for those of Megatron's
            experts.
    """
    if metadata.get("distrib_optim_sharding_type") == _RAW_WHOLE:
        _refuse_whole_buffers()
    marked = hasattr(DistributedOptimizer.sharded_param_state_dp_reshardable, "marks_stacked_experts")
    if metadata.get("distrib_optim_sharding_type") == _RAW and not marked:
        raise SettingsError(
            "an optimizer state that is saved by number is indistinguishable from that of Megatron's experts",
            found=f"the format {_RAW}, and stacked experts in a layer spec without install()",
            fix="call megatron_ep_v2.install() before the model is built, or add --dist-ckpt-optim-fully-reshardable",
        )


def mark_buffers(
    sharded_param_state_dp_reshardable: Callable[..., dict[int, object]],
) -> Callable[..., dict[int, object]]:
    """Wrap DistributedOptimizer's method, which returns the state of each buffer by its number, to use other keys for
    buffers with stacked experts."""

    @functools.wraps(sharded_param_state_dp_reshardable)
    def marked(self: DistributedOptimizer, *args: object, **kwargs: object) -> dict[int, object]:
        state = sharded_param_state_dp_reshardable(self, *args, **kwargs)

        def rename(value: object) -> object:
            if isinstance(value, ShardedTensor) and _BUCKET in value.key:
                return dataclasses.replace(value, key=value.key.replace(_BUCKET, _STACKED + _BUCKET))
            return value

        for number, buffer in enumerate(self.buffers):
            if _holds_stacked_experts(buffer):
                dict_list_map_inplace(rename, state[number])
        return state

    marked.marks_stacked_experts = True  # type: ignore[attr-defined]
    return marked


def refuse_whole_buffers(sharded_param_state_dp_zero: Callable[..., R]) -> Callable[..., R]:
    """Wrap DistributedOptimizer's method, which saves and loads whole buffers as they lie in memory, to raise for
    buffers with stacked experts."""

    @functools.wraps(sharded_param_state_dp_zero)
    def refusing(self: DistributedOptimizer, *args: object, **kwargs: object) -> R:
        if any(_holds_stacked_experts(buffer) for buffer in self.buffers):
            _refuse_whole_buffers()
        return sharded_param_state_dp_zero(self, *args, **kwargs)

    return refusing


def _refuse_whole_buffers() -> None:
    raise SettingsError(
        "an optimizer state of whole buffers would mix up stacked experts and Megatron's",
        found=f"the format {_RAW_WHOLE}",
        needed="a format with one entry per parameter",
        fix="--dist-ckpt-optim-fully-reshardable to save; --no-load-optim to load an older checkpoint",
    )


class _ParamBuffer(Protocol):
    """What is read of Megatron's buffers of parameters and gradients."""

    params: Iterable[torch.nn.Parameter]


def _holds_stacked_experts(buffer: _ParamBuffer) -> bool:
    return any(getattr(parameter, "stacked_experts", False) for parameter in buffer.params)


def explain_load(load: Callable[..., R]) -> Callable[..., R]:
    """Wrap `dist_checkpointing.load` to explain a failure caused by a checkpoint from another kind of experts."""

    @functools.wraps(load)
    def explained(
        sharded_state_dict: dict[str, object], checkpoint_dir: str | Path, *args: object, **kwargs: object
    ) -> R:
        wanted = _raw_keys(value.key for value in nested_values(sharded_state_dict) if hasattr(value, "key"))
        try:
            return load(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        except BaseException as error:  # torch's CheckpointException is not an Exception
            if wanted and not isinstance(error, KeyboardInterrupt | SystemExit):
                _raise_if_other_kind(wanted, checkpoint_dir, error)
            raise

    return explained


def _raise_if_other_kind(wanted: set[str], checkpoint_dir: str | Path, error: BaseException) -> None:
    try:  # Megatron's own reader fails with a newer torch (megatron-core 0.19.2 with torch 2.15)
        written = _raw_keys(FileSystemReader(str(checkpoint_dir)).read_metadata().state_dict_metadata)
    # An unreadable checkpoint is the cause of the failed load; the caller raises that error.
    except (OSError, EOFError, AttributeError, ImportError, pickle.UnpicklingError, CheckpointException):
        return
    missing = {
        key for key in wanted - written if key.replace(_STACKED, "") in {k.replace(_STACKED, "") for k in written}
    }
    if not missing:
        return
    kinds = "stacked experts", "Megatron's own experts"
    ours, theirs = kinds if _STACKED in min(missing) else kinds[::-1]
    raise SettingsError(
        "the optimizer state in this checkpoint belongs to another kind of experts",
        found=f"{checkpoint_dir}, saved with {theirs} in the format {_RAW}, which keeps buffers by number",
        needed=f"one that was saved with {ours} in that format, or any in a format with one entry per parameter",
        fix=_REMEDY,
    ) from error


def _raw_keys(keys: Iterable[str]) -> set[str]:
    return {key for key in keys if _BUCKET in key}
