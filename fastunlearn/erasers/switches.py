"""Which erasers are off: in a thread, and in what gradient checkpointing computes again.

Each thread has switches of its own. Blocks that gradient checkpointing (`use_reentrant=False`) computes again during a
backward pass must compute what they computed in the forward pass, though the `with` blocks around that may have ended,
and though autograd may use a thread of its own. So during a backward pass only `with` blocks count that were entered in
it. What was off in the forward pass is noted at the autograd graph, and looked up from the node that needs the block.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

_METADATA = "fastunlearn.erasers"  # the key of our notes at a node of the graph
_REENTRANT = "CheckpointFunctionBackward"
NO_BACKWARD = -1


class Switches(threading.local):
    """The switches of the current thread.

    Not a ContextVar, because `torch.compile` can trace this, with a guard on what it reads, and not that.

    Attributes:
        blocks: how many `with` blocks are active, by the backward pass in which they were entered and by eraser name.
    """

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, str], int] = {}


EVERYWHERE = Switches()  # of all erasers of all models, under the name ""


class _Off:
    """The erasers of one attention that were off in one call."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)


_noted: WeakSet[_Off] = WeakSet()  # of calls whose graph is alive, if anything was off: mostly none


def current_backward() -> int:
    """The backward pass that is running; `NO_BACKWARD` if none is, and in compiled code."""
    return NO_BACKWARD if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


@contextmanager
def switched_off(switched: Iterable[tuple[Switches, str]]) -> Iterator[None]:
    """Switches erasers off for the current thread. These contexts may end in any order."""
    passes = {NO_BACKWARD, current_backward()}
    keys = [(switches.blocks, (number, name)) for switches, name in switched for number in passes]
    for blocks, key in keys:
        blocks[key] = blocks.get(key, 0) + 1
    try:
        yield
    finally:
        for blocks, key in keys:
            blocks[key] -= 1
            if not blocks[key]:
                del blocks[key]


def note(stack: Any, off: tuple[str, ...], inputs: Iterable[Any], total: Tensor) -> None:
    """Notes what was off when `stack` added to an attention, at all nodes from the attention's inputs to `total`."""
    if not off and not _noted:
        return
    entry = _Off(off)
    if off:
        _noted.add(entry)
    for node in _upstream(total.grad_fn, {value.grad_fn for value in inputs if isinstance(value, Tensor)}):
        if node.next_functions:  # the others, of parameters, belong to other calls as well
            node.metadata.setdefault(_METADATA, {})[stack] = entry


def noted(stack: Any) -> tuple[str, ...]:
    """What was off in the call of `stack` that is being computed again for the node that autograd runs."""
    if not _noted:
        return ()
    node = torch._C._current_autograd_node()
    if node is None or node.name() == _REENTRANT:  # leaves no graph; `check_recomputable` lets it pass if all is on
        return ()
    entries = (node.metadata.get(_METADATA, {}).get(stack) for node in _upstream(node))
    return next((entry.names for entry in entries if entry is not None), ())


def _upstream(node: Any, last: Collection[Any] = ()) -> Iterator[Any]:
    """The node and those that its input was computed by, nearest first, but none beyond those in `last`."""
    front, seen = [node] if node is not None else [], {node, None}
    while front:
        following: list[Any] = []
        for node in front:
            yield node
            if node not in last:
                new = {before for before, _ in node.next_functions} - seen
                seen |= new
                following += new
        front = following


class _Call(threading.local):
    """The call of a transformer that is running in this thread."""

    with_gradient = False


_call = _Call()


def begin_call(transformer: Any, args: Any) -> None:
    """A forward pre-hook of transformers with erasers."""
    if not torch.compiler.is_compiling():
        _call.with_gradient = torch.is_grad_enabled()


def end_call(transformer: Any, args: Any, output: Any) -> None:
    """A forward hook of transformers with erasers."""
    if not torch.compiler.is_compiling():
        _call.with_gradient = False


def check_recomputable(off: tuple[str, ...]) -> None:
    """Raises if a reentrant checkpoint would not know in the backward pass what was off in the forward pass."""
    if off and _call.with_gradient and not torch.is_grad_enabled():
        raise RuntimeError(
            f"gradient checkpointing: expected use_reentrant=False while erasers are disabled ({', '.join(off)}), "
            "got a reentrant checkpoint, which would compute gradients with these erasers on"
        )
