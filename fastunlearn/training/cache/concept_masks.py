"""Where the concept is in a video that is being sampled: masks from the model's attention to its words."""

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
        self._sums: dict[str, Tensor] = {}  # of attention maps, by layer

    @contextmanager
    def watch(self, expert: VelocityModel, names: Sequence[str]) -> Iterator[None]:
        """Captures the attention of one forward pass of `expert`.

        The batch of the pass consists of the conditions called `names`, with one row per sample each.
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
            # A sum serves as well as an average, because each map is normalised by its own range.
            self._sums[layer] = self._sums[layer] + rows if layer in self._sums else rows

    def masks(self, threshold: float, token_grid: tuple[int, int, int]) -> Tensor:
        """Masks (B, F, h, w), bool, on the CPU: True where the average map reaches the threshold; see `get_mask`."""
        names = list(self._sums)
        maps = {name: self._sums[name] for name in ([names[i] for i in self._layers] or names)}
        masks = get_mask(maps, None, threshold, token_grid[1], token_grid[2])["average_mask"]
        return (masks != 0).cpu()
