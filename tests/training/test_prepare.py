"""`prepare`: what the cache holds, how work is shared and resumed, given videos, and the estimate of the cost."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from fastunlearn import AttnMapsCapture, attach_erasers, get_mask
from fastunlearn.erasers import detach_erasers
from fastunlearn.testing.tiny_pipelines import VARIANTS
from fastunlearn.training import prepare as prepare_module
from fastunlearn.training.cache import TeacherCache
from fastunlearn.training.cache.estimate import estimate
from fastunlearn.training.cache.plan import Plan
from fastunlearn.training.data.requests import Request, read_requests, read_video_requests
from fastunlearn.training.data.videos import read_video, write_video
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.sampling import denoise, random_generator, scheduler_for, stack_conditions
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.options import PrepareOptions
from fastunlearn.training.prepare import prepare, run

TARGETS = ("a red circle in the street", "a circle")
KEPT = ("a square", "a red square in the street")
REQUESTS = [
    Request(TARGETS[0]),
    Request(TARGETS[1]),
    Request(KEPT[0], "kept"),
    Request(TARGETS[0]),
    Request("", "kept"),
]
SIZE = {"height": 32, "width": 32, "num_frames": 9}
STEPS = 4


def options_for(folder="", output_dir="", **changes):
    settings = {
        "pretrained_model_name_or_path": str(folder),
        "output_dir": output_dir,
        "concept": "circle",
        "num_inference_steps": STEPS,
        "timesteps_per_trajectory": 2,
        "guidance_scale": 3.0,
        "batch_size": 2,
        "mixed_precision": "no",
        "device": "cpu",
        **SIZE,
    }
    return PrepareOptions(**settings | changes)


@pytest.fixture(scope="module")
def loaded(tiny_pipeline, loaded_model):
    """`loaded(family)`: the model and all prompts, loaded once. A test that changes the model restores it."""

    @cache
    def load(family):
        prompts = [*TARGETS, *KEPT, "", "bad quality"]
        encoded = encode_prompts(tiny_pipeline(family), prompts, "circle", dtype=torch.float32, device="cpu")
        return loaded_model(family), encoded

    return load


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def velocity(model, encoded, x_t, t, prompts):
    """The model's velocities (B, ...) at points x_t (B, ...), t (B,), with one prompt each; batched by timestep."""
    result = torch.empty_like(x_t)
    for value in t.unique():
        rows = (t == value).nonzero()[:, 0]
        condition = stack_conditions([encoded[prompts[row]].condition for row in rows], model.device)
        with torch.no_grad():
            result[rows] = model.experts[model.expert_index(float(value))](x_t[rows], t[rows], condition)
    return result


def assert_close(a, b, relative=1e-4):
    """Compares B points one by one: each is accurate relative to its own largest value."""
    assert a.shape == b.shape
    assert ((a - b).abs().flatten(1).amax(1) <= relative * b.abs().flatten(1).amax(1)).all()


@contextmanager
def hooked(*hooks):
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def count_forwards(model):
    """The batch sizes of the experts' forward passes from now on, and the hooks that record them."""
    batches = []

    def count(module, args, kwargs):
        batches.append(len(kwargs["hidden_states"]))

    hooks = [expert.transformer.register_forward_pre_hook(count, with_kwargs=True) for expert in model.experts]
    return batches, hooks


def prepare_and_open(model, encoded, folder, requests=REQUESTS, **changes):
    options = options_for(**changes)
    batches, hooks = count_forwards(model)
    with hooked(*hooks):
        prepare(model, encoded, requests, folder, options)
    scale = model.defaults.guidance_scale if options.guidance_scale is None else options.guidance_scale
    plan = Plan(requests, options, scale, {r.group for r in requests if encoded[r.prompt].token_indices})
    assert sum(batches) == plan.num_forwards
    cache = TeacherCache.open(folder, verify=True)
    assert sum(map(len, cache.groups.values())) == plan.num_points
    return cache


@pytest.mark.parametrize("family", VARIANTS)
def test_the_cache_holds_the_velocities_of_the_frozen_model(loaded, tmp_path, family):
    model, encoded = loaded(family)
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
def test_masks_come_from_the_attention_to_the_concept(loaded, tmp_path, family):
    model, encoded = loaded(family)
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
        expected = get_mask(total, None, 0.6, *grid[1:])["average_mask"][0]
        assert torch.equal(points.mask[number].float(), expected)
        assert 0 < expected.mean() < 1


