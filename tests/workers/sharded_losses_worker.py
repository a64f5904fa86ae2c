"""One process of a group: losses of shards against the oracle's of the whole tensors. Run by `test_sharded.py`.

    python sharded_losses_worker.py RANK WORLD_SIZE STORE

Every process makes the same calls in the same order. Wrong results are reported at the end, so that no process waits
for one that has stopped.
"""

import datetime
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastunlearn import (
    LowRankOutput,
    MaskLocalizationLoss,
    T2VUnlearningLoss,
    localization_loss,
    negatively_guided_velocity_loss,
    velocity_loss,
)
from fastunlearn.dtypes import compute_dtype
from fastunlearn.functional import LocalizationLoss
from fastunlearn.ops import definition
from fastunlearn.ops.torch_backend import blocks
from fastunlearn.testing import compare, oracle, random_mask, random_tensors
from fastunlearn.testing.checks import velocity_loss_of
from fastunlearn.testing.interpreter import is_interpreted

RANK, WORLD_SIZE = int(sys.argv[1]), int(sys.argv[2])
LENGTH = 8
LAYOUTS = {
    2: {"equal": (4, 4), "uneven": (3, 5), "one empty": (0, 8)},
    4: {"equal": (2, 2, 2, 2), "uneven": (1, 4, 1, 2), "two empty": (0, 5, 3, 0)},
}[WORLD_SIZE]
UNEVEN = LAYOUTS["uneven"]
# As on a GPU. On a CPU, where it costs nothing, a result decides whether a pass runs again.
blocks.can_look = lambda device: False
failures: list[str] = []
shared: list[Tensor] = []
"""Values that must have the same bits on every process."""


def shard(x: Tensor, dim: int, sizes: Sequence[int] = UNEVEN) -> Tensor:
    return x.detach().split(list(sizes), dim)[RANK].clone().requires_grad_(x.requires_grad)


