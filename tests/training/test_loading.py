"""Saved pipelines are loaded as diffusers loads them, and what cannot be loaded is refused with a reason."""

import json
import re
import shutil

import pytest
import torch
from pipeline_cases import FP32, ONE_OF_EACH, PROMPT, batched, copy_of, edit, every_family, noise, one_of_each
from safetensors.torch import load_file, save_file
from tiny_models import cogvideox

from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.model.video_model import Defaults


@every_family
def test_a_loaded_model_equals_the_pipeline_and_is_frozen(tiny_pipeline, loaded_model, diffusers_pipeline, family):
    model = loaded_model(family)
    pipeline = diffusers_pipeline(family)
    assert len(model.experts) == (2 if family == "wan-2.2" else 1)
    assert type(model.scheduler) is type(pipeline.scheduler)
    assert model.scheduler.config == pipeline.scheduler.config
    assert (model.device, model.dtype, model.path) == (torch.device("cpu"), torch.float32, str(tiny_pipeline(family)))
    for expert, name in zip(model.experts, ("transformer", "transformer_2"), strict=False):
        expected = getattr(pipeline, name).state_dict()
        assert not expert.training
        assert not any(parameter.requires_grad for parameter in expert.parameters())
        for key, value in expert.transformer.state_dict().items():
            assert torch.equal(value, expected[key]), key


@one_of_each
def test_half_precision_is_used_by_everything_but_wans_vae(tiny_pipeline, family):
    encoded = encode_prompts(tiny_pipeline(family), [PROMPT], None, dtype=torch.bfloat16, device="cpu")[PROMPT]
    assert encoded.condition["encoder_hidden_states"].dtype == torch.bfloat16
    model = load_model(tiny_pipeline(family), dtype=torch.bfloat16, device="cpu", vae=True)
    model.attach_erasers(4)
    assert model.dtype == torch.bfloat16
    assert next(model.vae.parameters()).dtype == (torch.float32 if family == "wan-2.2" else torch.bfloat16)
    velocity = model.experts[0](noise(model).bfloat16(), 500.0, batched(encoded))
    assert velocity.isfinite().all()
    assert model.decode(velocity).isfinite().all()


def test_defaults_equal_the_pipelines(loaded_model):
    defaults = {family: loaded_model(family).defaults for family in ONE_OF_EACH}
    assert defaults["cogvideox"] == Defaults(6.0, 64, 64, 9, 8)
    assert defaults["hunyuan_video"] == Defaults(1.0, 64, 64, 9, 15)
    assert defaults["wan-2.2"] == Defaults(5.0, 64, 64, 9, 16)


def test_a_path_without_a_pipeline_is_refused(tmp_path):
    for path in (tmp_path / "none", "./none", "none", "a/b/c"):
        with pytest.raises(
            FileNotFoundError,
            match=r"^pretrained_model_name_or_path: expected a folder or a Hub id .*, got '.*(none|a/b/c)', w",
        ) as error:
            load_model(path, **FP32)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="expected a saved diffusers pipeline") as error:
        load_model(tmp_path, **FP32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "class_name", ["StableDiffusionPipeline", "WanImageToVideoPipeline", ["mine", "Pipeline"], None]
)
def test_pipelines_of_other_classes_are_refused(tmp_path, class_name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    with pytest.raises(ValueError, match="expected a CogVideoXPipeline or HunyuanVideoPipeline or WanPipeline, got"):
        load_model(tmp_path, **FP32)
    with pytest.raises(ValueError, match=re.escape(f", a {class_name}")):
        encode_prompts(tmp_path, [PROMPT], None, **FP32)


def test_pipelines_with_a_timestep_per_token_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "expand_timesteps": True}))
    with pytest.raises(ValueError, match="expand_timesteps"):
        load_model(tmp_path, **FP32)


def test_pickled_weights_are_not_read(tiny_pipeline, tmp_path):
    folder = copy_of(tiny_pipeline("cogvideox"), tmp_path / "pipeline")
    weights = next((folder / "transformer").glob("*.safetensors"))
    torch.save(cogvideox().state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="transformer cannot be read: expected weights in .safetensors files"):
        load_model(folder, **FP32)


def test_an_incomplete_pipeline_is_refused(tiny_pipeline, tmp_path):
    folder = copy_of(tiny_pipeline("cogvideox"), tmp_path / "pipeline")
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="text_encoder/model.safetensors: not a whole safetensors file"):
        encode_prompts(folder, [PROMPT], None, **FP32)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(FileNotFoundError, match="expected a folder 'tokenizer' in '.*pipeline', got none"):
        encode_prompts(folder, [PROMPT], None, **FP32)
    load_model(folder, **FP32)  # needs neither
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match="model_index.json: expected a JSON object, got list$"):
        load_model(folder, **FP32)


def test_two_transformers_need_a_boundary(tiny_pipeline, tmp_path):
    without_ratio = copy_of(tiny_pipeline("wan-2.2"), tmp_path / "a")
    edit(without_ratio / "model_index.json", boundary_ratio=None)
    assert len(load_model(without_ratio, **FP32).experts) == 1  # as the pipeline uses the first alone
    without_second = copy_of(tiny_pipeline("wan"), tmp_path / "b")
    edit(without_second / "model_index.json", boundary_ratio=0.5)
    with pytest.raises(
        ValueError,
        match="expected transformer and transformer_2 in a pipeline with boundary_ratio 0.5, got no t.*_2$",
    ):
        load_model(without_second, **FP32)


def test_entries_missing_from_an_old_vae_configuration_get_their_defaults(tiny_pipeline, loaded_model, tmp_path):
    folder = copy_of(tiny_pipeline("wan"), tmp_path / "pipeline")
    config = json.loads((folder / "vae" / "config.json").read_text())
    for entry in ("scale_factor_temporal", "scale_factor_spatial"):
        del config[entry]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    assert load_model(folder, **FP32).latent_space == loaded_model("wan").latent_space


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_a_weight_under_another_name_is_missed(tiny_pipeline, tmp_path, component):
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline("cogvideox"), folder)
    (path,) = (folder / component).glob("*.safetensors")
    weights = load_file(path)
    lacking = sorted(weights)[-1]
    weights["renamed"] = weights.pop(lacking)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"expected all weights of {component} in .*, got none for '{lacking}'"):
        load_model(folder, **FP32, vae=True)
