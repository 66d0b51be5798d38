"""Sums over a block, and over the blocks: in a fixed order, to more digits than the arithmetic type has.

A thread carries its sum as two numbers, ``hi + lo``, that an addition without rounding error keeps
(:func:`add`); a block joins those of its threads (:func:`block_sum`) and stores them as its partial sum; the
kernel `finish`, of one block, joins the partial sums in float64. The order of every step follows from the
shape of the problem alone.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..spec import FLOAT32
from .target import (
    EVERY_LANE,
    Binary,
    Storage,
    as_kernel,
    compile,
    cuda,
    device,
    each,
    shared,
    storage,
    tree_sum,
    types,
)

# What kernels over one-dimensional arrays are bound to by `tiles`: the access to arrays; the arithmetic type;
# the elements of a vector; the vectors that a thread has in flight, how far each is from the first, and the
# numbers of their elements, of which ``k`` is in vector ``k // WIDTH``.
array: Any = storage(FLOAT32)
T: Any = np.float32
WIDTH: Any = 4
REPEAT: Any = 2
AHEAD: Any = (0, 256)
LANES: Any = (0, 1, 2, 3, 4, 5, 6, 7)

THREADS = 256  # a block of a kernel that reads arrays
# Bytes of each array, as numbers to compute with, that a thread has in flight: enough for the bandwidth of
# memory at the occupancy that its registers allow.
IN_FLIGHT = 32
# Blocks of such a kernel: several times what a GPU holds at once, so that none waits for a last one for long.
MOST_BLOCKS = 16384
# The same, where a block ends by adding up its threads' sums, in hundreds of instructions. With 16384 blocks
# an H100, which has 132 multiprocessors, took up to twice as long for bfloat16 and for rows of few classes.
SUMMING_BLOCKS = 16 * 132
FINISH_THREADS = 1024


class Launch(NamedTuple):
    """How a kernel is launched."""

    blocks: int
    threads: int


def launch(n: int, arithmetic: Any) -> Launch:
    """The blocks for `n` elements; each stores one partial sum, of two numbers."""
    tile = THREADS * IN_FLIGHT // np.dtype(arithmetic).itemsize
    return Launch(max(1, min(SUMMING_BLOCKS, -(-n // tile))), THREADS)


@cache
def tiles(array: Storage) -> dict[str, Any]:
    """What a kernel's loop over one-dimensional arrays of a storage is bound to."""
    # Single elements take an address each.
    elements = IN_FLIGHT // np.dtype(array.T).itemsize // (1 if array.width > 1 else 2)
    repeat = elements // array.width
    return dict(
        array=array,
        T=array.T,
        WIDTH=array.width,
        REPEAT=repeat,
        AHEAD=tuple(THREADS * k for k in range(repeat)),
        LANES=tuple(range(repeat * array.width)),
    )


# ---- what kernels call --------------------------------------------------------------------------------


@device
def add(hi, lo, x):
    """The sum ``hi + lo`` with `x` added: what rounding takes from `hi` goes to `lo` (Knuth's two-sum)."""
    total = hi + x
    back = total - hi
    return total, lo + ((hi - (total - back)) + (x - back))


@device
def warp_sum(hi, lo):
    """The sum of a warp's ``hi + lo``, in each of its threads; all 32 must call."""
    for step in (16, 8, 4, 2, 1):
        other_hi = cuda.shfl_xor_sync(EVERY_LANE, hi, step)
        other_lo = cuda.shfl_xor_sync(EVERY_LANE, lo, step)
        hi, lo = add(hi, lo + other_lo, other_hi)
    return hi, lo


@device
def warp_max(x):
    """The largest of a warp's numbers, in each of its threads; NaNs do not count, as in ``max`` there."""
    for step in (16, 8, 4, 2, 1):
        x = max(x, cuda.shfl_xor_sync(EVERY_LANE, x, step))
    return x


@device
def block_max(x):
    """The largest of a block's numbers, in each of its threads; all must call, whole warps of them."""
    tops = shared(32, x)
    warp, lane = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
    x = warp_max(x)
    cuda.syncthreads()  # until all have read what an earlier call left
    if lane == 0:
        tops[warp] = x
    cuda.syncthreads()
    return warp_max(tops[lane if lane < cuda.blockDim.x >> 5 else 0])


