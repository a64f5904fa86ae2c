"""Erasers on a model: attach, detach, disable and scale them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from fastunlearn.erasers.adapter import AdapterEraser
from fastunlearn.erasers.parts import Model, Part, parts_of, stacks_in
from fastunlearn.erasers.stack import EraserStack, add_erasers
from fastunlearn.erasers.switches import EVERYWHERE, begin_call, end_call, switched_off
from fastunlearn.families import experts, hidden_size
from fastunlearn.offloading import device_for_new_parts
from fastunlearn.ops.arguments import check_number


def _refuse_save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    """Replaces the `save_pretrained` of a transformer that has erasers.

    This is a plain function, not a method bound to one model, so that copies and pickles of the model keep it.
    """
    raise RuntimeError(
        "save_pretrained would write a model that from_pretrained loads without its erasers, so with the concept back. "
        "Save the erasers with fastunlearn.save_erasers; to save the base model, call fastunlearn.detach_erasers first"
    )


def _save_pipeline(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces the `save_pretrained` of a pipeline, which would save other parts before a transformer refuses."""
    if has_erasers(pipeline):
        _refuse_save_pretrained()
    return type(pipeline).save_pretrained(pipeline, *args, **kwargs)


def has_erasers(model: Model) -> bool:
    """Whether erasers are attached anywhere in a module or pipeline."""
    return any(isinstance(child, EraserStack) for part in experts(model).values() for child in part.modules())


def no_such_erasers(name: object) -> ValueError:
    """The error for a name that no attached erasers have."""
    return ValueError(f"name: expected the name of attached erasers, got {name!r}")


def check_new_name(parts: Sequence[Part], name: str) -> None:
    """Raises ValueError if erasers cannot be called `name`, or if some of the model's are already."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(EraserStack(), name):
        raise ValueError(f"name: expected letters, digits, '_' and '-', and no ModuleDict attribute, got {name!r}")
    if any(part.erasers(name) for part in parts):
        raise ValueError(
            f"name: expected a name that no attached erasers have, got {name!r}; detach those or choose another name"
        )


def check_scale(scale: object) -> None:
    """Raises unless `scale` is a finite number."""
    check_number("scale", scale)
    if not math.isfinite(scale):  # type: ignore[arg-type]
        raise ValueError(f"scale: expected a finite number, got {scale}")


def install_erasers(
    model: Model,
    sets: Sequence[tuple[Part, Mapping[str, Mapping[str, AdapterEraser]]]],
    scales: Mapping[str, float],
) -> None:
    """Attaches erasers, given per transformer by name and layer; all or none. Call `check_new_name` first."""
    done: list[Part] = []
    try:
        for part, erasers in sets:
            _install(part.transformer, part.attentions(), erasers, scales)
            done.append(part)
    except BaseException:
        for part in done:
            for name in scales:
                detach_erasers(part.transformer, name)
        raise
    if not isinstance(model, nn.Module):
        model.save_pretrained = partial(_save_pipeline, model)


def _install(
    transformer: nn.Module,
    layers: Mapping[str, nn.Module],
    sets: Mapping[str, Mapping[str, AdapterEraser]],
    scales: Mapping[str, float],
) -> None:
    """Attaches erasers to one transformer and freezes everything else in it."""
    _check_runs_hooks(transformer)
    for erasers in sets.values():
        for layer, eraser in erasers.items():  # first of all, because the device may be full
            attention = layers[layer]
            device = device_for_new_parts(attention, transformer)
            eraser.to(device).train(attention.training).requires_grad_(True)
    base: Any = transformer
    eraser_parameters = {id(p) for stack in stacks_in(layers).values() for p in stack.parameters()}
    if not eraser_parameters:
        base._trainable_before_erasers = [n for n, p in transformer.named_parameters() if p.requires_grad]
        base._eraser_call_hooks = [
            transformer.register_forward_pre_hook(begin_call),
            transformer.register_forward_hook(end_call, always_call=True),
        ]
        base.save_pretrained = _refuse_save_pretrained
    for parameter in transformer.parameters():
        if id(parameter) not in eraser_parameters:
            parameter.requires_grad_(False)
    for name, erasers in sets.items():
        for layer, eraser in erasers.items():
            stack = stacks_in(layers).get(layer)
            if stack is None:
                stack = EraserStack()
                stack.hook = layers[layer].register_forward_hook(add_erasers, with_kwargs=True)
                layers[layer].add_module("erasers", stack)
            stack[name], stack.scales[name] = eraser, scales[name]
    _compile_again()


def _compile_again() -> None:
    """Makes compiled code be compiled anew: `torch.compile` takes no notice of hooks that come or go later."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _check_runs_hooks(transformer: nn.Module) -> None:
    """Raises if a part of the model was captured as CUDA graphs, which cannot be made to call hooks that come later."""
    for name, module in transformer.named_modules():
        if getattr(vars(module).get("forward"), "__module__", None) == "torch.cuda.graphs":
            raise ValueError(
                f"model: expected modules that run as they are, got a CUDA graph in {name or type(module).__name__!r} "
                "(torch.cuda.make_graphed_callables); attach erasers before making it"
            )


