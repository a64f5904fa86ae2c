"""Videos before and after: what the model shows without erasers and with them, from the same noise.

For every prompt NAME-before.mp4, NAME-after.mp4, both side by side as NAME.mp4, and frames of both as NAME.png.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastunlearn.devices import usable_device
from fastunlearn.dtypes import model_dtype
from fastunlearn.files import writable
from fastunlearn.training.data.prompts import read_prompts
from fastunlearn.training.data.videos import side_by_side, write_strip, write_video
from fastunlearn.training.model import erased
from fastunlearn.training.model.memory import explained_out_of_memory
from fastunlearn.training.model.sampling import denoise, stack_conditions
from fastunlearn.training.model.text import Condition, encode_prompts
from fastunlearn.training.model.video_model import VideoModel, VideoSize
from fastunlearn.training.options import SampleOptions

_NAME_LENGTH = 56  # letters of up to four bytes; a file's name may have 255
_PROMPT, _NEGATIVE = "prompt", "negative"
_KINDS = ("before", "after")


def run(options: SampleOptions) -> list[Path]:
    """Makes the videos, and returns their files and those of the strips.

    A prompt's videos do not depend on the other prompts. Without erasers they are those of the diffusers pipeline with
    a generator of the same seed on the CPU.

    Raises:
        FileNotFoundError: there is no such pipeline, folder of erasers or file of prompts.
        ValueError: the erasers are not for this model, or an option does not fit it.
        OSError: something cannot be written.
        MemoryError: there is too little memory; says what would help.
        FloatingPointError: a video is not finite.
    """
    output = writable(options.output_dir)
    erased.check_folders(options.erasers)
    prompts = _prompts(options)
    names = file_names(prompts)
    device, dtype = usable_device(options.device), model_dtype(options.mixed_precision)
    texts = [options.negative_prompt, *prompts]
    with explained_out_of_memory(options):
        encoded = encode_prompts(options.pretrained_model_name_or_path, texts, None, dtype=dtype, device=device)
    model = erased.load_erased_model(options, dtype=dtype, device=device, vae=True)
    defaults = model.defaults
    size = defaults.size(options.height, options.width, options.num_frames)
    guidance_scale = defaults.guidance(options.guidance_scale)
    model.latent_shape(*size)  # raises if they do not divide
    written = []
    kinds = _KINDS if options.before else _KINDS[1:]
    steps = len(prompts) * len(kinds) * options.num_inference_steps
    with explained_out_of_memory(options), tqdm(total=steps, desc="sampling", unit="step") as bar:
        for prompt, name in zip(prompts, names, strict=True):
            conditions = {_PROMPT: encoded[prompt].condition, _NEGATIVE: encoded[options.negative_prompt].condition}
            videos = {}
            for kind in kinds:
                with erased.without_erasers(model) if kind == "before" else nullcontext():
                    videos[kind] = video(
                        model,
                        conditions,
                        size,
                        seed=options.seed,
                        num_inference_steps=options.num_inference_steps,
                        guidance_scale=guidance_scale,
                        bar=bar,
                    )
            written += _write(output, name, videos, prompt, options.format, options.fps or defaults.fps)
    print(f"wrote {len(written)} files to {output}: " + ", ".join(file.name for file in written))
    return written


def video(
    model: VideoModel,
    conditions: dict[str, Condition],
    size: VideoSize,
    *,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    bar: tqdm | None = None,
) -> Tensor:
    """One video: (F, 3, H, W) in [0, 1], on the CPU.

    Args:
        model: with its VAE.
        conditions: of the "prompt" and of the "negative" prompt, without a batch dim.
        size: of the video, as the model's `latent_shape` allows.
        seed: of the noise, which is drawn in float32 on the CPU: the same on every device.
        num_inference_steps: of sampling.
        guidance_scale: of the prompt over the negative one; 1 asks the model for the prompt alone.
        bar: a progress bar to advance a step at a time.

    Raises:
        FloatingPointError: the latents are not finite. Decoded, they would be a black video like any other.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, *model.latent_shape(*size), generator=generator)
    wanted = [_PROMPT] if guidance_scale == 1 else [_PROMPT, _NEGATIVE]
    for step in denoise(
        model,
        latents,
        {name: stack_conditions([conditions[name]], model.device) for name in wanted},
        follow=_PROMPT,
        guide_from=_NEGATIVE,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        generators=[generator],
    ):
        latents = step.x_next
        if bar is not None:
            bar.update()
    if not latents.isfinite().all():
        raise FloatingPointError(
            f"after {num_inference_steps} steps of sampling the video is not finite: the model overflows in "
            f"{model.dtype}, or guidance or the erasers are too strong"
        )
    return model.decode(latents, size.num_frames)[0]


def file_names(prompts: Sequence[str]) -> list[str]:
    """A name for each prompt's files: its words, in small letters of any script, numbered where two would be alike."""
    names: list[str] = []
    taken: set[str] = set()
    for prompt in prompts:
        text = unicodedata.normalize("NFKC", prompt).lower()
        words = re.sub(r"[\W_]+", "-", text).strip("-")
        if len(words) > _NAME_LENGTH:
            words = words[: _NAME_LENGTH + 1].rpartition("-")[0] or words[:_NAME_LENGTH]
        name, number = words or "video", 1
        # A prompt may end in "after" itself.
        while not taken.isdisjoint(stems := {name, *(f"{name}-{kind}" for kind in _KINDS)}):
            number += 1
            name = f"{words or 'video'}-{number}"
        taken |= stems
        names.append(name)
    return names


def _prompts(options: SampleOptions) -> list[str]:
    of_file = [] if options.prompts is None else [line.prompt for line in read_prompts(options.prompts)]
    return list(dict.fromkeys([*options.prompt, *of_file]))


def _write(output: Path, name: str, videos: dict[str, Tensor], prompt: str, ending: str, fps: float) -> list[Path]:
    files = []
    for kind, frames in videos.items():
        files.append(output / f"{name}-{kind}.{ending}")
        write_video(files[-1], frames, fps)
    if len(videos) > 1:
        files.append(output / f"{name}.{ending}")
        write_video(files[-1], side_by_side(list(videos.values()), list(videos)), fps)
    files.append(output / f"{name}.png")
    write_strip(files[-1], list(videos.values()), list(videos), prompt)
    return files
