"""Class scores: the driver of all losses of rows of scores, and the launch of one call.

Scores lie as (batch, classes, inner), once the axes are in the order of memory. Three layouts:

- rows (inner is 1): one row at a time.
- columns (the class axis is strided): no transposing copy is made.
- turned (inner is 1, few classes): some hundred rows are transposed in cache and done as columns.

A block (`score_blocks`) does one tile of rows, which stays in cache. Arrays that are contiguous in the order
of axes and of the arithmetic dtype are read and written where they lie; all others are gathered and scattered
a tile at a time. Tiles depend on the shape alone and their sums are added in order: the same bits for any
number of threads.

The driver and its task are compiled once for all losses and dtypes. Which of the blocks a call needs, and
whether it gathers, turns on extents and strides, that only the driver sees: an address in the recipe may be
0, and then the driver's status says what is missing before anything is written. `launch.run` compiles that,
and calls again.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit, types
from numba.core.errors import NumbaError

from ..bind import bind
from ..compiler import Rolled
from ..errors import at_users_line
from ..freeze import fingerprint
from ..layout import class_axis, class_rows
from ..math import select
from ..spec import CODES as FLOAT_CODES
from ..spec import EXACT, FLOAT32, FLOAT64, ScoreFunctions, ScoreRequest, Scores, bad_index
from . import launch as launches
from .arrange import (
    ADDRESS,
    AXES,
    CODE,
    LAYOUT_BYTES,
    SHAPE,
    STRIDES,
    call_lay,
    call_order_axes,
    lay_address,
    order_axes_address,
)
from .blocks import ENTRY
from .disk import kept
from .launch import CURVATURE as CURVED
from .launch import INCOMPLETE, OK, TERMS, UNFIT, Launch, New
from .native import (
    DESCRIPTION,
    HELPER,
    NO_MEMORY,
    addresses,
    allocate,
    at_address,
    caller,
    compile_drive,
    compile_entry,
    compile_function,
    data_of,
    describe,
    flags_of,
    item,
    larger,
    quotient,
    rank_of,
    release,
    run_drive,
    shape_of,
    smaller,
    stack,
    store,
    store_all,
    strides_of,
    tuple_at,
)
from .parallel import TASK, run_fork, run_task
from .score_blocks import (
    CAP,
    CAPPED,
    CLASS_WEIGHT,
    CLASSES,
    CURVATURE,
    FEW,
    GRAD,
    IGNORE,
    INPUT,
    KEEP,
    NUMBERS,
    PAD,
    PITCH,
    ROW_WEIGHT,
    ROWS,
    SCALE,
    SCRATCH,
    SPREAD,
    SQUARE,
    TARGET,
    TARGET_GRAD,
    UPSTREAM,
    VALUES,
    VECTORS,
    WEIGHT_SUM,
    Form,
    compile_block,
)
from .strided import CLASS_NUMBERS, INTEGERS, gatherer, integer_gatherer, scatterer, transfer
from .transpose import TRANSPOSE, transposer

ARRAYS, OF_SCORES = 9, 5  # of a call: `INPUT` to `VALUES`; of them the first have the input's shape

TILE = 32768  # bytes of a tile: it stays in cache
WIDE_TILE = 65536  # bytes of one of columns, of which memory is then read in longer pieces
NARROW = 64  # rows of a tile of columns, at least: enough for whole vectors
SHORT = 128  # classes up to which rows are turned
EVEN = 8  # the tiles that threads share are a multiple of this many: then each thread has as much to do
CHUNK = 512  # weights of rows that are gathered together
PARALLEL_FROM = 8192  # scores from which two threads beat one
IN_ROWS, IN_COLUMNS, TURNED = range(3)

# Of a recipe. Addresses of blocks and functions; those that no call has needed yet are 0. `HAVE` has the bits
# of those that are there, and `INCOMPLETE` less the bits of others that are needed is a status.
ROW_BLOCK, COLUMN_BLOCK, FEW_BLOCK, GATHER, SCATTER, GATHER_INTEGERS = range(6)
FORMS = Form.ROWS, Form.COLUMNS, Form.FEW_COLUMNS  # of the blocks, in this order
TURN, CARRY, WEIGH, BRING, TALLY, ARRANGE, ORDER, LAY = range(6, 14)
BLOCKS, TURN_BIT = 1 << ROW_BLOCK | 1 << COLUMN_BLOCK | 1 << FEW_BLOCK, 1 << TURN
MOVES = 1 << GATHER | 1 << SCATTER
OF_LABELS = 1 << GATHER_INTEGERS | 1 << TALLY | 1 << BRING
ARRANGEMENT = 1 << ARRANGE | 1 << ORDER | 1 << LAY
# What is there; the bits of what any call of the recipe needs; whether arrays have dtypes of which they may
# be taken as they lie; whether the target holds probabilities; whether class weights are needed, ones where
# none are given; whether there are row factors, ones likewise; whether scores are capped; what divides; the
# ignored label; bytes and code of the arithmetic dtype; workers; the arrays' codes, `ABSENT` where there is
# none.
HAVE, NEEDS, PLAIN, PROBABILITIES, WEIGHTS, FACTORS, CAPS = range(14, 21)
DIVIDE, IGNORED, ITEM, OWN_CODE, WORKERS, CODES = range(21, 27)
ABSENT = -1
WRONG_LABEL = 0  # a status
INT64 = INTEGERS["q"]
BY_ONE, BY_NUMBER, BY_COUNT = range(3)  # 1; a number; what the rows count for
# Of a launch's numbers: the divisor, the gradient's factor, label smoothing; then as in a block's from `CAP`
# on.
DIVISOR, FACTOR, SMOOTHING, MOST = range(4)

# Of a task's context, in int64: addresses of the recipe, the arrays' layouts and objects, the block's
# numbers; classes; the bits of what the call needs; memory to be released; addresses of the class weights and
# of the labels (0 where they are gathered); how many workers there are; batch, inner positions; the layout's
# kind; the block's address; rows of a tile in scratch memory, and as it is, tiles along the inner positions,
# tiles in all; the address of the tiles' sums; that of the first worker's scratch memory, and the bytes that
# each has.
RECIPE, LAYOUTS, OBJECTS, NUMBERS_, CLASSES_, NEEDED, MADE_WEIGHTS, CLASS_WEIGHTS, LABELS, SHARES = range(10)
BATCH, INNER, KIND, BLOCK, PITCH_, HEIGHT, ACROSS, TILES, SUMS, SCRATCH_AT, SCRATCH_BYTES = range(10, 21)

run_block = caller(types.float64, 1)
run_transpose = caller(types.int64, len(TRANSPOSE.args))
CARRYING = types.int64(*[types.int64] * 8)
run_carry = caller(types.int64, 8)
WEIGHING = types.int64(types.int64, types.int64)
run_weigh = caller(types.int64, 2)
BRINGING = types.int64(*[types.int64] * 7)
run_bring = caller(types.int64, 7)
OF_CONTEXT = types.int64(types.int64)
run_tally = run_arrange = caller(types.int64, 1)


@njit(**HELPER)
def read_number(address, i, size):
    """A float of 4 or 8 bytes, in float64."""
    if size == 4:
        return np.float64(at_address(address, np.float32(0))[i])
    return at_address(address, 0.0)[i]


@njit(**HELPER)
def fill_ones(address, count, size):
    """Store ones in floats of 4 or 8 bytes."""
    if size == 4:
        for i in range(count):
            at_address(address, np.float32(0))[i] = np.float32(1)
    else:
        for i in range(count):
            at_address(address, 0.0)[i] = 1.0


@njit(**HELPER)
def lies_straight(array, code, size):
    """Whether a laid-out array is contiguous and of one dtype."""
    a = at_address(array, 0)
    return (a[CODE] == code) & (a[AXES] == 1) & ((a[STRIDES] == size) | (a[SHAPE] == 1))


@njit(**HELPER)
def rows_at(function, array, code, size, first, count, room):
    """Where elements of an array over rows are: in its memory, or in `room`, where they are gathered."""
    if lies_straight(array, code, size):
        return at_address(array, 0)[ADDRESS] + first * size
    a = at_address(array, 0)
    transfer(
        function, (a[CODE], a[ADDRESS], array + 8 * SHAPE, array + 8 * STRIDES, a[AXES], first, room, count)
    )
    return room


@njit(**HELPER)
def labels_at(context, first, count, room):
    """Where labels are as int64: in the target's memory, or in `room`, where they are gathered."""
    c = at_address(context, 0)
    if c[LABELS]:
        return c[LABELS] + 8 * first
    r = at_address(c[RECIPE], 0)
    return rows_at(r[GATHER_INTEGERS], c[LAYOUTS] + LAYOUT_BYTES * TARGET, INT64, 8, first, count, room)


