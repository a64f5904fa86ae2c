"""Training makes videos of the prompts that it is given, at its checkpoints and at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prepare_cases import prepare_and_open
from training_cases import options_for

from fastunlearn.erasers import detach_erasers
from fastunlearn.training.loop.validation_videos import ValidationVideos, refuse_sharded_model
from fastunlearn.training.train import train


def rows_of(path: Path) -> list[Any]:
    """The four videos of a picture: before and after, for each of two prompts, cut at the white gaps between them."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    frames = picture[:, 120:]
    is_video = (frames < 250).any(2).mean(1) > 0.5
    starts = np.flatnonzero(np.diff(is_video.astype(int)) == 1) + 1
    ends = np.flatnonzero(np.diff(is_video.astype(int)) == -1) + 1
    return [frames[start:end] for start, end in zip(starts, ends, strict=True) if end - start > 40]


def test_pictures_show_every_prompt_before_and_after(model_and_prompts: Any, loaded_model: Any, tmp_path: Path) -> None:
    model, encoded = model_and_prompts("cogvideox")
    with_vae = loaded_model("cogvideox", vae=True)
    cache = prepare_and_open(model, encoded, tmp_path / "cache")
    prompts = [prompt for prompt in encoded if prompt != cache.facts["negative_prompt"]][:2]
    options = options_for(
        tmp_path / "out",
        validation_prompt=tuple(prompts),
        validation_inference_steps=2,
        checkpointing_steps=2,
        max_train_steps=3,
        learning_rate=0.5,
    )
    conditions = {prompt: entry.condition for prompt, entry in encoded.items()}
    state = torch.random.get_rng_state()
    try:
        train(with_vae, cache, tmp_path / "out", options, validation_conditions=conditions)
    finally:
        detach_erasers(with_vae.experts[0])
    assert torch.equal(torch.random.get_rng_state(), state)
    pictures = sorted(path.name for path in (tmp_path / "out" / "validation").iterdir())
    assert pictures == ["step-00002.png", "step-00003.png"]
    second, third = (rows_of(tmp_path / "out" / "validation" / name) for name in pictures)
    assert len(second) == len(third) == 4
    for row, is_frozen in enumerate((True, False, True, False)):
        assert (second[row] == third[row]).all() == is_frozen
        if not is_frozen:
            assert (second[row] != second[row - 1]).any()


def test_erasers_are_written_before_the_last_videos(
    model_and_prompts: Any, loaded_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoded = model_and_prompts("cogvideox")
    cache = prepare_and_open(model, encoded, tmp_path / "cache")
    prompts = tuple(prompt for prompt in encoded if prompt != cache.facts["negative_prompt"])[:1]
    conditions = {prompt: entry.condition for prompt, entry in encoded.items()}
    options = options_for(tmp_path / "out", validation_prompt=prompts, checkpointing_steps=2, max_train_steps=2)

    def run_out_of_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ValidationVideos, "write", run_out_of_memory)
    with_vae = loaded_model("cogvideox", vae=True)
    try:
        with pytest.raises(MemoryError):
            train(with_vae, cache, tmp_path / "out", options, validation_conditions=conditions)
    finally:
        detach_erasers(with_vae.experts[0])
    assert (tmp_path / "out" / "erasers" / "training.json").exists()


def test_what_cannot_be_sampled_is_refused(model_and_prompts: Any, loaded_model: Any, tmp_path: Path) -> None:
    model, encoded = model_and_prompts("cogvideox")
    cache = prepare_and_open(model, encoded, tmp_path / "cache")
    options = options_for(tmp_path / "out", validation_prompt=("unknown",))
    with_vae = loaded_model("cogvideox", vae=True)
    try:
        with pytest.raises(ValueError, match="validation_conditions: expected one for every prompt, got none for"):
            train(with_vae, cache, tmp_path / "out", options, validation_conditions={})
    finally:
        detach_erasers(with_vae.experts[0])
    with pytest.raises(ValueError, match="validation_prompt: expected none with a model that is sharded"):
        refuse_sharded_model(True)
