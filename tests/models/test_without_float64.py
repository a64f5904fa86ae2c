"""On a device without float64, everything that computes on the model's device gives the values of the CPU.

A float64 tensor on the simulated device raises, as it does on Apple's GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import cogvideox, inputs, wan_inputs
from torch import Tensor
from torch.utils._pytree import tree_map_only
from training_cases import tiny_model
from without_float64 import no_float64

from fastunlearn import (
    AttnMapsCapture,
    EraserOutputsCapture,
    T2VUnlearningLoss,
    as_velocity_model,
    attach_erasers,
    get_mask,
)
from fastunlearn.devices import round_buffers
from fastunlearn.schedule import add_noise, velocity_target
from fastunlearn.training.evaluation.metrics import Ratio, Sums
from fastunlearn.training.model.loading import load_model

ALPHAS = torch.linspace(1, 0, 1000, dtype=torch.float64) ** 2  # in float64, as in CogVideoX's scheduler


def on(device: torch.device | str, tree: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.detach().to(device), tree)


def same_on_both(compute: Callable[[torch.device], Any], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Checks that what `compute(device)` returns is the same on the CPU and on the device without float64."""
    expected = compute(torch.device("cpu"))
    with no_float64() as device:
        actual = on("cpu", compute(device))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def test_the_simulated_device_refuses_float64() -> None:
    with no_float64() as device:
        for make in (
            lambda: torch.zeros(2, device=device).double(),
            lambda: torch.zeros(2, dtype=torch.float64, device=device),
            lambda: ALPHAS.to(device),
            lambda: torch.ones(2, device=device).new_full((), 1, dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="doesn't support float64"):
                make()
        assert torch.zeros(2, device=device).cpu().double().dtype == torch.float64


@pytest.mark.parametrize("function", [add_noise, velocity_target])
def test_the_noise_schedule(function: Callable[..., Tensor]) -> None:
    x_0, noise = torch.randn(2, 3, 4, 4, 5, 5)
    t = torch.tensor([1, 500, 999])
    # sqrt(1 - a) loses four digits where a is close to 1.
    same_on_both(lambda device: function(x_0.to(device), noise.to(device), ALPHAS, t.to(device)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the attention does not return")
@pytest.mark.parametrize(("prediction_type", "low_rank"), [("v_prediction", True), ("epsilon", False)])
def test_a_whole_step_with_captures(prediction_type: Any, low_rank: bool) -> None:
    def step(device: torch.device) -> Any:
        model = as_velocity_model(cogvideox().float().to(device))
        erasers = attach_erasers(model, rank=3)
        parameters = [parameter for eraser in erasers.values() for parameter in eraser.parameters()]
        generator = torch.Generator().manual_seed(0)
        for parameter in parameters:
            value = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(value.to(device))
        x_t, _, cond = on(device, inputs())
        t, maps, outputs = torch.tensor([100, 900], device=device), {}, {}
        with torch.no_grad(), AttnMapsCapture(model, maps, token_indices=[3, 7]):
            model(x_t, t, cond)
        mask = get_mask(maps, None, 0.3, 8, 8, patch_size=2)["average_mask"]
        loss_fn = T2VUnlearningLoss(ALPHAS, channel_dim=2, prediction_type=prediction_type, normalization="mean")
        with EraserOutputsCapture(model, erasers, outputs, low_rank=low_rank):
            loss, entries = loss_fn(
                None, model, x_t, t, cond, cond / 2, uncond=cond * 0, mask=mask, eraser_outputs=outputs
            )
        return maps, mask, loss, entries, torch.autograd.grad(loss, parameters)

    same_on_both(step, rtol=1e-3, atol=1e-4)


def test_position_embeddings_in_float64() -> None:
    """diffusers keeps those of CogVideoX-2B in float64."""
    transformer = cogvideox()
    assert transformer.patch_embed.pos_embedding.dtype == torch.float64
    round_buffers([transformer, None], torch.device("cpu"))
    assert transformer.patch_embed.pos_embedding.dtype == torch.float64

    def velocity(device: torch.device) -> Tensor:
        x_t, t, cond = on(device, inputs(batch=1))
        round_buffers([transformer], device)
        with torch.no_grad():
            return as_velocity_model(transformer.to(device))(x_t, t, cond)

    same_on_both(velocity)


def test_models_are_loaded_without_float64(
    tiny_pipeline: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastunlearn.devices.widest_dtype", lambda device: torch.float32)
    model = load_model(tiny_pipeline("cogvideox"), dtype=torch.bfloat16, device="cpu", vae=True)
    assert {buffer.dtype for buffer in model.experts[0].buffers()} == {torch.float32}


def test_noise_for_flow_matching() -> None:
    model, (x_0, t, _) = tiny_model("wan"), wan_inputs()
    model.scheduler = FlowMatchEulerDiscreteScheduler()
    same_on_both(lambda device: model.add_noise(x_0.to(device), x_0.flip(-1).to(device), t.float().to(device)))


def test_sums_of_metrics() -> None:
    def ratio(device: torch.device) -> float:
        metric = Ratio()
        metric.add(torch.tensor(5.0), Sums(torch.tensor([1.0, 2.0], device=device), torch.ones(2, device=device)))
        assert metric.total is not None
        return metric.total

    same_on_both(lambda device: torch.tensor(ratio(device)))
