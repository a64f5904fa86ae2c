"""What a cache was made from: the facts in its index, and whether they fit the model that is to be trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fastunlearn.dtypes import dtype_name
from fastunlearn.families import find_transformer
from fastunlearn.offloading import loaded_parameters
from fastunlearn.training.cache.index import file_entry
from fastunlearn.training.cache.teacher import Teacher
from fastunlearn.training.data.requests import Request
from fastunlearn.training.model.video_model import VideoModel

_SAMPLED_VALUES = 16  # about as many values of each weight enter its digest
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


def cache_facts(teacher: Teacher) -> dict[str, Any]:
    """Everything that determines the content of a cache, as JSON."""
    options, model = teacher.options, teacher.model
    return {
        "backbone": model.family.name,
        "weights": weights_digest(model),
        "transformer": _config(find_transformer(model.experts[0])[0]),
        "scheduler": _config(model.scheduler),
        "latent_shape": list(teacher.latent_shape),
        "token_grid": list(teacher.token_grid),
        "dtype": dtype_name(model.dtype),
        "boundary": model.boundary,
        **teacher.size._asdict(),
        **{name: getattr(options, name) for name in _CONTENT_OPTIONS},
        "mask_layers": list(options.mask_layers),
        "guidance_scale": teacher.plan.guidance_scale,
        "token_indices": [list(teacher.encoded[prompt].token_indices) for prompt in teacher.prompts],
        "requests": [_request_facts(request) for request in teacher.plan.requests],
    }


def _config(component: Any) -> dict[str, str]:
    """The class and the configuration of a pipeline's component."""
    config = {key: repr(value) for key, value in sorted(component.config.items()) if not key.startswith("_")}
    return {"class": type(component).__name__, **config}


def _request_facts(request: Request) -> dict[str, Any]:
    facts: dict[str, Any] = {name: getattr(request, name) for name in ("prompt", "group", "instead", "follow")}
    facts["steps"] = list(request.steps)
    if request.source is not None:
        entry = file_entry(request.source)
        facts["source"] = {"file": entry["file"], "sha256": entry["sha256"]}
    return facts


def weights_digest(model: VideoModel) -> str:
    """A digest that tells models apart by a few values of each weight, without reading them all. Ignores erasers.

    Raises:
        ValueError: a weight is not loaded, or is sharded over processes.
    """
    digest = hashlib.sha256()
    for expert in model.experts:
        for name, weight in loaded_parameters(find_transformer(expert)[0], lambda name: ".erasers." not in name):
            for part, tensor in _plain_parts(name, weight):
                values = tensor.detach().flatten()
                values = values[:: max(1, len(values) // _SAMPLED_VALUES)].float().cpu()
                digest.update(f"{part} {tuple(tensor.shape)}".encode())
                digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _plain_parts(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that hold the values of a weight, which is itself one unless it is quantised."""
    if hasattr(weight, "full_tensor"):
        raise ValueError(f"{name}: expected a whole weight, got one that is sharded over processes")
    if not hasattr(weight, "__tensor_flatten__"):
        yield name, weight
        return
    for part in weight.__tensor_flatten__()[0]:
        yield from _plain_parts(f"{name}.{part}", getattr(weight, part))


def check_cache_fits(
    facts: Mapping[str, Any], model: VideoModel, condition_shapes: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> None:
    """Raises ValueError if a cache with these facts was made with another model than `model`.

    The model's path is not compared, because the model may have been moved. Its weights are compared only if it has the
    dtype that the cache was made in.
    """
    check_inputs_fit(facts, model, condition_shapes)
    has_same_dtype = facts.get("dtype") == dtype_name(model.dtype)
    if "weights" in facts and has_same_dtype and facts["weights"] != weights_digest(model):
        raise ValueError(
            f"cache: expected one made with the weights of {model.path}, got one made with the model "
            f"{facts.get('model')}, which has other weights; load that model, or run prepare with this one"
        )


def check_inputs_fit(
    facts: Mapping[str, Any], model: VideoModel, condition_shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raises ValueError if `model` cannot take the latents and conditions of a cache, whatever its weights are."""
    family, boundary = facts.get("backbone"), facts.get("boundary")
    if family != model.family.name:
        raise ValueError(
            f"cache: expected one made with a {model.family.name} model, got one made with a {family} model"
        )
    if boundary != model.boundary:
        raise ValueError(
            f"cache: expected one made with experts divided at timestep {model.boundary}, as this model's are; got "
            f"one made with experts divided at timestep {boundary}"
        )
    transformer: Any = model.experts[0].transformer
    channels = transformer.config.in_channels
    shape = tuple(facts["latent_shape"])
    if len(shape) != 4 or shape[model.family.channel_dim - 1] != channels:
        raise ValueError(f"cache: expected latents with {channels} channels, as this model's have; got shape {shape}")
    grid = model.token_grid(shape)
    if tuple(facts.get("token_grid", grid)) != grid:
        raise ValueError(
            f"cache: expected masks of shape {grid} for latents of shape {shape}, got {facts['token_grid']}"
        )
    sizes = model.family.condition_sizes(transformer.config)
    for keyword, condition_shape in condition_shapes.items():
        dims = model.family.conditions.get(keyword, ())
        expected = tuple(sizes.get(dim, dim) for dim in dims)
        if len(dims) != len(condition_shape) or any(
            isinstance(size, int) and size != got for size, got in zip(expected, condition_shape, strict=True)
        ):
            raise ValueError(
                f"cache: expected {keyword} of shape {expected}, as this model takes, got {condition_shape}"
            )
