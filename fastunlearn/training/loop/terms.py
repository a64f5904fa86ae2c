"""The three losses of a step, from points of the cache and two forward passes of the student.

This module composes the functions of `fastunlearn.functional` instead of calling `T2VUnlearningLoss`, because the
velocities of the frozen model come from the cache, every target group has its own guidance scale, one term's backward
pass may have to run before the next term's forward pass, and gradient accumulation needs terms that are means over
samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.capture import EraserOutputsCapture
from fastunlearn.functional import (
    LowRankOutput,
    localization_loss,
    negatively_guided_velocity_loss,
    velocity_loss,
)
from fastunlearn.training.loop.units import Units
from fastunlearn.training.options import TrainingOptions
from fastunlearn.velocity_model import VelocityModel

TERMS = ("unlearning", "preservation", "localization")


class Terms:
    """Computes the weighted losses. They are means over samples: with `scale`, those of batches add up to a step's.

    Velocity errors are relative to what the concept changes: rho(v' - target) / mean rho(v_cond - v_uncond). The
    localization loss is relative to the attentions' outputs, and a mean over all elements of a layer, whatever the size
    of the mask: with L layers of N tokens with D features, 1/L sum_l 1/(B N D) sum_bnd rho(o^l (1 - mask) / size_l).

    Args:
        options: the options of training.
        units: what the losses are relative to.
        device: the device of the student.
        dtype: the dtype that it computes in.
        scale: an additional factor of every loss: the batch's share of the step.
    """

    def __init__(
        self, options: TrainingOptions, units: Units, *, device: torch.device, dtype: torch.dtype, scale: float = 1.0
    ) -> None:
        self._options, self._layers, self._device, self._dtype = options, units.layers, device, dtype
        self._weights = {
            "unlearning": scale * options.unlearning_weight / units.velocity,
            "preservation": scale * options.preservation_weight / units.velocity,
            "localization": scale * options.localization_weight,
        }

    def target_losses(
        self, student: VelocityModel, erasers: Mapping[str, nn.Module], expert: int, points: Any, guidance_scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the unlearning loss and, unless its weight is 0, the localization loss.

        Args:
            student: the model with its erasers.
            erasers: the erasers by layer.
            expert: the index of the transformer that they belong to.
            points: target points, see `fastunlearn.training.cache.reader.Points`.
            guidance_scale: eta, how far the target lies beyond the velocity without the concept.

        Raises:
            ValueError: a mask is needed, and the points have none.
        """
        options, weight = self._options, self._weights["localization"]
        mask = None
        if weight or options.mask_unlearning:
            if points.mask is None:
                raise ValueError(
                    "cache: expected target points with masks, got points that have no masks; prepare them with the "
                    "concept in their prompts, or set localization_weight to 0 and leave mask_unlearning out"
                )
            mask = points.mask.to(self._device)
        outputs: dict[str, LowRankOutput] = {}
        capture = EraserOutputsCapture(student, erasers, outputs, low_rank=True) if weight else nullcontext()
        with capture:
            velocity = self._velocity(student, points)
        unlearning = negatively_guided_velocity_loss(
            velocity,
            points.v_uncond.to(self._device),
            points.v_cond.to(self._device),
            guidance_scale=guidance_scale,
            mask=mask if options.mask_unlearning else None,
            channel_dim=student.channel_dim,
            loss_type=options.loss_type,
            weight=self._weights["unlearning"],
        ).loss
        if not weight or mask is None:
            return unlearning, None
        relative = {
            layer: output._replace(weight=output.weight / size, bias=output.bias / size)
            for layer, size in self._layers[expert].items()
            for output in [outputs[layer]]
        }
        localization = localization_loss(
            relative, mask, loss_type=options.loss_type, normalization="mean", weight=weight
        ).loss
        return unlearning, localization

    def preservation_loss(self, student: VelocityModel, points: Any) -> Tensor:
        """Computes the preservation loss at kept points."""
        return velocity_loss(
            self._velocity(student, points),
            points.v_cond.to(self._device),
            channel_dim=student.channel_dim,
            loss_type=self._options.loss_type,
            weight=self._weights["preservation"],
        ).loss

    def _velocity(self, student: VelocityModel, points: Any) -> Tensor:
        condition = {name: value.to(self._device) for name, value in points.condition.items()}
        velocity: Tensor = student(points.x_t.to(self._device, self._dtype), points.t, condition)
        return velocity
