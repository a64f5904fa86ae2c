"""The velocity losses: target, residual, weights, loss, norms and gradients in one pass.

    target = uncond + guidance_scale * (uncond - cond), or uncond itself      error = prediction - target
    loss = scale * sum over elements of w * rho(error)                        w = mask * sample weight
    d loss / d prediction = g = scale * w * rho'(error)
    d loss / d uncond = -(1 + guidance_scale) * g                             d loss / d cond = guidance_scale * g

Floor: each input read once and each wanted gradient written once, 3n + n if only the prediction's is wanted. The
backward pass touches nothing if the upstream gradient is 1 (`fastunlearn.kernels.upstream`). In two cases the forward
pass leaves a factor to the backward pass, which then costs a read and a write:

1. A gradient is float16. Scaled by 1 / n it would underflow, multiplied by a large sample weight it would overflow, so
   both wait until the upstream gradient is known.
2. `mask_normalization="mask"`. The sum of the mask is known only when the pass is over.

`reduction="none"` also writes the loss of every element, and its backward pass reads as many upstream gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.dtypes import compute_dtype
from fastunlearn.kernels.launch import (
    FINISH_BLOCK,
    NO_OPERAND,
    PLANS,
    Launcher,
    Layout,
    block_elements,
    broadcast_offsets,
    described,
    distinct,
    finish_sum,
    launch_options,
    layout,
    leading_index,
    mask_index,
    on_device,
    programs_for,
    readable,
    rounded,
    same_layout,
    tile_count,
    tile_start,
)
from fastunlearn.kernels.upstream import scale_gradients
from fastunlearn.ops.once_differentiable import anchor, once_differentiable


@triton.jit
def velocity_forward_kernel(
    partial_ptr,  # (4, programs) out: sums of w * rho, prediction^2, target^2 and, if NORMALIZE, the mask
    losses_ptr,  # (elements,) out: scale * w * rho, or None
    gradient_prediction_ptr,  # (elements,) out, or None; so are the next two
    gradient_uncond_ptr,
    gradient_cond_ptr,
    prediction_ptr,  # (elements,)
    uncond_ptr,  # (elements,)
    cond_ptr,  # (elements,), or None: the target is uncond
    mask_ptr,  # the mask at its own resolution, without a channel dim, or None
    sample_weight_ptr,  # (B,), or None
    guidance_scale: tl.float64,
    loss_scale: tl.float64,  # multiplies what is stored at `losses_ptr`
    gradient_scale: tl.float64,  # multiplies the gradients
    elements,
    mask_strides,
    sample_weight_strides,
    MASK_DIM_SIZES: tl.constexpr,
    MASK_OPERAND_SIZES: tl.constexpr,
    MASK_IN_32_BITS: tl.constexpr,
    SAMPLE_DIM_SIZES: tl.constexpr,
    SAMPLE_OPERAND_SIZES: tl.constexpr,
    SAMPLE_IN_32_BITS: tl.constexpr,
    LOSS_TYPE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DEFER_SAMPLE_WEIGHT: tl.constexpr,  # write the gradients without it
    BLOCK: tl.constexpr,
):
    """Loss sums and gradients in one pass; each program takes every `num_programs`-th tile."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    dtype = partial_ptr.dtype.element_ty
    loss_sums = tl.zeros((BLOCK,), dtype)
    prediction_sums = tl.zeros((BLOCK,), dtype)
    target_sums = tl.zeros((BLOCK,), dtype)
    mask_sums = tl.zeros((BLOCK,), dtype)
    for tile in range(program, tile_count(elements, BLOCK), programs):
        offsets = tile_start(tile, BLOCK) + tl.arange(0, BLOCK)
        in_bounds = offsets < elements

        # 1. The target and the error.
        prediction = tl.load(prediction_ptr + offsets, in_bounds, 0).to(dtype)
        target = tl.load(uncond_ptr + offsets, in_bounds, 0).to(dtype)
        if cond_ptr is not None:
            cond = tl.load(cond_ptr + offsets, in_bounds, 0).to(dtype)
            target += tl.full((), guidance_scale, dtype) * (target - cond)
        error = prediction - target
        prediction_sums += prediction * prediction
        target_sums += target * target

        # 2. The residual and its slope; sign(0) = 0.
        if LOSS_TYPE == "l2":
            rho = error * error
            slope = 2 * error
        else:
            rho = tl.abs(error)
            slope = (error > 0).to(dtype) - (error < 0).to(dtype)

        # 3. The weights. Where one is 0, the element contributes nothing, even if it is NaN.
        if mask_ptr is not None:
            mask_offsets = broadcast_offsets(offsets, mask_strides, MASK_DIM_SIZES, MASK_OPERAND_SIZES, MASK_IN_32_BITS)
            weight = tl.load(mask_ptr + mask_offsets, in_bounds, 0).to(dtype)
            if NORMALIZE:
                mask_sums += weight
            rho = tl.where(weight == 0, 0, rho * weight)
            slope = tl.where(weight == 0, 0, slope * weight)
        if sample_weight_ptr is not None:
            sample_offsets = broadcast_offsets(
                offsets, sample_weight_strides, SAMPLE_DIM_SIZES, SAMPLE_OPERAND_SIZES, SAMPLE_IN_32_BITS
            )
            sample_weight = tl.load(sample_weight_ptr + sample_offsets, in_bounds, 0).to(dtype)
            rho = tl.where(sample_weight == 0, 0, rho * sample_weight)
            weighted_slope = slope if DEFER_SAMPLE_WEIGHT else slope * sample_weight
            slope = tl.where(sample_weight == 0, 0, weighted_slope)
        loss_sums += rho
        if losses_ptr is not None:
            tl.store(losses_ptr + offsets, rho * tl.full((), loss_scale, dtype), in_bounds)

        # 4. The gradients.
        gradient = slope * tl.full((), gradient_scale, dtype)
        if gradient_prediction_ptr is not None:
            element_type = gradient_prediction_ptr.dtype.element_ty
            tl.store(gradient_prediction_ptr + offsets, rounded(gradient, element_type), in_bounds)
        if gradient_uncond_ptr is not None:
            gradient_uncond = gradient * -1
            if cond_ptr is not None:
                gradient_uncond = gradient * tl.full((), -1 - guidance_scale, dtype)
            element_type = gradient_uncond_ptr.dtype.element_ty
            tl.store(gradient_uncond_ptr + offsets, rounded(gradient_uncond, element_type), in_bounds)
        if gradient_cond_ptr is not None:
            gradient_cond = gradient * tl.full((), guidance_scale, dtype)
            element_type = gradient_cond_ptr.dtype.element_ty
            tl.store(gradient_cond_ptr + offsets, rounded(gradient_cond, element_type), in_bounds)

    tl.store(partial_ptr + program, tl.sum(loss_sums))
    tl.store(partial_ptr + programs + program, tl.sum(prediction_sums))
    tl.store(partial_ptr + 2 * programs + program, tl.sum(target_sums))
    if NORMALIZE:
        tl.store(partial_ptr + 3 * programs + program, tl.sum(mask_sums))