@device
def block_sum(hi, lo):
    """The sum of a block's ``hi + lo``, in each of its threads; all must call, whole warps of them."""
    zero = type(hi)(0)
    his, los = shared(32, zero), shared(32, zero)
    warp, lane = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
    hi, lo = warp_sum(hi, lo)
    cuda.syncthreads()  # until all have read what an earlier call left
    if lane == 0:
        his[warp] = hi
        los[warp] = lo
    cuda.syncthreads()
    there = lane < cuda.blockDim.x >> 5
    return warp_sum(his[lane] if there else zero, los[lane] if there else zero)


@device
def whole(hi, lo):
    """``hi + lo`` as one number. Where `hi` has overflowed, or is NaN, `lo` means nothing."""
    return hi + lo if lo - lo == type(lo)(0) else hi


@device
def quotient(factor, divisor):
    """``factor / divisor``; a mean over nothing is NaN."""
    return factor / divisor if divisor != type(divisor)(0) else type(divisor)(np.nan)


def place(ahead, first, vectors):
    """Where a vector in flight is, and whether it is there: else the first stands for it."""
    there = first + ahead < vectors
    return (first + ahead if there else first) * WIDTH, there


def counted(x, lane, there):
    """A lane, or zero of a vector that is not there."""
    return (x if there[lane // WIDTH] else T(0),)


def partial_sum(partials, hi, lo):
    """Store the block's sum: hi and lo."""
    hi, lo = block_sum(hi, lo)
    if cuda.threadIdx.x == 0:
        partials[2 * cuda.blockIdx.x] = hi
        partials[2 * cuda.blockIdx.x + 1] = lo


# ---- kernels ------------------------------------------------------------------------------------------


def sums(x, n, partials):
    """Store each block's sum of its part of `x` in `partials`."""
    hi = lo = T(0)
    vectors = n // WIDTH
    first = cuda.blockIdx.x * (THREADS * REPEAT) + cuda.threadIdx.x
    while first < vectors:
        at, there = each(place, (AHEAD,), (first, vectors))
        xs = array.load_vectors(x, at)
        hi, lo = add(hi, lo, tree_sum(each(counted, (xs, LANES), (there,))[0]))
        first += cuda.gridDim.x * (THREADS * REPEAT)
    rest = vectors * WIDTH + cuda.threadIdx.x
    if cuda.blockIdx.x == 0 and rest < n:
        hi, lo = add(hi, lo, array.load(x, rest))
    partial_sum(partials, hi, lo)


def finish(partials, blocks, factor, divisor, out):
    """``out[0] = (sum of the partial sums) * factor / divisor[0]``, in float64; the divisor may be None."""
    hi = lo = np.float64(0)
    k = cuda.threadIdx.x
    while k < blocks:
        hi, lo = add(hi, lo + np.float64(partials[2 * k + 1]), np.float64(partials[2 * k]))
        k += cuda.blockDim.x
    hi, lo = block_sum(hi, lo)
    if cuda.threadIdx.x == 0:
        scale = factor if divisor is None else quotient(factor, np.float64(divisor[0]))
        array.store(out, 0, T(whole(hi, lo) * scale))


def sums_kernel(code: int, vectors: bool = True) -> Any:
    """`sums` of an array of one storage."""
    return as_kernel(sums, tiles(storage(code, vectors)), "sums", (code, vectors))


def finish_kernel(code: int) -> Any:
    """`finish` into an array of one storage."""
    array = storage(code)
    return as_kernel(finish, dict(array=array, T=array.T), "finish", code)


def compile_sums(code: int, cc: tuple[int, int], vectors: bool = True) -> Binary:
    """Compile `sums`: of weights, say. Its arguments: the array, its size, the partial sums."""
    array = storage(code)
    numbers = types.CPointer(array.arithmetic)
    return compile(sums_kernel(code, vectors), (array.pointer, types.int64, numbers), cc, THREADS)


def compile_finish(code: int, cc: tuple[int, int], divided: bool, widened: bool = False) -> Binary:
    """Compile `finish`, to be launched as one block of `FINISH_THREADS`.

    Its arguments: the partial sums, their number (of blocks), a float64 factor, a pointer to a divisor of the
    arithmetic type (null if not `divided`), and one to the result, of the storage. Where it is `widened`, to
    float64, the sums are of float32.
    """
    array = storage(code)
    numbers = types.CPointer(storage(FLOAT32).arithmetic if widened else array.arithmetic)
    divisor = numbers if divided else types.none
    arguments = (numbers, types.int64, types.float64, divisor, array.pointer)
    return compile(finish_kernel(code), arguments, cc, FINISH_THREADS)
