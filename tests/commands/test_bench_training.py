from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastunlearn.bench import published, step_costs, steps, training
from fastunlearn.bench.agreement import Disagreement
from fastunlearn.bench.cogvideox import SIZES, Size
from fastunlearn.bench.steps import StepCost, StepRunner
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.loop.terms import Terms

CPU = torch.device("cpu")
SMALL = Size(2, 2, 16, 64, 64, 5, text_tokens=8, text_features=16, time_features=16, rank=4)
FEW = ("fastunlearn", "fastunlearn, dense localization")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a process's peak memory is known on Linux")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small models of both kinds: without rotary embeddings, and with them."""
    monkeypatch.setattr(training, "SIZES", {"tiny": SMALL, "cogvideox-5b": replace(SMALL, rotary=True)})
    gc.freeze()  # the meter collects garbage before every call: it need not search what other modules and tests hold
    yield
    gc.unfreeze()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some of the peers."""
    for name, peers in (("PUBLISHED", (step_costs.TO_A_RANDOM_STEP, step_costs.TO_THE_END)), ("OURS", FEW)):
        monkeypatch.setattr(training, name, {peer: getattr(training, name)[peer] for peer in peers})


def run(*arguments: str) -> None:
    training.main(["--device", "cpu", "--steps", "1", "--sampling-steps", "2", "--trajectories", "1", *arguments])


def test_sizes_are_those_of_the_published_models() -> None:
    for name, features, layers in (("cogvideox-2b", 1920, 30), ("cogvideox-5b", 3072, 42)):
        size = SIZES[name]
        assert (size.tokens, size.features, size.layers) == (17550, features, layers)
        assert size.latents == (13, 60, 90)


@on_linux
@pytest.mark.usefixtures("small")
def test_every_peer_is_measured_printed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "training.json"
    run("--model", "cogvideox-5b", "--output", str(output))
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert "cogvideox-5b: 2 layers, 2 heads x 16, 32 + 8 tokens, erasers of rank 4; float32 on cpu" in printed
    assert {"command", "commit", "environment", "model", "sampling_steps"} <= report.keys()
    assert report["largest_relative_difference"] <= 1e-4
    rows = {row["peer"]: row for row in report["step"]}
    # Two passes per sampling step; then one for maps, one for outputs, three of the teacher, two of the student.
    assert rows[step_costs.TO_A_RANDOM_STEP]["passes"] == 2 + 7
    assert rows[step_costs.TO_THE_END]["passes"] == 4 + 7
    assert {rows[name]["passes"] for name in training.OURS} == {2}
    assert list(rows) == [*training.PUBLISHED, *training.OURS]
    for row in rows.values():
        assert re.search(rf"^{re.escape(row['peer'])} +\d+\.\d +\d+\.\d\d\d +\d+$", printed, re.MULTILINE)
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 0
    cache = report["cache"]
    assert cache["passes"] == 64 * 2 * 2
    assert cache["training_steps"] == 500
    assert cache["disk_bytes"] > 64 * 2 * 3 * (2 * 16 * 8 * 8) * 4  # x_t and two velocities at two points
    compared = report["step_with_its_share_of_the_cache"]
    assert [entry["peer"] for entry in compared] == list(training.OURS)
    for entry in compared:
        row = rows[entry["peer"]]
        assert entry["passes"] == row["passes"] + cache["passes"] / 500
        assert entry["seconds"] == pytest.approx(row["seconds"] + cache["seconds"] / 500)
        ratio = rows[step_costs.TO_THE_END]["seconds"] / entry["seconds"]
        assert entry["times_less_than_to_the_end"] == pytest.approx(ratio)
    assert [aim["aim"] for aim in report["aims"]] == [aim.text for aim in step_costs.AIMS]


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (
            published,
            "plain_velocity_loss",
            lambda prediction, uncond, cond, mask: (prediction - uncond).square().mean(),
        ),
        (published, "plain_localization_loss", lambda outputs, mask: sum(o.square().sum() for o in outputs)),
        (steps, "ETA", 2.0),
    ],
)
def test_no_time_is_measured_when_steps_disagree(
    module: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(Disagreement, match="loss: expected a relative difference of at most 1e-04, got "):
        steps.check(StepRunner(SMALL, CPU, torch.float32, 2))


@on_linux
@pytest.mark.usefixtures("small")
def test_a_disagreement_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(steps, "ETA", 2.0)
    with pytest.raises(SystemExit, match="results disagree, so no time is reported: unlearning loss"):
        run()
    assert "passes" not in capsys.readouterr().out


def test_steps_agree_in_bfloat16_and_with_rotary_embeddings() -> None:
    assert steps.check(StepRunner(replace(SMALL, rotary=True), CPU, torch.bfloat16, 2)) > 0


def test_dense_localization_is_the_same_loss(tmp_path: Path) -> None:
    runner = StepRunner(SMALL, CPU, torch.float32, 2)
    runner.make_cache(tmp_path, 1)
    points = TeacherCache.open(tmp_path).groups["target"].rows([0])
    step = runner.published_step()
    for eraser in step.erasers.values():
        torch.nn.init.normal_(eraser.up.weight, std=0.02)
    losses = [
        terms(runner.training, device=CPU, dtype=torch.float32).target_losses(step.trained, step.erasers, points, 7.5)
        for terms in (Terms, steps._DenseTerms)
    ]
    assert losses[0][1] is not None
    torch.testing.assert_close(losses[1], losses[0])


def test_random_sampling_steps_are_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []
    monkeypatch.setattr(published.PublishedStep, "step", lambda self, noise, until: reached.append(until))
    runner = StepRunner(SMALL, CPU, torch.float32, 50)
    for call in range(5):
        runner.run_published(call, 5)
    runner.run_published(0, 5, to_the_end=True)
    assert reached == [1, 5, 1, 15, 1, 25, 1, 35, 1, 45, 1, 50]


@on_linux
@pytest.mark.usefixtures("small", "few")
def test_a_peer_that_runs_out_of_memory_says_where_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "check", lambda runner: 0.0)  # it needs what fails here
    monkeypatch.setattr(published, "_MapsCapture", no_memory)
    monkeypatch.setattr(steps._DenseTerms, "target_losses", no_memory)
    output = tmp_path / "training.json"
    run("--output", str(output))
    printed = capsys.readouterr().out
    assert re.search(rf"{re.escape(step_costs.TO_THE_END)} +out of memory during the attention maps\n", printed)
    assert re.search(r"fastunlearn, dense localization +out of memory during the student\n", printed)
    report = json.loads(output.read_text())
    compared = {entry["peer"]: entry for entry in report["step_with_its_share_of_the_cache"]}
    assert "fastunlearn, dense localization" not in compared
    assert compared["fastunlearn"]["seconds"] > 0
    assert compared["fastunlearn"]["times_less_than_to_the_end"] is None
    assert report["aims"] == []


def test_ratios_and_goals_match_a_calculation_by_hand() -> None:
    rows = [
        step_costs.Row(step_costs.TO_A_RANDOM_STEP, 57, 12.0, 1000),
        step_costs.Row(step_costs.TO_THE_END, 107, 24.0, 1500),
        step_costs.Row("fastunlearn", 2, 1.0, 700),
        step_costs.Row("fastunlearn, sequential terms", 2, 1.5, 300),
    ]
    cache = step_costs.CacheCost(4, passes=6400, seconds=1000, peak_bytes=400, disk_bytes=0)
    plain, sequential = step_costs.with_cache(rows, cache)
    assert plain == {
        "peer": "fastunlearn",
        "passes": 2 + 12.8,
        "seconds": 3.0,
        "peak_bytes": 700,
        "times_less_than_to_a_random_step": 4.0,
        "times_less_than_to_the_end": 8.0,
        "of_the_memory": 0.7,
    }
    assert (sequential["seconds"], sequential["peak_bytes"], sequential["of_the_memory"]) == (3.5, 400, 0.4)
    both = ["fastunlearn", "fastunlearn, sequential terms"]
    assert [(result["reached_by"], result["missed_by"]) for result in step_costs.aims([plain, sequential])] == [
        ([], both),
        (both, []),
        (both[1:], both[:1]),
    ]


def test_a_row_has_the_mean_cost_and_the_largest_peak() -> None:
    class Meter:
        runs, device = 2, CPU
        peaks = iter([7, 1, 9])

        def peak_bytes(self, function: Any) -> int:
            function()
            return next(self.peaks)

    def fails(call: int) -> StepCost:
        if call == 0:
            return StepCost(1, 1)
        raise steps.RanOut("the teacher")

    peers = {"good": lambda call: StepCost(10 + call, 1.0 + 2 * call), "bad": fails}
    good, bad = step_costs.measure(peers, Meter())  # type: ignore[arg-type]
    assert good == step_costs.Row("good", 10.5, 2.0, 9)
    assert bad == step_costs.Row("bad", ran_out="the teacher")


@on_linux
@pytest.mark.usefixtures("small", "few")
def test_running_out_of_memory_for_the_cache_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "check", lambda runner: 0.0)
    monkeypatch.setattr("fastunlearn.training.cache.teacher.denoise", no_memory)
    with pytest.raises(SystemExit, match="cannot make a cache to train from: out of memory"):
        run()


def test_reached_and_missed_goals_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    good = {"peer": "good", "passes": 2.0, "seconds": 1.0, "peak_bytes": 1, "of_the_memory": 0.4}
    good |= {"times_less_than_to_a_random_step": 4.0, "times_less_than_to_the_end": 6.0}
    training.print_tables([], [good, good | {"peer": "bad", "of_the_memory": 0.6}])
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "5 times less time than sampling to a random step: reached by none",
        "5 times less time than sampling to the end: reached by all",
        "half the memory: reached by good. Missed by bad",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nowhere"], "nowhere"),
        (["--device", "meta"], "device: expected one that torch can use here, got 'meta'"),
        (["--device", "cpu", "--steps", "0"], "--steps: expected a number from 1 to 1000000, got 0"),
        (["--device", "cpu", "--sampling-steps", "1"], "--sampling-steps: expected a number from 2 to 1000000, got 1"),
        (["--device", "cpu", "--steps", "1" + "0" * 30], "--steps: expected a number from 1 to 1000000, got 10000"),
        (["--device", "cpu", "--trajectories", "0"], "--trajectories: expected a number from 1 to 1000000, got 0"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        training.main(arguments)
