"""The losses as one writes them in eager torch computing in float32: the yardstick of the error bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Float64 if any tensor is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def velocity_loss(
    prediction: Tensor,
    uncond: Tensor,
    cond: Tensor | None = None,
    *,
    guidance_scale: float = 0.0,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    channel_dim: int = 1,
    loss_type: str = "l2",
    reduction: str = "mean",
    mask_normalization: str = "all",
    weight: float = 1.0,
) -> Tensor:
    """`mask` has no channel dim and, if its resolution differs, one to three spatial dims."""
    dtype = compute_dtype(prediction, uncond, cond, mask, sample_weight)
    p, u = prediction.to(dtype), uncond.to(dtype)
    target = u if cond is None else u + guidance_scale * (u - cond.to(dtype))
    error = (p - target).square() if loss_type == "l2" else (p - target).abs()
    count: float | Tensor = error.numel()
    if mask is not None:
        spatial = tuple(p.shape[1:channel_dim] + p.shape[channel_dim + 1 :])
        m = mask.to(dtype)
        if tuple(m.shape[1:]) != spatial:
            m = F.interpolate(m[:, None], size=spatial, mode="nearest")[:, 0]
        m = m.unsqueeze(channel_dim).expand(p.shape)
        error = error * m
        if mask_normalization == "mask":
            count = m.sum()
    if sample_weight is not None:
        error = error * sample_weight.to(dtype).reshape(-1, *[1] * (p.dim() - 1))
    if reduction == "none":
        return error * weight
    return error.sum() * weight if reduction == "sum" else error.sum() / count * weight


def localization_loss(
    outputs: list[Tensor],
    masks: list[Tensor],
    *,
    loss_type: str = "l2",
    normalization: str = "sum",
    weight: float = 1.0,
) -> Tensor:
    """Masks are (B or 1, N) for tokens and (B or 1, *spatial) of any resolution for feature maps."""
    dtype = compute_dtype(*outputs, *masks)
    terms = []
    for output, mask in zip(outputs, masks, strict=True):
        m = mask.to(dtype)
        if output.dim() == 3:
            outside = (1 - m)[:, :, None].expand(output.shape)
        else:
            outside = (1 - F.interpolate(m[:, None], size=output.shape[2:], mode="nearest")).expand(output.shape)
        masked = output.to(dtype) * outside
        total = (masked.square() if loss_type == "l2" else masked.abs()).sum()
        terms.append(total / (output.shape[0] if normalization == "sum" else outside.sum()))
    return weight * torch.stack(terms).mean()


def low_rank_localization_loss(
    outputs: Sequence[tuple[Tensor, Tensor, Tensor | None]], masks: list[Tensor], **options: Any
) -> Tensor:
    """The dense loss of the outputs computed in float32: what a low-rank form has to match."""
    dtype = compute_dtype(*(x for output in outputs for x in output), *masks)
    dense = [F.linear(h.to(dtype), w.to(dtype), None if b is None else b.to(dtype)) for h, w, b in outputs]
    return localization_loss(dense, masks, **options)


def _logits(query: Tensor, key: Tensor, key_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits = query.to(dtype) @ key.to(dtype).mT * query.shape[-1] ** -0.5
    return logits if key_mask is None else logits.masked_fill(~key_mask[:, None, None], -torch.inf)


def log_sum_exp(query: Tensor, key: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The natural logarithm of the softmax's denominator, (B, H, Sq) float64."""
    return _logits(query, key, key_mask, torch.float64).logsumexp(-1)


def concept_attention(query: Tensor, key: Tensor, token_indices: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """All of softmax(query key^T), then the columns of the (T,) or (B, T) indices, -1 for none."""
    probability = _logits(query, key, key_mask, compute_dtype(query, key)).softmax(-1)
    index = token_indices.expand(query.shape[0], -1)[:, None, None].expand(*probability.shape[:3], -1)
    chosen = probability.gather(-1, index.clamp(min=0)).masked_fill(index < 0, 0)
    return chosen.sum(-1).mean(1).float()
