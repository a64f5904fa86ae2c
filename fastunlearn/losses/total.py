"""The three losses together, as one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastunlearn.functional import LocalizationNormalization, LossType, MaskNormalization
from fastunlearn.losses.localization import EraserOutputs, MaskLocalizationLoss, check_eraser_outputs
from fastunlearn.losses.preservation import ConceptPreservationLoss
from fastunlearn.losses.unlearning import NegativelyGuidedVelocityLoss
from fastunlearn.losses.velocity_models import VelocityModelLike, call_model, frozen_velocity
from fastunlearn.ops.arguments import check_number, check_tensor
from fastunlearn.ops.dispatch import Backend
from fastunlearn.schedule import PredictionType


class _Term(NamedTuple):
    """One of the three terms, times its weight, and its own entries of the loss dict, without the weight."""

    weighted: Tensor
    entries: dict[str, Tensor]


class T2VUnlearningLoss(nn.Module):
    """The three terms together: `w_unl L_unl + w_pre L_pre + w_loc L_loc` (T2VUnlearning, arXiv:2505.17550).

    fastunlearn's own trainer (`fastunlearn.training.loop.terms`) composes the functions of `fastunlearn.functional`
    instead of calling this module, because it reads the frozen model's velocities from a cache, has several target
    groups with a guidance scale each, can run one term's backward pass before the next term's forward pass, and
    accumulates gradients, which needs terms that are linear in the samples.

    Args:
        alphas_cumprod: (timesteps,), the noise schedule. Not read if `prediction_type` is "v_prediction".
        unlearning_weight: w_unl.
        preservation_weight: w_pre.
        localization_weight: w_loc.
        guidance_scale: eta, how far the target lies beyond the unconditional velocity.
        loss_type: "l2" or "l1", for all three terms.
        channel_dim: the channel dimension of a velocity, as in `NegativelyGuidedVelocityLoss`.
        mask_normalization: "all" or "mask", for the two velocity terms, as in `NegativelyGuidedVelocityLoss`.
        normalization: "sum", "mean" or "background_mean", for the localization term, as in `MaskLocalizationLoss`.
        prediction_type: "v_prediction", "epsilon" or "sample" (x0). Flow matching counts as "v_prediction".
        backend: "torch", "compile", "triton", or None for the best one available.
        group: a process group whose processes hold one shard of the tensors each; see `fastunlearn.functional`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor | None,
        unlearning_weight: float = 1.0,
        preservation_weight: float = 0.5,
        localization_weight: float = 1.0,
        guidance_scale: float = 7.5,
        loss_type: LossType = "l2",
        *,
        channel_dim: int = 1,
        mask_normalization: MaskNormalization = "all",
        normalization: LocalizationNormalization = "sum",
        prediction_type: PredictionType = "v_prediction",
        backend: Backend | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        for name, weight in (
            ("unlearning_weight", unlearning_weight),
            ("preservation_weight", preservation_weight),
            ("localization_weight", localization_weight),
        ):
            check_number(name, weight)
        self.unlearning_weight = unlearning_weight
        self.preservation_weight = preservation_weight
        self.localization_weight = localization_weight
        self.unlearning_loss = NegativelyGuidedVelocityLoss(
            alphas_cumprod,
            guidance_scale,
            loss_type,
            channel_dim=channel_dim,
            mask_normalization=mask_normalization,
            prediction_type=prediction_type,
            backend=backend,
            group=group,
        )
        self.preservation_loss = ConceptPreservationLoss(
            loss_type,
            channel_dim=channel_dim,
            mask_normalization=mask_normalization,
            prediction_type=prediction_type,
            alphas_cumprod=alphas_cumprod,
            backend=backend,
            group=group,
        )
        self.localization_loss = MaskLocalizationLoss(
            loss_type, normalization=normalization, backend=backend, group=group
        )

    def forward(
        self,
        model_original: VelocityModelLike | None,
        model_unlearned: VelocityModelLike,
        x_t: Tensor,
        t: Tensor,
        cond_target: Any,
        cond_preserve: Any = None,
        cond_neg: Any = None,
        uncond: Any = None,
        mask: Tensor | None = None,
        eraser_outputs: EraserOutputs | None = None,
        *,
        v_uncond: Tensor | None = None,
        v_cond: Tensor | None = None,
        v_preserve: Tensor | None = None,
        x_t_preserve: Tensor | None = None,
        t_preserve: Tensor | None = None,
        localization_mask: Tensor | Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Calls the models for every velocity that is not given, and adds the terms up.

        The erased model is called on the concept, then `eraser_outputs` is read, then the erased model is called on
        what should stay. So `eraser_outputs` may be the mapping that an active `EraserOutputsCapture` fills: the
        localization term then needs no forward pass of its own.

        Args:
            model_original: the frozen model. None means `model_unlearned` itself. Whatever it is, every eraser from
                `attach_erasers` is off while it is called, in the thread that calls it; to keep erasers on in
                it, pass its velocities (`v_uncond`, ...).
            model_unlearned: the model being erased.
            x_t: (B, ...) noisy latents.
            t: (B,) timesteps.
            cond_target: the condition of the concept.
            cond_preserve: the condition of what should stay. None leaves the preservation term out.
            cond_neg: the condition to use as the empty one if `uncond` is not given.
            uncond: the empty condition.
            mask: (B, *spatial) on the token grid, 1 on the concept. It limits the unlearning term to the concept and
                the localization term to the background. It applies to the preservation term only if that has no
                latents of its own.
            eraser_outputs: what `EraserOutputsCapture` captured. None leaves the localization term out.
            v_uncond: the frozen model's unconditional velocity, if known.
            v_cond: the frozen model's velocity for `cond_target`, if known.
            v_preserve: the frozen model's velocity for `cond_preserve`, if known.
            x_t_preserve: the latents of the preservation term. None means `x_t`.
            t_preserve: the timesteps of the preservation term. None means `t`.
            localization_mask: a mask, or one mask per layer, for the localization term in place of `mask`. Without
                `mask`, the unlearning term then covers the whole video, while erasers still have to stay silent outside
                the concept.

        Returns:
            The loss, and a dict. It always has total_loss and {term}_loss_weighted (0 for an absent term). A term that
            is present adds its own entries under unlearning/, preservation/ or localization/.

        Raises:
            ValueError: `eraser_outputs` came without a mask, or `localization_mask` without `eraser_outputs`;
                preservation tensors came without `cond_preserve`; `channel_dim` is not the model's.
            TypeError: a model, the mask or a velocity is of the wrong type.
        """
        unlearning = self.unlearning_loss
        unlearning._check_mask(mask, model_unlearned, x_t)
        _check_localization(eraser_outputs, mask, localization_mask)
        _check_preservation(cond_preserve, v_preserve, x_t_preserve, t_preserve)
        _check_velocities(v_uncond, v_cond, v_preserve)
        needs_teacher = v_uncond is None or v_cond is None or (cond_preserve is not None and v_preserve is None)
        teacher = unlearning._choose_teacher(model_original, model_unlearned) if needs_teacher else model_unlearned

        if v_uncond is None:
            v_uncond = unlearning._unconditional_velocity(teacher, x_t, t, cond_target, cond_neg, uncond)
        if v_cond is None:
            v_cond = frozen_velocity(teacher, x_t, t, cond_target)
        prediction = call_model(model_unlearned, x_t, t, cond_target, "model_unlearned")
        terms = {"unlearning": self._unlearning_term(prediction, v_uncond, v_cond, t, mask)}

        if eraser_outputs is not None:
            terms["localization"] = self._localization_term(
                eraser_outputs, mask if localization_mask is None else localization_mask
            )

        if cond_preserve is not None:
            x_t_kept = x_t if x_t_preserve is None else x_t_preserve
            t_kept = t if t_preserve is None else t_preserve
            if v_preserve is None:
                v_preserve = frozen_velocity(teacher, x_t_kept, t_kept, cond_preserve)
            prediction = call_model(model_unlearned, x_t_kept, t_kept, cond_preserve, "model_unlearned")
            kept_mask = mask if x_t_preserve is None else None
            terms["preservation"] = self._preservation_term(prediction, v_preserve, t_kept, kept_mask)

        return _total(terms)

    def _unlearning_term(
        self, prediction: Tensor, v_uncond: Tensor, v_cond: Tensor, t: Tensor, mask: Tensor | None
    ) -> _Term:
        weight = _folded(self.unlearning_weight)
        result = self.unlearning_loss._loss_from_velocities(prediction, v_uncond, v_cond, t, mask, weight)
        entries = self.unlearning_loss._loss_dict(result, weight)
        return _Term(_weighted(result.loss, self.unlearning_weight), entries)

    def _localization_term(self, eraser_outputs: EraserOutputs, mask: Any) -> _Term:
        weight = _folded(self.localization_weight)
        result = self.localization_loss._layers_loss(eraser_outputs, mask, weight)
        entries = self.localization_loss._loss_dict(*result, eraser_outputs, weight)
        return _Term(_weighted(result.loss, self.localization_weight), entries)

    def _preservation_term(self, prediction: Tensor, target: Tensor, t: Tensor, mask: Tensor | None) -> _Term:
        weight = _folded(self.preservation_weight)
        result = self.preservation_loss._loss_from_velocities(prediction, target, t, mask, weight)
        entries = self.preservation_loss._loss_dict(result, weight)
        return _Term(_weighted(result.loss, self.preservation_weight), entries)


def _folded(weight: float) -> float:
    """The weight to compute a term with: 1 for a weight of 0, whose term still has entries in the loss dict."""
    return weight if weight != 0 else 1.0


def _weighted(loss: Tensor, weight: float) -> Tensor:
    """The loss computed with `_folded(weight)`, or 0 without a gradient if the weight is 0."""
    return loss if weight != 0 else torch.zeros_like(loss)


def _total(terms: Mapping[str, _Term]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the terms in their order, and the loss dict."""
    total = terms["unlearning"].weighted
    absent = torch.zeros_like(total).detach()
    weighted = {
        f"{name}_loss_weighted": terms[name].weighted.detach() if name in terms else absent
        for name in ("unlearning", "preservation", "localization")
    }
    entries = {f"{name}/{entry}": value for name, term in terms.items() for entry, value in term.entries.items()}
    for name, term in terms.items():
        if name != "unlearning":
            total = total + term.weighted
    return total, {"total_loss": total.detach()} | weighted | entries


def _check_localization(eraser_outputs: object, mask: object, localization_mask: object) -> None:
    if eraser_outputs is None:
        if localization_mask is not None:
            raise ValueError("eraser_outputs: expected outputs of erasers with localization_mask, got None")
        return
    check_eraser_outputs(eraser_outputs)
    if mask is None and localization_mask is None:
        raise ValueError(
            "mask: expected a mask, or localization_mask, with eraser_outputs, got None; "
            "the localization term is over its background"
        )


def _check_velocities(v_uncond: object, v_cond: object, v_preserve: object) -> None:
    for name, velocity in (("v_uncond", v_uncond), ("v_cond", v_cond), ("v_preserve", v_preserve)):
        if velocity is not None:
            check_tensor(name, velocity)


def _check_preservation(cond_preserve: object, v_preserve: object, x_t_preserve: object, t_preserve: object) -> None:
    if cond_preserve is not None:
        return
    for name, given in (("v_preserve", v_preserve), ("x_t_preserve", x_t_preserve), ("t_preserve", t_preserve)):
        if given is not None:
            raise ValueError(f"cond_preserve: expected a condition with {name}, got None")
