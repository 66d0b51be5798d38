"""From arrays to kernels: device, dtype, layout, memory.

Everything that is true of arrays whatever the loss: which libraries' arrays are taken, how dtypes combine,
what `out` may be, and how a block kernel is run over arrays of any layout.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np

from .kernels.cpu import threads
from .kernels.spec import BLOCK, CODES

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)

# Elements from which two threads beat one: starting them costs about 6 us.
PARALLEL_FROM = 4 * BLOCK


@cache
def code_of(dtype: np.dtype) -> int | None:
    """How a dtype is stored, or None if it is no float that losses are computed on."""
    return CODES.get(dtype.name) if dtype.isnative else None


class OnDevice:
    """The base of `device.DeviceArray`, for who has not imported that: an array with no element here."""

    __slots__ = ()


def described(array: Any) -> bool:
    """Whether an array is a device's, as `device.begin` describes it."""
    return isinstance(array, OnDevice)


def is_device_array(value: Any) -> bool:
    """Whether a caller's value is an array on a CUDA device."""
    if type(value).__module__ == "cupy" or described(value):
        return True
    if hasattr(value, "is_cuda"):  # PyTorch's interface raises for some of its tensors
        return bool(value.is_cuda)
    return hasattr(value, "__cuda_array_interface__")


def as_array(loss: str, name: str, value: Any) -> np.ndarray:
    """A NumPy array, or one that `device.begin` has described; else a TypeError that says what to do."""
    if type(value) is np.ndarray or described(value):
        return value
    if is_device_array(value):
        raise TypeError(
            f"{loss}: {name} is on a CUDA device ({type(value).__module__}.{type(value).__name__}), and this "
            "loss computes on the CPU only: pass a NumPy array, such as cupy.asnumpy(...)"
        )
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{loss}: {name} is a masked array; pass its data and the mask as sample_weight")
    if isinstance(value, np.ndarray):
        return value.view(np.ndarray)
    if isinstance(value, np.generic | int | float | bool | list | tuple):
        return np.asarray(value)
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    hint = {
        "torch": "; pass tensor.detach().numpy()",
        "jax": "; pass numpy.asarray(...)",
        "jaxlib": "; pass numpy.asarray(...)",
        "pandas": "; pass .to_numpy()",
        "polars": "; pass .to_numpy()",
    }.get(kind.split(".")[0], "")
    raise TypeError(f"{loss}: {name} must be a NumPy or CuPy array, got {kind}{hint}")


def floating(loss: str, name: str, array: Any) -> Any:
    """An array of a floating dtype in native byte order and aligned, or a TypeError."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if code_of(array.dtype) is None:
        raise TypeError(
            f"{loss}: {name} must be float64, float32, float16 or bfloat16, got {array.dtype.name}"
        )
    return array if array.flags.aligned else array.copy()


def common_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The dtype that floats promote to, as in NumPy; the two halves meet in float32."""
    distinct = set(dtypes)
    if len(distinct) == 1:
        return dtypes[0]
    return FLOAT64 if FLOAT64 in distinct else FLOAT32


