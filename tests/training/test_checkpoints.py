from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import options_for, tiny_cache, tiny_model, weights

from fastunlearn import eraser_files, files, load_erasers
from fastunlearn.files import remove_folder
from fastunlearn.training.loop import checkpoints, record
from fastunlearn.training.loop.terms import Terms
from fastunlearn.training.loop.trainer import TrainingSummary
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import TargetGroup
from fastunlearn.training.train import run, train


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
        {"dtype": torch.float16, "unlearning_weight": 1e5},
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
    killed_at(files.shutil, "rmtree", 3)
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


def write_checkpoint(folder: Path, step: int, limit: int | None = None) -> Path:
    """Writes a checkpoint of erasers for a model with two experts, whatever the model may be."""

    def save_erasers(erasers: Path) -> None:
        for expert in ("transformer", "transformer_2"):
            states = {"layer": {name: torch.full((1,), float(step)) for name in eraser_files.PARAMETERS}}
            eraser_files.write(erasers, expert, states, {"rank": 1, "backbone": "wan"})

    return checkpoints.write(folder, step, save_erasers, {"step": step}, {}, limit)


def test_find_latest(tmp_path: Path) -> None:
    assert checkpoints.find(tmp_path / "nowhere", "latest") is None
    for step in (9, 10):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-12").write_text("a file")
    for name in ("checkpoint-11.partial", "checkpoint-x", "old-checkpoint-12"):
        (tmp_path / name).mkdir()
    assert checkpoints.find(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert checkpoints.find(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    assert checkpoints.find(Path("elsewhere"), str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    with pytest.raises(FileNotFoundError, match="the name of a checkpoint in .*, got 'checkpoint-12'"):
        checkpoints.find(tmp_path, "checkpoint-12")


@pytest.mark.parametrize(
    ("removed", "lacks"),
    [
        (checkpoints.METADATA, "checkpoint.json"),
        (checkpoints.STATE, "training_state.pt"),
        ("erasers/transformer/config.json", "erasers/transformer"),
        ("erasers/transformer_2/erasers-*.safetensors", "erasers/transformer_2"),
    ],
)
def test_latest_skips_incomplete_checkpoints_with_a_warning(removed: str, lacks: str, tmp_path: Path) -> None:
    first, second = write_checkpoint(tmp_path, 8), write_checkpoint(tmp_path, 10)
    for folder in (second, first):
        (file,) = folder.glob(removed)
        file.unlink()
        if folder == second:
            with pytest.warns(UserWarning, match=f"going on from .*checkpoint-8, because checkpoint-10 lacks {lacks}$"):
                assert checkpoints.find(tmp_path, "latest") == first
    with pytest.raises(FileNotFoundError, match=f"got none: checkpoint-10 lacks {lacks}; checkpoint-8 lacks {lacks}"):
        checkpoints.find(tmp_path, "latest")


def test_a_checkpoint_whose_folder_was_emptied_is_skipped(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3)
    (tmp_path / "checkpoint-4" / "erasers").mkdir(parents=True)
    match = "checkpoint-4 lacks checkpoint.json, training_state.pt, erasers$"
    with pytest.warns(UserWarning, match=match):
        assert checkpoints.find(tmp_path, "latest") == path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("situation", ["oldest", "replaced", "stale"])
def test_a_kill_at_any_call_to_the_system_leaves_only_complete_checkpoints(situation: str, tmp_path: Path) -> None:
    """Each run is killed one call later, while it writes a checkpoint and removes the oldest or a former one."""
    functions = ("rename", "replace", "rmdir", "unlink", "mkdir")  # all that change a folder
    kills = 0
    while True:
        folder = tmp_path / str(kills)
        folder.mkdir()
        for step in (1, 2):
            write_checkpoint(folder, step)
        if situation == "stale":
            write_checkpoint(folder, 3).rename(folder / "checkpoint-3.partial")

        def work(folder: Path = folder, last: int = kills) -> None:
            calls = 0

            def kill_at_last(original: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **keywords: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls > last:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*args, **keywords)

                return call

            for name in functions:
                setattr(os, name, kill_at_last(getattr(os, name)))
            write_checkpoint(folder, 2 if situation == "replaced" else 3, 1)

        status = _forked(work)
        latest = checkpoints.find(folder, "latest")
        assert latest is not None
        for path in checkpoints.existing(folder):
            assert checkpoints.read(path).state["step"] == int(path.name.removeprefix("checkpoint-"))
            for expert in ("transformer", "transformer_2"):
                assert eraser_files.read(path / "erasers" / expert).rank == 1
        write_checkpoint(folder, 4, 1)
        assert names(folder) == {"checkpoint-4"}
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
    assert kills > 15


def test_a_folder_is_renamed_before_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        remove_folder(tmp_path / "folder")
    assert names(tmp_path) == {"folder.removed.partial"}
    shutil.rmtree(tmp_path / "folder.removed.partial")
    with pytest.raises(FileNotFoundError):
        remove_folder(tmp_path / "folder")


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
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    match = "holds checkpoint-6 of an earlier run; go on from it with resume_from_checkpoint latest, choose another"
    with pytest.raises(FileExistsError, match=match):
        trained(tmp_path)
    for path in checkpoints.existing(tmp_path):
        shutil.rmtree(path)
    with pytest.raises(
        FileExistsError, match="output_dir: .*erasers holds those of an earlier run; choose another outp"
    ):
        trained(tmp_path)
    match = "holds those of an earlier run with other settings and no checkpoint to resume; choose"
    for changes in ({"seed": 1}, {"max_train_steps": 5}):
        with pytest.raises(FileExistsError, match=match):
            trained(tmp_path, resume_from_checkpoint="latest", **changes)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}.items() <= before.items()


def test_a_finished_run_without_checkpoints_may_be_repeated_by_latest(tmp_path: Path) -> None:
    """So a program that goes on from the latest checkpoint, if any, can be run again after its training is done."""
    changes = {"resume_from_checkpoint": "latest", "checkpointing_steps": 100}
    trained(tmp_path, **changes)
    before = eraser_files_in(tmp_path)
    assert len(trained(tmp_path, **changes).steps) == 6
    assert eraser_files_in(tmp_path) == before
    (tmp_path / "erasers" / record.RECORD).unlink()  # as erasers of earlier versions have none
    with pytest.raises(FileExistsError, match="with other settings and no checkpoint"):
        trained(tmp_path, **changes)


def test_overwriting_starts_anew(tmp_path: Path) -> None:
    fresh = trained(tmp_path / "fresh", seed=1, max_train_steps=3)
    output = tmp_path / "output"
    trained(output)
    (output / "notes.txt").write_text("kept")
    again = trained(output, seed=1, max_train_steps=3, overwrite_output_dir=True)
    assert [step for step, _ in again.steps] == [1, 2, 3]
    assert names(output) == {"checkpoint-2", "erasers", "notes.txt"}
    assert eraser_files_in(output) == eraser_files_in(tmp_path / "fresh")
    assert again.steps == fresh.steps
    with pytest.raises(
        ValueError, match="overwrite_output_dir: expected no resume_from_checkpoint beside it, got 'late"
    ):
        options_for(output, overwrite_output_dir=True, resume_from_checkpoint="latest")


def test_an_earlier_run_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "erasers").mkdir()
    with pytest.raises(FileExistsError, match="output_dir: expected a folder without trained erasers"):
        run(options_for(tmp_path))


def test_trained_erasers_have_a_record(tmp_path: Path) -> None:
    trained(tmp_path)
    found = record.read(tmp_path / "erasers")
    assert found is not None and found.settings == checkpoints.read(tmp_path / "checkpoint-6").settings
    assert found.seed is None and found.prompts == {record.prompt_digest(prompt) for prompt in ("a circle", "a square")}
    assert record.prompt_digest(" A  circle") == record.prompt_digest("a circle") != record.prompt_digest("a circles")
    assert record.read(tmp_path / "checkpoint-2" / "erasers") is not None
    tiny_erasers().save_erasers(tmp_path / "erasers")  # others
    with pytest.warns(
        UserWarning, match="erasers: expected the erasers that training.json describes, got others: a save"
    ):
        assert record.read(tmp_path / "erasers") is None
    path = tmp_path / "checkpoint-2" / "erasers" / record.RECORD
    content = json.loads(path.read_text())
    for damage in ({"settings": 1}, {"cache": []}, {"cache": {"prompts_sha256": "abc"}}):
        path.write_text(json.dumps(content | damage))
        with pytest.raises(ValueError, match="training.json: expected settings and a cache, got others"):
            record.read(path.parent)


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
    with pytest.raises(ValueError, match=r"targets was \[.*0.0.*\] and is \[.*2.0"):
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
        ("erasers/*.safetensors", "remove", FileNotFoundError, "is damaged: .*safetensors is missing"),
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
        trained(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_other_formats_and_versions_are_refused(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, 3, lambda folder: folder.mkdir(), {}, {})
    metadata = json.loads((path / checkpoints.METADATA).read_text())
    for change, match in (
        ({"format": "x"}, "expected the metadata of a checkpoint"),
        ({"format_version": 2}, "expected format_version 1, got 2"),
        ({"step": -1}, "expected a number of steps"),
        ({"step": True}, "expected a number of steps.*got True"),
        ({"step": 3.0}, "expected a number of steps"),
        ({"step": None}, "expected a number of steps"),
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


def _with_moment(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def change_state(state: dict[str, Any]) -> None:
        moments = state["optimizers"][0]["state"][0]
        moments[name] = change(moments.get(name))

    return change_state


HOSTILE_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shape": (_with_moment("exp_avg", lambda x: x[:1]), r"exp_avg: expected shape \(4, \d+\) of .*float32, got \(1,"),
    "huge": (
        _with_moment("exp_avg", lambda x: x[0, 0].expand(2**31, 2**31)),
        r"expected a file as torch.save writes it, got \d+ bytes that claim to hold \d+$",
    ),
    "dtype": (_with_moment("exp_avg", lambda x: x.double()), "exp_avg: expected .*float32, got .*float64"),
    "no tensor": (_with_moment("step", lambda x: 6), r"step: expected shape \(\) .*, got 6"),
    "NaN": (_with_moment("exp_avg", lambda x: x * float("nan")), "exp_avg: expected finite values"),
    "negative": (_with_moment("exp_avg_sq", lambda x: -1 - x), "exp_avg_sq: expected finite values that an optimizer"),
    "steps below 0": (_with_moment("step", lambda x: -x), "step: expected finite values"),
    "more": (_with_moment("extra", lambda x: 1), "state: expected step, exp_avg, exp_avg_sq of parameter 0, got"),
    "other number": (
        lambda state: state["optimizers"][0]["state"].update({99: {}}),
        "state: expected a parameter.s number, got 99",
    ),
    "no state": (lambda state: state["optimizers"][0].pop("state"), "optimizers: expected the state of an optimizer"),
    "groups": (lambda state: state["optimizers"][0]["param_groups"].pop(), "optimizers: expected the state of an opti"),
    "group of text": (lambda state: state["optimizers"][0].update(param_groups="ab"), "optimizers: expected the state"),
    "no optimizers": (lambda state: state.pop("optimizers"), "optimizers: expected the states of 1, got another"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    trained(output, checkpointing_steps=6)
    return output / "checkpoint-6"


@pytest.mark.parametrize("case", HOSTILE_STATES)
def test_a_hostile_state_is_refused(case: str, finished: Path, tmp_path: Path) -> None:
    change, match = HOSTILE_STATES[case]
    checkpoint = checkpoints.read(finished)
    change(checkpoint.state)
    checkpoints.write(
        tmp_path, 6, lambda folder: tiny_erasers().save_erasers(folder), checkpoint.state, checkpoint.settings
    )
    with pytest.raises(ValueError, match=f"checkpoint-6/training_state.pt: {match}"):
        trained(tmp_path, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    "scaler", [None, {}, {"scale": 0.0, "_growth_tracker": 1}, {"scale": float("inf"), "_growth_tracker": 1}]
)
def test_a_hostile_loss_scale_is_refused(scaler: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"dtype": torch.float16, "max_train_steps": 1, "checkpointing_steps": 1}
    trained(tmp_path, **changes)
    checkpoint = checkpoints.read(tmp_path / "checkpoint-1")
    state = checkpoint.state | {"scaler": scaler}
    checkpoints.write(tmp_path, 1, lambda folder: tiny_erasers().save_erasers(folder), state, checkpoint.settings)
    with pytest.raises(ValueError, match="checkpoint-1/training_state.pt: scaler: expected a loss scale and a number"):
        trained(tmp_path, resume_from_checkpoint="latest", **changes)


def test_hyperparameters_in_a_state_are_not_used(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", max_train_steps=7)
    path = tmp_path / "whole" / "checkpoint-6"
    checkpoint = checkpoints.read(path)
    checkpoint.state["optimizers"][0]["param_groups"][0].update(betas=(0.0, "x"), eps=-1.0, weight_decay=9e9)
    changed = checkpoints.write(
        tmp_path,
        6,
        lambda folder: shutil.copytree(path / "erasers", folder) and None,
        checkpoint.state,
        checkpoint.settings,
    )
    resumed = trained(tmp_path / "resumed", max_train_steps=7, resume_from_checkpoint=str(changed))
    expected = weights(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.model).items())


@pytest.mark.parametrize("kind", ["pickle", "compressed"])
def test_a_state_that_may_state_any_size_is_not_loaded(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    """An old-style file of torch, or a compressed archive, allocates what it states before that can be checked."""
    path = write_checkpoint(tmp_path, 1)
    state = path / checkpoints.STATE
    if kind == "pickle":
        torch.save({"x": torch.zeros(1)}, state, _use_new_zipfile_serialization=False)
    else:
        torch.save({"x": torch.zeros(100_000)}, state)
        with zipfile.ZipFile(state) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(state, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    metadata = json.loads((path / checkpoints.METADATA).read_text())
    metadata["sha256"] = hashlib.sha256(state.read_bytes()).hexdigest()
    (path / checkpoints.METADATA).write_text(json.dumps(metadata))
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"training_state.pt: expected .*(BadZipFile|bytes that claim to hold)"):
        checkpoints.read(path)


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


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("name", ["erasers", "erasers/transformer", "erasers/transformer_2"])
def test_trained_erasers_are_not_written_through_a_link(name: str, experts: int, tmp_path: Path) -> None:
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "output"
    elsewhere.mkdir()
    (output / name).parent.mkdir(parents=True)
    (output / name).symlink_to(elsewhere)
    with pytest.raises(FileExistsError, match=f"{name}: expected a folder, got a symbolic link; nothing is written"):
        trained(output, experts=experts, overwrite_output_dir=True)
    assert not list(elsewhere.iterdir()) and not checkpoints.existing(output)  # refused before training


def test_saved_erasers_of_two_transformers_are_not_written_through_a_link(tmp_path: Path) -> None:
    model = tiny_model("wan", experts=2)
    model.attach_erasers(rank=4)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "erasers").mkdir()
    (tmp_path / "erasers" / "transformer_2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="transformer_2: expected a folder, got a symbolic link"):
        model.save_erasers(tmp_path / "erasers")
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "chosen").symlink_to(tmp_path / "elsewhere")  # the user's own choice is followed
    model.save_erasers(tmp_path / "chosen")
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"transformer", "transformer_2"}


@pytest.mark.parametrize(
    "name", ["checkpoint-1", "checkpoint-2", "checkpoint-1.partial", "checkpoint-7.removed.partial"]
)
@pytest.mark.parametrize("leads_to", ["a folder", "nowhere", "a file"])
def test_linked_checkpoints_are_deleted_as_links(name: str, leads_to: str, tmp_path: Path) -> None:
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "output"
    output.mkdir()
    if leads_to == "a folder":
        elsewhere.mkdir()
        (elsewhere / "mine").write_text("mine")
    elif leads_to == "a file":
        elsewhere.write_text("mine")
    (output / name).symlink_to(elsewhere)
    for step in (1, 2, 3):
        write_checkpoint(output, step, limit=2)
        assert not (output / f"checkpoint-{step}").is_symlink()
    assert names(output) == {"checkpoint-2", "checkpoint-3"}
    if leads_to == "a folder":
        assert [path.name for path in elsewhere.iterdir()] == ["mine"]
    elif leads_to == "a file":
        assert elsewhere.read_text() == "mine"


def test_a_state_whose_tensors_repeat_a_few_bytes_is_refused(tmp_path: Path) -> None:
    """Copied into an optimizer's state, they would take all the memory there is."""
    path = write_checkpoint(tmp_path, 1)
    torch.save({"state": [{"exp_avg": torch.zeros(1).expand(1 << 40)}]}, path / checkpoints.STATE)
    metadata = json.loads((path / checkpoints.METADATA).read_text())
    metadata["sha256"] = hashlib.sha256((path / checkpoints.STATE).read_bytes()).hexdigest()
    (path / checkpoints.METADATA).write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=rf"training_state.pt: expected a file .* claim to hold {4 << 40}$"):
        checkpoints.read(path)
