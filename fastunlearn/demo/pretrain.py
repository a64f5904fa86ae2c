"""Trains the demo's text-to-video model and its judge from scratch, and writes `weights.safetensors`.

    python -m fastunlearn.demo.pretrain [--variant NAME] [--steps N] [--minutes M] [--seed N] [--output FILE]
        [--compile]

It took 32 minutes on one CPU core with --compile. It can be stopped at any time: run again with the same arguments, it
resumes from its last checkpoint, a file next to the output. Every step draws its data and noise from its own generator,
seeded by the run's seed and the step, so that a resumed run sees the same data as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastunlearn.console import one_line_messages
from fastunlearn.demo import model as demo_model
from fastunlearn.demo.judge import held_out_accuracy, train_judge
from fastunlearn.demo.world import COLOURS, KINDS, MAX_OBJECTS, Nouns, prompt_of, sample_videos
from fastunlearn.files import expand_home, load_torch, replace_file, shown, writable
from fastunlearn.option_parser import OptionParser
from fastunlearn.training.cache.index import file_entry
from fastunlearn.training.option_fields import is_count, is_seed

COMMAND = "fastunlearn.demo.pretrain"
BATCH = 16
MATRICES_LEARNING_RATE = 1e-2  # with Muon, which needs a third of the steps of AdamW for the same loss
LEARNING_RATE = 3e-3  # with AdamW: embeddings, biases, norms; and the text encoder before
WEIGHT_DECAY = 0.01
WARMUP = 50
DECAY_SHARE = 0.4  # fraction of the steps, at the end, over which the learning rate falls to 0
EMA_DECAY = 0.998
TEXT_STEPS, TEXT_BATCH = 600, 64
CONDITION_DROPOUT = 0.1
CHECKPOINT_EVERY = 200

_GOLDEN_RATIO = 0x9E3779B1  # its fraction times 2^32, made odd: the multiples modulo 2^32 are evenly spread


def learning_rate_factor(step: int, steps: int) -> float:
    """Returns a trapezoidal schedule: a short rise to 1, a long plateau, and a linear fall to 0."""
    rise = (step + 1) / WARMUP
    fall = (steps - step) / (DECAY_SHARE * steps)
    return min(1.0, rise, fall)


def build_optimizers(model: demo_model.TextToVideo) -> list[torch.optim.Optimizer]:
    """Builds Muon (torch 2.9 or later) for the matrices of the transformer's blocks, and AdamW for the rest of it."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.transformer.named_parameters():
        (matrices if parameter.ndim == 2 and "blocks." in name else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=MATRICES_LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    ]


def step_generator(seed: int, step: int) -> torch.Generator:
    """Returns a generator of random numbers that differ from those of other steps and of other seeds."""
    # Torch's CPU generator reads only 32 bits of its seed, so different runs start far apart in that range.
    return torch.Generator().manual_seed((seed * _GOLDEN_RATIO + step) % 2**32)


def training_loss(model: demo_model.TextToVideo, step: int, seed: int) -> Tensor:
    """Returns the mean squared velocity error on a new batch.

    Timesteps are denser near pure noise: there it is decided which object goes where.
    """
    generator = step_generator(seed, step)
    videos = sample_videos(BATCH, generator)
    dropped = torch.rand(BATCH, generator=generator) < CONDITION_DROPOUT
    prompts = ["" if drop else prompt for drop, prompt in zip(dropped.tolist(), videos.prompts, strict=True)]
    timesteps = model.scheduler.config.num_train_timesteps
    evenly_spread = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    t = ((1 - evenly_spread.square()) * timesteps).long().clamp(max=timesteps - 1)
    noise = torch.randn(videos.pixels.shape, generator=generator)
    x_t, velocity = model.noised(videos.pixels, noise, t)
    with torch.no_grad():
        text = model.encode(prompts)
    return (model.velocity(x_t, t, text) - velocity).square().mean()


