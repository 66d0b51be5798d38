"""CUDA kernels on their way to a device: compiled when first asked for, kept on disk, launched.

`Driver` is all that is asked of CUDA, and imports it.
"""

import hashlib
import importlib
import json
import os
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numba
import numpy as np

from .kernels import bind
from .kernels.spec import CODES
from .loss import Memo

INSTALL = (
    "computing on a CUDA device needs numba-cuda: pip install 'numbaloss[cuda12]' or 'numbaloss[cuda13]', as "
    "your driver's CUDA version is (numba-cuda needs NumPy below 2.5)"
)
HALVES = "float16", "bfloat16"
NO_DRIVER = "no CUDA driver can be loaded on this machine"


# ---- the driver ---------------------------------------------------------------------------------------


class Driver:
    """What is asked of the CUDA driver."""

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

    def launch(self, kernel: "Kernel", blocks: int, threads: int, stream: int, values: Any) -> None:
        kept = _arguments
        kernel.pack(kept.buffer, 0, *values)
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


# ---- kernels ------------------------------------------------------------------------------------------


class Kernel:
    """A kernel on one device."""

    __slots__ = ("function", "name", "pack")

    # How a parameter of one of PTX's types lies in 8 bytes.
    FORMATS: ClassVar[dict[str, str]] = {"f32": "f4x", "f64": "d", "u64": "q", "u32": "I4x", "s32": "i4x"}

    def __init__(self, function: Any, name: str, parameters: Sequence[str]) -> None:
        self.function, self.name = function, name
        packing = struct.Struct("=" + "".join(self.FORMATS[p] for p in parameters))
        assert len(parameters) <= _Arguments.MOST
        self.pack = packing.pack_into


_kernels: dict[Any, tuple[Kernel, ...]] = {}
_compiling = threading.Lock()


def kernels(device: int, make: Callable[..., Any], **request: Any) -> tuple[Kernel, ...]:
    """The kernels that ``make(cc=..., **request)`` compiles, if no disk has them; their device is current."""
    key = device, make, *request.values()
    found = _kernels.get(key)
    if found is not None:
        return found
    with _compiling:
        if key not in _kernels:
            cc = capability(device)
            if cc < (8, 0) and any(map(_is_half, (request.get("code"), request.get("to")))):
                raise TypeError(
                    "float16 and bfloat16 need a GPU of compute capability 8.0 or above, this one has "
                    f"{cc[0]}.{cc[1]}; pass float32"
                )
            _kernels[key] = tuple(
                Kernel(driver().load(image, name), name, parameters)
                for image, name, parameters in kept(make, {**request, "cc": cc})
            )
    return _kernels[key]


def _is_half(storage: Any) -> bool:
    """Whether a code or a dtype stands for 16 bits, which older devices do not pack by one instruction."""
    return getattr(storage, "name", storage) in (*HALVES, *map(CODES.get, HALVES))


# What quick calls need, by all that it depends on: their shape too.
recipes = Memo()


@cache
def capability(device: int) -> tuple[int, int]:
    return driver().capability(device)


# A kernel's image, the name of its entry point, and its parameters' types.
Compiled = tuple[bytes, str, Sequence[str]]


def kept(make: Callable[..., Any], request: dict[str, Any]) -> list[Compiled]:
    """Kernels from disk, or compiled and stored there."""
    path = _cache_directory()
    if path is not None:
        path = path / f"{make.__module__.rpartition('.')[2]}-{_identity(make, request)}.cubin"
        found = _stored(path)
        if found is not None:
            return found
    made = compiled(make, request)
    if path is not None:
        _store(path, made)
    return made


def compiled(make: Callable[..., Any], request: dict[str, Any]) -> list[Compiled]:
    made = make(**request)
    binaries = made if isinstance(made[0], tuple) else (made,)
    return [(b.image, b.name, b.parameters) for b in binaries]


def _identity(make: Callable[..., Any], request: dict[str, Any]) -> str:
    """A digest of all that a kernel depends on."""

    def described(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(described, x))
        return bind.fingerprint(x) if callable(x) and hasattr(x, "__code__") else str(x)

    versions = numba.__version__, importlib.import_module("numba_cuda").__version__
    name = make.__module__, make.__qualname__
    said = bind._kernel_sources(), versions, name, [(k, described(v)) for k, v in request.items()]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]


def _stored(path: Path) -> list[Compiled] | None:
    """What a file holds; None for one that is not there, or not whole."""
    try:
        header, _, images = path.read_bytes().partition(b"\n")
        said = json.loads(header)
        if said["sha256"] != hashlib.sha256(images).hexdigest():
            return None
        found, start = [], 0
        for name, parameters, size in said["kernels"]:
            found.append((images[start : start + size], name, parameters))
            start += size
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(path: Path, made: list[Compiled]) -> None:
    """Write a file at once, whoever else does; a disk that cannot be written to costs only time."""
    images = b"".join(image for image, _, _ in made)
    said = {
        "kernels": [(name, parameters, len(image)) for image, name, parameters in made],
        "sha256": hashlib.sha256(images).hexdigest(),
    }
    partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_bytes(json.dumps(said).encode() + b"\n" + images)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)


@cache
def _cache_directory() -> Path | None:
    """Where Numba keeps its compiled functions, or would."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    places = [Path(bind.__file__).parent / "cuda" / "__pycache__", Path(user) / "numbaloss"]
    if numba.config.CACHE_DIR:
        places = [Path(numba.config.CACHE_DIR) / "numbaloss"]
    for path in places:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(path, os.W_OK):
            return path
    return None


@cache
def templates(module: str) -> Any:
    """A module of `kernels.cuda`: the first call on a device imports it, and numba-cuda with it."""
    try:
        importlib.import_module("numba_cuda")
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return importlib.import_module(f"{__package__}.kernels.cuda.{module}")
