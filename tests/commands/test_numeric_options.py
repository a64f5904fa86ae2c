"""Every numeric option of every command takes any number, or refuses it in one line that names the option."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable
from pathlib import Path

import pytest

from fastunlearn.cli import PHASES, main
from fastunlearn.training import options as option_classes
from fastunlearn.training.options import EvaluateOptions, PrepareOptions, SampleOptions, TargetGroup, TrainingOptions

VALUES = ("-1", "0", "inf", "nan", "1e400", str(10**30), "9" * 5000, "abc", "")
SIZE = ("--height=32", "--width=32", "--num-frames=9", "--num-inference-steps=1")
CPU = ("--mixed-precision=no", "--device=cpu")
Pipelines = Callable[[str], Path]


def numeric_options() -> list[tuple[str, str]]:
    """(command, name) of every option that is a number, or a list of numbers."""
    found = []
    for command, (name, *_) in PHASES.items():
        options_class = getattr(option_classes, name)
        hints = typing.get_type_hints(options_class)
        for field in dataclasses.fields(options_class):
            hint = hints[field.name]
            members = {hint, *typing.get_args(hint)} - {bool}
            if members & {int, float}:
                found.append((command, field.name))
    return found


NUMERIC = numeric_options()


@pytest.mark.parametrize("command", PHASES)
def test_the_table_has_every_number_of_the_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = re.findall(r"^ +--([\w-]+) [NX]\b", capsys.readouterr().out, re.MULTILINE)
    assert len(shown) >= 8
    assert sorted(name.replace("-", "_") for name in shown) == sorted(name for of, name in NUMERIC if of == command)


@pytest.mark.parametrize("command", PHASES)
def test_every_number_has_a_range(command: str) -> None:
    options_class = getattr(option_classes, PHASES[command][0])
    for field in dataclasses.fields(options_class):
        if (command, field.name) in NUMERIC:
            check = field.metadata["check"]
            assert check is not None, field.name
            is_list = field.default == ()
            for value in (float("nan"), float("inf"), 10**30, -(10**30), 10**5000, "1", True):
                with pytest.raises(ValueError, match=rf"^{field.name}: expected a .*number from .* to .*, got ."):
                    check(field.name, (value,) if is_list else value)


@pytest.fixture(scope="module")
def room(tiny_pipeline: Pipelines, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A folder with prompts, a cache, and erasers."""

    def make(folder: Path) -> None:
        (folder / "target.txt").write_text("a circle\n")
        (folder / "kept.txt").write_text("a square\n")
        main([*prepare(tiny_pipeline, folder), f"--output-dir={folder / 'cache'}", *SIZE])
        main([*train(tiny_pipeline, folder), f"--output-dir={folder / 'trained'}"])

    return made_once("numeric_options", make)


def model(pipelines: Pipelines) -> str:
    return f"--pretrained-model-name-or-path={pipelines('cogvideox')}"


def prepare(pipelines: Pipelines, room: Path) -> tuple[str, ...]:
    prompts = (f"--target-prompts={room / 'target.txt'}", f"--kept-prompts={room / 'kept.txt'}")
    return ("prepare", model(pipelines), *prompts, "--concept=circle", "--num-trajectories=1", *CPU)


def train(pipelines: Pipelines, room: Path) -> tuple[str, ...]:
    return ("train", model(pipelines), f"--cache-dir={room / 'cache'}", "--rank=2", "--max-train-steps=1", *CPU)


def evaluate(pipelines: Pipelines, room: Path) -> tuple[str, ...]:
    return (
        "evaluate",
        model(pipelines),
        f"--erasers={room / 'trained/erasers'}",
        f"--cache-dir={room / 'cache'}",
        *CPU,
    )


def sample(pipelines: Pipelines, room: Path) -> tuple[str, ...]:
    erasers = f"--erasers={room / 'trained/erasers'}"
    return ("sample", model(pipelines), erasers, "--prompt=a circle", "--no-before", "--format=gif", *CPU)


COMMANDS = {"prepare": prepare, "train": train, "evaluate": evaluate, "sample": sample}


def accepted_values(command: str, name: str, refuses: Callable[..., str]) -> list[str]:
    """The values of the table that the option takes. All others must be refused in one line that names it."""
    accepted = []
    required = ("--pretrained-model-name-or-path=m", "--erasers=e", "--cache-dir=c", "--prompt=p", "--concept=c")
    known = {field.name for field in dataclasses.fields(getattr(option_classes, PHASES[command][0]))}
    given = [text for text in required if text[2:].partition("=")[0].replace("-", "_") in known]
    option = "--" + name.replace("_", "-")
    for value in VALUES:
        text = refuses(command, *given, "--output-dir=o", f"{option}={value}")
        if text is None:
            accepted.append(value)
            continue
        assert len(text.strip().splitlines()) == 1 and len(text) < 1200, (value, text[:2000])
        assert option in text or f"{name}: expected" in text, (value, text)
    return accepted


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """`refuses(*arguments)`: what the command line says against the options; None if it would run them."""
    for _, module, _ in PHASES.values():
        monkeypatch.setattr(f"{module}.run", lambda options: None)

    def call(*arguments: str) -> str | None:
        try:
            main(arguments)
        except SystemExit as end:
            assert end.code not in (0, None)
            return end.code if isinstance(end.code, str) else capsys.readouterr().err
        return None

    return call


