"""Makes videos before and after erasing: without the erasers and with them, from the same noise.

Every prompt gets NAME-before.mp4, NAME-after.mp4, both side by side as NAME.mp4, and frames of both as NAME.png.
Where no installed font has a prompt's letters, NAME.png shows its number in prompts.txt. Videos of less than 192 pixels
of width are written enlarged.
"""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from fastunlearn.devices import usable_device
from fastunlearn.dtypes import model_dtype
from fastunlearn.families import Condition
from fastunlearn.files import replace_file, shown, writable
from fastunlearn.training.data.comparison import side_by_side, write_strip
from fastunlearn.training.data.fonts import font_for
from fastunlearn.training.data.prompts import read_prompts
from fastunlearn.training.data.videos import check_ffmpeg, enlarged, write_video
from fastunlearn.training.data.words import has_unspaced_script
from fastunlearn.training.model import erased
from fastunlearn.training.model.memory import explained_out_of_memory
from fastunlearn.training.model.sampling import video
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.model.video_model import VideoModel, VideoSize
from fastunlearn.training.options import SampleOptions

_NAME_LENGTH = 56  # a file name may have 255 bytes, and a letter takes up to 4
_NEVER_ALONE = frozenset(["a", "an", "the", "of", "in", "on", "at", "to", "for", "with", "and", "or", "is"])
_VERSIONS = ("before", "after")
_PROMPTS = "prompts.txt"  # numbers and prompts


def run(options: SampleOptions) -> list[Path]:
    """Makes the videos that `options` describe. Returns the files written: the videos and the images of their frames.

    A prompt's videos do not depend on the other prompts. Without erasers they equal those of the diffusers pipeline
    called with a CPU generator of the same seed.

    Raises:
        FileNotFoundError: there is no such pipeline, folder of erasers or file of prompts.
        ValueError: the erasers are for another model, or an option does not fit the model.
        FileExistsError: a file exists that is not to be overwritten.
        OSError: a file cannot be written, or ffmpeg is missing.
        MemoryError: memory ran out; the message says what would help.
        FloatingPointError: a video is not finite.
    """
    prompts = _prompts(options)
    check_ffmpeg(options.format)
    output = writable(options.output_dir)
    erased.check_folders(options.erasers)
    names = file_names(prompts)
    files = [file for name in names for file in _files(output, name, options)]
    if any(font_for(prompt) is None for prompt in prompts):
        files.append(output / _PROMPTS)
    _refuse_to_replace(files, options)
    device, dtype = usable_device(options.device), model_dtype(options.mixed_precision)
    texts = [options.negative_prompt, *prompts]
    with explained_out_of_memory(options):
        encoded = encode_prompts(
            options.pretrained_model_name_or_path,
            texts,
            None,
            dtype=dtype,
            device=device,
            trust_remote_code=options.trust_remote_code,
        )
    model = erased.load_erased_model(options, dtype=dtype, device=device, vae=True)
    size = model.defaults.size(options.height, options.width, options.num_frames)
    model.latent_shape(*size)  # raises before any sampling if the model does not support this size
    fps = options.fps or model.defaults.fps
    titles = _titles(prompts, output)
    written = []
    steps = len(prompts) * len(_versions(options)) * options.num_inference_steps
    with explained_out_of_memory(options), tqdm(total=steps, desc="sampling", unit="step") as bar:
        for prompt, name, title in zip(prompts, names, titles, strict=True):
            conditions = {"prompt": encoded[prompt].condition, "negative": encoded[options.negative_prompt].condition}
            videos = _before_and_after(model, conditions, size, options, bar)
            written += _write(_files(output, name, options), videos, title, fps)
    print(f"wrote {len(written)} files to {output}: " + ", ".join(file.name for file in written))
    return written


def file_names(prompts: Sequence[str]) -> list[str]:
    """A file name for each prompt: its words in lower case, joined by hyphens. Equal names are numbered."""
    names: list[str] = []
    taken: set[str] = set()
    for prompt in prompts:
        text = unicodedata.normalize("NFKC", prompt).lower()
        words = re.sub(r"[\W_]+", "-", text).strip("-")
        if len(words) > _NAME_LENGTH:
            words = words[: _NAME_LENGTH + 1].rpartition("-")[0] or words[:_NAME_LENGTH]
        name, number = words or "video", 1
        # The names with -before and -after must be free too: a prompt may itself end in "after".
        while not taken.isdisjoint(stems := {name, *(f"{name}-{version}" for version in _VERSIONS)}):
            number += 1
            name = f"{words or 'video'}-{number}"
        taken |= stems
        names.append(name)
    return names


