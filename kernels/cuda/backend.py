"""The backend of CUDA devices: what `kernels.devices` asks of a device.

Kernels are compiled when first asked for, kept on disk, and launched on the caller's stream. Nothing here
waits for the device but `synchronize`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from ..devices import is_device_array
from ..spec import Elements, Linear, Margins, Picks, Scores, Sequences, Vectors, code_of
from . import driver, libraries, record
from .arithmetic import (
    add,
    as_float,
    assign,
    constant,
    divisor,
    empty,
    empty_like,
    excess,
    fold,
    from_host,
    masked_product,
    mean_of_rows,
    number,
    over,
    sum_dtype,
    sum_of_products,
    to_host,
    total,
)
from .arrays import DeviceArray, Queue, current_queue
from .faults import synchronize
from .libraries import Library, Location
from .record import signature

__all__ = [
    "add",
    "as_float",
    "assign",
    "constant",
    "describe",
    "divisor",
    "empty",
    "empty_like",
    "excess",
    "fold",
    "from_host",
    "from_program",
    "give",
    "holds",
    "masked_product",
    "mean_of_rows",
    "number",
    "over",
    "repeat",
    "run",
    "shards",
    "signature",
    "sum_dtype",
    "sum_of_products",
    "synchronize",
    "to_host",
    "total",
]

FAMILIES = {
    Elements: "elementwise",
    Scores: "softmax",
    Picks: "nll",
    Margins: "margins",
    Vectors: "vectors",
    Sequences: "ctc",
    Linear: "linear",
}

# Whether rows of soft margins have a kernel of their own; else they are computed by elements.
HAS_SOFT_MARGINS = True


@cache
def family(kind: Any) -> Any:
    """Return the module that computes a family of problems: imported, with its kernels, when asked for."""
    return import_module(f"{__package__}.{FAMILIES[kind]}")


def shards() -> Any:
    """Return the module that computes scores of which other ranks have other classes."""
    return import_module(f"{__package__}.shards")


def run(problem: Any, outputs: dict[str, Any]) -> Any:
    """Write the outputs that a problem is asked for, and return its value."""
    kind: Any = type(problem)
    value = family(kind).run(problem, outputs)
    recording = current_queue().record
    if recording is not None:
        recording.value = value
    return value


def repeat(
    problem: Any, outputs: dict[str, Any], made: tuple[str, ...], values: tuple[Any, ...], valued: bool
) -> Any:
    """Return the function that computes the same problem of other arrays; None where there is none."""
    return record.repeat(current_queue(), outputs, made, values, valued)


@contextmanager
def describe(loss: str, call: dict[str, Any], host: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Describe a call's arrays, those in `host` if they are on a device; it and its streams are current."""
    kept = {n: call[n] for n in host if not is_device_array(call[n])}
    described, queue = describe_call(loss, {n: v for n, v in call.items() if n not in kept})
    with queue.current():
        yield {**described, **kept}


def holds(value: Any) -> bool:
    """Return whether an argument lies on this device."""
    return isinstance(value, DeviceArray)


def give(result: Any) -> Any:
    """Return results as the caller's library has them."""
    if isinstance(result, DeviceArray):
        return result.owner
    return tuple(map(give, result)) if isinstance(result, tuple) else result


def given_to_caller(array: DeviceArray, dtype: np.dtype) -> Any:
    """Return an array for a function of the caller's: of the call's library, C-contiguous, in a dtype."""
    plain = array.dtype == dtype and array.flags.c_contiguous and array.library is current_queue().library
    return (array if plain else array.astype(dtype)).owner


def from_program(buffer: Any, stream: int) -> libraries.Memory:
    """Return a buffer of a program that calls a loss from within, to be used on a stream."""
    address, dtype = buffer.__cuda_array_interface__["data"][0] or 0, np.dtype(buffer.dtype)
    return libraries.Memory(address, dtype, tuple(buffer.shape), stream, buffer)


def taken_from_caller(loss: str, what: str, value: Any) -> DeviceArray:
    """Return what a function of the caller's gave, as a described array."""
    if not is_device_array(value):
        raise TypeError(f"{loss}: {what} must be an array on the vectors' device, got {type(value).__name__}")
    library, location = locate(loss, what, value)
    return DeviceArray(location, value, library, current_queue())


def locate(loss: str, name: str, value: Any) -> tuple[Library, Location]:
    """Return where a caller's array lies; a TypeError for one that cannot be used."""
    library = libraries.library_of(value.__class__)
    try:
        location = library.locate(value)
    except TypeError as error:
        raise TypeError(f"{loss}: {name} {error}") from None
    except KeyError as error:
        raise TypeError(f"{loss}: {name} has a __cuda_array_interface__ without {error}") from None
    size = location.dtype.itemsize
    if location.dtype.kind not in "fiub" and code_of(location.dtype) is None:
        raise TypeError(
            f"{loss}: {name} must be float64, float32, float16 or bfloat16, got {location.dtype.name}"
        )
    if not location.dtype.isnative:
        raise TypeError(f"{loss}: {name} must be in native byte order, got {location.dtype.str}")
    if location.address % size or any(s % size for s in location.strides or ()):
        raise TypeError(f"{loss}: {name} is not aligned to its dtype {location.dtype.name}")
    return library, location


def describe_call(loss: str, call: dict[str, Any]) -> tuple[dict[str, Any], Queue]:
    """Return a call with its device's arrays as `DeviceArray`; a TypeError unless all are on one device.

    The first one's library makes new arrays, and says on which stream.
    """
    given: list[tuple[str, Any]] = []
    for name, value in call.items():
        if name == "out" and isinstance(value, tuple | list):
            given += [(name, v) for v in value]
        elif name != "wrt":
            given.append((name, value))
    arrays = [(n, v) for n, v in given if is_device_array(v)]
    first = arrays[0][0]
    for name, value in given:
        if isinstance(value, np.ndarray | list | tuple) and np.ndim(value):
            raise TypeError(
                f"{loss}: all arrays must be on one device, but {first} is on a CUDA device and {name} on "
                "the host"
            )
    queue: Queue | None = None
    found: dict[int, DeviceArray] = {}
    for name, value in arrays:
        if isinstance(value, DeviceArray):  # a loss calls another
            queue = queue or Queue(value.queue.device, value.queue.stream, value.library)
            value.queue.record = None  # what that one does would be missing
            found[id(value)] = value
        if id(value) in found:
            continue
        library, location = locate(loss, name, value)
        device = driver.driver().device_of(location.address) if location.device is None else location.device
        if queue is None:
            queue = Queue(device, library.stream(device, location), library)
        elif device != queue.device:
            raise TypeError(
                f"{loss}: all arrays must be on one device, but {first} is on CUDA device {queue.device} and "
                f"{name} on CUDA device {device}"
            )
        elif library.ordered or location.stream is not None:
            stream = library.stream(device, location)
            if stream != queue.stream:
                queue.others.add(stream)
        found[id(value)] = DeviceArray(location, value, library, queue)
    assert queue is not None

    def seen(name: str, value: Any) -> Any:
        if name == "out" and isinstance(value, tuple | list):
            return tuple(found.get(id(v), v) for v in value)
        return found.get(id(value), value)

    return {name: seen(name, value) for name, value in call.items()}, queue
