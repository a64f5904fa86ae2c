"""Counts the bytes that the kernels load and store, against the fewest bytes possible. Needs no GPU.

The kernels run in Triton's interpreter. Beside them stand the bytes that the same operation moves in plain PyTorch, as
T2VUnlearning-style training loops write it ("seed, eager").
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Set before any kernel is imported: Triton reads TRITON_INTERPRET when a kernel is decorated.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["FASTUNLEARN_BACKEND"] = "triton"

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastunlearn.bench.cases import Case, localization_case, plain_concept_maps, plain_localization_loss, velocity_case
from fastunlearn.dtypes import dtype_name
from fastunlearn.functional import concept_attention, localization_loss, negatively_guided_velocity_loss
from fastunlearn.option_parser import OptionParser
from fastunlearn.testing.cases import low_rank_outputs, random_mask, random_tensors
from fastunlearn.testing.interpreter import observed_kernels

# Arguments of kernels that point to small tensors which many programs read: a GPU's caches serve them.
CACHED: tuple[str, ...] = ("mask_ptr", "mask_ptrs", "column_ptrs", "sample_weight_ptr", "weight_ptr", "matrix_ptr")
CACHED += ("key_ptr", "token_ptr")
# Arguments of kernels that point to partial sums and scalars.
SUMS: tuple[str, ...] = ("partial_ptr", "loss_ptr", "per_layer_ptr", "prediction_norm_ptr", "target_norm_ptr")
SUMS += ("inverse_ptr", "upstream_ptr", "sum_ptr", "moments_ptr", "gram_ptr", "partial_moments_ptr", "partial_gram_ptr")


class Sizes(NamedTuple):
    """Sizes of the tensors in the table.

    Attributes:
        velocity: (B, C, F, H, W) of a velocity.
        outputs: (B, N, D) of a layer's outputs in the localization loss.
        low_rank: N, D and r of a layer in the low-rank localization loss.
        attention: heads, tokens and channels per head in concept attention.
    """

    velocity: tuple[int, ...]
    outputs: tuple[int, int, int]
    low_rank: tuple[int, int, int]
    attention: tuple[int, int, int]


SIZES = {
    "full": Sizes((1, 16, 16, 64, 64), (1, 256, 512), (512, 256, 64), (4, 512, 64)),
    "small": Sizes((1, 16, 4, 32, 32), (1, 64, 128), (96, 64, 16), (2, 128, 32)),
}


class EagerTraffic(TorchDispatchMode):
    """Inside this context, adds up the bytes of every operation's inputs and outputs. A view moves no bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
            self.bytes += sum(_stored_bytes(x) for x in inputs + outputs)
        return result


def _stored_bytes(x: Tensor) -> int:
    """Bytes that a tensor's elements take in memory: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


class Row:
    """The bytes that one call moves.

    Args:
        name: the operation.
        floor: the fewest bytes possible.
        run: calls the operation, forward and backward.
        eager: does the same in plain PyTorch; None for no comparison.
    """

    def __init__(self, name: str, floor: int, run: Callable[[], Any], eager: Callable[[], Any] | None) -> None:
        self.name, self.floor = name, floor
        with observed_kernels() as observed:
            run()
        moved: Counter[str] = Counter()
        for (_, argument), count in (observed.loaded + observed.stored).items():
            column = "cached" if argument in CACHED else "sums" if argument in SUMS else "large"
            moved[column] += count
        self.large, self.cached, self.sums = moved["large"], moved["cached"], moved["sums"]
        self.launches = len(observed.launches)
        self.eager: EagerTraffic | None = None
        if eager is not None:
            with EagerTraffic() as self.eager:
                eager()

    @property
    def is_at_floor(self) -> bool:
        """Whether exactly the floor's bytes were moved."""
        return self.large == self.floor

    def __str__(self) -> str:
        line = (
            f"{self.name:<46} {self.large:>11,} {self.floor:>11,} {self.large / self.floor:>5.2f} "
            f"{self.cached:>10,} {self.sums:>10,} {self.launches:>8}"
        )
        if self.eager is None:
            return line
        return f"{line} {self.eager.bytes:>13,} {self.eager.bytes / self.floor:>6.2f} {self.eager.operations:>4}"


