"""The grid of cases that every backend has to pass on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.dtypes import FLOATING
from fastunlearn.functional import LowRankOutput, localization_loss
from fastunlearn.ops.arguments import check_choice
from fastunlearn.ops.dispatch import OPS
from fastunlearn.testing import checks
from fastunlearn.testing.error_bound import Comparison

DTYPES = FLOATING


class Case(NamedTuple):
    """One checked call of an operation, for any device and backend."""

    op: str
    dtype: torch.dtype
    name: str
    run: Callable[[torch.device, str | None], list[Comparison]]
    """Takes a device and a backend, and returns all comparisons. Raises AssertionError if one fails."""


def random_tensors(shape: Sequence[int], dtypes: Sequence[torch.dtype], seed: int = 0) -> list[Tensor]:
    """One normally distributed tensor per dtype, on the CPU. A seed gives the same numbers on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for dtype in dtypes]


def random_mask(kind: str, shape: Sequence[int], seed: int = 1) -> Tensor:
    """A mask on the CPU. `kind` is "soft" (float32), "half" (soft, float16), "bool", "int", "ones" or "zeros"."""
    soft = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    hard = soft > 0.4
    return {
        "soft": soft,
        "half": soft.half(),
        "bool": hard,
        "int": hard.long(),
        "ones": torch.ones(*shape),
        "zeros": torch.zeros(*shape),
    }[kind]


def cases(ops: Sequence[str] = OPS, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Case]:
    """All cases of the given operations and dtypes.

    Args:
        ops: names of operations, from `fastunlearn.ops.dispatch.OPS`.
        dtypes: the dtypes of the tensors. In cases that mix dtypes, those of the first tensor.

    Raises:
        ValueError: an operation is unknown.
    """
    for op in ops:
        check_choice("ops", op, OPS)
    makers = {
        "negatively_guided_velocity": _guided_velocity_cases,
        "negatively_guided_velocity_loss": lambda dtype: _velocity_cases(dtype, "negatively_guided_velocity_loss", 3),
        "velocity_loss": lambda dtype: _velocity_cases(dtype, "velocity_loss", 2),
        "localization_loss": _localization_cases,
        "low_rank_localization_loss": _low_rank_cases,
        "concept_attention": _attention_cases,
    }
    return [case for op in ops for dtype in dtypes for case in makers[op](dtype)]


def _velocity_cases(dtype: torch.dtype, op: str, count: int) -> Iterator[Case]:
    shape = (2, 3, 3, 5, 7)

    def case(
        name: str,
        *,
        shape: Sequence[int] = shape,
        dtypes: Sequence[torch.dtype] = (dtype,) * 3,
        arrange: Callable[[Tensor], Tensor] = lambda x: x,
        all_gradients: bool = True,
        upstream: Tensor | None = None,
        **options: Any,
    ) -> Case:
        def run(device: torch.device, backend: str | None) -> list[Comparison]:
            inputs = [arrange(x.to(device)) for x in random_tensors(shape, dtypes[:count])]
            for x in inputs if all_gradients else inputs[:1]:
                x.requires_grad_()
            on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
            gradient = None if upstream is None else upstream.to(device)
            return checks.check_velocity_loss(inputs, upstream=gradient, backend=backend, **on_device)

        return Case(op, dtype, name, run)

    for loss_type in ("l2", "l1"):
        for reduction in ("mean", "sum", "none"):
            yield case(f"{loss_type} {reduction}", loss_type=loss_type, reduction=reduction, weight=0.5)
        yield case(f"{loss_type}, prediction's gradient only", loss_type=loss_type, all_gradients=False)
        for kind in ("soft", "half", "bool", "int", "ones"):
            for normalization in ("all", "mask"):
                yield case(
                    f"{loss_type}, {kind} mask of another resolution, over {normalization}",
                    shape=(2, 3, 4, 6, 8),
                    loss_type=loss_type,
                    mask=random_mask(kind, (1 if kind == "soft" else 2, 2, 3, 4)),
                    mask_normalization=normalization,
                )
        yield case(
            f"{loss_type}, sample weights",
            loss_type=loss_type,
            sample_weight=torch.tensor([0.0, 3.0]),
            mask=random_mask("soft", (2, 3, 5, 7)),
        )
    yield case("large sample weights", sample_weight=torch.tensor([1e5, 2e5]), weight=1e-5)
    yield case("channels third", channel_dim=2, mask=random_mask("soft", (2, 3, 5, 7)), shape=(2, 3, 3, 5, 7))
    for shape_ in ((1, 1), (1, 3, 7), (3, 1, 13, 17), (5,), (2, 3, 2, 3, 2, 3), (2, 8, 5, 16, 32)):
        yield case(f"shape {shape_}", shape=shape_)
    yield case("empty batch", shape=(0, 3, 4, 5), reduction="sum")
    yield case("empty batch, mean", shape=(0, 3, 4, 5))
    yield case("permuted", arrange=lambda x: x.permute(4, 1, 3, 2, 0).detach(), mask=random_mask("soft", (7, 5, 3, 2)))
    yield case("sliced", arrange=lambda x: x[..., ::2].detach(), reduction="none")
    yield case("expanded", arrange=lambda x: x[:1].expand(4, *x.shape[1:]).detach())
    yield case("mixed with float32", dtypes=(dtype, torch.float32, torch.bfloat16))
    yield case("mixed with float16", dtypes=(dtype, torch.float16, torch.bfloat16), sample_weight=torch.ones(2))
    upstream_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    yield case("upstream gradient 1024", upstream=torch.tensor(1024.0, dtype=upstream_dtype))
    for name, upstream in {
        "expanded": torch.tensor(2.0).expand(shape),
        "transposed": random_tensors(shape[::-1], [torch.float32], 2)[0].permute(4, 3, 2, 1, 0),
    }.items():
        yield case(f"{name} upstream gradient", upstream=upstream.to(upstream_dtype), reduction="none")
    if dtype == torch.float64:
        for loss_type in ("l2", "l1"):
            yield Case(op, dtype, f"{loss_type}, gradcheck", _velocity_gradcheck(count, loss_type))


