"""Reading and writing files: whole or not there at all, JSON with a version, safetensors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes, *, beside: str = ".partial") -> None:
    """Writes `content` to a file beside `path`, makes sure it is on the disk, and renames it to `path`.

    A process that ends in between leaves the file beside, and `path` as it was. An error takes the file beside away.

    Args:
        path: the file to make or replace.
        content: of the file.
        beside: what is appended to the name meanwhile. Processes that may write one file at a time need one each.

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
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def writable(folder: str | os.PathLike[str]) -> Path:
    """Makes `folder`, and raises an OSError now rather than after hours of work if nothing can be written there."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass
    return path


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def shown(value: Any, most: int = 80) -> str:
    """The `repr` of a value for an error message, cut to `most` characters."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not an object. NaN and infinity are not JSON.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_versioned_json(path: Path, *, format: str, version: int, what: str) -> dict[str, Any]:
    """The JSON object in one of this library's own files, which say their format and its version.

    Args:
        path: of the file.
        format: the value that its entry "format" must have.
        version: the value that its entry "format_version" must have.
        what: what the file should be, for the error message: "the index of a teacher cache".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, of another format, or of another version.
    """
    content = read_json(path)
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
    """Opens a safetensors file, memory-mapped: `get_slice(name)[row]` reads that row alone.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no whole safetensors file.
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
