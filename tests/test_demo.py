from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from fastunlearn import load_erasers
from fastunlearn.demo import erase, evaluate, sampling
from fastunlearn.demo.judge import Judge, held_out_accuracy
from fastunlearn.demo.model import TOKEN_GRID, WEIGHTS, TextToVideo, load
from fastunlearn.demo.pretrain import main as pretrain
from fastunlearn.demo.run import run, table
from fastunlearn.demo.world import COLOURS, SHAPES, Noun, background, palette, prompt_of, sample_videos


@pytest.fixture(scope="module")
def trained() -> tuple[TextToVideo, Judge]:
    model, judge, _ = load()
    return model, judge


def test_videos_show_what_their_prompts_say() -> None:
    videos = sample_videos(64, torch.Generator().manual_seed(0))
    colours = list(COLOURS)
    for row, nouns in enumerate(videos.nouns):
        assert videos.prompts[row] == prompt_of(nouns)
        assert len({noun.shape for noun in nouns}) == len({noun.colour for noun in nouns}) == len(nouns)
        for index, noun in enumerate(nouns):
            inside = videos.coverage[row, index] == 1
            assert inside.flatten(1).sum(1).min() > 10
            paint = videos.pixels[row].permute(0, 2, 3, 1)[inside]
            torch.testing.assert_close(paint, palette()[colours.index(noun.colour)].expand_as(paint))
    bare = (videos.coverage == 0).all(dim=1)
    nothing = videos.pixels.permute(0, 1, 3, 4, 2)[bare]
    torch.testing.assert_close(nothing, background().expand_as(nothing))
    assert {len(nouns) for nouns in videos.nouns} == {1, 2}


def test_objects_move_and_do_not_overlap() -> None:
    videos = sample_videos(64, torch.Generator().manual_seed(1), two_objects=1.0)
    assert ((videos.coverage[:, 0] > 0.5) & (videos.coverage[:, 1] > 0.5)).sum() == 0
    assert (videos.pixels[:, 0] != videos.pixels[:, -1]).flatten(1).any(dim=1).all()


def test_the_tokenizer_finds_a_concept_in_a_prompt(trained: tuple[TextToVideo, Judge]) -> None:
    model, _ = trained
    assert model.token_indices("red circle and blue square", "circle") == [1]
    assert model.token_indices("red circle and blue square", "square") == [4]
    assert model.token_indices("red circle", "square") == []
    first, second = model.encode(["red circle and blue square", "blue circle and red square"])
    # The same words in another order: the encoder must tell whose colour is whose.
    assert not torch.allclose(first[1], second[1])


def test_the_weights_are_small_and_the_judge_is_right(trained: tuple[TextToVideo, Judge]) -> None:
    _, judge = trained
    assert WEIGHTS.stat().st_size < 4_000_000
    assert held_out_accuracy(judge, seed=12345) >= 0.97


