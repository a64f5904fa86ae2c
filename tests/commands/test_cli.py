from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from fastunlearn.cli import PHASES, _parser, main
from fastunlearn.ops.dispatch import OPS
from fastunlearn.training import options
from fastunlearn.training.options import TrainingOptions


def one_line_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command, which must fail with one line on stderr and no traceback."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    code = exit_info.value.code
    assert code not in (0, None)
    # A string as the exit code is what Python prints to stderr before it exits with 1.
    text = code if isinstance(code, str) else capsys.readouterr().err
    assert len(text.strip().splitlines()) == 1
    return text


def run_command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "fastunlearn", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_env_names_every_op_with_a_backend_and_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    main(["env"])
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "cpu:" in out
    for op in OPS:
        (line, *_) = (line for line in out.splitlines() if line.split()[:1] == [op])
        assert line.split()[1] == "torch"
        assert len(line.split()) > 3


def test_env_says_why_the_requested_backend_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    main(["env"])
    out = capsys.readouterr().out
    assert "FASTUNLEARN_BACKEND=triton" in out
    assert "none" in out


def test_an_option_given_twice_keeps_all_its_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    got = []
    monkeypatch.setattr("fastunlearn.training.sample.run", got.append)
    required = ["--pretrained-model-name-or-path", "x", "--output-dir", str(tmp_path)]
    for _ in range(2):  # the defaults must not keep the first call's values
        main(["sample", *required, "--erasers", "a", "--prompt", "a dog", "--erasers", "b", "--prompt", "a cat", "dog"])
    for chosen in got:
        assert chosen.prompt == ("a dog", "a cat", "dog")
        assert chosen.erasers == (Path("a"), Path("b"))
        assert chosen.eraser_scales == ()


def test_an_unknown_concept(capsys: pytest.CaptureFixture[str]) -> None:
    text = one_line_error(capsys, "demo", "--concept", "banana")
    assert "banana" in text and "circle" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prepare --num-trajectory 3", "prepare: unknown option --num-trajectory; did you mean --num-trajectories?"),
        ("prepare --num_trajectory=3", "prepare: unknown option --num-trajectory; did you mean --num-trajectories?"),
        ("train --steps 3", "train: unknown option --steps; --help lists the options"),
        ("--vresion", ": unknown option --vresion; did you mean --version?"),
        ("trian --rank 8", "got 'trian'; did you mean train?"),
        ("erase", ": command: expected one of prepare, train, evaluate, sample, demo, verify, bench, env, got 'erase'"),
        (
            "bench trafic",
            "bench: NAME: expected one of kernels, traffic, algorithms, training, recipes, got 'trafic'; did",
        ),
        ("bench kernels --rnus 3", "python -m fastunlearn.bench.kernels: unknown option --rnus; did you mean --runs?"),
        (
            "demo --concept circel",
            "--concept: expected one of circle, square, triangle, got 'circel'; did you mean circle",
        ),
        (
            "verify --dtype float16 float23",
            "--dtype: expected one of float16, bfloat16, float32, float64, got 'float23'",
        ),
        ("train --rank 3.5", "train: --rank: expected a whole number, got '3.5'"),
        ("train --eraser-scale half", "train: unknown option --eraser-scale"),
        ("evaluate --eraser-scales 1 half", "evaluate: --eraser-scales: expected a number, got 'half'"),
        ("bench kernels --runs ten", "kernels: --runs: expected a whole number, got 'ten'"),
        ("prepare --num 3", "--num could match --num-trajectories, --num-inference-steps, --num-frames"),
        ("env x", "fastunlearn env: unexpected 'x'; a value that has spaces needs quotes"),
        ("demo --seed 1 big", "fastunlearn demo: unexpected 'big'; a value that has spaces needs quotes"),
        ("demo --seed one", "fastunlearn demo: --seed: expected a whole number, got 'one'"),
    ],
)
def test_a_misspelt_command_is_one_line_with_what_may_be_meant(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in one_line_error(capsys, *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "fastunlearn [-h] [--version] command"),
        ("help", "fastunlearn [-h] [--version] command"),
        ("help train", "fastunlearn train [option ...]"),
        ("train help", "fastunlearn train [option ...]"),
        (
            "train --help",
            "They were chosen on the demo's model and tested on two others of its size, none of full size.",
        ),
        ("bench", "fastunlearn bench NAME [option ...]"),
        ("bench --help", "  traffic     bytes that the kernels move"),
        ("bench help kernels", "python -m fastunlearn.bench.kernels"),
        ("bench kernels help", "python -m fastunlearn.bench.kernels"),
        ("help bench algorithms", "python -m fastunlearn.bench.algorithms"),
        ("bench training --help", "python -m fastunlearn.bench.training"),
        ("--version", "fastunlearn 0"),
    ],
)
def test_help_and_version(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments.split())
    assert exit_info.value.code == 0
    output = capsys.readouterr()
    assert expected in output.out and output.err == ""


