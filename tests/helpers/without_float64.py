"""A device that has no float64, as Apple's "mps", simulated in the CPU's memory.

with no_float64():
    x = torch.randn(2, 3).to("mps")   # computes like a CPU, but refuses float64, in the words of MPS
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("mps", 0)


class _OnDevice(Tensor):
    """A tensor that says it is on DEVICE. To torch's C++ code, which has no MPS in this build, it is on "meta"."""

    data_on_cpu: Tensor
    device = DEVICE  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: Tensor) -> Tensor:
        if data.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return Tensor._make_wrapper_subclass(
            cls, data.shape, data.stride(), data.storage_offset(), dtype=data.dtype, device="meta"
        )

    def __init__(self, data: Tensor) -> None:
        self.data_on_cpu = data

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs the operator on the CPU. Its results are on the device that was asked for, or else on that of the inputs."""
    inputs = tree_flatten((args, kwargs))[0]
    is_on_device = any(isinstance(x, _OnDevice) for x in inputs)
    if (asked := kwargs.get("device")) is not None:
        is_on_device = torch.device(asked).type in (DEVICE.type, "meta")
        kwargs = kwargs | {"device": torch.device("cpu") if is_on_device else asked}
    plain = tree_map_only(_OnDevice, lambda x: x.data_on_cpu, (args, kwargs))
    result = func(*plain[0], **plain[1])
    if func._schema.is_mutable and args and isinstance(args[0], Tensor) and result is plain[0][0]:
        return args[0]
    return tree_map_only(Tensor, _OnDevice, result) if is_on_device else result


@contextmanager
def no_float64() -> Iterator[torch.device]:
    """Makes the device usable inside the `with`."""
    # `torch.tensor(..., device=...)` then makes a CPU tensor and moves it, as under FakeTensorMode.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