@triton.jit
def velocity_finish_kernel(
    loss_ptr,  # () out, or None
    prediction_norm_ptr,  # () out
    target_norm_ptr,  # () out
    inverse_ptr,  # () out: 1 / the mask's sum, 0 for an empty mask, or None
    partial_ptr,  # (4, programs), as the forward kernel wrote it
    scale: tl.float64,
    programs,
    BLOCK: tl.constexpr,
):
    """Add up the partial sums, in one program."""
    dtype = partial_ptr.dtype.element_ty
    tl.store(prediction_norm_ptr, tl.sqrt(finish_sum(partial_ptr + programs, programs, BLOCK)))
    tl.store(target_norm_ptr, tl.sqrt(finish_sum(partial_ptr + 2 * programs, programs, BLOCK)))
    if loss_ptr is not None:
        loss = finish_sum(partial_ptr, programs, BLOCK) * tl.full((), scale, dtype)
        if inverse_ptr is not None:
            total = finish_sum(partial_ptr + 3 * programs, programs, BLOCK)
            inverse = tl.where(total == 0, 0, 1 / total)
            tl.store(inverse_ptr, inverse)
            loss *= inverse
        tl.store(loss_ptr, loss)


class _Options(NamedTuple):
    """The arguments of a velocity loss that are not tensors."""

    guidance_scale: float
    channel_dim: int
    loss_type: str
    reduction: str
    mask_normalization: str
    weight: float


def _is_normalized(mask: Tensor | None, options: _Options) -> bool:
    """Whether the loss is divided by the sum of a mask."""
    return mask is not None and options.reduction == "mean" and options.mask_normalization == "mask"


