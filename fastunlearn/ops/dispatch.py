"""Which backend an operation runs on: torch, torch compiled, or a Triton kernel.

A backend is a module with a function per operation, named like the operation. All backends take the same arguments:
those of `fastunlearn.functional`, checked and completed. `fastunlearn.ops.torch_backend` has every operation.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch

from fastunlearn.dtypes import compute_dtype, dtype_name
from fastunlearn.ops import torch_backend
from fastunlearn.ops.arguments import check_choice

Backend = Literal["torch", "compile", "triton"]


class Kernel(NamedTuple):
    """A Triton kernel: the module in `fastunlearn.kernels`, and whether it computes in float64 on a GPU."""

    module: str
    has_float64: bool = True


# Every operation, and its kernel if there is one.
KERNELS: dict[str, Kernel | None] = {
    "negatively_guided_velocity": None,
    "negatively_guided_velocity_loss": Kernel("velocity"),
    "velocity_loss": Kernel("velocity"),
    "localization_loss": Kernel("localization"),
    # These multiply matrices, which Triton 3.7 cannot compile for a GPU in float64.
    "low_rank_localization_loss": Kernel("low_rank", has_float64=False),
    "concept_attention": Kernel("concept_attention", has_float64=False),
}
OPS = tuple(KERNELS)
# Older ones lack tuples of pointers, and constants that are tuples.
OLDEST_TRITON = (3, 4)
# Older GPUs have neither bfloat16 nor its matrix products.
OLDEST_CAPABILITY = (8, 0)


def _installation_obstacle() -> str | None:
    """Why the installed Triton cannot compile the kernels, or None. A build without a version passes."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for package in ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"):
        with contextlib.suppress(PackageNotFoundError):
            installed = version(package)
            numbers = re.match(r"(\d+)\.(\d+)", installed)
            if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST_TRITON:
                oldest = ".".join(map(str, OLDEST_TRITON))
                return f"the kernels need Triton {oldest} or newer, and {installed} is installed"
            return None
    return None


_INSTALLATION_OBSTACLE = _installation_obstacle()


class BackendChoice(NamedTuple):
    """Which backend an operation runs on, and why."""

    name: Backend
    reason: str


def choose_backend(
    op: str, device: torch.device, backend: str | None = None, dtype: torch.dtype = torch.float32
) -> BackendChoice:
    """The backend that `op` runs on.

    Args:
        op: one of `OPS`.
        device: where the tensors are.
        backend: "torch", "compile" or "triton". None means the environment variable FASTUNLEARN_BACKEND if it is set,
            else "triton" if the operation has a kernel for the device, else "torch". Unlike this argument, the variable
            does not raise for an operation without a kernel: that runs on "torch".
        dtype: the dtype of the arithmetic, float32 or float64.

    Raises:
        ValueError: unknown operation or backend, or a backend that cannot run the operation.
    """
    check_choice("op", op, OPS)
    name, reason = "backend", "asked for by backend="
    if backend is None:
        name, reason = "FASTUNLEARN_BACKEND", "asked for by FASTUNLEARN_BACKEND="
        backend = os.environ.get("FASTUNLEARN_BACKEND") or None
    obstacle = _triton_obstacle(op, device, dtype)
    if backend is not None:
        check_choice(name, backend, ("torch", "compile", "triton"))
        if name == "FASTUNLEARN_BACKEND" and backend == "triton" and not has_kernel(op, device, dtype):
            return BackendChoice("torch", f"no Triton kernel exists for {op} in {dtype}")
        if backend == "triton" and obstacle is not None:
            raise ValueError(f"{name}: expected 'torch', 'compile' or None here, got 'triton': {obstacle}")
        return BackendChoice(cast(Backend, backend), reason + backend)
    if obstacle is not None:
        return BackendChoice("torch", obstacle)
    if device.type == "cpu":
        return BackendChoice("torch", "Triton's interpreter is slow and has to be asked for")
    return BackendChoice("triton", f"{op} has a Triton kernel for {device.type} tensors")


def has_kernel(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a Triton kernel for `op` that computes in `dtype`."""
    kernel = KERNELS[op]
    return kernel is not None and (kernel.has_float64 or dtype != torch.float64 or device.type == "cpu")


def _triton_obstacle(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` cannot run on Triton, or None if it can."""
    if not has_kernel(op, device, dtype):
        return f"no Triton kernel exists for {op} in {dtype_name(dtype)} on {device.type} tensors"
    if _INSTALLATION_OBSTACLE is not None:
        return _INSTALLATION_OBSTACLE
    # ROCm's device type is "cuda" too. Triton's interpreter runs kernels on CPU tensors.
    if device.type not in ("cuda", "xpu") and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"Triton runs on GPUs, and on CPU tensors only under TRITON_INTERPRET=1, not on {device.type} tensors"
    return _capability_obstacle(device)


def _capability_obstacle(device: torch.device) -> str | None:
    """Why this GPU cannot run the kernels. AMD's and Intel's have no such number, nor has one that is not there."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_initialized():
        return None
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) >= OLDEST_CAPABILITY:
        return None
    needed = f"sm_{OLDEST_CAPABILITY[0]}{OLDEST_CAPABILITY[1]}"
    return (
        f"the kernels need a GPU of {needed} or newer, and {properties.name} is sm_{properties.major}{properties.minor}"
    )


def implementation(op: str, backend: str | None, *tensors: torch.Tensor | None) -> Callable[..., Any]:
    """The function of the chosen backend that computes `op` of these tensors."""
    device = next(x.device for x in tensors if x is not None)
    dtype = compute_dtype(*tensors)
    if torch.compiler.is_compiling():
        return _implementation(op, backend, device, dtype)
    # All that the choice depends on: choosing takes longer than a small operation.
    key = (op, backend, device, dtype, *map(os.environ.get, ("FASTUNLEARN_BACKEND", "TRITON_INTERPRET")))
    if key not in _chosen:
        _chosen[key] = _implementation(op, backend, device, dtype)
    return _chosen[key]


_chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _implementation(op: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    name = choose_backend(op, device, backend, dtype).name
    kernel = KERNELS[op]
    if name == "triton" and kernel is not None:
        return getattr(_kernel_module(kernel.module), op)
    compute: Callable[..., Any] = getattr(torch_backend, op)
    return functools.partial(compute, is_compiled=True) if name == "compile" else compute


def _kernel_module(name: str) -> ModuleType:
    # Imported here because Triton may be missing, and by a statement because torch.compile cannot trace importlib.
    from fastunlearn.kernels import concept_attention, localization, low_rank, velocity

    modules = {
        "concept_attention": concept_attention,
        "localization": localization,
        "low_rank": low_rank,
        "velocity": velocity,
    }
    return modules[name]
