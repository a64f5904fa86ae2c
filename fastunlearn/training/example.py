"""Erases a concept from a saved pipeline, from prompts to videos before and after: the whole way in Python.

    python -m fastunlearn.training.example PIPELINE OUTPUT

PIPELINE is a folder or a Hub id of CogVideoX, HunyuanVideo or Wan. To erase something else, change the constants below.
The commands `fastunlearn prepare`, `train` and `sample` do the same, with more options and on many GPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.comparison import write_strip
from fastunlearn.training.data.prompts import PromptLine
from fastunlearn.training.data.requests import Request, distinct_prompts, target_requests
from fastunlearn.training.data.videos import check_ffmpeg, write_video
from fastunlearn.training.model.erased import without_erasers
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.sampling import video
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.options import PrepareOptions, TrainingOptions
from fastunlearn.training.prepare import prepare
from fastunlearn.training.train import train

CONCEPT = "dog"
# Prompts that show the concept, short and long, as users write them. Each contains it as a word of its own.
TARGET_PROMPTS = [
    "a dog",
    "a small dog running on the beach",
    "A big brown dog is walking on the street, slowly, past parked cars and people with umbrellas, in soft rain.",
]
# Prompts for what must not change: first what is most easily confused with the concept, then anything else.
KEPT_PROMPTS = ["a cat", "a person walking in the park", "A yellow car stands in front of an old church at sunrise."]
VIDEO_SEED = 1000  # of the videos before and after; training does not use it


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example. The cache, the erasers and the videos are written into the folder OUTPUT."""
    chosen = _parse(arguments)
    check_ffmpeg("mp4")
    path, output, sampling_steps = chosen.pipeline, chosen.output, chosen.sampling_steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    # 1. Say what to sample: trajectories that cycle through the prompts. Dropping the concept's words from a target
    #    prompt gives the prompt for its absence. Then encode all prompts. The text encoders are freed afterwards, which
    #    leaves their memory to the model. The empty prompt is the negative prompt of classifier-free guidance.
    prepare_options = PrepareOptions(
        path,
        output / "cache",
        CONCEPT,
        num_trajectories=chosen.trajectories,
        num_inference_steps=sampling_steps,
        height=chosen.height,
        width=chosen.width,
        num_frames=chosen.num_frames,
    )
    requests = target_requests([PromptLine(prompt) for prompt in TARGET_PROMPTS], prepare_options)
    for number in range(chosen.trajectories):
        requests.append(Request(KEPT_PROMPTS[number % len(KEPT_PROMPTS)], group="kept"))
    encoded = encode_prompts(path, distinct_prompts(requests, ""), CONCEPT, dtype=dtype, device=device)
    model = load_model(path, dtype=dtype, device=device, vae=True)
    size = model.defaults.size(chosen.height, chosen.width, chosen.num_frames)

    # 2. Sample the trajectories with the frozen model, and cache training points from them: noisy latents, the
    #    velocities with the concept in the prompt and without, and a mask of where the concept is.
    prepare(model, encoded, requests, output / "cache", prepare_options)

    # 3. Train the erasers: away from the concept where it is visible, and no change anywhere else. They are saved in
    #    OUTPUT/erasers, where fastunlearn.load_erasers can load them from. If the program is interrupted, run it
    #    again: step 2 resumes where it stopped, and step 3 at its last checkpoint.
    training_options = TrainingOptions(
        path,
        output / "cache",
        output,
        rank=chosen.rank,
        max_train_steps=chosen.training_steps,
        gradient_checkpointing=True,
        resume_from_checkpoint="latest",
    )
    train(model, TeacherCache.open(output / "cache"), output, training_options)

    # 4. Sample the same noise twice: with the erasers switched off, and with them, as training left the model.
    prompt = TARGET_PROMPTS[0]
    conditions = {"prompt": encoded[prompt].condition, "negative": encoded[""].condition}
    settings = {
        "seed": VIDEO_SEED,
        "num_inference_steps": sampling_steps,
        "guidance_scale": model.defaults.guidance_scale,
    }
    with without_erasers(model):
        before = video(model, conditions, size, **settings)
    after = video(model, conditions, size, **settings)
    write_video(output / "before.mp4", before, model.defaults.fps)
    write_video(output / "after.mp4", after, model.defaults.fps)
    write_strip(output / "before-and-after.png", [before, after], ["before", "after"], prompt)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastunlearn.training.example",
        description="Erases a concept from a saved pipeline, and makes a video before and after.",
    )
    parser.add_argument("pipeline", help="the pipeline: a folder, or a Hub id")
    parser.add_argument("output", type=Path, help="folder for the cache, the erasers and the videos")
    for option, default, meaning in (
        ("--trajectories", 32, "number of trajectories for the target prompts, and as many for the kept prompts"),
        ("--sampling-steps", 50, "sampling steps per trajectory and per video"),
        ("--training-steps", 500, "optimizer steps"),
        ("--rank", 128, "rank of the erasers"),
    ):
        parser.add_argument(option, type=int, default=default, help=f"{meaning} (default: %(default)s)")
    for option, meaning in (
        ("--height", "height of the videos in pixels"),
        ("--width", "width of the videos in pixels"),
        ("--num-frames", "number of frames per video"),
    ):
        parser.add_argument(option, type=int, help=f"{meaning} (default: the pipeline's default)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
