"""The erasers of one attention, and the hook that adds what they return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.erasers.switches import (
    EVERYWHERE,
    NO_BACKWARD,
    Switches,
    check_recomputable,
    current_backward,
    note,
    noted,
)


class EraserStack(nn.ModuleDict):
    """The erasers of one attention by name, in the order in which they were attached."""

    def __init__(self) -> None:
        super().__init__()
        self._disabled_here = Switches()
        self._disabled_when_replicated: tuple[str, ...] = ()
        self.scales: dict[str, float] = {}
        self.hook: Any = None

    def forward(self, attention_output: Tensor, off: tuple[str, ...]) -> Tensor:
        """Returns the attention's output (..., dim) with what the erasers that are not `off` add to it."""
        total = attention_output
        for name, eraser in self.items():
            if name not in off:
                output, scale = eraser(attention_output), self.scales[name]
                total = total + (output if scale == 1 else output * scale)
        return total

    def disabled(self) -> tuple[str, ...]:
        """The names of the erasers that are off in the call that is being computed."""
        backward, here = current_backward(), self._disabled_here.blocks
        if (backward, "") in EVERYWHERE.blocks:
            return tuple(self)
        off = tuple(name for name in self if (backward, name) in here) if here else ()
        if backward != NO_BACKWARD:
            off += noted(self)
        return off + self._disabled_when_replicated

    def _replicate_for_data_parallel(self) -> Any:
        # DataParallel calls each replica in a thread that it starts for that call.
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._disabled_when_replicated = self.disabled()
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_disabled_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._disabled_here = Switches()  # a copy that is made inside `erasers_disabled` has its erasers on


def add_erasers(attention: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook of an attention with erasers."""
    erasers: Any = attention.erasers
    video = output[0] if isinstance(output, tuple) else output
    off = erasers.disabled()
    total = erasers(video, off)
    if not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            note(erasers, off, (*args, *kwargs.values()), total)
        else:
            check_recomputable(off)
    return (total, *output[1:]) if isinstance(output, tuple) else total
