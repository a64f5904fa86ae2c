"""Saved text-to-video pipelines, a phase's part of each at a time: the text encoders, or what denoises.

`encode_prompts` has only tokenizers and text encoders in memory and frees them; `load_model` has all but those.
"""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from safetensors import SafetensorError
from torch import Tensor

from fastunlearn.backbones import backbone_of
from fastunlearn.training.prompts import concept_tokens, occurrences
from fastunlearn.training.video_model import Defaults, LatentSpace, VideoModel

__all__ = [
    "Condition",
    "EncodedPrompt",
    "Outline",
    "VideoModel",
    "encode_prompts",
    "load_model",
    "outline_pipeline",
]

Condition = dict[str, Tensor]


class EncodedPrompt(NamedTuple):
    """A prompt as the transformer takes it.

    Attributes:
        prompt: the text.
        condition: tensors by the keyword of the transformer's forward method, without a batch dimension.
        token_indices: the positions of the concept's tokens among the text tokens that the transformer attends to;
            empty where the concept is not in the prompt.
    """

    prompt: str
    condition: Condition
    token_indices: list[int]


@dataclass(frozen=True)
class _Text:
    """A prompt as the tokenizer gets it."""

    prompt: str
    template: str = "{}"
    crop_start: int = 0


@dataclass(frozen=True)
class _Family:
    """What is known of a pipeline class beyond `fastunlearn.backbones`.

    Attributes:
        transformers: its components that denoise.
        text: its components that encode prompts.
        encode: (pipeline, prompt, max_sequence_length) to the condition, with a batch of 1.
        tokenized: a prompt as the tokenizer gets it.
        fps: of its videos.
        vae: the class of its VAE.
        vae_dtype: what the VAE needs to be right; None for the model's.
        latent_space: from the VAE's configuration.
    """

    transformers: tuple[str, ...]
    text: tuple[str, ...]
    encode: Callable[[Any, str, int], dict[str, Tensor]]
    tokenized: Callable[[str], _Text]
    fps: int
    vae: str
    vae_dtype: torch.dtype | None
    latent_space: Callable[[Mapping[str, Any]], LatentSpace]


def _encode_t5(pipeline: Any, prompt: str, length: int) -> dict[str, Tensor]:
    embeddings, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeddings}


def _encode_hunyuan_video(pipeline: Any, prompt: str, length: int) -> dict[str, Tensor]:
    embeddings, pooled, mask = pipeline.encode_prompt(prompt, max_sequence_length=length)
    return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask, "pooled_projections": pooled}


def _hunyuan_video_text(prompt: str) -> _Text:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as DEFAULT

    return _Text(prompt, DEFAULT["template"], DEFAULT["crop_start"])


def _wan_text(prompt: str) -> _Text:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return _Text(prompt_clean(prompt))


_FAMILIES: Mapping[str, _Family] = {
    "CogVideoXPipeline": _Family(
        transformers=("transformer",),
        text=("tokenizer", "text_encoder"),
        encode=_encode_t5,
        tokenized=_Text,
        fps=8,
        vae="AutoencoderKLCogVideoX",
        vae_dtype=None,
        latent_space=lambda config: LatentSpace(
            frames=int(config["temporal_compression_ratio"]),
            pixels=2 ** (len(config["block_out_channels"]) - 1),
            std=1 / config["scaling_factor"],
        ),
    ),
    "HunyuanVideoPipeline": _Family(
        transformers=("transformer",),
        text=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
        encode=_encode_hunyuan_video,
        tokenized=_hunyuan_video_text,
        fps=15,
        vae="AutoencoderKLHunyuanVideo",
        vae_dtype=None,
        latent_space=lambda config: LatentSpace(
            frames=config["temporal_compression_ratio"],
            pixels=config["spatial_compression_ratio"],
            std=1 / config["scaling_factor"],
        ),
    ),
    "WanPipeline": _Family(
        transformers=("transformer", "transformer_2"),
        text=("tokenizer", "text_encoder"),
        encode=_encode_t5,
        tokenized=_wan_text,
        fps=16,
        vae="AutoencoderKLWan",
        vae_dtype=torch.float32,
        latent_space=lambda config: LatentSpace(
            frames=config["scale_factor_temporal"],
            pixels=config["scale_factor_spatial"],
            mean=tuple(config["latents_mean"]),
            std=tuple(config["latents_std"]),
        ),
    ),
}


