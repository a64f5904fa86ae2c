"""The localization loss of dense outputs in one pass: the forward pass reads every output once and writes its gradient.

All layers are one autograd function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.dtypes import compute_dtype
from fastunlearn.ops.once_differentiable import once_differentiable
from fastunlearn.ops.spatial_masks import expanded_sum, match_resolution
from fastunlearn.ops.torch_backend.blocks import (
    block_elements,
    blocks_of,
    buffer,
    collapsed,
    compiled,
    inverse_or_zero,
    item_or_tensor,
    norms_of_rows,
    part,
    part_of_weights,
    read,
    sum_of_squares,
    with_zero_weights,
)
from fastunlearn.ops.torch_backend.upstream import keep_gradients, kept_dtype, kept_gradients, new_gradients


class Background(NamedTuple):
    """Where a layer's output counts."""

    weights: Tensor
    """1 - mask, ready to broadcast over the output."""
    scale: float | Tensor
    """What the layer's sum is multiplied by: 1 / its divisor."""
    is_binary: bool
    """Whether the weights are 0 and 1, so that they are their own squares."""


def backgrounds(
    shapes: Sequence[Sequence[int]], masks: Sequence[Tensor], normalization: str, dtype: torch.dtype
) -> list[Background]:
    """The backgrounds of outputs of these shapes, tokens (B, N, D) or feature maps (B, C, *spatial)."""
    # Most layers have the same mask and shape.
    known: dict[tuple[int, tuple[int, ...]], Background] = {}
    result = []
    for shape, mask in zip(shapes, masks, strict=True):
        key = (id(mask), tuple(shape))
        if key not in known:
            weights = 1 - match_resolution(mask, shape, 2 if len(shape) == 3 else 1, dtype)
            scale: float | Tensor
            if normalization == "background_mean":
                scale = item_or_tensor(inverse_or_zero(expanded_sum(weights, shape)))
            else:
                scale = 1 / max(shape[0] if normalization == "sum" else math.prod(shape), 1)
            known[key] = Background(weights, scale, mask.dtype == torch.bool)
        result.append(known[key])
    return result


def localization_loss(
    outputs: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    loss_type: str,
    normalization: str,
    weight: float,
    is_compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss, and the layers' terms without `weight`.

    Outputs are tokens (B, N, D) with a mask (B or 1, N), or feature maps (B, C, *spatial) with a mask of any
    resolution.
    """
    dtype = compute_dtype(*outputs, *masks)
    layers = backgrounds([output.shape for output in outputs], masks, normalization, dtype)
    options = _Options(loss_type == "l2", weight, dtype, is_compiled)
    if torch.is_grad_enabled() and any(output.requires_grad for output in outputs):
        return _LocalizationLoss.apply(layers, options, *outputs)  # type: ignore[no-untyped-call]
    return _one_pass(outputs, [False] * len(outputs), layers, options)[:2]


class _Options(NamedTuple):
    l2: bool
    weight: float
    dtype: torch.dtype
    is_compiled: bool


_Results = tuple[Tensor, Tensor, list[Tensor | None]]  # loss, terms of the layers, gradients


class _LocalizationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: list[Background], options: _Options, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        loss, per_layer, gradients = _one_pass(outputs, ctx.needs_input_grad[2:], layers, options)
        keep_gradients(ctx, outputs, gradients)
        ctx.mark_non_differentiable(per_layer)
        return loss, per_layer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *kept_gradients(ctx, upstream))


def _one_pass(
    outputs: Sequence[Tensor], needed: Sequence[bool], layers: Sequence[Background], options: _Options
) -> _Results:
    """Reads each output once. `needed` tells whose gradients to return."""
    if options.is_compiled or torch.compiler.is_compiling():
        return _whole(outputs, needed, layers, options)
    gradients = new_gradients(outputs, needed, options.dtype)
    terms = []
    for output, gradient, layer in zip(outputs, gradients, layers, strict=True):
        factor = layer.scale * options.weight / len(outputs)
        write = functools.partial(_write_blocks, output, gradient, layer, factor, options)
        terms.append(with_zero_weights(write, lambda total: total, output.device) * layer.scale)
    per_layer = torch.stack(terms)
    return options.weight * per_layer.mean(), per_layer, gradients


def _write_blocks(
    output: Tensor,
    gradient: Tensor | None,
    layer: Background,
    factor: float | Tensor,
    options: _Options,
    *,
    excludes: bool,
) -> Tensor:
    """Writes the gradient, multiplied by `factor`. Returns the sum of rho(output * weights)."""
    l2, dtype = options.l2, options.dtype
    factor = 2 * factor if l2 else factor
    # The weighted output takes the place of its gradient, if that is as wide.
    place = gradient if gradient is not None and gradient.dtype == dtype and gradient.is_contiguous() else None
    sums: list[Tensor] = []
    elements = block_elements(output.numel(), output.device)
    for block in blocks_of(output.shape, elements):
        x, w = part(output, block), part_of_weights(layer.weights, output.shape, block)
        outside = buffer(0, x.shape, dtype, x) if place is None else part(place, block)
        torch.mul(read(x, dtype, 0), w, out=outside)
        if excludes:
            outside.masked_fill_(w == 0, 0)
        slope = outside
        if l2:
            sums.append(norms_of_rows(outside))
        else:
            slope = torch.sign(outside, out=buffer(1, x.shape, dtype, x))
            sums.append(outside.mul_(slope).sum())
        if gradient is not None:
            # Weights of 0 and 1 are their own squares.
            if not (l2 and layer.is_binary):
                slope.mul_(w)
            result = part(gradient, block)
            if result.dtype == dtype:
                torch.mul(slope, factor, out=result)
            else:
                result.copy_(slope.mul_(factor))
    return sum_of_squares(sums) if l2 else torch.stack(sums).sum()


def _whole(
    outputs: Sequence[Tensor], needed: Sequence[bool], layers: Sequence[Background], options: _Options
) -> _Results:
    """What `_one_pass` returns, in one loop over each layer."""
    l2, weight, dtype, _ = options
    pairs = [collapsed([output], layer.weights) for output, layer in zip(outputs, layers, strict=True)]
    device = outputs[0].device
    scales = torch.stack([torch.as_tensor(layer.scale, dtype=dtype, device=device) for layer in layers])
    share = torch.as_tensor(weight / len(layers), dtype=dtype, device=device)
    run = compiled(_formula, l2, dtype, tuple(needed))
    loss, per_layer, gradients = run(*map(list, zip(*pairs, strict=True)), scales, share)
    shaped = [None if g is None else g.view(o.shape) for g, o in zip(gradients, outputs, strict=True)]
    return loss, per_layer, shaped


def _formula(l2: bool, dtype: torch.dtype, needed: tuple[bool, ...]) -> Callable[..., _Results]:
    def formula(outputs: list[Tensor], weights: list[Tensor], scales: Tensor, share: Tensor) -> _Results:
        terms: list[Tensor] = []
        gradients: list[Tensor | None] = []
        for output, w, scale, wanted in zip(outputs, weights, scales.unbind(), needed, strict=True):
            outside = torch.where(w == 0, 0, output.to(dtype) * w)
            slope = outside if l2 else outside.sign()
            terms.append((slope * outside).sum() * scale)
            gradient = slope * w * ((2 if l2 else 1) * share * scale) if wanted else None
            gradients.append(None if gradient is None else gradient.to(kept_dtype(output, dtype)))
        per_layer = torch.stack(terms)
        return per_layer.sum() * share, per_layer, gradients

    return formula