def _prompts(options: SampleOptions) -> list[str]:
    """The prompts of `--prompt` and of the file, each once. Finds a prompt that the shell has split into words."""
    words = [prompt for prompt in options.prompt if len(prompt.split()) == 1]
    sentence = " ".join(options.prompt)
    if len(options.prompt) > 1 and any(word.lower() in _NEVER_ALONE for word in words):
        raise ValueError(
            f"prompt: expected prompts, got {len(options.prompt)} of which some are single words that say nothing "
            f"alone: {shown(options.prompt)}; put quotation marks around a prompt with spaces: {shown(sentence)}"
        )
    if len(words) == len(options.prompt) > 1 and not has_unspaced_script(sentence):
        warnings.warn(
            f"prompt: got {len(words)} prompts of one word each, and makes a video for each; if they are one prompt, "
            f"put quotation marks around it: {shown(sentence)}",
            stacklevel=3,
        )
    if not all(prompt.strip() for prompt in options.prompt):
        warnings.warn("prompt: got an empty one; its video shows what the model makes without a prompt", stacklevel=3)
    from_file = [] if options.prompts is None else [line.prompt for line in read_prompts(options.prompts)]
    return list(dict.fromkeys([*options.prompt, *from_file]))


def _versions(options: SampleOptions) -> Sequence[str]:
    return _VERSIONS if options.before else _VERSIONS[1:]


def _before_and_after(
    model: VideoModel, conditions: Mapping[str, Condition], size: VideoSize, options: SampleOptions, bar: tqdm
) -> dict[str, Tensor]:
    """The videos of one prompt, by version."""
    videos = {}
    for version in _versions(options):
        with erased.without_erasers(model) if version == "before" else nullcontext():
            videos[version] = video(
                model,
                conditions,
                size,
                seed=options.seed,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=model.defaults.guidance(options.guidance_scale),
                bar=bar,
            )
    return videos


def _titles(prompts: Sequence[str], output: Path) -> list[str]:
    """The titles of the pictures: the prompts, or their numbers in a file where no installed font has their letters."""
    unshown = [prompt for prompt in prompts if font_for(prompt) is None]
    if not unshown:
        return list(prompts)
    lines = [f"{number}\t{prompt}\n" for number, prompt in enumerate(prompts, start=1)]
    replace_file(output / _PROMPTS, "".join(lines).encode())
    warnings.warn(
        f"no installed font has the letters of {shown(unshown[0])}"
        + (f" and {len(unshown) - 1} more" if len(unshown) > 1 else "")
        + f", so that pictures show the number that the prompt has in {output / _PROMPTS}; install a font that has "
        "them, such as Noto Sans CJK",
        stacklevel=3,
    )
    return [
        f"prompt {number} of {_PROMPTS}" if prompt in unshown else prompt
        for number, prompt in enumerate(prompts, start=1)
    ]


def _files(output: Path, name: str, options: SampleOptions) -> list[Path]:
    """The files of one prompt: a video per version, both side by side if there are two, and their frames."""
    videos = [f"{name}-{version}" for version in _versions(options)]
    if len(videos) > 1:
        videos.append(name)
    return [*(output / f"{video}.{options.format}" for video in videos), output / f"{name}.png"]


def _refuse_to_replace(files: Sequence[Path], options: SampleOptions) -> None:
    taken = [file.name for file in files if os.path.lexists(file)]
    if taken and not options.overwrite_output_dir:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise FileExistsError(
            f"{options.output_dir}: expected no videos of these prompts, got {taken[0]}{more}; choose another "
            "output_dir, or replace them with overwrite_output_dir"
        )


def _write(files: list[Path], videos: dict[str, Tensor], title: str, fps: float) -> list[Path]:
    """Writes the files of one prompt, which `_files` names, and returns their paths."""
    frames = [enlarged(video) for video in videos.values()]
    for file, version in zip(files, frames, strict=False):
        write_video(file, version, fps)
    if len(videos) > 1:
        write_video(files[len(videos)], side_by_side(frames, list(videos)), fps)
    write_strip(files[-1], list(videos.values()), list(videos), title)
    return files