def _pipeline_class(path: str | os.PathLike[str]) -> tuple[Any, _Family]:
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
    if not isinstance(class_name, str) or class_name not in _FAMILIES:
        raise ValueError(
            f"pretrained_model_name_or_path: expected a {' or '.join(_FAMILIES)}, but {name!r} holds a {class_name}"
        )
    if index.get("expand_timesteps"):
        raise ValueError(
            f"pretrained_model_name_or_path: expected one timestep a video, but {name!r} has one for every token "
            "(expand_timesteps), as Wan2.2-TI2V-5B does, which is not supported"
        )
    return getattr(diffusers, class_name), _FAMILIES[class_name]


def encode_prompts(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    concept: str | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    must_contain: Collection[str] = (),
) -> dict[str, EncodedPrompt]:
    """Encodes prompts by the pipeline's own `encode_prompt`: the tensors are those that the pipeline would use.

    Args:
        path: a folder that `save_pretrained` made, or a Hub id.
        prompts: each distinct one is encoded once.
        concept: whose tokens to look for, whole words in any case; None for no search.
        dtype: of the text encoders and the embeddings.
        device: where to encode, and where the conditions stay.
        must_contain: prompts that make no sense without the concept.

    Returns:
        The encoded prompts by their text.

    Raises:
        FileNotFoundError: there is no pipeline at `path`.
        ValueError: its class is not supported, the concept is blank or not in one of `must_contain`, or a prompt is so
            long that the concept in it is cut off; the message shows the prompt's tokens.
        TypeError: `prompts` is a single string.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a sequence of strings, got the string {prompts!r}")
    cls, family = _pipeline_class(path)
    pipeline = _load(cls, path, dtype, without=(*family.transformers, "vae")).to(device)
    length = _text_length(cls, path)
    # Every mistake in the prompts is found before the first is encoded.
    indices = {
        prompt: _token_indices(pipeline.tokenizer, family.tokenized(prompt), concept, length, prompt in must_contain)
        for prompt in prompts
    }
    encoded = {}
    with torch.no_grad():
        for prompt, positions in indices.items():
            condition = {key: value[0] for key, value in family.encode(pipeline, prompt, length).items()}
            encoded[prompt] = EncodedPrompt(prompt, condition, positions)
    del pipeline
    _free_memory()
    return encoded


def _token_indices(tokenizer: Any, text: _Text, concept: str | None, length: int, must_contain: bool) -> list[int]:
    if concept is None or not (must_contain or occurrences(text.prompt, concept)):
        return []
    return concept_tokens(
        tokenizer, text.prompt, concept, max_length=length, template=text.template, crop_start=text.crop_start
    )


def _text_length(cls: Any, path: str | os.PathLike[str]) -> int:
    """How many text tokens the transformer gets: what its configuration says, or else its pipeline."""
    import diffusers

    if cls is diffusers.CogVideoXPipeline:
        config = diffusers.CogVideoXTransformer3DModel.load_config(path, subfolder="transformer")
        return int(config["max_text_seq_length"])
    return int(inspect.signature(cls.__call__).parameters["max_sequence_length"].default)


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
    cls, family = _pipeline_class(path)
    dtypes = {"default": dtype, "vae": family.vae_dtype or dtype}
    pipeline = _load(cls, path, dtypes, without=family.text if vae else (*family.text, "vae")).to(device)
    # A pipeline may come with a second transformer that it is not configured to use.
    ratio = pipeline.config.get("boundary_ratio")
    transformers = [getattr(pipeline, name) for name in family.transformers[: 1 if ratio is None else None]]
    if None in transformers:
        expected = " and ".join(family.transformers)
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

    cls, family = _pipeline_class(path)
    index = diffusers.DiffusionPipeline.load_config(path)
    ratio = index.get("boundary_ratio")
    experts, encoder_parameters = [], 0
    with torch.device("meta"):
        for name in family.transformers[: 1 if ratio is None else None]:
            transformer_class = _component_class(diffusers, index, name)
            experts.append(transformer_class.from_config(transformer_class.load_config(path, subfolder=name)))
        for name in family.text:
            encoder_class = _component_class(transformers, index, name)
            if hasattr(encoder_class, "config_class"):  # a tokenizer has none
                encoder = encoder_class(encoder_class.config_class.from_pretrained(path, subfolder=name))
                encoder_parameters += sum(parameter.numel() for parameter in encoder.parameters())
    scheduler = _component_class(diffusers, index, "scheduler").from_pretrained(path, subfolder="scheduler")
    return Outline(_video_model(path, experts, scheduler, ratio), encoder_parameters, _text_length(cls, path))


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
    cls, family = _pipeline_class(path)
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


def _load(
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


def _vae_config(path: str | os.PathLike[str], family: _Family) -> dict[str, Any]:
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
    return Defaults(backbone_of(transformer).guidance_scale, height, width, num_frames, fps)


def _free_memory() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