def _divisor(elements: int, is_normalized: bool, reduction: str) -> int:
    """What the loss is divided by, as far as it is known before the launch."""
    return max(elements, 1) if reduction == "mean" and not is_normalized else 1


def _defers_scale(gradients: Iterable[Tensor | None], is_normalized: bool) -> bool:
    """Whether the forward pass leaves the scale and the sample weights to the backward pass."""
    return is_normalized or torch.float16 in [x.dtype for x in gradients if x is not None]


class _Plan(NamedTuple):
    """What follows from layouts and options."""

    like: Tensor  # empty, of the dtype of the arithmetic
    partial_sums: int
    divisor: int  # of the loss, as far as it is known before the launch
    is_normalized: bool
    defers_scale: bool
    forward: Launcher | None  # None for an empty batch
    finish: Launcher


@functools.lru_cache(PLANS)
def _plan(
    layouts: tuple[Layout | None, ...],
    needs_gradient: tuple[bool, ...],
    channel_dim: int,
    loss_type: str,
    reduction: str,
    mask_normalization: str,
    device: torch.device,
) -> _Plan | None:
    """The plan for inputs, mask and sample weights of these layouts, or None unless all inputs are dense and alike."""
    prediction, uncond, cond, mask, sample_weight = map(described, layouts)
    assert prediction is not None
    inputs = (prediction, uncond, cond)
    if any(x is not y for x, y in zip(inputs, same_layout(prediction, (uncond, cond)), strict=True)):
        return None
    options = _Options(1.0, channel_dim, loss_type, reduction, mask_normalization, 1.0)
    dtype, elements = compute_dtype(prediction, uncond, cond, mask, sample_weight), prediction.numel()
    block = block_elements(dtype)
    programs = programs_for(elements, block)
    is_normalized = _is_normalized(mask, options)
    gradients = [x for x, needed in zip(inputs, needs_gradient, strict=True) if needed]
    defers_scale = _defers_scale(gradients, is_normalized)
    mask_broadcast = NO_OPERAND if mask is None else mask_index(prediction, mask, channel_dim)
    sample_broadcast = NO_OPERAND if sample_weight is None else leading_index(prediction, sample_weight)
    constants = {
        "MASK_DIM_SIZES": mask_broadcast.DIM_SIZES,
        "MASK_OPERAND_SIZES": mask_broadcast.OPERAND_SIZES,
        "MASK_IN_32_BITS": mask_broadcast.IN_32_BITS,
        "SAMPLE_DIM_SIZES": sample_broadcast.DIM_SIZES,
        "SAMPLE_OPERAND_SIZES": sample_broadcast.OPERAND_SIZES,
        "SAMPLE_IN_32_BITS": sample_broadcast.IN_32_BITS,
        "LOSS_TYPE": loss_type,
        "NORMALIZE": is_normalized,
        "DEFER_SAMPLE_WEIGHT": defers_scale,
        "BLOCK": block,
    }
    integers = (elements, mask_broadcast.strides, sample_broadcast.strides)
    launch = launch_options(device)
    return _Plan(
        torch.empty(0, dtype=dtype, device=device),
        4 * programs,
        _divisor(elements, is_normalized, reduction),
        is_normalized,
        defers_scale,
        Launcher(velocity_forward_kernel, (programs,), integers, constants, launch) if programs else None,
        Launcher(velocity_finish_kernel, (1,), (programs,), {"BLOCK": FINISH_BLOCK}, launch),
    )