def test_mask_options(loaded, tmp_path):
    model, encoded = loaded("cogvideox")

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
def test_v_uncond_of_another_prompt(loaded, tmp_path, guidance_scale):
    model, encoded = loaded("cogvideox")
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


def test_without_guidance_the_negative_prompt_is_evaluated_at_points_only(loaded, tmp_path):
    model, encoded = loaded("hunyuan_video")
    cache = prepare_and_open(model, encoded, tmp_path, guidance_scale=None, timesteps_per_trajectory=1, batch_size=3)
    assert cache.facts["guidance_scale"] == 1.0
    rows = cache.groups["kept"].rows([0, 1])
    assert_close(rows.v_uncond, velocity(model, encoded, rows.x_t, rows.t, ["", ""]))
    assert_close(rows.v_cond, velocity(model, encoded, rows.x_t, rows.t, ["a square", ""]))


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
    with pytest.raises(ValueError, match="steps: expected a start below an end"):
        Request("x", steps=(0.5, 0.5))
    with pytest.raises(ValueError, match="instead: expected a prompt"):
        Request("x", follow="instead")
    with pytest.raises(ValueError, match="follow: expected 'prompt' or 'instead'"):
        Request("x", follow="other")
    with pytest.raises(ValueError, match="requests: expected at least one"):
        Plan([], options, 3.0, ())


