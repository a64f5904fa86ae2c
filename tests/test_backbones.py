import subprocess
import sys

import pytest
import torch
from diffusers import CogVideoXPipeline
from tiny_models import LAYERS, cogvideox, inputs
from torch import nn

from fastunlearn.backbones import as_velocity_model, attentions, backbone_of, find_transformer


class Wrapper(nn.Module):
    """As DistributedDataParallel holds its model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_the_transformer_is_found_inside_its_wrappers():
    transformer = cogvideox()
    velocity = as_velocity_model(transformer)
    compiled = torch.compile(velocity, backend="eager")
    for model in (transformer, velocity, Wrapper(transformer), compiled, Wrapper(compiled)):
        assert find_transformer(model)[0] is transformer
    backbone = backbone_of(transformer)
    assert backbone.name == "cogvideox"
    assert list(attentions(transformer, backbone.erased)) == LAYERS
    assert as_velocity_model(velocity) is velocity


def test_a_subclass_is_of_the_family():
    transformer = cogvideox()
    transformer.__class__ = type("FSDPModel", (type(transformer),), {})
    assert backbone_of(transformer).name == "cogvideox"


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Wrapper(nn.Linear(2, 2)), "cogvideox", None])
def test_another_model_is_refused_by_name(model):
    with pytest.raises(TypeError, match=f"CogVideoXTransformer3DModel.*got {type(model).__name__}"):
        backbone_of(model)


def rotary_of_the_pipeline(transformer, x_t):
    """What diffusers' own pipeline hands to its transformer; its VAE scales by 8."""
    pipeline = CogVideoXPipeline.__new__(CogVideoXPipeline)
    pipeline.transformer, pipeline.vae_scale_factor_spatial = transformer, 8
    frames, _, height, width = x_t.shape[1:]
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipeline, height * 8, width * 8, frames, torch.device("cpu")
    )


@pytest.mark.parametrize(
    "overrides",
    [{}, {"rope": True}, {"rope": True, "patch_size_t": 2, "patch_bias": False}, {"rope": True, "ofs_embed_dim": 32}],
    ids=["sincos", "rope", "rope-1.5", "ofs"],
)
@pytest.mark.parametrize("size", [(4, 8, 8), (2, 4, 8)])
def test_velocity_is_what_the_pipeline_would_get(overrides, size):
    transformer = cogvideox(**overrides)
    frames, height, width = size
    if not overrides:
        frames, height, width = 3, 8, 8
    x_t = torch.randn(2, frames, 4, height, width)
    _, t, cond = inputs()
    rotary = rotary_of_the_pipeline(transformer, x_t) if "rope" in overrides else None
    ofs = torch.full((1,), 2.0) if "ofs_embed_dim" in overrides else None
    with torch.no_grad():
        expected = transformer(x_t, cond, t, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]
        assert torch.equal(as_velocity_model(transformer)(x_t, t, cond), expected)
        if rotary is not None:
            assert not torch.equal(transformer(x_t, cond, t, ofs=ofs, return_dict=False)[0], expected)


def test_one_timestep_and_one_text_serve_the_batch():
    velocity = as_velocity_model(cogvideox())
    x_t, _, cond = inputs()
    with torch.no_grad():
        expected = velocity(x_t, torch.tensor([7, 7]), cond[:1].expand(2, -1, -1))
        for t in (7, torch.tensor(7), torch.tensor([7])):
            assert torch.equal(velocity(x_t, t, cond[:1].double()), expected)


def test_wrong_input_is_named():
    velocity = as_velocity_model(cogvideox())
    x_t, t, cond = inputs()
    with pytest.raises(TypeError, match="cond.*NoneType"):
        velocity(x_t, t, None)
    with pytest.raises(TypeError, match="x_t.*list"):
        velocity([x_t], t, cond)
    with pytest.raises(ValueError, match=r"x_t.*\(3, 4, 8, 8\)"):
        velocity(x_t[0], t, cond)
    with pytest.raises(ValueError, match=r"cond.*\(3, 16, 32\)"):
        velocity(x_t, t, torch.zeros(3, 16, 32))
    with pytest.raises(ValueError, match=r"t: .*\(3,\)"):
        velocity(x_t, torch.zeros(3), cond)


def test_training_works_after_sampling_in_inference_mode():
    velocity = as_velocity_model(cogvideox(rope=True))
    x_t, t, cond = torch.randn(2, 3, 4, 8, 16), *inputs()[1:]
    with torch.inference_mode():
        velocity(x_t, t, cond)
    velocity(x_t, t, cond).sum().backward()


def test_importing_needs_torch_alone():
    code = (
        "import sys, fastunlearn.backbones, fastunlearn.erasers, fastunlearn.masks, fastunlearn.capture\n"
        "heavy = {'diffusers', 'transformers', 'accelerate', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
