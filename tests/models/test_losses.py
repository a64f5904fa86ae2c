"""The loss modules: values and gradients against the oracle, keys, which model is called on what, warnings."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from loss_cases import ALPHAS, MASK, SHAPE, X_T, T, Table, eraser_outputs, random
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastunlearn
from fastunlearn import (
    ConceptPreservationLoss,
    MaskLocalizationLoss,
    NegativelyGuidedVelocityLoss,
    T2VUnlearningLoss,
)
from fastunlearn.ops import definition
from fastunlearn.ops.torch_backend import blocks
from fastunlearn.testing import oracle, random_mask
from fastunlearn.testing.checks import velocity_loss_of
from fastunlearn.testing.error_bound import compare

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # unexpected warnings are errors


class Linear(nn.Module):
    """A model that takes tensors as conditions and, if `empty` is given, None."""

    def __init__(self, empty: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(4, 3, seed=7))
        self.empty = empty
        self.calls = 0

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        self.calls += 1
        shift = self.empty if cond is None and self.empty is not None else cond.mean(1) @ self.weight
        return x_t * 0.5 + (shift if isinstance(shift, float) else shift[:, :, None, None, None])


def close(actual: Tensor, eager_value: Tensor, exact: Any, terms: int = X_T.numel()) -> None:
    compare("result", actual, eager_value, exact, terms=terms, compute=torch.float32)


def check_velocity_term(
    loss: Tensor, student: Table, name: str, teachers: list[Tensor], weight: float = 1.0, **options: Any
) -> dict[str, np.ndarray]:
    """Checks a term and the gradient at the student's velocity after a backward pass. Returns the oracle's results."""
    leaf = student.velocities[name].detach().clone().requires_grad_()
    tensors = (leaf, *[x.detach() for x in teachers])
    by_eager, *_ = velocity_loss_of(tensors, definition, weight=weight, **options)
    by_eager.sum().backward()
    exact = oracle.velocity_loss(*tensors, weight=weight, **options)
    close(loss, by_eager.detach(), exact["loss"])
    close(student.velocities[name].grad, leaf.grad, exact["prediction"])
    return exact


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", ["l2", "l1"])
@pytest.mark.parametrize("as_functions", [False, True])
def test_unlearning(student: Table, teacher: Table, loss_type: str, reduction: str, as_functions: bool) -> None:
    loss_fn = NegativelyGuidedVelocityLoss(ALPHAS, 3.0, loss_type, reduction)
    models = [(lambda *given, table=table: table(*given)) if as_functions else table for table in (student, teacher)]
    loss, entries = loss_fn(models[0], X_T, T, "concept", uncond="empty", mask=MASK, model_original=models[1])
    loss.sum().backward()
    options = {"guidance_scale": 3.0, "mask": MASK, "loss_type": loss_type, "reduction": reduction}
    velocities = [teacher.velocities[name] for name in ("empty", "concept")]
    exact = check_velocity_term(loss.detach(), student, "concept", velocities, **options)
    assert entries.keys() == {"unlearning_loss", "v_pred_norm", "v_neg_norm"}
    assert torch.equal(entries["unlearning_loss"], loss.detach())
    close(entries["v_pred_norm"], student.velocities["concept"].detach().norm(), exact["prediction_norm"])
    target = fastunlearn.negatively_guided_velocity(*velocities, 3.0).detach()
    close(entries["v_neg_norm"], target.norm(), exact["target_norm"])
    assert not any(value.requires_grad for value in entries.values())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert sorted(teacher.conditions) == ["concept", "empty"]
    assert student.conditions == ["concept"]
    assert (student.grad_modes, teacher.grad_modes) == ({True}, {False})
    assert all(x_t is X_T and t is T for x_t, t, _ in student.calls + teacher.calls)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_preservation(student: Table, teacher: Table, loss_type: str, reduction: str) -> None:
    loss, entries = ConceptPreservationLoss(loss_type, reduction)(teacher, student, X_T, T, "kept", MASK)
    loss.sum().backward()
    target = teacher.velocities["kept"]
    options = {"mask": MASK, "loss_type": loss_type, "reduction": reduction}
    exact = check_velocity_term(loss.detach(), student, "kept", [target], **options)
    assert entries.keys() == {"preservation_loss", "v_orig_norm", "v_unlearn_norm"}
    assert torch.equal(entries["preservation_loss"], loss.detach())
    close(entries["v_orig_norm"], target.detach().norm(), exact["target_norm"])
    close(entries["v_unlearn_norm"], student.velocities["kept"].detach().norm(), exact["prediction_norm"])
    assert not any(value.requires_grad for value in entries.values())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("mask_normalization", ["all", "mask"])
def test_channel_dim_and_mask_normalization(student: Table, teacher: Table, mask_normalization: str) -> None:
    # (B, F, C, H, W) = (2, 3, 4, 6, 5). With channel_dim=1 this mask would be read along other dimensions.
    mask = torch.rand(2, 3, 3, 5, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"channel_dim": 2, "mask_normalization": mask_normalization}
    total = T2VUnlearningLoss(ALPHAS, guidance_scale=2.0, **options)
    loss, entries = total(teacher, student, X_T, T, "concept", "kept", uncond="empty", mask=mask)
    loss.backward()
    velocities = [teacher.velocities[name] for name in ("empty", "concept")]
    key = "unlearning_loss_weighted"
    check_velocity_term(entries[key], student, "concept", velocities, guidance_scale=2.0, mask=mask, **options)
    key, kept = "preservation_loss_weighted", [teacher.velocities["kept"]]
    check_velocity_term(entries[key], student, "kept", kept, mask=mask, weight=0.5, **options)


def test_a_mask_read_along_other_axes_is_refused() -> None:
    """CogVideoX's latents with the default `channel_dim`, and models that are plain functions, which know no better."""
    shape, mask = (2, 5, 4, 6, 8), random_mask("bool", (2, 5, 3, 4))
    student, teacher = Table(0, shape), Table(10, shape)
    models = [(lambda *given, table=table: table(*given)) for table in (teacher, student)]

    def loss_of(channel_dim: int) -> Tensor:
        loss_fn = ConceptPreservationLoss(channel_dim=channel_dim, mask_normalization="mask")
        return loss_fn(*models, random(*shape, seed=1), T, "kept", mask)[0]

    with pytest.raises(
        ValueError, match=r"mask: expected sizes that divide \(4, 6, 8\).* \(2 would fit\).* patch_size"
    ):
        loss_of(1)
    error = (student.velocities["kept"] - teacher.velocities["kept"]).detach().double().square()
    weights = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, None].double().expand(shape)
    torch.testing.assert_close(loss_of(2).double(), (error * weights).sum() / weights.sum())