def _case_row(case: Case, dtype: torch.dtype) -> Row:
    return Row(f"{case.name}, {dtype_name(dtype)}", case.floor, case.peers["fastunlearn"], case.peers["seed, eager"])


def _low_rank_row(tokens: int, features: int, rank: int, layers: int, dtype: torch.dtype) -> Row:
    """Low-rank localization against the dense loss of outputs that exist already: computing them is not counted."""
    outputs = low_rank_outputs(layers, (1, tokens), features, rank, dtype, weight_dtype=torch.float32)
    mask = random_mask("bool", (1, tokens))
    for x in (x for output in outputs for x in output if x is not None):
        x.requires_grad_()
    dense = [x.requires_grad_() for x in random_tensors((1, tokens, features), [dtype] * layers)]
    background = int((~mask).sum())
    hidden_bytes = (2 * background + tokens) * rank * dtype.itemsize
    # Parameters are float32. Weights are read twice and written once; reads of the bias are served by caches.
    floor = layers * (hidden_bytes + (3 * rank + 1) * features * 4)
    return Row(
        f"low-rank localization, {layers} layers, {dtype_name(dtype)}",
        floor,
        lambda: localization_loss(outputs, mask).loss.backward(),
        lambda: plain_localization_loss(dense, mask.to(dtype)).backward(),
    )


def _attention_row(heads: int, tokens: int, channels: int, dtype: torch.dtype, *, with_lse: bool) -> Row:
    query, key = random_tensors((1, heads, tokens, channels), [dtype] * 2)
    lse = torch.zeros(1, heads, tokens) if with_lse else None
    concept = torch.tensor([3, 7])
    return Row(
        f"concept attention{', lse given' if with_lse else ''}, {dtype_name(dtype)}",
        query.nbytes + (0 if lse is None else lse.nbytes),
        lambda: concept_attention(query, key, concept, lse=lse),
        lambda: plain_concept_maps(query, key, concept),
    )


def rows(sizes: Sizes = SIZES["full"]) -> list[Row]:
    """Every row of the table, for an upstream gradient of 1."""
    table = []
    for dtype in (torch.float32, torch.bfloat16):
        for guided, masked in ((True, False), (True, True), (False, False)):
            case = velocity_case("", sizes.velocity, guided=guided, masked=masked, dtype=dtype)
            table.append(_case_row(case, dtype))
        table.append(_case_row(localization_case("", sizes.outputs, 4, dtype=dtype), dtype))
        table.append(_low_rank_row(*sizes.low_rank, 4, dtype))
        table += [_attention_row(*sizes.attention, dtype, with_lse=with_lse) for with_lse in (True, False)]
    tensors = random_tensors(sizes.velocity, [torch.float32] * 3)
    nbytes = tensors[0].nbytes
    table.append(
        Row("guided velocity, no gradient", 3 * nbytes, lambda: negatively_guided_velocity_loss(*tensors), None)
    )
    leaves = [x.clone().requires_grad_() for x in tensors]
    table.append(
        Row(
            "guided velocity, all three gradients",
            6 * nbytes,
            lambda: negatively_guided_velocity_loss(*leaves).loss.backward(),
            None,
        )
    )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table. Exits with an error if an operation does not move exactly its floor."""
    parser = OptionParser(prog="python -m fastunlearn.bench.traffic", description=__doc__)
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="full",
        help="full: a million elements per velocity, about a minute; small: a few seconds (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    print(
        f"{'forward + backward':<46} {'bytes':>11} {'floor':>11} {'ratio':>5} {'cached':>10} {'sums':>10} "
        f"{'launches':>8} {'seed, eager':>13} {'ratio':>6} {'ops':>4}"
    )
    table = rows(SIZES[options.size])
    print(*table, sep="\n")
    missed = [row.name for row in table if not row.is_at_floor]
    if missed:
        sys.exit(f"{parser.prog}: expected exactly the floor's bytes, got more or fewer for {'; '.join(missed)}")


if __name__ == "__main__":
    main()
