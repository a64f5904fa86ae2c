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
        return any(sign(path) for sign in (_sign_one, _sign_cache))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _sign_one(path: Path) -> bool:
    """A checkpoint's state and a file of erasers have their checksum in a file beside them."""
    if path.name == "training_state.pt":
        signed = path.parent / "checkpoint.json"
    elif path.name.startswith("erasers-"):
        signed = path.parent / "config.json"
    else:
        return False
    content = json.loads(signed.read_bytes())
    write(signed, json.dumps(content | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}).encode())
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
