"""bfloat16 in Triton's interpreter, which runs kernels on the CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch


@functools.cache
def make_bfloat16_exact() -> None:
    """Make the interpreter handle bfloat16 as hardware does, from now on and for every kernel of the process.

    Left alone, it truncates where hardware rounds, and multiplies matrices of bit patterns as if they were integers.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert, multiply = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self: Any, source: Any, dtype: Any) -> Any:
        if dtype.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float32, tl.float64):
            rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return convert(self, source, dtype)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        factors = (convert(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, *factors, *rest)

    InterpreterBuilder.cast_impl = InterpreterBuilder.create_fp_trunc = cast
    InterpreterBuilder.create_dot = dot
