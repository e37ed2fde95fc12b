"""The communication manager of a layer with redundant experts: copies of busy experts on ranks with room.

For each dispatch the ranks exchange their counts, and each makes the same plan of them. Selections are translated to
physical ids, of which a rank has L + R: its own experts, then its replica slots. The router, the probabilities and
their gradients know nothing of it. A dispatch for which nothing is planned is that of `ExpandedManager`, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep_v2 import recompute, settings
from megatron_ep_v2.balance import planner
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.contract import Redundancy
from megatron_ep_v2.buffers.groups import registered
from megatron_ep_v2.errors import InputError, SettingsError
from megatron_ep_v2.experts.counts import Replicas, RowInfo, attach
from megatron_ep_v2.megatron.expert_load import ExpertLoad
from megatron_ep_v2.megatron.managers import ExpandedManager

_OFF = "unset MCORE_DEEPEP_V2_REDUNDANT_EXPERTS"


@dataclass(frozen=True)
class _Placed:
    """Where the selections of one dispatch go.

    Attributes:
        logical, physical: [T, K] int64, selections as the router made them and as they are dispatched.
        mapping: [P, R] int32 on the CPU, the expert in each replica slot; -1 = none. On a GPU it arrives while the
            dispatch waits on the host.
        arrived: Recorded after the copy of `mapping`; None on a CPU.
        load: [L + 1] for `ExpertLoad`.
    """

    logical: torch.Tensor
    physical: torch.Tensor
    mapping: torch.Tensor
    arrived: torch.cuda.Event | None
    load: torch.Tensor


class RedundantManager(ExpandedManager):
    """`ExpandedManager` with redundant experts; needs the experts of this package.

    Raises:
        SettingsError: The layer is built for something that redundant experts do not go with.
    """

    _placed: _Placed | None = None  # until the dispatch is there
    _plans: bool  # and no recompute repeats it

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        config = self.config
        _check_config({name: getattr(config, name, None) for name in _NEEDED}, self.num_experts, config)
        self.num_slots, ranks = settings.active().redundant_experts, self.group.size()
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size or config.ffn_hidden_size
        self._redundancy = Redundancy(
            num_slots=self.num_slots,
            num_local_experts=self.num_local_experts,
            shapes=((2 * ffn, hidden), (hidden, ffn)),
            dtype=config.params_dtype,
        )
        self._replicas: Replicas | None = None  # of the dispatch, until the combine
        self._num_physical = ranks * (self.num_local_experts + self.num_slots)
        self.expert_load = ExpertLoad(self.group, self.num_local_experts, moves=True)

    def _selections(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Plan the dispatch, without a wait on the host, and translate the selections. A recomputed dispatch repeats
        the routing of the first run, and so its plan."""
        self._check_buffer(hidden_states)
        first = recompute.coming()
        self._placed = placed = self._plan() if first is None else vars(first)["placed"]
        self._plans = first is None
        return (placed.physical if first is None else self._follow(placed)), self._num_physical

    def _count(self, tokens_per_expert: torch.Tensor) -> None:
        """Set `tokens_per_expert`: [L] int64 on the CPU if no rank has a replica; else [L + R], with `Replicas`."""
        placed, self._placed = self._placed, None
        assert placed is not None  # of `_selections`
        if recompute.runs_first():
            vars(self.handle)["placed"] = placed
        if self._plans:
            self.expert_load.add(placed.load)
        if placed.arrived is not None:
            placed.arrived.synchronize()  # it has, as the dispatch's own counts came after it
        self._replicas = None
        if bool((placed.mapping >= 0).any()):
            self._replicas = Replicas(vars(self.handle)["carrier"], placed.mapping)
            attach(tokens_per_expert, RowInfo(replicas=self._replicas))
            self.tokens_per_expert = tokens_per_expert
        else:
            self.tokens_per_expert = tokens_per_expert[: self.num_local_experts]

    def combine(
        self, hidden_states: torch.Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> torch.Tensor:
        """Send [P, H] back; receive [T, H].

        Raises:
            SettingsError: The experts between dispatch and combine knew nothing of the replicas.
            EPError: See `CompactManager.dispatch`.
        """
        replicas, self._replicas = self._replicas, None
        if replicas is not None and not replicas.ran:
            raise SettingsError(
                "rows of redundant experts came back from experts that cannot run them",
                found="experts that did not read what tokens_per_expert carries (RowInfo.replicas)",
                needed="the experts of megatron_ep_v2.megatron.experts in every MoE layer",
                fix=f"set MCORE_DEEPEP_V2_EXPERTS=grouped before the model is built, or {_OFF}",
            )
        return super().combine(hidden_states, async_finish, allocate_on_comm_stream)

    def _check_buffer(self, hidden_states: torch.Tensor) -> None:
        """Check that the group's buffer has replica slots for this layer's experts. The first layer builds it."""
        buffer: Any = pool.find(self.group) or pool.get_buffer(
            self.group,
            hidden_states,
            self.token_indices,
            self._num_physical,
            self.token_probs,
            redundancy=self._redundancy,
        )
        if buffer.spec.redundancy != self._redundancy:
            raise InputError(
                f"rank {self.group.rank()}: the group's buffer has no replica slots for the experts of this layer",
                found=str(buffer.spec.redundancy),
                needed=f"{self._redundancy}: one size of experts for all MoE layers of a group",
                fix=f"megatron_ep_v2.destroy_buffers() on all ranks between two models, or {_OFF}",
            )

    def _plan(self) -> _Placed:
        """Plan this dispatch. Collective."""
        active, logical, ranks, rank = settings.active(), self.token_indices, self.group.size(), self.group.rank()
        mine = planner.count(logical, self.num_experts)
        counts = mine.new_empty(ranks, self.num_experts)
        dist.all_gather_into_tensor(counts.view(-1), mine, group=registered(self.group))
        plan = planner.plan(counts, self.num_slots, active.balance_min_rows, active.balance_from_percent)
        physical = planner.map_selections(logical, plan, rank)
        mapping = plan.experts.to(torch.int32).to("cpu", non_blocking=True)
        arrived = None
        if logical.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        tokens = counts.sum(dim=0).view(ranks, -1)[rank]
        load = torch.cat((tokens, (plan.rank_rows()[rank] - tokens.sum())[None]))
        return _Placed(logical, physical, mapping, arrived, load)

    def _follow(self, placed: _Placed) -> torch.Tensor:
        """[T, K] int64, this run's selections by the plan of the first run of a checkpointed layer. They differ from
        the first run's where the router's do, which is then counted (see `recompute`)."""
        home = planner.homes(self.num_experts, self.group.size(), self.num_slots, self.token_indices.device)
        return planner.follow(self.token_indices, placed.logical, placed.physical, home)


# Field of TransformerConfig -> the value that is needed, and what would have it. Absent in a version = as needed.
_NEEDED: Mapping[str, tuple[object, str]] = {
    "overlap_moe_expert_parallel_comm": (False, "--overlap-moe-expert-parallel-comm (1F1B overlap)"),
}


def _check_config(found: Mapping[str, object], num_experts: int, config: Any) -> None:
    """Refuse what redundant experts do not go with.

    Args:
        found: The fields of `_NEEDED`, None where the version lacks one.
        num_experts: Experts of the group, times the expert tensor parallel size.
        config: Megatron's TransformerConfig.
    """
    wrong = [(name, value) for name, value in found.items() if value and value != _NEEDED[name][0]]
    if num_experts != config.num_moe_experts:
        wrong.append(("expert_tensor_parallel_size", num_experts // config.num_moe_experts))
    if wrong:
        raise SettingsError(
            "redundant experts do not go with this configuration",
            found=", ".join(f"{name}={value}" for name, value in wrong),
            needed="no 1F1B overlap (overlap_moe_expert_parallel_comm=False), expert_tensor_parallel_size=1",
            fix=f"{_OFF}, or change the configuration",
        )
