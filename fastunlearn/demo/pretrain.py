"""Trains the demo's text-to-video model and its judge from nothing, and writes `weights.safetensors`.

    python -m fastunlearn.demo.pretrain [--steps N] [--minutes M] [--seed N] [--output FILE] [--compile]

Took 34 minutes on one CPU core with --compile. It can be stopped at any time: run again with the same arguments, it
goes on from its last checkpoint, which lies beside the output. Every step draws its data and noise from a generator of
its own, seeded by the run's seed and the step, so that a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastunlearn.demo import model as demo_model
from fastunlearn.demo.judge import held_out_accuracy, train_judge
from fastunlearn.demo.world import sample_videos
from fastunlearn.schedule import add_noise, velocity_target

BATCH = 16
MATRICES_LEARNING_RATE = 1e-2  # with Muon: a third of the steps that AdamW needs to the same loss
LEARNING_RATE = 3e-3  # with AdamW: embeddings, biases, norms, the text encoder
WEIGHT_DECAY = 0.01
WARMUP = 50
DECAY_SHARE = 0.4  # of the steps, at the end, in which the learning rate falls to zero
EMA_DECAY = 0.998
CONDITION_DROPOUT = 0.1
CHECKPOINT_EVERY = 200

_GOLDEN_RATIO = 0x9E3779B1  # of 2^32, made odd: its multiples fill the circle evenly


def learning_rate_factor(step: int, steps: int) -> float:
    """Trapezoid: a short rise to 1, a long plateau, a straight fall to zero."""
    rise = (step + 1) / WARMUP
    fall = (steps - step) / (DECAY_SHARE * steps)
    return min(1.0, rise, fall)


def build_optimizers(model: demo_model.TextToVideo) -> list[torch.optim.Optimizer]:
    """Muon (torch 2.9 or later) for the matrices of the transformer's blocks, AdamW for everything else."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "transformer_blocks" in name else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=MATRICES_LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    ]


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator of random numbers that no other step, of this run or of another seed's, begins with."""
    # Torch's generator on the CPU reads 32 bits of its seed: runs begin at places of these that lie far apart.
    return torch.Generator().manual_seed((seed * _GOLDEN_RATIO + step) % 2**32)


def training_loss(model: demo_model.TextToVideo, step: int, seed: int) -> Tensor:
    """Mean squared velocity error on a fresh batch, the timesteps spread evenly over the schedule."""
    generator = step_generator(seed, step)
    videos = sample_videos(BATCH, generator)
    dropped = torch.rand(BATCH, generator=generator) < CONDITION_DROPOUT
    prompts = ["" if drop else prompt for drop, prompt in zip(dropped.tolist(), videos.prompts, strict=True)]
    alphas_cumprod = model.scheduler.alphas_cumprod
    t = (((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH) * len(alphas_cumprod)).long()
    noise = torch.randn(videos.pixels.shape, generator=generator)
    x_t = add_noise(videos.pixels, noise, alphas_cumprod, t)
    prediction = model.velocity(x_t, t, model.encode(prompts))
    return (prediction - velocity_target(videos.pixels, noise, alphas_cumprod, t)).square().mean()


def _save_checkpoint(path: Path, **state: object) -> None:
    beside = path.with_suffix(".partial")
    torch.save(state, beside)
    beside.replace(path)


def train_model(
    steps: int, seed: int, checkpoint: Path, *, minutes: float = float("inf"), compiled: bool = False
) -> tuple[demo_model.TextToVideo, int, float]:
    """Trains, or goes on training, the model. Returns its moving average, the steps done and the last mean loss."""
    torch.manual_seed(seed)
    model = demo_model.TextToVideo()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = build_optimizers(model)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(learning_rate_factor, steps=steps))
        for optimizer in optimizers
    ]
    stateful: list[Any] = [*optimizers, *schedulers]
    step, smoothed = 0, 1.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if (state["seed"], state["steps"]) != (seed, steps):
            raise SystemExit(
                f"{checkpoint} is from a run with --seed {state['seed']} --steps {state['steps']}; "
                "give the same, or delete it"
            )
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for part, stored in zip(stateful, state["optimizers"], strict=True):
            part.load_state_dict(stored)
        step, smoothed = state["step"], state["loss"]
    if compiled:
        model.transformer.compile()
    ends = time.monotonic() + 60 * minutes
    with tqdm(total=steps, initial=step, desc="pretraining", unit="step", mininterval=2) as bar:
        while step < steps:
            loss = training_loss(model, step, seed)
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
            step += 1
            decay = min(EMA_DECAY, step / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            smoothed += 0.02 * (loss.item() - smoothed)
            bar.set_postfix(loss=f"{smoothed:.4f}", refresh=False)
            bar.update()
            out_of_time = time.monotonic() >= ends
            if step % CHECKPOINT_EVERY == 0 or step == steps or out_of_time:
                _save_checkpoint(
                    checkpoint,
                    seed=seed,
                    steps=steps,
                    step=step,
                    loss=smoothed,
                    model=model.state_dict(),
                    average=average.state_dict(),
                    optimizers=[part.state_dict() for part in stateful],
                )
            if out_of_time:
                break
    return average.eval(), step, smoothed


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains, and writes the weights."""
    parser = argparse.ArgumentParser(prog="python -m fastunlearn.demo.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3200, help="training steps in all (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; run again to go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=demo_model.WEIGHTS)
    parser.add_argument("--compile", action="store_true", help="a fifth faster, but needs a C++ compiler")
    options = parser.parse_args(arguments)
    checkpoint = options.output.with_suffix(".checkpoint")
    model, step, loss = train_model(
        options.steps, options.seed, checkpoint, minutes=options.minutes, compiled=options.compile
    )
    if step < options.steps:
        print(f"stopped after {step} of {options.steps} steps; run the same command to go on from {checkpoint}")
        return
    judge = train_judge(options.seed)
    accuracy = held_out_accuracy(judge, options.seed + 1)
    facts = {"steps": step, "seed": options.seed, "loss": round(loss, 5), "judge_accuracy": accuracy}
    demo_model.save(model, judge, facts, options.output)
    checkpoint.unlink()
    print(f"wrote {options.output} ({options.output.stat().st_size / 1e6:.2f} MB): {facts}")


if __name__ == "__main__":
    main()
