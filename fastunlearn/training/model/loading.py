"""Loading a saved diffusers pipeline without its text encoders: transformers, scheduler, and optionally the VAE.

Whatever depends on the model family comes from `fastunlearn.families`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from safetensors import SafetensorError

from fastunlearn.devices import round_buffers
from fastunlearn.families import FAMILIES, Family
from fastunlearn.training.model.video_model import Defaults, VideoModel


def load_model(
    path: str | os.PathLike[str], *, dtype: torch.dtype, device: torch.device | str, vae: bool = False
) -> VideoModel:
    """Loads the transformers and the scheduler of a saved pipeline, but no text encoder.

    Args:
        path: a folder that `save_pretrained` wrote, or a Hub id.
        dtype: the dtype of the transformers, except for modules that diffusers keeps in float32. The VAE has it too,
            unless its family needs another (Wan's VAE is always float32).
        device: where to load the model.
        vae: load the VAE as well. Only `decode` and `encode_video` need it.

    Raises:
        FileNotFoundError: there is no pipeline at `path`.
        ValueError: the pipeline's class, or the variant of its transformer, is not supported.
    """
    path = os.path.expanduser(path)
    cls, family = pipeline_class(path)
    dtypes = {"default": dtype, "vae": family.vae_dtype or dtype}
    without = family.text_components if vae else (*family.text_components, "vae")
    pipeline = load_components(cls, path, dtypes, without)
    round_buffers(pipeline.components.values(), torch.device(device))
    pipeline.to(device)
    boundary_ratio = pipeline.config.get("boundary_ratio")
    names = _denoisers_in_use(family, boundary_ratio)
    transformers = [getattr(pipeline, name) for name in names]
    if None in transformers:
        lacking = names[transformers.index(None)]
        raise ValueError(
            f"{path}: expected {' and '.join(names)} in a pipeline with boundary_ratio {boundary_ratio}, "
            f"got no {lacking}"
        )
    if vae:
        # Without tiling it would take more memory than the transformer. A small video is a single tile.
        pipeline.vae.enable_tiling()
    return _video_model(path, transformers, pipeline.scheduler, boundary_ratio, vae=pipeline.vae if vae else None)


class Outline(NamedTuple):
    """What the configuration files of a saved pipeline say about it.

    Attributes:
        model: its transformers are on the meta device: they have shapes but no weights.
        text_encoder_parameters: how many parameters the text encoders have together.
        text_length: how many text tokens the transformers get per prompt.
    """

    model: VideoModel
    text_encoder_parameters: int
    text_length: int


def outline_pipeline(path: str | os.PathLike[str]) -> Outline:
    """Reads a saved pipeline's configuration files only: no weights, however large the model is.

    Args:
        path: a folder that `save_pretrained` wrote, or a Hub id.

    Raises:
        FileNotFoundError: there is no pipeline at `path`.
        ValueError: the pipeline's class, or the variant of its transformer, is not supported.
    """
    import diffusers
    import transformers

    path = os.path.expanduser(path)
    cls, family = pipeline_class(path)
    index = diffusers.DiffusionPipeline.load_config(path)
    boundary_ratio = index.get("boundary_ratio")
    experts, encoder_parameters = [], 0
    with torch.device("meta"):
        for name in _denoisers_in_use(family, boundary_ratio):
            transformer_class = _component_class(diffusers, index, name)
            experts.append(transformer_class.from_config(transformer_class.load_config(path, subfolder=name)))
        for name in family.text_components:
            encoder_class = _component_class(transformers, index, name)
            if hasattr(encoder_class, "config_class"):  # tokenizers have none
                encoder = encoder_class(encoder_class.config_class.from_pretrained(path, subfolder=name))
                encoder_parameters += sum(parameter.numel() for parameter in encoder.parameters())
    scheduler = _component_class(diffusers, index, "scheduler").from_pretrained(path, subfolder="scheduler")
    model = _video_model(path, experts, scheduler, boundary_ratio)
    return Outline(model, encoder_parameters, family.text_length(cls, path))


def pipeline_class(path: str | os.PathLike[str]) -> tuple[Any, Family]:
    """The diffusers class and the family of a saved pipeline. Reads its model_index.json only.

    Raises:
        FileNotFoundError: there is no pipeline at `path`.
        ValueError: the pipeline's class, or an option that it is saved with, is not supported.
    """
    import diffusers

    name = os.path.expanduser(path)
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise FileNotFoundError(
            f"pretrained_model_name_or_path: expected a folder or a Hub id like 'owner/name', got {name!r}, "
            "which is neither"
        )
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
        raise ValueError(f"pretrained_model_name_or_path: expected a {expected}, got {name!r}, a {class_name}")
    for option, meaning in family.unsupported_options.items():
        if index.get(option):
            raise ValueError(
                f"pretrained_model_name_or_path: expected a pipeline without {option}, got {name!r}, which has it "
                f"({meaning}); this is not supported"
            )
    return getattr(diffusers, family.pipeline), family


def load_components(
    cls: Any, path: str | os.PathLike[str], dtype: torch.dtype | dict[str, torch.dtype], without: Sequence[str]
) -> Any:
    """Loads a pipeline without some of its components, from safetensors only: pickled weights are not read.

    Args:
        cls: the diffusers class of the pipeline.
        path: a folder that `save_pretrained` wrote, or a Hub id.
        dtype: one for all components, or one by component name.
        without: the names of the components to leave out.

    Raises:
        FileNotFoundError: the folder lacks a component.
        ValueError: a file of weights is damaged.
    """
    import diffusers

    for name, entry in cls.load_config(path).items():
        # transformers would silently make a tokenizer without a vocabulary if its folder were missing.
        is_needed = isinstance(entry, list) and any(entry) and name not in without
        if is_needed and Path(path).is_dir() and not Path(path, name).is_dir():
            raise FileNotFoundError(
                f"pretrained_model_name_or_path: expected a folder {name!r} in {os.fspath(path)!r}, got none"
            )
    # diffusers before 0.42 knows the older name only, and ignores the newer one.
    keyword = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    try:
        return cls.from_pretrained(path, use_safetensors=True, **{keyword: dtype}, **dict.fromkeys(without))
    except SafetensorError as error:
        raise ValueError(
            f"pretrained_model_name_or_path: expected whole files of weights in {os.fspath(path)!r}, got a truncated "
            f"or damaged one ({error})"
        ) from error


def _denoisers_in_use(family: Family, boundary_ratio: float | None) -> tuple[str, ...]:
    """The components that denoise. Without a boundary a pipeline uses the first alone, though it may hold a second."""
    return family.denoisers if boundary_ratio is not None else family.denoisers[:1]


def _component_class(library: Any, index: Mapping[str, Any], name: str) -> Any:
    """The class that model_index.json names for a component. It must be one of the library's own."""
    entry = index.get(name)
    component = getattr(library, str(entry[1]), None) if isinstance(entry, list | tuple) and len(entry) == 2 else None
    if not isinstance(component, type):
        raise ValueError(f"model_index.json: expected {name} to be a class of {library.__name__}, got {entry!r}")
    return component


def _video_model(
    path: str | os.PathLike[str],
    transformers: Sequence[Any],
    scheduler: Any,
    boundary_ratio: float | None,
    vae: Any = None,
) -> VideoModel:
    cls, family = pipeline_class(path)
    latent_space = family.latent_space(_vae_config(path, family))
    size = family.default_size(cls, transformers[0].config, latent_space)
    return VideoModel(
        transformers,
        scheduler,
        latent_space=latent_space,
        defaults=Defaults(family.guidance_scale, *size, family.fps),
        vae=vae,
        boundary=None if boundary_ratio is None else boundary_ratio * scheduler.config.num_train_timesteps,
        path=os.fspath(path),
    )


def _vae_config(path: str | os.PathLike[str], family: Family) -> dict[str, Any]:
    """The VAE's configuration, with the class's defaults for entries that the saved file is too old to have."""
    import diffusers

    cls = getattr(diffusers, family.vae)
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls.__init__).parameters.items()}
    return defaults | cls.load_config(path, subfolder="vae")
