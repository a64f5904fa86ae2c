"""Erasers of a model to a folder and back, checked against the model before anything is attached."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastunlearn import eraser_files
from fastunlearn.environment import installed_version
from fastunlearn.erasers.adapter import AdapterEraser
from fastunlearn.erasers.attached import (
    check_new_name,
    check_scale,
    install_erasers,
    no_such_erasers,
)
from fastunlearn.erasers.parts import Model, Part, parts_of
from fastunlearn.families import EXPERTS, Family, attentions, hidden_size
from fastunlearn.files import expand_home, one_line, shown
from fastunlearn.offloading import loaded_parameters

Folder = str | os.PathLike[str]


def save_erasers(model: Model, folder: Folder, name: str = "default", concept: str | None = None) -> None:
    """Saves the erasers called `name` as a config.json and a safetensors file.

    A crash while saving leaves what the folder held before. Erasers that were saved there earlier are replaced. If a
    pipeline has two transformers, the erasers of each go into a folder of its name inside, `transformer` and
    `transformer_2`. The parameters of an offloaded model are fetched from where they are.

    Args:
        model: the model that the erasers are attached to, or its pipeline.
        folder: where to save them; created if it does not exist.
        name: which erasers to save. The name is not stored, so they can be loaded under another one.
        concept: what they erase, stored for the record.

    Raises:
        TypeError: the model is of no supported family, or `concept` is not a string.
        ValueError: no erasers are called `name`, only one of a pipeline's two transformers has them, or their
            parameters are not what `load_erasers` can read: other names or shapes, quantised, sharded, not loaded,
            rounded to a narrow dtype, or not finite. Nothing is written.
        FileExistsError: the folder holds a config.json that is not of erasers, or a link called like a transformer.
        ImportError: safetensors is not installed.
    """
    for prefix, states, entries in collect_erasers(model, name, concept):
        eraser_files.write(folder, prefix, states, entries)


def collect_erasers(
    model: Model, name: str, concept: str | None
) -> Sequence[tuple[str, eraser_files.States, dict[str, Any]]]:
    """What `save_erasers` writes, checked: for each transformer its folder, and what `eraser_files.write` takes.

    Raises what `save_erasers` does.
    """
    if concept is not None and not isinstance(concept, str):
        raise TypeError(f"concept: expected a string or None, got {type(concept).__name__}")
    contents = []
    parts = parts_of(model)
    sets = [part.erasers(name) for part in parts]
    if not any(sets):
        raise no_such_erasers(name)
    for part, erasers in zip(parts, sets, strict=True):
        if not erasers:
            raise ValueError(
                f"model: expected erasers called {name!r} on both transformers of the pipeline, got none on "
                f"{part.prefix}; give save_erasers the transformer that has them"
            )
        states = _loaded_states(part.transformer, erasers, name)
        rank, dim = next(iter(states.values())).get("down.bias", torch.empty(0)).numel(), hidden_size(part.transformer)
        for layer, state in states.items():
            _check_shapes(layer, state, dim, rank)
            _check_saveable(layer, state)
            _check_finite(layer, state)
        config = {
            "backbone": part.family.name,
            "concept": concept,
            "rank": rank,
            "dim": dim,
            "versions": {package: installed_version(package) for package in ("fastunlearn", "torch", "diffusers")},
        }
        contents.append((part.prefix, states, config))
    return contents


def _loaded_states(
    transformer: nn.Module, erasers: Mapping[str, AdapterEraser], name: str
) -> dict[str, dict[str, Tensor]]:
    """The parameters of erasers by layer, then by name, wherever they are."""
    # Not state_dict(), which would shard again what FSDP2 has gathered.
    states: dict[str, dict[str, Tensor]] = {layer: dict(e.named_parameters()) for layer, e in erasers.items()}
    places = {f"{layer}.erasers.{name}.{key}": (layer, key) for layer, state in states.items() for key in state}
    for full_name, parameter in loaded_parameters(transformer, places.__contains__):
        layer, key = places[full_name]
        states[layer][key] = parameter
    return states


@overload
def load_erasers(model: Model, folder: Folder, name: str = ..., *, scale: float = ...) -> dict[str, AdapterEraser]: ...


@overload
def load_erasers(
    model: Model, folder: Sequence[Folder], *, names: Sequence[str], scales: Sequence[float] | None = ...
) -> dict[str, dict[str, AdapterEraser]]: ...


def load_erasers(
    model: Model,
    folder: Folder | Sequence[Folder],
    name: str | None = None,
    *,
    scale: float | None = None,
    names: Sequence[str] | None = None,
    scales: Sequence[float] | None = None,
) -> dict[str, AdapterEraser] | dict[str, dict[str, AdapterEraser]]:
    """Attaches saved erasers and freezes everything else, like `attach_erasers`.

        load_erasers(model, "erasers/car")
        load_erasers(model, ["erasers/nudity", "erasers/car"], names=["nudity", "car"], scales=[1.0, 0.5])

    Reads the folders that `save_erasers` writes and those of T2VUnlearning's scripts (`eraser_weights.pt`,
    `eraser_config.json`; for HunyuanVideo, erasers on its single blocks only are accepted too). Pickles are loaded with
    `weights_only=True`. The model is left as it was unless everything fits.

    Args:
        model: a supported transformer, a VelocityModel or other wrapper of one, or a diffusers pipeline.
        folder: the folder of one set of saved erasers, or a sequence of folders to attach together.
        name: what to call the erasers of a single folder; "default" if not given.
        scale: the scale of the erasers of a single folder, see `set_eraser_scale`; 1 if not given.
        names: what to call the erasers of several folders, one name per folder.
        scales: the scales of the erasers of several folders, one per folder; all 1 if not given.

    Returns:
        For one folder, the erasers by layer, as from `attach_erasers`. For several, the erasers by name, then by layer.

    Raises:
        TypeError: the model is of no supported family, `name` or `scale` came with several folders, `names` or `scales`
            came with one, or a scale is not a number.
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the erasers are not for this model, a name is taken or repeated, a scale is not
            finite, or the number of names or scales is not that of the folders.
        ImportError: safetensors is not installed.
    """
    is_single = isinstance(folder, (str, os.PathLike))
    for argument, value, is_allowed in (
        ("name", name, is_single),
        ("scale", scale, is_single),
        ("names", names, not is_single),
        ("scales", scales, not is_single),
    ):
        if value is not None and not is_allowed:
            folders_given = "one folder" if is_single else "several folders"
            raise TypeError(f"{argument}: expected None with {folders_given}, got {value!r}")
    if isinstance(folder, (str, os.PathLike)):
        name = "default" if name is None else name
        return _load(model, {name: folder}, {name: 1.0 if scale is None else scale})[name]
    folders = list(folder)
    if names is None or isinstance(names, str) or len(names) != len(folders) or len(set(names)) != len(names):
        raise ValueError(f"names: expected a name of its own for each of {len(folders)} folders, got {names!r}")
    if scales is not None and len(scales) != len(folders):
        raise ValueError(f"scales: expected a number for each of {len(folders)} folders, got {scales!r}")
    scales = [1.0] * len(folders) if scales is None else scales
    return _load(model, dict(zip(names, folders, strict=True)), dict(zip(names, scales, strict=True)))


def _load(
    model: Model, folders: Mapping[str, Folder], scales: Mapping[str, float]
) -> dict[str, dict[str, AdapterEraser]]:
    """Reads and checks everything before it attaches anything."""
    parts = parts_of(model)
    for name, scale in scales.items():
        check_new_name(parts, name)
        check_scale(scale)
    for folder in folders.values():
        _check_layout(expand_home(folder), parts)
    sets = [
        (
            part,
            {
                name: _read(part.transformer, part.family, Path(folder) / part.prefix)
                for name, folder in folders.items()
            },
        )
        for part in parts
    ]
    if folders:
        install_erasers(model, sets, scales)
    return {
        name: {layer: eraser for part, by_name in sets for layer, eraser in part.in_model(by_name[name]).items()}
        for name in folders
    }


def _check_layout(folder: Path, parts: Sequence[Part]) -> None:
    """Raises if `folder` holds erasers for one transformer and the model has two, or the reverse."""
    has_one, has_two = (
        any((place / config).is_file() for config in (eraser_files.CONFIG, eraser_files.UPSTREAM_CONFIG))
        for place in (folder, folder / EXPERTS[0])
    )
    if len(parts) > 1 and has_one and not has_two:
        raise ValueError(
            f"{folder}: expected folders {' and '.join(EXPERTS)} with erasers for each of the pipeline's transformers, "
            "got erasers for one transformer; give load_erasers the transformer that they are for"
        )
    if len(parts) == 1 and has_two and not has_one:
        raise ValueError(
            f"{folder}: expected erasers for one transformer, got folders {' and '.join(EXPERTS)} for two; give "
            "load_erasers the pipeline, or one of the two folders"
        )


def _read(transformer: nn.Module, family: Family, folder: Folder) -> dict[str, AdapterEraser]:
    """The erasers in a folder by layer, in the order of the model's layers."""
    stored = eraser_files.read(folder)
    if stored.family not in (None, family.name):
        raise ValueError(f"{folder}: expected erasers for {family.name}, got erasers for {one_line(stored.family, 80)}")
    # A block list must have erasers on all of its blocks, but not every list needs erasers: T2VUnlearning puts erasers
    # on HunyuanVideo's single blocks only.
    block_lists = {layer.partition(".")[0] for layer in stored.states}
    places = tuple(place for place in family.erased if place[0] in block_lists) or family.erased
    layers = attentions(transformer, places)
    if stored.states.keys() != layers.keys():
        missing, unknown = sorted(layers.keys() - stored.states.keys()), sorted(stored.states.keys() - layers.keys())
        raise ValueError(
            f"{folder}: expected erasers for all layers of the model and no others, "
            f"got none for layers {shown(missing)} and some for unknown layers {shown(unknown)}"
        )
    dim = hidden_size(transformer)
    return {layer: _restored(layer, stored.states[layer], dim, stored.rank) for layer in layers}


