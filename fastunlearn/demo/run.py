"""The demo from beginning to end: watch the frozen model, build masks, train erasers, compare before and after."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastunlearn.demo import erase, evaluate, picture
from fastunlearn.demo.model import load
from fastunlearn.demo.sampling import sample, starting_noise
from fastunlearn.demo.world import SHAPES, prompt_of
from fastunlearn.erasers import save_erasers


def writable(folder: Path) -> None:
    """Makes `folder`, and raises an OSError now rather than after minutes of work if nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


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
        ValueError: the world has no such concept.
        OSError: `output` cannot be written.
    """
    if concept not in SHAPES:
        raise ValueError(f"concept: expected one of {', '.join(SHAPES)}, got {concept!r}")
    writable(output)
    place = torch.device(device)
    began = time.perf_counter()
    seconds: dict[str, float] = {}

    def took(phase: str) -> None:
        seconds[phase] = round(time.perf_counter() - began - sum(seconds.values()), 1)

    model, judge, facts = load()
    model.to(place)
    judge.to(place)
    draw = random.Random(seed)

    def noise(count: int, part: int) -> torch.Tensor:
        return starting_noise(count, seed * 100 + part).to(place)

    took("load")
    with tqdm(total=5, desc="1/4 caching what the frozen model says", unit="batch") as bar:
        targets: list[erase.Cache] = []
        for alone, following in ((True, erase.ALONE_TRAJECTORIES), (False, erase.BESIDE_TRAJECTORIES)):
            caches = []
            for leading, count in ((True, erase.LEADING_TRAJECTORIES), (False, following)):
                batch = noise(count, 10 + bar.n)
                caches.append(erase.target_cache(model, concept, batch, draw, alone=alone, leading=leading))
                bar.update()
            targets.append(erase.Cache.joined(caches))
        kept = erase.kept_cache(model, concept, noise(erase.KEPT_TRAJECTORIES, 2), draw)
        bar.update()
    took("cache")

    asking, keeping = evaluate.requests(concept, random.Random(seed + 1))
    requests = asking + keeping
    prompts = [prompt_of(nouns) for nouns in requests]
    asking_prompts, keeping_prompts = prompts[: len(asking)], prompts[len(asking) :]
    start = noise(len(requests), 3)
    with tqdm(total=2, desc="2/4 generating before", unit="batch") as bar:
        on_asking = sample(model, asking_prompts, start[: len(asking)], concept=concept)
        bar.update()
        on_keeping = sample(model, keeping_prompts, start[len(asking) :])
        bar.update()
    before = torch.cat([on_asking.videos, on_keeping.videos])
    took("before")

    with tqdm(total=erase.STEPS, desc="3/4 training erasers", unit="step") as bar:
        history = []
        for losses in erase.train_erasers(model, targets[0], targets[1], kept, seed):
            history.append(losses)
            bar.set_postfix(loss=f"{losses['total_loss']:.4f}", refresh=False)
            bar.update()
    save_erasers(model.transformer, output / "erasers", concept=concept)
    took("train")

    with tqdm(total=2, desc="4/4 generating after", unit="batch") as bar:
        videos = []
        for some, noises in ((asking_prompts, start[: len(asking)]), (keeping_prompts, start[len(asking) :])):
            videos.append(sample(model, some, noises).videos)
            bar.update()
    after = torch.cat(videos)
    alone_prompts = [prompt for prompt, nouns in zip(prompts, asking, strict=False) if len(nouns) == 1]
    report: dict[str, Any] = {
        "concept": concept,
        "seed": seed,
        "device": str(place),
        "appearances": {
            "before": evaluate.appearances(judge, before, requests, concept),
            "after": evaluate.appearances(judge, after, requests, concept),
        },
        "mask_iou": evaluate.mask_overlap(judge, on_asking.masks, on_asking.videos, concept),
        "erasure_coefficient": evaluate.erasure_coefficient(model, alone_prompts, on_asking.steps),
        "preserved_drift": evaluate.drift(model, keeping_prompts, on_keeping.steps),
        "videos": len(requests),
        "judge_accuracy": facts["judge_accuracy"],
    }
    took("after")
    report["seconds"] = seconds
    report["total_seconds"] = round(sum(seconds.values()), 1)
    report["peak_memory_bytes"] = peak_memory(place)
    rows = [
        picture.Row(
            prompts[index],
            before[index],
            on_asking.masks[index] if index < len(asking) else None,
            after[index],
        )
        for index in _shown(asking, keeping)
    ]
    picture.draw(rows, history, concept, output / "demo.png")
    beside = output / "demo.json.partial"
    beside.write_text(json.dumps(report, indent=2) + "\n")
    beside.replace(output / "demo.json")
    return report


def _shown(asking: list[evaluate.Request], keeping: list[evaluate.Request]) -> list[int]:
    """Rows for the picture: the concept alone, beside each other shape, then the others alone and together."""
    requests = asking + keeping
    kinds = [frozenset(noun.shape for noun in nouns) for nouns in requests]
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
