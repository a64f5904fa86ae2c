from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastunlearn.training import sample
from fastunlearn.training.data import videos as video_files
from fastunlearn.training.data.videos import read_video
from fastunlearn.training.model import erased
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.video_model import VideoSize
from fastunlearn.training.options import SampleOptions
from fastunlearn.training.sample import file_names, run

SIZE = {"height": 32, "width": 32, "num_frames": 9}
Pipelines = Callable[[str], Path]


@pytest.fixture(scope="module")
def erasers(tiny_pipeline: Pipelines, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`erasers(family)`, or `erasers(family, std)`: a folder of random erasers, which change the model's videos."""

    @cache
    def saved(family: str, std: float = 1.0) -> Path:
        folder = tmp_path_factory.mktemp("erasers") / family
        model = load_model(tiny_pipeline(family), dtype=torch.float32, device="cpu")
        torch.manual_seed(0)
        for layers in model.attach_erasers(rank=4):
            for eraser in layers.values():
                torch.nn.init.normal_(eraser.up.weight, std=std)
        model.save_erasers(folder, concept="circle")
        return folder

    return saved


def options(pipeline: Path, erasers: Path, output: Path, **more: Any) -> SampleOptions:
    settings = {"prompt": ("a red circle",), "num_inference_steps": 2, "mixed_precision": "no", "device": "cpu"}
    return SampleOptions(str(pipeline), output, (erasers,), **{**settings, **SIZE, **more})


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan_video", "wan-2.2"])
def test_the_video_before_equals_the_pipelines_and_the_one_after_differs(
    family: str,
    tiny_pipeline: Pipelines,
    diffusers_pipeline: Callable[[str], Any],
    erasers: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    videos: dict[str, torch.Tensor] = {}
    write = sample.write_video
    monkeypatch.setattr(sample, "write_video", lambda p, f, fps: (videos.update({p.name: f}), write(p, f, fps)))
    written = run(options(tiny_pipeline(family), erasers(family), tmp_path, seed=3, guidance_scale=4.0))
    names = ["a-red-circle-before.mp4", "a-red-circle-after.mp4", "a-red-circle.mp4", "a-red-circle.png"]
    assert [file.name for file in written] == names
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)

    scale = {"true_cfg_scale" if family == "hunyuan_video" else "guidance_scale": 4.0}
    expected = diffusers_pipeline(family)(
        prompt="a red circle",
        negative_prompt="",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **scale,
        **SIZE,
    ).frames[0]
    before, after = (videos[name][:, :, ::6, ::6] for name in names[:2])  # small videos are written enlarged
    torch.testing.assert_close(before, expected, atol=2e-4, rtol=0)
    assert before.shape == after.shape == (9, 3, 32, 32)
    assert (after - before).abs().max() > 0.02
    assert torch.equal(videos[names[2]][:, :, -192:, :192], videos[names[0]])
    assert torch.equal(videos[names[2]][:, :, -192:, -192:], videos[names[1]])
    assert (
        read_video(written[0]) - videos[names[0]]
    ).abs().mean() < 0.2  # noise compresses badly, so the file differs visibly


def test_a_video_depends_on_its_prompt_seed_and_erasers_alone(
    tiny_pipeline: Pipelines, erasers: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline, folder = tiny_pipeline("wan"), erasers("wan")

    def files(name: str, **more: Any) -> dict[str, bytes]:
        run(options(pipeline, folder, tmp_path / name, before=False, format="gif", guidance_scale=1.0, **more))
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    (tmp_path / "prompts.txt").write_text("# two\na square\tnothing\n\na red circle\n")
    alone = files("alone")
    assert sorted(alone) == ["a-red-circle-after.gif", "a-red-circle.png"]
    beside = files("beside", prompts=tmp_path / "prompts.txt")
    assert sorted(beside) == [*sorted(alone), "a-square-after.gif", "a-square.png"]
    assert {name: beside[name] for name in alone} == alone
    assert beside["a-square-after.gif"] != alone["a-red-circle-after.gif"]
    assert files("seed", seed=1)["a-red-circle-after.gif"] != alone["a-red-circle-after.gif"]
    assert files("scale", eraser_scales=(0.0,))["a-red-circle-after.gif"] != alone["a-red-circle-after.gif"]


def test_prompts_that_no_font_can_show_are_numbered(
    tiny_pipeline: Pipelines, erasers: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(sample, "write_strip", lambda path, videos, labels, title: titles.append(title))
    monkeypatch.setattr(sample, "write_video", lambda *_: None)
    monkeypatch.setattr(sample, "font_for", lambda text: None if "狗" in text else "a font")
    prompts = ("一只狗", "a dog", "黑狗")
    settings = options(tiny_pipeline("wan"), erasers("wan"), tmp_path, prompt=prompts, before=False)
    with pytest.warns(UserWarning) as caught:
        run(settings)
    (message,) = (str(warning.message) for warning in caught if "font" in str(warning.message))
    assert message.startswith(
        "no installed font has the letters of '一只狗' and 1 more, so that pictures show the number"
    )
    assert titles == ["prompt 1 of prompts.txt", "a dog", "prompt 3 of prompts.txt"]
    assert (tmp_path / "prompts.txt").read_text(encoding="utf-8") == "1\t一只狗\n2\ta dog\n3\t黑狗\n"


def test_erasers_add_up_and_are_scaled(
    tiny_pipeline: Pipelines, erasers: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline, folder = tiny_pipeline("cogvideox"), erasers("cogvideox")

    def strip(name: str, folders: tuple[Path, ...], scales: tuple[float, ...]) -> np.ndarray:
        more = {"erasers": folders, "eraser_scales": scales, "num_inference_steps": 1}
        settings = {**vars(options(pipeline, folder, tmp_path / name)), **more}
        run(SampleOptions(**settings))
        return np.array(Image.open(tmp_path / name / "a-red-circle.png")).astype(float)

    twice = strip("twice", (folder, folder), (0.5, 0.5))
    once = strip("once", (folder,), (1.0,))
    off = strip("off", (folder,), (0.0,))
    assert np.abs(twice - once).max() <= 1  # one value in 255
    rows = off[-14 - 2 * 160 - 4 :, -14 - 6 * 160 - 5 * 4 :]  # without margin, title and labels
    np.testing.assert_array_equal(rows[:160], rows[164:324])  # at scale 0 the video after equals the one before
    assert np.abs(once - off).max() > 10


def test_size_guidance_and_frame_rate_default_to_the_pipelines(
    tiny_pipeline: Pipelines, erasers: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    calls: list[Any] = []
    rates: list[float] = []
    monkeypatch.setattr(sample, "video", lambda *a, **k: (calls.append((a, k)), torch.zeros(9, 3, 64, 64))[1])
    monkeypatch.setattr(sample, "write_video", lambda path, frames, fps: rates.append(fps))
    more = {"height": None, "width": None, "num_frames": None, "before": False}
    run(options(tiny_pipeline("cogvideox"), erasers("cogvideox"), tmp_path, **more))
    assert calls[0][0][2] == VideoSize(64, 64, 9)
    assert calls[0][1]["guidance_scale"] == 6.0
    assert rates == [8]


def test_videos_are_not_replaced(tiny_pipeline: Pipelines, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sample.erased, "check_folders", lambda folders: None)
    monkeypatch.setattr(sample, "encode_prompts", lambda *a, **k: pytest.fail("loaded a model"))
    chosen = options(
        tiny_pipeline("wan"), tmp_path, tmp_path / "out", prompt=("a square", "a red circle"), format="gif"
    )
    (tmp_path / "out").mkdir()
    for name, suffix in (("a-red-circle", ".gif"), ("a-red-circle-before", ".gif"), ("a-square", ".png")):
        file = (tmp_path / "out" / name).with_suffix(suffix)
        file.symlink_to("nowhere")
        with pytest.raises(
            FileExistsError, match=f"expected no videos of these prompts, got {file.name}; .*overwrite_out"
        ):
            run(chosen)
        file.unlink()
    for name in ("a-red-circle.gif", "a-square-after.gif", "a-square.png"):
        (tmp_path / "out" / name).touch()
    with pytest.raises(FileExistsError, match="got a-square-after.gif and 2 more; choose another output_dir"):
        run(chosen)
    for more in ({"overwrite_output_dir": True}, {"prompt": ("a blue circle",)}):
        with pytest.raises(pytest.fail.Exception, match="loaded a model"):
            run(SampleOptions(**vars(chosen) | more))


@pytest.mark.parametrize("family", ["hunyuan_video", "wan"])
def test_erasers_of_another_model_are_refused_in_one_line(
    family: str, tiny_pipeline: Pipelines, erasers: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"expected erasers for \w+, got erasers for cogvideox$"):
        run(options(tiny_pipeline(family), erasers("cogvideox"), tmp_path))
    assert not list(tmp_path.iterdir())


def test_mistakes_are_found_before_anything_is_loaded(
    tiny_pipeline: Pipelines, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sample, "encode_prompts", lambda *a, **k: pytest.fail("loaded a model"))
    pipeline, empty, trained = tiny_pipeline("wan"), tmp_path / "empty", tmp_path / "trained"
    empty.mkdir()
    (trained / "erasers").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for erasers, output, more, message in (
        (tmp_path / "no", tmp_path / "out", {}, r"^erasers: expected a folder, got .*no, which does not exist$"),
        (empty, tmp_path / "out", {}, r"^erasers: expected config.json in .*empty, as train writes it, got none$"),
        (trained, tmp_path / "out", {}, r"in .*trained, as .* got none; did you mean .*trained.erasers\?$"),
        (empty, tmp_path / "file", {}, "file"),
    ):
        with pytest.raises(OSError, match=message):
            run(options(pipeline, erasers, output, **more))
    with pytest.raises(ValueError, match="prompt: expected at least one prompt, here or in a file"):
        options(pipeline, empty, tmp_path, prompt=())
    with pytest.raises(ValueError, match="eraser_scales: expected one for each of 1 folders, got 2"):
        options(pipeline, empty, tmp_path, eraser_scales=(1.0, 2.0))
    for name, value in {
        "eraser_scales": (math.nan,),
        "guidance_scale": math.nan,
        "height": 0,
        "num_frames": 0,
        "seed": 2**32,
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            options(pipeline, empty, tmp_path, **{name: value})


def test_a_prompt_that_the_shell_split_is_noticed_before_any_work(
    tiny_pipeline: Pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "encode_prompts", lambda *a, **k: pytest.fail("loaded a model"))
    pipeline, output = tiny_pipeline("wan"), tmp_path / "out"
    for split in (("a", "nude", "person"), ("dog", "in", "the", "park"), ("a nude person", "at", "home")):
        with pytest.raises(ValueError) as error:
            run(options(pipeline, tmp_path, output, prompt=split))
        assert str(error.value) == (
            f"prompt: expected prompts, got {len(split)} of which some are single words that say nothing alone: "
            f"{split}; put quotation marks around a prompt with spaces: '{' '.join(split)}'"
        )
    assert not output.exists()
    message = "^prompt: got 2 prompts of one word each, and makes a video for each; if they are one .*: 'red dog'$"
    with pytest.warns(UserWarning, match=message):
        assert sample._prompts(options(pipeline, tmp_path, output, prompt=("red", "dog"))) == ["red", "dog"]
    with pytest.warns(UserWarning, match="^prompt: got an empty one; its video shows"):
        sample._prompts(options(pipeline, tmp_path, output, prompt=("",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompts in (("dog",), ("dog", "a cat"), ("一只狗", "一只猫"), ("a dog", "a dog"), ("A",)):
            got = sample._prompts(options(pipeline, tmp_path, output, prompt=prompts))
            assert got == list(dict.fromkeys(prompts))


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_a_missing_or_poor_ffmpeg_is_found_before_any_work(
    ending: str, tiny_pipeline: Pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "encode_prompts", lambda *a, **k: pytest.fail("loaded a model"))
    request = options(tiny_pipeline("wan"), tmp_path, tmp_path / "out", format=ending)
    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "no-ffmpeg"))
        with pytest.raises(OSError, match="^ffmpeg: expected a program that can be run, got '.*no-ffmpeg' .No such fi"):
            run(request)
    monkeypatch.setattr(video_files, f"_{ending.upper()}", ("-c:v", "no-such-encoder", "-f", ending))
    with pytest.raises(OSError, match=f"^format: expected one that ffmpeg can write, got {ending} .*cannot be written"):
        run(request)
    assert not (tmp_path / "out").exists()


def test_a_video_that_is_not_finite_is_refused(
    tiny_pipeline: Pipelines, erasers: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(FloatingPointError, match="^video: expected finite latents, got NaN .* after 2 sampling steps"):
        run(options(tiny_pipeline("wan"), erasers("wan", 1e37), tmp_path, eraser_scales=(1000.0,)))


def test_a_size_that_does_not_divide_is_refused_and_out_of_memory_is_explained(
    tiny_pipeline: Pipelines, erasers: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    pipeline, folder = tiny_pipeline("wan"), erasers("wan")
    with pytest.raises(ValueError, match="height: expected a positive multiple of 16, got 40"):
        run(options(pipeline, folder, tmp_path, height=40))

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore")

    helps = r"Tried to allocate 20 GiB.\). What helps: --mixed-precision bf16; a smaller --height, --width or --num-f"
    for module, name in ((sample, "video"), (sample, "encode_prompts"), (erased, "load_model")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(MemoryError, match=helps):
                run(options(pipeline, folder, tmp_path))


def test_file_names_are_safe_and_distinct() -> None:
    prompts = [
        "A red circle!",
        "a red   circle",
        "../../etc/passwd",
        "红圆圈, twice",
        "…",
        "?!",
        "x_y\n" * 40,
        "w" * 99,
    ]
    names = file_names(prompts)
    assert names[:6] == ["a-red-circle", "a-red-circle-2", "etc-passwd", "红圆圈-twice", "video", "video-2"]
    assert len(names[6]) <= 56 and names[6].endswith("-y")
    assert names[7] == "w" * 56
    assert file_names(["a", "a after", "a before"]) == ["a", "a-after-2", "a-before-2"]
    assert file_names(["a after", "a"]) == ["a-after", "a-2"]
    assert len(f"{file_names(['𠀀' * 99])[0]}-before.mp4.partial".encode()) <= 255
