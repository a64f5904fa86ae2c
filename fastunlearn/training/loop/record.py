"""The record beside trained erasers: what they were trained from, so that an evaluation can tell what is held out."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastunlearn.files import read_versioned_json, shown, write_json
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.cache.validation import is_list_of_strings
from fastunlearn.training.model.erased import erasers_digest

RECORD = "training.json"
FORMAT, FORMAT_VERSION = "fastunlearn-training-record", 1


class TrainingRecord(NamedTuple):
    """What erasers were trained from.

    settings: the settings of the run, as in a checkpoint. seed: that of the cache, if known. prompts: the
    `prompt_digest` of every prompt that the points of the cache have.
    """

    settings: dict[str, Any]
    seed: int | None
    prompts: frozenset[str]


def prompt_digest(prompt: str) -> str:
    """A digest that is the same for prompts that differ in white space or capitals only."""
    return hashlib.sha256(" ".join(prompt.split()).casefold().encode()).hexdigest()


def write(folder: Path, settings: Mapping[str, Any], cache: TeacherCache) -> None:
    """Writes the record of the erasers in `folder`. It holds digests of the prompts, not their text."""
    prompts = {prompt_digest(prompt) for prompt in cache.point_prompts()}
    write_json(
        folder / RECORD,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "erasers_sha256": erasers_digest(folder),
            "settings": dict(settings),
            "cache": {"seed": cache.facts.get("seed"), "prompts_sha256": sorted(prompts)},
        },
    )


def read(folder: Path) -> TrainingRecord | None:
    """Reads the record of the erasers in `folder`; None if there is none, or, after a warning, if it is of others.

    Raises:
        ValueError: the record or the erasers are damaged.
        FileNotFoundError: a file of the erasers is missing.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    content = read_versioned_json(path, format=FORMAT, version=FORMAT_VERSION, what="the record of trained erasers")
    settings, cache = content.get("settings"), content.get("cache")
    prompts = cache.get("prompts_sha256") if isinstance(cache, dict) else None
    if not isinstance(settings, dict) or not isinstance(cache, dict) or not is_list_of_strings(prompts):
        raise ValueError(f"{path}: expected settings and a cache, got others; the file is damaged: delete it")
    if content.get("erasers_sha256") != erasers_digest(folder):
        warnings.warn(
            f"{folder}: expected the erasers that {RECORD} describes, got others: a save was interrupted, or files "
            "were replaced; if there are two transformers, their erasers may not belong together",
            stacklevel=3,
        )
        return None
    return TrainingRecord(settings, cache.get("seed"), frozenset(prompts or ()))


def not_held_out(record: TrainingRecord, prompts: Iterable[str], seed: Any) -> str | None:
    """What of an evaluation's prompts and seed the erasers were trained with, in words; None if nothing."""
    distinct = list(dict.fromkeys(prompts))
    trained = [prompt for prompt in distinct if prompt_digest(prompt) in record.prompts]
    found = [f"{len(trained)} of {len(distinct)} prompts (such as {shown(trained[0])})"] if trained else []
    if seed is not None and seed == record.seed:
        found.append(f"the seed {seed}")
    return " and ".join(found) or None
