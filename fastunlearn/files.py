"""Reads and writes files: atomic replacement, versioned JSON, safetensors."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def expand_home(path: str | os.PathLike[str]) -> Path:
    """The path, with the user's home folder for a leading `~`, which shells leave in `--option=~/folder`."""
    return Path(os.path.expanduser(path))


def replace_file(path: Path, content: bytes, *, beside: str = ".partial") -> None:
    """Creates or replaces a file atomically: writes a temporary file next to it, syncs it to disk, and renames it.

    If the process dies on the way, `path` is unchanged and the temporary file stays. On an error the temporary file is
    removed.

    Args:
        path: the file to create or replace.
        content: the new content.
        beside: the suffix that the temporary file's name gets. Processes that may write the same file at the same time
            each need their own suffix.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(path.name + beside)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)  # the error of a full disk names no file
        raise


def remove_folder(folder: Path) -> None:
    """Deletes a folder and all that is in it.

    The folder is renamed first. If the process dies on the way, the folder is still whole or it is called
    NAME.removed.partial, so that nobody takes what is left for the whole.

    Raises:
        OSError: the folder cannot be renamed. What cannot be deleted after that stays under the new name.
    """
    removed = folder.with_name(folder.name + ".removed.partial")
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def writable(folder: str | os.PathLike[str]) -> Path:
    """Creates `folder` and checks that files can be written into it: better an OSError now than after hours of work."""
    path = expand_home(folder)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass
    return path


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically. Raises ValueError for NaN and infinity, which JSON cannot hold."""
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def shown(value: Any, most: int = 80) -> str:
    """The `repr` of a value, cut to `most` characters, for use in an error message."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def read_json(path: Path, *, allow_nan: bool = True) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        path: the file.
        allow_nan: whether NaN and infinity, which are not JSON but which Python writes, are read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not valid JSON, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=None if allow_nan else _refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_versioned_json(path: Path, *, format: str, version: int, what: str, allow_nan: bool = True) -> dict[str, Any]:
    """Reads a JSON object from one of this library's own files, which name their format and its version.

    Args:
        path: the file.
        format: the required value of the key "format".
        version: the required value of the key "format_version".
        what: what the file should be, for the error message, for example "the index of a teacher cache".
        allow_nan: as in `read_json`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not valid JSON, or has another format or another version.
    """
    content = read_json(path, allow_nan=allow_nan)
    if content.get("format") != format:
        raise ValueError(f"{path}: expected {what}, got another JSON file")
    got = content.get("format_version")
    if got != version:
        raise ValueError(
            f"{path}: expected format_version {version}, got {shown(got)}; a newer fastunlearn may read it"
        )
    return content


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Opens a safetensors file memory-mapped, so that `get_slice(name)[row]` reads only that row.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, damaged, or not a safetensors file.
    """
    import safetensors

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        file = safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); it is truncated or damaged") from error
    with file:
        yield file


def tensor_names(file: Any) -> list[str]:
    """The names of the tensors in a file that `open_safetensors` opened."""
    return list(file.keys())
