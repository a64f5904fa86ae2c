"""Where a phase computes, and in what, from its options."""

from __future__ import annotations

import torch

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def model_dtype(mixed_precision: str) -> torch.dtype:
    """What the frozen model is loaded in.

    Raises:
        ValueError: not one of "no", "fp16" and "bf16".
    """
    if mixed_precision not in DTYPES:
        raise ValueError(f"mixed_precision: expected one of {', '.join(DTYPES)}, got {mixed_precision!r}")
    return DTYPES[mixed_precision]


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
