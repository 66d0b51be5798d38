"""What the families of class scores share: how threads are dealt to rows, and what a row counts for.

Scores are (batch, classes, inner), in C order; ``inner == 1`` makes rows contiguous. A row of scores has one
class index, one sample weight, one upstream gradient and one term; rows are counted in the order (batch,
inner). Class indices are int64; weights, of classes and of rows, and upstream gradients are of the arithmetic
type, all else of one storage.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..counts import rows_of
from ..layout import class_axis, class_rows, index_at
from ..spec import (
    BFLOAT16,
    DOUBLE,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT64,
    arithmetic_dtype,
    bad_index,
    code_of,
)
from .arrays import VECTOR_BYTES, DeviceArray, current_queue, flat, store_sum, total
from .elementwise import over
from .reduce import SUMMING_BLOCKS, THREADS, Launch, add, partial_sum
from .reduce import launch as launch_of_elements
from .target import (
    EVERY_LANE,
    FAULT_MOST,
    WARP,
    Binary,
    Storage,
    as_kernel,
    compile,
    cuda,
    device,
    each,
    record,
    storage,
    types,
)

# What kernels over rows are bound to by `lanes`: the access to arrays, and to class weights; the arithmetic
# type; the elements of a vector; the vectors of a row that a thread holds or has in flight, their numbers
# and, as `LANES`, those of their elements; for each vector of class weights the vector that it goes with and
# the lane where it starts there; whether a part of a warp has a row, and not a block; what ends a sum.
array: Any = storage(FLOAT32)
numbers: Any = storage(FLOAT32)
T: Any = np.float32
WIDTH: Any = 4
REPEAT: Any = 2
AHEAD: Any = (0, 1)
LANES: Any = (0, 1, 2, 3, 4, 5, 6, 7)
PIECES: Any = (0, 1)
OFFSETS: Any = (0, 0)
TOGETHER: Any = True
store_partial: Any = None

INTEGERS = types.CPointer(types.int64)

# How threads are dealt to rows: a part of a warp, or a block, to one that they hold in registers; a block to
# a longer one, which it reads twice; several blocks to each of a few long ones; a thread to a vector of rows
# whose classes are strided.
TEAM, BLOCK, STREAM, SPLIT, COLUMNS = "team", "block", "stream", "split", "columns"

# Numbers of a row that a thread holds or has in flight: what leaves room for enough threads. Halves that go
# to a longer row fill two vectors; float64 takes two registers; of single elements, which take an address
# each, half as many.
HELD = 8
MOST_HOLDING = 512  # threads of a block that holds a row
ENOUGH_BLOCKS = 1024  # for any GPU: rows are split for that many
PART = 4 * THREADS * HELD  # elements of a part, at least
ENOUGH_THREADS = ENOUGH_BLOCKS * THREADS // 2


class Plan(NamedTuple):
    """How a kernel over rows is launched."""

    variant: str
    blocks: int
    threads: int
    deal: int  # the logarithm of the threads to a row (TEAM, COLUMNS); the blocks to a row (SPLIT); else 0
    partials: int  # partial sums, of two numbers each


def repeat(code: int, vectors: bool, variant: str) -> int:
    """The vectors of a row that a thread holds, or has in flight."""
    numbers = HELD // 2 if code == FLOAT64 else HELD
    if code in (FLOAT16, BFLOAT16) and variant in (BLOCK, STREAM, SPLIT):
        numbers *= 2
    return max(1, numbers // storage(code, vectors).width // (1 if vectors else 2))


def plan(batch: int, classes: int, inner: int, code: int, vectors: bool, split: bool = True) -> Plan:
    """The variant and the launch, from the shape alone.

    Parameters
    ----------
    batch, classes, inner : int
    code : int
        The storage.
    vectors : bool
        Whether all arrays start at multiples of 16 bytes, and the classes (with inner positions: these) are
        a multiple of the storage's width.
    split : bool
        Whether the kernel can share a row between blocks.
    """
    width, rows = storage(code, vectors).width, batch * inner
    if inner > 1:
        columns = -(-rows // width)
        deal = 0  # a thread reads two classes at a time
        while deal < 3 and columns << deal < ENOUGH_THREADS and 4 << deal <= classes:
            deal += 1
        blocks = max(1, min(SUMMING_BLOCKS, -(-(columns << deal) // THREADS)))
        return Plan(COLUMNS, blocks, THREADS, deal, blocks)
    deal = _log2(-(-classes // (width * repeat(code, vectors, TEAM))))
    if 1 << deal <= WARP:
        blocks = max(1, min(SUMMING_BLOCKS, -(-(rows << deal) // THREADS)))
        return Plan(TEAM, blocks, THREADS, deal, blocks)
    blocks = max(1, min(SUMMING_BLOCKS, rows))
    threads = 1 << _log2(-(-classes // (width * repeat(code, vectors, BLOCK))))
    if threads <= MOST_HOLDING:
        return Plan(BLOCK, blocks, max(WARP, threads), 0, blocks)
    parts = min(ENOUGH_BLOCKS // max(rows, 1), classes // PART)
    if split and rows and parts > 1:
        return Plan(SPLIT, rows * parts, THREADS, parts, rows)
    return Plan(STREAM, blocks, THREADS, 0, blocks)


def _log2(n: int) -> int:
    """The logarithm of the smallest power of two that is not less."""
    return max(n - 1, 0).bit_length()


@cache
def weights(code: int, vectors: bool = True) -> Storage:
    """The access to weights that go with arrays of a storage."""
    return storage(FLOAT64 if code == FLOAT64 else FLOAT32, vectors)


def lanes(code: int, vectors: bool, repeat: int, together: bool) -> dict[str, Any]:
    """Return what a kernel over rows is bound to."""
    array, numbers = storage(code, vectors), weights(code, vectors)
    pieces = [(k, j) for k in range(repeat) for j in range(0, array.width, numbers.width)]
    return dict(
        array=array,
        numbers=numbers,
        T=array.T,
        WIDTH=array.width,
        REPEAT=repeat,
        AHEAD=tuple(range(repeat)),
        LANES=tuple(range(repeat * array.width)),
        PIECES=tuple(k for k, _ in pieces),
        OFFSETS=tuple(j for _, j in pieces),
        TOGETHER=together,
        store_partial=partial_sum if together else store_own_partial,
    )


# ---- what kernels call --------------------------------------------------------------------------------


@device
def optional(array, i, otherwise):
    """An element of an array that may be None."""
    if array is None:
        return otherwise
    else:
        return array[i]


def row_team(deal):
    """Threads to a row, rows of a block, this thread's row among these, and its number in the row's team."""
    if TOGETHER:
        team = 1 << deal
        return team, cuda.blockDim.x >> deal, cuda.threadIdx.x >> deal, cuda.threadIdx.x & (team - 1)
    else:
        return cuda.blockDim.x, 1, 0, cuda.threadIdx.x & (cuda.blockDim.x - 1)


@device
def row_state(labels, weight, row_weights, upstream, i, n, classes, ignore, scale, own_only, reports, faults):
    """What a row counts for.

    Parameters
    ----------
    labels, weight, row_weights, upstream : pointers
        Each may be None; without labels only the row's weight decides.
    i, n : int
        The row, and how many there are.
    ignore : int or None
    scale : float
        Of the gradients.
    own_only : bool
        Whether a row counts nothing if its class has no weight.
    reports : bool
        Whether this thread records what is wrong.

    Returns
    -------
    live : bool
        Whether the row is read. Else its term and gradients are `fill`.
    fill, label
    row_weight, own_weight, factor
        The row's weight, that of its class, and what multiplies its gradients.
    """
    zero, one = type(scale)(0), type(scale)(1)
    live, fill, label = i < n, zero, -1
    row_weight = own_weight = factor = one
    if live:
        row_weight = optional(row_weights, i, one)
        factor = scale * optional(upstream, i, one)
        live = row_weight != zero
        if labels is not None:
            label = labels[i]
            ignored = False
            if ignore is not None:
                ignored = label == ignore
            if ignored:
                live = False
            elif label < 0 or label >= classes:
                live, fill = False, type(scale)(np.nan)
                if reports:
                    record(faults, i, label)
            else:
                own_weight = optional(weight, label, one)
                live = row_weight != zero and not (own_only and own_weight * row_weight == zero)
    return live, fill, label, row_weight, own_weight, factor


@device
def vector_at(ahead, first, step, stop, base, label, width):
    """A vector of a row, `ahead` steps after its first.

    Its index in memory; whether it comes before `stop`; and which of its lanes is the class `label`, or -1.
    Where it does not come before, the first one stands for it, which must: another thread may be writing to
    any other.
    """
    v = first + ahead * step
    there = v < stop
    return base + (v if there else first) * width, there, lane_of(label, v, there, width)


@device
def held_at(ahead, first, step, stop, base, label, width):
    """The same of a row that all threads have read before one writes to it: its first vector may stand."""
    v = first + ahead * step
    there = v < stop
    return base + (v if there else 0) * width, there, lane_of(label, v, there, width)


@device
def lane_of(label, v, there, width):
    lane = label - v * width
    return np.int32(lane if there & (lane >= 0) & (lane < width) else -1)


@device
def weights_at(ahead, offset, first, step, stop, base, width):
    """The index of a lane, `offset`, of such a vector."""
    v = first + ahead * step
    return (base + (v if v < stop else 0) * width + offset,)


def load_weights(weight, first, step, stop, base):
    """The weights that go with a thread's vectors of a row; they start at `base`."""
    at = each(weights_at, (PIECES, OFFSETS), (first, step, stop, base, WIDTH))[0]
    return numbers.load_vectors(weight, at)


