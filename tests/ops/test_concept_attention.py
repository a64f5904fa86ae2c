"""`concept_attention` against the float64 softmax."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor

from fastunlearn.dtypes import compute_dtype
from fastunlearn.functional import concept_attention
from fastunlearn.ops import definition
from fastunlearn.testing import cases, check_concept_attention, oracle
from fastunlearn.testing.cases import Case
from fastunlearn.testing.error_bound import compare

# The package has a function of this name.
module = importlib.import_module("fastunlearn.ops.torch_backend.concept_attention")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("case", cases(["concept_attention"]), ids=lambda case: f"{case.dtype}-{case.name}")
def test_grid(case: Case) -> None:
    case.run(torch.device("cpu"), None)


def query_and_key(
    batch: int = 2, heads: int = 3, queries: int = 13, keys: int = 17, d: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, queries, d, generator=generator)
    return query.to(dtype), torch.randn(batch, heads, keys, d, generator=generator).to(dtype)


def random_key_mask() -> Tensor:
    mask = torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:, 2] = True
    return mask


def check(query: Tensor, key: Tensor, indices: Tensor, key_mask: Tensor | None = None, **options: Any) -> None:
    actual = concept_attention(query, key, indices, key_mask=key_mask, **options)
    exact = oracle.concept_attention(query, key, indices, key_mask=key_mask)
    expected = definition.concept_attention(query, key, indices, key_mask=key_mask)
    assert not actual.requires_grad
    # The exponential magnifies the rounding of the logits, which are sums of d products each.
    compute = compute_dtype(query, key)
    compare("result", actual, expected, exact, terms=key.shape[2] * query.shape[-1], compute=compute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("block", [None, *(pytest.param(n, marks=pytest.mark.torch_backend) for n in (1, 50))])
def test_against_the_whole_softmax(
    dtype: torch.dtype, masked: bool, with_lse: bool, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block is not None:
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    query, key = query_and_key(dtype=dtype)
    key_mask = random_key_mask() if masked else None
    lse = definition.log_sum_exp(query, key, key_mask).to(compute_dtype(query)) if with_lse else None
    check(query, key, torch.tensor([2, 5, 16]), key_mask, lse=lse)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 2, 1, 5, 3), (3, 1, 7, 1, 4), (2, 5, 31, 29, 64)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    check(*query_and_key(*shape), torch.tensor([0]))


def test_strided_inputs() -> None:
    query, key = query_and_key()
    check(query.mT.contiguous().mT, key.transpose(1, 2).contiguous().transpose(1, 2), torch.tensor([3]))
    check(query.expand(2, 3, 13, 8), key[:, :, ::2], torch.tensor([3]))


def test_indices_per_sample_and_minus_one() -> None:
    query, key = query_and_key()
    indices = torch.tensor([[0, 4, -1], [7, -1, -1]])
    actual = concept_attention(query, key, indices, scale=0.3)
    exact = oracle.concept_attention(query, key, indices, scale=0.3)
    np.testing.assert_allclose(actual.numpy(), exact, rtol=1e-5)
    assert torch.equal(concept_attention(query, key, [0, 4]), concept_attention(query, key, torch.tensor([0, 4])))
    assert not concept_attention(query, key, torch.tensor([-1, -1])).any()
    assert not concept_attention(query, key, []).any()


def test_probabilities_of_all_keys_sum_to_one() -> None:
    query, key = query_and_key()
    torch.testing.assert_close(concept_attention(query, key, torch.arange(17)), torch.ones(2, 13))


@pytest.mark.parametrize("with_lse", [False, True])
def test_masked_keys_get_nothing(with_lse: bool) -> None:
    query, key = query_and_key()
    key_mask = random_key_mask()
    key_mask[0] = False
    key_mask[1, 5] = False
    key[1, :, 5] = torch.nan
    lse = definition.log_sum_exp(query, key, key_mask) if with_lse else None
    assert not concept_attention(query, key, [2, 5], key_mask=key_mask, lse=lse)[0].any()
    only_two = concept_attention(query, key, [2], key_mask=key_mask, lse=lse)
    assert only_two[1].all()
    assert torch.equal(concept_attention(query, key, [2, 5], key_mask=key_mask, lse=lse), only_two)


def test_large_logits_do_not_overflow() -> None:
    query, key = query_and_key()
    check_concept_attention(30 * query, 30 * key, torch.arange(10))


@pytest.mark.parametrize("scale", [-0.7, 0.0, 2])
@pytest.mark.parametrize("with_lse", [False, True])
def test_scales_of_any_sign(scale: float, with_lse: bool) -> None:
    query, key = query_and_key(keys=70)
    lse = (query.double() @ key.double().mT * scale).logsumexp(-1).float() if with_lse else None
    actual = concept_attention(query, key, [2, 5], scale=scale, lse=lse)
    np.testing.assert_allclose(actual.numpy(), oracle.concept_attention(query, key, [2, 5], scale=scale), rtol=2e-5)


def test_a_masked_key_stays_masked_where_the_scale_is_zero() -> None:
    query, key = query_and_key()
    mask = torch.arange(17).expand(2, 17) < 4
    actual = concept_attention(query, key, [2, 5], scale=0.0, key_mask=mask)
    torch.testing.assert_close(actual, torch.full((2, 13), 0.25))


@pytest.mark.parametrize("keys", [1, 32, 63, 64, 65, 128, 150])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keys_that_fill_blocks_or_do_not(keys: int, dtype: torch.dtype) -> None:
    check(*query_and_key(keys=keys, dtype=dtype), torch.tensor([0, keys // 2, keys - 1]))


KEY_MASKS = {
    "padding at the end": torch.arange(150) < 140,
    "a block of padding": torch.arange(150) < 64,
    "padding at the start": torch.arange(150) >= 70,
    "a gap": (torch.arange(150) < 66) | (torch.arange(150) > 128),
    "only the last key": torch.arange(150) == 149,
    "all but the last key": torch.arange(150) < 149,
}


@pytest.mark.parametrize("name", KEY_MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masks_of_whole_blocks(name: str, dtype: torch.dtype) -> None:
    """The samples differ, and masked keys are NaN: they must not be multiplied by 0."""
    query, key = query_and_key(keys=150, dtype=dtype)
    key_mask = torch.stack([KEY_MASKS[name], torch.ones(150, dtype=torch.bool)])
    kept = [2, 63, 64, 100, 135, 149]
    expected = concept_attention(query[1:], key[1:], kept)
    check(query, key, torch.tensor(kept), key_mask)
    key[0, :, ~KEY_MASKS[name]] = torch.nan
    actual = concept_attention(query, key, kept, key_mask=key_mask)
    only = KEY_MASKS[name].nonzero()[:, 0].tolist()
    without = concept_attention(query[:1], key[:1, :, only], [only.index(i) for i in kept if i in only])
    torch.testing.assert_close(actual[:1], without)
    torch.testing.assert_close(actual[1:], expected)


def test_empty_batch() -> None:
    assert concept_attention(*query_and_key(batch=0), torch.tensor([0])).shape == (0, 13)
    assert concept_attention(*query_and_key(queries=0), torch.tensor([0])).shape == (2, 0)


def test_no_gradient_and_inputs_unmutated() -> None:
    query, key = query_and_key()
    old_query, old_key = query.clone(), key.clone()
    assert not concept_attention(query.requires_grad_(), key.requires_grad_(), [1]).requires_grad
    assert torch.equal(query, old_query)
    assert torch.equal(key, old_key)


def test_autocast_changes_nothing() -> None:
    query, key = query_and_key()
    plain = concept_attention(query, key, [1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(concept_attention(query, key, [1]), plain)


@pytest.mark.torch_backend
def test_never_holds_queries_times_keys() -> None:
    query, key = query_and_key(1, 2, 1024, 1024, 8, torch.float64)
    with LargestTensor(torch.float64) as largest:
        concept_attention(query, key, [1])
    assert 0 < largest.elements <= module.BLOCK_ELEMENTS < query.shape[1] * 1024 * 1024


def test_compiled_without_graph_breaks() -> None:
    torch.compiler.reset()
    query, key = query_and_key()
    compiled = torch.compile(concept_attention, fullgraph=True, backend="aot_eager")
    indices, key_mask = torch.tensor([[1, 2], [3, -1]]), random_key_mask()
    expected = concept_attention(query, key, indices, key_mask=key_mask)
    torch.testing.assert_close(compiled(query, key, indices, key_mask=key_mask), expected)
    lse = definition.log_sum_exp(query, key)
    expected = concept_attention(query, key, indices, lse=lse)
    torch.testing.assert_close(compiled(query, key, indices, lse=lse), expected)


@pytest.mark.torch_backend
def test_compiling_does_not_unroll_the_loop_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 64)
    query, key, indices = torch.randn(1, 2, 40, 4), torch.randn(1, 2, 16, 4), torch.tensor([[1, -1]])
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(len(graph.graph.nodes))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(concept_attention, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(query, key, indices), concept_attention(query, key, indices))
    assert max(graphs) < 20
    arguments = (query, key, indices, 0.5, torch.rand(1, 16) > 0.3, torch.randn(1, 2, 40))
    torch.library.opcheck(module._opaque_concept_attention, arguments)


@pytest.mark.parametrize("token_indices", [[0.5], [True], "ab", None, [[1, 2], [1]]])
def test_indices_that_are_not_integers_raise(token_indices: object) -> None:
    with pytest.raises(TypeError, match="token_indices"):
        concept_attention(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 5, 4), token_indices)
