"""Runs the demo: `prepare`, `train` and `evaluate` on the little model, between the same videos before and after.

Nothing here erases: the three commands do, with the settings of a recipe. The demo writes the prompt files as a user
would, has videos judged, and draws.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastunlearn.demo import picture, prompts, report
from fastunlearn.demo.model import WEIGHTS
from fastunlearn.demo.videos import Generated, Studio, open_studio
from fastunlearn.demo.world import SHAPES, prompt_of
from fastunlearn.devices import usable_device
from fastunlearn.files import expand_home, read_json, refuse_links, remove_folder, replace_file, writable, write_json
from fastunlearn.training import evaluate, prepare, train
from fastunlearn.training.cache.changes import changes
from fastunlearn.training.data.recipe import read_recipe, with_recipe
from fastunlearn.training.loop import measurements
from fastunlearn.training.loop.checkpoints import ERASERS
from fastunlearn.training.model.demo_model import NAME
from fastunlearn.training.option_fields import is_seed
from fastunlearn.training.options import EvaluateOptions, PrepareOptions, TrainingOptions

RECIPE = Path(__file__).with_name("recipe.toml")
REPORT, RECIPE_COPY = "demo.json", "recipe.toml"
CACHE, TRAINED, EVALUATION = "cache", "trained", "evaluation"


def run(concept: str, output: Path, seed: int = 0, device: str = "cpu", recipe: Path = RECIPE) -> dict[str, Any]:
    """Erases `concept` from the demo's model.

    Writes demo.json, demo.png and demo.gif to `output`, and beside them what the commands read and write: the recipe,
    the prompt files, the cache, the erasers and their evaluation.

    Args:
        concept: the shape to erase.
        output: a new folder, or that of the same demo, which is then made anew.
        seed: the seed of the training data, of training, and of the judged videos.
        device: a torch device.
        recipe: the settings of `prepare` and `train`. The prompt files that it names are those that the demo writes.

    Returns:
        The content of demo.json. The same seed gives the same result on the same machine.

    Raises:
        ValueError: the world has no such concept, the device cannot be used, `seed` is negative or too large, or the
            recipe is not one.
        OSError: `output` cannot be written, or holds something else; or the recipe cannot be read.
        MemoryError: memory ran out; the message names the options of `prepare` or `train` that would help.
    """
    if concept not in SHAPES:
        raise ValueError(f"concept: expected one of {', '.join(SHAPES)}, got {concept!r}")
    is_seed("seed", seed)
    torch_device = usable_device(device)
    recipe = expand_home(recipe)
    read_recipe(recipe)  # raises before anything is written
    settings = recipe.read_bytes()
    output = writable(output)
    run_of = {
        "concept": concept,
        "seed": seed,
        "device": str(torch_device),
        "recipe": {"name": recipe.name, "sha256": hashlib.sha256(settings).hexdigest()},
    }
    _begin(output, run_of)
    replace_file(output / RECIPE_COPY, settings)
    prompts.write_files(output, concept)
    commands = _commands(output, concept, seed, str(torch_device))
    stopwatch = _Stopwatch()
    studio = open_studio(concept, seed, torch_device)
    sampling = commands["prepare"].options
    before = studio.generate(sampling, "generating before", with_masks=True)
    stopwatch.end_phase("before")
    results = {}
    for name, module in (("prepare", prepare), ("train", train), ("evaluate", evaluate)):
        print(f"\n$ {commands[name].line}")
        results[name] = module.run(commands[name].options)
        stopwatch.end_phase(name)
    studio.model.load_erasers(output / TRAINED / ERASERS)
    after = studio.generate(sampling, "generating after", with_masks=False)
    content = run_of | report.measure(studio, concept, before, after)
    content |= {name: results["evaluate"][name] for name in ("erasure_coefficient", "preserved_drift")}
    stopwatch.end_phase("after")
    content["seconds"] = stopwatch.seconds
    content["total_seconds"] = round(sum(stopwatch.seconds.values()), 1)
    content["peak_memory_bytes"] = peak_memory(torch_device)
    rows = _picture_rows(studio, content, before, after)
    picture.draw_picture(rows, measurements.read(output / TRAINED), concept, output / "demo.png")
    picture.draw_animation(rows, concept, output / "demo.gif")
    write_json(output / REPORT, content)
    return content


def peak_memory(device: torch.device) -> int | None:
    """Returns the peak memory in bytes: allocated on a CUDA device, else resident in the process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _begin(output: Path, run_of: dict[str, Any]) -> None:
    """Makes a folder that of this demo: empties it of an earlier run of the same one, and refuses all others."""
    refuse_links(output, CACHE, TRAINED, EVALUATION)
    path = output / REPORT
    if path.exists():
        try:
            found = read_json(path)
        except ValueError:
            found = {}
        others = list(changes({name: found.get(name) for name in run_of}, run_of))
        is_unfinished = found.keys() == run_of.keys()
        if others and not is_unfinished:
            raise FileExistsError(
                f"output: expected a new folder, or that of the same demo, got {path} of another (there -> now: "
                f"{'; '.join(others)}); choose another folder"
            )
    else:
        concept = run_of["concept"]
        files = [*prompts.training_files(concept), *prompts.held_out_files(concept), RECIPE_COPY]
        taken = [name for name in (CACHE, TRAINED, EVALUATION, *files) if os.path.lexists(output / name)]
        if taken:
            raise FileExistsError(
                f"output: expected a new folder, got {output} with {taken[0]} that is not of a demo; choose another one"
            )
    write_json(path, run_of)
    for name in (CACHE, TRAINED, EVALUATION):
        if (output / name).exists():
            remove_folder(output / name)


