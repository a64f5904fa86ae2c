"""Losses of tensors that are sharded over a process group, as in context parallelism.

Every process computes the loss of its shard with the implementation that it would use alone. What the shards' results
have to be divided by is known only together: so all scalars of a call, sums and denominators, go through one
all-reduce, and the gradient of the shard's loss is multiplied by a scalar on the device. Nothing waits for a device,
and the backward pass communicates nothing.

1. A shard's loss l is its sum divided by a number m that the shard knows: value = (sum of l * m) / d with the
   normalizer d of the whole, itself a sum over the shards.
2. d value / d l = m / d on the process that holds the shard: what multiplies the upstream gradient there.
3. For "mean", m = elements of the shard * processes. The factor of equal shards is then 1, exactly, and what the
   forward pass wrote is the gradient: no second pass over it. For the other normalizers m = 1, or B.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastunlearn.ops.spatial_masks import match_resolution


def check_group(group: object) -> None:
    """Raise unless `group` is None or a process group that this process belongs to."""
    if group is None:
        return
    if not dist.is_available():
        raise TypeError(f"group must be None where torch.distributed is not available, got {type(group).__name__}")
    # What `new_group` returns to a process outside the group. A ProcessGroup object is only ever held inside.
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must be one that this process belongs to, got what new_group returns outside of it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__} (of a DeviceMesh: get_group())"
        )


def velocity_loss_over_group(
    compute: Callable[..., tuple[Tensor, Tensor, Tensor]],
    prediction: Tensor,
    options: dict[str, Any],
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and norms of the whole.

    Args:
        compute: a velocity loss of the shard, but for the options.
        prediction: the shard's, (B, ...).
        options: the keyword arguments of `reference.velocity_loss`.
        group: who holds the other shards.
    """
    multiple, normalizers = 1, []
    if options["reduction"] == "mean":
        mask = options["mask"]
        if mask is not None and options["mask_normalization"] == "mask":
            options = options | {"reduction": "sum"}
            weights = match_resolution(mask, prediction.shape, options["channel_dim"])
            normalizers = [_expanded_sum(weights, prediction.shape)]
        else:
            processes = dist.get_world_size(group)
            options = options | {"weight": options["weight"] / processes}
            multiple = prediction.numel() * processes
            normalizers = [prediction.new_full((), prediction.numel(), dtype=torch.float64)]
    loss, *norms = compute(**options)
    squares = [norm.double().square() for norm in norms]
    sums = [] if options["reduction"] == "none" else [loss.detach().double() * multiple]
    summed = _all_reduced(torch.stack([*squares, *sums, *normalizers]), group)
    prediction_norm, target_norm = summed[:2].sqrt().to(loss.dtype).unbind()
    if sums:
        normalizer = summed[3] if normalizers else torch.ones_like(summed[2])
        value = _divide(summed[2], normalizer).to(loss.dtype)
        factors = _divide(torch.full_like(normalizer, multiple), normalizer)[None]
        loss = _Whole.apply(value, factors, loss)  # type: ignore[no-untyped-call]
    return loss, prediction_norm, target_norm


class LocalizationPart(NamedTuple):
    """What an implementation found in some layers of the shard with the normalization "sum"."""

    loss: Tensor  # weight / (all layers) * sum of the terms
    terms: Tensor  # (layers of the part,): sums over the shard, divided by `batch`
    batch: int  # not 0
    background: Tensor | None  # the sum of 1 - mask over the shard's elements, what "background_mean" divides by


def localization_loss_over_group(
    parts: Sequence[LocalizationPart], order: Sequence[int], weight: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The loss and the layers' terms of the whole. `order` takes the parts' layers to the caller's.

    Layers of a part have one background in the whole too, or none of their elements here.
    """
    backgrounds = [part.background.expand(len(part.terms)) for part in parts if part.background is not None]
    multiples = [part.batch if backgrounds else 1 for part in parts]
    terms = [part.terms.double() * multiple for part, multiple in zip(parts, multiples, strict=True)]
    # By layer, in the caller's order: layers that make one part here may be several on another process.
    rows = [torch.cat(row) for row in (terms, backgrounds) if row]
    sums, *normalizers = _all_reduced(torch.stack([row[i] for row in rows for i in order]), group).split(len(order))
    (normalizer,) = normalizers or [torch.ones_like(sums)]
    per_layer = _divide(sums, normalizer)

    starts = itertools.accumulate([len(part.terms) for part in parts[:-1]], initial=0)
    of_parts = [normalizer[order.index(start)] for start in starts]
    factors = torch.stack(
        [_divide(torch.full_like(x, multiple), x) for x, multiple in zip(of_parts, multiples, strict=True)]
    )
    losses = [part.loss for part in parts]
    dtype = torch.float64 if any(loss.dtype == torch.float64 for loss in losses) else torch.float32
    value = (weight * per_layer.mean()).to(dtype)
    return _Whole.apply(value, factors, *losses), per_layer.to(dtype)  # type: ignore[no-untyped-call]


def background_sum(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The sum of 1 - mask over the elements of a layer's output of `shape`: tokens (B, N, D) or (B, C, *spatial)."""
    background = 1 - match_resolution(mask, shape, 2 if len(shape) == 3 else 1).double()
    return _expanded_sum(background, shape)


class _Whole(torch.autograd.Function):
    """The value of the whole, whose derivative with respect to the shard's losses is `factors`."""

    @staticmethod
    def forward(value: Tensor, factors: Tensor, *losses: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, factors, *losses = inputs
        ctx.save_for_backward(factors)
        ctx.dtypes = [loss.dtype for loss in losses]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (factors,) = ctx.saved_tensors
        gradients = [(upstream * factor).to(dtype) for factor, dtype in zip(factors.unbind(), ctx.dtypes, strict=True)]
        return (None, None, *gradients)


@torch.no_grad()
def _all_reduced(scalars: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sums over the processes of (k,) float64, in which numbers of elements and squares of float32 are exact."""
    summed = scalars.clone()
    dist.all_reduce(summed, group=group)
    return summed


def _expanded_sum(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The float64 sum of `x` after broadcasting to `shape`."""
    return x.sum(dtype=torch.float64) * (math.prod(shape) // max(x.numel(), 1))


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 0 where there is nothing to divide by."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)
