"""The operations of concept erasure on tensors: arguments are checked, a backend is chosen, results are returned.

What each operation computes is defined in `fastunlearn.ops.definition`. All arithmetic is float32, or float64 if any
tensor is float64, whatever the inputs' dtypes, which may differ. Gradients have their input's dtype. The operations are
once-differentiable: a second derivative raises RuntimeError.

**Sharded tensors.** A loss takes a `group`, a `torch.distributed` process group, if each of its processes holds a shard
of the tensors, as in context parallelism. Tensors may be sharded along the batch or along a dim of positions. Shards
may differ in size, and a shard may be empty. Every process of the group

* passes its own shard of every tensor, including the mask of its positions, and the same options as all others;
* gets the same loss, norms and per-layer terms: those of the whole tensors. They are equal bit for bit if the
  all-reduce gives all processes the same bits, as gloo's and NCCL's do. Only with `reduction="none"` is the loss that
  of the process's own elements;
* gets, in the backward pass, the gradient of the whole loss with respect to its own shard. Nothing is communicated for
  it, and nothing has to be averaged. The upstream gradient of the loss must be the same on all processes;
* gets, for a tensor that all processes share, only the part of the gradient that comes from its own positions. Such
  tensors are the `weight` and `bias` of a `LowRankOutput` and all parameters that computed the shards. The caller adds
  up the parts, by an all-reduce with SUM. DistributedDataParallel takes the mean instead, which is too small by a
  factor of the group's size.

A call costs one all-reduce of a few scalars, float64 where the tensors' device has it, in the forward pass. The host
never waits for the device. All processes of the group must make the same calls in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastunlearn.ops.arguments import (
    check_choice,
    check_number,
    check_shape,
    check_tensor,
    token_index_rows,
    velocity_arguments,
)
from fastunlearn.ops.dispatch import Backend, BackendChoice, choose_backend, implementation
from fastunlearn.ops.localization import LowRankOutput, checked_layers, loss_of_layers, unify
from fastunlearn.ops.sharded import check_group, velocity_loss_over_group

__all__ = [
    "BackendChoice",
    "LocalizationLoss",
    "LowRankOutput",
    "VelocityLoss",
    "choose_backend",
    "concept_attention",
    "localization_loss",
    "negatively_guided_velocity",
    "negatively_guided_velocity_loss",
    "velocity_loss",
]

LossType = Literal["l2", "l1"]
Reduction = Literal["mean", "sum", "none"]
MaskNormalization = Literal["all", "mask"]
LocalizationNormalization = Literal["sum", "mean", "background_mean"]


class VelocityLoss(NamedTuple):
    """A loss between two velocities, and their L2 norms over all elements, unweighted and detached."""

    loss: Tensor
    prediction_norm: Tensor
    target_norm: Tensor


class LocalizationLoss(NamedTuple):
    """The localization loss, and the terms of its layers (L,), detached and without `weight`."""

    loss: Tensor
    per_layer: Tensor


def negatively_guided_velocity(uncond: Tensor, cond: Tensor, guidance_scale: float = 7.5) -> Tensor:
    """The velocity that leads away from a concept: uncond + guidance_scale * (uncond - cond).

    The target of T2VUnlearning (arXiv 2505.17550). Differentiable in both tensors.

    Args:
        uncond: velocity for a prompt without the concept, of any shape.
        cond: velocity for a prompt with the concept, of the same shape.
        guidance_scale: eta, how far to lead away.

    Returns:
        The velocity, in the inputs' promoted dtype, rounded once from float32 or float64.

    Raises:
        TypeError: a tensor is not floating point, or the guidance scale is not a number.
        ValueError: shapes or devices differ.
    """
    check_tensor("uncond", uncond)
    check_tensor("cond", cond, like=uncond)
    check_shape("cond", cond, uncond.shape, "that of uncond")
    check_number("guidance_scale", guidance_scale)
    return implementation("negatively_guided_velocity", None, uncond, cond)(uncond, cond, guidance_scale)


def negatively_guided_velocity_loss(
    prediction: Tensor,
    uncond: Tensor,
    cond: Tensor,
    *,
    guidance_scale: float = 7.5,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    channel_dim: int = 1,
    loss_type: LossType = "l2",
    reduction: Reduction = "mean",
    mask_normalization: MaskNormalization = "all",
    weight: float = 1.0,
    backend: Backend | None = None,
    group: dist.ProcessGroup | None = None,
) -> VelocityLoss:
    """The unlearning loss: weight * reduce(mask * sample_weight * rho(prediction - target)).

    The target is `negatively_guided_velocity(uncond, cond, guidance_scale)`, which is never written to memory. From
    T2VUnlearning (arXiv 2505.17550). Differentiable in `prediction`, `uncond` and `cond`. Where prediction and target
    are equal, the gradient of "l1" is 0.

    Args:
        prediction: the student's velocity, (B, C, *spatial) or with another `channel_dim`.
        uncond: the teacher's velocity for a prompt without the concept, of `prediction`'s shape. Usually detached.
        cond: the teacher's velocity for a prompt with the concept, of `prediction`'s shape. Usually detached.
        guidance_scale: eta, how far to lead away from the concept.
        mask: (B or 1, *spatial), or the same with a channel dim of size 1. Its dtype may be bool, integer or floating,
            and its values soft, but finite: a NaN in it makes the loss NaN. It may be coarser than the velocity by a
            whole number in each dim, as a grid of tokens is, and is then read as by
            `torch.nn.functional.interpolate(mode="nearest")`. It gets no gradient.
        sample_weight: (B,), finite, multiplies rho. It gets no gradient. An element contributes nothing, even if it is
            NaN, where its sample weight or its mask is 0.
        channel_dim: the channel's dim in the velocities: 1, or 2 in CogVideoX's (B, F, C, H, W). It says which dims the
            mask lacks; without a mask it changes nothing.
        loss_type: rho: "l2" is the square, "l1" the absolute value.
        reduction: "mean" over all elements, "sum", or "none" for the loss of each element.
        mask_normalization: what "mean" divides by: the number of "all" elements, or the sum of the "mask" over them.
        weight: multiplies the loss.
        backend: "torch", "compile", "triton" or None; see `choose_backend`.
        group: the processes over which the batch or the positions are sharded; see the module's docstring. "mean"
            divides by the elements, or the mask's sum, of all shards together, and the norms are over all shards.

    Returns:
        The loss, a scalar or of `prediction`'s shape, and the norms of prediction and target, all in float32, or
        float64 if any tensor is float64. The loss is 0 for an empty batch, and if "mean" would divide by a mask whose
        sum is 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or this process is not in the group.
    """
    check_tensor("prediction", prediction)
    check_tensor("cond", cond, like=prediction)
    check_shape("cond", cond, prediction.shape, "that of prediction")
    check_number("guidance_scale", guidance_scale)
    options = velocity_arguments(
        prediction, uncond, "uncond", mask, sample_weight, channel_dim, loss_type, reduction, mask_normalization, weight
    )
    check_group(group)
    op = implementation("negatively_guided_velocity_loss", backend, prediction)
    compute = functools.partial(op, prediction, uncond, cond, guidance_scale=guidance_scale)
    if group is not None:
        return VelocityLoss(*velocity_loss_over_group(compute, prediction, options, group))
    return VelocityLoss(*compute(**options))


def velocity_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    channel_dim: int = 1,
    loss_type: LossType = "l2",
    reduction: Reduction = "mean",
    mask_normalization: MaskNormalization = "all",
    weight: float = 1.0,
    backend: Backend | None = None,
    group: dist.ProcessGroup | None = None,
) -> VelocityLoss:
    """The preservation loss: weight * reduce(mask * sample_weight * rho(prediction - target)).

    From T2VUnlearning (arXiv 2505.17550). Differentiable in `prediction` and `target`. All options are those of
    `negatively_guided_velocity_loss`, which describes them in full.

    Args:
        prediction: the student's velocity, (B, C, *spatial) or with another `channel_dim`.
        target: the teacher's velocity, of `prediction`'s shape. Usually detached.
        mask: (B or 1, *spatial), as fine as the velocities or coarser by whole numbers.
        sample_weight: (B,).
        channel_dim: the channel's dim in the velocities.
        loss_type: "l2" or "l1".
        reduction: "mean", "sum" or "none".
        mask_normalization: "all" or "mask".
        weight: multiplies the loss.
        backend: "torch", "compile", "triton" or None.
        group: the processes over which the tensors are sharded.

    Returns:
        The loss, and the norms of prediction and target, as `negatively_guided_velocity_loss` returns them.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or this process is not in the group.
    """
    check_tensor("prediction", prediction)
    options = velocity_arguments(
        prediction, target, "target", mask, sample_weight, channel_dim, loss_type, reduction, mask_normalization, weight
    )
    check_group(group)
    compute = functools.partial(implementation("velocity_loss", backend, prediction), prediction, target)
    if group is not None:
        return VelocityLoss(*velocity_loss_over_group(compute, prediction, options, group))
    return VelocityLoss(*compute(**options))


def localization_loss(
    eraser_outputs: Sequence[Tensor | LowRankOutput] | Mapping[str, Tensor | LowRankOutput],
    mask: Tensor | Mapping[str, Tensor],
    *,
    loss_type: LossType = "l2",
    normalization: LocalizationNormalization = "sum",
    weight: float = 1.0,
    backend: Backend | None = None,
    group: dist.ProcessGroup | None = None,
) -> LocalizationLoss:
    """What erasers change outside the concept: weight * mean over layers of sum(rho((1 - mask) * output)) / divisor.

    The localization loss of Receler (arXiv 2311.17717) as T2VUnlearning (arXiv 2505.17550) uses it. Differentiable in
    the eraser outputs. Where 1 - mask is 0, an output contributes nothing, even if it is NaN.

    A `LowRankOutput` costs r/D of what its output (B, N, D) would cost: under "l2" the sum is a function of r x r
    moments of `hidden`, and neither the output nor its gradient is ever computed. The rounding error is a few units in
    the last place of the sum of squares of ||hidden @ weight.T|| + ||bias||, which matters only if these two nearly
    cancel. Under "l1", and if D is not larger than r, the output is computed.

    Args:
        eraser_outputs: one per layer, in a sequence or by name. Each is either tokens (B, N, D), or a feature map
            (B, C, *spatial) with two or more spatial dims, or a `LowRankOutput` of tokens, which is differentiable in
            all three of its tensors. Layers may be of different kinds.
        mask: 1 on the concept. One for all layers, or a mapping with one per layer name. Its dtype may be bool, integer
            or floating, and its values soft. For tokens it is (B or 1, *grid) with N positions. For feature maps it is
            (B or 1, *spatial), or the same with a channel dim of size 1, and is resized by nearest neighbour if its
            resolution differs. It gets no gradient.
        loss_type: rho: "l2" is the square, "l1" the absolute value.
        normalization: what a layer's sum is divided by. "sum": B. "mean": the number of all its elements, masked or
            not. "background_mean": the sum of 1 - mask over its elements, as in Receler.
        weight: multiplies the loss.
        backend: "torch", "compile", "triton" or None; see `choose_backend`.
        group: the processes over which the positions are sharded, in the same way for all layers; see the module's
            docstring. "mean" and "background_mean" divide by the elements, or the background, of all shards together,
            so they are right for a sharded batch too. "sum" divides each shard's sum by that shard's B. If the batch is
            sharded, make its shards equal and divide `weight` by their number.

    Returns:
        The loss, a scalar, and the layers' terms (L,), both in float32, or float64 if any tensor is float64. The loss
        is 0 without layers, for an empty batch, and if "background_mean" would divide by 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, a layer has no mask, or this process is not in
            the group.
    """
    check_choice("loss_type", loss_type, ("l2", "l1"))
    check_choice("normalization", normalization, ("sum", "mean", "background_mean"))
    check_number("weight", weight)
    check_group(group)
    layers = checked_layers(eraser_outputs, mask)
    if not layers:
        zeros = torch.zeros(1, device=mask.device if isinstance(mask, Tensor) else None)
        return LocalizationLoss(zeros.sum(), zeros[:0])
    loss, per_layer = loss_of_layers(
        unify(layers, loss_type),
        loss_type=loss_type,
        normalization=normalization,
        weight=weight,
        backend=backend,
        group=group,
        one_mask=not isinstance(mask, Mapping),
    )
    return LocalizationLoss(loss, per_layer)


def concept_attention(
    query: Tensor,
    key: Tensor,
    token_indices: Tensor | Sequence[int],
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    lse: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """How much each query attends to the concept's tokens: softmax probability, mean over heads, sum over tokens.

    T2VUnlearning (arXiv 2505.17550) thresholds these maps into masks. The Sq x Sk matrix is never held in memory. Not
    differentiable.

    Args:
        query: (B, H, Sq, d).
        key: (B, H, Sk, d), all keys of the softmax.
        token_indices: (T,) or (B, T) integers, the concept's keys; -1 stands for no key. A key named twice counts
            twice. An index out of range raises, except on a GPU and under `torch.compile`, where it counts as -1:
            reading it would wait for the device.
        scale: multiplies query . key; d ** -0.5 if None.
        key_mask: (B, Sk) bool, True for keys that are attended to. A query whose keys are all masked gets 0.
        lse: (B, H, Sq), the natural log of the softmax's denominator, if the attention's forward pass has kept it.
        backend: "torch", "compile", "triton" or None; see `choose_backend`.

    Returns:
        (B, Sq) float32, in [0, 1] if no token is named twice.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or device, or an index is out of range.
    """
    check_tensor("query", query)
    check_tensor("key", key, like=query)
    if query.dim() != 4:
        raise ValueError(f"query: expected shape (B, H, Sq, d), got {tuple(query.shape)}")
    batch, heads, queries, channels = query.shape
    if key.dim() != 4 or (*key.shape[:2], key.shape[3]) != (batch, heads, channels) or 0 in key.shape[1:]:
        raise ValueError(
            f"key: expected shape ({batch}, {heads}, Sk, {channels}) like query, with at least one head, key and "
            f"channel, got {tuple(key.shape)}"
        )
    if scale is None:
        scale = channels**-0.5
    check_number("scale", scale)
    if key_mask is not None:
        check_tensor("key_mask", key_mask, (torch.bool,), like=query)
        check_shape("key_mask", key_mask, (batch, key.shape[2]), "(B, Sk)")
    if lse is not None:
        check_tensor("lse", lse, like=query)
        check_shape("lse", lse, (batch, heads, queries), "(B, H, Sq)")
    indices = token_index_rows(token_indices, batch, key.shape[2]).to(query.device)
    compute = implementation("concept_attention", backend, query, key, lse)
    return compute(query, key, indices, scale=scale, key_mask=key_mask, lse=lse)
