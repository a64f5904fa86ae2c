"""Erasers: small adapters on a frozen transformer's attentions, as in T2VUnlearning (arXiv 2505.17550, section 3.2).

Let a be the video tokens that an attention returns and o_k = up_k(gelu(down_k(a))) the output of its k-th eraser. The
attention then returns a + sum_k s_k o_k, with scales s_k that are 1 unless set. Every eraser reads a, not what another
eraser made of it, so that erasers trained separately can be used together in any order.

    adapter.py    AdapterEraser, one eraser of one attention
    stack.py      all erasers of one attention, and the hook that adds what they return
    switches.py   which of them are off, in which thread, and when gradient checkpointing computes again
    parts.py      where erasers go: the transformers of a model or pipeline, and their attentions
    attached.py   erasers on a model: attach, detach, disable, scale
    saved.py      erasers of a model to a folder and back; the folder's format is in `fastunlearn.eraser_files`

What the rest of the library needs of an eraser:

* a model: forward takes the attention's video tokens (..., dim) and returns what is added to them, in their dtype;
* a trainer: `parameters()`, in float32 whatever is done to the model, its linear layers for example;
* `EraserOutputsCapture`: that forward is called as a module; for low-rank capture, that the last layer is linear and
  called `up`, with a `weight` (dim, rank) and a `bias` (dim,);
* a file: `state_dict()` with the entries `eraser_files.PARAMETERS`, of the shapes that `saved.py` checks.
"""

from fastunlearn.erasers.adapter import AdapterEraser
from fastunlearn.erasers.attached import (
    attach_erasers,
    detach_erasers,
    erasers_disabled,
    has_erasers,
    set_eraser_scale,
)
from fastunlearn.erasers.saved import load_erasers, save_erasers

__all__ = [
    "AdapterEraser",
    "attach_erasers",
    "detach_erasers",
    "erasers_disabled",
    "has_erasers",
    "load_erasers",
    "save_erasers",
    "set_eraser_scale",
]
