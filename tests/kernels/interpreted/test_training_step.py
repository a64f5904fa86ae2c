"""A training step on the demo's model, with the kernels and with the torch backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastunlearn import detach_erasers
from fastunlearn.demo.model import load
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.requests import Request
from fastunlearn.training.options import PrepareOptions, TrainingOptions
from fastunlearn.training.prepare import prepare
from fastunlearn.training.train import train

REQUESTS = [
    Request("red circle", instead="red", follow="instead"),
    Request("blue square and green circle", instead="blue square and green"),
    Request("red square", "kept"),
    Request("green triangle and blue square", "kept"),
]


def test_a_training_step_agrees_with_the_torch_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients agree to float32 rounding, with fresh erasers and one step later."""
    # Muon and Adam amplify the last bits of small gradients; plain gradient descent leaves them as they are.
    for optimizer in ("Muon", "AdamW"):
        monkeypatch.setattr(torch.optim, optimizer, lambda parameters, **_: torch.optim.SGD(parameters, lr=10.0))
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "torch")
    parts, _, _ = load()
    model = parts.without_text_encoder()
    prompts = [prompt for request in REQUESTS for prompt in (request.prompt, request.instead or "")]
    model_and_output = {"pretrained_model_name_or_path": "demo", "output_dir": tmp_path}
    prepare_options = PrepareOptions(
        **model_and_output, concept="circle", num_inference_steps=4, timesteps_per_trajectory=4, batch_size=2
    )
    prepare(model, parts.encode_prompts(["", *prompts], "circle"), REQUESTS, tmp_path / "cache", prepare_options)
    cache = TeacherCache.open(tmp_path / "cache")
    options = TrainingOptions(
        **model_and_output,
        cache_dir=tmp_path / "cache",
        rank=64,
        max_train_steps=2,
        train_batch_size=2,
        bias_learning_rate=10.0,
        optimizer="muon",
        relative=False,
        negative_guidance_scale=1.0,
        localization_weight=1e4,  # as large as the other terms, so that an error in its gradients shows
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
