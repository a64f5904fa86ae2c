"""The demo's little model in the place of a pipeline: for the four commands, and in Python."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastunlearn import load_erasers
from fastunlearn.cli import main
from fastunlearn.demo import model as demo_model
from fastunlearn.demo.judge import Judge
from fastunlearn.demo.model import GUIDANCE, VARIANTS, TextToVideo, load, save
from fastunlearn.demo.videos import open_studio
from fastunlearn.demo.world import FRAMES, HEIGHT, WIDTH
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.videos import read_video
from fastunlearn.training.model.loading import load_model, outline_pipeline
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.model.video_model import Defaults

FP32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
FEW = ("--num-trajectories", "1", "--timesteps-per-trajectory", "2", "--num-inference-steps", "2")
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def weights(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str], Path]:
    """`weights(variant)`: a file as `pretrain` writes it, with random weights."""

    def make(folder: Path) -> None:
        for variant in VARIANTS:
            torch.manual_seed(0)
            save(TextToVideo(variant), Judge(), {"steps": 0}, folder / f"{variant}.safetensors")

    return lambda variant: made_once("demo-models", make) / f"{variant}.safetensors"


@pytest.mark.parametrize("variant", ["cogvideox", "wan"])
def test_the_four_commands_work_on_it(
    variant: str,
    weights: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("target.txt").write_text("blue circle and green square\n")
    Path("kept.txt").write_text("green square\n")
    prompts = ("--concept", "circle", "--target-prompts", "target.txt", "--kept-prompts", "kept.txt")

    def call(command: str, *arguments: str) -> None:
        main([command, "--pretrained-model-name-or-path", str(weights(variant)), "--device", "cpu", *arguments])

    call("prepare", "--output-dir", "cache", *prompts, *FEW, "--estimate")
    printed = capsys.readouterr().out
    assert re.search(r"trajectories +2\n", printed) and re.search(r"points +4\n", printed)
    assert not Path("cache").exists()
    call("prepare", "--output-dir", "cache", *prompts, *FEW)
    cache = TeacherCache.open("cache")
    facts = cache.facts
    assert (facts["height"], facts["width"], facts["num_frames"]) == (HEIGHT, WIDTH, FRAMES)
    assert (facts["guidance_scale"], facts["dtype"], facts["model"]) == (GUIDANCE, "bfloat16", str(weights(variant)))
    call("train", "--cache-dir", "cache", "--output-dir", "trained", "--max-train-steps", "1", "--rank", "2")
    with pytest.warns(UserWarning, match="expected held-out prompts"):
        call("evaluate", "--erasers", "trained/erasers", "--output-dir", "out", *prompts, *FEW)
    assert json.loads(Path("out/evaluation.json").read_text())["target_points"] == 2
    sampling = ("--prompt", "red circle", "--num-inference-steps", "2", "--format", "gif")
    call("sample", "--erasers", "trained/erasers", "--output-dir", "videos", *sampling)
    assert read_video("videos/red-circle-before.gif").shape == (FRAMES, 3, 8 * HEIGHT, 8 * WIDTH)


def test_the_name_demo_means_the_weights_in_the_package(
    weights: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "WEIGHTS", weights("cogvideox-narrow"))
    with pytest.raises(ValueError, match="expected the weights that belong to this version, got others; install"):
        load_model("demo", **FP32)
    digest = demo_model.file_entry(weights("cogvideox-narrow"))["sha256"]
    monkeypatch.setattr(demo_model, "WEIGHTS_SHA256", digest)
    model = load_model("demo", **FP32)
    assert (model.path, model.defaults) == ("demo", Defaults(GUIDANCE, HEIGHT, WIDTH, FRAMES, fps=3))
    assert len(list(model.attach_erasers(rank=2)[0])) == 7
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    with pytest.raises(FileNotFoundError, match="in the folder 'demo', got no model_index.json there; for the demo's"):
        load_model("demo", **FP32)
    Path("demo/model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a CogVideoXPipeline or .*, got 'demo', a None"):
        load_model("demo", **FP32)


@every_variant
def test_what_is_loaded_is_what_was_saved(variant: str, weights: Callable[[str], Path]) -> None:
    torch.manual_seed(0)
    saved = TextToVideo(variant).eval()
    loaded = load_model(weights(variant), **FP32).experts[0].transformer
    for name, parameter in saved.transformer.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.half().float()), name
    outline = outline_pipeline(weights(variant))
    assert outline.text_length == demo_model.TEXT_LENGTH
    assert outline.text_encoder_parameters == sum(part.numel() for part in saved.text_encoder.parameters())


@every_variant
def test_prompts_are_encoded_by_its_text_encoder(variant: str, weights: Callable[[str], Path]) -> None:
    model, _, _ = load(weights(variant))
    prompts = ["red circle and blue square", "blue square", "", "blue square"]
    encoded = encode_prompts(weights(variant), prompts, "square", **FP32, must_contain=["blue square"])
    assert list(encoded) == prompts[:-1]
    assert [prompt.token_indices for prompt in encoded.values()] == [[4], [1], []]
    for prompt, embeddings in zip(prompts, model.encode(prompts), strict=True):
        torch.testing.assert_close(encoded[prompt].condition["encoder_hidden_states"], embeddings)
    with pytest.raises(ValueError, match="concept: expected whole words of the prompt 'red', got 'square'"):
        encode_prompts(weights(variant), ["red"], "square", **FP32, must_contain=["red"])
    with pytest.raises(ValueError, match="concept: expected 'square' in no prompt but the targets, got it in 'blue s"):
        encode_prompts(weights(variant), ["blue square"], "square", **FP32, must_not_contain=["blue square"])


def test_prompts_that_it_cannot_read_are_warned_of(weights: Callable[[str], Path]) -> None:
    known = "and, blue, circle, green, red, square, triangle"
    match = re.escape(f"the demo's model knows ({known}), got 'nude' in 'red nude person'; it takes all other words")
    with pytest.warns(UserWarning, match=match):
        encode_prompts(weights("wan"), ["red", "red nude person"], None, **FP32)
    with pytest.warns(UserWarning, match="expected at most 8 tokens, .*, got 9 in 'red circle and blue square and"):
        encode_prompts(weights("wan"), ["red circle and blue square and green triangle"], None, **FP32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompts(weights("wan"), ["red circle and blue square", ""], None, **FP32)


@every_variant
def test_it_is_rounded_as_diffusers_would_round_it(variant: str, weights: Callable[[str], Path]) -> None:
    transformer = load_model(weights(variant), dtype=torch.bfloat16, device="cpu").experts[0].transformer
    kept = {name for name, parameter in transformer.named_parameters() if parameter.dtype == torch.float32}
    assert transformer.dtype == torch.bfloat16
    assert any("time_embedder" in name for name in kept) == (variant == "wan")
    assert not any("attn" in name for name in kept)


def test_erasers_go_onto_it_in_python(weights: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(weights("wan"), **FP32)
    model.attach_erasers(rank=2)
    model.save_erasers(tmp_path, concept="circle")
    text_to_video, _, _ = load(weights("wan"))
    assert len(load_erasers(text_to_video.transformer, tmp_path)) == 4
    assert len(load_erasers(load_model(weights("wan"), **FP32).experts[0], tmp_path)) == 4


def _altered(file: Path, to: Path, facts: Any = None, **tensors: Any) -> Path:
    """A copy of a file with other facts, and with other tensors or, for None, without them; `__` stands for a dot."""
    changed = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, to, None if facts is None else {"facts": facts})
    return to


@pytest.mark.parametrize(
    ("facts", "tensors", "message"),
    [
        (None, {}, "expected a model that python -m fastunlearn.demo.pretrain wrote, got another safetensors file$"),
        ("[1]", {}, "expected a model that python -m fastunlearn.demo.pretrain wrote, got another safetensors file$"),
        ("[" * 10**5, {}, "expected a model that .* wrote, got another safetensors file$"),
        ('{"variant": "sd"}', {}, "expected one of the variants cogvideox, cogvideox-narrow, wan, got 'sd'$"),
        ('{"variant": []}', {}, r"expected one of the variants cogvideox, cogvideox-narrow, wan, got \[\]$"),
        ('{"variant": "wan"}', {}, "expected F16 .* as 'transformer.* got none; the file belongs to another version"),
        # The judge of an earlier version knew three kinds of objects.
        (
            "{}",
            {"judge__out__bias": torch.zeros(3).half()},
            r"expected F16 \(4,\) as 'judge.out.bias', got F16 \(3,\); the f",
        ),
        ("{}", {"judge__out__bias": torch.zeros(4)}, r"expected F16 \(4,\) as 'judge.out.bias', got F32 \(4,\); the"),
        ("{}", {"judge__out__bias": None}, r"expected F16 \(4,\) as 'judge.out.bias', got none; the file belongs to"),
        ("{}", {"more": torch.zeros(1)}, r"expected none as 'more', got F32 \(1,\); the file belongs to another ver"),
        ("{}", {"judge__out__bias": torch.full((4,), math.nan).half()}, "expected finite numbers in judge.out.bias,"),
    ],
)
def test_another_file_is_refused(
    facts: str | None, tensors: dict[str, Any], message: str, weights: Callable[[str], Path], tmp_path: Path
) -> None:
    file = _altered(weights("cogvideox"), tmp_path / "a.safetensors", facts, **tensors)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {message}") as error:
        load_model(file, **FP32)
    assert len(str(error.value)) < 400


def test_a_file_without_the_judge_s_accuracy_is_not_judged_by(weights: Callable[[str], Path]) -> None:
    with pytest.raises(
        ValueError, match=r"wan.safetensors: expected judge_accuracy in the record of training, got Non"
    ):
        open_studio("circle", 0, torch.device("cpu"), weights("wan"))


def test_a_damaged_or_missing_file_is_a_one_line_error(weights: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    arguments = ["sample", f"--pretrained-model-name-or-path={file}", f"--output-dir={tmp_path / 'out'}"]
    arguments += ["--erasers", str(tmp_path / "erasers"), "--prompt", "red circle"]
    (tmp_path / "erasers").mkdir()
    (tmp_path / "erasers" / "config.json").touch()
    with pytest.raises(SystemExit, match="pretrained_model_name_or_path: expected a file, got '.*', which does not ex"):
        main(arguments)
    file.write_bytes(weights("cogvideox").read_bytes()[:100_000])
    with pytest.raises(SystemExit, match=r"a\.safetensors: not a whole safetensors file .*; it is truncated or dam"):
        main(arguments)
