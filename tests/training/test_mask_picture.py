"""`masks.png`: what `prepare` shows of its masks, and what it warns of."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from prepare_cases import prepare_and_open

from fastunlearn.files import replace_file
from fastunlearn.training.cache.index import MASKS
from fastunlearn.training.cache.reader import TeacherCache


def test_it_has_a_row_per_masked_trajectory(model_and_prompts, tmp_path):
    cache = prepare_and_open(*model_and_prompts("cogvideox"), tmp_path)
    picture = np.asarray(Image.open(tmp_path / MASKS).convert("RGB"))
    pink = np.array([255, 51, 153])
    outlined = (np.abs(picture.astype(int) - pink).max(-1) < 3).any(1)
    masked = [entry for entry in cache.facts["requests"] if entry["group"] == "target"]
    rows = int((np.diff(outlined.astype(int)) == 1).sum())
    assert rows >= len(masked) > 0  # a mask may have several parts, one above the other


@pytest.mark.parametrize(("threshold", "kind", "change"), [(0.0, "full", "raise"), (1.0, "empty", "lower")])
def test_masks_that_tell_nothing_are_warned_of(threshold, kind, change, model_and_prompts, tmp_path, monkeypatch):
    if kind == "empty":  # the largest attention always reaches the threshold, so no mask is empty by itself
        monkeypatch.setattr("fastunlearn.training.cache.mask_picture.NEARLY_EMPTY", 0.2)
    with pytest.warns(UserWarning, match=f"masks nearly {kind} .*masks.png, then {change} --mask-threshold"):
        prepare_and_open(*model_and_prompts("cogvideox"), tmp_path, mask_threshold=threshold)


def test_a_cache_with_the_picture_is_a_cache(model_and_prompts, tmp_path):
    prepare_and_open(*model_and_prompts("wan"), tmp_path)
    assert (tmp_path / MASKS).stat().st_size > 1000
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "png")
    replace_file(tmp_path / MASKS, content.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TeacherCache.open(tmp_path).groups["target"].has_masks


@pytest.mark.parametrize("family", ["cogvideox", "wan"])
def test_the_estimate_of_x_0_inverts_the_noise(family, loaded_model):
    model = loaded_model(family)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 2, 3, 4, 4, 4, generator=generator)
    t = torch.tensor([300.0, 700.0])
    x_t = model.add_noise(x_0, noise, t)
    torch.testing.assert_close(
        model.estimate_x_0(x_t, model.velocity_target(x_0, noise, t), t), x_0, rtol=1e-4, atol=1e-4
    )
