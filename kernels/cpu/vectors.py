"""Losses of vectors: each row of two or three arrays gives one value through a few sums over the row.

One driver for all losses and dtypes. A tile of rows is read from memory once, and stays in cache for three
visits: sums over its rows, the rows' values, and the gradients of all vectors; see `vector_tiles`. Arrays
that are contiguous and of the arithmetic dtype are used where they lie, all others a tile at a time through
scratch; so is a gradient that overwrites its own vector. Tiles depend on the shape alone and their sums are
added in order: the same bits for any number of threads.

The driver takes one tuple of arrays, None for those that are absent: the three vectors, their gradients, the
curvature, the row arrays, sample weights, upstream gradients, terms, and the gradients of the row arrays.

A `recipe` is an array of int64 (see `MEASURE` and on), which depends on no extent: addresses of blocks and of
all else that is called, and the arrays' codes. `numbers` are float64: a divisor, the gradient's factor, the
norm's p and eps, and the loss's options.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.extending import intrinsic

from ..errors import at_users_line
from ..spec import (
    CODES,
    FLOAT32,
    FLOAT64,
    LARGEST,
    POWER,
    Distance,
    VectorFunctions,
    VectorRequest,
    Vectors,
)
from . import vector_definitions as definitions
from . import vector_distances as distances
from . import vector_tiles as tiles
from .arrange import ADDRESS as LAID_AT
from .arrange import AXES, LAYOUT_BYTES, SHAPE, STRIDES, call_lay, lay_address
from .launch import CURVATURE, INCOMPLETE, OK, TERMS, UNFIT, Launch, New
from .native import (
    HELPER,
    NO_MEMORY,
    allocate,
    at_address,
    caller,
    compile_entry,
    compile_function,
    data_of,
    held,
    item,
    rank_of,
    release,
    shape_of,
    stack,
    store,
)
from .parallel import TASK, run_fork, run_task
from .strided import INTEGERS, gatherer, integer_gatherer, scatterer, transfer

TILE = 8192  # elements of an array's tile, which stays in the second-level cache
PARALLEL_FROM = 16384  # coordinates from which two threads beat one
MOST_ROW_ARRAYS = 4
MOST_OPTIONS = 28

# Of a recipe.
(
    MEASURE,  # addresses of blocks; PULL is 0 where no vector's gradient is asked for
    CONCLUDE,
    PULL,
    FIELDS,  # numbers that the state of a row has
    DISTANCES,  # how many are measured
    ROW_COUNT,  # row arrays
    ROW_CURVATURE,  # whether the curvature is by a row array
    ITEM,  # bytes of an element of the arithmetic
    DIVIDE,
    SHARES,  # into which the tiles are cut for threads; the result does not depend on it
    LAY,  # addresses of `arrange.lay` and of `strided`'s functions, 0 where none is needed
    GATHER,
    SCATTER,
    GATHER_INTEGERS,
    ADD_WEIGHTS,  # the address of `weights_sum`, where it divides
    FIRST_CODE,  # an element code for each array, -1 for an absent one
) = range(16)
BY_NUMBER, BY_ROWS, BY_WEIGHTS = range(3)
DIVISOR, FACTOR = range(2)  # of `numbers`; then what blocks take after their scale
INTEGER = 8  # the code of an integer array is above that of `strided.INTEGERS` by this
INT64 = INTEGER + INTEGERS["q"]

# The arrays' slots: vectors, their gradients, the curvature, row arrays; then, from the end of the row
# arrays, weights, upstream gradients, terms and the gradients of the row arrays.
GRADIENTS, CURVED, ROWS = 3, 6, 7
WEIGHT, UPSTREAM, VALUES, ROW_GRADIENTS = range(4)

# How a tile of an array is had: none, where it lies, gathered, scattered, or made in scratch and copied.
ABSENT, DIRECT, GATHERED, SCATTERED, COPIED = range(5)
# Of a slot: an array's mode, address, elements a row, bytes of one; the function that moves it, and its code.
MODE, PLACE, WIDTH, BYTES, FUNCTION, CODE, SLOT = range(7)

# A task's context: int64.
RECIPE, NUMBERS, COUNT, SIZE, HEIGHT, TILES, WORKERS, SUMS, TABLE, LAYOUTS = range(10)
SCRATCH, SHARE = 10, 11  # of the first worker, and bytes that each has

# Calls of the recipe's blocks by address.
run_measure = run_conclude = run_pull = caller(types.float64, 2)


@intrinsic
def copy_memory(typingctx, into, source, size):
    """Copy bytes between addresses."""

    def codegen(context, builder, sig, args):
        void = ir.IntType(8).as_pointer()
        into, source = (builder.inttoptr(a, void) for a in args[:2])
        cgutils.raw_memcpy(builder, into, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@njit(**HELPER)
def rounded(size):
    """Bytes in whole cache lines."""
    return (size + 63) // 64 * 64


@njit(**HELPER)
def move(c, k, start, row, count):
    """Gather `count` elements of the k-th array to a row, or scatter them from there."""
    at, t = c[LAYOUTS] + k * LAYOUT_BYTES, c[TABLE] + k * 8 * SLOT
    slot, axes = at_address(t, 0), at_address(at, 0)[AXES]
    shape, strides = at + 8 * SHAPE, at + 8 * STRIDES
    transfer(slot[FUNCTION], (slot[CODE], slot[PLACE], shape, strides, axes, start, row, count))


def share_of_tiles(context, worker):
    """The task: one worker's tiles, through scratch memory of its own."""
    c = at_address(context, 0)
    r, table = at_address(c[RECIPE], 0), at_address(c[TABLE], 0)
    height, slots = c[HEIGHT], ROWS + 3 + 2 * r[ROW_COUNT]
    state = rounded(r[FIELDS] * height * r[ITEM])
    scratch = c[SCRATCH] + worker * c[SHARE]
    record = stack(8 * 24)
    tile = at_address(record, 0)
    tile[tiles.SIZE], tile[tiles.STATE], tile[tiles.PITCH] = c[SIZE], scratch, height * r[ITEM]
    tile[tiles.DISTANCES] = r[DISTANCES]
    for t in range(worker * c[TILES] // c[WORKERS], (worker + 1) * c[TILES] // c[WORKERS]):
        first = t * height
        count = tiles.least(height, c[COUNT] - first)
        tile[tiles.ROWS] = count
        free = scratch + state
        for k in range(slots):
            mode, width = table[k * SLOT + MODE], table[k * SLOT + WIDTH]
            tile[tiles.ARRAYS + k] = 0
            if mode == DIRECT:
                tile[tiles.ARRAYS + k] = table[k * SLOT + PLACE] + first * width * table[k * SLOT + BYTES]
            elif mode != ABSENT:
                tile[tiles.ARRAYS + k] = free
                if mode == GATHERED:
                    move(c, k, first * width, free, count * width)
                free += rounded(height * width * table[k * SLOT + BYTES])
        run_measure(r[MEASURE], (record, c[NUMBERS]))
        at_address(c[SUMS], 0.0)[t] = run_conclude(r[CONCLUDE], (record, c[NUMBERS]))
        if r[PULL]:
            run_pull(r[PULL], (record, c[NUMBERS]))
        for k in range(slots):
            mode, width = table[k * SLOT + MODE], table[k * SLOT + WIDTH]
            if mode == SCATTERED:
                move(c, k, first * width, tile[tiles.ARRAYS + k], count * width)
            elif mode == COPIED:
                each = width * table[k * SLOT + BYTES]
                copy_memory(table[k * SLOT + PLACE] + first * each, tile[tiles.ARRAYS + k], count * each)
    return 0


def weights_sum(context, into):
    """Store the sum of the sample weights, in float64 and in order."""
    c = at_address(context, 0)
    r = at_address(c[RECIPE], 0)
    k, table, single = ROWS + r[ROW_COUNT] + WEIGHT, at_address(c[TABLE], 0), r[ITEM] == 4
    row = stack(8 * 256)
    total, start = 0.0, 0
    while start < c[COUNT]:
        n = tiles.least(256, c[COUNT] - start)
        at = table[k * SLOT + PLACE] + start * table[k * SLOT + BYTES]
        if table[k * SLOT + MODE] == GATHERED:
            move(c, k, start, row, n)
            at = row
        for i in range(n):
            if single:
                total += at_address(at, np.float32(0))[i]
            else:
                total += at_address(at, 0.0)[i]
        start += n
    store(into, total)
    return 0


def rows_of_vectors(recipe, numbers, arrays, task, fork):
    """The divided sum of the rows' values, and `OK`, `UNFIT` or, below `INCOMPLETE`, what the recipe misses.

    `task` is the address of `share_of_tiles`, `fork` that of `parallel.fork`, or 0 to stay on this thread.
    """
    r = at_address(data_of(recipe), 0)
    like, row_count = item(arrays, 0), r[ROW_COUNT]
    rank, weights = rank_of(like), ROWS + row_count + WEIGHT
    if rank < 1:
        return 0.0, UNFIT
    shape = at_address(shape_of(like), 0)
    order, count, size = stack(8 * 64), 1, shape[rank - 1]
    for axis in range(rank):
        at_address(order, 0)[axis] = axis
        count *= shape[axis] if axis < rank - 1 else 1
    if size < 1:
        return 0.0, UNFIT
    context, table, layouts = stack(8 * 12), stack(8 * 6 * 18), stack(8 * 18 * 131)
    c, t = at_address(context, 0), at_address(table, 0)
    own = FLOAT32 if r[ITEM] == 4 else FLOAT64
    missing = 0
    for k in range(ROWS + 3 + 2 * row_count):
        code = r[FIRST_CODE + k]
        t[k * SLOT + MODE] = ABSENT
        if code < 0:
            continue
        at = layouts + k * LAYOUT_BYTES
        by_row = k >= ROWS or (k == CURVED and r[ROW_CURVATURE] != 0)
        array = item(arrays, k)
        if call_lay(r[LAY], (array, like, order, rank - 1 if by_row else -1, k == weights, at)) < 0:
            return 0.0, UNFIT
        layout = at_address(at, 0)
        width, bytes_ = 1 if by_row else size, 8 if code >= INTEGER else r[ITEM]
        t[k * SLOT + PLACE], t[k * SLOT + WIDTH], t[k * SLOT + BYTES] = layout[LAID_AT], width, bytes_
        reads = k < GRADIENTS or ROWS <= k <= weights + UPSTREAM
        lies = count * width <= 1 or (layout[AXES] == 1 and layout[STRIDES] == bytes_)
        if lies and (code == own or code == INT64):  # noqa: SIM109
            mode = DIRECT
            if not reads and k < CURVED and t[(k - GRADIENTS) * SLOT + PLACE] == layout[LAID_AT]:
                mode = COPIED
        else:
            mode = GATHERED if reads else SCATTERED
            field = (GATHER_INTEGERS if code >= INTEGER else GATHER) if reads else SCATTER
            if r[field] == 0:
                missing |= 1 << (field - GATHER)
            t[k * SLOT + FUNCTION], t[k * SLOT + CODE] = r[field], code % INTEGER
        t[k * SLOT + MODE] = mode
    if missing:
        return 0.0, INCOMPLETE - missing
    given = at_address(data_of(numbers), 0.0)
    c[RECIPE], c[COUNT], c[SIZE], c[TABLE], c[LAYOUTS] = data_of(recipe), count, size, table, layouts
    by = given[DIVISOR]
    if r[DIVIDE] == BY_ROWS:
        by = float(count)
    elif r[DIVIDE] == BY_WEIGHTS:
        run_task(r[ADD_WEIGHTS], (context, context + 8 * SUMS))
        by = at_address(context + 8 * SUMS, 0.0)[0]
    filled = stack(8 * 32)
    at_address(filled, 0.0)[tiles.SCALE] = given[FACTOR] / by
    for k in range(2, at_address(shape_of(numbers), 0)[0]):
        at_address(filled, 0.0)[k - 1] = given[k]
    if count == 0:
        return 0.0 / by, OK
    height = 1 if size > TILE else tiles.least(count, TILE // size)
    cut = (count + height - 1) // height
    workers = tiles.least(cut, r[SHARES]) if fork else 1
    share = rounded(r[FIELDS] * height * r[ITEM])
    for k in range(ROWS + 3 + 2 * row_count):
        if t[k * SLOT + MODE] > DIRECT:
            share += rounded(height * t[k * SLOT + WIDTH] * t[k * SLOT + BYTES])
    sums = allocate(8 * cut + 64 + workers * share)
    if not sums:
        return 0.0, NO_MEMORY
    c[SCRATCH], c[SHARE] = rounded(sums + 8 * cut), share
    c[NUMBERS], c[HEIGHT], c[TILES], c[WORKERS], c[SUMS] = filled, height, cut, workers, sums
    if workers > 1:
        run_fork(fork, (task, context, workers))
    else:
        run_task(task, (context, 0))
    total = 0.0
    for k in range(cut):
        total += at_address(sums, 0.0)[k]
    release(sums)
    return total / by, OK


ENTRY = types.Tuple((types.float64, types.int64))(held, held, held, types.int64, types.int64)


@cache
def task_address() -> int:
    """Return the address of `share_of_tiles`."""
    return compile_function(share_of_tiles, {}, "vectors", "vectors", TASK)


@cache
def weights_address() -> int:
    """Return the address of `weights_sum`."""
    return compile_function(weights_sum, {}, "vectors", "vectors", TASK)


@cache
def entry() -> Any:
    """Return `rows_of_vectors`, compiled."""
    return compile_entry(rows_of_vectors, {}, "vectors", "vectors", ENTRY)


# ---- launching ----------------------------------------------------------------------------------------


def element_code(array: np.ndarray | None) -> int:
    """Return an array's element code in a recipe; -1 for None."""
    if array is None:
        return -1
    if array.dtype.kind in "iu":
        return INTEGER + INTEGERS[array.dtype.char.replace("l", "q").replace("L", "Q")]
    return CODES[array.dtype.name]


def settled(distance: Distance, arithmetic: np.dtype) -> Distance:
    """Return a distance with the largest difference for a norm of so large a p: to the last bit the same."""
    if distance.kind == POWER and distance.p > (2.0**30 if arithmetic.itemsize == 4 else 2.0**59):
        return distance._replace(kind=LARGEST)
    return distance


def count_distances(f: VectorFunctions, swap: bool) -> int:
    """Return how many distances a row has."""
    return 1 if f.arity == 2 else 3 if swap else 2


@cache
def select_blocks(
    f: VectorFunctions, request: VectorRequest, kind: int, swap: bool, dtype: np.dtype
) -> tuple[int, int, int]:
    """Return the addresses of the blocks that serve a request; `kind` is that of the distance, if any."""
    count = count_distances(f, swap)
    try:
        conclude = definitions.conclusion(f, request, swap, dtype).address
        if f.terms is None:
            measure = distances.measure(kind, dtype)
            pull = distances.pull(kind, count, request.wrt, dtype) if request.wrt else None
        else:
            measure = definitions.measure(f, dtype)
            pull = definitions.pull(f, request, dtype) if request.wrt else None
        return measure.address, conclude, 0 if pull is None else pull.address
    except NumbaError as error:
        functions = tuple(g for g in (f.terms, f.finish) if g is not None)
        raise at_users_line(f.name, functions, error, "finish") from error


def new_terms(p: Vectors) -> np.ndarray | None:
    """Return a new array for the terms, if they are not reduced."""
    return np.empty(p.vectors[0].shape[:-1], p.dtype) if p.weighting.reduction == "none" else None


def pack(p: Vectors, outputs: dict[str, np.ndarray], made: tuple[str, ...]) -> Launch:
    """Pack a problem for the driver."""
    f, w, dtype = p.functions, p.weighting, p.arithmetic
    rows = len(f.row_arrays)
    assert rows <= MOST_ROW_ARRAYS and len(p.numbers) <= MOST_OPTIONS, f"{f.name}: too many arguments"
    weight = w.sample_weight
    if weight is not None and weight.dtype.kind not in "fV":
        weight = weight.astype(dtype)
    gradients = [outputs.get(n) for n in p.names]
    row_gradients = [outputs.get(n) for n in f.row_arrays]
    request = VectorRequest(
        tuple(k for k, g in enumerate(gradients) if g is not None),
        tuple(k for k, g in enumerate(row_gradients) if g is not None),
        CURVATURE in outputs,
        tuple(a.dtype.kind in "iu" for a in p.row_arrays),
    )
    arrays = (
        *(*p.vectors, None)[:3],
        *(*gradients, None)[:3],
        outputs.get(CURVATURE),
        *p.row_arrays,
        weight,
        w.upstream,
        outputs.get(TERMS),
        *row_gradients,
    )
    distance = Distance(POWER) if p.distance is None else settled(p.distance, dtype)
    divide = BY_NUMBER if w.divisor is not None else BY_ROWS if weight is None else BY_WEIGHTS
    count = count_distances(f, distance.swap)
    recipe = [
        *select_blocks(f, request, distance.kind, distance.swap, dtype),
        count * tiles.FIELDS if f.terms is None else definitions.fields(f),
        count,
        rows,
        request.curvature and bool(request.row_wrt),
        dtype.itemsize,
        divide,
        4 * numba.config.NUMBA_NUM_THREADS,
        lay_address(),
        *(0, 0, 0),
        weights_address() if divide == BY_WEIGHTS else 0,
        *map(element_code, arrays),
    ]
    numbers = [1.0 if w.divisor is None else w.divisor, w.factor, distance.p, distance.eps, *p.numbers]
    slots = {n: GRADIENTS + k for k, n in enumerate(p.names)}
    slots |= {n: ROWS + rows + ROW_GRADIENTS + k for k, n in enumerate(f.row_arrays)}
    slots |= {CURVATURE: CURVED, TERMS: ROWS + rows + VALUES}
    like = {n: k for k, n in enumerate(p.names)} | {n: ROWS + k for k, n in enumerate(f.row_arrays)}
    if request.curvature:
        like[CURVATURE] = request.wrt[0] if request.wrt else ROWS + request.row_wrt[0]
    new = tuple(New(slots[n], 0, rows_of) if n == TERMS else New(slots[n], like[n]) for n in made)
    return Launch(
        entry(), np.array(recipe, np.int64), np.array(numbers, np.float64), arrays, task_address(),
        PARALLEL_FROM, new, complete(dtype),
    )  # fmt: skip


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the rows of vectors."""
    return shape[:-1]


@cache
def complete(dtype: np.dtype) -> Any:
    """Return a function that compiles what a recipe misses."""

    def with_missing(recipe: np.ndarray, status: int) -> None:
        missing = INCOMPLETE - status
        if missing & 1:
            recipe[GATHER] = gatherer(dtype)
        if missing & 2:
            recipe[SCATTER] = scatterer(dtype)
        if missing & 4:
            recipe[GATHER_INTEGERS] = integer_gatherer()

    return with_missing


def refuse(p: Vectors, status: int) -> ValueError:
    """Return the error for a call that the driver refused."""
    return ValueError(f"{p.name}: shapes do not fit together")
