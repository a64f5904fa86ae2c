"""The localization loss of layers of any kind, which it brings to one form and groups into calls of a backend.

A backend takes dense outputs in one call and low-rank outputs in another, see `fastunlearn.ops.dispatch`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastunlearn.dtypes import compute_dtype, widest_dtype
from fastunlearn.ops.arguments import check_low_rank, check_tensor, layer_mask, named_layers
from fastunlearn.ops.dispatch import implementation
from fastunlearn.ops.sharded import ShardTerms, background_sum, localization_loss_over_group


class LowRankOutput(NamedTuple):
    """An eraser's output hidden @ weight.T + bias before it is computed: the last layer's input and parameters.

    hidden: (B, N, r). weight: (D, r). bias: (D,) or None. Their dtypes may differ.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """An eraser's output and its mask, in the form that backends take: (B or 1, N) for tokens."""

    output: Tensor | LowRankOutput
    mask: Tensor


def checked_layers(eraser_outputs: object, mask: Tensor | Mapping[str, Tensor]) -> list[Layer]:
    """The layers of `fastunlearn.localization_loss`, with their masks, checked."""
    outputs = named_layers(eraser_outputs)
    if isinstance(mask, Mapping) and not isinstance(eraser_outputs, Mapping):
        raise TypeError("mask: expected a tensor for eraser_outputs in a sequence, got a mapping")
    layers: list[Layer] = []
    # Most layers have the same mask and shape. They then share one converted mask too.
    converted: dict[tuple[int, torch.Size], Tensor] = {}
    first: Tensor | None = None
    for name, output in outputs.items():
        if isinstance(mask, Mapping) and name not in mask:
            raise ValueError(f"mask: expected an entry for every layer of eraser_outputs, got none for {name!r}")
        if isinstance(output, LowRankOutput):
            check_low_rank(f"eraser_outputs[{name}]", *output, like=first)
            tokens = output.hidden
        else:
            check_tensor(f"eraser_outputs[{name}]", output, like=first)
            tokens = output
        first = tokens if first is None else first
        own_mask = mask[name] if isinstance(mask, Mapping) else mask
        key = (id(own_mask), tokens.shape)
        if key not in converted:
            converted[key] = layer_mask(own_mask, tokens, name)
        layers.append(Layer(output, converted[key]))
    return layers


def unify(layers: Sequence[Layer], loss_type: str) -> list[Layer]:
    """The layers with one dtype of arithmetic for all, and as low-rank outputs only where that form pays."""
    dtype = compute_dtype(*(x for layer in layers for x in (*_tensors(layer.output), layer.mask)))
    if dtype == torch.float64:
        # A float64 tensor in any layer makes all arithmetic float64. Masks in float64 bring that to every call.
        converted = {id(layer.mask): layer.mask.double() for layer in layers}
        layers = [Layer(layer.output, converted[id(layer.mask)]) for layer in layers]
    return [
        Layer(_dense(layer.output, layer.mask, dtype), layer.mask)
        if isinstance(layer.output, LowRankOutput) and not _pays(layer.output, loss_type)
        else layer
        for layer in layers
    ]


def _tensors(output: Tensor | LowRankOutput) -> tuple[Tensor | None, ...]:
    return output if isinstance(output, LowRankOutput) else (output,)


def _shape(output: Tensor | LowRankOutput) -> tuple[int, ...]:
    """The shape of the output, computed or not."""
    if isinstance(output, LowRankOutput):
        return (*output.hidden.shape[:2], output.weight.shape[0])
    return tuple(output.shape)


def _pays(output: LowRankOutput, loss_type: str) -> bool:
    features, rank = output.weight.shape
    return loss_type == "l2" and features > rank > 0


