"""Runs the demo: generates videos, prepares a cache, trains erasers, and generates the same videos again."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastunlearn.demo import erase, evaluate, picture
from fastunlearn.demo.judge import Judge
from fastunlearn.demo.model import load
from fastunlearn.demo.world import FRAMES, HEIGHT, SHAPES, WIDTH, Nouns, prompt_of
from fastunlearn.devices import round_buffers, usable_device
from fastunlearn.files import read_json, refuse_links, writable, write_json
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.requests import Request
from fastunlearn.training.loop import checkpoints
from fastunlearn.training.model.text import EncodedPrompt
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import PrepareOptions
from fastunlearn.training.prepare import prepare
from fastunlearn.training.random_numbers import random_generator
from fastunlearn.training.train import train


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


def run(concept: str, output: Path, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Erases `concept` from the demo's model and writes demo.json, demo.png and the erasers to `output`.

    Returns:
        The content of demo.json. The same seed gives the same result on the same machine.

    Raises:
        ValueError: the world has no such concept, the device cannot be used, or `seed` is negative or too large.
        OSError: `output` cannot be written, or holds another run.
        MemoryError: memory ran out; the message names the options of `prepare` or `train` that would help.
    """
    if concept not in SHAPES:
        raise ValueError(f"concept: expected one of {', '.join(SHAPES)}, got {concept!r}")
    torch_device = usable_device(device)
    output = writable(output)
    refuse_links(output, checkpoints.ERASERS)
    if earlier := checkpoints.existing(output):
        raise FileExistsError(
            f"output: expected a folder without checkpoints, got {output} with {earlier[-1].name}; choose another one"
        )
    run_of = {"concept": concept, "seed": seed, "device": str(torch_device)}
    _refuse_another_demo(output, run_of)
    stopwatch = _Stopwatch()
    setup = _set_up(concept, seed, torch_device)
    stopwatch.end_phase("load")
    options = erase.prepare_options(concept, seed)
    before = _generate(setup, options, "generating before", with_masks=True)
    stopwatch.end_phase("before")
    with tempfile.TemporaryDirectory(dir=output, prefix="cache-") as cache:
        _prepare(setup, cache, options)
        stopwatch.end_phase("cache")
        history = _train(setup.model, cache, output, seed)
    stopwatch.end_phase("train")
    after = _generate(setup, options, "generating after", with_masks=False)
    report = run_of | _measure(setup, concept, before, after)
    stopwatch.end_phase("after")
    report["seconds"] = stopwatch.seconds
    report["total_seconds"] = round(sum(stopwatch.seconds.values()), 1)
    report["peak_memory_bytes"] = peak_memory(torch_device)
    picture.draw(_picture_rows(setup, before, after), history, concept, output / "demo.png")
    write_json(output / "demo.json", report)
    return report


def _refuse_another_demo(output: Path, run_of: dict[str, Any]) -> None:
    """Raises FileExistsError if the folder holds the report of another run. The same run may be repeated."""
    path = output / "demo.json"
    if not path.exists():
        return
    try:
        report = read_json(path)
    except ValueError:
        report = {}
    before = {name: report.get(name) for name in run_of}
    if before != run_of:
        raise FileExistsError(
            f"output: expected a new folder, or the demo of {run_of}, got {path} of {before}; choose another folder"
        )


