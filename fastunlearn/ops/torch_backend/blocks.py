"""Passes over tensors in blocks that fit into a cache, and which of two forms of a pass runs.

A pass reads its inputs once and returns everything that a loss needs of them: sums, and gradients. There are two forms:

* *In blocks*, for eager torch. The temporaries of a block are buffers that all blocks share, so that only inputs and
  gradients travel through memory, and half-precision inputs are never copied whole.
* *Whole*: the plain formula, which a compiler turns into one loop. `backend="compile"` compiles it, and so does a
  caller's own `torch.compile`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Per thread: small enough for a core's caches, large enough that starting the threads for an operation costs little.
BLOCK_ELEMENTS = 2**18
_MOST_THREADS = 4  # so that the temporaries of a block take 16 MB at the most
_ROW = 1024
Block = tuple[slice, ...]


def form(in_blocks: Callable[..., Any], whole: Callable[..., Any], is_compiled: bool) -> Callable[..., Any]:
    """The form of a pass to run: `whole` if it is compiled, by us or by the caller; otherwise `in_blocks`."""
    return whole if is_compiled or torch.compiler.is_compiling() else in_blocks


def compiled(make: Callable[..., Callable[..., Any]], *constants: Any) -> Callable[..., Any]:
    """The function make(*constants), compiled once for all sizes; as it is where the caller compiles.

    Args:
        make: returns a function of tensors.
        constants: what does not change during training: hashable.
    """
    return make(*constants) if torch.compiler.is_compiling() else _compiled(make, *constants)


@functools.cache
def _compiled(make: Callable[..., Callable[..., Any]], *constants: Any) -> Callable[..., Any]:
    # Not `fullgraph`, which raises at the limit of recompilations instead of running uncompiled.
    return torch.compile(make(*constants), dynamic=True)


def block_elements(elements: int, device: torch.device) -> int:
    """The most elements of a block, of so many in all: on a GPU, enough for few launches."""
    threads = torch.get_num_threads() if device.type == "cpu" else _MOST_THREADS
    return min(BLOCK_ELEMENTS * min(threads, _MOST_THREADS), max(elements, 1))


def blocks_of(shape: Sequence[int], limit: int) -> Iterator[Block]:
    """Indices of blocks of at most `limit` elements that together cover a `shape`."""
    if math.prod(shape) <= limit or not shape:
        yield ()
        return
    step = max(limit // math.prod(shape[1:]), 1)
    for start in range(0, shape[0], step):
        head = slice(start, start + step)
        for rest in blocks_of(shape[1:], limit):
            yield (head, *rest)


def part(x: Tensor, block: Block) -> Tensor:
    """The block of `x`: itself if there is only one."""
    return x[block] if block else x


def part_of_weights(weights: Tensor, shape: torch.Size, block: Block) -> Tensor:
    """The block of weights that broadcast over a `shape`, ready to broadcast over its block."""
    return weights.expand(shape)[block] if block else weights


_threads: Any = threading.local()


def buffer(index: int, shape: torch.Size, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory on the device of `like` for a temporary, which all blocks share. Another index is another memory.

    On a CPU every thread keeps it for all calls: fresh memory would cost more time than what is computed in it, because
    the system clears it.
    """
    # Tensors of other types may be without memory, or belong to a transformation.
    if like.device.type != "cpu" or type(like) not in (Tensor, torch.nn.Parameter):
        return torch.empty(shape, dtype=dtype, device=like.device)
    kept: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = vars(_threads)
    memory, latest = kept.get((index, dtype), (None, None))
    if latest is not None and latest.shape == shape:
        return latest
    with torch.inference_mode(False):
        if memory is None or memory.numel() < shape.numel():
            memory = torch.empty(shape.numel(), dtype=dtype)
        latest = memory[: shape.numel()].view(shape)
    kept[index, dtype] = memory, latest
    return latest


def read(x: Tensor, dtype: torch.dtype, index: int) -> Tensor:
    """`x` itself if it is contiguous and in `dtype`, otherwise a copy of it in the `buffer` of this index."""
    return x if x.dtype == dtype and x.is_contiguous() else buffer(index, x.shape, dtype, x).copy_(x)


def norms_of_rows(x: Tensor) -> Tensor:
    """The norms (R,) of short rows of a contiguous block.

    The sum of their squares is as exact as `x.square().sum()`, without writing the squares. `torch.dot` and the norm of
    all are ten times less exact.
    """
    rows, rest = divmod(x.numel(), _ROW)
    if not rest and rows:
        return torch.linalg.vector_norm(x.view(rows, _ROW), dim=1)
    x = x.view(-1)
    norms = torch.linalg.vector_norm(x[: rows * _ROW].view(rows, _ROW), dim=1)
    return torch.cat([norms, torch.linalg.vector_norm(x[rows * _ROW :]).view(1)])


def sum_of_squares(norms: list[Tensor]) -> Tensor:
    """The sum, (), of the squares of the `norms_of_rows` of all blocks."""
    return (norms[0] if len(norms) == 1 else torch.cat(norms)).square_().sum()


def norm(norms: list[Tensor]) -> Tensor:
    """The norm, (), of all blocks together from their norms."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def flat(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors with one dim if all are contiguous, which leaves blocks no remainders; otherwise as they are."""
    if all(x is None or x.is_contiguous() for x in tensors):
        return tuple(None if x is None else x.view(-1) for x in tensors)
    return tensors


def collapsed(tensors: Sequence[Tensor | None], weights: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, and after them the weights that broadcast over them, with as few dims as the weights allow.

    A compiler then makes one loop, and the same for all shapes. Tensors that are not contiguous stay as they are.
    """
    shape = next(x.shape for x in tensors if x is not None)
    if not all(x is None or x.is_contiguous() for x in (*tensors, weights)):
        return *tensors, weights
    if weights is None:
        return *flat(*tensors), None
    sizes: list[int] = []
    weight_sizes: list[int] = []
    for size, weight_size in zip(shape, weights.shape, strict=True):
        if size != 1:
            is_shared = weight_size == 1
            if sizes and is_shared == (weight_sizes[-1] == 1):
                sizes[-1] *= size
                weight_sizes[-1] *= weight_size
            else:
                sizes.append(size)
                weight_sizes.append(weight_size)
    return *(None if x is None else x.view(sizes) for x in tensors), weights.view(weight_sizes)


def can_look(device: torch.device) -> bool:
    """Whether looking at a result costs nothing, because no device has to be waited for."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def with_zero_weights(one_pass: Callable[..., Any], total: Callable[[Any], Tensor], device: torch.device) -> Any:
    """Runs a pass over weighted tensors, of which an element of weight 0 contributes nothing, even if it is NaN.

    Multiplying by 0 would keep NaN and infinity. Where one can look at them, they show in the sum, and only then does
    the pass run again and overwrite the elements of weight 0.

    Args:
        one_pass: takes `excludes`, whether to overwrite.
        total: returns the sum, (), of its result.
        device: where its tensors are.
    """
    if can_look(device):
        result = one_pass(excludes=False)
        if math.isfinite(total(result).item()):
            return result
    return one_pass(excludes=True)


def item_or_tensor(x: float | Tensor) -> float | Tensor:
    """A tensor's value if `can_look`: products of numbers take no time."""
    return x.item() if isinstance(x, Tensor) and can_look(x.device) else x


def inverse_or_zero(denominator: Tensor) -> Tensor:
    """1 / denominator, and 0 where it is 0."""
    return torch.where(denominator == 0, 0.0, 1 / denominator)
