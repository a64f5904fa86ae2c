"""Sampling step by step gives the latents of the whole pipeline, and the model's velocities on the way."""

import copy
from contextlib import nullcontext
from functools import cache

import diffusers
import pytest
import torch

from fastunlearn.testing.tiny_pipelines import VARIANTS
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.sampling import denoise, scheduler_for, stack_conditions, velocities
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.random_numbers import random_generator

PROMPTS = ["a red circle in the street", "a square"]
NEGATIVE = "bad quality"
SHAPE = {"height": 32, "width": 32, "num_frames": 9}
STEPS = 3


every_family = pytest.mark.parametrize("family", VARIANTS)


@pytest.fixture(scope="module")
def encoded_prompts(tiny_pipeline):
    """`encoded_prompts(family)`: the encoded prompts, in float32 by default."""

    @cache
    def encoded(family, dtype=torch.float32):
        return encode_prompts(tiny_pipeline(family), [*PROMPTS, NEGATIVE], "circle", dtype=dtype, device="cpu")

    return encoded


def conditions_of(encoded, **prompts):
    """By name, the stacked conditions of a list of prompts."""

    def stacked(texts):
        return stack_conditions([encoded[text].condition for text in texts], torch.device("cpu"))

    return {name: stacked(texts) for name, texts in prompts.items()}


def noise_for(model, batch=2):
    shape = model.latent_shape(**SHAPE)
    return torch.stack([torch.randn(shape, generator=random_generator(0, sample)) for sample in range(batch)])


def pipeline_latents(pipeline, noise, guidance_scale, generator=None):
    """The latents that the pipeline itself ends with."""
    name = type(pipeline).__name__
    guidance = {"true_cfg_scale" if name == "HunyuanVideoPipeline" else "guidance_scale": guidance_scale}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        latents=noise,
        num_inference_steps=STEPS,
        output_type="latent",
        generator=generator,
        **guidance,
        **SHAPE,
    ).frames


def close(a, b, relative):
    assert a.shape == b.shape and torch.isfinite(a).all()
    assert (a - b).abs().max() <= relative * b.abs().max(), (a - b).abs().max() / b.abs().max()