class NoWaiting(TorchDispatchMode):
    """Fails if a number is read from a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a call waits for the device"
        return func(*args, **(kwargs or {}))


def in_one_all_reduce(call: Callable[[], Any]) -> Any:
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce, NoWaiting():
        result = call()
    assert all_reduce.call_count == 1
    return result


def collect_failure(name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except AssertionError as error:
        failures.append(f"process {RANK} of {WORLD_SIZE}, {name}: {error}")


def check_velocity(
    dtype: torch.dtype,
    *,
    shape: Sequence[int] = (2, 3, LENGTH, 3),
    dim: int = 2,
    sizes: Sequence[int] = UNEVEN,
    guided: bool = True,
    upstream: float = 1.0,
    backend: str = "torch",
    **options: Any,
) -> None:
    inputs = [x.requires_grad_() for x in random_tensors(shape, (dtype,) * (3 if guided else 2))]
    op: Any = negatively_guided_velocity_loss if guided else velocity_loss
    if guided:
        options["guidance_scale"] = 3.0
    own = [shard(x, dim, sizes) for x in inputs]
    own_options = dict(options)
    channel_dim = options.get("channel_dim", 1)
    # Masks have no channel dim.
    shard_dims = {"mask": dim - (dim > channel_dim), "sample_weight": 0}
    for name in shard_dims:
        if name in options and (name == "mask" or dim == 0) and options[name].shape[shard_dims[name]] == LENGTH:
            own_options[name] = shard(options[name], shard_dims[name], sizes)
    result = in_one_all_reduce(lambda: op(*own, **own_options, backend=backend, group=dist.group.WORLD))
    gradients = torch.autograd.grad(result.loss, own, torch.full_like(result.loss, upstream))

    compute = compute_dtype(*inputs, *(options.get(name) for name in shard_dims))
    exact = oracle.velocity_loss(*inputs, **options, upstream=upstream)
    expected, *_ = velocity_loss_of(inputs, definition, **options)
    others = torch.autograd.grad(expected, inputs, torch.full_like(expected, upstream))

    def own_shard(whole: Any) -> Tensor:
        return shard(torch.as_tensor(whole), dim, sizes)

    terms = inputs[0].numel()
    if options.get("reduction") == "none":
        compare("losses", result.loss, own_shard(expected), own_shard(exact["loss"]), compute=compute)
    else:
        compare("loss", result.loss, expected, exact["loss"], terms=terms, compute=compute)
        shared.append(result.loss.detach().double())
    for name, gradient, other in zip(("prediction", "uncond", "cond"), gradients, others, strict=False):
        compare(name, gradient, own_shard(other), own_shard(exact[name]), terms=terms, roundings=2, compute=compute)
    for name in ("prediction_norm", "target_norm"):
        norm = getattr(result, name)
        assert not norm.requires_grad
        compare(name, norm, torch.tensor(exact[name], dtype=compute), exact[name], terms=terms, compute=compute)
        shared.append(norm.double())


def velocity_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    soft, hard = random_mask("soft", (2, LENGTH, 3)), random_mask("bool", (1, LENGTH, 3))
    weights = torch.tensor([0.5, 3.0])
    for loss_type in ("l2", "l1"):
        for reduction in ("mean", "sum", "none"):
            yield f"{loss_type} {reduction}", {"loss_type": loss_type, "reduction": reduction, "weight": 0.5}
        for normalization in ("all", "mask"):
            options = {"loss_type": loss_type, "mask_normalization": normalization, "sample_weight": weights}
            yield f"{loss_type}, soft mask over {normalization}", {"mask": soft, **options}
            yield f"{loss_type}, hard mask over {normalization}", {"mask": hard, "guided": False, **options}
    for layout, sizes in LAYOUTS.items():
        yield f"{layout} shards", {"sizes": sizes, "upstream": 3.0}
        yield f"{layout} shards, masked", {"sizes": sizes, "mask": soft, "mask_normalization": "mask", "upstream": 3.0}
    first = torch.arange(LENGTH)[None, :, None].expand(1, LENGTH, 3) >= UNEVEN[0]
    yield "all masked on the first process", {"mask": first, "mask_normalization": "mask"}
    yield "all masked", {"mask": torch.zeros(1, LENGTH, 3), "mask_normalization": "mask", "weight": 2.0}
    yield (
        "channels third",
        {"shape": (2, LENGTH, 3, 2), "dim": 1, "channel_dim": 2, "mask": random_mask("int", (2, 8, 2))},
    )
    yield (
        "shards of the batch",
        {
            "shape": (LENGTH, 3, 4, 6),
            "dim": 0,
            "mask": random_mask("soft", (LENGTH, 2, 3)),
            "mask_normalization": "mask",
            "sample_weight": torch.arange(LENGTH) / 4,
        },
    )
    yield "no weight", {"weight": 0.0}


Layers = list[Tensor | LowRankOutput]


def layers_of(dtype: torch.dtype, kinds: Sequence[str], features: Sequence[int]) -> Layers:
    """Layers of 2 * LENGTH tokens or positions. A half-precision `hidden` has float32 weights."""
    layers: Layers = []
    for seed, (kind, size) in enumerate(zip(kinds, features, strict=True)):
        if kind == "low rank":
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            (hidden,) = random_tensors((2, LENGTH * 2, 2), [dtype], seed)
            (weight,) = random_tensors((size, 2), [wide], seed + 100)
            (bias,) = random_tensors((size,), [wide], seed + 200)
            layers.append(LowRankOutput(hidden, weight, bias))
        else:
            shape = (2, LENGTH * 2, size) if kind == "tokens" else (2, size, LENGTH, 2)
            layers += random_tensors(shape, [dtype], seed)
    return layers


def flat(layers: Layers) -> list[Tensor]:
    return [x for layer in layers for x in (layer if isinstance(layer, LowRankOutput) else [layer])]


def dense(layer: Tensor | LowRankOutput) -> Tensor:
    if isinstance(layer, Tensor):
        return layer
    compute = compute_dtype(*layer)
    assert layer.bias is not None
    return layer.hidden.to(compute) @ layer.weight.to(compute).T + layer.bias.to(compute)


def own_layer(layer: Tensor | LowRankOutput, sizes: Sequence[int]) -> Tensor | LowRankOutput:
    token_sizes = [2 * size for size in sizes]
    if isinstance(layer, LowRankOutput):
        return LowRankOutput(shard(layer.hidden, 1, token_sizes), layer.weight.clone(), layer.bias.clone())
    return shard(layer, 1, token_sizes) if layer.dim() == 3 else shard(layer, 2, sizes)


def localization_over_group(
    whole: Layers, masks: Sequence[Tensor], sizes: Sequence[int], upstream: float, **options: Any
) -> tuple[LocalizationLoss, list[Tensor]]:
    """The result, and the gradients of this process's shards and of the whole parameters."""
    own = [own_layer(layer, sizes) for layer in whole]
    own_masks = {id(m): shard(m, 1, sizes) for m in masks}
    for x in flat(own):
        x.requires_grad_()
    result = in_one_all_reduce(
        lambda: localization_loss(
            {str(i): layer for i, layer in enumerate(own)},
            {str(i): own_masks[id(m)] for i, m in enumerate(masks)},
            group=dist.group.WORLD,
            **options,
        )
    )
    gradients = torch.autograd.grad(result.loss, flat(own), torch.full_like(result.loss, upstream))
    gradients = [x.contiguous() for x in gradients]  # gloo's all-reduce is wrong for other layouts
    parameters = {id(x) for layer in own if isinstance(layer, LowRankOutput) for x in layer[1:]}
    for x, gradient in zip(flat(own), gradients, strict=True):
        if id(x) in parameters:
            dist.all_reduce(gradient)
    return result, gradients


