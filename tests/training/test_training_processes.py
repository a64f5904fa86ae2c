"""Two processes train the same erasers as one with twice the batch size.

Each launcher starts once, because importing takes seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from training_worker import CASES, train_case

from fastunlearn import eraser_files
from fastunlearn.training import prepare, train
from fastunlearn.training.loop import measurements
from fastunlearn.training.loop.processes import connect, fsdp_plugin
from fastunlearn.training.options import PrepareOptions, TrainingOptions

WORKER = Path(__file__).parents[1] / "workers/training_worker.py"


def launch(arguments: Sequence[str]) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(WORKER.parents[1] / "helpers"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "view tensor" not in done.stderr


@pytest.fixture(scope="module")
def under_torchrun(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return made_once("torchrun", lambda output: launch([*launcher, str(WORKER), str(output), *CASES]))


def erasers(folder: Path) -> dict[str, torch.Tensor]:
    folders = sorted(path.parent for path in folder.rglob(eraser_files.CONFIG))
    return {
        f"{part.name}.{layer}.{name}": value
        for part in folders
        for layer, state in eraser_files.read(part).states.items()
        for name, value in state.items()
    }


def check_same(two: Path, one: Path, tolerance: float = 1e-4) -> None:
    got, expected = erasers(two), erasers(one)
    assert got.keys() == expected.keys() and len(got) >= 8
    largest = max(value.abs().max().item() for name, value in expected.items() if ".up." in name)
    assert largest > 1e-5
    for name, value in expected.items():
        assert (got[name] - value).abs().max().item() < tolerance * largest, name


@pytest.mark.filterwarnings("ignore:validation. expected an erasure coefficient")
@pytest.mark.parametrize("case", [case for case in CASES if case != "not-finite"])
def test_two_processes_equal_one_with_twice_the_batch_size(case: str, under_torchrun: Path, tmp_path: Path) -> None:
    train_case(tmp_path, case, batch=2, fsdp=False, gradient_checkpointing=False)
    check_same(under_torchrun / case / "erasers", tmp_path / "erasers")


@pytest.mark.filterwarnings("ignore:validation. expected an erasure coefficient")
@pytest.mark.parametrize("case", [case for case in CASES if "watched" in case])
def test_two_processes_measure_what_one_does(case: str, under_torchrun: Path, tmp_path: Path) -> None:
    train_case(tmp_path, case, batch=2, fsdp=False)
    got, expected = measurements.read(under_torchrun / case), measurements.read(tmp_path)
    assert [one.step for one in got] == [one.step for one in expected] == [0, 2, 4, 5]
    for metric in ("erasure_coefficient", "preserved_drift"):
        values = [getattr(one, metric) for one in expected]
        assert [getattr(one, metric) for one in got] == pytest.approx(values, rel=1e-3, abs=1e-5), metric
    assert (expected[-1].preserved_drift or 0) > 1e-3


def test_a_loss_that_is_not_finite_in_one_process_stops_all(under_torchrun: Path) -> None:
    folder = under_torchrun / "not-finite"
    messages = [(folder / f"stopped-{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1] and messages[0].startswith("step 2: the preservation loss is nan")
    assert not (folder / "erasers").exists()


def test_the_command_under_accelerate_launch_shards(tiny_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    """Trains from a cache on disk, in bfloat16, in which Wan keeps some parameters in float32."""
    pipeline = tiny_pipeline("wan-2.2")
    prompts = {"target": "a circle in the park\nred circle\n", "kept": "a dog on the street\n"}
    for name, text in prompts.items():
        (tmp_path / name).write_text(text)
    prepare.run(
        PrepareOptions(
            str(pipeline),
            tmp_path / "cache",
            concept="circle",
            target_prompts=tmp_path / "target",
            kept_prompts=tmp_path / "kept",
            num_trajectories=2,
            timesteps_per_trajectory=4,
            num_inference_steps=8,
            height=64,
            width=64,
            num_frames=9,
            device="cpu",
        )
    )
    paths = {"pretrained_model_name_or_path": str(pipeline), "cache_dir": str(tmp_path / "cache")}
    changes: dict[str, Any] = {
        "rank": 4,
        "max_train_steps": 3,
        "learning_rate": 0.1,
        "adam_epsilon": 1e-2,
        "lr_scheduler": "constant",
        "max_grad_norm": 0.01,
    }
    one = train.run(
        TrainingOptions(**paths, output_dir=tmp_path / "one", train_batch_size=2, device="cpu", **changes)  # type: ignore[arg-type]
    )
    given = paths | changes | {"output_dir": str(tmp_path / "two")}
    arguments = [text for name, value in given.items() for text in ("--" + name.replace("_", "-"), str(value))]
    flags = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--main_process_port", "0"]
    launch(["accelerate.commands.launch", *flags, "-m", "fastunlearn", "train", *arguments, "--gradient-checkpointing"])
    # Rounding to bfloat16 depends on the batch size. A sum in place of a mean would exceed even this tolerance.
    check_same(tmp_path / "two" / "erasers", one.erasers, tolerance=0.05)
    assert len(list((tmp_path / "two" / "erasers").glob("*/config.json"))) == 2


def test_fsdp_1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version in ("1", None):
        if version is None:
            monkeypatch.delenv("FSDP_VERSION")
        else:
            monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(ValueError, match="fsdp_version: expected FSDP version 2 .*, got 1"):
            fsdp_plugin(TrainingOptions("", Path(), Path()))


def test_processes_that_accelerate_did_not_connect_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TrainingOptions("", tmp_path, tmp_path, device="cpu")
    assert connect(options, tmp_path, cpu=True).num_processes == 1  # Accelerate keeps its first state
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="device: expected .* the 2 launched processes has, got cpu, with which Accelerate connected 1"
    ):
        connect(options, tmp_path, cpu=True)
