"""The velocity losses: target, residual, weights, loss, norms and gradients in one pass.

    target = uncond + eta * (uncond - cond), or uncond itself         error = prediction - target
    loss = scale * sum over elements of w * rho(error)                w = mask * sample weight
    d loss / d prediction = g = scale * w * rho'(error)     d / d uncond = -(1 + eta) g     d / d cond = eta g

Floor: every input read once and every wanted gradient written once, 3n + n for the prediction's alone. The backward
pass touches nothing where the upstream gradient is 1 (`fastunlearn.kernels.upstream`). Two cases leave a factor to it,
and cost it a read and a write:

1. A float16 gradient. Scaled by 1 / n it would underflow, multiplied by a large sample weight overflow: both wait.
2. `mask_normalization="mask"`. The sum of the mask is known once the pass is over.

`reduction="none"` writes the loss of every element too, and its backward reads as many upstream gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.kernels.launch import (
    FINISH_BLOCK,
    NO_WEIGHTS,
    Weights,
    block_elements,
    compute_dtype,
    finish_sum,
    launch_options,
    on_device,
    programs_for,
    readable,
    rounded,
    same_layout,
    tile_start,
    weight_offsets,
    weights_of,
)
from fastunlearn.kernels.upstream import anchor, graph_is_kept, once_differentiable, scale_gradients


@triton.jit
def velocity_forward_kernel(
    partial_ptr,  # (4, programs) out: sums of w * rho, prediction^2, target^2 and, if NORMALIZE, the mask
    losses_ptr,  # (elements,) out: scale * w * rho, or None
    gradient_prediction_ptr,  # (elements,) out, or None, like the next two
    gradient_uncond_ptr,
    gradient_cond_ptr,
    prediction_ptr,  # (elements,)
    uncond_ptr,  # (elements,)
    cond_ptr,  # (elements,), or None: the target is uncond
    mask_ptr,  # the mask at its own resolution, or None
    mask_strides,
    sample_weight_ptr,  # (B,), or None
    sample_weight_strides,
    guidance_scale: tl.float64,
    loss_scale: tl.float64,  # of `losses_ptr`
    gradient_scale: tl.float64,  # of the gradients
    elements,
    MASK_SIZES: tl.constexpr,
    MASK_WEIGHT_SIZES: tl.constexpr,
    MASK_NARROW: tl.constexpr,
    SAMPLE_SIZES: tl.constexpr,
    SAMPLE_WEIGHT_SIZES: tl.constexpr,
    SAMPLE_NARROW: tl.constexpr,
    LOSS_TYPE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DEFER_SAMPLE_WEIGHT: tl.constexpr,  # the gradients are written without it
    BLOCK: tl.constexpr,
):
    """All tensors; a program takes every `num_programs`-th tile."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    dtype = partial_ptr.dtype.element_ty
    loss_sums = tl.zeros((BLOCK,), dtype)
    prediction_sums = tl.zeros((BLOCK,), dtype)
    target_sums = tl.zeros((BLOCK,), dtype)
    mask_sums = tl.zeros((BLOCK,), dtype)
    for tile in range(program, tl.cdiv(elements, BLOCK), programs):
        offsets = tile_start(tile, BLOCK) + tl.arange(0, BLOCK)
        mask = offsets < elements

        # 1. The target and the error.
        prediction = tl.load(prediction_ptr + offsets, mask, 0).to(dtype)
        target = tl.load(uncond_ptr + offsets, mask, 0).to(dtype)
        if cond_ptr is not None:
            cond = tl.load(cond_ptr + offsets, mask, 0).to(dtype)
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

        # 3. Weights. Where one of them is 0 nothing is left, not even 0 * NaN.
        if mask_ptr is not None:
            mask_offsets = weight_offsets(offsets, mask_strides, MASK_SIZES, MASK_WEIGHT_SIZES, MASK_NARROW)
            weight = tl.load(mask_ptr + mask_offsets, mask, 0).to(dtype)
            if NORMALIZE:
                mask_sums += weight
            rho = tl.where(weight == 0, 0, rho * weight)
            slope = tl.where(weight == 0, 0, slope * weight)
        if sample_weight_ptr is not None:
            sample_offsets = weight_offsets(
                offsets, sample_weight_strides, SAMPLE_SIZES, SAMPLE_WEIGHT_SIZES, SAMPLE_NARROW
            )
            sample_weight = tl.load(sample_weight_ptr + sample_offsets, mask, 0).to(dtype)
            rho = tl.where(sample_weight == 0, 0, rho * sample_weight)
            weighted_slope = slope if DEFER_SAMPLE_WEIGHT else slope * sample_weight
            slope = tl.where(sample_weight == 0, 0, weighted_slope)
        loss_sums += rho
        if losses_ptr is not None:
            tl.store(losses_ptr + offsets, rho * tl.full((), loss_scale, dtype), mask)

        # 4. The gradients.
        gradient = slope * tl.full((), gradient_scale, dtype)
        if gradient_prediction_ptr is not None:
            element_type = gradient_prediction_ptr.dtype.element_ty
            tl.store(gradient_prediction_ptr + offsets, rounded(gradient, element_type), mask)
        if gradient_uncond_ptr is not None:
            gradient_uncond = gradient * -1
            if cond_ptr is not None:
                gradient_uncond = gradient * tl.full((), -1 - guidance_scale, dtype)
            element_type = gradient_uncond_ptr.dtype.element_ty
            tl.store(gradient_uncond_ptr + offsets, rounded(gradient_uncond, element_type), mask)
        if gradient_cond_ptr is not None:
            gradient_cond = gradient * tl.full((), guidance_scale, dtype)
            element_type = gradient_cond_ptr.dtype.element_ty
            tl.store(gradient_cond_ptr + offsets, rounded(gradient_cond, element_type), mask)

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
    programs,
    scale: tl.float64,
    BLOCK: tl.constexpr,
):
    """Add up what the programs found: one program."""
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
    """What a velocity loss is called with beside its tensors."""

    guidance_scale: float
    channel_dim: int
    loss_type: str
    reduction: str
    mask_normalization: str
    weight: float


