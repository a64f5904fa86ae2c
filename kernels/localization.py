"""The localization loss: weights, loss, every layer's term and the gradients in one pass over the background.

    term_l = normalizer_l * sum over elements of rho(w * o_l)         w = 1 - mask, one a token or a position
    loss = weight / L * sum_l term_l          d loss / d o_l = weight / L * normalizer_l * w * rho'(w * o_l)

normalizer: 1 / B or, under "background_mean", 1 / sum of w over all elements. Floor: the rows with w != 0 read once and
every gradient written once. Layers of one shape, layout and dtype share a launch, `LAYERS_PER_LAUNCH` at most: their
addresses are a tuple, not a table in memory, so that nothing is copied to the device and a CUDA graph may replay it.

The backward pass touches nothing where the upstream gradient is 1 (`fastunlearn.kernels.upstream`). Two cases leave a
factor to it: float16, where the scale might underflow, and "background_mean", whose sum is known once the pass is over.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.kernels.launch import (
    FINISH_BLOCK,
    MAX_PROGRAMS,
    Weights,
    block_elements,
    compute_dtype,
    finish_sum,
    is_dense,
    launch_options,
    on_device,
    programs_for,
    readable,
    rounded,
    tile_start,
    weight_offsets,
    weights_of,
)
from fastunlearn.kernels.upstream import anchor, graph_is_kept, once_differentiable, scale_gradients

LAYERS_PER_LAUNCH = 16
# Elements that are read or left out together: whole 16-byte loads in every dtype.
GROUP = 16


@triton.jit
def select(values, index):
    """values[index] for a tuple and an index known at run time."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def localization_forward_kernel(
    partial_ptr,  # (2, layers, partial_stride) out: sums of scale * rho(w * output) and, if NORMALIZE, of w
    partial_stride,
    weight_stride,  # from the first of these sums to the second
    gradient_ptrs,  # tuple of (elements,) out, or None
    output_ptrs,  # tuple of (elements,), one a layer
    mask_ptrs,  # tuple of the layers' masks at their own resolution, or of the one mask of them all
    mask_strides,
    term_scale: tl.float64,  # of the first sums
    gradient_scale: tl.float64,
    elements,
    MASK_SIZES: tl.constexpr,
    MASK_WEIGHT_SIZES: tl.constexpr,
    MASK_NARROW: tl.constexpr,
    ONE_WEIGHT_A_GROUP: tl.constexpr,
    LOSS_TYPE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Layer `program_id(1)`; a program takes every `num_programs(0)`-th tile of it."""
    program, programs, layer = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    output_ptr, mask_ptr = select(output_ptrs, layer), select(mask_ptrs, layer)
    dtype = partial_ptr.dtype.element_ty
    term_sums = tl.zeros((BLOCK // GROUP, GROUP), dtype)
    weight_sums = tl.zeros((BLOCK // GROUP, GROUP), dtype)
    for tile in range(program, tl.cdiv(elements, BLOCK), programs):
        group_offsets = tile_start(tile, BLOCK) + tl.arange(0, BLOCK // GROUP) * GROUP
        offsets = group_offsets[:, None] + tl.arange(0, GROUP)[None, :]
        mask = offsets < elements

        # 1. The weights. A group is read if one of its elements has a weight: a 16-byte load has one predicate.
        if ONE_WEIGHT_A_GROUP:
            group_mask = group_offsets < elements
            mask_offsets = weight_offsets(group_offsets, mask_strides, MASK_SIZES, MASK_WEIGHT_SIZES, MASK_NARROW)
            group_weight = 1 - tl.load(mask_ptr + mask_offsets, group_mask, 1.0).to(dtype)
            weight = tl.zeros((BLOCK // GROUP, GROUP), dtype) + group_weight[:, None]
            is_read = group_weight != 0
        else:
            mask_offsets = weight_offsets(offsets, mask_strides, MASK_SIZES, MASK_WEIGHT_SIZES, MASK_NARROW)
            weight = 1 - tl.load(mask_ptr + mask_offsets, mask, 1.0).to(dtype)
            is_read = tl.max((weight != 0).to(tl.int32), axis=1) != 0
        if NORMALIZE:
            weight_sums += weight

        # 2. The residual and its slope; sign(0) = 0. Where the weight is 0 nothing is left, not even 0 * NaN.
        output = tl.load(output_ptr + offsets, mask & is_read[:, None], 0).to(dtype)
        outside = tl.where(weight == 0, 0, output * weight)
        if LOSS_TYPE == "l2":
            term_sums += outside * outside
            slope = 2 * outside
        else:
            term_sums += tl.abs(outside)
            slope = (outside > 0).to(dtype) - (outside < 0).to(dtype)

        # 3. The gradient.
        if gradient_ptrs is not None:
            gradient_ptr = select(gradient_ptrs, layer)
            gradient = tl.where(weight == 0, 0, slope * weight * tl.full((), gradient_scale, dtype))
            tl.store(gradient_ptr + offsets, rounded(gradient, gradient_ptr.dtype.element_ty), mask)

    sum_ptr = partial_ptr + layer * partial_stride + program
    tl.store(sum_ptr, tl.sum(term_sums) * tl.full((), term_scale, dtype))
    if NORMALIZE:
        tl.store(sum_ptr + weight_stride, tl.sum(weight_sums))


@triton.jit
def localization_finish_kernel(
    loss_ptr,  # () out
    per_layer_ptr,  # (L,) out
    inverse_ptr,  # (L,) out: 1 / the sum of w, 0 for no background, or None
    partial_ptr,  # (2, L, programs), as the forward kernels wrote it
    weight_stride,  # from the first of these sums to the second
    layers,
    programs,
    scale: tl.float64,
    BLOCK: tl.constexpr,
):
    """Add up what the programs found, and the layers: one program."""
    dtype = partial_ptr.dtype.element_ty
    loss = tl.sum(tl.zeros((BLOCK,), dtype))
    for layer in range(layers):
        sum_ptr = partial_ptr + layer * programs
        term = finish_sum(sum_ptr, programs, BLOCK)
        if inverse_ptr is not None:
            total = finish_sum(sum_ptr + weight_stride, programs, BLOCK)
            inverse = tl.where(total == 0, 0, 1 / total)
            tl.store(inverse_ptr + layer, inverse)
            term *= inverse
        # Of squares and magnitudes: only rounding can make it negative, where it is the sum of a product of matrices.
        term = tl.where(term < 0, 0, term)
        tl.store(per_layer_ptr + layer, term)
        loss += term
    tl.store(loss_ptr, loss * tl.full((), scale, dtype))


class _Run(NamedTuple):
    """Consecutive layers of one shape, layout and dtype, with masks of one shape, layout and dtype."""

    layers: slice
    shape: torch.Size
    strides: tuple[int, ...]
    is_wanted: bool


class _Forward(NamedTuple):
    """What the forward pass returns, and what it keeps for the backward pass."""

    loss: Tensor
    per_layer: Tensor
    gradients: list[Tensor]  # in one stretch: (layers, elements) for every wanted run; else one for every wanted layer
    inverse: Tensor | None
    runs: list[_Run]


def _runs(outputs: Sequence[Tensor], masks: Sequence[Tensor], wanted: Sequence[bool]) -> list[_Run]:
    def likeness(i: int) -> tuple[Any, ...]:
        x, m = outputs[i], masks[i]
        return x.dtype, x.shape, x.stride(), m.dtype, m.shape, m.stride(), wanted[i]

    runs = []
    for _, layers in itertools.groupby(range(len(outputs)), likeness):
        first, *rest = layers
        if outputs[first].numel():
            x = outputs[first]
            runs.append(_Run(slice(first, first + 1 + len(rest)), x.shape, x.stride(), wanted[first]))
    return runs


def _mask_weights(x: Tensor, mask: Tensor) -> Weights:
    channel = 2 if x.dim() == 3 else 1
    shape, strides = list(mask.shape), list(mask.stride())
    shape.insert(channel, 1)
    strides.insert(channel, 0)
    return weights_of(x.shape, x.stride(), tuple(shape), tuple(strides))


def _scale(batch: int, layers: int, is_normalized: bool, weight: float) -> float:
    """The factor of a layer's sum in the loss, but for the normalizer that is known at the end."""
    return weight / layers / (1 if is_normalized else batch)


