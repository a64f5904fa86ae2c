from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MUTATIONS = Path(__file__).parents[1] / "mutations"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes with bounds that Linux knows")
def test_a_sample_of_mutated_files() -> None:
    """60 mutations, or as many as fit into 30 seconds; the whole thing is `python tests/mutations --count 1000`."""
    command = [sys.executable, str(MUTATIONS), "--count", "60", "--seed", "1", "--seconds", "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-1].split()
    assert total[0] == "total" and len(total) == 5  # no column for a bad outcome
    assert sum(map(int, total[1:])) >= 1
