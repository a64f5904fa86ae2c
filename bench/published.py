"""A training step as T2VUnlearning-style loops are published, written plainly: the peer of our own.

The model is there twice, as it was and as it becomes. Every step samples a trajectory with classifier-free guidance,
to a random step of it (as Receler does, half of the way on average) or to its end. Then, as the usage of the losses has
it, one pass shows the attention maps, tokens x tokens of them, and another what the erasers add; the model as it was is
asked three times, and the one that is trained twice, one prompt at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastunlearn import EraserOutputsCapture, as_velocity_model, attach_erasers, get_mask
from fastunlearn.bench.cases import seed_localization_loss, seed_velocity_loss


class Conditions(NamedTuple):
    """Text embeddings (1, L, D) of a prompt with the concept, of one to keep, and of the empty one."""

    target: Tensor
    kept: Tensor
    uncond: Tensor


class Losses(NamedTuple):
    """Of a step, without weights: two means of squares, and a sum of squares of what lies outside the mask."""

    unlearning: Tensor
    preservation: Tensor
    localization: Tensor


class _MapsCapture(TorchFunctionMode):
    """Computes the probabilities of every attention that runs, all of them, and keeps those of text tokens."""

    def __init__(self, text_length: int) -> None:
        super().__init__()
        self.maps: dict[str, Tensor] = {}
        self._text_length = text_length

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            probabilities = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
            self.maps[f"layer {len(self.maps)}"] = probabilities[:, :, self._text_length :, : self._text_length].clone()
        return func(*args, **(kwargs or {}))


class PublishedStep:
    """The training of erasers, a step at a time.

    Args:
        transformer: a CogVideoX, which becomes the one that is trained; a copy stays as it is.
        scheduler: of its pipeline.
        conditions: of the prompts.
        words: where the concept's tokens stand in the text.
        rank: of the erasers.
        weights: of the losses.
        guidance_scale: of sampling.
        sampling_steps: of a whole trajectory.
        checkpointing: whether activations are computed again in the backward pass.

    Attributes:
        original: the model as it was.
        trained: the model with erasers.
        erasers: these, by layer.
        parameters: of all erasers.
        weights: of the losses.
        doing: what it is at, or where it ran out of memory.
    """

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        conditions: Conditions,
        words: Sequence[int],
        *,
        rank: int,
        weights: tuple[float, float, float],
        guidance_scale: float = 6.0,
        sampling_steps: int = 50,
        checkpointing: bool = False,
    ) -> None:
        self.doing = "copying the model"
        self.original = as_velocity_model(copy.deepcopy(transformer).requires_grad_(False))
        self.trained = as_velocity_model(transformer)
        self.erasers = attach_erasers(transformer, rank)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        self.parameters = [p for eraser in self.erasers.values() for p in eraser.parameters()]
        self._optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self._scheduler, self._conditions, self._words = scheduler, conditions, words
        self._patch: int = transformer.config.patch_size
        self.weights, self._guidance_scale = weights, guidance_scale
        scheduler.set_timesteps(sampling_steps, device=conditions.target.device)

    def step(self, noise: Tensor, until: int) -> None:
        """A whole step: sampling from `noise` (1, F, C, H, W) through `until` steps, losses, and an update."""
        x_t, t = self.sample(noise, until)
        masks = get_mask(self.maps(x_t, t), self._words, 0.5, *x_t.shape[-2:], patch_size=self._patch)
        mask = masks["average_mask"]
        losses = self.losses(x_t, t, mask, x_t, t)
        self.doing = "the backward pass"
        total = sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True))
        total.backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def sample(self, noise: Tensor, until: int) -> tuple[Tensor, Tensor]:
        """x_t (1, F, C, H, W) and t (1,) after `until` steps; of a whole trajectory, noised anew to its middle."""
        self.doing = "sampling"
        text = torch.cat([self._conditions.uncond, self._conditions.target])
        timesteps = self._scheduler.timesteps
        x_t = noise
        for t in timesteps[:until]:
            uncond, cond = self.original(x_t.repeat(2, 1, 1, 1, 1), t.expand(2), text).chunk(2)
            guided = uncond + self._guidance_scale * (cond - uncond)
            x_t = self._scheduler.step(guided, t, x_t, return_dict=False)[0]
        if until < len(timesteps):
            return x_t, timesteps[until, None]
        t = timesteps[len(timesteps) // 2, None]
        return self._scheduler.add_noise(x_t, torch.randn_like(x_t), t), t

    @torch.no_grad()
    def maps(self, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The probabilities (1, heads, N, L) with which video tokens attend to the target's text, by layer."""
        self.doing = "the attention maps"
        with _MapsCapture(self._conditions.target.shape[1]) as captured:
            self.trained(x_t, t, self._conditions.target)
        return captured.maps

    def losses(self, x_t: Tensor, t: Tensor, mask: Tensor, x_t_kept: Tensor, t_kept: Tensor) -> Losses:
        """The losses where the target is asked for and where the kept one is; `mask` (1, F, h, w) on the token grid."""
        target, kept, uncond = self._conditions
        outputs: dict[str, Tensor] = {}
        self.doing = "the erasers' outputs"
        with EraserOutputsCapture(self.trained, self.erasers, outputs):
            self.trained(x_t, t, target)
        self.doing = "the teacher"
        with torch.no_grad():
            v_uncond = self.original(x_t, t, uncond)
            v_cond = self.original(x_t, t, target)
            v_kept = self.original(x_t_kept, t_kept, kept)
        self.doing = "the student"
        prediction = self.trained(x_t, t, target)
        prediction_kept = self.trained(x_t_kept, t_kept, kept)
        self.doing = "the losses"
        return Losses(
            seed_velocity_loss(prediction, v_uncond, v_cond, None),
            seed_velocity_loss(prediction_kept, v_kept, None, None),
            seed_localization_loss(list(outputs.values()), mask.flatten(1)),
        )