@pytest.mark.parametrize(
    ("shape", "mask_frames", "channel_dim"),
    [
        ((2, 2, 4, 6, 8), 2, 1),  # two frames, taken for half of the channels
        ((2, 4, 2, 6, 8), 2, 2),
        ((2, 4, 4, 6, 8), 4, 1),  # as many frames as channels
        ((2, 4, 4, 6, 8), 2, 2),
    ],
)
def test_a_mask_that_fits_other_axes_as_well_warns_once(
    shape: tuple[int, ...], mask_frames: int, channel_dim: int
) -> None:
    loss_fn = ConceptPreservationLoss(channel_dim=channel_dim)
    call = lambda: loss_fn(  # noqa: E731
        Table(0, shape), Table(10, shape), random(*shape, seed=1), T, "kept", torch.ones(2, mask_frames, 3, 4)
    )
    with pytest.warns(UserWarning, match=rf"mask: .* with channel_dim={3 - channel_dim} as well as") as caught:
        call()
        call()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("mask_size", [(2, 2, 12, 16), (2, 2, 4, 3)])  # finer, and height and width exchanged
def test_a_mask_that_fits_no_axes_raises_and_does_not_warn(mask_size: tuple[int, ...]) -> None:
    shape = (2, 2, 4, 6, 8)
    loss_fn = ConceptPreservationLoss()
    with warnings.catch_warnings(), pytest.raises(ValueError, match="mask: expected sizes that divide"):
        warnings.simplefilter("error")
        loss_fn(Table(0, shape), Table(10, shape), random(*shape, seed=1), T, "kept", torch.ones(mask_size))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", ["l2", "l1"])
