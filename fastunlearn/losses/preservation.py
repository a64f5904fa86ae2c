"""The preservation loss: holds the erased model to the frozen one on what should stay."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from fastunlearn.functional import LossType, MaskNormalization, Reduction, VelocityLoss, velocity_loss
from fastunlearn.losses.velocity_error import VelocityErrorLoss
from fastunlearn.losses.velocity_models import VelocityModelLike, call_model, frozen_velocity
from fastunlearn.ops.dispatch import Backend
from fastunlearn.schedule import PredictionType


class ConceptPreservationLoss(VelocityErrorLoss):
    """Holds the erased model to the frozen one on a concept to keep: `rho(v_theta'(x_t, c) - v_theta(x_t, c))`.

    All arguments mean what they mean in `NegativelyGuidedVelocityLoss`.

    Args:
        loss_type: "l2" or "l1".
        reduction: "mean", "sum" or "none".
        channel_dim: the channel dimension of a velocity.
        mask_normalization: "all" or "mask".
        prediction_type: "v_prediction", "epsilon" or "sample"; the latter two need `alphas_cumprod`.
        alphas_cumprod: (timesteps,), the noise schedule.
        backend: "torch", "compile", "triton" or None.
        group: a process group over which the tensors are sharded.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        loss_type: LossType = "l2",
        reduction: Reduction = "mean",
        *,
        channel_dim: int = 1,
        mask_normalization: MaskNormalization = "all",
        prediction_type: PredictionType = "v_prediction",
        alphas_cumprod: Tensor | None = None,
        backend: Backend | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            alphas_cumprod, loss_type, reduction, channel_dim, mask_normalization, prediction_type, backend, group
        )

    def forward(
        self,
        model_original: VelocityModelLike | None,
        model_unlearned: VelocityModelLike,
        x_t: Tensor,
        t: Tensor,
        cond_preserve: Any,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Calls each model once.

        Args:
            model_original: the frozen model. None means `model_unlearned` itself. Whatever it is, every eraser from
                `attach_erasers` is off while it is called, in the thread that calls it.
            model_unlearned: the model being erased.
            x_t: (B, ...) noisy latents.
            t: (B,) timesteps.
            cond_preserve: the condition of what should stay.
            mask: (B, *spatial), 1 where the models should agree.

        Returns:
            The loss, and a dict with preservation_loss, v_orig_norm and v_unlearn_norm.
        """
        self._check_mask(mask, model_unlearned, x_t)
        teacher = self._choose_teacher(model_original, model_unlearned)
        v_original = frozen_velocity(teacher, x_t, t, cond_preserve)
        prediction = call_model(model_unlearned, x_t, t, cond_preserve, "model_unlearned")
        result = self._loss_from_velocities(prediction, v_original, t, mask)
        return result.loss, self._loss_dict(result)

    def _loss_from_velocities(
        self, prediction: Tensor, target: Tensor, t: Tensor, mask: Tensor | None, weight: float = 1.0
    ) -> VelocityLoss:
        """The loss of known velocities, times `weight`."""
        return velocity_loss(prediction, target.detach(), **self._loss_options(prediction, t, mask, weight))

    @staticmethod
    def _loss_dict(result: VelocityLoss, weight: float = 1.0) -> dict[str, Tensor]:
        """The entries for a result whose loss includes the factor `weight`; the entries do not include it."""
        return {
            "preservation_loss": result.loss.detach() / weight,
            "v_orig_norm": result.target_norm,
            "v_unlearn_norm": result.prediction_norm,
        }
