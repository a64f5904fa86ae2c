"""The two algorithms against what they replace, and what they add to a step: `python -m fastunlearn.bench.algorithms`.

Every peer runs in this process on the same inputs, and its result is compared before it is timed. Times are medians of
runs taken in turn; memory is the most that the process, or the GPU, held above what it held before.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunlearn import (
    AttnMapsCapture,
    EraserOutputsCapture,
    LowRankOutput,
    T2VUnlearningLoss,
    as_velocity_model,
    attach_erasers,
    concept_attention,
    localization_loss,
)
from fastunlearn.bench.cases import MIB, Disagreement, seed_localization_loss, seed_maps
from fastunlearn.bench.kernels import provenance, save


class Layer(NamedTuple):
    """A layer of a model: tokens of video, features, and heads of so many channels."""

    tokens: int
    features: int
    heads: int
    channels: int


LAYERS = {
    "cogvideox-2b": Layer(17550, 1920, 30, 64),
    "cogvideox-5b": Layer(17550, 3072, 48, 64),
    "hunyuan_video": Layer(118800, 3072, 24, 128),
}
RANK = 128
# Numbers of tokens on a kind of device, and the most at which tokens x tokens are held.
ATTENTION_SIZES = {"cpu": ((2048, 4096, 8192), 4096), "cuda": ((4096, 8192, 17776, 32768), 8192)}


class Meter:
    """Medians of time, and peaks of memory, on a device."""

    def __init__(self, device: torch.device, runs: int) -> None:
        self.device, self.runs = device, runs

    def seconds(self, peers: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Medians of the peers' times, measured in turn, so that what else the machine does troubles them alike."""
        times: dict[str, list[float]] = {name: [] for name in peers}
        for run in range(self.runs + 1):
            for name, function in peers.items():
                self._wait()
                start = time.perf_counter()
                function()
                self._wait()
                if run:  # the first is a warm-up
                    times[name].append(time.perf_counter() - start)
        return {name: statistics.median(found) for name, found in times.items()}

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        """The most bytes that a call holds above what is held before it."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            function()
            return torch.cuda.max_memory_allocated(self.device) - before
        # Resident memory, after giving back what was freed. Linux keeps its high-water mark, and starts anew if asked.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _agree(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    if not error <= tolerance:
        raise Disagreement(f"{what}: relative error {error:.1e}, at most {tolerance:.0e} expected")


def _share(part: float, whole: float) -> str:
    """Their ratio, as text; of what is lost in the noise there is none."""
    return f"{part / whole:.3f}" if whole > 0 else "-"


class _Upstream(torch.autograd.Function):
    """What the rest of the model does to an eraser's output: it is used, and a gradient comes back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def low_rank(model: str, layers: int, dtype: torch.dtype, meter: Meter) -> dict[str, Any]:
    """What localization adds to the up-projection of some erasers and its gradient, which every step has.

    Args:
        model: one of `LAYERS`.
        layers: how many erasers.
        dtype: of hidden states and outputs; parameters are float32.
        meter: what measures.

    Raises:
        Disagreement: the low-rank form and the dense one do not agree.
    """
    tokens, features = LAYERS[model].tokens, LAYERS[model].features
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(meter.device, kind)

    hiddens = [random(1, tokens, RANK).requires_grad_() for _ in range(layers)]
    weights = [(random(features, RANK, kind=torch.float32) / RANK**0.5).requires_grad_() for _ in range(layers)]
    biases = [random(features, kind=torch.float32).requires_grad_() for _ in range(layers)]
    gradients = [random(1, tokens, features) for _ in range(layers)]
    mask = (torch.rand(1, tokens, generator=generator) > 0.7).float().to(meter.device)
    leaves = [*hiddens, *weights, *biases]

    def step(localization: str | None) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Any] = []
        used = torch.zeros((), device=meter.device)
        for hidden, weight, bias, gradient in zip(hiddens, weights, biases, gradients, strict=True):
            output = F.linear(hidden, weight.to(dtype), bias.to(dtype))
            used = used + _Upstream.apply(output, gradient)  # type: ignore[no-untyped-call]
            if localization == "dense":
                outputs.append(output)
            elif localization == "low rank":
                outputs.append(LowRankOutput(hidden, weight, bias))
        loss = used
        if localization == "dense":
            loss = loss + seed_localization_loss(outputs, mask)
        elif localization == "low rank":
            loss = loss + localization_loss(outputs, mask).loss
        del output, outputs
        found = torch.autograd.grad(loss, leaves)
        return loss.detach(), list(found)

    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    dense, ours = step("dense"), step("low rank")
    _agree("low-rank localization", ours[0], dense[0], tolerance)
    for actual, expected in zip(ours[1], dense[1], strict=True):
        _agree("gradient of low-rank localization", actual, expected, tolerance)
    del dense, ours
    peers = {
        "without": functools.partial(step, None),
        "dense, eager": functools.partial(step, "dense"),
        "low rank": functools.partial(step, "low rank"),
    }
    seconds = meter.seconds(peers)
    peaks = {name: meter.peak_bytes(function) for name, function in peers.items()}
    name = f"{model}, {layers} layers, {str(dtype).removeprefix('torch.')}"
    print(f"\nlocalization: {name}, N={tokens} D={features} r={RANK}")
    print(f"{'':<14} {'step ms':>9} {'added ms':>9} {'of dense':>9} {'peak MiB':>9} {'added MiB':>10} {'of dense':>9}")
    rows = []
    for peer in peers:
        shown = f"{peer:<14} {1e3 * seconds[peer]:>9.1f}"
        if peer == "without":
            print(f"{shown} {'':>9} {'':>9} {peaks[peer] / MIB:>9.0f}")
        else:
            more, of_dense = (seconds[x] - seconds["without"] for x in (peer, "dense, eager"))
            memory, memory_of_dense = (max(peaks[x] - peaks["without"], 0) for x in (peer, "dense, eager"))
            print(
                f"{shown} {1e3 * more:>9.1f} {_share(more, of_dense):>9} "
                f"{peaks[peer] / MIB:>9.0f} {memory / MIB:>10.0f} {_share(memory, memory_of_dense):>9}"
            )
        rows.append({"peer": peer, "seconds": seconds[peer], "peak_bytes": peaks[peer]})
    return {"table": "localization", "name": name, "rows": rows}


