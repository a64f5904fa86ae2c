"""Triton's interpreter, which runs kernels on CPU tensors under TRITON_INTERPRET=1: made exact, and observed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


def is_interpreted() -> bool:
    """Whether kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def rounding_to_nearest() -> Iterator[None]:
    """Inside this context the interpreter rounds float32 to bfloat16 as hardware does; by itself it truncates."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, dtype: Any) -> Any:
        if dtype.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float32, tl.float64):
            rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return convert(self, source, dtype)

    casts = ("cast_impl", "create_fp_trunc")
    with mock.patch.multiple(InterpreterBuilder, **dict.fromkeys(casts, cast)):
        yield
