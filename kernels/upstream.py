"""The backward pass of losses whose forward pass writes the gradients: multiply those by the upstream gradient.

    result = gradient * upstream * scale * inverse * (weight of the element's sample or layer)

Floor: no bytes if the gradients may be overwritten and the product of the factors is 1, which the kernel checks on the
device; otherwise one read and one write. A gradient of 0 stays 0 even if a factor is NaN or infinite, because its
element may have weight 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.kernels.launch import (
    NO_OPERAND,
    PLANS,
    Launcher,
    Layout,
    block_elements,
    broadcast_offsets,
    described,
    launch_options,
    layout,
    leading_index,
    on_device,
    programs_for,
    readable,
    rounded,
    tile_count,
    tile_start,
)
from fastunlearn.ops.once_differentiable import graph_is_kept


@triton.jit
def scale_gradients_kernel(
    result_ptrs,  # tuple of (elements,) out; `gradient_ptrs` themselves if IN_PLACE
    gradient_ptrs,  # tuple of (elements,) that the forward pass wrote
    upstream_ptr,  # (elements,) if PER_ELEMENT, else ()
    inverse_ptr,  # () another factor, or None
    weight_ptr,  # one factor per sample or per layer, or None
    scale: tl.float64,
    elements,
    weight_strides,
    WEIGHT_DIM_SIZES: tl.constexpr,
    WEIGHT_OPERAND_SIZES: tl.constexpr,
    WEIGHT_IN_32_BITS: tl.constexpr,
    PER_ELEMENT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply all gradients; each program takes every `num_programs`-th tile."""
    dtype = upstream_ptr.dtype.element_ty
    common_factor = tl.full((), scale, dtype)
    if not PER_ELEMENT:
        common_factor *= tl.load(upstream_ptr)
    if inverse_ptr is not None:
        common_factor *= tl.load(inverse_ptr)
    tiles = tile_count(elements, BLOCK)
    if IN_PLACE and not PER_ELEMENT and weight_ptr is None:
        # A kernel cannot return early, so it loops over no tiles instead.
        tiles = tl.where(common_factor == 1, 0, tiles)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offsets = tile_start(tile, BLOCK) + tl.arange(0, BLOCK)
        in_bounds = offsets < elements
        factors = tl.zeros((BLOCK,), dtype) + common_factor
        if PER_ELEMENT:
            factors *= tl.load(upstream_ptr + offsets, in_bounds, 0)
        if weight_ptr is not None:
            weight_offsets = broadcast_offsets(
                offsets, weight_strides, WEIGHT_DIM_SIZES, WEIGHT_OPERAND_SIZES, WEIGHT_IN_32_BITS
            )
            factors *= tl.load(weight_ptr + weight_offsets, in_bounds, 0).to(dtype)
        for i in tl.static_range(len(gradient_ptrs)):
            gradient = tl.load(gradient_ptrs[i] + offsets, in_bounds, 0).to(dtype)
            gradient = tl.where(gradient == 0, 0, gradient * factors)
            tl.store(result_ptrs[i] + offsets, rounded(gradient, result_ptrs[i].dtype.element_ty), in_bounds)


@functools.lru_cache(PLANS)
def _launcher(
    gradient: Layout,
    dtypes: tuple[torch.dtype, ...],
    upstream_dtype: torch.dtype,
    weight: Layout | None,
    has_inverse: bool,
    per_element: bool,
    in_place: bool,
    device: torch.device,
) -> Launcher:
    """How to multiply gradients of these `dtypes` and the layout of the first; its arguments are the kernel's."""
    x, weights = described(gradient), described(weight)
    assert x is not None
    index = NO_OPERAND if weights is None else leading_index(x, weights)
    block = block_elements(upstream_dtype)
    constants = {
        "WEIGHT_DIM_SIZES": index.DIM_SIZES,
        "WEIGHT_OPERAND_SIZES": index.OPERAND_SIZES,
        "WEIGHT_IN_32_BITS": index.IN_32_BITS,
        "PER_ELEMENT": per_element,
        "IN_PLACE": in_place,
        "BLOCK": block,
    }
    grid = (programs_for(x.numel(), block),)
    return Launcher(scale_gradients_kernel, grid, (x.numel(), index.strides), constants, launch_options(device))


def _launch(
    gradients: Sequence[Tensor],
    upstream: Tensor,
    scale: float,
    inverse: Tensor | None,
    weight: Tensor | None,
    *,
    in_place: bool,
) -> list[Tensor]:
    results = list(gradients) if in_place else [torch.empty_like(x) for x in gradients]
    if not results or results[0].numel() == 0:
        return results
    first = gradients[0]
    per_element = upstream.dim() > 0 and any(upstream.stride())
    if per_element:
        if upstream.stride() != first.stride():
            upstream = torch.empty_like(first, dtype=upstream.dtype).copy_(upstream)
    elif upstream.dim() > 0:
        upstream = upstream[(0,) * upstream.dim()]  # one expanded value: the gradient of a sum or a mean
    launch = _launcher(
        layout(first),
        tuple([x.dtype for x in gradients]),
        upstream.dtype,
        layout(weight),
        inverse is not None,
        per_element,
        in_place,
        first.device,
    )
    with on_device(first):
        launch(
            (tuple(results), tuple(gradients), upstream, inverse, None if weight is None else readable(weight)),
            float(scale),
        )
    return results


@torch.library.custom_op("fastunlearn::scale_gradients", mutates_args=())
def scale_gradients_op(
    gradients: list[Tensor], upstream: Tensor, scale: float, inverse: Tensor | None, weight: Tensor | None
) -> list[Tensor]:
    """`scale_gradients` as torch.compile sees it: never in place."""
    return _launch(gradients, upstream, scale, inverse, weight, in_place=False)


@scale_gradients_op.register_fake
def _(gradients: list[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(x) for x in gradients]


def scale_gradients(
    gradients: Sequence[Tensor],
    upstream: Tensor,
    scale: float,
    inverse: Tensor | None = None,
    weight: Tensor | None = None,
) -> list[Tensor]:
    """Multiply gradients of one dense layout in one launch: in place, unless the graph is kept or compiled.

    Args:
        gradients: what the forward pass wrote, all of one shape.
        upstream: the upstream gradient, () or of the gradients' shape.
        scale: a factor.
        inverse: another one, ().
        weight: a factor for each position in the gradients' first dim, (n,), or (1,) for all of them.
    """
    if torch.compiler.is_compiling():
        return scale_gradients_op(list(gradients), upstream, scale, inverse, weight)
    return _launch(gradients, upstream, scale, inverse, weight, in_place=not graph_is_kept())
