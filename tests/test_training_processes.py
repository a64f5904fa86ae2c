"""Two processes train what one does with twice the batch. Each launcher starts once: importing takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from training_worker import CASES, train_case

from fastunlearn import eraser_files
from fastunlearn.training.options import TrainingOptions
from fastunlearn.training.parallel import fsdp_plugin

WORKER = Path(__file__).with_name("training_worker.py")


def launch(output: Path, launcher: Sequence[str], cases: Sequence[str]) -> Path:
    environment = os.environ | {
        "PYTHONPATH": str(WORKER.parent),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", *launcher, str(WORKER), str(output), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "view tensor" not in done.stderr
    return output


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("torchrun")
    return launch(output, ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], list(CASES))


def erasers(folder: Path) -> dict[str, torch.Tensor]:
    found = sorted(path.parent for path in folder.rglob(eraser_files.CONFIG))
    return {
        f"{part.name}.{layer}.{name}": value
        for part in found
        for layer, state in eraser_files.read(part).states.items()
        for name, value in state.items()
    }


def check_same(two: Path, one: Path) -> None:
    got, expected = erasers(two), erasers(one)
    assert got.keys() == expected.keys() and len(got) >= 8
    largest = max(value.abs().max().item() for name, value in expected.items() if ".up." in name)
    assert largest > 1e-5
    for name, value in expected.items():
        assert (got[name] - value).abs().max().item() < 1e-4 * largest, name


@pytest.mark.parametrize("case", [case for case in CASES if case != "not-finite"])
def test_two_processes_are_one_with_twice_the_batch(case: str, under_torchrun: Path, tmp_path: Path) -> None:
    train_case(tmp_path, case, batch=2, fsdp=False, gradient_checkpointing=False)
    check_same(under_torchrun / case / "erasers", tmp_path / "erasers")


def test_a_loss_of_one_process_that_is_not_finite_stops_all(under_torchrun: Path) -> None:
    folder = under_torchrun / "not-finite"
    told = [(folder / f"stopped-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and told[0].startswith("step 2: the preservation loss is nan")
    assert not (folder / "erasers").exists()


def test_accelerate_launch_shards(tmp_path: Path) -> None:
    flags = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--main_process_port", "0"]
    launch(tmp_path / "two", ["accelerate.commands.launch", *flags], ["replicated"])
    train_case(tmp_path / "one", "replicated", batch=2)
    check_same(tmp_path / "two" / "replicated" / "erasers", tmp_path / "one" / "erasers")


def test_fsdp_1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version in ("1", None):
        if version is None:
            monkeypatch.delenv("FSDP_VERSION")
        else:
            monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(ValueError, match="expected FSDP version 2 .*, got 1"):
            fsdp_plugin(TrainingOptions("", Path(), Path()))
