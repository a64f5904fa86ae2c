"""The size of the largest tensor that an operation creates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastunlearn.ops.torch_backend import blocks


class LargestTensor(TorchDispatchMode):
    """A context in which `elements` becomes the largest number of elements of any new tensor of `dtype`.

    Also of memory that the torch backend keeps for all calls: it is new then.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.elements = 0
        vars(blocks._threads).clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == self.dtype:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result
