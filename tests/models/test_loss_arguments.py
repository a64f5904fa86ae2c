"""The arguments of the loss modules: original signatures, and what wrong arguments raise."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from loss_cases import ALPHAS, MASK, X_T, T, Table
from tiny_models import GRID, cogvideox, inputs
from torch import Tensor

import fastunlearn
from fastunlearn import (
    ConceptPreservationLoss,
    MaskLocalizationLoss,
    NegativelyGuidedVelocityLoss,
    T2VUnlearningLoss,
    as_velocity_model,
)

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # unexpected warnings are errors


REQUIRED = inspect.Parameter.empty
SIGNATURES: dict[Any, dict[str, Any]] = {
    T2VUnlearningLoss: {
        "alphas_cumprod": REQUIRED,
        "unlearning_weight": 1.0,
        "preservation_weight": 0.5,
        "localization_weight": 1.0,
        "guidance_scale": 7.5,
        "loss_type": "l2",
    },
    T2VUnlearningLoss.forward: {
        "self": REQUIRED,
        "model_original": REQUIRED,
        "model_unlearned": REQUIRED,
        "x_t": REQUIRED,
        "t": REQUIRED,
        "cond_target": REQUIRED,
        "cond_preserve": None,
        "cond_neg": None,
        "uncond": None,
        "mask": None,
        "eraser_outputs": None,
    },
    NegativelyGuidedVelocityLoss: {
        "alphas_cumprod": REQUIRED,
        "guidance_scale": 7.5,
        "loss_type": "l2",
        "reduction": "mean",
    },
    NegativelyGuidedVelocityLoss.forward: {
        "self": REQUIRED,
        "model": REQUIRED,
        "x_t": REQUIRED,
        "t": REQUIRED,
        "cond_c": REQUIRED,
        "cond_neg": None,
        "uncond": None,
        "mask": None,
    },
    ConceptPreservationLoss: {"loss_type": "l2", "reduction": "mean"},
    ConceptPreservationLoss.forward: {
        "self": REQUIRED,
        "model_original": REQUIRED,
        "model_unlearned": REQUIRED,
        "x_t": REQUIRED,
        "t": REQUIRED,
        "cond_preserve": REQUIRED,
        "mask": None,
    },
    MaskLocalizationLoss: {"loss_type": "l2", "reduction": "mean"},
    MaskLocalizationLoss.forward: {"self": REQUIRED, "eraser_outputs": REQUIRED, "mask": REQUIRED},
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_positional_arguments_are_the_originals(function: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(SIGNATURES[function].items())
    assert all(p.default is not REQUIRED for p in parameters if p.kind is p.KEYWORD_ONLY)


def test_the_original_names_are_exported() -> None:
    names = {"T2VUnlearningLoss", "AttnMapsCapture", "EraserOutputsCapture", "get_mask", "AdapterEraser"}
    assert names <= set(fastunlearn.__all__)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: T2VUnlearningLoss([0.5]), TypeError, "alphas_cumprod: expected a tensor, got list"),
        (
            lambda: T2VUnlearningLoss(ALPHAS[None]),
            ValueError,
            r"alphas_cumprod: expected .*\(timesteps,\), got \(1, 11\)",
        ),
        (
            lambda: T2VUnlearningLoss(None, prediction_type="epsilon"),
            ValueError,
            "alphas_cumprod: expected .*'epsilon', got None",
        ),
        (lambda: T2VUnlearningLoss(ALPHAS, prediction_type="v"), ValueError, "prediction_type: expected .* got 'v'"),
        (lambda: T2VUnlearningLoss(ALPHAS, loss_type="huber"), ValueError, "loss_type: expected .* got 'huber'"),
        (lambda: T2VUnlearningLoss(ALPHAS, normalization="max"), ValueError, "normalization: expected .* got 'max'"),
        (
            lambda: T2VUnlearningLoss(ALPHAS, mask_normalization="m"),
            ValueError,
            "mask_normalization: expected .* got 'm'",
        ),
        (lambda: T2VUnlearningLoss(ALPHAS, torch.ones(())), TypeError, "unlearning_weight: expected .* got Tensor"),
        (lambda: T2VUnlearningLoss(ALPHAS, 1.0, "0.5"), TypeError, "preservation_weight: expected .* got str"),
        (lambda: T2VUnlearningLoss(ALPHAS, 1.0, 0.5, None), TypeError, "localization_weight: expected .* got NoneType"),
        (lambda: NegativelyGuidedVelocityLoss(ALPHAS, "7"), TypeError, "guidance_scale: expected a number, got str"),
        (lambda: NegativelyGuidedVelocityLoss(ALPHAS, reduction="avg"), ValueError, "reduction: expected .* got 'avg'"),
        (lambda: ConceptPreservationLoss("l3"), ValueError, "loss_type: expected .* got 'l3'"),
        (lambda: MaskLocalizationLoss("l3"), ValueError, "loss_type: expected .* got 'l3'"),
        (lambda: MaskLocalizationLoss(reduction="avg"), ValueError, "reduction: expected .* got 'avg'"),
    ],
)
def test_bad_construction(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eraser_outputs": {}}, ValueError, "mask: expected .* with eraser_outputs, got None"),
        (
            {"localization_mask": torch.ones(2, 3, 4, 5)},
            ValueError,
            "eraser_outputs: expected .* with localization_mask, got None",
        ),
        ({"mask": MASK, "eraser_outputs": [X_T]}, TypeError, "eraser_outputs: expected a mapping .* got list"),
        ({"mask": {"average_mask": MASK}}, TypeError, r"mask: expected a tensor.*'average_mask'.* got dict"),
        ({"v_uncond": 1.0}, TypeError, "v_uncond: expected a tensor, got float"),
        ({"v_cond": [X_T]}, TypeError, "v_cond: expected a tensor, got list"),
        ({"v_preserve": X_T}, ValueError, "cond_preserve: expected .* with v_preserve, got None"),
        ({"x_t_preserve": X_T}, ValueError, "cond_preserve: expected .* with x_t_preserve, got None"),
        ({"t_preserve": T}, ValueError, "cond_preserve: expected .* with t_preserve, got None"),
        ({"cond_preserve": "kept", "v_preserve": "v"}, TypeError, "v_preserve: expected a tensor, got str"),
    ],
)
def test_bad_calls_reach_no_model(
    student: Table, teacher: Table, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        T2VUnlearningLoss(ALPHAS)(teacher, student, X_T, T, "concept", uncond="empty", **options)
    assert not student.calls
    assert not teacher.calls


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_outputs_without_names_are_refused(reduction: str) -> None:
    with pytest.raises(TypeError, match="eraser_outputs: expected a mapping .* got list"):
        MaskLocalizationLoss(reduction=reduction)([torch.ones(2, 60, 5)], MASK)


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        (T.float(), TypeError, "t: expected one of the dtypes.*float32"),
        (T + 1, ValueError, "t: expected timesteps from 0 to 10, got 11"),
        (torch.tensor([1, 2, 3]), ValueError, r"t: expected one timestep or \(2,\), got shape \(3,\)"),
    ],
)
def test_bad_timesteps(student: Table, teacher: Table, t: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        T2VUnlearningLoss(ALPHAS, prediction_type="epsilon")(teacher, student, X_T, t, "concept", uncond="empty")


def test_bad_models(student: Table, teacher: Table) -> None:
    transformer = cogvideox()
    wrapped = as_velocity_model(transformer)
    x_t, t, cond = inputs()
    loss_fn = T2VUnlearningLoss(ALPHAS)
    for models, name in (((transformer, wrapped), "model_original"), ((wrapped, transformer), "model_unlearned")):
        with pytest.raises(TypeError, match=rf"{name}: expected .* \(x_t, t, cond\) .*as_velocity_model"):
            loss_fn(*models, x_t, t, cond, uncond=cond)
    with pytest.raises(TypeError, match="model_unlearned: expected .* the velocity as a tensor, got tuple"):
        loss_fn(teacher, lambda *given: (student(*given),), X_T, T, "concept", uncond="empty")
    # With channel_dim=1, the mask (B, F, h, w) would be read along (C, H, W) without an error.
    for call in (
        lambda mask: loss_fn(None, wrapped, x_t, t, cond, uncond=cond, mask=mask),
        lambda mask: NegativelyGuidedVelocityLoss(ALPHAS)(wrapped, x_t, t, cond, None, cond, mask),
        lambda mask: ConceptPreservationLoss()(None, wrapped, x_t, t, cond, mask),
    ):
        with pytest.raises(ValueError, match="channel_dim: expected 2 for this model's masks, got 1"):
            call(torch.ones(2, *GRID))
