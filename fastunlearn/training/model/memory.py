"""Explaining what helps when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastunlearn.training.options import EvaluateOptions, PrepareOptions, SampleOptions, TrainingOptions

Options = PrepareOptions | TrainingOptions | EvaluateOptions | SampleOptions


@contextmanager
def explained_out_of_memory(options: Options) -> Iterator[None]:
    """Turns an out-of-memory error inside the `with` block into a MemoryError that names the options that help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        message = str(error)
        lacks_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not lacks_memory and "can't allocate memory" not in message and "not enough memory" not in message:
            raise
        helps = "; ".join(remedy for remedy, is_left in _remedies(options) if is_left)
        raise MemoryError(
            f"out of memory ({message.splitlines()[0] if message else 'no details'}). What helps: {helps}"
        ) from error


def _remedies(options: Options) -> list[tuple[str, bool]]:
    """Options that take less memory, each with whether it is left to try."""
    precision = ("--mixed-precision bf16", options.mixed_precision == "no")
    if isinstance(options, TrainingOptions):
        accumulated = options.train_batch_size * options.gradient_accumulation_steps
        return [
            ("--gradient-checkpointing", not options.gradient_checkpointing),
            ("--sequential-terms", not options.sequential_terms and options.preservation_weight > 0),
            (
                f"--train-batch-size 1 with --gradient-accumulation-steps {accumulated}",
                options.train_batch_size > 1,
            ),
            precision,
            ("several processes with --fsdp", not options.fsdp),
            ("a smaller --height, --width or --num-frames at prepare", True),
        ]
    smaller_batch = ("--batch-size 1", not isinstance(options, SampleOptions) and options.batch_size > 1)
    return [smaller_batch, precision, ("a smaller --height, --width or --num-frames", True)]
