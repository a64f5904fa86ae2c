"""One eraser of one attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Linear(nn.Linear):
    """Computes in the dtype of its input, whatever the dtype of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class AdapterEraser(nn.Module):
    """Linear(dim, rank), GELU, Linear(rank, dim). The last layer starts at zero, so a fresh eraser changes nothing.

    Parameters stay float32 even if the model around them is cast to half precision, because AdamW's epsilon is 0 in
    float16. They are cast to the input's dtype when they are used.

    Args:
        dim: the number of features of the tokens that it reads and writes.
        rank: the number of features in between.

    Raises:
        ValueError: `dim` or `rank` is not a positive integer.
    """

    def __init__(self, dim: int, rank: int = 128) -> None:
        super().__init__()
        for argument, value in (("dim", dim), ("rank", rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{argument}: expected a positive integer, got {value!r}")
        self.down = _Linear(dim, rank, dtype=torch.float32)
        self.up = _Linear(rank, dim, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns what to add to `hidden_states` (..., dim): a tensor of the same shape and dtype."""
        output: Tensor = self.up(F.gelu(self.down(hidden_states)))
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterEraser:
        """Follows the model to another device, but not to a narrower dtype."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