def arithmetic_dtype(dtype: np.dtype) -> np.dtype:
    """float64 for float64, float32 for all others."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def check_out(
    loss: str, name: str, out: Any, like: np.ndarray, inputs: Sequence[tuple[str, np.ndarray]]
) -> bool:
    """Refuse an `out` that cannot take the gradient by `name`; say whether it is that very argument."""
    on_device = described(like)
    if not (described(out) if on_device else isinstance(out, np.ndarray)):
        where = "an array on the device" if on_device else "a NumPy array"
        raise TypeError(f"{loss}: out for {name} must be {where}, got {type(out).__name__}")
    if out.shape != like.shape:
        raise ValueError(f"{loss}: out for {name} must have shape {like.shape}, got {out.shape}")
    if out.dtype != like.dtype.newbyteorder("="):
        raise TypeError(f"{loss}: out for {name} must be {like.dtype.name}, got {out.dtype.name}")
    if not out.flags.writeable:
        raise ValueError(f"{loss}: out for {name} is read-only")
    if not out.flags.aligned:
        raise ValueError(f"{loss}: out for {name} is not aligned to its dtype")
    if overlaps_itself(out):
        raise ValueError(f"{loss}: out for {name} has elements that share memory")
    same = False
    for argument, array in inputs:
        if argument == name and is_same_memory(out, array):
            same = True
        elif share_memory(out, array):
            raise ValueError(
                f"{loss}: out for {name} overlaps {argument}; it may be {name} itself, or memory of its own"
            )
    return same


def overlaps_itself(array: np.ndarray) -> bool:
    """Whether two elements lie at one address (or may: a layout too tangled to tell)."""
    if array.flags.c_contiguous or array.flags.f_contiguous:
        return False
    axes = sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1)
    end = array.itemsize
    for stride, n in axes:
        if stride < end:
            return True
        end = stride * (n - 1) + end
    return False


def is_same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or (
        a.shape == b.shape
        and a.strides == b.strides
        and a.dtype == b.dtype
        and address_of(a) == address_of(b)
    )


def share_memory(a: np.ndarray, b: np.ndarray) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except (np.exceptions.TooHardError, OverflowError):
        return True


def address_of(array: Any) -> int:
    return array.address if described(array) else array.__array_interface__["data"][0]


# ---- drivers ---------------------------------------------------------------------------------------


@cache
def direct(parallel: bool) -> Any:
    from .kernels.cpu import drive  # on the first call, so that importing the library stays quick

    return drive.compile_direct(parallel)


@cache
def staged(dtype: np.dtype, parallel: bool) -> Any:
    from .kernels.cpu import drive

    return drive.compile_staged(dtype, parallel)


def run_direct(function: int, arrays: tuple[np.ndarray, ...], numbers: tuple[float, ...]) -> Any:
    """Run a block kernel over flat, contiguous arrays of the arithmetic dtype."""
    if arrays[0].size < PARALLEL_FROM:
        return direct(False)(function, arrays, numbers)
    return threads.run(lambda: direct(False), lambda: direct(True), (function, arrays, numbers))


def run(
    kernel: Callable[[bool], int],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    in_place: Sequence[bool],
    numbers: tuple[float, ...],
    arithmetic: np.dtype,
) -> tuple[float, int]:
    """Run a block kernel over arrays of one shape and any layout.

    Parameters
    ----------
    kernel : callable
        ``kernel(in_place)`` gives the address of the kernel that overwrites its operands, or of the one that
        writes every output apart.
    inputs, outputs : sequences of arrays
        In the kernel's order, all of one shape; an input may be a broadcast view.
    in_place : sequence of bool
        Per output, whether it is the memory of one of the inputs.
    numbers : tuple of float
        The gradient's scale, then the options.

    Returns
    -------
    total, invalid : float, int
        The sum of the terms and the number of elements out of their domain.
    """
    arrays = _aligned_axes([*inputs, *outputs])
    if all(a.dtype == arithmetic and a.flags.c_contiguous for a in arrays):
        kept = arrays[: len(inputs)] + [
            a for a, same in zip(arrays[len(inputs) :], in_place, strict=True) if not same
        ]
        flat = tuple(_writeable(a.reshape(-1)) for a in kept)
        return run_direct(kernel(any(in_place)), flat, _padded(numbers))
    shape, strides = _collapse(arrays)
    arguments = (
        kernel(False),
        np.array([address_of(a) for a in arrays], np.int64),
        np.array([code_of(a.dtype) for a in arrays], np.int64),
        np.array(shape, np.int64),
        np.array(strides, np.int64),
        len(inputs),
        np.array(numbers, np.float64),
        4 * numba.config.NUMBA_NUM_THREADS,
    )
    if arrays[0].size < PARALLEL_FROM:
        return staged(arithmetic, False)(*arguments)
    return threads.run(lambda: staged(arithmetic, False), lambda: staged(arithmetic, True), arguments)


def _padded(numbers: tuple[float, ...]) -> tuple[float, ...]:
    """To a multiple of four: the driver is compiled for the length of this tuple."""
    return numbers + (0.0,) * (-len(numbers) % 4)


def _writeable(array: np.ndarray) -> np.ndarray:
    """The same memory under a type that the driver is compiled for; kernels never write an input."""
    return array if array.flags.writeable else np.asarray(_Memory(array))


class _Memory:
    """An array's memory, said to be writeable."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # keeps it alive
        self.__array_interface__ = {**array.__array_interface__, "data": (address_of(array), False)}


def axes_in_order(arrays: Sequence[Any]) -> tuple[int, ...]:
    """The order of the arrays' axes in which memory is walked in order, where there is one."""
    ndim = arrays[-1].ndim
    if ndim < 2 or all(a.flags.c_contiguous for a in arrays):
        return tuple(range(ndim))
    weight = [sum(abs(a.strides[k]) for a in arrays) for k in range(ndim)]
    return tuple(sorted(range(ndim), key=lambda k: (-weight[k], k)))


def _aligned_axes(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The arrays with their axes permuted alike, so that memory is walked in order where it can be."""
    axes = axes_in_order(arrays)
    return arrays if axes == tuple(range(len(axes))) else [a.transpose(axes) for a in arrays]


def _collapse(arrays: Sequence[np.ndarray]) -> tuple[list[int], list[list[int]]]:
    """The common shape and each array's byte strides, with axes merged wherever all arrays allow it."""
    shape: list[int] = []
    strides: list[list[int]] = [[] for _ in arrays]
    for axis, extent in enumerate(arrays[0].shape):
        if extent == 1:
            continue
        steps = [a.strides[axis] for a in arrays]
        if shape and all(s[-1] == step * extent for s, step in zip(strides, steps, strict=True)):
            shape[-1] *= extent
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            shape.append(extent)
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    if not shape:
        return [1], [[a.itemsize] for a in arrays]
    return shape, strides
