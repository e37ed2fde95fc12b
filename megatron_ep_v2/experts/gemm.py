"""The three GEMMs of a linear layer of several experts, on three backends.

    forward   x [P, K]    , w [L, N, K] -> x @ w.T    [P, N]    each row with its own expert's w
    dgrad     grad [P, N] , w [L, N, K] -> grad @ w   [P, K]
    wgrad     grad [P, N] , x [P, K]    -> grad.T @ x [L, N, K] over each expert's rows; zero without rows

Unowned rows are not read, and their outputs are uninitialised.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Protocol

import torch

from megatron_ep_v2 import versions
from megatron_ep_v2.errors import InputError, SettingsError, UnavailableError
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.layouts.places import CONTIGUOUS_ALIGNMENT


class Gemm(Protocol):
    """Interface of a backend.

    Attributes:
        alignment: Each expert's rows must be padded to a multiple of this.
    """

    alignment: int

    def require(self, device: torch.device) -> None:
        """Raise UnavailableError if this backend cannot run on this device."""

    def check(self, x: torch.Tensor, w: torch.Tensor) -> None:
        """Raise an EPError if this backend cannot multiply these tensors."""

    def forward(self, x: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor: ...

    def dgrad(self, grad: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor: ...

    def wgrad(self, grad: torch.Tensor, x: torch.Tensor, groups: Groups) -> torch.Tensor: ...


class Sequential:
    """One GEMM per expert, for any dtype and device. The host must know the sizes."""

    alignment = 1

    def require(self, device: torch.device) -> None:
        """Do nothing: this backend runs on any device."""

    def check(self, x: torch.Tensor, w: torch.Tensor) -> None:
        """Check the dtypes.

        Raises:
            InputError: Rows and weights have different dtypes.
        """
        if x.dtype != w.dtype:
            raise InputError(
                "experts multiply rows and weights of one dtype",
                found=f"{x.dtype} rows, {w.dtype} weights",
                needed="one dtype for both",
                fix="train without autocast, in Megatron's own mixed precision (--bf16)",
            )

    def forward(self, x: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor:
        return self._by_expert(x, w.transpose(1, 2), groups)

    def dgrad(self, grad: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor:
        return self._by_expert(grad, w, groups)

    def wgrad(self, grad: torch.Tensor, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        sizes = groups.host_sizes
        out = x.new_empty(len(sizes), grad.shape[1], x.shape[1])
        used = sum(sizes)
        for mine, a, b in zip(out, grad[:used].split(sizes), x[:used].split(sizes), strict=True):
            torch.mm(a.t(), b, out=mine)
        return out

    def _by_expert(self, x: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor:
        sizes = groups.host_sizes
        out = x.new_empty(len(x), w.shape[2])
        used = sum(sizes)
        for mine, rows, weight in zip(out[:used].split(sizes), x[:used].split(sizes), w, strict=True):
            torch.mm(rows, weight, out=mine)
        return out


class Grouped:
    """torch's grouped GEMM: one kernel, sizes on the device."""

    alignment = 1

    def require(self, device: torch.device) -> None:
        """Check torch and the GPU.

        Raises:
            UnavailableError: This torch has no grouped GEMM, or none for this GPU that leaves the sizes on the device.
        """
        _grouped_mm()
        # On other GPUs it is a loop that waits for the sizes (pytorch, aten/src/ATen/native/cuda/GroupedBlas.cpp).
        if device.type == "cuda" and _capability(device)[0] not in (9, 10):
            raise UnavailableError(
                "torch has no grouped GEMM for this GPU",
                found=f"compute capability {_capability(device)}",
                needed="9 or 10, as H100, H200, B200 have",
                fix="choose the sequential experts",
            )

    def check(self, x: torch.Tensor, w: torch.Tensor) -> None:
        """Check device, dtypes and sizes.

        Raises:
            UnavailableError: See `require`.
            InputError: The dtype or size is not supported.
        """
        self.require(x.device)
        good = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
        step = 16 // x.element_size()  # rows must start at multiples of 16 bytes
        if x.dtype not in good or w.dtype != x.dtype or w.shape[1] % step or w.shape[2] % step:
            raise InputError(
                "torch's grouped GEMM does not take these experts",
                found=f"{x.dtype} rows, {w.dtype} weights {tuple(w.shape)}",
                needed=f"{' or '.join(map(str, good))} for both, sizes that are multiples of {step}",
                fix="train in bf16 (--bf16), or choose the sequential experts",
            )

    def forward(self, x: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor:
        return self._multiply(x, w.transpose(1, 2), groups)

    def dgrad(self, grad: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor:
        return self._multiply(grad, w, groups)

    def wgrad(self, grad: torch.Tensor, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        if not x.shape[0]:
            return x.new_zeros(groups.ends.shape[0], grad.shape[1], x.shape[1])
        # The only pair of layouts that allows empty groups and groups of any size (GroupMMCommon.cuh).
        return _grouped_mm()(grad.t(), x, offs=groups.ends)

    def _multiply(self, x: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor:
        if not x.shape[0]:
            return x.new_empty(0, w.shape[2])
        return _grouped_mm()(x, w, offs=groups.ends)


class DeepGemm(Grouped):
    """DeepGEMM's bf16 GEMMs on the contiguous layout, forward and dgrad.

    wgrad is torch's: on SM90 DeepGEMM's own (k_grouped_bf16_gemm_tn_contiguous) needs the sizes on the host.
    """

    alignment = CONTIGUOUS_ALIGNMENT

    def require(self, device: torch.device) -> None:
        """Check DeepGEMM, torch and the GPU.

        Raises:
            UnavailableError: DeepGEMM is not installed, the device is no GPU, or torch has no grouped GEMM for it.
        """
        deep_gemm()
        if device.type != "cuda":
            raise UnavailableError(
                "DeepGEMM multiplies on GPUs only", found=f"rows on {device}", fix="choose the sequential experts"
            )
        super().require(device)

    def check(self, x: torch.Tensor, w: torch.Tensor) -> None:
        """Check device, dtypes and sizes.

        Raises:
            UnavailableError: See `require`.
            InputError: The dtype or size is not supported.
        """
        super().check(x, w)
        if w.shape[1] % 64 or w.shape[2] % 64:  # DeepGEMM, impls/sm90_bf16_gemm.hpp: k % 64 == 0; N is dgrad's K
            raise InputError(
                "DeepGEMM does not take experts of this size",
                found=f"weights {tuple(w.shape)}",
                needed="multiples of 64",
                fix="choose the grouped experts",
            )

    def forward(self, x: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor:
        out = x.new_empty(x.shape[0], w.shape[1])
        deep_gemm().m_grouped_bf16_gemm_nt_contiguous(x, w, out, groups.m_indices)
        return out

    def dgrad(self, grad: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor:
        out = grad.new_empty(grad.shape[0], w.shape[2])
        deep_gemm().m_grouped_bf16_gemm_nn_contiguous(grad, w, out, groups.m_indices)
        return out


GEMMS: dict[str, Gemm] = {"deepgemm": DeepGemm(), "grouped": Grouped(), "sequential": Sequential()}


def gemm(backend: str) -> Gemm:
    """The backend of this name."""
    if backend not in GEMMS:
        raise SettingsError(
            f"there are no {backend!r} experts",
            needed="one of " + ", ".join(GEMMS),
            fix="pass one of these names; sequential runs anywhere",
        )
    return GEMMS[backend]


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def deep_gemm() -> ModuleType:
    """Import the package deep_gemm.

    Raises:
        UnavailableError: It cannot be imported. Its import also asserts that it finds a CUDA toolkit.
    """
    try:
        return importlib.import_module("deep_gemm")
    except (ImportError, AssertionError, OSError, RuntimeError) as error:
        raise UnavailableError(
            "DeepGEMM cannot be imported",
            found=f"{type(error).__name__}: {error}",
            needed="the package deep_gemm, and the CUDA toolkit that it compiles with",
            fix="install it from its repository (deepseek-ai/DeepGEMM), or choose the grouped experts",
        ) from error


@functools.cache
def _grouped_mm() -> Callable[..., torch.Tensor]:
    """torch.nn.functional.grouped_mm from torch 2.10 on; before, torch._grouped_mm with the same arguments."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    found = public or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise UnavailableError(
            "this torch has no grouped GEMM",
            found=f"torch {torch.__version__}",
            needed="torch.nn.functional.grouped_mm (torch 2.10) or "
            f"torch._grouped_mm (torch {versions.TORCH_GROUPED_GEMM})",
            fix="upgrade torch, or choose the sequential experts",
        )
    return found
