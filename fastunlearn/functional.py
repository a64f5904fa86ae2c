"""The operations of concept erasure, tensors in and tensors out: arguments are checked, the backend is chosen.

What each operation computes is defined in `fastunlearn.ops.definition`. All arithmetic is float32, or float64 if any
tensor passed is float64, whatever the inputs' dtypes, which may differ. Gradients come back in their input's dtype. The
operations are once-differentiable: a second derivative raises RuntimeError.

With a `group`, a `torch.distributed` process group, a loss is that of tensors whose shards its processes hold, as in
context parallelism. A shard is of the batch, or of any dim of positions; it may be empty, and shards need not be equal.
Every process of the group

* passes its own shard of every tensor, the mask of those positions among them, and the same options;
* gets the same loss, norms and layers' terms, those of the whole (to the bit where the backend's all-reduce gives all
  processes the same bits, as gloo and NCCL do). Only the elements of `reduction="none"` are each process's own;
* gets, in its backward pass, the gradient of the whole with respect to its own shard, provided that all processes
  multiply their losses by the same upstream gradient. Nothing is communicated then, and nothing need be averaged;
* gets, for a tensor that all share (`LowRankOutput.weight` and `bias`, and any parameter that the shards were computed
  with), its own positions' part of the gradient. The caller adds the parts up: all-reduce with SUM, not with the mean
  that DistributedDataParallel takes.

A call is one all-reduce of a few float64 scalars, on the tensors' device, in the forward pass. It waits for no device.
All processes of the group have to make the same calls in the same order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastunlearn.ops.arguments import (
    check_choice,
    check_low_rank,
    check_number,
    check_shape,
    check_tensor,
    layer_mask,
    named_layers,
    token_index_rows,
    velocity_arguments,
)
from fastunlearn.ops.dispatch import Backend, BackendChoice, choose_backend, implementation
from fastunlearn.ops.sharded import (
    LocalizationPart,
    background_sum,
    check_group,
    localization_loss_over_group,
    velocity_loss_over_group,
)

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
LocalizationNormalization = Literal["sum", "background_mean"]


class VelocityLoss(NamedTuple):
    """A loss between velocities, and the L2 norms of the two, over all elements, unweighted and detached."""

    loss: Tensor
    prediction_norm: Tensor
    target_norm: Tensor


class LocalizationLoss(NamedTuple):
    """The localization loss, and every layer's own term (L,), detached and without `weight`."""

    loss: Tensor
    per_layer: Tensor