@pytest.mark.parametrize(("command", "name"), NUMERIC, ids=lambda value: value)
def test_numbers_out_of_range_are_refused_in_one_line(command: str, name: str, refuses: Callable[..., str]) -> None:
    assert set(accepted_values(command, name, refuses)) <= {"-1", "0"}


@pytest.mark.filterwarnings("ignore:.*expected held-out")
@pytest.mark.parametrize("value", ["-1", "0"])
@pytest.mark.parametrize("command", PHASES)
def test_numbers_in_range_run(
    command: str,
    value: str,
    tiny_pipeline: Pipelines,
    room: Path,
    tmp_path: Path,
    refuses: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [name for of, name in NUMERIC if of == command and value in accepted_values(command, name, refuses)]
    monkeypatch.undo()
    assert names
    arguments = [*COMMANDS[command](tiny_pipeline, room), f"--output-dir={tmp_path / 'out'}"]
    arguments += SIZE if command in ("prepare", "sample") else ()
    main([*arguments, *(f"--{name.replace('_', '-')}={value}" for name in names)])
    assert (tmp_path / "out").is_dir()


def test_the_largest_values_that_once_crashed() -> None:
    folder = Path("folder")
    for refused, name in (
        (lambda value: PrepareOptions("model", folder, "circle", height=value), "height"),
        (lambda value: TrainingOptions("model", folder, folder, rank=value), "rank"),
        (lambda value: TrainingOptions("model", folder, folder, train_batch_size=value), "train_batch_size"),
        (lambda value: EvaluateOptions("model", (folder,), folder, cache_dir=folder, width=value), "width"),
        (lambda value: SampleOptions("model", folder, (folder,), ("a circle",), num_frames=value), "num_frames"),
    ):
        refused(2**16)  # type: ignore[no-untyped-call]
        with pytest.raises(ValueError, match=f"^{name}: expected a whole number from 1 to 65536, got 65537$"):
            refused(2**16 + 1)  # type: ignore[no-untyped-call]


def test_the_points_of_a_step_are_bounded() -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps: expected at most 1048576 points .* got 2097152"):
        TrainingOptions("", Path(), Path(), train_batch_size=2**11, gradient_accumulation_steps=2**10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias_learning_rate": -1.0}, "bias_learning_rate: expected a number from 0 to 1000, got -1.0"),
        ({"adam_epsilon": float("inf")}, "adam_epsilon: expected a number from 1e-30 to 1, got inf"),
        ({"adam_epsilon": 0.0}, "adam_epsilon: expected a number from 1e-30 to 1, got 0.0"),
        ({"adam_beta1": 1.0}, "adam_beta1: expected a number from 0 to below 1, got 1.0"),
        ({"adam_beta2": 1.5}, "adam_beta2: expected a number from 0 to 1, got 1.5"),
        ({"lr_power": -1.0}, "lr_power: expected a number from 0 to 100, got -1.0"),
        ({"rank": 2.0}, "rank: expected a whole number from 1 to 65536, got 2.0"),
        ({"rank": 10**5000}, "rank: expected a whole number from 1 to 65536, got a longer number"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as info:
        TrainingOptions("", Path(), Path(), **changes)  # type: ignore[arg-type]
    assert str(info.value) == message


def test_shares_and_scales_of_target_groups() -> None:
    for share in (0.0, -1.0, float("inf"), float("nan"), 1e30):
        with pytest.raises(ValueError, match="share: expected a number from 1e-06 to 1e"):
            TargetGroup(share=share)
    with pytest.raises(ValueError, match="guidance_scale: expected a number from -1000 to 1000, got nan"):
        TargetGroup(guidance_scale=float("nan"))


@pytest.mark.parametrize("value", VALUES)
def test_the_demo_s_seed(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if value == "0":
        return
    with pytest.raises(SystemExit) as info:
        main(["demo", f"--output={tmp_path / 'out'}", f"--seed={value}"])
    text = info.value.code if isinstance(info.value.code, str) else capsys.readouterr().err
    assert len(text.strip().splitlines()) == 1 and len(text) < 1200
    assert "seed" in text
