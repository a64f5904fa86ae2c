"""Writing a teacher cache: one shard per unit of work, each complete or absent, by one process or many, resumable."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastunlearn.dtypes import dtype_named
from fastunlearn.files import expand_home, replace_file, shown
from fastunlearn.ops.arguments import check_shape
from fastunlearn.training.cache import shards
from fastunlearn.training.cache.changes import changes
from fastunlearn.training.cache.index import (
    CACHE_FILE,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    PROMPTS,
    SAFETENSORS_DTYPES,
    cache_fingerprint,
    file_entry,
    read_index,
    sealed,
)

_SHOWN_CHANGES = 20


class CacheWriter:
    """Writes the shards of a cache that do not exist yet.

    Several processes may write to one cache at the same time, if no two write the same unit. One of them calls `finish`
    at the end. The same facts and points give the same files, byte for byte.

    Args:
        folder: a new or empty folder, or a cache that was begun with the same facts. Other files in the folder of a
            cache are left alone.
        facts: everything that determines the content, as JSON: `latent_shape`, `token_grid` (F, h, w), `dtype` (its
            name), `boundary` (a timestep or None), and any other settings.
        conditions: the condition of every prompt that points have, by prompt.
        groups: the group of each unit.
        origin: information that does not determine the content, as JSON.
        process_index: differs between the processes that write at the same time.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: the cache was begun with other facts; the message lists them.
        OSError: a file cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        facts: Mapping[str, Any],
        conditions: Mapping[str, Mapping[str, Tensor]],
        groups: Sequence[str],
        *,
        origin: Mapping[str, Any] | None = None,
        process_index: int = 0,
    ) -> None:
        self.folder = expand_home(folder)
        self._partial_suffix = f".{process_index}.partial"
        # To JSON and back, so that they can be compared with those read from an index: a tuple becomes a list.
        self._facts = json.loads(json.dumps({**facts, "prompts": list(conditions)}, allow_nan=False))
        self._groups = list(groups)
        self._prompt_indices = {prompt: index for index, prompt in enumerate(conditions)}
        dtype = dtype_named(self._facts["dtype"])
        if dtype is None or self._facts["dtype"] not in SAFETENSORS_DTYPES:
            expected = ", ".join(SAFETENSORS_DTYPES)
            raise ValueError(f"facts: expected one of {expected} as 'dtype', got {shown(self._facts['dtype'])}")
        self._dtype = dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        content = _serialized(conditions)
        sha256 = hashlib.sha256(content).hexdigest()
        begun = self._read_begun_index(dict(origin or {}), sha256)
        self._store_conditions(content, sha256)
        self.fingerprint = cache_fingerprint(self._facts, sha256)
        self._index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "finished": False,
            "fingerprint": self.fingerprint,
            "facts": self._facts,
            "origin": dict(origin or {}) if begun is None else begun["origin"],
            "conditions": file_entry(self.folder / PROMPTS),
        }
        self._listed = {} if begun is None else _listed_checksums(begun)
        self._intact: set[int] = set()  # the units that were written or checked by this process
        if begun is None:
            self._store_index(self._index)

    def _read_begun_index(self, origin: Mapping[str, Any], conditions_sha256: str) -> dict[str, Any] | None:
        """The index of the cache to resume, checked against this run; None if the cache is new."""
        path = self.folder / INDEX
        if not path.exists():
            refuse_foreign_files(self.folder)
            return None
        index = read_index(path)
        changed = list(changes(index["facts"], self._facts))
        if changed:
            more = f"\n  and {len(changed) - _SHOWN_CHANGES} more" if len(changed) > _SHOWN_CHANGES else ""
            raise ValueError(
                f"{self.folder}: expected a cache with these arguments, got one that was begun with other arguments; "
                "pass those, or choose another folder (in the cache -> now):\n  "
                + "\n  ".join(changed[:_SHOWN_CHANGES])
                + more
            )
        if index["origin"].get("versions") != origin.get("versions"):
            warnings.warn(
                f"{path}: the cache was begun with {shown(index['origin'].get('versions'))} and continues with "
                f"{shown(origin.get('versions'))}: its points may differ by rounding",
                stacklevel=3,
            )
        if index["conditions"]["sha256"] != conditions_sha256:
            raise ValueError(
                f"{self.folder}: expected the prompts' conditions that the cache was begun with, got others for the "
                "same prompts: the text encoders or their precision changed; choose another folder"
            )
        return index

    def _store_conditions(self, content: bytes, sha256: str) -> None:
        path = self.folder / PROMPTS
        if not path.exists() or file_entry(path)["sha256"] != sha256:
            self._store(PROMPTS, content)

    def has(self, unit: int) -> bool:
        """Whether the unit's shard exists, after checking that it is intact and belongs to this run.

        Raises:
            ValueError: the file is damaged, was changed or belongs to another run. It is left as it is.
        """
        path = self.folder / shards.file_name(unit)
        if not path.exists():
            return False
        self._check(unit, path)
        return True

    def _check(self, unit: int, path: Path) -> None:
        try:
            shards.check_shard(path, self._label(unit), self._facts)
            if path.name in self._listed and file_entry(path)["sha256"] != self._listed[path.name]:
                raise ValueError(f"{path}: expected the checksum that {INDEX} lists, got another; the file was changed")
        except ValueError as error:
            raise ValueError(f"{error}; delete the file to compute it again, or choose another folder") from error
        self._intact.add(unit)

    def write(
        self,
        unit: int,
        prompts: Sequence[str],
        *,
        x_t: Tensor,
        t: Tensor,
        v_uncond: Tensor,
        v_cond: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Writes the shard of a unit with K points.

        Args:
            unit: the index of the unit.
            prompts: K prompts, the ones that `v_cond` was computed with.
            x_t: (K, *latent).
            t: (K,).
            v_uncond: (K, *latent).
            v_cond: (K, *latent).
            mask: (K, F, h, w), nonzero on the concept; None if the unit's group has no masks.

        Raises:
            ValueError: a tensor has the wrong shape or a value that is not finite.
            OSError: the file cannot be written.
        """
        latents = {"x_t": x_t, "v_uncond": v_uncond, "v_cond": v_cond}
        for name, tensor in latents.items():
            check_shape(name, tensor, (len(prompts), *self._facts["latent_shape"]), "points and latent shape")
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{name}: expected finite values, got NaN or infinity in unit {unit} ({shown(prompts[0])}): the "
                    "model overflows; prepare with mixed_precision 'bf16' or 'no'"
                )
        tensors = {name: tensor.to(self._dtype) for name, tensor in latents.items()}
        tensors["t"] = t.float()
        tensors["prompt"] = torch.tensor([self._prompt_indices[prompt] for prompt in prompts], dtype=torch.int32)
        if mask is not None:
            check_shape("mask", mask, (len(prompts), *self._facts["token_grid"]), "points and token grid")
            tensors["mask"] = mask != 0
        self._store(shards.file_name(unit), shards.serialize(tensors, self._label(unit)))
        self._listed.pop(shards.file_name(unit), None)  # an index may list the file that was missing
        self._intact.add(unit)

    def is_complete(self) -> bool:
        """Whether the shards of all units exist."""
        return not self._missing_units()

    def _missing_units(self) -> list[int]:
        units = range(len(self._groups))
        return [unit for unit in units if not (self.folder / shards.file_name(unit)).exists()]

    def finish(self) -> None:
        """Lists all shards in the index, marks it as finished, and deletes temporary files of interrupted processes.

        Raises:
            ValueError: shards are missing, damaged or of another run.
        """
        missing = self._missing_units()
        if missing:
            raise ValueError(
                f"{self.folder}: expected {len(self._groups)} shards, got {len(self._groups) - len(missing)}; "
                f"{shards.file_name(missing[0])} is missing: see whether a process failed, then run prepare again"
            )
        entries = []
        for unit, group in enumerate(self._groups):
            path = self.folder / shards.file_name(unit)
            if unit not in self._intact:
                self._check(unit, path)
            entries.append(file_entry(path) | {"group": group} | shards.summary(path))
        self._store_index({**self._index, "finished": True, "shards": entries})
        for file in self.folder.iterdir():
            match = CACHE_FILE.fullmatch(file.name)
            if match and match["partial"]:
                file.unlink()

    def _label(self, unit: int) -> shards.Label:
        return shards.Label(self.fingerprint, unit, self._groups[unit])

    def _store_index(self, index: Mapping[str, Any]) -> None:
        self._store(INDEX, (json.dumps(sealed(index), indent=1, allow_nan=False) + "\n").encode())

    def _store(self, name: str, content: bytes) -> None:
        path = self.folder / name
        try:
            replace_file(path, content, beside=self._partial_suffix)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"no space left for {len(content)} bytes; the files written before are intact: make room and run the "
                "same command again to continue",
                str(path),
            ) from error


def _listed_checksums(index: Mapping[str, Any]) -> dict[str, Any]:
    """The checksums that an index lists, by file name; none if it is not finished."""
    shard_entries = index.get("shards")
    entries = shard_entries if isinstance(shard_entries, list) else []
    return {str(entry.get("file")): entry.get("sha256") for entry in entries if isinstance(entry, dict)}


def refuse_foreign_files(folder: Path) -> None:
    """Raises FileExistsError if the folder has no index and holds a file that is not part of a cache."""
    if (folder / INDEX).exists():
        return
    foreign = sorted(file.name for file in folder.iterdir() if not CACHE_FILE.fullmatch(file.name))
    if foreign:
        raise FileExistsError(
            f"{folder}: expected a new folder or a teacher cache, got one with {', '.join(foreign[:3])}; choose "
            "another folder"
        )


def _serialized(conditions: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    return safetensors.torch.save(
        {
            f"{index}.{keyword}": tensor.detach().cpu().contiguous()
            for index, condition in enumerate(conditions.values())
            for keyword, tensor in condition.items()
        }
    )
