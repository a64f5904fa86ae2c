"""Fixtures for every test, and how pytest-xdist's workers share the machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch requires it

from fastunlearn.testing.interpreter import is_interpreted

# Workers run side by side: without this, each of them and of their subprocesses would start a thread for every core.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    _THREADS = max(1, (os.cpu_count() or 1) // _WORKERS)
    os.environ["OMP_NUM_THREADS"] = str(_THREADS)
    torch.set_num_threads(_THREADS)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_pipeline(variant)`: the folder of a tiny saved pipeline, made at the first call. Tests only read it."""

    @cache
    def saved(variant: str) -> Path:
        from fastunlearn.testing.tiny_pipelines import save_tiny_pipeline

        folder = tmp_path_factory.mktemp("pipelines") / variant
        save_tiny_pipeline(variant, folder)
        # Encoding prompts collects garbage. Looking through all that diffusers imports would take 0.6 s each time.
        gc.collect()
        gc.freeze()
        return folder

    return saved


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`made_once(name, make)`: a folder that `make` fills, once for all of xdist's workers. Tests only read it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # every worker's own folder is in it

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, partial = root / name, root / f"{name}.partial"
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                partial.mkdir()
                make(partial)
                partial.rename(folder)
        return folder

    return made


# Whether Triton interprets a kernel is settled when the kernel is decorated: these tests need a process of their own.
collect_ignore = [] if is_interpreted() else ["kernels/interpreted"]
