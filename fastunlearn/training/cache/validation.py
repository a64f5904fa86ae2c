"""Checks a finished cache before training reads it. Nothing in the folder is trusted: anybody may have made it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

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

    t: (K,) float32. prompts: (K,) int64, each point's index in the list of prompts.
    """

    path: Path
    group: str
    t: Tensor
    prompts: Tensor
    has_masks: bool


class CheckedCache(NamedTuple):
    """The content of a valid index, and the files that it lists."""

    facts: dict[str, Any]
    origin: dict[str, Any]
    fingerprint: str
    prompts: list[str]
    boundary: float | None
    conditions: Path
    groups: dict[str, list[CheckedShard]]


def check_cache(folder: Path, *, verify: bool = False) -> CheckedCache:
    """Checks that the files in `folder` are a finished cache and fit its index.

    Args:
        folder: the cache.
        verify: whether to read every byte and compare checksums; else only sizes and headers are compared.

    Raises:
        FileNotFoundError: there is no cache, or one of its files is missing.
        ValueError: the cache is not finished, or a file is damaged or does not fit the index.
    """
    return _Checker(folder, verify).check()


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
    def __init__(self, folder: Path, verify: bool) -> None:
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
        dtype = self._get(
            facts, "dtype", lambda x: isinstance(x, str) and x in SAFETENSORS_DTYPES, "a dtype of latents"
        )
        self.stored_dtype = SAFETENSORS_DTYPES[dtype]
        self.boundary = self._get(facts, "boundary", lambda x: x is None or _is_finite_number(x), "a number or null")
        self.latent_shape = tuple(self._get(facts, "latent_shape", _is_list_of_sizes, "a list of sizes"))
        self.token_grid = tuple(self._get(facts, "token_grid", _is_list_of_sizes, "a list of sizes"))

    def check(self) -> CheckedCache:
        conditions = self._file(self.index["conditions"], PROMPTS.__eq__, f"the file name {PROMPTS!r}")
        self._check_conditions(conditions)
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
        if self.verify and file_entry(path)["sha256"] != entry.get("sha256"):
            raise ValueError(
                f"{path}: expected the checksum that {INDEX} lists, got another; the file is damaged or was changed: "
                "delete it and run prepare again with the same arguments"
            )
        return path

    def _check_conditions(self, path: Path) -> None:
        with open_safetensors(path) as file:
            names = set(tensor_names(file))
        keywords = {name.partition(".")[2] for name in names}
        if names != {f"{number}.{keyword}" for number in range(len(self.prompts)) for keyword in keywords}:
            raise ValueError(
                f"{path}: expected a condition for each of {len(self.prompts)} prompts, got {shown(sorted(names))}"
            )

    def _shard(self, entry: Mapping[str, Any], unit: int) -> CheckedShard:
        path = self._file(entry, SHARD_FILE.fullmatch, "the file name of a shard")
        with open_safetensors(path) as file:
            label, _ = shards.read_label(path, file)
            if label != shards.Label(self.index["fingerprint"], unit, str(entry.get("group"))):
                raise ValueError(f"{path}: expected the shard that {INDEX} lists, got one of another run or unit")
            has_masks = self._check_tensors(path, file, entry.get("points"))
            t, prompts = file.get_tensor("t").clone(), file.get_tensor("prompt").long()
        if not bool(((t >= 0) & (t <= 1000)).all()):  # NaN fails too
            raise ValueError(f"{path}: expected timesteps from 0 to 1000, got {shown(t.tolist())}")
        if bool(((prompts < 0) | (prompts >= len(self.prompts))).any()):
            raise ValueError(
                f"{path}: expected indices of the {len(self.prompts)} prompts, got {shown(prompts.tolist())}"
            )
        return CheckedShard(path, label.group, t, prompts, has_masks)

    def _check_tensors(self, path: Path, file: Any, points: Any) -> bool:
        """Checks the names, dtypes and shapes of a shard's tensors. Returns whether masks are among them."""
        slices = {name: file.get_slice(name) for name in tensor_names(file)}
        got = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
        latents = (self.stored_dtype, (points, *self.latent_shape))
        expected: dict[str, Any] = {"x_t": latents, "v_uncond": latents, "v_cond": latents}
        expected |= {"t": ("F32", (points,)), "prompt": ("I32", (points,))}
        if "mask" in got:
            expected["mask"] = ("BOOL", (points, *self.token_grid))
        if got != expected:
            raise ValueError(f"{path}: expected {shown(points)} points, as {INDEX} lists: {expected}; got {got}")
        return "mask" in got
