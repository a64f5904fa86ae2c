"""The wheel holds every package under its right name, and importing the bare source folder says what to do."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the built wheel, and with the dependencies of the present one."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy, because setuptools leaves a build folder behind, and would package files of old builds.
    source = folder / "source"
    source.mkdir()
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    files = listed.stdout.split("\0") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, ".", cwd=source)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("fastunlearn-*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    installed = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    # The .pth files in a folder that a .pth file names are not read, so an editable install there stays invisible.
    (packages,) = (environment / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_imports_in_a_clean_environment(clean_python: Path, tmp_path: Path) -> None:
    code = (
        "import fastunlearn, fastunlearn.kernels, fastunlearn.bench, fastunlearn.demo.model as demo\n"
        "import importlib.util as u, pathlib\n"
        "print(fastunlearn.__file__)\n"
        "print(pathlib.Path(fastunlearn.__file__).with_name('py.typed').exists(), demo.WEIGHTS.exists())\n"
        "def shadows(name):\n"
        "    spec = u.find_spec(name)\n"
        "    return spec is not None and 'environment' in str(spec.origin)\n"
        "print(shadows('kernels'), shadows('bench'))\n"
    )
    result = run(clean_python, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    place, shipped, shadows = result.stdout.splitlines()
    assert place.startswith(str(clean_python.parents[2]))
    assert shipped == "True True"
    assert shadows == "False False"


def test_the_wheel_has_every_module(clean_python: Path) -> None:
    (packages,) = (clean_python.parents[1] / "lib").glob("python*/site-packages")
    copy = clean_python.parents[2] / "source"
    sources = {path.relative_to(copy) for path in (copy / "fastunlearn").rglob("*.py")}
    missing = {path for path in sources if not (packages / path).exists()}
    assert sources
    assert missing == set()


def test_the_console_script_runs(clean_python: Path, tmp_path: Path) -> None:
    result = run(clean_python.with_name("fastunlearn"), "env", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "velocity_loss" in result.stdout


def test_the_source_folder_over_an_installed_wheel_says_what_to_do(clean_python: Path) -> None:
    result = run(clean_python, "-c", "import fastunlearn", cwd=ROOT)
    assert result.returncode != 0
    assert "pip install -e ." in result.stderr.splitlines()[-1]


def test_importing_needs_torch_alone() -> None:
    """Optional packages are neither imported nor needed until a function that uses them is called."""
    code = (
        "import sys\n"
        "optional = ('diffusers', 'transformers', 'accelerate', 'safetensors', 'matplotlib', 'triton', 'tqdm')\n"
        "for name in optional: sys.modules[name] = None\n"
        "import fastunlearn, fastunlearn.cli, fastunlearn.environment\n"
        "print(fastunlearn.environment.describe())\n"
    )
    result = run(sys.executable, "-c", code, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