@njit(**HELPER)
def tally_of(labels, count, ignore, classes):
    """How many labels are not to be ignored; and how many of these are no classes."""
    counted, wrong = 0, 0
    for i in range(count):
        counts = labels[i] != ignore
        counted += counts
        wrong += counts & (np.uint64(labels[i]) >= np.uint64(classes))
    return counted, wrong


def tally(context):
    """How many rows count, by labels that are gathered; -1 where a label is no class."""
    c, room, counted = at_address(context, 0), stack(8 * 512), 0
    rows, ignore = c[BATCH] * c[INNER], at_address(c[RECIPE], 0)[IGNORED]
    for start in range(0, rows, CHUNK):
        n = smaller(CHUNK, rows - start)
        labels = at_address(labels_at(context, start, n, room), 0)
        more, wrong = tally_of(labels, n, ignore, c[CLASSES_])
        if wrong:
            return -1
        counted += more
    return counted


def carry(context, k, back, start, rows, tile, pitch, flat):
    """Copy the k-th array's part of a tile to columns or rows in scratch memory, or back.

    `flat` is memory as large as the tile.
    """
    c, array = at_address(context, 0), at_address(context, 0)[LAYOUTS] + LAYOUT_BYTES * k
    r, a = at_address(c[RECIPE], 0), at_address(array, 0)
    classes, size = c[CLASSES_], r[ITEM]
    shape, strides, code, address, axes = array + 8 * SHAPE, array + 8 * STRIDES, a[CODE], a[ADDRESS], a[AXES]
    move = r[SCATTER] if back else r[GATHER]
    if c[KIND] == IN_COLUMNS:
        for j in range(classes):
            column, first = tile + j * pitch * size, start + j * c[INNER]
            transfer(move, (code, address, shape, strides, axes, first, column, rows))
        return 0
    there = tile if c[KIND] == IN_ROWS else flat
    if c[KIND] == TURNED and back:
        run_transpose(r[TURN], (tile, pitch * size, there, classes * size, classes, rows))
    transfer(move, (code, address, shape, strides, axes, start, there, rows * classes))
    if c[KIND] == TURNED and not back:
        run_transpose(r[TURN], (there, classes * size, tile, pitch * size, rows, classes))
    return 0


