"""The loss modules with a tiny CogVideoX: the teacher is the model without its erasers, captures, gradients."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import ALPHAS, X_T, T, Table
from tiny_models import GRID, LAYERS, cogvideox, inputs, train_a_little
from torch import Tensor

from fastunlearn import (
    ConceptPreservationLoss,
    EraserOutputsCapture,
    MaskLocalizationLoss,
    NegativelyGuidedVelocityLoss,
    T2VUnlearningLoss,
    as_velocity_model,
    attach_erasers,
    erasers_disabled,
)
from fastunlearn.testing import oracle

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # unexpected warnings are errors


@pytest.fixture(scope="module")
def erased() -> tuple[Any, Any, dict[str, Any]]:
    """The original model, a copy with erasers that have an effect, and these erasers."""
    original = as_velocity_model(cogvideox())
    model = copy.deepcopy(original)
    erasers = attach_erasers(model, rank=4)
    train_a_little(erasers)
    return original, model, erasers


def cogvideox_arguments() -> dict[str, Any]:
    x_t, t, cond = inputs()
    kept, uncond = inputs(seed=5)[2], inputs(seed=6)[2]
    mask = (torch.rand(2, *GRID, generator=torch.Generator().manual_seed(3)) > 0.6).float()
    return {"x_t": x_t, "t": t, "cond_target": cond, "cond_preserve": kept, "uncond": uncond, "mask": mask}


@pytest.mark.parametrize("frozen", ["none", "same", "wrapper", "copy"])
def test_the_teacher_is_the_model_without_erasers(erased: Any, frozen: str) -> None:
    original, model, erasers = erased
    wrapper = as_velocity_model(model.transformer)
    assert wrapper is not model
    teacher = {"none": None, "same": model, "wrapper": wrapper, "copy": original}[frozen]
    arguments = cogvideox_arguments()
    x_t, t, cond, uncond = (arguments[name] for name in ("x_t", "t", "cond_target", "uncond"))
    loss, entries = T2VUnlearningLoss(None, guidance_scale=2.0, channel_dim=2)(teacher, model, **arguments)
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        v_uncond, v_cond, v_kept = (original(x_t, t, c) for c in (uncond, cond, arguments["cond_preserve"]))
        prediction, kept = model(x_t, t, cond), model(x_t, t, arguments["cond_preserve"])
    assert (prediction - v_cond).norm() > 0.01 * v_cond.norm()
    exact = oracle.velocity_loss(
        prediction, v_uncond, v_cond, guidance_scale=2.0, mask=arguments["mask"], channel_dim=2
    )
    np.testing.assert_allclose(entries["unlearning/unlearning_loss"], exact["loss"], rtol=1e-5)
    np.testing.assert_allclose(entries["unlearning/v_neg_norm"], exact["target_norm"], rtol=1e-5)
    exact_kept = oracle.velocity_loss(kept, v_kept, mask=arguments["mask"], channel_dim=2)
    np.testing.assert_allclose(entries["preservation/preservation_loss"], exact_kept["loss"], rtol=1e-5)
    np.testing.assert_allclose(entries["preservation/v_orig_norm"], exact_kept["target_norm"], rtol=1e-5)
    np.testing.assert_allclose(loss.detach(), exact["loss"] + 0.5 * exact_kept["loss"], rtol=1e-5)
    trained = {id(parameter) for eraser in erasers.values() for parameter in eraser.parameters()}
    for name, parameter in [*model.named_parameters(), *original.named_parameters()]:
        if id(parameter) in trained:
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


class Wrapper(torch.nn.Module):
    """Holds the model as data parallelism does."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any) -> Tensor:
        return self.module(*given)


