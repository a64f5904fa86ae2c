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
from fastunlearn.training.loop.units import Units, divided
from fastunlearn.training.options import TrainingOptions
from fastunlearn.velocity_model import VelocityModel

TERMS = ("unlearning", "preservation", "localization")


class Terms:
    """Computes the weighted losses. They are means over samples: with `scale`, those of batches add up to a step's.

    The localization loss is the mean over all elements of a layer, whatever the size of the mask: with L layers of N
    tokens with D features, 1/L sum_l 1/(B N D) sum_bnd rho(o^l (1 - mask)).

    Args:
        options: the options of training.
        units: what the losses are relative to: velocity errors to what the concept changes, an eraser's output to that
            of its attention. If None, they are as they are.
        device: the device of the student.
        dtype: the dtype that it computes in.
        scale: an additional factor of every loss: the batch's share of the step.
    """

    def __init__(
        self,
        options: TrainingOptions,
        units: Units | None = None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        scale: float = 1.0,
    ) -> None:
        self._options, self._units, self._device, self._dtype = options, units, device, dtype
        velocity_scale = scale if units is None else scale / units.velocity
        self._weights = {
            "unlearning": velocity_scale * options.unlearning_weight,
            "preservation": velocity_scale * options.preservation_weight,
            "localization": scale * options.localization_weight,
        }

    def target_losses(
        self,
        student: VelocityModel,
        erasers: Mapping[str, nn.Module],
        points: Any,
        guidance_scale: float,
        expert: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the unlearning loss and, unless its weight is 0, the localization loss.

        Args:
            student: the model with its erasers.
            erasers: the erasers by layer.
            points: target points, see `fastunlearn.training.cache.reader.Points`.
            guidance_scale: eta, how far the target lies beyond the velocity without the concept.
            expert: the index of the student among the model's transformers.

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
        if self._units is not None:
            outputs = divided(outputs, self._units.layers[expert])
        localization = localization_loss(
            outputs, mask, loss_type=options.loss_type, normalization="mean", weight=weight
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
