"""Checks a finished cache before training reads it. Nothing in the folder is trusted: anybody may have made it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastunlearn.families import FAMILIES
from fastunlearn.files import open_safetensors, shown, tensor_names
from fastunlearn.training.cache import shards
from fastunlearn.training.cache.index import (
    INDEX,
    PROMPTS,
    SAFETENSORS_DTYPES,
    SHARD_FILE,
    file_entry,
    read_index,
)


class CheckedShard(NamedTuple):
    """A shard with K points that fits the index.

    sha256: the checksum that the index lists. t: (K,) float32. prompts: (K,) int64, each point's index in the list of
    prompts.
    """

    path: Path
    sha256: str
    group: str
    t: Tensor
    prompts: Tensor
    has_masks: bool


class CheckedCache(NamedTuple):
    """The content of a valid index, and the files that it lists. condition_shapes: those of the first prompt."""

    facts: dict[str, Any]
    origin: dict[str, Any]
    fingerprint: str
    prompts: list[str]
    boundary: float | None
    conditions: Path
    condition_shapes: dict[str, tuple[int, ...]]
    groups: dict[str, list[CheckedShard]]


def check_cache(folder: Path, *, verify: bool | None = None) -> CheckedCache:
    """Checks that the files in `folder` are a finished cache and fit its index.

    Args:
        folder: the cache.
        verify: True compares the checksums of all files; None those of all but the shards, of which sizes, headers,
            timesteps and prompts are compared; False compares no checksum of a file.

    Raises:
        FileNotFoundError: there is no cache, or one of its files is missing.
        ValueError: the cache is not finished, or a file is damaged or does not fit the index.
    """
    return _Checker(folder, verify).check()


def check_sha256(path: Path, sha256: str) -> None:
    """Raises ValueError unless the file has the checksum that the index of its cache lists."""
    if file_entry(path)["sha256"] != sha256:
        raise ValueError(
            f"{path}: expected the checksum that {INDEX} lists, got another; the file is damaged or was changed: "
            "delete it and run prepare again with the same arguments"
        )


def check_conditions(path: Path, prompts: Sequence[str], facts: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Checks, by their header, that the conditions of all prompts are there and have the dtypes that training needs.

    Args:
        path: the file of the conditions.
        prompts: the prompts of the cache.
        facts: those of the cache: the name of the model family, if there is one, says what a condition consists of.

    Returns:
        The shapes of the first prompt's condition, by keyword.

    Raises:
        ValueError: a tensor is missing, or does not fit.
    """
    with open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in tensor_names(file)}
        got = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
    family = next((family for family in FAMILIES if family.name == facts.get("backbone")), None)
    keywords = {name.partition(".")[2] for name in got} if family is None else set(family.conditions)
    if set(got) != {f"{number}.{keyword}" for number in range(len(prompts)) for keyword in keywords}:
        raise ValueError(
            f"{path}: expected {', '.join(sorted(keywords))} for each of {len(prompts)} prompts, "
            f"got {shown(sorted(got))}"
        )
    if family is not None:
        latents = SAFETENSORS_DTYPES[facts["dtype"]]
        for name, (dtype, shape) in got.items():
            dims = family.conditions[name.partition(".")[2]]
            dtypes = ("I64", "BOOL") if dims == ("L",) else (latents,)  # ("L",): a text mask
            if dtype not in dtypes or len(shape) != len(dims) or 0 in shape:
                raise ValueError(
                    f"{path}: expected ({', '.join(dims)}) of {' or '.join(dtypes)} as {shown(name)}, "
                    f"got {shown(shape)} of {dtype}"
                )
    return {name.partition(".")[2]: shape for name, (_, shape) in got.items() if name.startswith("0.")}