class _Forward(NamedTuple):
    """What the forward pass returns, and what it keeps for the backward pass."""

    loss: Tensor
    prediction_norm: Tensor
    target_norm: Tensor
    gradients: list[Tensor]  # of the wanted inputs
    inverse: Tensor | None


def _is_normalized(mask: Tensor | None, options: _Options) -> bool:
    """Whether the loss is divided by the sum of a mask."""
    return mask is not None and options.reduction == "mean" and options.mask_normalization == "mask"


def _scale(elements: int, is_normalized: bool, options: _Options) -> float:
    if options.reduction == "mean" and not is_normalized:
        return options.weight / max(elements, 1)
    return options.weight


def _mask_weights(x: Tensor, mask: Tensor, channel_dim: int) -> Weights:
    shape, strides = list(mask.shape), list(mask.stride())
    shape.insert(channel_dim, 1)
    strides.insert(channel_dim, 0)
    return weights_of(x.shape, x.stride(), tuple(shape), tuple(strides))


def _sample_weights(x: Tensor, sample_weight: Tensor) -> Weights:
    rest = x.dim() - 1
    return weights_of(x.shape, x.stride(), (*sample_weight.shape, *[1] * rest), (*sample_weight.stride(), *[0] * rest))


def _launch_forward(
    prediction: Tensor,
    uncond: Tensor,
    cond: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    wanted: tuple[bool, bool, bool],
    options: _Options,
) -> _Forward:
    dtype = compute_dtype(prediction, uncond, cond, mask, sample_weight)
    prediction, uncond, cond = same_layout(prediction, (uncond, cond))
    elements, device = prediction.numel(), prediction.device
    block = block_elements(dtype)
    programs = programs_for(elements, block)
    is_normalized = _is_normalized(mask, options)
    per_element = options.reduction == "none"

    gradients = [
        torch.empty_like(x) if x is not None and is_wanted else None
        for x, is_wanted in zip((prediction, uncond, cond), wanted, strict=True)
    ]
    scale = _scale(elements, is_normalized, options)
    defers = _defers(gradients, is_normalized)
    mask_weights = NO_WEIGHTS if mask is None else _mask_weights(prediction, mask, options.channel_dim)
    sample_weights = NO_WEIGHTS if sample_weight is None else _sample_weights(prediction, sample_weight)
    partial = torch.empty(4 * programs, dtype=dtype, device=device)
    scalars = [torch.empty((), dtype=dtype, device=device) for _ in range(4)]
    losses = torch.empty_like(prediction, dtype=dtype) if per_element else None
    inverse = scalars[3] if is_normalized else None

    with on_device(prediction):
        if programs:
            velocity_forward_kernel[(programs,)](
                partial,
                losses,
                *gradients,
                prediction,
                uncond,
                cond,
                None if mask is None else readable(mask),
                mask_weights.strides,
                None if sample_weight is None else readable(sample_weight),
                sample_weights.strides,
                float(options.guidance_scale),
                float(scale),
                1.0 if defers else float(scale),
                elements,
                MASK_SIZES=mask_weights.SIZES,
                MASK_WEIGHT_SIZES=mask_weights.WEIGHT_SIZES,
                MASK_NARROW=mask_weights.NARROW,
                SAMPLE_SIZES=sample_weights.SIZES,
                SAMPLE_WEIGHT_SIZES=sample_weights.WEIGHT_SIZES,
                SAMPLE_NARROW=sample_weights.NARROW,
                LOSS_TYPE=options.loss_type,
                NORMALIZE=is_normalized,
                DEFER_SAMPLE_WEIGHT=defers,
                BLOCK=block,
                **launch_options(prediction),
            )
        velocity_finish_kernel[(1,)](
            None if per_element else scalars[0],
            scalars[1],
            scalars[2],
            inverse,
            partial,
            programs,
            float(scale),
            BLOCK=FINISH_BLOCK,
            **launch_options(prediction),
        )
    loss = scalars[0] if losses is None else losses
    return _Forward(loss, scalars[1], scalars[2], [x for x in gradients if x is not None], inverse)


