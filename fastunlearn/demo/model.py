"""The demo's text-to-video model: CogVideoX, made small enough to train on a laptop. Its weights are in the package.

It is built from the classes of diffusers and transformers (a CogVideoXTransformer3DModel, a T5 encoder with a
SentencePiece tokenizer, CogVideoX's noise schedule), with few and narrow layers. Pixels serve as latents.

Two more variants, for `pretrain --variant`, show whether a setting works on other models, too: one with more and
narrower layers, and a Wan, which is trained by flow matching.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.vae import IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from fastunlearn.demo.judge import Judge
from fastunlearn.demo.world import COLOURS, FRAMES, HEIGHT, SHAPES, WIDTH
from fastunlearn.families import LatentSpace, family_of
from fastunlearn.files import open_safetensors, replace_file, shown, tensor_names
from fastunlearn.schedule import add_noise, velocity_target
from fastunlearn.training.cache.index import file_entry
from fastunlearn.training.data.prompts import concept_tokens
from fastunlearn.training.data.words import occurrences
from fastunlearn.training.model.text import EncodedPrompt
from fastunlearn.training.model.video_model import Defaults, VideoModel

WEIGHTS = Path(__file__).with_name("weights.safetensors")
WEIGHTS_SHA256 = "f8e4a0842741e6a2a417a86b5262c057ebfde9395f923314c343bb0f981586c0"  # `pretrain` prints it
TEXT_LENGTH = 8
TEXT_WIDTH = 64
PATCH = 2
TOKEN_GRID = (FRAMES, HEIGHT // PATCH, WIDTH // PATCH)
GUIDANCE = 2.5


def build_cogvideox(layers: int, heads: int) -> CogVideoXTransformer3DModel:
    """Builds layers of width 32 * heads, for 8 text tokens and 288 video tokens."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
        num_layers=layers,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        sample_frames=FRAMES,
        patch_size=PATCH,
        temporal_compression_ratio=1,
        max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
        temporal_interpolation_scale=1.0,
    )


def build_wan() -> WanTransformer3DModel:
    """Builds four layers of width 128, which attend to the text by cross-attention."""
    return WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def build_tokenizer() -> T5Tokenizer:
    """Builds a tokenizer with one token per word. Unknown words become `<unk>`; every prompt ends with `</s>`."""
    words = ["and", *COLOURS, *SHAPES]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in words)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """Builds two layers of width 64. They encode the order of text tokens, which CogVideoX's transformer ignores."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
        )
    )


def build_cogvideox_scheduler() -> CogVideoXDDIMScheduler:
    """Builds CogVideoX's noise schedule: scaled linear, v-prediction, trailing timesteps, zero terminal SNR."""
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        set_alpha_to_one=True,
        snr_shift_scale=1.0,
    )


def build_wan_scheduler() -> UniPCMultistepScheduler:
    """Builds Wan's scheduler: flow matching, with its shift for small videos."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )


class Variant(NamedTuple):
    """A transformer and its noise schedule."""

    transformer: Callable[[], nn.Module]
    scheduler: Callable[[], Any]


DEMO = "cogvideox"  # the variant whose weights are in the package
VARIANTS = {
    DEMO: Variant(lambda: build_cogvideox(layers=4, heads=4), build_cogvideox_scheduler),
    "cogvideox-narrow": Variant(lambda: build_cogvideox(layers=7, heads=3), build_cogvideox_scheduler),
    "wan": Variant(build_wan, build_wan_scheduler),
}


class PixelSpace:
    """Takes the place of a VAE: pixels are latents."""

    def encode(self, videos: Tensor) -> AutoencoderKLOutput:
        """Returns videos (B, 3, F, H, W) in [-1, 1] unchanged, as a distribution."""
        return AutoencoderKLOutput(IdentityDistribution(videos))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Returns latents unchanged, in a tuple."""
        return (latents,)