def _restored(layer: str, state: Mapping[str, Any], dim: int, rank: int) -> AdapterEraser:
    """An eraser with the parameters in `state`, or a ValueError that says what is wrong with them."""
    for key, value in state.items():
        if isinstance(value, Tensor) and not _is_plain(value):
            description = f"{value.dtype}, {value.layout} on {value.device}" + ", nested" * value.is_nested
            raise ValueError(f"{layer}: expected {key} to be a dense floating-point tensor, got {description}")
    _check_shapes(layer, state, dim, rank)
    weights = {key: value.to(torch.float32, copy=True) for key, value in state.items()}
    _check_finite(layer, weights)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced right away
        eraser = AdapterEraser(dim, rank)
    eraser.load_state_dict(weights, assign=True)
    return eraser


def _check_shapes(layer: str, state: Mapping[str, Any], dim: int, rank: int) -> None:
    # Spelled out rather than read from a new eraser: a file may claim any rank, and nothing of that size may be
    # allocated before the tensors are known to have it.
    expected = {"down.weight": (rank, dim), "down.bias": (rank,), "up.weight": (dim, rank), "up.bias": (dim,)}
    got = {key: tuple(value.shape) if isinstance(value, Tensor) else value for key, value in state.items()}
    if got != expected:
        raise ValueError(f"{layer}: expected parameters {shown(expected, 300)}, got {shown(got, 300)}")


def _check_saveable(layer: str, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if type(value) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"{layer}: expected {key} to be a plain tensor, got {type(value).__name__}; an eraser cannot be saved "
                "while it is quantised or sharded (after fully_shard, call unshard() on every process first)"
            )
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{layer}: expected {key} in float32, got {value.dtype}, to which something has rounded it; call "
                "float() on the model to save erasers with what is left of their precision"
            )


def _is_plain(value: Tensor) -> bool:
    is_dense = value.layout is torch.strided and not value.is_nested and value.device.type == "cpu"
    return is_dense and value.is_floating_point()


def _check_finite(layer: str, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{layer}: expected finite numbers in {key}, got NaN or infinity")
