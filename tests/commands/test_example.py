from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastunlearn.training import example
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.videos import read_video
from fastunlearn.training.model.loading import load_model

FEW = ["--trajectories", "3", "--sampling-steps", "4", "--training-steps", "40", "--rank", "4"]
SIZE = ["--height", "32", "--width", "48", "--num-frames", "9"]


@pytest.fixture(scope="module")
def folders(tiny_pipeline: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The pipeline, and the folder that the example wrote."""
    pipeline, output = tiny_pipeline("cogvideox"), tmp_path_factory.mktemp("example")
    example.main([str(pipeline), str(output), *FEW, *SIZE])
    return pipeline, output


def test_the_cache_has_points_of_every_prompt(folders: tuple[Path, Path]) -> None:
    cache = TeacherCache.open(folders[1] / "cache", verify=True)
    assert cache.facts["concept"] == example.CONCEPT
    assert {name: len(group) for name, group in cache.groups.items()} == {"target": 12, "kept": 12}
    for name, prompts in (("target", example.TARGET_PROMPTS), ("kept", example.KEPT_PROMPTS)):
        assert {cache.prompts[number] for number in cache.groups[name].prompts.tolist()} == set(prompts)
    mask = cache.groups["target"].rows([0]).mask
    assert mask is not None
    assert 0 < mask.float().mean() < 1


def test_the_saved_erasers_turn_the_model_away_from_the_concept(folders: tuple[Path, Path]) -> None:
    pipeline, output = folders
    model = load_model(pipeline, dtype=torch.float32, device="cpu")
    points = TeacherCache.open(output / "cache").groups["target"].rows([0, 5])

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            return model.experts[0](points.x_t, points.t, points.condition)

    target = points.v_uncond + 7.5 * (points.v_uncond - points.v_cond)
    before = velocity()
    torch.testing.assert_close(before, points.v_cond)
    model.load_erasers(output / "erasers")
    after = velocity()
    assert (after - before).norm() > 1e-3 * before.norm()
    assert (after - target).norm() < (before - target).norm()


def test_the_videos_are_written(folders: tuple[Path, Path]) -> None:
    _, output = folders
    before, after = (read_video(output / f"{name}.mp4") for name in ("before", "after"))
    assert before.shape == after.shape == (9, 3, 32, 48)
    assert not torch.equal(before, after)
    assert (output / "before-and-after.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_keeps_the_cache_and_gives_the_same_erasers(folders: tuple[Path, Path]) -> None:
    pipeline, output = folders
    shards = {file: file.stat().st_mtime_ns for file in (output / "cache").glob("shard-*")}
    erasers = {file.name: file.read_bytes() for file in (output / "erasers").iterdir()}
    example.main([str(pipeline), str(output), *FEW, *SIZE])
    assert shards
    assert {file: file.stat().st_mtime_ns for file in (output / "cache").glob("shard-*")} == shards
    assert {file.name: file.read_bytes() for file in (output / "erasers").iterdir()} == erasers
