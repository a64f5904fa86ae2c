from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import options_for, tiny_cache, tiny_model, weights

from fastunlearn import AdapterEraser
from fastunlearn.training.loop.units import Units, learning_rates, measure_units, scale_initial_weights
from fastunlearn.training.options import TargetGroup
from fastunlearn.training.train import train

TARGETS = (TargetGroup("target"), TargetGroup("other"))


@pytest.mark.parametrize(("family", "experts"), [("cogvideox", 1), ("hunyuan_video", 1), ("wan", 2)])
def test_units_are_measured_without_what_erasers_add(family: str, experts: int) -> None:
    model = tiny_model(family, experts=experts)
    cache: Any = tiny_cache(model)
    erasers = model.attach_erasers(4)

    def measured() -> Units:
        return measure_units(model, erasers, cache, TARGETS, loss_type="l2", batch_size=3)

    fresh = measured()
    for layers in erasers:
        for eraser in layers.values():
            torch.nn.init.normal_(eraser.up.weight)
    assert measured() == fresh
    points = [cache.groups[group.name].points for group in TARGETS]
    expected = torch.cat([(p.v_cond - p.v_uncond).square() for p in points]).mean().item()
    assert fresh.velocity == pytest.approx(expected, rel=1e-5)
    assert [list(sizes) for sizes in fresh.layers] == [list(layers) for layers in erasers]


def trained(output: Path, *, velocity: float = 1.0, attention: float = 1.0, **changes: Any) -> tuple[Any, list[Any]]:
    """Trains a tiny Wan whose velocities and attention outputs are larger by these factors."""
    model = tiny_model("wan")
    with torch.no_grad():
        for block in model.experts[0].transformer.blocks:  # type: ignore[attr-defined]
            for parameter in block.attn2.to_out[0].parameters():
                parameter *= attention
        for parameter in model.experts[0].transformer.proj_out.parameters():  # type: ignore[union-attr]
            parameter *= velocity
    metrics: list[Any] = []
    options = options_for(output, relative=True, learning_rate=0.02, max_train_steps=3, max_grad_norm=0.0, **changes)
    train(model, tiny_cache(model), output, options, on_step=lambda _, values: metrics.append(values))  # type: ignore[arg-type]
    return model, metrics


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_a_model_with_larger_velocities_trains_the_same(loss_type: str, tmp_path: Path) -> None:
    model, metrics = trained(tmp_path / "1", loss_type=loss_type)
    larger, larger_metrics = trained(tmp_path / "2", velocity=64.0, loss_type=loss_type)
    for expected, got in zip(metrics, larger_metrics, strict=True):
        assert got == pytest.approx(expected, rel=1e-3)
    expected, got = weights(model), weights(larger)
    assert all(torch.allclose(got[name], value, rtol=1e-3, atol=1e-6) for name, value in expected.items())


def test_the_first_step_changes_an_output_by_the_learning_rate(tmp_path: Path) -> None:
    """Whatever the rank, the width and the size of what an eraser reads: measured at its own input."""
    torch.manual_seed(0)
    for optimizer in ("adamw", "muon"):
        for rank, dim, size in ((8, 64, 1.0), (32, 256, 100.0), (128, 128, 0.01)):
            eraser = AdapterEraser(dim, rank)
            units = Units(1.0, [{"layer": size}])
            scale_initial_weights([{"layer": eraser}], units)
            x = size * torch.randn(512, dim)
            hidden = torch.nn.functional.gelu(eraser.down(x))
            rate = 0.01 * learning_rates(eraser, size, optimizer)["up.weight"]
            if optimizer == "adamw":  # every element moves by the learning rate
                step = rate * torch.ones(dim, rank)
            else:  # equal singular values, and AdamW's root mean square of 0.2
                step = 0.2 * rate * max(dim, rank) ** 0.5 * torch.linalg.qr(torch.randn(dim, rank))[0]
            change = (hidden @ step.T).square().mean().sqrt().item() / size
            assert 0.002 < change < 0.05, (optimizer, rank, dim, size, change)


def test_a_cache_without_a_concept_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    cache: Any = tiny_cache(model)
    points = cache.groups["target"].points
    cache.groups["target"].points = points._replace(v_uncond=points.v_cond)
    with pytest.raises(ValueError, match="expected target points whose velocity depends on the concept"):
        train(model, cache, tmp_path, options_for(tmp_path, relative=True))
