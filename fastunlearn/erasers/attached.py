"""Erasers on a model: attach, detach, disable and scale them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastunlearn.erasers.adapter import AdapterEraser
from fastunlearn.erasers.switches import (
    EVERYWHERE,
    NO_BACKWARD,
    Switches,
    begin_call,
    check_recomputable,
    current_backward,
    end_call,
    note,
    noted,
    switched_off,
)
from fastunlearn.families import Family, attentions, find_transformer, hidden_size
from fastunlearn.ops.arguments import check_number


class _EraserStack(nn.ModuleDict):
    """The erasers of one attention by name, in the order in which they were attached."""

    def __init__(self) -> None:
        super().__init__()
        self._disabled_here = Switches()
        self._disabled_when_replicated: tuple[str, ...] = ()
        self.scales: dict[str, float] = {}
        self.hook: Any = None

    def forward(self, attention_output: Tensor, off: tuple[str, ...]) -> Tensor:
        total = attention_output
        for name, eraser in self.items():
            if name not in off:
                output, scale = eraser(attention_output), self.scales[name]
                total = total + (output if scale == 1 else output * scale)
        return total

    def disabled(self) -> tuple[str, ...]:
        """The names of the erasers that are off in the call that is being computed."""
        backward, here = current_backward(), self._disabled_here.blocks
        if (backward, "") in EVERYWHERE.blocks:
            return tuple(self)
        off = tuple(name for name in self if (backward, name) in here) if here else ()
        if backward != NO_BACKWARD:
            off += noted(self)
        return off + self._disabled_when_replicated

    def _replicate_for_data_parallel(self) -> Any:
        # DataParallel calls each replica in a thread that it starts for that call.
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._disabled_when_replicated = self.disabled()
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_disabled_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._disabled_here = Switches()  # a copy that is made inside `erasers_disabled` has its erasers on


def _add_erasers(attention: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook of an attention with erasers."""
    erasers: Any = attention.erasers
    video = output[0] if isinstance(output, tuple) else output
    off = erasers.disabled()
    total = erasers(video, off)
    if not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            note(erasers, off, (*args, *kwargs.values()), total)
        else:
            check_recomputable(off)
    return (total, *output[1:]) if isinstance(output, tuple) else total


def _refuse_save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    """Replaces the `save_pretrained` of a transformer that has erasers.

    This is a plain function, not a method bound to one model, so that copies and pickles of the model keep it.
    """
    raise RuntimeError(
        "save_pretrained would write a model that from_pretrained loads without its erasers, so with the concept back. "
        "Save the erasers with fastunlearn.save_erasers; to save the base model, call fastunlearn.detach_erasers first"
    )


def attached_erasers(transformer: nn.Module, family: Family, name: str) -> dict[str, AdapterEraser]:
    """The erasers called `name` by layer; empty if there are none."""
    stacks = _stacks(attentions(transformer, family.erased))
    return {layer: stack[name] for layer, stack in stacks.items() if name in stack}  # type: ignore[misc]


def has_erasers(module: nn.Module) -> bool:
    """Whether erasers are attached anywhere in `module`."""
    return any(isinstance(child, _EraserStack) for child in module.modules())


def no_such_erasers(name: object) -> ValueError:
    """The error for a name that no attached erasers have."""
    return ValueError(f"name: expected the name of attached erasers, got {name!r}")


def _stacks(layers: Mapping[str, nn.Module]) -> dict[str, _EraserStack]:
    """The eraser stacks of those attentions that have one, by layer."""
    stacks = {layer: attention._modules.get("erasers") for layer, attention in layers.items()}
    return {layer: stack for layer, stack in stacks.items() if isinstance(stack, _EraserStack)}


