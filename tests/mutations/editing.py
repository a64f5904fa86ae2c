"""What every edit of a file is given, and how it writes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

DEPTH = 100_000
PAYLOAD_MODULE = "mutation_payload"  # in `Room.module_folder`, which is on sys.path: it leaves `Room.sentinel` behind


class NotApplicable(Exception):
    """This edit makes no sense for this file."""


@dataclass(frozen=True)
class Room:
    """What surrounds the file that is edited.

    Attributes:
        files: all files that the command reads, the edited one among them.
        outputs: the folders that the command may write to. One that the user has made a link is one all the same.
        outside: a folder that no command may write to.
        module_folder: a folder on `sys.path` with the module `PAYLOAD_MODULE`.
        sentinel: a file that exists afterwards if foreign code has run.
    """

    files: Sequence[Path]
    outputs: Sequence[Path]
    outside: Path
    module_folder: Path
    sentinel: Path


Edit = Callable[[random.Random, Path, Room], None]


def write(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def content_of(path: Path, least: int = 1) -> bytes:
    content = path.read_bytes()
    if len(content) < least:
        raise NotApplicable
    return content
