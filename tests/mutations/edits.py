"""Damages one file: what a broken disk, a hasty hand or an attacker does to it.

An edit is a function (rng, path, room) -> None that changes the file at `path`; `room` knows the other files. An edit
that cannot be applied to this file raises `NotApplicable`. The edits here suit any file; json_edits.py and
tensor_edits.py know formats.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from editing import Edit, NotApplicable, Room, content_of, write
from json_edits import CONFIGURATIONS, JSON
from tensor_edits import PICKLES, SAFETENSORS


def flip_bytes(rng: random.Random, path: Path, room: Room) -> None:
    content = bytearray(content_of(path))
    for _ in range(rng.choice((1, 1, 4, 64))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    write(path, bytes(content))


def flip_a_byte_near_the_start(rng: random.Random, path: Path, room: Room) -> None:
    content = bytearray(content_of(path))
    content[rng.randrange(min(len(content), 64))] ^= rng.randrange(1, 256)
    write(path, bytes(content))


def truncate(rng: random.Random, path: Path, room: Room) -> None:
    content = content_of(path)
    write(path, content[: rng.choice((rng.randrange(len(content)), len(content) - 1, min(len(content), 7)))])


def extend(rng: random.Random, path: Path, room: Room) -> None:
    write(path, path.read_bytes() + rng.randbytes(rng.choice((1, 8, 10_000))))


def make_empty(rng: random.Random, path: Path, room: Room) -> None:
    write(path, b"")


def fill_with_noise(rng: random.Random, path: Path, room: Room) -> None:
    write(path, rng.randbytes(len(path.read_bytes())))


def delete(rng: random.Random, path: Path, room: Room) -> None:
    path.unlink()


def swap_with_another(rng: random.Random, path: Path, room: Room) -> None:
    other = rng.choice(room.files)
    alike = [file for file in room.files if file.suffix == path.suffix and file != path]
    if alike and rng.random() < 0.7:
        other = rng.choice(alike)
    first, second = path.read_bytes(), other.read_bytes()
    if first == second:
        raise NotApplicable
    write(path, second)
    write(other, first)


def become_a_folder(rng: random.Random, path: Path, room: Room) -> None:
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "file").write_text("")


def become_a_fifo(rng: random.Random, path: Path, room: Room) -> None:
    path.unlink()
    os.mkfifo(path)


def become_a_dangling_link(rng: random.Random, path: Path, room: Room) -> None:
    path.unlink()
    path.symlink_to(room.outside / "absent")


def become_a_loop(rng: random.Random, path: Path, room: Room) -> None:
    path.unlink()
    path.symlink_to(path.name)


def become_a_link_outside(rng: random.Random, path: Path, room: Room) -> None:
    target = room.outside / "target"
    target.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(target)


def become_an_endless_device(rng: random.Random, path: Path, room: Room) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def move_its_folder_outside(rng: random.Random, path: Path, room: Room) -> None:
    folder = path.parent
    if folder in room.outputs or folder.name == "world":
        raise NotApplicable
    target = room.outside / "folder"
    folder.rename(target)
    folder.symlink_to(target)


GENERAL: tuple[Edit, ...] = (
    *(flip_bytes, flip_bytes, flip_a_byte_near_the_start, truncate, extend, make_empty, fill_with_noise, delete),
    *(swap_with_another, become_a_folder, become_a_fifo, become_a_dangling_link, become_a_loop),
    *(become_a_link_outside, become_an_endless_device, move_its_folder_outside),
)


# Prompts.


def insert_odd_text(rng: random.Random, path: Path, room: Room) -> None:
    content = path.read_bytes()
    odd = rng.choice(
        (
            b"\xff\xfe",
            b"\x00",
            b"\t",
            b"\r",
            b"\n\n",
            b"x" * 2_000_000,
            b"a " * 100_000,
            "\u200b\u0301漢\U0001f600".encode(),
        )
    )
    place = rng.randrange(len(content) + 1)
    write(path, content[:place] + odd + content[place:])


def repeat_many_times(rng: random.Random, path: Path, room: Room) -> None:
    write(path, path.read_bytes() * 20_000)


TEXT: tuple[Edit, ...] = (insert_odd_text, insert_odd_text, repeat_many_times)


def choose_edit(rng: random.Random, path: Path, *, is_pipeline: bool) -> Edit:
    """An edit that suits a file: in three of five cases one of its format, else one that suits any file."""
    special: dict[str, tuple[Edit, ...]] = {
        ".json": CONFIGURATIONS if is_pipeline else JSON,
        ".safetensors": SAFETENSORS,
        ".pt": PICKLES,
        ".txt": TEXT,
    }
    suited = special.get(path.suffix, ())
    return rng.choice(suited if suited and rng.random() < 0.6 else GENERAL)
