import inspect
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, FlowMatchEulerDiscreteScheduler
from tiny_models import FAMILIES, cogvideox, hunyuan_video, hunyuan_video_inputs, inputs, wan
from torch import nn

from fastunlearn import families
from fastunlearn.families import attentions, family_of, find_transformer, patch_size
from fastunlearn.velocity_model import as_velocity_model


class Wrapper(nn.Module):
    """Holds its model as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_transformer_is_found_inside_its_wrappers(family):
    transformer = family.make()
    velocity = as_velocity_model(transformer)
    compiled = torch.compile(velocity, backend="eager")
    for model in (transformer, velocity, Wrapper(transformer), compiled, Wrapper(compiled)):
        assert find_transformer(model)[0] is transformer
    its_family = family_of(transformer)
    assert its_family.name == family.name
    assert list(attentions(transformer, its_family.erased)) == family.layers
    assert as_velocity_model(velocity) is velocity
    assert patch_size(velocity) == (1, 2, 2)


def test_a_subclass_is_of_the_family():
    transformer = cogvideox()
    transformer.__class__ = type("FSDPModel", (type(transformer),), {})
    assert family_of(transformer).name == "cogvideox"


def holder_of(transformer):
    """A user's own module around a transformer, which takes nobody knows what."""
    holder = nn.Module()
    holder.transformer = transformer
    return holder


OTHER_MODELS = [nn.Linear(2, 2), Wrapper(nn.Linear(2, 2)), holder_of(cogvideox()), "cogvideox", None]


@pytest.mark.parametrize("model", OTHER_MODELS, ids=lambda model: type(model).__name__)
def test_another_model_is_refused_by_name(model):
    with pytest.raises(TypeError, match=f"CogVideoXTransformer3DModel.*got {type(model).__name__}"):
        family_of(model)


@pytest.mark.parametrize(
    ("make", "config", "entry"),
    [
        (hunyuan_video, {"image_condition_type": "token_replace"}, "image_condition_type"),
        (hunyuan_video, {"image_condition_type": "latent_concat"}, "image_condition_type"),
        (wan, {"image_dim": 16}, "image_dim"),
        (wan, {"added_kv_proj_dim": 48}, "added_kv_proj_dim"),
    ],
)
def test_image_to_video_transformers_are_refused(make, config, entry):
    with pytest.raises(ValueError, match=f"text-to-video.*{entry}=None.*got {entry}={next(iter(config.values()))!r}"):
        as_velocity_model(make(**config))


def diffusers_pipeline(transformer):
    """diffusers' own pipeline with this transformer, without a VAE and text encoders."""
    family = family_of(transformer)
    pipeline_class = getattr(diffusers, family.pipeline)
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    components = {p.name: None for p in parameters if p.default is p.empty and p.name != "self"}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0) if family.flow_matching else CogVideoXDDIMScheduler()
    return pipeline_class(**components | {"transformer": transformer, "scheduler": scheduler})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_velocity_is_the_transformer_output_in_the_pipeline(family, dtype):
    transformer = family.make().to(dtype)
    _, _, cond = family.inputs(1, dtype)
    prompt, scale = {"prompt_embeds": cond}, 1.0  # no classifier-free guidance: one forward pass per sampling step
    if isinstance(cond, dict):
        cond["encoder_attention_mask"][:, 10:] = 0
        prompt = {
            "prompt_embeds": cond["encoder_hidden_states"],
            "pooled_prompt_embeds": cond["pooled_projections"],
            "prompt_attention_mask": cond["encoder_attention_mask"],
        }
        scale = 4.3  # an input of the transformer; in bfloat16, 4.3 * 1000 differs from 4300
    calls = []
    handle = transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    pipeline = diffusers_pipeline(transformer)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3}
    pipeline(**prompt, **size, guidance_scale=scale, output_type="latent")
    handle.remove()
    assert len(calls) >= 3
    velocity = as_velocity_model(transformer, embedded_guidance_scale=scale)
    with torch.no_grad():
        for given, expected in calls:
            x_t, t = given["hidden_states"], given["timestep"]
            assert torch.equal(velocity(x_t, t, cond), expected)
            assert not torch.equal(velocity(x_t, t + 100, cond), expected)


def test_guidance_and_padding_of_hunyuan_video():
    transformer = hunyuan_video()
    x_t, t, cond = hunyuan_video_inputs()
    velocity = as_velocity_model(transformer)
    with torch.no_grad():
        plain = velocity(x_t, t, cond)
        guidance = torch.full((2,), 6.0) * 1000
        expected = transformer(hidden_states=x_t, timestep=t, guidance=guidance, return_dict=False, **cond)[0]
        assert torch.equal(plain, expected)
        assert not torch.equal(as_velocity_model(velocity, embedded_guidance_scale=1)(x_t, t, cond), plain)
        for dtype in (torch.bool, torch.float64):
            mask = cond["encoder_attention_mask"].to(dtype)
            assert torch.equal(velocity(x_t, t, cond | {"encoder_attention_mask": mask}), plain)
        everything = torch.ones_like(cond["encoder_attention_mask"])
        unpadded = velocity(x_t, t, cond | {"encoder_attention_mask": everything})
        assert torch.equal(unpadded[0], plain[0])
        assert not torch.equal(unpadded[1], plain[1])
        undistilled = hunyuan_video(guidance_embeds=False)
        expected = undistilled(hidden_states=x_t, timestep=t, return_dict=False, **cond)[0]
        assert torch.equal(as_velocity_model(undistilled)(x_t, t, cond), expected)
    assert as_velocity_model(velocity, embedded_guidance_scale=6.0) is velocity
    with pytest.raises(TypeError, match="embedded_guidance_scale.*str"):
        as_velocity_model(transformer, embedded_guidance_scale="6")
    with pytest.raises(ValueError, match="embedded_guidance_scale.*nan"):
        as_velocity_model(transformer, embedded_guidance_scale=float("nan"))


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_a_family_has_the_sampling_defaults_of_its_pipeline(family):
    pipeline_class = getattr(diffusers, family.pipeline)
    defaults = {name: p.default for name, p in inspect.signature(pipeline_class.__call__).parameters.items()}
    assert family.guidance_scale == defaults.get("true_cfg_scale", defaults["guidance_scale"])
    if family.embedded_guidance_scale is not None:
        assert family.embedded_guidance_scale == defaults["guidance_scale"]


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_a_family_matches_flow_if_its_scheduler_has_no_schedule_of_alphas(family):
    for make_pipeline in family.tiny_pipelines.values():
        scheduler = make_pipeline().scheduler
        predicts_flow = getattr(scheduler.config, "prediction_type", "flow_prediction") == "flow_prediction"
        assert family.flow_matching == predicts_flow


