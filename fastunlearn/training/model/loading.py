"""Loading a saved pipeline without its text encoders: transformers, scheduler, and the VAE if it is wanted."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from safetensors import SafetensorError

from fastunlearn.families import FAMILIES, Family, LatentSpace, family_of
from fastunlearn.training.model.video_model import Defaults, VideoModel

__all__ = ["Outline", "VideoModel", "load_components", "load_model", "outline_pipeline", "pipeline_class"]


def pipeline_class(path: str | os.PathLike[str]) -> tuple[Any, Family]:
    """The diffusers class of the saved pipeline; looks at its model_index.json only."""
    import diffusers

    name = os.fspath(path)
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise FileNotFoundError(f"pretrained_model_name_or_path: no folder {name!r}, which is no id on the Hub either")
    try:
        index = diffusers.DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"pretrained_model_name_or_path: expected a saved diffusers pipeline, got {name!r} ({reason})"
        ) from error
    class_name = index.get("_class_name") if isinstance(index, dict) else None
    family = next((family for family in FAMILIES if family.pipeline == class_name), None)
    if family is None:
        expected = " or ".join(family.pipeline for family in FAMILIES)
        raise ValueError(f"pretrained_model_name_or_path: expected a {expected}, but {name!r} holds a {class_name}")
    for option, meaning in family.unsupported_options.items():
        if index.get(option):
            raise ValueError(
                f"pretrained_model_name_or_path: expected a pipeline without {option}, but {name!r} has it "
                f"({meaning}), which is not supported"
            )
    return getattr(diffusers, family.pipeline), family


def load_model(
    path: str | os.PathLike[str], *, dtype: torch.dtype, device: torch.device | str, vae: bool = False
) -> VideoModel:
    """Loads the transformers and the scheduler of a saved pipeline, and its VAE if asked to. No text encoder.

    Args:
        path: a folder that `save_pretrained` made, or a Hub id.
        dtype: of the transformers, but for the modules that their family keeps in float32. The VAE's too, but Wan's
            VAE is always float32.
        device: where to.
        vae: whether to load the VAE, which only `decode` and `encode_video` need.

    Raises:
        FileNotFoundError: there is no pipeline at `path`.
        ValueError: its class, or the variant of its transformer, is not supported.
    """
    cls, family = pipeline_class(path)
    dtypes = {"default": dtype, "vae": family.vae_dtype or dtype}
    pipeline = load_components(
        cls, path, dtypes, without=family.text_components if vae else (*family.text_components, "vae")
    ).to(device)
    # A pipeline may come with a second transformer that it is not configured to use.
    ratio = pipeline.config.get("boundary_ratio")
    transformers = [getattr(pipeline, name) for name in family.denoisers[: 1 if ratio is None else None]]
    if None in transformers:
        expected = " and ".join(family.denoisers)
        raise ValueError(f"{path}: expected {expected} in a pipeline with boundary_ratio {ratio}")
    if vae:
        pipeline.vae.enable_tiling()  # else it takes more memory than the transformer; small videos are one tile
    return _video_model(path, transformers, pipeline.scheduler, ratio, vae=pipeline.vae if vae else None)


class Outline(NamedTuple):
    """A saved pipeline as far as its configurations tell it.

    Attributes:
        model: its transformers are on the meta device, so that they have sizes but no weights.
        text_encoder_parameters: how many parameters the text encoders have.
        text_length: how many text tokens the transformers get.
    """

    model: VideoModel
    text_encoder_parameters: int
    text_length: int


def outline_pipeline(path: str | os.PathLike[str]) -> Outline:
    """Reads configurations alone: no weights, whatever their size.

    Args:
        path: a folder that `save_pretrained` made, or a Hub id.

    Raises:
        FileNotFoundError: there is no pipeline at `path`.
        ValueError: its class, or the variant of its transformer, is not supported.
    """
    import diffusers
    import transformers

    cls, family = pipeline_class(path)
    index = diffusers.DiffusionPipeline.load_config(path)
    ratio = index.get("boundary_ratio")
    experts, encoder_parameters = [], 0
    with torch.device("meta"):
        for name in family.denoisers[: 1 if ratio is None else None]:
            transformer_class = _component_class(diffusers, index, name)
            experts.append(transformer_class.from_config(transformer_class.load_config(path, subfolder=name)))
        for name in family.text_components:
            encoder_class = _component_class(transformers, index, name)
            if hasattr(encoder_class, "config_class"):  # a tokenizer has none
                encoder = encoder_class(encoder_class.config_class.from_pretrained(path, subfolder=name))
                encoder_parameters += sum(parameter.numel() for parameter in encoder.parameters())
    scheduler = _component_class(diffusers, index, "scheduler").from_pretrained(path, subfolder="scheduler")
    return Outline(_video_model(path, experts, scheduler, ratio), encoder_parameters, family.text_length(cls, path))


def _component_class(library: Any, index: Mapping[str, Any], name: str) -> Any:
    """The class that model_index.json names for a component, which must be one of the library's own."""
    entry = index.get(name)
    found = getattr(library, str(entry[1]), None) if isinstance(entry, list | tuple) and len(entry) == 2 else None
    if not isinstance(found, type):
        raise ValueError(f"model_index.json: expected {name} to be a class of {library.__name__}, got {entry!r}")
    return found