def _defers(dtype: torch.dtype, is_normalized: bool) -> bool:
    """Whether the forward pass leaves that factor to the backward pass."""
    return is_normalized or dtype == torch.float16


def _launch_forward(
    outputs: Sequence[Tensor],
    masks: Sequence[Tensor],
    wanted: Sequence[bool],
    loss_type: str,
    normalization: str,
    weight: float,
    *,
    in_one_stretch: bool,
) -> _Forward:
    device, layers = outputs[0].device, len(outputs)
    dtype = compute_dtype(*outputs, *masks)
    block = block_elements(dtype)
    outputs = [x if is_dense(x) else x.contiguous() for x in outputs]
    masks = [readable(m) for m in masks]
    runs = _runs(outputs, masks, wanted)
    is_normalized = normalization == "background_mean"

    most = max(MAX_PROGRAMS // layers, 1)
    programs = max((programs_for(x.numel(), block, most) for x in outputs), default=0)
    # Where layers differ, not every program finds something.
    is_one_run = bool(runs) and runs[0].layers == slice(0, layers)
    partial = (torch.empty if is_one_run else torch.zeros)(2, layers, programs, dtype=dtype, device=device)
    loss = torch.empty((), dtype=dtype, device=device)
    per_layer = torch.empty(layers, dtype=dtype, device=device)
    inverse = torch.empty_like(per_layer) if is_normalized else None
    gradients = []
    with on_device(outputs[0]):
        for run in runs:
            run_outputs, run_masks, run_partial = outputs[run.layers], masks[run.layers], partial[:, run.layers]
            x = run_outputs[0]
            weights = _mask_weights(x, run_masks[0])
            run_gradients: list[Tensor] = []
            if run.is_wanted and in_one_stretch:
                # The backward pass of any number of layers is one launch.
                gradients.append(torch.empty(len(run_outputs), x.numel(), dtype=x.dtype, device=device))
                run_gradients = list(gradients[-1].unbind())
            elif run.is_wanted:
                run_gradients = [torch.empty_like(x) for x in run_outputs]
                gradients += run_gradients
            for start in range(0, len(run_outputs), LAYERS_PER_LAUNCH):
                some = slice(start, start + LAYERS_PER_LAUNCH)
                some_masks = run_masks[some]
                if len({m.data_ptr() for m in some_masks}) == 1:
                    some_masks = some_masks[:1]
                localization_forward_kernel[(programs_for(x.numel(), block, most), len(run_outputs[some]))](
                    run_partial[:, some],
                    partial.stride(1),
                    partial.stride(0),
                    tuple(run_gradients[some]) or None,
                    tuple(run_outputs[some]),
                    tuple(some_masks),
                    weights.strides,
                    1.0 if is_normalized else 1 / x.shape[0],
                    1.0 if _defers(x.dtype, is_normalized) else _scale(x.shape[0], layers, is_normalized, weight),
                    x.numel(),
                    MASK_SIZES=weights.SIZES,
                    MASK_WEIGHT_SIZES=weights.WEIGHT_SIZES,
                    MASK_NARROW=weights.NARROW,
                    ONE_WEIGHT_A_GROUP=weights.WEIGHT_SIZES[0] == 0 and weights.SIZES[0] % GROUP == 0,
                    LOSS_TYPE=loss_type,
                    NORMALIZE=is_normalized,
                    BLOCK=block,
                    GROUP=GROUP,
                    **launch_options(outputs[0]),
                )
        localization_finish_kernel[(1,)](
            loss,
            per_layer,
            inverse,
            partial,
            partial.stride(0),
            layers,
            programs,
            weight / layers,
            BLOCK=FINISH_BLOCK,
            **launch_options(outputs[0]),
        )
    return _Forward(loss, per_layer, gradients, inverse, runs)


def _left_factors(
    dtype: torch.dtype, batch: int, layers: int, elements: int, of_layers: slice, inverse: Tensor | None, weight: float
) -> dict[str, Any]:
    """What the forward pass left to be multiplied, as arguments of `scale_gradients`."""
    factors: dict[str, Any] = {"scale": 1.0}
    if _defers(dtype, inverse is not None):
        factors["scale"] = _scale(batch, layers, inverse is not None, weight)
    if inverse is not None:
        factors["weight"] = inverse[of_layers]
        is_narrow = elements * factors["weight"].numel() < 2**31
        factors["weights"] = Weights((0, 1), (elements, 1), (0, 1), is_narrow)
    return factors


class _LocalizationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        masks: Sequence[Tensor],
        loss_type: str,
        normalization: str,
        weight: float,
        *outputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[4:]
        result = _launch_forward(outputs, masks, wanted, loss_type, normalization, weight, in_one_stretch=True)
        ctx.save_for_backward(result.inverse, *result.gradients)
        ctx.anchors = [anchor(x) for x, is_wanted in zip(outputs, wanted, strict=True) if is_wanted]
        ctx.runs, ctx.weight = [run for run in result.runs if run.is_wanted], weight
        # A layer without elements is in no run.
        ctx.gradients = [torch.empty_like(x) if wanted[i] and not x.numel() else None for i, x in enumerate(outputs)]
        ctx.mark_non_differentiable(result.per_layer)
        return result.loss, result.per_layer

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inverse, *saved = ctx.saved_tensors
        found = list(ctx.gradients)
        with torch.no_grad():
            in_place = not graph_is_kept()
            for gradient, run in zip(saved, ctx.runs, strict=True):
                factors = _left_factors(
                    gradient.dtype, run.shape[0], len(found), gradient.shape[1], run.layers, inverse, ctx.weight
                )
                (scaled,) = scale_gradients([gradient], upstream, **factors, in_place=in_place)
                found[run.layers] = [x.as_strided(run.shape, run.strides) for x in scaled.unbind()]
        return (None, None, None, None, *once_differentiable(found, upstream, ctx.anchors))


@torch.library.custom_op("fastunlearn::localization_loss", mutates_args=())
def localization_loss_op(
    outputs: list[Tensor],
    masks: list[Tensor],
    wanted: list[bool],
    loss_type: str,
    normalization: str,
    weight: float,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """What compilers see: the loss, the terms, the gradients of the wanted layers, and the inverse if there is one."""
    loss, per_layer, gradients, inverse, _ = _launch_forward(
        outputs, masks, wanted, loss_type, normalization, weight, in_one_stretch=False
    )
    found = iter(gradients)
    gradients = [
        next(found) if x.numel() else torch.empty_like(x)
        for x, is_wanted in zip(outputs, wanted, strict=True)
        if is_wanted
    ]
    return loss, per_layer, gradients, [] if inverse is None else [inverse]


@localization_loss_op.register_fake
def _(
    outputs: list[Tensor], masks: list[Tensor], wanted: list[bool], loss_type: str, normalization: str, weight: float
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    dtype = compute_dtype(*outputs, *masks)
    loss, per_layer = (outputs[0].new_empty(shape, dtype=dtype) for shape in ((), (len(outputs),)))
    laid_out = (x if is_dense(x) else x.contiguous() for x in outputs)
    gradients = [torch.empty_like(x) for x, is_wanted in zip(laid_out, wanted, strict=True) if is_wanted]
    return loss, per_layer, gradients, [torch.empty_like(per_layer)] if normalization == "background_mean" else []


@torch.library.custom_op("fastunlearn::localization_loss_backward", mutates_args=())
def localization_loss_backward_op(
    gradients: list[Tensor],
    upstream: Tensor,
    inverse: Tensor | None,
    wanted: list[bool],
    weight: float,
) -> list[Tensor]:
    """The gradients times the upstream gradient."""
    results = []
    of_layers = [i for i, is_wanted in enumerate(wanted) if is_wanted]
    for gradient, i in zip(gradients, of_layers, strict=True):
        factors = _left_factors(
            gradient.dtype,
            max(gradient.shape[0], 1),
            len(wanted),
            gradient.numel(),
            slice(i, i + 1),
            inverse,
            weight,
        )
        results += scale_gradients([gradient], upstream, **factors)
    return results


@localization_loss_backward_op.register_fake
def _(gradients: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in gradients]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, masks, ctx.wanted, _, _, ctx.weight = inputs
    ctx.masks = len(masks)
    _, _, gradients, inverse = output
    ctx.save_for_backward(inverse[0] if inverse else None, *gradients)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    inverse, *saved = ctx.saved_tensors
    found = iter(localization_loss_backward_op(saved, upstream, inverse, ctx.wanted, ctx.weight))
    of_outputs = [next(found) if is_wanted else None for is_wanted in ctx.wanted]
    return of_outputs, [None] * ctx.masks, None, None, None, None


localization_loss_op.register_autograd(_backward, setup_context=_setup_context)


def localization_loss(
    outputs: Sequence[Tensor], masks: Sequence[Tensor], *, loss_type: str, normalization: str, weight: float
) -> tuple[Tensor, Tensor]:
    """The function of that name in `torch_backend`: a launch for `LAYERS_PER_LAUNCH` like layers, and one."""
    # `ctx.needs_input_grad` does not know of `torch.no_grad`.
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in outputs]
    if torch.compiler.is_compiling():
        loss, per_layer, _, _ = localization_loss_op(
            list(outputs), list(masks), wanted, loss_type, normalization, weight
        )
        return loss, per_layer.detach()
    if not any(wanted):
        return _launch_forward(outputs, masks, wanted, loss_type, normalization, weight, in_one_stretch=True)[:2]
    return _LocalizationLoss.apply(masks, loss_type, normalization, weight, *outputs)  # type: ignore[no-untyped-call]