def test_every_family_is_tested():
    assert [row.name for row in FAMILIES] == [family.name for family in families.FAMILIES]


def rotary_of_the_pipeline(transformer, x_t):
    """The rotary embeddings that diffusers' pipeline passes to its transformer, with a VAE that scales by 8."""
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
def test_cogvideox_gets_the_inputs_that_its_pipeline_computes(overrides, size):
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


def first_sample(cond):
    """The first sample's condition, with a batch of 1."""
    return {name: value[:1] for name, value in cond.items()} if isinstance(cond, dict) else cond[:1]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_one_timestep_and_one_condition_are_broadcast(family):
    velocity = as_velocity_model(family.make())
    x_t, _, cond = family.inputs()
    first = first_sample(cond)
    twice = (
        {name: value.expand(2, *value.shape[1:]) for name, value in first.items()}
        if isinstance(cond, dict)
        else (first.expand(2, -1, -1))
    )
    with torch.no_grad():
        expected = velocity(x_t, torch.tensor([7, 7]), twice)
        for t in (7, torch.tensor(7), torch.tensor([7])):
            assert torch.equal(velocity(x_t, t, first), expected)
        if not isinstance(cond, dict):
            assert torch.equal(velocity(x_t, 7, {"encoder_hidden_states": first.double()}), expected)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_wrong_input_is_named(family):
    velocity = as_velocity_model(family.make())
    x_t, t, cond = family.inputs()
    channel_dim = velocity.channel_dim
    with pytest.raises(TypeError, match="cond.*encoder_hidden_states.*NoneType"):
        velocity(x_t, t, None)
    with pytest.raises(TypeError, match="x_t.*list"):
        velocity([x_t], t, cond)
    with pytest.raises(ValueError, match=r"x_t.*five.*got shape \(\d, \d, 8, 8\)"):
        velocity(x_t[0], t, cond)
    with pytest.raises(ValueError, match=rf"x_t.*4 channels in dimension {channel_dim}"):
        velocity(x_t.transpose(1, 2), t, cond)
    with pytest.raises(ValueError, match=r"t: .*\(3,\)"):
        velocity(x_t, torch.zeros(3), cond)
    with pytest.raises(ValueError, match=r"t: .*\(2, 3\)"):
        velocity(x_t, torch.zeros(2, 3), cond)
    whole = cond if isinstance(cond, dict) else {"encoder_hidden_states": cond}
    with pytest.raises(ValueError, match=r"cond.*missing: \[\], unknown: \['attention_kwargs'\]"):
        velocity(x_t, t, whole | {"attention_kwargs": cond})
    for name in whole:
        with pytest.raises(ValueError, match=rf"cond.*missing: \['{name}'\], unknown: \[\]"):
            velocity(x_t, t, {key: value for key, value in whole.items() if key != name})
        with pytest.raises(TypeError, match=rf"cond\['{name}'\].*list"):
            velocity(x_t, t, whole | {name: [1]})
        with pytest.raises(ValueError, match=rf"cond\['{name}'\].*expected \(2 or 1, .*got shape \(3, "):
            velocity(x_t, t, whole | {name: whole[name][:1].repeat(3, *[1] * (whole[name].dim() - 1))})
        with pytest.raises(ValueError, match=rf"cond\['{name}'\].*expected \(2 or 1, .*got shape \(2, "):
            velocity(x_t, t, whole | {name: whole[name][..., None]})


def test_the_parts_of_a_hunyuan_video_condition_must_fit_together():
    velocity = as_velocity_model(hunyuan_video())
    x_t, t, cond = hunyuan_video_inputs()
    with pytest.raises(ValueError, match=r"missing: \['encoder_attention_mask', 'pooled_projections'\]"):
        velocity(x_t, t, cond["encoder_hidden_states"])
    with pytest.raises(ValueError, match=r"encoder_attention_mask.*L = 16.*\(2, 15\)"):
        velocity(x_t, t, cond | {"encoder_attention_mask": cond["encoder_attention_mask"][:, :15]})


def test_training_works_after_sampling_in_inference_mode():
    velocity = as_velocity_model(cogvideox(rope=True))
    x_t, t, cond = torch.randn(2, 3, 4, 8, 16), *inputs()[1:]
    with torch.inference_mode():
        velocity(x_t, t, cond)
    velocity(x_t, t, cond).sum().backward()


def test_importing_needs_torch_alone():
    code = (
        "import sys, fastunlearn.families, fastunlearn.erasers, fastunlearn.masks, fastunlearn.capture\n"
        "heavy = {'diffusers', 'transformers', 'accelerate', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
