"""Rules of arrays, whatever the loss: the kinds that are taken, dtypes, `out`, overlap, broadcasting."""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .kernels.devices import is_device_array
from .kernels.layout import is_same_memory, overlaps_itself, share_memory
from .kernels.spec import code_of, is_described


def as_array(loss: str, name: str, value: Any) -> Any:
    """Return a NumPy array, or one that a device describes; else a TypeError that says what to do."""
    if type(value) is np.ndarray or is_described(value):
        return value
    if is_device_array(value):
        raise TypeError(
            f"{loss}: {name} is on a CUDA device ({type(value).__module__}.{type(value).__name__}): "
            "pass a NumPy array, such as cupy.asnumpy(...)"
        )
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{loss}: {name} is a masked array; pass its data and the mask as sample_weight")
    if isinstance(value, np.ndarray):
        return as_plain(value)
    if isinstance(value, np.generic | int | float | bool | list | tuple):
        try:
            return np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{loss}: {name} is no array of numbers: {error}") from None
    if is_foreign(value):
        return taken(loss, name, value)
    kind = kind_of(value)
    hint = {"pandas": "; pass .to_numpy()", "polars": "; pass .to_numpy()"}.get(kind.split(".")[0], "")
    raise TypeError(f"{loss}: {name} must be a NumPy or CuPy array, got {kind}{hint}")


def kind_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


# ---- arrays of other libraries ------------------------------------------------------------------------

ON_CPU, ON_CUDA, ON_CUDA_MANAGED = 1, 2, 13  # of DLPack's devices


def is_foreign(value: Any) -> bool:
    """Return whether a value is an array of another library, which DLPack takes."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return False
    return not (is_described(value) or is_device_array(value))


def taken(loss: str, name: str, value: Any) -> Any:
    """Return another library's array as NumPy's, or CuPy's of a CUDA device, over the same memory."""
    hint = {
        "torch": "; pass tensor.detach(), or call the loss of numbaloss.torch, which has autograd",
        "jax": "; pass numpy.asarray(...), or call the loss of numbaloss.jax within programs",
        "jaxlib": "; pass numpy.asarray(...), or call the loss of numbaloss.jax within programs",
    }.get(kind_of(value).split(".")[0], "")
    try:
        device = int(value.__dlpack_device__()[0])
        if device == ON_CPU:
            return np.from_dlpack(value)
        problem = "lies on a device that is neither the CPU nor one of CUDA"
        if device in (ON_CUDA, ON_CUDA_MANAGED):
            return importlib.import_module("cupy").from_dlpack(value)
    except ImportError:
        problem = "lies on a CUDA device and has no __cuda_array_interface__: CuPy is needed to take it"
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        problem = f"is not given by DLPack: {error}"
    raise TypeError(f"{loss}: {name} ({kind_of(value)}) {problem}{hint}")


def library_of(array: Any) -> Callable[[Any], Any]:
    """Return the function of a foreign array's library that takes others' arrays, over the same memory."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__().from_dlpack
    return sys.modules[type(array).__module__.split(".")[0]].from_dlpack


def as_plain(array: Any) -> Any:
    """Return an array of a subclass of NumPy's, as `np.memmap`, as a plain one over the same memory."""
    return (
        array.view(np.ndarray) if isinstance(array, np.ndarray) and type(array) is not np.ndarray else array
    )


def floating(loss: str, name: str, array: Any) -> Any:
    """Return an array of a floating dtype in native byte order and aligned, or raise a TypeError."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if code_of(array.dtype) is None:
        raise TypeError(
            f"{loss}: {name} must be float64, float32, float16 or bfloat16, got {array.dtype.name}"
        )
    return array if array.flags.aligned else array.copy()


def is_weak(array: Any, given: Any) -> bool:
    """Return whether an argument promotes no float: as in NumPy, a number or an integer array."""
    return array.dtype.kind in "iub" or type(given) is float


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Return whether a shape broadcasts to another."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def check_broadcasts(loss: str, name: str, array: Any, to: tuple[int, ...]) -> None:
    """Refuse an array that does not broadcast to a shape."""
    if not broadcasts(array.shape, to):
        raise ValueError(f"{loss}: {name} of shape {array.shape} does not broadcast to {to}")


def check_out(loss: str, name: str, out: Any, like: Any, inputs: Sequence[tuple[str, Any]]) -> None:
    """Refuse an `out` that cannot take the gradient by `name`: it may be that very argument."""
    on_device = is_described(like)
    if not (is_described(out) if on_device else isinstance(out, np.ndarray)):
        where = "an array on the device" if on_device else "a NumPy array"
        raise TypeError(f"{loss}: out for {name} must be {where}, got {type(out).__name__}")
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"{loss}: out for {name} is a masked array; pass its data")
    if out.shape != like.shape:
        raise ValueError(f"{loss}: out for {name} must have shape {like.shape}, got {out.shape}")
    own = like.dtype.newbyteorder("=")
    if out.dtype != own and (code_of(out.dtype) is None or out.itemsize >= like.itemsize):
        raise TypeError(
            f"{loss}: out for {name} must be {own.name} or a narrower float, got {out.dtype.name}"
        )
    if not out.flags.writeable:
        raise ValueError(f"{loss}: out for {name} is read-only")
    if not out.flags.aligned:
        raise ValueError(f"{loss}: out for {name} is not aligned to its dtype")
    if overlaps_itself(out):
        raise ValueError(f"{loss}: out for {name} has elements that share memory")
    for argument, array in inputs:
        if share_memory(out, array) and not (argument == name and is_same_memory(out, array)):
            raise ValueError(
                f"{loss}: out for {name} overlaps {argument}; it may be {name} itself, or memory of its own"
            )
