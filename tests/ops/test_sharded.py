"""Losses over a process group: shards on 2 and 4 processes against the whole tensors, in `sharded_losses_worker.py`."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

WORKER = Path(__file__).parents[1] / "workers/sharded_losses_worker.py"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo to reduce with"
)
@pytest.mark.parametrize("processes", [2, 4])
def test_losses_over_a_group_are_those_of_the_whole_tensors(processes: int, tmp_path: Path) -> None:
    # Run the kernels too, in Triton's interpreter, with as few processes as possible.
    interpreted = {"TRITON_INTERPRET": "1"} if processes == 2 and HAS_TRITON else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **interpreted}
    if not interpreted:
        environment.pop("TRITON_INTERPRET", None)
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(processes), tmp_path / "store"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=170)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-5000:]
        assert "values agree" in output
