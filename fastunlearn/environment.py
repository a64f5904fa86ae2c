"""The facts for a bug report: versions, devices, and the backend of every operation with the reason for it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fastunlearn.ops.dispatch import OPS, choose_backend

PACKAGES = ("fastunlearn", "torch", "triton", "numpy", "diffusers", "transformers", "accelerate", "safetensors")
VARIABLES = (
    "FASTUNLEARN_BACKEND",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "WORLD_SIZE",
    "ACCELERATE_USE_FSDP",
)
# Where the project's tests have run. Add what has run, not what should work.
RUN_WHERE = """\
CPU, one process: all operations, the kernels in Triton's interpreter, all commands on tiny CogVideoX, HunyuanVideo, Wan
CPU, several processes over gloo: losses over a process group (2 and 4); prepare, train with and without FSDP2 (2)
not yet: GPUs, NCCL, full-size checkpoints from the Hub; the kernels compile for sm_80, sm_90, sm_100 and gfx942"""


def installed_version(package: str) -> str | None:
    """Returns the version, or None if it is not installed, as when this package itself runs from its sources."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> list[tuple[torch.device, str]]:
    """Returns the CPU and every CUDA, ROCm and XPU device that torch sees, each with a description."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    descriptions = [(torch.device("cpu"), cpu)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        architecture = (
            f"gfx {properties.gcnArchName}" if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        )
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        descriptions.append((torch.device("cuda", index), f"{properties.name}, {architecture}, {memory}"))
    if hasattr(torch, "xpu"):
        for index in range(torch.xpu.device_count()):
            descriptions.append((torch.device("xpu", index), torch.xpu.get_device_name(index)))
    return descriptions


def describe() -> str:
    """Returns these facts as text, one per line."""
    lines = [f"python        {platform.python_version()}, {platform.platform()}"]
    lines += [f"{package:<13} {installed_version(package) or 'not installed'}" for package in PACKAGES]
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    for device, description in devices():
        lines += ["", f"{device}: {description}"]
        for op in OPS:
            try:
                choice: tuple[str, str] = choose_backend(op, device)
            except ValueError as error:
                choice = ("none", str(error))
            lines.append(f"  {op:<32} {choice[0]:<8} {choice[1]}")
    lines += ["", "tested so far:", *(f"  {line}" for line in RUN_WHERE.splitlines())]
    return "\n".join(lines)
