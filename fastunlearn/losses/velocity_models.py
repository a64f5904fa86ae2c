"""Calling the models: the one being erased, and the frozen one without gradient and without erasers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastunlearn.erasers.attached import all_erasers_disabled
from fastunlearn.families import FAMILIES

VelocityModelLike = Callable[[Tensor, Tensor, Any], Tensor]


def call_model(model: VelocityModelLike, x_t: Tensor, t: Tensor, cond: Any, argument: str) -> Tensor:
    """The velocity that `model` predicts. `argument` is the name to call the model by in an error message.

    Raises:
        TypeError: `model` is a bare diffusers transformer, or returns something other than a tensor.
    """
    class_name = type(model).__name__
    # A diffusers transformer would accept the three tensors, but in another order.
    if any(class_name == family.transformer for family in FAMILIES):
        raise TypeError(
            f"{argument}: expected a callable (x_t, t, cond) -> velocity, got {class_name}; "
            "wrap it in fastunlearn.as_velocity_model"
        )
    velocity = model(x_t, t, cond)
    if not isinstance(velocity, Tensor):
        raise TypeError(
            f"{argument}: expected the model to return the velocity as a tensor, got {type(velocity).__name__}; "
            "wrap a diffusers transformer in fastunlearn.as_velocity_model"
        )
    return velocity


def frozen_velocity(model: VelocityModelLike, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    """The velocity of the frozen model: no gradient, and every eraser switched off, wherever `model` may hold it."""
    with torch.no_grad(), all_erasers_disabled():
        return call_model(model, x_t, t, cond, "model_original")
