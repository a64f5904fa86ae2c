"""Which backend an operation runs on: the reference in torch, the reference compiled, or a Triton kernel."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch

from fastunlearn.ops import torch_backend
from fastunlearn.ops.arguments import check_choice

Backend = Literal["torch", "compile", "triton"]

OPS = (
    "negatively_guided_velocity",
    "negatively_guided_velocity_loss",
    "velocity_loss",
    "localization_loss",
    "low_rank_localization_loss",
    "concept_attention",
)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _velocity_kernels() -> ModuleType:
    from fastunlearn.kernels import velocity

    return velocity


def _localization_kernels() -> ModuleType:
    from fastunlearn.kernels import localization

    return localization


def _low_rank_kernels() -> ModuleType:
    from fastunlearn.kernels import low_rank

    return low_rank


def _concept_attention_kernels() -> ModuleType:
    from fastunlearn.kernels import concept_attention

    return concept_attention


# Operation -> what imports its Triton implementation, a function of that name with the arguments of `reference`'s.
KERNELS = {
    "negatively_guided_velocity_loss": _velocity_kernels,
    "velocity_loss": _velocity_kernels,
    "localization_loss": _localization_kernels,
    "low_rank_localization_loss": _low_rank_kernels,
    "concept_attention": _concept_attention_kernels,
}


# These multiply matrices, which Triton 3.7 cannot compile for a GPU in float64.
_WITHOUT_FLOAT64 = ("low_rank_localization_loss", "concept_attention")


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
        backend: "torch", "compile", "triton", or None: the environment variable FASTUNLEARN_BACKEND if set, else
            "triton" where the operation has a kernel for the device, else "torch". The variable says what to use where
            there is a choice: an operation without a kernel runs on "torch" whatever it says.
        dtype: of the arithmetic, float32 or float64.

    Raises:
        ValueError: unknown operation or backend, or a backend that cannot run it.
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
            raise ValueError(f"{name} must be 'torch', 'compile' or None here, got 'triton': {obstacle}")
        return BackendChoice(cast(Backend, backend), reason + backend)
    if obstacle is not None:
        return BackendChoice("torch", obstacle)
    if device.type == "cpu":
        return BackendChoice("torch", "Triton's interpreter is slow and has to be asked for")
    return BackendChoice("triton", f"{op} has a Triton kernel for {device.type} tensors")


def has_kernel(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a Triton kernel for `op` in arithmetic of `dtype`."""
    return op in KERNELS and not (op in _WITHOUT_FLOAT64 and dtype == torch.float64 and device.type != "cpu")


def _triton_obstacle(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` cannot run on Triton, or None where it can."""
    if not has_kernel(op, device, dtype):
        return f"no Triton kernel exists for {op} in {str(dtype).removeprefix('torch.')} on {device.type} tensors"
    if not _HAS_TRITON:
        return "Triton is not installed"
    # ROCm's device type is "cuda" too. Triton's interpreter runs kernels on CPU tensors.
    if device.type in ("cuda", "xpu") or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"Triton does not run on {device.type} tensors (on CPU ones only under TRITON_INTERPRET=1)"


def implementation(op: str, backend: str | None, *tensors: torch.Tensor | None) -> Callable[..., Any]:
    """The function that computes `op` of these tensors on the chosen backend, with the arguments of `reference`'s."""
    given = [x for x in tensors if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    name = choose_backend(op, given[0].device, backend, dtype).name
    if name == "triton":
        return getattr(KERNELS[op](), op)
    if name == "compile" and not torch.compiler.is_compiling():
        return _compiled(op)
    return getattr(torch_backend, op)


@functools.cache
def _compiled(op: str) -> Callable[..., Any]:
    # Not `fullgraph`: past the limit of recompilations it would raise instead of running uncompiled.
    return torch.compile(getattr(torch_backend, op))
