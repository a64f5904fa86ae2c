"""The localization loss: weights, loss, every layer's term and the gradients in one pass over the background.

    term_l = sum over elements of rho(w * o_l) / divisor_l            w = 1 - mask, one per token or position
    loss = weight / L * sum_l term_l          d loss / d o_l = weight / L / divisor_l * w * rho'(w * o_l)

divisor: B under "sum", the number of elements under "mean", the sum of w over all elements under "background_mean".
Floor: the rows with w != 0 read once and every gradient written once.

Layers of one shape, layout and dtype share a launch, up to `LAYERS_PER_LAUNCH` of them. Their addresses are a tuple of
pointer arguments, not a table in memory: nothing is copied to the device, and a CUDA graph may replay the launch.

The backward pass touches nothing if the upstream gradient is 1 (`fastunlearn.kernels.upstream`). In two cases the
forward pass leaves a factor for it to apply: float16 gradients, which the factor might make underflow, and
"background_mean", whose divisor is known only when the pass is over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.dtypes import compute_dtype
from fastunlearn.kernels.launch import (
    FINISH_BLOCK,
    MAX_PROGRAMS,
    block_elements,
    broadcast_offsets,
    dense,
    distinct,
    finish_sum,
    launch_options,
    mask_index,
    on_device,
    programs_for,
    readable,
    rounded,
    tile_count,
    tile_start,
)
from fastunlearn.kernels.upstream import scale_gradients
from fastunlearn.ops.once_differentiable import anchor, once_differentiable

LAYERS_PER_LAUNCH = 16
# Elements that are loaded or skipped together: whole 16-byte loads in every dtype.
GROUP = 16


@triton.jit
def select(values, index):
    """Return values[index] for a tuple and an index that is known only at run time."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def localization_forward_kernel(
    partial_ptr,  # (2, layers, partial_stride) out: sums of term_scale * rho(w * output) and, if NORMALIZE, of w
    partial_stride,
    weight_stride,  # from the first kind of sum to the second
    gradient_ptrs,  # tuple of (elements,) out, or None
    output_ptrs,  # tuple of (elements,), one per layer
    mask_ptrs,  # tuple of masks at their own resolution, one per layer or one for all
    mask_strides,
    term_scale: tl.float64,  # multiplies the first kind of sum
    gradient_scale: tl.float64,  # multiplies the gradients
    elements,
    MASK_DIM_SIZES: tl.constexpr,
    MASK_OPERAND_SIZES: tl.constexpr,
    MASK_IN_32_BITS: tl.constexpr,
    ONE_WEIGHT_PER_GROUP: tl.constexpr,
    LOSS_TYPE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Process layer `program_id(1)`; each program takes every `num_programs(0)`-th tile of it."""
    program, programs, layer = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    output_ptr, mask_ptr = select(output_ptrs, layer), select(mask_ptrs, layer)
    dtype = partial_ptr.dtype.element_ty
    term_sums = tl.zeros((BLOCK // GROUP, GROUP), dtype)
    weight_sums = tl.zeros((BLOCK // GROUP, GROUP), dtype)
    for tile in range(program, tile_count(elements, BLOCK), programs):
        group_offsets = tile_start(tile, BLOCK) + tl.arange(0, BLOCK // GROUP) * GROUP
        offsets = group_offsets[:, None] + tl.arange(0, GROUP)[None, :]
        in_bounds = offsets < elements

        # 1. The weights. A 16-byte load has one predicate, so a group is read if any of its weights is not 0.
        if ONE_WEIGHT_PER_GROUP:
            group_in_bounds = group_offsets < elements
            mask_offsets = broadcast_offsets(
                group_offsets, mask_strides, MASK_DIM_SIZES, MASK_OPERAND_SIZES, MASK_IN_32_BITS
            )
            group_weight = 1 - tl.load(mask_ptr + mask_offsets, group_in_bounds, 1.0).to(dtype)
            weight = tl.zeros((BLOCK // GROUP, GROUP), dtype) + group_weight[:, None]
            is_read = group_weight != 0
        else:
            mask_offsets = broadcast_offsets(offsets, mask_strides, MASK_DIM_SIZES, MASK_OPERAND_SIZES, MASK_IN_32_BITS)
            weight = 1 - tl.load(mask_ptr + mask_offsets, in_bounds, 1.0).to(dtype)
            is_read = tl.max((weight != 0).to(tl.int32), axis=1) != 0
        if NORMALIZE:
            weight_sums += weight

        # 2. The residual and its slope; sign(0) = 0. Where the weight is 0, the element contributes nothing, not even
        # 0 * NaN.
        output = tl.load(output_ptr + offsets, in_bounds & is_read[:, None], 0).to(dtype)
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
            tl.store(gradient_ptr + offsets, rounded(gradient, gradient_ptr.dtype.element_ty), in_bounds)

    sum_ptr = partial_ptr + layer * partial_stride + program
    tl.store(sum_ptr, tl.sum(term_sums) * tl.full((), term_scale, dtype))
    if NORMALIZE:
        tl.store(sum_ptr + weight_stride, tl.sum(weight_sums))


@triton.jit
def localization_finish_kernel(
    loss_ptr,  # () out
    per_layer_ptr,  # (L,) out
    inverse_ptr,  # (L,) out: 1 / the sum of w, 0 for no background, or None
    partial_ptr,  # (2, L, programs), as the forward kernel wrote it
    weight_stride,  # from the first kind of sum to the second
    layers,
    programs,
    scale: tl.float64,
    BLOCK: tl.constexpr,
):
    """Add up the partial sums of every layer, and the layers, in one program."""
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
        # Squares and magnitudes cannot add up to less than 0, but rounding can make the low-rank form negative.
        term = tl.where(term < 0, 0, term)
        tl.store(per_layer_ptr + layer, term)
        loss += term
    tl.store(loss_ptr, loss * tl.full((), scale, dtype))


class _Run(NamedTuple):
    """Consecutive layers that share launches: outputs and masks of one shape, layout and dtype."""

    layers: slice
    shape: torch.Size
    strides: tuple[int, ...]
    needs_gradient: bool


def equal_stretches(keys: Sequence[object]) -> list[slice]:
    """The slices of `keys` in which all are equal, each as long as possible."""
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(keys)], strict=True)]


def _runs(outputs: Sequence[Tensor], masks: Sequence[Tensor], needs_gradient: Sequence[bool]) -> list[_Run]:
    """Divide the layers into runs; outputs are dense, masks readable."""
    keys = [
        (x.dtype, x.shape, x.stride(), m.dtype, m.shape, m.stride(), needed)
        for x, m, needed in zip(outputs, masks, needs_gradient, strict=True)
    ]
    return [
        _Run(layers, outputs[layers.start].shape, outputs[layers.start].stride(), needs_gradient[layers.start])
        for layers in equal_stretches(keys)
    ]


def known_divisor(shape: Sequence[int], normalization: str) -> int:
    """The divisor of a layer's sum as far as it is known before the launch; at least 1.

    Args:
        shape: the shape of the layer's output.
        normalization: "sum", "mean" or "background_mean", whose divisor is known only at the end and counts as 1.
    """
    if normalization == "background_mean":
        return 1
    return max(shape[0] if normalization == "sum" else math.prod(shape), 1)


def _defers_scale(dtype: torch.dtype, normalization: str) -> bool:
    """Whether the forward pass leaves the scale of the gradients to the backward pass."""
    return normalization == "background_mean" or dtype == torch.float16


def _launch_forward(
    outputs: list[Tensor], masks: list[Tensor], runs: list[_Run], loss_type: str, normalization: str, weight: float
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return the loss, the layers' terms, the gradients, and the layers' 1 / (sum of w) if they are used.

    The gradients of a run that needs them are one tensor, (layers, elements), so that the backward pass takes one
    launch per run, however many layers it has.
    """
    device, layers = outputs[0].device, len(outputs)
    dtype = compute_dtype(*outputs, *masks)
    block = block_elements(dtype)
    is_normalized = normalization == "background_mean"

    most = max(MAX_PROGRAMS // layers, 1)
    programs = max((programs_for(x.numel(), block, most) for x in outputs), default=0)
    # Layers with fewer tiles than `programs` leave some of their partial sums unwritten.
    partial = (torch.empty if len(runs) == 1 else torch.zeros)(2, layers, programs, dtype=dtype, device=device)
    loss = torch.empty((), dtype=dtype, device=device)
    per_layer = torch.empty(layers, dtype=dtype, device=device)
    inverse = torch.empty_like(per_layer) if is_normalized else None
    gradients = []
    with on_device(outputs[0]):
        for run in runs:
            run_outputs, run_masks, run_partial = outputs[run.layers], masks[run.layers], partial[:, run.layers]
            x = run_outputs[0]
            index = mask_index(x, run_masks[0], _channel_dim(x))
            divisor = known_divisor(x.shape, normalization)
            scale = weight / layers / divisor
            run_gradients: list[Tensor] = []
            if run.needs_gradient:
                gradients.append(torch.empty(len(run_outputs), x.numel(), dtype=x.dtype, device=device))
                run_gradients = list(gradients[-1].unbind())
            if not x.numel():
                continue
            for start in range(0, len(run_outputs), LAYERS_PER_LAUNCH):
                chunk = slice(start, start + LAYERS_PER_LAUNCH)
                chunk_masks = run_masks[chunk]
                if len({m.data_ptr() for m in chunk_masks}) == 1:
                    chunk_masks = chunk_masks[:1]
                localization_forward_kernel[(programs_for(x.numel(), block, most), len(run_outputs[chunk]))](
                    run_partial[:, chunk],
                    partial.stride(1),
                    partial.stride(0),
                    tuple(run_gradients[chunk]) or None,
                    tuple(run_outputs[chunk]),
                    tuple(chunk_masks),
                    index.strides,
                    1 / divisor,
                    1.0 if _defers_scale(x.dtype, normalization) else scale,
                    x.numel(),
                    MASK_DIM_SIZES=index.DIM_SIZES,
                    MASK_OPERAND_SIZES=index.OPERAND_SIZES,
                    MASK_IN_32_BITS=index.IN_32_BITS,
                    ONE_WEIGHT_PER_GROUP=index.OPERAND_SIZES[0] == 0 and index.DIM_SIZES[0] % GROUP == 0,
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
    return loss, per_layer, gradients, [] if inverse is None else [inverse]


def _channel_dim(x: Tensor) -> int:
    return 2 if x.dim() == 3 else 1  # tokens (B, N, D), else feature maps (B, C, *spatial)


@torch.library.custom_op("fastunlearn::localization_loss", mutates_args=())
def localization_loss_op(
    outputs: list[Tensor],
    masks: list[Tensor],
    needs_gradient: list[bool],
    loss_type: str,
    normalization: str,
    weight: float,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The forward pass as torch.compile sees it."""
    runs = _runs(outputs, masks, needs_gradient)
    return _launch_forward(outputs, masks, runs, loss_type, normalization, weight)


@localization_loss_op.register_fake
def _(
    outputs: list[Tensor],
    masks: list[Tensor],
    needs_gradient: list[bool],
    loss_type: str,
    normalization: str,
    weight: float,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    dtype = compute_dtype(*outputs, *masks)
    loss, per_layer = (outputs[0].new_empty(shape, dtype=dtype) for shape in ((), (len(outputs),)))
    gradients = []
    for run in _runs(outputs, masks, needs_gradient):
        if run.needs_gradient:
            first, *rest = outputs[run.layers]
            gradients.append(first.new_empty(1 + len(rest), first.numel()))
    return loss, per_layer, gradients, [torch.empty_like(per_layer)] if normalization == "background_mean" else []


class _LocalizationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss_type: str, normalization: str, weight: float, layers: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`tensors`: the output of every layer, then the mask of every layer."""
        needs_gradient = list(ctx.needs_input_grad[4 : 4 + layers])
        options = loss_type, normalization, weight
        outputs, masks = [dense(x) for x in tensors[:layers]], list(tensors[layers:])
        runs = _runs(outputs, masks, needs_gradient)
        if torch.compiler.is_compiling():
            loss, per_layer, gradients, inverse = localization_loss_op(outputs, masks, needs_gradient, *options)
        else:
            # A registered operator would cost three times the host time.
            loss, per_layer, gradients, inverse = _launch_forward(outputs, masks, runs, *options)
            # The outputs are not saved: second derivatives are noticed by their anchors.
            ctx.anchors = [anchor(x) for x, needed in zip(tensors, needs_gradient, strict=False) if needed]
        ctx.save_for_backward(inverse[0] if inverse else None, *gradients)
        ctx.runs = [run for run in runs if run.needs_gradient]
        ctx.layers, ctx.normalization, ctx.weight = layers, normalization, weight
        ctx.mark_non_differentiable(per_layer)
        return loss, per_layer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inverse, *saved = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * ctx.layers
        for written, run in zip(saved, ctx.runs, strict=True):
            scale = 1.0
            if _defers_scale(written.dtype, ctx.normalization):
                scale = ctx.weight / ctx.layers / known_divisor(run.shape, ctx.normalization)
            layer_weight = None if inverse is None else inverse[run.layers]
            (scaled,) = scale_gradients([written], upstream, scale, weight=layer_weight)
            gradients[run.layers] = [x.as_strided(run.shape, run.strides) for x in scaled.unbind()]
        return (None, None, None, None, *gradients, *[None] * ctx.layers)


def localization_loss(
    outputs: Sequence[Tensor], masks: Sequence[Tensor], *, loss_type: str, normalization: str, weight: float
) -> tuple[Tensor, Tensor]:
    """The Triton counterpart of the `torch_backend` function: 1 launch per `LAYERS_PER_LAUNCH` like layers, plus 1."""
    masks, options = [readable(m) for m in masks], (loss_type, normalization, weight)
    # Inside an autograd function, `ctx.needs_input_grad` is True even under `torch.no_grad`.
    if torch.is_grad_enabled() and any(x.requires_grad for x in outputs):
        return _LocalizationLoss.apply(*options, len(outputs), *distinct([*outputs, *masks]))  # type: ignore[no-untyped-call]
    outputs, needs_gradient = [dense(x) for x in outputs], [False] * len(outputs)
    if torch.compiler.is_compiling():
        return localization_loss_op(outputs, masks, needs_gradient, *options)[:2]
    return _launch_forward(outputs, masks, _runs(outputs, masks, needs_gradient), *options)[:2]
