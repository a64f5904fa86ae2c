"""What the frozen model sees in sampled videos, computed again from its definition."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastunlearn.training import evaluate
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.requests import Request
from fastunlearn.training.evaluation import seen
from fastunlearn.training.evaluation.report import table
from fastunlearn.training.evaluation.seen import BASELINE, ERASED, FROZEN, Sightings, look
from fastunlearn.training.model.erased import without_erasers
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.sampling import denoise, scheduler_for, stack_conditions
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import EvaluateOptions, PrepareOptions
from fastunlearn.training.prepare import prepare
from fastunlearn.training.random_numbers import random_generator

Pipelines = Callable[[str], Path]
Made = tuple[VideoModel, TeacherCache, dict[str, Any]]
REQUESTS = [
    Request("a red circle", instead="a red square"),
    Request("a blue circle", instead="a blue thing"),
    Request("a square", "kept"),
]
STEPS, GUIDANCE, SEED = 4, 3.0, 7
FP32 = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module")
def made(tiny_pipeline: Pipelines, made_once: Callable[..., Path]) -> Callable[[str], Made]:
    """`made(family)`: a tiny model with strong erasers, a cache of REQUESTS, and the encoded prompts."""

    @functools.cache
    def make(family: str) -> Made:
        pipeline = tiny_pipeline(family)
        model = load_model(pipeline, **FP32)
        texts = ["", *(text for request in REQUESTS for text in (request.prompt, request.instead) if text)]
        encoded = encode_prompts(pipeline, texts, "circle", **FP32)
        options = PrepareOptions(
            str(pipeline),
            Path(),
            "circle",
            num_inference_steps=STEPS,
            timesteps_per_trajectory=2,
            guidance_scale=GUIDANCE,
            height=32,
            width=32,
            num_frames=9,
            seed=SEED,
        )
        folder = made_once(f"seen-{family}", lambda folder: prepare(model, encoded, REQUESTS, folder, options))
        torch.manual_seed(0)
        for layers in model.attach_erasers(rank=4):
            for eraser in layers.values():
                torch.nn.init.normal_(eraser.up.weight, std=0.3)
        return model, TeacherCache.open(folder), encoded

    return make


def sampled(model: VideoModel, encoded: dict[str, Any], prompt: str, noise: torch.Generator, shape: Any) -> Any:
    latents = torch.randn(1, *shape, generator=noise)
    texts = {"follow": prompt, "negative": ""}
    conditions = {name: stack_conditions([encoded[text].condition], model.device) for name, text in texts.items()}
    settings = {"guide_from": "negative", "guidance_scale": GUIDANCE, "num_inference_steps": STEPS}
    return list(denoise(model, latents, conditions, follow="follow", generators=[noise], **settings))


@pytest.mark.parametrize("family", ["cogvideox", "wan-2.2"])
def test_the_likeness_compares_the_errors_with_both_prompts(family: str, made: Callable[[str], Made]) -> None:
    model, cache, encoded = made(family)
    videos: dict[str, list[Tensor]] = {version: [] for version in seen.VERSIONS}
    sightings = look(model, cache, on_videos=lambda version, _, x_0: videos[version].extend(x_0))
    assert sightings.prompts == ["a red circle", "a blue circle"]
    timesteps = scheduler_for(model, STEPS).timesteps
    levels = [int(STEPS * (0.1 + 0.7 * (part + 0.5) / seen.NOISE_LEVELS)) for part in range(seen.NOISE_LEVELS)]
    assert len(set(levels)) > 1
    for index, request in enumerate(REQUESTS[:2]):
        for version in seen.VERSIONS:
            prompt = request.instead if version == BASELINE else request.prompt
            noise = random_generator(SEED, "noise", index)
            if version == ERASED:
                steps = sampled(model, encoded, prompt, noise, cache.facts["latent_shape"])
            else:
                with without_erasers(model):
                    steps = sampled(model, encoded, prompt, noise, cache.facts["latent_shape"])
            x_0 = steps[-1].x_next
            torch.testing.assert_close(videos[version][index][None], x_0, rtol=1e-3, atol=1e-3)
            gain, length = 0.0, 0.0
            for number, level in enumerate(levels):
                t = timesteps[level]
                eps = torch.randn(x_0.shape[1:], generator=random_generator(SEED, "noise", index, "level", number))
                if family == "cogvideox":
                    a = model.scheduler.alphas_cumprod[t].double()
                    x_t, target = a.sqrt() * x_0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x_0
                else:
                    x_t, target = x_0 + t / 1000 * (eps - x_0), eps - x_0
                expert = model.experts[model.expert_index(float(t))]
                with torch.no_grad(), without_erasers(model):
                    v, v_0 = (
                        expert(x_t.float(), t, stack_conditions([encoded[text].condition], model.device)).double()
                        for text in (request.prompt, request.instead)
                    )
                gain += ((target - v_0).square().sum() - (target - v).square().sum()).item()
                length += (v - v_0).square().sum().item()
            assert 2 * sightings.likeness[version][index] - 1 == pytest.approx(gain / length, rel=2e-2, abs=2e-2)


def test_the_coefficient_along_the_erased_models_own_trajectories(made: Callable[[str], Made]) -> None:
    model, cache, encoded = made("cogvideox")
    steps = sampled(model, encoded, "a red circle", random_generator(SEED, "noise", 0), cache.facts["latent_shape"])
    along, length = 0.0, 0.0
    for step in steps:  # five parts of four steps: 0, 1, 2, 2, 3
        with torch.no_grad(), without_erasers(model):
            v, v_0 = (
                model.experts[0](step.x_t, step.t, stack_conditions([encoded[text].condition], model.device))
                for text in ("a red circle", "a red square")
            )
        along += ((step.velocities["follow"] - v_0) * (v - v_0)).sum().item()
        length += (v - v_0).square().sum().item()
    assert look(model, cache, 1).on_policy.total == pytest.approx(along / length, rel=1e-3)


def test_erasers_that_do_nothing_leave_everything_to_be_seen(made: Callable[[str], Made]) -> None:
    model, cache, _ = made("cogvideox")
    with without_erasers(model):
        sightings = look(model, cache, 1)
    assert sightings.likeness[ERASED] == sightings.likeness[FROZEN]
    assert sightings.on_policy.total == pytest.approx(1, abs=1e-6)


def test_videos_do_not_depend_on_their_batch_and_start_from_the_noise_of_the_cache(made: Callable[[str], Made]) -> None:
    model, cache, _ = made("cogvideox")
    keys: list[Any] = []
    together = look(model, cache, 3, 2, on_videos=lambda _, videos, __: keys.extend(video.key for video in videos))
    assert list(dict.fromkeys(keys)) == [(7, "noise", 0), (7, "noise", 1), (7, "noise", 0, 1)]
    assert together.prompts == ["a red circle", "a blue circle", "a red circle"]
    alone = look(model, cache, 1)
    for version in seen.VERSIONS:
        assert together.likeness[version][0] == pytest.approx(alone.likeness[version][0], abs=1e-3)
        assert together.likeness[version][0] != together.likeness[version][2]


def test_shares_and_the_normalised_mean() -> None:
    sightings = Sightings(["a", "b", "a", "b"])
    sightings.likeness = {ERASED: [0.6, 0.5, 0.2, -0.3], FROZEN: [1.2, 1, 1, 0.8], BASELINE: [-0.1, 0.1, 0, 0.6]}
    report = sightings.report()
    assert report is not None
    assert report["share"] == {ERASED: 0.25, FROZEN: 1.0, BASELINE: 0.25}
    assert report["mean_likeness"] == pytest.approx((0.25 - 0.15) / (1 - 0.15))
    assert report["by_prompt"] == [
        {"prompt": "a", "videos": 2, "share": {ERASED: 0.5, FROZEN: 1.0, BASELINE: 0.0}},
        {"prompt": "b", "videos": 2, "share": {ERASED: 0.0, FROZEN: 1.0, BASELINE: 0.5}},
    ]
    sightings.likeness[FROZEN] = sightings.likeness[BASELINE]
    assert sightings.mean_likeness is None
    assert Sightings().report() is None and Sightings().mean_likeness is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "x"}, "says how it was sampled, but seed: expected a whole number from 0 to 4294967295, got 'x'$"),
        ({"num_inference_steps": None}, "num_inference_steps: expected a whole number from 1 to 10000, got None$"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a number from -1000 to 1000, got nan$"),
        ({"negative_prompt": "ugly"}, "negative_prompt: expected one of its prompts, got 'ugly'$"),
        ({"requests": None}, "expected a list of requests in its facts, got None$"),
        ({"requests": [{"prompt": "x"}]}, "expected the condition of every prompt, got none of 'x'$"),
        ({"requests": [{"prompt": ["x"]}]}, r"expected the condition of every prompt, got none of \['x'\]$"),
    ],
)
def test_caches_that_do_not_say_how_they_were_sampled(
    change: dict[str, Any], message: str, made: Callable[[str], Made]
) -> None:
    model, cache, _ = made("cogvideox")
    facts = {**cache.facts, **change}
    with pytest.raises(ValueError, match=message):
        look(model, TeacherCache(cache.folder, facts, "", cache.groups, cache.prompts, cache.condition_shapes), 1)


def test_videos_that_are_not_finite_are_refused(made: Callable[[str], Made]) -> None:
    model, cache, _ = made("cogvideox")
    bias = next(iter(model.experts[0].parameters()))
    kept = bias.data.clone()
    bias.data.fill_(float("nan"))
    try:
        with pytest.raises(
            ValueError,
            match=r"^video: expected finite latents, got NaN or infinity at t=999 for 'a red circle' \(erased\)",
        ):
            look(model, cache, 1)
    finally:
        bias.data.copy_(kept)


def test_evaluate_reports_what_is_seen(made: Callable[[str], Made], tiny_pipeline: Pipelines, tmp_path: Path) -> None:
    model, cache, _ = made("cogvideox")
    model.save_erasers(tmp_path / "erasers", concept="circle")

    def options(output: str, **more: Any) -> EvaluateOptions:
        folders = (str(tiny_pipeline("cogvideox")), (tmp_path / "erasers",), tmp_path / output)
        settings = {"cache_dir": cache.folder, "mixed_precision": "no", "device": "cpu", "batch_size": 4, **more}
        return EvaluateOptions(*folders, **settings)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tiny random model sees little
        report = evaluate.run(options("seen", num_videos=2))
    stored = json.loads((tmp_path / "seen/evaluation.json").read_text())["seen"]
    assert stored == report["seen"] and stored["videos"] == 2
    expected = look(model, cache, 2, 4)
    for version in seen.VERSIONS:
        assert stored["likeness"][version] == pytest.approx(expected.likeness[version], abs=1e-3)
    share = {version: f"{value:.0%}" for version, value in stored["share"].items()}
    line = f"concept seen            in {share[ERASED]} of 2 videos with the erasers, {share[FROZEN]} without"
    assert any(text.startswith(line) for text in table(report).splitlines())
    assert evaluate.run(options("unseen", num_videos=0))["seen"] is None


def test_a_model_that_cannot_tell_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    sightings = Sightings(["a"] * 4)
    sightings.likeness = {ERASED: [0.0] * 4, FROZEN: [1.0, 1, 1, 0], BASELINE: [1.0, 1, 0, 0]}
    monkeypatch.setattr(evaluate, "look", lambda *_, **__: sightings)
    with pytest.warns(UserWarning, match=r"^num_videos: expected the concept to be seen .* got 75% and 50%; the share"):
        evaluate._look(None, None, EvaluateOptions("m", (Path("e"),), Path("o"), cache_dir=Path("c")))  # type: ignore[arg-type]


def test_the_velocity_target_is_what_the_models_were_trained_to_predict(loaded_model: Callable[..., Any]) -> None:
    x_0, noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([999, 200])
    torch.testing.assert_close(loaded_model("wan").velocity_target(x_0, noise, t), noise - x_0)
    model = loaded_model("cogvideox")
    a = model.scheduler.alphas_cumprod[t][:, None].float()
    torch.testing.assert_close(model.velocity_target(x_0, noise, t), a.sqrt() * noise - (1 - a).sqrt() * x_0)
