"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastunlearn.testing.interpreter import exact_bfloat16, is_interpreted


@pytest.fixture(scope="session", autouse=True)
def exact_interpreter() -> Iterator[None]:
    """Kernels in the interpreter round as they do on a GPU."""
    if not is_interpreted():
        yield
        return
    with exact_bfloat16():
        yield


# What needs Triton's interpreter, which is chosen when kernels are decorated, runs in a process of its own.
collect_ignore = [] if is_interpreted() else ["interpreted"]
