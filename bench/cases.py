"""What is measured of one operation: its inputs, the fewest bytes that it can move, and its peers.

A peer is one way to compute the operation. A call of it runs forward and backward once on the case's inputs and returns
the loss and the gradients. The peers called "seed" are the operation in plain PyTorch, as T2VUnlearning-style training
loops write it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunlearn.bench.agreement import check_largest_difference
from fastunlearn.bench.meters import MIB
from fastunlearn.functional import localization_loss, negatively_guided_velocity_loss, velocity_loss
from fastunlearn.testing.cases import random_tensors

MOST_MIB = 1 << 16

ETA = 7.5
# Latents (B, C, F, H, W) of a video of each model's default size.
REAL_SHAPES = {
    "cogvideox": (1, 16, 13, 60, 90),
    "hunyuan_video": (1, 16, 33, 90, 160),
    "wan": (1, 16, 21, 60, 104),
}
SYNTHETIC_MIB = (64, 256, 1024, 4096)
EXACT = "reference in float64"
Result = tuple[Tensor, list[Tensor]]  # the loss and the gradients


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        name: the operation and what is special about the call.
        size: the name of the size.
        inputs: the tensors that require gradients, then the others.
        floor: the fewest bytes that forward and backward can move: every input read once, every output written once.
        peers: by name, functions that run once on the inputs. The peer `EXACT` is only there to compare with.
    """

    name: str
    size: str
    inputs: list[Tensor]
    floor: int
    peers: dict[str, Callable[[], Result]]

    def check(self) -> None:
        """Compares every peer's loss and gradients with those in float64.

        fastunlearn computes in float32, and may be off by one rounding of its result. The other peers compute in the
        inputs' dtype, and may be off by a few roundings.

        Raises:
            Disagreement: a peer is off by more; the message names the case, the peer and the difference.
        """
        exact_loss, exact_gradients = self.peers[EXACT]()
        for name, peer in self.timed().items():
            roundings = 1 if name == "fastunlearn" else 8
            loss, gradients = peer()
            for actual, exact in zip([loss, *gradients], [exact_loss, *exact_gradients], strict=True):
                quantity = "loss" if actual is loss else "gradient"
                tolerance = max(roundings * torch.finfo(actual.dtype).eps, 1e-5)
                check_largest_difference(f"{self.name} at {self.size}: {quantity} of {name}", actual, exact, tolerance)

    def timed(self) -> dict[str, Callable[[], Result]]:
        """The peers that are timed: all but `EXACT`."""
        return {name: peer for name, peer in self.peers.items() if name != EXACT}


def _loss_and_gradients(loss: Tensor, inputs: Sequence[Tensor]) -> Result:
    return loss.detach(), list(torch.autograd.grad(loss, inputs))


