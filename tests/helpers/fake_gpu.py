"""A GPU that is not there: Triton's own binder, compiler, loader and launcher, over the driver of `fake_cuda.c`.

CPU tensors stand for the GPU's. Kernels are compiled to machine code and loaded, and their launches are recorded with
all parameters, but nothing runs: what is in result tensors means nothing.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

COMPILER = shutil.which("gcc") or shutil.which("cc")


class RecordedLaunch(NamedTuple):
    """What the driver was asked to launch."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    registers: int
    parameters: list[tuple[int, int]]  # bytes, and their value as an unsigned number


class FakeGpu:
    """Triton's active driver from now on, for the rest of the process.

    Args:
        folder: where to build the library.
        capability: the GPU's, such as (9, 0).

    Raises:
        RuntimeError: there is no C compiler.
    """

    def __init__(self, folder: Path, capability: tuple[int, int] = (9, 0)) -> None:
        if COMPILER is None:
            raise RuntimeError("a C compiler: expected gcc or cc on the path, got neither")
        source, library = Path(__file__).with_name("fake_cuda.c"), folder / "libcuda.so.1"
        command = [COMPILER, "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source]
        subprocess.run(command, check=True)
        (folder / "libcuda.so").symlink_to(library.name)
        # Triton links its launchers against the library in this folder.
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        for name, kind in (("fake_launches", ctypes.c_long), ("fake_name", ctypes.c_char_p)):
            getattr(self._library, name).restype = kind
        self._library.fake_value.restype = ctypes.c_uint64
        self._library.fake_capability(*capability)

        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver

        class Driver(CudaDriver):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.get_device_capability = lambda device=0: capability
                self.get_current_device = lambda: 0
                self.set_current_device = lambda device: None
                self.get_current_stream = lambda device: 0

            def get_current_target(self) -> Any:
                return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

        triton.runtime.driver.set_active(Driver())

    @contextmanager
    def recorded(self) -> Iterator[list[RecordedLaunch]]:
        """Fill the list with the launches made inside, at its end."""
        launches: list[RecordedLaunch] = []
        self._library.fake_forget()
        yield launches
        launches += map(self._launch, range(self._library.fake_launches()))

    def _launch(self, index: int) -> RecordedLaunch:
        library, i = self._library, ctypes.c_long(index)
        grid, block, shared_bytes = (ctypes.c_uint * 3)(), (ctypes.c_uint * 3)(), ctypes.c_uint()
        library.fake_dimensions(i, grid, block, ctypes.byref(shared_bytes))
        parameters = [(library.fake_size(i, p), library.fake_value(i, p)) for p in range(library.fake_parameters(i))]
        name, registers = library.fake_name(i).decode(), library.fake_registers(i)
        return RecordedLaunch(name, tuple(grid), tuple(block), shared_bytes.value, registers, parameters)
