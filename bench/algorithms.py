"""Measures low-rank localization and concept attention, alone and in whole models, against what they replace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunlearn import LowRankOutput, concept_attention, localization_loss
from fastunlearn.bench import cogvideox
from fastunlearn.bench.agreement import check_relative_difference
from fastunlearn.bench.cases import plain_concept_maps, plain_localization_loss
from fastunlearn.bench.command import check_counts, one_line_errors, option_parser, write_report
from fastunlearn.bench.meters import MIB, Cost, Meter, measurable_device
from fastunlearn.bench.whole_models import captured_forward, demo_step
from fastunlearn.dtypes import dtype_name

COMMAND = "fastunlearn.bench.algorithms"
TABLES = ("localization", "attention", "forward", "demo")


class Layer(NamedTuple):
    """The size of a model's layer.

    Attributes:
        tokens: tokens of a video.
        features: features of a token.
        heads: attention heads.
        channels: channels per head.
    """

    tokens: int
    features: int
    heads: int
    channels: int


LAYERS = {
    name: Layer(size.tokens, size.features, size.heads, size.channels)
    for name, size in cogvideox.SIZES.items()
    if name != "tiny"
} | {"hunyuan_video": Layer(118800, 3072, 24, 128)}
RANK = 128
# By device: the numbers of tokens to measure, and the largest one whose tokens x tokens softmax fits into memory.
ATTENTION_SIZES = {"cpu": ((2048, 4096, 8192), 4096), "cuda": ((4096, 8192, 17776, 32768), 8192)}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class _Upstream(torch.autograd.Function):
    """Stands for the rest of the model: it takes an eraser's output, and returns a gradient for it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


