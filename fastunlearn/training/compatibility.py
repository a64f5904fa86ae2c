"""Whether a teacher cache is of the model that is to be trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastunlearn.training.video_model import VideoModel


def check_made_with(facts: Mapping[str, Any], model: VideoModel) -> None:
    """Raises ValueError if a cache of these facts was made with another model than `model`."""
    made_with, path = facts.get("model"), model.path
    # A model may have been moved, or be named by its Hub id here and by a folder there.
    if made_with and path and Path(made_with).name != Path(path).name:
        raise ValueError(f"the cache was made with the model {made_with}, but this one is {path}")
    if facts["backbone"] != model.backbone.name:
        raise ValueError(f"the cache was made with a {facts['backbone']} model, but this one is {model.backbone.name}")
    if facts["boundary"] != model.boundary:
        raise ValueError(
            f"the cache was made with transformers divided at timestep {facts['boundary']}, but this model's are at "
            f"{model.boundary}"
        )
    transformer: Any = model.experts[0].transformer
    channels = transformer.config.in_channels
    shape = tuple(facts["latent_shape"])
    if len(shape) != 4 or shape[model.backbone.channel_dim - 1] != channels:
        raise ValueError(f"the cache's latents have shape {shape}, but this model's have {channels} channels")
