"""What the two velocity losses share: options, checks, the frozen model, and weights for epsilon and x0 models."""

from __future__ import annotations

import warnings
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastunlearn.dtypes import widest_dtype
from fastunlearn.erasers import has_erasers
from fastunlearn.functional import LossType, MaskNormalization, Reduction
from fastunlearn.losses.velocity_models import VelocityModelLike
from fastunlearn.ops.arguments import check_choice, check_tensor
from fastunlearn.ops.dispatch import Backend
from fastunlearn.ops.sharded import check_group
from fastunlearn.ops.spatial_masks import covers
from fastunlearn.schedule import PREDICTION_TYPES, PredictionType, velocity_error_weight
from fastunlearn.velocity_model import VelocityModel


class VelocityErrorLoss(nn.Module):
    """Base class of `NegativelyGuidedVelocityLoss` and `ConceptPreservationLoss`."""

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
        check_choice("loss_type", loss_type, get_args(LossType))
        check_choice("reduction", reduction, get_args(Reduction))
        check_choice("mask_normalization", mask_normalization, get_args(MaskNormalization))
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_group(group)
        if alphas_cumprod is not None:
            check_tensor("alphas_cumprod", alphas_cumprod)
            if alphas_cumprod.dim() != 1:
                raise ValueError(f"alphas_cumprod: expected shape (timesteps,), got {tuple(alphas_cumprod.shape)}")
        elif prediction_type != "v_prediction":
            raise ValueError(
                f"alphas_cumprod: expected the noise schedule with prediction_type={prediction_type!r}, got None"
            )
        # Not a buffer: `.half()` would round the small alphas, whose inverses are the weights.
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
        """Warns the first time, at the line that called the module.

        Only methods that `forward` calls directly may call this: `stacklevel` counts this method, that method,
        `forward`, and the two frames of `nn.Module.__call__`.
        """
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=6)

    def _choose_teacher(
        self, model_original: VelocityModelLike | None, model_erased: VelocityModelLike
    ) -> VelocityModelLike:
        """The model to call as the frozen one: `model_original`, or `model_erased`, called with its erasers off."""
        if model_original is not None and model_original is not model_erased:
            return model_original
        if not isinstance(model_erased, nn.Module):
            self._warn_once(
                "model_original is not given and the model is a function: unless it calls a model with erasers from "
                "fastunlearn.attach_erasers, the model being trained is its own target; pass a frozen model_original"
            )
        elif not has_erasers(model_erased):
            self._warn_once(
                "model_original is not given and the model has no erasers from fastunlearn.attach_erasers to switch "
                "off: the model being trained is its own target; pass a frozen model_original"
            )
        return model_erased

    def _check_mask(self, mask: Tensor | None, model: VelocityModelLike, x_t: Tensor) -> None:
        """Raises if `mask` is not a tensor, or if `channel_dim` is not that of the model. Called before any model is.

        With the wrong `channel_dim` a mask is read along the wrong dimensions. Where it fits there too, only a warning
        is possible, because a plain function does not know its `channel_dim`.
        """
        if mask is None:
            return
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"mask: expected a tensor, such as get_mask(...)['average_mask'], got {type(mask).__name__}"
            )
        if isinstance(model, VelocityModel) and model.channel_dim != self.channel_dim:
            raise ValueError(
                f"channel_dim: expected {model.channel_dim} for this model's masks, got {self.channel_dim}"
            )
        is_video = (x_t.dim(), mask.dim()) == (5, 4) and self.channel_dim in (1, 2)
        if isinstance(model, VelocityModel) or not is_video or mask.shape[1] == 1:
            return
        other_dim = 3 - self.channel_dim
        fits_both = all(covers(mask, x_t.shape, dim) for dim in (1, 2))
        # The other reading is the likelier one if the mask is as fine or finer in it.
        if fits_both and x_t.shape[self.channel_dim] <= x_t.shape[other_dim]:
            self._warn_once(
                f"mask: {tuple(mask.shape)} fits x_t of {tuple(x_t.shape)} with channel_dim={other_dim} as well as "
                f"with channel_dim={self.channel_dim}, which is used; pass the dimension of the channels: 2 if x_t is "
                "(B, F, C, H, W), as in CogVideoX, 1 if it is (B, C, F, H, W)"
            )

    def _loss_options(self, prediction: Tensor, t: Tensor, mask: Tensor | None, weight: float) -> dict[str, Any]:
        """The keyword arguments that both velocity losses of `fastunlearn.functional` take."""
        return {
            "mask": mask,
            "sample_weight": self._sample_weight(prediction, t),
            "channel_dim": self.channel_dim,
            "loss_type": self.loss_type,
            "reduction": self.reduction,
            "mask_normalization": self.mask_normalization,
            "weight": weight,
            "backend": self.backend,
            "group": self.group,
        }

    def _sample_weight(self, prediction: Tensor, t: Tensor) -> Tensor | None:
        """The weight per sample that turns the error of an epsilon or x0 model into that of a velocity."""
        if self.alphas_cumprod is None or self.prediction_type == "v_prediction":
            return None
        # Kept on the device: copying it at every step would make the host wait every time.
        self.alphas_cumprod = self.alphas_cumprod.to(prediction.device, widest_dtype(prediction.device))
        batch = prediction.shape[0]
        t = torch.as_tensor(t)
        if t.dim() > 1 or t.numel() not in (1, batch):
            raise ValueError(f"t: expected one timestep or ({batch},), got shape {tuple(t.shape)}")
        t = t.to(prediction.device).expand(batch)
        return velocity_error_weight(self.alphas_cumprod, t, self.prediction_type, self.loss_type)