class _Stopwatch:
    """Measures how long each phase takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def end_phase(self, name: str) -> None:
        self.seconds[name] = round(time.perf_counter() - self._start - sum(self.seconds.values()), 1)


@dataclass(frozen=True)
class _Setup:
    """The trained model and judge, the training trajectories, and the held-out prompts to generate videos for."""

    model: VideoModel
    judge: Judge
    judge_accuracy: float
    requests: list[Request]
    encoded: dict[str, EncodedPrompt]
    with_concept: list[Nouns]
    without_concept: list[Nouns]
    noise: tuple[Tensor, ...]  # for the held-out prompts with the concept, and for those without

    @property
    def held_out(self) -> list[Nouns]:
        """All held-out prompts; those with the concept come first."""
        return self.with_concept + self.without_concept

    def encode(self, held_out: Sequence[Nouns]) -> list[EncodedPrompt]:
        return [self.encoded[prompt_of(nouns)] for nouns in held_out]


def _set_up(concept: str, seed: int, device: torch.device) -> _Setup:
    text_to_video, judge, training_record = load()
    judge.to(device)
    round_buffers([text_to_video], device)
    model = text_to_video.to(device).without_text_encoder()
    requests = erase.requests(concept, random.Random(seed))
    with_concept, without_concept = evaluate.held_out(concept, random.Random(seed + 1))
    held_out = with_concept + without_concept
    prompts = [prompt for request in requests for prompt in (request.prompt, request.instead or "")]
    prompts += [prompt_of(nouns) for nouns in held_out]
    noise = torch.randn(
        len(held_out), *model.latent_shape(HEIGHT, WIDTH, FRAMES), generator=random_generator(seed, "held out")
    )
    return _Setup(
        model=model,
        judge=judge,
        judge_accuracy=training_record["judge_accuracy"],
        requests=requests,
        encoded=text_to_video.encode_prompts(["", *prompts], concept),
        with_concept=with_concept,
        without_concept=without_concept,
        noise=noise.split([len(with_concept), len(without_concept)]),
    )


def _generate(
    setup: _Setup, options: PrepareOptions, description: str, *, with_masks: bool
) -> tuple[evaluate.Generated, evaluate.Generated]:
    """Generates the held-out videos: those with the concept in their prompts, and the others."""
    batches = list(zip((setup.with_concept, setup.without_concept), setup.noise, strict=True))
    with_concept, without_concept = (
        evaluate.generate(setup.model, setup.encode(held_out), setup.encoded[""], noise, options, with_masks=with_masks)
        for held_out, noise in tqdm(batches, desc=description, unit="batch")
    )
    return with_concept, without_concept


def _prepare(setup: _Setup, folder: str, options: PrepareOptions) -> None:
    with tqdm(desc="running the frozen model", unit="batch") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        prepare(setup.model, setup.encoded, setup.requests, folder, options, progress=progress)


def _train(model: VideoModel, cache: str, output: Path, seed: int) -> list[dict[str, float]]:
    """Trains erasers, which stay on the model, and writes them to `output`. Returns the metrics of every step."""
    history: list[dict[str, float]] = []
    train(
        model,
        TeacherCache.open(cache),
        output,
        # There is no checkpoint, but "latest" lets the same demo run again in its folder.
        replace(erase.training_options(seed), resume_from_checkpoint="latest"),
        targets=erase.TARGETS,
        kept=erase.KEPT,
        lr_lambda=erase.learning_rate_factor,
        on_step=lambda _, metrics: history.append(metrics),
    )
    return history


def _measure(
    setup: _Setup, concept: str, before: Sequence[evaluate.Generated], after: Sequence[evaluate.Generated]
) -> dict[str, Any]:
    """The results in the report."""
    frozen, frozen_kept = before
    assert frozen.masks is not None  # all of these prompts contain the concept
    concept_alone = setup.encode([nouns for nouns in setup.with_concept if len(nouns) == 1])
    return {
        "appearances": {
            when: evaluate.appearances(setup.judge, _videos(generated), setup.held_out, concept)
            for when, generated in (("before", before), ("after", after))
        },
        "mask_iou": evaluate.mask_overlap(setup.judge, frozen.masks, frozen.videos, concept),
        "erasure_coefficient": evaluate.erasure_coefficient(setup.model, concept_alone, frozen.steps),
        "preserved_drift": evaluate.drift(setup.model, setup.encode(setup.without_concept), frozen_kept.steps),
        "videos": len(setup.held_out),
        "judge_accuracy": setup.judge_accuracy,
    }


def _videos(generated: Sequence[evaluate.Generated]) -> Tensor:
    return torch.cat([batch.videos for batch in generated])


def _picture_rows(
    setup: _Setup, before: Sequence[evaluate.Generated], after: Sequence[evaluate.Generated]
) -> list[picture.Row]:
    """Two rows for each combination of shapes that has the concept, and one for each that does not."""
    shapes = [frozenset(noun.shape for noun in nouns) for nouns in setup.held_out]
    with_concept = len(setup.with_concept)
    first_of_kind = [shapes.index(kind) for kind in dict.fromkeys(shapes)]
    second_of_kind = [index for index, kind in enumerate(shapes[:with_concept]) if shapes[:index].count(kind) == 1]
    frames_before, frames_after = (setup.model.decode(_videos(generated)) for generated in (before, after))
    masks = before[0].masks
    return [
        picture.Row(
            prompt_of(setup.held_out[index]),
            frames_before[index],
            masks[index] if masks is not None and index < with_concept else None,
            frames_after[index],
        )
        for index in sorted(first_of_kind + second_of_kind)
    ]


def table(report: dict[str, Any]) -> str:
    """Returns the report as text."""
    concept = report["concept"]
    columns = {
        "asked": "asked for",
        "beside": f"beside a {concept}",
        "uninvited": "uninvited",
        "colour": "asked-for colour",
    }

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    lines = [
        f'"{concept}" erased: share of videos in which each shape appears, before -> after',
        " " * 10 + "".join(f"{head:>20}" for head in columns.values()),
    ]
    for shape, was in report["appearances"]["before"].items():
        now = report["appearances"]["after"][shape]
        cells = [
            "-" if was[name] is None else f"{percent(was[name]):>4} -> {percent(now[name]):>4}" for name in columns
        ]
        lines.append(f"{shape:<10}" + "".join(f"{cell:>20}" for cell in cells))
    memory = report["peak_memory_bytes"]
    seconds = ", ".join(f"{phase} {value:.0f}" for phase, value in report["seconds"].items())
    lines += [
        "",
        f"mask against the {concept} (mean IoU)        {report['mask_iou']:.2f}",
        f"erasure coefficient of the velocity     1.00 -> {report['erasure_coefficient']:.2f}",
        f"drift of the velocity on kept prompts   {report['preserved_drift']:.3f}",
        f"judge's accuracy on held-out renders    {report['judge_accuracy']:.1%}",
        f"time                                    {report['total_seconds']:.0f} s ({seconds})",
        f"peak memory                             {'unknown' if memory is None else f'{memory / 2**20:.0f} MiB'}",
    ]
    return "\n".join(lines)
