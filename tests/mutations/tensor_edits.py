"""Edits of files of tensors: those of safetensors, and those of torch.save."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from editing import DEPTH, Edit, NotApplicable, Room, content_of, write

# safetensors.


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    content = content_of(path, 10)
    length = struct.unpack("<Q", content[:8])[0]
    try:
        return json.loads(content[8 : 8 + length]), content[8 + length :]
    except ValueError as error:
        raise NotApplicable from error


def _join(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    if length is None and (header, data) == _split(path):
        raise NotApplicable
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    write(path, struct.pack("<Q", len(text) if length is None else length) + text + data)


def _tensor(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    return header[rng.choice([name for name in header if name != "__metadata__"])]


def change_dtype(rng: random.Random, path: Path, room: Room) -> None:
    header, data = _split(path)
    tensor = _tensor(rng, header)
    same_size = {
        "F32": ("I32", "U32"),
        "F16": ("BF16", "I16"),
        "BF16": ("F16", "I16"),
        "I32": ("F32",),
        "I64": ("F64",),
    }
    tensor["dtype"] = rng.choice((*same_size.get(tensor["dtype"], ()), "F64", "BOOL", "F8_E4M3", "C64", "NONE", 1))
    _join(path, header, data)


def convert_a_tensor(rng: random.Random, path: Path, room: Room) -> None:
    """Stores a tensor in another dtype or shape, with the data to match: the file is whole."""
    import safetensors.torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    choices: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: value.to(torch.float64),
        lambda: value.to(torch.float16),
        lambda: value.to(torch.int64),
        lambda: value != 0,
        lambda: value.flatten(),
        lambda: value[None],
        lambda: value[:0],
        lambda: value.repeat(2, *[1] * (value.dim() - 1)),
        lambda: value.transpose(0, -1).contiguous(),
        lambda: torch.zeros(()),
        lambda: torch.full(value.shape, float("nan")).to(value.dtype),
        lambda: torch.full(value.shape, float("inf")).to(value.dtype),
        lambda: torch.full(value.shape, 1e30).to(value.dtype),
    )
    tensors[name] = rng.choice(choices)()
    write(path, safetensors.torch.save(tensors, metadata))


def change_shape(rng: random.Random, path: Path, room: Room) -> None:
    header, data = _split(path)
    tensor = _tensor(rng, header)
    shape = tensor["shape"]
    tensor["shape"] = rng.choice(
        ([], [0], [*shape, 1], [10**9, *shape], shape[::-1], [2**63], [-1], None, "x", [2**40] * 2)
    )
    _join(path, header, data)


def change_offsets(rng: random.Random, path: Path, room: Room) -> None:
    header, data = _split(path)
    tensor = _tensor(rng, header)
    start, end = tensor["data_offsets"]
    tensor["data_offsets"] = rng.choice(
        ([0, 0], [end, start], [start, end + 4], [start, 2**63], [0, end - start], [-1, end], [start], None, [1e3, 2e3])
    )
    _join(path, header, data)


def change_header_length(rng: random.Random, path: Path, room: Room) -> None:
    header, data = _split(path)
    length = len(json.dumps(header))
    _join(path, header, data, rng.choice((0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1)))


def put_nan_into_data(rng: random.Random, path: Path, room: Room) -> None:
    header, data = _split(path)
    tensor = _tensor(rng, header)
    start, end = tensor["data_offsets"]
    pattern = {"F32": struct.pack("<f", float("nan")), "F16": b"\x00\x7e", "BF16": b"\xc0\x7f"}.get(tensor["dtype"])
    if pattern is None or end - start < len(pattern):
        raise NotApplicable
    _join(path, header, data[:start] + pattern + data[start + len(pattern) :])


def change_names(rng: random.Random, path: Path, room: Room) -> None:
    header, data = _split(path)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    kind = rng.randrange(5)
    if kind == 0:
        del header[name]  # its bytes stay, owned by no tensor
    elif kind == 1:
        header[rng.choice(("renamed", "", "x" * 1_000_000, "0.", "1_0.encoder_hidden_states"))] = header.pop(name)
    elif kind == 2:
        header["__metadata__"] = rng.choice(({}, {"format": "tf"}, {"a": 1}, None, {"x": "[" * DEPTH}))
    elif kind == 3:
        _join(path, "[" * DEPTH + "]" * DEPTH, data)
        return
    else:
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    _join(path, header, data)


def edit_metadata(rng: random.Random, path: Path, room: Room) -> None:
    header, data = _split(path)
    metadata = header.get("__metadata__") or {}
    if not metadata:
        raise NotApplicable
    key = rng.choice(list(metadata))
    metadata[key] = rng.choice(("", "null", "[]", "1", '{"a": 1}', "[" * DEPTH, "x" * 2_000_000, metadata[key] + " "))
    _join(path, header, data)


SAFETENSORS: tuple[Edit, ...] = (
    *(convert_a_tensor,) * 5,
    *(change_dtype, change_shape, change_offsets, change_header_length, put_nan_into_data, change_names, edit_metadata),
)


# Files of torch.save.


class _Payload:
    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return exec, (self._command,)


def pickle_code(rng: random.Random, path: Path, room: Room) -> None:
    content = _Payload(f"import pathlib; pathlib.Path({str(room.sentinel)!r}).touch()")
    torch.save(rng.choice((content, {"optimizers": [content]}, {"layer": content})), path)


def save_something_else(rng: random.Random, path: Path, room: Room) -> None:
    write(path, b"")
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    choices = (None, [], {}, 1, "x", {"a": 1}, {1: {2: 3}}, torch.zeros(2), deep, {"optimizers": None}, {"scaler": []})
    torch.save(rng.choice(choices), path)


def _tensors_in(content: Any) -> list[tuple[Any, Any]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [pair for key, value in items for pair in ((content, key), *_tensors_in(value))]


def change_a_saved_value(rng: random.Random, path: Path, room: Room) -> None:
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:
        raise NotApplicable from error
    places = _tensors_in(content)
    if not places:
        raise NotApplicable
    container, key = rng.choice(places)
    value = container[key]
    choices: list[Any] = [
        None,
        [],
        {},
        "x",
        -1,
        float("nan"),
        10**30,
        True,
        torch.zeros(0),
        torch.zeros(2, 3),
        complex(1, 1),
    ]
    if isinstance(value, torch.Tensor):
        choices += [
            *(value.double(), value.flatten(), value.to(torch.int64), value[None], value + float("nan"), value.half()),
            *(
                value.to("meta"),
                torch.zeros(1).expand(10**6, 10**6),
                value.to_sparse(),
                -value,
                value.to(torch.complex64),
            ),
        ]
    if rng.random() < 0.2:
        del container[key]
    else:
        container[key] = rng.choice(choices)
    torch.save(content, path)


def save_as_before_torch_1_6(rng: random.Random, path: Path, room: Room) -> None:
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:
        raise NotApplicable from error
    torch.save(content, path, _use_new_zipfile_serialization=False)


PICKLES: tuple[Edit, ...] = (
    pickle_code,
    save_something_else,
    *(change_a_saved_value,) * 6,
    save_as_before_torch_1_6,
)
