from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import options_for, tiny_cache, tiny_model, weights

from fastunlearn import EraserOutputsCapture, erasers_disabled, load_erasers
from fastunlearn.families import find_transformer
from fastunlearn.training.cache.provenance import check_cache_fits, weights_digest
from fastunlearn.training.cache.reader import Points
from fastunlearn.training.loop.batches import Batches
from fastunlearn.training.loop.optimizer import ErasersOptimizer, learning_rate_factor
from fastunlearn.training.loop.terms import Terms
from fastunlearn.training.loop.trainer import TrainingSummary
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import TargetGroup
from fastunlearn.training.train import train

Metrics = list[dict[str, float]]
# With a large epsilon, the step of Adam is proportional to the gradient. With a small one, rounding errors in a tiny
# gradient become full steps.
SMOOTH = {"adam_epsilon": 1e-2, "learning_rate": 0.1, "max_grad_norm": 0.0}


def trained(
    output: Path, family: str = "cogvideox", *, experts: int = 1, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[VideoModel, Metrics]:
    """Trains a tiny model for some steps; returns it and the metrics of the steps."""
    keywords = {name: changes.pop(name) for name in ("targets", "kept", "lr_lambda") if name in changes}
    model = tiny_model(family, dtype, experts)
    metrics: Metrics = []
    train(
        model,
        tiny_cache(model),  # type: ignore[arg-type]
        output,
        options_for(output, **changes),
        on_step=lambda step, step_metrics: metrics.append(step_metrics | {"step": step}),
        **keywords,
    )
    return model, metrics


def largest_difference(first: VideoModel, second: VideoModel) -> float:
    """The largest difference between the erasers of two models, relative to the largest weight."""
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys() and len(a) > 0
    largest_weight = max(value.abs().max().item() for name, value in a.items() if ".up." in name)
    assert largest_weight > 1e-4
    return max((a[name] - b[name]).abs().max().item() for name in a) / largest_weight


def same_bits(first: VideoModel, second: VideoModel) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("family", "experts"), [("cogvideox", 1), ("hunyuan_video", 1), ("wan", 1), ("wan", 2)])
def test_erasers_learn_and_the_base_model_does_not(family: str, experts: int, tmp_path: Path) -> None:
    model = tiny_model(family, experts=experts)
    before = [{name: p.clone() for name, p in expert.named_parameters()} for expert in model.experts]
    cache = tiny_cache(model, points=2)
    options = options_for(tmp_path, max_train_steps=25, learning_rate=2e-2, train_batch_size=2, adam_weight_decay=0.0)
    metrics: Metrics = []
    summary = train(model, cache, tmp_path, options, on_step=lambda _, step_metrics: metrics.append(step_metrics))  # type: ignore[arg-type]
    first, last = (sum(m["unlearning_loss"] for m in some) for some in (metrics[:8], metrics[-8:]))
    assert last < 0.95 * first
    for expert, was in zip(model.experts, before, strict=True):
        now = dict(expert.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in was.items())
        assert all(parameter.grad is None for parameter in now.values())
    assert summary == TrainingSummary(tmp_path / "erasers", 25, None, metrics[-1])
    again = tiny_model(family, experts=experts)
    again.load_erasers(summary.erasers)
    assert same_bits(model, again)


