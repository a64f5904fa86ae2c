"""Saved erasers on a saved model: what evaluation and sampling begin with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastunlearn.eraser_files import CONFIG, UPSTREAM_CONFIG
from fastunlearn.erasers import erasers_disabled
from fastunlearn.training.video_model import VideoModel


def check_folders(folders: Sequence[Path]) -> None:
    """Raises FileNotFoundError for a folder without erasers: now, rather than after a large model is loaded."""
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"erasers: no folder {folder}")
        places = [folder / name for name in (CONFIG, UPSTREAM_CONFIG, f"transformer/{CONFIG}")]
        if not any(place.is_file() for place in places):
            raise FileNotFoundError(f"erasers: {folder} holds none; expected {CONFIG} in it, as train writes it")


def load_onto(model: VideoModel, folders: Sequence[Path], scales: Sequence[float] = ()) -> None:
    """Attaches the erasers of all folders, whatever these are called.

    Args:
        model: the model.
        folders: what train, or `fastunlearn.save_erasers`, wrote.
        scales: one a folder; none for 1 each.

    Raises:
        FileNotFoundError: a folder holds no erasers.
        ValueError: erasers are damaged, or of another model; or scales and folders differ in number.
    """
    names = [f"erasers-{number}" for number in range(1, len(folders) + 1)]
    model.load_erasers(folders, names, scales or None)


@contextmanager
def without_erasers(model: VideoModel) -> Iterator[None]:
    """The model as it was before any erasers, all its experts."""
    with ExitStack() as stack:
        for expert in model.experts:
            stack.enter_context(erasers_disabled(expert))
        yield