def attention(model: str, dtype: torch.dtype, meter: Meter) -> dict[str, Any]:
    """Concept attention, with the log-sum-exp and without, against softmax over tokens x tokens.

    Args:
        model: one of `LAYERS`.
        dtype: of queries and keys.
        meter: what measures, at `ATTENTION_SIZES` for its device.

    Raises:
        Disagreement: the results do not agree.
    """
    heads, channels = LAYERS[model].heads, LAYERS[model].channels
    sizes, largest = ATTENTION_SIZES[meter.device.type]
    tokens = torch.tensor([3, 7], device=meter.device)
    print(f"\nconcept attention: {heads} heads x {channels}, {str(dtype).removeprefix('torch.')}")
    print(f"{'S':>6} {'peer':<14} {'ms':>10} {'faster':>8} {'peak MiB':>9}")
    rows = []
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        shape = (1, heads, size, channels)
        query, key = (torch.randn(shape, generator=generator).to(meter.device, dtype) for _ in range(2))
        blocks = (query[:, :, i : i + 256].float() @ key.float().mT for i in range(0, size, 256))
        lse = torch.cat([(block * channels**-0.5).logsumexp(-1) for block in blocks], 2)
        peers: dict[str, Callable[[], Tensor]] = {
            "softmax, eager": functools.partial(seed_maps, query, key, tokens),
            "without lse": functools.partial(concept_attention, query, key, tokens),
            "with lse": functools.partial(concept_attention, query, key, tokens, lse=lse),
        }
        is_held = size <= largest
        if not is_held:
            del peers["softmax, eager"]
        expected = next(iter(peers.values()))()
        for name, function in peers.items():
            _agree(f"concept attention {name}", function(), expected, 1e-4 if dtype == torch.float32 else 3e-2)
        peaks = {name: meter.peak_bytes(function) for name, function in peers.items()}
        seconds = meter.seconds(peers)
        for name in peers:
            faster = f"{seconds['softmax, eager'] / seconds[name]:.1f}x" if is_held else ""
            print(
                f"{size:>6} {name:<14} {1e3 * seconds[name]:>10.2f} {faster:>8} {peaks[name] / MIB:>9.0f}", flush=True
            )
            rows.append({"tokens": size, "peer": name, "seconds": seconds[name], "peak_bytes": peaks[name]})
    return {"table": "concept attention", "name": f"{heads} heads x {channels}", "rows": rows}


def captured_forward(meter: Meter, *, layers: int = 4, heads: int = 8, side: int = 64) -> dict[str, Any]:
    """A forward pass of a CogVideoX that captures maps against a plain one.

    Args:
        meter: what measures.
        layers: of the transformer.
        heads: of 64 channels each.
        side: height and width of the latents; a token covers two by two of them, in four frames.

    Raises:
        Disagreement: the captured pass has other bits, or lacks a map.
    """
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_embed_dim=64,
        num_layers=layers,
        sample_width=side,
        sample_height=side,
        sample_frames=13,
    ).to(meter.device)
    model = as_velocity_model(transformer)
    x_t, text = torch.randn(1, 4, 16, side, side, device=meter.device), torch.randn(1, 226, 64, device=meter.device)
    t = torch.tensor([500], device=meter.device)

    @torch.no_grad()
    def plain() -> Tensor:
        return model(x_t, t, text)

    maps: dict[str, Tensor] = {}

    def captured() -> Tensor:
        with AttnMapsCapture(model, maps, token_indices=[3, 7]):
            return plain()

    if not torch.equal(plain(), captured()):
        raise Disagreement("a captured forward pass must give the same bits as a plain one")
    if len(maps) != layers:
        raise Disagreement(f"a captured forward pass must give a map of each of {layers} layers, got {len(maps)}")
    seconds = meter.seconds({"plain": plain, "captured": captured})
    ratio = seconds["captured"] / seconds["plain"]
    print(f"\nforward pass: CogVideoX, {layers} layers, {heads} heads x 64, {side**2} + 226 tokens")
    print(f"plain {1e3 * seconds['plain']:.0f} ms, captured {1e3 * seconds['captured']:.0f} ms: {ratio:.3f} times")
    return {"table": "captured forward", "rows": [{"peer": name, "seconds": s} for name, s in seconds.items()]}


