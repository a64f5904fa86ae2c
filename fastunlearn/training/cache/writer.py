"""Writing a teacher cache: a shard a unit of work, each whole or not there, by one process or many, resumable."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastunlearn.files import replace_file
from fastunlearn.ops.arguments import check_shape
from fastunlearn.training.cache import shards
from fastunlearn.training.cache.index import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    OWN_FILE,
    PROMPTS,
    file_entry,
    fingerprint_of,
    read_index,
    shown,
)

_SHOWN_CHANGES = 20


class CacheWriter:
    """Writes the units of a cache that are not there yet.

    Several processes may write units of one cache at a time, each unit by one of them, and one calls `finish` at the
    end. The same facts and points give the same files, byte for byte.

    Args:
        folder: a new or empty folder, or a cache that was begun with the same facts. Foreign files beside a cache are
            left alone.
        facts: what determines the content, as JSON: `latent_shape`, `token_grid` (F, h, w), `dtype` (its name),
            `boundary` (a timestep or None), and whatever else does.
        conditions: the condition of every prompt that points have.
        groups: the group of each unit.
        origin: what is worth knowing and does not determine the content, as JSON.
        process_index: a number that is this process's own among those that write at a time.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: the cache there was begun with other facts; the message lists them.
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
        self.folder = Path(folder)
        self._beside = f".{process_index}.partial"
        # As JSON gives it back, so that what is compared is what was written.
        self._facts = json.loads(json.dumps({**facts, "prompts": list(conditions)}, allow_nan=False))
        self._groups = list(groups)
        self._numbers = {prompt: number for number, prompt in enumerate(conditions)}
        self._dtype = DTYPES[self._facts["dtype"]]
        self._begin(_serialized(conditions), dict(origin or {}))

    def _begin(self, conditions: bytes, origin: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / INDEX
        if path.exists():
            existing = read_index(path)
            self._compare(existing)
            _warn_of_other_versions(path, existing["origin"], origin)
            origin = existing["origin"]
        else:
            existing = {}
            refuse_foreign(self.folder)
        sha256 = hashlib.sha256(conditions).hexdigest()
        if existing and existing["conditions"]["sha256"] != sha256:
            raise ValueError(
                f"{self.folder}: was begun with other conditions for the same prompts: the text encoders or their "
                "precision changed; choose another folder"
            )
        if not (self.folder / PROMPTS).exists() or file_entry(self.folder / PROMPTS)["sha256"] != sha256:
            self._store(PROMPTS, conditions)
        entry = file_entry(self.folder / PROMPTS)
        self.fingerprint = fingerprint_of(self._facts, entry["sha256"])
        self._index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "finished": False,
            "fingerprint": self.fingerprint,
            "facts": self._facts,
            "origin": origin,
            "conditions": entry,
        }
        if not existing:
            self._store_index(self._index)

    def _compare(self, existing: Mapping[str, Any]) -> None:
        changes = list(_changes(existing["facts"], self._facts))
        if changes:
            more = f"\n  and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
            raise ValueError(
                f"{self.folder}: was begun with other arguments; pass those, or choose another folder "
                "(in the cache -> now):\n  " + "\n  ".join(changes[:_SHOWN_CHANGES]) + more
            )

    def has(self, unit: int) -> bool:
        """Whether the unit's shard is there, whole and of this run.

        Raises:
            ValueError: what is there is not that. It is left as it is.
        """
        path = self.folder / shards.file_name(unit)
        if not path.exists():
            return False
        try:
            shards.check(path, self._label(unit))
        except ValueError as error:
            raise ValueError(f"{error}; delete the file to have it made again, or choose another folder") from error
        return True

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
        """Writes the unit's K points.

        Args:
            unit: which.
            prompts: K prompts, those of `v_cond`.
            x_t: (K, *latent).
            t: (K,).
            v_uncond: (K, *latent).
            v_cond: (K, *latent).
            mask: (K, F, h, w), nonzero on the concept; None where the unit's group has no masks.

        Raises:
            ValueError: a shape is wrong, or a value is not finite.
            OSError: the file cannot be written.
        """
        latents = {"x_t": x_t, "v_uncond": v_uncond, "v_cond": v_cond}
        for name, tensor in latents.items():
            check_shape(name, tensor, (len(prompts), *self._facts["latent_shape"]), "points and latent shape")
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{name}: not finite in unit {unit} ({shown(prompts[0])}): the model overflows; "
                    "prepare with mixed_precision 'bf16' or 'no'"
                )
        tensors = {name: tensor.to(self._dtype) for name, tensor in latents.items()}
        tensors["t"] = t.float()
        tensors["prompt"] = torch.tensor([self._numbers[prompt] for prompt in prompts], dtype=torch.int32)
        if mask is not None:
            check_shape("mask", mask, (len(prompts), *self._facts["token_grid"]), "points and token grid")
            tensors["mask"] = mask != 0
        self._store(shards.file_name(unit), shards.serialize(tensors, self._label(unit)))

    def is_complete(self) -> bool:
        """Whether every unit's shard is there."""
        return not self._missing()

    def _missing(self) -> list[int]:
        units = range(len(self._groups))
        return [unit for unit in units if not (self.folder / shards.file_name(unit)).exists()]

    def finish(self) -> None:
        """Writes the index, once every unit's shard is there, and takes away what interrupted writing left.

        Raises:
            ValueError: shards are missing, or not of this run.
        """
        missing = self._missing()
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} of {len(self._groups)} shards are missing, the first is "
                f"{shards.file_name(missing[0])}; did every process end well?"
            )
        entries = []
        for unit, group in enumerate(self._groups):
            path = self.folder / shards.file_name(unit)
            points = shards.points(path, self._label(unit))
            entries.append(file_entry(path) | {"group": group, "points": points})
        self._store_index({**self._index, "finished": True, "shards": entries})
        for file in self.folder.iterdir():
            match = OWN_FILE.fullmatch(file.name)
            if match and match["partial"]:
                file.unlink()

    def _label(self, unit: int) -> shards.Label:
        return shards.Label(self.fingerprint, unit, self._groups[unit])

    def _store_index(self, index: Mapping[str, Any]) -> None:
        self._store(INDEX, (json.dumps(index, indent=1, allow_nan=False) + "\n").encode())

    def _store(self, name: str, content: bytes) -> None:
        path = self.folder / name
        try:
            replace_file(path, content, beside=self._beside)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"no space left for {len(content)} bytes; what was written before is whole: make room and run the "
                "same again to go on",
                str(path),
            ) from error


