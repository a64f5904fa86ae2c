"""The losses that erase a concept, as modules: they call the models, call `functional`, and fill the loss dict.

Signatures, defaults and dictionary keys are those of T2VUnlearning-style training loops, so that changing one import is
all it takes. Two things differ on purpose. The target always comes from the frozen model and carries no gradient, as in
the paper (T2VUnlearning, arXiv:2505.17550); and every value in a loss dict is a detached tensor on the
device, so that nothing here waits for a GPU.

A model is any callable `(x_t, t, cond) -> velocity`; `fastunlearn.as_velocity_model` makes one of a diffusers
transformer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastunlearn.erasers import _Erasers, erasers_disabled
from fastunlearn.families import FAMILIES
from fastunlearn.functional import (
    LocalizationLoss,
    LocalizationNormalization,
    LossType,
    LowRankOutput,
    MaskNormalization,
    Reduction,
    VelocityLoss,
    localization_loss,
    negatively_guided_velocity_loss,
    velocity_loss,
)
from fastunlearn.ops.arguments import check_choice, check_number, check_tensor
from fastunlearn.ops.dispatch import Backend
from fastunlearn.ops.sharded import check_group
from fastunlearn.schedule import PREDICTION_TYPES, PredictionType, velocity_error_weight
from fastunlearn.velocity_model import VelocityModel

VelocityModelLike = Callable[[Tensor, Tensor, Any], Tensor]
LossDict = dict[str, Tensor]


def _call(model: VelocityModelLike, x_t: Tensor, t: Tensor, cond: Any, argument: str) -> Tensor:
    name = type(model).__name__
    if any(name == family.transformer for family in FAMILIES):  # its own arguments come in another order
        raise TypeError(f"{argument} must take (x_t, t, cond): pass fastunlearn.as_velocity_model of the {name}")
    velocity = model(x_t, t, cond)
    if not isinstance(velocity, Tensor):
        raise TypeError(
            f"{argument} must return the velocity as a tensor, got {type(velocity).__name__}; "
            "wrap a diffusers transformer in fastunlearn.as_velocity_model"
        )
    return velocity


def _frozen(model: VelocityModelLike, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    """The velocity of theta: no gradient, erasers off."""
    off = erasers_disabled(model) if isinstance(model, nn.Module) else nullcontext()
    with torch.no_grad(), off:
        return _call(model, x_t, t, cond, "model_original")


def _fold(weight: float) -> float:
    """The weight to fold into a term's gradient. A term of weight 0 is still computed, for its entry in the dict."""
    return weight if weight != 0 else 1.0


def _weighted(loss: Tensor, weight: float) -> Tensor:
    return loss if weight != 0 else torch.zeros_like(loss)


