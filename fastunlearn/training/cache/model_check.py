"""Whether a teacher cache is of the model that is to be trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fastunlearn.families import find_transformer
from fastunlearn.training.model.video_model import VideoModel

_VALUES_OF_A_WEIGHT = 16


def digest_of_weights(model: VideoModel) -> str:
    """Tells models apart by a few values of each weight, without reading all of them. Erasers do not count."""
    digest = hashlib.sha256()
    for expert in model.experts:
        for name, weight in find_transformer(expert)[0].named_parameters():
            if ".erasers." in name:
                continue
            values = weight.detach().flatten()
            values = values[:: max(1, len(values) // _VALUES_OF_A_WEIGHT)].float().cpu()
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def check_made_with(facts: Mapping[str, Any], model: VideoModel) -> None:
    """Raises ValueError if a cache of these facts was made with another model than `model`.

    Where the model is found does not matter: it may have been moved. Its weights are compared if they are in the dtype
    that the cache was made in.
    """
    if facts["backbone"] != model.family.name:
        raise ValueError(f"the cache was made with a {facts['backbone']} model, but this one is {model.family.name}")
    if facts["boundary"] != model.boundary:
        raise ValueError(
            f"the cache was made with transformers divided at timestep {facts['boundary']}, but this model's are at "
            f"{model.boundary}"
        )
    transformer: Any = model.experts[0].transformer
    channels = transformer.config.in_channels
    shape = tuple(facts["latent_shape"])
    if len(shape) != 4 or shape[model.family.channel_dim - 1] != channels:
        raise ValueError(f"the cache's latents have shape {shape}, but this model's have {channels} channels")
    has_same_dtype = facts.get("dtype") == str(model.dtype).removeprefix("torch.")
    if "weights" in facts and has_same_dtype and facts["weights"] != digest_of_weights(model):
        raise ValueError(
            f"the cache was made with the model {facts.get('model')}, and this one, {model.path}, has other weights"
        )
