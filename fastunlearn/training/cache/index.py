"""The index of a teacher cache, and the rules that its writer and its reader share."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

INDEX, PROMPTS = "index.json", "prompts.safetensors"
FORMAT, FORMAT_VERSION = "fastunlearn-teacher-cache", 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OWN_FILE = re.compile(r"(index\.json|prompts\.safetensors|shard-\d{5,9}\.safetensors)(?P<partial>\.\d+\.partial)?")
SHARD = re.compile(r"shard-\d{5,9}\.safetensors")
_SHOWN = 80  # characters of a value that an error shows


def fingerprint_of(facts: Mapping[str, Any], conditions_sha256: str) -> str:
    """The checksum of what determines a cache's content."""
    content = json.dumps([facts, conditions_sha256], sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """What the index says of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def shown(value: Any) -> str:
    """A value for an error message, cut short."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def read_index(path: Path) -> dict[str, Any]:
    """The index as it was written.

    Raises:
        ValueError: it is damaged, not a cache's index, of another version, or its facts are not those of its
            fingerprint.
    """
    try:
        index = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path}: not the index of a teacher cache")
    if index.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {shown(index.get('format_version'))}; "
            "a newer fastunlearn may read it"
        )
    for name in ("facts", "origin", "conditions"):
        if not isinstance(index.get(name), dict):
            raise ValueError(f"{path}: expected an object as {name!r}, got {shown(index.get(name))}")
    sha256 = index["conditions"].get("sha256")
    if not isinstance(sha256, str) or index.get("fingerprint") != fingerprint_of(index["facts"], sha256):
        raise ValueError(f"{path}: its facts do not have its fingerprint; it was changed by hand or is damaged")
    return index


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def is_number(value: Any) -> bool:
    """Whether it is a finite number, as JSON gives them."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_size(value: Any) -> bool:
    """Whether it is a positive integer that a tensor can have as a size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def is_texts(value: Any) -> bool:
    """Whether it is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_objects(value: Any) -> bool:
    """Whether it is a list of JSON objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
