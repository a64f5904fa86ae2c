"""A model with one parameter per condition, and the tensors that tests of the loss modules call it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Both ends occur: CogVideoX's last alpha is exactly 0, and the first is set to 1 here.
ALPHAS = torch.linspace(1, 0, 11, dtype=torch.float64)
SHAPE = (2, 3, 4, 6, 5)
T = torch.tensor([3, 10])
NAMES = ("concept", "kept", "empty", "negative")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Table(nn.Module):
    """A model with one parameter per condition: the velocity that it returns, so that its gradient can be read."""

    def __init__(self, seed: int, shape: tuple[int, ...] = SHAPE) -> None:
        super().__init__()
        self.velocities = nn.ParameterDict({name: random(*shape, seed=seed + i) for i, name in enumerate(NAMES)})
        self.calls: list[tuple[Tensor, Tensor, Any]] = []
        self.grad_modes: set[bool] = set()

    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.calls.append((x_t, t, cond))
        self.grad_modes.add(torch.is_grad_enabled())
        return self.velocities[cond].clone()

    @property
    def conditions(self) -> list[Any]:
        return [cond for _, _, cond in self.calls]


X_T = random(*SHAPE, seed=50)
MASK = torch.rand(2, 4, 3, 5, generator=torch.Generator().manual_seed(51))


def eraser_outputs(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: random(*shape, seed=len(name)).requires_grad_() for name, shape in shapes.items()}
