"""Erasers on disk. Knows files and tensors, no models: `fastunlearn.erasers` checks what it reads against a model.

A folder holds `config.json` and the weights file that it names, `erasers-<hash>.safetensors` with
`{layer}.down.weight`, `{layer}.down.bias`, `{layer}.up.weight` and `{layer}.up.bias`. Replacing config.json is what
makes a save happen: until then the old one still names the old weights, so that a crash leaves one or the other.

The folders of T2VUnlearning's own scripts (`eraser_config.json`, `eraser_weights.pt`) are read too.
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

import torch
from torch import Tensor

from fastunlearn.files import replace_file

CONFIG = "config.json"
FORMAT, FORMAT_VERSION = "fastunlearn-erasers", 1
UPSTREAM_CONFIG, UPSTREAM_WEIGHTS = "eraser_config.json", "eraser_weights.pt"
PARAMETERS = ("down.weight", "down.bias", "up.weight", "up.bias")

States = Mapping[str, Mapping[str, Tensor]]


class StoredErasers(NamedTuple):
    """A folder's erasers: parameters by layer, on the CPU; `family` is None where the format does not say it."""

    states: dict[str, dict[str, Tensor]]
    rank: int
    family: str | None


def write(folder: str | os.PathLike[str], states: States, facts: Mapping[str, Any]) -> None:
    """Saves `states`, and `facts` as more entries of config.json. What was there before stays whole until the end."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    old = None
    if (folder / CONFIG).exists():
        # Not ours: a model's config.json, which must not be lost. Ours, damaged: may be replaced.
        old = _json(folder / CONFIG)
        if old.get("format") != FORMAT:
            raise FileExistsError(
                f"{folder / CONFIG} belongs to something else; save erasers into a folder of their own"
            )
    flat = {
        f"{layer}.{key}": tensor.detach().cpu().contiguous() for layer, s in states.items() for key, tensor in s.items()
    }
    weights = _safetensors().save(flat)
    digest = hashlib.sha256(weights).hexdigest()
    file = f"erasers-{digest[:12]}.safetensors"
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, **facts, "layers": list(states)}
    config |= {"weights": file, "sha256": digest}
    replace_file(folder / file, weights)
    replace_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    for stale in folder.iterdir():
        if re.fullmatch(r"erasers-[0-9a-f]{12}\.safetensors(\.partial)?", stale.name) and stale.name != file:
            stale.unlink()


def read(folder: str | os.PathLike[str]) -> StoredErasers:
    """Reads either layout.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or not what it should be.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file():
        return _read_own(folder)
    if (folder / UPSTREAM_CONFIG).is_file():
        return _read_upstream(folder)
    raise FileNotFoundError(f"{folder}: neither {CONFIG} nor {UPSTREAM_CONFIG} is there")


def _read_own(folder: Path) -> StoredErasers:
    path = folder / CONFIG
    config = _json(path)
    if config.get("format") != FORMAT:
        raise ValueError(f"{path}: not the configuration of saved erasers")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {config.get('format_version')!r}; "
            "a newer fastunlearn may read it"
        )
    layers, backbone = config.get("layers"), config.get("backbone")
    if not isinstance(layers, list) or not isinstance(backbone, str):
        raise ValueError(f"{path}: expected a list 'layers' and a string 'backbone'")
    file = _weights_path(folder, config)
    weights = _existing(file).read_bytes()
    if hashlib.sha256(weights).hexdigest() != config.get("sha256"):
        raise ValueError(f"{file}: does not have the checksum that {CONFIG} tells; it is incomplete or was changed")
    load = _safetensors().load
    try:
        flat = load(weights)
    except Exception as error:  # a checksum proves that the file is whole, not that its author meant well
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    states = {
        str(layer): {key: flat.pop(f"{layer}.{key}") for key in PARAMETERS if f"{layer}.{key}" in flat}
        for layer in layers
    }
    if flat:
        raise ValueError(f"{file}: tensors of no layer in {CONFIG}: {sorted(flat)}")
    return StoredErasers(states, _rank(path, config.get("rank")), backbone)


def _read_upstream(folder: Path) -> StoredErasers:
    path, file = folder / UPSTREAM_CONFIG, _existing(folder / UPSTREAM_WEIGHTS)
    config = _json(path)
    if config.get("eraser_type") != "adapter":
        raise ValueError(f"{path}: expected eraser_type 'adapter', got {config.get('eraser_type')!r}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{file}: not a readable file of weights alone ({type(error).__name__})") from error
    if not isinstance(content, dict) or not all(isinstance(state, Mapping) for state in content.values()):
        raise ValueError(f"{file}: expected a dict of state dicts by layer")
    states = {str(layer).removesuffix(".adapter"): dict(state) for layer, state in content.items()}
    return StoredErasers(states, _rank(path, config.get("eraser_rank")), None)


def _weights_path(folder: Path, config: Mapping[str, Any]) -> Path:
    name = config.get("weights")
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{folder / CONFIG}: 'weights' must name a .safetensors file of the same folder, got {name!r}")
    return folder / name


def _rank(path: Path, rank: object) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{path}: expected a positive integer as rank, got {rank!r}")
    return rank


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return path


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saved erasers need safetensors: pip install 'fastunlearn[train]'") from error
    return safetensors.torch