def pretrain_text_encoder(model: demo_model.TextToVideo, seed: int) -> None:
    """Teaches the text encoder to say at every word which object the word belongs to. Takes half a minute.

    Then it stays as it is, as the pretrained text encoder of a real model does. If it were trained together with the
    transformer, it would become a bag of words: the transformer first learns which kinds and which colours a prompt
    names, and what else the encoder says is noise until it is gone. Then kinds and colours would be right, but combined
    and placed by chance.
    """
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(demo_model.TEXT_WIDTH, (MAX_OBJECTS + 1) * len(KINDS) * len(COLOURS))
    optimizer = torch.optim.AdamW([*model.text_encoder.parameters(), *head.parameters()], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=TEXT_STEPS)
    for _ in tqdm(range(TEXT_STEPS), desc="pretraining the text encoder", unit="step"):
        nouns = sample_videos(TEXT_BATCH, generator).nouns
        logits = head(model.encode([prompt_of(of_video) for of_video in nouns]))
        loss = F.cross_entropy(logits.transpose(1, 2), word_labels(nouns))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def word_labels(prompts: Sequence[Nouns]) -> Tensor:
    """Returns the object of every token, (prompts, TEXT_LENGTH): a number for its place, kind and colour.

    The place is 0 or 1 from left to right, or 2 for an object that is alone. "and" and padding have the label -100,
    which the cross-entropy ignores.
    """
    labels = torch.full((len(prompts), demo_model.TEXT_LENGTH), -100)
    for row, nouns in enumerate(prompts):
        start = 0
        for index, noun in enumerate(nouns):
            end = start + len(str(noun).split())
            place = index if len(nouns) > 1 else MAX_OBJECTS
            label = (place * len(KINDS) + KINDS.index(noun.kind)) * len(COLOURS) + list(COLOURS).index(noun.colour)
            labels[row, start:end] = label
            start = end + 1
    return labels


