"""Launch of Triton kernels with less work on the host.

`kernel[grid](...)` looks up the compiled kernel at each call: it inspects every argument, every constant and the
environment, which takes longer than most of these kernels run. Here the caller states what the compiled kernel depends
on, and it is launched directly: `compiled[grid](...)`, which passes the constants from Triton 3.3 on.

`triton.cdiv` and `triton.next_power_of_2` may be used inside kernels, too, and so take the host 3 to 5 us a call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

if not hasattr(tl, "gather"):
    raise ImportError(f"Triton {triton.__version__}, which has no tl.gather")

_compiled: dict[tuple[object, ...], triton.compiler.CompiledKernel] = {}


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, int, int],
    tensors: Sequence[torch.Tensor],
    numbers: tuple[int, ...] = (),
    constants: tuple[object, ...] = (),
    **options: int,
) -> None:
    """Launch a kernel on the current stream.

    Args:
        kernel: A function under `triton.jit` that lives as long as the process, with its parameters in this order.
        grid: Programs.
        tensors: Pointers, on the current device; compiled for their dtypes and for 16-byte alignment.
        numbers: Below 2**31; the kernel names all of them in `do_not_specialize`.
        constants: `tl.constexpr`; compiled for their values.
        options: Triton's, such as num_warps.
    """
    arguments = (*tensors, *numbers, *constants)
    if torch.compiler.is_compiling():  # torch.compile knows only this form
        kernel[grid](*arguments, **options)
        return
    device = tensors[0].get_device()
    key = (
        *(id(kernel), device, constants, *options.items()),  # a kernel's own hash takes 2 us
        *[tensor.dtype for tensor in tensors],
        *[tensor.data_ptr() % 16 == 0 for tensor in tensors],
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*arguments)
        return
    compiled = kernel[grid](*arguments, **options)
    if compiled is None:  # in Triton's interpreter
        return
    for parameter in kernel.params[len(tensors) : len(tensors) + len(numbers)]:
        assert parameter.do_not_specialize, f"{parameter.name} would be compiled for its first value"
    if device < 0 or device == torch.cuda.current_device():  # else it was loaded on another device
        _compiled[key] = compiled


def ceil_div(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`, which is 1 or more."""
    return 1 << (number - 1).bit_length()