def _video_model(
    path: str | os.PathLike[str],
    transformers: Sequence[Any],
    scheduler: Any,
    boundary_ratio: float | None,
    vae: Any = None,
) -> VideoModel:
    cls, family = pipeline_class(path)
    latent_space = family.latent_space(_vae_config(path, family))
    return VideoModel(
        transformers,
        scheduler,
        latent_space=latent_space,
        defaults=_defaults(cls, transformers[0], latent_space, family.fps),
        vae=vae,
        boundary=None if boundary_ratio is None else boundary_ratio * scheduler.config.num_train_timesteps,
        path=os.fspath(path),
    )


def load_components(
    cls: Any, path: str | os.PathLike[str], dtype: torch.dtype | dict[str, torch.dtype], without: Sequence[str]
) -> Any:
    """The pipeline without some of its components. No pickles are read."""
    import diffusers

    for name, entry in cls.load_config(path).items():
        # A tokenizer whose folder is missing would be made without a vocabulary.
        is_wanted = isinstance(entry, list) and any(entry) and name not in without
        if is_wanted and Path(path).is_dir() and not Path(path, name).is_dir():
            raise FileNotFoundError(f"pretrained_model_name_or_path: {os.fspath(path)!r} lacks the folder {name!r}")
    # Before 0.42 it had only the older name, and ignored the newer one.
    keyword = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    try:
        return cls.from_pretrained(path, use_safetensors=True, **{keyword: dtype}, **dict.fromkeys(without))
    except SafetensorError as error:
        raise ValueError(
            f"pretrained_model_name_or_path: weights in {os.fspath(path)!r} are truncated or damaged ({error})"
        ) from error


def _vae_config(path: str | os.PathLike[str], family: Family) -> dict[str, Any]:
    """With the defaults of entries that were not there yet when it was saved. No weights are loaded."""
    import diffusers

    cls = getattr(diffusers, family.vae)
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls.__init__).parameters.items()}
    return defaults | cls.load_config(path, subfolder="vae")


def _defaults(cls: Any, transformer: Any, latent_space: LatentSpace, fps: int) -> Defaults:
    """What the pipeline's call has as defaults, or computes from the transformer's configuration."""
    call = inspect.signature(cls.__call__).parameters
    if call["height"].default is None:
        config, pixels = transformer.config, latent_space.pixels
        height, width, num_frames = pixels * config.sample_height, pixels * config.sample_width, config.sample_frames
    else:
        height, width, num_frames = (call[name].default for name in ("height", "width", "num_frames"))
    return Defaults(family_of(transformer).guidance_scale, height, width, num_frames, fps)
