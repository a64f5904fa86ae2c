"""The demo from beginning to end: watch the frozen model, build masks, train erasers, compare before and after."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastunlearn.demo import erase, evaluate, picture
from fastunlearn.demo.model import load
from fastunlearn.demo.world import FRAMES, HEIGHT, SHAPES, WIDTH, prompt_of
from fastunlearn.files import writable, write_json
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
    """Bytes: of the device's allocator on a GPU, of the process elsewhere. None where the system does not tell."""
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

    Returns what demo.json holds. The same seed gives the same result on the same machine.

    Raises:
        ValueError: the world has no such concept, or `seed` is below 0 or too large.
        OSError: `output` cannot be written, or holds another training's checkpoints.
        MemoryError: naming the options that help `prepare` or `train`.
    """
    if concept not in SHAPES:
        raise ValueError(f"concept: expected one of {', '.join(SHAPES)}, got {concept!r}")
    writable(output)
    if found := checkpoints.existing(output):
        raise FileExistsError(f"{output} holds {found[-1].name} of a training; choose another folder")
    place = torch.device(device)
    began = time.perf_counter()
    seconds: dict[str, float] = {}

    def took(phase: str) -> None:
        seconds[phase] = round(time.perf_counter() - began - sum(seconds.values()), 1)

    parts, judge, facts = load()
    judge.to(place)
    model = parts.to(place).without_text_encoder()
    requests = erase.requests(concept, random.Random(seed))
    asking, keeping = evaluate.held_out(concept, random.Random(seed + 1))
    asked = asking + keeping
    prompts = [prompt_of(nouns) for nouns in asked]
    of_requests = [prompt for request in requests for prompt in (request.prompt, request.instead or "")]
    encoded = parts.encode_prompts(["", *of_requests, *prompts], concept)
    took("load")

    options = erase.prepare_options(concept, seed)
    halves = [[encoded[prompt_of(nouns)] for nouns in half] for half in (asking, keeping)]
    shape = model.latent_shape(HEIGHT, WIDTH, FRAMES)
    noise = torch.randn(len(asked), *shape, generator=random_generator(seed, "held out")).split(list(map(len, halves)))

    def generate(description: str, *, with_masks: bool) -> list[evaluate.Generated]:
        batches = list(zip(halves, noise, strict=True))
        return [
            evaluate.generate(model, half, encoded[""], start, options, with_masks=with_masks)
            for half, start in tqdm(batches, desc=description, unit="batch")
        ]

    before = generate("generating before", with_masks=True)
    took("before")
    with tempfile.TemporaryDirectory(dir=output, prefix="cache-") as cache:
        _prepare(model, encoded, requests, cache, options)
        took("cache")
        history = _train(model, cache, output, seed)
    took("train")
    after = generate("generating after", with_masks=False)
    on_asking, on_keeping = before
    videos = {
        when: torch.cat([half.videos for half in generated])
        for when, generated in (("before", before), ("after", after))
    }
    assert on_asking.masks is not None  # all of these prompts have the concept
    report: dict[str, Any] = {
        "concept": concept,
        "seed": seed,
        "device": str(place),
        "appearances": {when: evaluate.appearances(judge, shown, asked, concept) for when, shown in videos.items()},
        "mask_iou": evaluate.mask_overlap(judge, on_asking.masks, on_asking.videos, concept),
        "erasure_coefficient": evaluate.erasure_coefficient(
            model, [prompt for prompt, nouns in zip(halves[0], asking, strict=True) if len(nouns) == 1], on_asking.steps
        ),
        "preserved_drift": evaluate.drift(model, halves[1], on_keeping.steps),
        "videos": len(asked),
        "judge_accuracy": facts["judge_accuracy"],
    }
    took("after")
    report["seconds"] = seconds
    report["total_seconds"] = round(sum(seconds.values()), 1)
    report["peak_memory_bytes"] = peak_memory(place)
    frames = {when: model.decode(latents) for when, latents in videos.items()}
    rows = [
        picture.Row(
            prompts[index],
            frames["before"][index],
            on_asking.masks[index] if index < len(asking) else None,
            frames["after"][index],
        )
        for index in _shown(asking, keeping)
    ]
    picture.draw(rows, history, concept, output / "demo.png")
    write_json(output / "demo.json", report)
    return report


def _prepare(
    model: VideoModel,
    encoded: Mapping[str, EncodedPrompt],
    requests: Sequence[Request],
    folder: str,
    options: PrepareOptions,
) -> None:
    with tqdm(desc="caching what the frozen model says", unit="batch") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        prepare(model, encoded, requests, folder, options, progress=progress)


def _train(model: VideoModel, cache: str, output: Path, seed: int) -> list[dict[str, float]]:
    """Leaves the erasers on the model, and in `output`. Returns the metrics of every step."""
    history: list[dict[str, float]] = []
    train(
        model,
        TeacherCache.open(cache),
        output,
        erase.training_options(seed),
        targets=erase.TARGETS,
        kept=erase.KEPT,
        lr_lambda=erase.learning_rate_factor,
        on_step=lambda _, metrics: history.append(metrics),
    )
    return history


def _shown(asking: list[evaluate.Asked], keeping: list[evaluate.Asked]) -> list[int]:
    """Rows for the picture: two each of the concept alone and beside another shape, one each without the concept."""
    kinds = [frozenset(noun.shape for noun in nouns) for nouns in asking + keeping]
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    again = [index for index, kind in enumerate(kinds) if kinds[:index].count(kind) == 1 and index < len(asking)]
    return sorted(firsts + again)


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    concept = report["concept"]
    heads = {
        "asked": "asked for",
        "beside": f"beside a {concept}",
        "uninvited": "uninvited",
        "colour": "asked-for colour",
    }

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    lines = [
        f'"{concept}" erased: share of videos in which each shape appears, before -> after',
        " " * 10 + "".join(f"{head:>20}" for head in heads.values()),
    ]
    for shape, was in report["appearances"]["before"].items():
        now = report["appearances"]["after"][shape]
        cells = ["-" if was[name] is None else f"{share(was[name]):>4} -> {share(now[name]):>4}" for name in heads]
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