def weigh(context, counted):
    """Settle the class weights, their sum, and what the rows count for, which goes where the scale will be.

    `counted` is the number of rows that count. Gives a status.
    """
    c = at_address(context, 0)
    r, of_block = at_address(c[RECIPE], 0), at_address(c[NUMBERS_], 0.0)
    classes, size, own, array = c[CLASSES_], r[ITEM], r[OWN_CODE], at_address(c[OBJECTS], 0)[CLASS_WEIGHT]
    code, weights, total = r[CODES + CLASS_WEIGHT], 0, float(classes)
    if code != ABSENT:
        weights = data_of(array)
        if code != own or (at_address(strides_of(array), 0)[0] != size and classes != 1):
            if r[GATHER] == 0:
                return INCOMPLETE - (1 << GATHER)
            weights = allocate(classes * size)
            if not weights:
                return NO_MEMORY
            c[MADE_WEIGHTS] = weights
            move = code, data_of(array), shape_of(array), strides_of(array), 1, 0, weights, classes
            transfer(r[GATHER], move)
        total = 0.0
        for k in range(classes):
            total += read_number(weights, k, size)
    elif r[WEIGHTS]:
        weights = allocate(classes * size)
        if not weights:
            return NO_MEMORY
        c[MADE_WEIGHTS] = weights
        fill_ones(weights, classes, size)
    c[CLASS_WEIGHTS], of_block[WEIGHT_SUM] = weights, total
    by_class, by_row = code != ABSENT and not r[PROBABILITIES], r[CODES + ROW_WEIGHT] != ABSENT
    if not by_class and not by_row:
        return OK
    divisor, room, labels_room = 0.0, stack(8 * 512), stack(8 * 512)
    row_weight, rows = c[LAYOUTS] + LAYOUT_BYTES * ROW_WEIGHT, c[BATCH] * c[INNER]
    for start in range(0, rows, CHUNK):
        n, w, y = smaller(CHUNK, rows - start), 0, 0
        if by_row:
            w = rows_at(r[GATHER], row_weight, own, size, start, n, room)
        if not r[PROBABILITIES]:
            y = labels_at(context, start, n, labels_room)
        for i in range(n):
            counts = 1.0
            if not r[PROBABILITIES]:
                label = at_address(y, 0)[i]
                if label == r[IGNORED]:
                    continue
                if by_class:
                    counts = read_number(weights, label, size)
            if by_row:
                counts = counts * read_number(w, i, size)
            divisor += counts
    of_block[SCALE] = divisor
    return OK


def bring(context, record, back, first, rows, room, line_bytes):
    """Settle a tile's part of the arrays over rows, gathered in lines of `room`; or put back the values.

    In place of the labels' address there is that of memory for them.
    """
    c, a = at_address(context, 0), at_address(record, 0)
    r = at_address(c[RECIPE], 0)
    size, own = r[ITEM], r[OWN_CODE]
    terms = c[LAYOUTS] + LAYOUT_BYTES * VALUES
    t, wanted = at_address(terms, 0), r[CODES + VALUES] != ABSENT
    in_place = wanted and lies_straight(terms, own, size)
    if back:
        if wanted and not in_place:
            shape, strides = terms + 8 * SHAPE, terms + 8 * STRIDES
            transfer(r[SCATTER], (t[CODE], t[ADDRESS], shape, strides, t[AXES], first, a[VALUES], rows))
        return 0
    if not r[PROBABILITIES]:
        a[TARGET] = labels_at(context, first, rows, a[TARGET])
    a[VALUES] = t[ADDRESS] + first * size if in_place else room
    if r[FACTORS]:
        for k in range(ROW_WEIGHT, VALUES):
            a[k] = room + (1 + k - ROW_WEIGHT) * line_bytes
            if r[CODES + k] == ABSENT:
                fill_ones(a[k], rows, size)
            else:
                a[k] = rows_at(r[GATHER], c[LAYOUTS] + LAYOUT_BYTES * k, own, size, first, rows, a[k])
    return 0


def arrange(context):
    """Put the axes in the order of memory, and settle how all arrays lie in it; gives a status."""
    c = at_address(context, 0)
    r, objects = at_address(c[RECIPE], 0), at_address(c[OBJECTS], 0)
    scores, size, own = objects[INPUT], r[ITEM], r[OWN_CODE]
    rank, shape = rank_of(scores), at_address(shape_of(scores), 0)
    axis = 1 if rank > 1 else 0
    of_scores, order = stack(8 * 5), stack(8 * 64)
    count = 0
    for k in range(OF_SCORES):
        if r[CODES + k] != ABSENT and (k != TARGET or r[PROBABILITIES]):
            if rank_of(objects[k]) != rank:
                return UNFIT
            store(of_scores + 8 * count, objects[k])
            count += 1
    call_order_axes(r[ORDER], (of_scores, count, order))
    c[BATCH] = c[INNER] = 1
    extents = BATCH
    for k in range(rank):
        along = at_address(order, 0)[k]
        if along == axis:
            extents = INNER
        else:
            c[extents] *= shape[along]
    for k in range(ARRAYS):
        if r[CODES + k] == ABSENT or k == CLASS_WEIGHT:
            continue
        labels = k == TARGET and not r[PROBABILITIES]
        array, skip = c[LAYOUTS] + LAYOUT_BYTES * k, axis if labels or k > CURVATURE else -1
        if call_lay(r[LAY], (objects[k], scores, order, skip, k == ROW_WEIGHT, array)) < 0:
            return UNFIT
        at_address(array, 0)[CODE] = r[CODES + k]
        if labels:
            c[LABELS] = at_address(array, 0)[ADDRESS]
            if not lies_straight(array, INT64, 8):
                c[LABELS] = 0
                c[NEEDED] |= OF_LABELS
        elif not lies_straight(array, own, size):
            output = GRAD <= k <= CURVATURE or k == VALUES
            c[NEEDED] |= 1 << SCATTER if output else 1 << GATHER
            c[NEEDED] |= 1 << BRING if k == VALUES else 0
            c[NEEDED] |= 1 << CARRY if k < OF_SCORES else 0
    return OK