class Plain:
    """Holds the model where no search through modules finds it."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __call__(self, *given: Any) -> Tensor:
        return self.held(*given)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: lambda *given: model(*given),
        lambda model: Plain(lambda *given: model(*given)),
        lambda model: Wrapper(lambda *given: model(*given)),
        lambda model: Wrapper(Wrapper(model)),
        lambda model: as_velocity_model(model.transformer),
        lambda model: torch.compile(lambda *given: model(*given), backend="eager"),
    ],
    ids=["lambda", "object", "module around a lambda", "data parallel", "velocity model", "compiled"],
)
def test_a_wrapper_of_the_erased_model_is_no_teacher_of_its_own(erased: Any, wrap: Any) -> None:
    original, model, _ = erased
    arguments = cogvideox_arguments()
    loss_fn = T2VUnlearningLoss(None, guidance_scale=2.0, channel_dim=2)
    _, expected = loss_fn(original, model, **arguments)
    _, entries = loss_fn(wrap(model), wrap(model), **arguments)
    assert expected["preservation/preservation_loss"] > 0
    assert entries.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(entries[name], value, rtol=1e-6, atol=0, msg=name)
    x_t, t, cond, uncond = (arguments[name] for name in ("x_t", "t", "cond_target", "uncond"))
    unlearning, preservation = NegativelyGuidedVelocityLoss(None), ConceptPreservationLoss()
    losses = [
        unlearning(wrap(model), x_t, t, cond, None, uncond, model_original=teacher)[0]
        for teacher in (original, wrap(model))
    ] + [preservation(teacher, wrap(model), x_t, t, cond)[0] for teacher in (original, wrap(model))]
    torch.testing.assert_close(losses[::2], losses[1::2], rtol=1e-6, atol=0)


def test_a_function_without_a_teacher_is_called_without_its_erasers(erased: Any) -> None:
    original, model, _ = erased
    x_t, t, cond = inputs()
    expected, _ = ConceptPreservationLoss()(original, model, x_t, t, cond)
    with pytest.warns(UserWarning, match="the model is a function: unless it calls a model with erasers"):
        loss, _ = ConceptPreservationLoss()(None, lambda *given: model(*given), x_t, t, cond)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_erasers_of_a_teacher_of_its_own_are_off_too(erased: Any) -> None:
    original, model, _ = erased
    arguments = cogvideox_arguments()
    teacher = copy.deepcopy(model)
    loss_fn = T2VUnlearningLoss(None, channel_dim=2)
    assert torch.equal(loss_fn(teacher, model, **arguments)[0], loss_fn(original, model, **arguments)[0])
    x_t, t = arguments["x_t"], arguments["t"]
    with torch.no_grad():  # to keep them on, pass velocities
        given = {
            name: teacher(x_t, t, arguments[condition])
            for name, condition in (("v_cond", "cond_target"), ("v_uncond", "uncond"), ("v_preserve", "cond_preserve"))
        }
    loss, entries = loss_fn(teacher, model, **arguments, **given)
    assert entries["preservation/preservation_loss"] == 0
    assert not torch.isclose(loss, loss_fn(original, model, **arguments)[0], rtol=1e-3)


def test_the_single_loss_modules_find_the_teacher_too(erased: Any) -> None:
    original, model, _ = erased
    x_t, t, cond = inputs()
    uncond = inputs(seed=6)[2]
    unlearning = NegativelyGuidedVelocityLoss(None)
    by_itself, apart = (unlearning(model, x_t, t, cond, None, uncond, model_original=m)[0] for m in (None, original))
    torch.testing.assert_close(by_itself, apart, rtol=1e-6, atol=0)
    with erasers_disabled(model):
        assert not torch.isclose(unlearning(model, x_t, t, cond, None, uncond)[0], apart, rtol=1e-3)
    preservation = ConceptPreservationLoss()
    losses = [preservation(m, model, x_t, t, cond)[0] for m in (None, model, original)]
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[1], losses[2], rtol=1e-6, atol=0)
    assert losses[2] > 0


@pytest.mark.parametrize("original", ["none", "same"])
@pytest.mark.parametrize("as_module", [True, False])
def test_a_model_that_would_be_its_own_target_causes_one_warning(
    student: Table, original: str, as_module: bool
) -> None:
    conditions: dict[Any, dict[str, str]] = {
        T2VUnlearningLoss(ALPHAS): {"cond_target": "concept", "cond_preserve": "kept", "uncond": "empty"},
        ConceptPreservationLoss(): {"cond_preserve": "kept"},
    }
    model = student if as_module else lambda *given: student(*given)
    for loss_fn, given in conditions.items():
        with pytest.warns(UserWarning, match="pass a frozen model_original") as caught:
            for _ in range(2):
                loss_fn(None if original == "none" else model, model, x_t=X_T, t=T, **given)
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("frozen", ["none", "copy"])
def test_a_live_capture_saves_a_forward_pass(erased: Any, preserve: bool, frozen: str) -> None:
    original, model, erasers = erased
    teacher = None if frozen == "none" else original
    loss_fn = T2VUnlearningLoss(None, channel_dim=2)
    arguments = cogvideox_arguments()
    if not preserve:
        del arguments["cond_preserve"]
    captured: dict[str, Tensor] = {}
    gradients, calls = [], []
    losses: list[tuple[Tensor, dict[str, Tensor]]] = []
    counter = model.register_forward_hook(lambda *_: calls[-1].append(1))
    for live in (False, True):
        model.zero_grad()
        calls.append([])
        outputs: dict[str, Tensor] = {}
        with EraserOutputsCapture(model, erasers, outputs):
            if live:
                losses.append(loss_fn(teacher, model, **arguments, eraser_outputs=outputs))
            else:
                model(arguments["x_t"], arguments["t"], arguments["cond_target"])
        if not live:
            captured = {name: output.detach().clone() for name, output in outputs.items()}
            losses.append(loss_fn(teacher, model, **arguments, eraser_outputs=outputs))
        losses[-1][0].backward()
        gradients.append([p.grad.clone() for eraser in erasers.values() for p in eraser.parameters()])
    counter.remove()
    assert len(calls[0]) == len(calls[1]) + 1
    (_, separate), (_, live_entries) = losses
    assert separate.keys() == live_entries.keys()
    assert separate.keys() >= {f"localization/{layer}/loss" for layer in LAYERS}
    for name, value in separate.items():
        torch.testing.assert_close(live_entries[name], value, rtol=1e-6, atol=0, msg=name)
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5 * first.abs().max().item())
    exact = oracle.localization_loss(list(captured.values()), [arguments["mask"].flatten(1)] * len(captured))
    np.testing.assert_allclose(separate["localization/total_loss"], exact["loss"], rtol=1e-5)
    for layer, term in zip(LAYERS, exact["per_layer"], strict=True):
        np.testing.assert_allclose(separate[f"localization/{layer}/loss"], term, rtol=1e-5)


def test_localization_reaches_only_erasers(erased: Any) -> None:
    _, model, erasers = erased
    x_t, t, cond = inputs()
    outputs: dict[str, Tensor] = {}
    with EraserOutputsCapture(model, erasers, outputs):
        model(x_t, t, cond)
    model.zero_grad()
    loss, _ = MaskLocalizationLoss()(outputs, cogvideox_arguments()["mask"])
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == (".erasers." in name), name