@pytest.mark.parametrize("relative", [False, True])
def test_the_losses_are_those_of_the_formulas(relative: bool, tmp_path: Path) -> None:
    """The losses of the second step are those of the formulas, for several groups with a guidance scale each."""
    weighted = {"unlearning_weight": 0.7, "preservation_weight": 0.4, "localization_weight": 3.0}
    targets = (TargetGroup("target", 7.5, 1.0), TargetGroup("other", 2.0, 1.0))
    options: dict[str, Any] = {**weighted, "train_batch_size": 3, "targets": targets, "learning_rate": 0.05}
    options |= {"relative": relative}
    for loss_type, masked, negative in (("l2", False, 0.0), ("l1", True, 1.0)):
        options |= {"loss_type": loss_type, "mask_unlearning": masked, "kept_negative_share": negative}
        model, _ = trained(tmp_path / f"one-{loss_type}", max_train_steps=1, **options)
        _, metrics = trained(tmp_path / f"two-{loss_type}", max_train_steps=2, **options)
        cache = tiny_cache(tiny_model())
        draw = Batches(cache.groups, targets, "kept", size=3, seed=0).draw(1)
        target = cache.groups[draw.target.name].rows(draw.target_rows)
        kept = cache.groups["kept"].rows(draw.kept_rows, torch.full((3,), negative == 1))
        (student,) = model.experts
        erasers = {layer: attention.erasers["default"] for layer, attention in _attentions(student)}
        outputs: dict[str, Tensor] = {}
        with torch.no_grad(), EraserOutputsCapture(student, erasers, outputs):
            v_target = student(target.x_t, target.t, target.condition)
        with torch.no_grad():
            v_kept = student(kept.x_t, kept.t, kept.condition)

        def rho(error: Tensor, loss_type: str = loss_type) -> Tensor:
            return error.square() if loss_type == "l2" else error.abs()

        v_neg = target.v_uncond + draw.target.guidance_scale * (target.v_uncond - target.v_cond)
        pixels = target.mask.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, None] if masked else 1
        background = (~target.mask).float().flatten(1)[..., None]
        velocity, sizes = 1.0, dict.fromkeys(outputs, 1.0)
        if relative:
            points = [cache.groups[group].points for group in ("target", "other")]
            velocity = torch.cat([rho(p.v_cond - p.v_uncond) for p in points]).mean().item()
            sizes = _attention_sizes(student, outputs, points)
        localization = [rho(o * background / sizes[layer]).mean() for layer, o in outputs.items()]
        expected = {
            "unlearning_loss": 0.7 * (pixels * rho(v_target - v_neg)).mean() / velocity,
            "preservation_loss": 0.4 * rho(v_kept - kept.v_cond).mean() / velocity,
            "localization_loss": 3.0 * torch.stack(localization).mean(),
        }
        expected["loss"] = sum(expected.values())
        for name, value in expected.items():
            assert metrics[1][name] == pytest.approx(value.item(), rel=1e-4), name
        assert metrics[1]["localization_loss"] > 0


def _attention_sizes(student: Any, layers: Iterable[str], groups: Sequence[Points]) -> dict[str, float]:
    """The root mean square of every attention's output, without erasers, over four points of each group."""
    outputs: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [
        attention.register_forward_hook(lambda *call, layer=layer: outputs[layer].append(call[-1][0]), prepend=True)
        for layer, attention in _attentions(student)
    ]
    with torch.no_grad(), erasers_disabled(student):
        for points in groups:
            rows = [index * len(points.t) // 4 for index in range(4)]
            student(points.x_t[rows], points.t[rows], {name: v[rows] for name, v in points.condition.items()})
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(values).square().mean().sqrt().item() for layer, values in outputs.items()}


def _attentions(student: nn.Module) -> list[tuple[str, Any]]:
    blocks: Any = student.transformer.transformer_blocks
    return [(f"transformer_blocks.{index}.attn1", block.attn1) for index, block in enumerate(blocks)]


def test_gradient_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    whole, metrics = trained(tmp_path / "whole", train_batch_size=4, **SMOOTH)
    parts, parts_metrics = trained(tmp_path / "parts", train_batch_size=1, gradient_accumulation_steps=4, **SMOOTH)
    assert largest_difference(whole, parts) < 1e-4
    for expected, got in zip(metrics, parts_metrics, strict=True):
        assert expected == pytest.approx(got, rel=1e-4)


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan_video", "wan"])
def test_sequential_terms_and_checkpointing_change_no_gradient(family: str, tmp_path: Path) -> None:
    joint, _ = trained(tmp_path / "joint", family, **SMOOTH)
    sequential, _ = trained(tmp_path / "sequential", family, sequential_terms=True, **SMOOTH)
    assert largest_difference(joint, sequential) < 1e-4
    checkpointed, _ = trained(tmp_path / "checkpointed", family, gradient_checkpointing=True, **SMOOTH)
    assert largest_difference(joint, checkpointed) < 1e-6


def peak_saved_bytes(output: Path, **changes: Any) -> int:
    """The peak of the bytes that autograd saves for backward passes, in a run of one step."""
    alive = peak = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, peak
            self.tensor = tensor
            alive += tensor.nbytes
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        trained(output, max_train_steps=1, train_batch_size=2, **changes)
    return peak


def test_sequential_terms_save_half_of_the_activations(tmp_path: Path) -> None:
    joint = peak_saved_bytes(tmp_path / "joint")
    assert peak_saved_bytes(tmp_path / "sequential", sequential_terms=True) < 0.55 * joint


