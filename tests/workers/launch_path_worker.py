"""Launch every kernel by Triton's own binder and launcher, and check what reaches the driver.

`launch_path_worker.py [CAPABILITY]`, such as 8.0 (default: 9.0). Prints what was wrong, then how often each kernel was
launched and compiled. It can run under any version of Triton, by way of PYTHONPATH.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import torch
import triton
from fake_gpu import FakeGpu, RecordedLaunch
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastunlearn.kernels.launch import Launcher
from fastunlearn.testing import ahead_of_time, launches
from fastunlearn.testing.ahead_of_time import Launch
from fastunlearn.testing.launches import OPERATIONS, combinations, pairwise

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def problems(wanted: Launch, values: list[Any], launch: RecordedLaunch) -> list[str]:
    """What differs between a call of a kernel and the launch that reached the driver."""
    found = []
    if launch.kernel != wanted.kernel.__name__:
        return [f"expected a launch of {wanted.kernel.__name__}, got {launch.kernel}"]
    if launch.block != (32 * wanted.options.get("num_warps", 4), 1, 1) or min(launch.grid) < 1:
        found.append(f"expected {wanted.options} and a grid, got blocks of {launch.block} in a grid of {launch.grid}")
    # Triton's own scratch memory follows the kernel's parameters.
    sent, scratch = launch.parameters[: len(values)], launch.parameters[len(values) :]
    if len(sent) < len(values):
        return [*found, f"expected {len(values)} parameters, got {len(sent)}"]
    for i, ((size, number), value) in enumerate(zip(sent, values, strict=True)):
        if isinstance(value, float):
            number = struct.unpack({4: "f", 8: "d"}[size], struct.pack("Q", number)[:size])[0]
            value = struct.unpack("f", struct.pack("f", value))[0] if size == 4 else value
        elif value < 0:
            value += 256**size
        if number != value:
            found.append(f"expected parameter {i} to be {value}, got {number} in {size} bytes")
    if any(number for _, number in scratch):
        found.append(f"expected only scratch memory behind the parameters, got {scratch}")
    return found


def sent_values(wanted: Launch, bound: dict[str, Any]) -> list[Any]:
    """The arguments that are parameters of the machine code: addresses and numbers, tuples flattened, no constants."""
    values = []

    def add(value: Any, kind: Any) -> None:
        if isinstance(kind, tuple):
            for x, own in zip(value, kind, strict=True):
                add(x, own)
        elif kind != "constexpr":
            values.append(value.data_ptr() if isinstance(value, Tensor) else value)

    for name, kind in wanted.signature.items():
        add(bound[name], kind)
    return values


class Recorder:
    """Runs kernels by way of Triton, and collects what is wrong, and how often each kernel was compiled."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.wrong: Counter[str] = Counter()
        self.compiled: Counter[str] = Counter()
        self.launched: Counter[str] = Counter()
        self.direct = 0
        self._wanted: Launch | None = None
        triton.knobs.runtime.jit_post_compile_hook = self._after_compilation

    def _after_compilation(self, *, fn: Any, compile: Any, **_: Any) -> None:
        """What is compiled must be what `fastunlearn.testing.ahead_of_time` says that it is."""
        assert self._wanted is not None
        self.compiled[self._wanted.kernel.__name__] += 1
        pairs = {
            "types": (self._wanted.signature, compile["signature"]),
            "constants": (self._wanted.constants, compile["constants"]),
            "attributes": (self._wanted.attributes, {k: v for k, v in compile["configs"][0].items() if v}),
        }
        for what, (expected, got) in pairs.items():
            if plain(expected) != plain(got):
                self.wrong[f"{self._wanted.kernel.__name__}: expected the {what} {expected}, got {got}"] += 1

    @contextmanager
    def __call__(self) -> Iterator[list[Launch]]:
        """Stands for `recorded_launches`, but runs them."""
        calls: list[tuple[Launch, list[Any]]] = []
        run, launch = JITFunction.run, Launcher.__call__

        def observe(kernel: Any, *args: Any, **kwargs: Any) -> None:
            self._wanted = ahead_of_time._specialize(kernel, args, kwargs)
            bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            calls.append((self._wanted, sent_values(self._wanted, bound)))

        def observed_run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            observe(kernel, *args, **kwargs)
            return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        def observed_launch(launcher: Launcher, *args: Any) -> None:
            before = len(calls)
            launch(launcher, *args)
            if len(calls) == before:  # not by Triton, but directly
                self.direct += 1
                with mock.patch.object(
                    JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs: observe(kernel, *args, **kwargs)
                ):
                    launcher.by_triton(*args)

        patch = mock.patch.object
        with (
            patch(JITFunction, "run", observed_run),
            patch(Launcher, "__call__", observed_launch),
            self.gpu.recorded() as reached,
        ):
            yield []
        if len(reached) != len(calls):
            self.wrong[f"expected {len(calls)} launches, got {len(reached)}"] += 1
        for (wanted, values), launch in zip(calls, reached, strict=False):
            self.launched[launch.kernel] += 1
            self.wrong.update(f"{wanted.kernel.__name__}: {problem}" for problem in problems(wanted, values, launch))


def plain(x: Any) -> Any:
    """Without Triton's wrappers around constants and tuples, which change from version to version."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return tuple(map(plain, x))
    return plain(x.value) if type(x).__name__ == "constexpr" else x


def main(capability: str = "9.0") -> int:
    """Call every operation in every dtype, twice, and say what was wrong."""
    major, minor = map(int, capability.split("."))
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(FakeGpu(Path(folder), (major, minor)))
        todo = []
        for operation in OPERATIONS:
            for dtype in DTYPES[: -1 if operation.multiplies_matrices else None]:
                few = (
                    pairwise(operation.choices)[:4] if dtype == torch.bfloat16 else combinations(operation.choices)[:1]
                )
                todo += [(operation, dtype, choice) for choice in (*few, operation.heaviest)]
        with mock.patch.object(launches, "recorded_launches", recorder):
            for again in (False, True):
                before = recorder.compiled.total()
                for operation, dtype, choice in todo:
                    try:
                        operation.record((dtype,) * 3, choice)
                    except Exception as error:
                        what = f"{operation.record.__name__}, {dtype}, {choice}: {type(error).__name__}: {error}"
                        recorder.wrong[what] += 1
                if again and not recorder.direct:
                    recorder.wrong["expected the same calls to be launched directly, got none"] += 1
                if again and recorder.compiled.total() != before:
                    recorder.wrong["expected the same calls to compile nothing, got other machine code"] += 1
    for problem, count in recorder.wrong.items():
        print(f"WRONG {count} times: {problem}")
    for kernel, count in sorted(recorder.launched.items()):
        print(f"{kernel}: launched {count} times, compiled {recorder.compiled[kernel]} times")
    print(f"torch {torch.__version__}, Triton {triton.__version__}: {len(todo)} calls, {recorder.wrong.total()} wrong")
    return 1 if recorder.wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
