"""The training step of published T2VUnlearning-style loops, written plainly: what our step is compared with.

Two copies of the model are in memory: the original one, and the one that is trained. A step

1. samples a trajectory with classifier-free guidance, to a random sampling step (as Receler does, which is halfway on
   average) or to its end;
2. runs one pass to compute the concept's mask from attention maps of tokens x tokens, and one to capture the erasers'
   outputs, as the usage notes of T2VUnlearning's losses say;
3. runs the original model three times and the trained one twice, one prompt at a time.
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
from fastunlearn.bench.cases import plain_localization_loss, plain_velocity_loss


class Conditions(NamedTuple):
    """Text embeddings (1, L, D) of three prompts.

    Attributes:
        target: a prompt with the concept.
        kept: a prompt whose videos should stay as they are.
        uncond: the empty prompt.
    """

    target: Tensor
    kept: Tensor
    uncond: Tensor


class Losses(NamedTuple):
    """The losses of a step, without their weights.

    Attributes:
        unlearning: a mean of squares.
        preservation: a mean of squares.
        localization: a sum of squares over what lies outside the mask, averaged over layers.
    """

    unlearning: Tensor
    preservation: Tensor
    localization: Tensor


class _MapsCapture(TorchFunctionMode):
    """Computes all probabilities of every attention that runs, and keeps those from video tokens to text tokens."""

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
    """Trains erasers one step at a time.

    Args:
        transformer: a CogVideoX. It becomes the trained model; the original one is a copy.
        scheduler: the scheduler of its pipeline.
        conditions: the prompts' text embeddings.
        words: positions of the concept's tokens in the target prompt.
        rank: inner width of the erasers.
        weights: weights of the unlearning, preservation and localization losses.
        guidance_scale: scale of classifier-free guidance while sampling.
        sampling_steps: steps of a whole trajectory.
        checkpointing: whether to use gradient checkpointing.

    Attributes:
        original: the model without erasers.
        trained: the model with erasers.
        erasers: the erasers, by layer.
        parameters: the parameters of all erasers.
        weights: the losses' weights.
        phase: what the step is doing; after an out-of-memory error, what it was doing then.
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
        self.phase = "copying the model"
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

    def step(self, noise: Tensor, stop_after: int) -> None:
        """One whole training step.

        Args:
            noise: (1, F, C, H, W), where sampling starts.
            stop_after: the number of sampling steps to take.
        """
        x_t, t = self.sample(noise, stop_after)
        masks = get_mask(self.maps(x_t, t), self._words, 0.5, *x_t.shape[-2:], patch_size=self._patch)
        mask = masks["average_mask"]
        losses = self.losses(x_t, t, mask, x_t, t)
        self.phase = "the backward pass"
        total = sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True))
        total.backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def sample(self, noise: Tensor, stop_after: int) -> tuple[Tensor, Tensor]:
        """Samples part of a trajectory, or all of it, in which case noise is added up to the middle timestep.

        Args:
            noise: (1, F, C, H, W), where sampling starts.
            stop_after: the number of sampling steps to take.

        Returns:
            x_t (1, F, C, H, W) and its timestep (1,).
        """
        self.phase = "sampling"
        text = torch.cat([self._conditions.uncond, self._conditions.target])
        timesteps = self._scheduler.timesteps
        x_t = noise
        for t in timesteps[:stop_after]:
            uncond, cond = self.original(x_t.repeat(2, 1, 1, 1, 1), t.expand(2), text).chunk(2)
            guided = uncond + self._guidance_scale * (cond - uncond)
            x_t = self._scheduler.step(guided, t, x_t, return_dict=False)[0]
        if stop_after < len(timesteps):
            return x_t, timesteps[stop_after, None]
        t = timesteps[len(timesteps) // 2, None]
        return self._scheduler.add_noise(x_t, torch.randn_like(x_t), t), t

    @torch.no_grad()
    def maps(self, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Attention probabilities (1, heads, N, L) from video tokens to the target prompt's tokens, by layer."""
        self.phase = "the attention maps"
        with _MapsCapture(self._conditions.target.shape[1]) as captured:
            self.trained(x_t, t, self._conditions.target)
        return captured.maps

    def losses(self, x_t: Tensor, t: Tensor, mask: Tensor, x_t_kept: Tensor, t_kept: Tensor) -> Losses:
        """The three losses.

        Args:
            x_t: (1, F, C, H, W), the point for the target prompt.
            t: (1,), its timestep.
            mask: (1, F, h, w) on the token grid.
            x_t_kept: (1, F, C, H, W), the point for the kept prompt.
            t_kept: (1,), its timestep.
        """
        target, kept, uncond = self._conditions
        outputs: dict[str, Tensor] = {}
        self.phase = "the erasers' outputs"
        with EraserOutputsCapture(self.trained, self.erasers, outputs):
            self.trained(x_t, t, target)
        self.phase = "the teacher"
        with torch.no_grad():
            v_uncond = self.original(x_t, t, uncond)
            v_cond = self.original(x_t, t, target)
            v_kept = self.original(x_t_kept, t_kept, kept)
        self.phase = "the student"
        prediction = self.trained(x_t, t, target)
        prediction_kept = self.trained(x_t_kept, t_kept, kept)
        self.phase = "the losses"
        return Losses(
            plain_velocity_loss(prediction, v_uncond, v_cond, None),
            plain_velocity_loss(prediction_kept, v_kept, None, None),
            plain_localization_loss(list(outputs.values()), mask.flatten(1)),
        )