def worker_tiles(context, worker):
    """The driver's task: compute one worker's tiles. Of worker -1: tell how much memory each takes."""
    c = at_address(context, 0)
    r = at_address(c[RECIPE], 0)
    classes, inner, height, pitch, size = c[CLASSES_], c[INNER], c[HEIGHT], c[PITCH_], r[ITEM]
    turned, in_columns, own = c[KIND] == TURNED, c[KIND] == IN_COLUMNS, r[OWN_CODE]
    brings = c[NEEDED] >> BRING & 1
    tile_bytes = quotient(classes * larger(height, pitch) * size + 127, 64) * 64
    line_bytes = quotient(larger(height, PAD) * size + 127, 64) * 64
    record, memory = stack(8 * 22), stack(8 * 15)
    a, straight, tile_at = at_address(record, 0), at_address(memory, 0), at_address(memory + 8 * 5, 0)
    there = at_address(memory + 8 * 10, 0)
    # Per array: its offset in scratch memory; 0 where it is used in its place, -1 where it goes into the
    # gradient's.
    free = 64
    for k in range(OF_SCORES):
        present = (r[CODES + k] != ABSENT) & ((k != TARGET) | (r[PROBABILITIES] != 0))
        straight[k] = present & lies_straight(c[LAYOUTS] + LAYOUT_BYTES * k, own, size)
        a[k] = tile_at[k] = 0
        a[PITCH + k] = inner
        if (present | (k == GRAD)) & (turned | (straight[k] == 0)):
            tile_at[k] = -1
            if k != INPUT:
                tile_at[k] = free
                a[PITCH + k] = pitch
                free += tile_bytes
    flat = free
    if turned & ((c[NEEDED] & MOVES) != 0):
        free += tile_bytes
    capped = free
    if r[CAPS]:
        free += tile_bytes
    labels = free
    if c[LABELS] == 0:
        free += quotient(line_bytes, size) * 8
    if worker < 0:
        c[SCRATCH_BYTES] = free + (3 + VECTORS) * line_bytes
        return 0
    base = c[SCRATCH_AT] + worker * c[SCRATCH_BYTES]  # the first offset is 64
    room = base + free
    store_all(record + 8 * CAPPED, (base + capped, pitch))
    store_all(record + 8 * SCRATCH, (room + 3 * line_bytes, line_bytes))
    a[CLASSES] = classes
    a[IGNORE] = r[IGNORED]
    a[NUMBERS] = c[NUMBERS_]
    a[CLASS_WEIGHT] = c[CLASS_WEIGHTS]
    for tile in range(quotient(worker * c[TILES], c[SHARES]), quotient((worker + 1) * c[TILES], c[SHARES])):
        if in_columns:
            n = quotient(tile, c[ACROSS])
            s = (tile - n * c[ACROSS]) * height
            rows = smaller(height, inner - s)
            start, first = n * classes * inner + s, n * inner + s
        else:
            first = tile * height
            rows = smaller(height, c[BATCH] - first)
            start = first * classes
        a[ROWS] = rows
        for k in range(OF_SCORES):
            there[k] = at_address(c[LAYOUTS] + LAYOUT_BYTES * k, 0)[ADDRESS] + start * size
            a[k] = base + tile_at[k] if tile_at[k] else there[k]
        if tile_at[INPUT]:
            a[INPUT] = a[GRAD]
            a[PITCH + INPUT] = a[PITCH + GRAD]
        for k in range(2):
            if straight[k] & turned:
                run_transpose(r[TURN], (there[k], classes * size, a[k], pitch * size, rows, classes))
            elif tile_at[k]:
                run_carry(r[CARRY], (context, k, 0, start, rows, a[k], a[PITCH + k], base + flat))
        if not r[PROBABILITIES]:
            a[TARGET] = c[LABELS] + 8 * first if c[LABELS] else base + labels
        a[VALUES] = room
        if brings:
            run_bring(r[BRING], (context, record, 0, first, rows, room, line_bytes))
        elif r[CODES + VALUES] != ABSENT:
            a[VALUES] = at_address(c[LAYOUTS] + LAYOUT_BYTES * VALUES, 0)[ADDRESS] + first * size
        store(c[SUMS] + 8 * tile, run_block(c[BLOCK], (record,)))
        for k in range(GRAD, OF_SCORES):
            if straight[k] & turned:
                run_transpose(r[TURN], (a[k], pitch * size, there[k], classes * size, classes, rows))
            elif tile_at[k] and r[CODES + k] != ABSENT:
                run_carry(r[CARRY], (context, k, 1, start, rows, a[k], a[PITCH + k], base + flat))
        if brings:
            run_bring(r[BRING], (context, record, 1, first, rows, room, line_bytes))
    return 0


