"""What to say when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastunlearn.training.options import EvaluateOptions, PrepareOptions, SampleOptions, TrainingOptions

Options = PrepareOptions | TrainingOptions | EvaluateOptions | SampleOptions


@contextmanager
def explained_out_of_memory(options: Options) -> Iterator[None]:
    """Turns what torch raises when memory runs out into a MemoryError that says what would help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        message = str(error)
        lacks_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not lacks_memory and "can't allocate memory" not in message and "not enough memory" not in message:
            raise
        helps = "; ".join(knob for knob, is_left in _knobs(options) if is_left)
        raise MemoryError(
            f"out of memory ({message.splitlines()[0] if message else 'no details'}). What helps: {helps}"
        ) from error


def _knobs(options: Options) -> list[tuple[str, bool]]:
    """What takes less memory, and whether it is left to try."""
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
    batch = ("--batch-size 1", not isinstance(options, SampleOptions) and options.batch_size > 1)
    return [batch, precision, ("a smaller --height, --width or --num-frames", True)]
