"""What the kernels share: 64-bit offsets, tile sizes, dense layouts, and broadcasting a mask of any resolution.

Velocities, eraser outputs and their gradients are read by flat index, in the order in which they lie in memory, so that
every shape gets full 16-byte accesses. The element of a smaller operand (a mask, per-sample weights) that belongs to a
flat index is computed from that index: the operand is never expanded.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.kernels.interpreter import make_bfloat16_exact

# Each of 128 threads issues two or more 16-byte loads per input, and uses few enough registers for full occupancy.
WARPS = 4
MAX_REGISTERS = 255
BLOCK_ELEMENTS = 2048
# Beyond this many tiles, a program processes several. This is enough programs to load any GPU evenly, and few enough
# that one program can add up their partial sums in a fixed order: the same bits every time, without atomics.
MAX_PROGRAMS = 4096
FINISH_BLOCK = 2048
# Calls that a loss remembers the plan of. Training meets few shapes, and a plan is small.
PLANS = 1024

Layout = tuple[Sequence[int], Sequence[int], torch.dtype]  # shape, strides, dtype


@triton.jit
def tile_start(tile, BLOCK: tl.constexpr):
    """The flat index of a tile's first element, in 64 bits: a velocity may have more than 2^31 elements."""
    return tl.cast(tile, tl.int64) * BLOCK


@triton.jit
def tile_count(elements, BLOCK: tl.constexpr):
    """The number of tiles of 1 or more elements. `tl.cdiv` overflows 32 bits shortly before 2^31 elements."""
    return (elements - 1) // BLOCK + 1


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Convert `x` to DTYPE; to half precision by way of float32, because no hardware rounds float64 to bfloat16."""
    if DTYPE.primitive_bitwidth == 16:
        return x.to(tl.float32).to(DTYPE)
    return x.to(DTYPE)


@triton.jit
def nearest(position, DIM_SIZE: tl.constexpr, OPERAND_SIZE: tl.constexpr):
    """The operand position that `F.interpolate(mode="nearest")` reads for a position in a dim of DIM_SIZE."""
    if OPERAND_SIZE == DIM_SIZE:
        return position
    # Positions are not negative, so truncation is floor.
    return tl.minimum((position.to(tl.float32) * (OPERAND_SIZE / DIM_SIZE)).to(position.dtype), OPERAND_SIZE - 1)


@triton.jit
def broadcast_offsets(offsets, strides, DIM_SIZES: tl.constexpr, OPERAND_SIZES: tl.constexpr, IN_32_BITS: tl.constexpr):
    """The operand offset for every flat index in `offsets`; the other arguments are the fields of a `BroadcastIndex`.

    Sizes are compile-time constants because dividing by a constant compiles to a multiplication. 32-bit arithmetic,
    where it suffices, makes that four times cheaper.
    """
    index = offsets.to(tl.int32) if IN_32_BITS else offsets
    operand_offsets = tl.zeros_like(index)
    for i in tl.static_range(len(DIM_SIZES)):
        position = index
        if i + 1 < len(DIM_SIZES):
            position = index % DIM_SIZES[i]
            index = index // DIM_SIZES[i]
        if OPERAND_SIZES[i] != 0:
            operand_offsets += nearest(position, DIM_SIZES[i], OPERAND_SIZES[i]) * strides[i]
    return operand_offsets


@triton.jit
def finish_sum(partial_ptr, programs, BLOCK: tl.constexpr):
    """Sum the (programs,) values at `partial_ptr` in a fixed order."""
    sums = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + program, program < programs, 0)
    return tl.sum(sums)


class BroadcastIndex(NamedTuple):
    """How to find an operand's element from a flat index into the dense tensor that the operand broadcasts over.

    The dims are the dense tensor's, innermost first, adjacent ones merged where possible. A dim that the operand does
    not vary along has operand size 0. An operand size that differs from the dim's is read by nearest neighbour.
    """

    strides: tuple[int, ...]  # of the operand
    DIM_SIZES: tuple[int, ...]
    OPERAND_SIZES: tuple[int, ...]
    IN_32_BITS: bool  # whether 32-bit arithmetic suffices


NO_OPERAND = BroadcastIndex((0,), (1,), (0,), True)


@functools.lru_cache(maxsize=4096)
def broadcast_index(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    operand_shape: tuple[int, ...],
    operand_strides: tuple[int, ...],
) -> BroadcastIndex:
    """The `BroadcastIndex` of an operand over a dense tensor with as many dims; operand dims of size 1 broadcast."""
    merged: list[tuple[int, int, int]] = []
    for dim in sorted(range(len(shape)), key=lambda i: (strides[i], shape[i])):
        size, operand_size, stride = shape[dim], operand_shape[dim], operand_strides[dim]
        if size == 1:
            continue
        if operand_size == 1 or (stride == 0 and operand_size == size):
            stride, operand_size = 0, 0
        if merged and operand_size in (0, size):
            inner_size, inner_operand_size, inner_stride = merged[-1]
            # Merge if the operand broadcasts along both dims, or is contiguous across them.
            if (operand_size == inner_operand_size == 0) or (
                operand_size and inner_operand_size == inner_size and stride == inner_stride * inner_size
            ):
                size *= inner_size
                merged[-1] = (size, operand_size and size, inner_stride)
                continue
        merged.append((size, operand_size, stride))
    if not merged:
        merged.append((1, 0, 0))
    outer_size, outer_operand_size, outer_stride = merged[-1]
    if outer_operand_size in (0, outer_size):
        # The outermost size is never divided by. Leaving it out lets other batch sizes reuse the compiled kernel.
        merged[-1] = (1, min(outer_operand_size, 1), outer_stride)
    elements, operand_span = 1, 1
    for size in shape:
        elements *= size
    for size, stride in zip(operand_shape, operand_strides, strict=True):
        operand_span += (size - 1) * stride
    dim_sizes, operand_sizes, merged_strides = zip(*merged, strict=True)
    return BroadcastIndex(merged_strides, dim_sizes, operand_sizes, max(elements, operand_span) < 2**31)


def layout(x: Tensor | None) -> Layout | None:
    """What the plan of a call depends on: the tensor's shape, strides and dtype."""
    return None if x is None else (x.shape, x.stride(), x.dtype)