@every_family
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_sampling_gives_the_latents_of_the_pipeline(
    family, guidance_scale, loaded_model, diffusers_pipeline, encoded_prompts
):
    model, pipeline = loaded_model(family), diffusers_pipeline(family)
    noise = noise_for(model)
    conditions = conditions_of(encoded_prompts(family), prompt=PROMPTS, negative=[NEGATIVE] * 2)
    expected = pipeline_latents(pipeline, noise, guidance_scale)
    steps = list(
        denoise(
            model,
            noise,
            conditions,
            follow="prompt",
            guide_from="negative",
            guidance_scale=guidance_scale,
            num_inference_steps=STEPS,
        )
    )
    close(steps[-1].x_next, expected, 1e-4)
    assert [step.index for step in steps] == [0, 1, 2]
    assert [step.t for step in steps] == pipeline.scheduler.timesteps.tolist()
    assert torch.equal(steps[0].x_t, noise) and torch.equal(steps[1].x_t, steps[0].x_next)
    # The condition matters: following the other one ends elsewhere.
    other = list(denoise(model, noise, conditions, follow="negative", guidance_scale=1, num_inference_steps=STEPS))
    assert (other[-1].x_next - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize("scheduler", ["CogVideoXDPMScheduler", "DPMSolverMultistepScheduler"])
def test_other_schedulers(scheduler, loaded_model, diffusers_pipeline, encoded_prompts):
    family = "cogvideox" if "Cog" in scheduler else "wan"
    settings = {} if "Cog" in scheduler else {"algorithm_type": "dpmsolver++"}
    scheduler_class = getattr(diffusers, scheduler)
    model, encoded = copy.copy(loaded_model(family)), encoded_prompts(family)
    model.scheduler = scheduler_class.from_config(model.scheduler.config, **settings)
    components = diffusers_pipeline(family).components
    components["scheduler"] = scheduler_class.from_config(model.scheduler.config, **settings)
    pipeline = type(diffusers_pipeline(family))(**components)
    noise = noise_for(model)
    generators = [random_generator("noise on the way", sample) for sample in range(2)]
    expected = pipeline_latents(
        pipeline, noise, 5.0, [random_generator("noise on the way", sample) for sample in range(2)]
    )
    conditions = conditions_of(encoded, prompt=PROMPTS, negative=[NEGATIVE] * 2)
    settings = {"follow": "prompt", "guide_from": "negative", "guidance_scale": 5.0, "num_inference_steps": STEPS}
    *_, last = denoise(model, noise, conditions, generators=generators, **settings)
    close(last.x_next, expected, 1e-4)
    first, second = ([*denoise(model, noise, conditions, **settings)][-1].x_next for _ in range(2))
    assert torch.equal(first, second)  # without generators too
    # A sample does not depend on the rest of its batch.
    alone = {name: {key: value[:1] for key, value in condition.items()} for name, condition in conditions.items()}
    *_, last = denoise(model, noise[:1], alone, **settings)
    close(last.x_next, first[:1], 1e-4)


@every_family
def test_the_velocities_of_a_step_are_the_experts_own(family, loaded_model, encoded_prompts):
    model = loaded_model(family)
    noise = noise_for(model)
    conditions = conditions_of(encoded_prompts(family), prompt=PROMPTS, negative=[NEGATIVE] * 2)
    for step in denoise(model, noise, conditions, follow="prompt", num_inference_steps=STEPS):
        expert = model.experts[model.expert_index(step.t)]
        assert step.velocities.keys() == conditions.keys()
        for key, velocity in step.velocities.items():
            with torch.no_grad():
                close(velocity, expert(step.x_t, step.t, conditions[key]), 1e-4)
        one_at_a_time = velocities(model, step.x_t, torch.tensor(step.t), conditions, one_at_a_time=True)
        for key, velocity in one_at_a_time.items():
            close(velocity, step.velocities[key], 1e-4)
    used = {model.expert_index(t) for t in scheduler_for(model, STEPS).timesteps.tolist()}
    assert used == ({0, 1} if family == "wan-2.2" else {0})


def test_conditions_of_different_lengths_go_one_at_a_time(loaded_model, encoded_prompts):
    model = loaded_model("wan")
    conditions = conditions_of(encoded_prompts("wan"), prompt=PROMPTS, negative=[NEGATIVE] * 2)
    conditions["negative"] = {key: value[:, :100] for key, value in conditions["negative"].items()}
    seen = []

    def watch(expert, names):
        seen.append(list(names))
        return nullcontext()

    by_name = velocities(model, noise_for(model), torch.tensor(500), conditions, watch=watch)
    assert seen == [["prompt"], ["negative"]] and list(by_name) == ["prompt", "negative"]
    with pytest.raises(ValueError, match="encoder_hidden_states of one shape"):
        stack_conditions([{key: value[0] for key, value in c.items()} for c in conditions.values()], model.device)


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan_video", "wan"])
def test_half_precision_stays_near_float32(tiny_pipeline, family, encoded_prompts):
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(tiny_pipeline(family), dtype=dtype, device="cpu")
        conditions = conditions_of(encoded_prompts(family, dtype), prompt=PROMPTS, negative=[NEGATIVE] * 2)
        *_, step = denoise(
            model,
            noise_for(model),
            conditions,
            follow="prompt",
            guide_from="negative",
            guidance_scale=2.0,
            num_inference_steps=STEPS,
        )
        assert step.x_t.dtype == dtype and {v.dtype for v in step.velocities.values()} == {dtype}
        # Only CogVideoX's pipeline rounds latents between steps.
        assert step.x_next.dtype == (dtype if family == "cogvideox" else torch.float32)
        ends[dtype] = step.x_next.float()
    error = (ends[torch.bfloat16] - ends[torch.float32]).norm() / ends[torch.float32].norm()
    assert 0 < error < 0.15


def test_sampling_does_not_change_the_models_scheduler(loaded_model, encoded_prompts):
    model = loaded_model("wan")
    conditions = conditions_of(encoded_prompts("wan"), prompt=PROMPTS)
    before = repr(vars(model.scheduler))
    list(denoise(model, noise_for(model), conditions, follow="prompt", num_inference_steps=2))
    assert repr(vars(model.scheduler)) == before


def test_bad_arguments(loaded_model, encoded_prompts):
    model = loaded_model("cogvideox")
    noise, conditions = noise_for(model), conditions_of(encoded_prompts("cogvideox"), prompt=PROMPTS)
    for settings, message in (
        ({"follow": "promt"}, "follow: expected one of 'prompt', got 'promt'"),
        ({"follow": "prompt", "guidance_scale": 2.0}, "guide_from: expected one of 'prompt', got None"),
        ({"follow": "prompt", "num_inference_steps": 0}, "num_inference_steps: expected a positive number, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            next(denoise(model, noise, conditions, **settings))


def test_a_key_determines_a_generators_numbers():
    draws = [torch.rand(1, generator=random_generator(*key)).item() for key in ((0, 1), (1, 0), (0, 1), (2**40, 1))]
    assert draws[0] == draws[2] and len(set(draws)) == 3