class TextToVideo(nn.Module):
    """A transformer with its text encoder, tokenizer and scheduler."""

    text_length = TEXT_LENGTH

    def __init__(self, variant: str = DEMO) -> None:
        super().__init__()
        self.variant = variant
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = VARIANTS[variant].transformer()
        self.scheduler = VARIANTS[variant].scheduler()

    def encode(self, prompts: list[str]) -> Tensor:
        """Returns text embeddings (B, TEXT_LENGTH, 64). They include the padding, as in CogVideoX."""
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        device = self.text_encoder.shared.weight.device
        return self.text_encoder(ids.to(device)).last_hidden_state

    def encode_prompts(self, prompts: Sequence[str], concept: str) -> dict[str, EncodedPrompt]:
        """Encodes each distinct prompt once, as `encode_prompts` does for the pipelines of `fastunlearn.training`."""
        encoded = {}
        distinct = list(dict.fromkeys(prompts))
        for prompt, embeddings in zip(distinct, self.encode(distinct), strict=True):
            tokens = concept_tokens(self.tokenizer, prompt, concept) if occurrences(prompt, concept) else []
            encoded[prompt] = EncodedPrompt(prompt, {"encoder_hidden_states": embeddings}, tokens)
        return encoded

    def rounded(self, dtype: torch.dtype) -> TextToVideo:
        """Rounds its parameters to `dtype`, except for those that diffusers keeps in float32. Returns itself."""
        transformer: Any = self.transformer
        kept = set(transformer._keep_in_fp32_modules or ())
        for name, parameter in self.named_parameters():
            if kept.isdisjoint(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return self

    def without_text_encoder(self, path: str = "demo") -> VideoModel:
        """Returns the transformer, not a copy of it, in the form that `prepare` and `train` take.

        Args:
            path: what the model is called in a cache and in errors.
        """
        return VideoModel(
            [self.transformer],
            self.scheduler,
            latent_space=LatentSpace(frames=1, pixels=1),
            defaults=Defaults(GUIDANCE, HEIGHT, WIDTH, FRAMES, fps=FRAMES),
            vae=PixelSpace(),
            path=path,
        )

    def noised(self, pixels: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the noisy latents x_t at timesteps `t` (B,) and the velocity there, in the transformer's layout.

        Args:
            pixels: (B, F, 3, H, W).
            noise: of the same shape.
            t: (B,) whole timesteps.
        """
        if family_of(self.transformer).flow_matching:
            sigma = t[:, None, None, None, None] / self.scheduler.config.num_train_timesteps
            x_t, velocity = torch.lerp(pixels, noise, sigma), noise - pixels
        else:
            alphas_cumprod = self.scheduler.alphas_cumprod
            x_t = add_noise(pixels, noise, alphas_cumprod, t)
            velocity = velocity_target(pixels, noise, alphas_cumprod, t)
        channel_dim = family_of(self.transformer).channel_dim
        return x_t.movedim(2, channel_dim), velocity.movedim(2, channel_dim)

    def velocity(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Returns the transformer's prediction of the velocity at x_t, of the same shape."""
        return self.transformer(hidden_states=x_t, timestep=t, encoder_hidden_states=text, return_dict=False)[0]


def save(model: TextToVideo, judge: Judge, record: dict[str, Any], path: Path = WEIGHTS) -> None:
    """Writes the trained weights in float16, with a record of their training in the file's header."""
    import safetensors.torch

    tensors = {name: tensor.half().contiguous() for name, tensor in _learned(model, judge).items()}
    metadata = {"facts": json.dumps({"variant": model.variant} | record)}
    replace_file(path, safetensors.torch.save(tensors, metadata))


def load(path: Path = WEIGHTS) -> tuple[TextToVideo, Judge, dict[str, Any]]:
    """Returns the trained model and its judge, frozen and in float32, and the record of their training.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is damaged, `save` did not write it or an earlier version did, or it is in the place of the
            weights in the package and not the file that belongs to this version.
    """
    with open_safetensors(path) as stored:
        if path == WEIGHTS and file_entry(path)["sha256"] != WEIGHTS_SHA256:
            raise ValueError(
                f"{path}: expected the weights that belong to this version, got others; install fastunlearn again"
            )
        record = _record(path, stored)
        model, judge = TextToVideo(record["variant"]), Judge()
        learned = _learned(model, judge)
        _check_tensors(path, stored, learned)
        for name, parameter in learned.items():
            tensor = stored.get_tensor(name)
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: expected finite numbers in {name}, got NaN or infinity")
            parameter.copy_(tensor)
    return model.eval().requires_grad_(False), judge.eval().requires_grad_(False), record


def _record(path: Path, stored: Any) -> dict[str, Any]:
    """The record of training in the header of a file, with the variant that was trained."""
    try:
        record = {"variant": DEMO} | json.loads((stored.metadata() or {})["facts"])
        is_known = isinstance(record["variant"], str) and record["variant"] in VARIANTS
    except (KeyError, ValueError, TypeError, RecursionError):
        raise ValueError(
            f"{path}: expected a model that python -m fastunlearn.demo.pretrain wrote, got another safetensors file"
        ) from None
    if not is_known:
        raise ValueError(f"{path}: expected one of the variants {', '.join(VARIANTS)}, got {shown(record['variant'])}")
    return record


def _check_tensors(path: Path, stored: Any, learned: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless a file holds the tensors of a model and its judge, and no others."""
    slices = {name: stored.get_slice(name) for name in tensor_names(stored)}
    got = {name: (slice.get_dtype(), tuple(slice.get_shape())) for name, slice in slices.items()}
    expected = {name: ("F16", tuple(tensor.shape)) for name, tensor in learned.items()}
    if got != expected:
        name = min(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        wanted, found = (" ".join(map(str, of[name])) if name in of else "none" for of in (expected, got))
        raise ValueError(
            f"{path}: expected {wanted} as {shown(name)}, got {found}; the file belongs to another version of "
            "fastunlearn: make it again with python -m fastunlearn.demo.pretrain"
        )


def _learned(model: TextToVideo, judge: Judge) -> dict[str, Tensor]:
    """What is stored of both: all but buffers and the second name of the shared embedding."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if "embed_tokens" not in name}
    parameters |= {f"judge.{name}": parameter for name, parameter in judge.named_parameters()}
    return {name: parameter.detach() for name, parameter in parameters.items()}
