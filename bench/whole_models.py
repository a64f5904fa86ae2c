"""Measures what captures and low-rank outputs cost or save in a pass through a whole model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn import AttnMapsCapture, EraserOutputsCapture, T2VUnlearningLoss, as_velocity_model, attach_erasers
from fastunlearn.bench.agreement import Disagreement, check_relative_difference
from fastunlearn.bench.cogvideox import Size, random_transformer
from fastunlearn.bench.meters import MIB, Meter

DEMO_POINTS, DEMO_RANK = 12, 64  # target points, and as many kept ones, of a step on the demo's model


def captured_forward(meter: Meter, *, layers: int = 4, heads: int = 8, side: int = 64) -> dict[str, Any]:
    """A forward pass of a CogVideoX that captures concept maps, against a plain one.

    Args:
        meter: measures both.
        layers: transformer blocks.
        heads: attention heads of 64 channels each.
        side: height and width of the four latent frames; a token covers 2 x 2 latent pixels.

    Raises:
        Disagreement: the captured pass gives other bits, or a map of some layers is missing.
    """
    size = Size(layers, heads, 64, 8 * side, 8 * side, 13, text_tokens=226, text_features=64, time_features=512, rank=0)
    model = as_velocity_model(random_transformer(size, meter.device, torch.float32))
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, 4, 16, side, side, generator=generator).to(meter.device)
    text = torch.randn(1, 226, 64, generator=generator).to(meter.device)
    t = torch.tensor([500], device=meter.device)

    @torch.no_grad()
    def plain() -> Tensor:
        return model(x_t, t, text)

    maps: dict[str, Tensor] = {}

    def captured() -> Tensor:
        with AttnMapsCapture(model, maps, token_indices=[3, 7]):
            return plain()

    if not torch.equal(plain(), captured()):
        raise Disagreement("captured forward pass: expected the same bits as without a capture, got others")
    if len(maps) != layers:
        raise Disagreement(f"captured forward pass: expected a map of each of {layers} layers, got {len(maps)}")
    seconds = meter.seconds({"plain": plain, "captured": captured})
    ratio = seconds["captured"] / seconds["plain"]
    print(f"\nforward pass: CogVideoX, {layers} layers, {heads} heads x 64, {size.tokens} + 226 tokens")
    print(f"plain {1e3 * seconds['plain']:.0f} ms, captured {1e3 * seconds['captured']:.0f} ms: {ratio:.3f} times")
    return {"table": "captured forward", "rows": [{"peer": name, "seconds": s} for name, s in seconds.items()]}


def demo_step(meter: Meter) -> dict[str, Any]:
    """A training step on the demo's model, with dense eraser outputs and with low-rank ones.

    Raises:
        Disagreement: the losses or the gradients of both differ.
    """
    step = _demo_step(meter.device)
    for actual, expected in zip(step(True), step(False), strict=True):
        check_relative_difference("the demo's step", actual, expected, 1e-4)
    costs = meter.costs({"outputs": functools.partial(step, False), "low rank": functools.partial(step, True)})
    print("\na training step at the demo's size, forward and backward")
    for name, (seconds, peak_bytes) in costs.items():
        print(f"{name:<14} {1e3 * seconds:>8.0f} ms {peak_bytes / MIB:>9.0f} MiB")
    return {"table": "demo step", "rows": [{"peer": name, **cost._asdict()} for name, cost in costs.items()]}


def _demo_step(device: torch.device) -> Callable[[bool], tuple[Tensor, ...]]:
    """A function that takes a step, with low-rank outputs or dense ones, and returns the loss and the gradients.

    Teacher velocities and masks are random, and no optimizer runs.
    """
    from fastunlearn.demo.model import TEXT_LENGTH, TOKEN_GRID, load
    from fastunlearn.demo.world import FRAMES, HEIGHT, WIDTH

    model = load()[0].to(device)
    erasers = attach_erasers(model.transformer, rank=DEMO_RANK)
    torch.manual_seed(0)
    for eraser in erasers.values():
        nn.init.normal_(eraser.up.weight, std=0.01)
    velocity = as_velocity_model(model.transformer)
    loss_fn = T2VUnlearningLoss(model.scheduler.alphas_cumprod, channel_dim=2, normalization="background_mean")
    width = model.transformer.config.text_embed_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(DEMO_POINTS, *shape, device=device)

    video = (FRAMES, 3, HEIGHT, WIDTH)
    x_t, v_uncond, v_cond = (random(*video) for _ in range(3))
    x_t_kept, v_kept = (random(*video) for _ in range(2))
    text, kept_text = (random(TEXT_LENGTH, width) for _ in range(2))
    t = torch.full((DEMO_POINTS,), 500, device=device)
    mask = (torch.rand(DEMO_POINTS, *TOKEN_GRID, device=device) > 0.7).float()
    parameters = [p for eraser in erasers.values() for p in eraser.parameters()]

    def step(is_low_rank: bool) -> tuple[Tensor, ...]:
        outputs: dict[str, Any] = {}
        with EraserOutputsCapture(velocity, erasers, outputs, low_rank=is_low_rank):
            loss, _ = loss_fn(
                None,
                velocity,
                x_t,
                t,
                text,
                kept_text,
                localization_mask=mask,
                eraser_outputs=outputs,
                v_uncond=v_uncond,
                v_cond=v_cond,
                v_preserve=v_kept,
                x_t_preserve=x_t_kept,
                t_preserve=t,
            )
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    return step