@pytest.fixture(scope="module")
def undisturbed(loaded, tmp_path_factory):
    """The files of a cache that one process wrote without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prepare_and_open(*loaded("cogvideox"), folder, batch_size=1)
    return contents(folder)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in turn", "reversed"])
def test_processes_share_the_work_without_overlap_or_gap(loaded, tmp_path, undisturbed, order):
    model, encoded = loaded("cogvideox")
    progress = []
    for process_index in order:
        before = set(os.listdir(tmp_path))
        prepare(
            model,
            encoded,
            REQUESTS,
            tmp_path,
            options_for(batch_size=1),
            process_index=process_index,
            num_processes=2,
            progress=lambda done, total: progress.append((done, total)),
        )
        new = {int(name[6:11]) for name in set(os.listdir(tmp_path)) - before if name.startswith("shard")}
        assert new == set(range(process_index, 5, 2))
    assert contents(tmp_path) == undisturbed
    assert progress == [(done, total) for total in [(3, 2)[i] for i in order] for done in range(total + 1)]


def test_with_a_barrier_process_0_writes_the_index(loaded, tmp_path, undisturbed):
    model, encoded = loaded("cogvideox")

    def other_process():
        prepare(
            model,
            encoded,
            REQUESTS,
            tmp_path,
            options_for(batch_size=1),
            process_index=1,
            num_processes=2,
            barrier=lambda: None,
        )
        with pytest.raises(ValueError, match="not finished"):
            TeacherCache.open(tmp_path)

    prepare(
        model,
        encoded,
        REQUESTS,
        tmp_path,
        options_for(batch_size=1),
        num_processes=2,
        barrier=other_process,
    )
    assert contents(tmp_path) == undisturbed
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="expected 5 shards, got 4; shard-00001.* is missing"):
        prepare(model, encoded, REQUESTS, tmp_path, options_for(batch_size=1), num_processes=2, barrier=lambda: None)


def test_a_trajectory_does_not_depend_on_the_rest_of_its_batch(loaded, tmp_path):
    model, encoded = loaded("cogvideox")
    alone = prepare_and_open(model, encoded, tmp_path / "alone", batch_size=1)
    together = prepare_and_open(model, encoded, tmp_path / "together", batch_size=3)
    for name, points in alone.groups.items():
        a, b = (cache.groups[name].rows(range(len(points))) for cache in (alone, together))
        assert torch.equal(a.t, b.t)
        for field in ("x_t", "v_uncond", "v_cond"):
            assert_close(getattr(a, field), getattr(b, field))


def test_changed_arguments_and_models_are_reported(loaded, tmp_path, undisturbed):
    model, encoded = loaded("cogvideox")
    for name, content in undisturbed.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        prepare(model, encoded, REQUESTS, tmp_path, options_for(batch_size=1, seed=5, height=64))
    assert str(caught.value).splitlines()[1:] == [
        "  latent_shape: [3, 4, 4, 4] -> [3, 4, 8, 4]",
        "  token_grid: [3, 2, 2] -> [3, 4, 2]",
        "  height: 32 -> 64",
        "  seed: 0 -> 5",
    ]
    with pytest.raises(ValueError, match=r"requests\[1\].prompt: 'a circle' -> 'a red square in the street'"):
        changed = [Request(KEPT[1], "kept") if request.prompt == TARGETS[1] else request for request in REQUESTS]
        prepare(model, encoded, changed, tmp_path, options_for(batch_size=1))
    with pytest.raises(ValueError, match="requests: 5 entries -> 4 entries"):
        prepare(model, encoded, REQUESTS[:4], tmp_path, options_for(batch_size=1))
    other, _ = loaded("cogvideox-rope")
    with pytest.raises(ValueError, match="transformer.use_rotary_positional_embeddings: 'False' -> 'True'"):
        prepare(other, encoded, REQUESTS, tmp_path, options_for(batch_size=1))
    weight = model.experts[0].transformer.transformer_blocks[1].attn1.to_q.weight
    before = weight.clone()
    try:
        with torch.no_grad():
            weight += 1
        with pytest.raises(ValueError, match="weights: '.*' -> '"):
            prepare(model, encoded, REQUESTS, tmp_path, options_for(batch_size=1))
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert contents(tmp_path) == undisturbed


def test_erasers_are_disabled_during_prepare(loaded, tmp_path, undisturbed):
    model, encoded = loaded("cogvideox")
    erasers = attach_erasers(model.experts[0], rank=2)
    try:
        with torch.no_grad():
            for eraser in erasers.values():
                eraser.up.bias.fill_(1.0)
        prepare_and_open(model, encoded, tmp_path, batch_size=1)
    finally:
        detach_erasers(model.experts[0])
        model.experts[0].requires_grad_(False)
    assert contents(tmp_path) == undisturbed


def test_out_of_memory_says_what_helps(loaded, tmp_path):
    model, encoded = loaded("cogvideox")

    def exhaust(module, args):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    message = "3 GiB.*--batch-size 1; --mixed-precision bf16; .*--num-frames"
    with hooked(model.experts[0].register_forward_pre_hook(exhaust)), pytest.raises(MemoryError, match=message):
        prepare(model, encoded, REQUESTS, tmp_path, options_for())
    prepare(model, encoded, REQUESTS, tmp_path, options_for())


def test_prompts_and_sizes_that_do_not_fit_are_refused(loaded, tmp_path):
    model, encoded = loaded("cogvideox")
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


def test_velocities_that_overflow_are_not_written(loaded, tmp_path):
    model, encoded = loaded("cogvideox")
    hook = model.experts[0].register_forward_hook(lambda module, args, output: output * float("inf"))
    message = "finite values, got NaN or infinity in unit 0.*mixed_precision 'bf16'"
    with hooked(hook), pytest.raises(ValueError, match=message):
        prepare(model, encoded, REQUESTS, tmp_path, options_for())
    assert not list(tmp_path.glob("shard*"))


@pytest.fixture
def data(tmp_path):
    """A folder with a video of the right size, one that is longer and larger, and latents; and the latents."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    write_video(folder / "first.mp4", torch.rand(9, 3, 32, 32, generator=generator), 8)
    write_video(folder / "second.gif", torch.rand(11, 3, 50, 70, generator=generator), 8)
    latents = torch.randn(3, 4, 4, 4, generator=generator)
    safetensors.torch.save_file({"latents": latents}, folder / "third.safetensors")
    for name, prompt in (("first", TARGETS[0]), ("second", KEPT[0]), ("third", f"{TARGETS[1]}\t{KEPT[1]}")):
        (folder / f"{name}.txt").write_text(prompt)
    return folder, latents


