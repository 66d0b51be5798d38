"""A copy between arrays of any strides and dtypes: to the contiguous array that a kernel takes, and back.

One kernel copies all elements; another leaves out those whose share, a number that goes with each, is zero.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..spec import CODES
from .reduce import MOST_BLOCKS, THREADS, Launch
from .target import Binary, as_kernel, compile, cuda, dot, each, numba_type, storage, types, unravel

# What the kernels are bound to.
T: Any = np.float32
INDEX: Any = np.int64
AHEAD: Any = (0, 256, 512, 768)
source: Any = None
target: Any = None
read: Any = None
write: Any = None

MOST_LABEL = np.uint64(2**63 - 1)
REPEAT = 4  # elements that a thread has in flight
WIDE = 2**31  # elements from which an index has 64 bits

# What an array of any other integer dtype, or of booleans, is copied to where labels are meant.
LABELS = np.dtype(np.int64)


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The same copy over as few axes as can be, those of the target's smallest strides last.

    Parameters
    ----------
    shape : sequence of int
    *strides : sequences of int
        Of the source, the target, and the shares, if any, in elements; 0 where an array is broadcast,
        negative where it runs backwards.

    Returns
    -------
    shape, *strides : of the same length, at least 1
    """
    axes = [a for a in zip(shape, *strides, strict=True) if a[0] != 1]
    axes.sort(key=lambda a: -abs(a[2]))
    joined: list[tuple[int, ...]] = []
    for n, *steps in axes:
        if joined and all(before == n * s for before, s in zip(joined[-1][1:], steps, strict=True)):
            joined[-1] = (joined[-1][0] * n, *steps)
        else:
            joined.append((n, *steps))
    return tuple(zip(*(joined or [(1, *[0] * len(strides))]), strict=True))


def launch(n: int) -> Launch:
    """The blocks for `n` elements."""
    return Launch(max(1, min(MOST_BLOCKS, -(-n // (THREADS * REPEAT)))), THREADS)


def element(ahead, first, n, x, y, shape, source_strides, target_strides):
    i = first + ahead
    if i < n:
        at = unravel(INDEX(i), shape)
        write(y, dot(at, target_strides), read(x, dot(at, source_strides)))
    return ()


def shared_element(ahead, first, n, x, y, shares, shape, source_strides, target_strides, share_strides):
    i = first + ahead
    if i < n:
        at = unravel(INDEX(i), shape)
        share = shares[dot(at, share_strides)]
        there = share != type(share)(0)
        write(y, dot(at, target_strides), read(x, dot(at, source_strides)) if there else T(0))
    return ()


def loop(x, y, n, shape, source_strides, target_strides):
    """Copy the `n` elements of `x` to `y`: arrays of one shape, each of its strides in elements."""
    first = cuda.blockIdx.x * (THREADS * REPEAT) + cuda.threadIdx.x
    while first < n:
        each(element, (AHEAD,), (first, n, x, y, shape, source_strides, target_strides))
        first += cuda.gridDim.x * (THREADS * REPEAT)


def loop_shared(x, y, shares, n, shape, source_strides, target_strides, share_strides):
    """As `loop`, but what has no share is not read: there, `y` is zero."""
    first = cuda.blockIdx.x * (THREADS * REPEAT) + cuda.threadIdx.x
    while first < n:
        common = first, n, x, y, shares, shape, source_strides, target_strides, share_strides
        each(shared_element, (AHEAD,), common)
        first += cuda.gridDim.x * (THREADS * REPEAT)


def read_float(p, i):
    return T(source.load(p, i))


def read_integer(p, i):
    return T(p[i])


def read_large(p, i):
    """What no int64 holds is the largest: no class has that index, nor is it ignored."""
    return T(min(p[i], MOST_LABEL))


def write_float(p, i, x):
    target.store(p, i, x)


def write_integer(p, i, x):
    p[i] = x


def kernel(dtype: np.dtype, to: np.dtype, wide: bool, shared: bool = False) -> Any:
    """`loop`, or `loop_shared`, from one dtype to another: the four floating ones and `LABELS`."""
    large = dtype == np.uint64 and to == LABELS
    scope = dict(
        INDEX=np.int64 if wide else np.int32,
        AHEAD=tuple(THREADS * k for k in range(REPEAT)),
        T=storage(CODES[to.name]).T if to.name in CODES else to.type,
        source=storage(CODES[dtype.name]) if dtype.name in CODES else None,
        target=storage(CODES[to.name]) if to.name in CODES else None,
        read=read_float if dtype.name in CODES else read_large if large else read_integer,
        write=write_float if to.name in CODES else write_integer,
    )
    name, template = f"{dtype.name}_{to.name}", loop_shared if shared else loop
    return as_kernel(template, scope, name, (name, wide))


def compile_copy(
    dtype: np.dtype, to: np.dtype, axes: int, wide: bool, cc: tuple[int, int], shares: int | None = None
) -> Binary:
    """Compile `loop`, or `loop_shared`, for arrays of so many axes (after :func:`collapse`).

    Parameters
    ----------
    dtype, to : dtype
        Of the source: a float, an integer or a bool; of the target: a float or `LABELS`.
    axes : int
    wide : bool
        Whether there are 2**31 elements or more.
    cc : tuple
    shares : int, optional
        The storage of the shares.
    """

    def pointer(d: np.dtype) -> Any:
        return storage(CODES[d.name]).pointer if d.name in CODES else types.CPointer(numba_type(d))

    sizes = types.UniTuple(types.int64, axes)
    made, arrays = kernel(dtype, to, wide, shares is not None), (pointer(dtype), pointer(to))
    if shares is None:
        return compile(made, (*arrays, types.int64, sizes, sizes, sizes), cc, THREADS)
    arguments = (*arrays, storage(shares).pointer, types.int64, sizes, sizes, sizes, sizes)
    return compile(made, arguments, cc, THREADS)
