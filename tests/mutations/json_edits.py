"""Edits of JSON files, and of the configurations of a pipeline, which may name code."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from editing import DEPTH, PAYLOAD_MODULE, Edit, NotApplicable, Room, write

_MARK = "mutation-mark"
_TEXTS = {
    "null": "null",
    "list": "[]",
    "object": "{}",
    "deep list": "[" * DEPTH + "]" * DEPTH,
    "deep object": '{"a":' * DEPTH + "1" + "}" * DEPTH,
    "huge integer": "1" + "0" * 5000,
    "integer of 400 digits": "1" * 400,
    "1e400": "1e400",
    "NaN": "NaN",
    "minus infinity": "-Infinity",
    "long string": json.dumps("x" * 2_000_000),
    "control characters": json.dumps("\n\x1b[2J\u202e\x00" * 20),
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "billion": "1000000000",
    "2^63": str(2**63),
    "fraction": "0.5",
    "path": '"../../outside/target"',
    "absolute path": '"/etc/passwd"',
    "unicode": '"\\ud800"',
    "list of objects": '[{"a": 1}, null, "x"]',
}


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    pairs: list[tuple[Any, Any]] = []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        pairs += [(content, key), *_places(value)]
    return pairs


def _parsed(path: Path) -> Any:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise NotApplicable from error
    if not _places(content):
        raise NotApplicable
    return content


def replace_json_value(rng: random.Random, path: Path, room: Room) -> None:
    content = _parsed(path)
    container, key = rng.choice(_places(content))
    container[key] = _MARK
    write(path, json.dumps(content, indent=2).replace(f'"{_MARK}"', rng.choice(list(_TEXTS.values()))).encode())


def change_json_number(rng: random.Random, path: Path, room: Room) -> None:
    content = _parsed(path)
    places = [(box, key) for box, key in _places(content) if type(box[key]) in (int, float)]
    if not places:
        raise NotApplicable
    container, key = rng.choice(places)
    value = container[key]
    container[key] = rng.choice(
        (value - 1, value + 1, value * 2, 0, -value, 10**9, float(value), str(value), value + 0.5)
    )
    write(path, json.dumps(content, indent=2).encode())


def remove_json_key(rng: random.Random, path: Path, room: Room) -> None:
    content = _parsed(path)
    container, key = rng.choice(_places(content))
    del container[key]
    write(path, json.dumps(content, indent=2).encode())


def add_json_key(rng: random.Random, path: Path, room: Room) -> None:
    content = _parsed(path)
    containers = [content, *(box[key] for box, key in _places(content) if isinstance(box[key], dict | list))]
    container = rng.choice(containers)
    if isinstance(container, list):
        container.insert(
            rng.randrange(len(container) + 1), rng.choice((None, 1, "x", container[0] if container else {}))
        )
    else:
        container[
            rng.choice(("added", "", "_class_name", "auto_map", "dtype", "torch_dtype", "quantization_config"))
        ] = rng.choice((None, 1, "x", {"a": 1}, [1]))
    write(path, json.dumps(content, indent=2).encode())


def swap_json_values(rng: random.Random, path: Path, room: Room) -> None:
    content = _parsed(path)
    (box, key), (other, other_key) = rng.choice(_places(content)), rng.choice(_places(content))
    box[key], other[other_key] = other[other_key], box[key]
    try:
        write(path, json.dumps(content, indent=2).encode())
    except ValueError as error:  # a value was put into itself
        raise NotApplicable from error


def repeat_json_key(rng: random.Random, path: Path, room: Room) -> None:
    content = _parsed(path)
    if not isinstance(content, dict) or not content:
        raise NotApplicable
    key = rng.choice(list(content))
    write(
        path, (json.dumps(content, indent=2).rstrip()[:-1] + f', "{key}": {rng.choice(("1", "null", "[]"))}}}').encode()
    )


JSON: tuple[Edit, ...] = (
    *(replace_json_value,) * 8,
    *(change_json_number,) * 3,
    *(remove_json_key,) * 2,
    *(add_json_key, swap_json_values, repeat_json_key),
)


def name_foreign_code(rng: random.Random, path: Path, room: Room) -> None:
    """Names a module for a component: one on `sys.path`, one beside the component, or one by way of `auto_map`."""
    content = _parsed(path)
    payload = (room.module_folder / f"{PAYLOAD_MODULE}.py").read_text()
    if path.name == "model_index.json":
        component = rng.choice([name for name, value in content.items() if isinstance(value, list)])
        kind = rng.randrange(4)
        if kind == 0:
            content[component] = [PAYLOAD_MODULE, "Component"]
        elif kind == 1:
            content[component] = ["component_code", "Component"]
            (path.parent / component / "component_code.py").write_text(payload)
        elif kind == 2:
            content["_class_name"] = ["component_code", "Component"]
            (path.parent / "component_code.py").write_text(payload)
        else:
            content[rng.choice(("added", component))] = ["diffusers." + PAYLOAD_MODULE, "Component"]
    else:
        names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoModelForCausalLM")
        content["auto_map"] = dict.fromkeys(names, "component_code.Component")
        content["_class_name"] = rng.choice((content.get("_class_name", "Component"), "Component"))
        (path.parent / "component_code.py").write_text(payload)
    write(path, json.dumps(content).encode())


CONFIGURATIONS: tuple[Edit, ...] = (*JSON, name_foreign_code, name_foreign_code)
