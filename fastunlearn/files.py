"""Reads and writes files: regular files only, atomic replacement, versioned JSON, safetensors, torch's own format."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

JSON_BYTES = 64 << 20  # far more than any JSON file here needs; parsed, it may take 20 times as much memory
MESSAGE_LENGTH = 600

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


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
        # Only a new file is written to: a link of this name could lead out of the folder.
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:
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
    """Deletes a folder and all that is in it. Of a symbolic link to a folder, only the link is deleted.

    The folder is renamed first. If the process dies on the way, the folder is still whole or it is called
    NAME.removed.partial, so that nobody takes what is left for the whole.

    Raises:
        OSError: the folder cannot be renamed. What cannot be deleted after that stays under the new name.
    """
    removed = folder.with_name(folder.name + ".removed.partial")
    folder.rename(removed)
    with suppress(OSError):
        delete(removed)


def delete(path: Path) -> None:
    """Deletes a file, or a folder with all that is in it. Of a symbolic link, only the link is deleted.

    Raises:
        OSError: something cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def writable(folder: str | os.PathLike[str]) -> Path:
    """Creates `folder` and checks that files can be written into it: better an OSError now than after hours of work."""
    path = expand_home(folder)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass
    return path


def subfolder(folder: Path, name: str) -> Path:
    """Creates a folder in an output folder, or takes the one that is there.

    Raises:
        FileExistsError: it is a symbolic link, through which files would be written somewhere else, or it is a file.
    """
    refuse_links(folder, name)
    path = folder / name
    path.mkdir(exist_ok=True)
    return path


def refuse_links(folder: Path, *names: str) -> None:
    """Raises FileExistsError if one of these entries of an output folder is a symbolic link."""
    for path in (folder / name for name in names):
        if path.is_symlink():
            raise FileExistsError(
                f"{path}: expected a folder, got a symbolic link; nothing is written through it: delete the link, or "
                "choose another output folder"
            )


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading. Anything else in its place could block for ever or have no end.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is a folder, a named pipe, a socket or a device.
        OSError: it cannot be read.
    """
    # Without O_NONBLOCK, opening a named pipe waits for somebody to write into it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError:
        _check_mode(path, os.stat(path).st_mode)  # says more about what cannot be opened, such as a socket
        raise
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """The content of a regular file.

    Raises:
        ValueError: it has more than `most` bytes.
        Others: what `open_file` raises.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise ValueError(f"{path}: expected a file of at most {most} bytes, got {size}")
        return file.read() if most is None else file.read(most)


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises what `open_file` raises: for a file that a library opens by its name."""
    open_file(path).close()


def _check_mode(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"{os.fspath(path)}: expected a file, got {_KINDS.get(stat.S_IFMT(mode), 'something else')}")


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically. Raises ValueError for NaN and infinity, which JSON cannot hold."""
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def shown(value: Any, most: int = 80) -> str:
    """The `repr` of a value, cut to `most` characters, for use in an error message."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} of very many levels"
    return text if len(text) <= most else text[:most] + "..."


def one_line(error: object, most: int = MESSAGE_LENGTH) -> str:
    """The text of an error in one line of at most about `most` characters, whatever somebody's file put into it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def read_json(path: Path, *, allow_nan: bool = True, most: int = JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        path: the file.
        allow_nan: whether NaN and infinity, which are not JSON but which Python writes, are read.
        most: the size in bytes up to which the file is read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a file, is larger than `most`, is not valid JSON, names a key twice, or holds something
            other than an object.
    """
    text = read_file(path, most)
    try:
        content = json.loads(
            text,
            parse_constant=None if allow_nan else _refuse_constant,
            object_pairs_hook=_object_of_distinct_keys,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error, 200)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _object_of_distinct_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(repeated)} is there twice")
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

    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    check_file(path)
    try:
        file = safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({one_line(error, 200)}); it is truncated or damaged"
        ) from error
    with file:
        yield file


def tensor_names(file: Any) -> list[str]:
    """The names of the tensors in a file that `open_safetensors` opened."""
    return list(file.keys())


def load_torch(path: Path, content: bytes | None = None) -> Any:
    """Loads what `torch.save` wrote, on the CPU: tensors, numbers and strings in dicts and lists, and no other objects.

    Args:
        path: the file.
        content: its bytes, if they have been read already.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not such a file, or its tensors claim more memory than the file itself takes.
    """
    import torch

    content = read_file(path) if content is None else content
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size <= len(content):
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            # The numbers of a tensor may repeat a few bytes over and over: 3 kB can claim a tensor of any size.
            size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(loaded))
            if size <= len(content):
                return loaded
    except Exception as error:  # a damaged pickle can raise almost anything
        # Without torch's own text, which advises to load the file without the check.
        raise ValueError(
            f"{path}: expected a readable file of tensors alone, got one that fails to load ({type(error).__name__})"
        ) from error
    raise ValueError(
        f"{path}: expected a file as torch.save writes it, got {len(content)} bytes that claim to hold {size}"
    )


def _tensors(content: Any) -> Iterator[Any]:
    """The tensors in nested dicts and lists."""
    import torch

    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
