"""The files of saved erasers. This module knows files and tensors; `fastunlearn.erasers.saved` compares with a model.

A folder holds `config.json` and the weights file that it names, `erasers-<hash>.safetensors`, with the tensors
`{layer}.down.weight`, `{layer}.down.bias`, `{layer}.up.weight` and `{layer}.up.bias`. A save takes effect when
config.json is replaced: until then the old one still names the old weights, so a crash leaves the old erasers or the
new ones, complete.

The folders of T2VUnlearning's own scripts (`eraser_config.json`, `eraser_weights.pt`) can be read too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from fastunlearn.files import (
    expand_home,
    load_torch,
    one_line,
    read_file,
    read_json,
    read_versioned_json,
    replace_file,
    shown,
    subfolder,
)

CONFIG = "config.json"
FORMAT, FORMAT_VERSION = "fastunlearn-erasers", 1
UPSTREAM_CONFIG, UPSTREAM_WEIGHTS = "eraser_config.json", "eraser_weights.pt"
PARAMETERS = ("down.weight", "down.bias", "up.weight", "up.bias")

States = Mapping[str, Mapping[str, Tensor]]


class StoredErasers(NamedTuple):
    """The erasers in a folder.

    Attributes:
        states: the parameters by layer, then by name, on the CPU.
        rank: the rank that the configuration states.
        family: the name of the model family; None if the format does not record it.
    """

    states: dict[str, dict[str, Tensor]]
    rank: int
    family: str | None


def write(folder: str | os.PathLike[str], part: str, states: States, entries: Mapping[str, Any]) -> None:
    """Saves erasers; what the folder held before stays complete until the save takes effect.

    Args:
        folder: where to save them; created if it does not exist.
        part: the folder in it for the erasers of one of several transformers; "" for `folder` itself.
        states: the parameters by layer, then by name.
        entries: more entries for config.json.

    Raises:
        FileExistsError: the folder holds a config.json that is not of erasers, or a symbolic link called `part`.
        ImportError: safetensors is not installed.
    """
    folder = expand_home(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if part:
        folder = subfolder(folder, part)
    path = folder / CONFIG
    # A model's config.json must not be lost. One of our own may be replaced.
    if path.exists() and read_json(path).get("format") != FORMAT:
        raise FileExistsError(
            f"{path}: expected the configuration of saved erasers, got another file; "
            "save erasers into a folder of their own"
        )
    tensors = {
        f"{layer}.{key}": tensor.detach().cpu().contiguous()
        for layer, state in states.items()
        for key, tensor in state.items()
    }
    weights = _safetensors().save(tensors)
    digest = hashlib.sha256(weights).hexdigest()
    weights_name = f"erasers-{digest[:12]}.safetensors"
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, **entries, "layers": list(states)}
    config |= {"weights": weights_name, "sha256": digest}
    replace_file(folder / weights_name, weights)
    replace_file(path, (json.dumps(config, indent=2) + "\n").encode())
    for file in folder.iterdir():
        is_weights = re.fullmatch(r"erasers-[0-9a-f]{12}\.safetensors(\.partial)?", file.name)
        if is_weights and file.name != weights_name:
            file.unlink()


def read(folder: str | os.PathLike[str]) -> StoredErasers:
    """Reads a folder of either format.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or is not what it should be.
        ImportError: safetensors is needed and not installed.
    """
    folder = expand_home(folder)
    if (folder / CONFIG).exists():
        return _read_own(folder)
    if (folder / UPSTREAM_CONFIG).exists():
        return _read_upstream(folder)
    raise FileNotFoundError(f"{folder}: expected {CONFIG} or {UPSTREAM_CONFIG} in this folder, found neither")


def _read_own(folder: Path) -> StoredErasers:
    path = folder / CONFIG
    config = read_versioned_json(path, format=FORMAT, version=FORMAT_VERSION, what="the configuration of saved erasers")
    layers, family = config.get("layers"), config.get("backbone")
    if not isinstance(layers, list) or not isinstance(family, str):
        raise ValueError(
            f"{path}: expected a list 'layers' and a string 'backbone', got {shown(layers)} and {shown(family)}"
        )
    weights_path = _weights_path(folder, config)
    weights = _content(weights_path)
    if hashlib.sha256(weights).hexdigest() != config.get("sha256"):
        raise ValueError(
            f"{weights_path}: expected the checksum that {CONFIG} states, got another; "
            "the file is incomplete or was changed"
        )
    load = _safetensors().load
    try:
        tensors = load(weights)
    except Exception as error:  # the checksum proves that the file is complete, not that it is valid
        raise ValueError(
            f"{weights_path}: expected a safetensors file, got one that cannot be read ({one_line(error, 200)})"
        ) from error
    states = {
        str(layer): {key: tensors.pop(f"{layer}.{key}") for key in PARAMETERS if f"{layer}.{key}" in tensors}
        for layer in layers
    }
    if tensors:
        raise ValueError(
            f"{weights_path}: expected tensors of the layers in {CONFIG}, got others too: {shown(sorted(tensors))}"
        )
    return StoredErasers(states, _rank(path, config.get("rank")), family)


def _read_upstream(folder: Path) -> StoredErasers:
    path, weights_path = folder / UPSTREAM_CONFIG, folder / UPSTREAM_WEIGHTS
    config = read_json(path)
    if config.get("eraser_type") != "adapter":
        raise ValueError(f"{path}: expected eraser_type 'adapter', got {shown(config.get('eraser_type'))}")
    content = load_torch(weights_path, _content(weights_path))
    if not isinstance(content, dict) or not all(isinstance(state, Mapping) for state in content.values()):
        raise ValueError(f"{weights_path}: expected a dict of state dicts by layer, got {type(content).__name__}")
    states = {str(layer).removesuffix(".adapter"): dict(state) for layer, state in content.items()}
    return StoredErasers(states, _rank(path, config.get("eraser_rank")), None)


def _weights_path(folder: Path, config: Mapping[str, Any]) -> Path:
    name = config.get("weights")
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(
            f"{folder / CONFIG}: expected 'weights' to name a .safetensors file in the same folder, got {shown(name)}"
        )
    return folder / name


def _rank(path: Path, rank: object) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{path}: expected a positive integer as rank, got {shown(rank)}")
    return rank


def _content(path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    return read_file(path)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saved erasers need safetensors: pip install 'fastunlearn[train]'") from error
    return safetensors.torch