def test_a_word_that_is_help_is_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: --pretrained-model-name-or-path" in one_line_error(capsys, "sample", "--prompt", "help")


def test_a_device_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "verify"):
        assert "device: expected one that torch can use" in one_line_error(capsys, command, "--device", "nonsense")


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_a_device_that_training_cannot_use(
    device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastunlearn.training.cache.reader.TeacherCache.open", lambda folder: None)
    model = ("--pretrained-model-name-or-path", "model", "--cache-dir", "cache", "--output-dir", str(tmp_path))
    expected = f"device: expected one that torch can use here, got '{device}': "
    assert expected in one_line_error(capsys, "train", *model, "--device", device)


def test_help_shows_defaults_of_zero_and_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["--seed"].endswith(" (0)") and lines["--train-batch-size"].endswith(" (1)")
    assert lines["--max-grad-norm"].endswith(" (1.0)")
    assert "False" not in lines["--fsdp"] and "None" not in lines["--device"]


def test_an_output_that_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert str(tmp_path / "taken") in one_line_error(capsys, "demo", "--output", str(tmp_path / "taken"))


def test_a_missing_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fastunlearn.demo.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    text = one_line_error(capsys, "demo")
    assert "fastunlearn[train]" in text and "diffusers" in text


@pytest.mark.parametrize("command", PHASES)
def test_a_command_s_help_is_readable(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 76
    assert max(map(len, lines)) <= 132
    assert sum(line.lstrip().startswith("--") for line in lines) >= 15
    for name in ("--pretrained-model-name-or-path", "--output-dir", "--seed", "--mixed-precision"):
        assert any(line.split()[:1] == [name] for line in lines)


@pytest.mark.parametrize("command", PHASES)
def test_every_option_has_a_help_phrase_and_a_group(command: str) -> None:
    for option in fields(getattr(options, PHASES[command][0])):
        assert len(option.metadata["help"].split()) >= 3, option.name
        assert not option.metadata["help"].startswith("of "), option.name
        assert option.metadata["group"], option.name


def test_every_other_option_has_a_help_phrase() -> None:
    (subcommands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    for command, parser in subcommands.choices.items():
        shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        for action in shown:
            assert action.help and len(action.help.split()) >= 3, (command, action.dest)
        # Only the opposites of switches are hidden.
        assert {action.dest for action in parser._actions} == {action.dest for action in shown}, command


@pytest.mark.parametrize("spelling", ["--max-train-steps", "--max_train_steps"])
def test_options_may_be_spelt_as_in_diffusers_scripts(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastunlearn.training import train

    seen: list[TrainingOptions] = []
    monkeypatch.setattr(train, "run", seen.append)
    main(
        ["train", "--pretrained_model_name_or_path=a_b", "--cache_dir", "cache_dir", "--output-dir", "out"]
        + [spelling, "7", "--sequential-terms"]
    )
    (given,) = seen
    assert given == TrainingOptions("a_b", Path("cache_dir"), Path("out"), max_train_steps=7, sequential_terms=True)


def test_wrong_options_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train = ("train", "--pretrained-model-name-or-path", "model", "--output-dir", str(tmp_path / "out"))
    assert "--cache-dir" in one_line_error(capsys, *train)
    assert "rank" in one_line_error(capsys, *train, "--cache-dir", str(tmp_path), "--rank", "0")
    assert "fp15" in one_line_error(capsys, *train, "--cache-dir", str(tmp_path), "--mixed-precision", "fp15")
    assert "expected a teacher cache" in one_line_error(capsys, *train, "--cache-dir", str(tmp_path))


def test_help_of_a_benchmark_that_runs_in_the_interpreter() -> None:
    # In a process of its own: importing it chooses Triton's interpreter.
    result = run_command("bench", "traffic", "--help")
    assert result.returncode == 0
    assert "--size" in result.stdout and "forward + backward" not in result.stdout


def test_the_start_of_an_option_is_enough_where_only_one_starts_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastunlearn.training import train

    seen: list[TrainingOptions] = []
    monkeypatch.setattr(train, "run", seen.append)
    main(["train", "--pretrained", "model", "--cache", "cache", "--output", "out", "--max_train", "7"])
    assert seen == [TrainingOptions("model", Path("cache"), Path("out"), max_train_steps=7)]
