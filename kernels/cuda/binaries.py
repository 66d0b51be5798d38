"""CUDA kernels on their way to a device: compiled when first asked for, kept on disk, loaded."""

import hashlib
import importlib
import json
import os
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numba
import numpy as np

from .. import bind, room
from ..freeze import fingerprint
from ..spec import CODES
from . import driver

HALVES = "float16", "bfloat16"


class Kernel:
    """A kernel on one device."""

    __slots__ = ("function", "name", "pack", "parameters")

    # How a parameter of one of PTX's types lies in 8 bytes.
    FORMATS: ClassVar[dict[str, str]] = {"f32": "f4x", "f64": "d", "u64": "q", "u32": "I4x", "s32": "i4x"}

    def __init__(self, function: Any, name: str, parameters: Sequence[str]) -> None:
        self.function, self.name, self.parameters = function, name, parameters
        packing = struct.Struct("=" + "".join(self.FORMATS[p] for p in parameters))
        assert len(parameters) <= driver._Arguments.MOST
        self.pack = packing.pack_into

    def cast(self, values: Sequence[Any]) -> list[Any]:
        """The same arguments, those of float32 rounded to it: infinite beyond its range, as casts are."""
        with np.errstate(over="ignore"):
            return [
                float(np.float32(v)) if p == "f32" else v
                for p, v in zip(self.parameters, values, strict=True)
            ]


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
            cc = driver.capability(device)
            if cc < (8, 0) and any(map(_is_half, (request.get("code"), request.get("to")))):
                raise TypeError(
                    "float16 and bfloat16 need a GPU of compute capability 8.0 or above, this one has "
                    f"{cc[0]}.{cc[1]}; pass float32"
                )
            _kernels[key] = tuple(
                Kernel(driver.driver().load(image, name), name, parameters)
                for image, name, parameters in kept(make, {**request, "cc": cc})
            )
    return _kernels[key]


def _is_half(storage: Any) -> bool:
    """Whether a code or a dtype stands for 16 bits, which older devices do not pack by one instruction."""
    return getattr(storage, "name", storage) in (*HALVES, *map(CODES.get, HALVES))


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
    """Return a digest of all that a kernel depends on."""

    def said_of(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(said_of, x))
        return fingerprint(x) if callable(x) and hasattr(x, "__code__") else str(x)

    versions = numba.__version__, importlib.import_module("numba_cuda").__version__
    name = make.__module__, make.__qualname__
    said = bind.sources(), versions, name, [(k, said_of(v)) for k, v in request.items()]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]


def _stored(path: Path) -> list[Compiled] | None:
    """What a file holds; None for one that is not there, or not whole."""
    room.used(path)
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
        room.stored(path, len(images))
    except OSError:
        partial.unlink(missing_ok=True)


@cache
def _cache_directory() -> Path | None:
    """Where Numba keeps its compiled functions, or would."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
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
