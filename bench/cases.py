"""What is measured: every operation's inputs, its floor in bytes, and its peers, defined once for every runner.

A peer runs forward and backward once, from the same inputs, and returns the loss and the gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunlearn.functional import localization_loss, negatively_guided_velocity_loss, velocity_loss
from fastunlearn.testing.cases import random_tensors

ETA = 7.5
MIB = 2**20
# Latents of 480 x 720 x 49 and of the other models' defaults, (B, C, F, H, W).
REAL = {
    "cogvideox": (1, 16, 13, 60, 90),
    "hunyuan_video": (1, 16, 33, 90, 160),
    "wan": (1, 16, 21, 60, 104),
}
SYNTHETIC = (64, 256, 1024, 4096)
Result = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Args:
        name: of the operation and what is special about the call.
        size: what the size is called.
        inputs: the tensors that require gradients, then the others.
        floor: bytes read and written at least, forward and backward.
        peers: by name; each runs once on the inputs.
    """

    name: str
    size: str
    inputs: list[Tensor]
    floor: int
    peers: dict[str, Callable[[], Result]]

    def check(self) -> None:
        """Raise unless every peer's loss and gradients agree with float64's.

        fastunlearn, which computes in float32, may be off by a rounding of its results; the others compute in the
        inputs' dtype, and may be off by a few.

        Raises:
            Disagreement: naming the case, the peer, and by how much it is off.
        """
        exact = self.peers["reference in float64"]()
        for name, peer in self.timed().items():
            roundings = 1 if name == "fastunlearn" else 8
            loss, gradients = peer()
            for mine, other in zip([loss, *gradients], [exact[0], *exact[1]], strict=True):
                what = "loss" if mine is loss else "gradient"
                allowed = max(roundings * torch.finfo(mine.dtype).eps, 1e-5)
                _agree(f"{self.name} at {self.size}: a {what} of {name}", mine, other, allowed)

    def timed(self) -> dict[str, Callable[[], Result]]:
        """The peers without the one that is only there to be compared with."""
        return {name: peer for name, peer in self.peers.items() if name != "reference in float64"}


class Disagreement(RuntimeError):
    """Peers compute different things: their times must not be compared."""


def _agree(what: str, actual: Tensor, exact: Tensor, tolerance: float) -> None:
    scale = exact.abs().max().item()
    error = (actual.double() - exact.double()).abs().max().item()
    if not error <= tolerance * scale:
        raise Disagreement(f"{what} is off by {error:.3g}, where {tolerance * scale:.3g} is allowed")