def _as_float64(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


def plain_velocity_loss(prediction: Tensor, uncond: Tensor, cond: Tensor | None, mask: Tensor | None) -> Tensor:
    """The loss as T2VUnlearning-style loops write it, with the norms that their loss dict reports."""
    target = uncond if cond is None else uncond + ETA * (uncond - cond)
    loss = (prediction - target) ** 2
    if mask is not None:
        loss = loss * F.interpolate(mask[:, None].to(prediction.dtype), size=prediction.shape[2:], mode="nearest")
    norms = prediction.detach().norm() + target.detach().norm()
    return loss.mean() + 0 * norms


def plain_localization_loss(outputs: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The loss as T2VUnlearning-style loops write it, layer by layer."""
    losses = [((o * (1 - mask[..., None].to(o.dtype))) ** 2).sum(dim=(1, 2)).mean() for o in outputs]
    return sum(losses[1:], losses[0]) / len(losses)


def plain_concept_maps(query: Tensor, key: Tensor, tokens: Tensor) -> Tensor:
    """Concept maps (B, Sq) as T2VUnlearning-style loops take them: from all probabilities (B, H, Sq, Sk)."""
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
    """The unlearning loss or the preservation loss.

    Args:
        size: the name of the size.
        shape: (B, C, F, H, W) of a velocity.
        guided: True for the unlearning loss, from uncond and cond; False for the preservation loss, from a target.
        masked: whether there is a hard mask, with one token per 2 x 2 latent pixels.
        dtype: the velocities' dtype.
        device: where the tensors are.
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
        return _loss_and_gradients(result.loss, inputs[:1])

    def plain(function: Any, tensors: Sequence[Tensor]) -> Result:
        cond = tensors[2] if guided else None
        return _loss_and_gradients(function(tensors[0], tensors[1], cond, mask), tensors[:1])

    peers = {
        "fastunlearn": ours,
        "seed, eager": lambda: plain(plain_velocity_loss, inputs),
        "seed, compiled": lambda: plain(_compiled(plain_velocity_loss), inputs),
        EXACT: lambda: plain(plain_velocity_loss, _as_float64(inputs)),
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
    """The localization loss with half of the tokens masked.

    Args:
        size: the name of the size.
        shape: (B, N, D) of each layer's outputs.
        layers: the number of layers.
        dtype: the outputs' dtype.
        device: where the tensors are.
    """
    outputs = [random_tensors(shape, [dtype], seed)[0].to(device).requires_grad_() for seed in range(layers)]
    mask = (random_tensors(shape[:2], [torch.float32])[0] > 0).to(device)
    row = shape[2] * outputs[0].element_size()
    floor = layers * (int((~mask).sum()) * row + shape[0] * shape[1] * row)

    def plain(function: Any, tensors: Sequence[Tensor]) -> Result:
        return _loss_and_gradients(function(tensors, mask.to(tensors[0].dtype)), tensors)

    peers = {
        "fastunlearn": lambda: _loss_and_gradients(localization_loss(outputs, mask).loss, outputs),
        "seed, eager": lambda: plain(plain_localization_loss, outputs),
        "seed, compiled": lambda: plain(_compiled(plain_localization_loss), outputs),
        EXACT: lambda: plain(plain_localization_loss, _as_float64(outputs)),
    }
    return Case(f"localization, {layers} layers", size, outputs, floor, peers)


def case_makers(
    sizes: Sequence[str], dtype: torch.dtype, device: torch.device | str
) -> list[tuple[str, Callable[[], Case]]]:
    """Names of cases, and functions that make them one at a time: cases of 4 GiB do not fit into memory together.

    Args:
        sizes: each "small", "real", "synthetic" or a number of MiB.
        dtype: the large tensors' dtype.
        device: where the tensors are.

    Raises:
        ValueError: a size is none of these.
    """
    makers: list[tuple[str, Callable[[], Case]]] = []
    options: dict[str, Any] = {"dtype": dtype, "device": device}

    def add(size: str, shape: Sequence[int], tokens: Sequence[int], layers: int) -> None:
        for guided, masked in ((True, False), (True, True), (False, False)):
            velocity = functools.partial(velocity_case, size, shape, guided=guided, masked=masked, **options)
            makers.append((f"velocity {size}", velocity))
        makers.append((f"localization {size}", functools.partial(localization_case, size, tokens, layers, **options)))

    for size in sizes:
        if size == "small":
            add("small", (1, 16, 4, 32, 32), (1, 256, 64), 2)
        elif size == "real":
            for name, shape in REAL_SHAPES.items():
                add(name, shape, (1, shape[2] * shape[3] * shape[4] // 4, 3072), 2)
        elif size == "synthetic" or (size.isdecimal() and 1 <= int(size[:9]) <= MOST_MIB):
            for mebibytes in SYNTHETIC_MIB if size == "synthetic" else (int(size),):
                elements = mebibytes * MIB // dtype.itemsize
                # Latents of 16 channels and as many frames as make up the size.
                shape = (1, 16, elements // (16 * 64 * 64), 64, 64)
                add(f"{mebibytes} MiB", shape, (1, elements // 3072, 3072), 1)
        else:
            raise ValueError(
                f"--size: expected 'small', 'real', 'synthetic' or a number of MiB to {MOST_MIB}, got {size[:80]!r}"
            )
    return makers
