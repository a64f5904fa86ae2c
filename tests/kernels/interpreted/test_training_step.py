"""A training step of the demo: the kernels against the reference."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from fastunlearn import detach_erasers
from fastunlearn.demo import erase
from fastunlearn.demo.model import load
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.prepare import prepare
from fastunlearn.training.train import train


def test_a_step_of_the_demo_is_the_reference_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients agree to float32's rounding, at fresh erasers and a step later."""
    monkeypatch.setattr(erase, "SAMPLING_STEPS", 4)
    monkeypatch.setattr(erase, "TRAJECTORIES", dict.fromkeys(erase.TRAJECTORIES, 1))
    monkeypatch.setattr(erase, "LEADING_TRAJECTORIES", 1)
    # Muon and Adam make much of the last bits of small gradients; plain descent shows the gradients as they are.
    for optimizer in ("Muon", "AdamW"):
        monkeypatch.setattr(torch.optim, optimizer, lambda parameters, **_: torch.optim.SGD(parameters, lr=10.0))
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "torch")
    parts, _, _ = load()
    model = parts.without_text_encoder()
    requests = erase.requests("circle", random.Random(0))
    prompts = [prompt for request in requests for prompt in (request.prompt, request.instead or "")]
    encoded = parts.encode_prompts(["", *prompts], "circle")
    prepare(model, encoded, requests, tmp_path / "cache", erase.prepare_options("circle", 0))
    cache = TeacherCache.open(tmp_path / "cache")
    options = dataclasses.replace(
        erase.training_options(0),
        max_train_steps=2,
        train_batch_size=2,
        bias_learning_rate=10.0,
        # As large as the other terms, so that what is wrong in its gradients shows.
        localization_weight=1.0,
    )
    losses, gradients = [], []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
        # The first step finds the up-projections at 0; what the second finds comes of the first one's gradients.
        history: list[dict[str, float]] = []
        found: dict[str, torch.Tensor] = {}

        def on_step(
            step: int,
            metrics: dict[str, float],
            history: list[dict[str, float]] = history,
            found: dict[str, torch.Tensor] = found,
        ) -> None:
            history.append(metrics)
            named = parts.transformer.named_parameters()
            found.update({f"{step} {name}": p.grad.clone() for name, p in named if p.grad is not None})

        train(
            model,
            cache,
            tmp_path / backend,
            options,
            targets=erase.TARGETS,
            kept=erase.KEPT,
            lr_lambda=lambda step: 1.0,
            on_step=on_step,
        )
        losses.append(history)
        gradients.append(found)
        detach_erasers(parts.transformer)
    for of_torch, of_triton in zip(*losses, strict=True):
        assert of_torch.keys() == of_triton.keys()
        for name, value in of_torch.items():
            assert of_triton[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    assert losses[0][1]["localization_loss"] > 1e-3
    assert len(gradients[0]) >= 2 * 4
    assert gradients[0].keys() == gradients[1].keys()
    for name, of_torch in gradients[0].items():
        assert (gradients[1][name] - of_torch).norm() <= 1e-5 * of_torch.norm(), name
