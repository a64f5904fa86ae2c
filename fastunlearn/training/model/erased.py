"""Saved erasers on a saved model: what evaluation and sampling begin with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from fastunlearn.eraser_files import CONFIG, UPSTREAM_CONFIG
from fastunlearn.erasers import erasers_disabled
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.memory import explained_out_of_memory
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import EvaluateOptions, SampleOptions


def check_folders(folders: Sequence[Path]) -> None:
    """Raises FileNotFoundError for a folder without erasers: now, rather than after a large model is loaded."""
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"erasers: no folder {folder}")
        places = [folder / name for name in (CONFIG, UPSTREAM_CONFIG, f"transformer/{CONFIG}")]
        if not any(place.is_file() for place in places):
            raise FileNotFoundError(f"erasers: {folder} holds none; expected {CONFIG} in it, as train writes it")


def load_erased_model(
    options: EvaluateOptions | SampleOptions, *, dtype: torch.dtype, device: torch.device, vae: bool = False
) -> VideoModel:
    """The model that `options` name, with all erasers that they name attached, whatever their folders are called.

    Raises:
        FileNotFoundError: there is no such pipeline, or a folder holds no erasers.
        ValueError: the pipeline is not supported, or the erasers are damaged or of another model.
        MemoryError: there is too little memory; says what would help.
    """
    with explained_out_of_memory(options):
        model = load_model(options.pretrained_model_name_or_path, dtype=dtype, device=device, vae=vae)
        names = [f"erasers-{number}" for number in range(1, len(options.erasers) + 1)]
        model.load_erasers(options.erasers, names, options.eraser_scales or None)
    return model


@contextmanager
def without_erasers(model: VideoModel) -> Iterator[None]:
    """The model as it was before any erasers, all its experts."""
    with ExitStack() as stack:
        for expert in model.experts:
            stack.enter_context(erasers_disabled(expert))
        yield
