"""The demo's text-to-video model: CogVideoX, made small enough to train on a laptop.

It is built from the classes of diffusers and transformers (a CogVideoXTransformer3DModel, a T5 encoder with a
SentencePiece tokenizer, CogVideoX's noise schedule), with few and narrow layers. Pixels serve as latents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.models.autoencoders.vae import IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from fastunlearn.demo.judge import Judge
from fastunlearn.demo.world import COLOURS, FRAMES, HEIGHT, SHAPES, WIDTH
from fastunlearn.families import LatentSpace
from fastunlearn.files import open_safetensors, tensor_names
from fastunlearn.training.cache.index import file_entry
from fastunlearn.training.data.prompts import concept_tokens
from fastunlearn.training.data.words import occurrences
from fastunlearn.training.model.text import EncodedPrompt
from fastunlearn.training.model.video_model import Defaults, VideoModel

WEIGHTS = Path(__file__).with_name("weights.safetensors")
WEIGHTS_SHA256 = "7fa7b3fb2789344cec55c37a8d5f46edf2b92cbf734ef8a51d330bb0d1aa9730"  # `pretrain` prints it
TEXT_LENGTH = 8
PATCH = 2
TOKEN_GRID = (FRAMES, HEIGHT // PATCH, WIDTH // PATCH)
GUIDANCE = 2.5


def build_transformer() -> CogVideoXTransformer3DModel:
    """Builds four layers of width 128, for 8 text tokens and 288 video tokens: 1.3 million parameters."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=4,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        sample_frames=FRAMES,
        patch_size=PATCH,
        temporal_compression_ratio=1,
        max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
        temporal_interpolation_scale=1.0,
    )


def build_tokenizer() -> T5Tokenizer:
    """Builds a tokenizer with one token per word. Unknown words become `<unk>`; every prompt ends with `</s>`."""
    words = ["and", *COLOURS, *SHAPES]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in words)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """Builds two layers of width 64. They encode the order of text tokens, which CogVideoX's transformer ignores."""
    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    )


def build_scheduler() -> CogVideoXDDIMScheduler:
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

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer()
        self.scheduler = build_scheduler()

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

    def without_text_encoder(self) -> VideoModel:
        """Returns the transformer, not a copy of it, in the form that `prepare` and `train` take."""
        return VideoModel(
            [self.transformer],
            self.scheduler,
            latent_space=LatentSpace(frames=1, pixels=1),
            defaults=Defaults(GUIDANCE, HEIGHT, WIDTH, FRAMES, fps=FRAMES),
            vae=PixelSpace(),
            path="fastunlearn.demo",
        )

    def velocity(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Returns the transformer's prediction of v = sqrt(a) eps - sqrt(1 - a) x_0, (B, F, 3, H, W)."""
        return self.transformer(x_t, text, t, return_dict=False)[0]


def save(model: TextToVideo, judge: Judge, record: dict[str, Any], path: Path = WEIGHTS) -> None:
    """Writes the trained weights in float16, with a record of their training in the file's header."""
    from safetensors.torch import save_file

    learned = _state(model) | {f"judge.{name}": tensor for name, tensor in judge.state_dict().items()}
    tensors = {name: tensor.half().contiguous() for name, tensor in learned.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"facts": json.dumps(record)})
    partial.replace(path)


def load(path: Path = WEIGHTS) -> tuple[TextToVideo, Judge, dict[str, Any]]:
    """Returns the trained model and its judge, frozen and in float32, and the record of their training.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is damaged, or is not the one that belongs to this version.
    """
    with open_safetensors(path) as stored:
        if path == WEIGHTS and file_entry(path)["sha256"] != WEIGHTS_SHA256:
            raise ValueError(
                f"{path}: expected the weights that belong to this version, got others; install fastunlearn again"
            )
        record = json.loads(stored.metadata()["facts"])
        tensors = {name: stored.get_tensor(name).float() for name in tensor_names(stored)}
    model, judge = TextToVideo(), Judge()
    for name, parameter in _state(model).items():
        parameter.copy_(tensors[name])
    judge.load_state_dict({name: tensors[f"judge.{name}"] for name in judge.state_dict()})
    return model.eval().requires_grad_(False), judge.eval().requires_grad_(False), record


def _state(model: TextToVideo) -> dict[str, Tensor]:
    """Returns the trained parameters, without buffers and without the second name of the shared embedding."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "embed_tokens" not in name}
