"""Every kernel compiles for GPUs that are not here, without spills, and accesses large tensors 16 bytes at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastunlearn.testing.ahead_of_time import TARGETS, Launch, compile_launch, recorded_launches
from fastunlearn.testing.launches import (
    ATTENTION_CHOICES,
    OPERATIONS,
    Operation,
    attention_launches,
    combinations,
    pairwise,
    table_row,
)

pytest.importorskip("triton", reason="there are no kernels without Triton")

from fastunlearn.kernels import concept_attention
from fastunlearn.kernels.velocity import velocity_loss

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
MIXED = [(SINGLE, BRAIN, BRAIN), (BRAIN, HALF, SINGLE), (HALF, SINGLE, DOUBLE)]
LARGE = ("losses_ptr", "prediction_ptr", "uncond_ptr", "cond_ptr", "output_ptrs", "gradient_ptrs", "result_ptrs")
LARGE += ("gradient_prediction_ptr", "gradient_uncond_ptr", "gradient_cond_ptr", "x_ptrs", "query_ptr")
BYTES = {"*fp16": 2, "*bf16": 2, "*fp32": 4, "*fp64": 8}
SHARDS = 16  # more than there are cores, and few enough that recording the launches in every process is cheap


def wide_accesses(launch: Launch) -> int:
    """The number of 16-byte accesses that a thread needs for its part of a tile of every large tensor."""
    if launch.kernel.__name__.endswith("finish_kernel"):
        return 0
    warps = launch.options["num_warps"]
    constants = {launch.kernel.arg_names[path[0]]: value for path, value in launch.constants.items() if len(path) == 1}
    rank = constants.get("RANK", 16)
    if rank % 16 or constants.get("CHANNELS", 16) % 16:
        return 0  # rows are not 16-byte aligned
    count = 0
    for name, kind in launch.signature.items():
        if name not in LARGE and not (name == "upstream_ptr" and constants.get("PER_ELEMENT")):
            continue
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if launch.kernel.__name__ != "scale_gradients_kernel":
            kinds = kinds[:1]  # each program processes one of the layers
        count += sum(tile_elements(constants, name) * BYTES[k] // (16 * 32 * warps) for k in kinds if k in BYTES)
    return count


def tile_elements(constants: dict[str, Any], name: str) -> int:
    """The number of elements in a tile of a large tensor."""
    if "BLOCK_QUERIES" in constants:
        return constants["BLOCK_QUERIES"] * constants["CHANNELS"]
    if "BLOCK_ROWS" in constants:
        columns = constants.get("BLOCK_INNER", constants["BLOCK_RANK"]) if name == "x_ptrs" else constants["BLOCK_RANK"]
        return constants["BLOCK_ROWS"] * min(columns, constants["RANK"])
    return constants["BLOCK"]


def problems(launch: Launch, target: str) -> list[str]:
    binary = compile_launch(launch, target)
    complaints = []
    if binary.spilled_bytes or binary.local_bytes:
        complaints.append("spills")
    if TARGETS[target][0] == "cuda" and binary.wide_accesses < wide_accesses(launch):
        complaints.append(f"{binary.wide_accesses} accesses of 16 bytes, {wide_accesses(launch)} needed")
    return [f"{complaint}: {table_row(launch, target, binary)}" for complaint in complaints]


def recorded(operation: Operation, dtypes: tuple[torch.dtype, ...], grid: list[dict[str, Any]]) -> Iterator[Launch]:
    for choice in grid:
        yield from operation.record(dtypes, choice)


@functools.cache
def jobs() -> list[tuple[Launch, str]]:
    """What to compile for which target, each once.

    Every pair of choices meets in every dtype on every target, and so do all choices that need registers. The full
    product of the choices is compiled in bfloat16 for sm_90 alone: from one dtype or target to another, a kernel
    differs in its conversions, its accesses and its number of registers, which the pairs and the heaviest choice show,
    but not in how its choices combine. So do mixed dtypes, which differ from uniform ones only in conversions: theirs
    are compiled for sm_90. Products of matrices in float64 do not compile; they run on the torch backend.
    """
    grids: list[tuple[Iterator[Launch], list[str]]] = []
    for operation in OPERATIONS:
        everything = combinations(operation.choices)
        # The pairs, and all choices switched on at once; or everything, where that is no more.
        pairs = everything if len(everything) <= 12 else [*pairwise(operation.choices), operation.heaviest]
        dtypes = (HALF, BRAIN, SINGLE) if operation.multiplies_matrices else (HALF, BRAIN, SINGLE, DOUBLE)
        grids += [(recorded(operation, (dtype,) * 3, pairs), list(TARGETS)) for dtype in dtypes]
        if not operation.multiplies_matrices:
            grids.append((recorded(operation, (BRAIN,) * 3, everything), ["sm_90"]))
            grids += [(recorded(operation, mixed, pairs), ["sm_90"]) for mixed in MIXED]
    distinct = {
        (launch.key, target): (launch, target)
        for launches, targets in grids
        for launch in launches
        for target in targets
    }
    return list(distinct.values())


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_launch_compiles_well(shard: int) -> None:
    table = [line for launch, target in jobs()[shard::SHARDS] for line in problems(launch, target)]
    assert len(jobs()) > 1000
    assert not table, "\n".join(table)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_two_programs_of_attention_share_a_multiprocessor_of_hopper(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concept_attention, "_capability", lambda device: 9)
    concept_attention._plan.cache_clear()
    grid = [choice for choice in combinations(ATTENTION_CHOICES) if not choice["lse"]]
    for choice in grid if dtype == BRAIN else grid[:1]:
        (launch,) = attention_launches((dtype,), choice)
        binary = compile_launch(launch, "sm_90")
        assert binary.spilled_bytes == binary.local_bytes == 0
        assert binary.registers * launch.options["num_warps"] * 32 <= 65536 // 2
    concept_attention._plan.cache_clear()


@pytest.mark.parametrize(
    ("heads", "tokens", "channels"),
    [(30, 17776, 64), (48, 17776, 64), (24, 119056, 128), (40, 32760, 128), (12, 32760, 128)],
    ids=["CogVideoX-2B", "CogVideoX-5B", "HunyuanVideo", "Wan 14B", "Wan 1.3B"],
)
@pytest.mark.parametrize("multiprocessors", [108, 132, 148, 160])
def test_attention_leaves_few_multiprocessors_idle(
    heads: int, tokens: int, channels: int, multiprocessors: int
) -> None:
    x = torch.empty(1, heads, tokens, channels, dtype=BRAIN, device="meta")
    for programs_each in (1, 2):
        plan = concept_attention._plan(
            x.shape,
            x.stride(),
            x.dtype,
            tokens,
            x.stride(),
            x.dtype,
            2,
            (2, 1),
            None,
            None,
            None,
            torch.device("cpu"),
        )
        waves = math.prod(plan.grid) / (programs_each * multiprocessors)
        assert waves / math.ceil(waves) > 0.93


def test_more_than_two_to_the_31_elements() -> None:
    """Such tensors cost no memory here, because nothing touches it: launches are recorded and compiled, not run."""
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
    table = [line for launch in launches for target in TARGETS for line in problems(launch, target)]
    assert not table, "\n".join(table)
