"""The localization loss of low-rank outputs hidden @ weight^T + bias, without computing the outputs.

With a = 1 - mask per token, h = [hidden, 1] and W = [weight, bias], both one column wider than the rank:

    moments = sum over tokens of a^2 h^T h        gram = W^T W        term = sum(moments * gram) / divisor
    d term / d h = 2 / divisor * a^2 * h gram                         d term / d W = 2 / divisor * W moments

The divisor is that of `localization.py`. Both matrices come from one kernel, `moments_kernel`, which sums the outer
products of rows with themselves: rows a * [hidden, 1] give the moments, rows [weight, bias] the gram. Both gradients
come from `gradient_rows_kernel`, as rows times a matrix. Floor: the background's hidden rows read once forward and once
backward and their gradient written once; the same for the parameters.

Matrix products run on tensor cores in bfloat16. A value is split into bfloat16 pieces that add up to it exactly: one
piece for a bfloat16, two for a float16, three for a float32. Products of two float32 factors are not split: they are
computed in float32. Float64 runs in the interpreter only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.dtypes import compute_dtype
from fastunlearn.kernels.launch import FINISH_BLOCK, distinct, launch_options, on_device, readable, rounded
from fastunlearn.kernels.localization import (
    LAYERS_PER_LAUNCH,
    equal_stretches,
    known_divisor,
    localization_finish_kernel,
    select,
)
from fastunlearn.ops.once_differentiable import once_differentiable

# As large as registers allow without spilling when every factor is split into three pieces.
BLOCK_SUMMED_ROWS = 16
BLOCK_ROWS, BLOCK_INNER = 64, 32
FLOAT32_BLOCK_ROWS, FLOAT32_BLOCK_INNER = 32, 16
BLOCK_RANK = 128  # larger ranks take several blocks
BLOCK_ENTRIES = 1024
SMALLEST_DOT = 16
WARPS = 8
# The partial sums that a program writes are as large as a few hundred rows, so it should process many more than that:
# this many, unless fewer than `ENOUGH_PROGRAMS` programs would then be left to fill a GPU.
ROWS_PER_PROGRAM = 2048
ENOUGH_PROGRAMS = 256
PIECES = {torch.bfloat16: 1, torch.float16: 2}  # how many bfloat16 pieces a value is split into; 3 for other dtypes


@triton.jit
def add_product(result, a, b, A_PIECES: tl.constexpr, B_PIECES: tl.constexpr):
    """Return result + a @ b to float32 precision, with `a` and `b` split into so many bfloat16 pieces.

    Three pieces times three are multiplied in float32 instead: they would take six products and more tensor memory than
    sm_100 has, in which case Triton 3.7 compiles the kernel to nothing.
    """
    if A_PIECES == 3 and B_PIECES == 3:
        return result + tl.dot(a, b, input_precision="ieee")
    a0, b0 = a.to(tl.bfloat16), b.to(tl.bfloat16)
    # Smallest products first. Piece i times piece j is left out if i + j > 2: it is below float32's precision.
    if A_PIECES > 1:
        a_rest = a - a0.to(tl.float32)
        a1 = a_rest.to(tl.bfloat16)
        if A_PIECES > 2:
            result = tl.dot((a_rest - a1.to(tl.float32)).to(tl.bfloat16), b0, result)
    if B_PIECES > 1:
        b_rest = b - b0.to(tl.float32)
        b1 = b_rest.to(tl.bfloat16)
        if B_PIECES > 2:
            result = tl.dot(a0, (b_rest - b1.to(tl.float32)).to(tl.bfloat16), result)
        if A_PIECES > 1:
            result = tl.dot(a1, b1, result)
        result = tl.dot(a0, b1, result)
    if A_PIECES > 1:
        result = tl.dot(a1, b0, result)
    return tl.dot(a0, b0, result)


@triton.jit
def row_factors(
    row, rows, column_ptr, sample_stride, token_stride, tokens, IS_HIDDEN: tl.constexpr, dtype: tl.constexpr
):
    """Return each row's factor and the entry in its last column: 1 - mask for both, or 1 and the bias."""
    in_bounds = row < rows
    factor = in_bounds.to(dtype)
    last = tl.zeros_like(factor)
    if IS_HIDDEN:
        offsets = (row // tokens) * sample_stride + (row % tokens) * token_stride
        factor = 1 - tl.load(column_ptr + offsets, in_bounds, 1.0).to(dtype)
        last = factor
    elif column_ptr is not None:
        last = tl.load(column_ptr + row * token_stride, in_bounds, 0).to(dtype)
    return factor, last


@triton.jit
def moments_kernel(
    partial_ptr,  # (programs, layers, (RANK + 1)^2 + 1) out: sums of outer products and, last, of the row factors
    x_ptrs,  # tuple of (rows, RANK), one per layer: hidden states, or weights
    column_ptrs,  # tuple of masks (B or 1, tokens), or of biases (rows,), or None
    sample_stride,
    token_stride,
    tokens,
    rows,
    RANK: tl.constexpr,
    IS_HIDDEN: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Sum outer products over rows, for layer `program_id(1)` and block `program_id(2)` of the matrix.

    Each program takes every `num_programs(0)`-th tile of rows.
    """
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
    factor_sums = tl.zeros((BLOCK_ROWS,), dtype)
    for tile in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        factor, last = row_factors(row, rows, column_ptr, sample_stride, token_stride, tokens, IS_HIDDEN, dtype)
        is_read = factor != 0
        corner += last * last
        factor_sums += factor
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
        if IS_HIDDEN and PIECES < 3:
            # Rows of factor 1, as under a hard mask, are unchanged and need no more pieces than their dtype does.
            if tl.sum((is_read & (factor != 1)).to(tl.int32)) == 0:
                moments = add_product(moments, x, x_right, PIECES, PIECES)
            else:
                moments = add_product(moments, x, x_right, 3, PIECES)
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
        tl.store(entry_ptr + WIDTH * WIDTH, tl.sum(factor_sums))


@triton.jit
def moments_finish_kernel(
    sum_ptr,  # (2, L, blocks) out: sums of moments * gram, and of the row factors
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
    """Add up partial sums in a fixed order: block `program_id(0)` of the entries of layer `program_id(1)`."""
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
    # The last entry is the sum of the row factors, not part of the matrix.
    is_product = entry < SIZE - 1
    tl.store(sum_ptr, tl.sum(tl.where(is_product, moments * gram, 0)) * tl.full((), term_scale, dtype))
    factor_sum = tl.sum(tl.where(entry == SIZE - 1, moments, 0))
    tl.store(sum_ptr + weight_stride, factor_sum * tl.full((), weight_scale, dtype))


@triton.jit
def gradient_rows_kernel(
    result_ptrs,  # tuple of (rows, RANK) out, one per layer, or None
    last_ptrs,  # tuple of (rows,) out: the gradient's last column, or None
    x_ptrs,  # this and the next four as in `moments_kernel`
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
    PIECES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """[x, last column] @ matrix for rows `program_id(0)` and columns `program_id(2)` of layer `program_id(1)`."""
    layer = tl.program_id(1)
    dtype: tl.constexpr = matrix_ptr.dtype.element_ty
    WIDTH: tl.constexpr = RANK + 1
    x_ptr = select(x_ptrs, layer)
    column_ptr = None
    if column_ptrs is not None:
        column_ptr = select(column_ptrs, layer)
    common_factor = tl.load(upstream_ptr).to(dtype) * tl.full((), scale, dtype)
    if inverse_ptr is not None:
        common_factor *= tl.load(inverse_ptr + layer)
    matrix_ptr += tl.cast(layer, tl.int64) * (WIDTH * WIDTH + 1)
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    factor, last = row_factors(row, rows, column_ptr, sample_stride, token_stride, tokens, IS_HIDDEN, dtype)
    is_read = factor != 0
    if IS_HIDDEN:
        row_scales, last = common_factor * factor * factor, is_read.to(dtype)
    else:
        row_scales = common_factor * factor
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
        result = add_product(result, x, matrix, PIECES, 3)
        if last_ptrs is not None:
            inner_border = tl.load(matrix_ptr + RANK * WIDTH + inner, inner < RANK, 0)
            last_result += tl.sum(x * inner_border[None, :], axis=1)

    if result_ptrs is not None:
        result_ptr = select(result_ptrs, layer)
        result = rounded(tl.where(is_read[:, None], result * row_scales[:, None], 0), result_ptr.dtype.element_ty)
        is_stored = (row < rows)[:, None] & is_column[None, :]
        tl.store(result_ptr + row[:, None] * RANK + column[None, :], result, is_stored)
    if last_ptrs is not None:
        last_ptr = select(last_ptrs, layer)
        last_result = rounded(last_result * row_scales, last_ptr.dtype.element_ty)
        if tl.program_id(2) == 0:  # the programs of other columns compute the same
            tl.store(last_ptr + row, last_result, row < rows)


class _Layer(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor


def _layers(tensors: Sequence[Any], masks: Sequence[Tensor]) -> list[_Layer]:
    """Layers from a flat list of the hidden states, weight and bias of each."""
    return [_Layer(*tensors[3 * i : 3 * i + 3], mask) for i, mask in enumerate(masks)]


def _runs(layers: Sequence[_Layer]) -> list[slice]:
    """Runs of at most `LAYERS_PER_LAUNCH` consecutive layers of one dtype, shape and layout, without empty layers."""
    keys = [[x if x is None else (x.dtype, x.shape, x.stride()) for x in layer] for layer in layers]
    return [
        slice(start, min(start + LAYERS_PER_LAUNCH, run.stop))
        for run in equal_stretches(keys)
        if layers[run.start].hidden.numel()
        for start in range(run.start, run.stop, LAYERS_PER_LAUNCH)
    ]


def _block_rank(rank: int) -> int:
    return min(max(triton.next_power_of_2(rank), SMALLEST_DOT), BLOCK_RANK)


class _Rows(NamedTuple):
    """The hidden states of a run's layers, or their weights, as arguments of both kernels."""

    x: tuple[Tensor, ...]
    columns: tuple[Tensor, ...] | None
    sample_stride: int
    token_stride: int
    tokens: int
    rows: int

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """The compile-time constants and launch options of both kernels for arithmetic in `dtype`."""
        rank = self.x[0].shape[-1]
        return {
            "RANK": rank,
            "IS_HIDDEN": self.x[0].dim() == 3,
            # Sums of bfloat16 products are float32, so float64 arithmetic is never split.
            "PIECES": PIECES.get(self.x[0].dtype, 3) if dtype == torch.float32 else 3,
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


def _known_divisor(layer: _Layer, normalization: str) -> int:
    """`known_divisor` for the shape that the layer's output would have; the output itself is never computed."""
    return known_divisor((*layer.hidden.shape[:2], layer.weight.shape[0]), normalization)


def _partial_moments(rows: _Rows, dtype: torch.dtype) -> Tensor:
    layers, rank = len(rows.x), rows.x[0].shape[-1]
    tiles = triton.cdiv(rows.rows, BLOCK_SUMMED_ROWS)
    programs = min(tiles, max(triton.cdiv(rows.rows, ROWS_PER_PROGRAM), ENOUGH_PROGRAMS // layers))
    blocks = triton.cdiv(rank, _block_rank(rank)) ** 2
    partial = torch.empty(programs, layers, (rank + 1) ** 2 + 1, dtype=dtype, device=rows.x[0].device)
    moments_kernel[(programs, layers, blocks)](partial, *rows, BLOCK_ROWS=BLOCK_SUMMED_ROWS, **rows.constants(dtype))
    return partial


def _launch_forward(
    tensors: list[Tensor | None], masks: list[Tensor], normalization: str, weight: float
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return the loss, the layers' terms, moments and gram of every run, and the layers' 1 / (sum of a) if used."""
    layers = _layers(tensors, masks)
    device = masks[0].device
    dtype = compute_dtype(*tensors, *masks)
    is_normalized = normalization == "background_mean"
    largest_size = max((layer.hidden.shape[2] + 1) ** 2 + 1 for layer in layers)
    sums = torch.zeros(2, len(layers), triton.cdiv(largest_size, BLOCK_ENTRIES), dtype=dtype, device=device)
    per_layer = torch.empty(len(layers), dtype=dtype, device=device)
    loss = torch.empty((), dtype=dtype, device=device)
    inverse = torch.empty_like(per_layer) if is_normalized else None
    matrices = []
    with on_device(loss):
        for run in _runs(layers):
            run_layers = layers[run]
            partial_moments = _partial_moments(_hidden_rows(run_layers), dtype)
            partial_gram = _partial_moments(_weight_rows(run_layers), dtype)
            moments, gram = torch.empty_like(partial_moments[0]), torch.empty_like(partial_gram[0])
            size = moments.shape[1]
            moments_finish_kernel[(triton.cdiv(size, BLOCK_ENTRIES), len(run_layers))](
                sums[:, run],
                sums.stride(1),
                sums.stride(0),
                moments,
                gram,
                partial_moments,
                partial_gram,
                partial_moments.shape[0],
                partial_gram.shape[0],
                1 / _known_divisor(run_layers[0], normalization),
                float(run_layers[0].weight.shape[0]),
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
    tensors: list[Tensor | None],
    masks: list[Tensor],
    needs_gradient: list[bool],
    upstream: Tensor,
    matrices: list[Tensor],
    inverse: Tensor | None,
    normalization: str,
    weight: float,
) -> list[Tensor]:
    """Return the gradients of those of `tensors` that need one."""
    layers = _layers(tensors, masks)
    # An empty layer is in no run: its gradients are zeros.
    gradients = [
        (torch.empty if layers[i // 3].hidden.numel() else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)
        if needed and x is not None
        else None
        for i, (x, needed) in enumerate(zip(tensors, needs_gradient, strict=True))
    ]
    with on_device(upstream):
        for i, run in enumerate(_runs(layers)):
            run_layers, moments, gram = layers[run], matrices[2 * i], matrices[2 * i + 1]
            scale = 2 * weight / len(layers) / _known_divisor(run_layers[0], normalization)
            run_inverse = None if inverse is None else inverse[run]
            hidden_gradients, weight_gradients, bias_gradients = (
                _destinations(
                    tensors[3 * run.start + j : 3 * run.stop : 3], gradients[3 * run.start + j : 3 * run.stop : 3]
                )
                for j in range(3)
            )
            _launch_gradient_rows(hidden_gradients, None, _hidden_rows(run_layers), gram, upstream, run_inverse, scale)
            _launch_gradient_rows(
                weight_gradients, bias_gradients, _weight_rows(run_layers), moments, upstream, run_inverse, scale
            )
    return [x for x in gradients if x is not None]


def _destinations(tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
    """Where a launch writes the gradients of a run's layers, or None if no layer needs one.

    If only some layers need one, those of the others are written to memory that is thrown away.
    """
    if all(x is None for x in gradients):
        return None
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if gradient is None else gradient
        for x, gradient in zip(tensors, gradients, strict=True)
        if x is not None
    )


def _launch_gradient_rows(
    results: tuple[Tensor, ...] | None,
    last: tuple[Tensor, ...] | None,
    rows: _Rows,
    matrix: Tensor,
    upstream: Tensor,
    inverse: Tensor | None,
    scale: float,
) -> None:
    if results is None and last is None:
        return
    rank = rows.x[0].shape[-1]
    constants = rows.constants(matrix.dtype)
    is_unsplit = constants["PIECES"] == 3
    block = FLOAT32_BLOCK_ROWS if is_unsplit else BLOCK_ROWS
    gradient_rows_kernel[(triton.cdiv(rows.rows, block), len(rows.x), triton.cdiv(rank, _block_rank(rank)))](
        results,
        last,
        *rows[:5],
        matrix,
        upstream,
        inverse,
        scale,
        rows.rows,
        BLOCK_ROWS=block,
        BLOCK_INNER=FLOAT32_BLOCK_INNER if is_unsplit else BLOCK_INNER,
        **constants,
    )


low_rank_localization_loss_op = torch.library.custom_op(
    "fastunlearn::low_rank_localization_loss", _launch_forward, mutates_args=()
)
low_rank_localization_loss_backward_op = torch.library.custom_op(
    "fastunlearn::low_rank_localization_loss_backward", _launch_backward, mutates_args=()
)


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


@low_rank_localization_loss_backward_op.register_fake
def _(tensors: list[Tensor | None], masks: list[Tensor], needs_gradient: list[bool], *_: Any) -> list[Tensor]:
    pairs = zip(tensors, needs_gradient, strict=True)
    return [x.new_empty(x.shape) for x, needed in pairs if needed and x is not None]


class _LowRankLocalizationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, normalization: str, weight: float, layers: int, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`tensors`: hidden states, weight and bias of every layer, then the mask of every layer."""
        # Outside of a compiled graph, a registered operator would cost host time.
        launch = low_rank_localization_loss_op if torch.compiler.is_compiling() else _launch_forward
        inputs, masks = list(tensors[: 3 * layers]), list(tensors[3 * layers :])
        loss, per_layer, matrices, inverse = launch(inputs, masks, normalization, weight)
        ctx.save_for_backward(*tensors, inverse[0] if inverse else None, *matrices)
        ctx.layers, ctx.normalization, ctx.weight = layers, normalization, weight
        ctx.mark_non_differentiable(per_layer)
        return loss, per_layer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        count = 3 * ctx.layers
        inputs, masks = ctx.saved_tensors[:count], ctx.saved_tensors[count : 4 * ctx.layers]
        inverse, *matrices = ctx.saved_tensors[4 * ctx.layers :]
        needs_gradient = list(ctx.needs_input_grad[3 : 3 + count])
        launch = low_rank_localization_loss_backward_op if torch.compiler.is_compiling() else _launch_backward
        gradients = iter(
            launch(
                list(inputs), list(masks), needs_gradient, upstream, matrices, inverse, ctx.normalization, ctx.weight
            )
        )
        input_gradients = (next(gradients) if needed else None for needed in needs_gradient)
        return (None, None, None, *input_gradients, *[None] * ctx.layers)


def low_rank_localization_loss(
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    masks: Sequence[Tensor],
    *,
    normalization: str,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """The Triton counterpart of the `torch_backend` function: 3 launches per `LAYERS_PER_LAUNCH` layers, plus 1."""
    tensors = [x for layer in zip(hiddens, weights, biases, strict=True) for x in layer]
    return _LowRankLocalizationLoss.apply(  # type: ignore[no-untyped-call]
        normalization, weight, len(masks), *distinct([*tensors, *masks])
    )
