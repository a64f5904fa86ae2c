"""The transformers of a model or pipeline, and where their erasers are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from fastunlearn.erasers.adapter import AdapterEraser
from fastunlearn.erasers.stack import EraserStack
from fastunlearn.families import Family, attentions, experts, find_transformer

# A module, or a diffusers pipeline, which is known by its components: importing fastunlearn needs torch only.
Model = Any


class Part(NamedTuple):
    """A transformer of a model.

    Attributes:
        prefix: what its layers' names in the model, and its folder of saved erasers, begin with; "" if it is the only
            transformer.
        transformer: the transformer.
        family: what is known of its family.
    """

    prefix: str
    transformer: nn.Module
    family: Family

    def attentions(self) -> dict[str, nn.Module]:
        """The attentions that can have erasers, by layer."""
        return attentions(self.transformer, self.family.erased)

    def erasers(self, name: str) -> dict[str, AdapterEraser]:
        """The erasers called `name` by layer; empty if there are none."""
        stacks = stacks_in(self.attentions())
        return {layer: stack[name] for layer, stack in stacks.items() if name in stack}  # type: ignore[misc]

    def in_model(self, by_layer: Mapping[str, AdapterEraser]) -> dict[str, AdapterEraser]:
        """The same erasers by the layers' names in the model."""
        return {f"{self.prefix}.{layer}".lstrip("."): eraser for layer, eraser in by_layer.items()}


def parts_of(model: Model) -> list[Part]:
    """The one transformer of `model`, or the two of a pipeline.

    Raises:
        TypeError: `model` is not of a supported family.
        ValueError: a transformer is a variant of its family that is not supported.
    """
    return [Part(prefix, *find_transformer(part)) for prefix, part in experts(model).items()]


def stacks_in(layers: Mapping[str, nn.Module]) -> dict[str, EraserStack]:
    """The eraser stacks of those attentions that have one, by layer."""
    stacks = {layer: attention._modules.get("erasers") for layer, attention in layers.items()}
    return {layer: stack for layer, stack in stacks.items() if isinstance(stack, EraserStack)}
