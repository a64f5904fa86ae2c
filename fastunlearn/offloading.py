"""Where an offloaded model computes, and where its weights are in between.

Accelerate and diffusers offload by hooks that they leave on modules. The hooks are read as they are, so neither library
is imported for a model that is not offloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def computing_device(module: nn.Module, transformer: nn.Module) -> torch.device:
    """The device that a part of `transformer`, or all of it, computes on, wherever its weights are in between."""
    parts = list(module.modules())
    for part in parts:
        for hook in _accelerate_hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.empty(0, device=device).device  # Accelerate also takes an accelerator's bare number
    group = _group_of(parts, transformer)
    if group is not None:
        return torch.device(group.onload_device)
    return next(module.parameters()).device


def device_for_new_parts(module: nn.Module, transformer: nn.Module) -> torch.device:
    """The device for modules that are to be added to `module`, a part of `transformer`: where it computes.

    Raises:
        ValueError: the weights of `module` are on the meta device and not offloaded, so there are none; or it is
            offloaded in a way that new parts would break.
    """
    device = computing_device(module, transformer)
    if device.type == "meta":
        raise ValueError("model: expected loaded weights, got some on the meta device; load the model's weights first")
    group = _group_of([module], transformer)
    if group is not None and group.cpu_param_dict:  # the complete list of what may be moved
        raise ValueError(
            "model: expected one that can take new parameters, got one that is offloaded in blocks through a stream; "
            "attach or load erasers before enable_group_offload(use_stream=True), or use offload_type='leaf_level'"
        )
    return device


def loaded_parameters(transformer: nn.Module, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """The parameters with wanted names, in the model's order. Those that are offloaded are fetched, one at a time.

    Raises:
        ValueError: a parameter is on the meta device, and no hook knows its values.
    """
    on_disk = {
        id(parameter): (group.safetensors_file_path, key)
        for group in _groups(transformer)
        if getattr(group, "offload_to_disk_path", None) is not None
        for parameter, key in group.tensor_to_key.items()
    }
    for name, parameter in transformer.named_parameters():
        if not wanted(name):
            continue
        if id(parameter) in on_disk:  # between forward passes, the parameter itself is uninitialised memory
            yield name, _from_file(*on_disk[id(parameter)])
        else:
            yield name, _fetched(transformer, name) if parameter.is_meta else parameter


def _fetched(transformer: nn.Module, name: str) -> Tensor:
    """The values of a parameter on the meta device, from a hook of its module or of one around that."""
    path, _, key = name.rpartition(".")
    while True:
        for hook in _accelerate_hooks(transformer.get_submodule(path)):
            weights = getattr(hook, "weights_map", None)
            value: Tensor | None = None if weights is None else weights.get(key)
            if value is not None:
                return value
        if not path:
            raise ValueError(f"{name}: expected loaded weights, got a parameter on the meta device that has none")
        path, _, part = path.rpartition(".")
        key = f"{part}.{key}"


def _from_file(path: str, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _groups(transformer: nn.Module) -> Iterator[Any]:
    """The groups of modules that diffusers' group offloading moves together."""
    for module in transformer.modules():
        registry = vars(module).get("_diffusers_hook")
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None:
            yield hook.group


def _group_of(modules: list[nn.Module], transformer: nn.Module) -> Any | None:
    """The first group that moves one of `modules`, by itself or with a module around it; None if there is none."""
    wanted = {id(module) for module in modules}
    for group in _groups(transformer):
        if any(id(part) in wanted for root in group.modules for part in root.modules()):
            return group
    return None
