"""The tiny pipelines that the tests and the README's commands run on."""

import json
import shutil

import pytest
import torch
from pipeline_cases import FP32, PROMPT, batched, every_family, noise

from fastunlearn.families.base import DEFAULT_SIZE
from fastunlearn.testing.tiny_pipelines import FRAMES, HEIGHT, WIDTH, save_tiny_pipeline
from fastunlearn.training.model.loading import load_model, outline_pipeline
from fastunlearn.training.model.text import encode_prompts


def test_a_seed_determines_the_weights_and_the_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    save_tiny_pipeline("cogvideox", tmp_path / "a")
    assert torch.equal(torch.rand(2), expected)
    save_tiny_pipeline("cogvideox", tmp_path / "b")
    save_tiny_pipeline("cogvideox", tmp_path / "c", seed=1)
    files = [next((tmp_path / name / "transformer").glob("*.safetensors")).read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_an_unknown_variant_is_refused(tmp_path):
    with pytest.raises(ValueError, match="family: expected one of 'cogvideox', .*, got 'mochi'"):
        save_tiny_pipeline("mochi", tmp_path)


@every_family
def test_the_default_size_is_tiny_and_saved_with_the_pipeline(tiny_pipeline, family):
    defaults = load_model(tiny_pipeline(family), **FP32).defaults
    assert defaults.size() == (HEIGHT, WIDTH, FRAMES)


@pytest.mark.parametrize("size", [[64, 64], [64, 64, 0], "large", [64, 64, True], {"height": 64}])
def test_a_default_size_that_is_none_is_refused(tiny_pipeline, tmp_path, size):
    folder = shutil.copytree(tiny_pipeline("wan"), tmp_path / "wan")
    file = folder / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {DEFAULT_SIZE: size}))
    with pytest.raises(ValueError, match=f"{DEFAULT_SIZE}: expected height, width and number of frames, got"):
        outline_pipeline(folder)


@every_family
def test_the_prompt_changes_the_velocity(tiny_pipeline, family):
    encoded = encode_prompts(tiny_pipeline(family), [PROMPT, ""], None, **FP32)
    model = load_model(tiny_pipeline(family), **FP32)
    x_t = noise(model)
    for expert in model.experts:
        cond, uncond = (expert(x_t, 500.0, batched(encoded[prompt])) for prompt in (PROMPT, ""))
        assert (cond - uncond).norm() > 0.02 * uncond.norm()
