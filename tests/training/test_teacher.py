"""The points of a cache: the frozen model's velocities, masks and steps, whatever batch a trajectory is in."""

import pytest
import torch
from prepare_cases import (
    KEPT,
    REQUESTS,
    SIZE,
    STEPS,
    TARGETS,
    WITHOUT,
    assert_close,
    hooked,
    options_for,
    prepare_and_open,
    velocity,
)

from fastunlearn import AttnMapsCapture, get_mask
from fastunlearn.testing.tiny_pipelines import VARIANTS
from fastunlearn.training.cache.plan import Plan
from fastunlearn.training.data.requests import Request
from fastunlearn.training.model.sampling import denoise, random_generator, scheduler_for, stack_conditions
from fastunlearn.training.prepare import prepare


@pytest.mark.parametrize("family", VARIANTS)
def test_the_cache_holds_the_velocities_of_the_frozen_model(model_and_prompts, tmp_path, family):
    model, encoded = model_and_prompts(family)
    cache = prepare_and_open(model, encoded, tmp_path, negative_prompt="bad quality", timesteps_per_trajectory=STEPS)
    shape = model.latent_shape(**SIZE)
    assert tuple(cache.facts["latent_shape"]) == shape and cache.facts["backbone"] == model.family.name
    assert {name: len(points) for name, points in cache.groups.items()} == {"target": 3 * STEPS, "kept": 2 * STEPS}
    timesteps = scheduler_for(model, STEPS).timesteps.float()
    for name, points in cache.groups.items():
        rows = points.rows(range(len(points)))
        assert torch.equal(rows.t, timesteps.repeat(len(points) // STEPS))
        assert rows.x_t.dtype == torch.float32
        assert points.experts.tolist() == [model.expert_index(t) for t in rows.t.tolist()]
        prompts = [cache.prompts[number] for number in points.prompts]
        requested = [request.prompt for request in REQUESTS if request.group == name]
        assert prompts == [prompt for prompt in requested for _ in range(STEPS)]
        assert_close(rows.v_cond, velocity(model, encoded, rows.x_t, rows.t, prompts))
        negative = ["bad quality"] * len(prompts)
        assert_close(rows.v_uncond, velocity(model, encoded, rows.x_t, rows.t, negative))
        for i, prompt in enumerate(prompts):
            condition = encoded[prompt].condition
            assert all(torch.equal(rows.condition[key][i], condition[key]) for key in condition)
        assert (rows.v_cond - rows.v_uncond).abs().max() > 0.01 * rows.v_cond.abs().max()
    # A trajectory starts at noise that depends on the seed and the trajectory's index.
    first = cache.groups["target"].rows([0, STEPS, 2 * STEPS]).x_t
    for got, number in zip(first, (0, 1, 3), strict=True):
        assert torch.equal(got, torch.randn(shape, generator=random_generator(0, "noise", number)))
    assert set(model.experts) == {model.experts[i] for i in cache.groups["target"].experts.tolist()}


@pytest.mark.parametrize("family", VARIANTS)
def test_masks_come_from_the_attention_to_the_concept(model_and_prompts, tmp_path, family):
    model, encoded = model_and_prompts(family)
    cache = prepare_and_open(model, encoded, tmp_path, REQUESTS[:2], mask_threshold=0.6, timesteps_per_trajectory=1)
    points = cache.groups["target"].rows([0, 1])
    grid = model.token_grid(model.latent_shape(**SIZE))
    assert points.mask.shape == (2, *grid) and points.mask.dtype == torch.bool
    for number in range(2):
        # The same trajectory sampled alone, and the attention of forward passes with the prompt alone.
        prompt = TARGETS[number]
        noise = torch.randn(model.latent_shape(**SIZE), generator=random_generator(0, "noise", number))[None]
        conditions = {
            name: stack_conditions([encoded[text].condition], model.device)
            for name, text in (("negative", ""), ("prompt", prompt))
        }
        total = {}
        for step in denoise(
            model,
            noise,
            conditions,
            follow="prompt",
            guide_from="negative",
            guidance_scale=3.0,
            num_inference_steps=STEPS,
        ):
            if step.index < STEPS // 2:
                continue
            maps = {}
            expert = model.experts[model.expert_index(step.t)]
            with torch.no_grad(), AttnMapsCapture(expert, maps, token_indices=encoded[prompt].token_indices):
                expert(step.x_t, step.t, conditions["prompt"])
            total = {layer: total.get(layer, 0) + attention for layer, attention in maps.items()}
        expected = get_mask(total, None, 0.6, *grid[1:], frames=grid[0])["average_mask"][0]
        assert torch.equal(points.mask[number].float(), expected)
        assert 0 < expected.mean() < 1


def test_mask_options(model_and_prompts, tmp_path):
    model, encoded = model_and_prompts("cogvideox")

    def masks(name, **changes):
        cache = prepare_and_open(model, encoded, tmp_path / name, REQUESTS[:2], height=64, width=64, **changes)
        return cache.groups["target"].rows(range(4)).mask

    default = masks("default")
    assert torch.equal(default[0], default[1]) and torch.equal(default[2], default[3])  # one per trajectory
    assert not torch.equal(default, masks("layer", mask_layers=(1,)))
    assert not torch.equal(default, masks("start", mask_start=0.0))
    assert masks("threshold", mask_threshold=0.0).all()
    assert torch.equal(default, masks("alone", batch_size=1))
    with pytest.raises(ValueError, match=r"mask_layers: expected layers from 0 to 1, got \[2\]"):
        masks("wrong", mask_layers=(0, 2))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_v_uncond_of_another_prompt(model_and_prompts, tmp_path, guidance_scale):
    model, encoded = model_and_prompts("cogvideox")
    instead = KEPT[1]
    requests = [Request(TARGETS[0], "towards", instead), Request(TARGETS[0], "away", instead, "instead", (0.5, 1))]
    cache = prepare_and_open(
        model, encoded, tmp_path, requests, guidance_scale=guidance_scale, timesteps_per_trajectory=2
    )
    for number, (name, followed) in enumerate((("towards", TARGETS[0]), ("away", instead))):
        points = cache.groups[name]
        rows = points.rows([0, 1])
        noise = torch.randn(model.latent_shape(**SIZE), generator=random_generator(0, "noise", number))[None]
        conditions = {
            key: stack_conditions([encoded[text].condition], model.device)
            for key, text in (("negative", ""), ("followed", followed))
        }
        steps = {
            step.t: step.x_t
            for step in denoise(
                model,
                noise,
                conditions,
                follow="followed",
                guide_from="negative",
                guidance_scale=guidance_scale,
                num_inference_steps=STEPS,
            )
        }
        assert_close(rows.x_t, torch.cat([steps[t.item()] for t in rows.t]))
        assert_close(rows.v_cond, velocity(model, encoded, rows.x_t, rows.t, [TARGETS[0]] * 2))
        assert_close(rows.v_uncond, velocity(model, encoded, rows.x_t, rows.t, [instead] * 2))
        assert rows.mask.any() and not rows.mask.all()
    assert cache.groups["away"].t.tolist() == scheduler_for(model, STEPS).timesteps.tolist()[STEPS // 2 :]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_trajectory_that_follows_the_negative_prompt(model_and_prompts, tmp_path, guidance_scale):
    model, encoded = model_and_prompts("cogvideox")
    requests = [Request(TARGETS[1], follow="negative")]
    cache = prepare_and_open(
        model, encoded, tmp_path, requests, guidance_scale=guidance_scale, timesteps_per_trajectory=STEPS
    )
    rows = cache.groups["target"].rows(range(STEPS))
    noise = torch.randn(model.latent_shape(**SIZE), generator=random_generator(0, "noise", 0))[None]
    conditions = {"negative": stack_conditions([encoded[""].condition], model.device)}
    steps = list(denoise(model, noise, conditions, follow="negative", num_inference_steps=STEPS))
    assert_close(rows.x_t, torch.cat([step.x_t for step in steps]))
    assert_close(rows.v_cond, velocity(model, encoded, rows.x_t, rows.t, [TARGETS[1]] * STEPS))
    assert_close(rows.v_uncond, velocity(model, encoded, rows.x_t, rows.t, [""] * STEPS))
    assert rows.mask.any() and not rows.mask.all()


def test_kept_points_can_be_read_with_the_negative_prompt(model_and_prompts, tmp_path):
    model, encoded = model_and_prompts("cogvideox")
    requests = [Request(TARGETS[0]), Request(KEPT[0], "kept"), Request(KEPT[1], "kept", instead=WITHOUT)]
    cache = prepare_and_open(model, encoded, tmp_path, requests, negative_prompt="bad quality")
    points = cache.groups["kept"]
    is_first = torch.tensor([cache.prompts[number] == KEPT[0] for number in points.prompts])
    assert torch.equal(points.has_negative, is_first) and is_first.sum() == 2
    assert cache.groups["target"].has_negative.all()
    first, second = is_first.nonzero()[:, 0].tolist()
    other = (~is_first).nonzero()[0].item()
    plain = points.rows([first, second, other])
    rows = points.rows([first, second, other], torch.tensor([False, True, False]))
    assert torch.equal(rows.x_t, plain.x_t) and torch.equal(rows.v_uncond, plain.v_uncond)
    assert torch.equal(rows.v_cond[[0, 2]], plain.v_cond[[0, 2]]) and torch.equal(rows.v_cond[1], plain.v_uncond[1])
    for row, prompt in enumerate((KEPT[0], "bad quality", KEPT[1])):
        for keyword, value in encoded[prompt].condition.items():
            assert torch.equal(rows.condition[keyword][row], value)
    with pytest.raises(ValueError, match="^negative: expected points whose v_uncond is of the negative prompt, got"):
        points.rows([other], torch.tensor([True]))


def test_without_guidance_the_negative_prompt_is_evaluated_at_points_only(model_and_prompts, tmp_path):
    model, encoded = model_and_prompts("hunyuan_video")
    cache = prepare_and_open(model, encoded, tmp_path, guidance_scale=None, timesteps_per_trajectory=1, batch_size=3)
    assert cache.facts["guidance_scale"] == 1.0
    rows = cache.groups["kept"].rows([0, 1])
    assert_close(rows.v_uncond, velocity(model, encoded, rows.x_t, rows.t, ["", ""]))
    assert_close(rows.v_cond, velocity(model, encoded, rows.x_t, rows.t, ["a square", ""]))


def test_a_trajectory_does_not_depend_on_the_rest_of_its_batch(model_and_prompts, tmp_path):
    model, encoded = model_and_prompts("cogvideox")
    alone = prepare_and_open(model, encoded, tmp_path / "alone", batch_size=1)
    together = prepare_and_open(model, encoded, tmp_path / "together", batch_size=3)
    for name, points in alone.groups.items():
        a, b = (cache.groups[name].rows(range(len(points))) for cache in (alone, together))
        assert torch.equal(a.t, b.t)
        for field in ("x_t", "v_uncond", "v_cond"):
            assert_close(getattr(a, field), getattr(b, field))


def test_point_steps_are_spread_over_the_trajectory():
    options = options_for(num_inference_steps=50, timesteps_per_trajectory=7)
    plan = Plan([Request("x", steps=(0.2, 0.9)) for _ in range(200)], options, 3.0, ())
    edges = [10 + part * 35 // 7 for part in range(8)]
    for steps in plan.point_steps:
        assert all(low <= step < high for low, high, step in zip(edges[:-1], edges[1:], steps, strict=True))
    assert {step for steps in plan.point_steps for step in steps} == set(range(10, 45))
    assert len({tuple(steps) for steps in plan.point_steps}) > 150  # trajectories differ
    all_steps = Plan([Request("x")], options_for(timesteps_per_trajectory=9), 3.0, ())
    assert all_steps.point_steps == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"steps: expected .* of the 4 sampling steps in it, got \(0.3, 0.4\)"):
        Plan([Request("x", steps=(0.3, 0.4))], options_for(), 3.0, ())
    with pytest.raises(ValueError, match="requests: expected at least one"):
        Plan([], options, 3.0, ())


def test_prompts_and_sizes_that_do_not_fit_are_refused(model_and_prompts, tmp_path):
    model, encoded = model_and_prompts("cogvideox")
    with pytest.raises(
        ValueError,
        match="'circle' in all prompts of group 'target' or in none, got some with it, and 'a square' without",
    ):
        prepare(model, encoded, [Request(TARGETS[0]), Request("a square")], tmp_path, options_for())
    with pytest.raises(ValueError, match="encoded: expected every prompt.*'a dog' is missing"):
        prepare(model, encoded, [Request("a dog")], tmp_path, options_for())
    with pytest.raises(ValueError, match="height: expected a positive multiple of 16, got 33"):
        prepare(model, encoded, REQUESTS, tmp_path, options_for(height=33))
    assert not list(tmp_path.iterdir())


def test_velocities_that_overflow_are_not_written(model_and_prompts, tmp_path):
    model, encoded = model_and_prompts("cogvideox")
    infinity = float("inf")
    for overflow, message in (
        # In the last step, whose attention comes before the overflow.
        (lambda t: infinity if t.max() < 1000 / STEPS else 1, "finite values, got NaN or infinity in unit 0"),
        (lambda t: infinity, r"attn_maps\['transformer_blocks.0.attn1'\]: expected finite attention, got NaN"),
    ):
        hook = model.experts[0].register_forward_hook(lambda _, args, output, f=overflow: output * f(args[1]))
        with hooked(hook), pytest.raises(ValueError, match=f"{message}.*mixed_precision 'bf16'"):
            prepare(model, encoded, REQUESTS, tmp_path, options_for())
        assert not list(tmp_path.glob("shard*"))


def test_out_of_memory_says_what_helps(model_and_prompts, tmp_path):
    model, encoded = model_and_prompts("cogvideox")

    def exhaust(module, args):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    message = "3 GiB.*--batch-size 1; --mixed-precision bf16; .*--num-frames"
    with hooked(model.experts[0].register_forward_pre_hook(exhaust)), pytest.raises(MemoryError, match=message):
        prepare(model, encoded, REQUESTS, tmp_path, options_for())
    prepare(model, encoded, REQUESTS, tmp_path, options_for())
