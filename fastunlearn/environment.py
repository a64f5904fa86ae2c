"""What a bug report needs: versions, devices, and the backend of every op with the reason for it."""

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
# What the project's own tests have run. Extend it with what was run, not with what should work.
RUN_WHERE = """\
CPU, 1 process: all operations, the kernels in Triton's interpreter, all commands on tiny CogVideoX, HunyuanVideo, Wan
CPU, 2 and 4 processes over gloo: losses over a group; 2 processes: prepare, train replicated and under FSDP2
GPU, NCCL, Hub checkpoints at full size: not yet; the kernels compile for sm_80, sm_90, sm_100 and gfx942"""


def installed_version(package: str) -> str | None:
    """None where it is not installed, as where this package itself is run from its sources."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> list[tuple[torch.device, str]]:
    """The CPU and every accelerator that torch sees, each with its description."""
    found = [(torch.device("cpu"), f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = f"gfx {properties.gcnArchName}" if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append((torch.device("cuda", index), f"{properties.name}, {kind}, {memory}"))
    if hasattr(torch, "xpu"):
        found += [
            (torch.device("xpu", index), torch.xpu.get_device_name(index)) for index in range(torch.xpu.device_count())
        ]
    return found


def describe() -> str:
    """All of it as text, one fact a line."""
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
    lines += ["", "tested so far", *(f"  {line}" for line in RUN_WHERE.splitlines())]
    return "\n".join(lines)
