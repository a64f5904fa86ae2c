"""Triton's interpreter, which runs kernels on the CPU under TRITON_INTERPRET=1, made observable."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass
class Observed:
    """The launches and the memory traffic of interpreted kernels."""

    launches: list[str] = field(default_factory=list)
    loaded: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Bytes loaded, by kernel and pointer argument."""
    stored: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Bytes stored, by kernel and pointer argument."""


@contextmanager
def observed_kernels() -> Iterator[Observed]:
    """Count launches, and the bytes that kernels load and store; masked-off lanes do not count."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    observed = Observed()
    running: list[tuple[str, list[tuple[int, int, str]]]] = []
    run, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def observed_run(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        observed.launches.append(name)
        bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
        ranges = []
        for argument, value in bound.items():
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, Tensor):
                    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
                    ranges.append((x.data_ptr(), x.data_ptr() + span * x.element_size(), argument))
        running.append((name, ranges))
        try:
            run(self, *args, **kwargs)
        finally:
            running.pop()

    def count(counter: Counter[tuple[str, str]], pointers: Any, mask: Any) -> None:
        addresses = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data).astype(bool)]
        if addresses.size == 0:
            return
        name, ranges = running[-1]
        first = int(addresses.flat[0])
        argument = next((argument for low, high, argument in ranges if low <= first < high), "elsewhere")
        counter[name, argument] += addresses.size * (pointers.get_element_ty().primitive_bitwidth // 8)

    def observed_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(observed.loaded, pointers, mask)
        return load(self, pointers, mask, *rest)

    def observed_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(observed.stored, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    patch = mock.patch.object
    with (
        patch(GridExecutor, "__call__", observed_run),
        patch(InterpreterBuilder, "create_masked_load", observed_load),
        patch(InterpreterBuilder, "create_masked_store", observed_store),
    ):
        yield observed
