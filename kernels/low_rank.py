"""The localization loss of low-rank outputs hidden @ weight^T + bias, without the outputs.

With a = 1 - mask a token, h = [hidden, 1] and W = [weight, bias], both a column wider than the rank:

    moments = sum over tokens of a^2 h^T h        gram = W^T W        term = normalizer * sum(moments * gram)
    d term / d h = 2 * normalizer * a^2 * h gram                      d term / d W = 2 * normalizer * W moments

Both matrices come from one kernel: tokens weighed by a with 1 as their last column, or rows of the weight with the
bias. So do both gradients: rows times a matrix. Floor: the background's hidden rows read once forward and once
backward, their gradient written once; the parameters likewise.

Products are of bfloat16 parts on tensor cores: one makes up a bfloat16, two a float16, three a float32. Those of
float32 hidden states are not. Float64 ones run in the interpreter only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.kernels.launch import FINISH_BLOCK, compute_dtype, launch_options, on_device, readable, rounded
from fastunlearn.kernels.localization import LAYERS_PER_LAUNCH, localization_finish_kernel, select
from fastunlearn.kernels.upstream import once_differentiable

# As large as registers allow with three parts of everything: the compiler spills nothing.
BLOCK_SUMMED_ROWS = 16
BLOCK_ROWS, BLOCK_INNER = 64, 32
BLOCK_ROWS_OF_FLOAT32, BLOCK_INNER_OF_FLOAT32 = 32, 16
BLOCK_RANK = 128  # at most: larger ranks take several blocks
BLOCK_ENTRIES = 1024
SMALLEST_DOT = 16
WARPS = 8
# A program's sums are as large as a few hundred rows: it takes this many, unless that leaves a GPU idle.
ROWS_A_PROGRAM = 2048
ENOUGH_PROGRAMS = 256
PARTS = {torch.bfloat16: 1, torch.float16: 2}  # else 3


@triton.jit
def add_product(result, a, b, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr):
    """The sum result + a @ b as precise as float32 makes it, where so many bfloat16 parts make up `a` and `b` exactly.

    Float32 times float32 would take six products, and more tensor memory than sm_100 has: Triton 3.7 then compiles the
    kernel to nothing. That is left to ordinary arithmetic.
    """
    if A_PARTS == 3 and B_PARTS == 3:
        return result + tl.dot(a, b, input_precision="ieee")
    a0, b0 = a.to(tl.bfloat16), b.to(tl.bfloat16)
    # Smallest first. What two parts beyond the first of both add is below float32's precision.
    if A_PARTS > 1:
        a_rest = a - a0.to(tl.float32)
        a1 = a_rest.to(tl.bfloat16)
        if A_PARTS > 2:
            result = tl.dot((a_rest - a1.to(tl.float32)).to(tl.bfloat16), b0, result)
    if B_PARTS > 1:
        b_rest = b - b0.to(tl.float32)
        b1 = b_rest.to(tl.bfloat16)
        if B_PARTS > 2:
            result = tl.dot(a0, (b_rest - b1.to(tl.float32)).to(tl.bfloat16), result)
        if A_PARTS > 1:
            result = tl.dot(a1, b1, result)
        result = tl.dot(a0, b1, result)
    if A_PARTS > 1:
        result = tl.dot(a1, b0, result)
    return tl.dot(a0, b0, result)


@triton.jit
def factors(row, rows, column_ptr, sample_stride, token_stride, tokens, IS_HIDDEN: tl.constexpr, dtype: tl.constexpr):
    """What multiplies a row, and the row's last column: 1 - mask twice, or 1 and the bias."""
    is_row = row < rows
    factor = is_row.to(dtype)
    last = tl.zeros_like(factor)
    if IS_HIDDEN:
        offsets = (row // tokens) * sample_stride + (row % tokens) * token_stride
        factor = 1 - tl.load(column_ptr + offsets, is_row, 1.0).to(dtype)
        last = factor
    elif column_ptr is not None:
        last = tl.load(column_ptr + row * token_stride, is_row, 0).to(dtype)
    return factor, last


@triton.jit
def moments_kernel(
    partial_ptr,  # (programs, layers, (RANK + 1)^2 + 1) out: sums of outer products, and of what multiplies the rows
    x_ptrs,  # tuple of (rows, RANK), one a layer: hidden states, or weights
    column_ptrs,  # tuple of masks (B or 1, tokens), or of biases (rows,), or None
    sample_stride,
    token_stride,
    tokens,
    rows,
    RANK: tl.constexpr,
    IS_HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Layer `program_id(1)`, block `program_id(2)` of the matrix; a program takes every `num_programs(0)`-th tile."""
    program, programs, layer = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    blocks: tl.constexpr = (RANK + BLOCK_RANK - 1) // BLOCK_RANK
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    left = (tl.program_id(2) // blocks) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    right = (tl.program_id(2) % blocks) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    x_ptr = select(x_ptrs, layer)
    column_ptr = None
    if column_ptrs is not None:
        column_ptr = select(column_ptrs, layer)

    moments = tl.zeros((BLOCK_RANK, BLOCK_RANK), dtype)
    border = tl.zeros((BLOCK_RANK,), dtype)
    corner = tl.zeros((BLOCK_ROWS,), dtype)
    weights = tl.zeros((BLOCK_ROWS,), dtype)
    for tile in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        factor, last = factors(row, rows, column_ptr, sample_stride, token_stride, tokens, IS_HIDDEN, dtype)
        is_read = factor != 0
        corner += last * last
        weights += factor
        x_right = tl.load(
            x_ptr + row[:, None] * RANK + right[None, :], is_read[:, None] & (right < RANK)[None, :], 0
        ).to(dtype)
        x = x_right
        if blocks > 1:
            x = tl.load(x_ptr + row[:, None] * RANK + left[None, :], is_read[:, None] & (left < RANK)[None, :], 0).to(
                dtype
            )
        border += tl.sum(x * (factor * last)[:, None], axis=0)
        x = tl.trans(x * (factor * factor)[:, None])
        if IS_HIDDEN and PARTS < 3:
            # A hard mask leaves what is read as it is: its parts are enough.
            if tl.sum((is_read & (factor != 1)).to(tl.int32)) == 0:
                moments = add_product(moments, x, x_right, PARTS, PARTS)
            else:
                moments = add_product(moments, x, x_right, 3, PARTS)
        else:
            moments = add_product(moments, x, x_right, 3, 3)

    WIDTH: tl.constexpr = RANK + 1
    entry_ptr = partial_ptr + (tl.cast(program, tl.int64) * tl.num_programs(1) + layer) * (WIDTH * WIDTH + 1)
    is_entry = (left < RANK)[:, None] & (right < RANK)[None, :]
    tl.store(entry_ptr + left[:, None] * WIDTH + right[None, :], moments, is_entry)
    if tl.program_id(2) % blocks == 0:
        tl.store(entry_ptr + left * WIDTH + RANK, border, left < RANK)
        tl.store(entry_ptr + RANK * WIDTH + left, border, left < RANK)
    if tl.program_id(2) == 0:
        tl.store(entry_ptr + WIDTH * WIDTH - 1, tl.sum(corner))
        tl.store(entry_ptr + WIDTH * WIDTH, tl.sum(weights))


@triton.jit
def moments_finish_kernel(
    sum_ptr,  # (2, L, sums_stride) out: of moments * gram, and of what multiplies the rows, a block each
    layer_stride,
    weight_stride,
    moments_ptr,  # (layers, SIZE) out
    gram_ptr,  # (layers, SIZE) out
    partial_moments_ptr,  # (programs, layers, SIZE)
    partial_gram_ptr,  # (gram_programs, layers, SIZE)
    programs,
    gram_programs,
    term_scale: tl.float64,
    weight_scale: tl.float64,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up what the programs found, in a fixed order: entries `program_id(0)` of layer `program_id(1)`."""
    block, layer, layers = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.num_programs(1)
    dtype: tl.constexpr = moments_ptr.dtype.element_ty
    entry = block * BLOCK + tl.arange(0, BLOCK)
    is_entry = entry < SIZE
    moments, gram = tl.zeros((BLOCK,), dtype), tl.zeros((BLOCK,), dtype)
    for program in range(0, programs):
        offsets = (tl.cast(program, tl.int64) * layers + layer) * SIZE + entry
        moments += tl.load(partial_moments_ptr + offsets, is_entry, 0)
    for program in range(0, gram_programs):
        offsets = (tl.cast(program, tl.int64) * layers + layer) * SIZE + entry
        gram += tl.load(partial_gram_ptr + offsets, is_entry, 0)
    tl.store(moments_ptr + layer * SIZE + entry, moments, is_entry)
    tl.store(gram_ptr + layer * SIZE + entry, gram, is_entry)
    sum_ptr += layer * layer_stride + block
    # The last entry is none of the matrix.
    is_product = entry < SIZE - 1
    tl.store(sum_ptr, tl.sum(tl.where(is_product, moments * gram, 0)) * tl.full((), term_scale, dtype))
    weights = tl.sum(tl.where(entry == SIZE - 1, moments, 0))
    tl.store(sum_ptr + weight_stride, weights * tl.full((), weight_scale, dtype))


@triton.jit
def gradient_rows_kernel(
    result_ptrs,  # tuple of (rows, RANK) out, one a layer, or None
    last_ptrs,  # tuple of (rows,) out: the last column, or None
    x_ptrs,  # as in `moments_kernel`, like what follows
    column_ptrs,
    sample_stride,
    token_stride,
    tokens,
    matrix_ptr,  # (layers, (RANK + 1)^2 + 1)
    upstream_ptr,  # ()
    inverse_ptr,  # (layers,) or None
    scale: tl.float64,
    rows,
    RANK: tl.constexpr,
    IS_HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Rows `program_id(0)` of layer `program_id(1)`, columns `program_id(2)`: [x, last column] @ matrix."""
    layer = tl.program_id(1)
    dtype: tl.constexpr = matrix_ptr.dtype.element_ty
    WIDTH: tl.constexpr = RANK + 1
    x_ptr = select(x_ptrs, layer)
    column_ptr = None
    if column_ptrs is not None:
        column_ptr = select(column_ptrs, layer)
    multiple = tl.load(upstream_ptr).to(dtype) * tl.full((), scale, dtype)
    if inverse_ptr is not None:
        multiple *= tl.load(inverse_ptr + layer)
    matrix_ptr += tl.cast(layer, tl.int64) * (WIDTH * WIDTH + 1)
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    factor, last = factors(row, rows, column_ptr, sample_stride, token_stride, tokens, IS_HIDDEN, dtype)
    is_read = factor != 0
    if IS_HIDDEN:
        multiples, last = multiple * factor * factor, is_read.to(dtype)
    else:
        multiples = multiple * factor
    column = tl.program_id(2) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    is_column = column < RANK

    border = tl.load(matrix_ptr + RANK * WIDTH + column, is_column, 0)
    result = last[:, None] * border[None, :]
    last_result = last * tl.load(matrix_ptr + WIDTH * WIDTH - 1)
    for first in range(0, RANK, BLOCK_INNER):
        inner = first + tl.arange(0, BLOCK_INNER)
        x = tl.load(x_ptr + row[:, None] * RANK + inner[None, :], is_read[:, None] & (inner < RANK)[None, :], 0).to(
            dtype
        )
        is_entry = (inner < RANK)[:, None] & is_column[None, :]
        matrix = tl.load(matrix_ptr + inner[:, None] * WIDTH + column[None, :], is_entry, 0)
        result = add_product(result, x, matrix, PARTS, 3)
        if last_ptrs is not None:
            inner_border = tl.load(matrix_ptr + RANK * WIDTH + inner, inner < RANK, 0)
            last_result += tl.sum(x * inner_border[None, :], axis=1)

    if result_ptrs is not None:
        result_ptr = select(result_ptrs, layer)
        result = rounded(tl.where(is_read[:, None], result * multiples[:, None], 0), result_ptr.dtype.element_ty)
        is_stored = (row < rows)[:, None] & is_column[None, :]
        tl.store(result_ptr + row[:, None] * RANK + column[None, :], result, is_stored)
    if last_ptrs is not None:
        last_ptr = select(last_ptrs, layer)
        last_result = rounded(last_result * multiples, last_ptr.dtype.element_ty)
        tl.store(last_ptr + row, last_result, (row < rows) & (tl.program_id(2) == 0))


class _Layer(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor


def _runs(layers: Sequence[_Layer]) -> list[slice]:
    """Consecutive layers that share a launch: alike in everything, `LAYERS_PER_LAUNCH` at most."""

    def likeness(i: int) -> tuple[Any, ...]:
        return tuple(x if x is None else (x.dtype, x.shape, x.stride()) for x in layers[i])

    runs = []
    for _, found in itertools.groupby(range(len(layers)), likeness):
        of_run = list(found)
        runs += [of_run[i : i + LAYERS_PER_LAUNCH] for i in range(0, len(of_run), LAYERS_PER_LAUNCH)]
    return [slice(run[0], run[-1] + 1) for run in runs if layers[run[0]].hidden.numel()]


def _block_rank(rank: int) -> int:
    return min(max(triton.next_power_of_2(rank), SMALLEST_DOT), BLOCK_RANK)


class _Rows(NamedTuple):
    """The rows of a run's hidden states, or of its weights, as both kernels take them."""

    x: tuple[Tensor, ...]
    columns: tuple[Tensor, ...] | None
    sample_stride: int
    token_stride: int
    tokens: int
    rows: int

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """Compile-time constants and options of both kernels, which compute in `dtype`."""
        rank = self.x[0].shape[-1]
        return {
            "RANK": rank,
            "IS_HIDDEN": self.x[0].dim() == 3,
            # Sums of bfloat16 products are float32.
            "PARTS": PARTS.get(self.x[0].dtype, 3) if dtype == torch.float32 else 3,
            "BLOCK_RANK": _block_rank(rank),
            **launch_options(self.x[0], WARPS),
        }


def _hidden_rows(layers: Sequence[_Layer]) -> _Rows:
    batch, tokens, _ = layers[0].hidden.shape
    strides = layers[0].mask.stride()
    masks = tuple(readable(layer.mask) for layer in layers)
    x = tuple(layer.hidden.contiguous() for layer in layers)
    return _Rows(x, masks, 0 if masks[0].shape[0] == 1 else strides[0], strides[1], tokens, batch * tokens)


def _weight_rows(layers: Sequence[_Layer]) -> _Rows:
    x = tuple(layer.weight.contiguous() for layer in layers)
    biases = tuple(layer.bias for layer in layers if layer.bias is not None)
    return _Rows(x, biases or None, 0, biases[0].stride(0) if biases else 0, 1, x[0].shape[0])


def _partial_moments(rows: _Rows, dtype: torch.dtype) -> Tensor:
    layers, rank = len(rows.x), rows.x[0].shape[-1]
    tiles = triton.cdiv(rows.rows, BLOCK_SUMMED_ROWS)
    programs = min(tiles, max(triton.cdiv(rows.rows, ROWS_A_PROGRAM), ENOUGH_PROGRAMS // layers))
    blocks = triton.cdiv(rank, _block_rank(rank)) ** 2
    partial = torch.empty(programs, layers, (rank + 1) ** 2 + 1, dtype=dtype, device=rows.x[0].device)
    moments_kernel[(programs, layers, blocks)](partial, *rows, BLOCK_ROWS=BLOCK_SUMMED_ROWS, **rows.constants(dtype))
    return partial


def _launch_forward(
    layers: Sequence[_Layer], normalization: str, weight: float
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Loss, terms, and what the backward pass needs: moments and gram of every run; the inverse sums, if any."""
    device = layers[0].hidden.device
    dtype = compute_dtype(*(x for layer in layers for x in layer))
    is_normalized = normalization == "background_mean"
    runs = _runs(layers)
    most = max((layer.hidden.shape[2] + 1) ** 2 + 1 for layer in layers)
    sums = torch.zeros(2, len(layers), triton.cdiv(most, BLOCK_ENTRIES), dtype=dtype, device=device)
    per_layer = torch.empty(len(layers), dtype=dtype, device=device)
    loss = torch.empty((), dtype=dtype, device=device)
    inverse = torch.empty_like(per_layer) if is_normalized else None
    matrices = []
    with on_device(layers[0].hidden):
        for run in runs:
            of_run = layers[run]
            partial_moments = _partial_moments(_hidden_rows(of_run), dtype)
            partial_gram = _partial_moments(_weight_rows(of_run), dtype)
            moments, gram = torch.empty_like(partial_moments[0]), torch.empty_like(partial_gram[0])
            size = moments.shape[1]
            moments_finish_kernel[(triton.cdiv(size, BLOCK_ENTRIES), len(of_run))](
                sums[:, run],
                sums.stride(1),
                sums.stride(0),
                moments,
                gram,
                partial_moments,
                partial_gram,
                partial_moments.shape[0],
                partial_gram.shape[0],
                1.0 if is_normalized else 1 / of_run[0].hidden.shape[0],
                float(of_run[0].weight.shape[0]),
                SIZE=size,
                BLOCK=BLOCK_ENTRIES,
                **launch_options(moments),
            )
            matrices += [moments, gram]
        localization_finish_kernel[(1,)](
            loss,
            per_layer,
            inverse,
            sums,
            sums.stride(0),
            len(layers),
            sums.shape[2],
            weight / len(layers),
            BLOCK=FINISH_BLOCK,
            **launch_options(loss),
        )
    return loss, per_layer, matrices, [] if inverse is None else [inverse]


def _launch_backward(
    layers: Sequence[_Layer],
    wanted: Sequence[Sequence[bool]],
    upstream: Tensor,
    matrices: Sequence[Tensor],
    inverse: Tensor | None,
    weight: float,
) -> list[list[Tensor | None]]:
    """The gradients of hidden, weight and bias of every layer, None where not wanted."""
    found: list[list[Tensor | None]] = [
        [
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if is_wanted and x is not None else None
            for x, is_wanted in zip(layer[:3], of_layer, strict=True)
        ]
        for layer, of_layer in zip(layers, wanted, strict=True)
    ]
    runs = _runs(layers)
    for layer, of_layer in zip(layers, found, strict=True):
        if not layer.hidden.numel():
            for x in of_layer:
                if x is not None:
                    x.zero_()
    with on_device(upstream):
        for i, run in enumerate(runs):
            of_run, moments, gram = layers[run], matrices[2 * i], matrices[2 * i + 1]
            scale = 2 * weight / len(layers)
            if inverse is None:
                scale /= of_run[0].hidden.shape[0]
            for rows, matrix, names in (
                (_hidden_rows(of_run), gram, (0, None)),
                (_weight_rows(of_run), moments, (1, 2)),
            ):
                results, last = (_all_or_none(of_run, found[run], name) for name in names)
                if results is None and last is None:
                    continue
                blocks = triton.cdiv(rows.x[0].shape[-1], _block_rank(rows.x[0].shape[-1]))
                constants = rows.constants(matrix.dtype)
                is_whole = constants["PARTS"] == 3
                block = BLOCK_ROWS_OF_FLOAT32 if is_whole else BLOCK_ROWS
                gradient_rows_kernel[(triton.cdiv(rows.rows, block), len(of_run), blocks)](
                    results,
                    last,
                    *rows[:5],
                    matrix,
                    upstream,
                    None if inverse is None else inverse[run],
                    scale,
                    rows.rows,
                    BLOCK_ROWS=block,
                    BLOCK_INNER=BLOCK_INNER_OF_FLOAT32 if is_whole else BLOCK_INNER,
                    **constants,
                )
    return found


def _all_or_none(
    layers: Sequence[_Layer], gradients: Sequence[Sequence[Tensor | None]], index: int | None
) -> tuple[Tensor, ...] | None:
    """Where to write the gradients of a run; where only some layers' are wanted, the others' go where nobody looks."""
    if index is None or all(of_layer[index] is None for of_layer in gradients):
        return None
    results = []
    for layer, of_layer in zip(layers, gradients, strict=True):
        x = of_layer[index]
        if x is None:
            like = layer[index]
            x = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        results.append(x)
    return tuple(results)


class _LowRankLocalizationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, masks: Sequence[Tensor], normalization: str, weight: float, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`tensors`: hidden, weight and bias of every layer."""
        loss, per_layer, matrices, inverse = _launch_forward(_layers(tensors, masks), normalization, weight)
        ctx.save_for_backward(*tensors, *masks, *matrices, *inverse)
        ctx.layers, ctx.weight, ctx.inverses = len(masks), weight, len(inverse)
        ctx.mark_non_differentiable(per_layer)
        return loss, per_layer

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        count = ctx.layers
        tensors, masks = ctx.saved_tensors[: 3 * count], ctx.saved_tensors[3 * count : 4 * count]
        end = len(ctx.saved_tensors) - ctx.inverses
        matrices, inverse = ctx.saved_tensors[4 * count : end], ctx.saved_tensors[end:]
        wanted = ctx.needs_input_grad[3:]
        with torch.no_grad():
            found = _launch_backward(
                _layers(tensors, masks),
                [wanted[i : i + 3] for i in range(0, len(wanted), 3)],
                upstream,
                matrices,
                inverse[0] if inverse else None,
                ctx.weight,
            )
        gradients = [x for of_layer in found for x in of_layer]
        return (None, None, None, *once_differentiable(gradients, upstream, [x for x in tensors if x is not None]))


def _layers(tensors: Sequence[Any], masks: Sequence[Tensor]) -> list[_Layer]:
    return [_Layer(*tensors[3 * i : 3 * i + 3], mask) for i, mask in enumerate(masks)]


@torch.library.custom_op("fastunlearn::low_rank_localization_loss", mutates_args=())
def low_rank_localization_loss_op(
    tensors: list[Tensor | None], masks: list[Tensor], normalization: str, weight: float
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """What compilers see: the loss, the terms, and what the backward pass needs."""
    return _launch_forward(_layers(tensors, masks), normalization, weight)


@low_rank_localization_loss_op.register_fake
def _(
    tensors: list[Tensor | None], masks: list[Tensor], normalization: str, weight: float
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    layers = _layers(tensors, masks)
    dtype = compute_dtype(*tensors, *masks)
    loss, per_layer = (masks[0].new_empty(shape, dtype=dtype) for shape in ((), (len(layers),)))
    matrices = []
    for run in _runs(layers):
        shape = (len(layers[run]), (layers[run][0].hidden.shape[2] + 1) ** 2 + 1)
        matrices += [masks[0].new_empty(shape, dtype=dtype) for _ in range(2)]
    return loss, per_layer, matrices, [torch.empty_like(per_layer)] if normalization == "background_mean" else []


@torch.library.custom_op("fastunlearn::low_rank_localization_loss_backward", mutates_args=())
def low_rank_localization_loss_backward_op(
    tensors: list[Tensor | None],
    masks: list[Tensor],
    wanted: list[bool],
    upstream: Tensor,
    matrices: list[Tensor],
    inverse: Tensor | None,
    weight: float,
) -> list[Tensor]:
    """The wanted gradients."""
    of_layers = [wanted[i : i + 3] for i in range(0, len(wanted), 3)]
    found = _launch_backward(_layers(tensors, masks), of_layers, upstream, matrices, inverse, weight)
    return [x for of_layer in found for x in of_layer if x is not None]


@low_rank_localization_loss_backward_op.register_fake
def _(tensors: list[Tensor | None], masks: list[Tensor], wanted: list[bool], *_: Any) -> list[Tensor]:
    pairs = zip(tensors, wanted, strict=True)
    return [x.new_empty(x.shape) for x, is_wanted in pairs if is_wanted and x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    tensors, masks, _, ctx.weight = inputs
    _, _, matrices, inverse = output
    ctx.wanted = [x is not None and x.requires_grad for x in tensors]
    ctx.counts = len(tensors), len(masks), len(matrices)
    ctx.save_for_backward(*tensors, *masks, *matrices, *inverse)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    tensors, masks, matrices = ([next(saved) for _ in range(count)] for count in ctx.counts)
    inverse = next(saved, None)
    found = iter(
        low_rank_localization_loss_backward_op(tensors, masks, ctx.wanted, upstream, matrices, inverse, ctx.weight)
    )
    return [next(found) if is_wanted else None for is_wanted in ctx.wanted], [None] * len(masks), None, None


low_rank_localization_loss_op.register_autograd(_backward, setup_context=_setup_context)


def low_rank_localization_loss(
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    masks: Sequence[Tensor],
    *,
    normalization: str,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """The function of that name in `torch_backend`: three launches for `LAYERS_PER_LAUNCH` layers, and one."""
    tensors = [x for layer in zip(hiddens, weights, biases, strict=True) for x in layer]
    if torch.compiler.is_compiling():
        loss, per_layer, *_ = low_rank_localization_loss_op(tensors, list(masks), normalization, weight)
        return loss, per_layer.detach()
    return _LowRankLocalizationLoss.apply(masks, normalization, weight, *tensors)  # type: ignore[no-untyped-call]
