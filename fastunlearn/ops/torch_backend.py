"""The torch backend: every operation in bounded memory, for tensors that no Triton kernel runs on.

This is not the definition of the operations, which is `fastunlearn.ops.definition`. It computes the same in blocks, so
that half-precision inputs are never copied whole, and with backward passes written by hand, so that autograd keeps no
intermediate tensors.

Arguments are those of `fastunlearn.functional`, already checked. Masks are as in `fastunlearn.ops.spatial_masks`.
Arithmetic is float32, or float64 if any input is float64. An element of weight 0 contributes nothing, whatever its
value: its product is overwritten, because 0 * NaN is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastunlearn.dtypes import compute_dtype
from fastunlearn.ops.once_differentiable import once_differentiable
from fastunlearn.ops.spatial_masks import expanded_sum, match_resolution

# Float32 temporaries of 4 MB: small enough for a CPU's cache, large enough for few launches on a GPU.
BLOCK_ELEMENTS = 2**20
Block = tuple[slice, ...]


def negatively_guided_velocity(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """The velocity uncond + guidance_scale * (uncond - cond), in the promoted dtype of the two."""
    return _NegativelyGuidedVelocity.apply(uncond, cond, guidance_scale)  # type: ignore[no-untyped-call]


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
        weights = match_resolution(mask, prediction.shape, channel_dim).to(dtype)
        if reduction == "mean" and mask_normalization == "mask":
            scale = weight * _inverse_or_zero(expanded_sum(weights, prediction.shape))
    if sample_weight is not None:
        per_sample = sample_weight.to(dtype).reshape(-1, *[1] * (prediction.dim() - 1))
        weights = per_sample if weights is None else weights * per_sample
    if weights is not None:
        weights = weights.expand(prediction.shape)
    return _VelocityLoss.apply(  # type: ignore[no-untyped-call]
        prediction, uncond, cond, weights, scale, guidance_scale, loss_type, reduction == "none", dtype
    )


def localization_loss(
    outputs: Sequence[Tensor], masks: Sequence[Tensor], *, loss_type: str, normalization: str, weight: float
) -> tuple[Tensor, Tensor]:
    """The loss, and the layers' terms without `weight`.

    Outputs are tokens (B, N, D) with a mask (B or 1, N), or feature maps (B, C, *spatial) with a mask of any
    resolution.
    """
    dtype = compute_dtype(*outputs, *masks)
    terms = []
    for output, mask in zip(outputs, masks, strict=True):
        channel_dim = 2 if output.dim() == 3 else 1
        background = 1 - match_resolution(mask, output.shape, channel_dim).to(dtype)
        scale = _layer_scale(background, output.shape, normalization)
        background = background.expand(output.shape)
        term = _LocalizationTerm.apply(output, background, scale, loss_type, dtype)  # type: ignore[no-untyped-call]
        terms.append(term)
    per_layer = torch.stack(terms)
    return weight * per_layer.mean(), per_layer.detach()


def low_rank_localization_loss(
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    masks: Sequence[Tensor],
    *,
    normalization: str,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """The "l2" `localization_loss` of the outputs hidden @ weight.T + bias, without computing them.

    Let x = (1 - mask) * [hidden, 1], one row per token, and W = [weight, bias]. The sum of squares of x W^T equals the
    sum of the elements of (W^T W) * (x^T x): two matrices of rank + 1 rows.
    """
    dtype = compute_dtype(*hiddens, *weights, *biases, *masks)
    terms = []
    for hidden, up, bias, mask in zip(hiddens, weights, biases, masks, strict=True):
        background = 1 - mask.to(dtype)
        scale = _layer_scale(background, (*hidden.shape[:2], up.shape[0]), normalization)
        background = background.expand(hidden.shape[:2])
        term, *_ = _LowRankLocalizationTerm.apply(  # type: ignore[no-untyped-call]
            hidden, up, bias, background, scale, dtype
        )
        terms.append(term)
    per_layer = torch.stack(terms)
    return weight * per_layer.mean(), per_layer.detach()


@torch.no_grad()
def concept_attention(
    query: Tensor,
    key: Tensor,
    token_indices: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """The softmax probabilities of the keys in `token_indices` (B, T), summed over these, averaged over heads."""
    # A compiler would unroll the loop over blocks, which takes minutes for a hundred blocks.
    compute = _opaque_concept_attention if torch.compiler.is_compiling() else _concept_attention
    return compute(query, key, token_indices, float(scale), key_mask, lse)


def _concept_attention(
    query: Tensor, key: Tensor, token_indices: Tensor, scale: float, key_mask: Tensor | None, lse: Tensor | None
) -> Tensor:
    batch, heads, queries, channels = query.shape
    keys, tokens = key.shape[2], token_indices.shape[1]
    dtype = compute_dtype(query, key, lse)
    is_chosen = (token_indices >= 0) & (token_indices < keys)
    index = token_indices.clamp(0, keys - 1)
    if key_mask is not None:
        is_chosen = is_chosen & key_mask.gather(1, index)
    largest_row = max(channels, tokens, keys)
    if lse is not None:
        key = key.gather(2, index[:, None, :, None].expand(batch, heads, tokens, channels)).to(dtype) * scale
        # With few logits per query, the largest temporary is the converted queries, if they need converting.
        largest_row = max(tokens, 1 if query.dtype == dtype else channels)
    probability = torch.zeros(batch, queries, dtype=dtype, device=query.device)

    for samples, some_heads, rows in _blocks((batch, heads, queries), max(BLOCK_ELEMENTS // largest_row, 1)):
        # Autocast would compute the product in half precision.
        with torch.autocast(query.device.type, enabled=False):
            q = query[samples, some_heads, rows].to(dtype)
            logits = (q if lse is not None else q * scale) @ key[samples, some_heads].to(dtype).mT
        if lse is not None:
            p = (logits - lse[samples, some_heads, rows, None].to(dtype)).exp()
        else:
            if key_mask is not None:
                logits = logits.masked_fill(~key_mask[samples, None, None], -math.inf)
            p = logits.softmax(-1).gather(-1, index[samples, None, None].expand(*logits.shape[:3], tokens))
        p = p.masked_fill(~is_chosen[samples, None, None], 0)
        probability[samples, rows] += p.sum((1, 3))
    return (probability / heads).float()


_opaque_concept_attention = torch.library.custom_op(
    "fastunlearn::torch_concept_attention",
    _concept_attention,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor token_indices, float scale, Tensor? key_mask, Tensor? lse) -> Tensor",
)


@_opaque_concept_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], dtype=torch.float32)


class _NegativelyGuidedVelocity(torch.autograd.Function):
    @staticmethod
    def forward(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
        dtype = compute_dtype(uncond, cond)
        velocity = torch.empty_like(uncond, dtype=torch.promote_types(uncond.dtype, cond.dtype))
        for block in _blocks(uncond.shape):
            velocity[block] = _target(uncond, cond, block, guidance_scale, dtype)
        return velocity

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        uncond, cond, ctx.guidance_scale = inputs
        ctx.dtypes = uncond.dtype, cond.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factors = (1 + ctx.guidance_scale, -ctx.guidance_scale)
        gradients = [
            torch.empty_like(upstream, dtype=dtype) if wanted else None
            for dtype, wanted in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        for block in _blocks(upstream.shape):
            _write_multiples(gradients, block, upstream[block].to(compute_dtype(upstream)), factors)
        return (*gradients, None)


class _VelocityLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        prediction: Tensor,
        uncond: Tensor,
        cond: Tensor | None,
        weights: Tensor | None,
        scale: float | Tensor,
        guidance_scale: float,
        loss_type: str,
        per_element: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses = torch.empty_like(prediction, dtype=dtype) if per_element else None
        sums = []
        for block in _blocks(prediction.shape):
            predicted = prediction[block].to(dtype)
            target = _target(uncond, cond, block, guidance_scale, dtype)
            loss = _weigh(_rho(predicted - target, loss_type), weights, block)
            if losses is not None:
                losses[block] = loss * scale
            sums.append(torch.stack([loss.sum(), predicted.square().sum(), target.square().sum()]))
        total, prediction_square, target_square = torch.stack(sums).sum(0).unbind()
        return total * scale if losses is None else losses, prediction_square.sqrt(), target_square.sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        prediction, uncond, cond, weights, ctx.scale, ctx.guidance_scale, ctx.loss_type, _, ctx.dtype = inputs
        ctx.save_for_backward(prediction, uncond, cond, weights)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        prediction, uncond, cond, weights = ctx.saved_tensors
        # The target is subtracted. d target / d uncond = 1 + guidance_scale, d target / d cond = -guidance_scale.
        factors = (1.0, -1.0 if cond is None else -1.0 - ctx.guidance_scale, ctx.guidance_scale)
        gradients = [
            torch.empty_like(x) if wanted else None
            for x, wanted in zip((prediction, uncond, cond), ctx.needs_input_grad, strict=False)
        ]
        upstream = (upstream * ctx.scale).expand(prediction.shape)
        for block in _blocks(prediction.shape):
            target = _target(uncond, cond, block, ctx.guidance_scale, ctx.dtype)
            slope = _slope(prediction[block].to(ctx.dtype) - target, ctx.loss_type) * upstream[block]
            _write_multiples(gradients, block, _weigh(slope, weights, block), factors)
        return (*gradients, None, None, None, None, None, None)


class _LocalizationTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        output: Tensor, background: Tensor, scale: float | Tensor, loss_type: str, dtype: torch.dtype
    ) -> Tensor:
        sums = []
        for block in _blocks(output.shape):
            outside = _weigh(output[block].to(dtype), background, block)
            sums.append(_rho(outside, loss_type).sum())
        return torch.stack(sums).sum() * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        eraser_output, background, ctx.scale, ctx.loss_type, ctx.dtype = inputs
        ctx.save_for_backward(eraser_output, background)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        output, background = ctx.saved_tensors
        gradient = torch.empty_like(output)
        upstream = upstream * ctx.scale
        for block in _blocks(output.shape):
            outside = _weigh(output[block].to(ctx.dtype), background, block)
            gradient[block] = _weigh(_slope(outside, ctx.loss_type) * upstream, background, block)
        return gradient, None, None, None, None


class _LowRankLocalizationTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        up: Tensor,
        bias: Tensor | None,
        background: Tensor,
        scale: float | Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = hidden.shape[2] + 1
        moments = torch.zeros(size, size, dtype=dtype, device=hidden.device)
        # Autocast would compute the products in half precision.
        with torch.autocast(hidden.device.type, enabled=False):
            for block in _token_blocks(hidden):
                x = _with_ones(hidden, background, block, dtype)
                moments.addmm_(x.mT, x)
            gram = _gram(up, bias, dtype)
        # This is a sum of squares, which only rounding can make negative.
        return ((gram * moments).sum() * scale).clamp(min=0), gram, moments

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, up, bias, background, ctx.scale, ctx.dtype = inputs
        ctx.save_for_backward(hidden, up, bias, background, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, up, bias, background, gram, moments = ctx.saved_tensors
        factor = 2 * upstream * ctx.scale
        hidden_gradient, up_gradient, bias_gradient = (None, None, None)
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                hidden_gradient = torch.empty_like(hidden)
                columns = (gram * factor)[:, :-1].contiguous()
                for block in _token_blocks(hidden):
                    slope = (_with_ones(hidden, background, block, ctx.dtype) @ columns).view(hidden[block].shape)
                    hidden_gradient[block] = _weigh(slope, background[..., None], block)
            if any(ctx.needs_input_grad[1:3]):
                both_gradients = _columns(up, bias, ctx.dtype) @ (moments * factor)
                up_gradient = both_gradients[:, :-1].to(up.dtype)
                bias_gradient = None if bias is None else both_gradients[:, -1].to(bias.dtype)
        return hidden_gradient, up_gradient, bias_gradient, None, None, None


def _token_blocks(hidden: Tensor) -> Iterator[Block]:
    """Indices of blocks of tokens."""
    whole = torch.compiler.is_compiling()
    yield from _blocks(hidden.shape[:2], None if whole else max(BLOCK_ELEMENTS // (hidden.shape[2] + 1), 1))


def _with_ones(hidden: Tensor, background: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The product background * [hidden, 1] for a block of tokens, (tokens, rank + 1); 0 where the background is 0."""
    h = hidden[block].to(dtype)
    x = h.new_empty(*h.shape[:2], h.shape[2] + 1)
    x[..., :-1], x[..., -1] = h, 1
    weights = background[block][..., None]
    return x.mul_(weights).masked_fill_(weights == 0, 0).flatten(0, 1)


