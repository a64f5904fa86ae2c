"""Training on one process or several, with Accelerate, and the base model sharded over them with FSDP2.

Erasers are replicated. They stay plain tensors even if the base model is sharded, so that a capture always sees an
eraser's complete weights.
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
    """Returns Accelerate's settings for sharding the base model; None if it is not to be sharded.

    The settings are those of `accelerate launch --use_fsdp`, or the defaults if only the option `fsdp` asks for it.

    Raises:
        ValueError: `accelerate launch` asks for FSDP 1, which cannot leave the erasers in a block unsharded.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(
                f"fsdp_version: expected FSDP version 2 (accelerate launch --fsdp_version 2), got {version}"
            )
        return FullyShardedDataParallelPlugin()
    return FullyShardedDataParallelPlugin(fsdp_version=2) if options.fsdp else None


def connect(options: TrainingOptions, logging_dir: Path, *, cpu: bool) -> Any:
    """Connects this process to the others that the launcher started, and returns its `Accelerator`, with trackers.

    Args:
        options: the options of training.
        logging_dir: the folder of the trackers' logs.
        cpu: whether to run on the CPU. On a machine without a GPU it must be set, or Accelerate connects no processes.

    Raises:
        ValueError: the tracker is not installed, or Accelerate did not connect the processes.
    """
    from accelerate import Accelerator

    # Accelerate's mixed precision would be autocast. It is not needed: the base model is loaded in its dtype.
    accelerator = Accelerator(cpu=cpu, log_with=options.report_to, project_dir=logging_dir)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"device: expected a device that each of the {launched} launched processes has, got "
            f"{options.device or 'none'}, with which Accelerate connected {accelerator.num_processes}; choose another "
            "device, or, if this program used Accelerate before, the device that it used then"
        )
    if options.report_to is not None and not accelerator.log_with:
        raise ValueError(f"report_to: expected an installed tracker, got {options.report_to}, which is not installed")
    return accelerator


def shard(model: nn.Module, eraser_parameters: Sequence[nn.Parameter], plugin: Any, device: torch.device) -> None:
    """Shards the frozen parameters over all processes, block by block, and moves the complete erasers to `device`.

    Args:
        model: a transformer with erasers, or a wrapper of it; on any device.
        eraser_parameters: all parameters of the erasers.
        plugin: Accelerate's settings for FSDP2.
        device: the device of this process.
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
    # FSDP warns that a view might be changed in place, which nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for blocks in dict.fromkeys(blocks for blocks, _ in (*family.erased, *family.text_attended)):
        for block in getattr(transformer, blocks):
            fully_shard(block, **options)
    fully_shard(transformer, **options)