def velocity_shape(megabytes: int, dtype: torch.dtype) -> tuple[int, ...]:
    """A velocity of so many MiB, (B, C, F, H, W) with the latents' 16 channels."""
    return (1, 16, megabytes * MIB // dtype.itemsize // (16 * 64 * 64), 64, 64)


def _derive(loss: Tensor, inputs: Sequence[Tensor]) -> Result:
    return loss.detach(), list(torch.autograd.grad(loss, inputs))


def _doubled(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


def seed_velocity_loss(prediction: Tensor, uncond: Tensor, cond: Tensor | None, mask: Tensor | None) -> Tensor:
    """The loss as T2VUnlearning-style loops write it, with the norms of their loss dict."""
    target = uncond if cond is None else uncond + ETA * (uncond - cond)
    loss = (prediction - target) ** 2
    if mask is not None:
        loss = loss * F.interpolate(mask[:, None].to(prediction.dtype), size=prediction.shape[2:], mode="nearest")
    norms = prediction.detach().norm() + target.detach().norm()
    return loss.mean() + 0 * norms


def seed_localization_loss(outputs: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The loss as T2VUnlearning-style loops write it, layer by layer."""
    losses = [((o * (1 - mask[..., None].to(o.dtype))) ** 2).sum(dim=(1, 2)).mean() for o in outputs]
    return sum(losses[1:], losses[0]) / len(losses)


def seed_maps(query: Tensor, key: Tensor, tokens: Tensor) -> Tensor:
    """Concept maps (B, Sq) as T2VUnlearning-style loops take them: from probabilities (B, H, Sq, Sk) of all keys."""
    probabilities = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return probabilities[..., tokens].sum(-1).mean(1)


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)


def velocity_case(
    size: str,
    shape: Sequence[int],
    *,
    guided: bool = True,
    masked: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """The unlearning loss, or the preservation loss; a mask has a token for two by two latent pixels.

    Args:
        size: what to call it.
        shape: (B, C, F, H, W).
        guided: with uncond and cond, or with a target.
        masked: with a hard mask.
        dtype: of the velocities.
        device: where.
    """
    inputs = [x.to(device) for x in random_tensors(shape, [dtype] * (3 if guided else 2))]
    inputs[0].requires_grad_()
    mask = None
    if masked:
        mask = (random_tensors((shape[0], shape[2], shape[3] // 2, shape[4] // 2), [dtype])[0] > 0).to(device)
    floor = (len(inputs) + 1) * inputs[0].numel() * inputs[0].element_size()

    def ours() -> Result:
        if guided:
            result = negatively_guided_velocity_loss(*inputs, guidance_scale=ETA, mask=mask)
        else:
            result = velocity_loss(*inputs, mask=mask)
        return _derive(result.loss, inputs[:1])

    def seed(function: Any, tensors: Sequence[Tensor]) -> Result:
        cond = tensors[2] if guided else None
        return _derive(function(tensors[0], tensors[1], cond, mask), tensors[:1])

    peers = {
        "fastunlearn": ours,
        "seed, eager": lambda: seed(seed_velocity_loss, inputs),
        "seed, compiled": lambda: seed(_compiled(seed_velocity_loss), inputs),
        "reference in float64": lambda: seed(seed_velocity_loss, _doubled(inputs)),
    }
    name = ("guided velocity" if guided else "preservation") + (", masked" if masked else "")
    return Case(name, size, inputs, floor, peers)


def localization_case(
    size: str,
    shape: Sequence[int],
    layers: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """The localization loss, half of the tokens masked.

    Args:
        size: what to call it.
        shape: (B, N, D) of every layer.
        layers: how many.
        dtype: of the outputs.
        device: where.
    """
    outputs = [random_tensors(shape, [dtype], seed)[0].to(device).requires_grad_() for seed in range(layers)]
    mask = (random_tensors(shape[:2], [torch.float32])[0] > 0).to(device)
    row = shape[2] * outputs[0].element_size()
    floor = layers * (int((~mask).sum()) * row + shape[0] * shape[1] * row)

    def seed(function: Any, tensors: Sequence[Tensor]) -> Result:
        return _derive(function(tensors, mask.to(tensors[0].dtype)), tensors)

    peers = {
        "fastunlearn": lambda: _derive(localization_loss(outputs, mask).loss, outputs),
        "seed, eager": lambda: seed(seed_localization_loss, outputs),
        "seed, compiled": lambda: seed(_compiled(seed_localization_loss), outputs),
        "reference in float64": lambda: seed(seed_localization_loss, _doubled(outputs)),
    }
    return Case(f"localization, {layers} layers", size, outputs, floor, peers)


def makers(
    sizes: Sequence[str], dtype: torch.dtype, device: torch.device | str
) -> list[tuple[str, Callable[[], Case]]]:
    """Names, and functions that make the cases one by one: at 4 GB they must not all be there at once.

    Args:
        sizes: "small", "real", "synthetic", or a number of MiB.
        dtype: of the large tensors.
        device: where.

    Raises:
        ValueError: an unknown size.
    """
    found: list[tuple[str, Callable[[], Case]]] = []
    options: dict[str, Any] = {"dtype": dtype, "device": device}

    def add(size: str, shape: Sequence[int], tokens: Sequence[int], layers: int) -> None:
        for guided, masked in ((True, False), (True, True), (False, False)):
            velocity = functools.partial(velocity_case, size, shape, guided=guided, masked=masked, **options)
            found.append((f"velocity {size}", velocity))
        found.append((f"localization {size}", functools.partial(localization_case, size, tokens, layers, **options)))

    for size in sizes:
        if size == "small":
            add("small", (1, 16, 4, 32, 32), (1, 256, 64), 2)
        elif size == "real":
            for name, shape in REAL.items():
                add(name, shape, (1, shape[2] * shape[3] * shape[4] // 4, 3072), 2)
        elif size == "synthetic" or size.isdigit():
            for megabytes in SYNTHETIC if size == "synthetic" else (int(size),):
                rows = megabytes * MIB // dtype.itemsize // 3072
                add(f"{megabytes} MiB", velocity_shape(megabytes, dtype), (1, rows, 3072), 1)
        else:
            raise ValueError(f"size must be 'small', 'real', 'synthetic' or a number of MiB, got {size!r}")
    return found
