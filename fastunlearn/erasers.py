"""Erasers: small adapters on a frozen transformer's attentions, as in T2VUnlearning (arXiv 2505.17550, section 3.2).

With a the video tokens that an attention returns and o_k = up_k(gelu(down_k(a))) the output of its k-th eraser, the
attention returns a + sum_k s_k o_k instead, with scales s_k that are 1 unless set. Every eraser reads a, not what an
earlier eraser made of it, so that erasers trained apart can be used together in any order.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import eraser_files
from fastunlearn.environment import installed_version
from fastunlearn.families import Family, attentions, find_transformer, hidden_size
from fastunlearn.ops.arguments import check_number


class _Linear(nn.Linear):
    """Computes in its input's dtype, whatever its parameters'."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class AdapterEraser(nn.Module):
    """Linear(dim, rank), GELU, Linear(rank, dim). Its last layer starts at zero, so that a fresh eraser does nothing.

    Parameters stay float32 even if the model around it is cast to half precision (AdamW's epsilon is 0 in float16), and
    are cast to the input's dtype when used.
    """

    def __init__(self, dim: int, rank: int = 128) -> None:
        """`dim`: features of the tokens it reads and writes. `rank`: features in between."""
        super().__init__()
        for argument, value in (("dim", dim), ("rank", rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{argument}: expected a positive integer, got {value!r}")
        self.down = _Linear(dim, rank, dtype=torch.float32)
        self.up = _Linear(rank, dim, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., dim) to (..., dim) in the input's dtype: what is to be added to the input."""
        output: Tensor = self.up(F.gelu(self.down(hidden_states)))
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterEraser:
        """Follows the model to another device, not to a narrower dtype."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]


class _Erasers(nn.ModuleDict):
    """The erasers of one attention, by name, in the order they were attached."""

    def __init__(self) -> None:
        super().__init__()
        self.disabled: Counter[str] = Counter()
        self.scales: dict[str, float] = {}
        self.hook: Any = None

    def forward(self, attention_output: Tensor) -> Tensor:
        total = attention_output
        for name, eraser in self.items():
            if not self.disabled[name]:
                output, scale = eraser(attention_output), self.scales[name]
                total = total + (output if scale == 1 else output * scale)
        return total

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside `erasers_disabled` has nobody to switch it on again.
        return {**self.__dict__, "disabled": Counter()}


def _add_erasers(attention: nn.Module, args: Any, output: Any) -> Any:
    erasers: Any = attention.erasers
    if isinstance(output, tuple):
        return (erasers(output[0]), *output[1:])
    return erasers(output)


def _refuse_save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for the `save_pretrained` of a transformer that has erasers.

    A plain function, not a method bound to one model, so that copies and pickles of the model keep it.
    """
    raise RuntimeError(
        "save_pretrained would write a model that from_pretrained loads without its erasers, so with the concept back. "
        "Save the erasers with fastunlearn.save_erasers; to save the base model, call fastunlearn.detach_erasers first"
    )


def _attached(transformer: nn.Module, family: Family, name: str) -> dict[str, AdapterEraser]:
    """The erasers called `name`, by layer; empty if there are none."""
    stacks = _stacks(attentions(transformer, family.erased))
    return {layer: stack[name] for layer, stack in stacks.items() if name in stack}  # type: ignore[misc]


def _stacks(layers: Mapping[str, nn.Module]) -> dict[str, _Erasers]:
    found = {layer: attention._modules.get("erasers") for layer, attention in layers.items()}
    return {layer: stack for layer, stack in found.items() if isinstance(stack, _Erasers)}


def _check_free(transformer: nn.Module, family: Family, name: str) -> None:
    """Raises ValueError if `name` cannot name an eraser, or names one of the model's already."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(_Erasers(), name):
        raise ValueError(f"name: expected letters, digits, '_' and '-', and no ModuleDict attribute, got {name!r}")
    if _attached(transformer, family, name):
        raise ValueError(f"name: the model has erasers called {name!r} already; detach them or choose another name")


def _install(
    transformer: nn.Module,
    family: Family,
    sets: Mapping[str, Mapping[str, AdapterEraser]],
    scales: Mapping[str, float],
) -> None:
    """Puts every set's erasers on their layers and freezes the base. `_check_free` comes first."""
    layers = attentions(transformer, family.erased)
    for erasers in sets.values():
        for layer, eraser in erasers.items():  # before anything else, because the device may be full
            attention = layers[layer]
            eraser.to(next(attention.parameters()).device).train(attention.training).requires_grad_(True)
    base: Any = transformer
    eraser_parameters = {id(p) for stack in _stacks(layers).values() for p in stack.parameters()}
    if not eraser_parameters:
        base._trainable_before_erasers = [n for n, p in transformer.named_parameters() if p.requires_grad]
        base.save_pretrained = _refuse_save_pretrained
    for parameter in transformer.parameters():
        if id(parameter) not in eraser_parameters:
            parameter.requires_grad_(False)
    for name, erasers in sets.items():
        for layer, eraser in erasers.items():
            stack = _stacks(layers).get(layer)
            if stack is None:
                stack = _Erasers()
                stack.hook = layers[layer].register_forward_hook(_add_erasers)
                layers[layer].add_module("erasers", stack)
            stack[name], stack.scales[name] = eraser, scales[name]


def attach_erasers(model: nn.Module, rank: int = 128, name: str = "default") -> dict[str, AdapterEraser]:
    """Puts a fresh eraser on every attention of `model` and freezes everything else.

    The model's output stays as it was, bit for bit, until the erasers are trained. Its parameters keep their names; the
    erasers' are `{layer}.erasers.{name}.down.weight` and so on. While erasers are attached the transformer refuses
    `save_pretrained`, because `from_pretrained` would silently give the model without them: use `save_erasers`.

    Args:
        model: a supported transformer (see `fastunlearn.families`), or a VelocityModel or other wrapper of one.
        rank: the erasers' inner width.
        name: several sets of erasers can live on one model; their outputs add up.

    Returns:
        The erasers by the path of their attention from the transformer, as "transformer_blocks.0.attn1".

    Raises:
        TypeError: the model is of no supported family.
        ValueError: erasers of this name are attached already, or the name or the rank is none.
    """
    transformer, family = find_transformer(model)
    _check_free(transformer, family, name)
    dim = hidden_size(transformer)
    erasers = {layer: AdapterEraser(dim, rank) for layer in attentions(transformer, family.erased)}
    _install(transformer, family, {name: erasers}, {name: 1.0})
    return erasers


def detach_erasers(model: nn.Module, name: str | None = None) -> None:
    """Removes the erasers called `name`, or all of them.

    With the last ones go the hooks and the guard on `save_pretrained`, and the parameters that were trainable before
    the first erasers came are trainable again. Without any erasers, and without a name, nothing happens.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: no erasers are called `name`.
    """
    transformer, family = find_transformer(model)
    layers = attentions(transformer, family.erased)
    stacks = _stacks(layers)
    if name is not None and not _attached(transformer, family, name):
        raise ValueError(f"name: no erasers are called {name!r}")
    for layer, stack in stacks.items():
        if name is not None and name in stack:
            del stack[name], stack.scales[name]
        if name is None or not len(stack):
            stack.hook.remove()
            del layers[layer].erasers
    if stacks and not _stacks(layers):
        base: Any = transformer
        trainable = set(base._trainable_before_erasers)
        del base._trainable_before_erasers
        vars(base).pop("save_pretrained", None)  # gone already where somebody lifted the guard by hand
        for parameter_name, parameter in transformer.named_parameters():
            if parameter_name in trainable:
                parameter.requires_grad_(True)


@contextmanager
def erasers_disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Runs `model` as if the erasers called `name`, or all of them, were not attached.

    Nests, ends with exceptions, and concerns this model only: a copy made inside has its erasers on. Takes any module
    that holds a model with erasers, and does nothing if there are none and no name is given.

    Raises:
        TypeError: `model` is no module.
        ValueError: no erasers are called `name`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    stacks = [module for module in model.modules() if isinstance(module, _Erasers)]
    switched = [(stack, key) for stack in stacks for key in stack if name in (None, key)]
    if name is not None and not switched:
        raise ValueError(f"name: no erasers are called {name!r}")
    for stack, key in switched:
        stack.disabled[key] += 1
    try:
        yield
    finally:
        for stack, key in switched:
            stack.disabled[key] -= 1


def set_eraser_scale(model: nn.Module, name: str, scale: float) -> None:
    """Multiplies what the erasers called `name` add to their attentions by `scale`: 0 for nothing, 1 as trained.

    The scale belongs to this model and is not saved with the erasers. `EraserOutputsCapture` shows their own outputs,
    unscaled.

    Raises:
        TypeError: the model is of no supported family, or `scale` is no number.
        ValueError: no erasers are called `name`, or `scale` is not finite.
    """
    transformer, family = find_transformer(model)
    _check_scale(scale)
    if not _attached(transformer, family, name):
        raise ValueError(f"name: no erasers are called {name!r}")
    for stack in _stacks(attentions(transformer, family.erased)).values():
        if name in stack:
            stack.scales[name] = scale


def save_erasers(
    model: nn.Module, folder: str | os.PathLike[str], name: str = "default", concept: str | None = None
) -> None:
    """Saves the erasers called `name`: a config.json and a safetensors file.

    A crash on the way leaves what the folder held before. Erasers saved there earlier are replaced.

    Args:
        model: what they are attached to.
        folder: where to; created if need be.
        name: which. Not stored: they may be loaded under another name.
        concept: what they erase, for the record.

    Raises:
        TypeError: the model is of no supported family, or `concept` is no string.
        ValueError: no erasers are called `name`, or a parameter is not finite.
        FileExistsError: the folder holds the config.json of something else.
        ImportError: safetensors is not installed.
    """
    if concept is not None and not isinstance(concept, str):
        raise TypeError(f"concept: expected a string or None, got {type(concept).__name__}")
    transformer, family = find_transformer(model)
    erasers = _attached(transformer, family, name)
    if not erasers:
        raise ValueError(f"name: no erasers are called {name!r}")
    states = {layer: eraser.state_dict() for layer, eraser in erasers.items()}
    for layer, state in states.items():
        _check_finite(layer, state)
    rank, dim = next(iter(erasers.values())).down.weight.shape
    facts = {
        "backbone": family.name,
        "concept": concept,
        "rank": rank,
        "dim": dim,
        "versions": {package: installed_version(package) for package in ("fastunlearn", "torch", "diffusers")},
    }
    eraser_files.write(folder, states, facts)


Folder = str | os.PathLike[str]


@overload
def load_erasers(
    model: nn.Module, folder: Folder, name: str = ..., *, scale: float = ...
) -> dict[str, AdapterEraser]: ...


@overload
def load_erasers(
    model: nn.Module, folder: Sequence[Folder], *, names: Sequence[str], scales: Sequence[float] | None = ...
) -> dict[str, dict[str, AdapterEraser]]: ...


def load_erasers(
    model: nn.Module,
    folder: Folder | Sequence[Folder],
    name: str | None = None,
    *,
    scale: float | None = None,
    names: Sequence[str] | None = None,
    scales: Sequence[float] | None = None,
) -> dict[str, AdapterEraser] | dict[str, dict[str, AdapterEraser]]:
    """Attaches saved erasers, and freezes everything else, like `attach_erasers`.

        load_erasers(model, "erasers/car")
        load_erasers(model, ["erasers/nudity", "erasers/car"], names=["nudity", "car"], scales=[1.0, 0.5])

    Reads what `save_erasers` wrote and what T2VUnlearning's scripts wrote (`eraser_weights.pt`, `eraser_config.json`;
    for HunyuanVideo on its single blocks alone). Pickles are loaded with `weights_only=True`. The model is not touched
    unless everything fits.

    Args:
        model: a supported transformer, or a VelocityModel or other wrapper of one.
        folder: what was saved; or several folders, whose erasers are stacked.
        name: what to call one folder's erasers here; "default" if not given.
        scale: of one folder's erasers: what their outputs are multiplied by; 1 if not given. See `set_eraser_scale`.
        names: what to call the erasers of several folders, one name each.
        scales: their scales, one each; all 1 if not given.

    Returns:
        The erasers by layer; of several folders by name, then by layer.

    Raises:
        TypeError: the model is of no supported family, `name` or `scale` came with several folders, `names` or `scales`
            with one, or a scale is no number.
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, erasers are not for this model, a name is taken or comes twice, a scale is not
            finite, or there are not as many names or scales as folders.
        ImportError: safetensors is not installed.
    """
    is_one = isinstance(folder, (str, os.PathLike))
    for argument, value, allowed in (
        ("name", name, is_one),
        ("scale", scale, is_one),
        ("names", names, not is_one),
        ("scales", scales, not is_one),
    ):
        if value is not None and not allowed:
            raise TypeError(f"{argument}: is for {'several folders' if is_one else 'one folder'}, got {value!r}")
    if isinstance(folder, (str, os.PathLike)):
        name = "default" if name is None else name
        return _load(model, {name: folder}, {name: 1.0 if scale is None else scale})[name]
    folders = list(folder)
    if names is None or isinstance(names, str) or len(names) != len(folders) or len(set(names)) != len(names):
        raise ValueError(f"names: expected a name of its own for each of {len(folders)} folders, got {names!r}")
    if scales is not None and len(scales) != len(folders):
        raise ValueError(f"scales: expected a number for each of {len(folders)} folders, got {scales!r}")
    scales = [1.0] * len(folders) if scales is None else scales
    return _load(model, dict(zip(names, folders, strict=True)), dict(zip(names, scales, strict=True)))


def _load(
    model: nn.Module, folders: Mapping[str, Folder], scales: Mapping[str, float]
) -> dict[str, dict[str, AdapterEraser]]:
    """Everything is read and checked before anything is attached."""
    transformer, family = find_transformer(model)
    for name, scale in scales.items():
        _check_free(transformer, family, name)
        _check_scale(scale)
    sets = {name: _read(transformer, family, folder) for name, folder in folders.items()}
    if sets:
        _install(transformer, family, sets, scales)
    return sets


def _read(transformer: nn.Module, family: Family, folder: Folder) -> dict[str, AdapterEraser]:
    stored = eraser_files.read(folder)
    if stored.family not in (None, family.name):
        raise ValueError(f"{folder}: erasers for {stored.family}, but the model is {family.name}")
    # A folder has erasers for all blocks of a list, though not for every list: T2VUnlearning erases HunyuanVideo in its
    # single blocks alone.
    lists = {layer.partition(".")[0] for layer in stored.states}
    layers = attentions(transformer, tuple(place for place in family.erased if place[0] in lists) or family.erased)
    if stored.states.keys() != layers.keys():
        missing, unknown = sorted(layers.keys() - stored.states.keys()), sorted(stored.states.keys() - layers.keys())
        raise ValueError(f"{folder}: erasers missing for layers {missing}, and given for layers unknown {unknown}")
    dim = hidden_size(transformer)
    return {layer: _restored(layer, stored.states[layer], dim, stored.rank) for layer in layers}


def _restored(layer: str, state: Mapping[str, Any], dim: int, rank: int) -> AdapterEraser:
    for key, value in state.items():
        if isinstance(value, Tensor) and not _is_plain(value):
            kind = f"{value.dtype}, {value.layout} on {value.device}" + ", nested" * value.is_nested
            raise ValueError(f"{layer}: expected {key} to be a dense floating-point tensor, got {kind}")
    # Not asked of an eraser: `rank` is only what a file says, and none of its size may be made before it fits.
    expected = {"down.weight": (rank, dim), "down.bias": (rank,), "up.weight": (dim, rank), "up.bias": (dim,)}
    got = {key: tuple(value.shape) if isinstance(value, Tensor) else value for key, value in state.items()}
    if got != expected:
        raise ValueError(f"{layer}: expected parameters {expected}, got {got}")
    weights = {key: value.to(torch.float32, copy=True) for key, value in state.items()}
    _check_finite(layer, weights)
    with torch.device("meta"):  # no memory, and no random numbers, for weights about to be replaced
        eraser = AdapterEraser(dim, rank)
    eraser.load_state_dict(weights, assign=True)
    return eraser


def _check_scale(scale: object) -> None:
    check_number("scale", scale)
    if not math.isfinite(scale):  # type: ignore[arg-type]
        raise ValueError(f"scale must be finite, got {scale}")


def _is_plain(value: Tensor) -> bool:
    dense = value.layout is torch.strided and not value.is_nested and value.device.type == "cpu"
    return dense and value.is_floating_point()


def _check_finite(layer: str, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{layer}: {key} of the eraser holds NaN or infinity")
