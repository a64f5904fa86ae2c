"""One shard of a teacher cache: a safetensors file that says itself what it belongs to.

The label lets a resumed run tell a shard of its own from one of another run, of other arguments, or a damaged one,
before any index lists it. It is JSON under a single key of the file's metadata: several keys would be written in random
order, and the same content has to give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from fastunlearn.files import open_safetensors, tensor_names

_KEY = "fastunlearn-teacher-cache"


class Label(NamedTuple):
    """What a shard belongs to: the cache's fingerprint, the unit of work that made it, the group of its points."""

    fingerprint: str
    unit: int
    group: str


def file_name(unit: int) -> str:
    """The name of a unit's shard."""
    return f"shard-{unit:05d}.safetensors"


def serialize(tensors: Mapping[str, Tensor], label: Label) -> bytes:
    """The file's content; equal arguments give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(label._asdict() | {"digest": _digest(tensors)}, sort_keys=True)
    return safetensors.torch.save(tensors, metadata={_KEY: text})


def read_label(path: Path, file: Any) -> tuple[Label, str]:
    """The label of an opened shard, and the digest of its tensors.

    Raises:
        ValueError: the file has no label.
    """
    try:
        content = json.loads(file.metadata()[_KEY])
        label = Label(*(content[name] for name in Label._fields))
        digest = content["digest"]
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a shard of a teacher cache") from error
    return label, digest


def points(path: Path, label: Label) -> int:
    """The number of points in a shard with this label; reads the header alone.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or labelled otherwise.
    """
    with open_safetensors(path) as file:
        _check_label(path, label, read_label(path, file)[0])
        return file.get_slice("t").get_shape()[0]


def check(path: Path, label: Label) -> None:
    """Reads a whole shard.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or labelled otherwise.
    """
    with open_safetensors(path) as file:
        found, digest = read_label(path, file)
        _check_label(path, label, found)
        # A tensor at a time is in memory, and of a memory-mapped file that is the page cache's.
        if _digest({name: file.get_tensor(name) for name in tensor_names(file)}) != digest:
            raise ValueError(f"{path}: does not have the digest that it tells; it is damaged or was changed")


def _check_label(path: Path, expected: Label, found: Label) -> None:
    for name, right, got in zip(Label._fields, expected, found, strict=True):
        if got != right:
            raise ValueError(f"{path}: a shard of another run or of other arguments ({name} is {got}, not {right})")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
