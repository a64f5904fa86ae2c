"""The index file of a teacher cache: its format, its fingerprint, and how to read it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastunlearn.files import open_file, read_versioned_json, shown

INDEX, PROMPTS, MASKS = "index.json", "prompts.safetensors", "masks.png"
FORMAT, FORMAT_VERSION = "fastunlearn-teacher-cache", 1
# The dtypes that latents are stored in: the name in the index, and the name in a safetensors file.
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Every file of a cache. The suffix .partial marks a temporary file that an interrupted process left behind.
CACHE_FILE = re.compile(
    r"(index\.json|prompts\.safetensors|masks\.png|shard-\d{5,9}\.safetensors)(?P<partial>(\.\d+)?\.partial)?"
)
SHARD_FILE = re.compile(r"shard-\d{5,9}\.safetensors")


def cache_fingerprint(facts: Mapping[str, Any], conditions_sha256: str) -> str:
    """The SHA-256 of everything that determines the content of a cache."""
    content = json.dumps([facts, conditions_sha256], sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()


def sealed(index: Mapping[str, Any]) -> dict[str, Any]:
    """The index with a checksum of its own entries, so that a shard that was dropped from its list is noticed too."""
    entries = {key: value for key, value in index.items() if key != "sha256"}
    content = json.dumps(entries, sort_keys=True, allow_nan=False)
    return entries | {"sha256": hashlib.sha256(content.encode()).hexdigest()}


def file_entry(path: Path) -> dict[str, Any]:
    """The index entry of a file: its name, its size in bytes and its SHA-256."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def read_index(path: Path) -> dict[str, Any]:
    """Reads an index and checks that its facts match its fingerprint, and its entries the checksum that it states.

    Raises:
        ValueError: the file is damaged, is not the index of a cache, has another version, or was edited.
    """
    index = read_versioned_json(
        path, format=FORMAT, version=FORMAT_VERSION, what="the index of a teacher cache", allow_nan=False
    )
    for key in ("facts", "origin", "conditions"):
        if not isinstance(index.get(key), dict):
            raise ValueError(f"{path}: expected an object as {key!r}, got {shown(index.get(key))}")
    sha256 = index["conditions"].get("sha256")
    if not isinstance(sha256, str) or index.get("fingerprint") != cache_fingerprint(index["facts"], sha256):
        raise ValueError(
            f"{path}: expected a fingerprint that matches its facts, got {shown(index.get('fingerprint'))}; the file "
            "was edited or is damaged: delete it and run prepare again with the same arguments"
        )
    if "sha256" in index and index != sealed(index):  # those of earlier versions state none
        raise ValueError(
            f"{path}: expected entries that match its checksum, got others; the file was edited or is damaged: delete "
            "it and run prepare again with the same arguments"
        )
    return index