def _velocity_gradcheck(count: int, loss_type: str) -> Callable[[torch.device, str | None], list[Comparison]]:
    def run(device: torch.device, backend: str | None) -> list[Comparison]:
        inputs = [x.to(device) for x in random_tensors((2, 2, 4), [torch.float64] * count)]
        # At least one apart, so that no finite difference crosses the kink of l1.
        inputs[0] = inputs[0] + 10
        options: dict[str, Any] = {
            "mask": random_mask("soft", (2, 2)).to(device),
            "sample_weight": torch.tensor([1.0, 2.0], device=device),
            "loss_type": loss_type,
            "mask_normalization": "mask",
            "weight": 0.7,
        } | ({"guidance_scale": 0.5} if count == 3 else {})
        for reduction in ("mean", "none"):
            checks.check_gradients(
                lambda *x, reduction=reduction: (
                    checks.velocity_loss_of(x, backend=backend, reduction=reduction, **options).loss
                ),
                [x.requires_grad_() for x in inputs],
            )
        return []

    return run


def _localization_cases(dtype: torch.dtype) -> Iterator[Case]:
    grid, tokens, features = (3, 2, 5), (2, 30, 7), (2, 4, 3, 5, 6)

    def case(name: str, shapes: Sequence[Sequence[int]], mask: Tensor, **options: Any) -> Case:
        def run(device: torch.device, backend: str | None) -> list[Comparison]:
            outputs = [
                random_tensors(shape, [dtype], seed)[0].to(device).requires_grad_() for seed, shape in enumerate(shapes)
            ]
            return checks.check_localization_loss(outputs, mask.to(device), backend=backend, **options)

        return Case("localization_loss", dtype, name, run)

    for loss_type in ("l2", "l1"):
        for normalization in ("sum", "background_mean"):
            options = {"loss_type": loss_type, "normalization": normalization}
            for kind in ("soft", "half", "bool", "int", "zeros"):
                mask = random_mask(kind, (2, *grid))
                yield case(f"{loss_type} {normalization}, tokens, {kind} mask", [tokens] * 3, mask, **options)
            mask = random_mask("soft", (1, 2, 3, 4))
            name = f"{loss_type} {normalization}, feature maps, mask of another resolution"
            yield case(name, [features, (2, 1, 4, 4, 4)], mask, **options)
            mask = random_mask("bool", (2, *grid))
            yield case(f"{loss_type} {normalization}, layers apart", [tokens, (2, 30, 1), tokens], mask, **options)
            yield case(f"{loss_type} {normalization}, wide tokens", [(2, 30, 64)] * 2, mask, upstream=1024.0, **options)
        mean: dict[str, Any] = {"loss_type": loss_type, "normalization": "mean"}
        yield case(f"{loss_type} mean, tokens, soft mask", [tokens] * 3, random_mask("soft", (2, *grid)), **mean)
        mask = random_mask("bool", (1, 2, 3, 4))
        yield case(
            f"{loss_type} mean, feature maps, mask of another resolution", [features, (2, 1, 4, 4, 4)], mask, **mean
        )
    mask = random_mask("bool", (2, *grid))
    yield case("mean, wide tokens", [(2, 30, 64)] * 2, mask, upstream=1024.0, normalization="mean", weight=0.5)
    yield case("more layers than a launch takes", [(2, 30, 16)] * 18, mask, weight=0.5)
    if dtype == torch.float64:
        yield Case("localization_loss", dtype, "gradcheck", _localization_gradcheck)


