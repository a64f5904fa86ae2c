"""Velocity losses in one pass: the forward pass reads every input once and writes the gradients."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fastunlearn.dtypes import compute_dtype
from fastunlearn.ops.once_differentiable import once_differentiable
from fastunlearn.ops.spatial_masks import expanded_sum, match_resolution
from fastunlearn.ops.torch_backend.blocks import (
    BLOCK_ELEMENTS,
    block_elements,
    blocks_of,
    buffer,
    collapsed,
    compiled,
    flat,
    form,
    inverse_or_zero,
    item_or_tensor,
    norm,
    norms_of_rows,
    part,
    part_of_weights,
    read,
    sum_of_squares,
    with_zero_weights,
)
from fastunlearn.ops.torch_backend.upstream import keep_gradients, kept_dtype, kept_gradients, new_gradients


class _Options(NamedTuple):
    l2: bool
    per_element: bool
    weights_are_binary: bool
    guidance_scale: float
    dtype: torch.dtype
    is_compiled: bool


_Inputs = tuple[Tensor, Tensor, Tensor | None]  # prediction, uncond, cond
_Results = tuple[Tensor, Tensor, Tensor, list[Tensor | None]]  # loss, norms of prediction and target, gradients


def negatively_guided_velocity(
    uncond: Tensor, cond: Tensor, guidance_scale: float, *, is_compiled: bool = False
) -> Tensor:
    """The velocity uncond + guidance_scale * (uncond - cond), in the promoted dtype of the two."""
    return _NegativelyGuidedVelocity.apply(uncond, cond, guidance_scale, is_compiled)  # type: ignore[no-untyped-call]


def velocity_loss(prediction: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the L2 norms of prediction and target."""
    return negatively_guided_velocity_loss(prediction, target, None, guidance_scale=0.0, **options)


