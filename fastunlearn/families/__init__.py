"""The supported families of text-to-video models: one file per family, with all that the library knows of it.

To add a family, write its file (`base.py` lists the fields to fill in) and add it to `FAMILIES` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastunlearn.families.base import AttentionPlaces, Condition, Family, LatentSpace
from fastunlearn.families.cogvideox import COGVIDEOX
from fastunlearn.families.hunyuan_video import HUNYUAN_VIDEO
from fastunlearn.families.wan import WAN
from fastunlearn.files import shown

__all__ = [
    "EXPERTS",
    "FAMILIES",
    "AttentionPlaces",
    "Condition",
    "Family",
    "LatentSpace",
    "attentions",
    "experts",
    "family_of",
    "find_transformer",
    "hidden_size",
    "patch_size",
    "token_grid",
]

FAMILIES = (COGVIDEOX, HUNYUAN_VIDEO, WAN)
EXPERTS = ("transformer", "transformer_2")  # the components of a pipeline that can be transformers


def experts(model: Any) -> dict[str, Any]:
    """The transformers of `model`, a diffusers pipeline or a module, by the prefix that tells one from another.

    The prefix is "" if there is one transformer only, and the component's name if there are two, as in Wan 2.2 A14B.
    Whether they are transformers of a supported family is for `find_transformer` to check.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    found = {name: part for name in EXPERTS if isinstance(part := getattr(model, name, None), nn.Module)}
    return found if len(found) > 1 else {"": next(iter(found.values()), model)}


def find_transformer(model: nn.Module) -> tuple[nn.Module, Family]:
    """The diffusers transformer inside `model`, and its family.

    Looks into a VelocityModel, a model compiled by `torch.compile`, and data-parallel wrappers, in any nesting. Other
    modules that hold a transformer are refused: it is not known how they are called.

    Raises:
        TypeError: there is no transformer of a supported family inside.
        ValueError: the transformer is a variant of its family that is not supported.
    """
    inner: Any = model
    while isinstance(inner, nn.Module):
        family = _family_of_class(type(inner))
        if family is not None:
            _check_variant(inner, family)
            return inner, family
        inner = _wrapped_module(inner)
    supported = ", ".join(family.transformer for family in FAMILIES)
    hint = "; give its transformer" if isinstance(getattr(model, "transformer", None), nn.Module) else ""
    raise TypeError(f"model: expected one of {supported}, possibly wrapped, got {type(model).__name__}{hint}")


def _wrapped_module(wrapper: nn.Module) -> nn.Module | None:
    """The module that a known wrapper holds; None if this is not such a wrapper."""
    children = wrapper._modules
    if "VelocityModel" in _class_names(type(wrapper)):
        return children["transformer"]
    return children.get("_orig_mod", children.get("module"))  # of torch.compile; of data parallelism


def _family_of_class(cls: type) -> Family | None:
    names = _class_names(cls)
    return next((family for family in FAMILIES if family.transformer in names), None)


def _class_names(cls: type) -> set[str]:
    """The names of a class and its bases, to tell it by.

    By name, so that nothing need be imported for it. With the bases, because FSDP and users subclass transformers.
    """
    return {base.__name__ for base in cls.__mro__}


def _check_variant(transformer: nn.Module, family: Family) -> None:
    for entry, expected in family.supported_config.items():
        config: Any = transformer.config
        got = getattr(config, entry, expected)
        if got != expected:
            raise ValueError(
                f"model: expected a text-to-video {family.transformer}, configured with {entry}={expected}; "
                f"got {entry}={shown(got)}"
            )


def family_of(model: nn.Module) -> Family:
    """The family of the transformer inside `model`.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: it is a variant of its family that is not supported.
    """
    return find_transformer(model)[1]


def patch_size(model: nn.Module) -> tuple[int, int, int]:
    """How many latent (frames, rows, columns) a video token covers.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: it is a variant of its family that is not supported.
    """
    config: Any = find_transformer(model)[0].config
    if isinstance(config.patch_size, int):
        return config.patch_size_t or 1, config.patch_size, config.patch_size
    frames, rows, columns = config.patch_size
    return frames, rows, columns


def token_grid(model: nn.Module, latent_shape: Sequence[int]) -> tuple[int, int, int]:
    """The (frames, rows, columns) of video tokens in latents of `latent_shape`, which has no batch dimension.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: it is a variant of its family that is not supported.
    """
    channel_dim = family_of(model).channel_dim
    sizes = [size for dim, size in enumerate(latent_shape, start=1) if dim != channel_dim]
    frames, rows, columns = (size // unit for size, unit in zip(sizes, patch_size(model), strict=True))
    return frames, rows, columns


def attentions(transformer: nn.Module, places: AttentionPlaces) -> dict[str, nn.Module]:
    """The attentions at `places`, by their path inside the transformer, such as "transformer_blocks.0.attn1"."""
    return {
        f"{blocks}.{index}.{attribute}": getattr(block, attribute)
        for blocks, attribute in places
        for index, block in enumerate(getattr(transformer, blocks))
    }


def hidden_size(transformer: nn.Module) -> int:
    """The number of features D of the tokens that the transformer's attentions return."""
    config: Any = transformer.config
    return config.num_attention_heads * config.attention_head_dim
