"""Backward of every loss here: multiply the gradients that the forward pass wrote by the upstream gradient.

    result = gradient * upstream * scale * inverse * weight of the element's sample or layer

Floor: where the product is 1, which is seen on the device, and the gradients may be overwritten: nothing. Elsewhere one
read and one write. A gradient of 0 stays 0, whatever multiplies it: its weight may have been 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.kernels.launch import (
    NO_WEIGHTS,
    Weights,
    block_elements,
    launch_options,
    on_device,
    programs_for,
    rounded,
    tile_start,
    weight_offsets,
)


@triton.jit
def scale_gradients_kernel(
    result_ptrs,  # tuple of (elements,) out; `gradient_ptrs` themselves if IN_PLACE
    gradient_ptrs,  # tuple of (elements,) that the forward pass wrote
    upstream_ptr,  # (elements,) if PER_ELEMENT, else ()
    inverse_ptr,  # () another factor, or None
    weight_ptr,  # a factor for every sample or layer, or None
    weight_strides,
    scale: tl.float64,
    elements,
    SIZES: tl.constexpr,
    WEIGHT_SIZES: tl.constexpr,
    NARROW: tl.constexpr,
    PER_ELEMENT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply all gradients; a program takes every `num_programs`-th tile."""
    dtype = upstream_ptr.dtype.element_ty
    factor = tl.full((), scale, dtype)
    if not PER_ELEMENT:
        factor *= tl.load(upstream_ptr)
    if inverse_ptr is not None:
        factor *= tl.load(inverse_ptr)
    tiles = tl.cdiv(elements, BLOCK)
    if IN_PLACE and not PER_ELEMENT and weight_ptr is None:
        # No `return` in a kernel: no tiles instead.
        tiles = tl.where(factor == 1, 0, tiles)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offsets = tile_start(tile, BLOCK) + tl.arange(0, BLOCK)
        mask = offsets < elements
        factors = tl.zeros((BLOCK,), dtype) + factor
        if PER_ELEMENT:
            factors *= tl.load(upstream_ptr + offsets, mask, 0)
        if weight_ptr is not None:
            found = weight_offsets(offsets, weight_strides, SIZES, WEIGHT_SIZES, NARROW)
            factors *= tl.load(weight_ptr + found, mask, 0).to(dtype)
        for i in tl.static_range(len(gradient_ptrs)):
            gradient = tl.load(gradient_ptrs[i] + offsets, mask, 0).to(dtype)
            gradient = tl.where(gradient == 0, 0, gradient * factors)
            tl.store(result_ptrs[i] + offsets, rounded(gradient, result_ptrs[i].dtype.element_ty), mask)


def scale_gradients(
    gradients: Sequence[Tensor],
    upstream: Tensor,
    scale: float,
    *,
    inverse: Tensor | None = None,
    weight: Tensor | None = None,
    weights: Weights | None = None,
    in_place: bool = False,
) -> list[Tensor]:
    """The gradients, all of one dense layout, times `upstream` and what else is given, in one launch.

    Args:
        gradients: what the forward pass wrote, overwritten if `in_place`.
        upstream: () or of the gradients' shape.
        scale: a factor.
        inverse: () another.
        weight: a factor that varies as `weights` says.
        weights: how to find the `weight` of an element.
        in_place: whether the gradients may be overwritten.
    """
    gradients = list(gradients)
    results = gradients if in_place else [torch.empty_like(x) for x in gradients]
    elements = gradients[0].numel() if gradients else 0
    if elements == 0:
        return results
    per_element = upstream.dim() > 0 and any(upstream.stride())
    if per_element:
        if upstream.stride() != gradients[0].stride():
            upstream = torch.empty_like(gradients[0], dtype=upstream.dtype).copy_(upstream)
    elif upstream.dim() > 0:
        upstream = upstream[(0,) * upstream.dim()]  # one value, expanded: the gradient of a sum or a mean
    weights = weights or NO_WEIGHTS
    block = block_elements(upstream.dtype)
    with on_device(upstream):
        scale_gradients_kernel[(programs_for(elements, block),)](
            tuple(results),
            tuple(gradients),
            upstream,
            inverse,
            weight,
            weights.strides,
            float(scale),
            elements,
            SIZES=weights.SIZES,
            WEIGHT_SIZES=weights.WEIGHT_SIZES,
            NARROW=weights.NARROW,
            PER_ELEMENT=per_element,
            IN_PLACE=in_place,
            BLOCK=block,
            **launch_options(upstream),
        )
    return results


def graph_is_kept() -> bool:
    """Whether the backward pass that is running may run again, so that nothing it saved may be overwritten."""
    try:
        return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return True


def anchor(x: Tensor) -> Tensor:
    """An empty tensor that depends on `x` and holds none of its memory."""
    with torch.enable_grad():
        return x.flatten()[:0].clone() if x.dim() == 0 else x.narrow(0, 0, 0).clone()


def once_differentiable(
    gradients: Sequence[Tensor | None], upstream: Tensor, anchors: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients, which raise if they are differentiated again with respect to what they were computed from."""
    if not torch.is_grad_enabled():
        return list(gradients)
    forbid: Callable[..., Tensor] = _NoSecondDerivative.apply
    return [None if x is None else forbid(x, upstream, *anchors) for x in gradients]


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient as it is, depending on what it was computed from."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError("fastunlearn's losses are once-differentiable: there is no second derivative")