def _defers(gradients: Any, is_normalized: bool) -> bool:
    """Whether the forward pass leaves the scale and the sample weights to the backward pass."""
    return is_normalized or any(x is not None and x.dtype == torch.float16 for x in gradients)


def _launch_backward(
    gradients: list[Tensor],
    upstream: Tensor,
    inverse: Tensor | None,
    sample_weight: Tensor | None,
    options: _Options,
    in_place: bool,
) -> list[Tensor]:
    is_normalized = inverse is not None
    if not _defers(gradients, is_normalized):
        return scale_gradients(gradients, upstream, 1.0, in_place=in_place)
    weights = None if sample_weight is None else _sample_weights(gradients[0], sample_weight)
    return scale_gradients(
        gradients,
        upstream,
        _scale(gradients[0].numel(), is_normalized, options),
        inverse=inverse,
        weight=None if sample_weight is None else readable(sample_weight),
        weights=weights,
        in_place=in_place,
    )


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
        wanted = ctx.needs_input_grad[:3]
        result = _launch_forward(prediction, uncond, cond, mask, sample_weight, wanted, options)
        ctx.save_for_backward(result.inverse, sample_weight, *result.gradients)
        ctx.anchors = [anchor(x) for x, is_wanted in zip((prediction, uncond, cond), wanted, strict=True) if is_wanted]
        ctx.options = options
        ctx.mark_non_differentiable(result.prediction_norm, result.target_norm)
        return result.loss, result.prediction_norm, result.target_norm

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inverse, sample_weight, *saved = ctx.saved_tensors
        with torch.no_grad():
            found = _launch_backward(saved, upstream, inverse, sample_weight, ctx.options, not graph_is_kept())
        gradients = iter(once_differentiable(found, upstream, ctx.anchors))
        return (*(next(gradients) if is_wanted else None for is_wanted in ctx.needs_input_grad[:3]), None, None, None)