def test_the_seed_determines_the_erasers(tmp_path: Path) -> None:
    one, _ = trained(tmp_path / "one", seed=3)
    torch.manual_seed(99)
    again, _ = trained(tmp_path / "again", seed=3)
    other, _ = trained(tmp_path / "other", seed=4)
    assert same_bits(one, again) and not same_bits(one, other)


def test_training_does_not_change_the_caller_s_random_state(tmp_path: Path) -> None:
    model = tiny_model()
    cache = tiny_cache(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, cache, tmp_path, options_for(tmp_path, max_train_steps=1))  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), expected)


def test_a_step_trains_one_of_two_transformers(tmp_path: Path) -> None:
    """The erasers of the other transformer do not change by a bit, neither by weight decay nor by momentum."""
    options: dict[str, Any] = {"adam_weight_decay": 0.1, "experts": 2}
    previous = weights(trained(tmp_path / "0", "wan", max_train_steps=1, learning_rate=0.0, **options)[0])
    moved = []
    for steps in (1, 2, 3, 4):
        now = weights(trained(tmp_path / str(steps), "wan", max_train_steps=steps, **options)[0])
        moved.append({name[0] for name in now if not torch.equal(now[name], previous[name])})
        previous = now
    assert all(len(experts) == 1 for experts in moved)
    assert {"0", "1"} == set.union(*moved)


@pytest.mark.parametrize(
    ("dtype", "optimizer"), [(torch.float16, "adamw"), (torch.float16, "muon"), (torch.bfloat16, "adamw")]
)
def test_half_precision_base_has_float32_erasers_and_no_nan(dtype: torch.dtype, optimizer: str, tmp_path: Path) -> None:
    changes = {"max_train_steps": 25, "learning_rate": 1e-3, "optimizer": optimizer}
    _, exact = trained(tmp_path / "exact", **changes)
    model, metrics = trained(tmp_path / "half", dtype=dtype, **changes)
    assert {value.dtype for value in weights(model).values()} == {torch.float32}
    assert all(value.isfinite().all() for value in weights(model).values())
    assert all(math.isfinite(value) for step_metrics in metrics for value in step_metrics.values())
    assert ("loss_scale" in metrics[0]) == (dtype == torch.float16)
    for one, other in zip(metrics, exact, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.1)


def test_a_float16_overflow_skips_the_step_and_halves_the_scale(tmp_path: Path) -> None:
    changes = {"dtype": torch.float16, "unlearning_weight": 1e4, "optimizer": "muon"}
    start, _ = trained(tmp_path / "0", max_train_steps=1, **changes | {"learning_rate": 0.0, "adam_weight_decay": 0.0})
    skipped, metrics = trained(tmp_path / "1", max_train_steps=1, **changes)
    assert metrics[0]["loss_scale"] == 2.0**15 and not math.isfinite(metrics[0]["gradient_norm"])
    assert same_bits(start, skipped)
    later, metrics = trained(tmp_path / "2", max_train_steps=16, **changes)
    assert math.isfinite(metrics[-1]["gradient_norm"]) and not same_bits(start, later)


def test_an_overflow_of_one_optimizer_s_gradients_skips_the_other_too(tmp_path: Path) -> None:
    matrix, bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    erasers = [{"layer": nn.ParameterDict({"matrix": matrix, "bias": bias})}]
    options = options_for(tmp_path, optimizer="muon", learning_rate=0.1, max_grad_norm=0.0)
    optimizer = ErasersOptimizer(erasers, options, None, lambda _: 1.0, processes=1, losses=1, dtype=torch.float16)
    for factor, moves in ((1e36, False), (1.0, True)):
        optimizer.start(0)
        optimizer.backward([matrix.sum() + factor * bias.sum()])
        optimizer.finish(0, lambda losses, norm: None)
        assert ((matrix != 1).any(), (bias != 1).any()) == (moves, moves)


def test_a_gradient_that_is_never_finite_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Terms.preservation_loss

    def with_nan_gradient(*args: Any) -> Tensor:
        loss = original(*args)
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(Terms, "preservation_loss", with_nan_gradient)
    with pytest.raises(FloatingPointError, match="float16 at any loss scale; use bf16"):
        trained(tmp_path / "half", dtype=torch.float16, max_train_steps=60)
    with pytest.raises(FloatingPointError, match="step 1: the gradient's norm is nan"):
        trained(tmp_path / "full")


