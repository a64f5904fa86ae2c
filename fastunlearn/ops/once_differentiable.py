"""Gradients that refuse to be differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """`backward`, computed without a graph and raising if its gradients are differentiated again.

    torch's decorator of that name returns constants where only the inputs, not the upstream gradient, require
    gradients: a gradient penalty would then be dropped without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        # The compiler refuses second derivatives by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            sources = (*upstream, *ctx.saved_tensors)
            forbid: Callable[..., Tensor] = _NoSecondDerivative.apply
            gradients = tuple(None if g is None else forbid(g, *sources) for g in gradients)
        return gradients

    return wrapper


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient as it is, depending on everything that it was computed from."""

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError("fastunlearn's losses are once-differentiable: there is no second derivative")
