"""Sums over some of an array's axes: the gradient of an operand that was broadcast along them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..spec import code_of
from .arrays import DeviceArray
from .libraries import strides_of
from .reduce import MOST_BLOCKS, THREADS, Launch, add, block_sum, whole
from .target import Binary, as_kernel, compile, cuda, dot, storage, types, unravel

# What the kernel is bound to.
T: Any = np.float32
source: Any = None
target: Any = None


def loop(x, y, kept, shape, strides, summed, summed_shape, summed_strides):
    """Store in ``y[k]`` the sum over the summed axes of `x`, at the `k`-th place of the kept ones."""
    k = cuda.blockIdx.x
    while k < kept:
        start = dot(unravel(k, shape), strides)
        hi = lo = T(0)
        j = cuda.threadIdx.x
        while j < summed:
            hi, lo = add(hi, lo, source.load(x, start + dot(unravel(j, summed_shape), summed_strides)))
            j += cuda.blockDim.x
        hi, lo = block_sum(hi, lo)
        if cuda.threadIdx.x == 0:
            target.store(y, k, T(whole(hi, lo)))
        k += cuda.gridDim.x


def launch(kept: int, summed: int) -> Launch:
    """A block, at times of one warp, for each sum."""
    return Launch(max(1, min(MOST_BLOCKS, kept)), 32 if summed <= THREADS else THREADS)


def kernel(code: int, to: int) -> Any:
    """`loop` from an array of one storage to one of another, of the same arithmetic."""
    array = storage(code)
    scope = dict(T=array.T, source=array, target=storage(to))
    return as_kernel(loop, scope, "fold", (code, to))


def compile_fold(code: int, to: int, axes: int, summed_axes: int, cc: tuple[int, int]) -> Binary:
    """Compile `loop`. Its arguments: the array, the result, and for the kept axes and for the summed ones
    their number of elements, their shape and their strides in elements."""
    kept, summed = (types.UniTuple(types.int64, n) for n in (axes, summed_axes))
    arguments = (
        storage(code).pointer, storage(to).pointer, types.int64, kept, kept, types.int64, summed, summed
    )  # fmt: skip
    return compile(kernel(code, to), arguments, cc, THREADS)


# ---- launching ----------------------------------------------------------------------------------------


def fold(full: DeviceArray, result: DeviceArray, axes: Sequence[int] | None = None) -> None:
    """Store an array, summed over all axes but some, which are the result's.

    Without `axes`, it is summed over those along which `result` was broadcast to its shape.
    """
    if not result.size:
        return
    full = full.astype(full.dtype, copy=False)
    queue = full.queue
    if axes is None:
        extra = full.ndim - result.ndim
        axes = [k for k in range(extra, full.ndim) if full.shape[k] == result.shape[k - extra]]
    strides = strides_of(full.shape, 1)
    kept = [(full.shape[k], strides[k]) for k in axes] or [(1, 0)]
    summed = [(full.shape[k], strides[k]) for k in range(full.ndim) if k not in axes] or [(1, 0)]
    count = math.prod(n for n, _ in summed)
    written = result if result.flags.c_contiguous else queue.empty(result.shape, result.dtype)
    queue.launch(
        launch(result.size, count),
        compile_fold,
        (full, written, result.size, *_transposed(kept), count, *_transposed(summed)),
        code=code_of(full.dtype),
        to=code_of(result.dtype),
        axes=len(kept),
        summed_axes=len(summed),
    )
    if written is not result:
        result.assign(written)


def _transposed(pairs: list[tuple[int, int]]) -> list[int]:
    return [a for a, _ in pairs] + [b for _, b in pairs]