def _localization_gradcheck(device: torch.device, backend: str | None) -> list[Comparison]:
    outputs = [
        (random_tensors(shape, [torch.float64])[0].abs() + 1).to(device).requires_grad_()
        for shape in ((2, 4, 2), (2, 2, 3, 1))
    ]
    mask = random_mask("soft", (2, 2, 2)).to(device)
    for loss_type in ("l2", "l1"):
        for normalization in ("sum", "mean", "background_mean"):
            options: dict[str, Any] = {"loss_type": loss_type, "normalization": normalization, "weight": 0.7}
            options["backend"] = backend
            checks.check_gradients(lambda *x, options=options: localization_loss(x, mask, **options).loss, outputs)
    return []


def low_rank_outputs(
    layers: int,
    tokens: tuple[int, int],
    features: int,
    rank: int,
    dtype: torch.dtype,
    *,
    weight_dtype: torch.dtype | None = None,
    kind: str = "random",
    with_bias: bool = True,
) -> list[LowRankOutput]:
    """Random low-rank outputs on the CPU, the same on every machine.

    Args:
        layers: the number of layers.
        tokens: (B, N).
        features: D.
        rank: r.
        dtype: the dtype of `hidden`.
        weight_dtype: the dtype of `weight` and `bias`, if it differs from that of `hidden`.
        kind: "random"; "fresh", with parameters of 0; "biased", with a large bias; "cancelling", with a bias of about
            minus hidden @ weight.T.
        with_bias: whether there is a bias.
    """
    outputs = []
    for layer in range(layers):
        generator = torch.Generator().manual_seed(layer)
        hidden = torch.randn(*tokens, rank, generator=generator)
        if kind == "cancelling":
            hidden = 1 + hidden / 32
        hidden = hidden.to(dtype)
        weight = torch.randn(features, rank, generator=generator) / rank**0.5
        bias = torch.randn(features, generator=generator)
        if kind == "fresh":
            weight, bias = torch.zeros_like(weight), torch.zeros_like(bias)
        if kind == "biased":
            bias = 100 * bias
        weight = weight.to(weight_dtype or dtype)
        if kind == "cancelling":
            bias = -(weight.double() @ hidden.double().mean((0, 1)))
        outputs.append(LowRankOutput(hidden, weight, bias.to(weight_dtype or dtype) if with_bias else None))
    return outputs


def _leaves(
    output: LowRankOutput, device: torch.device, arrange: Callable[[Tensor], Tensor] = lambda x: x
) -> LowRankOutput:
    hidden, weight, bias = (None if x is None else arrange(x.to(device)).requires_grad_() for x in output)
    assert hidden is not None
    assert weight is not None
    return LowRankOutput(hidden, weight, bias)