@pytest.mark.parametrize("family", ["cogvideox", "wan-2.2"])
def test_points_of_given_videos(tiny_pipeline, loaded, loaded_model, tmp_path, data, family):
    folder, latents = data
    if family == "wan-2.2":
        latents = latents.movedim(1, 0).contiguous()
        safetensors.torch.save_file({"latents": latents[None]}, folder / "third.safetensors")
    options = options_for(
        tiny_pipeline(family), tmp_path / "cache", data=folder, timesteps_per_trajectory=3, guidance_scale=None
    )
    run(options)
    cache = TeacherCache.open(tmp_path / "cache", verify=True)
    target, kept = cache.groups["target"], cache.groups["kept"]
    assert (len(target), len(kept)) == (6, 3) and target.has_masks and not kept.has_masks
    assert [cache.prompts[number] for number in target.prompts.tolist()] == [TARGETS[0]] * 3 + [TARGETS[1]] * 3
    model, (_, encoded) = loaded_model(family, vae=True), loaded(family)
    rows = target.rows(range(6))
    video_latents = model.encode_video(read_video(folder / "first.mp4")[None])[0]
    noised = []
    for trajectory, x_0 in ((0, video_latents), (2, latents)):
        generator = random_generator(0, "noise", trajectory)
        for t in rows.t[len(noised) :][:3]:
            noise = torch.randn(x_0.shape, generator=generator)
            noised.append(model.add_noise(x_0[None], noise[None], t[None])[0])
    assert_close(rows.x_t, torch.stack(noised))
    for name, prompts in (("v_cond", TARGETS), ("v_uncond", ("", KEPT[1]))):
        expected = velocity(model, encoded, rows.x_t, rows.t, [prompt for prompt in prompts for _ in range(3)])
        assert_close(getattr(rows, name), expected)
    assert rows.mask.any() and not rows.mask.all()
    (folder / "first.txt").write_text(TARGETS[1])
    with pytest.raises(ValueError, match=r"requests\[0\].prompt: 'a red circle in the street' -> 'a circle'"):
        prepare(model, encoded, read_requests(options), options.output_dir, options)


def test_wrong_files_in_a_folder_of_videos(data, loaded, loaded_model, tmp_path):
    folder, _ = data
    model, (_, encoded) = loaded_model("cogvideox", vae=True), loaded("cogvideox")
    assert [request.group for request in read_video_requests(folder, "circle")] == ["target", "kept", "target"]
    for name in ("fourth.MP4", "fifth.SafeTensors"):  # cameras write capitals
        (folder / name).touch()
        (folder / name).with_suffix(".txt").write_text("a dog")
    requests = {request.source.name: request for request in read_video_requests(folder, "circle")}
    for name, expected in {
        "first.mp4": True,
        "third.safetensors": False,
        "fourth.MP4": True,
        "fifth.SafeTensors": False,
    }.items():
        assert requests[name].needs_vae == expected, name
    for name in ("fourth.MP4", "fifth.SafeTensors"):
        (folder / name).unlink()
    options = options_for(data=folder)
    (folder / "first.txt").write_text("one circle\ntwo circle\n")
    with pytest.raises(ValueError, match="first.txt: expected one prompt, got 2"):
        read_requests(options)
    (folder / "first.txt").write_text("one circle\tno circle\n")
    with pytest.raises(ValueError, match="first.txt: expected a prompt without 'circle' after the tab"):
        read_requests(options)
    (folder / "first.txt").unlink()
    with pytest.raises(FileNotFoundError, match="first.txt"):
        read_requests(options)
    (folder / "first.mp4").unlink()
    for index, (tensors, message) in enumerate(
        (
            ({"latents": torch.zeros(2, 4, 4, 4)}, r"third.safetensors: .*\(3, 4, 4, 4\), got \(2, 4, 4, 4\)"),
            ({"latents": torch.full((3, 4, 4, 4), float("nan"))}, "third.safetensors: expected finite latents"),
            ({"latent": torch.zeros(1)}, r"third.safetensors: expected a tensor called 'latents', got \['latent'\]"),
        )
    ):
        safetensors.torch.save_file(tensors, folder / "third.safetensors")
        with pytest.raises(ValueError, match=message):
            prepare(model, encoded, read_requests(options), tmp_path / f"cache {index}", options)
    (folder / "third.safetensors").unlink()
    longer = dataclasses.replace(options, num_frames=13)
    with pytest.raises(ValueError, match="second.gif: expected at least 13 frames, got 11"):
        prepare(model, encoded, read_requests(longer), tmp_path / "longer", longer)
    (folder / "second.gif").unlink()
    with pytest.raises(ValueError, match="data: expected .mp4, .gif or .safetensors files.*got none"):
        read_requests(options)
    with pytest.raises(FileNotFoundError, match="data: expected a folder of videos"):
        read_requests(dataclasses.replace(options, data=folder / "nowhere"))


def write_prompts(folder, **files):
    paths = {}
    for name, text in files.items():
        paths[name] = folder / f"{name}.txt"
        paths[name].write_text(text)
    return paths