def filled(lane, x):
    return (x,)


def fill_vectors(outputs, at, there, fill):
    """Write one number to some vectors of three outputs, each of which may be None."""
    first, second, third = outputs
    xs = each(filled, (LANES,), (fill,))[0]
    array.store_vectors(first, at, there, xs)
    array.store_vectors(second, at, there, xs)
    array.store_vectors(third, at, there, xs)


def fill_row(outputs, base, first, step, stop, fill):
    """Write one number to a thread's part of a row of three outputs: from the vector `first` to `stop`."""
    while first < stop:
        at, there, _ = each(vector_at, (AHEAD,), (first, step, stop, base, -1, WIDTH))
        fill_vectors(outputs, at, there, fill)
        first += REPEAT * step


@device
def team_max(x, team):
    """The largest of the numbers of a team, which is a part of a warp; NaNs do not count."""
    for step in (1, 2, 4, 8, 16):
        if step < team:
            x = max(x, cuda.shfl_xor_sync(EVERY_LANE, x, step))
    return x


@device
def team_sum(x, team):
    """The sum over a team, in each of its threads."""
    for step in (1, 2, 4, 8, 16):
        if step < team:
            x += cuda.shfl_xor_sync(EVERY_LANE, x, step)
    return x


def store_own_partial(partials, hi, lo):
    """As `reduce.partial_sum`, where the block's first thread has all of the sum."""
    if cuda.threadIdx.x == 0:
        partials[2 * cuda.blockIdx.x] = hi
        partials[2 * cuda.blockIdx.x + 1] = lo