def test_the_judge_sees_nothing_where_nothing_is(trained: tuple[TextToVideo, Judge]) -> None:
    _, judge = trained
    empty = background()[:, None, None].expand(1, 3, 3, 16, 24)
    assert (judge(empty) < 0).all()
    noise = torch.randn(8, 3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    assert (judge(empty + 0.1 * noise) < 0).all()


def test_sampling_is_reproducible_and_follows_the_prompt(trained: tuple[TextToVideo, Judge]) -> None:
    model, judge = trained
    prompts = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
    noise = sampling.starting_noise(len(prompts), 7)
    videos = sampling.sample(model, prompts, noise).videos
    assert torch.equal(videos, sampling.sample(model, prompts, noise).videos)
    seen = judge(videos) > 0
    right = [seen[row, row // 3, row % 3].item() for row in range(len(prompts))]
    assert sum(right) >= 7


def test_watching_other_prompts_does_not_change_the_way(trained: tuple[TextToVideo, Judge]) -> None:
    model, _ = trained
    noise = sampling.starting_noise(2, 3)
    prompts, other = ["blue square", "red triangle"], ["blue square and red circle", "red triangle and green circle"]
    alone = sampling.sample(model, prompts, noise)
    watched = sampling.sample(model, prompts, noise, other=other, concept="circle")
    torch.testing.assert_close(alone.videos, watched.videos, rtol=1e-4, atol=1e-4)
    assert watched.masks is not None and watched.masks.shape == (2, *TOKEN_GRID)
    assert 0 < watched.masks.mean() < 1
    step = watched.steps[3]
    again = model.velocity(step.x_t, step.t, model.encode(other))
    torch.testing.assert_close(step.v_other, again, rtol=1e-4, atol=1e-4)


def test_appearances_on_rendered_videos(trained: tuple[TextToVideo, Judge]) -> None:
    """Renders are what they say, so a report on them is known; asked for something else, it is known too."""
    _, judge = trained
    videos = sample_videos(200, torch.Generator().manual_seed(3))
    report = evaluate.appearances(judge, videos.pixels, videos.nouns, "circle")
    for shape in SHAPES:
        assert report[shape]["asked"] >= 0.95
        assert report[shape]["colour"] >= 0.95
        assert report[shape]["uninvited"] <= 0.05
        assert report[shape]["beside"] is None if shape == "circle" else report[shape]["beside"] >= 0.95
    only_squares = [(Noun("square", "red"),)] * 200
    report = evaluate.appearances(judge, videos.pixels, only_squares, "circle")
    share = sum("circle" in prompt for prompt in videos.prompts) / 200
    assert report["circle"]["asked"] is None
    assert report["circle"]["uninvited"] == pytest.approx(share, abs=0.03)


def test_mask_overlap_is_one_for_the_object_itself(trained: tuple[TextToVideo, Judge]) -> None:
    _, judge = trained
    videos = sample_videos(20, torch.Generator().manual_seed(4), two_objects=1.0)
    rows = [row for row, nouns in enumerate(videos.nouns) if any(noun.shape == "circle" for noun in nouns)]
    index = [next(i for i, noun in enumerate(videos.nouns[row]) if noun.shape == "circle") for row in rows]
    coverage = videos.coverage[rows, index]
    exact = torch.nn.functional.avg_pool2d(coverage, 2) >= 0.5
    assert evaluate.mask_overlap(judge, exact.float(), videos.pixels[rows], "circle") > 0.9
    assert evaluate.mask_overlap(judge, 1 - exact.float(), videos.pixels[rows], "circle") < 0.05


def test_an_unerased_model_has_coefficient_one_and_no_drift(trained: tuple[TextToVideo, Judge]) -> None:
    model, _ = trained
    prompts = ["red circle", "blue circle"]
    steps = sampling.sample(model, prompts, sampling.starting_noise(2, 5)).steps
    assert evaluate.erasure_coefficient(model, prompts, steps) == pytest.approx(1, abs=1e-3)
    assert evaluate.drift(model, prompts, steps) == pytest.approx(0, abs=1e-4)
    assert evaluate.erasure_coefficient(model, ["", ""], steps) == pytest.approx(0, abs=1e-3)


def test_target_points_pair_a_prompt_with_what_is_left_of_it(trained: tuple[TextToVideo, Judge]) -> None:
    model, _ = trained
    noise = sampling.starting_noise(3, 6)
    for alone, leading in itertools.product((True, False), repeat=2):
        cache = erase.target_cache(model, "circle", noise, random.Random(0), alone=alone, leading=leading)
        assert len(cache) == 3 * (erase.LEADING_STEPS if leading else sampling.STEPS)
        said = model.velocity(cache.x_t, cache.t, cache.text)
        torch.testing.assert_close(said, cache.v_cond, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(cache.v_cond, cache.v_uncond, atol=1e-2)


def test_a_short_run_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erase, "STEPS", 3)
    for name in ("LEADING_TRAJECTORIES", "ALONE_TRAJECTORIES", "BESIDE_TRAJECTORIES"):
        monkeypatch.setattr(erase, name, 3)
    monkeypatch.setattr(erase, "KEPT_TRAJECTORIES", 3)
    monkeypatch.setattr(evaluate, "ALONE", 2)
    monkeypatch.setattr(evaluate, "PAIRED", 2)
    report = run("triangle", tmp_path, seed=1)
    assert json.loads((tmp_path / "demo.json").read_text()) == report
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))
    text = table(report)
    assert "triangle" in text and "IoU" in text
    assert set(report["appearances"]["after"]) == set(SHAPES)
    fresh, _, _ = load()
    assert len(load_erasers(fresh.transformer, tmp_path / "erasers")) == 4


def test_pretraining_resumes_as_if_unbroken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    judged = {"fastunlearn.demo.judge.STEPS": 2, "fastunlearn.demo.pretrain.BATCH": 4}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in judged.items():
            patch.setattr(name, value)
        pretrain(["--steps", "2", "--output", str(whole)])
        pretrain(["--steps", "2", "--output", str(parts), "--minutes", "0.00001"])
        assert "run the same command to go on" in capsys.readouterr().out
        assert parts.with_suffix(".checkpoint").exists() and not parts.exists()
        with pytest.raises(SystemExit, match="--seed 0 --steps 2"):
            pretrain(["--steps", "3", "--output", str(parts)])
        pretrain(["--steps", "2", "--output", str(parts)])
    assert whole.read_bytes() == parts.read_bytes()
    assert not parts.with_suffix(".checkpoint").exists()
