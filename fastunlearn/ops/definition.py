"""What every operation computes, in plain eager torch: one short function per operation, gradients by autograd.

This is the definition that the documentation points at, and the yardstick of the tests: a backend's error may be at
most twice the error of these functions, plus what rounding may add (see `fastunlearn.testing.compare`). They are
written to be read. They hold whole float32 copies in memory, and nothing in the library runs on them.

The functions have the names of the public ones in `fastunlearn.functional` and return the same values, as plain tuples.
Three rules hold everywhere:

* Arithmetic is float32, or float64 if any tensor is float64, whatever the inputs' dtypes.
* An element of weight 0 contributes nothing to a loss or a gradient, even if it is NaN or infinite. The error is
  therefore replaced by 0 *before* it is squared: multiplying by 0 would keep NaN.
* At a tie, where the error is 0, the gradient of "l1" is 0. That is `torch.sign(0)`, autograd's gradient of `abs`.

A mask has no channel dim: it is (B or 1, *spatial) for velocities and feature maps, (B or 1, N) for tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunlearn.dtypes import compute_dtype


def negatively_guided_velocity(uncond: Tensor, cond: Tensor, guidance_scale: float = 7.5) -> Tensor:
    """The velocity that leads away from a concept: v_uncond + eta * (v_uncond - v_cond).

    Classifier-free guidance with the sign turned. Source: the target of T2VUnlearning (arXiv 2505.17550).
    """
    dtype = compute_dtype(uncond, cond)
    u, c = uncond.to(dtype), cond.to(dtype)
    return (u + guidance_scale * (u - c)).to(torch.promote_types(uncond.dtype, cond.dtype))


def negatively_guided_velocity_loss(
    prediction: Tensor, uncond: Tensor, cond: Tensor, *, guidance_scale: float = 7.5, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`velocity_loss` whose target is the negatively guided velocity, without rounding the target.

    Source: the unlearning loss of T2VUnlearning (arXiv 2505.17550).
    """
    dtype = compute_dtype(prediction, uncond, cond, options.get("mask"), options.get("sample_weight"))
    target = negatively_guided_velocity(uncond.to(dtype), cond.to(dtype), guidance_scale)
    return velocity_loss(prediction, target, **options)


def velocity_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    channel_dim: int = 1,
    loss_type: str = "l2",
    reduction: str = "mean",
    mask_normalization: str = "all",
    weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss weight * reduce(m * s * rho(prediction - target)), and the L2 norms of prediction and target.

    m is the mask, s the sample's weight, rho(x) = x^2 ("l2") or |x| ("l1"). "mean" divides the sum by the number of all
    elements, or by the mask's sum over them ("mask"); a divisor of 0 gives 0. The norms are unweighted and detached.
    Source: the preservation loss of T2VUnlearning (arXiv 2505.17550).
    """
    dtype = compute_dtype(prediction, target, mask, sample_weight)
    p, t = prediction.to(dtype), target.to(dtype)
    error, factors = p - t, []
    divisor: int | Tensor = error.numel()
    if mask is not None:
        factors.append(_broadcast_mask(mask.to(dtype), error.shape, channel_dim))
        if mask_normalization == "mask":
            divisor = factors[0].sum()
    if sample_weight is not None:
        factors.append(sample_weight.to(dtype).reshape(-1, *[1] * (p.dim() - 1)))
    for factor in factors:
        error = _hide(error, factor)
    loss = _rho(error, loss_type)
    for factor in factors:
        loss = loss * factor
    if reduction == "sum":
        loss = loss.sum()
    if reduction == "mean":
        loss = _divide(loss.sum(), divisor)
    return loss * weight, p.detach().norm(), t.detach().norm()


def localization_loss(
    outputs: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    loss_type: str = "l2",
    normalization: str = "sum",
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The loss weight * mean over layers of (sum of rho((1 - mask) * output)) / divisor, and the terms of the layers.

    Outputs are tokens (B, N, D) or feature maps (B, C, *spatial). The divisor is B ("sum"), the number of elements
    ("mean"), or the sum of 1 - mask over all elements ("background_mean"); a divisor of 0 gives 0. The terms (L,) are
    without `weight` and detached. Source: Receler (arXiv 2311.17717), as T2VUnlearning (arXiv 2505.17550) uses it.
    """
    dtype = compute_dtype(*outputs, *masks)
    terms = []
    for output, mask in zip(outputs, masks, strict=True):
        background = _broadcast_mask(1 - mask.to(dtype), output.shape, 2 if output.dim() == 3 else 1)
        outside = _hide(output.to(dtype), background) * background
        divisors: dict[str, int | Tensor] = {
            "sum": output.shape[0],
            "mean": output.numel(),
            "background_mean": background.sum(),
        }
        terms.append(_divide(_rho(outside, loss_type).sum(), divisors[normalization]))
    per_layer = torch.stack(terms)
    return weight * per_layer.mean(), per_layer.detach()