def check_new_name(transformer: nn.Module, family: Family, name: str) -> None:
    """Raises ValueError if erasers cannot be called `name`, or if some of the model's are already."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(_EraserStack(), name):
        raise ValueError(f"name: expected letters, digits, '_' and '-', and no ModuleDict attribute, got {name!r}")
    if attached_erasers(transformer, family, name):
        raise ValueError(
            f"name: expected a name that no attached erasers have, got {name!r}; detach those or choose another name"
        )


def check_scale(scale: object) -> None:
    """Raises unless `scale` is a finite number."""
    check_number("scale", scale)
    if not math.isfinite(scale):  # type: ignore[arg-type]
        raise ValueError(f"scale: expected a finite number, got {scale}")


def install_erasers(
    transformer: nn.Module,
    family: Family,
    sets: Mapping[str, Mapping[str, AdapterEraser]],
    scales: Mapping[str, float],
) -> None:
    """Attaches erasers, given by name and layer, and freezes the base model. Call `check_new_name` first."""
    _check_runs_hooks(transformer)
    layers = attentions(transformer, family.erased)
    for erasers in sets.values():
        for layer, eraser in erasers.items():  # first of all, because the device may be full
            attention = layers[layer]
            eraser.to(next(attention.parameters()).device).train(attention.training).requires_grad_(True)
    base: Any = transformer
    eraser_parameters = {id(p) for stack in _stacks(layers).values() for p in stack.parameters()}
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
            stack = _stacks(layers).get(layer)
            if stack is None:
                stack = _EraserStack()
                stack.hook = layers[layer].register_forward_hook(_add_erasers, with_kwargs=True)
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


def attach_erasers(model: nn.Module, rank: int = 128, name: str = "default") -> dict[str, AdapterEraser]:
    """Puts a fresh eraser on every attention of `model` and freezes everything else.

    The model's output stays the same, bit for bit, until the erasers are trained. The model's parameters keep their
    names; the erasers' are called `{layer}.erasers.{name}.down.weight` and so on. While erasers are attached, the
    transformer refuses `save_pretrained`, because `from_pretrained` would silently load it without them: use
    `save_erasers`. What `torch.compile` has compiled is compiled again at its next call, here and whenever erasers are
    loaded or detached.

    Args:
        model: a supported transformer (see `fastunlearn.families`), or a VelocityModel or other wrapper of one.
        rank: the number of features inside an eraser.
        name: what to call this set of erasers. A model can have several sets; their outputs add up.

    Returns:
        The erasers by layer, the path of the attention inside the transformer, such as "transformer_blocks.0.attn1".

    Raises:
        TypeError: the model is of no supported family.
        ValueError: erasers of this name are already attached, the name or the rank is not valid, or a part of the model
            was made a CUDA graph.
    """
    transformer, family = find_transformer(model)
    check_new_name(transformer, family, name)
    dim = hidden_size(transformer)
    erasers = {layer: AdapterEraser(dim, rank) for layer in attentions(transformer, family.erased)}
    install_erasers(transformer, family, {name: erasers}, {name: 1.0})
    return erasers


def detach_erasers(model: nn.Module, name: str | None = None) -> None:
    """Removes the erasers called `name`, or all erasers.

    When the last ones are removed, so are the hooks and the guard on `save_pretrained`, and the parameters that were
    trainable before the first erasers were attached become trainable again. Without a name, a model that has no
    erasers is left as it is.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: no erasers are called `name`.
    """
    transformer, family = find_transformer(model)
    layers = attentions(transformer, family.erased)
    stacks = _stacks(layers)
    if name is not None and not attached_erasers(transformer, family, name):
        raise no_such_erasers(name)
    for layer, stack in stacks.items():
        if name is not None and name in stack:
            del stack[name], stack.scales[name]
        if name is None or not len(stack):
            stack.hook.remove()
            del layers[layer].erasers
    if stacks:
        _compile_again()
    if stacks and not _stacks(layers):
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
def erasers_disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Inside this context, `model` runs as if the erasers called `name`, or all erasers, were not attached.

    Contexts can be nested, an exception ends them properly, and they affect this model only: in a copy made inside,
    the erasers are on. They affect the current thread only (asyncio tasks share a thread, so do not await inside).
    Gradient checkpointing computes again, in any thread, what the forward pass computed. Any module that contains a
    model with erasers will do. Without a name, a module without erasers is left as it is.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no erasers are called `name`.
        RuntimeError: in the forward pass, if gradient checkpointing is reentrant (`use_reentrant=True`).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    stacks = [module for module in model.modules() if isinstance(module, _EraserStack)]
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


def set_eraser_scale(model: nn.Module, name: str, scale: float) -> None:
    """Multiplies what the erasers called `name` add to their attentions by `scale`: 0 for nothing, 1 as trained.

    The scale is a setting of this model: it holds in all threads, and is not saved with the erasers. Set it between
    training steps, because gradient checkpointing computes again with the scale of that time. `EraserOutputsCapture`
    captures outputs without the scale.

    Raises:
        TypeError: the model is of no supported family, or `scale` is not a number.
        ValueError: no erasers are called `name`, or `scale` is not finite.
    """
    transformer, family = find_transformer(model)
    check_scale(scale)
    if not attached_erasers(transformer, family, name):
        raise no_such_erasers(name)
    for stack in _stacks(attentions(transformer, family.erased)).values():
        if name in stack:
            stack.scales[name] = scale
