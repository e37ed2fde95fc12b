"""The communication managers of Megatron-Core's flex dispatcher.

With the compact layout Megatron's own manager does the work. With the expanded layout rows arrive sorted by local
expert with their probabilities, and combine sums them, so Megatron's steps between dispatch and experts (indices to
multihot, permute, `.item()`, unpermute) are not needed. Everything else is inherited, and so are the attribute names
that other Megatron code reads (`token_probs`, `dispatched_probs`, `handle`); after the combine they are None.
"""

from __future__ import annotations

import functools
import logging
import math
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from megatron_ep_v2 import recompute, settings, streams
from megatron_ep_v2.buffers import capacity, pool
from megatron_ep_v2.errors import ClosedError, SettingsError
from megatron_ep_v2.experts.counts import CountsOnDevice, RowInfo, attach, row_info
from megatron_ep_v2.fused_a2a import fused_dispatch, set_deepep_num_sms
from megatron_ep_v2.gradients import order
from megatron_ep_v2.kernels.topk import top_k
from megatron_ep_v2.megatron.copies import deepcopy_sharing_groups, refuse_to_pickle_groups, shallow_copy
from megatron_ep_v2.megatron.expert_load import ExpertLoad
from megatron_ep_v2.megatron.overlap import PLAN, SHARED, WGRAD, say_overlap
from megatron_ep_v2.megatron.symbols import MANAGER
from megatron_ep_v2.started_a2a import (
    StartedCombine,
    StartedDispatch,
    finish_dispatch,
    start_combine,
    start_dispatch,
)
from megatron_ep_v2.sync_free import sync_free_combine, sync_free_dispatch
from megatron_ep_v2.wire.formats import dtype_of_recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Installed:
    """Layout and experts that layers are built for; each `install()` makes a new object.

    Attributes:
        layout: compact, expanded or sync-free.
        experts: The setting `experts`.
        redundant_experts: The setting of that name.
    """

    layout: str
    experts: str
    redundant_experts: int = 0

    def __str__(self) -> str:
        replicas = f", redundant_experts={self.redundant_experts}" if self.redundant_experts else ""
        return f"layout={self.layout}, experts={self.experts}{replicas}"


# Bound by `install()` together with Megatron's symbols, so that rebinding those (`binding.bound`) rebinds it too.
installed: Installed | None = None

managers: weakref.WeakSet[CompactManager] = weakref.WeakSet()  # of the layers that are alive


@functools.cache
def _warn_of_half_precision(dtype: torch.dtype) -> None:
    """Warn once per dtype."""
    logger.warning("router probabilities are %s; set --moe-router-dtype fp32", dtype)


def follow_deterministic_mode(config: TransformerConfig, group: ProcessGroup) -> None:
    """Turn on the setting `deterministic` under Megatron's --deterministic-mode, unless the user has set it.

    Args:
        config: Megatron's TransformerConfig.
        group: Process group of the experts.

    Raises:
        SettingsError: The group already has a buffer that is not deterministic.
    """
    if not config.deterministic_mode or settings.active().deterministic:
        return
    if settings.active().source("deterministic") == "default" and pool.find(group):
        raise SettingsError(
            "Megatron's deterministic mode comes too late: a buffer was built without it",
            found=f"deterministic={settings.active().describe()['deterministic']}, and the group's buffer in use",
            needed="one value for all models of a group",
            fix="build the deterministic model first, or set MCORE_DEEPEP_V2_DETERMINISTIC=1 for the whole job",
        )
    settings.offer("deterministic", True, "Megatron's --deterministic-mode")


