"""Checkpoints of training: folders `checkpoint-N` after N steps.

A folder holds

    erasers/            as `VideoModel.save_erasers` writes them: they can be loaded as a result can
    training_state.pt   the optimizers' states, and the loss scale where there is one
    checkpoint.json     the step, what the run depends on, and the checksum of training_state.pt

It is written under the name `checkpoint-N.partial` and renamed, so that a checkpoint is whole or not there. Nothing in
it can run code: training_state.pt is loaded with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastunlearn.files import replace_file

ERASERS, STATE, FACTS = "erasers", "training_state.pt", "checkpoint.json"
FORMAT, FORMAT_VERSION = "fastunlearn-checkpoint", 1


class Checkpoint(NamedTuple):
    """What a checkpoint holds, but for the erasers, which are in the folder `erasers`."""

    path: Path
    step: int
    settings: dict[str, Any]
    state: dict[str, Any]

    @property
    def erasers(self) -> Path:
        """Where the erasers are."""
        return self.path / ERASERS


def existing(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, in the order of their steps."""
    found = folder.iterdir() if folder.is_dir() else ()
    numbered = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in found}
    whole = (path for path, name in numbered.items() if name and path.is_dir())
    return sorted(whole, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def find(folder: Path, wanted: str) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means; None if it is "latest" and there is none yet.

    Args:
        folder: the run's.
        wanted: "latest", a path, or the name of a checkpoint in `folder`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    if wanted == "latest":
        return next(reversed(existing(folder)), None)
    for path in (Path(wanted), folder / wanted):
        if path.is_dir():
            return path
    raise FileNotFoundError(f"resume_from_checkpoint: there is no checkpoint {wanted}, nor in {folder}")


def write(
    folder: Path,
    step: int,
    save_erasers: Callable[[Path], None],
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    limit: int | None = None,
) -> Path:
    """Writes `checkpoint-{step}` into `folder`; only then removes the oldest ones beyond `limit`.

    Of a run that went back to an earlier checkpoint the later ones stay until they are written again, and do not count.

    Args:
        folder: the run's.
        step: how many steps were done.
        save_erasers: writes the erasers into the folder that it is given.
        state: of the optimizers: tensors, numbers and strings in dicts and lists.
        settings: what the run depends on, for JSON.
        limit: how many checkpoints to keep; None for all.

    Raises:
        OSError: it cannot be written. What was there before still is.
    """
    path = folder / f"checkpoint-{step}"
    partial = path.with_name(path.name + ".partial")
    for stale in folder.glob("checkpoint-*.partial"):
        shutil.rmtree(stale)
    try:
        partial.mkdir()
        save_erasers(partial / ERASERS)
        # In memory first: torch.save itself tells a full disk from a damaged archive badly.
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
        replace_file(partial / STATE, content)
        facts = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": step,
            "settings": settings,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        replace_file(partial / FACTS, (json.dumps(facts, indent=2) + "\n").encode())
        if path.exists():  # of a run that went on from an earlier checkpoint: the same again
            path.rename(path.with_name(path.name + ".replaced.partial"))
        partial.rename(path)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{path} cannot be written ({reason}); earlier checkpoints are untouched") from error
    shutil.rmtree(path.with_name(path.name + ".replaced.partial"), ignore_errors=True)
    if limit is not None:
        for oldest in [path for path in existing(folder) if _step(path) <= step][:-limit]:
            shutil.rmtree(oldest)
    return path


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint and checks that it is whole, erasers excepted, whose own reader does.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: it is damaged, or not what it should be.
    """
    try:
        facts = json.loads((path / FACTS).read_bytes())
        content = (path / STATE).read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"checkpoint {path} is incomplete: {Path(error.filename).name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {FACTS} is no JSON ({error})") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"{path / FACTS}: not that of a checkpoint")
    if facts.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path / FACTS}: expected format_version {FORMAT_VERSION}, got {facts.get('format_version')!r}; "
            "a newer fastunlearn may read it"
        )
    if hashlib.sha256(content).hexdigest() != facts.get("sha256"):
        raise ValueError(f"checkpoint {path} is damaged: {STATE} does not have the checksum that {FACTS} tells")
    step, settings = facts.get("step"), facts.get("settings")
    if not isinstance(step, int) or step < 0 or not isinstance(settings, dict):
        raise ValueError(f"{path / FACTS}: expected a number of steps as 'step' and an object as 'settings'")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a checksum proves that the file is whole, not that its author meant well
        raise ValueError(f"{path / STATE}: not a readable file of tensors alone ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path / STATE}: expected a dict, got {type(state).__name__}")
    return Checkpoint(path, step, settings, state)


def check_same_run(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Raises ValueError, which lists what differs, unless the checkpoint was made with the same settings."""
    then = checkpoint.settings
    names = [name for name in {**then, **settings} if then.get(name) != settings.get(name)]
    if names:
        changes = "; ".join(f"{name} was {then.get(name)!r} and is {settings.get(name)!r}" for name in names)
        raise ValueError(
            f"{checkpoint.path} belongs to another run: {changes}. Give what it was, or begin in another output_dir"
        )


def _sync(folder: Path) -> None:
    """Makes sure that a renaming is on the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
