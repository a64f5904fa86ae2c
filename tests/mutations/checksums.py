"""Makes checksums fit altered files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from editing import write

from fastunlearn.training.cache.index import cache_fingerprint, file_entry, sealed


def resign(path: Path) -> bool:
    """Makes the checksums of an edited file fit it again, as an attacker would. Returns whether there are any."""
    try:
        return any(sign(path) for sign in (_sign_checkpoint, _sign_erasers, _sign_cache))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sign_checkpoint(path: Path) -> bool:
    metadata = path.parent / "checkpoint.json"
    if path.name != "training_state.pt":
        return False
    content = json.loads(metadata.read_bytes())
    write(metadata, json.dumps(content | {"sha256": _sha256(path)}).encode())
    return True


def _sign_erasers(path: Path) -> bool:
    config = path.parent / "config.json"
    if not path.name.startswith("erasers-"):
        return False
    content = json.loads(config.read_bytes())
    write(config, json.dumps(content | {"sha256": _sha256(path)}).encode())
    return True


def _sign_cache(path: Path) -> bool:
    index = path.parent / "index.json"
    if not index.is_file():
        return False
    content = json.loads(index.read_bytes())
    if path.name == "prompts.safetensors":
        content["conditions"] |= file_entry(path)
    for entry in content.get("shards", ()):
        if entry["file"] == path.name:
            entry |= file_entry(path)
    content["fingerprint"] = cache_fingerprint(content["facts"], content["conditions"]["sha256"])
    write(index, json.dumps(sealed(content), indent=2).encode())
    return True