# ---- what rows with class indices count for -----------------------------------------------------------


def counts(labels, weight, sample_weight, n, classes, ignore, partials):
    """Partial sums of the rows' class weights times sample weights: what the mean divides by.

    Neither an ignored row counts nor one whose class index is out of range.
    """
    hi = lo = T(0)
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    while i < n:
        label = labels[i]
        if label != ignore and label >= 0 and label < classes:
            hi, lo = add(hi, lo, optional(weight, label, T(1)) * optional(sample_weight, i, T(1)))
        i += cuda.gridDim.x * THREADS
    partial_sum(partials, hi, lo)


def counts_launch(n: int) -> Launch:
    """The blocks for `n` rows; each stores one partial sum, of two numbers."""
    return launch_of_elements(n, np.float32)


def counts_kernel(code: int) -> Any:
    """`counts` for scores of one storage."""
    return as_kernel(counts, dict(T=storage(code).T), "counts", code)


def compile_counts(code: int, cc: tuple[int, int], weighted: bool, sample_weighted: bool) -> Binary:
    """Compile `counts`; `finish` with a factor of 1 makes the divisor of its partial sums."""
    numbers = types.CPointer(storage(code).arithmetic)
    arguments = (
        INTEGERS,
        numbers if weighted else types.none,
        numbers if sample_weighted else types.none,
        *[types.int64] * 3,
        numbers,
    )
    return compile(counts_kernel(code), arguments, cc, THREADS)