def described(layout: Layout | None) -> Tensor | None:
    """A tensor without memory that has the layout."""
    if layout is None:
        return None
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def mask_index(x: Tensor, mask: Tensor, channel_dim: int) -> BroadcastIndex:
    """The index of a mask that lacks the channel dim of `x`."""
    shape, strides = list(mask.shape), list(mask.stride())
    shape.insert(channel_dim, 1)
    strides.insert(channel_dim, 0)
    return broadcast_index(x.shape, x.stride(), tuple(shape), tuple(strides))


def leading_index(x: Tensor, values: Tensor) -> BroadcastIndex:
    """The index of `values`, one for each position in the first dim of `x`."""
    rest = x.dim() - 1
    return broadcast_index(x.shape, x.stride(), (*values.shape, *[1] * rest), (*values.stride(), *[0] * rest))


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps, whatever the order of dims."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def dense(x: Tensor) -> Tensor:
    """`x` itself if it is dense, else a contiguous copy."""
    return x if is_dense(x) else x.contiguous()


def same_layout(first: Tensor, others: Sequence[Tensor | None]) -> list[Any]:
    """The tensors, dense and all in the layout of the first; only those that differ are copied."""
    first = dense(first)
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


def readable(x: Tensor) -> Tensor:
    """The same memory in a dtype that kernels can load: bool as uint8."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors; under torch.compile views of them, because it refuses to pass one tensor twice to an autograd op."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    return [x if x is None else x.view_as(x) for x in tensors]


def block_elements(dtype: torch.dtype) -> int:
    """Elements per tile for arithmetic in `dtype`: a float64 takes two registers."""
    return BLOCK_ELEMENTS // 2 if dtype == torch.float64 else BLOCK_ELEMENTS


def programs_for(elements: int, block: int, most: int = MAX_PROGRAMS) -> int:
    """The number of programs that share the elements."""
    return min(triton.cdiv(elements, block), most)


def launch_options(x: Tensor | torch.device, warps: int = WARPS) -> dict[str, int]:
    """The number of warps and, on NVIDIA, a register limit: without it, ptxas may spill to fit one more block."""
    options = {"num_warps": warps}
    device = x.device if isinstance(x, Tensor) else x
    if device.type != "xpu" and torch.version.hip is None:
        options["maxnreg"] = MAX_REGISTERS
    return options


# Settled when kernels are decorated. The interpreter takes tensors of a GPU as well.
_IS_INTERPRETED = not isinstance(tile_start, triton.JITFunction)
_NO_CHANGE = contextlib.nullcontext()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device current: Triton launches on the current device. Every launch is inside this."""
    if _IS_INTERPRETED:
        make_bfloat16_exact()
        return _NO_CHANGE
    device = x.device
    if device.index is None:
        return _NO_CHANGE
    module = getattr(torch, device.type)
    return _NO_CHANGE if module.current_device() == device.index else module.device(device)


