"""Phase 1, `fastunlearn prepare`: fills a teacher cache with the frozen model's velocities along its trajectories.

`run` takes the options of the command line; `prepare` takes a loaded model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastunlearn.devices import usable_device
from fastunlearn.dtypes import model_dtype
from fastunlearn.environment import installed_version
from fastunlearn.files import writable
from fastunlearn.training.cache.estimate import estimate
from fastunlearn.training.cache.mask_picture import show_masks
from fastunlearn.training.cache.provenance import cache_facts
from fastunlearn.training.cache.reader import stored_prompts
from fastunlearn.training.cache.teacher import Teacher
from fastunlearn.training.cache.writer import CacheWriter, refuse_foreign_files
from fastunlearn.training.data.recipe import KEPT
from fastunlearn.training.data.requests import Request, distinct_prompts, read_requests
from fastunlearn.training.data.videos import check_ffmpeg
from fastunlearn.training.model.loading import load_model, outline_pipeline
from fastunlearn.training.model.memory import explained_out_of_memory
from fastunlearn.training.model.text import EncodedPrompt, encode_prompts
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import PrepareOptions

_PACKAGES = ("fastunlearn", "torch", "diffusers", "transformers", "safetensors")  # versions of these are recorded

Progress = Callable[[int, int], None]


def prepare(
    model: VideoModel,
    encoded: Mapping[str, EncodedPrompt],
    requests: Sequence[Request],
    folder: str | os.PathLike[str],
    options: PrepareOptions,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    barrier: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Makes a teacher cache, or resumes one: units of work that are done already are left as they are.

    The process that finishes it also writes `masks.png`, which shows masks on the videos, and warns of those that are
    nearly empty or nearly full.

    Process i does the units i, i + num_processes, and so on. On the same kind of device, all processes together write
    the same bytes that one process alone would write.

    Args:
        model: the frozen model. Erasers that are attached to it are disabled meanwhile.
        encoded: every prompt of the requests, and the negative prompt.
        requests: one per trajectory.
        folder: the folder of the cache.
        options: how to sample. Its prompt files, paths and precision are ignored.
        process_index: the index of this process.
        num_processes: the number of processes that work on this cache.
        barrier: waits for all processes, after which process 0 finishes the cache. Without a barrier, the process that
            finds all units done finishes it.
        progress: called with the number of units that this process has done and the number that it will do; the first
            time with 0 done.

    Raises:
        ValueError: a prompt is not encoded, only some prompts of a group contain the concept, the cache belongs to
            another run or is damaged, or the model's outputs are not finite.
        FileExistsError: the folder holds something else.
        OSError: a file cannot be written.
        MemoryError: there is not enough memory; the message names the options that help.
    """
    teacher = Teacher(model, encoded, requests, options)
    units = teacher.plan.units
    writer = CacheWriter(
        folder,
        cache_facts(teacher),
        {prompt: encoded[prompt].condition for prompt in teacher.prompts},
        [unit.template.group for unit in units],
        origin={"model": model.path, "versions": {name: installed_version(name) or "unknown" for name in _PACKAGES}},
        process_index=process_index,
    )
    own_units = range(process_index, len(units), num_processes)
    for done, index in enumerate(own_units):
        if progress:
            progress(done, len(own_units))
        if not writer.has(index):
            with explained_out_of_memory(options):
                points = teacher.points(units[index])
            writer.write(index, **points)
    if progress:
        progress(len(own_units), len(own_units))
    if barrier is not None:
        barrier()
    finishes = writer.is_complete() if barrier is None else process_index == 0
    if finishes:
        writer.finish()
        with explained_out_of_memory(options):
            show_masks(teacher, writer)


