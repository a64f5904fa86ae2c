"""The READMEs are true: commands and snippets run, tables are what the commands print, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastunlearn
from fastunlearn.cli import PHASES, main
from fastunlearn.demo.prompts import write_files
from fastunlearn.demo.report import table as demo_table
from fastunlearn.demo.run import RECIPE
from fastunlearn.training import cost, example_step

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "bench/README.md", "kernels/README.md")

# Small enough for a test.
SMALL = {
    "prepare": "--num-trajectories 3 --timesteps-per-trajectory 2 --num-inference-steps 3",
    "train": "--max-train-steps 2 --rank 4",
    "evaluate": "--num-trajectories 1 --timesteps-per-trajectory 2 --num-inference-steps 3",
    "sample": "--num-inference-steps 2",
}


def blocks(language: str, heading: str, page: str = README) -> list[str]:
    """The code blocks of a language in a section."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert found, f"no ```{language} block under {heading!r}"
    return found


@pytest.mark.parametrize("block", [0, 1])
def test_the_four_commands_run(
    block: int, tiny_pipeline: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = blocks("bash", "Erase a concept from your model")[block].replace("\\\n", "").splitlines()
    model = lines[0].removeprefix("MODEL=")
    assert model == ("zai-org/CogVideoX-2b", "demo")[block]
    if model != "demo":
        model = str(tiny_pipeline("cogvideox"))
    commands = []
    for line in filter(None, lines[1:]):
        if line.startswith("printf "):
            subprocess.run(["bash", "-c", line], check=True)
            continue
        program, command, *arguments = shlex.split(line.replace("$MODEL", shlex.quote(model)))
        assert program == "fastunlearn"
        main([command, *arguments, *SMALL[command].split(), "--mixed-precision", "no"])
        commands.append(command)
    assert commands == list(PHASES)
    (erasers,) = tmp_path.glob("*trained/erasers/config.json")
    assert json.loads(erasers.read_text())["rank"] == 4
    (report,) = tmp_path.glob("*evaluation/evaluation.json")
    assert json.loads(report.read_text())["target_points"] == 2
    videos = [path.name for path in tmp_path.glob("*videos/*") if path.suffix != ".png"]
    assert len(videos) == 3 * (2, 3)[block]


def test_the_demo_s_commands_run_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, *lines = blocks("bash", "Erase a concept from your model")[2].splitlines()
    assert folder == "cd fastunlearn-demo"
    write_files(tmp_path, "circle")
    (tmp_path / "recipe.toml").write_bytes(RECIPE.read_bytes())
    monkeypatch.chdir(tmp_path)
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert program == "fastunlearn"
        main([command, *arguments, *SMALL[command].split()])
    assert json.loads((tmp_path / "my-erasers/erasers/config.json").read_text())["rank"] == 4


def test_the_drop_in_diff_is_the_example_step() -> None:
    (diff,) = blocks("diff", "Use the losses in your training loop")
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    source = Path(example_step.__file__).read_text(encoding="utf-8").splitlines()
    imports = [line for line in added if line.startswith("from ")]
    assert imports
    for line in imports:
        names: dict[str, object] = {}
        exec(line, names)  # public names, whatever way the example imports them
        assert all(getattr(fastunlearn, name) is value for name, value in names.items() if name != "__builtins__")
    changes = [line for line in added if line and line not in imports]
    assert len(changes) >= 4
    assert [line for line in changes if line not in source] == []


def test_the_example_step_trains_the_erasers_alone() -> None:
    model, erasers, losses = example_step.training_step()
    assert losses["total_loss"].isfinite()
    assert losses["total_loss"] > 0
    assert erasers
    # The first layer of a fresh eraser gets a gradient of 0, because the last one starts at 0.
    gradients = [eraser.up.weight.grad for eraser in erasers.values()]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)
    trained = {id(parameter) for eraser in erasers.values() for parameter in eraser.parameters()}
    base = [parameter for parameter in model.parameters() if id(parameter) not in trained]
    assert base
    assert all(parameter.grad is None for parameter in base)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_is_named_exists(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    modules = {name for name in re.findall(r"python -m (fastunlearn[\w.]*)", text) if not name.endswith("NAME")}
    assert modules
    for module in modules:
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None, f"there is no module {module}"
        assert '__name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8"), f"{module} is no command"
    code = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    for command in {name for part in code for name in re.findall(r"(?:^|&& )fastunlearn ([a-z]+)", part, re.MULTILINE)}:
        with pytest.raises(SystemExit) as exit_info:
            main([command, "--help"])
        assert exit_info.value.code == 0, command
        capsys.readouterr()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    folder = (ROOT / page).parent
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", (ROOT / page).read_text(encoding="utf-8"))
    for path, heading in links:
        target = folder / path if path else ROOT / page
        assert target.exists(), f"{page} links to {path}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}, heading


def test_nothing_is_left_to_fill_in() -> None:
    prose = re.sub(r"```.*?```|`[^`]*`|\[[^]]*\]\([^)]*\)", "", README, flags=re.DOTALL)
    assert re.findall(r"\b[A-Z]+_[A-Z]+\b|TODO|XXX", prose) == []


def test_the_costs_are_those_that_are_computed() -> None:
    assert f"```\n{cost.table()}\n```" in README


def test_the_demo_table_is_the_committed_result() -> None:
    expected = demo_table(json.loads((ROOT / "bench/results/demo/seed0.json").read_text()))
    first, _, _ = expected.partition("\n\n")
    assert first in README
    assert expected in (ROOT / "bench/README.md").read_text(encoding="utf-8")
