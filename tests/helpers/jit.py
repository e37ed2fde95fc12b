"""The kernels that deep_ep has compiled, read in its cache: a row for each generation, by the carrier's name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.carriers import v2_carrier

VARIABLE = "EP_JIT_CACHE_DIR"


@dataclass(frozen=True)
class Cache:
    """Where a generation of deep_ep keeps its kernels, each in a folder of its own.

    Attributes:
        home: The folder where EP_JIT_CACHE_DIR is not set.
        sources: Pattern of their sources in it.
        several: EP_JIT_CACHE_DIR may be several folders, separated by colons.
    """

    home: Path
    sources: str
    several: bool = False

    def folders(self) -> list[Path]:
        value = os.environ.get(VARIABLE)
        if not value:
            return [self.home]
        return [Path(folder) for folder in (value.split(":") if self.several else [value])]


CACHES = {
    "elastic": Cache(Path.home() / ".deep_ep", "cache/kernel.*/kernel.cu"),
    "ep": Cache(Path.home() / ".dj", "**/kernel.cu", several=True),
}


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
    cache = CACHES[v2_carrier()]
    shape = re.compile(rf"\b(\w+)_impl<.*\b({2 * hidden}|{hidden})\b.*, (\d+), {num_experts}, {num_topk}\b")
    for folder in cache.folders():
        for source in folder.glob(cache.sources):
            if found := shape.search(source.read_text()):
                yield Kernel(source.parent, found[1], int(found[3]))
