"""Text-to-video pipelines of every family, small enough for a laptop, with random weights, made without a network.

Everything but the sizes is as in the published pipelines: the classes, the schedulers, the lengths of texts, the
prompt template, the compression of the VAE. A call with `height=64, width=64, num_frames=9` takes well under a second.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

FAMILIES = ("cogvideox", "cogvideox-rope", "hunyuanvideo", "wan", "wan-2.2")
HEIGHT, WIDTH, FRAMES = 64, 64, 9

_WORDS = (
    "a and the of in on with is to by two one no photo video bad blurry quality "
    "circle square triangle star red green blue yellow big small "
    "person nude naked clothed man woman dog cat car cart scar church street park beach "
    "walking running standing sitting playing"
)
_HEADS, _HEAD_DIM, _CHANNELS, _TEXT_DIM = 4, 16, 4, 32
_VALUE_GAIN = 6.0


def save_tiny_pipeline(family: str, folder: str | os.PathLike[str], seed: int = 0) -> None:
    """Saves a tiny random pipeline as `save_pretrained` does, for `from_pretrained` to load.

    Weights are scaled so that attention is far from uniform and prompts make a difference. The same seed gives the same
    weights; torch's own random numbers go on as if nothing was drawn.

    Args:
        family: "cogvideox" (2B: no rotary embeddings), "cogvideox-rope" (5B), "hunyuanvideo", "wan" (2.1) or "wan-2.2"
            (A14B: two transformers, divided at boundary_ratio 0.875).
        folder: where to; made if need be.
        seed: of the weights.

    Raises:
        ValueError: an unknown family.
    """
    builders: dict[str, Callable[[], Any]] = {
        "cogvideox": _cogvideox,
        "cogvideox-rope": lambda: _cogvideox(rotary=True),
        "hunyuanvideo": _hunyuanvideo,
        "wan": _wan,
        "wan-2.2": lambda: _wan(experts=2),
    }
    if family not in builders:
        raise ValueError(f"family must be one of {', '.join(map(repr, FAMILIES))}; got {family!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        builders[family]().save_pretrained(folder)


def _cogvideox(rotary: bool = False) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5EncoderModel

    tokenizer = _t5_tokenizer()
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        time_embed_dim=32,
        text_embed_dim=_TEXT_DIM,
        num_layers=2,
        sample_width=WIDTH // 8,
        sample_height=HEIGHT // 8,
        sample_frames=FRAMES,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=rotary,
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(_t5_config("T5Config", len(tokenizer))).eval(),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=_CHANNELS,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7 if rotary else 1.15258426,
        ).eval(),
        transformer=_sharpen(transformer, [block.attn1 for block in transformer.transformer_blocks]),
        scheduler=CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            clip_sample=False,
            set_alpha_to_one=True,
            snr_shift_scale=1.0 if rotary else 3.0,
        ),
    )


def _hunyuanvideo() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    tokenizer, tokenizer_2 = _llama_tokenizer(), _clip_tokenizer()
    text_encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_DIM,
            intermediate_size=37,
            num_hidden_layers=4,  # the pipeline reads the output of the last but two
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.5,
        )
    )
    text_encoder_2 = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer_2),
            hidden_size=_TEXT_DIM,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=_TEXT_DIM,
            bos_token_id=tokenizer_2.bos_token_id,
            eos_token_id=tokenizer_2.eos_token_id,
            pad_token_id=tokenizer_2.pad_token_id,
            initializer_factor=10.0,
        )
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=_TEXT_DIM,
        pooled_projection_dim=_TEXT_DIM,
        rope_axes_dim=(4, 6, 6),
    )
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    return HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2.eval(),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=_CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        ).eval(),
        transformer=_sharpen(transformer, [block.attn for block in blocks]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _wan(experts: int = 1) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5EncoderModel

    tokenizer = _t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(_t5_config("UMT5Config", len(tokenizer))).eval(),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=_CHANNELS,
            num_res_blocks=1,
            latents_mean=[-0.7, 0.3, 0.1, -0.2],
            latents_std=[2.8, 1.4, 0.6, 2.1],
        ).eval(),
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer() if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )


def _wan_transformer() -> nn.Module:
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=_HEADS,
        attention_head_dim=12,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        text_dim=_TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return _sharpen(
        transformer, [attention for block in transformer.blocks for attention in (block.attn1, block.attn2)]
    )


def _sharpen(transformer: Any, attentions: Sequence[Any]) -> nn.Module:
    """Random norms on queries and keys, large values: heads attend sharply, to different things, and it matters."""
    with torch.no_grad():
        for attention in attentions:
            for norm in (attention.norm_q, attention.norm_k):
                norm.weight.normal_(1.5, 0.3)
            attention.to_v.weight.mul_(_VALUE_GAIN)
    return transformer.eval()


def _t5_config(name: str, vocabulary: int) -> Any:
    import transformers

    return getattr(transformers, name)(
        vocab_size=vocabulary, d_model=_TEXT_DIM, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0
    )


def _t5_tokenizer() -> Any:
    """SentencePiece, a token a known word and a token a letter elsewhere; ends a text with `</s>`."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    words = [(f"▁{word}", -2.0) for word in _WORDS.split()]
    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'-()"]
    return T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0)


def _llama_tokenizer() -> Any:
    """A token a word, sign and line break: the pipeline's template takes the 95 tokens that it crops."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end_of_text|>", "<unk>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    split = pre_tokenizers.Split(Regex(r"<\|\w+\|>|\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    template: str = DEFAULT_PROMPT_TEMPLATE["template"]
    pieces = [piece for piece, _ in split.pre_tokenize_str(template)]
    vocabulary = dict.fromkeys([*special, *pieces, *_WORDS.split(), *".,;:!?'-"])
    backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        padding_side="right",
    )


def _clip_tokenizer() -> Any:
    """A token a byte."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], model_max_length=77)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastunlearn.testing.tiny_pipelines", description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder")
    options = parser.parse_args()
    save_tiny_pipeline(options.family, options.folder)


if __name__ == "__main__":
    _main()