@pytest.mark.parametrize(
    ("value", "group", "term"), [(math.nan, "kept", "preservation"), (math.inf, "target", "unlearning")]
)
def test_a_loss_that_is_not_finite_stops_training(value: float, group: str, term: str, tmp_path: Path) -> None:
    model = tiny_model()
    cache = tiny_cache(model)
    draws = Batches(cache.groups, [TargetGroup()], "kept", size=1, seed=0)
    rows = {"target": "target_rows", "kept": "kept_rows"}[group]
    # The first step, from the third on, whose point has not been drawn before.
    seen = [int(getattr(draws.draw(step), rows)) for step in range(12)]
    bad = next(step for step in range(2, 12) if seen[step] not in seen[:step])
    cache.groups[group].points.v_cond[seen[bad], 0, 0, 0, 0] = value
    options = options_for(tmp_path, max_train_steps=12, checkpointing_steps=1)
    kept: list[dict[str, Tensor]] = []
    with pytest.raises(FloatingPointError, match=rf"step {bad + 1}: the {term} loss is .*checkpoint-{bad}$"):
        train(model, cache, tmp_path, options, on_step=lambda *_: kept.append(weights(model)))  # type: ignore[arg-type]
    assert all(torch.equal(value, kept[-1][name]) for name, value in weights(model).items())
    load_erasers(tiny_model().experts[0], tmp_path / f"checkpoint-{bad}" / "erasers")
    assert not (tmp_path / f"checkpoint-{bad + 1}").exists() and not (tmp_path / "erasers").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
        MemoryError(),
    ],
)
def test_out_of_memory_errors_name_the_options_that_help(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Terms, "preservation_loss", fail)
    with pytest.raises(MemoryError) as raised:
        trained(tmp_path, train_batch_size=2)
    for knob in (
        "--gradient-checkpointing",
        "--sequential-terms",
        "--train-batch-size 1",
        "--mixed-precision bf16",
        "--height",
    ):
        assert knob in str(raised.value)
    with pytest.raises(MemoryError) as raised:
        trained(tmp_path, sequential_terms=True, gradient_checkpointing=True, mixed_precision="bf16")
    for knob in ("--gradient-checkpointing", "--sequential-terms", "--train-batch-size", "--mixed-precision"):
        assert knob not in str(raised.value)


def test_other_runtime_errors_are_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Terms, "preservation_loss", fail)
    with pytest.raises(RuntimeError, match="^something else$"):
        trained(tmp_path)


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_learning_rate_schedules_match_diffusers(name: Any, tmp_path: Path) -> None:
    from diffusers.optimization import get_scheduler

    options = options_for(
        tmp_path, lr_scheduler=name, max_train_steps=9, lr_warmup_steps=3, lr_num_cycles=2, lr_power=2.0
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=options.learning_rate)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=9, num_cycles=2, power=2.0)
    factor = learning_rate_factor(options)
    for step in range(9):
        assert options.learning_rate * factor(step) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_a_custom_learning_rate_schedule(tmp_path: Path) -> None:
    still, metrics = trained(tmp_path / "0", lr_lambda=lambda step: 0.0, adam_weight_decay=0.0)
    assert all(not value.any() for name, value in weights(still).items() if ".up." in name)
    _, metrics = trained(tmp_path / "1", lr_lambda=lambda step: 1 / (step + 1))
    assert [m["learning_rate"] for m in metrics] == pytest.approx([1e-3 / n for n in (1, 2, 3, 4)])


def test_biases_have_their_own_learning_rate(tmp_path: Path) -> None:
    for optimizer in ("adamw", "muon"):
        model, _ = trained(tmp_path / optimizer, optimizer=optimizer, learning_rate=0.0, bias_learning_rate=1e-2)
        for name, value in weights(model).items():
            if ".up." in name:
                assert value.any() == name.endswith("bias"), name


def test_gradients_are_clipped(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3))]
    erasers = [{"layer": nn.ParameterList(parameters)}]
    for limit, expected in ((0.5, 0.5), (100.0, 6.0), (0.0, 6.0)):
        options = options_for(tmp_path, max_grad_norm=limit)
        optimizer = ErasersOptimizer(erasers, options, None, lambda _: 1.0, processes=1, losses=2, dtype=torch.float32)
        optimizer.start(0)
        loss = 2 * sum(parameter.sum() for parameter in parameters)
        optimizer.backward([None, torch.as_tensor(loss)])
        metrics = optimizer.finish(0, lambda losses, norm: None)
        assert metrics["gradient_norm"] == pytest.approx(6.0)
        clipped = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        assert clipped.norm().item() == pytest.approx(expected, rel=1e-4)


