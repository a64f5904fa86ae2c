"""One eraser of one attention."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Linear(nn.Module):
    """Computes in the dtype of its input, whatever the dtype of its parameters, which never become narrower.

    It is no `torch.nn.Linear`, because whatever casts, quantises or adapts "all linear layers" of a model finds them by
    that class: diffusers' layerwise casting, torchao's `quantize_`, PEFT's "all-linear", and loops written by hand.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        initial = nn.Linear(in_features, out_features, dtype=torch.float32)
        self.weight, self.bias = initial.weight, initial.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Any, recurse: bool = True) -> _Linear:
        """Follows the model to another device, but not to a narrower dtype."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]


def _refuse_gradient(gradient: Tensor) -> NoReturn:
    raise RuntimeError(
        "erasers: expected parameters that stay in memory while they are trained, got offloaded ones, whose gradients "
        "would be lost; offload the model first, and then attach or load its erasers"
    )


class AdapterEraser(nn.Module):
    """Linear(dim, rank), GELU, Linear(rank, dim). The last layer starts at zero, so a fresh eraser changes nothing.

    Parameters stay float32 even if the model around them or any part of it is cast to a narrower dtype, because AdamW's
    epsilon is 0 in float16. They are cast to the input's dtype when they are used.

    Args:
        dim: the number of features of the tokens that it reads and writes.
        rank: the number of features in between.

    Raises:
        ValueError: `dim` or `rank` is not a positive integer.
        RuntimeError: in the backward pass, if the parameters are offloaded, because their gradients would be lost.
    """

    def __init__(self, dim: int, rank: int = 128) -> None:
        super().__init__()
        for argument, value in (("dim", dim), ("rank", rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{argument}: expected a positive integer, got {value!r}")
        self.down = _Linear(dim, rank)
        self.up = _Linear(rank, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns what to add to `hidden_states` (..., dim): a tensor of the same shape and dtype."""
        output: Tensor = self.up(F.gelu(self.down(hidden_states)))
        # Accelerate's offloading computes with copies of parameters that are on the meta device before and after.
        if output.requires_grad and self.up.weight.is_meta and not output.is_meta:
            output.register_hook(_refuse_gradient)
        return output