# ---- launching ----------------------------------------------------------------------------------------


class Rows:
    """The rows of a problem: their order, and what multiplies and divides their terms.

    Parameters
    ----------
    p : record
    arrays : list
        Those that have the rows' elements, the first operand first.
    shape : tuple of int
        Of the terms.
    axes : layout.Axes or layout.InOrder
    """

    def __init__(self, p: Any, arrays: list[Any], shape: tuple[int, ...], axes: Any) -> None:
        w = p.weighting
        self.queue, self.axes, self.arithmetic, self.dtype = current_queue(), axes, p.arithmetic, p.dtype
        self.reduction, self.shape, self.count = w.reduction, shape, math.prod(shape)
        # Elements of one dtype are computed on as they are, if their arithmetic is the call's.
        storage = arrays[0].dtype
        if (
            any(a.dtype != storage for a in arrays)
            or arithmetic_dtype(storage) != p.arithmetic
            or (self.reduction == "none" and storage != p.dtype)
        ):
            storage = p.arithmetic
        self.storage, self.code = storage, code_of(storage)
        self.sample_weight = self.over_rows(w.sample_weight, p.arithmetic)
        up = w.upstream
        self.scaled_by = up if up is not None and not up.ndim else None
        self.upstream = self.over_rows(up if self.scaled_by is None else None, p.arithmetic)
        self.factor, self.given = w.factor, w.divisor

    def over_rows(self, array: Any, dtype: np.dtype) -> DeviceArray | None:
        """Return an optional array over rows, flat, in the order in which they are visited."""
        if isinstance(array, DeviceArray):
            array = np.broadcast_to(array, self.shape).transpose(self.axes.rows)
            return flat(array, array.shape, dtype, self.queue).reshape(-1)
        return None if array is None else flat(array, (self.count,), dtype, self.queue)

    def as_kernel_input(self, array: Any) -> Any:
        """Return an array, or None, as kernels read it: C-contiguous in the order of axes, of the storage."""
        if array is None:
            return None
        array = array.transpose(self.axes.order)
        return flat(array, array.shape, self.storage, self.queue)

    def output_buffer(self, array: Any) -> Any:
        """Return the array that a kernel writes for an output, or None: the output itself where it can be."""
        if array is None:
            return None
        array = array.transpose(self.axes.order)
        if array.dtype == self.storage and array.flags.c_contiguous:
            return array
        return self.queue.empty(array.shape, self.storage)

    def copy_back(self, array: Any, written: Any) -> None:
        """Copy a kernel's array to the output that it is for."""
        if array is not None:
            array = array.transpose(self.axes.order)
            if array.address != written.address:
                array.assign(written)

    def terms(self) -> DeviceArray | None:
        """Return an array for the terms, where they are asked for."""
        if self.reduction != "none":
            return None
        return self.queue.empty(self.shape, self.dtype, axes=self.axes.rows)

    def divisors(self, counted: Callable[[], DeviceArray] | None = None) -> tuple[float, DeviceArray | None]:
        """Return the divisor: a number, and a 0-d array where the data makes it.

        That is given by `counted`, or is the number of rows, each of its sample weight.
        """
        if self.given is not None:
            return self.given, None
        if counted is not None:
            return 1.0, counted()
        if self.sample_weight is None:
            return float(self.count), None
        return 1.0, total(self.sample_weight, 1.0, self.arithmetic)

    def finish(self, partials: DeviceArray | None, divisor: float, by: DeviceArray | None) -> DeviceArray:
        """Return the value, from the terms' partial sums (None: there is no row)."""
        value = self.queue.empty((), self.dtype)
        if partials is None:
            self.queue.fill(value, math.nan if self.given is None else 0.0)
        else:
            store_sum(self.queue, partials, 1.0 / divisor, by, value)
        return value

    def gradients_by(self, by: DeviceArray | None) -> DeviceArray | None:
        """Return the array that gradients are divided by, beside a number."""
        return over(by, self.scaled_by, self.arithmetic)


