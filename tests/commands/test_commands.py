"""The four commands, one after the other as a user runs them, on a saved pipeline of every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastunlearn.cli import main
from fastunlearn.testing.tiny_pipelines import FRAMES, HEIGHT, VARIANTS, WIDTH
from fastunlearn.training.data.videos import read_video


@pytest.mark.parametrize("family", VARIANTS)
def test_the_commands_lead_from_prompts_to_videos(
    family: str, tiny_pipeline: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "target.txt").write_text("a red circle\na nude person and a red circle in the park\n")
    (tmp_path / "kept.txt").write_text("# prompts to keep\na blue square\n\n")
    (tmp_path / "target-held-out.txt").write_text("a blue circle\n")
    (tmp_path / "kept-held-out.txt").write_text("a red square\n")
    model = ["--pretrained-model-name-or-path", str(tiny_pipeline(family)), "--mixed-precision", "no"]

    def prompts(suffix: str = "") -> list[object]:
        target, kept = tmp_path / f"target{suffix}.txt", tmp_path / f"kept{suffix}.txt"
        return ["--concept", "circle", "--target-prompts", target, "--kept-prompts", kept]

    sampling = ["--num-inference-steps", "4"]  # the size is the pipeline's default
    cache, trained = tmp_path / "cache", tmp_path / "trained"

    def run(command: str, *arguments: object) -> str:
        main([command, *model, *map(str, arguments)])
        return capsys.readouterr().out

    points = ["--num-trajectories", "2", "--timesteps-per-trajectory", "4"]
    estimate = run("prepare", *prompts(), *sampling, *points, "--output-dir", cache, "--estimate")
    assert "points" in estimate and not cache.exists()
    run("prepare", *prompts(), *sampling, *points, "--output-dir", cache)

    steps = ["--max-train-steps", "12", "--rank", "8", "--learning-rate", "3e-3", "--lr-warmup-steps", "0"]
    run("train", "--cache-dir", cache, "--output-dir", trained, *steps, "--train-batch-size", "2")

    erasers = trained / "erasers"
    held_out = prompts("-held-out")
    run("evaluate", *held_out, *sampling, *points, "--erasers", erasers, "--output-dir", tmp_path / "evaluation")
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert report["erasure_coefficient"] < 1
    assert report["preserved_drift"] > 0

    run("sample", *sampling, "--erasers", erasers, "--prompt", "a red circle", "--output-dir", tmp_path / "videos")
    suffixes = sorted(path.suffix for path in (tmp_path / "videos").iterdir())
    assert ".mp4" in suffixes and ".png" in suffixes
    assert read_video(tmp_path / "videos/a-red-circle-after.mp4").shape == (
        FRAMES,
        3,
        3 * HEIGHT,
        3 * WIDTH,
    )  # enlarged, as all small ones

    folders = [erasers / "transformer", erasers / "transformer_2"] if family == "wan-2.2" else [erasers]
    for folder in folders:
        (file,) = folder.glob("*.safetensors")
        assert any(tensor.any() for name, tensor in load_file(file).items() if name.endswith("up.weight"))
