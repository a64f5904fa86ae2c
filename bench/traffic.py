"""Bytes that the kernels move against the floor, counted: `python -m fastunlearn.bench.traffic`. Needs no GPU."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

# Read when kernels are decorated, which is at the first call.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["FASTUNLEARN_BACKEND"] = "triton"

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastunlearn.bench.cases import Case, localization_case, velocity_case
from fastunlearn.functional import negatively_guided_velocity_loss
from fastunlearn.testing.cases import random_tensors
from fastunlearn.testing.interpreter import observed_kernels

WEIGHTS = ("mask_ptr", "mask_ptrs", "sample_weight_ptr", "weight_ptr")
SUMS = ("partial_ptr", "loss_ptr", "per_layer_ptr", "prediction_norm_ptr", "target_norm_ptr", "inverse_ptr")
SUMS += ("upstream_ptr",)


class EagerTraffic(TorchDispatchMode):
    """Inside this context, the bytes of every operation's inputs and outputs. Views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        storages = {x.untyped_storage().data_ptr() for x in inputs}
        is_view = all(x.untyped_storage().data_ptr() in storages for x in outputs) and "_" not in func.__name__[-1:]
        if outputs and not is_view:
            self.operations += 1
            # What is expanded is read as what it is expanded from.
            self.bytes += sum(_bytes(x) for x in inputs + outputs)
        return result


def _bytes(x: Tensor) -> int:
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


class Row:
    """What a call moved."""

    def __init__(self, name: str, floor: int, run: Callable[[], Any], eager: Callable[[], Any] | None) -> None:
        self.name, self.floor = name, floor
        with observed_kernels() as observed:
            run()
        moved: Counter[str] = Counter()
        for (_, argument), count in (observed.loaded + observed.stored).items():
            kind = "weights" if argument in WEIGHTS else "sums" if argument in SUMS else "large"
            moved[kind] += count
        self.large, self.weights, self.sums = moved["large"], moved["weights"], moved["sums"]
        self.launches = len(observed.launches)
        self.eager: EagerTraffic | None = None
        if eager is not None:
            with EagerTraffic() as self.eager:
                eager()

    @property
    def is_at_floor(self) -> bool:
        """Whether not a byte more than the floor was moved, nor one less."""
        return self.large == self.floor

    def __str__(self) -> str:
        line = (
            f"{self.name:<46} {self.large:>11,} {self.floor:>11,} {self.large / self.floor:>5.2f} "
            f"{self.weights:>10,} {self.sums:>8,} {self.launches:>8}"
        )
        if self.eager is None:
            return line
        return f"{line} {self.eager.bytes:>12,} {self.eager.bytes / self.floor:>5.2f} {self.eager.operations:>4}"


def _of_case(case: Case, dtype: torch.dtype) -> Row:
    name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
    return Row(name, case.floor, case.peers["fastunlearn"], case.peers["seed, eager"])


def rows() -> list[Row]:
    """Every row of the table, at a unit upstream gradient."""
    shape = (1, 16, 16, 64, 64)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for guided, masked in ((True, False), (True, True), (False, False)):
            found.append(_of_case(velocity_case("", shape, guided=guided, masked=masked, dtype=dtype), dtype))
        found.append(_of_case(localization_case("", (1, 256, 512), 4, dtype=dtype), dtype))
    tensors = random_tensors(shape, [torch.float32] * 3)
    size = tensors[0].numel() * 4
    found.append(Row("guided velocity, no gradient", 3 * size, lambda: negatively_guided_velocity_loss(*tensors), None))
    wanted = [x.clone().requires_grad_() for x in tensors]
    found.append(
        Row(
            "guided velocity, all three gradients",
            6 * size,
            lambda: negatively_guided_velocity_loss(*wanted).loss.backward(),
            None,
        )
    )
    return found


def main() -> None:
    """Print the table; fail if a ratio is not 1."""
    print(
        f"{'forward + backward':<46} {'bytes':>11} {'floor':>11} {'ratio':>5} {'weights':>10} {'sums':>8} "
        f"{'launches':>8} {'seed, eager':>12} {'ratio':>5} {'ops':>4}"
    )
    table = rows()
    print(*table, sep="\n")
    if not all(row.is_at_floor for row in table):
        sys.exit("a kernel does not move the floor's bytes")


if __name__ == "__main__":
    main()
