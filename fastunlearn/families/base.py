"""What the library has to know of a family of text-to-video models: the fields that every family fills in.

A family is one file beside this one. It imports diffusers and transformers inside its functions only, so that
`import fastunlearn` needs nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Condition = Mapping[str, Tensor]
AttentionPlaces = tuple[tuple[str, str], ...]


class LatentSpace(NamedTuple):
    """How a VAE's latents relate to a video. Normalised latents are (z - mean) / std of the VAE's own latents z.

    Attributes:
        frames: video frames per latent frame, after the first.
        pixels: pixels per latent pixel, along either side.
        mean: one number, or one per channel.
        std: one number, or one per channel.
    """

    frames: int
    pixels: int
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0


class TokenizerInput(NamedTuple):
    """A prompt as the family's pipeline hands it to the tokenizer.

    Attributes:
        prompt: the cleaned prompt.
        template: the text around it; the prompt goes to "{}".
        crop_start: how many leading tokens the pipeline drops after encoding.
    """

    prompt: str
    template: str = "{}"
    crop_start: int = 0


def no_extra_inputs(transformer: nn.Module, x_t: Tensor, embedded_guidance_scale: float) -> dict[str, Any]:
    """`Family.extra_inputs` of a transformer that takes latents, timestep and condition only."""
    return {}


def set_step_count(scheduler: Any, num_inference_steps: int, device: torch.device) -> None:
    """`Family.set_timesteps` of a pipeline that leaves the timesteps to its scheduler."""
    scheduler.set_timesteps(num_inference_steps, device=device)


@dataclass(frozen=True, kw_only=True)
class TransformerFacts:
    """The transformer: where its attentions are, and how it is called.

    Attributes:
        name: the family's name, in saved erasers and caches too.
        transformer: the class name of its diffusers transformer.
        erased: where erasers sit: (list of blocks, attribute of the attention in a block). Such an attention returns
            the video tokens (B, N, D), alone or first in a tuple with the text tokens.
        text_attended: likewise, where video tokens attend to text tokens.
        text_position: where the text tokens are among the keys of `text_attended`: before the video tokens ("first"),
            after them ("last"), or alone ("cross"). Queries are in the same order; under "cross" they are video tokens
            only.
        channel_dim: the channel dimension of a latent: 2 in (B, F, C, H, W), 1 in (B, C, F, H, W).
        conditions: the tensors of a condition, by keyword of the transformer's forward method, each with the names of
            its dimensions after the batch. Dimensions of one name have one size.
        condition_sizes: (transformer's configuration) -> the sizes of those dimensions, but for "L", the text tokens.
        extra_inputs: (transformer, x_t, embedded_guidance_scale) -> the forward method's other keyword arguments.
        embedded_guidance_scale: the default of the guidance that a distilled transformer takes as an input; None where
            the family has no such transformers.
        supported_config: entries of the transformer's configuration that must have these values. Image-to-video
            variants are told by them, and refused.
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
        """The video tokens among the queries, and the text tokens among the keys, of a `text_attended` attention."""
        if self.text_position == "first":
            return slice(text_length, None), slice(0, text_length)
        if self.text_position == "last":
            return slice(0, length - text_length), slice(length - text_length, None)
        return slice(None), slice(None)


@dataclass(frozen=True, kw_only=True)
class Family(TransformerFacts):
    """One family of text-to-video models: `TransformerFacts`, and what its diffusers pipeline does.

    Attributes:
        pipeline: the class name of its diffusers pipeline.
        denoisers: the pipeline's components that denoise.
        text_components: the pipeline's components that encode prompts.
        encode: (pipeline, prompt, max_sequence_length) -> the condition, with a batch of 1.
        text_length: (pipeline class, folder or Hub id) -> how many text tokens the transformer gets.
        tokenizer_input: a prompt -> what the tokenizer gets.
        vae: the class name of its VAE.
        vae_dtype: the dtype that the VAE needs; None for the transformer's.
        latent_space: (the VAE's configuration) -> its latent space.
        flow_matching: True where the model predicts noise - x0 at x_t = (1 - s) x0 + s noise, t = 1000 s. False where
            it predicts v, noise or x0 in a schedule of `alphas_cumprod`, as its scheduler says.
        guidance_scale: the pipeline's default for classifier-free guidance; 1 where it takes one pass per step.
        fps: frames per second of its videos.
        float32_latents: whether the pipeline keeps latents in float32 between sampling steps, or in the model's dtype.
        set_timesteps: (scheduler, sampling steps, device): sets the timesteps as the pipeline does.
        unsupported_options: entries of model_index.json that must be absent or false, each with what it means.
        tiny_pipelines: variant -> a function that makes a tiny random pipeline of it, without a network.
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
    float32_latents: bool = True
    set_timesteps: Callable[[Any, int, torch.device], None] = set_step_count
    unsupported_options: Mapping[str, str] = field(default_factory=dict)
    tiny_pipelines: Mapping[str, Callable[[], Any]]


def encode_t5(pipeline: Any, prompt: str, length: int) -> dict[str, Tensor]:
    """`Family.encode` of a pipeline with one T5 encoder."""
    embeddings, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeddings}


def max_sequence_length(pipeline_class: Any, path: Any) -> int:
    """`Family.text_length` of a pipeline that pads every prompt to the default of its own argument."""
    import inspect

    return int(inspect.signature(pipeline_class.__call__).parameters["max_sequence_length"].default)
