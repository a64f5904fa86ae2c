"""Every kernel compiles for GPUs that are not here, without spills, and moves large tensors 16 bytes at a time."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import pytest
import torch

from fastunlearn.testing.ahead_of_time import TARGETS, Launch, compile_launch, recorded_launches
from fastunlearn.testing.launches import (
    ATTENTION_CHOICES,
    LOCALIZATION_CHOICES,
    LOW_RANK_CHOICES,
    VELOCITY_CHOICES,
    attention_launches,
    combinations,
    distinct,
    localization_launches,
    low_rank_launches,
    pairwise,
    row,
    velocity_launches,
)

pytest.importorskip("triton", reason="there are no kernels without Triton")

from fastunlearn.kernels.velocity import velocity_loss

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
MIXED = [(SINGLE, BRAIN, BRAIN), (BRAIN, HALF, SINGLE), (HALF, SINGLE, DOUBLE)]
LARGE = ("losses_ptr", "prediction_ptr", "uncond_ptr", "cond_ptr", "output_ptrs", "gradient_ptrs", "result_ptrs")
LARGE += ("gradient_prediction_ptr", "gradient_uncond_ptr", "gradient_cond_ptr", "x_ptrs", "query_ptr")
BYTES = {"*fp16": 2, "*bf16": 2, "*fp32": 4, "*fp64": 8}


def wide_accesses(launch: Launch) -> int:
    """How many 16-byte accesses a thread needs for its part of a tile of every large tensor."""
    if launch.kernel.__name__.endswith("finish_kernel"):
        return 0
    warps = launch.options["num_warps"]
    constants = {launch.kernel.arg_names[path[0]]: value for path, value in launch.constants.items() if len(path) == 1}
    rank = constants.get("RANK", 16)
    if rank % 16 or constants.get("CHANNELS", 16) % 16:
        return 0  # rows that do not begin at 16 bytes
    count = 0
    for name, kind in launch.signature.items():
        if name not in LARGE and not (name == "upstream_ptr" and constants.get("PER_ELEMENT")):
            continue
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if launch.kernel.__name__ != "scale_gradients_kernel":
            kinds = kinds[:1]  # one of the layers
        count += sum(elements(constants, name) * BYTES[k] // (16 * 32 * warps) for k in kinds if k in BYTES)
    return count


def elements(constants: dict[str, Any], name: str) -> int:
    """Of the tile of a large tensor."""
    if "BLOCK_QUERIES" in constants:
        return constants["BLOCK_QUERIES"] * constants["CHANNELS"]
    if "BLOCK_ROWS" in constants:
        columns = constants.get("BLOCK_INNER", constants["BLOCK_RANK"]) if name == "x_ptrs" else constants["BLOCK_RANK"]
        return constants["BLOCK_ROWS"] * min(columns, constants["RANK"])
    return constants["BLOCK"]


def problems(launch: Launch, target: str) -> list[str]:
    binary = compile_launch(launch, target)
    found = []
    if binary.spilled_bytes or binary.local_bytes:
        found.append("spills")
    if TARGETS[target][0] == "cuda" and binary.wide_accesses < wide_accesses(launch):
        found.append(f"{binary.wide_accesses} accesses of 16 bytes, {wide_accesses(launch)} needed")
    return [f"{what}: {row(launch, target, binary)}" for what in found]


def compiled(chunk: tuple[list[int], list[str]]) -> list[str]:
    indices, targets = chunk
    return [line for i in indices for target in targets for line in problems(LAUNCHES[i], target)]


LAUNCHES: list[Launch] = []


def check(launches: list[Launch], targets: list[str]) -> None:
    global LAUNCHES
    LAUNCHES = launches
    count = min(os.cpu_count() or 1, 8)
    chunks = [(list(range(len(launches)))[i :: 4 * count], targets) for i in range(4 * count)]
    # Forked, because kernels cannot be sent: the children find `LAUNCHES` as it is.
    with multiprocessing.get_context("fork").Pool(count) as pool:
        table = [line for lines in pool.map(compiled, chunks) for line in lines]
    assert launches
    assert not table, "\n".join(table)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE, DOUBLE])
def test_every_combination(dtype: torch.dtype) -> None:
    velocity = (x for c in combinations(VELOCITY_CHOICES) for x in velocity_launches((dtype,) * 3, c))
    localization = (x for c in combinations(LOCALIZATION_CHOICES) for x in localization_launches(dtype, c))
    check(distinct(velocity) + distinct(localization), ["sm_90"])


@pytest.mark.parametrize("dtypes", [(HALF,) * 3, (BRAIN,) * 3, (SINGLE,) * 3, (DOUBLE,) * 3, *MIXED])
def test_other_gpus_and_mixed_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    velocity = (x for c in pairwise(VELOCITY_CHOICES) for x in velocity_launches(dtypes, c))
    localization = (x for c in pairwise(LOCALIZATION_CHOICES) for x in localization_launches(dtypes[0], c))
    check(distinct(velocity) + distinct(localization), list(TARGETS))


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
def test_products_of_matrices(dtype: torch.dtype) -> None:
    """Float64 ones do not compile, and run on torch."""
    low_rank = (x for c in pairwise(LOW_RANK_CHOICES) for x in low_rank_launches(dtype, c))
    attention = (x for c in combinations(ATTENTION_CHOICES) for x in attention_launches(dtype, c))
    check(distinct(low_rank) + distinct(attention), list(TARGETS))


def test_more_than_two_to_the_31_elements() -> None:
    """Memory that is not touched is not there: what would be launched is compiled all the same."""
    shape = (1, 2, 2**30 + 2048)
    prediction, target = (torch.empty(shape, dtype=BRAIN) for _ in range(2))
    prediction.requires_grad_()
    with recorded_launches() as launches:
        loss, *_ = velocity_loss(
            prediction,
            target,
            mask=torch.zeros(1, 2**20),
            sample_weight=None,
            channel_dim=1,
            loss_type="l2",
            reduction="mean",
            mask_normalization="all",
            weight=1.0,
        )
        loss.backward()
    forward, _, backward = launches
    assert forward.signature["elements"] == backward.signature["elements"] == "i64"
    assert forward.constants[(forward.kernel.arg_names.index("MASK_IN_32_BITS"),)] is False
    check(launches, list(TARGETS))
