"""A training step of the demo, with the kernels and with the torch backend."""

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


def test_a_training_step_agrees_with_the_torch_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients agree to float32 rounding, with fresh erasers and one step later."""
    monkeypatch.setattr(erase, "SAMPLING_STEPS", 4)
    monkeypatch.setattr(erase, "TRAJECTORIES", dict.fromkeys(erase.TRAJECTORIES, 1))
    monkeypatch.setattr(erase, "LEADING_TRAJECTORIES", 1)
    # Muon and Adam amplify the last bits of small gradients; plain gradient descent leaves them as they are.
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
        # As large as the other terms, so that an error in its gradients shows.
        localization_weight=1.0,
    )
    losses, gradients = [], []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
        # In the first step the up-projections are 0; the second step depends on the gradients of the first.
        history: list[dict[str, float]] = []
        step_gradients: dict[str, torch.Tensor] = {}

        def on_step(
            step: int,
            metrics: dict[str, float],
            history: list[dict[str, float]] = history,
            step_gradients: dict[str, torch.Tensor] = step_gradients,
        ) -> None:
            history.append(metrics)
            named = parts.transformer.named_parameters()
            step_gradients.update({f"{step} {name}": p.grad.clone() for name, p in named if p.grad is not None})

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
        gradients.append(step_gradients)
        detach_erasers(parts.transformer)
    for torch_metrics, triton_metrics in zip(*losses, strict=True):
        assert torch_metrics.keys() == triton_metrics.keys()
        for name, value in torch_metrics.items():
            assert triton_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    assert losses[0][1]["localization_loss"] > 1e-3
    assert len(gradients[0]) >= 2 * 4
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
