"""Tiny pipelines as they are loaded: once per family for all tests of training. A test that changes one restores it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

Pipelines = Callable[[str], Path]


@pytest.fixture(scope="session")
def diffusers_pipeline(tiny_pipeline: Pipelines) -> Callable[[str], Any]:
    """`diffusers_pipeline(family)`: the whole pipeline as diffusers loads it."""

    @cache
    def load(family: str) -> Any:
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(tiny_pipeline(family))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="session")
def loaded_model(tiny_pipeline: Pipelines) -> Callable[..., Any]:
    """`loaded_model(family)`, or with `vae=True`: the `VideoModel` in float32 on the CPU."""

    @cache
    def load(family: str, vae: bool = False) -> Any:
        import torch

        from fastunlearn.training.model.loading import load_model

        return load_model(tiny_pipeline(family), dtype=torch.float32, device="cpu", vae=vae)

    return load


@pytest.fixture(scope="session")
def model_and_prompts(tiny_pipeline: Pipelines, loaded_model: Callable[..., Any]) -> Callable[[str], Any]:
    """`model_and_prompts(family)`: `loaded_model(family)`, and `prepare_cases.PROMPTS` encoded for it, by prompt."""

    @cache
    def load(family: str) -> Any:
        import torch
        from prepare_cases import PROMPTS

        from fastunlearn.training.model.text import encode_prompts

        encoded = encode_prompts(tiny_pipeline(family), PROMPTS, "circle", dtype=torch.float32, device="cpu")
        return loaded_model(family), encoded

    return load
