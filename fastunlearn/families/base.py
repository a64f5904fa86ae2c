"""The fields that describe a family of text-to-video models. Every family fills them in, in a file beside this one.

A family's file imports diffusers and transformers inside its functions only, so that `import fastunlearn` needs nothing
but torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastunlearn.files import shown

Condition = Mapping[str, Tensor]
AttentionPlaces = tuple[tuple[str, str], ...]


class LatentSpace(NamedTuple):
    """How a VAE's latents relate to a video. Normalised latents are (z - mean) / std, with z as the VAE encodes it.

    Attributes:
        frames: video frames per latent frame, after the first.
        pixels: video pixels per latent pixel, in height and in width.
        mean: one number, or one per channel.
        std: one number, or one per channel.
    """

    frames: int
    pixels: int
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0


class PublishedModel(NamedTuple):
    """A published model at its usual video size: what its cost is computed from.

    Attributes:
        name: the name of the model.
        video: the size of its videos, height x width x frames.
        parameters: the parameters of one transformer.
        transformers: 2 if it has one transformer for high noise and one for low noise.
        text_encoder_parameters: the parameters of all its text encoders.
        blocks: attention blocks of a transformer, all of which have an eraser.
        features: D, features per token.
        video_tokens: N, video tokens of a sample.
        text_tokens: text tokens in the same attentions; 0 if the text enters by cross-attention.
        latent_elements: numbers in one sample's latents.
    """

    name: str
    video: str
    parameters: float
    text_encoder_parameters: float
    blocks: int
    features: int
    video_tokens: int
    text_tokens: int
    latent_elements: int
    transformers: int = 1


class TokenizerInput(NamedTuple):
    """A prompt in the form in which the family's pipeline passes it to the tokenizer.

    Attributes:
        prompt: the prompt, cleaned as the pipeline cleans it.
        template: the text around the prompt, with "{}" in the prompt's place.
        crop_start: how many tokens the pipeline drops from the start after encoding.
    """

    prompt: str
    template: str = "{}"
    crop_start: int = 0


def no_extra_inputs(transformer: nn.Module, x_t: Tensor, embedded_guidance_scale: float) -> dict[str, Any]:
    """`Family.extra_inputs` of a transformer that takes only latents, timestep and condition."""
    return {}


def no_largest_grid(config: Any) -> tuple[None, None, None]:
    """`Family.largest_grid` of a transformer that computes the positions of any size."""
    return None, None, None


# An entry of a transformer's configuration. diffusers keeps entries with an underscore, and passes them to no class.
DEFAULT_SIZE = "_default_size"


def size_of_pipeline_call(pipeline_class: Any, config: Any, latent_space: LatentSpace) -> tuple[int, int, int]:
    """`Family.default_size` of a pipeline that has its default size in the signature of `__call__`.

    The tiny pipelines' transformers have a smaller one in their configuration, as `DEFAULT_SIZE`.

    Raises:
        ValueError: the one in the configuration is not three positive numbers.
    """
    import inspect

    if (size := config.get(DEFAULT_SIZE)) is not None:
        is_size = isinstance(size, list | tuple) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)
        if not is_size:
            raise ValueError(f"{DEFAULT_SIZE}: expected height, width and number of frames, got {shown(size)}")
        return size[0], size[1], size[2]
    parameters = inspect.signature(pipeline_class.__call__).parameters
    height, width, num_frames = (parameters[name].default for name in ("height", "width", "num_frames"))
    return height, width, num_frames


def set_step_count(scheduler: Any, num_inference_steps: int, device: torch.device) -> None:
    """`Family.set_timesteps` of a pipeline that lets its scheduler choose the timesteps."""
    scheduler.set_timesteps(num_inference_steps, device=device)


def encode_t5(pipeline: Any, prompt: str, length: int) -> dict[str, Tensor]:
    """`Family.encode` of a pipeline with a single T5 encoder."""
    embeddings, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeddings}


def max_sequence_length(pipeline_class: Any, path: Any) -> int:
    """`Family.text_length` of a pipeline that pads every prompt to its default `max_sequence_length`."""
    import inspect

    return int(inspect.signature(pipeline_class.__call__).parameters["max_sequence_length"].default)


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """The transformer: where its attentions are, and how to call it.

    Attributes:
        name: the name of the family, also in the files of saved erasers and teacher caches.
        transformer: the class name of the diffusers transformer.
        erased: the attentions that get erasers, as pairs (list of blocks, attribute of a block). Such an attention
            returns the video tokens (B, N, D), alone or first in a tuple with the text tokens.
        text_attended: the attentions in which video tokens attend to text tokens, likewise.
        text_position: where the text tokens are among the keys of `text_attended`: before the video tokens ("first"),
            after them ("last"), or without them ("cross"). Queries have the same order, but "cross" queries are video
            tokens only.
        channel_dim: the channel dimension of a latent: 2 in (B, F, C, H, W), 1 in (B, C, F, H, W).
        conditions: the tensors of a condition: their names, which are keywords of the transformer's forward method,
            and the names of their dimensions after the batch. Dimensions with the same name have the same size.
        condition_sizes: (the transformer's configuration) -> the size of every such dimension except "L", the number
            of text tokens.
        extra_inputs: (transformer, x_t, embedded_guidance_scale) -> further keyword arguments of the forward method.
        embedded_guidance_scale: the default guidance scale that a guidance-distilled transformer gets as an input;
            None if the family has no such transformer.
        supported_config: entries of the transformer's configuration that must have these values. This is how
            image-to-video variants, which are not supported, are recognised.
    """

    name: str
    transformer: str
    erased: AttentionPlaces
    text_attended: AttentionPlaces
    text_position: Literal["first", "last", "cross"]
    channel_dim: int
    conditions: Mapping[str, tuple[str, ...]]
    condition_sizes: Callable[[Any], dict[str, int]]
    extra_inputs: Callable[[nn.Module, Tensor, float], dict[str, Any]] = no_extra_inputs
    embedded_guidance_scale: float | None = None
    supported_config: Mapping[str, Any] = field(default_factory=dict)

    def video_and_text(self, length: int, text_length: int) -> tuple[slice, slice]:
        """The video tokens among `length` queries, and the text tokens among the keys, of a `text_attended` attention.

        Args:
            length: the number of queries.
            text_length: the number of text tokens.
        """
        if self.text_position == "first":
            return slice(text_length, None), slice(0, text_length)
        if self.text_position == "last":
            return slice(0, length - text_length), slice(length - text_length, None)
        return slice(None), slice(None)


@dataclass(frozen=True, kw_only=True)
class Family(TransformerSpec):
    """A family of text-to-video models: its transformer (`TransformerSpec`), and what its diffusers pipeline does.

    Attributes:
        pipeline: the class name of the diffusers pipeline.
        denoisers: the pipeline's components that denoise.
        text_components: the pipeline's components that encode prompts.
        encode: (pipeline, prompt, max_sequence_length) -> the condition, with a batch of 1.
        text_length: (pipeline class, folder or Hub id) -> the number of text tokens that the transformer gets.
        tokenizer_input: (prompt) -> what the tokenizer gets.
        vae: the class name of the VAE.
        vae_dtype: the dtype to load the VAE in; None for that of the transformer.
        latent_space: (the VAE's configuration) -> its latent space.
        flow_matching: True if the model predicts noise - x0 at x_t = (1 - s) x0 + s noise, t = 1000 s. False if it
            predicts v, noise or x0 on a noise schedule `alphas_cumprod`; the scheduler's configuration says which.
        guidance_scale: the pipeline's default for classifier-free guidance; 1 if it makes one pass per sampling step.
        fps: frames per second of the videos.
        default_size: (pipeline class, the transformer's configuration, latent space) -> the default height, width and
            number of frames of a video.
        largest_grid: (the transformer's configuration) -> the most frames, rows and columns of video tokens that it
            has positions for, each None if it has them for any number.
        float32_latents: whether the pipeline keeps latents in float32 between sampling steps, or in the model's dtype.
        set_timesteps: (scheduler, number of sampling steps, device); sets the timesteps as the pipeline does.
        unsupported_options: options in model_index.json that must not be set, each with what it means.
        published: the published models of the family, for the computed costs in `fastunlearn.training.cost`.
        tiny_transformer: (**configuration) -> a tiny random transformer for tests; the arguments override entries of
            its configuration.
        tiny_pipelines: functions that make a tiny random pipeline without a network, by the name of the variant.
    """

    pipeline: str
    denoisers: tuple[str, ...] = ("transformer",)
    text_components: tuple[str, ...] = ("tokenizer", "text_encoder")
    encode: Callable[[Any, str, int], dict[str, Tensor]]
    text_length: Callable[[Any, Any], int]
    tokenizer_input: Callable[[str], TokenizerInput] = TokenizerInput
    vae: str
    vae_dtype: torch.dtype | None = None
    latent_space: Callable[[Mapping[str, Any]], LatentSpace]
    flow_matching: bool
    guidance_scale: float
    fps: int
    default_size: Callable[[Any, Any, LatentSpace], tuple[int, int, int]] = size_of_pipeline_call
    largest_grid: Callable[[Any], tuple[int | None, int | None, int | None]] = no_largest_grid
    float32_latents: bool = True
    set_timesteps: Callable[[Any, int, torch.device], None] = set_step_count
    unsupported_options: Mapping[str, str] = field(default_factory=dict)
    published: tuple[PublishedModel, ...]
    tiny_transformer: Callable[..., Any]
    tiny_pipelines: Mapping[str, Callable[[], Any]]
