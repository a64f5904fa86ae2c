"""The noise schedule behind v-prediction, epsilon-prediction and x0-prediction, from `alphas_cumprod` alone.

With a = alphas_cumprod[t]: x_t = sqrt(a) x_0 + sqrt(1 - a) eps and v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans and Ho,
2022). Everything is computed in float64 and rounded once, because `get_velocity` in the model's dtype loses x_0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastunlearn.ops.arguments import INTEGER, check_tensor

PredictionType = Literal["v_prediction", "epsilon", "sample"]
PREDICTION_TYPES: tuple[PredictionType, ...] = ("v_prediction", "epsilon", "sample")


def _alpha_sigma(alphas_cumprod: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a) for every sample, shaped to broadcast over `like`."""
    check_tensor("alphas_cumprod", alphas_cumprod)
    check_tensor("t", t, INTEGER)
    if t.device.type == "cpu" and not torch.compiler.is_compiling():  # looking at another device would wait for it
        outside = t[(t < 0) | (t >= len(alphas_cumprod))]
        if outside.numel():
            raise ValueError(f"t must be from 0 to {len(alphas_cumprod) - 1}, got {outside[0].item()}")
    a = alphas_cumprod.to(device=like.device, dtype=torch.float64)[t.to(like.device, torch.int64)]
    shape = (-1,) + (1,) * (like.dim() - 1)
    return a.sqrt().reshape(shape), (1 - a).sqrt().reshape(shape)


def add_noise(x_0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) noise.

    x_0, noise: (B, ...). alphas_cumprod: (T,). t: (B,) integers. Returns x_0's dtype.
    """
    alpha, sigma = _alpha_sigma(alphas_cumprod, t, x_0)
    return (alpha * x_0 + sigma * noise).to(x_0.dtype)


def velocity_target(x_0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """The velocity sqrt(a) noise - sqrt(1 - a) x_0, what a v-prediction model is trained to predict.

    x_0, noise: (B, ...). alphas_cumprod: (T,). t: (B,) integers. Returns x_0's dtype.
    """
    alpha, sigma = _alpha_sigma(alphas_cumprod, t, x_0)
    return (alpha * noise - sigma * x_0).to(x_0.dtype)


def velocity_error_weight(
    alphas_cumprod: Tensor, t: Tensor, prediction_type: PredictionType | Literal["x0"], loss_type: Literal["l2", "l1"]
) -> Tensor | None:
    """What turns rho(prediction error) into rho(velocity error), a weight for every sample.

    At a given x_t the velocity error is the prediction error times 1 / sqrt(a) if the model predicts epsilon, and times
    1 / sqrt(1 - a) if it predicts x_0: the terms in x_t cancel, in a guided target too. The losses of T2VUnlearning
    (arXiv 2505.17550) are stated for velocities; with this weight they hold for such models.

    Args:
        alphas_cumprod: (T,), the product of 1 - beta up to every timestep.
        t: (B,) integer timesteps.
        prediction_type: what the model predicts, in diffusers' words; "x0" is another name for "sample".
        loss_type: "l2" squares the factor, "l1" does not.

    Returns:
        (B,) float32 on t's device, 0 where the factor would be infinite; None for "v_prediction", which needs none.

    Raises:
        TypeError: `t` is not of integers, or `alphas_cumprod` no tensor.
        ValueError: an unknown prediction or loss type, `t` that is not (B,), or a timestep out of range (looked at on
            the CPU only).
    """
    if prediction_type not in (*PREDICTION_TYPES, "x0"):
        raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES} or 'x0', got {prediction_type!r}")
    if loss_type not in ("l2", "l1"):
        raise ValueError(f"loss_type must be 'l2' or 'l1', got {loss_type!r}")
    if t.dim() != 1:
        raise ValueError(f"t must be (B,), one timestep a sample, got shape {tuple(t.shape)}")
    if prediction_type == "v_prediction":
        return None
    alpha, sigma = _alpha_sigma(alphas_cumprod, t, like=t)
    divisor = alpha if prediction_type == "epsilon" else sigma
    factor = torch.where(divisor == 0, 0.0, 1 / divisor)
    return (factor.square() if loss_type == "l2" else factor).float()
