from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

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


def test_an_unknown_concept(capsys: pytest.CaptureFixture[str]) -> None:
    text = one_line_error(capsys, "demo", "--concept", "banana")
    assert "banana" in text and "circle" in text


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "erase" in one_line_error(capsys, "erase")


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
    assert len(lines) <= 64
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
        for action in parser._actions:
            assert action.help and len(action.help.split()) >= 3, (command, action.dest)


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


def test_bench_runs_a_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "kernels", "--help"])
    assert exit_info.value.code == 0
    assert "fastunlearn.bench.kernels" in capsys.readouterr().out
