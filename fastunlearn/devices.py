"""The device that a command runs on."""

from __future__ import annotations

import torch


def usable_device(name: str | None) -> torch.device:
    """The device called `name`; without a name an accelerator if there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        for accelerator in ("cuda", "xpu", "mps"):
            module = getattr(torch, accelerator, None)
            if module is not None and module.is_available():
                return torch.device(accelerator)
        return torch.device("cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # a device without numbers, "meta", is none to compute on
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device: {name!r} cannot be used: {reason}") from error