def refuse_foreign(folder: Path) -> None:
    """Raises FileExistsError where a folder without an index holds what is no part of a cache."""
    if (folder / INDEX).exists():
        return
    foreign = sorted(file.name for file in folder.iterdir() if not OWN_FILE.fullmatch(file.name))
    if foreign:
        raise FileExistsError(f"{folder}: expected a new folder or a teacher cache, found {', '.join(foreign[:3])}")


def _changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Lines that name what differs, as deep inside as it is still clear."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(x, dict | list) for x in old + new):
        if len(old) != len(new):
            yield f"{name}: {len(old)} of them -> {len(new)} of them"
            return
        for index, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from _changes(before, now, f"{name}[{index}]")
    else:
        yield f"{name}: {shown(old)} -> {shown(new)}"


def _serialized(conditions: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    return safetensors.torch.save(
        {
            f"{number}.{keyword}": tensor.detach().cpu().contiguous()
            for number, condition in enumerate(conditions.values())
            for keyword, tensor in condition.items()
        }
    )


def _warn_of_other_versions(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if old.get("versions") != new.get("versions"):
        warnings.warn(
            f"{path}: the cache was begun with {shown(old.get('versions'))}, and goes on with "
            f"{shown(new.get('versions'))}: its points may differ by rounding",
            stacklevel=4,
        )
