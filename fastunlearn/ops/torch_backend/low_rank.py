"""The "l2" localization loss of low-rank outputs, without computing them: hidden states are read once.

Let x = (1 - mask) * [hidden, 1], one row per token, and W = [weight, bias]. The sum of squares of x W^T equals the sum
of the elements of (W^T W) * (x^T x): two matrices of rank + 1 rows. Its gradient with respect to x is 2 x (W^T W),
which needs no second pass, because W^T W is known before the first. All layers are one autograd function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.dtypes import compute_dtype
from fastunlearn.ops.once_differentiable import anchor, once_differentiable
from fastunlearn.ops.torch_backend.blocks import (
    block_elements,
    blocks_of,
    buffer,
    compiled,
    form,
    part,
    with_zero_weights,
)
from fastunlearn.ops.torch_backend.localization import Background, backgrounds
from fastunlearn.ops.torch_backend.upstream import kept_dtype, scaled_gradients


class _Pass(NamedTuple):
    """What a pass over the hidden states of a layer returns."""

    total: Tensor
    """The sum of squares of the output outside the mask."""
    moments: Tensor
    """x^T x, (rank + 1, rank + 1)."""
    gradient: Tensor | None
    """Of the hidden states."""


def low_rank_localization_loss(
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    masks: Sequence[Tensor],
    *,
    normalization: str,
    weight: float,
    is_compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The "l2" `localization_loss` of the outputs hidden @ weight.T + bias, without computing them."""
    dtype = compute_dtype(*hiddens, *weights, *biases, *masks)
    shapes = [(*hidden.shape[:2], up.shape[0]) for hidden, up in zip(hiddens, weights, strict=True)]
    layers = backgrounds(shapes, masks, normalization, dtype)
    tensors = (*hiddens, *weights, *biases)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _LowRankLocalizationLoss.apply(layers, weight, dtype, is_compiled, *tensors)  # type: ignore[no-untyped-call]
    terms = [
        _one_pass(hidden, columns(up, bias, dtype), layer, False, 1.0, is_compiled=is_compiled).total * layer.scale
        for hidden, up, bias, layer in zip(hiddens, weights, biases, layers, strict=True)
    ]
    per_layer = torch.stack(terms)
    return weight * per_layer.mean(), per_layer


class _LowRankLocalizationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layers: list[Background],
        weight: float,
        dtype: torch.dtype,
        is_compiled: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        count = len(layers)
        hiddens, ups, biases = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        needed = ctx.needs_input_grad[4:]
        share = weight / count
        if not torch.compiler.is_compiling():
            ctx.anchors = [anchor(x) for x, wanted in zip(tensors, needed, strict=True) if wanted and x is not None]
        terms, moments, gradients, ctx.scales = [], [], [], []
        for hidden, up, bias, layer, wanted in zip(hiddens, ups, biases, layers, needed, strict=False):
            assert hidden is not None and up is not None
            scale = share * layer.scale
            result = _one_pass(hidden, columns(up, bias, dtype), layer, wanted, scale, is_compiled=is_compiled)
            terms.append(result.total * layer.scale)
            moments.append(result.moments)
            gradients.append(result.gradient)
            ctx.scales.append(scale)
        ctx.dtype, ctx.dtypes = dtype, [None if hidden is None else hidden.dtype for hidden in hiddens]
        ctx.save_for_backward(*ups, *biases, *moments, *gradients)
        per_layer = torch.stack(terms)
        ctx.mark_non_differentiable(per_layer)
        return weight * per_layer.mean(), per_layer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.scales)
        saved = ctx.saved_tensors
        ups, biases, moments, gradients = (saved[i * count : (i + 1) * count] for i in range(4))
        hidden_gradients = scaled_gradients(gradients, ctx.dtypes, upstream)
        up_gradients: list[Tensor | None] = [None] * count
        bias_gradients: list[Tensor | None] = [None] * count
        needs_up, needs_bias = ctx.needs_input_grad[4 + count : 4 + 2 * count], ctx.needs_input_grad[4 + 2 * count :]
        for i, (up, bias, moment, scale) in enumerate(zip(ups, biases, moments, ctx.scales, strict=True)):
            if needs_up[i] or needs_bias[i]:
                with torch.autocast(up.device.type, enabled=False):
                    both = columns(up, bias, ctx.dtype) @ (moment * (2 * upstream * scale))
                up_gradients[i] = both[:, :-1].to(up.dtype)
                bias_gradients[i] = None if bias is None else both[:, -1].to(bias.dtype)
        return (None, None, None, None, *hidden_gradients, *up_gradients, *bias_gradients)


