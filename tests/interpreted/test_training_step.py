"""A training step of the demo: the kernels against the reference."""

from __future__ import annotations

import random

import pytest
import torch

from fastunlearn import detach_erasers
from fastunlearn.demo import erase, sampling
from fastunlearn.demo.model import load


def test_a_step_of_the_demo_is_the_reference_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses agree to float32's rounding, and so do the erasers after the step."""
    monkeypatch.setattr(sampling, "STEPS", 4)
    model, _, _ = load()
    draw = random.Random(0)
    caches = [
        erase.target_cache(model, "circle", sampling.starting_noise(2, 0), draw, alone=alone, leading=True)
        for alone in (True, False)
    ]
    kept = erase.kept_cache(model, "circle", sampling.starting_noise(2, 1), draw)
    losses, weights = [], []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
        steps = erase.train_erasers(model, *caches, kept, seed=0)
        # The first step finds the erasers at 0; what the second finds comes of the first one's gradients.
        losses.append([next(steps) for _ in range(2)])
        erasers = [p.detach().clone() for name, p in model.transformer.named_parameters() if "eraser" in name]
        weights.append(erasers)
        detach_erasers(model.transformer)
    assert weights[0]
    for of_torch, of_triton in zip(*losses, strict=True):
        assert of_torch.keys() == of_triton.keys()
        for name, value in of_torch.items():
            assert of_triton[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)
