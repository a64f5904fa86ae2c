"""Erases a concept from a saved pipeline and shows a video before and after: the whole way, as a program to read.

    python -m fastunlearn.training.example PIPELINE OUTPUT

PIPELINE is a folder or a name on the Hub, of CogVideoX, HunyuanVideo or Wan. To erase something else, change the
constants. `fastunlearn prepare`, `train` and `sample` do the same with all options, on many processes if need be.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.requests import Request
from fastunlearn.training.data.videos import write_strip, write_video
from fastunlearn.training.model.erased import without_erasers
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.options import PrepareOptions, TrainingOptions
from fastunlearn.training.prepare import prepare
from fastunlearn.training.sample import video
from fastunlearn.training.train import train

CONCEPT = "dog"
# Short prompts and long ones, as users write them. Each has the concept, a word of its own, in it.
TARGET_PROMPTS = [
    "a dog",
    "a small dog running on the beach",
    "A big brown dog is walking on the street, slowly, past parked cars and people with umbrellas, in soft rain.",
]
# What is to stay as it is: what the concept is most easily confused with, and anything else.
KEPT_PROMPTS = ["a cat", "a person walking in the park", "A yellow car stands in front of an old church at sunrise."]
SEED = 1000  # of the videos before and after; none that the erasers are trained at has it


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it; what it writes is in the folder OUTPUT."""
    parser = argparse.ArgumentParser(prog="python -m fastunlearn.training.example", description=__doc__.split(":")[0])
    parser.add_argument("pipeline", help="a folder, or a name on the Hub")
    parser.add_argument("output", type=Path, help="folder for the cache, the erasers and the videos")
    parser.add_argument("--trajectories", type=int, default=32, help="sampled for either list (default: %(default)s)")
    parser.add_argument("--sampling-steps", type=int, default=50, help="of each (default: %(default)s)")
    parser.add_argument("--training-steps", type=int, default=500, help="of the erasers (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=128, help="of the erasers (default: %(default)s)")
    for name in ("height", "width", "num-frames"):
        parser.add_argument(f"--{name}", type=int, help="of the videos (default: the pipeline's)")
    given = parser.parse_args(arguments)
    path, output, steps = given.pipeline, given.output, given.sampling_steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    # The text encoder is gone again when this returns; what follows needs its results alone. "" is no prompt.
    encoded = encode_prompts(path, ["", *TARGET_PROMPTS, *KEPT_PROMPTS], CONCEPT, dtype=dtype, device=device)
    model = load_model(path, dtype=dtype, device=device, vae=True)
    defaults = model.defaults
    size = defaults.size(given.height, given.width, given.num_frames)

    # 1. Ask the frozen model, once: at points of trajectories, what it says with the prompt and without, and where it
    #    looks for the concept. The prompts take turns.
    requests = []
    for number in range(given.trajectories):
        requests.append(Request(TARGET_PROMPTS[number % len(TARGET_PROMPTS)], group="target"))
        requests.append(Request(KEPT_PROMPTS[number % len(KEPT_PROMPTS)], group="kept"))
    preparing = PrepareOptions(path, output / "cache", CONCEPT, num_inference_steps=steps, **size._asdict())
    prepare(model, encoded, requests, output / "cache", preparing)

    # 2. Train the erasers: away from the concept where it is, and nothing else. They are saved in OUTPUT/erasers, for
    #    fastunlearn.load_erasers. Run again after a crash, this goes on from the last checkpoint, and 1. where it was.
    training = TrainingOptions(
        path,
        output / "cache",
        output,
        rank=given.rank,
        max_train_steps=given.training_steps,
        gradient_checkpointing=True,
        resume_from_checkpoint="latest",
    )
    train(model, TeacherCache.open(output / "cache"), output, training)

    # 3. Look at it: the same noise without the erasers, which are on the model now, and with them.
    prompt = TARGET_PROMPTS[0]
    conditions = {"prompt": encoded[prompt].condition, "negative": encoded[""].condition}
    sampling = {"seed": SEED, "num_inference_steps": steps, "guidance_scale": defaults.guidance_scale}
    with without_erasers(model):
        before = video(model, conditions, size, **sampling)
    after = video(model, conditions, size, **sampling)
    write_video(output / "before.mp4", before, defaults.fps)
    write_video(output / "after.mp4", after, defaults.fps)
    write_strip(output / "before-and-after.png", [before, after], ["before", "after"], prompt)


if __name__ == "__main__":
    main()
