"""Losses of tensors that are sharded over a process group, as in context parallelism.

Every process computes the loss of its own shard, with the backend that it would use alone. No process alone knows the
divisor of the whole loss. So all scalars of a call, sums and divisors, go through one all-reduce, and the gradient of
the shard's loss is multiplied by a scalar on the device. The host never waits for a device, and the backward pass
communicates nothing.

1. A shard's loss l is a sum divided by a number m that the shard knows. The loss of the whole is sum(l * m) / d, with
   the divisor d of the whole, which is itself a sum over the shards.
2. Its derivative with respect to l is m / d. That factor multiplies the upstream gradient of l.
3. For "mean", l is divided by the number of processes too, so that m = elements of the shard * processes. With equal
   shards, m / d is then exactly 1: the gradient that the forward pass wrote is final, and no second pass over it is
   needed. Otherwise m = 1, except for "background_mean": its shards are computed as "sum", divided by B, so m = B.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastunlearn.dtypes import compute_dtype, widest_dtype
from fastunlearn.ops.spatial_masks import expanded_sum, match_resolution


def check_group(group: object) -> None:
    """Raise unless `group` is None or a process group that this process belongs to."""
    if group is None:
        return
    if not dist.is_available():
        raise TypeError(f"group: expected None without torch.distributed, got {type(group).__name__}")
    # A process outside a group gets this number from `new_group`, never a ProcessGroup.
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected one that this process belongs to, got what new_group returns outside of it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a torch.distributed.ProcessGroup, got {type(group).__name__} "
            "(a DeviceMesh gives one by get_group())"
        )


def velocity_loss_over_group(
    compute: Callable[..., tuple[Tensor, Tensor, Tensor]],
    prediction: Tensor,
    options: dict[str, Any],
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the norms of the whole.

    Args:
        compute: computes the velocity loss of the shard from the options.
        prediction: the shard's prediction, (B, ...).
        options: the keyword arguments of `fastunlearn.ops.torch_backend.velocity_loss`.
        group: the processes that hold the shards.
    """
    multiple, divisors = 1, []
    wide = widest_dtype(prediction.device)
    if options["reduction"] == "mean":
        mask = options["mask"]
        if mask is not None and options["mask_normalization"] == "mask":
            options = options | {"reduction": "sum"}
            weights = match_resolution(mask, prediction.shape, options["channel_dim"])
            divisors = [expanded_sum(weights, prediction.shape, wide)]
        else:
            processes = dist.get_world_size(group)
            options = options | {"weight": options["weight"] / processes}
            multiple = prediction.numel() * processes
            divisors = [prediction.new_full((), prediction.numel(), dtype=wide)]
    loss, *norms = compute(**options)
    squares = [norm.to(wide).square() for norm in norms]
    sums = [] if options["reduction"] == "none" else [loss.detach().to(wide) * multiple]
    summed = _all_reduced(torch.stack([*squares, *sums, *divisors]), group)
    prediction_norm, target_norm = summed[:2].sqrt().to(loss.dtype).unbind()
    if sums:
        divisor = summed[3] if divisors else torch.ones_like(summed[2])
        value = _divide(summed[2], divisor).to(loss.dtype)
        factors = _divide(torch.full_like(divisor, multiple), divisor)[None]
        loss = _Whole.apply(value, factors, loss)  # type: ignore[no-untyped-call]
    return loss, prediction_norm, target_norm


class ShardTerms(NamedTuple):
    """The localization loss of some layers on this process, and how it contributes to the whole."""

    loss: Tensor
    """weight / (number of all layers) * sum of `terms`, possibly divided further."""
    terms: Tensor
    """(layers,): sums over the shard, divided by `term_multiple`."""
    term_multiple: int = 1
    loss_multiple: int = 1
    """m: the whole's derivative with respect to `loss` is m / (sum of `divisor` over the processes)."""
    divisor: Tensor | None = None
    """The shard's part of the whole's divisor, a scalar of `widest_dtype`. None for 1."""


def localization_loss_over_group(
    shards: Sequence[ShardTerms], order: Sequence[int], weight: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The loss and the layers' terms of the whole.

    Args:
        shards: one per call of a backend. The layers of a call have one divisor in the whole too, or no elements here.
        order: for each layer, in the caller's order, its position among the concatenated terms.
        weight: multiplies the loss.
        group: the processes that hold the shards.
    """
    wide = widest_dtype(shards[0].terms.device)
    terms = torch.cat([shard.terms.to(wide) * shard.term_multiple for shard in shards])
    divisors = [shard.divisor.expand(len(shard.terms)) for shard in shards if shard.divisor is not None]
    # Scalars go by layer, in the caller's order: layers of one call here may be in several calls on another process.
    rows = [terms, torch.cat(divisors)] if divisors else [terms]
    sums, *summed_divisors = _all_reduced(torch.stack([row[i] for row in rows for i in order]), group).split(len(order))
    (divisor,) = summed_divisors or [torch.ones_like(sums)]
    per_layer = _divide(sums, divisor)

    starts = itertools.accumulate([len(shard.terms) for shard in shards[:-1]], initial=0)
    shard_divisors = [divisor[order.index(start)] for start in starts]
    factors = [
        _divide(torch.full_like(own_divisor, shard.loss_multiple), own_divisor)
        for shard, own_divisor in zip(shards, shard_divisors, strict=True)
    ]
    losses = [shard.loss for shard in shards]
    dtype = compute_dtype(*losses)
    value = (weight * per_layer.mean()).to(dtype)
    return _Whole.apply(value, torch.stack(factors), *losses), per_layer.to(dtype)  # type: ignore[no-untyped-call]


def background_sum(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The sum of 1 - mask over the elements of a layer's output of `shape`: tokens (B, N, D) or (B, C, *spatial)."""
    background = 1 - match_resolution(mask, shape, 2 if len(shape) == 3 else 1).to(widest_dtype(mask.device))
    return expanded_sum(background, shape)


class _Whole(torch.autograd.Function):
    """Returns `value`, the loss of the whole; its derivatives with respect to this process's losses are `factors`."""

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
    """The sums of (k,) scalars over the processes. Float64 holds element counts and squares of float32 exactly."""
    summed = scalars.clone()
    dist.all_reduce(summed, group=group)
    return summed


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)
