"""Folders and files that a phase leaves."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from fastunlearn.atomic import replace_file


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
