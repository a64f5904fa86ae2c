"""A leading `~`, which shells leave in `--output-dir=~/cache`, means the user's home folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch

from fastunlearn.files import expand_home, writable
from fastunlearn.testing.tiny_pipelines import save_tiny_pipeline
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.comparison import write_strip
from fastunlearn.training.data.prompts import read_prompts
from fastunlearn.training.data.videos import read_video, write_video
from fastunlearn.training.loop import checkpoints
from fastunlearn.training.model.loading import load_model, outline_pipeline
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.options import EvaluateOptions, PrepareOptions, SampleOptions, TrainingOptions

FP32 = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home folder. The working folder is another one, where nothing may be written."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


@pytest.mark.parametrize("options_class", [PrepareOptions, TrainingOptions, EvaluateOptions, SampleOptions])
def test_every_option_that_is_a_path(options_class: type, home: Path) -> None:
    given: dict[str, object] = {"concept": "~", "prompt": ("~",)}
    expected = dict(given)
    for field in fields(options_class):
        if field.name in ("pretrained_model_name_or_path", "resume_from_checkpoint"):
            given[field.name], expected[field.name] = "~/here", str(home / "here")
        elif field.type.startswith("tuple[Path"):
            given[field.name], expected[field.name] = (Path("~/a"), Path("b~")), (home / "a", Path("b~"))
        elif field.type.startswith("Path"):
            given[field.name], expected[field.name] = Path("~/here"), home / "here"
    names = {field.name for field in fields(options_class)}
    options = options_class(**{name: value for name, value in given.items() if name in names})
    for name in names & expected.keys():
        assert getattr(options, name) == expected[name], name
    assert all(name in given for name in names if options_class.__dataclass_fields__[name].default is MISSING)


def test_the_functions_that_read_and_write(tiny_pipeline: Callable[[str], Path], home: Path) -> None:
    shutil.copytree(tiny_pipeline("wan"), home / "wan")
    model = load_model("~/wan", **FP32)
    assert model.path == str(home / "wan")
    assert outline_pipeline("~/wan").model.family is model.family
    assert list(encode_prompts(Path("~/wan"), ["a dog"], None, **FP32)) == ["a dog"]

    erasers = model.attach_erasers(rank=2)
    model.save_erasers("~/erasers")
    assert (home / "erasers/config.json").is_file()
    loaded = load_model("~/wan", **FP32).load_erasers("~/erasers")
    assert loaded["default"][0].keys() == erasers[0].keys()

    video = torch.rand(5, 3, 16, 16)
    write_video("~/video.gif", video, fps=8)
    assert read_video("~/video.gif").shape == video.shape
    write_strip("~/strip.png", [video], ["before"])
    assert (home / "strip.png").is_file()

    (home / "prompts.txt").write_text("a dog\n")
    assert [line.prompt for line in read_prompts("~/prompts.txt")] == ["a dog"]
    with pytest.raises(FileNotFoundError, match="home/cache"):
        TeacherCache.open("~/cache")
    (home / "checkpoint-1").mkdir()
    assert checkpoints.find(Path("run"), "~/checkpoint-1") == home / "checkpoint-1"
    save_tiny_pipeline("cogvideox", "~/tiny")
    assert (home / "tiny/model_index.json").is_file()
    assert writable("~/new") == home / "new"
    assert list(Path().iterdir()) == []


def test_only_a_leading_tilde_of_a_user_who_exists(home: Path) -> None:
    assert expand_home("~") == home
    for path in ("a/~", "a~", "./~", "~no-such-user/a"):
        assert expand_home(path) == Path(path)
