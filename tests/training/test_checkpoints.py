from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import options_for, tiny_cache, tiny_model, weights

from fastunlearn import eraser_files, load_erasers
from fastunlearn.training.loop import checkpoints
from fastunlearn.training.loop.terms import Terms
from fastunlearn.training.loop.trainer import TrainingSummary
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import TargetGroup
from fastunlearn.training.train import train


def trained(output: Path, *, experts: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Trained:
    """Trains a tiny model for 6 steps with a checkpoint every 2."""
    keywords = {name: changes.pop(name) for name in ("targets", "lr_lambda") if name in changes}
    family = "cogvideox" if experts == 1 else "wan"
    model = tiny_model(family, dtype, experts)
    options = options_for(output, **{"max_train_steps": 6, "checkpointing_steps": 2} | changes)
    steps: list[tuple[int, float]] = []
    summary = train(
        model,
        tiny_cache(tiny_model(family, experts=experts)),  # type: ignore[arg-type]
        output,
        options,
        on_step=lambda step, metrics: steps.append((step, metrics["loss"])),
        **keywords,
    )
    return Trained(model, summary, steps)


class Trained:
    def __init__(self, model: VideoModel, summary: TrainingSummary, steps: list[tuple[int, float]]) -> None:
        self.model, self.summary, self.steps = model, summary, steps


def eraser_files_in(output: Path) -> dict[str, bytes]:
    """The content of every file of the trained erasers."""
    files = [path for path in (output / "erasers").rglob("*") if path.is_file()]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon", "gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"experts": 2},
        {"dtype": torch.float16},
        # Two steps before the checkpoint are skipped, so that the loss scale in it differs from the initial one.
        {"dtype": torch.float16, "unlearning_weight": 3e3},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", **changes)
    assert names(tmp_path / "whole") == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "erasers"}
    if "unlearning_weight" in changes:
        assert checkpoints.read(tmp_path / "whole" / "checkpoint-2").state["scaler"]["scale"] == 2.0**14
    for step in (2, 4):
        output = tmp_path / str(step)
        output.mkdir()
        start = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = trained(output, resume_from_checkpoint=str(start), **changes)
        assert eraser_files_in(output) == eraser_files_in(tmp_path / "whole") != {}
        assert resumed.steps == whole.steps[step:] and resumed.summary.resumed_from == start
        last = "checkpoint-6"
        assert checkpoints.read(output / last).settings == checkpoints.read(tmp_path / "whole" / last).settings
        state = (output / last / checkpoints.STATE).read_bytes()
        assert state == (tmp_path / "whole" / last / checkpoints.STATE).read_bytes()


