"""The README's training step runs as it is written there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


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
