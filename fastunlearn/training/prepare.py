"""The teacher cache's making: trajectories of the frozen model, and what it says at points of them.

`prepare` works with a loaded model, `run` with the options of the command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastunlearn.devices import usable_device
from fastunlearn.dtypes import model_dtype
from fastunlearn.environment import installed_version
from fastunlearn.families import find_transformer
from fastunlearn.files import writable
from fastunlearn.training.cache.index import file_entry
from fastunlearn.training.cache.model_check import digest_of_weights
from fastunlearn.training.cache.plan import video_size
from fastunlearn.training.cache.reader import stored_prompts
from fastunlearn.training.cache.teacher import Teacher
from fastunlearn.training.cache.writer import CacheWriter, refuse_foreign
from fastunlearn.training.data.requests import Request, prompts_of, requests_of
from fastunlearn.training.data.user_videos import holds_latents
from fastunlearn.training.model.loading import load_model, outline_pipeline
from fastunlearn.training.model.memory import explained_out_of_memory
from fastunlearn.training.model.text import EncodedPrompt, encode_prompts
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import PrepareOptions

_PACKAGES = ("fastunlearn", "torch", "diffusers", "transformers", "safetensors")
_CONTENT_OPTIONS = (
    "concept",
    "negative_prompt",
    "timesteps_per_trajectory",
    "num_inference_steps",
    "batch_size",
    "mask_threshold",
    "mask_start",
    "seed",
)


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
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Makes a teacher cache, or goes on with one. Units of work that are done already are left as they are.

    Unit i is for process i % num_processes. All processes together write what one alone would, byte for byte, on the
    same kind of device.

    Args:
        model: the frozen model; its erasers, if it has any, are off meanwhile.
        encoded: every prompt of the requests, and the negative prompt.
        requests: the trajectories.
        folder: of the cache.
        options: those that name prompts, paths and precision are not read.
        process_index: of this process.
        num_processes: that work on this cache.
        barrier: waits for all processes. The first one then writes the index; without a barrier the one that finds
            everything done.
        progress: called with the number of this process's units done, and of all its units, at first with 0.

    Raises:
        ValueError: a prompt is not encoded, of a group with the concept in it not all prompts have it, the cache is
            another run's or damaged, or the model's outputs are not finite.
        FileExistsError: the folder holds something else.
        OSError: a file cannot be written.
        MemoryError: naming the options that help.
    """
    teacher = Teacher(model, encoded, requests, options)
    versions = {package: installed_version(package) or "unknown" for package in _PACKAGES}
    writer = CacheWriter(
        folder,
        _facts(teacher),
        {prompt: encoded[prompt].condition for prompt in teacher.prompts},
        [unit.kind.group for unit in teacher.plan.units],
        origin={"model": model.path, "versions": versions},
        process_index=process_index,
    )
    own = range(process_index, len(teacher.plan.units), num_processes)
    for done, index in enumerate(own):
        if progress:
            progress(done, len(own))
        if not writer.has(index):
            with explained_out_of_memory(options):
                points = teacher.points(teacher.plan.units[index])
            writer.write(index, **points)
    if progress:
        progress(len(own), len(own))
    if barrier is not None:
        barrier()
    is_last = writer.is_complete() if barrier is None else process_index == 0
    if is_last:
        writer.finish()


def _facts(teacher: Teacher) -> dict[str, Any]:
    """What determines a cache's content, as JSON."""
    options, model = teacher.options, teacher.model
    return {
        "backbone": model.family.name,
        "weights": digest_of_weights(model),
        "transformer": _config(find_transformer(model.experts[0])[0]),
        "scheduler": _config(model.scheduler),
        "latent_shape": list(teacher.latent_shape),
        "token_grid": list(teacher.token_grid),
        "dtype": str(model.dtype).removeprefix("torch."),
        "boundary": model.boundary,
        **teacher.size,
        **{name: getattr(options, name) for name in _CONTENT_OPTIONS},
        "mask_layers": list(options.mask_layers),
        "guidance_scale": teacher.plan.guidance_scale,
        "token_indices": [list(teacher.encoded[prompt].token_indices) for prompt in teacher.prompts],
        "requests": [_facts_of(request) for request in teacher.plan.requests],
    }