class Launcher:
    """A kernel with everything settled but its tensors and its floating-point numbers.

    An ordinary launch finds out at every call which machine code serves the arguments. A launcher asks Triton once,
    and from then on calls the machine code itself: 2 to 4 us instead of 10 to 16. The kernel's parameters must come in
    this order: pointers, numbers (annotated `tl.float64`), integers, constants. A launcher belongs to the dtypes of its
    tensors, and to which of them are None.

    Args:
        kernel: the kernel.
        grid: the number of programs in each dim.
        integers: the arguments between numbers and constants: integers, and tuples of integers.
        constants: the constants by name, in the order of the kernel's parameters.
        options: `launch_options`.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        integers: Sequence[Any],
        constants: Mapping[str, Any],
        options: Mapping[str, int],
    ) -> None:
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self._integers, self._keywords = tuple(integers), {**constants, **options}
        self._settled = (*integers, *constants.values())
        # Triton's launchers of machine code, by device and by the addresses that are not divisible by 16.
        self._runners: dict[Any, Callable[..., None]] = {}

    def __call__(self, tensors: Sequence[Tensor | tuple[Tensor, ...] | None], *numbers: float) -> None:
        """Launch the kernel on the device of the tensors, which must be the current one: see `on_device`.

        Args:
            tensors: what the kernel's pointers point to; a tuple for a tuple of pointers.
            numbers: the kernel's floating-point numbers.
        """
        if not _IS_DIRECT:
            self.by_triton(tensors, *numbers)
            return
        addresses: list[Any] = []
        bits = 0
        for x in tensors:
            if x is None:
                addresses.append(x)
            elif type(x) is tuple:
                several = tuple([y.data_ptr() for y in x])
                bits |= functools.reduce(operator.or_, several)
                addresses.append(several)
            else:
                address = x.data_ptr()  # type: ignore[union-attr]
                bits |= address
                addresses.append(address)
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = device if bits % 16 == 0 else (device, *map(_misaligned, addresses))
        runner = self._runners.get(key)
        if runner is None:
            self._runners[key] = self.by_triton(tensors, *numbers)[self.grid]
        else:
            runner(*addresses, *numbers, *self._settled, stream=driver.get_current_stream(device))

    def by_triton(self, tensors: Sequence[Tensor | tuple[Tensor, ...] | None], *numbers: float) -> Any:
        """Launch the kernel as Triton does, and return what Triton compiled."""
        return self.kernel[self.grid](*tensors, *numbers, *self._integers, **self._keywords)


# Triton for ROCm and XPU looks at more than the dtypes and alignments of tensors, and the interpreter has no launchers.
_IS_DIRECT = not _IS_INTERPRETED and torch.version.hip is None and getattr(torch.version, "xpu", None) is None


def _misaligned(address: int | tuple[int, ...] | None) -> Any:
    if isinstance(address, tuple):
        return tuple(map(_misaligned, address))
    return address is not None and address % 16 != 0