def drive(recipe, numbers, arrays, task, fork):
    """Compute all rows.

    Parameters
    ----------
    recipe, numbers : arrays
        As `launch` makes them.
    arrays : tuple
        In the order of `INPUT` to `VALUES`.
    task : address
        Of `worker_tiles`.
    fork : address
        Of `parallel.fork`, or 0 to stay on this thread.

    Returns
    -------
    value, status : float, int
        The divided sum; and `OK`, `UNFIT`, what the recipe misses (at most `INCOMPLETE`), or `WRONG_LABEL`,
        where a label is no class. But for `OK`, nothing was written.
    """
    r, given = at_address(data_of(recipe), 0), at_address(data_of(numbers), 0.0)
    scores = item(arrays, INPUT)
    rank, shape = rank_of(scores), at_address(shape_of(scores), 0)
    if rank == 0:
        return 0.0, UNFIT
    axis = smaller(rank - 1, 1)
    classes, size = shape[axis], r[ITEM]
    objects, layouts, context, filled = stack(8 * 9), stack(8 * 9 * 131), stack(8 * 21), stack(8 * 64)
    c, of_block = at_address(context, 0), at_address(filled, 0.0)
    # From `RECIPE` to `SHARES`.
    store_all(context, (data_of(recipe), layouts, objects, filled, classes, r[NEEDS], 0, 0, 0, 1))
    # Arrays in C order lie as they are, where their dtypes allow it; others are for `arrange`.
    plain, fits = r[PLAIN], True
    for k in range(ARRAYS):
        if r[CODES + k] == ABSENT:
            continue
        array = item(arrays, k)
        store(objects + 8 * k, array)
        own_shape = at_address(shape_of(array), 0)
        if k == CLASS_WEIGHT:
            fits = fits and rank_of(array) == 1 and own_shape[0] == classes
            continue
        plain = plain & flags_of(array)
        labels = (k == TARGET) & (r[PROBABILITIES] == 0)
        lost = labels | (k > CURVATURE)  # the class axis
        store_all(layouts + LAYOUT_BYTES * k, (data_of(array), r[CODES + k], 1))
        at_address(layouts + LAYOUT_BYTES * k, 0)[STRIDES] = size
        if labels:
            c[LABELS] = data_of(array)
        if plain:
            fits = fits & (rank_of(array) == rank - lost)
            for j in range(smaller(rank_of(array), rank - lost)):
                fits = fits & (own_shape[j] == shape[j + (lost & (j >= axis))])
    if not fits:
        return 0.0, UNFIT
    if plain:
        c[BATCH] = c[INNER] = 1
        if axis:
            c[BATCH] = shape[0]
        for k in range(2, rank):
            c[INNER] *= shape[k]
    else:
        status = INCOMPLETE - ARRANGEMENT
        if r[ARRANGE]:
            status = run_arrange(r[ARRANGE], (context,))
        if status != OK:
            return 0.0, status
    batch, inner = c[BATCH], c[INNER]
    rows, in_columns = batch * inner, inner > 1
    if rows == 0:
        by = given[DIVISOR] if r[DIVIDE] == BY_NUMBER else 1.0
        return (np.nan if r[DIVIDE] == BY_COUNT else 0.0 / by), OK
    # Tiles. Columns an odd number of cache lines apart do not fall on the same places in cache.
    across, tile_bytes = batch, TILE
    if in_columns:
        across, tile_bytes = inner, WIDE_TILE
    height = larger(1, smaller(quotient(quotient(tile_bytes, size), larger(classes, 1)), across))
    if rows * classes >= PARALLEL_FROM:
        tiles = quotient(quotient(across + height - 1, height) + EVEN - 1, EVEN) * EVEN
        height = quotient(across + tiles - 1, tiles)
    kind, block, pitch, needs = IN_ROWS, ROW_BLOCK, 1, 0
    if in_columns | (classes <= SHORT):
        height = larger(NARROW, quotient(height + 15, 16) * 16)
        kind, block, pitch = IN_COLUMNS, COLUMN_BLOCK, (quotient(height, 16) | 1) * 16
        if classes <= FEW:
            block = FEW_BLOCK
        if not in_columns:
            kind, needs = TURNED, TURN_BIT
    across = quotient(across + height - 1, height)
    tiles = across
    if in_columns:
        tiles = batch * across
    store_all(context + 8 * KIND, (kind, r[block], pitch, height, across, tiles))
    c[NEEDED] |= needs | 1 << block
    # Whether all labels are classes, and how many rows count.
    status, counted = INCOMPLETE - (c[NEEDED] & ~r[HAVE]), rows
    if status == INCOMPLETE:
        status = OK
        if r[PROBABILITIES] == 0:
            if c[LABELS]:
                counted, wrong = tally_of(at_address(c[LABELS], 0), rows, r[IGNORED], classes)
                counted = select(wrong != 0, -1, counted)
            else:
                counted = run_tally(r[TALLY], (context,))
            if counted < 0:
                status = WRONG_LABEL
        of_block[SCALE], of_block[WEIGHT_SUM] = float(counted), float(classes)
        if status == OK and c[NEEDED] >> WEIGH & 1:
            status = run_weigh(r[WEIGH], (context, counted))
    total = divisor = 1.0
    if status == OK:
        if r[DIVIDE] == BY_COUNT:
            divisor = of_block[SCALE]
        elif r[DIVIDE] == BY_NUMBER:
            divisor = given[DIVISOR]
        of_block[SCALE] = given[FACTOR] / divisor
        of_block[KEEP], of_block[SPREAD] = 1 - given[SMOOTHING], given[SMOOTHING] / classes
        for k in range(at_address(shape_of(numbers), 0)[0] - MOST):  # the cap and all that follows
            of_block[CAP + k] = given[MOST + k]
        if fork:
            c[SHARES] = smaller(tiles, r[WORKERS])
        run_task(task, (context, -1))
        c[SUMS] = allocate(8 * tiles + 64 + c[SHARES] * c[SCRATCH_BYTES])
        status = select(c[SUMS] != 0, OK, NO_MEMORY)
    if status == OK:
        c[SCRATCH_AT] = quotient(c[SUMS] + 8 * tiles, 64) * 64
        if c[SHARES] > 1:
            run_fork(fork, (task, context, c[SHARES]))
        else:
            run_task(task, (context, 0))
        total = 0.0
        for k in range(tiles):
            total += at_address(c[SUMS], 0.0)[k]
        release(c[SUMS])
    release(c[MADE_WEIGHTS])
    return total / divisor, status