def _low_rank_cases(dtype: torch.dtype) -> Iterator[Case]:
    grid, tokens = (3, 5, 7), (2, 105)

    def case(
        name: str,
        mask: Tensor,
        *,
        layers: int = 2,
        tokens: tuple[int, int] = tokens,
        features: int = 24,
        rank: int = 16,
        arrange: Callable[[Tensor], Tensor] = lambda x: x,
        weight_dtype: torch.dtype | None = None,
        kind: str = "random",
        with_bias: bool = True,
        **options: Any,
    ) -> Case:
        def run(device: torch.device, backend: str | None) -> list[Comparison]:
            outputs = [
                _leaves(output, device, arrange)
                for output in low_rank_outputs(
                    layers, tokens, features, rank, dtype, weight_dtype=weight_dtype, kind=kind, with_bias=with_bias
                )
            ]
            return checks.check_low_rank_localization_loss(outputs, mask.to(device), backend=backend, **options)

        return Case("low_rank_localization_loss", dtype, name, run)

    soft = random_mask("soft", (2, *grid))
    for normalization in ("sum", "background_mean"):
        for kind in ("soft", "half", "bool", "int", "ones", "zeros"):
            mask = random_mask(kind, (1 if kind == "half" else 2, *grid))
            yield case(f"{normalization}, {kind} mask", mask, normalization=normalization, weight=0.5)
        for kind in ("fresh", "biased", "cancelling"):
            yield case(f"{normalization}, {kind}", soft, normalization=normalization, kind=kind)
    yield case("mean, soft mask", soft, normalization="mean", weight=0.5)
    yield case("mean, bool mask", random_mask("bool", (2, *grid)), normalization="mean", upstream=1024.0)
    yield case("no bias", soft, with_bias=False)
    yield case("float32 weights", soft, weight_dtype=torch.float32, upstream=1024.0)
    for rank, features in ((1, 2), (7, 9), (40, 130)):
        yield case(f"rank {rank} of {features}", soft, rank=rank, features=features)
    yield case("rank 130 of 140", soft, rank=130, features=140, layers=1)
    yield case("rank above the features", soft, rank=24, features=16)
    yield case("l1", soft, loss_type="l1")
    few = random_mask("soft", (2, 3, 7))
    yield case("more layers than a launch takes", few, layers=18, tokens=(2, 21), features=6, rank=4)
    yield case("one token", random_mask("soft", (1, 1)), tokens=(1, 1))
    yield case("strided", soft, arrange=lambda x: x.repeat_interleave(2, 0)[::2].detach())
    if dtype == torch.float64:
        yield Case("low_rank_localization_loss", dtype, "gradcheck", _low_rank_gradcheck)


def _low_rank_gradcheck(device: torch.device, backend: str | None) -> list[Comparison]:
    (output,) = low_rank_outputs(1, (2, 4), 3, 2, torch.float64)
    mask = random_mask("soft", (2, 2, 2)).to(device)
    for normalization in ("sum", "mean", "background_mean"):
        options: dict[str, Any] = {"normalization": normalization, "weight": 0.7, "backend": backend}
        checks.check_gradients(
            lambda *x, options=options: localization_loss([LowRankOutput(*x)], mask, **options).loss,
            [x for x in _leaves(output, device) if x is not None],
        )
    return []


def _guided_velocity_cases(dtype: torch.dtype) -> Iterator[Case]:
    for other in DTYPES:

        def run(device: torch.device, backend: str | None, other: torch.dtype = other) -> list[Comparison]:
            uncond, cond = (x.to(device).requires_grad_() for x in random_tensors((2, 3, 5, 7), (dtype, other)))
            return checks.check_negatively_guided_velocity(uncond, cond)

        yield Case("negatively_guided_velocity", dtype, f"with {other}", run)


def _attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    def case(
        name: str,
        *,
        queries: int = 37,
        keys: int = 29,
        channels: int = 16,
        heads: int = 3,
        tokens: Sequence[Any] = (0, 5, 28),
        key_dtype: torch.dtype = dtype,
        is_masked: bool = False,
        with_lse: bool = False,
        factor: float = 1.0,
        arrange: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Case:
        def run(device: torch.device, backend: str | None) -> list[Comparison]:
            query = random_tensors((2, heads, queries, channels), [dtype])[0].to(device) * factor
            key = random_tensors((2, heads, keys, channels), [key_dtype], 1)[0].to(device)
            key_mask = random_mask("bool", (2, keys)).to(device) if is_masked else None
            indices = torch.tensor(tokens, device=device)
            return checks.check_concept_attention(
                arrange(query), arrange(key), indices, key_mask=key_mask, with_lse=with_lse, backend=backend
            )

        return Case("concept_attention", dtype, name, run)

    for with_lse in (False, True):
        suffix = ", lse given" if with_lse else ""
        for is_masked in (False, True):
            yield case(("keys masked" if is_masked else "all keys") + suffix, is_masked=is_masked, with_lse=with_lse)
        for channels in (1, 40, 64, 128):
            yield case(f"{channels} channels{suffix}", channels=channels, with_lse=with_lse)
        yield case(f"tokens per sample{suffix}", tokens=[[3, -1, 7], [-1, 0, 0]], with_lse=with_lse)
        yield case(f"twenty tokens{suffix}", tokens=list(range(20)), with_lse=with_lse)
        yield case(f"transposed{suffix}", arrange=lambda x: x.mT.contiguous().mT, with_lse=with_lse)
        yield case(f"long{suffix}", queries=150, keys=333, heads=1, with_lse=with_lse, is_masked=True)
        yield case(f"float32 keys{suffix}", key_dtype=torch.float32, with_lse=with_lse)
    yield case("one key", keys=1, tokens=[0])
    yield case("sharp", factor=30.0)
    yield case("heads inside", arrange=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), heads=5, tokens=[1])