@pytest.mark.parametrize("normalization", ["sum", "mean", "background_mean"])
def test_localization(loss_type: str, reduction: str, normalization: str) -> None:
    outputs = eraser_outputs(first=(2, 12, 5), second=(2, 12, 8), feature_map=(2, 7, 3, 2, 2))
    masks = {name: torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(len(name))) for name in outputs}
    loss, entries = MaskLocalizationLoss(loss_type, reduction, normalization=normalization)(outputs, masks)
    loss.sum().backward()
    flat = [mask if name == "feature_map" else mask.flatten(1) for name, mask in masks.items()]
    weight = 1.0 if reduction == "mean" else len(outputs)
    options: dict[str, Any] = {"loss_type": loss_type, "normalization": normalization}
    leaves = [output.detach().clone().requires_grad_() for output in outputs.values()]
    exact = oracle.localization_loss(leaves, flat, weight=weight, **options)
    by_eager, _ = definition.localization_loss(leaves, flat, weight=weight, **options)
    by_eager.backward()
    per_layer = [
        definition.localization_loss([leaf], [mask], **options)[0] for leaf, mask in zip(leaves, flat, strict=True)
    ]
    if reduction == "none":
        close(loss.detach(), torch.stack(per_layer).detach(), exact["per_layer"])
    else:
        close(loss.detach(), by_eager.detach(), exact["loss"])
    for index, (name, output) in enumerate(outputs.items()):
        close(output.grad, leaves[index].grad, exact["gradients"][index])
        close(entries[f"{name}/loss"], per_layer[index].detach(), exact["per_layer"][index])
    assert entries.keys() == {"total_loss", "num_layers", "first/loss", "second/loss", "feature_map/loss"}
    assert torch.equal(entries["total_loss"], loss.detach())
    assert entries["num_layers"] == 3
    assert not any(value.requires_grad for value in entries.values())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_localization_of_nothing(reduction: str) -> None:
    loss, entries = MaskLocalizationLoss(reduction=reduction)({}, MASK)
    assert loss.sum() == 0
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert entries.keys() == {"total_loss", "num_layers"}
    assert entries["num_layers"] == 0


@pytest.mark.parametrize(
    "weights", [(1.0, 0.5, 1.0), (2.0, 0.25, 3.0), (0.0, 0.5, 1.0), (1.0, 0.0, 0.5), (1.0, 0.5, 0)]
)
def test_the_weighted_sum_of_all_terms(student: Table, teacher: Table, weights: tuple[float, float, float]) -> None:
    outputs = eraser_outputs(first=(2, 60, 5), second=(2, 60, 8))
    loss_fn = T2VUnlearningLoss(ALPHAS, *weights, 3.0)
    loss, entries = loss_fn(
        teacher, student, X_T, T, "concept", "kept", uncond="empty", mask=MASK, eraser_outputs=outputs
    )
    loss.backward()
    exact = [
        oracle.velocity_loss(
            *[x.detach() for x in (student.velocities["concept"], *map(teacher.velocities.get, ("empty", "concept")))],
            guidance_scale=3.0,
            mask=MASK,
        ),
        oracle.velocity_loss(student.velocities["kept"], teacher.velocities["kept"], mask=MASK),
        oracle.localization_loss(list(outputs.values()), [MASK.flatten(1)] * 2),
    ]
    # The rounding error of float32 sums of at most 600 numbers of the same sign.
    tolerance: dict[str, Any] = {"rtol": 4e-6, "atol": 0}
    terms = (
        ("unlearning_loss_weighted", "unlearning/unlearning_loss"),
        ("preservation_loss_weighted", "preservation/preservation_loss"),
        ("localization_loss_weighted", "localization/total_loss"),
    )
    for (weighted, unweighted), term, weight in zip(terms, exact, weights, strict=True):
        np.testing.assert_allclose(entries[weighted], weight * term["loss"], **tolerance)
        np.testing.assert_allclose(entries[unweighted], term["loss"], **tolerance)
    expected = sum(weight * term["loss"] for weight, term in zip(weights, exact, strict=True))
    np.testing.assert_allclose(loss.detach(), expected, **tolerance)
    assert torch.equal(entries["total_loss"], loss.detach())
    gradients = [
        (weights[0] * exact[0]["prediction"], student.velocities["concept"]),
        (weights[1] * exact[1]["prediction"], student.velocities["kept"]),
        *zip([weights[2] * g for g in exact[2]["gradients"]], outputs.values(), strict=True),
    ]
    for gradient, leaf in gradients:
        if np.any(gradient):
            np.testing.assert_allclose(leaf.grad, gradient, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())
        else:
            assert leaf.grad is None
    assert not any(value.requires_grad for value in entries.values())
    assert all(parameter.grad is None for parameter in teacher.parameters())