def _forked(work: Callable[[], None], seconds: float | None = None) -> int:
    """Runs `work` in a child process, killed after `seconds` if given; returns its exit status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Uses one thread, because a forked child has one, and the number of threads changes how sums are rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_any_moment_can_be_resumed(tmp_path: Path) -> None:
    """SIGKILL comes in a step, at each file, before the folder is renamed, and while old folders are removed."""
    changes: dict[str, Any] = {"max_train_steps": 12, "checkpoints_total_limit": 2}
    trained(tmp_path / "whole", **changes)
    output = tmp_path / "killed"
    output.mkdir()

    def killed_at(owner: Any, function: str, call: int) -> None:
        def work() -> None:
            original, calls = getattr(owner, function), 0

            def count_and_kill(*args: Any, **keywords: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **keywords)

            setattr(owner, function, count_and_kill)
            trained(output, resume_from_checkpoint="latest", **changes)

        assert os.WTERMSIG(_forked(work)) == signal.SIGKILL, (function, call)

    killed_at(Terms, "preservation_loss", 2)
    assert names(output) == set()
    killed_at(checkpoints, "replace_file", 1)  # the state, after the erasers
    assert names(output) == {"checkpoint-2.partial"}
    killed_at(Terms, "preservation_loss", 4)
    assert names(output) == {"checkpoint-2"}
    killed_at(eraser_files, "replace_file", 2)
    assert names(output) == {"checkpoint-2", "checkpoint-4.partial"}
    killed_at(checkpoints, "replace_file", 4)  # the metadata of the second
    assert names(output) == {"checkpoint-2", "checkpoint-4", "checkpoint-6.partial"}
    killed_at(checkpoints.os, "fsync", 6)
    killed_at(checkpoints.shutil, "rmtree", 3)
    for seconds in (0.15, 0.3, 0.1):
        _forked(lambda: trained(output, resume_from_checkpoint="latest", **changes) and None, seconds)
        for path in checkpoints.existing(output):
            checkpoints.read(path)
            load_erasers(tiny_model().experts[0], path / "erasers")
    trained(output, resume_from_checkpoint="latest", **changes)
    assert eraser_files_in(output) == eraser_files_in(tmp_path / "whole")
    assert names(output) == {"checkpoint-10", "checkpoint-12", "erasers"}


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trained(tmp_path, max_train_steps=11, checkpointing_steps=1, checkpoints_total_limit=3)
    assert names(tmp_path) == {"checkpoint-9", "checkpoint-10", "checkpoint-11", "erasers"}


def test_later_checkpoints_do_not_count_when_going_back(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "checkpoint-6" / checkpoints.STATE).write_bytes(b"")  # a damaged checkpoint is a reason to go back
    with pytest.raises(ValueError, match="checkpoint-6 is damaged"):
        trained(tmp_path, resume_from_checkpoint="latest")
    changes = {"resume_from_checkpoint": "checkpoint-4", "checkpoints_total_limit": 1, "checkpointing_steps": 1}
    trained(tmp_path, max_train_steps=5, **changes)
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-6", "erasers"}
    again = trained(tmp_path, **changes | {"resume_from_checkpoint": "checkpoint-5"})
    assert [step for step, _ in again.steps] == [6]
    assert names(tmp_path) == {"checkpoint-6", "erasers"}


def test_find_latest(tmp_path: Path) -> None:
    assert checkpoints.find(tmp_path / "nowhere", "latest") is None
    (tmp_path / "checkpoint-12").write_text("a file")
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.partial", "checkpoint-x", "old-checkpoint-12"):
        (tmp_path / name).mkdir()
    assert checkpoints.find(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert checkpoints.find(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    assert checkpoints.find(Path("elsewhere"), str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    with pytest.raises(FileNotFoundError, match="the name of a checkpoint in .*, got checkpoint-12"):
        checkpoints.find(tmp_path, "checkpoint-12")


def test_latest_without_checkpoints_starts_a_new_run(tmp_path: Path) -> None:
    fresh = trained(tmp_path / "1", resume_from_checkpoint="latest")
    assert fresh.summary.resumed_from is None and [step for step, _ in fresh.steps] == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_takes_no_steps(tmp_path: Path) -> None:
    trained(tmp_path)
    before = eraser_files_in(tmp_path)
    again = trained(tmp_path, resume_from_checkpoint="latest")
    assert again.steps == [] and again.summary.metrics == {} and again.summary.steps == 6
    assert eraser_files_in(tmp_path) == before


def test_a_folder_with_another_run_is_not_overwritten(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match="holds checkpoint-6 of an earlier run; go on from it with resume_from_check"):
        trained(tmp_path)


def test_going_back_to_an_earlier_checkpoint_writes_the_later_ones_again(tmp_path: Path) -> None:
    trained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    resumed = trained(tmp_path, resume_from_checkpoint="checkpoint-2")
    assert [step for step, _ in resumed.steps] == [3, 4, 5, 6]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_changed_settings_are_listed(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError) as raised:
        trained(tmp_path, resume_from_checkpoint="latest", learning_rate=0.5, seed=3, train_batch_size=2)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'checkpoint-6'} belongs to another run: ")
    for change in ("learning_rate was 0.001 and is 0.5", "seed was 0 and is 3", "points a step was 1 and is 2"):
        assert change in message
    assert "rank" not in message
    with pytest.raises(ValueError, match=r"targets was \[.*7.5.*\] and is \[.*2.0"):
        trained(tmp_path, resume_from_checkpoint="latest", targets=[TargetGroup(guidance_scale=2.0)])
    settings = checkpoints.read(tmp_path / "checkpoint-6").settings
    checkpoint = checkpoints.Checkpoint(tmp_path, 6, settings, {})
    with pytest.raises(ValueError, match="cache was '000.*' and is 'other'"):
        checkpoints.check_same_run(checkpoint, settings | {"cache": "other"})


def test_settings_that_may_change_on_resume(tmp_path: Path) -> None:
    """These are how a step is computed and divided into batches, how checkpoints are kept, and the number of steps."""
    whole = trained(tmp_path / "whole", max_train_steps=8, train_batch_size=2)
    trained(tmp_path / "cut", max_train_steps=4, train_batch_size=2)
    resumed = trained(
        tmp_path / "cut",
        max_train_steps=8,
        resume_from_checkpoint="latest",
        train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        sequential_terms=True,
        checkpointing_steps=3,
        checkpoints_total_limit=1,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=0,
    )
    assert resumed.summary.steps == 8 and [loss for _, loss in resumed.steps] == pytest.approx(
        [loss for _, loss in whole.steps[4:]], rel=1e-4
    )
    with pytest.raises(ValueError, match="max_train_steps: .*checkpoint-6 has had 6 steps already, got 5"):
        trained(tmp_path / "cut", max_train_steps=5, resume_from_checkpoint="latest", train_batch_size=2)


def test_a_schedule_may_change_only_for_future_steps(tmp_path: Path) -> None:
    trained(tmp_path, lr_lambda=lambda step: 1.0 if step < 6 else 0.5)
    longer = trained(tmp_path, lr_lambda=lambda step: 1.0, max_train_steps=8, resume_from_checkpoint="latest")
    assert [step for step, _ in longer.steps] == [7, 8]
    linear = tmp_path / "linear"
    trained(linear, lr_scheduler="linear", lr_warmup_steps=0)
    with pytest.raises(ValueError, match=r"learning rates so far \(lr_scheduler, lr_warmup_steps, max_train_steps\)"):
        trained(
            linear, lr_scheduler="linear", lr_warmup_steps=0, max_train_steps=8, resume_from_checkpoint="checkpoint-4"
        )


@pytest.mark.parametrize(
    ("file", "damage", "error", "match"),
    [
        (checkpoints.STATE, "truncate", ValueError, "is damaged: training_state.pt does not have the checksum"),
        (checkpoints.STATE, "remove", FileNotFoundError, "is incomplete: training_state.pt is missing"),
        (
            checkpoints.METADATA,
            "truncate",
            ValueError,
            "is damaged or of another version: .*checkpoint.json: not valid JSON",
        ),
        (checkpoints.METADATA, "remove", FileNotFoundError, "is incomplete: checkpoint.json is missing"),
        ("erasers/config.json", "remove", FileNotFoundError, "is damaged: .*config.json"),
        ("erasers/*.safetensors", "truncate", ValueError, "is damaged: .*safetensors: expected the checksum"),
    ],
)
def test_a_damaged_checkpoint_is_an_error(
    file: str, damage: str, error: type[Exception], match: str, tmp_path: Path
) -> None:
    trained(tmp_path)
    (path,) = (tmp_path / "checkpoint-6").glob(file)
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(error, match=f"checkpoint .*checkpoint-6 {match}"):
        trained(tmp_path, resume_from_checkpoint="latest")


def test_other_formats_and_versions_are_refused(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, 3, lambda folder: folder.mkdir(), {}, {})
    metadata = json.loads((path / checkpoints.METADATA).read_text())
    for change, match in (
        ({"format": "x"}, "expected the metadata of a checkpoint"),
        ({"format_version": 2}, "expected format_version 1, got 2"),
        ({"step": -1}, "expected a number of steps"),
        ({"settings": []}, "an object as 'settings'"),
    ):
        (path / checkpoints.METADATA).write_text(json.dumps(metadata | change))
        with pytest.raises(ValueError, match=match):
            checkpoints.read(path)


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = checkpoints.write(tmp_path, 3, lambda folder: folder.mkdir(), {"optimizers": _Malicious()}, {})
    with pytest.raises(ValueError, match="training_state.pt: expected a readable file of tensors alone"):
        checkpoints.read(path)
    assert not Path("pwned").exists()


def test_the_state_of_other_optimizers_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    checkpoint = checkpoints.read(tmp_path / "checkpoint-6")
    for state in ({}, {"optimizers": [], "scaler": {}}, {"optimizers": [{"state": {}}], "scaler": {}}):
        checkpoints.write(
            tmp_path, 6, lambda folder: tiny_erasers().save_erasers(folder), state, checkpoint.settings, None
        )
        with pytest.raises(ValueError, match="checkpoint-6/training_state.pt: "):
            trained(tmp_path, resume_from_checkpoint="latest")


def test_a_state_of_other_shapes_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    checkpoint = checkpoints.read(tmp_path / "checkpoint-6")
    moments = checkpoint.state["optimizers"][0]["state"][0]
    moments["exp_avg"] = moments["exp_avg"][:1]
    checkpoints.write(
        tmp_path, 6, lambda folder: tiny_erasers().save_erasers(folder), checkpoint.state, checkpoint.settings
    )
    with pytest.raises(ValueError, match=r"training_state.pt: exp_avg: expected shape \(4, \d+\), got \(1,"):
        trained(tmp_path, resume_from_checkpoint="latest")


def test_a_huge_step_is_refused_before_learning_rates_are_computed(tmp_path: Path) -> None:
    trained(tmp_path)
    metadata = tmp_path / "checkpoint-6" / checkpoints.METADATA
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"step": 10**15}))
    with pytest.raises(ValueError, match="max_train_steps: .*has had 1000000000000000 steps already, got 6"):
        trained(tmp_path, resume_from_checkpoint="latest")


def tiny_erasers() -> VideoModel:
    model = tiny_model()
    model.attach_erasers(rank=4)
    return model


def test_a_full_disk_does_not_damage_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole")
    real, calls = checkpoints.replace_file, 0

    def full(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    output = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "replace_file", full)
        with pytest.raises(OSError, match=r"checkpoint-4 cannot be written \(No space left on device\)") as raised:
            trained(output)
    assert raised.value.errno == errno.ENOSPC
    assert names(output) == {"checkpoint-2"}
    resumed = trained(output, resume_from_checkpoint="latest")
    assert eraser_files_in(output) == eraser_files_in(tmp_path / "whole")
    assert weights(resumed.model).keys() == weights(whole.model).keys()
