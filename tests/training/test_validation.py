"""Training measures erasure and drift at points of the cache that it never trains on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import MemoryCache, options_for, tiny_cache, tiny_model

from fastunlearn.training.evaluation.metrics import Ratio, drift, erasure
from fastunlearn.training.loop.batches import Batches, hold_out
from fastunlearn.training.loop.measurements import Measured, metrics, read, summary
from fastunlearn.training.loop.trainer import TrainingSummary
from fastunlearn.training.loop.validation import VALIDATION, Validation
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import TargetGroup
from fastunlearn.training.train import train

WATCHED = {"validation_share": 0.25, "validation_steps": 2}


def watched(
    output: Path, *, family: str = "cogvideox", experts: int = 1, points: int = 12, **changes: Any
) -> tuple[TrainingSummary, VideoModel, MemoryCache, list[dict[str, float]]]:
    """Trains a tiny model for 4 steps, measured at the start and after every second step."""
    model = tiny_model(family, experts=experts)
    cache = tiny_cache(model, points=points)
    targets = changes.pop("targets", None)
    rows: list[dict[str, float]] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "validation: expected a")
        done = train(
            model,
            cache,  # type: ignore[arg-type]
            output,
            options_for(output, **WATCHED | changes),
            targets=targets,
            on_step=lambda step, row: rows.append(row),
        )
    return done, model, cache, rows


@pytest.mark.parametrize(("family", "experts"), [("cogvideox", 1), ("wan", 2)])
def test_the_metrics_are_evaluate_s_at_the_held_out_points(family: str, experts: int, tmp_path: Path) -> None:
    targets = [TargetGroup("target"), TargetGroup("other", 2.0)]
    done, model, cache, rows = watched(tmp_path, family=family, experts=experts, targets=targets, learning_rate=0.1)
    held_out = hold_out(cache.groups, 0.25, 0)
    assert {name: int(chosen.sum()) for name, chosen in held_out.items()} == {"target": 3, "other": 4, "kept": 3}
    erased, changed = Ratio(), Ratio(root=True)
    with torch.no_grad():
        for name, chosen in held_out.items():
            for row in chosen.nonzero()[:, 0]:
                points = cache.groups[name].rows(row[None])
                velocity = model.experts[int(cache.groups[name].experts[row])](points.x_t, points.t, points.condition)
                if name == "kept":
                    changed.add(points.t, drift(velocity, points.v_cond))
                else:
                    erased.add(points.t, erasure(velocity, points.v_uncond, points.v_cond))
    start, _, last = done.measurements
    assert start == Measured(0, pytest.approx(1, abs=1e-5), pytest.approx(0, abs=1e-5))
    assert last == Measured(4, pytest.approx(erased.total, rel=1e-5), pytest.approx(changed.total, rel=1e-4))
    assert changed.total is not None and changed.total > 0.01
    assert [("erasure_coefficient" in row, "preserved_drift" in row) for row in rows] == [
        (False, False),
        (True, True),
    ] * 2
    assert done.metrics == rows[-1] and rows[-1]["erasure_coefficient"] == last.erasure_coefficient
    content = json.loads((tmp_path / VALIDATION).read_text())
    assert (content["target_points"], content["kept_points"]) == (7, 3)
    assert [entry["step"] for entry in content["measurements"]] == [0, 2, 4]
    assert read(tmp_path) == list(done.measurements)
    assert rows[-1]["smoothed_preserved_drift"] == content["measurements"][2]["smoothed_preserved_drift"]


def test_measurements_are_smoothed_and_summed_up() -> None:
    measurements = [Measured(0, 1.0, 0.0), Measured(25, 0.5, None), Measured(50, 0.25, 0.1)]
    rows = metrics(measurements)
    assert [row["smoothed_erasure_coefficient"] for row in rows] == [1.0, 0.75, 0.5]
    assert "preserved_drift" not in rows[1] and rows[2]["smoothed_preserved_drift"] == 0.1
    assert summary(measurements) == (
        "held-out points after 50 steps: erasure coefficient 1.00 -> 0.25 (1: nothing is erased, 0: as without the "
        "concept), drift at kept prompts 0.100 (0: none)"
    )
    assert summary([Measured(3, None, 0.5)]) == "held-out points after 3 steps: drift at kept prompts 0.500 (0: none)"


def test_whole_trajectories_are_held_out_and_never_drawn() -> None:
    model = tiny_model("wan", experts=2)
    groups = tiny_cache(model, points=20).groups
    for points in groups.values():
        points.trajectories = torch.arange(len(points)) // 2
    held_out = hold_out(groups, 0.3, 5)
    for name, points in groups.items():
        chosen = held_out[name]
        # Of 10, 12 and 11 trajectories, the last of which has one point.
        assert len(points.trajectories[chosen].unique()) == {"target": 3, "other": 4, "kept": 3}[name]
        assert not set(points.trajectories[chosen].tolist()) & set(points.trajectories[~chosen].tolist())
    targets = [TargetGroup("target"), TargetGroup("other")]
    batches = Batches(groups, targets, "kept", size=3, seed=5, held_out=held_out)
    drawn: dict[str, set[int]] = {name: set() for name in groups}
    for step in range(300):
        draw = batches.draw(step)
        drawn[draw.target.name].update(draw.target_rows.tolist())
        drawn["kept"].update(draw.kept_rows.tolist())
    for name, rows in drawn.items():
        assert rows == set((~held_out[name]).nonzero()[:, 0].tolist())
    assert all(torch.equal(chosen, held_out[name]) for name, chosen in hold_out(groups, 0.3, 5).items())
    assert any(not torch.equal(chosen, held_out[name]) for name, chosen in hold_out(groups, 0.3, 6).items())


def test_a_transformer_keeps_a_point_and_a_small_group_all_of_them() -> None:
    groups = tiny_cache(tiny_model("wan", experts=2), points=6).groups
    groups["target"].experts = torch.tensor([0, 0, 0, 0, 0, 1])
    for seed in range(8):
        chosen = hold_out(groups, 0.5, seed)["target"]
        assert chosen.sum() == 3 and not chosen[5]
    groups["target"].trajectories = torch.tensor([0, 0, 1, 1, 2, 2])
    assert set(hold_out(groups, 0.1, 0)) == {"other", "kept"}
    assert hold_out(groups, 0.0, 0) == {}


def test_points_are_spread_over_the_timesteps_and_bounded(tmp_path: Path) -> None:
    done, _, _, _ = watched(tmp_path, points=40, validation_share=0.5, train_batch_size=3, max_train_steps=1)
    content = json.loads((tmp_path / VALIDATION).read_text())
    assert (content["target_points"], content["kept_points"]) == (8, 8)
    assert [one.step for one in done.measurements] == [0, 1], "the last step is measured, whatever its number"


def test_a_resumed_run_goes_on_with_the_measurements(tmp_path: Path) -> None:
    whole, *_ = watched(tmp_path / "whole", checkpointing_steps=2)
    watched(tmp_path / "cut", checkpointing_steps=2)
    again, *_ = watched(tmp_path / "cut", checkpointing_steps=2, resume_from_checkpoint="checkpoint-2")
    assert again.measurements == whole.measurements and len(whole.measurements) == 3
    assert (tmp_path / "cut" / VALIDATION).read_bytes() == (tmp_path / "whole" / VALIDATION).read_bytes()
    finished, *_ = watched(tmp_path / "cut", checkpointing_steps=2, resume_from_checkpoint="latest")
    assert finished.measurements == whole.measurements
    with pytest.raises(ValueError, match="belongs to another run: validation_share was 0.25 and is 0.5"):
        watched(tmp_path / "cut", resume_from_checkpoint="latest", validation_share=0.5)
    fewer, *_ = watched(tmp_path / "cut", max_train_steps=1, overwrite_output_dir=True)
    assert [one.step for one in fewer.measurements] == [one.step for one in read(tmp_path / "cut")] == [0, 1]
    watched(tmp_path / "cut", max_train_steps=1, overwrite_output_dir=True, validation_steps=0)
    assert not (tmp_path / "cut" / VALIDATION).exists()


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        (None, "expected measurements at ascending steps, got None"),
        ([3], "got 3; the file is damaged: delete it"),
        ([{"step": True}], "got {'step': True}"),
        ([{"step": 0}, {"step": 0}], "got {'step': 0}"),
        ([{"step": 0, "preserved_drift": "0"}], "got {'step': 0, 'preserved_drift': '0'}"),
        ([{"step": 0, "erasure_coefficient": 10**40}], "got {'step': 0"),
    ],
)
def test_damaged_measurements_are_refused(entries: Any, match: str, tmp_path: Path) -> None:
    content = {"format": "fastunlearn-validation", "format_version": 1, "measurements": entries}
    (tmp_path / VALIDATION).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match):
        read(tmp_path)


def test_what_is_not_erased_or_not_kept_is_a_warning(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.warns(UserWarning) as caught:
        train(model, tiny_cache(model), tmp_path / "0", options_for(tmp_path / "0", learning_rate=0.0, **WATCHED))  # type: ignore[arg-type]
    (message,) = {str(warning.message) for warning in caught if str(warning.message).startswith("validation: ")}
    assert message.startswith(
        "validation: expected an erasure coefficient of at most 0.3 at held-out points, got 1.00: the concept is not "
        "erased; look at masks.png in the cache's folder"
    )
    model = tiny_model()
    strong = options_for(tmp_path / "1", learning_rate=1.0, preservation_weight=1e-6, **WATCHED)
    with pytest.warns(UserWarning, match="expected a drift of at most 0.1 at held-out points of kept prompts, got "):
        train(model, tiny_cache(model), tmp_path / "1", strong)  # type: ignore[arg-type]


def test_drift_is_measured_even_if_nothing_holds_it_back(tmp_path: Path) -> None:
    done, _, cache, _ = watched(tmp_path / "0", preservation_weight=0.0, learning_rate=0.1)
    assert (done.measurements[-1].preserved_drift or 0) > 0.01
    record = json.loads((tmp_path / "0" / "erasers/training.json").read_text())
    assert record["settings"]["kept"] is None, "a run may be resumed that drew no kept points"
    del cache.groups["kept"]
    output = tmp_path / "1"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "validation: expected an erasure")
        done = train(tiny_model(), cache, output, options_for(output, preservation_weight=0.0, **WATCHED))  # type: ignore[arg-type]
    assert {one.preserved_drift for one in done.measurements} == {None}


def test_a_small_group_is_not_watched_and_said_once(tmp_path: Path) -> None:
    model = tiny_model()
    cache = tiny_cache(model)
    cache.groups["target"].trajectories = torch.arange(8) // 3
    with pytest.warns(UserWarning) as caught:
        done = train(model, cache, tmp_path, options_for(tmp_path, **WATCHED))  # type: ignore[arg-type]
    (message,) = (str(warning.message) for warning in caught if "trajectories" in str(warning.message))
    assert message == (
        "validation: expected at least 4 trajectories in a group, to hold one out, got fewer in 'target', where "
        "erasure or drift is therefore not watched; prepare more trajectories, or set validation_share to 0"
    )
    assert {one.erasure_coefficient for one in done.measurements} == {None}
    assert done.measurements[-1].preserved_drift is not None


def test_a_velocity_that_is_not_finite_stops_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = Validation._sums
    monkeypatch.setattr(Validation, "_sums", lambda *of: [(t, float("nan"), divisor) for t, _, divisor in sums(*of)])
    with pytest.raises(FloatingPointError, match="step 0: the velocity at a held-out point at timestep .* not finite"):
        watched(tmp_path)