class LowRankOutput(NamedTuple):
    """An eraser's output hidden @ weight.T + bias, not computed: what its last layer reads, and its parameters.

    hidden: (B, N, r). weight: (D, r). bias: (D,) or None. Their dtypes may differ.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def negatively_guided_velocity(uncond: Tensor, cond: Tensor, guidance_scale: float = 7.5) -> Tensor:
    """The velocity that leads away from a concept: uncond + guidance_scale * (uncond - cond).

    The target of T2VUnlearning (arXiv 2505.17550). Differentiable in both tensors.

    Args:
        uncond: velocity without the concept in the prompt, any shape.
        cond: velocity with it, of the same shape.
        guidance_scale: eta.

    Returns:
        The velocity, in the inputs' promoted dtype (rounded once, from float32 or float64).

    Raises:
        TypeError: a tensor is not floating point, or the scale is not a number.
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

    The target is `negatively_guided_velocity(uncond, cond, guidance_scale)`, never written to memory. From
    T2VUnlearning (arXiv 2505.17550). Differentiable in `prediction`, `uncond` and `cond`; at a tie the gradient of
    "l1" is 0.

    Args:
        prediction: the student's velocity, (B, C, *spatial) or with another `channel_dim`.
        uncond: the teacher's velocity without the concept in the prompt, of `prediction`'s shape. Detach it.
        cond: the teacher's velocity with it, of `prediction`'s shape.
        guidance_scale: eta.
        mask: (B or 1, *spatial), or with a channel dim of size 1; bool, integer or floating, hard or soft. Of any
            resolution: read as by `torch.nn.functional.interpolate(mode="nearest")`. Takes no gradient.
        sample_weight: (B,), multiplies rho. Takes no gradient. Where it or the mask is 0, even NaN contributes nothing.
        channel_dim: which dim of the velocities is the channel: 1, or 2 in CogVideoX's (B, F, C, H, W).
        loss_type: rho, "l2" (square) or "l1" (absolute value).
        reduction: "mean" (over all elements), "sum" or "none".
        mask_normalization: what "mean" divides by: "all" elements, or the sum of the "mask" over all of them.
        weight: multiplies the loss.
        backend: "torch", "compile", "triton" or None; see `choose_backend`.
        group: over whose processes the batch or the positions are sharded. "mean" then divides by the elements, or the
            mask's sum, of all shards together, and the norms are over all of them. For gradients see the module's
            docstring.

    Returns:
        The loss, a scalar or of `prediction`'s shape, and the norms of prediction and target: float32, or float64 if
        any tensor passed is. An empty batch or a mask of sum 0 to divide by gives 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, or a group that this process is not in.
    """
    check_tensor("prediction", prediction)
    check_tensor("cond", cond, like=prediction)
    check_shape("cond", cond, prediction.shape, "that of prediction")
    check_number("guidance_scale", guidance_scale)
    common = velocity_arguments(
        prediction, uncond, "uncond", mask, sample_weight, channel_dim, loss_type, reduction, mask_normalization, weight
    )
    check_group(group)
    op = implementation("negatively_guided_velocity_loss", backend, prediction)
    compute = functools.partial(op, prediction, uncond, cond, guidance_scale=guidance_scale)
    if group is not None:
        return VelocityLoss(*velocity_loss_over_group(compute, prediction, common, group))
    return VelocityLoss(*compute(**common))


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

    From T2VUnlearning (arXiv 2505.17550). Differentiable in `prediction` and `target`.

    Args:
        prediction: the student's velocity, (B, C, *spatial) or with another `channel_dim`.
        target: the teacher's velocity, of `prediction`'s shape. Detach it.
        mask: as in `negatively_guided_velocity_loss`, like all that follow.
        sample_weight: (B,).
        channel_dim: which dim of the velocities is the channel.
        loss_type: "l2" or "l1".
        reduction: "mean", "sum" or "none".
        mask_normalization: "all" or "mask".
        weight: multiplies the loss.
        backend: "torch", "compile", "triton" or None.
        group: over whose processes the tensors are sharded.

    Returns:
        The loss, and the norms of prediction and target, as `negatively_guided_velocity_loss` returns them.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, or a group that this process is not in.
    """
    check_tensor("prediction", prediction)
    common = velocity_arguments(
        prediction, target, "target", mask, sample_weight, channel_dim, loss_type, reduction, mask_normalization, weight
    )
    check_group(group)
    compute = functools.partial(implementation("velocity_loss", backend, prediction), prediction, target)
    if group is not None:
        return VelocityLoss(*velocity_loss_over_group(compute, prediction, common, group))
    return VelocityLoss(*compute(**common))


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
    """What erasers change outside the concept: weight * mean over layers of sum(rho(output * (1 - mask))) / normalizer.

    The localization loss of Receler (arXiv 2311.17717) as T2VUnlearning (arXiv 2505.17550) uses
    it. Differentiable in the eraser outputs. Where 1 - mask is 0, even NaN contributes nothing.

    A `LowRankOutput` costs r/D of what its output would: under "l2" the sum is a function of r x r moments of `hidden`,
    and neither the output nor its gradient exists. Its rounding error is a few units of what the sum would be if every
    output were as long as hidden @ weight.T and bias together, which matters only where these cancel. Under "l1", and
    where D is no larger than r, the output is computed from it.

    Args:
        eraser_outputs: one a layer, in a sequence or by name, of these kinds in any mixture: tokens (B, N, D); feature
            maps (B, C, *spatial) with two or more spatial dims; `LowRankOutput`s of tokens, differentiable in all three
            tensors.
        mask: 1 on the concept, one for all layers or one a layer name; bool, integer or floating, hard or soft. For
            tokens (B or 1, *grid) of N positions in all; for feature maps (B or 1, *spatial), or with a channel dim of
            size 1, of any resolution, read by nearest neighbour. Takes no gradient.
        loss_type: rho, "l2" or "l1".
        normalization: "sum" divides a layer's sum by B; "background_mean", Receler's, by D times the sum of 1 - mask.
        weight: multiplies the loss.
        backend: "torch", "compile", "triton" or None; see `choose_backend`.
        group: over whose processes the positions are sharded, the same for all layers. "sum" then divides the sum over
            all shards by a shard's B, which is that of the whole; "background_mean" divides it by the background of all
            shards together. With shards of the batch instead, "background_mean" is right as well, and "sum" divides
            each shard's sum by the shard's own B: divide `weight` by the number of (equal) shards. See the
            module's docstring, also for gradients.

    Returns:
        The loss, a scalar, and every layer's term (L,): float32, or float64 if any tensor passed is. No layers, an
        empty batch or no background give 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, a layer without a mask, or a group that this
            process is not in.
    """
    check_choice("loss_type", loss_type, ("l2", "l1"))
    check_choice("normalization", normalization, ("sum", "background_mean"))
    check_number("weight", weight)
    check_group(group)
    layers = named_layers(eraser_outputs)
    if isinstance(mask, Mapping) and not isinstance(eraser_outputs, Mapping):
        raise TypeError("mask must be a tensor where eraser_outputs is a sequence, got a mapping")
    outputs: list[Tensor | LowRankOutput] = []
    masks: list[Tensor] = []
    # Layers mostly share a mask and a shape: one tensor then serves them all.
    seen: dict[tuple[int, torch.Size], Tensor] = {}
    first: Tensor | None = None
    is_double = False
    for name, output in layers.items():
        if isinstance(mask, Mapping) and name not in mask:
            raise ValueError(f"mask must have an entry for every layer of eraser_outputs; {name!r} has none")
        if isinstance(output, LowRankOutput):
            check_low_rank(f"eraser_outputs[{name}]", *output, like=first)
            tokens = output.hidden
        else:
            check_tensor(f"eraser_outputs[{name}]", output, like=first)
            tokens = output
        first = tokens if first is None else first
        of_layer = mask[name] if isinstance(mask, Mapping) else mask
        key = (id(of_layer), tokens.shape)
        if key not in seen:
            seen[key] = layer_mask(of_layer, tokens, name)
        outputs.append(output)
        masks.append(seen[key])
        of_output = output if isinstance(output, LowRankOutput) else (output,)
        is_double |= any(x is not None and x.dtype == torch.float64 for x in (*of_output, masks[-1]))
    if first is None:
        zeros = torch.zeros(1, device=mask.device if isinstance(mask, Tensor) else None)
        return LocalizationLoss(zeros.sum(), zeros[:0])

    if is_double:
        # One of the kinds may have no tensor of float64: masks bring it to both.
        doubles = {id(x): x.double() for x in masks}
        masks = [doubles[id(x)] for x in masks]
    for i, output in enumerate(outputs):
        if isinstance(output, LowRankOutput):
            features, rank = output.weight.shape
            if loss_type == "l1" or features <= rank or rank == 0:
                outputs[i] = _dense(output, masks[i], torch.float64 if is_double else torch.float32)

    # The two kinds apart, then together in the layers' order. Over a group, what a background mean divides by is a
    # factor of a whole call, so that layers differing in it are apart too. Masks that are one here may be several on
    # another process.
    over_backgrounds = group is not None and normalization == "background_mean"
    calls: dict[tuple[Any, ...], list[int]] = {}
    for i, output in enumerate(outputs):
        likeness: tuple[Any, ...] = (isinstance(output, LowRankOutput),)
        if over_backgrounds:
            likeness += (_output_shape(output), i if isinstance(mask, Mapping) else None)
        calls.setdefault(likeness, []).append(i)
    parts = []
    for (is_low_rank, *_), index in calls.items():
        of_op: list[Any] = [outputs[i] for i in index]
        op = "low_rank_localization_loss" if is_low_rank else "localization_loss"
        arguments = [list(column) for column in zip(*of_op, strict=True)] if is_low_rank else [of_op]
        options: dict[str, Any] = {} if is_low_rank else {"loss_type": loss_type}
        options["normalization"] = normalization if group is None else "sum"
        options["weight"] = weight * len(index) / len(outputs)
        of_masks = [masks[i] for i in index]
        loss, terms = implementation(op, backend, *itertools.chain(*arguments), *of_masks)(
            *arguments, of_masks, **options
        )
        shape = _output_shape(of_op[0])
        background = background_sum(of_masks[0], shape) if over_backgrounds else None
        parts.append(LocalizationPart(loss, terms, max(shape[0], 1), background))
    called = list(itertools.chain(*calls.values()))
    order = sorted(range(len(called)), key=called.__getitem__)
    if group is not None:
        return LocalizationLoss(*localization_loss_over_group(parts, order, weight, group))
    if len(parts) == 1:
        return LocalizationLoss(parts[0].loss, parts[0].terms)
    terms = torch.cat([part.terms for part in parts])
    return LocalizationLoss(parts[0].loss + parts[1].loss, torch.stack([terms[i] for i in order]))