def _launch_forward(
    prediction: Tensor,
    uncond: Tensor,
    cond: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    needs_gradient: list[bool],
    guidance_scale: float,
    channel_dim: int,
    loss_type: str,
    reduction: str,
    mask_normalization: str,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return the loss, both norms, the gradients of inputs that need one, and 1 / the mask's sum if it is used."""
    options = (guidance_scale, channel_dim, loss_type, reduction, mask_normalization, weight)
    plan = _plan(
        (layout(prediction), layout(uncond), layout(cond), layout(mask), layout(sample_weight)),
        tuple(needs_gradient),
        *options[1:-1],
        prediction.device,
    )
    if plan is None:
        inputs = same_layout(prediction, (uncond, cond))
        return _launch_forward(*inputs, mask, sample_weight, needs_gradient, *options)

    gradients = [
        torch.empty_like(x) if x is not None and needed else None
        for x, needed in zip((prediction, uncond, cond), needs_gradient, strict=True)
    ]
    scale = float(weight) / plan.divisor
    partial = plan.like.new_empty(plan.partial_sums)
    loss = plan.like.new_empty(())
    prediction_norm, target_norm = torch.empty_like(loss), torch.empty_like(loss)
    inverse = torch.empty_like(loss) if plan.is_normalized else None
    losses = torch.empty_like(prediction, dtype=loss.dtype) if reduction == "none" else None

    with on_device(prediction):
        if plan.forward is not None:
            plan.forward(
                (
                    partial,
                    losses,
                    *gradients,
                    prediction,
                    uncond,
                    cond,
                    None if mask is None else readable(mask),
                    None if sample_weight is None else readable(sample_weight),
                ),
                float(guidance_scale),
                scale,
                1.0 if plan.defers_scale else scale,
            )
        plan.finish((loss if losses is None else None, prediction_norm, target_norm, inverse, partial), scale)
    return (
        loss if losses is None else losses,
        prediction_norm,
        target_norm,
        [x for x in gradients if x is not None],
        [] if inverse is None else [inverse],
    )


velocity_loss_op = torch.library.custom_op("fastunlearn::velocity_loss", _launch_forward, mutates_args=())


@velocity_loss_op.register_fake
def _(
    prediction: Tensor,
    uncond: Tensor,
    cond: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    needs_gradient: list[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    dtype = compute_dtype(prediction, uncond, cond, mask, sample_weight)
    laid_out = same_layout(prediction, (uncond, cond))
    loss, *norms = (prediction.new_empty((), dtype=dtype) for _ in range(3))
    if _Options(*options).reduction == "none":
        loss = torch.empty_like(laid_out[0], dtype=dtype)
    gradients = [torch.empty_like(x) for x, needed in zip(laid_out, needs_gradient, strict=True) if needed]
    inverse = [torch.empty_like(norms[0])] if _is_normalized(mask, _Options(*options)) else []
    return loss, norms[0], norms[1], gradients, inverse


class _VelocityLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prediction: Tensor,
        uncond: Tensor,
        cond: Tensor | None,
        mask: Tensor | None,
        sample_weight: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs, needs_gradient = (prediction, uncond, cond), list(ctx.needs_input_grad[:3])
        launch = velocity_loss_op
        if not torch.compiler.is_compiling():
            # A registered operator would cost three times the host time.
            launch = _launch_forward
            # The inputs are not saved: second derivatives are noticed by their anchors.
            ctx.anchors = [anchor(x) for x, needed in zip(inputs, needs_gradient, strict=True) if needed]
        loss, *norms, gradients, inverse = launch(*inputs, mask, sample_weight, needs_gradient, *options)
        is_normalized = bool(inverse)
        ctx.scale = 1.0
        deferred_weight = None
        if _defers_scale(gradients, is_normalized):
            ctx.scale = options.weight / _divisor(prediction.numel(), is_normalized, options.reduction)
            deferred_weight = sample_weight
        ctx.save_for_backward(inverse[0] if inverse else None, deferred_weight, *gradients)
        ctx.mark_non_differentiable(*norms)
        return loss, norms[0], norms[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inverse, sample_weight, *gradients = ctx.saved_tensors
        scaled = iter(scale_gradients(gradients, upstream, ctx.scale, inverse, sample_weight))
        return (*(next(scaled) if needed else None for needed in ctx.needs_input_grad[:3]), None, None, None)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton counterpart of the `torch_backend` function: two launches, and one in the backward pass."""
    options = _Options(guidance_scale, channel_dim, loss_type, reduction, mask_normalization, weight)
    tensors = (prediction, uncond, cond, mask, sample_weight)
    # Inside an autograd function, `ctx.needs_input_grad` is True even under `torch.no_grad`.
    needs_gradient = prediction.requires_grad or uncond.requires_grad or (cond is not None and cond.requires_grad)
    if needs_gradient and torch.is_grad_enabled():
        return _VelocityLoss.apply(*distinct(tensors), options)  # type: ignore[no-untyped-call]
    launch = velocity_loss_op if torch.compiler.is_compiling() else _launch_forward
    return launch(*tensors, [False] * 3, *options)[:3]


def velocity_loss(prediction: Tensor, target: Tensor, **common: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton counterpart of the `torch_backend` function."""
    return negatively_guided_velocity_loss(prediction, target, None, guidance_scale=0.0, **common)
