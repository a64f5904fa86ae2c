"""The README's training step runs as it is written there, and its commands are what the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastunlearn.cli import PHASES, main

README = Path(__file__).parents[2] / "README.md"


def test_use_it_in_your_training_loop() -> None:
    section = README.read_text(encoding="utf-8").partition("\n## Use it in your training loop\n")[2]
    block = re.search(r"^```python\n(.*?)^```$", section.partition("\n## ")[0], re.DOTALL | re.MULTILINE)
    assert block is not None, "no ```python block follows the heading"
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block[1], str(README), "exec"), names)

    assert names["loss"].isfinite()
    assert names["loss"] > 0
    erasers = names["erasers"]
    assert erasers
    # The first layer of a fresh eraser gets a gradient of 0, because the last one starts at 0.
    assert all(eraser.up.weight.grad.isfinite().all() and eraser.up.weight.grad.any() for eraser in erasers.values())
    trained = {id(parameter) for eraser in erasers.values() for parameter in eraser.parameters()}
    base = [parameter for parameter in names["model"].parameters() if id(parameter) not in trained]
    assert base
    assert all(parameter.grad is None for parameter in base)


def test_the_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text(encoding="utf-8").partition("\n## Erase a concept from your model\n")[2]
    block = re.search(r"^```bash\n(.*?)^```$", section.partition("\n## ")[0], re.DOTALL | re.MULTILINE)
    assert block is not None, "no ```bash block follows the heading"
    run = []
    monkeypatch.setattr("fastunlearn.cli._run_phase", lambda options: run.append(options.command))
    for line in block[1].replace("\\\n", "").splitlines():
        if line.startswith("fastunlearn "):
            main(shlex.split(line)[1:])
    assert run == list(PHASES)
