"""One shard of a teacher cache: a safetensors file with a label that says what it belongs to.

The label tells a resumed run whether a shard is its own, belongs to another run or other arguments, or is damaged, even
before an index lists it. It is JSON under a single key of the file's metadata: safetensors writes several keys in
random order, but the same content has to give the same bytes.
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

from fastunlearn.files import open_safetensors, shown, tensor_names
from fastunlearn.training.cache.index import SAFETENSORS_DTYPES

_METADATA_KEY = "fastunlearn-teacher-cache"


class Label(NamedTuple):
    """What a shard belongs to: the fingerprint of its cache, its unit of work, and the group of its points."""

    fingerprint: str
    unit: int
    group: str


def file_name(unit: int) -> str:
    """The name of the shard that a unit of work writes."""
    return f"shard-{unit:05d}.safetensors"


def serialize(tensors: Mapping[str, Tensor], label: Label) -> bytes:
    """The content of a shard's file. Equal arguments give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(tensors, metadata=_metadata(label, digest(tensors)))


def _metadata(label: Label, digest: str) -> dict[str, str]:
    return {_METADATA_KEY: json.dumps(label._asdict() | {"digest": digest}, sort_keys=True)}


def read_label(path: Path, file: Any) -> tuple[Label, str]:
    """The label of an open shard, and the digest of its tensors.

    Raises:
        ValueError: the file has no label.
    """
    try:
        content = json.loads(file.metadata()[_METADATA_KEY])
        label = Label(*(content[name] for name in Label._fields))
        expected = content["digest"]
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a shard of a teacher cache, got a file without a shard's label") from error
    return label, expected


def summary(path: Path) -> dict[str, Any]:
    """What the index says of the points in a shard that was checked: how many there are, and their `steps_digest`."""
    with open_safetensors(path) as file:
        t, prompt = file.get_tensor("t"), file.get_tensor("prompt")
        return {"points": len(t), "steps_sha256": steps_digest(t, prompt)}


def steps_digest(t: Tensor, prompt: Tensor) -> str:
    """The digest of what is read of a shard when its cache is opened: each point's timestep and index of its prompt."""
    return digest({"t": t, "prompt": prompt})


def check_tensors(path: Path, file: Any, points: Any, facts: Mapping[str, Any]) -> bool:
    """Checks the names, dtypes and shapes of an open shard's tensors, by its header. Returns whether it has masks.

    Args:
        path: the file, for the message.
        file: the open file.
        points: the number of points that it should have.
        facts: those of the cache: `latent_shape`, `token_grid` and `dtype` are used.

    Raises:
        ValueError: a tensor is missing, or does not fit.
    """
    slices = {name: file.get_slice(name) for name in tensor_names(file)}
    got = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
    latents = (SAFETENSORS_DTYPES[facts["dtype"]], (points, *facts["latent_shape"]))
    expected: dict[str, Any] = {"x_t": latents, "v_uncond": latents, "v_cond": latents}
    expected |= {"t": ("F32", (points,)), "prompt": ("I32", (points,))}
    if "mask" in got:
        expected["mask"] = ("BOOL", (points, *facts["token_grid"]))
    if got != expected:
        raise ValueError(f"{path}: expected {shown(points)} points with {shown(expected, 400)}, got {shown(got, 400)}")
    return "mask" in got


def check_shard(path: Path, label: Label, facts: Mapping[str, Any]) -> None:
    """Reads the whole shard and checks its label and its tensors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or has another label.
    """
    with open_safetensors(path) as file:
        actual, expected = read_label(path, file)
        _check_label(path, label, actual)
        is_there = "t" in tensor_names(file) and len(file.get_slice("t").get_shape()) == 1
        check_tensors(path, file, file.get_slice("t").get_shape()[0] if is_there else None, facts)
        # The file is memory-mapped, so its tensors take page cache and no memory of the process.
        if digest({name: file.get_tensor(name) for name in tensor_names(file)}) != expected:
            raise ValueError(
                f"{path}: expected tensors that match its digest, got others; the file is damaged or was changed"
            )
        if file.metadata() != _metadata(label, expected):  # true equals 1, and further entries are no label's
            raise ValueError(f"{path}: expected the label that prepare writes, got another; the file was changed")


def _check_label(path: Path, expected: Label, actual: Label) -> None:
    for name, wanted, got in zip(Label._fields, expected, actual, strict=True):
        if got != wanted:
            raise ValueError(
                f"{path}: expected a shard of this run, got one of another run or of other arguments "
                f"({name} is {got}, not {wanted})"
            )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
