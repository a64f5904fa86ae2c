"""The estimate of what `prepare` will cost, against what it does cost."""

import dataclasses
import json
import shutil

import pytest
from prepare_cases import KEPT, TARGETS, count_forwards, options_for, write_prompts

from fastunlearn.testing.tiny_pipelines import VARIANTS
from fastunlearn.training import prepare as prepare_module
from fastunlearn.training.cache.estimate import estimate
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.options import PrepareOptions
from fastunlearn.training.prepare import run


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
    tensors = sum(sizes.values()) - sizes["index.json"] - sizes["masks.png"]
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
    # A pass more at the 5 points of the 16 trajectories that follow the target prompt. On the 16 that follow the
    # replacement there are 25 at the steps with masks, and those at the 39 points before these.
    assert (estimated.points, estimated.forward_passes) == (320, 64 * 100 + 16 * 5 + 16 * 25 + 39)
    # The model's README says 1.69 billion parameters, of 2 bytes each.
    assert 3.3e9 < estimated.transformers < 3.5e9
    assert 320 * 3 * 13 * 16 * 60 * 90 * 2 < estimated.disk < 320 * 6.8e6
    lines = str(estimated).splitlines()
    assert lines[1].split() == ["points", "320"] and lines[3].split() == ["on", "disk", "2.2", "GB"]
