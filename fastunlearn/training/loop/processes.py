"""One process or many: what Accelerate knows of them, and a base model divided over them.

Erasers are replicated. Where the base model is sharded (FSDP2) they stay out of it, plain tensors, so that what a
capture sees of an eraser's weights is always the whole.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastunlearn.families import find_transformer
from fastunlearn.training.options import TrainingOptions


def fsdp_plugin(options: TrainingOptions) -> Any | None:
    """How to shard the base model: as `accelerate launch` was told, or by default where only the options ask for it.

    Raises:
        ValueError: `accelerate launch` was told to use FSDP 1, which cannot leave erasers out of a block.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(f"expected FSDP version 2 (accelerate launch --fsdp_version 2), got {version}")
        return FullyShardedDataParallelPlugin()
    return FullyShardedDataParallelPlugin(fsdp_version=2) if options.fsdp else None


def is_cpu(device: str | None) -> bool:
    """Whether a phase runs on the CPU: it was told to, or there is nothing else.

    Accelerate has to be told. Else it takes processes on a machine without a GPU for strangers to each other.

    Raises:
        ValueError: torch knows no device of this name.
    """
    if device is None:
        return not torch.accelerator.is_available()
    try:
        return torch.device(device).type == "cpu"
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def accelerator_of(options: TrainingOptions, logging_dir: Path, *, cpu: bool) -> Any:
    """This process's Accelerator, with the trackers that the options ask for.

    Raises:
        ValueError: none of these is installed; or a launcher started several processes, and Accelerate did not connect
            them.
    """
    from accelerate import Accelerator

    # Accelerate's own mixed precision is autocast: it is not used, since the base model has its dtype already.
    accelerator = Accelerator(cpu=cpu, log_with=options.report_to, project_dir=logging_dir)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"device: {launched} processes were launched, but Accelerate knows of {accelerator.num_processes}: "
            f"{options.device or 'its choice'} is no device of every process, or it was set up for another one before"
        )
    if options.report_to is not None and not accelerator.log_with:
        raise ValueError(f"report_to: {options.report_to} is not installed")
    return accelerator


def shard(model: nn.Module, eraser_parameters: Sequence[nn.Parameter], plugin: Any, device: torch.device) -> None:
    """Divides the frozen parameters over all processes, block by block; moves the erasers to `device` as they are.

    Args:
        model: a transformer with erasers, or a wrapper of it; on any device.
        eraser_parameters: all of the erasers'.
        plugin: Accelerate's, of FSDP 2.
        device: this process's.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    transformer, family = find_transformer(model)
    for parameter in eraser_parameters:
        parameter.data = parameter.data.to(device)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "ignored_params": set(eraser_parameters),
    }
    # FSDP fears that a view may be changed in place. None is.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for blocks in dict.fromkeys(blocks for blocks, _ in (*family.erased, *family.text_attended)):
        for block in getattr(transformer, blocks):
            fully_shard(block, **options)
    fully_shard(transformer, **options)