def _columns(up: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The matrix [weight, bias], (D, rank + 1)."""
    last = up.new_zeros(up.shape[0]) if bias is None else bias
    return torch.cat([up.to(dtype), last.to(dtype)[:, None]], 1)


def _gram(up: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    columns = _columns(up, bias, dtype)
    return columns.mT @ columns


def _target(uncond: Tensor, cond: Tensor | None, block: Block, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    base = uncond[block].to(dtype)
    return base if cond is None else base + guidance_scale * (base - cond[block].to(dtype))


def _rho(error: Tensor, loss_type: str) -> Tensor:
    return error.square() if loss_type == "l2" else error.abs()


def _slope(error: Tensor, loss_type: str) -> Tensor:
    """rho'(error), 0 at a tie."""
    return 2 * error if loss_type == "l2" else error.sign()


def _weigh(values: Tensor, weights: Tensor | None, block: Block) -> Tensor:
    """The product values * weights, and 0 wherever the weight is 0, even for NaN and infinity."""
    if weights is None:
        return values
    w = weights[block]
    return (values * w).masked_fill_(w == 0, 0)


def _write_multiples(
    destinations: Sequence[Tensor | None], block: Block, values: Tensor, factors: Sequence[float]
) -> None:
    """Set destination[block] = factor * values for every destination that is not None, rounded once to its dtype."""
    for destination, factor in zip(destinations, factors, strict=False):
        if destination is not None:
            destination[block] = factor * values


def _layer_scale(background: Tensor, shape: Sequence[int], normalization: str) -> float | Tensor:
    """What a layer's sum is multiplied by: 1 / the divisor of its output of `shape`."""
    if normalization == "background_mean":
        return _inverse_or_zero(expanded_sum(background, shape))
    return 1 / max(shape[0] if normalization == "sum" else math.prod(shape), 1)


def _inverse_or_zero(denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, 0.0, 1 / denominator)


def _blocks(shape: Sequence[int], limit: int | None = None) -> Iterator[Block]:
    """Indices of blocks of at most `limit` elements, `BLOCK_ELEMENTS` if None, that together cover a `shape`."""
    if limit is None:
        # A compiler fuses the arithmetic, so there are no temporaries to bound, and it would unroll a loop over blocks.
        limit = math.prod(shape) if torch.compiler.is_compiling() else BLOCK_ELEMENTS
    if math.prod(shape) <= limit or not shape:
        yield (slice(None),) * len(shape)
        return
    step = max(limit // math.prod(shape[1:]), 1)
    for start in range(0, shape[0], step):
        head = slice(start, start + step)
        for rest in _blocks(shape[1:], limit):
            yield (head, *rest)
