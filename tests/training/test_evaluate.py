from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fastunlearn.training import evaluate, prepare
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.requests import read_requests
from fastunlearn.training.evaluate import run
from fastunlearn.training.evaluation.measure import KEPT, batches, group_timesteps, measure
from fastunlearn.training.evaluation.report import draw, table
from fastunlearn.training.loop import record
from fastunlearn.training.model.erased import erasers_digest
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.options import EvaluateOptions

Pipelines = Callable[[str], Path]
TARGET_PROMPTS = "a red circle\na blue circle\ta blue square\n"
KEPT_PROMPTS = "a red square\n"


def save_erasers(pipeline: Path, folder: Path, std: float) -> Path:
    model = load_model(pipeline, dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    for layers in model.attach_erasers(rank=4):
        for eraser in layers.values():
            torch.nn.init.normal_(eraser.up.weight, std=std)
    model.save_erasers(folder, concept="circle")
    return folder


def options(pipeline: Path, folder: Path, erasers: Path, **more: Any) -> EvaluateOptions:
    folder.mkdir(exist_ok=True)
    (folder / "targets.txt").write_text(TARGET_PROMPTS)
    (folder / "kept.txt").write_text(KEPT_PROMPTS)
    settings: dict[str, Any] = {
        "concept": "circle",
        "target_prompts": folder / "targets.txt",
        "kept_prompts": folder / "kept.txt",
        "num_trajectories": 3,
        "timesteps_per_trajectory": 2,
        "num_inference_steps": 4,
        "num_videos": 1,
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "batch_size": 2,
        "mixed_precision": "no",
        "device": "cpu",
    }
    return EvaluateOptions(str(pipeline), (erasers,), folder / "out", **{**settings, **more})


@pytest.fixture(scope="module")
def evaluated(
    tiny_pipeline: Pipelines, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvaluateOptions, dict[str, Any]]:
    """An evaluation of the tiny Wan with two experts: its options and its report."""
    pipeline, folder = tiny_pipeline("wan-2.2"), tmp_path_factory.mktemp("evaluated")
    chosen = options(pipeline, folder, save_erasers(pipeline, folder / "erasers", 0.3))
    return chosen, run(chosen)


def test_the_cache_has_the_chosen_baseline_on_trajectories_of_the_target_prompts(
    tiny_pipeline: Pipelines, tmp_path: Path
) -> None:
    chosen = options(tiny_pipeline("cogvideox"), tmp_path, tmp_path)
    for changes, baselines in (
        ({}, ["a red", "a blue square", "a red"]),
        ({"replacement": "star"}, ["a red star", "a blue square", "a red star"]),
        ({"baseline": "negative"}, [None, "a blue square", None]),
    ):
        preparing = evaluate.prepare_options(dataclasses.replace(chosen, **changes))  # type: ignore[arg-type]
        requests = read_requests(preparing)
        assert [request.instead for request in requests[:3]] == baselines
        assert {request.follow for request in requests} == {"prompt"}


def test_the_report_agrees_with_the_metrics_definitions(
    evaluated: tuple[EvaluateOptions, dict[str, Any]],
) -> None:
    chosen, report = evaluated
    cache = TeacherCache.open(chosen.output_dir / "cache")
    model = load_model(chosen.pretrained_model_name_or_path, dtype=torch.float32, device="cpu")
    model.load_erasers(chosen.erasers)
    sums = {name: [0.0, 0.0] for name in ("erasure", "distance", "drift", "inside")}
    at: dict[float, list[float]] = {}
    for name, points in cache.groups.items():
        for index in range(len(points)):
            row = points.rows([index])
            with torch.no_grad():
                velocity = model.experts[model.expert_index(row.t.item())](row.x_t, row.t, row.condition).double()
            v_cond, v_uncond = row.v_cond.double(), row.v_uncond.double()
            change = (velocity - v_cond).square()
            if name == KEPT:
                sums["drift"][0] += change.sum().item()
                sums["drift"][1] += v_cond.square().sum().item()
                continue
            along = ((velocity - v_uncond) * (v_cond - v_uncond)).sum().item()
            length = (v_cond - v_uncond).square().sum().item()
            sums["distance"][0] += (velocity - v_uncond).square().sum().item()
            sums["distance"][1] += length
            entry = at.setdefault(row.t.item(), [0.0, 0.0])
            for totals in (sums["erasure"], entry):
                totals[0] += along
                totals[1] += length
            assert row.mask is not None
            mask = row.mask.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]
            sums["inside"][0] += (change * mask).sum().item()
            sums["inside"][1] += change.sum().item()
    assert report["erasure_coefficient"] == pytest.approx(sums["erasure"][0] / sums["erasure"][1], rel=1e-4)
    assert report["distance_to_baseline"] == pytest.approx((sums["distance"][0] / sums["distance"][1]) ** 0.5, rel=1e-4)
    early = [at[t] for t in sorted(at, reverse=True)[: (len(at) + 1) // 2]]
    assert 0 < len(early) < len(at)
    expected = sum(along for along, _ in early) / sum(length for _, length in early)
    assert report["early_erasure_coefficient"] == pytest.approx(expected, rel=1e-4)
    assert report["preserved_drift"] == pytest.approx((sums["drift"][0] / sums["drift"][1]) ** 0.5, rel=1e-4)
    assert report["localization"] == pytest.approx(sums["inside"][0] / sums["inside"][1], rel=1e-4)
    assert 0 < report["localization"] < 1
    assert abs(report["erasure_coefficient"] - 1) > 1e-3 and report["preserved_drift"] > 1e-3
    rows = {row["from"]: row for row in report["by_timestep"]}
    for t, (along, length) in at.items():
        assert rows[t]["erasure_coefficient"] == pytest.approx(along / length, rel=1e-4)
    assert {0, 1} == {model.expert_index(t) for t in at}


def test_the_report_names_what_was_evaluated(evaluated: tuple[EvaluateOptions, dict[str, Any]]) -> None:
    chosen, report = evaluated
    written = json.loads((chosen.output_dir / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert written["concept"] == "circle"
    assert written["options"]["num_inference_steps"] == 4
    (erasers,) = written["erasers"]
    assert (erasers["folder"], erasers["scale"]) == (str(chosen.erasers[0]), 1.0)
    assert erasers["sha256"] == erasers_digest(chosen.erasers[0]) and len(erasers["sha256"]) == 64
    cache = TeacherCache.open(chosen.output_dir / "cache")
    assert written["cache"]["fingerprint"] == cache.fingerprint and written["cache"]["seed"] == 1000
    assert written["cache"]["weights"] == cache.facts["weights"]
    assert written["versions"]["torch"] == torch.__version__
    assert (written["target_points"], written["kept_points"]) == (6, 6)
    prompts = {row["prompt"]: row["points"] for row in written["by_prompt"]}
    assert prompts == {"a red circle": 4, "a blue circle": 2, "a red square": 6}
    assert written["frozen_drift"] < 1e-4  # in float32 the frozen model reproduces the cache
    share = written["mask_share"]
    assert 0 < share["least"] <= share["mean"] <= share["most"] < 1
    width, height = Image.open(chosen.output_dir / "evaluation.png").size
    assert width > 2 * height


def test_evaluation_and_preparation_have_different_default_seeds() -> None:
    from fastunlearn.training.options import PrepareOptions

    seeds = [{f.name: f.default for f in dataclasses.fields(cls)}["seed"] for cls in (EvaluateOptions, PrepareOptions)]
    assert seeds == [1000, 0]


@pytest.mark.filterwarnings("ignore:.*only 1 of 2 prompts are used:UserWarning")
@pytest.mark.parametrize("family", ["cogvideox-rope", "hunyuan_video"])
def test_erasers_at_scale_0_change_nothing(family: str, tiny_pipeline: Pipelines, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(family)
    erasers = save_erasers(pipeline, tmp_path / "erasers", 0.3)
    strong = options(pipeline, tmp_path, erasers, num_trajectories=1)
    assert run(strong)["erasure_coefficient"] != pytest.approx(1, abs=1e-3)
    cache = tmp_path / "out" / "cache"
    none = {"concept": None, "target_prompts": None, "kept_prompts": None}
    more = {"cache_dir": cache, "batch_size": 1, "overwrite_output_dir": True, **none}
    report = run(options(pipeline, tmp_path, erasers, eraser_scales=(0.0,), **more))
    assert report["concept"] == "circle"
    assert report["erasure_coefficient"] == pytest.approx(1, abs=1e-4)
    assert report["preserved_drift"] < 1e-4


def test_a_second_evaluation_reuses_the_cache(
    evaluated: tuple[EvaluateOptions, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, report = evaluated
    times = {path: path.stat().st_mtime_ns for path in (chosen.output_dir / "cache").glob("shard-*")}
    capsys.readouterr()
    again = run(chosen)
    assert {path: path.stat().st_mtime_ns for path in (chosen.output_dir / "cache").glob("shard-*")} == times
    assert again == report
    printed = capsys.readouterr().out
    assert "evaluation.json" in printed and table(report) in printed
    with pytest.raises(ValueError, match="begun with other arguments(.|\n)*seed: 1000 -> 1001"):
        run(dataclasses.replace(chosen, seed=1001, overwrite_output_dir=True))


def test_another_evaluation_is_not_replaced(
    evaluated: tuple[EvaluateOptions, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, report = evaluated
    output = tmp_path / "out"
    shutil.copytree(chosen.output_dir, output)
    chosen = dataclasses.replace(chosen, output_dir=output)
    path = output / "evaluation.json"
    before = path.read_bytes()
    erasers = save_erasers(Path(chosen.pretrained_model_name_or_path), tmp_path / "erasers", 0.1)
    with pytest.raises(
        FileExistsError, match=r"evaluation.json: .*overwrite_output_dir .*erasers\[0\].sha256: '.* -> '"
    ):
        run(dataclasses.replace(chosen, erasers=(erasers,)))
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.erased, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
        for change, match in (
            ({"seed": 7}, "options.seed: 1000 -> 7"),
            ({"batch_size": 1}, "options.batch_size: 2 -> 1"),
        ):
            with pytest.raises(FileExistsError, match=rf"another one; choose another output_dir.*{match}$"):
                run(dataclasses.replace(chosen, **change))
        assert path.read_bytes() == before
        path.write_text("something else")
        with pytest.raises(FileExistsError, match="expected this evaluation or none"):
            run(chosen)
    path.write_bytes(before)
    moved = shutil.copytree(chosen.erasers[0], tmp_path / "moved")
    assert run(dataclasses.replace(chosen, erasers=(moved,)))["by_prompt"] == report["by_prompt"]
    replaced = run(dataclasses.replace(chosen, erasers=(erasers,), overwrite_output_dir=True))
    assert replaced["erasers"][0]["sha256"] != report["erasers"][0]["sha256"]
    assert json.loads(path.read_text()) == json.loads(json.dumps(replaced))


@pytest.mark.filterwarnings("ignore:.* of 2 prompts are used")
def test_prompts_and_seeds_of_the_training_are_noticed(
    evaluated: tuple[EvaluateOptions, dict[str, Any]], tmp_path: Path
) -> None:
    chosen, _ = evaluated
    cache = TeacherCache.open(chosen.output_dir / "cache")
    erasers = shutil.copytree(chosen.erasers[0], tmp_path / "erasers")
    trained_from = SimpleNamespace(facts={"seed": 0}, point_prompts=lambda: ["a Red  circle", "a green square"])
    record.write(erasers, {}, trained_from)  # type: ignore[arg-type]
    sampled = dataclasses.replace(chosen, erasers=(erasers,), output_dir=tmp_path / "out")
    few = dataclasses.replace(sampled, num_trajectories=1, num_inference_steps=2)
    tail = "that these erasers were trained with; the result does not tell how they work on others$"
    with pytest.warns(UserWarning, match=f"erasers: .* got 1 of 2 prompts .such as 'a red circle'. {tail}"):
        run(few)
    for seed, what in ((1000, "the seed 1000"), (0, None)):
        trained_from = SimpleNamespace(facts={"seed": seed}, point_prompts=lambda: ["a green square"])
        record.write(erasers, {}, trained_from)  # type: ignore[arg-type]
        given = dataclasses.replace(
            sampled, cache_dir=cache.folder, output_dir=tmp_path / f"given-{seed}", batch_size=12
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(given)
        messages = [str(entry.message) for entry in caught if "held-out" in str(entry.message)]
        expected = [] if what is None else [f"got {what} that these erasers were trained with"]
        assert len(messages) == len(expected) and all(text in messages[0] for text in expected)


def test_erasers_and_caches_of_another_model_are_refused(
    evaluated: tuple[EvaluateOptions, dict[str, Any]],
    tiny_pipeline: Pipelines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen, _ = evaluated
    cache = chosen.output_dir / "cache"
    wan, cogvideox = tiny_pipeline("wan"), tiny_pipeline("cogvideox")
    wan_erasers = save_erasers(wan, tmp_path / "erasers", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "prepare", lambda *a, **k: pytest.fail("sampled before the erasers were tried"))
        with pytest.raises(ValueError, match="^[^\n]*expected erasers for cogvideox, got erasers for wan$"):
            run(options(cogvideox, tmp_path, wan_erasers))
    erasers = save_erasers(cogvideox, tmp_path / "cog", 0.1)
    with pytest.raises(
        ValueError, match="cache: expected one made with a cogvideox model, got one made with a wan model$"
    ):
        run(options(cogvideox, tmp_path, erasers, cache_dir=cache))
    from fastunlearn.testing.tiny_pipelines import save_tiny_pipeline

    save_tiny_pipeline("wan-2.2", tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match="expected a teacher cache of this model, got one that .* differs from by [0-9]+%"
    ):
        other = {"pretrained_model_name_or_path": str(tmp_path / "other"), "output_dir": tmp_path / "of-other"}
        run(dataclasses.replace(chosen, cache_dir=cache, **other))


def test_velocities_that_are_not_finite_are_refused(evaluated: tuple[EvaluateOptions, dict[str, Any]]) -> None:
    chosen, _ = evaluated
    cache = TeacherCache.open(chosen.output_dir / "cache")
    model = load_model(chosen.pretrained_model_name_or_path, dtype=torch.float32, device="cpu")
    for layers in model.attach_erasers(rank=2):
        next(iter(layers.values())).up.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="finite ones, got nan"):
        measure(model, cache, 2)


def test_mistakes_are_found_before_anything_is_loaded(
    tiny_pipeline: Pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.erased, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
    pipeline, erasers = tiny_pipeline("wan"), tmp_path / "erasers"
    with pytest.raises(FileNotFoundError, match="erasers: expected a folder, got .*erasers, which does not exist"):
        run(options(pipeline, tmp_path, erasers))
    erasers.mkdir()
    (erasers / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no.txt"):
        run(options(pipeline, tmp_path, erasers, target_prompts=tmp_path / "no.txt"))
    with pytest.raises(FileNotFoundError, match="index.json is missing"):
        run(options(pipeline, tmp_path, erasers, cache_dir=tmp_path / "no cache"))
    with pytest.raises(ValueError, match="kept_prompts: expected a value where there is no cache_dir"):
        options(pipeline, tmp_path, erasers, kept_prompts=None)


def test_out_of_memory_is_explained(
    evaluated: tuple[EvaluateOptions, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate, "measure", fails)
    with pytest.raises(MemoryError, match="What helps: --batch-size 1; --mixed-precision bf16; a smaller --height"):
        run(evaluated[0])


def test_timesteps_are_grouped_evenly() -> None:
    assert group_timesteps([], 10) == []
    assert group_timesteps([3.0, 2.0, 1.0], 10) == [[3.0], [2.0], [1.0]]
    groups = group_timesteps([float(t) for t in range(50, 0, -1)], 10)
    assert [len(group) for group in groups] == [5] * 10
    assert [t for group in groups for t in group] == [float(t) for t in range(50, 0, -1)]


def test_every_batch_belongs_to_one_expert(evaluated: tuple[EvaluateOptions, dict[str, Any]]) -> None:
    chosen, _ = evaluated
    points = TeacherCache.open(chosen.output_dir / "cache").groups["target"]
    rows = batches(points, 4)
    assert sorted(torch.cat(rows).tolist()) == list(range(len(points)))
    assert all(len(points.experts[batch].unique()) == 1 and len(batch) <= 4 for batch in rows)


def test_what_was_not_measured_is_left_out(evaluated: tuple[EvaluateOptions, dict[str, Any]], tmp_path: Path) -> None:
    _, report = evaluated
    nothing = {"localization": None, "preserved_drift": None}
    bare = {**report, **nothing, "mask_share": None, "frozen_drift": None, "concept": None}
    bare["by_timestep"] = [{**row, **nothing} for row in report["by_timestep"]]
    bare["by_timesteps"] = [{**row, **nothing} for row in report["by_timesteps"]]
    bare["by_prompt"] = []
    bare["seen"] = None
    text = table(bare)
    assert "concept seen            not measured: no videos were sampled" in text.splitlines()
    assert text.splitlines()[-1].startswith("distance to baseline    1: nothing erased")
    assert [line.split()[-1] for line in text.splitlines() if "total" in line] == ["-"]
    draw(bare, tmp_path / "a.png")
    draw(report, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("concept", ["$x^$", "a_b", "狗", "a word " * 20])
def test_a_concept_of_any_letters_is_drawn_without_a_warning(
    concept: str, evaluated: tuple[EvaluateOptions, dict[str, Any]], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, of glyphs that are missing
        draw({**evaluated[1], "concept": concept}, tmp_path / "a.png")


def test_no_text_lies_on_a_curve_and_every_axis_has_a_name(
    evaluated: tuple[EvaluateOptions, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    draw({**evaluated[1], "frozen_drift": 0.1}, tmp_path / "a.png")
    (figure,) = figures
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and not axes.texts
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0
    labels = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    assert {"1: nothing erased", "0: the concept has no effect", "drift by rounding: 0.1000"} < set(labels)
    assert any(re.fullmatch(r"mask: \d+% of the tokens \(\d+% to \d+%\)", label) for label in labels)
