"""Tiny caches, and what tests of `prepare` compare them with."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from fastunlearn.training.cache import TeacherCache
from fastunlearn.training.cache.plan import Plan
from fastunlearn.training.data.requests import Request
from fastunlearn.training.model.sampling import stack_conditions
from fastunlearn.training.options import PrepareOptions
from fastunlearn.training.prepare import prepare

TARGETS = ("a red circle in the street", "a circle")
KEPT = ("a square", "a red square in the street")
WITHOUT = "a red in the street"  # the first target without the concept; nothing is left of the other one
PROMPTS = (*TARGETS, *KEPT, WITHOUT, "", "bad quality")
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
    """Options for a few steps of sampling of tiny videos."""
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


def contents(folder):
    """The bytes of every file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_prompts(folder, **files):
    """Writes NAME.txt for every name and text. Returns the paths by name, as options take them."""
    paths = {}
    for name, text in files.items():
        paths[name] = folder / f"{name}.txt"
        paths[name].write_text(text)
    return paths


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
    """Removes the hooks of a model at the end."""
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
    """Makes a cache and opens it, after checking that it took the planned forward passes and has the planned points."""
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
