"""A loaded model with saved erasers on it: what evaluating and sampling start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from fastunlearn import eraser_files
from fastunlearn.eraser_files import CONFIG, UPSTREAM_CONFIG
from fastunlearn.erasers import erasers_disabled
from fastunlearn.families import EXPERTS
from fastunlearn.training.cache.shards import digest
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.memory import explained_out_of_memory
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import EvaluateOptions, SampleOptions


def check_folders(folders: Sequence[Path]) -> None:
    """Raises FileNotFoundError if a folder holds no erasers. Cheap enough to call before loading a large model."""
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"erasers: expected a folder, got {folder}, which does not exist")
        places = [folder / name for name in (CONFIG, UPSTREAM_CONFIG, f"transformer/{CONFIG}")]
        if not any(place.is_file() for place in places):
            within = folder / "erasers"
            hint = f"; did you mean {within}?" if within.is_dir() else ""
            raise FileNotFoundError(f"erasers: expected {CONFIG} in {folder}, as train writes it, got none{hint}")


def load_erased_model(
    options: EvaluateOptions | SampleOptions, *, dtype: torch.dtype, device: torch.device, vae: bool = False
) -> VideoModel:
    """Loads the pipeline named in `options` and attaches all the erasers named there.

    The erasers are called "erasers-1", "erasers-2" and so on, because their folders may have the same name.

    Raises:
        FileNotFoundError: there is no such pipeline, or a folder holds no erasers.
        ValueError: the pipeline is not supported, or erasers are damaged or made for another model.
        MemoryError: memory ran out; the message says what would help.
    """
    with explained_out_of_memory(options):
        model = load_model(
            options.pretrained_model_name_or_path,
            dtype=dtype,
            device=device,
            vae=vae,
            trust_remote_code=options.trust_remote_code,
        )
        names = [f"erasers-{number}" for number in range(1, len(options.erasers) + 1)]
        model.load_erasers(options.erasers, names, options.eraser_scales or None)
    return model


def erasers_digest(folder: Path) -> str:
    """The SHA-256 of the names, shapes and values of all erasers in a folder, whichever of its formats they have.

    Raises: as `eraser_files.read` does.
    """
    places = [place for place in (folder / name for name in EXPERTS) if place.is_dir()] or [folder]
    return digest(
        {
            f"{number}.{layer}.{name}": tensor.detach()
            for number, place in enumerate(places)
            for layer, state in eraser_files.read(place).states.items()
            for name, tensor in state.items()
        }
    )


@contextmanager
def without_erasers(model: VideoModel) -> Iterator[None]:
    """Switches the erasers of every expert off inside the `with` block: the model computes as if it had none."""
    with ExitStack() as stack:
        for expert in model.experts:
            stack.enter_context(erasers_disabled(expert))
        yield
