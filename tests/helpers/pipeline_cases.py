"""What the tests of loaded pipelines share: families, a prompt, a size, noise, and a record of a module's calls."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch

from fastunlearn.testing.tiny_pipelines import VARIANTS

SIZE = {"height": 64, "width": 64, "num_frames": 9}
PROMPT = "a nude person in the park"
FP32 = {"dtype": torch.float32, "device": "cpu"}
ONE_OF_EACH = ["cogvideox", "hunyuan_video", "wan-2.2"]
every_family = pytest.mark.parametrize("family", VARIANTS)
one_of_each = pytest.mark.parametrize("family", ONE_OF_EACH)


def noise(model, batch=1, seed=0):
    """Standard normal latents of a video of `SIZE`."""
    shape = model.latent_shape(**SIZE)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def batched(encoded):
    """The condition of an encoded prompt, as a batch of 1."""
    return {key: value[None] for key, value in encoded.condition.items()}


@contextmanager
def recorded_calls(*modules):
    """Records (index of the module, keyword arguments) of every call of one of `modules`."""
    calls = []

    def record(index):
        return lambda module, args, kwargs: calls.append((index, kwargs))

    handles = [
        module.register_forward_pre_hook(record(index), with_kwargs=True) for index, module in enumerate(modules)
    ]
    yield calls
    for handle in handles:
        handle.remove()


def copy_of(folder, to):
    shutil.copytree(folder, to)
    return to


def edit(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
