"""Building blocks of the tiny random pipelines: sizes, tokenizers, and weights that make attention sharp.

Everything but the sizes is as in the published pipelines: the classes, the schedulers, the number of text tokens, the
prompt template, the VAE's compression. The commands' default size is `HEIGHT` x `WIDTH` x `FRAMES`, whose videos take
well under a second; diffusers' own default, where a pipeline has it in its signature, stays large.
"""

from __future__ import annotations

from typing import Any

import torch

from fastunlearn.families.base import DEFAULT_SIZE

HEIGHT, WIDTH, FRAMES = 64, 64, 9
HEADS, HEAD_DIM, CHANNELS, TEXT_DIM = 4, 16, 4, 32

_WORDS = (
    "a and the of in on with is to by two one no photo video bad blurry quality "
    "circle square triangle star red green blue yellow big small "
    "person nude naked clothed man woman dog cat car cart scar church street park beach "
    "walking running standing sitting playing"
)
VALUE_GAIN = 6.0  # how much larger the pipelines' values are, so that prompts change the video


def sharpen(transformer: Any, value_gain: float = 1.0) -> Any:
    """Randomises the norms of queries and keys, so that heads attend sharply, each to something different.

    Args:
        transformer: the transformer to change: all its attentions that normalise queries and keys.
        value_gain: multiplies the weights of these attentions' value projections.

    Returns:
        The transformer, in eval mode.
    """
    with torch.no_grad():
        for attention in transformer.modules():
            if getattr(attention, "norm_q", None) is not None:
                for norm in (attention.norm_q, attention.norm_k):
                    norm.weight.normal_(1.5, 0.3)
                attention.to_v.weight.mul_(value_gain)
    return transformer.eval()


def with_default_size(transformer: Any) -> Any:
    """Gives the transformer the tiny default size, where the published pipeline's would take hours."""
    transformer.register_to_config(**{DEFAULT_SIZE: [HEIGHT, WIDTH, FRAMES]})
    return transformer


def t5_config(name: str, vocabulary: int) -> Any:
    """A configuration of transformers' class `name`, for a model of a few thousand parameters."""
    import transformers

    return getattr(transformers, name)(
        vocab_size=vocabulary, d_model=TEXT_DIM, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0
    )


def t5_tokenizer() -> Any:
    """SentencePiece with one token per known word and one per letter of other words; a text ends with `</s>`."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    words = [(f"▁{word}", -2.0) for word in _WORDS.split()]
    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'-()"]
    return T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0)


def llama_tokenizer(template: str) -> Any:
    """One token per word, sign and line break. HunyuanVideo's template then has the 95 tokens that get cropped."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end_of_text|>", "<unk>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    split = pre_tokenizers.Split(Regex(r"<\|\w+\|>|\n|\w+|[^\w\s]"), behavior="removed", invert=True)
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


def clip_tokenizer() -> Any:
    """One token per byte."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], model_max_length=77)