def _output_shape(output: Tensor | LowRankOutput) -> tuple[int, ...]:
    if isinstance(output, LowRankOutput):
        return (*output.hidden.shape[:2], output.weight.shape[0])
    return tuple(output.shape)


def _dense(output: LowRankOutput, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The tokens (B, N, D). What is not read is 0: its NaN would reach the weights."""
    with torch.autocast(output.hidden.device.type, enabled=False):
        hidden = output.hidden.to(dtype).masked_fill((mask == 1)[..., None], 0)
        bias = None if output.bias is None else output.bias.to(dtype)
        return torch.nn.functional.linear(hidden, output.weight.to(dtype), bias)


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
    """How much every query attends to the concept's tokens: softmax probability, mean over heads, sum over tokens.

    What T2VUnlearning (arXiv 2505.17550) thresholds into masks. Queries x keys are never held at once. Not
    differentiable.

    Args:
        query: (B, H, Sq, d).
        key: (B, H, Sk, d), all keys of the softmax.
        token_indices: (T,) or (B, T) integers, the concept's keys; -1 for none. One named twice counts twice. One out
            of range counts as -1 where it cannot be looked at: on a GPU, and under `torch.compile`.
        scale: what multiplies query . key; d ** -0.5 if None.
        key_mask: (B, Sk) bool, True where attended. A query whose keys are all masked gets 0.
        lse: (B, H, Sq), the natural log of the softmax's denominator, where the attention's forward pass kept it.
        backend: "torch", "compile", "triton" or None; see `choose_backend`.

    Returns:
        (B, Sq) float32, in [0, 1] if no token is named twice.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or device, or an index out of range.
    """
    check_tensor("query", query)
    check_tensor("key", key, like=query)
    if query.dim() != 4:
        raise ValueError(f"query must be (B, H, Sq, d), got {tuple(query.shape)}")
    batch, heads, queries, channels = query.shape
    if key.dim() != 4 or (*key.shape[:2], key.shape[3]) != (batch, heads, channels) or 0 in key.shape[1:]:
        raise ValueError(
            f"key must be ({batch}, {heads}, Sk, {channels}) like query, with at least one head, key and channel; "
            f"got {tuple(key.shape)}"
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
