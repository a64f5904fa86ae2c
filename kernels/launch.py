"""What every kernel here shares: 64-bit offsets, tile sizes, dense layouts, and reading weights of any resolution.

Velocities, eraser outputs and their gradients are read in the order in which they lie in memory, by flat index: full
16-byte accesses at any shape. What broadcasts over them (a mask, weights per sample) is found from that index.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Two or more 16-byte loads of every input for each of 128 threads, and few enough registers for full occupancy.
WARPS = 4
MAX_REGISTERS = 255
BLOCK_ELEMENTS = 2048
# Past this many tiles a program takes several: waves enough to fill any GPU evenly, and few enough partial sums that
# one program adds them up, in a fixed order: the same bits every time, without atomics.
MAX_PROGRAMS = 4096
FINISH_BLOCK = 2048


@triton.jit
def tile_start(tile, BLOCK: tl.constexpr):
    """The first element of a tile, in 64 bits: a velocity may have more than 2^31 elements."""
    return tl.cast(tile, tl.int64) * BLOCK


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """`x` as DTYPE. No hardware rounds float64 to bfloat16: half precisions go by way of float32."""
    if DTYPE.primitive_bitwidth == 16:
        return x.to(tl.float32).to(DTYPE)
    return x.to(DTYPE)


@triton.jit
def nearest(position, SIZE: tl.constexpr, WEIGHT_SIZE: tl.constexpr):
    """The position among WEIGHT_SIZE that `F.interpolate(mode="nearest")` reads for a position among SIZE."""
    if WEIGHT_SIZE == SIZE:
        return position
    # Truncation is floor: nothing is negative.
    return tl.minimum((position.to(tl.float32) * (WEIGHT_SIZE / SIZE)).to(position.dtype), WEIGHT_SIZE - 1)


@triton.jit
def weight_offsets(offsets, strides, SIZES: tl.constexpr, WEIGHT_SIZES: tl.constexpr, NARROW: tl.constexpr):
    """Where the weight of every element lies: see `Weights`.

    The sizes are compile-time constants because a division by one is a multiplication. 32 bits, where they are enough,
    make it four times cheaper.
    """
    index = offsets.to(tl.int32) if NARROW else offsets
    found = tl.zeros_like(index)
    for i in tl.static_range(len(SIZES)):
        position = index
        if i + 1 < len(SIZES):
            position = index % SIZES[i]
            index = index // SIZES[i]
        if WEIGHT_SIZES[i] != 0:
            found += nearest(position, SIZES[i], WEIGHT_SIZES[i]) * strides[i]
    return found


@triton.jit
def finish_sum(partial_ptr, programs, BLOCK: tl.constexpr):
    """The sum of the (programs,) at `partial_ptr`, in a fixed order."""
    sums = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + program, program < programs, 0)
    return tl.sum(sums)


class Weights(NamedTuple):
    """How to find the weight of an element from its place in memory: the dims of the weighed tensor, innermost first.

    A dim over which the weights do not vary has weight size 0. A weight size other than the dim's own is read by
    nearest neighbour.
    """

    strides: tuple[int, ...]
    SIZES: tuple[int, ...]
    WEIGHT_SIZES: tuple[int, ...]
    NARROW: bool


NO_WEIGHTS = Weights((0,), (1,), (0,), True)


@functools.lru_cache(maxsize=4096)
def weights_of(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    weight_shape: tuple[int, ...],
    weight_strides: tuple[int, ...],
) -> Weights:
    """Weights of `weight_shape`, over a dense tensor of as many dims; size 1 where they do not vary."""
    merged: list[tuple[int, int, int]] = []
    for dim in sorted(range(len(shape)), key=lambda i: (strides[i], shape[i])):
        size, weight_size, stride = shape[dim], weight_shape[dim], weight_strides[dim]
        if size == 1:
            continue
        if weight_size == 1 or (stride == 0 and weight_size == size):
            stride, weight_size = 0, 0
        if merged and weight_size in (0, size):
            inner_size, inner_weight_size, inner_stride = merged[-1]
            # Both do not vary, or one runs through into the other.
            if (weight_size == inner_weight_size == 0) or (
                weight_size and inner_weight_size == inner_size and stride == inner_stride * inner_size
            ):
                size *= inner_size
                merged[-1] = (size, weight_size and size, inner_stride)
                continue
        merged.append((size, weight_size, stride))
    if not merged:
        merged.append((1, 0, 0))
    outer_size, outer_weight_size, outer_stride = merged[-1]
    if outer_weight_size in (0, outer_size):
        # The outermost size divides nothing: without it a batch of another size needs no other kernel.
        merged[-1] = (1, min(outer_weight_size, 1), outer_stride)
    elements, span = 1, 1
    for size in shape:
        elements *= size
    for size, stride in zip(weight_shape, weight_strides, strict=True):
        span += (size - 1) * stride
    sizes, weight_sizes, found_strides = zip(*merged, strict=True)
    return Weights(found_strides, sizes, weight_sizes, max(elements, span) < 2**31)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order of dims."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_layout(first: Tensor, others: Sequence[Tensor | None]) -> list[Any]:
    """The tensors, dense and in one layout; copied only if they are not."""
    first = first if is_dense(first) else first.contiguous()
    laid_out: list[Tensor | None] = [first]
    for x in others:
        if x is not None and not _has_strides_of(x, first):
            x = torch.empty_like(first, dtype=x.dtype).copy_(x)
        laid_out.append(x)
    return laid_out


def _has_strides_of(x: Tensor, other: Tensor) -> bool:
    if x.stride() == other.stride():
        return True
    return all(a == b or size == 1 for a, b, size in zip(x.stride(), other.stride(), x.shape, strict=True))


def readable(weights: Tensor) -> Tensor:
    """The same tensor in a dtype that a kernel can load."""
    return weights.view(torch.uint8) if weights.dtype == torch.bool else weights


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Float64 if any tensor is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def block_elements(dtype: torch.dtype) -> int:
    """Elements a program, for arithmetic in `dtype`: a float64 takes two registers."""
    return BLOCK_ELEMENTS // 2 if dtype == torch.float64 else BLOCK_ELEMENTS


def programs_for(elements: int, block: int, most: int = MAX_PROGRAMS) -> int:
    """How many programs share the elements."""
    return min(triton.cdiv(elements, block), most)


def launch_options(x: Tensor, warps: int = WARPS) -> dict[str, int]:
    """Warps, and on NVIDIA a limit of registers: told one, ptxas no longer spills to make room for one more block."""
    options = {"num_warps": warps}
    if x.device.type != "xpu" and torch.version.hip is None:
        options["maxnreg"] = MAX_REGISTERS
    return options


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, x.device.type).device(x.device)