class _VelocityErrorLoss(nn.Module):
    """What the two losses on velocities share: their options, the frozen model, the weights for epsilon and x0."""

    def __init__(
        self,
        alphas_cumprod: Tensor | None,
        loss_type: LossType,
        reduction: Reduction,
        channel_dim: int,
        mask_normalization: MaskNormalization,
        prediction_type: PredictionType,
        backend: Backend | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        check_choice("loss_type", loss_type, ("l2", "l1"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_choice("mask_normalization", mask_normalization, ("all", "mask"))
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_group(group)
        if alphas_cumprod is not None:
            check_tensor("alphas_cumprod", alphas_cumprod)
            if alphas_cumprod.dim() != 1:
                raise ValueError(f"alphas_cumprod must have shape (timesteps,), got {tuple(alphas_cumprod.shape)}")
        elif prediction_type != "v_prediction":
            raise ValueError(f"alphas_cumprod is required with prediction_type={prediction_type!r}")
        # No buffer: `.half()` would spoil the small alphas, whose inverses are weights.
        self.alphas_cumprod = alphas_cumprod
        self.loss_type = loss_type
        self.reduction = reduction
        self.channel_dim = channel_dim
        self.mask_normalization = mask_normalization
        self.prediction_type = prediction_type
        self.backend = backend
        self.group = group
        self._warned: set[str] = set()

    def _warn_once(self, message: str) -> None:
        """To be called by what `forward` calls: then the warning points at the caller of the module."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=6)

    def _teacher(self, model_original: VelocityModelLike | None, model: VelocityModelLike) -> VelocityModelLike:
        """The frozen model: `model_original`, or `model`, whose erasers `_frozen` switches off."""
        if model_original is not None and model_original is not model:
            return model_original
        if not isinstance(model, nn.Module) or not any(isinstance(module, _Erasers) for module in model.modules()):
            self._warn_once(
                "model_original is not given and the model has no erasers from fastunlearn.attach_erasers to switch "
                "off: the model being trained is its own target; pass a frozen model_original"
            )
        return model

    def _check_mask(self, mask: Tensor | None, model: VelocityModelLike) -> None:
        """Before any model is called, and where the layout is known: read along wrong dims, a mask may well fit."""
        if mask is None:
            return
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, as get_mask(...)['average_mask'] is, got {type(mask).__name__}")
        if isinstance(model, VelocityModel) and model.channel_dim != self.channel_dim:
            raise ValueError(f"channel_dim must be {model.channel_dim} for this model's masks, got {self.channel_dim}")

    def _options(self, prediction: Tensor, t: Tensor, mask: Tensor | None, weight: float) -> dict[str, Any]:
        """The keyword arguments that both functions of `functional` take."""
        sample_weight = None
        if self.alphas_cumprod is not None and self.prediction_type != "v_prediction":
            # Moved once, not at every step: a copy to the device waits for it.
            self.alphas_cumprod = self.alphas_cumprod.to(prediction.device)
            batch = prediction.shape[0]
            t = torch.as_tensor(t)
            if t.dim() > 1 or t.numel() not in (1, batch):
                raise ValueError(f"t must be one timestep or ({batch},), got shape {tuple(t.shape)}")
            t = t.to(prediction.device).expand(batch)
            sample_weight = velocity_error_weight(self.alphas_cumprod, t, self.prediction_type, self.loss_type)
        return {
            "mask": mask,
            "sample_weight": sample_weight,
            "channel_dim": self.channel_dim,
            "loss_type": self.loss_type,
            "reduction": self.reduction,
            "mask_normalization": self.mask_normalization,
            "weight": weight,
            "backend": self.backend,
            "group": self.group,
        }


class NegativelyGuidedVelocityLoss(_VelocityErrorLoss):
    """Pulls the erased model's velocity to the frozen model's, guided away from the concept.

    `rho(v_theta'(x_t, c) - v_neg)` with `v_neg = v_uncond + guidance_scale * (v_uncond - v_c)`, both from the frozen
    model (T2VUnlearning, arXiv:2505.17550).

    Args:
        alphas_cumprod: (timesteps,). Only read where `prediction_type` is not "v_prediction".
        guidance_scale: eta, how far beyond the unconditional velocity the target lies.
        loss_type: "l2" (squared error) or "l1" (absolute error).
        reduction: "mean", "sum" or "none".
        channel_dim: which dim of the velocity is the channel: 1 in (B, C, ...), 2 in CogVideoX's (B, F, C, H, W).
        mask_normalization: whether "mean" divides by "all" elements or by the "mask"'s weight.
        prediction_type: "v_prediction", "epsilon" or "sample" (x0). Flow matching counts as "v_prediction".
        backend: "torch", "compile", "triton" or None for the best available.
        group: a process group whose processes each hold a shard of the tensors; see `fastunlearn.functional`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
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
    ) -> tuple[Tensor, LossDict]:
        """Calls the erased model once and the frozen model twice.

        Args:
            model: the model being erased.
            x_t: (B, ...) noisy latents.
            t: (B,) timesteps.
            cond_c: the concept's condition, as `model` takes it.
            cond_neg: the condition to fall back to where `uncond` is not given.
            uncond: the empty condition. With neither, the model is called with None and, if it refuses, with zeros.
            mask: (B, *spatial), 1 on the concept, at the latents' resolution or coarser.
            model_original: the frozen model. None: `model` itself with its erasers off.

        Returns:
            The loss, and a dict with unlearning_loss, v_pred_norm and v_neg_norm.
        """
        self._check_mask(mask, model)
        teacher = self._teacher(model_original, model)
        v_uncond = self._unconditional(teacher, x_t, t, cond_c, cond_neg, uncond)
        v_cond = _frozen(teacher, x_t, t, cond_c)
        prediction = _call(model, x_t, t, cond_c, "model")
        result = self._from_velocities(prediction, v_uncond, v_cond, t, mask)
        return result.loss, self._entries(result)

    def _from_velocities(
        self,
        prediction: Tensor,
        v_uncond: Tensor,
        v_cond: Tensor,
        t: Tensor,
        mask: Tensor | None,
        weight: float = 1.0,
    ) -> VelocityLoss:
        return negatively_guided_velocity_loss(
            prediction,
            v_uncond.detach(),
            v_cond.detach(),
            guidance_scale=self.guidance_scale,
            **self._options(prediction, t, mask, weight),
        )

    @staticmethod
    def _entries(result: VelocityLoss, weight: float = 1.0) -> LossDict:
        return {
            "unlearning_loss": result.loss.detach() / weight,
            "v_pred_norm": result.prediction_norm,
            "v_neg_norm": result.target_norm,
        }

    def _unconditional(
        self, teacher: VelocityModelLike, x_t: Tensor, t: Tensor, cond_c: Any, cond_neg: Any, uncond: Any
    ) -> Tensor:
        if uncond is not None and cond_neg is not None:
            self._warn_once("both uncond and cond_neg were given: uncond is used, cond_neg is not")
        empty = cond_neg if uncond is None else uncond
        if empty is not None:
            return _frozen(teacher, x_t, t, empty)
        try:
            return _frozen(teacher, x_t, t, None)
        except (TypeError, ValueError, AttributeError):
            if not isinstance(cond_c, Tensor):
                raise
        v_uncond = _frozen(teacher, x_t, t, torch.zeros_like(cond_c))
        self._warn_once(
            "neither uncond nor cond_neg was given and the model does not take None: zeros of cond_c's shape stand for "
            "the empty condition; pass uncond to choose another"
        )
        return v_uncond


class ConceptPreservationLoss(_VelocityErrorLoss):
    """Holds the erased model to the frozen one on a concept to keep: `rho(v_theta'(x_t, c) - v_theta(x_t, c))`.

    Args:
        loss_type: "l2" (squared error) or "l1" (absolute error).
        reduction: "mean", "sum" or "none".
        channel_dim: which dim of the velocity is the channel: 1 in (B, C, ...), 2 in CogVideoX's (B, F, C, H, W).
        mask_normalization: whether "mean" divides by "all" elements or by the "mask"'s weight.
        prediction_type: "v_prediction", "epsilon" or "sample" (x0); the latter two need `alphas_cumprod`.
        alphas_cumprod: (timesteps,). Only read where `prediction_type` is not "v_prediction".
        backend: "torch", "compile", "triton" or None for the best available.
        group: a process group whose processes each hold a shard of the tensors; see `fastunlearn.functional`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
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
    ) -> tuple[Tensor, LossDict]:
        """Calls each model once.

        Args:
            model_original: the frozen model. None, or `model_unlearned` itself: that model with its erasers off.
            model_unlearned: the model being erased.
            x_t: (B, ...) noisy latents.
            t: (B,) timesteps.
            cond_preserve: the condition of what is kept.
            mask: (B, *spatial), where to hold it.

        Returns:
            The loss, and a dict with preservation_loss, v_orig_norm and v_unlearn_norm.
        """
        self._check_mask(mask, model_unlearned)
        teacher = self._teacher(model_original, model_unlearned)
        v_original = _frozen(teacher, x_t, t, cond_preserve)
        prediction = _call(model_unlearned, x_t, t, cond_preserve, "model_unlearned")
        result = self._from_velocities(prediction, v_original, t, mask)
        return result.loss, self._entries(result)

    def _from_velocities(
        self, prediction: Tensor, target: Tensor, t: Tensor, mask: Tensor | None, weight: float = 1.0
    ) -> VelocityLoss:
        return velocity_loss(prediction, target.detach(), **self._options(prediction, t, mask, weight))

    @staticmethod
    def _entries(result: VelocityLoss, weight: float = 1.0) -> LossDict:
        return {
            "preservation_loss": result.loss.detach() / weight,
            "v_orig_norm": result.target_norm,
            "v_unlearn_norm": result.prediction_norm,
        }


class MaskLocalizationLoss(nn.Module):
    """Keeps erasers silent outside the concept: `1/L sum_l 1/B sum rho(o^l (1 - M))` (T2VUnlearning, arXiv:2505.17550).

    Args:
        loss_type: "l2" (squared) or "l1" (absolute).
        reduction: over layers: their "mean", their "sum", or "none" for one loss a layer, (L,).
        normalization: of a layer's loss: "sum" over tokens and features, as above, or "background_mean", the mean over
            the background's elements (Receler, arXiv:2311.17717).
        backend: "torch", "compile", "triton" or None for the best available.
        group: a process group whose processes each hold a shard of the tensors; see `fastunlearn.functional`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        loss_type: LossType = "l2",
        reduction: Reduction = "mean",
        *,
        normalization: LocalizationNormalization = "sum",
        backend: Backend | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_choice("loss_type", loss_type, ("l2", "l1"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_choice("normalization", normalization, ("sum", "background_mean"))
        check_group(group)
        self.loss_type = loss_type
        self.reduction = reduction
        self.normalization = normalization
        self.backend = backend
        self.group = group

    def forward(
        self, eraser_outputs: Mapping[str, Tensor | LowRankOutput], mask: Tensor | Mapping[str, Tensor]
    ) -> tuple[Tensor, LossDict]:
        """Reads what `EraserOutputsCapture` caught.

        Args:
            eraser_outputs: each eraser's output by name: (B, N, D) tokens, (B, C, *spatial) feature maps, or
                `LowRankOutput`s.
            mask: (B, F, h, w) on the token grid, 1 on the concept; or one such mask a layer, by the same names.

        Returns:
            The loss, and a dict with total_loss, num_layers and {eraser_name}/loss. An empty mapping gives 0.
        """
        _check_eraser_outputs(eraser_outputs)
        if self.reduction == "none":
            losses = [self._of({name: output}, mask).loss for name, output in eraser_outputs.items()]
            loss = torch.stack(losses) if losses else self._of({}, mask).per_layer
            return loss, self._entries(loss, loss.detach(), eraser_outputs)
        loss, per_layer = self._of(eraser_outputs, mask, len(eraser_outputs) if self.reduction == "sum" else 1.0)
        return loss, self._entries(loss, per_layer, eraser_outputs)

    def _of(
        self,
        eraser_outputs: Mapping[str, Tensor | LowRankOutput],
        mask: Tensor | Mapping[str, Tensor],
        weight: float = 1.0,
    ) -> LocalizationLoss:
        return localization_loss(
            eraser_outputs,
            mask,
            loss_type=self.loss_type,
            normalization=self.normalization,
            weight=weight,
            backend=self.backend,
            group=self.group,
        )

    @staticmethod
    def _entries(
        loss: Tensor, per_layer: Tensor, eraser_outputs: Mapping[str, Tensor | LowRankOutput], weight: float = 1.0
    ) -> LossDict:
        entries = {
            "total_loss": loss.detach() / weight,
            # Filled on the device: copying a number there would wait for it.
            "num_layers": torch.full((), len(eraser_outputs), device=loss.device),
        }
        return entries | {f"{name}/loss": layer for name, layer in zip(eraser_outputs, per_layer, strict=True)}


class T2VUnlearningLoss(nn.Module):
    """The three terms together: `w_unl L_unl + w_pre L_pre + w_loc L_loc` (T2VUnlearning, arXiv:2505.17550).

    Args:
        alphas_cumprod: (timesteps,). Only read where `prediction_type` is not "v_prediction".
        unlearning_weight: w_unl.
        preservation_weight: w_pre.
        localization_weight: w_loc.
        guidance_scale: eta, how far beyond the unconditional velocity the target lies.
        loss_type: "l2" or "l1", for all three terms.
        channel_dim: which dim of the velocity is the channel: 1 in (B, C, ...), 2 in CogVideoX's (B, F, C, H, W).
        mask_normalization: whether the velocity terms divide by "all" elements or by the "mask"'s weight.
        normalization: of the localization term, "sum" or "background_mean".
        prediction_type: "v_prediction", "epsilon" or "sample" (x0). Flow matching counts as "v_prediction".
        backend: "torch", "compile", "triton" or None for the best available.
        group: a process group whose processes each hold a shard of the tensors; see `fastunlearn.functional`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
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
        eraser_outputs: Mapping[str, Tensor | LowRankOutput] | None = None,
        *,
        v_uncond: Tensor | None = None,
        v_cond: Tensor | None = None,
        v_preserve: Tensor | None = None,
        x_t_preserve: Tensor | None = None,
        t_preserve: Tensor | None = None,
        localization_mask: Tensor | Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, LossDict]:
        """Calls the models for what is not given, and adds the terms up.

        The erased model is called on the concept first, then `eraser_outputs` is read, then it is called on what is
        kept. So the mapping may be one that an active `EraserOutputsCapture` is filling: no forward pass of its own.

        Args:
            model_original: the frozen model. None, or `model_unlearned` itself: that model with its erasers off.
            model_unlearned: the model being erased.
            x_t: (B, ...) noisy latents.
            t: (B,) timesteps.
            cond_target: the concept's condition.
            cond_preserve: the condition of what is kept. None leaves the preservation term out.
            cond_neg: stands for the empty condition where `uncond` is not given.
            uncond: the empty condition.
            mask: (B, *spatial) on the token grid, 1 on the concept. Limits the unlearning term to the concept and the
                localization term to the background; the preservation term too, if it has no latents of its own.
            eraser_outputs: what `EraserOutputsCapture` caught. None leaves the localization term out.
            v_uncond: the frozen model's unconditional velocity, if known.
            v_cond: the frozen model's velocity given `cond_target`, if known.
            v_preserve: the frozen model's velocity given `cond_preserve`, if known.
            x_t_preserve: latents of the preservation term; `x_t` if None.
            t_preserve: their timesteps; `t` if None.
            localization_mask: the localization term's mask, or masks by layer, where it is not `mask`: with it and no
                `mask`, the unlearning term is over the whole video and erasers are still held to the concept.

        Returns:
            The loss, and a dict: total_loss and {term}_loss_weighted always (0 for an absent term), and each present
            term's own entries under unlearning/, preservation/ and localization/.

        Raises:
            ValueError: `eraser_outputs` without a mask, or `localization_mask` without them; preservation tensors
                without `cond_preserve`; `channel_dim` is not the model's.
            TypeError: a model, the mask or a velocity of the wrong type.
        """
        unlearning = self.unlearning_loss
        unlearning._check_mask(mask, model_unlearned)
        if localization_mask is not None and eraser_outputs is None:
            raise ValueError("eraser_outputs is required with localization_mask")
        where = mask if localization_mask is None else localization_mask
        if eraser_outputs is not None:
            _check_eraser_outputs(eraser_outputs)
            if where is None:
                raise ValueError(
                    "mask, or localization_mask, is required with eraser_outputs: "
                    "the localization term is over its background"
                )
        for name, given in (("v_preserve", v_preserve), ("x_t_preserve", x_t_preserve), ("t_preserve", t_preserve)):
            if given is not None and cond_preserve is None:
                raise ValueError(f"cond_preserve is required with {name}")
        for name, velocity in (("v_uncond", v_uncond), ("v_cond", v_cond), ("v_preserve", v_preserve)):
            if velocity is not None:
                check_tensor(name, velocity)
        needs_teacher = v_uncond is None or v_cond is None or (cond_preserve is not None and v_preserve is None)
        teacher = unlearning._teacher(model_original, model_unlearned) if needs_teacher else model_unlearned

        if v_uncond is None:
            v_uncond = unlearning._unconditional(teacher, x_t, t, cond_target, cond_neg, uncond)
        if v_cond is None:
            v_cond = _frozen(teacher, x_t, t, cond_target)
        prediction = _call(model_unlearned, x_t, t, cond_target, "model_unlearned")
        weight = _fold(self.unlearning_weight)
        result = unlearning._from_velocities(prediction, v_uncond, v_cond, t, mask, weight)
        total = _weighted(result.loss, self.unlearning_weight)
        zero = torch.zeros_like(total).detach()
        entries = {
            "unlearning_loss_weighted": total.detach(),
            "preservation_loss_weighted": zero,
            "localization_loss_weighted": zero,
        }
        entries |= _prefixed("unlearning", unlearning._entries(result, weight))

        if eraser_outputs is not None and where is not None:
            weight = _fold(self.localization_weight)
            layers = self.localization_loss._of(eraser_outputs, where, weight)
            term = _weighted(layers.loss, self.localization_weight)
            total = total + term
            entries["localization_loss_weighted"] = term.detach()
            entries |= _prefixed("localization", self.localization_loss._entries(*layers, eraser_outputs, weight))

        if cond_preserve is not None:
            x_t_kept = x_t if x_t_preserve is None else x_t_preserve
            t_kept = t if t_preserve is None else t_preserve
            if v_preserve is None:
                v_preserve = _frozen(teacher, x_t_kept, t_kept, cond_preserve)
            prediction = _call(model_unlearned, x_t_kept, t_kept, cond_preserve, "model_unlearned")
            weight = _fold(self.preservation_weight)
            kept_mask = mask if x_t_preserve is None else None
            result = self.preservation_loss._from_velocities(prediction, v_preserve, t_kept, kept_mask, weight)
            term = _weighted(result.loss, self.preservation_weight)
            total = total + term
            entries["preservation_loss_weighted"] = term.detach()
            entries |= _prefixed("preservation", self.preservation_loss._entries(result, weight))

        return total, {"total_loss": total.detach()} | entries


def _check_eraser_outputs(eraser_outputs: object) -> None:
    if not isinstance(eraser_outputs, Mapping):  # the names of a sequence's entries in the dict would be its tensors
        raise TypeError(
            f"eraser_outputs must be a mapping of outputs by eraser name, got {type(eraser_outputs).__name__}"
        )


def _prefixed(term: str, entries: LossDict) -> LossDict:
    return {f"{term}/{name}": value for name, value in entries.items()}
