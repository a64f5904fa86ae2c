"""The unlearning loss: leads the erased model's velocity away from the concept."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastunlearn.functional import (
    LossType,
    MaskNormalization,
    Reduction,
    VelocityLoss,
    negatively_guided_velocity_loss,
)
from fastunlearn.losses.velocity_error import VelocityErrorLoss
from fastunlearn.losses.velocity_models import VelocityModelLike, call_model, frozen_velocity
from fastunlearn.ops.arguments import check_number
from fastunlearn.ops.dispatch import Backend
from fastunlearn.schedule import PredictionType


class NegativelyGuidedVelocityLoss(VelocityErrorLoss):
    """Pulls the erased model's velocity towards the frozen model's, guided away from the concept.

    `rho(v_theta'(x_t, c) - v_neg)` with `v_neg = v_uncond + guidance_scale * (v_uncond - v_c)`. Both velocities in
    `v_neg` come from the frozen model (T2VUnlearning, arXiv:2505.17550).

    Args:
        alphas_cumprod: (timesteps,), the noise schedule. Not read if `prediction_type` is "v_prediction".
        guidance_scale: eta, how far the target lies beyond the unconditional velocity.
        loss_type: rho, "l2" (squared error) or "l1" (absolute error).
        reduction: "mean", "sum" or "none".
        channel_dim: the channel dimension of a velocity: 1 in (B, C, ...), 2 in CogVideoX's (B, F, C, H, W). It says
            which dimensions a mask goes along; without a mask it changes nothing.
        mask_normalization: what "mean" divides by: the number of "all" elements, or the sum of the "mask".
        prediction_type: "v_prediction", "epsilon" or "sample" (x0). Flow matching counts as "v_prediction".
        backend: "torch", "compile", "triton", or None for the best one available.
        group: a process group whose processes hold one shard of the tensors each; see `fastunlearn.functional`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor | None,
        guidance_scale: float = 7.5,
        loss_type: LossType = "l2",
        reduction: Reduction = "mean",
        *,
        channel_dim: int = 1,
        mask_normalization: MaskNormalization = "all",
        prediction_type: PredictionType = "v_prediction",
        backend: Backend | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            alphas_cumprod, loss_type, reduction, channel_dim, mask_normalization, prediction_type, backend, group
        )
        check_number("guidance_scale", guidance_scale)
        self.guidance_scale = guidance_scale

    def forward(
        self,
        model: VelocityModelLike,
        x_t: Tensor,
        t: Tensor,
        cond_c: Any,
        cond_neg: Any = None,
        uncond: Any = None,
        mask: Tensor | None = None,
        *,
        model_original: VelocityModelLike | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Calls the erased model once and the frozen model twice.

        Args:
            model: the model being erased.
            x_t: (B, ...) noisy latents.
            t: (B,) timesteps.
            cond_c: the condition of the concept, in the form that `model` takes.
            cond_neg: the condition to use as the empty one if `uncond` is not given.
            uncond: the empty condition. If neither is given, the model is called with None, and if it refuses None,
                with zeros in the shape of `cond_c`.
            mask: (B, *spatial), 1 on the concept, at the latents' resolution or coarser by whole numbers, such as on
                the token grid.
            model_original: the frozen model. None means `model` itself. Whatever it is, every eraser from
                `attach_erasers` is off while it is called, in the thread that calls it.

        Returns:
            The loss, and a dict with unlearning_loss, v_pred_norm and v_neg_norm.
        """
        self._check_mask(mask, model, x_t)
        teacher = self._choose_teacher(model_original, model)
        v_uncond = self._unconditional_velocity(teacher, x_t, t, cond_c, cond_neg, uncond)
        v_cond = frozen_velocity(teacher, x_t, t, cond_c)
        prediction = call_model(model, x_t, t, cond_c, "model")
        result = self._loss_from_velocities(prediction, v_uncond, v_cond, t, mask)
        return result.loss, self._loss_dict(result)

    def _unconditional_velocity(
        self, teacher: VelocityModelLike, x_t: Tensor, t: Tensor, cond_c: Any, cond_neg: Any, uncond: Any
    ) -> Tensor:
        """The frozen model's velocity for the empty condition, chosen as `forward` documents."""
        if uncond is not None and cond_neg is not None:
            self._warn_once("both uncond and cond_neg were given: uncond is used, cond_neg is not")
        empty = cond_neg if uncond is None else uncond
        if empty is not None:
            return frozen_velocity(teacher, x_t, t, empty)
        try:
            return frozen_velocity(teacher, x_t, t, None)
        except (TypeError, ValueError, AttributeError):
            if not isinstance(cond_c, Tensor):
                raise
        v_uncond = frozen_velocity(teacher, x_t, t, torch.zeros_like(cond_c))
        self._warn_once(
            "neither uncond nor cond_neg was given and the model does not take None: zeros of cond_c's shape stand for "
            "the empty condition; pass uncond to choose another"
        )
        return v_uncond

    def _loss_from_velocities(
        self,
        prediction: Tensor,
        v_uncond: Tensor,
        v_cond: Tensor,
        t: Tensor,
        mask: Tensor | None,
        weight: float = 1.0,
    ) -> VelocityLoss:
        """The loss of known velocities, times `weight`."""
        return negatively_guided_velocity_loss(
            prediction,
            v_uncond.detach(),
            v_cond.detach(),
            guidance_scale=self.guidance_scale,
            **self._loss_options(prediction, t, mask, weight),
        )

    @staticmethod
    def _loss_dict(result: VelocityLoss, weight: float = 1.0) -> dict[str, Tensor]:
        """The entries for a result whose loss includes the factor `weight`; the entries do not include it."""
        return {
            "unlearning_loss": result.loss.detach() / weight,
            "v_pred_norm": result.prediction_norm,
            "v_neg_norm": result.target_norm,
        }
