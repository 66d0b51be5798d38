"""Where a case runs: how its arrays get there, how a call is timed, what a copy and an allocation cost."""

import importlib
import importlib.util
import time
import tracemalloc
from collections.abc import Callable
from itertools import repeat
from typing import Any, ClassVar

import numpy as np
from numba import prange

import numbaloss as nl
from numbaloss.kernels.cpu.disk import kept
from numbaloss.kernels.cpu.elementwise import PARALLEL_FROM

Call = Callable[[], Any]


class Absent(Exception):
    """A device that this machine has not, or cannot use; the message says why."""


@kept(nogil=True)
def _copy_serial(source, target):
    for i in range(source.size):
        target[i] = source[i]


@kept(parallel=True, nogil=True)
def _copy_parallel(source, target):
    for i in prange(source.size):
        target[i] = source[i]


class CPU:
    """NumPy arrays, Numba's threads, the host's clock."""

    name: ClassVar[str] = "cpu"

    def put(self, array: np.ndarray) -> Any:
        return array

    def get(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def empty_like(self, array: Any) -> Any:
        return np.empty_like(array)

    def seconds(self, call: Call, calls: int = 1) -> float:
        """Seconds of one call, of so many in a row."""
        start = time.perf_counter()
        for _ in repeat(None, calls):
            call()
        return (time.perf_counter() - start) / calls

    def copier(self, nbytes: int) -> Call:
        """A copy that moves so many bytes, half read and half written, on all of the threads."""
        source, target = np.zeros((2, max(1, nbytes // 8)), np.float32)
        copy = _copy_serial if source.size < PARALLEL_FROM else _copy_parallel
        return lambda: copy(source, target)

    def peak(self, call: Call) -> int:
        """Bytes that a call holds at most beyond its arguments; NumPy reports its arrays to tracemalloc."""
        nl.free_memory()  # else the gradient lies where an earlier one lay, and costs nothing
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


class CUDA:
    """CuPy arrays, on its current device and stream, timed by events."""

    name: ClassVar[str] = "cuda"

    def __init__(self) -> None:
        if importlib.util.find_spec("cupy") is None:
            raise Absent("CuPy is not installed: pip install cupy-cuda12x or cupy-cuda13x")
        cupy = importlib.import_module("cupy")
        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise Absent(f"CuPy finds no CUDA device: {error}") from error
        self.cupy = cupy

    def put(self, array: np.ndarray) -> Any:
        return self.cupy.asarray(array)

    def get(self, array: Any) -> np.ndarray:
        return self.cupy.asnumpy(array)

    def empty_like(self, array: Any) -> Any:
        return self.cupy.empty_like(array)

    def seconds(self, call: Call, calls: int = 1) -> float:
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record()
        for _ in repeat(None, calls):
            call()
        end.record()
        end.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, end) / 1e3 / calls

    def copier(self, nbytes: int) -> Call:
        source, target = self.cupy.zeros((2, max(1, nbytes // 8)), np.float32)
        return lambda: self.cupy.copyto(target, source)

    def peak(self, call: Call) -> int:
        pool = self.cupy.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        call()
        return pool.total_bytes() - before


Device = CPU | CUDA
HOST = CPU()


def open_device(name: str) -> Device:
    """A device by name; raises `Absent`."""
    return HOST if name == "cpu" else CUDA()