@cache
def entry() -> Any:
    """Return `drive`, compiled."""
    return compile_entry(drive, {}, "scores", "scores", ENTRY, pipeline_class=Rolled)


@cache
def task_address() -> int:
    """Return the address of `worker_tiles`."""
    return compile_function(worker_tiles, {}, "scores", "scores", TASK, pipeline_class=Rolled)


# ---- a call ------------------------------------------------------------------------------------------------

# An output in place of the target's gradient: each class's distance from logsumexp, times the slope by the
# cross entropy and all that multiplies the row's gradient.
DISTANCES = "distances"

# What was compiled already, by all that it depends on: later recipes have it from the start.
_compiled: dict[tuple[Any, ...], int] = {}


def request_of(p: Scores, outputs: dict[str, Any]) -> ScoreRequest:
    """Return what a call asks of its block."""
    smoothed = not p.has_probabilities and p.label_smoothing != 0
    w = p.weighting
    return ScoreRequest(
        probabilities=p.has_probabilities,
        weighted=not p.has_probabilities and (smoothed or p.weight is not None),
        smoothed=smoothed,
        row_factors=w.sample_weight is not None or w.upstream is not None,
        grad="input" in outputs,
        target_grad="target" in outputs or DISTANCES in outputs,
        by_weight=DISTANCES in outputs,
        curvature=CURVED in outputs,
        policy=p.curvature if CURVED in outputs else EXACT,
        floored=CURVED in outputs and p.floor is not None,
        softcap=p.softcap is not None,
        lse_square=p.lse_square_scale != 0,
        valued=p.valued,
    )


Makers = tuple[tuple[tuple[Any, ...], Callable[[], int]], ...]


def makers(functions: ScoreFunctions, request: ScoreRequest, dtype: np.dtype) -> Makers:
    """Return, of the recipe's first slots, a name and a function that compiles what goes there."""

    def of(form: Form) -> tuple[Any, ...]:
        return form, functions, request, dtype

    return (
        *((of(form), lambda form=form: block(functions, request, form, dtype)) for form in FORMS),
        (("gather", dtype), lambda: gatherer(dtype)),
        (("scatter", dtype), lambda: scatterer(dtype)),
        (("gather integers",), integer_gatherer),
        (("transpose", dtype), lambda: transposer(dtype)),
        (("carry",), lambda: compile_function(carry, {}, "scores", "scores", CARRYING)),
        (("weigh",), lambda: compile_function(weigh, {}, "scores", "scores", WEIGHING)),
        (("bring",), lambda: compile_function(bring, {}, "scores", "scores", BRINGING)),
        (("tally",), lambda: compile_function(tally, {}, "scores", "scores", OF_CONTEXT)),
        (("arrange",), lambda: compile_function(arrange, {}, "scores", "scores", OF_CONTEXT)),
        (("order",), order_axes_address),
        (("lay",), lay_address),
    )


def block(functions: ScoreFunctions, request: ScoreRequest, form: Form, dtype: np.dtype) -> int:
    """Compile a definition's block; an error in it leads to its line."""
    if form is Form.ROWS:
        request = request._replace(valued=True)
    elif request.probabilities:
        request, form = request._replace(valued=True), Form.ANY_COLUMNS
    try:
        return compile_block(functions, request, form, dtype)
    except NumbaError as error:
        raise at_users_line(functions.name, (functions.value,), error) from error


def completer(makers: Makers) -> Callable[[np.ndarray, int], None]:
    """Return a function that compiles what a recipe misses, and puts it there."""

    def complete(recipe: np.ndarray, status: int) -> None:
        missing = INCOMPLETE - status
        for slot, (name, make) in enumerate(makers):
            if missing >> slot & 1:
                recipe[slot] = _compiled[name] = make()
                recipe[HAVE] |= 1 << slot

    return complete


SLOTS = {
    "input": GRAD,
    "target": TARGET_GRAD,
    DISTANCES: TARGET_GRAD,
    CURVED: CURVATURE,
    TERMS: VALUES,
}


