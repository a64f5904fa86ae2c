"""Noise schedules for v-prediction, epsilon-prediction and x0-prediction, given as `alphas_cumprod`.

With a = alphas_cumprod[t]: x_t = sqrt(a) x_0 + sqrt(1 - a) eps and v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans and Ho,
2022). Everything is computed in float64 and rounded once: in the model's dtype, as diffusers' `get_velocity` computes,
x_0 would be lost in rounding. On a device without float64 it is computed in float32, in which sqrt(1 - a) is wrong by
up to 4e-5 of itself at the first timesteps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastunlearn.dtypes import INTEGER, widest_dtype
from fastunlearn.ops.arguments import check_choice, check_tensor

PredictionType = Literal["v_prediction", "epsilon", "sample"]
PREDICTION_TYPES: tuple[PredictionType, ...] = ("v_prediction", "epsilon", "sample")


def _alpha_sigma(alphas_cumprod: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a) per sample, shaped to broadcast over `like`."""
    check_tensor("alphas_cumprod", alphas_cumprod)
    check_tensor("t", t, INTEGER)
    if t.device.type == "cpu" and not torch.compiler.is_compiling():  # reading values from a GPU would wait for it
        outside = t[(t < 0) | (t >= len(alphas_cumprod))]
        if outside.numel():
            raise ValueError(f"t: expected timesteps from 0 to {len(alphas_cumprod) - 1}, got {outside[0].item()}")
    a = alphas_cumprod.to(device=like.device, dtype=widest_dtype(like.device))[t.to(like.device, torch.int64)]
    shape = (-1,) + (1,) * (like.dim() - 1)
    return a.sqrt().reshape(shape), (1 - a).sqrt().reshape(shape)


def add_noise(x_0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """The noisy sample x_t = sqrt(a) x_0 + sqrt(1 - a) noise.

    Args:
        x_0: (B, ...) clean samples.
        noise: (B, ...) Gaussian noise.
        alphas_cumprod: (T,), the product of 1 - beta up to each timestep.
        t: (B,) integer timesteps.

    Returns:
        (B, ...) in the dtype of `x_0`.
    """
    alpha, sigma = _alpha_sigma(alphas_cumprod, t, x_0)
    return (alpha * x_0 + sigma * noise).to(x_0.dtype)


def velocity_target(x_0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """The velocity sqrt(a) noise - sqrt(1 - a) x_0, which a v-prediction model is trained to predict.

    Args:
        x_0: (B, ...) clean samples.
        noise: (B, ...) Gaussian noise.
        alphas_cumprod: (T,), the product of 1 - beta up to each timestep.
        t: (B,) integer timesteps.

    Returns:
        (B, ...) in the dtype of `x_0`.
    """
    alpha, sigma = _alpha_sigma(alphas_cumprod, t, x_0)
    return (alpha * noise - sigma * x_0).to(x_0.dtype)


def velocity_error_weight(
    alphas_cumprod: Tensor, t: Tensor, prediction_type: PredictionType | Literal["x0"], loss_type: Literal["l2", "l1"]
) -> Tensor | None:
    """The weight per sample that turns rho(prediction error) into rho(velocity error).

    At a given x_t the velocity error is the prediction error times 1 / sqrt(a) if the model predicts epsilon, and times
    1 / sqrt(1 - a) if it predicts x_0, because the terms in x_t cancel, in a guided target too. The losses of
    T2VUnlearning (arXiv 2505.17550) are stated for velocities. With this weight they hold for such models.

    Args:
        alphas_cumprod: (T,), the product of 1 - beta up to each timestep.
        t: (B,) integer timesteps.
        prediction_type: what the model predicts, in diffusers' terms; "x0" is another name for "sample".
        loss_type: "l2" squares the factor, "l1" does not.

    Returns:
        (B,) float32 on the device of `t`, 0 where the factor would be infinite. None for "v_prediction", which needs no
        weight.

    Raises:
        TypeError: `t` does not hold integers, or `alphas_cumprod` is not a tensor.
        ValueError: the prediction type or the loss type is unknown, `t` is not (B,), or a timestep is out of range
            (checked on the CPU only).
    """
    check_choice("prediction_type", prediction_type, (*PREDICTION_TYPES, "x0"))
    check_choice("loss_type", loss_type, ("l2", "l1"))
    if t.dim() != 1:
        raise ValueError(f"t: expected shape (B,), one timestep per sample, got {tuple(t.shape)}")
    if prediction_type == "v_prediction":
        return None
    alpha, sigma = _alpha_sigma(alphas_cumprod, t, like=t)
    divisor = alpha if prediction_type == "epsilon" else sigma
    factor = torch.where(divisor == 0, 0.0, 1 / divisor)
    return (factor.square() if loss_type == "l2" else factor).float()