class _Command(NamedTuple):
    """A command's options, and the line that a user would type for them."""

    options: Any
    line: str


def _commands(output: Path, concept: str, seed: int, device: str) -> dict[str, _Command]:
    """The commands that erase. Whatever is not given here comes from the recipe, or is a default."""
    # A folder of that name would be taken for a pipeline.
    model = str(WEIGHTS) if os.path.isdir(NAME) else NAME
    everywhere: dict[str, Any] = {"pretrained_model_name_or_path": model, "device": device, "seed": seed}
    recipe = output / RECIPE_COPY
    preparing = everywhere | {"concept": concept, "recipe": recipe, "output_dir": output / CACHE}
    training = everywhere | {"recipe": recipe, "cache_dir": output / CACHE, "output_dir": output / TRAINED}
    prepare_options = with_recipe(PrepareOptions, **preparing)
    held_out = prompts.held_out_files(concept)
    target_file, kept_file = held_out
    evaluating = everywhere | {
        "erasers": (output / TRAINED / ERASERS,),
        "concept": concept,
        "target_prompts": output / target_file,
        "kept_prompts": output / kept_file,
        "output_dir": output / EVALUATION,
        "num_trajectories": len(held_out[target_file]),
        "num_inference_steps": prepare_options.num_inference_steps,
        "batch_size": prepare_options.batch_size,
        "mixed_precision": prepare_options.mixed_precision,
        "seed": (seed + 1000) % 2**32,
    }
    return {
        "prepare": _Command(prepare_options, _line("prepare", preparing)),
        "train": _Command(with_recipe(TrainingOptions, **training), _line("train", training)),
        "evaluate": _Command(EvaluateOptions(**evaluating), _line("evaluate", evaluating)),
    }


def _line(command: str, given: dict[str, Any]) -> str:
    words = ["fastunlearn", command]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


class _Stopwatch:
    """Measures how long each phase takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def end_phase(self, name: str) -> None:
        self.seconds[name] = round(time.perf_counter() - self._start - sum(self.seconds.values()), 1)


def _picture_rows(studio: Studio, content: dict[str, Any], before: Generated, after: Generated) -> list[picture.Row]:
    """A row for each headline, with the first of its videos."""
    shapes = [prompts.kinds_in(nouns) for nouns in studio.prompts]
    assert before.masks is not None
    frames_before, frames_after = (studio.model.decode(generated.videos) for generated in (before, after))
    rows = []
    for asked, subject, was, now in report.headlines(content):
        index = shapes.index(asked)
        rows.append(
            picture.Row(
                subject,
                f"{report.percent(was)} → {report.percent(now)}",
                0 if was is None else was["videos"],
                subject == content["concept"],
                prompt_of(studio.prompts[index]),
                frames_before[index],
                before.masks[index] if index < studio.with_concept else None,
                frames_after[index],
            )
        )
    return rows