def _dense(output: LowRankOutput, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The tokens (B, N, D). Hidden rows of weight 0 are set to 0: their NaN would reach the weights' gradients."""
    with torch.autocast(output.hidden.device.type, enabled=False):
        hidden = output.hidden.to(dtype).masked_fill((mask == 1)[..., None], 0)
        bias = None if output.bias is None else output.bias.to(dtype)
        return torch.nn.functional.linear(hidden, output.weight.to(dtype), bias)


def loss_of_layers(
    layers: Sequence[Layer],
    *,
    loss_type: str,
    normalization: str,
    weight: float,
    backend: str | None,
    group: dist.ProcessGroup | None,
    one_mask: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and the layers' terms in their order.

    Args:
        layers: at least one, unified.
        loss_type: as in `fastunlearn.localization_loss`.
        normalization: as in `fastunlearn.localization_loss`.
        weight: as in `fastunlearn.localization_loss`.
        backend: as in `fastunlearn.localization_loss`.
        group: as in `fastunlearn.localization_loss`.
        one_mask: whether all layers were given the same mask, on every process.
    """
    if group is None and not any(isinstance(layer.output, LowRankOutput) for layer in layers):
        return _call_backend(layers, normalization, weight, loss_type=loss_type, backend=backend)
    needs_one_divisor = group is not None and normalization != "sum"
    calls = _calls(layers, needs_one_divisor=needs_one_divisor, one_mask=one_mask)
    compute = functools.partial(_call_backend, loss_type=loss_type, backend=backend)
    # The terms come in the order of the calls.
    called = list(itertools.chain(*calls))
    order = sorted(range(len(called)), key=called.__getitem__)
    groups = [[layers[i] for i in call] for call in calls]
    shares = [weight * len(call) / len(layers) for call in calls]
    if group is not None:
        shards = [
            _shard_terms(compute, own, normalization, share, group) for own, share in zip(groups, shares, strict=True)
        ]
        return localization_loss_over_group(shards, order, weight, group)
    results = [compute(own, normalization, share) for own, share in zip(groups, shares, strict=True)]
    if len(results) == 1:
        return results[0]
    (loss, terms), (other_loss, other_terms) = results
    terms = torch.cat([terms, other_terms])
    return loss + other_loss, torch.stack([terms[i] for i in order])


def _calls(layers: Sequence[Layer], *, needs_one_divisor: bool, one_mask: bool) -> list[list[int]]:
    """Which layers go into which call of a backend.

    Low-rank outputs and dense outputs need a call each. With `needs_one_divisor`, layers whose divisors may differ need
    one each too: over a group, the divisor is a factor of a whole call. Layers share a divisor if they have one shape
    and one mask. Masks that are one tensor on this process may be several on another, so all that counts is whether the
    caller gave one mask.
    """
    calls: dict[tuple[Any, ...], list[int]] = {}
    for i, layer in enumerate(layers):
        key: tuple[Any, ...] = (isinstance(layer.output, LowRankOutput),)
        if needs_one_divisor:
            key += (_shape(layer.output), None if one_mask else i)
        calls.setdefault(key, []).append(i)
    return list(calls.values())


def _call_backend(
    layers: Sequence[Layer], normalization: str, weight: float, *, loss_type: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The loss and the terms of layers that are all dense or all low-rank."""
    outputs: list[Any] = [layer.output for layer in layers]
    masks = [layer.mask for layer in layers]
    options: dict[str, Any] = {"normalization": normalization, "weight": weight}
    if isinstance(outputs[0], LowRankOutput):
        op, arguments = "low_rank_localization_loss", [list(column) for column in zip(*outputs, strict=True)]
    else:
        op, arguments = "localization_loss", [outputs]
        options["loss_type"] = loss_type
    compute = implementation(op, backend, *itertools.chain(*arguments), *masks)
    return compute(*arguments, masks, **options)


def _shard_terms(
    compute: Callable[..., tuple[Tensor, Tensor]],
    layers: Sequence[Layer],
    normalization: str,
    weight: float,
    group: dist.ProcessGroup,
) -> ShardTerms:
    """What this process contributes to the loss of the whole, for the layers of one call."""
    mask, shape = layers[0].mask, _shape(layers[0].output)
    if normalization == "sum":
        return ShardTerms(*compute(layers, "sum", weight))
    if normalization == "background_mean":
        batch = max(shape[0], 1)
        return ShardTerms(*compute(layers, "sum", weight), batch, batch, background_sum(mask, shape))
    processes, elements = dist.get_world_size(group), math.prod(shape)
    divisor = torch.full((), elements, dtype=widest_dtype(mask.device), device=mask.device)
    return ShardTerms(*compute(layers, "mean", weight / processes), elements, elements * processes, divisor)