def exact_layer(
    layer: Tensor | LowRankOutput, mask: Tensor, **options: Any
) -> tuple[float, list[tuple[Tensor, float | None]]]:
    """The oracle's term, and its gradients with the magnitudes of what cancels in them."""
    if isinstance(layer, LowRankOutput):
        exact = oracle.low_rank_localization_loss([layer], [mask], **options)
        gradients, magnitudes = exact["gradients"][0], exact["magnitudes"][0][1:]
    else:
        exact = oracle.localization_loss([layer], [mask], **options)
        gradients, magnitudes = exact["gradients"], [None]
    return exact["per_layer"][0], [(torch.as_tensor(x), m) for x, m in zip(gradients, magnitudes, strict=True)]


def check_localization(
    dtype: torch.dtype,
    *,
    kinds: Sequence[str] = ("tokens", "low rank", "feature map", "tokens"),
    features: Sequence[int] = (3, 5, 3, 4),
    sizes: Sequence[int] = UNEVEN,
    masks: Sequence[Tensor] | None = None,
    upstream: float = 1.0,
    backend: str = "torch",
    **options: Any,
) -> None:
    whole = layers_of(dtype, kinds, features)
    masks = [random_mask("soft", (2, LENGTH, 2))] * len(whole) if masks is None else masks
    result, own_gradients = localization_over_group(whole, masks, sizes, upstream, backend=backend, **options)

    # The oracle takes one kind of layer at a time.
    flat_masks = [m.flatten(1) if kind != "feature map" else m for kind, m in zip(kinds, masks, strict=True)]
    for x in flat(whole):
        x.requires_grad_()
    compute = compute_dtype(*flat(whole), *masks)
    expected, _ = definition.localization_loss([dense(layer) for layer in whole], flat_masks, **options)
    expected_gradients = torch.autograd.grad(expected, flat(whole), torch.full_like(expected, upstream))
    pairs = zip(own_gradients, expected_gradients, strict=True)
    share = options.get("weight", 1.0) / len(whole)
    per_layer, terms = [], 1000
    for i, (layer, m) in enumerate(zip(whole, flat_masks, strict=True)):
        term, exact_gradients = exact_layer(layer, m, **{**options, "weight": share, "upstream": upstream})
        per_layer.append(term)
        for j, (exact, magnitude) in enumerate(exact_gradients):
            gradient, other = next(pairs)
            if j == 0:
                dim, dim_sizes = (1, [2 * size for size in sizes]) if gradient.dim() == 3 else (2, sizes)
                other, exact = shard(other, dim, dim_sizes), shard(exact, dim, dim_sizes)
            bound: Any = {"terms": terms, "roundings": 2, "magnitude": magnitude, "compute": compute}
            compare(f"gradient {j} of layer {i}", gradient, other, exact, **bound)
    assert next(pairs, None) is None
    exact_loss = torch.tensor(share * sum(per_layer))
    compare("loss", result.loss, expected, exact_loss, terms=terms, compute=compute)
    exact_terms = torch.tensor(per_layer, dtype=torch.float64)
    compare("terms", result.per_layer, exact_terms.to(compute), exact_terms, terms=terms, compute=compute)
    assert not result.per_layer.requires_grad
    shared.extend([result.loss.detach().double(), *result.per_layer.double()])


