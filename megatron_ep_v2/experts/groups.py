"""Groups of rows by expert, with sizes on the host where it knows them without a wait."""

from __future__ import annotations

import functools
import math
from array import array
from dataclasses import dataclass
from itertools import accumulate

import torch

from megatron_ep_v2.errors import InputError
from megatron_ep_v2.experts.counts import row_info
from megatron_ep_v2.layouts.places import CONTIGUOUS_ALIGNMENT, Places


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Rows [P] of L experts, one after the other.

    Attributes:
        ends: [L] int32 on the rows' device, where each expert's rows end.
        sizes: Rows of each expert if the host knows them; None = only the device does.
        alignment: Each size is a multiple of this.
        used: One int32 on the device: rows from this one on are unowned. None = there are none.
        num_rows: P.
        rows_node: Number of the autograd node that the rows come from, if the weights' gradients are to be computed
            after its backward has run; None = as soon as they can be.
    """

    ends: torch.Tensor
    sizes: tuple[int, ...] | None
    alignment: int
    used: torch.Tensor | None
    num_rows: int
    rows_node: int | None = None

    @classmethod
    def from_places(cls, places: Places) -> Groups:
        """Groups of rows that `layouts.gather_rows` laid out, contiguous or masked. No host wait."""
        used = places.ends[-1] if places.expected_m is None else None
        return cls(ends=places.ends, sizes=None, alignment=places.alignment, used=used, num_rows=places.num_rows)

    @classmethod
    def from_counts(cls, tokens_per_expert: torch.Tensor, rows: torch.Tensor) -> Groups:
        """Groups from the counts that Megatron passes to its experts. No host wait.

        Args:
            tokens_per_expert: [L] integers. On the CPU with rows on a GPU, their sum must be P; else P at most. With
                a `RowInfo` or without.
            rows: [P, H].

        Raises:
            InputError: The counts do not fit the rows, if that is known without a wait.
        """
        num_rows, info = rows.shape[0], row_info(tokens_per_expert)
        if tokens_per_expert.device == rows.device and not rows.is_cpu:
            ends = tokens_per_expert.cumsum(0).to(torch.int32) if info.ends is None else info.ends
            return cls(ends=ends, sizes=None, alignment=info.alignment, used=ends[-1], num_rows=num_rows)
        sizes = tuple(tokens_per_expert.long().tolist())  # .long() gives plain tensors: CountsOnDevice.tolist() raises
        used = sum(sizes)
        if used > num_rows or (used < num_rows and rows.is_cuda):
            raise InputError(
                "the experts' rows are not as many as their counts say",
                found=f"{num_rows} rows, tokens_per_expert adds up to {used}",
                needed="one row for each",
                fix="keep a static number of rows with counts on the device",
            )
        ends = torch.frombuffer(array("i", accumulate(sizes)), dtype=torch.int32)
        if not rows.is_cpu:
            ends = ends.to(rows.device, non_blocking=True)  # the driver stages it: no wait, and the source may be freed
        tail = ends[-1] if used < num_rows else None
        alignment = math.gcd(CONTIGUOUS_ALIGNMENT, *sizes)  # as far as a backend may ask for
        return cls(ends=ends, sizes=sizes, alignment=alignment, used=tail, num_rows=num_rows, rows_node=info.rows_node)

    def of_run(self, ends: torch.Tensor) -> Groups:
        """These groups with the `ends` saved with the rows of a backward. Under a checkpoint without reentry they come
        from a later run than the first."""
        if ends is self.ends:
            return self
        return Groups(
            ends=ends,
            sizes=None,
            alignment=self.alignment,
            used=None if self.used is None else ends[-1],
            num_rows=self.num_rows,
        )

    @functools.cached_property
    def m_indices(self) -> torch.Tensor:
        """[P] int32, the expert of each row; -1 = unowned. Unlike in `Places`, padding belongs to the expert: its zeros
        give zeros, where DeepGEMM would write nothing."""
        slot = torch.arange(self.num_rows, dtype=torch.int32, device=self.ends.device)
        expert = torch.searchsorted(self.ends, slot, right=True, out_int32=True)
        return expert if self.used is None else torch.where(expert < len(self.ends), expert, -1)

    @functools.cached_property
    def host_sizes(self) -> tuple[int, ...]:
        """Rows of each expert. Waits for the device, once, if the host does not know them."""
        return self.sizes if self.sizes is not None else tuple(self.ends.diff(prepend=self.ends.new_zeros(1)).tolist())