class _UpProjections:
    """The last linear layer of some erasers, with random inputs, and with gradients from the rest of the model.

    Args:
        layer: the model's size.
        count: the number of erasers.
        dtype: dtype of hidden states and outputs. Parameters are float32.
        device: where the tensors are.
    """

    def __init__(self, layer: Layer, count: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        features, tokens = layer.features, layer.tokens
        self.hiddens = [random(1, tokens, RANK).requires_grad_() for _ in range(count)]
        self.weights = [
            (random(features, RANK, dtype=torch.float32) / RANK**0.5).requires_grad_() for _ in range(count)
        ]
        self.biases = [random(features, dtype=torch.float32).requires_grad_() for _ in range(count)]
        self.gradients = [random(1, tokens, features) for _ in range(count)]
        self.mask = (torch.rand(1, tokens, generator=generator) > 0.7).float().to(device)

    def step(self, localization: str | None) -> tuple[Tensor, list[Tensor]]:
        """The loss and the gradients, with a localization loss that is "dense" or "low rank", or without one."""
        outputs: list[Any] = []
        loss = torch.zeros((), device=self.mask.device)
        for hidden, weight, bias, gradient in zip(self.hiddens, self.weights, self.biases, self.gradients, strict=True):
            output = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
            loss = loss + _Upstream.apply(output, gradient)  # type: ignore[no-untyped-call]
            if localization == "dense":
                outputs.append(output)
            elif localization == "low rank":
                outputs.append(LowRankOutput(hidden, weight, bias))
        if localization == "dense":
            loss = loss + plain_localization_loss(outputs, self.mask)
        elif localization == "low rank":
            loss = loss + localization_loss(outputs, self.mask).loss
        del output, outputs  # the backward pass may free them
        return loss.detach(), list(torch.autograd.grad(loss, [*self.hiddens, *self.weights, *self.biases]))


def low_rank(model: str, layers: int, dtype: torch.dtype, meter: Meter) -> dict[str, Any]:
    """Measures what a localization loss adds to the erasers' up-projections, which run in every step anyway.

    Args:
        model: a key of `LAYERS`.
        layers: the number of erasers.
        dtype: dtype of hidden states and outputs. Parameters are float32.
        meter: measures the peers.

    Raises:
        Disagreement: the low-rank loss and the dense one differ.
    """
    layer = LAYERS[model]
    erasers = _UpProjections(layer, layers, dtype, meter.device)
    (dense_loss, dense_gradients), (loss, gradients) = erasers.step("dense"), erasers.step("low rank")
    check_relative_difference("low-rank localization loss", loss, dense_loss, TOLERANCE[dtype])
    for actual, expected in zip(gradients, dense_gradients, strict=True):
        check_relative_difference("gradient of low-rank localization", actual, expected, TOLERANCE[dtype])
    del dense_gradients, gradients, actual, expected
    costs = meter.costs(
        {
            "without": functools.partial(erasers.step, None),
            "dense, eager": functools.partial(erasers.step, "dense"),
            "low rank": functools.partial(erasers.step, "low rank"),
        }
    )
    name = f"{model}, {layers} layers, {dtype_name(dtype)}"
    print(f"\nlocalization: {name}, N={layer.tokens} D={layer.features} r={RANK}")
    _print_added_costs(costs)
    return {
        "table": "localization",
        "name": name,
        "rows": [{"peer": peer, **cost._asdict()} for peer, cost in costs.items()],
    }


def _print_added_costs(costs: Mapping[str, Cost]) -> None:
    """Prints every peer's cost, and what it adds to the step without localization."""
    print(f"{'':<14} {'step ms':>9} {'added ms':>9} {'of dense':>9} {'peak MiB':>9} {'added MiB':>10} {'of dense':>9}")
    without, dense = costs["without"], costs["dense, eager"]
    dense_seconds = dense.seconds - without.seconds
    dense_bytes = max(dense.peak_bytes - without.peak_bytes, 0)
    for peer, cost in costs.items():
        start = f"{peer:<14} {1e3 * cost.seconds:>9.1f}"
        if peer == "without":
            print(f"{start} {'':>9} {'':>9} {cost.peak_bytes / MIB:>9.0f}")
            continue
        seconds, nbytes = cost.seconds - without.seconds, max(cost.peak_bytes - without.peak_bytes, 0)
        print(
            f"{start} {1e3 * seconds:>9.1f} {_ratio(seconds, dense_seconds):>9} "
            f"{cost.peak_bytes / MIB:>9.0f} {nbytes / MIB:>10.0f} {_ratio(nbytes, dense_bytes):>9}"
        )


def _ratio(part: float, whole: float) -> str:
    """`part / whole` as text; a dash if noise has made the whole 0 or negative."""
    return f"{part / whole:.3f}" if whole > 0 else "-"


def attention(model: str, dtype: torch.dtype, meter: Meter) -> dict[str, Any]:
    """Measures concept attention, given the log-sum-exp or not, against the softmax over tokens x tokens.

    Args:
        model: a key of `LAYERS`.
        dtype: dtype of queries and keys.
        meter: measures the peers, at the `ATTENTION_SIZES` of its device.

    Raises:
        Disagreement: the maps differ.
    """
    heads, channels = LAYERS[model].heads, LAYERS[model].channels
    sizes, largest_softmax = ATTENTION_SIZES[meter.device.type]
    tokens = torch.tensor([3, 7], device=meter.device)
    print(f"\nconcept attention: {heads} heads x {channels}, {dtype_name(dtype)}")
    print(f"{'S':>6} {'peer':<14} {'ms':>10} {'faster':>8} {'peak MiB':>9}")
    rows = []
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        shape = (1, heads, size, channels)
        query, key = (torch.randn(shape, generator=generator).to(meter.device, dtype) for _ in range(2))
        lse = _log_sum_exp(query, key)
        peers: dict[str, Callable[[], Tensor]] = {
            "softmax, eager": functools.partial(plain_concept_maps, query, key, tokens),
            "without lse": functools.partial(concept_attention, query, key, tokens),
            "with lse": functools.partial(concept_attention, query, key, tokens, lse=lse),
        }
        if size > largest_softmax:
            del peers["softmax, eager"]
        expected = next(iter(peers.values()))()
        for peer, function in peers.items():
            check_relative_difference(f"concept attention {peer}", function(), expected, TOLERANCE[dtype])
        costs = meter.costs(peers)
        for peer, (seconds, peak_bytes) in costs.items():
            faster = f"{costs['softmax, eager'].seconds / seconds:.1f}x" if size <= largest_softmax else ""
            print(f"{size:>6} {peer:<14} {1e3 * seconds:>10.2f} {faster:>8} {peak_bytes / MIB:>9.0f}", flush=True)
            rows.append({"tokens": size, "peer": peer, "seconds": seconds, "peak_bytes": peak_bytes})
    return {"table": "concept attention", "name": f"{heads} heads x {channels}", "rows": rows}


def _log_sum_exp(query: Tensor, key: Tensor) -> Tensor:
    """The log-sum-exp (B, H, Sq) of the scaled logits, computed in blocks of 256 queries."""
    blocks = (query[:, :, i : i + 256].float() @ key.float().mT for i in range(0, query.shape[2], 256))
    return torch.cat([(block * query.shape[-1] ** -0.5).logsumexp(-1) for block in blocks], 2)


def _measure(tables: Sequence[str], meter: Meter) -> list[dict[str, Any]]:
    on_cpu = meter.device.type == "cpu"
    models = ["cogvideox-2b"] if on_cpu else list(LAYERS)
    results = []
    if "localization" in tables:
        results += [low_rank(model, 4, dtype, meter) for model in models for dtype in (torch.float32, torch.bfloat16)]
    if "attention" in tables:
        results += [attention(model, torch.float32 if on_cpu else torch.bfloat16, meter) for model in models]
    if "forward" in tables:
        results.append(captured_forward(meter))
    if "demo" in tables:
        results.append(demo_step(meter))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables, and writes them if asked to."""
    parser = option_parser(COMMAND, __doc__)
    parser.add_argument(
        "--only", nargs="+", choices=TABLES, default=TABLES, help="measure only these tables (default: all)"
    )
    parser.add_argument(
        "--runs", type=int, default=5, metavar="N", help="report the median of N runs (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    with one_line_errors(COMMAND, ValueError):
        check_counts(options, runs=1)
        meter = Meter(measurable_device(options.device), options.runs)
    print(f"{meter.device}, {torch.get_num_threads()} threads, medians of {options.runs}")
    with one_line_errors(COMMAND):
        tables = _measure(options.only, meter)
    write_report(options.output, COMMAND, arguments, {"runs": options.runs, "tables": tables})


if __name__ == "__main__":
    main()