def demo_step(meter: Meter) -> dict[str, Any]:
    """A training step on the demo's model, at its batch, with the erasers' outputs captured and with low-rank ones.

    Velocities and masks are random, and there is no optimizer.
    """
    from fastunlearn.demo.erase import POINTS_A_STEP, RANK
    from fastunlearn.demo.model import TEXT_LENGTH, TOKEN_GRID, load
    from fastunlearn.demo.world import FRAMES, HEIGHT, WIDTH

    model = load()[0].to(meter.device)
    erasers = attach_erasers(model.transformer, rank=RANK)
    torch.manual_seed(0)
    for eraser in erasers.values():
        nn.init.normal_(eraser.up.weight, std=0.01)
    velocity = as_velocity_model(model.transformer)
    loss_fn = T2VUnlearningLoss(model.scheduler.alphas_cumprod, channel_dim=2, normalization="background_mean")
    width = model.transformer.config.text_embed_dim

    def random(count: int, *shape: int) -> Tensor:
        return torch.randn(count, *shape, device=meter.device)

    video = (FRAMES, 3, HEIGHT, WIDTH)
    x_t, v_uncond, v_cond = (random(POINTS_A_STEP, *video) for _ in range(3))
    kept, v_kept = (random(POINTS_A_STEP, *video) for _ in range(2))
    text, kept_text = (random(POINTS_A_STEP, TEXT_LENGTH, width) for _ in range(2))
    t = torch.full((POINTS_A_STEP,), 500, device=meter.device)
    mask = (torch.rand(POINTS_A_STEP, *TOKEN_GRID, device=meter.device) > 0.7).float()
    parameters = [p for eraser in erasers.values() for p in eraser.parameters()]

    def step(is_low_rank: bool) -> tuple[Tensor, ...]:
        outputs: dict[str, Any] = {}
        with EraserOutputsCapture(velocity, erasers, outputs, low_rank=is_low_rank):
            loss, _ = loss_fn(
                None,
                velocity,
                x_t,
                t,
                text,
                kept_text,
                localization_mask=mask,
                eraser_outputs=outputs,
                v_uncond=v_uncond,
                v_cond=v_cond,
                v_preserve=v_kept,
                x_t_preserve=kept,
                t_preserve=t,
            )
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    for actual, expected in zip(step(True), step(False), strict=True):
        _agree("the demo's step", actual, expected, 1e-4)
    peers = {"outputs": functools.partial(step, False), "low rank": functools.partial(step, True)}
    seconds = meter.seconds(peers)
    peaks = {name: meter.peak_bytes(function) for name, function in peers.items()}
    print("\na training step at the demo's size, forward and backward")
    for name in peers:
        print(f"{name:<14} {1e3 * seconds[name]:>8.0f} ms {peaks[name] / MIB:>9.0f} MiB")
    rows = [{"peer": name, "seconds": seconds[name], "peak_bytes": peaks[name]} for name in peers]
    return {"table": "demo step", "rows": rows}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastunlearn.bench.algorithms", description=__doc__)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=("localization", "attention", "forward", "demo"), help="tables (default: all)"
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of which the median (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them if asked to."""
    options = _parser().parse_args(arguments)
    if options.runs < 1:
        sys.exit(f"fastunlearn.bench.algorithms: --runs must be at least 1, got {options.runs}")
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"fastunlearn.bench.algorithms: {str(error).splitlines()[0]}")
    if device.type not in ATTENTION_SIZES:
        sys.exit(f"fastunlearn.bench.algorithms: --device must be a CPU or a CUDA GPU, got {device}")
    if device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        sys.exit("fastunlearn.bench.algorithms: a process's peaks of memory are known on Linux alone")
    meter = Meter(device, options.runs)
    models = ["cogvideox-2b"] if device.type == "cpu" else list(LAYERS)
    only = options.only or ("localization", "attention", "forward", "demo")
    tables: list[dict[str, Any]] = []
    print(f"{device}, {torch.get_num_threads()} threads, medians of {options.runs}")
    try:
        if "localization" in only:
            for model in models:
                for dtype in (torch.float32, torch.bfloat16):
                    tables.append(low_rank(model, 4, dtype, meter))
        if "attention" in only:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            tables += [attention(model, dtype, meter) for model in models]
        if "forward" in only:
            tables.append(captured_forward(meter))
        if "demo" in only:
            tables.append(demo_step(meter))
    except Disagreement as error:
        sys.exit(f"fastunlearn.bench.algorithms: no speed of what disagrees: {error}")
    if options.output is not None:
        made = provenance("fastunlearn.bench.algorithms", sys.argv[1:] if arguments is None else arguments)
        save(options.output, made | {"runs": options.runs, "tables": tables})
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