def encoded_prompts(
    options: PrepareOptions, requests: Sequence[Request], dtype: torch.dtype, device: torch.device
) -> dict[str, EncodedPrompt]:
    """The encoded prompts of all requests, on the CPU.

    They are read from a cache that was begun with the same prompts, or else computed by the text encoders.

    Args:
        options: the options of `prepare`.
        requests: one per trajectory.
        dtype: the dtype of the text encoders and of the conditions.
        device: where to run the text encoders.

    Raises: what `encode_prompts` raises.
    """
    prompts = distinct_prompts(requests, options.negative_prompt)
    stored = stored_prompts(options.output_dir, options.concept, dtype)
    if stored is not None and list(stored) == prompts:
        return stored
    targets = {request.prompt for request in requests if request.group != KEPT}
    encoded = encode_prompts(
        options.pretrained_model_name_or_path,
        prompts,
        options.concept,
        dtype=dtype,
        device=device,
        must_contain=targets,
        must_not_contain=[prompt for prompt in prompts if prompt not in targets],
        trust_remote_code=options.trust_remote_code,
    )
    return {
        text: prompt._replace(condition={keyword: value.cpu() for keyword, value in prompt.condition.items()})
        for text, prompt in encoded.items()
    }


def run(options: PrepareOptions) -> None:
    """Makes the cache that `options` describe. Started by Accelerate or torchrun, each process makes its share.

    Raises: what `prepare`, `read_requests`, `encode_prompts` and `load_model` raise.
    """
    from accelerate import PartialState

    if options.estimate:
        print(estimate(options))
        return
    dtype, device = model_dtype(options.mixed_precision), usable_device(options.device)
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1:
        device = state.device  # each process has its own
    requests = read_requests(options)
    if any(request.needs_ffmpeg for request in requests):
        check_ffmpeg()

    def check_and_encode() -> dict[str, EncodedPrompt]:
        _check_folder_and_size(options)
        return encoded_prompts(options, requests, dtype, device)

    # Only one process encodes: others might round differently, but a cache holds one condition per prompt.
    encoded = _broadcast_from_main_process(state, check_and_encode)
    needs_vae = any(request.needs_vae for request in requests)
    model = load_model(
        options.pretrained_model_name_or_path,
        dtype=dtype,
        device=device,
        vae=needs_vae,
        trust_remote_code=options.trust_remote_code,
    )
    with progress_bar("prepare", is_visible=state.is_main_process) as progress:
        prepare(
            model,
            encoded,
            requests,
            options.output_dir,
            options,
            process_index=state.process_index,
            num_processes=state.num_processes,
            barrier=state.wait_for_everyone,
            progress=progress,
        )
    if state.is_main_process:
        print(f"wrote {options.output_dir}")


def _check_folder_and_size(options: PrepareOptions) -> None:
    """Finds mistakes in the output folder and the video size before weights are loaded, which takes minutes."""
    refuse_foreign_files(writable(options.output_dir))
    model = outline_pipeline(options.pretrained_model_name_or_path, trust_remote_code=options.trust_remote_code).model
    model.latent_shape(*model.defaults.size(options.height, options.width, options.num_frames))


def _broadcast_from_main_process(
    state: Any, compute: Callable[[], dict[str, EncodedPrompt]]
) -> dict[str, EncodedPrompt]:
    """Returns on every process what `compute` returns on the main one.

    If it raises there, every process ends with the same message instead of waiting for a lost process.
    """
    from accelerate.utils import broadcast_object_list

    if state.num_processes == 1:
        return compute()
    if state.is_main_process:
        try:
            result = compute()
        except Exception as error:
            broadcast_object_list([None, str(error)])
            raise
        broadcast_object_list([result, None])
        return result
    result, message = broadcast_object_list([None, None])
    if message is not None:
        raise ValueError(message)
    return result


@contextmanager
def progress_bar(description: str, *, is_visible: bool = True) -> Iterator[Progress]:
    """The `progress` of `prepare` as a bar on the terminal."""
    from tqdm import tqdm

    with tqdm(desc=description, unit="batch", disable=not is_visible) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