def test_the_prompts_of_a_file_take_turns(tmp_path):
    paths = write_prompts(
        tmp_path, target_prompts="a circle\n# a comment\n\na red circle\ta red square\n", kept_prompts="a dog\n"
    )
    requests = read_requests(options_for(num_trajectories=3, **paths))
    assert requests == [
        Request("a circle"),
        Request("a red circle", instead="a red square"),
        Request("a circle"),
        *[Request("a dog", "kept")] * 3,
    ]
    with pytest.warns(UserWarning, match="target_prompts.txt: only 1 of 2 prompts are used; raise num_trajectories"):
        read_requests(options_for(num_trajectories=1, **paths))
    for change, message in (
        (
            {"kept_prompts": "a big circle\n"},
            "kept_prompts.txt: expected a prompt without 'circle', got 'a big circle'",
        ),
        (
            {"target_prompts": "a circle\ta Circle\n"},
            "target_prompts.txt: expected a prompt without 'circle', got 'a Circle'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_requests(options_for(**paths | write_prompts(tmp_path, **change)))
    with pytest.raises(ValueError, match="target_prompts: expected a file"):
        read_requests(options_for())
    with pytest.raises(ValueError, match="data: expected no target_prompts or kept_prompts"):
        read_requests(options_for(data=tmp_path, **paths))


def test_wrong_options_are_refused():
    for change, message in (
        ({"batch_size": 0}, "batch_size: .*at least 1, got 0"),
        ({"mask_threshold": 1.5}, "mask_threshold: .*got 1.5"),
        ({"mask_start": 1.0}, "mask_start: .*got 1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale: .*got nan"),
        ({"concept": " "}, "concept: .*got ' '"),
    ):
        with pytest.raises(ValueError, match=message):
            options_for(**change)


@pytest.mark.parametrize(
    ("size", "foreign", "error"),
    [
        ({"height": 33}, None, "height: expected a positive multiple of 16, got 33"),
        ({"num_frames": 8}, None, "num_frames: expected 1 more than a multiple of 4, got 8"),
        ({}, "thesis.tex", "expected a new folder or a teacher cache, got one with thesis.tex"),
    ],
)
def test_mistakes_are_found_before_weights_are_loaded(tiny_pipeline, tmp_path, monkeypatch, size, foreign, error):
    paths = write_prompts(tmp_path, target_prompts=TARGETS[0])
    output = tmp_path / "cache"
    if foreign:
        output.mkdir()
        (output / foreign).touch()
    monkeypatch.setattr(prepare_module, "encode_prompts", lambda *args, **kwargs: pytest.fail("encoded"))
    with pytest.raises((ValueError, OSError), match=error):
        run(options_for(tiny_pipeline("cogvideox"), output, **size, **paths))
    assert os.listdir(output) == ([foreign] if foreign else [])
    with pytest.raises(OSError, match="target_prompts.txt"):
        run(options_for(tiny_pipeline("cogvideox"), paths["target_prompts"], **paths))


def test_every_process_raises_the_error_of_the_main_process(monkeypatch):
    sent = []

    def broadcast(objects):
        if objects != [None, None]:
            sent[:] = objects
        return list(sent)

    def fail():
        raise ValueError("height: wrong")

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", broadcast)
    first, second = (SimpleNamespace(num_processes=2, is_main_process=is_first) for is_first in (True, False))
    for state in (first, second):  # the second computes nothing itself
        with pytest.raises(ValueError, match="^height: wrong$"):
            prepare_module._broadcast_from_main_process(state, fail)
    for state, compute in ((first, lambda: {"a": 1}), (second, fail)):
        assert prepare_module._broadcast_from_main_process(state, compute) == {"a": 1}


def test_resuming_needs_no_text_encoder(tiny_pipeline, tmp_path, monkeypatch):
    paths = write_prompts(tmp_path, target_prompts=f"{TARGETS[0]}\n", kept_prompts=f"{KEPT[0]}\n")
    options = options_for(
        tiny_pipeline("wan"),
        tmp_path / "cache",
        num_trajectories=2,
        guidance_scale=None,
        mixed_precision="bf16",
        **paths,
    )
    run(options)
    finished = contents(tmp_path / "cache")
    cache = TeacherCache.open(tmp_path / "cache", verify=True)
    rows = cache.groups["target"].rows([0])
    assert rows.x_t.dtype == torch.bfloat16 and rows.condition["encoder_hidden_states"].dtype == torch.bfloat16
    assert cache.facts["guidance_scale"] == 5.0 and cache.facts["model"] == str(tiny_pipeline("wan"))

    def refuse(*args, **kwargs):
        raise AssertionError("encoded again")

    monkeypatch.setattr(prepare_module, "encode_prompts", refuse)
    (tmp_path / "cache" / "shard-00001.safetensors").unlink()
    run(options)
    assert contents(tmp_path / "cache") == finished
    with pytest.raises(AssertionError, match="encoded again"):
        run(dataclasses.replace(options, concept="street"))


@pytest.mark.parametrize("family", VARIANTS)
def test_the_estimate_matches_the_real_cost(tiny_pipeline, tmp_path, monkeypatch, capsys, family):
    paths = write_prompts(
        tmp_path, target_prompts=f"{TARGETS[0]}\n{TARGETS[1]}\t{KEPT[0]}\n", kept_prompts=f"{KEPT[0]}\n{KEPT[1]}\n"
    )
    options = options_for(
        tiny_pipeline(family),
        tmp_path / "cache",
        num_trajectories=3,
        guidance_scale=None,
        mixed_precision="bf16",
        **paths,
    )
    estimated = estimate(options)
    run(dataclasses.replace(options, estimate=True))
    assert capsys.readouterr().out == f"{estimated}\n"
    assert not options.output_dir.exists()
    counts = {}

    def counted(*args, **kwargs):
        counts["model"] = load_model(*args, **kwargs)
        counts["batches"], _ = count_forwards(counts["model"])
        return counts["model"]

    monkeypatch.setattr(prepare_module, "load_model", counted)
    run(options)
    assert estimated.forward_passes == sum(counts["batches"])
    assert (estimated.trajectories, estimated.points) == (6, 12)
    weights = sum(p.numel() for expert in counts["model"].experts for p in expert.parameters())
    assert estimated.transformers == 2 * weights
    sizes = {path.name: path.stat().st_size for path in options.output_dir.iterdir()}
    tensors = sum(sizes.values()) - sizes["index.json"]
    headers = 1200 * len(sizes)
    assert estimated.disk <= tensors <= estimated.disk + headers
    assert (
        estimated.text_encoders > 0
        and estimated.memory >= estimated.transformers + estimated.activations > estimated.transformers
    )


def test_an_estimate_of_a_real_size(tiny_pipeline, tmp_path):
    """The configuration of CogVideoX-2B, with 64 trajectories of 50 steps and 5 points each."""
    folder = tmp_path / "2b"
    shutil.copytree(tiny_pipeline("cogvideox"), folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config |= {
        "num_attention_heads": 30,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": 512,
        "text_embed_dim": 4096,
        "num_layers": 30,
        "sample_width": 90,
        "sample_height": 60,
        "sample_frames": 49,
    }
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    paths = write_prompts(tmp_path, target_prompts=TARGETS[0], kept_prompts=KEPT[0])
    options = PrepareOptions(str(folder), tmp_path / "cache", "circle", **paths)
    estimated = estimate(options)
    assert (estimated.points, estimated.forward_passes) == (320, 6400)
    # The model's README says 1.69 billion parameters, of 2 bytes each.
    assert 3.3e9 < estimated.transformers < 3.5e9
    assert 320 * 3 * 13 * 16 * 60 * 90 * 2 < estimated.disk < 320 * 6.8e6
    lines = str(estimated).splitlines()
    assert lines[1].split() == ["points", "320"] and lines[3].split() == ["on", "disk", "2.2", "GB"]


@pytest.fixture(scope="module")
def processes(tiny_pipeline, tmp_path_factory):
    """A folder with three caches: by one process, by processes that were killed, and by two launched processes."""
    folder = tmp_path_factory.mktemp("processes")
    write_prompts(folder, target_prompts="\n".join(TARGETS), kept_prompts="\n".join(KEPT))
    script = Path(__file__).parents[1] / "workers/prepare_worker.py"
    command = [sys.executable, str(script), str(tiny_pipeline("cogvideox")), str(folder)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_killed_and_resumed_cache_is_the_same(processes):
    assert contents(processes / "killed") == contents(processes / "undisturbed")
    assert TeacherCache.open(processes / "killed", verify=True).groups.keys() == {"target", "kept"}


def test_two_launched_processes_write_the_same_cache(processes):
    assert contents(processes / "launched") == contents(processes / "undisturbed")
