"""`prepare` on one process and several: how they share the work, resume it, and report mistakes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prepare_cases import KEPT, REQUESTS, TARGETS, contents, options_for, prepare_and_open, write_prompts

from fastunlearn import attach_erasers
from fastunlearn.erasers import detach_erasers
from fastunlearn.training import prepare as prepare_module
from fastunlearn.training.cache import TeacherCache
from fastunlearn.training.data.requests import Request
from fastunlearn.training.prepare import prepare, run


@pytest.fixture(scope="module")
def undisturbed(model_and_prompts, tmp_path_factory):
    """The files of a cache that one process wrote without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prepare_and_open(*model_and_prompts("cogvideox"), folder, batch_size=1)
    return contents(folder)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in turn", "reversed"])
def test_processes_share_the_work_without_overlap_or_gap(model_and_prompts, tmp_path, undisturbed, order):
    model, encoded = model_and_prompts("cogvideox")
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


def test_with_a_barrier_process_0_writes_the_index(model_and_prompts, tmp_path, undisturbed):
    model, encoded = model_and_prompts("cogvideox")

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


def test_changed_arguments_and_models_are_reported(model_and_prompts, tmp_path, undisturbed):
    model, encoded = model_and_prompts("cogvideox")
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
    other, _ = model_and_prompts("cogvideox-rope")
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


def test_erasers_are_disabled_during_prepare(model_and_prompts, tmp_path, undisturbed):
    model, encoded = model_and_prompts("cogvideox")
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


@pytest.mark.filterwarnings("ignore:kept_prompts")
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


@pytest.fixture(scope="module")
def processes(tiny_pipeline, made_once):
    """A folder with three caches: by one process, by processes that were killed, and by two launched processes."""

    def make(folder):
        write_prompts(folder, target_prompts="\n".join(TARGETS), kept_prompts="\n".join(KEPT))
        script = Path(__file__).parents[1] / "workers/prepare_worker.py"
        command = [sys.executable, str(script), str(tiny_pipeline("cogvideox")), str(folder)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return made_once("prepare-processes", make)


def test_a_killed_and_resumed_cache_is_the_same(processes):
    assert contents(processes / "killed") == contents(processes / "undisturbed")
    assert TeacherCache.open(processes / "killed", verify=True).groups.keys() == {"target", "kept"}


def test_two_launched_processes_write_the_same_cache(processes):
    assert contents(processes / "launched") == contents(processes / "undisturbed")