def low_rank_localization_loss(
    outputs: Sequence[tuple[Tensor, Tensor, Tensor | None]], masks: Sequence[Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    """`localization_loss` of the outputs hidden @ weight.T + bias, given as (hidden, weight, bias) per layer.

    Backends get the same value from r x r matrices, without computing an output. Source: this library.
    """
    dtype = compute_dtype(*(x for output in outputs for x in output), *masks)
    dense = []
    for (hidden, weight, bias), mask in zip(outputs, masks, strict=True):
        # Tokens of weight 0 take part in no gradient, that of `weight` included.
        h = hidden.to(dtype).masked_fill((mask.to(dtype) == 1)[..., None], 0)
        dense.append(F.linear(h, weight.to(dtype), None if bias is None else bias.to(dtype)))
    return localization_loss(dense, masks, **options)


def concept_attention(
    query: Tensor,
    key: Tensor,
    token_indices: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """How much attention each query pays to the concept's tokens: softmax(scale * query key^T), (B, Sq) float32.

    The probabilities of the keys in `token_indices`, (T,) or (B, T), are summed, then averaged over heads. -1 and
    indices beyond the last key stand for no token. Keys where `key_mask` is False get no attention; with no key left,
    the result is 0. `lse` is `log_sum_exp`, which makes the softmax exp(logits - lse). Source: the attention maps that
    T2VUnlearning (arXiv 2505.17550) thresholds into masks.
    """
    logits = _logits(query, key, key_mask, scale, compute_dtype(query, key, lse))
    probability = logits.softmax(-1) if lse is None else (logits - lse[..., None]).exp()
    if key_mask is not None:
        probability = probability.masked_fill(~key_mask[:, None, None], 0)
    index = token_indices.expand(query.shape[0], -1)[:, None, None].expand(*probability.shape[:3], -1)
    is_token = (index >= 0) & (index < key.shape[2])
    chosen = probability.gather(-1, index.clamp(0, key.shape[2] - 1)).masked_fill(~is_token, 0)
    return chosen.sum(-1).mean(1).float()


def log_sum_exp(query: Tensor, key: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The natural logarithm of the softmax's denominator, (B, H, Sq) float64."""
    return _logits(query, key, key_mask, None, torch.float64).logsumexp(-1)


def _logits(query: Tensor, key: Tensor, key_mask: Tensor | None, scale: float | None, dtype: torch.dtype) -> Tensor:
    logits = query.to(dtype) @ key.to(dtype).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    return logits if key_mask is None else logits.masked_fill(~key_mask[:, None, None], -torch.inf)


def _broadcast_mask(mask: Tensor, shape: torch.Size, channel_dim: int) -> Tensor:
    """The mask (B or 1, *spatial) at the resolution of `shape`, read by nearest neighbour, the same for all channels.

    A resolution may differ in one to three spatial dims, which is what `interpolate` takes.
    """
    spatial = shape[1:channel_dim] + shape[channel_dim + 1 :]
    if mask.shape[1:] != spatial:
        mask = F.interpolate(mask[:, None], size=spatial, mode="nearest")[:, 0]
    return mask.unsqueeze(channel_dim).expand(shape)


def _hide(values: Tensor, factor: Tensor) -> Tensor:
    """The values, with 0 wherever the factor is 0."""
    return values.clone().masked_fill_(factor == 0, 0)


def _rho(error: Tensor, loss_type: str) -> Tensor:
    return error.square() if loss_type == "l2" else error.abs()


def _divide(total: Tensor, divisor: int | Tensor) -> Tensor:
    """The quotient total / divisor, and 0 where the divisor is 0."""
    if isinstance(divisor, int):
        return total / max(divisor, 1)
    return torch.where(divisor == 0, 0.0, total / torch.where(divisor == 0, 1, divisor))