@torch.library.custom_op("fastunlearn::velocity_loss", mutates_args=())
def velocity_loss_op(
    prediction: Tensor,
    uncond: Tensor,
    cond: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    wanted: list[bool],
    guidance_scale: float,
    channel_dim: int,
    loss_type: str,
    reduction: str,
    mask_normalization: str,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """What compilers see: the loss, the norms, the gradients of the wanted, and the inverse if there is one."""
    options = _Options(guidance_scale, channel_dim, loss_type, reduction, mask_normalization, weight)
    loss, *norms, gradients, inverse = _launch_forward(
        prediction, uncond, cond, mask, sample_weight, tuple(wanted), options
    )
    return loss, norms[0], norms[1], gradients, [] if inverse is None else [inverse]


@velocity_loss_op.register_fake
def _(
    prediction: Tensor,
    uncond: Tensor,
    cond: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    wanted: list[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    dtype = compute_dtype(prediction, uncond, cond, mask, sample_weight)
    laid_out = same_layout(prediction, (uncond, cond))
    loss, *norms = (prediction.new_empty((), dtype=dtype) for _ in range(3))
    if _Options(*options).reduction == "none":
        loss = torch.empty_like(laid_out[0], dtype=dtype)
    gradients = [torch.empty_like(x) for x, is_wanted in zip(laid_out, wanted, strict=True) if is_wanted]
    inverse = [torch.empty_like(norms[0])] if _is_normalized(mask, _Options(*options)) else []
    return loss, norms[0], norms[1], gradients, inverse


@torch.library.custom_op("fastunlearn::velocity_loss_backward", mutates_args=())
def velocity_loss_backward_op(
    gradients: list[Tensor],
    upstream: Tensor,
    inverse: Tensor | None,
    sample_weight: Tensor | None,
    guidance_scale: float,
    channel_dim: int,
    loss_type: str,
    reduction: str,
    mask_normalization: str,
    weight: float,
) -> list[Tensor]:
    """The gradients times the upstream gradient."""
    options = _Options(guidance_scale, channel_dim, loss_type, reduction, mask_normalization, weight)
    return _launch_backward(gradients, upstream, inverse, sample_weight, options, in_place=False)


@velocity_loss_backward_op.register_fake
def _(gradients: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in gradients]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, _, _, sample_weight, ctx.wanted, *options = inputs
    *_, gradients, inverse = output
    ctx.save_for_backward(inverse[0] if inverse else None, sample_weight, *gradients)
    ctx.options = _Options(*options)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    inverse, sample_weight, *saved = ctx.saved_tensors
    found = iter(velocity_loss_backward_op(saved, upstream, inverse, sample_weight, *ctx.options))
    return (*(next(found) if is_wanted else None for is_wanted in ctx.wanted), *[None] * (3 + len(ctx.options)))


velocity_loss_op.register_autograd(_backward, setup_context=_setup_context)


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
    """The function of that name in `torch_backend`: two launches, and one for the backward pass."""
    options = _Options(guidance_scale, channel_dim, loss_type, reduction, mask_normalization, weight)
    inputs = (prediction, uncond, cond)
    # `ctx.needs_input_grad` does not know of `torch.no_grad`.
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    if torch.compiler.is_compiling():
        loss, *norms, _, _ = velocity_loss_op(*inputs, mask, sample_weight, wanted, *options)
        return loss, norms[0].detach(), norms[1].detach()
    if not any(wanted):
        return _launch_forward(*inputs, mask, sample_weight, (False,) * 3, options)[:3]
    # A registered operator takes three times the host time of this.
    return _VelocityLoss.apply(*inputs, mask, sample_weight, options)  # type: ignore[no-untyped-call]


def velocity_loss(prediction: Tensor, target: Tensor, **common: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The function of that name in `torch_backend`."""
    return negatively_guided_velocity_loss(prediction, target, None, guidance_scale=0.0, **common)
