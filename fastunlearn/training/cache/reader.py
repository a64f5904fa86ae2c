"""Reading a teacher cache: `TeacherCache` opens it, a `PointSet` reads the points of one group row by row."""

from __future__ import annotations

import bisect
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.dtypes import dtype_name
from fastunlearn.files import expand_home, open_safetensors, tensor_names
from fastunlearn.ops.arguments import integer_tensor
from fastunlearn.training.cache.index import INDEX, PROMPTS, file_entry, read_index
from fastunlearn.training.cache.validation import (
    CheckedShard,
    check_cache,
    check_conditions,
    check_sha256,
    is_list_of_strings,
)
from fastunlearn.training.model.text import EncodedPrompt


class Points(NamedTuple):
    """A batch of B points, on the CPU.

    x_t, v_uncond, v_cond: (B, *latent) in the model's dtype. t: (B,) float32. condition: the tensors (B, ...) that
    `v_cond` was computed with. mask: (B, F, h, w) bool on the token grid, True on the concept; None if the group has
    no masks.
    """

    x_t: Tensor
    t: Tensor
    condition: dict[str, Tensor]
    v_uncond: Tensor
    v_cond: Tensor
    mask: Tensor | None


class PointSet:
    """The K points of one group; `len()` is K. Only the requested rows are read from disk.

    The first time that a shard is read, it is read as a whole to compare its checksum, unless `verified`.

    Attributes:
        t: (K,) float32.
        prompts: (K,) int64, each point's index in `TeacherCache.prompts`.
        experts: (K,) int64, the index of the transformer that each point is for: 1 below the model's boundary timestep.
        trajectories: (K,) int64, the number of the trajectory that each point is on. Trajectories that cannot be told
            apart, because they have one prompt and one's points go on where another's end, count as one.
        has_negative: (K,) bool, whether the point can be read with the negative prompt, which `v_uncond` is of.
        has_masks: whether the points have masks.
    """

    def __init__(
        self,
        shards: Sequence[CheckedShard],
        conditions: Path,
        boundary: float | None,
        *,
        negative_prompt: int | None = None,
        replaced: Collection[int] = (),
        verified: bool = False,
    ) -> None:
        self._files = [shard.path for shard in shards]
        self._unverified = {} if verified else {number: shard.sha256 for number, shard in enumerate(shards)}
        self._starts = [0]
        for shard in shards:
            self._starts.append(self._starts[-1] + len(shard.t))
        self._conditions = conditions
        self.t = torch.cat([shard.t for shard in shards])
        self.prompts = torch.cat([shard.prompts for shard in shards])
        self._negative_prompt = negative_prompt
        is_replaced = torch.isin(self.prompts, torch.tensor(list(replaced), dtype=torch.int64))
        self.has_negative = ~is_replaced & (negative_prompt is not None)
        self.has_masks = shards[0].has_masks
        self.experts = torch.zeros_like(self.prompts) if boundary is None else (self.t < boundary).long()
        self.trajectories = torch.cat([_begins_trajectory(shard) for shard in shards]).cumsum(0) - 1

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, indices: Tensor | Sequence[int], negative: Tensor | None = None) -> Points:
        """Reads the points at `indices` (B,), in that order. An index may occur more than once.

        Args:
            indices: the numbers of the points.
            negative: (B,) bool, which points to read with the negative prompt: its condition, and `v_uncond` as
                `v_cond`.

        Raises:
            TypeError: `indices` are not integers.
            ValueError: `indices` is empty or out of range, a point cannot be read with the negative prompt, the
                conditions of its prompts differ in shape, or a shard was changed.
            FileNotFoundError: a shard was deleted after the cache was opened.
        """
        index = integer_tensor("indices", indices).long().cpu()
        if index.dim() != 1 or not len(index):
            raise ValueError(f"indices: expected shape (B,) with B at least 1, got shape {tuple(index.shape)}")
        if index.min() < 0 or index.max() >= len(self):
            raise ValueError(f"indices: expected numbers from 0 to {len(self) - 1}, got {index.tolist()}")
        is_negative = torch.zeros_like(index, dtype=torch.bool) if negative is None else negative.cpu()
        if bool((is_negative & ~self.has_negative[index]).any()):
            raise ValueError("negative: expected points whose v_uncond is of the negative prompt, got others as well")
        with ExitStack() as stack:
            open_files: dict[int, Any] = {}
            locations = []
            for i in index.tolist():
                shard = bisect.bisect_right(self._starts, i) - 1
                if shard not in open_files:
                    open_files[shard] = stack.enter_context(open_safetensors(self._files[shard]))
                    if shard in self._unverified:
                        check_sha256(self._files[shard], self._unverified[shard])
                        del self._unverified[shard]
                locations.append((open_files[shard], i - self._starts[shard]))

            def rows(name: str) -> Tensor:
                return torch.stack([file.get_slice(name)[row] for file, row in locations])

            prompts = self.prompts[index]
            v_uncond, v_cond = rows("v_uncond"), rows("v_cond")
            if self._negative_prompt is not None:
                prompts[is_negative] = self._negative_prompt
                v_cond[is_negative] = v_uncond[is_negative]
            return Points(
                rows("x_t"),
                self.t[index],
                self.condition(prompts.tolist()),
                v_uncond,
                v_cond,
                rows("mask") if self.has_masks else None,
            )

    def condition(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        """Reads the conditions of the prompts with these numbers (indices in `TeacherCache.prompts`), as a batch.

        Raises:
            ValueError: they differ in shape.
        """
        with open_safetensors(self._conditions) as file:
            keywords = [name.partition(".")[2] for name in tensor_names(file) if name.startswith(f"{prompts[0]}.")]
            condition = {}
            for keyword in keywords:
                tensors = {prompt: file.get_tensor(f"{prompt}.{keyword}") for prompt in set(prompts)}
                shapes = {tuple(tensor.shape) for tensor in tensors.values()}
                if len(shapes) > 1:
                    raise ValueError(
                        f"indices: expected prompts whose {keyword} have one shape, got {sorted(shapes)}; read these "
                        "points separately"
                    )
                condition[keyword] = torch.stack([tensors[prompt] for prompt in prompts])
            return condition


def _begins_trajectory(shard: CheckedShard) -> Tensor:
    """Whether each point of a shard is the first of a trajectory, along which timesteps fall and the prompt stays."""
    begins = torch.ones(len(shard.t), dtype=torch.bool)
    begins[1:] = (shard.t[1:] > shard.t[:-1]) | (shard.prompts[1:] != shard.prompts[:-1])
    return begins


class TeacherCache:
    """A finished cache, opened for reading.

    Attributes:
        folder: where it is.
        facts: what it was made from. `latent_shape`, `token_grid`, `dtype`, `boundary`, `backbone`, `concept`,
            `requests` and the other settings determine its content; `model` and `versions` are for information.
        fingerprint: a checksum of everything that determines its content.
        groups: the points, by the name of their group.
        prompts: every prompt whose condition is stored.
        condition_shapes: the shapes of the first prompt's condition, by keyword of the transformer's forward method.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        fingerprint: str,
        groups: dict[str, PointSet],
        prompts: list[str],
        condition_shapes: dict[str, tuple[int, ...]],
    ) -> None:
        self.folder, self.facts, self.fingerprint = folder, facts, fingerprint
        self.groups, self.prompts, self.condition_shapes = groups, prompts, condition_shapes

    def point_prompts(self) -> list[str]:
        """The prompts that points have, each once."""
        used = {number for points in self.groups.values() for number in points.prompts.tolist()}
        return [self.prompts[number] for number in sorted(used)]

    @staticmethod
    def open(folder: str | os.PathLike[str], *, verify: bool | None = None) -> TeacherCache:
        """Opens the cache in `folder` after checking that its files fit its index, by their sizes and headers.

        Args:
            folder: the output folder of `prepare`.
            verify: when checksums are compared: by default (None) a shard's when it is first read, and those of all
                else now; True: all of them now; False: never.

        Raises:
            FileNotFoundError: there is no cache, or one of its files is missing.
            ValueError: the cache is not finished, or a file is damaged or does not fit the index.
        """
        folder = expand_home(folder)
        checked = check_cache(folder, verify=verify)
        numbers = {prompt: number for number, prompt in enumerate(checked.prompts)}
        negative = checked.facts.get("negative_prompt")
        replaced = _prompts_with_replacement(checked.facts)
        return TeacherCache(
            folder,
            checked.origin | checked.facts,
            checked.fingerprint,
            {
                name: PointSet(
                    group,
                    checked.conditions,
                    checked.boundary,
                    negative_prompt=numbers.get(negative) if isinstance(negative, str) else None,
                    replaced=[number for prompt, number in numbers.items() if (name, prompt) in replaced],
                    verified=verify is not None,
                )
                for name, group in checked.groups.items()
            },
            checked.prompts,
            checked.condition_shapes,
        )


def _prompts_with_replacement(facts: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(group, prompt) of the points whose `v_uncond` may be of another prompt than the negative one."""
    requests = facts.get("requests")
    entries = [entry for entry in requests if isinstance(entry, dict)] if isinstance(requests, list) else []
    return {
        (str(entry.get("group")), str(entry.get("prompt"))) for entry in entries if entry.get("instead") is not None
    }


def stored_prompts(folder: str | os.PathLike[str], concept: str, dtype: torch.dtype) -> dict[str, EncodedPrompt] | None:
    """The encoded prompts of a cache that `prepare` began, so that resuming needs no text encoder.

    Returns:
        The prompts by their text. None if there is no cache, it was begun with another concept or dtype, or its file of
        prompts is damaged.

    Raises:
        ValueError: the folder holds an index that is damaged.
    """
    index_path, path = (expand_home(folder) / name for name in (INDEX, PROMPTS))
    if not index_path.is_file() or not path.is_file():
        return None
    index = read_index(index_path)
    facts = index["facts"]
    prompts, token_indices = facts.get("prompts"), facts.get("token_indices")
    if (
        not is_list_of_strings(prompts)
        or not isinstance(token_indices, list)
        or len(token_indices) != len(prompts)
        or facts.get("concept") != concept
        or facts.get("dtype") != dtype_name(dtype)
        or file_entry(path)["sha256"] != index["conditions"]["sha256"]
    ):
        return None
    try:
        check_conditions(path, prompts, facts)
    except ValueError:
        return None
    encoded = {
        prompt: EncodedPrompt(prompt, {}, list(indices)) for prompt, indices in zip(prompts, token_indices, strict=True)
    }
    with open_safetensors(path) as file:
        for name in tensor_names(file):
            number, _, keyword = name.partition(".")
            encoded[prompts[int(number)]].condition[keyword] = file.get_tensor(name).clone()
    return encoded
