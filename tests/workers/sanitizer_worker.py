"""Run kernels in the interpreter so that an access out of bounds ends the process: `sanitizer_worker.py NAME`.

`symbolic`: triton-viz proves every access in bounds, for all programs at once. It cannot model a load whose mask was
itself loaded (`localization_forward_kernel`, `moments_kernel`, `gradient_rows_kernel`), a loop whose bound was loaded
(`scale_gradients_kernel`), or nested loops (`concept_attention_kernel`).

`fenced`: those kernels and others run on memory that ends, and in a second round begins, at a page that must not be
touched.

`symbolic-planted` and `fenced-planted` run a kernel with an access out of bounds, which must be found.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.functional import (
    LowRankOutput,
    concept_attention,
    localization_loss,
    negatively_guided_velocity_loss,
    velocity_loss,
)
from fastunlearn.kernels import launch, localization, low_rank, upstream, velocity


@triton.jit
def planted_kernel(result_ptr, x_ptr, elements, BLOCK: tl.constexpr):
    """Reads one element too many."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, offsets <= elements, 0)
    tl.store(result_ptr + offsets, x, offsets < elements)


def velocity_calls() -> None:
    """Velocity losses of awkward sizes and of more than a tile, with every pointer argument in use."""
    for shape, mask_sizes in (((2, 3, 4, 9, 11), (2, 3, 11)), ((1, 1), ()), ((3, 1, 13, 17), (1, 17))):
        prediction, uncond, cond = (torch.randn(shape).requires_grad_() for _ in range(3))
        negatively_guided_velocity_loss(prediction, uncond, cond, backend="triton")
        velocity_loss(prediction, uncond, reduction="none", backend="triton")
        mask = torch.rand(1, *mask_sizes)
        for normalization in ("all", "mask"):
            negatively_guided_velocity_loss(
                prediction,
                uncond,
                cond,
                mask=mask,
                sample_weight=torch.rand(shape[0]),
                mask_normalization=normalization,
                backend="triton",
            )


def low_rank_calls(normalization: str) -> None:
    """Low-rank localization with one and several blocks per rank."""
    for layers, tokens, features, rank in ((2, 37, 23, 5), (1, 70, 150, 130)):
        outputs = [
            LowRankOutput(*(fenced_copy(torch.randn(shape)).requires_grad_() for shape in shapes))
            for shapes in [((2, tokens, rank), (features, rank), (features,))] * layers
        ]
        mask = fenced_copy(torch.rand(1, tokens))
        localization_loss(outputs, mask, normalization=normalization, backend="triton").loss.backward()


def all_calls() -> None:
    """The calls of `velocity_calls`, localization, the backward passes, and concept attention."""
    velocity_calls()
    for shape in ((2, 3, 5, 7, 11), (1, 1), (3, 1, 13, 17)):
        prediction, target = (fenced_copy(torch.randn(shape)).requires_grad_() for _ in range(2))
        for reduction in ("mean", "none"):
            loss = velocity_loss(prediction, target, reduction=reduction, backend="triton").loss
            loss.backward(torch.randn_like(loss), retain_graph=True)
            loss.backward(torch.randn_like(loss))
        half = fenced_copy(torch.randn(shape).half()).requires_grad_()
        weights = fenced_copy(torch.rand(shape[0]))
        velocity_loss(half, target, sample_weight=weights, backend="triton").loss.backward()
    for normalization in ("sum", "background_mean"):
        for shapes, mask in (
            ([(2, 37, 16)] * 3, torch.rand(2, 37) > 0.5),
            ([(2, 37, 5), (1, 37, 33)], torch.rand(1, 37)),
            ([(2, 3, 5, 7)] * 2, torch.rand(2, 3, 3) > 0.5),
        ):
            outputs = [fenced_copy(torch.randn(shape)).requires_grad_() for shape in shapes]
            loss = localization_loss(outputs, fenced_copy(mask), normalization=normalization, backend="triton").loss
            loss.backward(torch.tensor(3.0))
        low_rank_calls(normalization)
    for queries, keys, channels, tokens in ((70, 75, 16, 3), (1, 1, 3, 1), (5, 129, 40, 17)):
        query, key = (fenced_copy(torch.randn(2, 3, n, channels)) for n in (queries, keys))
        index = fenced_copy(torch.randint(-1, keys, (2, tokens)))
        key_mask = fenced_copy(torch.rand(2, keys) > 0.3)
        concept_attention(query, key, index, backend="triton")
        concept_attention(query, key, index, key_mask=key_mask, backend="triton")
        lse = fenced_copy(torch.randn(2, 3, queries))
        concept_attention(query, key, index, key_mask=key_mask, lse=lse, backend="triton")


