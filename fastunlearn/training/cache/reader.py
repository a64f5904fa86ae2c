"""The teacher cache: what the frozen model said at points of its trajectories, written once and read while training.

A folder of

    index.json              what determines the content, its fingerprint, and every shard with its checksum
    prompts.safetensors     each prompt's condition, once: "{number}.{keyword of the transformer's forward method}"
    shard-00000.safetensors the points of one unit of work, and so on

A shard's K points are `x_t`, `v_uncond`, `v_cond` (K, *latent) in the model's dtype, `t` (K,) float32, `prompt` (K,)
int32, the number of the prompt that `v_cond` is the velocity at, and in groups with masks `mask` (K, F, h, w) bool.

Files appear whole or not at all. The index is there from the start, not yet `finished`, so that a run that resumes can
compare its arguments. There is nothing in the folder but JSON and safetensors: a stranger's cache cannot run code.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.files import open_safetensors, tensor_names
from fastunlearn.ops.arguments import integer_tensor
from fastunlearn.training.cache import shards
from fastunlearn.training.cache.index import (
    DTYPES,
    INDEX,
    PROMPTS,
    SHARD,
    file_entry,
    is_number,
    is_objects,
    is_size,
    is_texts,
    read_index,
    shown,
)
from fastunlearn.training.model.text import EncodedPrompt

_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names


class Points(NamedTuple):
    """B points, on the CPU.

    x_t, v_uncond, v_cond: (B, *latent) in the model's dtype. t: (B,) float32. condition: the tensors (B, ...) that
    `v_cond` is the velocity at. mask: (B, F, h, w) bool on the token grid, True on the concept; None in groups without.
    """

    x_t: Tensor
    t: Tensor
    condition: dict[str, Tensor]
    v_uncond: Tensor
    v_cond: Tensor
    mask: Tensor | None


class PointSet:
    """The points of one group. `len()` is their number K; only the rows asked for are read.

    Attributes:
        t: (K,) float32.
        prompts: (K,) int64, each point's number in `TeacherCache.prompts`.
        experts: (K,) int64, which of the model's transformers each point is for: 1 below its boundary timestep.
        has_masks: whether the points have masks.
    """

    def __init__(
        self,
        files: Sequence[Path],
        lengths: Sequence[int],
        t: Tensor,
        prompts: Tensor,
        conditions: Path,
        boundary: float | None,
        has_masks: bool,
    ) -> None:
        self._files = list(files)
        self._starts = [0]
        for length in lengths:
            self._starts.append(self._starts[-1] + length)
        self._conditions = conditions
        self.t, self.prompts, self.has_masks = t, prompts, has_masks
        self.experts = torch.zeros_like(prompts) if boundary is None else (t < boundary).long()

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, indices: Tensor | Sequence[int]) -> Points:
        """The points numbered `indices` (B,), in that order; a number may come twice.

        Raises:
            TypeError: `indices` are no integers.
            ValueError: there are none, one is out of range, or their prompts' conditions differ in shape.
            FileNotFoundError: a shard was taken away since the cache was opened.
        """
        index = integer_tensor("indices", indices).long().cpu()
        if index.dim() != 1 or not len(index):
            raise ValueError(f"indices: expected (B,) with at least one, got shape {tuple(index.shape)}")
        if index.min() < 0 or index.max() >= len(self):
            raise ValueError(f"indices: expected numbers from 0 to {len(self) - 1}, got {index.tolist()}")
        with ExitStack() as stack:
            files: dict[int, Any] = {}
            places = []
            for i in index.tolist():
                shard = bisect.bisect_right(self._starts, i) - 1
                if shard not in files:
                    files[shard] = stack.enter_context(open_safetensors(self._files[shard]))
                places.append((files[shard], i - self._starts[shard]))

            def rows(name: str) -> Tensor:
                return torch.stack([file.get_slice(name)[row] for file, row in places])

            return Points(
                rows("x_t"),
                self.t[index],
                self._condition(self.prompts[index].tolist()),
                rows("v_uncond"),
                rows("v_cond"),
                rows("mask") if self.has_masks else None,
            )

    def _condition(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        with open_safetensors(self._conditions) as file:
            keywords = [name.partition(".")[2] for name in tensor_names(file) if name.startswith(f"{prompts[0]}.")]
            condition = {}
            for keyword in keywords:
                tensors = {prompt: file.get_tensor(f"{prompt}.{keyword}") for prompt in set(prompts)}
                if len({tensor.shape for tensor in tensors.values()}) > 1:
                    raise ValueError(f"indices: prompts whose {keyword} differ in shape cannot be read together")
                condition[keyword] = torch.stack([tensors[prompt] for prompt in prompts])
            return condition


class TeacherCache:
    """A finished cache, opened for reading.

    Attributes:
        folder: where it is.
        facts: what it was made of: `latent_shape`, `dtype`, `boundary`, `token_grid`, `concept`, `backbone`, `requests`
            and the other arguments, with `model` and `versions`, which do not determine the content.
        fingerprint: the checksum of the facts and conditions that do.
        groups: points by group.
        prompts: every prompt there is a condition of.
    """

    def __init__(
        self, folder: Path, facts: dict[str, Any], fingerprint: str, groups: dict[str, PointSet], prompts: list[str]
    ) -> None:
        self.folder, self.facts, self.fingerprint = folder, facts, fingerprint
        self.groups, self.prompts = groups, prompts

    @staticmethod
    def open(folder: str | os.PathLike[str], *, verify: bool = False) -> TeacherCache:
        """Opens the cache in `folder` and checks that its files fit the index, by their size and header.

        Args:
            folder: what `prepare` wrote.
            verify: whether to read every byte and compare checksums as well.

        Raises:
            FileNotFoundError: there is no cache, or a file of it is missing.
            ValueError: it is not finished, damaged, or not what it should be.
        """
        return _Reader(Path(folder)).read(verify)


class _Shard(NamedTuple):
    path: Path
    group: str
    t: Tensor
    prompts: Tensor
    has_masks: bool


class _Reader:
    """Believes nothing that is written in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / INDEX

    def read(self, verify: bool) -> TeacherCache:
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is missing: {self.folder} is no teacher cache; run prepare first")
        index = read_index(self.path)
        if index.get("finished") is not True:
            raise ValueError(f"{self.path}: the cache is not finished; run prepare again with the same arguments")
        facts = index["facts"]
        self.fingerprint = index["fingerprint"]
        self.prompts = self._expect(facts, "prompts", is_texts, "a list of texts")
        self.dtype = DTYPES[self._expect(facts, "dtype", lambda x: isinstance(x, str) and x in DTYPES, "a dtype")]
        boundary = self._expect(facts, "boundary", lambda x: x is None or is_number(x), "a number or null")
        self.latent_shape, self.token_grid = (self._sizes(facts, name) for name in ("latent_shape", "token_grid"))
        conditions = self._file(index["conditions"], PROMPTS.__eq__, verify)
        self._check_conditions(conditions)
        groups: dict[str, list[_Shard]] = {}
        for unit, entry in enumerate(self._expect(index, "shards", is_objects, "a list of objects")):
            shard = self._shard(entry, unit, verify)
            groups.setdefault(shard.group, []).append(shard)
        return TeacherCache(
            self.folder,
            index["origin"] | facts,
            self.fingerprint,
            {name: self._point_set(name, group, conditions, boundary) for name, group in groups.items()},
            self.prompts,
        )

    def _expect(self, content: Mapping[str, Any], name: str, is_right: Callable[[Any], bool], expected: str) -> Any:
        if name not in content or not is_right(content[name]):
            raise ValueError(f"{self.path}: expected {expected} as {name!r}, got {shown(content.get(name))}")
        return content[name]

    def _sizes(self, facts: Mapping[str, Any], name: str) -> tuple[int, ...]:
        return tuple(
            self._expect(facts, name, lambda x: isinstance(x, list) and all(map(is_size, x)), "a list of sizes")
        )

    def _file(self, entry: Mapping[str, Any], is_right: Callable[[str], Any], verify: bool) -> Path:
        """The file that an entry of the index names: of the writer's own form, so that no path leads elsewhere."""
        name = self._expect(entry, "file", lambda x: isinstance(x, str) and bool(is_right(x)), "one of its file names")
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; run prepare again with the same arguments to have it made")
        if path.stat().st_size != entry.get("bytes"):
            told = shown(entry.get("bytes"))
            raise ValueError(f"{path}: expected {told} bytes, got {path.stat().st_size}; it is truncated or changed")
        if verify and file_entry(path)["sha256"] != entry.get("sha256"):
            raise ValueError(f"{path}: does not have the checksum that {INDEX} tells; it is damaged or was changed")
        return path

    def _check_conditions(self, path: Path) -> None:
        with open_safetensors(path) as file:
            names = set(tensor_names(file))
        keywords = {name.partition(".")[2] for name in names}
        if names != {f"{number}.{keyword}" for number in range(len(self.prompts)) for keyword in keywords}:
            raise ValueError(f"{path}: expected a condition for each of {len(self.prompts)} prompts")

    def _shard(self, entry: Mapping[str, Any], unit: int, verify: bool) -> _Shard:
        path = self._file(entry, SHARD.fullmatch, verify)
        points = entry.get("points")
        with open_safetensors(path) as file:
            label, _ = shards.read_label(path, file)
            if label != shards.Label(self.fingerprint, unit, str(entry.get("group"))):
                raise ValueError(f"{path}: not the shard that {INDEX} tells, but one of another run or unit")
            slices = {name: file.get_slice(name) for name in tensor_names(file)}
            got = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
            latents = (_STORED[self.dtype], (points, *self.latent_shape))
            expected: dict[str, Any] = {"x_t": latents, "v_uncond": latents, "v_cond": latents}
            expected |= {"t": ("F32", (points,)), "prompt": ("I32", (points,))}
            if "mask" in got:
                expected["mask"] = ("BOOL", (points, *self.token_grid))
            if got != expected:
                raise ValueError(f"{path}: expected {shown(points)} points as {INDEX} tells, {expected}; got {got}")
            t, prompts = file.get_tensor("t").clone(), file.get_tensor("prompt").long()
        if not bool(((t >= 0) & (t <= 1000)).all()):  # false for NaN
            raise ValueError(f"{path}: expected timesteps from 0 to 1000")
        if bool(((prompts < 0) | (prompts >= len(self.prompts))).any()):
            raise ValueError(f"{path}: expected numbers of the {len(self.prompts)} prompts in 'prompt'")
        return _Shard(path, label.group, t, prompts, "mask" in got)

    def _point_set(self, name: str, group: list[_Shard], conditions: Path, boundary: float | None) -> PointSet:
        if len({shard.has_masks for shard in group}) > 1:
            raise ValueError(f"{self.folder}: some shards of group {name!r} have masks and others have none")
        return PointSet(
            [shard.path for shard in group],
            [len(shard.t) for shard in group],
            torch.cat([shard.t for shard in group]),
            torch.cat([shard.prompts for shard in group]),
            conditions,
            boundary,
            group[0].has_masks,
        )


def stored_prompts(folder: Path, concept: str, dtype: torch.dtype) -> dict[str, EncodedPrompt] | None:
    """The prompts of a cache that was begun with these arguments; None if it was not, or holds no whole ones."""
    index_path, path = Path(folder) / INDEX, Path(folder) / PROMPTS
    if not index_path.is_file() or not path.is_file():
        return None
    index = read_index(index_path)
    facts, entry = index["facts"], file_entry(path)
    prompts, tokens = facts.get("prompts"), facts.get("token_indices")
    if (
        not is_texts(prompts)
        or not isinstance(tokens, list)
        or len(tokens) != len(prompts)
        or facts.get("concept") != concept
        or facts.get("dtype") != str(dtype).removeprefix("torch.")
        or entry["sha256"] != index["conditions"]["sha256"]
    ):
        return None
    encoded = {prompt: EncodedPrompt(prompt, {}, list(of_it)) for prompt, of_it in zip(prompts, tokens, strict=True)}
    with open_safetensors(path) as file:
        for name in tensor_names(file):
            number, _, keyword = name.partition(".")
            if not number.isdecimal() or int(number) >= len(prompts):
                return None
            encoded[prompts[int(number)]].condition[keyword] = file.get_tensor(name).clone()
    return encoded
