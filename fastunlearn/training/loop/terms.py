"""The three losses of a step, from the cache's points and two passes of the student."""

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
from fastunlearn.training.options import TrainingOptions
from fastunlearn.velocity_model import VelocityModel

TERMS = ("unlearning", "preservation", "localization")


class Terms:
    """Computes losses with their weights, all linear in the samples, so that parts of a batch add up to the whole.

    The localization loss is a mean: with N tokens of D features in a layer, 1/L sum_l 1/B sum_b 1/(N D) sum_nd
    rho(o^l (1 - mask)), whatever the size of the mask.

    Args:
        options: of training.
        device: where the student is.
        dtype: what it computes in.
        share: what every loss is multiplied by besides: the batch's share of the step.
    """

    def __init__(
        self, options: TrainingOptions, *, device: torch.device, dtype: torch.dtype, share: float = 1.0
    ) -> None:
        self._options, self._device, self._dtype = options, device, dtype
        self._weights = {term: share * getattr(options, f"{term}_weight") for term in TERMS}

    def of_target(
        self, student: VelocityModel, erasers: Mapping[str, nn.Module], points: Any, guidance_scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """The unlearning loss and, unless its weight is 0, the localization loss.

        Args:
            student: the model with its erasers.
            erasers: these, by layer.
            points: of the cache, see `fastunlearn.training.cache.reader.Points`.
            guidance_scale: eta.

        Raises:
            ValueError: the points have no mask where one is needed.
        """
        options, weight = self._options, self._weights["localization"]
        mask = None
        if weight or options.mask_unlearning:
            if points.mask is None:
                raise ValueError(
                    "the cache's target points have no masks: prepare them with the concept in their prompts, or set "
                    "localization_weight to 0 and leave mask_unlearning out"
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
        output = next(iter(outputs.values()))
        elements = output.hidden.shape[1] * output.weight.shape[0]
        return unlearning, localization_loss(outputs, mask, loss_type=options.loss_type, weight=weight / elements).loss

    def of_kept(self, student: VelocityModel, points: Any) -> Tensor:
        """The preservation loss."""
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
