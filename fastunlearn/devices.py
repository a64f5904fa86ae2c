"""The device that a command runs on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastunlearn.dtypes import widest_dtype

_UNUSABLE = (RuntimeError, AssertionError, NotImplementedError)


def usable_device(name: str | None) -> torch.device:
    """Returns the device called `name`, or, without a name, an accelerator if there is one and the CPU otherwise.

    Raises:
        ValueError: torch cannot compute on this device here.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails on "meta", which has no data
        return probe.device
    except _UNUSABLE as error:
        raise _unusable(name, error) from error


def is_cpu(name: str | None) -> bool:
    """Whether `usable_device(name)` is the CPU; allocates nothing, so that processes can ask before they are connected.

    Raises:
        ValueError: torch knows no device of this name.
    """
    if name is None:
        return not torch.accelerator.is_available()
    try:
        return torch.device(name).type == "cpu"
    except _UNUSABLE as error:
        raise _unusable(name, error) from error


def round_buffers(modules: Iterable[object], device: torch.device) -> None:
    """Rounds float64 buffers of modules that are about to be moved to a `device` without float64, where `to` raises.

    diffusers keeps the position embeddings of CogVideoX-2B in float64, whatever the dtype of the model.
    """
    if widest_dtype(device) == torch.float64:
        return
    for module in modules:
        for part in module.modules() if isinstance(module, nn.Module) else ():
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.dtype == torch.float64:
                    setattr(part, name, buffer.float())


def _unusable(name: str, error: Exception) -> ValueError:
    reason = str(error).split("\n")[0].split(". ")[0]
    return ValueError(f"device: expected one that torch can use here, got {name!r}: {reason}")
