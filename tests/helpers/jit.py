"""The kernels that the DeepEP V2 of this machine has compiled, read in its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.generations import GENERATIONS
from tests.helpers.carriers import v2_carrier

# Their sources below a cache folder, by generation. Each has a folder of its own.
SOURCES = {"2.1": "cache/kernel.*/kernel.cu", "2.5": "**/kernel.cu"}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel for a number of tokens per rank, as its source names it: kind "dispatch", "combine",
    "dispatch_copy_epilogue" or "combine_reduce_epilogue"."""

    folder: Path
    kind: str
    num_max_tokens_per_rank: int


def compiled_kernels(hidden: int, num_experts: int, num_topk: int) -> Iterator[Kernel]:
    """Those of a shape in bf16. All have the row's size, as elements or bytes, and then the capacity, the experts and
    top-k among their template arguments, in this order."""
    generation = str(CARRIERS[v2_carrier()].generation)
    shape = re.compile(rf"\b(\w+)_impl<.*\b({2 * hidden}|{hidden})\b.*, (\d+), {num_experts}, {num_topk}\b")
    for folder in GENERATIONS[generation].cache_folders(os.environ, Path.home()):
        for source in folder.glob(SOURCES[generation]):
            if found := shape.search(source.read_text()):
                yield Kernel(source.parent, found[1], int(found[3]))
