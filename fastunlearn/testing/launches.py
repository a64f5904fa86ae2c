"""All the kernel launches that the operations make, recorded by calling them, to be compiled ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.testing.ahead_of_time import TARGETS, Binary, Launch, compile_launch, recorded_launches

# Sizes for which 16-byte accesses are promised: divisible by 16, and whole tiles in every dtype.
VELOCITY = (2, 16, 4, 32, 32)
TOKENS = (2, 64, 128)
FEATURES = (2, 16, 4, 16, 16)

VELOCITY_CHOICES: dict[str, tuple[Any, ...]] = {
    "inputs": (3, 2),
    "gradients": ("prediction", "all", "none"),
    "mask": ("of another resolution", None, "of the same resolution"),
    "sample_weight": (False, True),
    "loss_type": ("l2", "l1"),
    "reduction": ("mean", "none"),
    "mask_normalization": ("all", "mask"),
    "upstream": ("unit", "kept"),
}
LOCALIZATION_CHOICES: dict[str, tuple[Any, ...]] = {
    "outputs": ("tokens", "feature maps", "feature maps, mask of another resolution"),
    "layers": (3, 16),
    "gradients": (True, False),
    "loss_type": ("l2", "l1"),
    # Not "mean": to the kernels it is "sum" with another scale.
    "normalization": ("sum", "background_mean"),
    "masks": ("one for all", "one per layer"),
}

LOW_RANK_CHOICES: dict[str, tuple[Any, ...]] = {
    "rank": (128, 16, 40, 160),
    "gradients": ("all", "hidden", "weight", "none"),
    "weight_dtype": (torch.float32, None),
    "with_bias": (True, False),
    "normalization": ("sum", "background_mean"),
    "layers": (1, 16),
}
ATTENTION_CHOICES: dict[str, tuple[Any, ...]] = {
    "channels": (64, 128, 40),
    "lse": (True, False),
    "key_mask": (False, True),
}


def combinations(choices: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """All combinations of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def pairwise(choices: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """A few combinations that contain every pair of values of different choices."""

    def pairs(combination: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations(combination.items(), 2))

    everything = combinations(choices)
    missing = set().union(*map(pairs, everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda combination: len(pairs(combination) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def velocity_launches(dtypes: tuple[torch.dtype, ...], choice: dict[str, Any]) -> list[Launch]:
    """The launches of a velocity loss and its backward pass.

    Args:
        dtypes: the dtypes of prediction, uncond and cond.
        choice: a value for each of `VELOCITY_CHOICES`.
    """
    from fastunlearn.kernels.velocity import negatively_guided_velocity_loss

    inputs: list[Tensor | None] = [torch.zeros(VELOCITY, dtype=dtype) for dtype in dtypes]
    if choice["inputs"] == 2:
        inputs[2] = None
    count = {"all": 3, "prediction": 1, "none": 0}[choice["gradients"]]
    for x in inputs[:count]:
        if x is not None:
            x.requires_grad_()
    shapes = {"of the same resolution": (2, 4, 32, 32), "of another resolution": (2, 4, 16, 16)}
    with recorded_launches() as launches:
        loss, *_ = negatively_guided_velocity_loss(
            *inputs,
            guidance_scale=7.5,
            mask=torch.zeros(shapes[choice["mask"]]) if choice["mask"] else None,
            sample_weight=torch.zeros(2) if choice["sample_weight"] else None,
            channel_dim=1,
            loss_type=choice["loss_type"],
            reduction=choice["reduction"],
            mask_normalization=choice["mask_normalization"],
            weight=1.0,
        )
        if count:
            upstream = torch.zeros_like(loss) if choice["reduction"] == "none" else None
            loss.backward(upstream, retain_graph=choice["upstream"] == "kept")
    return launches


def localization_launches(dtypes: tuple[torch.dtype, ...], choice: dict[str, Any]) -> list[Launch]:
    """The launches of the localization loss and its backward pass.

    Args:
        dtypes: only the first is used, for the outputs.
        choice: a value for each of `LOCALIZATION_CHOICES`.
    """
    from fastunlearn.kernels.localization import localization_loss

    dtype = dtypes[0]
    shape = TOKENS if choice["outputs"] == "tokens" else FEATURES
    mask_shape = {"tokens": (2, 64), "feature maps": (2, 4, 16, 16)}.get(choice["outputs"], (2, 4, 8, 8))
    outputs = [torch.zeros(shape, dtype=dtype, requires_grad=choice["gradients"]) for _ in range(choice["layers"])]
    masks = [torch.zeros(mask_shape) for _ in outputs]
    if choice["masks"] == "one for all":
        masks = masks[:1] * len(outputs)
    with recorded_launches() as launches:
        loss, _ = localization_loss(
            outputs, masks, loss_type=choice["loss_type"], normalization=choice["normalization"], weight=1.0
        )
        if choice["gradients"]:
            loss.backward()
    return launches


def low_rank_launches(dtypes: tuple[torch.dtype, ...], choice: dict[str, Any]) -> list[Launch]:
    """The launches of the localization loss of low-rank outputs and its backward pass.

    Args:
        dtypes: only the first is used, for the hidden states, and for the parameters unless `choice` names another.
        choice: a value for each of `LOW_RANK_CHOICES`.
    """
    from fastunlearn.kernels.low_rank import low_rank_localization_loss

    dtype = dtypes[0]
    parameter_dtype, count = choice["weight_dtype"] or dtype, choice["layers"]
    hidden = torch.zeros(2, 256, choice["rank"], dtype=dtype, requires_grad=choice["gradients"] in ("all", "hidden"))
    weight = torch.zeros(
        256, choice["rank"], dtype=parameter_dtype, requires_grad=choice["gradients"] in ("all", "weight")
    )
    bias = torch.zeros(256, dtype=parameter_dtype, requires_grad=choice["gradients"] == "all")
    with recorded_launches() as launches:
        loss, _ = low_rank_localization_loss(
            [hidden] * count,
            [weight] * count,
            [bias if choice["with_bias"] else None] * count,
            [torch.zeros(2, 256)] * count,
            normalization=choice["normalization"],
            weight=1.0,
        )
        if choice["gradients"] != "none":
            loss.backward()
    return launches


def attention_launches(dtypes: tuple[torch.dtype, ...], choice: dict[str, Any]) -> list[Launch]:
    """The launches of concept attention.

    Args:
        dtypes: only the first is used, for queries and keys.
        choice: a value for each of `ATTENTION_CHOICES`.
    """
    from fastunlearn.kernels.concept_attention import concept_attention

    dtype = dtypes[0]
    query = torch.zeros(2, 4, 1024, choice["channels"], dtype=dtype)
    with recorded_launches() as launches:
        concept_attention(
            query,
            query,
            torch.zeros(2, 3, dtype=torch.int64),
            scale=0.125,
            key_mask=torch.zeros(2, 1024, dtype=torch.bool) if choice["key_mask"] else None,
            lse=torch.zeros(2, 4, 1024) if choice["lse"] else None,
        )
    return launches


class Operation(NamedTuple):
    """What to compile for an operation.

    Attributes:
        choices: the values of everything that a launch depends on, besides dtypes.
        heaviest: a value for each of the choices, such that everything is switched on: most registers are needed.
        record: (dtypes, a value for each of the choices) -> the launches.
        multiplies_matrices: whether it does: then it has no float64 on a GPU, where the torch backend computes it.
    """

    choices: dict[str, tuple[Any, ...]]
    heaviest: dict[str, Any]
    record: Callable[[tuple[torch.dtype, ...], dict[str, Any]], list[Launch]]
    multiplies_matrices: bool


OPERATIONS = (
    Operation(
        VELOCITY_CHOICES,
        {
            "inputs": 3,
            "gradients": "all",
            "mask": "of another resolution",
            "sample_weight": True,
            "loss_type": "l1",
            "reduction": "none",
            "mask_normalization": "mask",
            "upstream": "kept",
        },
        velocity_launches,
        multiplies_matrices=False,
    ),
    Operation(
        LOCALIZATION_CHOICES,
        {
            "outputs": "feature maps, mask of another resolution",
            "layers": 16,
            "gradients": True,
            "loss_type": "l1",
            "normalization": "background_mean",
            "masks": "one per layer",
        },
        localization_launches,
        multiplies_matrices=False,
    ),
    Operation(
        LOW_RANK_CHOICES,
        {
            "rank": 160,
            "gradients": "all",
            "weight_dtype": torch.float32,
            "with_bias": True,
            "normalization": "background_mean",
            "layers": 16,
        },
        low_rank_launches,
        multiplies_matrices=True,
    ),
    Operation(
        ATTENTION_CHOICES,
        {"channels": 128, "lse": False, "key_mask": True},
        attention_launches,
        multiplies_matrices=True,
    ),
)


def table_row(launch: Launch, target: str, binary: Binary) -> str:
    """A table row: target, registers, spilled and local bytes, kernel, and accesses to global memory."""
    counts = " ".join(f"{binary.accesses.count(kind)}x{kind}" for kind in sorted(set(binary.accesses)))
    memory = f"{binary.registers:>4} {binary.spilled_bytes:>5} {binary.local_bytes:>5}"
    return f"{target:<7} {memory}  {launch.describe()}  {counts}"


def main() -> None:
    """Print a table of what the usual calls compile to: one line per kernel, dtype and target."""
    print(f"{'kernel':<28} {'dtype':<9} {'target':<7} registers  spilled  accesses of 16 bytes, narrower ones")
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        launches = [
            launch
            for operation in OPERATIONS
            if not (operation.multiplies_matrices and dtype == torch.float64)
            for launch in operation.record((dtype,) * 3, combinations(operation.choices)[0])
        ]
        first_launch: dict[str, Launch] = {}
        for launch in launches:
            first_launch.setdefault(launch.kernel.__name__, launch)
        for launch in first_launch.values():
            for target in TARGETS:
                binary = compile_launch(launch, target)
                wide = binary.wide_accesses
                shown = f"{wide}, {len(binary.accesses) - wide}" if binary.accesses else "not counted"
                name = str(dtype).removeprefix("torch.")
                print(
                    f"{launch.kernel.__name__:<28} {name:<9} {target:<7} "
                    f"{binary.registers:>9}  {binary.spilled_bytes:>7}  {shown}"
                )


if __name__ == "__main__":
    main()