def pack(p: Scores, outputs: dict[str, Any], made: tuple[str, ...]) -> Launch | None:
    """Pack a problem for the driver; None where it is not one run: see `compute`.

    `outputs` are gradients by ``"input"`` and ``"target"``, ``"curvature"``, the rows' ``"terms"``; or, in
    place of the target's gradient, `DISTANCES`: see `weight_gradient`.
    """
    if "weight" in outputs:
        return None
    w, own = p.weighting, np.dtype(p.arithmetic)

    def as_floats(array: Any) -> Any:
        if array is None or (array.dtype.name in FLOAT_CODES and array.dtype.itemsize <= own.itemsize):
            return array
        return array.astype(own)

    arrays: list[Any] = [None] * ARRAYS
    # Labels in the other order of bytes are converted here, as class weights of other dtypes are.
    native = p.has_probabilities or p.target.dtype.isnative
    arrays[INPUT], arrays[TARGET] = p.input, p.target if native else p.target.astype(np.int64)
    arrays[CLASS_WEIGHT], arrays[ROW_WEIGHT] = as_floats(p.weight), as_floats(w.sample_weight)
    arrays[UPSTREAM] = as_floats(w.upstream)
    for name, array in outputs.items():
        arrays[SLOTS[name]] = array
    codes = [ABSENT if a is None else FLOAT_CODES.get(a.dtype.name, ABSENT) for a in arrays]
    if not p.has_probabilities:
        codes[TARGET] = CLASS_NUMBERS[arrays[TARGET].dtype.char.replace("l", "q").replace("L", "Q")]
    request = request_of(p, outputs)
    make = makers(p.functions, request, own)
    divide = BY_COUNT if w.divisor is None else BY_ONE if w.divisor == 1 else BY_NUMBER
    addresses = [_compiled.get(name, 0) for name, _ in make]
    weighs = request.weighted or p.has_probabilities or p.weight is not None or w.sample_weight is not None
    plain = not request.row_factors and all(
        code in (ABSENT, INT64 if k == TARGET and not p.has_probabilities else FLOAT_CODES[own.name])
        for k, code in enumerate(codes)
        if k != CLASS_WEIGHT
    )
    recipe = [*addresses, sum(1 << k for k, address in enumerate(addresses) if address)]
    recipe += [weighs << WEIGH | request.row_factors << BRING, plain, p.has_probabilities]
    recipe += [request.weighted or p.has_probabilities, request.row_factors, request.softcap, divide]
    recipe += [p.ignore_index, own.itemsize, FLOAT_CODES[own.name], 4 * numba.config.NUMBA_NUM_THREADS]
    numbers = [1.0 if w.divisor is None else w.divisor, w.factor, p.label_smoothing]
    numbers += [1.0 if p.softcap is None else p.softcap, p.lse_square_scale, *p.numbers]
    numbers += [p.floor] if request.floored else []
    like = {"target": TARGET, DISTANCES: TARGET}
    new = tuple(New(SLOTS[n], like.get(n, INPUT), class_rows if n == TERMS else None) for n in made)
    return Launch(
        entry(), np.array([*recipe, *codes], np.int64), np.array(numbers), tuple(arrays), task_address(),
        PARALLEL_FROM, new, completer(make),
    )  # fmt: skip


def new_terms(p: Scores) -> np.ndarray | None:
    """Return a new array for the terms, if they are asked for."""
    if p.weighting.reduction != "none":
        return None
    return np.empty(class_rows(p.input.shape), p.dtype)


def refuse(p: Scores, status: int) -> Exception:
    """Return the error for a call that was refused: of the first label, in C order, that is no class."""
    if status == UNFIT:
        return ValueError(
            f"{p.name}: arrays of shapes {p.input.shape} and {p.target.shape} do not fit together"
        )
    classes = p.input.shape[class_axis(p.input.shape)]
    wrong = (p.target != p.ignore_index) & ((p.target < 0) | (p.target >= classes))
    if p.target.dtype.kind == "f":
        fractional = ~np.isfinite(p.target) | (p.target != np.trunc(p.target))
        if fractional.any():
            return ValueError(f"{p.name}: target must hold class numbers, got {p.target[fractional][0]}")
    index = tuple(int(k) for k in np.unravel_index(np.argmax(wrong), p.target.shape))
    return bad_index(p.name, index, int(p.target[index]), classes)


def compute(p: Scores, outputs: dict[str, Any]) -> Any:
    """Write the outputs, the gradient by ``"weight"`` among them, and return the value."""
    this = sys.modules[__name__]
    if "weight" not in outputs:
        return launches.compute(this, p, outputs)
    # Computed before its arguments may be overwritten, and written when they are no longer needed.
    by_weight = weight_gradient(p)
    value = launches.compute(this, p, {n: o for n, o in outputs.items() if n != "weight"})
    outputs["weight"][...] = by_weight
    return value


def weight_gradient(p: Scores) -> np.ndarray:
    """Return the gradient by the class weights, with probabilities: sum over rows of B q'_c (lse - x_c).

    B is the slope by the cross entropy, with all that multiplies a row's gradient; q' the smoothed
    probability.
    """
    distances = np.empty(p.input.shape, p.arithmetic)
    reduced = p.weighting._replace(reduction="sum") if p.weighting.reduction == "none" else p.weighting
    launches.compute(sys.modules[__name__], p._replace(weighting=reduced), {DISTANCES: distances})
    axis = class_axis(p.input.shape)
    q = (1 - p.label_smoothing) * p.target.astype(np.float64) + p.label_smoothing / p.input.shape[axis]
    products = np.multiply(q, distances, where=q != 0, out=np.zeros(q.shape))
    return products.sum(axis=tuple(k for k in range(q.ndim) if k != axis))


# ---- inside compiled code ----------------------------------------------------------------------------------

RECIPE_SIZE, MOST_NUMBERS = CODES + ARRAYS, 64
NUMBERS_AT = 8 * RECIPE_SIZE  # in the memory of a call: after the recipe
OBJECTS_AT = NUMBERS_AT + 8 * MOST_NUMBERS
MEMORY = OBJECTS_AT + 8 * ARRAYS + DESCRIPTION * 6  # bytes

# Bound by `compile_inside`: the addresses that `compile_blocks` and `compile_functions` give; how many
# requests a definition has, and whether those with label smoothing and the squared logsumexp are among them;
# whether the target holds probabilities, and scores are capped.
block_address: Any = None
function_address: Any = None
REQUESTS: Any = 1
SMOOTHS: Any = False
SQUARES: Any = False
OF_PROBABILITIES: Any = False
IS_CAPPED: Any = False


