"""From prompts to an erased model: the four commands, and what they are made of.

    options.py       the options of every command; the command line is made from these dataclasses (option_fields.py)
    prepare.py       `fastunlearn prepare` stores the frozen model's velocities and masks: the teacher cache
    train.py         `fastunlearn train` trains erasers on that cache
    evaluate.py      `fastunlearn evaluate` measures erasers on held-out prompts, without making a video
    sample.py        `fastunlearn sample` makes videos without and with erasers, from the same noise
    example.py       the same in Python, as one short program: read this first
    example_step.py  one training step with the drop-in losses, for loops that exist already
    cost.py          memory and hours on published models, computed
    random_numbers.py  generators that a key seeds, the same on every device

Each command is a module whose `run` takes its options; the command line only parses them. `prepare` and `train` take
options and groups of target prompts from one recipe file, `--recipe` (data/recipe.py). What they use, in folders:

    data/        what the user gives: prompts, videos, recipe files, and the requests made from them
    model/       a saved pipeline in memory, component by component, and sampling from it
    cache/       the teacher cache: planned, computed, written, read
    evaluation/  metrics on velocities, and their report
    loop/        the training loop: batches, losses, optimizer, validation, checkpoints, processes

The commands import from these folders. A folder imports options.py, random_numbers.py, and folders listed above it.
"""
