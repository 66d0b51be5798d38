"""CUDA devices that are not there: arrays of CuPy, PyTorch and no library, in the machine's memory; a driver.

:func:`install` puts them in place of the libraries and of the driver. A kernel's image is its PTX, which
:data:`MACHINE` executes; it is kept on disk as binaries are, in a folder beside them. The host reads arrays
through :func:`host` alone: any other access ends the process.
"""

import ctypes
import fcntl
import sys
import tempfile
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from numbaloss.kernels.cuda import binaries, driver, faults, libraries, linear, target
from numbaloss.loss import Loss
from numbaloss.quick import never

from .machine import INIT, READ, WRITE, Machine

MACHINE = Machine()
# Instead of a kernel the PTX that is executed, by the kernel's name.
MUTANTS: dict[str, str] = {}


# ---- arrays -------------------------------------------------------------------------------------------


class Flags(NamedTuple):
    c_contiguous: bool


ALIVE: Any = weakref.WeakSet()  # all arrays


class Array:
    """An array on a device: a view of addresses that the host cannot read."""

    def __init__(self, view: np.ndarray, on: int = 0) -> None:
        self.view, self.on = view, on
        ALIVE.add(self)

    address = property(lambda self: self.view.__array_interface__["data"][0])

    def __getitem__(self, key: Any) -> Any:
        return type(self)(self.view[key], self.on)

    def _interface(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.view.shape,
            "typestr": self.view.dtype.str,
            "data": (self.address, False),
            "strides": None if self.view.flags.c_contiguous else self.view.strides,
            "stream": None,
        }


class CuPyArray(Array):
    __module__ = "cupy"

    data = property(lambda self: SimpleNamespace(ptr=self.address, device_id=self.on))
    flags = property(lambda self: Flags(self.view.flags.c_contiguous))
    shape = property(lambda self: self.view.shape)
    dtype = property(lambda self: self.view.dtype)
    strides = property(lambda self: self.view.strides)
    ndim = property(lambda self: self.view.ndim)
    size = property(lambda self: self.view.size)
    __cuda_array_interface__ = property(Array._interface)

    def transpose(self, axes: Any) -> Any:
        return CuPyArray(self.view.transpose(axes), self.on)


class Tensor(Array):
    __module__ = "torch"
    requires_grad = False
    is_cuda = True
    layout = "strided"

    shape = property(lambda self: list(self.view.shape))
    dtype = property(lambda self: TORCH[self.view.dtype.name])
    device = property(lambda self: SimpleNamespace(index=self.on))

    @property
    def __cuda_array_interface__(self) -> Any:
        raise TypeError("torch.bfloat16 has no type string")

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.on

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.view.itemsize for s in self.view.strides)

    def is_contiguous(self) -> bool:
        return self.view.flags.c_contiguous

    def is_neg(self) -> bool:
        return False

    def permute(self, axes: Any) -> Any:
        return Tensor(self.view.transpose(axes), self.on)


class Plain(Array):
    """An array of no library in particular."""

    stream: int | None = None

    @property
    def __cuda_array_interface__(self) -> Any:
        return {**self._interface(), "stream": self.stream}


def _places(view: np.ndarray) -> np.ndarray:
    """Where in the memory each byte of each element is."""
    start = view.__array_interface__["data"][0] - MACHINE.base
    offsets = np.zeros(1, np.int64)
    for n, s in zip(view.shape, view.strides, strict=True):
        offsets = (offsets[:, None] + s * np.arange(n)).ravel()
    return start + offsets[:, None] + np.arange(view.itemsize)


def host(x: Any, whole: bool = True) -> np.ndarray:
    """A copy of a device's array, of which something has written all."""
    places = _places(x.view)
    assert not whole or (MACHINE.memory.flags[places] & INIT).all(), "an element that nothing wrote"
    return MACHINE.memory.bytes[places].reshape(-1).view(x.view.dtype).reshape(x.view.shape)


def write(x: Any, a: np.ndarray) -> None:
    """Give a device's array values."""
    places = _places(x.view)
    MACHINE.memory.bytes[places] = np.ascontiguousarray(a).reshape(-1).view(np.uint8).reshape(places.shape)
    MACHINE.memory.flags[places] |= INIT


def _allocated(count: int, dtype: Any, on: int, name: str = "made", room: int = 0) -> np.ndarray:
    """A flat array, of which nothing is written; `room` bytes before it are nobody's."""
    dtype = np.dtype(dtype)
    at = MACHINE.allocate(count * dtype.itemsize, name, on, room)
    return np.frombuffer(MACHINE.map, dtype, max(count, 1), at)[:count]


