"""The gradients that a forward pass writes, and the backward pass that multiplies them by the upstream gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunlearn.ops.once_differentiable import anchor, graph_is_kept
from fastunlearn.ops.torch_backend import blocks


def kept_dtype(x: Tensor, compute: torch.dtype) -> torch.dtype:
    """The dtype in which the forward pass keeps the gradient of `x`.

    In float16, a gradient divided by the number of elements would lose its bits before a loss scaler multiplies it, and
    a large one would be infinite. It is rounded once, in the backward pass.
    """
    return compute if x.dtype == torch.float16 else x.dtype


def new_gradients(inputs: Sequence[Tensor | None], needed: Sequence[bool], compute: torch.dtype) -> list[Tensor | None]:
    """Memory for the gradients of the inputs that need one, None for the others. `needed` may be longer."""
    return [
        torch.empty_like(x, dtype=kept_dtype(x, compute)) if wanted and x is not None else None
        for x, wanted in zip(inputs, needed, strict=False)
    ]


def keep_gradients(ctx: Any, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Keeps the gradients for `kept_gradients`, and of the inputs only what second derivatives are noticed by."""
    ctx.dtypes = [None if x is None else x.dtype for x in inputs]
    if not torch.compiler.is_compiling():
        pairs = zip(inputs, gradients, strict=True)
        ctx.anchors = [anchor(x) for x, gradient in pairs if x is not None and gradient is not None]
    ctx.save_for_backward(*gradients)


def kept_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """The gradients multiplied by the upstream gradient, () or of their shape: in place, unless the graph is kept.

    A gradient of 0 stays 0 even if the upstream gradient is NaN or infinite, because its element may have weight 0.
    """
    return scaled_gradients(ctx.saved_tensors, ctx.dtypes, upstream)


def scaled_gradients(
    gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None], upstream: Tensor
) -> list[Tensor | None]:
    """As `kept_gradients`, for these gradients, in these dtypes."""
    if upstream.dim() > 0 and not torch.compiler.is_compiling() and not any(upstream.stride()):
        upstream = upstream[(0,) * upstream.dim()]  # one expanded value: the gradient of a sum or a mean
    factor, keeps = math.nan, True
    if upstream.dim() == 0 and blocks.can_look(upstream.device):
        factor, keeps = upstream.item(), graph_is_kept()
    results: list[Tensor | None] = []
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        if gradient is None:
            results.append(None)
            continue
        if not math.isfinite(factor):
            gradient = torch.where(gradient == 0, 0, gradient * upstream)
        elif keeps:
            gradient = gradient * factor
        elif factor != 1:
            gradient.mul_(factor)
        results.append(gradient if gradient.dtype == dtype else gradient.to(dtype))
    return results
