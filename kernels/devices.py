"""Which device a call is on, and the backend that serves it. Backends are imported when first asked for.

A backend is a module of these names, whatever the device:

- `describe(loss, call, host)`: a context with the call's arrays as checks and kernels take them;
- `holds`, `give`: whether an array is the device's; results for the caller's library;
- `from_program`, on CUDA devices: a buffer of JAX's as an array of a call;
- `empty`, `empty_like`, `assign`: memory;
- `product`, `masked_product`, `sum_of_products`, `ratio`, `excess`, `total`, `fold`: arithmetic with arrays;
- `run(problem, outputs)`: write the outputs, return the value;
- `repeat(problem, outputs, made, values, valued)`: a function that does so for other arrays of a signature;
- `synchronize`, `free_memory`.
"""

import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

from .spec import is_described

INSTALL = (
    "computing on a CUDA device needs numba-cuda: pip install 'numbaloss[cuda12]' or 'numbaloss[cuda13]', as "
    "your driver's CUDA version is (numba-cuda needs NumPy below 2.5)"
)


@cache
def cpu() -> Any:
    """Return the backend of the CPU."""
    return importlib.import_module(f"{__package__}.cpu.backend")


@cache
def cuda() -> Any:
    """Return the backend of CUDA devices: the first call imports numba-cuda."""
    try:
        importlib.import_module("numba_cuda")
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return importlib.import_module(f"{__package__}.cuda.backend")


def is_device_array(value: Any) -> bool:
    """Return whether a caller's value is an array on a CUDA device."""
    if type(value).__module__ == "cupy" or is_described(value):
        return True
    if hasattr(value, "is_cuda"):  # PyTorch's interface raises for some of its tensors
        return bool(value.is_cuda)
    if not hasattr(value, "__cuda_array_interface__"):
        return False
    # By way of DLPack and CuPy results are of the array's own library; without CuPy they are Numba's.
    return not (hasattr(value, "__dlpack__") and hasattr(value, "__array_namespace__") and _has_cupy())


@cache
def _has_cupy() -> bool:
    return "cupy" in sys.modules or importlib.util.find_spec("cupy") is not None


def of(values: Iterable[Any]) -> Any:
    """Return the backend that serves a call with these arguments."""
    return cuda() if any(map(is_device_array, values)) else cpu()


def signature(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the part of a call on a device that decides how it is computed; None of one that is not kept."""
    return cuda().signature(values)


def synchronize() -> None:
    """Wait for the CUDA devices that losses were computed on, and raise what was wrong with their data.

    On a GPU a class index out of range, or a number out of a loss's domain, gives NaN, and a record of the
    first position; the call itself returns before the kernel has run. This function raises the error that
    the call would have raised on the CPU. With ``NUMBALOSS_CUDA_SYNCHRONOUS=1`` in the environment each call
    does so itself.

    Raises
    ------
    IndexError
        If a class index was out of range.
    ValueError
        If a number was out of its domain.
    """
    if cuda.cache_info().currsize:  # else no loss was computed on one
        cuda().synchronize()


def free_memory() -> int:
    """Give the memory that is kept for large gradients back to the operating system.

    Returns
    -------
    int
        Its size in bytes.
    """
    return cpu().free_memory()