ORIGINAL_KEYS = {
    "total_loss",
    "unlearning_loss_weighted",
    "preservation_loss_weighted",
    "localization_loss_weighted",
    "unlearning/unlearning_loss",
    "unlearning/v_pred_norm",
    "unlearning/v_neg_norm",
    "preservation/preservation_loss",
    "preservation/v_orig_norm",
    "preservation/v_unlearn_norm",
    "localization/total_loss",
    "localization/num_layers",
    "localization/first/loss",
}


def test_the_keys_of_the_loss_dict(student: Table, teacher: Table) -> None:
    loss_fn = T2VUnlearningLoss(ALPHAS)
    terms = {"mask": MASK, "eraser_outputs": eraser_outputs(first=(2, 60, 5))}
    _, entries = loss_fn(teacher, student, X_T, T, "concept", "kept", uncond="empty", **terms)
    assert entries.keys() == ORIGINAL_KEYS
    assert all(isinstance(value, Tensor) and value.dim() == 0 for value in entries.values())
    _, entries = loss_fn(teacher, student, X_T, T, "concept", uncond="empty")
    assert entries.keys() == {key for key in ORIGINAL_KEYS if "/" not in key or key.startswith("unlearning/")}
    assert entries["preservation_loss_weighted"] == entries["localization_loss_weighted"] == 0
    assert entries["total_loss"] == entries["unlearning_loss_weighted"] == entries["unlearning/unlearning_loss"] > 0


def test_uncond_wins_over_cond_neg_and_a_warning_says_so_once(student: Table, teacher: Table) -> None:
    loss_fn = T2VUnlearningLoss(ALPHAS)
    for _ in range(2):
        loss_fn(teacher, student, X_T, T, "concept", cond_neg="negative")
    assert teacher.conditions == ["negative", "concept"] * 2
    teacher.calls.clear()
    with pytest.warns(UserWarning, match="both uncond and cond_neg were given: uncond is used") as caught:
        for _ in range(2):
            loss_fn(teacher, student, X_T, T, "concept", cond_neg="negative", uncond="empty")
    assert teacher.conditions == ["empty", "concept"] * 2
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("total", [True, False])
def test_zeros_stand_in_for_none_and_a_warning_says_so_once(total: bool) -> None:
    cond = random(2, 6, 4, seed=1)
    teacher, student = Linear(), Linear()

    def loss(loss_fn: Any, **conditions: Any) -> Tensor:
        models = {"model_original": teacher, "model_unlearned" if total else "model": student}
        return loss_fn(x_t=X_T, t=T, **models, **{"cond_target" if total else "cond_c": cond}, **conditions)[0]

    loss_fn: Any = (T2VUnlearningLoss if total else NegativelyGuidedVelocityLoss)(ALPHAS)
    with pytest.warns(UserWarning, match="zeros of cond_c's shape") as caught:
        first, second = loss(loss_fn), loss(loss_fn)
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(first, second)
    assert torch.equal(first, loss(loss_fn, uncond=torch.zeros_like(cond)))
    assert not torch.equal(first, loss(loss_fn, uncond=cond))


