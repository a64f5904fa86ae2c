"""What to say when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastunlearn.training.options import TrainingOptions


@contextmanager
def explained_out_of_memory(options: TrainingOptions) -> Iterator[None]:
    """Turns what torch raises when memory runs out into a MemoryError that says what would help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        message = str(error)
        lacks_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not lacks_memory and "can't allocate memory" not in message and "not enough memory" not in message:
            raise
        knobs = [
            ("--gradient-checkpointing", not options.gradient_checkpointing),
            ("--sequential-terms", not options.sequential_terms and options.preservation_weight > 0),
            (
                "--train-batch-size 1 with --gradient-accumulation-steps "
                f"{options.train_batch_size * options.gradient_accumulation_steps}",
                options.train_batch_size > 1,
            ),
            ("--mixed-precision bf16", options.mixed_precision == "no"),
            ("several processes with --fsdp", not options.fsdp),
            ("a smaller --height, --width or --num-frames at prepare", True),
        ]
        helps = "; ".join(knob for knob, is_left in knobs if is_left)
        raise MemoryError(
            f"out of memory ({message.splitlines()[0] if message else 'no details'}). What helps: {helps}"
        ) from error