def num_sms_of(config: TransformerConfig) -> int | None:
    """The SM count that Megatron's configuration has for the backend deepep; None = it has none.

    Up to 0.18 each backend has a field of its own. From 0.19 on `moe_flex_dispatcher_num_sms` is for all of them, and
    Megatron copies the old fields into it, `moe_hybridep_num_sms`, too, which Megatron-Bridge's recipes set for every
    backend. A count that is there by that copy alone is HybridEP's.
    """
    own: int | None = getattr(config, "moe_deepep_num_sms", None)
    of_all: int | None = getattr(config, "moe_flex_dispatcher_num_sms", None)
    if of_all is None:
        return own
    copied = own is None and of_all == getattr(config, "moe_hybridep_num_sms", None)
    return None if copied else of_all


def refuse_capture() -> None:
    """Raise before a dispatch that waits on the host, in which CUDA would say only that the capture is invalid."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise SettingsError(
            "this MoE layer waits on the host for the number of its rows, which a CUDA graph cannot capture",
            found=f"a capture; {installed}",
            needed="sync_free, in which no shape depends on what has arrived; or a graph without the MoE layer",
            fix="set MCORE_DEEPEP_V2_SYNC_FREE=1 and MCORE_DEEPEP_V2_EXPERTS=grouped before the model is built, or "
            "leave the dispatch out of Megatron's graphs: --cuda-graph-impl transformer_engine for attn, moe_router "
            "and moe_preprocess",
        )


MegatronsManager: Any = getattr(token_dispatcher, MANAGER)


class CompactManager(MegatronsManager):  # type: ignore[misc]
    """Megatron's manager. Also passes Megatron's configuration to the settings, counts the expert load, and checks that
    the layout and experts that it was built for are still installed.

    Attributes:
        expert_load: Tokens that this rank's experts received in this layer.
        starts: False: calls wait, as where the buffer cannot start one. For comparisons.
    """

    starts = True
    token_probs: torch.Tensor
    tokens_per_expert: torch.Tensor
    handle: Any  # of the buffer, or of `sync_free`; None after the combine

    def __init__(self, *args: object, **kwargs: object):
        before = settings.active()
        super().__init__(*args, **kwargs)
        settings.activate(before)  # it has offered the configuration's SM count, which may be another backend's
        self._follow_config()
        self._built_for = installed
        self.expert_load = ExpertLoad(self.group, self.num_local_experts)
        capacity.note_model(self.group, self.config)
        managers.add(self)

    __reduce_ex__ = refuse_to_pickle_groups
    __copy__ = shallow_copy

    def __deepcopy__(self, memo: dict[int, object]) -> CompactManager:
        """Copy for a copy of the layer, on the same group and so the same buffer."""
        copied = deepcopy_sharing_groups(self, memo)
        managers.add(copied)
        return copied

    def setup_metadata(self, routing_map: torch.Tensor, probs: torch.Tensor) -> None:
        """Find the selections of each token, in any order: dispatch or Megatron's permutation sorts rows by expert.

        A selection of probability 0 adds nothing to output or gradients and becomes -1: padding tokens that were
        removed from the routing map, tokens that the capacity factor dropped, and experts that a replayed routing names
        twice are neither sent nor counted.

        Args:
            routing_map: [T, ...] bool over the group's experts; unused, because the probabilities imply it.
            probs: [T, ...], dense over the group's experts.

        Sets `token_probs` [T, K] and `token_indices` [T, K] int64, -1 where the probability is 0.
        """
        if probs.dim() != 2:
            probs = probs.reshape(len(probs), self.num_experts)
        self.token_probs, self.token_indices = top_k(probs, self.router_topk)

    def dispatch(
        self, hidden_states: torch.Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> torch.Tensor:
        """Dispatch as Megatron's manager does.

        Raises:
            ClosedError: After `uninstall()`.
            SettingsError: Another layout, or other experts, are installed now than when this layer was built; or a
                CUDA graph captures this layer.
            EPError: See `fused_dispatch`.
        """
        self._check_installed()
        refuse_capture()
        if overlap := self._overlap():
            say_overlap(overlap, "the layout is compact")
        rows: torch.Tensor = super().dispatch(hidden_states, async_finish, allocate_on_comm_stream)
        self.expert_load.add(self.tokens_per_expert)
        return rows

    def combine(
        self, hidden_states: torch.Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> torch.Tensor:
        """Combine as Megatron's manager does. Raises as `dispatch`."""
        self._check_installed()
        combined: torch.Tensor = super().combine(hidden_states, async_finish, allocate_on_comm_stream)
        return combined

    def _overlap(self) -> str | None:
        """Megatron's option by which something can run next to this dispatch or its backward; None = there is none."""
        if not self.starts:
            return None
        return next((option for option in (PLAN, SHARED, WGRAD) if getattr(self.config, option, False)), None)

    def _check_installed(self) -> None:
        """Check that the installation has not changed. Cheap, because it runs before every dispatch and combine. All
        ranks have called the same `install()`, so all of them raise."""
        if installed is not self._built_for:
            self._continue_on(installed)

    def _follow_config(self) -> None:
        """Pass the values of Megatron's configuration to the settings in force: when the layer is built, and when it
        continues after another `install()`."""
        if num_sms := num_sms_of(self.config):
            set_deepep_num_sms(num_sms)
        follow_deterministic_mode(self.config, self.group)

    def _continue_on(self, now: Installed | None) -> None:
        """Continue after another `install()`, if it has the same layout and experts."""
        if now is None:
            raise ClosedError(
                "this MoE layer was built on megatron_ep_v2, which is not installed any more",
                found=f"built for {self._built_for}; installed: Megatron's own dispatcher, as after uninstall()",
                needed="the layout and experts that it was built for",
                fix="call install() again with the previous settings, or build the model again",
            )
        if now != self._built_for:
            raise SettingsError(
                "this MoE layer was built for something else than what is installed now",
                found=f"built for {self._built_for}; installed: {now}",
                needed="one layout and one kind of experts from when the model is built",
                fix="call install() once, before the model is built; or build the model again",
            )
        self._follow_config()
        self._built_for = now


