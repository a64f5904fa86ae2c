"""Dtypes: the ones that tensors may have, the one that arithmetic runs in, and their names in files and options."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MASK = (torch.bool, *INTEGER, *FLOATING)

_DTYPE_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in MASK}
_DTYPE_BY_MIXED_PRECISION = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic on these tensors: float64 if any of them is float64, else float32."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that lacks it, as Apple's GPUs ("mps") and some of Intel's ("xpu") do."""
    lacks = device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64)
    return torch.float32 if lacks else torch.float64


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch.", such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: object) -> torch.dtype | None:
    """The dtype whose `dtype_name` this is, or None if there is no such dtype."""
    return _DTYPE_BY_NAME.get(name) if isinstance(name, str) else None


def model_dtype(mixed_precision: str) -> torch.dtype:
    """The dtype in which a frozen model is loaded.

    Raises:
        ValueError: `mixed_precision` is not "no", "fp16" or "bf16".
    """
    if mixed_precision not in _DTYPE_BY_MIXED_PRECISION:
        expected = ", ".join(_DTYPE_BY_MIXED_PRECISION)
        raise ValueError(f"mixed_precision: expected one of {expected}, got {mixed_precision!r}")
    return _DTYPE_BY_MIXED_PRECISION[mixed_precision]
