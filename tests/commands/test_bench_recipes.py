"""The comparison of recipes: what a row changes, what is done once, and the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastunlearn.bench import recipes
from fastunlearn.demo import prompts
from fastunlearn.demo.model import WEIGHTS
from fastunlearn.demo.report import WHEN
from fastunlearn.demo.run import RECIPE
from fastunlearn.demo.world import SHAPES
from fastunlearn.training.data.recipe import read_recipe
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
    assert math.isnan(recipes.rank_correlation([1], [1]))


def _run(**changed: Any) -> dict[str, Any]:
    """A run as it is in the output file: half of the videos show what they should, whatever the row."""
    half = dict.fromkeys(("asked", "beside", "uninvited", "colour"), {"share": 0.5})
    seen = {when: dict.fromkeys(SHAPES, half) for when in WHEN}
    facts = {"model": "weights", "weights": "0" * 12, "row": "defaults", "seed": 0, "options": {}}
    return facts | {"appearances": seen, "together": {}, "binding": {}, "mask_iou": 0.5, "metrics": {}} | changed


def test_a_table_a_model() -> None:
    runs = [_run(), _run(seed=1), _run(row="paper"), _run(weights="1" * 12), _run(model="wan")]
    lines = list(recipes.table(runs))
    assert [line.partition(":")[0] for line in lines if "SHA-256" in line] == [
        "weights, SHA-256 000000000000...",
        "weights, SHA-256 111111111111...",
        "wan, SHA-256 000000000000...",
    ]
    assert [line[:40].rstrip() for line in lines if "->" in line and "SHA-256" not in line] == [
        "defaults",
        "paper (1 of 2 seeds)",
        "defaults",
        "defaults",
    ]
    assert lines[2].split()[1:] == 5 * ["50%", "->", "50%"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "--output: expected a new file or results of fastunlearn.bench.recipes, got another file, .*results.json"),
        ({"runs": [{"row": "defaults"}]}, "--output: expected a new file or results of .*, got another file, .*"),
        (
            {"runs": [_run(row="paper")]},
            "--output: expected runs with the options of today's rows, got others for 'paper' in .*; choose another",
        ),
        ({"runs": [_run(row=[])]}, r"--output: expected runs with the options .*, got others for \[\] in .*"),
    ],
)
def test_a_file_of_other_runs_is_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    output.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=f"^fastunlearn.bench.recipes: {message}"):
        recipes.main(["--output", str(output), "--device", "cpu"])
    assert json.loads(output.read_text()) == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0", "-1"], "--seeds: expected a whole number from 0 to 4294967295, got -1"),
        (["--device", "nowhere"], "device: expected .*, got 'nowhere'"),
        (["--models", str(WEIGHTS), "no.safetensors"], "no.safetensors is missing"),
    ],
)
def test_options_that_cannot_be_are_one_line_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"^fastunlearn.bench.recipes: {message}") as error:
        recipes.main(["--device", "cpu", *arguments])
    assert "\n" not in str(error.value)


def test_rows_are_listed_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipes.main(["--rows", "defaults, eta 2"])
    error = capsys.readouterr().err
    assert "expected one of defaults, 'defaults, 120 steps of 8', paper, 'paper, relative', " in error
    assert "did you mean defaults, eta 1?" in error


def test_the_paper_s_row_is_the_paper_s_recipe() -> None:
    """But for what the size of the demo's model asks for."""
    recipe = read_recipe(RECIPE.with_name("paper.toml"))
    for command, listed, options in (
        ("prepare", recipe.prepare, PrepareOptions("", Path(), "circle")),
        ("train", recipe.train, TrainingOptions("", Path(), Path())),
    ):
        row = recipes.ROWS["paper"][command]
        own_size = {"target_prompts", "kept_prompts", "mixed_precision"}
        differs = {name: value for name, value in listed.items() if value != getattr(options, name)}
        assert {n: v for n, v in differs.items() if n not in own_size | recipes._SIZE[command].keys()} == row


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
