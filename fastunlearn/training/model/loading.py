"""Loading a saved diffusers pipeline without its text encoders: transformers, scheduler, and optionally the VAE.

The demo's model takes the place of a pipeline where it is asked for (see `load_demo_model`).
Whatever depends on the model family comes from `fastunlearn.families`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import nn

from fastunlearn.devices import round_buffers
from fastunlearn.families import FAMILIES, Family
from fastunlearn.files import one_line, shown
from fastunlearn.training.model.demo_model import load_demo_model
from fastunlearn.training.model.pipeline_folder import (
    ARGUMENT,
    check_folder,
    check_index,
    component_class,
    local_folder,
    model_without_weights,
    one_line_errors,
    read_config,
    read_index,
)
from fastunlearn.training.model.video_model import Defaults, VideoModel


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    vae: bool = False,
    trust_remote_code: bool = False,
) -> VideoModel:
    """Loads the transformers and the scheduler of a saved pipeline, but no text encoder.

    Args:
        path: a folder that `save_pretrained` wrote, a Hub id, or what `load_demo_model` takes.
        dtype: the dtype of the transformers, except for modules that diffusers keeps in float32. The VAE has it too,
            unless its family needs another (Wan's VAE is always float32).
        device: where to load the model.
        vae: load the VAE as well. Only `decode` and `encode_video` need it.
        trust_remote_code: let the pipeline run code of its own.

    Raises:
        FileNotFoundError: there is no pipeline at `path`, or the Hub cannot be reached.
        ValueError: the pipeline's class, or the variant of its transformer, is not supported, a file is damaged, or the
            pipeline would run code of its own.
    """
    path = os.path.expanduser(path)
    if (demo := load_demo_model(path)) is not None:
        round_buffers([demo], torch.device(device))
        return demo.rounded(dtype).to(device).without_text_encoder(path)
    cls, family = pipeline_class(path, trust_remote_code)
    dtypes = {"default": dtype, "vae": family.vae_dtype or dtype}
    without = family.text_components if vae else (*family.text_components, "vae")
    pipeline = load_components(cls, path, dtypes, without, trust_remote_code)
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
    return _video_model(
        path,
        transformers,
        pipeline.scheduler,
        boundary_ratio,
        pipeline.vae if vae else None,
        trust_remote_code=trust_remote_code,
    )


class Outline(NamedTuple):
    """What the configuration files of a saved pipeline say about it.

    Attributes:
        model: its transformers are on the meta device: they have shapes but no weights. Those of the demo have both.
        text_encoder_parameters: how many parameters the text encoders have together.
        text_length: how many text tokens the transformers get per prompt.
    """

    model: VideoModel
    text_encoder_parameters: int
    text_length: int


def outline_pipeline(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Outline:
    """Reads a saved pipeline's configuration files only: no weights, however large the model is.

    Args:
        path: as for `load_model`.
        trust_remote_code: as for `load_model`.

    Raises: what `load_model` raises.
    """
    path = os.path.expanduser(path)
    if (demo := load_demo_model(path)) is not None:
        encoder_parameters = sum(parameter.numel() for parameter in demo.text_encoder.parameters())
        return Outline(demo.without_text_encoder(path), encoder_parameters, demo.text_length)
    cls, family = pipeline_class(path, trust_remote_code)
    index = read_index(path)
    boundary_ratio = index.get("boundary_ratio")
    experts, encoder_parameters = [], 0
    for name in _denoisers_in_use(family, boundary_ratio):
        experts.append(_without_weights(path, index, name, trust_remote_code))
    for name in family.text_components:
        if issubclass(component_class(index, name), nn.Module):  # tokenizers are none
            encoder = _without_weights(path, index, name, trust_remote_code)
            encoder_parameters += sum(parameter.numel() for parameter in encoder.parameters())
    scheduler_class: Any = component_class(index, "scheduler")
    with one_line_errors(f"the scheduler of {shown(path, 300)}"):
        config = read_config(path, "scheduler/scheduler_config.json", trust_remote_code)
        scheduler = scheduler_class.from_config(config)
    model = _video_model(path, experts, scheduler, boundary_ratio, trust_remote_code=trust_remote_code)
    return Outline(model, encoder_parameters, text_length(cls, family, path, trust_remote_code))


def _without_weights(path: str, index: Mapping[str, Any], name: str, trust_remote_code: bool) -> Any:
    with one_line_errors(f"{name} of {shown(path, 300)}"):
        config = read_config(path, f"{name}/config.json", trust_remote_code)
        return model_without_weights(component_class(index, name), config)


def pipeline_class(path: str | os.PathLike[str], trust_remote_code: bool = False) -> tuple[Any, Family]:
    """The diffusers class and the family of a saved pipeline. Reads its model_index.json only.

    Raises:
        FileNotFoundError: there is no pipeline at `path`, or the Hub cannot be reached.
        ValueError: the pipeline's class, or an option that it is saved with, is not supported, or a component is of no
            class of diffusers or transformers and `trust_remote_code` is False.
    """
    import diffusers

    name = os.path.expanduser(path)
    if not os.path.isdir(name) and (Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise FileNotFoundError(
            f"{ARGUMENT}: expected a folder or a Hub id like 'owner/name', got {shown(name, 300)}, which is neither"
        )
    index = read_index(name)
    class_name = index.get("_class_name")
    family = next((family for family in FAMILIES if family.pipeline == class_name), None)
    if family is None:
        expected = " or ".join(family.pipeline for family in FAMILIES)
        raise ValueError(f"{ARGUMENT}: expected a {expected}, got {shown(name, 300)}, a {one_line(class_name, 80)}")
    for option, meaning in family.unsupported_options.items():
        if index.get(option):
            raise ValueError(
                f"{ARGUMENT}: expected a pipeline without {option}, got {shown(name, 300)}, "
                f"which has it ({meaning}); this is not supported"
            )
    check_index(index, trust_remote_code)
    return getattr(diffusers, family.pipeline), family


def text_length(cls: Any, family: Family, path: str | os.PathLike[str], trust_remote_code: bool = False) -> int:
    """The number of text tokens that a saved pipeline's transformer gets per prompt."""
    name = os.fspath(path)
    with one_line_errors(f"the configuration of the transformer of {shown(name, 300)}"):
        read_config(name, "transformer/config.json", trust_remote_code)
        return family.text_length(cls, str(local_folder(name) or name))


def load_components(
    cls: Any,
    path: str | os.PathLike[str],
    dtype: torch.dtype | dict[str, torch.dtype],
    without: Sequence[str],
    trust_remote_code: bool = False,
) -> Any:
    """Loads a pipeline without some of its components, from safetensors only: pickled weights are not read.

    Args:
        cls: the diffusers class of the pipeline.
        path: a folder that `save_pretrained` wrote, or a Hub id.
        dtype: one for all components, or one by component name.
        without: the names of the components to leave out.
        trust_remote_code: as for `load_model`.

    Raises:
        FileNotFoundError: the folder lacks a component.
        ValueError: a file is damaged, or is or names code that is not trusted.
    """
    import diffusers

    left_out: dict[str, Any] = dict.fromkeys(without)
    options = {"use_safetensors": True, "trust_remote_code": trust_remote_code, **left_out}
    path = os.fspath(path)
    with one_line_errors(shown(path, 300)):
        folder = local_folder(path) or Path(cls.download(path, **options))
    index = read_index(str(folder))
    check_index(index, trust_remote_code)
    needed = [name for name, entry in index.items() if isinstance(entry, list) and any(entry) and name not in without]
    check_folder(folder, index, needed, trust_remote_code)
    # diffusers before 0.42 knows the older name only, and ignores the newer one.
    keyword = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    with one_line_errors(shown(path, 300)):
        loaded = {} if isinstance(dtype, dict) else _load_text_encoders(folder, index, needed, dtype)
    for name, (_, lacking) in loaded.items():
        _refuse_lacking(path, name, lacking)
    options |= {name: encoder for name, (encoder, _) in loaded.items()}
    with one_line_errors(shown(path, 300)):
        pipeline = cls.from_pretrained(str(folder), **options, **{keyword: dtype})
    for name, component in pipeline.components.items():
        # diffusers leaves a weight that the files lack on the meta device, where it has no data.
        parameters = component.named_parameters() if isinstance(component, nn.Module) else ()
        _refuse_lacking(path, name, [key for key, parameter in parameters if parameter.is_meta])
    return pipeline


def _load_text_encoders(
    folder: Path, index: Mapping[str, Any], names: Sequence[str], dtype: torch.dtype
) -> dict[str, tuple[Any, Collection[str]]]:
    """The models of transformers among some components, each with the names of the weights that its files lack.

    transformers gives random values to a weight that the files lack. A pipeline that loads its encoders itself would
    not say so.
    """
    import transformers

    loaded = {}
    for name in names:
        library, class_name = index[name]
        cls: Any = getattr(transformers, class_name, None) if library == "transformers" else None
        is_encoder = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if is_encoder:
            encoder, report = cls.from_pretrained(
                folder / name, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            loaded[name] = (encoder, report["missing_keys"])
    return loaded


def _refuse_lacking(path: str, name: str, lacking: Collection[str]) -> None:
    if lacking:
        raise ValueError(
            f"{ARGUMENT}: expected all weights of {name} in {shown(path, 300)}, got none for {shown(min(lacking))}"
        )


def _denoisers_in_use(family: Family, boundary_ratio: float | None) -> tuple[str, ...]:
    """The components that denoise. Without a boundary a pipeline uses the first alone, though it may hold a second."""
    return family.denoisers if boundary_ratio is not None else family.denoisers[:1]


def _video_model(
    path: str | os.PathLike[str],
    transformers: Sequence[Any],
    scheduler: Any,
    boundary_ratio: float | None,
    vae: Any = None,
    *,
    trust_remote_code: bool = False,
) -> VideoModel:
    cls, family = pipeline_class(path, trust_remote_code)
    with one_line_errors(f"the configuration of {shown(os.fspath(path), 300)}"):
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
    return defaults | read_config(os.fspath(path), "vae/config.json", trust_remote_code=False)