def attach_erasers(model: Model, rank: int = 128, name: str = "default") -> dict[str, AdapterEraser]:
    """Puts a fresh eraser on every attention of `model` and freezes everything else.

    The model's output stays the same, bit for bit, until the erasers are trained. The model's parameters keep their
    names; the erasers' are called `{layer}.erasers.{name}.down.weight` and so on. While erasers are attached, the
    transformer refuses `save_pretrained`, because `from_pretrained` would silently load it without them: use
    `save_erasers`. A pipeline that was given here or to `load_erasers` refuses before it writes anything, another one
    when it comes to the transformer. What `torch.compile` has compiled is compiled again at its next call, here and
    whenever erasers are loaded or detached.

    If the model is offloaded, its erasers stay on the device that it computes on. Offload first and attach then:
    erasers that are offloaded with the model can be used and saved, but not trained.

    Args:
        model: a supported transformer (see `fastunlearn.families`), a VelocityModel or other wrapper of one, or a
            diffusers pipeline, with one transformer or two.
        rank: the number of features inside an eraser.
        name: what to call this set of erasers. A model can have several sets; their outputs add up.

    Returns:
        The erasers by layer, which is the path of the attention inside the transformer, "transformer_blocks.0.attn1",
        or, in a pipeline with two, inside the pipeline, "transformer_2.blocks.0.attn2".

    Raises:
        TypeError: the model is of no supported family.
        ValueError: erasers of this name are already attached, the name or the rank is not valid, a part of the model
            was made a CUDA graph, its weights are not loaded, or it is offloaded in a way that takes no new parameters.
    """
    parts = parts_of(model)
    check_new_name(parts, name)
    sets = [
        (part, {layer: AdapterEraser(hidden_size(part.transformer), rank) for layer in part.attentions()})
        for part in parts
    ]
    install_erasers(model, [(part, {name: erasers}) for part, erasers in sets], {name: 1.0})
    return {layer: eraser for part, erasers in sets for layer, eraser in part.in_model(erasers).items()}


def detach_erasers(model: Model, name: str | None = None) -> None:
    """Removes the erasers called `name`, or all erasers, from a model or pipeline.

    When the last ones are removed, so are the hooks and the guard on `save_pretrained`, and the parameters that were
    trainable before the first erasers were attached become trainable again. Without a name, a model that has no
    erasers is left as it is.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: no erasers are called `name`.
    """
    parts = parts_of(model)
    if name is not None and not any(part.erasers(name) for part in parts):
        raise no_such_erasers(name)
    for part in parts:
        _detach(part.transformer, part.attentions(), name)
    if not isinstance(model, nn.Module) and not has_erasers(model):
        model.__dict__.pop("save_pretrained", None)


def _detach(transformer: nn.Module, layers: Mapping[str, nn.Module], name: str | None) -> None:
    stacks = stacks_in(layers)
    for layer, stack in stacks.items():
        if name is not None and name in stack:
            del stack[name], stack.scales[name]
        if name is None or not len(stack):
            stack.hook.remove()
            del layers[layer].erasers
    if stacks:
        _compile_again()
    if stacks and not stacks_in(layers):
        base: Any = transformer
        trainable = set(base._trainable_before_erasers)
        for hook in base._eraser_call_hooks:
            hook.remove()
        del base._trainable_before_erasers, base._eraser_call_hooks
        vars(base).pop("save_pretrained", None)  # absent if the user removed the guard
        for parameter_name, parameter in transformer.named_parameters():
            if parameter_name in trainable:
                parameter.requires_grad_(True)


@contextmanager
def erasers_disabled(model: Model, name: str | None = None) -> Iterator[None]:
    """Inside this context, `model` runs as if the erasers called `name`, or all erasers, were not attached.

    Contexts can be nested, an exception ends them properly, and they affect this model only: in a copy made inside,
    the erasers are on. They affect the current thread only (asyncio tasks share a thread, so do not await inside).
    Gradient checkpointing computes again, in any thread, what the forward pass computed, except in blocks that
    `torch.compile` compiled one by one: compile the whole model to train through checkpoints with erasers disabled. Any
    module that contains a model with erasers, or a pipeline, will do. Without a name, a module without erasers is left
    as it is.

    Raises:
        TypeError: `model` is neither a module nor a pipeline.
        ValueError: no erasers are called `name`.
        RuntimeError: in the forward pass, if gradient checkpointing is reentrant (`use_reentrant=True`).
    """
    modules = list(experts(model).values())
    if not isinstance(modules[0], nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module or a pipeline, got {type(model).__name__}")
    stacks = [child for module in modules for child in module.modules() if isinstance(child, EraserStack)]
    switched = [(stack._disabled_here, key) for stack in stacks for key in stack if name in (None, key)]
    if name is not None and not switched:
        raise no_such_erasers(name)
    with switched_off(switched):
        yield


@contextmanager
def all_erasers_disabled() -> Iterator[None]:
    """Inside this context, every model runs without erasers in this thread, wherever a function may hold it."""
    with switched_off([(EVERYWHERE, "")]):
        yield


def set_eraser_scale(model: Model, name: str, scale: float) -> None:
    """Multiplies what the erasers called `name` add to their attentions by `scale`: 0 for nothing, 1 as trained.

    The scale is a setting of this model: it holds in all threads, and is not saved with the erasers. Set it between
    training steps, because gradient checkpointing computes again with the scale of that time. `EraserOutputsCapture`
    captures outputs without the scale.

    Raises:
        TypeError: the model is of no supported family, or `scale` is not a number.
        ValueError: no erasers are called `name`, or `scale` is not finite.
    """
    parts = parts_of(model)
    check_scale(scale)
    if not any(part.erasers(name) for part in parts):
        raise no_such_erasers(name)
    for part in parts:
        for stack in stacks_in(part.attentions()).values():
            if name in stack:
                stack.scales[name] = scale