def negatively_guided_velocity_loss(
    prediction: Tensor,
    uncond: Tensor,
    cond: Tensor | None,
    *,
    guidance_scale: float,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    channel_dim: int,
    loss_type: str,
    reduction: str,
    mask_normalization: str,
    weight: float,
    is_compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the L2 norms of prediction and target.

    The target is `negatively_guided_velocity(uncond, cond)`, or `uncond` itself if `cond` is None.
    """
    dtype = compute_dtype(prediction, uncond, cond, mask, sample_weight)
    scale: float | Tensor = weight
    if reduction == "mean":
        scale = weight / max(prediction.numel(), 1)
    weights = None
    if mask is not None:
        weights = match_resolution(mask, prediction.shape, channel_dim, dtype)
        if reduction == "mean" and mask_normalization == "mask":
            scale = item_or_tensor(weight * inverse_or_zero(expanded_sum(weights, prediction.shape)))
    if sample_weight is not None:
        per_sample = sample_weight.to(dtype).reshape(-1, *[1] * (prediction.dim() - 1))
        weights = per_sample if weights is None else weights * per_sample
    is_binary = sample_weight is None and mask is not None and mask.dtype == torch.bool
    options = _Options(loss_type == "l2", reduction == "none", is_binary, guidance_scale, dtype, is_compiled)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (prediction, uncond, cond)):
        return _VelocityLoss.apply(prediction, uncond, cond, weights, scale, options)  # type: ignore[no-untyped-call]
    return _one_pass((prediction, uncond, cond), (False, False, False), weights, scale, options)[:3]


class _VelocityLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prediction: Tensor,
        uncond: Tensor,
        cond: Tensor | None,
        weights: Tensor | None,
        scale: float | Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (prediction, uncond, cond)
        loss, *norms, gradients = _one_pass(inputs, ctx.needs_input_grad, weights, scale, options)
        keep_gradients(ctx, inputs, gradients)
        ctx.mark_non_differentiable(*norms)
        return loss, norms[0], norms[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*kept_gradients(ctx, upstream), None, None, None)


def _one_pass(
    inputs: _Inputs, needed: Sequence[bool], weights: Tensor | None, scale: float | Tensor, options: _Options
) -> _Results:
    """Reads prediction, uncond and cond once.

    Args:
        inputs: the three.
        needed: begins with three: of which of them to return the gradient.
        weights: broadcast over the velocities, or None.
        scale: multiplies the loss and the gradients.
        options: of the loss.
    """
    if options.is_compiled or torch.compiler.is_compiling():
        return _whole(inputs, needed, weights, scale, options)
    return _in_blocks(inputs, needed, weights, scale, options)


def _multiples(guidance_scale: Any, is_guided: bool) -> tuple[float, Any, Any]:
    """What the gradients of prediction, uncond and cond are of that of the error, prediction - target."""
    return 1.0, -1.0 - guidance_scale if is_guided else -1.0, guidance_scale


def _in_blocks(
    inputs: _Inputs, needed: Sequence[bool], weights: Tensor | None, scale: float | Tensor, options: _Options
) -> _Results:
    prediction = inputs[0]
    gradients = new_gradients(inputs, needed, options.dtype)
    losses = torch.empty_like(prediction, dtype=options.dtype) if options.per_element else None
    factor = item_or_tensor(2 * scale if options.l2 else scale)
    tensors: tuple[Tensor | None, ...] = (*inputs, losses, *gradients)
    if weights is None:
        if prediction.numel() > BLOCK_ELEMENTS:
            tensors = flat(*tensors)
        loss, *norms = _write_blocks(tensors, None, factor, options)
    else:
        write = functools.partial(_write_blocks, tensors, weights, factor, options)
        loss, *norms = with_zero_weights(write, lambda results: results[0], prediction.device)
    return (loss if losses is None else losses) * scale, norms[0], norms[1], gradients


def _write_blocks(
    tensors: tuple[Tensor | None, ...],
    weights: Tensor | None,
    factor: float | Tensor,
    options: _Options,
    *,
    excludes: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes losses, without scale, and gradients, which come after the three inputs in `tensors`.

    Returns:
        The sum of the losses, and the norms of prediction and target.
    """
    prediction, uncond, cond, losses, *gradients = tensors
    assert prediction is not None and uncond is not None
    l2, dtype, guidance_scale = options.l2, options.dtype, options.guidance_scale
    # Weights of 0 and 1 are their own squares, so the weighted error alone tells the loss.
    squares_suffice = l2 and losses is None and (weights is None or options.weights_are_binary)
    # `lerp` computes uncond + ((1 + guidance_scale) - 1) * (uncond - cond).
    is_interpolation = guidance_scale > -0.5 and _rounded(_rounded(1 + guidance_scale) - 1) == _rounded(guidance_scale)
    multiples = _multiples(guidance_scale, cond is not None)
    written = [(g, multiple * factor) for g, multiple in zip(gradients, multiples, strict=True) if g is not None]
    # The error takes the place of the gradient that is written last, if that is as wide.
    written.reverse()
    place = written[-1][0] if written else None
    if place is not None and not (place.dtype == dtype and place.is_contiguous()):
        place = None
    sums: list[Tensor] = []
    prediction_norms: list[Tensor] = []
    target_norms: list[Tensor] = []
    elements = block_elements(prediction.numel(), prediction.device)
    for block in blocks_of(prediction.shape, elements):
        predicted = read(part(prediction, block), dtype, 0)
        shape = predicted.shape
        error = buffer(1, shape, dtype, predicted) if place is None else part(place, block)
        target = read(part(uncond, block), dtype, 2)
        if cond is not None:
            other = read(part(cond, block), dtype, 3)
            if is_interpolation:
                target = torch.lerp(other, target, 1 + guidance_scale, out=error)
            else:
                torch.sub(target, other, out=error)
                target = torch.add(target, error, alpha=guidance_scale, out=error)
        prediction_norms.append(vector_norm(predicted))
        target_norms.append(vector_norm(target))
        slope = torch.sub(predicted, target, out=error)
        if weights is not None:
            w = part_of_weights(weights, prediction.shape, block)
            if excludes:
                error.masked_fill_(w == 0, 0)
        if squares_suffice:
            if weights is not None:
                error.mul_(w)
            sums.append(norms_of_rows(error))
        else:
            slope = buffer(2, shape, dtype, predicted)
            if l2:
                slope.copy_(error)
            else:
                torch.sign(error, out=slope)
            if weights is not None:
                slope.mul_(w)
            sums.append(error.mul_(slope).sum())
            if losses is not None:
                part(losses, block).copy_(error)
        for gradient, multiple in written:
            result = part(gradient, block)
            if result.dtype == dtype:
                torch.mul(slope, multiple, out=result)
            else:
                result.copy_(torch.mul(slope, multiple, out=buffer(3, shape, dtype, predicted)))
    loss = sum_of_squares(sums) if squares_suffice else torch.stack(sums).sum()
    return loss, norm(prediction_norms), norm(target_norms)


def _rounded(x: float) -> float:
    """`x` in float32."""
    return ctypes.c_float(x).value


def _whole(
    inputs: _Inputs, needed: Sequence[bool], weights: Tensor | None, scale: float | Tensor, options: _Options
) -> _Results:
    """What `_in_blocks` computes, in one loop."""
    shape, device = inputs[0].shape, inputs[0].device
    scalars = [torch.as_tensor(x, dtype=options.dtype, device=device) for x in (scale, options.guidance_scale)]
    run = compiled(_formula, options.l2, options.per_element, options.dtype, tuple(needed[:3]))
    loss, *norms, gradients = run(*collapsed(inputs, weights), *scalars)
    gradients = [None if g is None else g.view(shape) for g in gradients]
    return loss.view(shape) if options.per_element else loss, norms[0], norms[1], gradients


def _formula(l2: bool, per_element: bool, dtype: torch.dtype, needed: tuple[bool, ...]) -> Callable[..., _Results]:
    def formula(
        prediction: Tensor,
        uncond: Tensor,
        cond: Tensor | None,
        weights: Tensor | None,
        scale: Tensor,
        guidance_scale: Tensor,
    ) -> _Results:
        predicted, target = prediction.to(dtype), uncond.to(dtype)
        if cond is not None:
            target = target + guidance_scale * (target - cond.to(dtype))
        error = predicted - target
        if weights is not None:
            error = torch.where(weights == 0, 0, error)
        slope = error if l2 else error.sign()
        if weights is not None:
            slope = slope * weights
        losses = slope * error
        factor = slope * (2 * scale if l2 else scale)
        multiples = _multiples(guidance_scale, cond is not None)
        gradients = [
            (factor * multiple).to(kept_dtype(x, dtype)) if wanted and x is not None else None
            for x, wanted, multiple in zip((prediction, uncond, cond), needed, multiples, strict=True)
        ]
        loss = (losses if per_element else losses.sum()) * scale
        return loss, predicted.square().sum().sqrt(), target.square().sum().sqrt(), gradients

    return formula


class _NegativelyGuidedVelocity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, uncond: Tensor, cond: Tensor, guidance_scale: float, is_compiled: bool) -> Tensor:
        ctx.guidance_scale, ctx.dtypes = guidance_scale, (uncond.dtype, cond.dtype)
        run = form(_target_in_blocks, _target, is_compiled)
        velocity: Tensor = run(uncond, cond, guidance_scale, compute_dtype(uncond, cond))
        return velocity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factors = (1 + ctx.guidance_scale, -ctx.guidance_scale)
        wide = compute_dtype(upstream)
        gradients = [
            (upstream.to(wide) * factor).to(dtype) if wanted else None
            for factor, dtype, wanted in zip(factors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return (*gradients, None, None)


def _target(uncond: Tensor, cond: Tensor, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    base = uncond.to(dtype)
    velocity = base + guidance_scale * (base - cond.to(dtype))
    return velocity.to(torch.promote_types(uncond.dtype, cond.dtype))


def _target_in_blocks(uncond: Tensor, cond: Tensor, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    velocity = torch.empty_like(uncond, dtype=torch.promote_types(uncond.dtype, cond.dtype))
    for block in blocks_of(uncond.shape, block_elements(uncond.numel(), uncond.device)):
        velocity[block] = _target(uncond[block], cond[block], guidance_scale, dtype)
    return velocity
