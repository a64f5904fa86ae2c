from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MUTATIONS = Path(__file__).parents[1] / "mutations"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes with bounds that Linux knows")
def test_a_sample_of_mutated_files() -> None:
    """40 mutations; the whole thing is `python tests/mutations --count 1000`."""
    command = [sys.executable, str(MUTATIONS), "--count", "40", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-1].split()
    assert total[0] == "total" and len(total) == 5  # no column for a bad outcome
    assert sum(map(int, total[1:])) == 40
