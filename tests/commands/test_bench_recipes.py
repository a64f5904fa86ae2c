"""The comparison of recipes: what a row changes, what is done once, and the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastunlearn.bench import recipes
from fastunlearn.demo import prompts
from fastunlearn.training.options import PrepareOptions, TrainingOptions


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts, sampling steps and training steps."""
    judged = prompts.judged
    monkeypatch.setattr(prompts, "judged", lambda concept: judged(concept)[::9])
    size = {"num_inference_steps": 2, "batch_size": 4, "num_trajectories": 2, "timesteps_per_trajectory": 1}
    training = {"max_train_steps": 2, "checkpointing_steps": 10, "validation_share": 0.0}
    monkeypatch.setattr(recipes, "_SIZE", {"prepare": size, "train": training})
    monkeypatch.setattr(recipes, "ROWS", {"defaults": {}, "paper": recipes.ROWS["paper"]})


def test_every_row_has_options_that_exist() -> None:
    for row in recipes.ROWS.values():
        assert set(row) <= {"prepare", "train"}
        assert set(row.get("prepare", {})) <= set(PrepareOptions.__dataclass_fields__)
        assert set(row.get("train", {})) <= set(TrainingOptions.__dataclass_fields__)


def test_a_row_changes_what_it_says() -> None:
    defaults = TrainingOptions("", Path(), Path())
    for row, option, value in (
        ("defaults, eta 7.5", "negative_guidance_scale", 7.5),
        ("defaults, no localization", "localization_weight", 0.0),
        ("defaults, constant learning rate", "lr_scheduler", "constant_with_warmup"),
    ):
        assert recipes.ROWS[row]["train"] == {option: value} and getattr(defaults, option) != value
        assert not recipes.ROWS[row]["prepare"]


def test_rank_correlation() -> None:
    assert recipes.rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert recipes.rank_correlation([1, 2, 3], [3, 2, -1]) == pytest.approx(-1)
    # The ranks are 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 1 - the variance that ties take away.
    assert recipes.rank_correlation([0, 5, 5, 7], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert math.isnan(recipes.rank_correlation([1, 1], [1, 2]))


def test_runs_are_done_once_and_shown(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "recipes.json"
    arguments = ["--rows", "defaults", "paper", "--seeds", "3", "--output", str(output), "--device", "cpu"]
    recipes.main(arguments)
    printed = capsys.readouterr().out
    done: dict[str, Any] = json.loads(output.read_text())
    assert [(run["row"], run["seed"]) for run in done["runs"]] == [("defaults", 3), ("paper", 3)]
    table = printed[printed.index("share of videos before -> after") :].splitlines()
    assert [line.split("  ")[0] for line in table[2:4]] == ["defaults", "paper"]
    assert all(line.count("->") == 5 for line in table[2:4])
    assert len(done["runs"][0]["metrics"]) == 7 and "over 2 runs" in printed
    content = output.read_bytes()
    recipes.main(arguments)
    assert output.read_bytes() == content and "\n".join(table) in capsys.readouterr().out
