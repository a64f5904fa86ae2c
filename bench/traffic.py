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

from fastunlearn.bench.cases import Case, localization_case, seed_localization_loss, seed_maps, velocity_case
from fastunlearn.functional import concept_attention, localization_loss, negatively_guided_velocity_loss
from fastunlearn.testing.cases import low_rank_outputs, random_mask, random_tensors
from fastunlearn.testing.interpreter import exact_bfloat16, observed_kernels

# Small, read again and again: caches serve these.
CACHED = ("mask_ptr", "mask_ptrs", "column_ptrs", "sample_weight_ptr", "weight_ptr", "matrix_ptr", "key_ptr")
CACHED += ("token_ptr",)
SUMS = ("partial_ptr", "loss_ptr", "per_layer_ptr", "prediction_norm_ptr", "target_norm_ptr", "inverse_ptr")
SUMS += ("upstream_ptr", "sum_ptr", "moments_ptr", "gram_ptr", "partial_moments_ptr", "partial_gram_ptr")


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
        with exact_bfloat16(), observed_kernels() as observed:
            run()
        moved: Counter[str] = Counter()
        for (_, argument), count in (observed.loaded + observed.stored).items():
            kind = "cached" if argument in CACHED else "sums" if argument in SUMS else "large"
            moved[kind] += count
        self.large, self.cached, self.sums = moved["large"], moved["cached"], moved["sums"]
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
            f"{self.cached:>10,} {self.sums:>10,} {self.launches:>8}"
        )
        if self.eager is None:
            return line
        return f"{line} {self.eager.bytes:>13,} {self.eager.bytes / self.floor:>6.2f} {self.eager.operations:>4}"


def _of_case(case: Case, dtype: torch.dtype) -> Row:
    name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
    return Row(name, case.floor, case.peers["fastunlearn"], case.peers["seed, eager"])


def _low_rank(tokens: int, features: int, rank: int, layers: int, dtype: torch.dtype) -> Row:
    """Against the dense loss of outputs that exist anyway: the up-projection's bytes are nobody's."""
    outputs = low_rank_outputs(layers, (1, tokens), features, rank, dtype, weight_dtype=torch.float32)
    mask = random_mask("bool", (1, tokens))
    for x in (x for output in outputs for x in output):
        x.requires_grad_()
    dense = [x.requires_grad_() for x in random_tensors((1, tokens, features), [dtype] * layers)]
    background = int((~mask).sum())
    hidden = (2 * background + tokens) * rank * dtype.itemsize
    # Parameters are float32: read twice and written once; of the bias, what is read comes from caches.
    floor = layers * (hidden + (3 * rank + 1) * features * 4)
    return Row(
        f"low-rank localization, {layers} layers, {str(dtype).removeprefix('torch.')}",
        floor,
        lambda: localization_loss(outputs, mask).loss.backward(),
        lambda: seed_localization_loss(dense, mask.to(dtype)).backward(),
    )


def _attention(heads: int, size: int, channels: int, dtype: torch.dtype, *, with_lse: bool) -> Row:
    query, key = random_tensors((1, heads, size, channels), [dtype] * 2)
    lse = torch.zeros(1, heads, size) if with_lse else None
    tokens = torch.tensor([3, 7])
    return Row(
        f"concept attention{', lse given' if with_lse else ''}, {str(dtype).removeprefix('torch.')}",
        query.nbytes + (0 if lse is None else lse.nbytes),
        lambda: concept_attention(query, key, tokens, lse=lse),
        lambda: seed_maps(query, key, tokens),
    )


def rows() -> list[Row]:
    """Every row of the table, at a unit upstream gradient."""
    shape = (1, 16, 16, 64, 64)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for guided, masked in ((True, False), (True, True), (False, False)):
            found.append(_of_case(velocity_case("", shape, guided=guided, masked=masked, dtype=dtype), dtype))
        found.append(_of_case(localization_case("", (1, 256, 512), 4, dtype=dtype), dtype))
        found.append(_low_rank(512, 256, 64, 4, dtype))
        found += [_attention(4, 512, 64, dtype, with_lse=with_lse) for with_lse in (True, False)]
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
        f"{'forward + backward':<46} {'bytes':>11} {'floor':>11} {'ratio':>5} {'cached':>10} {'sums':>10} "
        f"{'launches':>8} {'seed, eager':>13} {'ratio':>6} {'ops':>4}"
    )
    table = rows()
    print(*table, sep="\n")
    if not all(row.is_at_floor for row in table):
        sys.exit("a kernel does not move the floor's bytes")


if __name__ == "__main__":
    main()
