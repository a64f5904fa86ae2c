"""The commands whose files are mutated: what each reads, what it writes, and what counts as its result."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZE = ("--height", "32", "--width", "32", "--num-frames", "9")
CPU = ("--mixed-precision", "no", "--device", "cpu")
FEW = ("--num-trajectories", "2", "--timesteps-per-trajectory", "2", "--num-inference-steps", "2")
MEASURED = (
    *("erasure_coefficient", "preserved_drift", "localization", "mask_share", "frozen_drift"),
    *("target_points", "kept_points", "by_timestep", "by_timesteps", "by_prompt"),
)
Result = dict[str, str]  # what it is -> a digest of it


@dataclass(frozen=True)
class Case:
    """A command, and the files that it reads.

    Attributes:
        name: for the table.
        arguments: the command line, relative to the world's folder.
        inputs: the folders and files that it reads; all of them are mutated.
        own: those of the inputs, as prefixes, that the user makes: another content is another input.
        outputs: what it may write.
        result: what must not differ unnoticed.
        run: what runs instead of the command line.
    """

    name: str
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    own: tuple[str, ...]
    outputs: tuple[str, ...]
    result: Callable[[Path], Result]
    prepare: Callable[[], None] = lambda: None


def files_in(*places: Path) -> list[Path]:
    """All files in folders, and files themselves, sorted."""
    return sorted(
        file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()
    )


def digests(*folders: str) -> Callable[[Path], Result]:
    """The result is the content of every file in these folders."""

    def result(world: Path) -> Result:
        files = files_in(*(world / folder for folder in folders))
        return {str(file.relative_to(world)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    return result


def measured(folder: str) -> Callable[[Path], Result]:
    """The result is the numbers in evaluation.json."""

    def result(world: Path) -> Result:
        content = json.loads((world / folder / "evaluation.json").read_bytes())
        return {name: json.dumps(content[name]) for name in MEASURED}

    return result


def tensors_of(folder: str) -> Callable[[Path], Result]:
    """The result is the tensors in the safetensors files, whatever the JSON beside them says of paths."""
    return lambda world: {
        name: digest for name, digest in digests(folder)(world).items() if name.endswith(".safetensors")
    }


def _prepare(pipeline: str, *data: str, output: str = "out") -> tuple[str, ...]:
    model = ("--pretrained-model-name-or-path", pipeline, "--output-dir", output, "--concept", "circle")
    return ("prepare", *model, *data, *FEW, *SIZE, *CPU)


def _train(pipeline: str, cache: str, output: str, steps: int, *more: str) -> tuple[str, ...]:
    folders = ("--pretrained-model-name-or-path", pipeline, "--cache-dir", cache, "--output-dir", output)
    return ("train", *folders, "--rank", "2", "--max-train-steps", str(steps), "--learning-rate", "0.1", *CPU, *more)


PROMPTS = ("--target-prompts", "target.txt", "--kept-prompts", "kept.txt")


def _evaluate(pipeline: str, erasers: str, output: str, *more: str) -> tuple[str, ...]:
    folders = ("--pretrained-model-name-or-path", pipeline, "--erasers", erasers, "--output-dir", output)
    return ("evaluate", *folders, *more, *FEW, *SIZE, *CPU)


def _sample(pipeline: str, erasers: str, output: str, *more: str) -> tuple[str, ...]:
    folders = ("--pretrained-model-name-or-path", pipeline, "--erasers", erasers, "--output-dir", output)
    return ("sample", *folders, "--format", "gif", "--num-inference-steps", "2", *SIZE, *CPU, *more)


def _load_demo_weights() -> None:
    """Lets `fastunlearn demo` end after it has read the weights in `demo/weights.safetensors`."""
    from fastunlearn.demo import model, report, run

    model.WEIGHTS = Path("demo/weights.safetensors")

    def run_briefly(concept: str, output: Path, *_: Any) -> dict[str, Any]:
        text_to_video, judge, record = model.load(model.WEIGHTS)
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
        for module in (text_to_video, judge):
            for tensor in module.state_dict().values():
                digest.update(tensor.numpy().tobytes())
        output.mkdir()
        (output / "weights").write_text(digest.hexdigest())
        return {}

    run.run, report.table = run_briefly, str


ERASED = "trained/erasers"
CASES = (
    *(
        Case(
            f"prepare {pipeline}",
            _prepare(pipeline, *PROMPTS),
            (pipeline, "target.txt", "kept.txt"),
            (pipeline, "target.txt", "kept.txt"),
            ("out",),
            tensors_of("out"),
        )
        for pipeline in ("cogvideox", "hunyuan_video", "wan-2.2")
    ),
    Case(
        "prepare with the demo's model",
        (*_prepare("little.safetensors", *PROMPTS), "--height", "16", "--width", "24", "--num-frames", "3"),
        ("little.safetensors",),
        ("little.safetensors",),
        ("out",),
        tensors_of("out"),
    ),
    Case(
        "prepare --estimate",
        (*_prepare("wan-2.2", *PROMPTS), "--estimate"),
        ("wan-2.2", "target.txt", "kept.txt"),
        ("wan-2.2", "target.txt", "kept.txt"),
        ("out",),
        digests("out"),
    ),
    Case("prepare --data", _prepare("cogvideox", "--data", "data"), ("data",), ("data",), ("out",), tensors_of("out")),
    Case(
        "prepare, resumed",
        _prepare("cogvideox", *PROMPTS, output="unfinished"),
        ("unfinished",),
        (),
        ("unfinished",),
        digests("unfinished"),
    ),
    Case(
        "prepare, finished",
        _prepare("cogvideox", *PROMPTS, output="cache"),
        ("cache",),
        (),
        ("cache",),
        digests("cache"),
    ),
    *(
        Case(
            f"train {pipeline}",
            _train(pipeline, f"cache{suffix}", "out", 2),
            (f"cache{suffix}", f"{pipeline}/transformer"),
            (pipeline,),
            ("out",),
            tensors_of("out/erasers"),
        )
        for pipeline, suffix in (("cogvideox", ""), ("wan-2.2", "-of-two"))
    ),
    Case(
        "train, resumed",
        _train("cogvideox", "cache", "trained", 2, "--resume-from-checkpoint", "latest"),
        ("trained",),
        (),
        ("trained",),
        tensors_of("trained/erasers"),
    ),
    Case(
        "train, resumed, muon",
        _train("cogvideox", "cache", "muon", 2, "--optimizer", "muon", "--resume-from-checkpoint", "checkpoint-1"),
        ("muon/checkpoint-1",),
        (),
        ("muon",),
        tensors_of("muon/erasers"),
    ),
    Case(
        "evaluate",
        _evaluate("wan-2.2", "erasers-of-two", "out", "--cache-dir", "cache-of-two"),
        ("erasers-of-two", "cache-of-two"),
        (),
        ("out",),
        measured("out"),
    ),
    Case(
        "evaluate, again",
        _evaluate("cogvideox", ERASED, "evaluation", *PROMPTS, "--concept", "circle"),
        ("evaluation", "target.txt", "kept.txt"),
        ("target.txt", "kept.txt"),
        ("evaluation",),
        measured("evaluation"),
    ),
    Case(
        "sample",
        _sample("cogvideox", ERASED, "out", "--prompts", "target.txt"),
        ("cogvideox", ERASED, "target.txt"),
        ("cogvideox", "target.txt"),
        ("out",),
        digests("out"),
    ),
    Case(
        "sample, again",
        _sample("cogvideox", ERASED, "videos", "--prompt", "a circle", "--overwrite-output-dir"),
        ("videos",),
        (),
        ("videos",),
        digests("videos"),
    ),
    Case(
        "sample, erasers as published",
        _sample("cogvideox", "published", "out", "--prompt", "a circle", "--no-before"),
        ("published",),
        ("published",),  # this format has no checksums
        ("out",),
        digests("out"),
    ),
    Case(
        "demo",
        ("demo", "--output", "out"),
        ("demo",),
        (),
        ("out",),
        digests("out"),
        _load_demo_weights,
    ),
)


def make_world(world: Path, call: Callable[[Sequence[str]], None]) -> None:
    """Makes all files that the cases read, in `world`, which is the working directory; `call` runs a command."""
    import torch

    from fastunlearn.demo.judge import Judge
    from fastunlearn.demo.model import WEIGHTS, TextToVideo, save
    from fastunlearn.eraser_files import UPSTREAM_CONFIG, UPSTREAM_WEIGHTS
    from fastunlearn.testing.tiny_pipelines import save_tiny_pipeline
    from fastunlearn.training.data.videos import write_video

    for pipeline in ("cogvideox", "hunyuan_video", "wan-2.2"):
        save_tiny_pipeline(pipeline, world / pipeline)
    (world / "target.txt").write_text("a red circle in the street\na circle\ta square\n")
    (world / "kept.txt").write_text("a square\n# a remark\na red square in the street\n")
    (world / "demo").mkdir()
    shutil.copy(WEIGHTS, world / "demo/weights.safetensors")
    save(TextToVideo(), Judge(), {}, world / "little.safetensors")
    call(_prepare("cogvideox", *PROMPTS, output="cache"))
    call(_prepare("wan-2.2", *PROMPTS, output="cache-of-two"))
    _make_data(world, write_video)
    _interrupt(world / "cache", world / "unfinished")
    call(_train("cogvideox", "cache", "trained", 2, "--checkpointing-steps", "1"))
    shutil.rmtree(world / "trained/checkpoint-2")
    call(_train("cogvideox", "cache", "muon", 2, "--checkpointing-steps", "1", "--optimizer", "muon"))
    shutil.rmtree(world / "muon/checkpoint-2")
    call(_train("wan-2.2", "cache-of-two", "trained-of-two", 2))
    shutil.copytree(world / "trained-of-two/erasers", world / "erasers-of-two")
    call(_evaluate("cogvideox", ERASED, "evaluation", *PROMPTS, "--concept", "circle"))
    call(_sample("cogvideox", ERASED, "videos", "--prompt", "a circle"))
    published = world / "published"
    published.mkdir()
    torch.save(_as_published(world / ERASED), published / UPSTREAM_WEIGHTS)
    (published / UPSTREAM_CONFIG).write_text(json.dumps({"eraser_type": "adapter", "eraser_rank": 2}))


def _make_data(world: Path, write_video: Callable[..., None]) -> None:
    import safetensors.torch
    import torch

    data = world / "data"
    data.mkdir()
    generator = torch.Generator().manual_seed(0)
    latents = safetensors.torch.load_file(files_in(world / "cache")[-1])["x_t"][0]
    safetensors.torch.save_file({"latents": latents}, data / "latents.safetensors")
    for name in ("video.mp4", "picture.gif"):
        write_video(data / name, torch.rand(9, 3, 32, 32, generator=generator), 8)
    for name, prompt in (("latents", "a circle"), ("video", "a square"), ("picture", "a red circle")):
        (data / f"{name}.txt").write_text(prompt)


def _interrupt(cache: Path, unfinished: Path) -> None:
    """Copies a finished cache as it was just before its last shard was written."""
    from fastunlearn.training.cache.index import sealed

    shutil.copytree(cache, unfinished)
    files_in(unfinished)[-1].unlink()
    index = json.loads((unfinished / "index.json").read_bytes())
    del index["shards"]
    index["finished"] = False
    (unfinished / "index.json").write_text(json.dumps(sealed(index), indent=1, allow_nan=False) + "\n")


def _as_published(erasers: Path) -> dict[str, dict[str, Any]]:
    from fastunlearn.eraser_files import read

    return {f"{layer}.adapter": dict(state) for layer, state in read(erasers).states.items()}


if sys.platform == "win32":
    raise ImportError("mutations need fork")