class _Pretraining:
    """The state of a run: the model, its moving average, the optimizers, and the number of steps done."""

    def __init__(self, variant: str, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.steps, self.seed = steps, seed
        self.model = demo_model.TextToVideo(variant)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = build_optimizers(self.model)
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(learning_rate_factor, steps=steps))
            for optimizer in self.optimizers
        ]
        self.step, self.smoothed_loss = 0, 1.0

    def pretrain_text_encoder(self) -> None:
        pretrain_text_encoder(self.model, self.seed)
        self.average.text_encoder.load_state_dict(self.model.text_encoder.state_dict())

    def _stateful(self) -> list[Any]:
        return [*self.optimizers, *self.schedulers]

    def take_step(self) -> None:
        loss = training_loss(self.model, self.step, self.seed)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.transformer.parameters(), 1.0)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.smoothed_loss += 0.02 * (loss.item() - self.smoothed_loss)

    def _state(self) -> dict[str, Any]:
        return {
            "variant": self.model.variant,
            "seed": self.seed,
            "steps": self.steps,
            "step": self.step,
            "loss": self.smoothed_loss,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [part.state_dict() for part in self._stateful()],
        }

    def save(self, path: Path) -> None:
        content = io.BytesIO()
        torch.save(self._state(), content)
        replace_file(path, content.getvalue())

    def load(self, path: Path) -> None:
        """Raises ValueError if the file is damaged, or not a checkpoint of such a run."""
        state = load_torch(path)
        if not isinstance(state, dict) or state.keys() != self._state().keys():
            raise ValueError(
                f"{path}: expected a checkpoint of this command, got another file; delete it to start anew"
            )
        own = {"variant": self.model.variant, "seed": self.seed, "steps": self.steps}
        its = {name: state[name] for name in own}
        if its != own:
            expected, got = (" ".join(f"--{name} {value}" for name, value in of.items()) for of in (own, its))
            raise ValueError(
                f"{path}: expected a checkpoint of a run with {expected}, got one with {got}; give the same "
                "arguments, or delete it"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for part, part_state in zip(self._stateful(), state["optimizers"], strict=True):
            part.load_state_dict(part_state)
        self.step, self.smoothed_loss = state["step"], state["loss"]


def train_model(
    variant: str, steps: int, seed: int, checkpoint: Path, *, minutes: float = float("inf"), compiled: bool = False
) -> tuple[demo_model.TextToVideo, int, float]:
    """Trains the model, from `checkpoint` if it exists, until all steps are done or the time is up.

    Returns:
        The moving average of the model, the number of steps done, and the smoothed loss.
    """
    run = _Pretraining(variant, steps, seed)
    if checkpoint.exists():
        run.load(checkpoint)
    else:
        run.pretrain_text_encoder()
    if compiled:
        run.model.transformer.compile()
    deadline = time.monotonic() + 60 * minutes
    with tqdm(total=steps, initial=run.step, desc="pretraining", unit="step", mininterval=2) as bar:
        while run.step < steps:
            run.take_step()
            bar.set_postfix(loss=f"{run.smoothed_loss:.4f}", refresh=False)
            bar.update()
            out_of_time = time.monotonic() >= deadline
            if run.step % CHECKPOINT_EVERY == 0 or run.step == steps or out_of_time:
                run.save(checkpoint)
            if out_of_time:
                break
    return run.average.eval(), run.step, run.smoothed_loss


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, and writes the weights."""
    parser = OptionParser(prog=f"python -m {COMMAND}", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--variant",
        choices=demo_model.VARIANTS,
        default=demo_model.DEMO,
        metavar="NAME",
        help=f"model to train: {', '.join(demo_model.VARIANTS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=3200, metavar="N", help="training steps in total (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        metavar="M",
        help="stop after this many minutes; run again to resume (default: no limit)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of weights and data (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=expand_home,
        metavar="FILE",
        help="file to write, NAME.safetensors (default: the demo's weights, in the package; required for another "
        "variant)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer: a fifth faster, but needs a C++ compiler"
    )
    options = parser.parse_args(arguments)
    with one_line_messages(COMMAND):
        _check(options)
        _pretrain(options.variant, options.steps, options.seed, options.output, options.minutes, options.compile)


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for what would fail only after minutes. Fills in the output."""
    is_count("--steps", options.steps)
    is_seed("--seed", options.seed)
    if not options.minutes > 0:  # NaN fails too
        raise ValueError(f"--minutes: expected a number above 0, got {options.minutes}")
    if options.output is None:
        if options.variant != demo_model.DEMO:
            raise ValueError("--output: expected a file for a variant whose weights are not in the package, got none")
        options.output = demo_model.WEIGHTS
    if options.output.suffix != ".safetensors":
        raise ValueError(
            f"--output: expected a name that ends in .safetensors, by which the commands know the demo's models, got "
            f"{shown(str(options.output), 300)}"
        )
    writable(options.output.parent)


def _pretrain(variant: str, steps: int, seed: int, output: Path, minutes: float, compiled: bool) -> None:
    checkpoint = output.with_suffix(".checkpoint")
    model, step, loss = train_model(variant, steps, seed, checkpoint, minutes=minutes, compiled=compiled)
    if step < steps:
        print(f"stopped after {step} of {steps} steps; run the same command to go on from {checkpoint}")
        return
    judge = train_judge(seed)
    accuracy = held_out_accuracy(judge, seed + 1)
    record = {"steps": step, "seed": seed, "loss": round(loss, 5), "judge_accuracy": accuracy}
    demo_model.save(model, judge, record, output)
    checkpoint.unlink()
    entry = file_entry(output)
    print(f"wrote {output} ({entry['bytes'] / 1e6:.2f} MB, SHA-256 {entry['sha256']}): {record}")
    if output == demo_model.WEIGHTS and entry["sha256"] != demo_model.WEIGHTS_SHA256:
        print(f"the demo refuses these weights until WEIGHTS_SHA256 in {demo_model.__file__} is their SHA-256")


if __name__ == "__main__":
    main()
