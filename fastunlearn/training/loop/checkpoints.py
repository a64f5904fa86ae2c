"""Checkpoints of training: a folder `checkpoint-N` holds the state after N steps.

    erasers/            the erasers, written by `VideoModel.save_erasers`; they load like the trained erasers
    training_state.pt   the optimizers' states, and the loss scale if there is one
    checkpoint.json     the step, the run's settings, and the checksum of training_state.pt

The folder is written as `checkpoint-N.partial` and then renamed, and it is renamed again before it is deleted, so that
a checkpoint is complete or absent. Loading it cannot run code, because training_state.pt is loaded with
`weights_only=True`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastunlearn import eraser_files
from fastunlearn.files import (
    delete,
    expand_home,
    load_torch,
    read_file,
    read_versioned_json,
    remove_folder,
    replace_file,
    shown,
)
from fastunlearn.training.cache.changes import shown_apart

ERASERS, STATE, METADATA = "erasers", "training_state.pt", "checkpoint.json"
FORMAT, FORMAT_VERSION = "fastunlearn-checkpoint", 1


class Checkpoint(NamedTuple):
    """The content of a checkpoint, except for the erasers, which stay in the folder `erasers`."""

    path: Path
    step: int
    settings: dict[str, Any]
    state: dict[str, Any]

    @property
    def erasers(self) -> Path:
        """The folder of the erasers."""
        return self.path / ERASERS


def existing(folder: Path) -> list[Path]:
    """Returns the checkpoints in `folder`, in the order of their steps."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in entries if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def find(folder: Path, wanted: str) -> Path | None:
    """Returns the checkpoint that `resume_from_checkpoint` names; None if that is "latest" and there is none yet.

    "latest" skips checkpoints that lack a file, with a warning.

    Args:
        folder: the folder of the run.
        wanted: "latest", a path, or the name of a checkpoint in `folder`.

    Raises:
        FileNotFoundError: there is no such checkpoint, or "latest" finds none that is complete.
    """
    if wanted == "latest":
        return _latest(folder)
    for path in (expand_home(wanted), folder / wanted):
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"resume_from_checkpoint: expected latest, a path, or the name of a checkpoint in {folder}, got {shown(wanted)}"
    )


def _latest(folder: Path) -> Path | None:
    incomplete = []
    for path in reversed(existing(folder)):
        if missing := _missing(path):
            incomplete.append(f"{path.name} lacks {', '.join(missing)}")
            continue
        if incomplete:
            warnings.warn(
                f"resume_from_checkpoint: going on from {path}, because {'; '.join(incomplete)}", stacklevel=2
            )
        return path
    if incomplete:
        raise FileNotFoundError(
            f"resume_from_checkpoint: expected a complete checkpoint in {folder}, got none: {'; '.join(incomplete)}; "
            "delete them to start anew, or choose another output_dir"
        )
    return None


def _missing(path: Path) -> list[str]:
    """What a checkpoint's folder lacks. Damaged files are not missing."""
    missing = [name for name in (METADATA, STATE) if not (path / name).is_file()]
    erasers = path / ERASERS
    for folder in [entry for entry in erasers.glob("*") if entry.is_dir()] or [erasers]:
        try:
            eraser_files.read(folder)
        except FileNotFoundError:
            missing.append(folder.relative_to(path).as_posix())
        except ValueError:
            continue
    return missing


def write(
    folder: Path,
    step: int,
    save_erasers: Callable[[Path], None],
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    limit: int | None = None,
) -> Path:
    """Writes `checkpoint-{step}` into `folder`, and then removes the oldest checkpoints beyond `limit`.

    If the run was resumed from an earlier checkpoint, the folder may hold later ones. They do not count towards `limit`
    and stay until they are overwritten.

    Args:
        folder: the folder of the run.
        step: the number of steps done.
        save_erasers: writes the erasers into the folder that it is given.
        state: the optimizers' state: tensors, numbers and strings in dicts and lists.
        settings: the run's settings, which a resumed run must share; written as JSON.
        limit: the number of checkpoints to keep; None for all.

    Raises:
        OSError: it cannot be written. Existing checkpoints are untouched.
    """
    path = folder / f"checkpoint-{step}"
    partial = path.with_name(path.name + ".partial")
    replaced = path.with_name(path.name + ".replaced.partial")
    try:
        for stale in folder.glob("checkpoint-*.partial"):
            delete(stale)
        partial.mkdir()
        save_erasers(partial / ERASERS)
        _write_state(partial, step, state, settings)
        if os.path.lexists(path):  # by a run that was later resumed from an earlier checkpoint
            path.rename(replaced)
        partial.rename(path)
        _sync(folder)
    except OSError as error:
        with suppress(OSError):
            delete(partial)
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{path} cannot be written ({reason}); earlier checkpoints are untouched") from error
    with suppress(OSError):
        delete(replaced)
    if limit is not None:
        for oldest in [path for path in existing(folder) if _step(path) <= step][:-limit]:
            remove_folder(oldest)
    return path


def _write_state(folder: Path, step: int, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    # Serialised in memory, because torch.save into a file reports a full disk as a damaged archive.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    replace_file(folder / STATE, content)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "settings": settings,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    replace_file(folder / METADATA, (json.dumps(metadata, indent=2) + "\n").encode())


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint and checks that it is complete, except for the erasers, which `load_erasers` checks.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: the checkpoint is damaged, or of another format or version.
    """
    try:
        metadata = read_versioned_json(
            path / METADATA, format=FORMAT, version=FORMAT_VERSION, what="the metadata of a checkpoint"
        )
        content = read_file(path / STATE)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"checkpoint {path} is incomplete: {Path(error.filename).name} is missing") from None
    except ValueError as error:
        raise ValueError(f"checkpoint {path} is damaged or of another version: {error}") from error
    if hashlib.sha256(content).hexdigest() != metadata.get("sha256"):
        raise ValueError(f"checkpoint {path} is damaged: {STATE} does not have the checksum that {METADATA} records")
    step, settings = metadata.get("step"), metadata.get("settings")
    if type(step) is not int or step < 0 or not isinstance(settings, dict):
        raise ValueError(
            f"{path / METADATA}: expected a number of steps as 'step' and an object as 'settings', "
            f"got {shown(step)} and {shown(settings)}"
        )
    state = load_torch(path / STATE, content)  # a matching checksum does not rule out a malicious file
    if not isinstance(state, dict):
        raise ValueError(f"{path / STATE}: expected a dict, got {type(state).__name__}")
    return Checkpoint(path, step, settings, state)


def check_same_run(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Raises ValueError, with a list of the differences, unless the checkpoint was made with the same settings."""
    before = checkpoint.settings
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        pairs = [(name, *shown_apart(before.get(name), settings.get(name))) for name in names]
        differences = "; ".join(f"{name} was {was} and is {now}" for name, was, now in pairs)
        raise ValueError(
            f"{checkpoint.path} belongs to another run: {differences}. Give the former values, or choose another "
            "output_dir"
        )


def _sync(folder: Path) -> None:
    """Makes sure that a renamed entry of `folder` is on the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
