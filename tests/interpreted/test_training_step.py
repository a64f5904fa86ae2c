"""A training step of the demo: the kernels against the reference."""

from __future__ import annotations

import random

import pytest
import torch

from fastunlearn import detach_erasers
from fastunlearn.demo import erase, sampling
from fastunlearn.demo.model import load


def test_a_step_of_the_demo_is_the_reference_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients agree to float32's rounding, at fresh erasers and a step later."""
    monkeypatch.setattr(sampling, "STEPS", 4)
    # As large as the other terms, so that what is wrong in its gradients shows.
    monkeypatch.setattr(erase, "LOCALIZATION_WEIGHT", 1e3)
    # Muon and Adam make much of the last bits of small gradients; plain descent shows the gradients as they are.
    for optimizer in ("Muon", "AdamW"):
        monkeypatch.setattr(torch.optim, optimizer, lambda parameters, **_: torch.optim.SGD(parameters, lr=10.0))
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "torch")
    model, _, _ = load()
    draw = random.Random(0)
    caches = [
        erase.target_cache(model, "circle", sampling.starting_noise(2, 0), draw, alone=alone, leading=True)
        for alone in (True, False)
    ]
    kept = erase.kept_cache(model, "circle", sampling.starting_noise(2, 1), draw)
    losses, gradients = [], []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
        steps = erase.train_erasers(model, *caches, kept, seed=0)
        # The first step finds the up-projections at 0; what the second finds comes of the first one's gradients.
        losses.append([next(steps) for _ in range(2)])
        gradients.append({name: p.grad for name, p in model.transformer.named_parameters() if p.grad is not None})
        detach_erasers(model.transformer)
    for of_torch, of_triton in zip(*losses, strict=True):
        assert of_torch.keys() == of_triton.keys()
        for name, value in of_torch.items():
            assert of_triton[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    assert losses[0][1]["localization_loss_weighted"] > 1e-3
    assert len(gradients[0]) >= 4
    assert gradients[0].keys() == gradients[1].keys()
    for name, of_torch in gradients[0].items():
        assert (gradients[1][name] - of_torch).norm() <= 1e-5 * of_torch.norm(), name
