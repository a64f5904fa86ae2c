"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

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


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_pipeline(family)`: the folder of a tiny saved pipeline, made at the first call. Not to be written into."""

    @cache
    def saved(family: str) -> Path:
        from fastunlearn.testing.tiny_pipelines import save_tiny_pipeline

        folder = tmp_path_factory.mktemp("pipelines") / family
        save_tiny_pipeline(family, folder)
        return folder

    return saved


# What needs Triton's interpreter, which is chosen when kernels are decorated, runs in a process of its own.
collect_ignore = [] if is_interpreted() else ["kernels/interpreted"]
