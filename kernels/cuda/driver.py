"""All that is asked of the CUDA driver. Only here is it imported."""

import sys
import threading
from functools import cache
from typing import Any

import numpy as np

from ..devices import INSTALL

NO_DRIVER = "no CUDA driver can be loaded on this machine"


class Driver:
    """The CUDA driver."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise ImportError(INSTALL) from error
        self.api = driver
        self.streams: dict[int, Any] = {}
        self.contexts: dict[int, Any] = {}
        try:
            self._check(driver.cuInit(0))
        except Exception as error:
            raise RuntimeError(f"{NO_DRIVER}: {error}") from error

    def _check(self, results: Any) -> Any:
        """A driver function's results, without the error that it may be."""
        error, *values = results
        if error:
            _, text = self.api.cuGetErrorString(error)
            raise RuntimeError(f"CUDA: {error.name}: {(text or b'').decode()}")
        return values[0] if values else None

    def context(self, device: int) -> Any:
        """The context that the array libraries use: a device's primary one."""
        if device not in self.contexts:
            self.contexts[device] = self._check(self.api.cuDevicePrimaryCtxRetain(device))
        return self.contexts[device]

    def enter(self, device: int) -> bool:
        """Make a device's context the current one; says whether :meth:`leave` must be called."""
        context = self.contexts.get(device) or self.context(device)
        if int(self._check(self.api.cuCtxGetCurrent())) == int(context):
            return False
        self._check(self.api.cuCtxPushCurrent(context))
        return True

    def leave(self) -> None:
        self._check(self.api.cuCtxPopCurrent())

    def device_of(self, address: int) -> int:
        """The device that memory is on; that of the current context for none."""
        if not address:
            if int(self._check(self.api.cuCtxGetCurrent())):
                return int(self._check(self.api.cuCtxGetDevice()))
            return 0
        kind = self.api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        return int(self._check(self.api.cuPointerGetAttribute(kind, address)))

    def capability(self, device: int) -> tuple[int, int]:
        kinds = self.api.CUdevice_attribute
        major, minor = (
            int(self._check(self.api.cuDeviceGetAttribute(kind, device)))
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return major, minor

    def load(self, image: bytes, name: str) -> Any:
        """A compiled kernel, in the current context."""
        module = self._check(self.api.cuModuleLoadData(image))
        return self._check(self.api.cuModuleGetFunction(module, name.encode()))

    def _stream(self, stream: int) -> Any:
        if stream not in self.streams:
            self.streams[stream] = self.api.CUstream(stream)
        return self.streams[stream]

    def launch(self, kernel: Any, blocks: int, threads: int, stream: int, values: Any) -> None:
        kept = _arguments
        try:
            kernel.pack(kept.buffer, 0, *values)
        except OverflowError:
            kernel.pack(kept.buffer, 0, *kernel.cast(values))
        error = self.api.cuLaunchKernel(
            kernel.function, blocks, 1, 1, threads, 1, 1, 0, self._stream(stream), kept.pointers, 0
        )[0]
        if error:
            self._check((error,))

    def fill(self, address: int, pattern: bytes, stream: int) -> None:
        """Store up to 8 bytes."""
        stream = self._stream(stream)
        if len(pattern) == 2:
            bits = int.from_bytes(pattern, sys.byteorder)
            self._check(self.api.cuMemsetD16Async(address, bits, 1, stream))
            return
        for k in range(0, len(pattern), 4):
            bits = int.from_bytes(pattern[k : k + 4], sys.byteorder)
            self._check(self.api.cuMemsetD32Async(address + k, bits, 1, stream))

    def store(self, address: int, values: np.ndarray, stream: int) -> None:
        """Copy a contiguous array from the host, which may be dropped when this returns."""
        self._check(
            self.api.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, self._stream(stream))
        )

    def copy(self, address: int, source: int, nbytes: int, stream: int) -> None:
        """Copy a device's memory."""
        self._check(self.api.cuMemcpyDtoDAsync(address, source, nbytes, self._stream(stream)))

    def wait(self, stream: int, other: int) -> None:
        """Let a stream wait for what another has been given so far."""
        flags = self.api.CUevent_flags.CU_EVENT_DISABLE_TIMING
        event = self._check(self.api.cuEventCreate(flags))
        try:
            self._check(self.api.cuEventRecord(event, self._stream(other)))
            self._check(self.api.cuStreamWaitEvent(self._stream(stream), event, 0))
        finally:
            self._check(self.api.cuEventDestroy(event))

    def zeros(self, count: int) -> int:
        """The address of so many int64 on the current device, all 0."""
        address = int(self._check(self.api.cuMemAlloc(8 * count)))
        self.clear(address, count)
        return address

    def clear(self, address: int, count: int) -> None:
        self._check(self.api.cuMemsetD32(address, 0, 2 * count))

    def read(self, address: int, count: int) -> np.ndarray:
        """Wait for all of the current device's work, then read so many int64."""
        self._check(self.api.cuCtxSynchronize())
        values = np.empty(count, np.int64)
        self._check(self.api.cuMemcpyDtoH(values.ctypes.data, address, values.nbytes))
        return values


class _Arguments(threading.local):
    """Room for one launch's arguments, 8 bytes each, and the pointers to them that the driver wants."""

    MOST = 256

    def __init__(self) -> None:
        self.memory = np.zeros((2, self.MOST), np.uint64)
        start = self.memory.ctypes.data
        self.memory[1] = start + 8 * np.arange(self.MOST, dtype=np.uint64)
        self.buffer = memoryview(self.memory[0]).cast("B")
        self.pointers = start + 8 * self.MOST


_arguments = _Arguments()


@cache
def driver() -> Any:
    """The driver; tests put another in its place."""
    return Driver()


@cache
def capability(device: int) -> tuple[int, int]:
    """Return a device's compute capability."""
    return driver().capability(device)