def shape_free(plan: Any) -> Any:
    """Return the plan without its row count, so that one kernel serves every batch size."""
    return plan._replace(blocks=0, partials=0, deal=min(plan.deal, 1))


def whole_vectors(classes: int, inner: int, dtype: np.dtype) -> bool:
    """Return whether every row, or row of inner positions, starts where a vector may if the first does."""
    return (inner if inner > 1 else classes) * dtype.itemsize % VECTOR_BYTES == 0


def count_rows(rows: Rows, labels: Any, weight: Any, classes: int, ignore: int) -> DeviceArray:
    """Return the sum of the weights of the rows that are not ignored."""
    grid = counts_launch(rows.count)
    partials = rows.queue.empty((2 * grid.blocks,), rows.arithmetic)
    rows.queue.launch(
        grid,
        compile_counts,
        (labels, weight, rows.sample_weight, rows.count, classes, ignore, partials),
        code=code_of(rows.arithmetic),
        weighted=weight is not None,
        sample_weighted=rows.sample_weight is not None,
    )
    result = rows.queue.empty((), rows.arithmetic)
    store_sum(rows.queue, partials, 1.0, None, result)
    return result


def counted(p: Any) -> Any:
    """Return what a mean of rows divides by, in float64: a number, or a 0-d array where the data makes it."""
    found, queue = rows_of(p), current_queue()
    count = math.prod(found.shape)
    weights, own = p.weighting.sample_weight, found.class_weight
    if not count or (weights is None and found.labels is None):
        return float(count)
    if weights is not None:
        weights = flat(weights, found.shape, DOUBLE, queue).reshape(-1)
        if found.labels is None:
            return total(weights, 1.0, DOUBLE)
    grid = counts_launch(count)
    partials, result = queue.empty((2 * grid.blocks,), DOUBLE), queue.empty((), DOUBLE)
    labels = flat(found.labels, found.shape, INT64, queue).reshape(-1)
    # Without weights of classes any label is one.
    classes = found.classes if own is not None else 1 << 62
    own = None if own is None else flat(own, (classes,), DOUBLE, queue)
    queue.launch(
        grid,
        compile_counts,
        (labels, own, weights, count, classes, p.ignore_index, partials),
        code=FLOAT64,
        weighted=own is not None,
        sample_weighted=weights is not None,
    )
    store_sum(queue, partials, 1.0, None, result)
    return result


def index_fault(name: str, shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[Any, Any]:
    """Return a kind of call, and the error for a class index: of rows of scores whose axes are so visited."""
    axis = class_axis(shape)
    rows = tuple(k - (k > axis) for k in order if k != axis)

    def error(position: int, label: int) -> IndexError:
        return bad_index(
            name, index_at(position, class_rows(shape), rows), label, shape[axis], most=FAULT_MOST
        )

    return (name, shape, order), error