def symbolic(call: Any) -> None:
    """Run under triton-viz's sanitizer, which ends the process if an access may be out of bounds."""
    import triton_viz
    from triton_viz.core import patch

    hooks = type(patch._loop_patcher.hooks)
    iterate = hooks.loop_iter_wrapper

    def unrolled(self: Any, function: Any, args: Any, kwargs: Any, line: int, kind: str) -> Any:
        # Loops that the compiler unrolls have no symbolic index.
        return (
            function(*args, **kwargs)
            if kind == "tl_static_range"
            else iterate(self, function, args, kwargs, line, kind)
        )

    # The functions that kernels call are in other modules.
    for module in (launch, localization, low_rank, upstream, velocity):
        module._triton_viz_loop_patcher = patch._loop_patcher
    with mock.patch.object(hooks, "loop_iter_wrapper", unrolled):
        call(triton_viz.trace("sanitizer"))


def fenced_allocator(at_end: bool) -> Any:
    """Return a function that allocates memory with a forbidden page at its end or at its beginning."""
    libc = ctypes.CDLL(None, use_errno=True)
    kept = []

    def allocate(elements: int, dtype: torch.dtype) -> Tensor:
        size = max(elements * dtype.itemsize, 1)
        pages = -(-size // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
        kept.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (0, pages + 1):
            if libc.mprotect(ctypes.c_void_p(start + page * mmap.PAGESIZE), mmap.PAGESIZE, 0):
                raise OSError(ctypes.get_errno(), "mprotect failed")
        begin = mmap.PAGESIZE + (pages * mmap.PAGESIZE - elements * dtype.itemsize if at_end else 0)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        return whole[begin : begin + elements * dtype.itemsize].view(dtype)

    return allocate


allocate: Any = None


def fenced_copy(x: Tensor) -> Tensor:
    """Copy the tensor to memory between forbidden pages."""
    if allocate is None or not x.numel():
        return x
    return allocate(x.numel(), x.dtype).view(x.shape).copy_(x)


@contextmanager
def fenced_allocations() -> Iterator[None]:
    """Place the tensors that kernels write between forbidden pages."""
    empty, empty_like = torch.empty, torch.empty_like

    def fenced_empty(*size: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        x = empty(*size, dtype=dtype, device=device)
        return x if not x.numel() else fenced_copy(x)

    def fenced_like(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        y = empty_like(x, dtype=dtype)
        return y if not y.numel() else allocate(y.numel(), y.dtype).as_strided(y.shape, y.stride())

    with mock.patch.object(torch, "empty", fenced_empty), mock.patch.object(torch, "empty_like", fenced_like):
        yield


def main(name: str) -> None:
    """Run the named check, and print "clean" at its end."""
    global allocate
    if name == "symbolic":

        def traced(trace: Any) -> None:
            for kernel in ("velocity_forward_kernel", "velocity_finish_kernel"):
                setattr(velocity, kernel, trace(getattr(velocity, kernel)))
            velocity_calls()
            low_rank.moments_finish_kernel = trace(low_rank.moments_finish_kernel)
            low_rank_calls("sum")

        symbolic(traced)
    elif name == "symbolic-planted":
        symbolic(lambda trace: trace(planted_kernel)[(2,)](torch.empty(100), torch.ones(100), 100, BLOCK=64))
    elif name == "fenced":
        for at_end in (True, False):
            allocate = fenced_allocator(at_end)
            with fenced_allocations():
                all_calls()
    elif name == "fenced-planted":
        allocate = fenced_allocator(True)
        planted_kernel[(2,)](torch.empty(100), fenced_copy(torch.ones(100)), 100, BLOCK=64)
    print("clean")


if __name__ == "__main__":
    main(sys.argv[1])
