"""Sizes of a MoE layer and what it runs on, and how ranks are shared out: for tests on a CPU and on GPUs alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.helpers.carriers import v2_carrier


@dataclass(frozen=True)
class Shape:
    """One MoE layer.

    Attributes:
        dtype: Of rows and weights.
        topk, hidden, ffn: K, H and the experts' intermediate size.
        experts: Of the whole group.
        tokens: The most of any rank.
        device: "cpu" or "cuda".
    """

    dtype: torch.dtype = torch.float32
    topk: int = 3
    hidden: int = 64
    experts: int = 8
    ffn: int = 32
    tokens: int = 32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-top{self.topk}"

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def buffer(self) -> str:
        """The carrier that is tested there."""
        return v2_carrier() if self.on_gpu else "reference"


# fp32: what is compared is the routing of tokens and gradients, and not how bf16 rounds.
CPU = Shape()
GPU = Shape(torch.bfloat16, topk=8, hidden=2048, experts=128, ffn=768, tokens=4096, device="cuda")


@dataclass(frozen=True)
class Split:
    """How the ranks are shared out: tensor parallel (of the experts too) x expert parallel."""

    tp: int
    ep: int

    @property
    def size(self) -> int:
        return self.tp * self.ep

    def __str__(self) -> str:
        return f"tp{self.tp}-ep{self.ep}"
