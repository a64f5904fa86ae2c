"""Compile the kernels that a call launches for GPUs that are not there, and read the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """A recorded launch: a kernel as the compiler specialises it."""

    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for launches that run the same machine code."""
        return repr((self.kernel.__name__, self.signature, self.constants, self.attributes, self.options))

    def describe(self) -> str:
        """The kernel's name, and the types and constants that distinguish this specialisation."""
        names = self.kernel.arg_names
        constants = [f"{names[path[0]]}={value}" for path, value in self.constants.items() if len(path) == 1]
        types = [f"{name}:{type_}" for name, type_ in self.signature.items() if "*" in str(type_)]
        return f"{self.kernel.__name__}({', '.join(types + constants)})"


class Binary(NamedTuple):
    """What matters about the machine code of a launch."""

    spilled_bytes: int
    local_bytes: int
    registers: int
    accesses: list[str]  # PTX instructions that access global memory; empty on other targets than CUDA

    @property
    def wide_accesses(self) -> int:
        """The number of 16-byte accesses."""
        return sum(access.endswith(("v4.b32", "v2.b64", "cp.async 0x10")) for access in self.accesses)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches in the list instead of running them."""
    from triton.runtime.jit import JITFunction

    from fastunlearn.kernels.launch import Launcher

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_specialize(self, args, kwargs))

    patch = mock.patch.object
    with patch(JITFunction, "run", run), patch(Launcher, "__call__", Launcher.by_triton):
        yield launches


def compile_launch(launch: Launch, target: str) -> Binary:
    """Compile a launch for one of `TARGETS`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=launch.attributes
    )
    options = dict(launch.options)
    if target.startswith("gfx"):
        options.pop("maxnreg", None)  # NVIDIA's
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    if target.startswith("gfx"):
        return _read_amdgcn(compiled.asm["amdgcn"])
    return _read_cubin(compiled.asm["cubin"], compiled.asm["ptx"])


def _read_amdgcn(assembly: str) -> Binary:
    def largest(name: str) -> int:
        return max(int(x) for x in re.findall(rf"\.{name}:\s*(\d+)", assembly))

    # Spilled scalar registers go to lanes of vector registers, not to memory, so only vector registers count.
    return Binary(4 * largest("vgpr_spill_count"), largest("private_segment_fixed_size"), largest("vgpr_count"), [])


def _read_cubin(cubin: bytes, ptx: str) -> Binary:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL"))
    accesses = re.findall(r"(?:ld|st)\.global\S*", ptx)
    # The bytes that a pipelined loop copies to shared memory.
    accesses += [f"cp.async {size}" for size in re.findall(r"cp\.async\.c[ag]\.\S+ \[.*?\], \[.*?\], (\w+)", ptx)]
    # Spilled registers lie on the stack.
    return Binary(stack, local, registers, accesses)


def _specialize(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
    bound = dict(zip(kernel.arg_names, args, strict=False))
    bound.update({name: value for name, value in kwargs.items() if name in kernel.arg_names})
    missing = [name for name in kernel.arg_names if name not in bound]
    if missing:
        raise TypeError(f"{kernel.__name__} was launched without {missing}")
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def type_of(value: Any, path: tuple[int, ...], annotation: str, is_constexpr: bool) -> Any:
        if isinstance(value, tuple) and not is_constexpr:
            return tuple(type_of(x, (*path, i), "", False) for i, x in enumerate(value))
        if isinstance(value, Tensor) and not is_constexpr:
            if value.data_ptr() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return _POINTERS[value.dtype]
        # Triton treats an integer argument of 1 as a constant.
        if is_constexpr or value is None or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return annotation or "fp32"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {
        parameter.name: type_of(bound[parameter.name], (i,), parameter.annotation_type, parameter.is_constexpr)
        for i, parameter in enumerate(kernel.params)
    }
    return Launch(kernel, signature, constants, attributes, options)
