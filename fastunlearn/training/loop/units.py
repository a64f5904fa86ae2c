"""The units of a run: what a model's velocities and attention outputs measure, so that settings hold for any model.

A velocity error means little without the size of what the prompt changes, and the output of an eraser without the size
of what it is added to. Both differ between models by orders of magnitude, and between layers of a model. So losses and
learning rates are relative to these sizes, which are measured on points of the cache before training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastunlearn.erasers import set_eraser_scale
from fastunlearn.functional import LowRankOutput
from fastunlearn.training.cache.reader import PointSet, TeacherCache
from fastunlearn.training.model.video_model import Erasers, VideoModel
from fastunlearn.training.options import TargetGroup

# Enough for an average over prompts and timesteps; read in seconds even where a point has 50 MB.
_VELOCITY_POINTS, _LAYER_POINTS = 64, 8


class Units(NamedTuple):
    """What a run measures in.

    velocity: the mean of rho(v_cond - v_uncond) over target points and elements: what the concept changes; rho is the
        square under "l2" and the absolute value under "l1". layers: per transformer and layer, the root mean square of
        the attention's output, to which an eraser adds its own.
    """

    velocity: float
    layers: list[dict[str, float]]


def measure_units(
    model: VideoModel,
    erasers: Sequence[Erasers],
    cache: TeacherCache,
    targets: Sequence[TargetGroup],
    *,
    loss_type: str,
    batch_size: int,
) -> Units:
    """Measures the units on points of the target groups, spread evenly. The erasers add nothing meanwhile.

    Raises:
        ValueError: the velocities with and without the concept are equal at all of these points, or an attention's
            output is 0 or not finite.
    """
    groups = [cache.groups[target.name] for target in targets]
    velocity = _concept_size(groups, loss_type)
    if not 0 < velocity < float("inf"):
        raise ValueError(
            "cache: expected target points whose velocity depends on the concept, got a mean difference of "
            f"{velocity:g}; prepare other target prompts, or another replacement for the concept"
        )
    layers = [_attention_sizes(model, index, layers, groups, batch_size) for index, layers in enumerate(erasers)]
    return Units(velocity, layers)


def _concept_size(groups: Sequence[PointSet], loss_type: str) -> float:
    sums, count = 0.0, 0
    for points in groups:
        for row in _spread(torch.arange(len(points)), _VELOCITY_POINTS).split(1):
            batch = points.rows(row)
            difference = batch.v_cond.double() - batch.v_uncond.double()
            sums += (difference.square() if loss_type == "l2" else difference.abs()).sum().item()
            count += difference.numel()
    return sums / count


@torch.no_grad()
def _attention_sizes(
    model: VideoModel, index: int, erasers: Erasers, groups: Sequence[PointSet], batch_size: int
) -> dict[str, float]:
    """The root mean square of every eraser's input, over points of one transformer."""
    squares: dict[str, list[Tensor]] = {layer: [] for layer in erasers}
    expert = model.experts[index]
    with _watched(erasers, squares), _silenced(expert):
        for points in groups:
            rows = _spread((points.experts == index).nonzero()[:, 0], max(1, _LAYER_POINTS // len(groups)))
            for batch_rows in rows.split(batch_size):
                batch = points.rows(batch_rows)
                condition = {name: value.to(model.device) for name, value in batch.condition.items()}
                expert(batch.x_t.to(model.device, model.dtype), batch.t, condition)
    sizes = {}
    for layer, values in squares.items():
        # A transformer without points is not trained; any unit will do.
        size = torch.cat(values).mean().sqrt().item() if values else 1.0
        if not 0 < size < float("inf"):
            raise ValueError(f"model: expected an attention output of finite size in {layer}, got {size:g}")
        sizes[layer] = size
    return sizes


def _spread(rows: Tensor, most: int) -> Tensor:
    """At most `most` of the rows, evenly spaced."""
    count = min(most, len(rows))
    return rows[(torch.arange(count) * len(rows)).div(max(count, 1), rounding_mode="floor")]


@contextmanager
def _watched(erasers: Mapping[str, nn.Module], squares: Mapping[str, list[Tensor]]) -> Iterator[None]:
    """Appends, in every call of an eraser, the mean square of each sample of its input."""

    def watch(layer: str, module: nn.Module, args: Any) -> None:
        squares[layer].append(args[0].float().square().flatten(1).mean(1))

    hooks = [eraser.register_forward_pre_hook(partial(watch, layer)) for layer, eraser in erasers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _silenced(expert: nn.Module) -> Iterator[None]:
    """Erasers run, but add nothing: so a resumed run measures what it measured at its start."""
    set_eraser_scale(expert, "default", 0.0)
    try:
        yield
    finally:
        set_eraser_scale(expert, "default", 1.0)


@torch.no_grad()
def scale_initial_weights(erasers: Sequence[Erasers], units: Units) -> None:
    """Makes the activations inside new erasers independent of the size of what they read."""
    for layers, sizes in zip(erasers, units.layers, strict=True):
        for layer, eraser in layers.items():
            eraser.down.weight /= sizes[layer]


def divided(outputs: Mapping[str, LowRankOutput], sizes: Mapping[str, float]) -> dict[str, LowRankOutput]:
    """Erasers' outputs divided by the sizes of what they are added to."""
    return {
        layer: LowRankOutput(hidden, weight / sizes[layer], None if bias is None else bias / sizes[layer])
        for layer, (hidden, weight, bias) in outputs.items()
    }


def learning_rates(eraser: Any, size: float, optimizer: str) -> dict[str, float]:
    """The learning rate of each parameter at which a step changes the eraser's output by up to its input's size.

    An AdamW step changes every element of a matrix by up to the learning rate; with K input features of size x, these
    add up to K x. An eraser's hidden features have a size of about 1/4. Muon's step, scaled as here to have AdamW's
    root mean square, has equal singular values.

    Args:
        eraser: an adapter eraser.
        size: the root mean square of its input.
        optimizer: "adamw" or "muon"; biases always use AdamW.
    """
    rank, dim = eraser.down.weight.shape
    if optimizer == "muon":
        matrices = {"down.weight": rank**0.5 / (0.2 * dim * size), "up.weight": size / (0.2 * 0.4 * rank**0.5)}
    else:
        matrices = {"down.weight": 4 / (dim * size), "up.weight": 4 * size / rank}
    return matrices | {"down.bias": 1.0, "up.bias": size}