def localization_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    soft, hard = random_mask("soft", (2, LENGTH, 2)), random_mask("bool", (1, LENGTH, 2))
    first = (torch.arange(LENGTH)[None, :, None].expand(1, LENGTH, 2) < UNEVEN[0]).float()
    for normalization in ("sum", "mean", "background_mean"):
        for loss_type in ("l2",) if normalization == "mean" else ("l2", "l1"):
            yield (
                f"{loss_type} {normalization}",
                {"loss_type": loss_type, "normalization": normalization, "weight": 0.5},
            )
        for layout, sizes in LAYOUTS.items():
            yield f"{layout} shards, {normalization}", {"sizes": sizes, "normalization": normalization, "upstream": 3.0}
        yield (
            f"a mask per layer, {normalization}",
            {
                "masks": [hard, soft, soft, first],
                "features": (3, 5, 3, 3),
                "normalization": normalization,
                "weight": 2.0,
            },
        )
        yield (
            f"all masked on the first process, {normalization}",
            {"masks": [first] * 4, "normalization": normalization},
        )
    yield "all masked", {"masks": [torch.ones(1, LENGTH, 2)] * 4, "normalization": "background_mean"}
    yield "low rank alone", {"kinds": ["low rank"] * 2, "features": [5, 6], "normalization": "background_mean"}


def check_nan() -> None:
    """NaN of weight 0 is not in the loss. It is in the norms, which are unweighted, on every process."""
    prediction, target = random_tensors((2, 3, LENGTH, 3), (torch.float32,) * 2)
    mask = torch.ones(2, LENGTH, 3)
    mask[:, 0] = 0
    expected = velocity_loss(prediction, target, mask=mask)
    prediction[:, :, 0] = float("nan")
    own = shard(prediction, 2).requires_grad_()
    result = velocity_loss(own, shard(target, 2), mask=shard(mask, 1), group=dist.group.WORLD)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss)
    assert result.prediction_norm.isnan()
    assert own.grad is not None and own.grad.isfinite().all()

    tokens, outside = torch.full((1, LENGTH, 3), float("nan")), torch.zeros(1, LENGTH)
    outside[0, 0] = 1
    tokens[:, 1:] = 2
    own = shard(tokens, 1).requires_grad_()
    loss = localization_loss([own], shard(outside, 1), group=dist.group.WORLD).loss
    loss.backward()
    torch.testing.assert_close(loss.item(), 4.0 * 3 * (LENGTH - 1), rtol=1e-6, atol=0)
    assert own.grad is not None and own.grad.isfinite().all()


def check_equal_shards_take_no_second_pass() -> None:
    """The gradient that the forward pass wrote is the result to the bit, because its factor is exactly 1."""
    for dtype in (torch.float32, torch.float64):
        for length in (49, 107):  # where multiplying by a rounded inverse would show
            prediction, target = random_tensors((1, 1, length), (dtype, dtype))
            prediction.requires_grad_()
            result = velocity_loss(prediction, target, group=dist.group.WORLD)
            local = velocity_loss(prediction, target, weight=1 / WORLD_SIZE)
            assert torch.equal(*(torch.autograd.grad(x.loss, prediction)[0] for x in (result, local)))
            output, mask = prediction.view(1, length, 1), torch.zeros(1, length)
            options: Any = {"normalization": "mean"}
            result = localization_loss([output], mask, group=dist.group.WORLD, **options)
            local = localization_loss([output], mask, weight=1 / WORLD_SIZE, **options)
            assert torch.equal(*(torch.autograd.grad(x.loss, prediction)[0] for x in (result, local)))