def put(kind: type, a: Any, on: int = 0, writable: bool = True, offset: int = 0, name: str = "") -> Any:
    """An array on a device with the values and the strides of one on the host.

    Only its own elements may be read there, and be written if it is `writable`. It starts `offset` elements
    after a multiple of 256 bytes, and where the host's array is in its owner.
    """
    a = np.asarray(a)
    owner = a
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    start, first = (x.__array_interface__["data"][0] for x in (a, owner))
    low = min(first, start + sum(min(0, s * (n - 1)) for s, n in zip(a.strides, a.shape, strict=True)))
    high = start + sum(max(0, s * (n - 1)) for s, n in zip(a.strides, a.shape, strict=True)) + a.itemsize
    count = max(high - low, a.itemsize) // a.itemsize if a.size else 0
    flat = _allocated(count, a.dtype, on, name, offset * a.itemsize)
    view = np.lib.stride_tricks.as_strided(flat[(start - low) // a.itemsize :], a.shape, a.strides)
    made = kind(view, on)
    if a.size:
        at = flat.__array_interface__["data"][0] - MACHINE.base
        MACHINE.memory.flags[at : at + flat.nbytes] = 0
        write(made, a)
        MACHINE.memory.flags[_places(view)] = READ | INIT | (WRITE if writable else 0)
    return made


def _empty(kind: type, shape: Any, dtype: Any, on: int) -> Any:
    return kind(_allocated(int(np.prod(shape)), dtype, on).reshape(shape), on)


def _cupy(current: Any) -> ModuleType:
    module: Any = ModuleType("cupy")
    module.ndarray = CuPyArray
    module.empty = lambda shape, dtype: _empty(CuPyArray, shape, dtype, current.device)

    class Device:
        def __init__(self, on: int) -> None:
            self.on = on

        def __enter__(self) -> None:
            self.before, current.device = current.device, self.on

        def __exit__(self, *_: Any) -> None:
            current.device = self.before

    module.cuda = SimpleNamespace(
        get_current_stream=lambda on: SimpleNamespace(ptr=current.stream),
        runtime=SimpleNamespace(getDevice=lambda: current.device),
        Device=Device,
    )
    return module


class _Kind:
    """One of PyTorch's dtypes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"torch.{self.name}"


_FLOATS, _INTEGERS = "float64 float32 float16 bfloat16", "int64 int32 int16 int8 uint8 uint64 bool"
TORCH = {n: _Kind(n) for n in f"{_FLOATS} {_INTEGERS}".split()}


def _torch(current: Any) -> ModuleType:
    module: Any = ModuleType("torch")
    module.__dict__.update(TORCH)
    module.strided = "strided"
    module.device = lambda kind, index: SimpleNamespace(index=index)

    def empty(shape: Any, dtype: Any, device: Any) -> Any:
        own = ml_dtypes.bfloat16 if dtype.name == "bfloat16" else dtype.name
        return _empty(Tensor, shape, own, device.index)

    module.empty = empty
    module.cuda = SimpleNamespace(current_stream=lambda on: SimpleNamespace(cuda_stream=current.stream))
    return module


def multiply(a: Any, b: Any, out: Any, more: bool) -> None:
    """In place of CuPy's product: of matrices on one device, each of an order that it need not copy."""
    (m, k), n = a.shape, b.shape[1]
    assert b.shape[0] == k and out.shape == (m, n) and a.dtype == b.dtype == out.dtype
    for x in (a, b, out):
        assert x.flags.c_contiguous or x.flags.f_contiguous
        assert not x.size or MACHINE.block(x.address)[3] == x.queue.device
    assert not any(np.may_share_memory(out.view, x.view) for x in (a, b))
    with np.errstate(all="ignore"):
        made = np.matmul(host(a), host(b))
        made = host(out) + made if more else made
    assert (MACHINE.memory.flags[_places(out.view)] & WRITE).all()
    write(out, made.astype(out.dtype))


# ---- the driver ---------------------------------------------------------------------------------------


class Driver(driver.Driver):
    """The driver, of which only how a kernel is launched is its own."""

    def __init__(self, current: Any) -> None:
        self.api = SimpleNamespace(cuLaunchKernel=self._launched)
        self.current = current
        self.launched: list[str] = []
        self.used: list[int] = []  # streams, in the order of launches
        self.waits: list[tuple[int, int]] = []
        self.cc = (9, 0)

    def enter(self, on: int) -> bool:
        if self.current.device == on:
            return False
        self.before, self.current.device = self.current.device, on
        return True

    def leave(self) -> None:
        self.current.device = self.before

    def device_of(self, address: int) -> int:
        return MACHINE.block(address)[3]

    def capability(self, on: int) -> tuple[int, int]:
        return self.cc

    def load(self, image: bytes, name: str) -> Any:
        text = image.decode()
        assert f".entry {name}(" in text
        return name, text

    def _stream(self, stream: int) -> int:
        return stream

    def _launched(self, function: Any, *given: Any) -> tuple[int]:
        blocks, _, _, threads, _, _, shared, stream, pointers, _ = given
        assert given[1:3] == given[4:6] == (1, 1) and not shared
        name, text = function
        program = MACHINE.program(MUTANTS.get(name, text))
        count = len(program.module.parameters)
        places = np.frombuffer((ctypes.c_uint64 * count).from_address(pointers), np.uint64)
        parameters = [ctypes.string_at(int(p), 8) for p in places]
        for p in parameters:
            address = int.from_bytes(p, sys.byteorder)
            assert not MACHINE.holds(address) or self.device_of(address) == self.current.device, (
                "another device"
            )
        self.launched.append(name)
        self.used.append(stream)
        MACHINE.launch(program, blocks, threads, parameters)
        return (0,)

    def _set(self, address: int, raw: bytes) -> None:
        assert self.device_of(address) == self.current.device, "memory of another device"
        at = address - MACHINE.base
        flags = MACHINE.memory.flags[at : at + len(raw)]
        assert (flags & WRITE).all(), "the host writes what is not there to be written"
        MACHINE.memory.bytes[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
        flags |= INIT

    def fill(self, address: int, pattern: bytes, stream: int) -> None:
        self._set(address, pattern)

    def store(self, address: int, values: np.ndarray, stream: int) -> None:
        assert values.flags.c_contiguous
        self._set(address, values.tobytes())

    def copy(self, address: int, source: int, nbytes: int, stream: int) -> None:
        at = source - MACHINE.base
        assert (MACHINE.memory.flags[at : at + nbytes] & INIT).all(), "what is copied was not written"
        self._set(address, MACHINE.memory.bytes[at : at + nbytes].tobytes())

    def wait(self, stream: int, other: int) -> None:
        self.waits.append((stream, other))

    def zeros(self, count: int) -> int:
        address = MACHINE.base + MACHINE.allocate(8 * count, "faults", self.current.device)
        self._set(address, bytes(8 * count))
        return address

    def clear(self, address: int, count: int) -> None:
        self._set(address, bytes(8 * count))

    def read(self, address: int, count: int) -> np.ndarray:
        at = address - MACHINE.base
        return MACHINE.memory.bytes[at : at + 8 * count].copy().view(np.int64)


def losses(of: type = Loss) -> Iterator[Any]:
    """All losses, the tests' own included."""
    if "_made" in of.__dict__:
        yield of.function
    for more in of.__subclasses__():
        yield from losses(more)


def forget_calls() -> None:
    """Drop what was prepared for calls seen before."""
    for loss in losses():
        loss._bindings.clear()


def prepared_calls() -> list[Any]:
    """What was prepared since the last time that calls were forgotten."""
    memos = [b.prepared for loss in losses() for b in loss._bindings.values()]
    return [made for memo in memos for made in memo.values() if made is not never]


# Kept from test to test: what was read for one is used by the next.
KERNELS: dict[Any, Any] = {}


def install(monkeypatch: Any, product: bool = True) -> Driver:
    """Put all of it in place, until the test ends; a `product` of matrices too, which is CuPy's."""
    MACHINE.clear()
    MACHINE.units, MACHINE.rng = 1, np.random.default_rng(0)
    current = SimpleNamespace(device=0, stream=7)
    found = Driver(current)
    monkeypatch.setitem(sys.modules, "cupy", _cupy(current))
    monkeypatch.setitem(sys.modules, "torch", _torch(current))
    from numba import cuda

    def device_array(shape: Any, dtype: Any, strides: Any) -> Any:
        flat = _allocated(int(np.prod(shape)), dtype, current.device)
        return Plain(np.lib.stride_tricks.as_strided(flat, shape, strides), current.device)

    monkeypatch.setattr(cuda, "device_array", device_array, raising=False)
    numbers = dict(registers=0, local_bytes=0, shared_bytes=0)
    monkeypatch.setattr(target, "_link", lambda ptx, cc: (ptx.encode(), numbers))
    folder = binaries._cache_directory.__wrapped__()

    if folder is not None:
        folder = folder / "ptx"
        folder.mkdir(exist_ok=True)
    kept = binaries.kept

    def kept_once(make: Any, request: Any) -> Any:
        """As `binaries.kept`, while no other process does the same."""
        with open((folder or Path(tempfile.gettempdir())) / "lock", "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, int(binaries._identity(make, request)[:8], 16))
            return kept(make, request)

    monkeypatch.setattr(binaries, "_cache_directory", lambda: folder)
    monkeypatch.setattr(binaries, "kept", kept_once)
    monkeypatch.setattr(binaries, "_kernels", KERNELS)
    if product:
        monkeypatch.setattr(linear, "multiply", multiply)
    monkeypatch.setattr(driver, "driver", lambda: found)
    monkeypatch.setattr(driver, "capability", found.capability)
    monkeypatch.setattr(faults, "_faults", {})
    for name in ("library", "library_of"):
        monkeypatch.setattr(libraries, name, cache(getattr(libraries, name).__wrapped__))
    forget_calls()
    return found