def test_terms_of_weight_zero_are_left_out(tmp_path: Path) -> None:
    """Without the preservation loss the cache needs no kept points; without the localization loss, no masks."""
    model = tiny_model()
    cache = tiny_cache(model)
    del cache.groups["kept"]
    target = cache.groups["target"]
    target.points = target.points._replace(mask=None)
    metrics: Metrics = []
    options = options_for(tmp_path / "0", preservation_weight=0.0, localization_weight=0.0)
    train(model, cache, tmp_path / "0", options, on_step=lambda _, step_metrics: metrics.append(step_metrics))  # type: ignore[arg-type]
    assert all(m["preservation_loss"] == m["localization_loss"] == 0 for m in metrics)
    assert all(m["loss"] == m["unlearning_loss"] > 0 for m in metrics)
    for changes in ({"localization_weight": 1.0}, {"localization_weight": 0.0, "mask_unlearning": True}):
        options = options_for(tmp_path / "1", preservation_weight=0.0, **changes)
        with pytest.raises(ValueError, match="have no masks"):
            train(tiny_model(), cache, tmp_path / "1", options)  # type: ignore[arg-type]


def test_draws_follow_the_shares_and_depend_only_on_seed_and_step() -> None:
    model = tiny_model("wan", experts=2)
    groups = tiny_cache(model, points=12).groups
    targets = [TargetGroup("target", share=1.0), TargetGroup("other", share=3.0)]
    batches = Batches(groups, targets, "kept", size=4, seed=7)
    draws = [batches.draw(step) for step in range(400)]
    assert sum(draw.target.name == "target" for draw in draws) == pytest.approx(100, abs=3)
    # The shares hold in short intervals, too.
    assert all(2 <= sum(d.target.name == "target" for d in draws[i : i + 16]) <= 6 for i in range(0, 400, 16))
    for name in ("target", "other"):
        share = groups[name].experts.float().mean().item()
        group_experts = [draw.expert for draw in draws if draw.target.name == name]
        assert sum(group_experts) / len(group_experts) == pytest.approx(share, abs=0.05)
        rows = torch.cat([draw.target_rows for draw in draws if draw.target.name == name])
        assert len(rows.unique()) == len(groups[name])
    for draw in draws:
        assert (groups[draw.target.name].experts[draw.target_rows] == draw.expert).all()
        assert (groups["kept"].experts[draw.kept_rows] == draw.expert).all()
        enough = (groups[draw.target.name].experts == draw.expert).sum() >= 4
        assert len(draw.target_rows) == len(draw.kept_rows) == 4
        assert not enough or len(draw.target_rows.unique()) == 4
    again = Batches(groups, targets, "kept", size=4, seed=7).draw(123)
    assert torch.equal(again.target_rows, draws[123].target_rows) and torch.equal(again.kept_rows, draws[123].kept_rows)
    # Seeds that differ only beyond 32 bits give different draws.
    for seed in (8, 7 + (1 << 32)):
        others = [Batches(groups, targets, "kept", size=4, seed=seed).draw(step).target_rows for step in range(20)]
        assert any(not torch.equal(rows, draw.target_rows) for rows, draw in zip(others, draws, strict=False))


@pytest.mark.parametrize(("share", "counts"), [(0.25, {1}), (0.1, {0, 1}), (0.6, {2, 3}), (1.0, {4}), (0.0, {0})])
def test_a_share_of_the_kept_points_has_the_negative_prompt(share: float, counts: set[int]) -> None:
    groups = tiny_cache(tiny_model(), points=12).groups
    batches = Batches(groups, [TargetGroup()], "kept", size=4, seed=7, negative_share=share)
    draws = [batches.draw(step) for step in range(100)]
    assert {int(draw.kept_negative.sum()) for draw in draws} == counts
    assert sum(int(draw.kept_negative.sum()) for draw in draws) == round(400 * share)
    rows = torch.cat([draw.kept_rows[draw.kept_negative] for draw in draws])
    assert len(rows.unique()) == (13 if share else 0)
    without = Batches(groups, [TargetGroup()], "kept", size=4, seed=7)
    assert all(torch.equal(without.draw(step).kept_rows, draw.kept_rows) for step, draw in enumerate(draws))
    groups["kept"].has_negative[:] = False
    if share:
        with pytest.raises(ValueError) as error:
            Batches(groups, [TargetGroup()], "kept", size=4, seed=7, negative_share=share)
        assert str(error.value) == (
            "kept: expected points in group 'kept' whose v_uncond is of the negative prompt, with that prompt's "
            f"condition in the cache, because kept_negative_share is {share:g}, got none; set it to 0, or prepare the "
            "cache with some kept prompts that have no other prompt after a tab"
        )
        groups["kept"].has_negative[5] = True
        draws = [Batches(groups, [TargetGroup()], "kept", size=4, seed=7, negative_share=1.0).draw(s) for s in range(9)]
        assert {5} == {int(row) for draw in draws for row in draw.kept_rows[draw.kept_negative]}


