"""Gradients that refuse to be differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Make `backward` compute without a graph, and its gradients raise if they are differentiated again.

    torch's decorator of the same name returns constants if the inputs require gradients but the upstream gradient does
    not, so a gradient penalty would silently vanish.

    A second derivative raises if its backward pass comes to the upstream gradient or to one of the saved tensors. A
    forward pass that does not save its inputs sets `ctx.anchors` to their `anchor`s instead.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        # Under torch.compile, the compiler itself refuses second derivatives.
        if not torch.compiler.is_compiling():
            anchors = getattr(ctx, "anchors", None)
            sources = (*upstream, *(ctx.saved_tensors if anchors is None else anchors))
            forbid: Callable[..., Tensor] = _NoSecondDerivative.apply
            gradients = tuple(None if g is None else forbid(g, *sources) for g in gradients)
        return gradients

    return wrapper


def graph_is_kept() -> bool:
    """Whether the running backward pass may run again, so that nothing it saved may be overwritten."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except (AttributeError, RuntimeError):
        return True


def anchor(x: Tensor) -> Tensor:
    """An empty tensor that depends on `x` in the autograd graph but keeps none of its memory alive."""
    with torch.enable_grad():
        return x.flatten()[:0].clone() if x.dim() == 0 else torch.narrow_copy(x, 0, 0, 0)


class _NoSecondDerivative(torch.autograd.Function):
    """Return a gradient unchanged, as a function of everything that it was computed from."""

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError("fastunlearn's losses are once-differentiable: there is no second derivative")
