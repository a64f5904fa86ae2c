"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


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