def test_a_cache_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny_model()

    def check_refused(match: str, change: dict[str, Any] | None = None, **keywords: Any) -> None:
        cache = tiny_cache(model)
        cache.facts |= change or {}
        if change == {}:
            cache.groups["kept"].experts = cache.groups["kept"].experts[:0]
        with pytest.raises(ValueError, match=match):
            train(model, cache, tmp_path, options_for(tmp_path), **keywords)  # type: ignore[arg-type]

    check_refused("made with a cogvideox model, got one made with a wan model", {"backbone": "wan"})
    check_refused("divided at timestep 875.0", {"boundary": 875.0})
    check_refused(r"latents with 4 channels.*got shape \(16, 3, 8, 8\)", {"latent_shape": [16, 3, 8, 8]})
    check_refused(
        r"expected masks of shape \(\d, \d, \d\) for latents of shape .*, got \[7, 7, 7\]", {"token_grid": [7, 7, 7]}
    )
    check_refused("got one made with a None model", {"backbone": None})
    fitting = tiny_cache(model)
    for shape in ((5, 99), (99,)):
        with pytest.raises(ValueError, match=rf"expected encoder_hidden_states of shape \('L', \d+\), .*\({shape[0]},"):
            check_cache_fits(fitting.facts, model, {"encoder_hidden_states": shape})
    with pytest.raises(ValueError, match=r"expected other of shape \(\), as this model takes, got \(1,\)"):
        check_cache_fits(fitting.facts, model, {"other": (1,)})
    check_refused(
        r"expected one of the cache's groups \('target', 'other', 'kept'\), got 'else'", targets=[TargetGroup("else")]
    )
    check_refused("at least one group", targets=[])
    check_refused("group 'kept' of the cache: expected at least one point, got none", {})
    model.path = "there/CogVideoX-5b"
    changed = tiny_model()
    next(find_transformer(changed.experts[0])[0].parameters()).data.flatten()[0] += 1e-3
    other = {"model": "here/CogVideoX-2b", "dtype": "float32", "weights": weights_digest(changed)}
    check_refused("weights of there/CogVideoX-5b, got .* here/CogVideoX-2b, which has other weights", other)
    assert weights_digest(tiny_model()) == weights_digest(model), "the same model elsewhere is the same"
    check_cache_fits(tiny_cache(model).facts | other | {"weights": weights_digest(model)}, model)
    check_cache_fits(tiny_cache(model).facts | other | {"dtype": "bfloat16"}, model)
    two = tiny_model("wan", experts=2)
    cache = tiny_cache(two)
    cache.groups["kept"].experts.zero_()
    with pytest.raises(
        ValueError, match=r"for transformer 1 in group 'kept', because \d+ points of group 'target'.*got none"
    ):
        train(two, cache, tmp_path, options_for(tmp_path))  # type: ignore[arg-type]


def test_options_are_checked() -> None:
    for changes in (
        {"rank": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"learning_rate": math.nan},
        {"checkpoints_total_limit": 0},
    ):
        (name,) = changes
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            options_for("", **changes)
    with pytest.raises(ValueError, match="share: expected a number from 1e-06 to 1e\\+06, got 0"):
        TargetGroup(share=0)
    with pytest.raises(ValueError, match="guidance_scale: expected a number from -1000 to 1000, got inf"):
        replace(TargetGroup(), guidance_scale=math.inf)


def test_metrics_go_to_tensorboard(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, metrics = trained(tmp_path, report_to="tensorboard")
    (events,) = (tmp_path / "logs").rglob("events.out.tfevents.*.0")
    log = event_accumulator.EventAccumulator(str(events)).Reload()
    for name in ("loss", "unlearning_loss", "preservation_loss", "localization_loss", "learning_rate"):
        logged = [(scalar.step, scalar.value) for scalar in log.Scalars(name)]
        assert logged == [(m["step"], pytest.approx(m[name])) for m in metrics]


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="report_to: .* wandb, which is not installed"):
        trained(tmp_path, report_to="wandb")
