"""Where a concept is in a video that is being sampled: masks from the model's attention to its words."""

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
        condition: the name of the condition that has the concept.
        token_indices: the concept's tokens in it, a list for each of B samples.
        layers: the attention layers to use, counted from 0 in the order of the model; all if empty.
    """

    def __init__(self, condition: str, token_indices: Sequence[Sequence[int]], layers: Sequence[int] = ()) -> None:
        self._condition = condition
        length = max(map(len, token_indices))
        self._tokens = [[*tokens, *[-1] * (length - len(tokens))] for tokens in token_indices]
        self._layers = layers
        self._maps: dict[str, Tensor] = {}

    @contextmanager
    def watch(self, expert: VelocityModel, names: Sequence[str]) -> Iterator[None]:
        """Watches a forward pass of `expert` whose batch is that of the conditions `names`, B samples each."""
        if self._condition not in names:
            yield
            return
        batch, place = len(self._tokens), names.index(self._condition)
        none = [[-1] * len(self._tokens[0])] * batch
        rows = [row for name in names for row in (self._tokens if name == self._condition else none)]
        maps: dict[str, Tensor] = {}
        with AttnMapsCapture(expert, maps, token_indices=rows):
            yield
        for layer, found in maps.items():
            found = found[place * batch : (place + 1) * batch]
            # A sum is as good as an average: maps are normalised by their own range.
            self._maps[layer] = self._maps[layer] + found if layer in self._maps else found

    def masks(self, threshold: float, token_grid: tuple[int, int, int]) -> Tensor:
        """(B, F, h, w) bool on the CPU, True where the average map reaches the threshold; see `get_mask`."""
        names = list(self._maps)
        maps = {name: self._maps[name] for name in ([names[i] for i in self._layers] or names)}
        masks = get_mask(maps, None, threshold, token_grid[1], token_grid[2])["average_mask"]
        return (masks != 0).cpu()