def _before_the_end(token: torch.Tensor) -> torch.Tensor:
    """The token of a started dispatch, with a node of its own. Megatron (`SharedExpertMLP.linear_fc1_forward_and_act`)
    gives the shared expert's backward the number before that node's, which is higher than that of the node at which the
    communication ends."""
    seen = token.view_as(token)
    if token.grad_fn is not None:
        order(seen, token.grad_fn._sequence_nr() + 2)
    return seen


class ExpandedManager(CompactManager):
    """Megatron's manager without a permutation: the dispatch sorts rows by expert.

    Where the buffer can, calls are only started (`started_a2a`), and finished when their rows are wanted:

    - With a shared expert next to the communication (`moe_shared_expert_overlap`): dispatch and combine, forward and
      backward. Megatron launches the shared expert in between, and these experts' weight gradients run there, too.
    - In Megatron's 1F1B plan (`overlap_moe_expert_parallel_comm`): the dispatch, until the node of the experts. The
      host launches the other micro-batch's work before it waits for the counts.
    - With `overlap_dispatch_backward_with_experts_wgrad`: the dispatch, for its backward, next to which these experts'
      weight gradients run.
    """

    _started: StartedDispatch | None = None
    _combining: StartedCombine | None = None

    def dispatch(
        self, hidden_states: torch.Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> torch.Tensor:
        """Send [T, H]; receive [P, H] sorted by local expert.

        Sets `dispatched_probs` [P] fp32, `tokens_per_expert` [L] int64 on the CPU, and `handle` for the combine. A
        dispatch that is only started returns a tensor without elements, and `dispatched_probs` is one; what it should
        have set is set by `get_permuted_hidden_states_by_experts`.

        Raises:
            EPError: See `CompactManager.dispatch`.
        """
        self._check_installed()
        refuse_capture()
        self.token_probs, self._alignment = self._probs_in_fp32(), self._expert_alignment()
        self._started = self._combining = None  # of a forward that has raised in between
        selections, num_experts = self._selections(hidden_states)
        if self._in_plan():
            streams.record([selections])  # of the compute stream; DeepEP 2.5 reads them again in the last backward
        overlap = self._overlap()
        if overlap:
            self._started = started = start_dispatch(
                hidden_states,
                selections,
                self.token_probs,
                num_experts,
                self.group,
                expert_alignment=self._alignment,
                keep_indices=self._keeps_indices(),
                next_to_experts=overlap != PLAN,
            )
            say_overlap(overlap, self._why_not_started() if started is None else None)
            if started is not None:
                self.dispatched_probs = started.probs_token
                return _before_the_end(started.token)
        hidden_states, _, self.dispatched_probs, tokens_per_expert, self.handle = fused_dispatch(
            hidden_states,
            selections,
            self.token_probs,
            num_experts,
            self.group,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
            do_expand=True,
            expert_alignment=self._alignment,
            keep_indices=self._keeps_indices(),
        )
        assert tokens_per_expert is not None  # known, because this dispatch waits
        self._count(tokens_per_expert)
        return hidden_states

    def _in_plan(self) -> bool:
        """Whether Megatron's 1F1B plan runs this layer: dispatch and combine on one stream, the experts on another."""
        return bool(getattr(self.config, PLAN, False))

    def _keeps_indices(self) -> bool:
        """Whether `token_indices` have not changed when the backward has run. `setup_metadata` makes them for one
        forward; but those that a CUDA graph of the preprocessing has returned are in memory that Megatron 0.19 leaves
        to the graphs after it (`make_weakref`, in `--cuda-graph-impl local`)."""
        return getattr(self.config, "cuda_graph_impl", "none") in ("none", "full_iteration")

    def _selections(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
        """What is dispatched: [T, K] int64 expert ids, and how many experts they are of."""
        return self.token_indices, self.num_experts

    def _why_not_started(self) -> str:
        return "the layer is recomputed" if recompute.in_checkpoint() else "this buffer cannot start a call"

    def _count(self, tokens_per_expert: torch.Tensor) -> None:
        """Set `tokens_per_expert`, from the counts of a dispatch that is there, with `handle`."""
        self.tokens_per_expert = tokens_per_expert
        unpadded = self.handle.num_unaligned_recv_tokens_per_expert  # on the device
        self.expert_load.add(tokens_per_expert if self._alignment == 1 or unpadded is None else unpadded)

    def combine(
        self, hidden_states: torch.Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> torch.Tensor:
        """Send [P, H] back; receive [T, H], or a tensor without elements if the combine is only started:
        `take_combine` then has it."""
        if self._overlap() == SHARED:
            self._check_installed()
            assert self.handle is not None  # of the dispatch
            self._combining = started = start_combine(hidden_states, self.group, self.handle)
            if started is not None:
                self._forget()
                return started.token
        combined: torch.Tensor = super().combine(hidden_states, async_finish, allocate_on_comm_stream)
        self._forget()
        return combined

    def take_combine(self) -> StartedCombine | None:
        """The combine that was started and is to be finished."""
        started, self._combining = self._combining, None
        return started

    def _forget(self) -> None:
        """Drop the tensors after the combine. Else this step's autograd graph lives until the next step, whose nodes
        may run in another stream: an error if the next step is captured into a CUDA graph. And what the counts carry
        would be copied with a copy of the layer, replicas with their buffer."""
        self.handle = self.token_probs = self.token_indices = None  # type: ignore[assignment]
        self.dispatched_probs = self.tokens_per_expert = None  # type: ignore[assignment]

    def get_permuted_hidden_states_by_experts(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows unchanged, once they are there, and their probabilities in the router's dtype."""
        started, self._started = self._started, None
        if started is not None:
            hidden_states, self.dispatched_probs, counts, self.handle = finish_dispatch(
                started, hidden_states, self.dispatched_probs
            )
            self._count(counts)
            if started.next_to_experts and hidden_states.grad_fn is not None:
                info = replace(row_info(self.tokens_per_expert), rows_node=hidden_states.grad_fn._sequence_nr())
                attach(self.tokens_per_expert, info)
        elif self._in_plan():
            # Of the communication stream, where the next dispatch may be given the memory of `ends` before the experts'
            # backward has read them. Delayed weight gradients read the rows after the plan has dropped them.
            info = row_info(self.tokens_per_expert)
            streams.record([hidden_states, self.dispatched_probs, self.tokens_per_expert, info.ends])
        probs = self.dispatched_probs
        return hidden_states, probs.double() if self.router_dtype == "fp64" else probs

    def get_restored_hidden_states_by_experts(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the rows unchanged."""
        return hidden_states

    def _follow_config(self) -> None:
        super()._follow_config()
        settings.settle_dispatch_dtypes(*dtype_of_recipe(self.config))

    def _probs_in_fp32(self) -> torch.Tensor:
        if self.token_probs.dtype in (torch.bfloat16, torch.float16):
            _warn_of_half_precision(self.token_probs.dtype)
        return self.token_probs.float()

    def _expert_alignment(self) -> int:
        """Least common multiple of Megatron's alignment and the setting `expert_alignment`. Megatron's counts if fp8,
        fp4 or the padding option needs it, or if its experts leave padding to the dispatcher (grouped tensors,
        main)."""
        config = self.config
        wants_padding = config.fp8 or getattr(config, "fp4", None) or config.moe_router_padding_for_quantization
        if not wants_padding and (padded_before := getattr(moe_utils, "skip_routed_expert_padding", None)):
            wants_padding = padded_before(config)
        of_megatron = int(token_dispatcher.get_align_size_for_quantization(config)) if wants_padding else 1
        return math.lcm(of_megatron or 1, settings.active().expert_alignment or 1)


# ------------------------------------------------------------------------------------------- without a wait on the host


class SyncFreeManager(ExpandedManager):
    """Megatron's manager on `sync_free`: expanded rows, with `tokens_per_expert` on the device. Experts that need it as
    a list (TEGroupedMLP, SequentialMLP) would wait for it; those of `megatron_ep_v2.experts` do not.

    Megatron's stream arguments are ignored; `fused_a2a` explains why.
    """

    def dispatch(
        self, hidden_states: torch.Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> torch.Tensor:
        """Send [T, H]; receive [M, H] sorted by local expert, zero on padding.

        Sets `dispatched_probs` [M] fp32, `tokens_per_expert` [L] int32 on the device, and `handle` for the combine.

        Raises:
            EPError: See `CompactManager.dispatch` and `sync_free_dispatch`.
        """
        self._check_installed()
        if overlap := self._overlap():
            say_overlap(overlap, "the host does not wait in sync-free mode", waits=False)
        self.token_probs = self._probs_in_fp32()
        if self._in_plan():
            streams.record([self.token_indices])  # as in the expanded layout
        hidden_states, self.dispatched_probs, counts, self.handle = sync_free_dispatch(
            hidden_states,
            self.token_indices,
            self.token_probs,
            self.num_experts,
            self.group,
            expert_alignment=self._expert_alignment(),
            keep_indices=self._keeps_indices(),
            load_on=self.expert_load.load_on,
        )
        self.tokens_per_expert, places = counts.as_subclass(CountsOnDevice), self.handle.places
        attach(self.tokens_per_expert, RowInfo(alignment=places.alignment, ends=places.ends))
        return hidden_states

    def combine(
        self, hidden_states: torch.Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> torch.Tensor:
        """Send [M, H] back; receive [T, H]."""
        self._check_installed()
        assert self.handle is not None  # of the dispatch
        combined = sync_free_combine(hidden_states, self.group, self.handle)
        self._forget()
        return combined


BY_LAYOUT: dict[str, type[CompactManager]] = {
    "compact": CompactManager,
    "expanded": ExpandedManager,
    "sync-free": SyncFreeManager,
}