def test_a_model_that_takes_none_is_given_none() -> None:
    cond = random(2, 6, 4, seed=1)
    teacher = Linear(empty=2.0)
    loss, _ = NegativelyGuidedVelocityLoss(None, 3.0)(Linear(), X_T, T, cond, model_original=teacher)
    assert teacher.calls == 2
    target = fastunlearn.negatively_guided_velocity(teacher(X_T, T, None), teacher(X_T, T, cond), 3.0)
    assert torch.equal(loss, fastunlearn.velocity_loss(Linear()(X_T, T, cond), target).loss)


def test_errors_of_the_model_are_not_taken_for_a_refusal_of_none(student: Table) -> None:
    def broken(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        raise ValueError("broken anyway")

    def out_of_memory(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        if cond is None:
            raise RuntimeError("out of memory")
        return x_t

    # A warning would be an error here. The one about zeros must not come, because zeros were not used.
    loss_fn = T2VUnlearningLoss(ALPHAS)
    with pytest.raises(ValueError, match="broken anyway"):
        loss_fn(broken, student, X_T, T, torch.zeros(2, 6, 4))
    with pytest.raises(RuntimeError, match="out of memory"):
        loss_fn(out_of_memory, student, X_T, T, torch.zeros(2, 6, 4))
    with pytest.raises(ValueError, match="broken anyway"):
        loss_fn(broken, student, X_T, T, "concept")


def test_given_teacher_tensors_replace_calls_and_get_no_gradient(student: Table, teacher: Table) -> None:
    loss_fn = T2VUnlearningLoss(ALPHAS, guidance_scale=3.0)
    expected, _ = loss_fn(teacher, student, X_T, T, "concept", "kept", uncond="empty", mask=MASK)
    teacher.calls.clear()
    given = {
        "v_uncond": teacher.velocities["empty"],
        "v_cond": teacher.velocities["concept"],
        "v_preserve": teacher.velocities["kept"],
    }
    left = {"v_uncond": "empty", "v_cond": "concept", "v_preserve": "kept"}
    for name, velocity in given.items():
        conditions = [cond for key, cond in left.items() if key != name]
        loss, _ = loss_fn(teacher, student, X_T, T, "concept", "kept", uncond="empty", mask=MASK, **{name: velocity})
        assert torch.equal(loss, expected)
        assert teacher.conditions == conditions
        teacher.calls.clear()
    # If all of them are given, no frozen model is needed, and no warning says that it is missing.
    for original in (None, student, teacher):
        student.calls.clear()
        loss, _ = loss_fn(original, student, X_T, T, "concept", "kept", mask=MASK, **given)
        loss.backward()
        assert torch.equal(loss, expected)
        assert student.conditions == ["concept", "kept"]
    assert not teacher.calls
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_that_enables_gradients_still_gets_none(student: Table, teacher: Table) -> None:
    with_gradients = torch.enable_grad()(teacher.forward)
    T2VUnlearningLoss(ALPHAS)(with_gradients, student, X_T, T, "concept", "kept", uncond="empty")[0].backward()
    assert student.velocities["concept"].grad.any()
    assert student.velocities["kept"].grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_mask_applies_to_preservation_only_at_the_same_latents(student: Table, teacher: Table) -> None:
    loss_fn = T2VUnlearningLoss(ALPHAS)
    other_x_t, other_t = random(*SHAPE, seed=60), torch.tensor([1, 2])
    kept = (student.velocities["kept"].detach(), teacher.velocities["kept"].detach())
    masked, unmasked = (fastunlearn.velocity_loss(*kept, mask=mask).loss for mask in (MASK, None))
    assert masked < unmasked * 0.9

    def preservation(**options: Any) -> Tensor:
        student.calls.clear()
        teacher.calls.clear()
        _, entries = loss_fn(teacher, student, X_T, T, "concept", "kept", uncond="empty", **options)
        return entries["preservation/preservation_loss"]

    torch.testing.assert_close(preservation(), unmasked, rtol=1e-6, atol=0)
    torch.testing.assert_close(preservation(mask=MASK), masked, rtol=1e-6, atol=0)
    torch.testing.assert_close(preservation(mask=MASK, t_preserve=other_t), masked, rtol=1e-6, atol=0)
    assert student.calls[-1][0] is teacher.calls[-1][0] is X_T
    assert student.calls[-1][1] is teacher.calls[-1][1] is other_t
    assert student.calls[0][1] is T
    loss = preservation(mask=MASK, x_t_preserve=other_x_t, t_preserve=other_t)
    torch.testing.assert_close(loss, unmasked, rtol=1e-6, atol=0)
    assert student.calls[-1][0] is teacher.calls[-1][0] is other_x_t
    assert student.calls[0][0] is X_T
    preservation(mask=MASK, x_t_preserve=other_x_t)
    assert student.calls[-1][1] is T


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_prediction_types(student: Table, teacher: Table, prediction_type: str, loss_type: str) -> None:
    x_t_preserve, t_preserve = random(*SHAPE, seed=60), torch.tensor([0, 5])
    loss_fn = T2VUnlearningLoss(ALPHAS, guidance_scale=3.0, loss_type=loss_type, prediction_type=prediction_type)
    apart = {"x_t_preserve": x_t_preserve, "t_preserve": t_preserve}
    loss, entries = loss_fn(teacher, student, X_T, T, "concept", "kept", uncond="empty", **apart)
    loss.backward()
    for name, teachers, t, weight, key, guidance in (
        ("concept", ("empty", "concept"), T, 1.0, "unlearning_loss_weighted", {"guidance_scale": 3.0}),
        ("kept", ("kept",), t_preserve, 0.5, "preservation_loss_weighted", {}),
    ):
        weights = torch.tensor(oracle.velocity_error_weight(ALPHAS, t, prediction_type, loss_type)).float()
        options = {"sample_weight": weights, "weight": weight, "loss_type": loss_type, **guidance}
        velocities = [teacher.velocities[teacher_name] for teacher_name in teachers]
        check_velocity_term(entries[key], student, name, velocities, **options)
    # Alpha is 0 at the last timestep and sigma at the first, so these samples have weight 0.
    undefined = student.velocities["concept"].grad[1] if prediction_type == "epsilon" else None
    undefined = student.velocities["kept"].grad[0] if undefined is None else undefined
    assert not undefined.any()
    assert student.velocities["concept"].grad[0].any()
    assert student.velocities["kept"].grad[1].any()


@pytest.mark.parametrize("normalization", ["sum", "mean", "background_mean"])
def test_the_localization_term_is_normalised_as_asked(student: Table, teacher: Table, normalization: str) -> None:
    outputs = eraser_outputs(first=(2, 60, 5), second=(2, 60, 8))
    loss_fn = T2VUnlearningLoss(ALPHAS, normalization=normalization)
    _, entries = loss_fn(teacher, student, X_T, T, "concept", uncond="empty", mask=MASK, eraser_outputs=outputs)
    summed = ((1 - MASK.double()).flatten(1)[..., None] * output.double() for output in outputs.values())
    background = (1 - MASK.double()).sum()
    for (name, output), outside in zip(outputs.items(), summed, strict=True):
        divisor = {"sum": 2, "mean": output.numel(), "background_mean": background * output.shape[2]}[normalization]
        expected = (outside.square().sum() / divisor).detach().float()
        torch.testing.assert_close(entries[f"localization/{name}/loss"], expected, rtol=1e-5, atol=0)


def test_localization_may_have_a_mask_of_its_own(student: Table, teacher: Table) -> None:
    loss_fn = T2VUnlearningLoss(ALPHAS)
    other = 1 - MASK
    outputs = eraser_outputs(first=(2, 60, 5), second=(2, 60, 3))

    def entries(**masks: Any) -> dict[str, Any]:
        return loss_fn(teacher, student, X_T, T, "concept", uncond="empty", eraser_outputs=outputs, **masks)[1]

    both, apart = entries(mask=MASK), entries(mask=MASK, localization_mask=other)
    alone = entries(localization_mask={"first": other, "second": other})
    term, layers = "unlearning/unlearning_loss", "localization/total_loss"
    assert torch.equal(both[term], apart[term]) and not torch.equal(both[term], alone[term])
    assert torch.equal(alone[layers], apart[layers]) and not torch.equal(both[layers], apart[layers])
    assert torch.equal(alone[layers], MaskLocalizationLoss()(outputs, other)[0])
    assert torch.equal(alone[term], entries(localization_mask=MASK)[term])


def test_one_timestep_is_used_for_all_samples(student: Table, teacher: Table) -> None:
    loss_fn = ConceptPreservationLoss(alphas_cumprod=ALPHAS, prediction_type="epsilon")
    expected = loss_fn(teacher, student, X_T, torch.tensor([7, 7]), "kept")[0]
    for t in (torch.tensor([7]), torch.tensor(7)):
        assert torch.equal(loss_fn(teacher, student, X_T, t, "kept")[0], expected)
    assert not torch.equal(loss_fn(teacher, student, X_T, torch.tensor(6), "kept")[0], expected)


def test_half_precision_does_not_round_the_schedule(student: Table, teacher: Table) -> None:
    alphas = torch.tensor([0.9, 3e-8], dtype=torch.float64)  # 0 in half precision
    options: dict[str, Any] = {"alphas_cumprod": alphas, "prediction_type": "epsilon"}
    arguments = (teacher, student, X_T, torch.tensor([0, 1]), "kept")
    expected = ConceptPreservationLoss(**options)(*arguments)[0]
    half = ConceptPreservationLoss(**options).half()
    assert torch.equal(half(*arguments)[0], expected)
    assert half.state_dict() == {}


class NoSync(TorchDispatchMode):
    """Refuses the operations that make the host wait for a GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
        return function(*args, **(kwargs or {}))


def test_no_value_is_read_back_to_the_host(student: Table, teacher: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU there is nothing to wait for, and results are looked at.
    monkeypatch.setattr(blocks, "can_look", lambda device: False)
    loss_fn = T2VUnlearningLoss(ALPHAS, 1.0, 0.5, 0.0, mask_normalization="mask", prediction_type="epsilon")
    outputs = eraser_outputs(first=(2, 60, 5))
    terms = {"mask": MASK, "eraser_outputs": outputs}
    with NoSync(), pytest.raises(AssertionError):
        X_T.sum().item()
    with NoSync():
        loss_fn(teacher, student, X_T, T, "concept", "kept", uncond="empty", **terms)[0].backward()
    assert student.velocities["concept"].grad.any()


def test_a_unet_takes_the_losses_and_nothing_else() -> None:
    """Receler's loop, for Stable Diffusion 1.4: the losses take its tensors, as their documentation says."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    sizes = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    unet, frozen = (UNet2DConditionModel(sample_size=8, cross_attention_dim=8, **blocks, **sizes) for _ in range(2))
    x_t, t, (cond, uncond) = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 2, 5, 8)
    mask = random_mask("bool", (2, 4, 4))

    def model(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return unet(x_t, t, cond).sample

    loss_fn = T2VUnlearningLoss(ALPHAS, guidance_scale=3.0, prediction_type="epsilon", normalization="background_mean")
    outputs = eraser_outputs(mid=(2, 16, 6), up=(2, 64, 8))
    loss, entries = loss_fn(
        lambda *given: frozen(*given).sample,
        model,
        x_t,
        t,
        cond,
        uncond=uncond,
        mask=mask,
        eraser_outputs=outputs,
        localization_mask={"mid": mask, "up": mask.repeat_interleave(2, 1).repeat_interleave(2, 2)},
    )
    loss.backward()
    assert any(parameter.grad.any() for parameter in unet.parameters())
    with torch.no_grad():
        tensors = model(x_t, t, cond), *(frozen(x_t, t, c).sample for c in (uncond, cond))
    weight = oracle.velocity_error_weight(ALPHAS, t, "epsilon", "l2")
    exact = oracle.velocity_loss(*tensors, guidance_scale=3.0, mask=mask, sample_weight=weight)
    torch.testing.assert_close(entries["unlearning/unlearning_loss"].item(), float(exact["loss"]), rtol=1e-4, atol=0)
    assert entries["localization/num_layers"] == 2
    for use in (
        lambda: fastunlearn.AttnMapsCapture(unet, {}),
        lambda: fastunlearn.attach_erasers(unet),
        lambda: fastunlearn.as_velocity_model(unet),
    ):
        with pytest.raises(TypeError, match="UNet2DConditionModel"):
            use()