def inside(x, target, g, weight, extents, settings, numbers):
    """The value and the status of contiguous arrays: scores of (batch, classes, inner).

    `settings` are the number of the definition and the label to ignore; `numbers` the divisor (NaN for what
    the rows count for), what multiplies the gradient, label smoothing, and as a block has them from `CAP` on.
    """
    definition, ignored = settings
    memory = stack(MEMORY)
    r, given, objects = at_address(memory, 0), memory + NUMBERS_AT, memory + OBJECTS_AT
    free, item_size = objects + 8 * ARRAYS, x.itemsize
    code = FLOAT32 if item_size == 4 else FLOAT64
    for k in range(RECIPE_SIZE):
        r[k] = ABSENT if k >= CODES else 0
    for k in range(len(numbers)):
        store(given + 8 * k, numbers[k])
    smoothed = SMOOTHS and numbers[SMOOTHING] != 0
    square = SQUARES and numbers[MOST + SQUARE - CAP] != 0
    weighted = not OF_PROBABILITIES and (smoothed or weight.size != 0)
    block = 2 * (definition * REQUESTS + (REQUESTS // 2 if SMOOTHS else 1) * square + smoothed)
    r[ROW_BLOCK], r[COLUMN_BLOCK] = block_address(block), block_address(block + 1)
    r[FEW_BLOCK] = r[COLUMN_BLOCK]
    r[TURN], r[WEIGH] = function_address(2), function_address(3)
    r[HAVE] = BLOCKS | TURN_BIT | 1 << WEIGH
    r[PROBABILITIES], r[CAPS], r[FACTORS] = 1 if OF_PROBABILITIES else 0, 1 if IS_CAPPED else 0, 0
    r[WEIGHTS] = 1 if weighted or OF_PROBABILITIES else 0
    r[NEEDS], r[PLAIN] = r[WEIGHTS] << WEIGH, 1
    r[DIVIDE] = BY_COUNT if numbers[DIVISOR] != numbers[DIVISOR] else BY_NUMBER
    r[IGNORED], r[ITEM], r[OWN_CODE], r[WORKERS] = ignored, item_size, code, 1
    r[CODES + INPUT], r[CODES + TARGET] = code, code if OF_PROBABILITIES else INT64
    store(objects + 8 * INPUT, describe(free, x.ctypes.data, extents, item_size))
    at, data = free + DESCRIPTION, target.ctypes.data
    if OF_PROBABILITIES:
        store(objects + 8 * TARGET, describe(at, data, extents, item_size))
    else:
        store(objects + 8 * TARGET, describe(at, data, (extents[0], extents[2]), 8))
    if g.size:
        r[CODES + GRAD] = code
        store(objects + 8 * GRAD, describe(free + 2 * DESCRIPTION, g.ctypes.data, extents, item_size))
    if weight.size:
        r[CODES + CLASS_WEIGHT] = code
        at = free + 3 * DESCRIPTION
        store(objects + 8 * CLASS_WEIGHT, describe(at, weight.ctypes.data, (weight.size,), item_size))
    recipe = describe(free + 4 * DESCRIPTION, memory, (RECIPE_SIZE,), 8)
    of_numbers = describe(free + 5 * DESCRIPTION, given, (len(numbers),), 8)
    return run_drive(function_address(0), recipe, of_numbers, tuple_at(objects), function_address(1))


class Given(NamedTuple):
    """What a call inside compiled code gives, as its types tell."""

    grad: bool = True
    probabilities: bool = False
    weight: bool = False
    softcap: bool = False
    label_smoothing: bool = False  # these two may be 0 when the call is made
    lse_square_scale: bool = False


def compile_blocks(
    definitions: tuple[ScoreFunctions, ...], requests: tuple[ScoreRequest, ...], dtype: np.dtype
) -> tuple[int, ...]:
    """Return the addresses of each definition's blocks for each request: over rows, and over columns."""
    return tuple(
        block(f, request, form, dtype)
        for f in definitions
        for request in requests
        for form in (Form.ROWS, Form.ANY_COLUMNS)
    )


def compile_functions(dtype: np.dtype) -> tuple[int, ...]:
    """Return the addresses of the driver, its task, and the functions that it calls."""
    return (
        compile_drive(drive),
        task_address(),
        transposer(dtype),
        compile_function(weigh, {}, "scores", "scores", WEIGHING),
    )


@cache
def compile_inside(definitions: tuple[ScoreFunctions, ...], given: Given, dtype: np.dtype) -> Any:
    """Return `inside` for definitions and a dtype, with the blocks that a call may need."""
    name, smooths = definitions[0].name, given.label_smoothing and not given.probabilities
    requests = tuple(
        ScoreRequest(
            probabilities=given.probabilities,
            weighted=not given.probabilities and (smoothed or given.weight),
            smoothed=smoothed,
            grad=given.grad,
            softcap=given.softcap,
            lse_square=square,
        )
        for square in ((False, True) if given.lse_square_scale else (False,))
        for smoothed in ((False, True) if smooths else (False,))
    )
    scope = dict(
        block_address=addresses(compile_blocks, definitions, requests, dtype),
        function_address=addresses(compile_functions, dtype),
        REQUESTS=len(requests),
        SMOOTHS=smooths,
        SQUARES=given.lse_square_scale,
        OF_PROBABILITIES=given.probabilities,
        IS_CAPPED=given.softcap,
    )
    identity = [(fingerprint(f.value), f[2:], requests, dtype.name) for f in definitions]
    return bind(inside, scope, name, identity, kept(nogil=True, error_model="numpy"))