def check_layers_alike_on_one_process_alone() -> None:
    """Maps of different heights are all empty on most processes; two masks are one tensor on the first process."""
    maps = [random_tensors((2, 3, height, 3), [torch.float64])[0] for height in (LENGTH, 2 * LENGTH, LENGTH)]
    sizes = [LENGTH, *[0] * (WORLD_SIZE - 1)]
    mask = random_mask("soft", (2, LENGTH, 3)).double()
    own_maps = [shard(x, 2, [size * x.shape[2] // LENGTH for size in sizes]) for x in maps]
    tokens = [x.movedim(1, -1).flatten(1, 2) for x in (maps[0], maps[2])]
    masks = [torch.cat([torch.zeros(2, UNEVEN[0], 3), value[:, UNEVEN[0] :]], 1) for value in (mask, mask / 2)]
    own_tokens = [shard(x, 1, [3 * size for size in UNEVEN]) for x in tokens]
    own_masks = [shard(x, 1) for x in masks]
    if RANK == 0:
        own_masks = [own_masks[0]] * 2
    for whole, whole_masks, own, own_mask, dim, token_sizes in (
        (maps, [mask] * 3, own_maps, shard(mask, 1, sizes), 2, None),
        (tokens, masks, own_tokens, dict(enumerate(own_masks)), 1, [3 * size for size in UNEVEN]),
    ):
        for x in (*whole, *own):
            x.requires_grad_()
        options: Any = {"normalization": "background_mean", "weight": 3.0}
        result = localization_loss(dict(enumerate(own)), own_mask, group=dist.group.WORLD, **options)
        expected = localization_loss(dict(enumerate(whole)), dict(enumerate(whole_masks)), **options)
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=0)
        gradients = (torch.autograd.grad(x.loss, y) for x, y in ((result, own), (expected, whole)))
        for gradient, other in zip(*gradients, strict=True):
            dim_sizes = token_sizes or [size * other.shape[dim] // LENGTH for size in sizes]
            torch.testing.assert_close(gradient, shard(other, dim, dim_sizes), rtol=1e-13, atol=0)


class Scale(nn.Module):
    """A model in which each output depends on the input at its own position and on one shared parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: float) -> Tensor:
        return self.scale * x_t + cond


def check_modules() -> None:
    (x_t, tokens) = random_tensors((2, 3, LENGTH, 3), (torch.float64,) * 2)
    mask = random_mask("soft", (2, LENGTH, 3)).double()
    frozen = Scale().requires_grad_(False)

    def run(x_t: Tensor, tokens: Tensor, mask: Tensor, group: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        model = Scale()
        with torch.no_grad():
            model.scale += 0.2
        loss_fn = T2VUnlearningLoss(
            None, 2.0, 0.5, 0.1, mask_normalization="mask", normalization="background_mean", group=group
        )
        outputs = {"a": model.scale * tokens.movedim(1, -1).flatten(1, 2), "b": model.scale * tokens}
        t = torch.tensor([1, 2])
        loss, entries = loss_fn(
            frozen, model, x_t, t, 0.3, cond_preserve=0.1, uncond=0.2, mask=mask, eraser_outputs=outputs
        )
        loss.backward()
        assert model.scale.grad is not None
        alone = MaskLocalizationLoss(reduction="none", group=group)(outputs, mask)[0].detach()
        return loss.detach(), entries | {"alone": alone}, model.scale.grad

    loss, entries, gradient = run(shard(x_t, 2), shard(tokens, 2), shard(mask, 1), dist.group.WORLD)
    expected, expected_entries, expected_gradient = run(x_t, tokens, mask, None)
    dist.all_reduce(gradient)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-13, atol=0)
    torch.testing.assert_close(entries, expected_entries, rtol=1e-14, atol=0)


def check_compiled() -> None:
    prediction, target = random_tensors((2, 3, LENGTH, 3), (torch.float32,) * 2)
    (hidden, weight) = random_tensors((2, LENGTH * 3, 2), (torch.float32,))[0], torch.ones(5, 2)
    mask = random_mask("soft", (2, LENGTH, 3))
    prediction, target, mask = shard(prediction, 2), shard(target, 2), shard(mask, 1)
    hidden = shard(hidden, 1, [3 * size for size in UNEVEN]).requires_grad_()
    prediction.requires_grad_()
    group = dist.group.WORLD

    def losses(prediction: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        over_mask = velocity_loss(prediction, target, mask=mask, mask_normalization="mask", group=group)
        layers = [LowRankOutput(hidden, weight, None), hidden]
        outside = localization_loss(layers, mask, normalization="background_mean", group=group)
        outside_mean = localization_loss(layers, mask, normalization="mean", group=group)
        mean = velocity_loss(prediction, target, group=group)
        total = over_mask.loss + outside.loss + outside_mean.loss + mean.loss
        return total, outside.per_layer + outside_mean.per_layer + over_mask.prediction_norm

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    actual, expected = ([*f(prediction, hidden)] for f in (compiled, losses))
    for results in (actual, expected):
        results += torch.autograd.grad(results[0], (prediction, hidden))
    torch.testing.assert_close(actual, expected)


def check_second_derivative_raises() -> None:
    (prediction, target) = random_tensors((2, 3, 4), (torch.float32,) * 2)
    prediction.requires_grad_()
    loss = velocity_loss(prediction, target, group=dist.group.WORLD).loss
    try:
        (gradient,) = torch.autograd.grad(loss, prediction, create_graph=True)
        gradient.square().sum().backward()
    except RuntimeError as error:
        assert "once-differentiable" in str(error), error
    else:
        raise AssertionError("a second derivative must raise")


def check_other_groups() -> None:
    """A group of some processes reduces over these alone. The others cannot use it."""
    inside = dist.new_group([0, 1])
    outside = dist.new_group([1])
    prediction, target = (x[RANK % 2] for x in random_tensors((2, 1, 3, 4), (torch.float64,) * 2))
    whole = velocity_loss(*random_tensors((2, 3, 4), (torch.float64,) * 2))
    if RANK < 2:
        torch.testing.assert_close(velocity_loss(prediction, target, group=inside).loss, whole.loss)
    for group, members in ((inside, (0, 1)), (outside, (1,))):
        if RANK not in members:
            for call in (
                lambda: velocity_loss(prediction, target, group=group),  # noqa: B023
                lambda: T2VUnlearningLoss(None, group=group),  # noqa: B023
            ):
                try:
                    call()
                except ValueError as error:
                    assert "group: expected one that this process belongs to" in str(error), error
                else:
                    raise AssertionError("a group that the process is not in must raise")


def check_shared() -> None:
    mine = torch.stack(shared)
    every = [torch.empty_like(mine) for _ in range(WORLD_SIZE)]
    dist.all_gather(every, mine)
    for other in every:
        assert torch.equal(mine, other), "processes disagree about the value of the whole"


def check_cases(backend: str, *dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        for cases, check in ((velocity_cases, check_velocity), (localization_cases, check_localization)):
            for name, case in cases():
                if (backend == "torch" and dtype in (torch.float32, torch.float64)) or "shards" in name:
                    collect_failure(
                        f"{check.__name__} {name}, {dtype}, {backend}",
                        functools.partial(check, dtype, backend=backend, **case),
                    )


def main() -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(sys.argv[3], WORLD_SIZE),
        rank=RANK,
        world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=60),
    )
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    check_cases("torch", *(dtypes if WORLD_SIZE == 2 else dtypes[:1]))
    if is_interpreted():
        check_cases("triton", torch.float32, torch.float16)
    checks = [
        check_nan,
        check_equal_shards_take_no_second_pass,
        check_layers_alike_on_one_process_alone,
        check_modules,
        check_second_derivative_raises,
    ]
    if WORLD_SIZE == 2:
        checks.append(check_compiled)  # the compiler is slow to import
    for check in (*checks, check_other_groups, check_shared):
        collect_failure(check.__name__, check)
    dist.barrier()
    dist.destroy_process_group()
    print(f"{len(shared)} values agree", *failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