def _config(part: Any) -> dict[str, str]:
    """The configuration of a part of a pipeline."""
    config = {key: repr(value) for key, value in sorted(part.config.items()) if not key.startswith("_")}
    return {"class": type(part).__name__, **config}


def _facts_of(request: Request) -> dict[str, Any]:
    facts: dict[str, Any] = {name: getattr(request, name) for name in ("prompt", "group", "instead", "follow")}
    facts["steps"] = list(request.steps)
    if request.source is not None:
        entry = file_entry(request.source)
        facts["source"] = {"file": entry["file"], "sha256": entry["sha256"]}
    return facts


def encoded_prompts(
    options: PrepareOptions, requests: Sequence[Request], dtype: torch.dtype, device: torch.device
) -> dict[str, EncodedPrompt]:
    """Every prompt that `prepare` wants: from a cache that was begun with the same ones, or else from the encoders.

    They are on the CPU.

    Args:
        options: of `prepare`.
        requests: its trajectories.
        dtype: of the text encoders and the conditions.
        device: where to encode.

    Raises: as `encode_prompts` does.
    """
    wanted = prompts_of(requests, options.negative_prompt)
    stored = stored_prompts(options.output_dir, options.concept, dtype)
    if stored is not None and list(stored) == wanted:
        return stored
    encoded = encode_prompts(
        options.pretrained_model_name_or_path,
        wanted,
        options.concept,
        dtype=dtype,
        device=device,
        must_contain={request.prompt for request in requests if request.group == "target"},
    )
    return {
        prompt: one._replace(condition={key: value.cpu() for key, value in one.condition.items()})
        for prompt, one in encoded.items()
    }


def run(options: PrepareOptions) -> None:
    """Makes the cache that `options` describe; on every process that Accelerate or torchrun started, its part.

    Raises: as `prepare`, `requests_of`, `encode_prompts` and `load_model` do.
    """
    from accelerate import PartialState
    from tqdm import tqdm

    if options.estimate:
        from fastunlearn.training.cache.estimate import estimate

        print(estimate(options))
        return
    dtype = model_dtype(options.mixed_precision)
    device = usable_device(options.device)
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1:
        device = state.device  # each process has its own
    requests = requests_of(options)

    def checked_and_encoded() -> dict[str, EncodedPrompt]:
        _check_before_loading(options)
        return encoded_prompts(options, requests, dtype, device)

    # One process encodes: others might round otherwise, and a cache has one condition a prompt.
    encoded = _from_the_first_process(state, checked_and_encoded)
    needs_vae = any(request.source is not None and not holds_latents(request.source) for request in requests)
    model = load_model(options.pretrained_model_name_or_path, dtype=dtype, device=device, vae=needs_vae)
    with tqdm(desc="prepare", unit="batch", disable=not state.is_main_process) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

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


def _from_the_first_process(state: Any, make: Callable[[], dict[str, EncodedPrompt]]) -> dict[str, EncodedPrompt]:
    """What `make` gives the first process. Its mistakes end every process with the same line, not with a lost one."""
    from accelerate.utils import broadcast_object_list

    if state.num_processes == 1:
        return make()
    if state.is_main_process:
        try:
            made = make()
        except Exception as error:
            broadcast_object_list([None, str(error)])
            raise
        broadcast_object_list([made, None])
        return made
    made, error_line = broadcast_object_list([None, None])
    if error_line is not None:
        raise ValueError(error_line)
    return made


def _check_before_loading(options: PrepareOptions) -> None:
    """Finds what is wrong with the folder or the size before weights are read, which takes minutes."""
    refuse_foreign(writable(options.output_dir))
    model = outline_pipeline(options.pretrained_model_name_or_path).model
    model.latent_shape(**video_size(options, model.defaults))
