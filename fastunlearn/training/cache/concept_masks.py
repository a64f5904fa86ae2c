"""Masks of where the concept is in a video that is being sampled, from the model's attention to the concept's words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from fastunlearn.capture import AttnMapsCapture
from fastunlearn.masks import get_mask
from fastunlearn.velocity_model import VelocityModel


class ConceptMasks:
    """Averages the attention to the concept's tokens over the forward passes that it watches.

    Args:
        condition: the name of the condition that contains the concept.
        token_indices: the positions of the concept's tokens in that condition, one list per sample.
        layers: the attention layers to use, counted from 0 in the order of the model; all of them if empty.
    """

    def __init__(self, condition: str, token_indices: Sequence[Sequence[int]], layers: Sequence[int] = ()) -> None:
        self._condition = condition
        length = max(map(len, token_indices))
        self._tokens = [[*tokens, *[-1] * (length - len(tokens))] for tokens in token_indices]
        self._layers = layers
        self._sums: dict[str, Tensor] = {}  # sums of attention maps, by layer

    @contextmanager
    def watch(self, expert: VelocityModel, names: Sequence[str]) -> Iterator[None]:
        """Captures the attention of one forward pass of `expert`.

        The batch of the pass is the conditions called `names`, one after the other, each with a row per sample.
        """
        if self._condition not in names:
            yield
            return
        batch, position = len(self._tokens), names.index(self._condition)
        no_tokens = [[-1] * len(self._tokens[0])] * batch
        token_indices = [row for name in names for row in (self._tokens if name == self._condition else no_tokens)]
        maps: dict[str, Tensor] = {}
        with AttnMapsCapture(expert, maps, token_indices=token_indices):
            yield
        for layer, captured in maps.items():
            rows = captured[position * batch : (position + 1) * batch]
            # Summing is enough: `get_mask` normalises each map by its own range, so dividing would change nothing.
            self._sums[layer] = self._sums[layer] + rows if layer in self._sums else rows

    def masks(self, threshold: float, token_grid: tuple[int, int, int]) -> Tensor:
        """Masks (B, F, h, w), bool, on the CPU: True where the average map reaches the threshold; see `get_mask`."""
        layers = list(self._sums)
        maps = {layer: self._sums[layer] for layer in ([layers[i] for i in self._layers] or layers)}
        masks = get_mask(maps, None, threshold, *token_grid[1:], frames=token_grid[0])["average_mask"]
        return (masks != 0).cpu()