def is_list_of_strings(value: Any) -> bool:
    """Whether a JSON value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _is_list_of_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_size, value))


def _is_size(value: Any) -> bool:
    """Whether a JSON value is a positive integer that the dimension of a tensor can have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Checker:
    def __init__(self, folder: Path, verify: bool | None) -> None:
        self.folder, self.verify, self.index_path = folder, verify, folder / INDEX
        if not self.index_path.is_file():
            raise FileNotFoundError(f"{folder}: expected a teacher cache, but {INDEX} is missing; run prepare first")
        self.index = read_index(self.index_path)
        if self.index.get("finished") is not True:
            raise ValueError(
                f"{self.index_path}: expected a finished cache, got one that is not finished; run prepare again with "
                "the same arguments"
            )
        facts = self.index["facts"]
        self.prompts: list[str] = self._get(facts, "prompts", is_list_of_strings, "a list of strings")
        self._get(facts, "dtype", lambda x: isinstance(x, str) and x in SAFETENSORS_DTYPES, "a dtype of latents")
        self.boundary = self._get(facts, "boundary", lambda x: x is None or _is_finite_number(x), "a number or null")
        for key in ("latent_shape", "token_grid"):
            self._get(facts, key, _is_list_of_sizes, "a list of sizes")

    def check(self) -> CheckedCache:
        conditions = self._file(self.index["conditions"], PROMPTS.__eq__, f"the file name {PROMPTS!r}")
        if self.verify is not False:
            check_sha256(conditions, self.index["conditions"]["sha256"])
        condition_shapes = check_conditions(conditions, self.prompts, self.index["facts"])
        groups: dict[str, list[CheckedShard]] = {}
        for unit, entry in enumerate(self._get(self.index, "shards", _is_list_of_objects, "a list of objects")):
            shard = self._shard(entry, unit)
            groups.setdefault(shard.group, []).append(shard)
        for name, group in groups.items():
            if len({shard.has_masks for shard in group}) > 1:
                raise ValueError(
                    f"{self.folder}: expected masks in all shards of group {name!r} or in none, got masks in some"
                )
        return CheckedCache(
            self.index["facts"],
            self.index["origin"],
            self.index["fingerprint"],
            self.prompts,
            self.boundary,
            conditions,
            condition_shapes,
            groups,
        )

    def _get(self, content: Mapping[str, Any], key: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
        if key not in content or not is_valid(content[key]):
            raise ValueError(f"{self.index_path}: expected {expected} as {key!r}, got {shown(content.get(key))}")
        return content[key]

    def _file(self, entry: Mapping[str, Any], is_valid_name: Callable[[str], Any], expected: str) -> Path:
        """The file of an index entry. Only names that the writer uses are valid, so no path leads out of the folder."""
        name = self._get(entry, "file", lambda x: isinstance(x, str) and bool(is_valid_name(x)), expected)
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; run prepare again with the same arguments to recreate it")
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise ValueError(
                f"{path}: expected {shown(entry.get('bytes'))} bytes, got {size}; the file is truncated or was "
                "changed: delete it and run prepare again with the same arguments"
            )
        return path

    def _shard(self, entry: Mapping[str, Any], unit: int) -> CheckedShard:
        path = self._file(entry, SHARD_FILE.fullmatch, "the file name of a shard")
        sha256 = self._get(entry, "sha256", lambda x: isinstance(x, str), "a checksum")
        if self.verify:
            check_sha256(path, sha256)
        with open_safetensors(path) as file:
            label, _ = shards.read_label(path, file)
            if label != shards.Label(self.index["fingerprint"], unit, str(entry.get("group"))):
                raise ValueError(f"{path}: expected the shard that {INDEX} lists, got one of another run or unit")
            has_masks = shards.check_tensors(path, file, entry.get("points"), self.index["facts"])
            t, prompt = file.get_tensor("t").clone(), file.get_tensor("prompt")
            prompts = prompt.long()
            digest = None if self.verify is False else shards.steps_digest(t, prompt)
        if digest is not None and entry.get("steps_sha256", digest) != digest:  # caches of earlier versions list none
            raise ValueError(
                f"{path}: expected the timesteps and prompts that {INDEX} lists, got others; the file is damaged or "
                "was changed: delete it and run prepare again with the same arguments"
            )
        if not bool(((t >= 0) & (t <= 1000)).all()):  # NaN fails too
            raise ValueError(f"{path}: expected timesteps from 0 to 1000, got {shown(t.tolist())}")
        if bool(((prompts < 0) | (prompts >= len(self.prompts))).any()):
            raise ValueError(
                f"{path}: expected indices of the {len(self.prompts)} prompts, got {shown(prompts.tolist())}"
            )
        return CheckedShard(path, sha256, label.group, t, prompts, has_masks)