def columns(up: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The matrix W = [weight, bias], (D, rank + 1)."""
    last = up.new_zeros(up.shape[0]) if bias is None else bias
    return torch.cat([up.to(dtype), last.to(dtype)[:, None]], 1)


def _one_pass(
    hidden: Tensor, w: Tensor, layer: Background, wanted: bool, factor: float | Tensor, *, is_compiled: bool
) -> _Pass:
    """A pass over a layer's hidden states. Their gradient, if `wanted`, is multiplied by `factor`."""
    # Autocast would compute the products in half precision.
    with torch.autocast(hidden.device.type, enabled=False):
        gram = w.mT @ w
        slopes = gram[:, :-1] * (2 * factor)
        background = layer.weights[..., 0].expand(hidden.shape[:2])
        if form(_in_blocks, _formula, is_compiled) is _in_blocks:
            gradient = torch.empty_like(hidden, dtype=kept_dtype(hidden, w.dtype)) if wanted else None
            one_pass = functools.partial(_in_blocks, hidden, background, gram, slopes, gradient)
            total, moments = with_zero_weights(one_pass, lambda result: result[0], hidden.device)
        else:
            total, moments, gradient = compiled(_formula, wanted)(hidden, background, gram, slopes)
    return _Pass(total, moments, gradient)


def _in_blocks(
    hidden: Tensor, background: Tensor, gram: Tensor, slopes: Tensor, gradient: Tensor | None, *, excludes: bool
) -> tuple[Tensor, Tensor]:
    size = hidden.shape[2] + 1
    elements = max(block_elements(background.numel() * size, hidden.device), size)
    moments = torch.zeros_like(gram)
    for block in blocks_of(hidden.shape[:2], elements // size):
        here, weights = part(hidden, block), part(background, block)[..., None]
        x = buffer(0, torch.Size((*here.shape[:2], size)), gram.dtype, here)
        x[..., :-1], x[..., -1] = here, 1
        x.mul_(weights)
        if excludes:
            x.masked_fill_(weights == 0, 0)
        rows = x.flatten(0, 1)
        moments.addmm_(rows.mT, rows)
        if gradient is not None:
            size_of_product = torch.Size((rows.shape[0], slopes.shape[1]))
            product = torch.mm(rows, slopes, out=buffer(1, size_of_product, gram.dtype, here))
            part(gradient, block).copy_(product.view(here.shape).mul_(weights))
    return _sum_of_squares(gram, moments), moments


def _formula(wanted: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    def formula(
        hidden: Tensor, background: Tensor, gram: Tensor, slopes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        weights = background[..., None]
        x = torch.cat([hidden.to(gram.dtype), torch.ones_like(weights)], -1) * weights
        x = torch.where(weights == 0, 0, x)
        rows = x.flatten(0, 1)
        moments = rows.mT @ rows
        gradient = ((x @ slopes) * weights).to(kept_dtype(hidden, gram.dtype)) if wanted else None
        return _sum_of_squares(gram, moments), moments, gradient

    return formula


def _sum_of_squares(gram: Tensor, moments: Tensor) -> Tensor:
    """This is a sum of squares, which only rounding can make negative."""
    return (gram * moments).sum().clamp(min=0)
