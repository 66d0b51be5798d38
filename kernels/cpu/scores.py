"""Class scores: the driver of all losses of rows of scores, and the launch of one call.

Scores lie as (batch, classes, inner), once the axes are in the order of memory. Three layouts:

- rows (inner is 1): one row at a time.
- columns (the class axis is strided): no transposing copy is made.
- turned (inner is 1, few classes): some hundred rows are transposed in cache and done as columns.

A block (`score_blocks`) does one tile of rows, which stays in cache. Arrays that are contiguous in the order of axes
and of the arithmetic dtype are read and written where they lie; all others are gathered and scattered a tile at a
time. Tiles depend on the shape alone and their sums are added in order: the same bits for any number of threads.

The driver and its task are compiled once for all losses and dtypes. Which of the blocks a call needs, and whether it
gathers, turns on extents and strides, that only the driver sees: an address in the recipe may be 0, and then the
driver's status says what is missing before anything is written. `run` compiles that, and calls again.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import njit, types

from ..spec import CODES as FLOAT_CODES
from ..spec import ScoreRequest, Scores
from . import launch as launches
from .arrange import (
    ADDRESS,
    AXES,
    CODE,
    LAYOUT,
    SHAPE,
    STRIDES,
    call_lay,
    call_order_axes,
    lay_address,
    order_axes_address,
)
from .blocks import ENTRY
from .launch import OK, UNFIT, Launch, New
from .native import (
    HELPER,
    allocate,
    at_address,
    caller,
    compile_entry,
    compile_function,
    data_of,
    item,
    rank_of,
    release,
    shape_of,
    stack,
    store,
    strides_of,
)
from .parallel import TASK, run_fork, run_task
from .score_blocks import (
    CAP,
    CAPPED,
    CAPPED_PITCH,
    CLASS_WEIGHT,
    CLASSES,
    CURVATURE,
    GRAD,
    IGNORE,
    INPUT,
    KEEP,
    NUMBERS,
    OPTIONS,
    PAD,
    PITCH,
    RECORD,
    ROW_WEIGHT,
    ROWS,
    SCALE,
    SCRATCH,
    SPREAD,
    SQUARE,
    STEP,
    TARGET,
    TARGET_GRAD,
    TURN,
    UPSTREAM,
    VALUES,
    VECTORS,
    WEIGHT_SUM,
    compile_block,
    compile_turn,
)
from .strided import INTEGERS, gatherer, integer_gatherer, scatterer, transfer

ARRAYS, OF_SCORES = 9, 5  # of a call: `INPUT` to `VALUES`; of them the first have the input's shape

TILE = 32768  # bytes of a tile: it stays in cache
NARROW = 64  # rows of a tile of columns, at least: enough for whole vectors
SHORT = 64  # classes up to which rows are turned
CHUNK = 512  # labels that are looked at together
IN_ROWS, IN_COLUMNS, TURNED = range(3)

# Of a recipe. Addresses of blocks and functions, of which those that no call has needed yet are 0, in the order of
# the bits of a status: `MISSING` less their sum.
ROW_BLOCK, COLUMN_BLOCK, GATHER, SCATTER, GATHER_INTEGERS, TURN_TO, TURN_FROM = range(7)
MISSING = -16
FUNCTIONS = 7
# Addresses of `arrange`'s functions; whether the target holds probabilities; whether class weights are needed, ones
# where none are given; whether there are row factors, ones likewise; whether scores are capped; what divides;
# the ignored label; bytes and code of the arithmetic dtype; workers; the arrays' codes, `ABSENT` where there is none.
ORDER, LAY, PROBABILITIES, WEIGHTS, FACTORS, CAPS, DIVIDE, IGNORED, ITEM, OWN_CODE, WORKERS, CODES = range(7, 19)
ABSENT = -1
INT64 = INTEGERS["q"]
BY_ONE, BY_NUMBER, BY_COUNT = range(3)  # 1; a number; what the rows count for
# Of a launch's numbers: the divisor, the gradient's factor, label smoothing, the cap, what multiplies the squared
# logsumexp; then the options.
DIVISOR, FACTOR, SMOOTHING, MOST, OF_SQUARE, FIRST_OPTION = range(6)

# Of a task's context, in int64.
RECIPE, LAYOUTS, KIND, CLASSES_, INNER, BATCH, HEIGHT, PITCH_, ACROSS, TILES = range(10)
SHARES, NUMBERS_, CLASS_WEIGHTS, SUMS = range(10, 14)
CONTEXT = 14

run_block = caller(types.float64, 1)
run_turn = caller(types.int64, 5)


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
    transfer(function, (a[CODE], a[ADDRESS], array + 8 * SHAPE, array + 8 * STRIDES, a[AXES], first, room, count))
    return room


@njit(**HELPER)
def carry(move, turn, context, array, straight, start, rows, tile, pitch, flat, back):
    """Copy an array's part of a tile to scratch memory, or back."""
    c, a = at_address(context, 0), at_address(array, 0)
    classes, size = c[CLASSES_], at_address(c[RECIPE], 0)[ITEM]
    shape, strides = array + 8 * SHAPE, array + 8 * STRIDES
    if c[KIND] == IN_COLUMNS:
        for k in range(classes):
            column = tile + k * pitch * size
            first = start + k * c[INNER]
            transfer(move, (a[CODE], a[ADDRESS], shape, strides, a[AXES], first, column, rows))
        return
    there = flat
    if c[KIND] == IN_ROWS:
        there = tile
    elif straight:
        there = a[ADDRESS] + start * size
    if c[KIND] == TURNED and back:
        run_turn(turn, (there, tile, classes, pitch, rows))
    if not straight:
        transfer(move, (a[CODE], a[ADDRESS], shape, strides, a[AXES], start, there, rows * classes))
    if c[KIND] == TURNED and not back:
        run_turn(turn, (there, tile, classes, pitch, rows))


def worker_tiles(context, worker):
    """The driver's task: compute one worker's tiles."""
    c = at_address(context, 0)
    r = at_address(c[RECIPE], 0)
    classes, inner, height, pitch, size = c[CLASSES_], c[INNER], c[HEIGHT], c[PITCH_], r[ITEM]
    turned, in_columns, own = c[KIND] == TURNED, c[KIND] == IN_COLUMNS, r[OWN_CODE]
    tile_bytes = (classes * max(height, pitch) * size + 127) // 64 * 64
    line_bytes = (max(height, PAD) * 8 + 127) // 64 * 64
    lines = VECTORS + 4 if c[KIND] != IN_ROWS else 5
    memory = allocate(7 * 64 + 7 * tile_bytes + lines * line_bytes)
    free = (memory + 63) // 64 * 64
    record = stack(8 * 22)
    a = at_address(record, 0)
    straights, tiles_at = stack(8 * 5), stack(8 * 5)
    straight, tile_at = at_address(straights, 0), at_address(tiles_at, 0)
    for k in range(OF_SCORES):
        there = r[CODES + k] != ABSENT and (k != TARGET or r[PROBABILITIES])
        lies = there and lies_straight(c[LAYOUTS] + 8 * LAYOUT * k, own, size)
        straight[k] = lies
        tile_at[k] = 0  # where it lies
        if (there or k == GRAD) and (turned or not lies):
            if k != INPUT:  # scores go where the gradient goes
                tile_at[k] = free
                free += tile_bytes
            else:
                tile_at[k] = -1
        a[k], a[PITCH + k] = 0, inner
        if tile_at[k] > 0:
            a[PITCH + k] = pitch
    flat = free
    free += tile_bytes
    a[CAPPED], a[CAPPED_PITCH] = free, pitch
    free += tile_bytes
    room = free
    a[SCRATCH], a[STEP] = room + 4 * line_bytes, line_bytes
    a[CLASSES], a[IGNORE], a[NUMBERS], a[CLASS_WEIGHT] = classes, r[IGNORED], c[NUMBERS_], c[CLASS_WEIGHTS]
    for tile in range(worker * c[TILES] // c[SHARES], (worker + 1) * c[TILES] // c[SHARES]):
        if in_columns:
            n, s = tile // c[ACROSS], tile % c[ACROSS] * height
            rows = min(height, inner - s)
            start, first = n * classes * inner + s, n * inner + s
        else:
            first = tile * height
            rows = min(height, c[BATCH] - first)
            start = first * classes
        a[ROWS] = rows
        for k in range(OF_SCORES):
            array = c[LAYOUTS] + 8 * LAYOUT * k
            if tile_at[k] > 0:
                a[k] = tile_at[k]
            elif tile_at[k] == 0 and straight[k]:
                a[k] = at_address(array, 0)[ADDRESS] + start * size
        if tile_at[INPUT]:
            a[INPUT], a[PITCH + INPUT] = a[GRAD], a[PITCH + GRAD]
        for k in range(2):
            if tile_at[k]:
                array = c[LAYOUTS] + 8 * LAYOUT * k
                carry(r[GATHER], r[TURN_TO], context, array, straight[k], start, rows, a[k], a[PITCH + k], flat, False)
        if not r[PROBABILITIES]:
            labels = c[LAYOUTS] + 8 * LAYOUT * TARGET
            a[TARGET] = rows_at(r[GATHER_INTEGERS], labels, INT64, 8, first, rows, room)
        if r[FACTORS]:
            for k in range(ROW_WEIGHT, VALUES):
                line = room + (1 + k - ROW_WEIGHT) * line_bytes
                if r[CODES + k] == ABSENT:
                    fill_ones(line, rows, size)
                    a[k] = line
                else:
                    a[k] = rows_at(r[GATHER], c[LAYOUTS] + 8 * LAYOUT * k, own, size, first, rows, line)
        terms = c[LAYOUTS] + 8 * LAYOUT * VALUES
        in_terms = r[CODES + VALUES] != ABSENT and lies_straight(terms, own, size)
        a[VALUES] = room + 3 * line_bytes
        if in_terms:
            a[VALUES] = at_address(terms, 0)[ADDRESS] + first * size
        block = r[ROW_BLOCK] if c[KIND] == IN_ROWS else r[COLUMN_BLOCK]
        store(c[SUMS] + 8 * tile, run_block(block, (record,)))
        for k in range(GRAD, OF_SCORES):
            if tile_at[k] and r[CODES + k] != ABSENT:
                array = c[LAYOUTS] + 8 * LAYOUT * k
                carry(r[SCATTER], r[TURN_FROM], context, array, straight[k], start, rows, a[k], a[PITCH + k], flat, True)
        if r[CODES + VALUES] != ABSENT and not in_terms:
            t = at_address(terms, 0)
            shape, strides = terms + 8 * SHAPE, terms + 8 * STRIDES
            transfer(r[SCATTER], (t[CODE], t[ADDRESS], shape, strides, t[AXES], first, a[VALUES], rows))
    release(memory)
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
        The divided sum; and `OK`, `UNFIT`, what the recipe misses (at most `MISSING`), or the first row, in the
        order of memory, whose label is none. But for `OK`, nothing was written.
    """
    r, given = at_address(data_of(recipe), 0), at_address(data_of(numbers), 0.0)
    scores = item(arrays, INPUT)
    rank, shape = rank_of(scores), at_address(shape_of(scores), 0)
    if rank == 0:
        return 0.0, UNFIT
    axis = 1 if rank > 1 else 0
    classes, size, own = shape[axis], r[ITEM], r[OWN_CODE]
    # How the arrays lie.
    objects, order, layouts = stack(8 * 5), stack(8 * 64), stack(8 * 9 * 131)
    count = 0
    for k in range(OF_SCORES):
        if r[CODES + k] != ABSENT and (k != TARGET or r[PROBABILITIES]):
            if rank_of(item(arrays, k)) != rank:
                return 0.0, UNFIT
            store(objects + 8 * count, item(arrays, k))
            count += 1
    call_order_axes(r[ORDER], (objects, count, order))
    batch = inner = 1
    before = True
    for k in range(rank):
        along = at_address(order, 0)[k]
        if along == axis:
            before = False
        elif before:
            batch *= shape[along]
        else:
            inner *= shape[along]
    rows = batch * inner
    kind, most = IN_COLUMNS, TILE // size // max(classes, 1)
    if inner == 1:
        kind = IN_ROWS if classes > SHORT else TURNED
    gathers = scatters = integers = False
    for k in range(ARRAYS):
        if r[CODES + k] == ABSENT or k == CLASS_WEIGHT:
            continue
        of_rows = k > CURVATURE or (k == TARGET and not r[PROBABILITIES])
        array, broadcast = layouts + 8 * LAYOUT * k, k == ROW_WEIGHT or k == UPSTREAM
        if call_lay(r[LAY], (item(arrays, k), scores, order, axis if of_rows else -1, broadcast, array)) < 0:
            return 0.0, UNFIT
        at_address(array, 0)[CODE] = r[CODES + k]
        if k == TARGET and of_rows:
            integers = not lies_straight(array, INT64, 8)
        elif not lies_straight(array, own, size):
            output = k == GRAD or k == TARGET_GRAD or k == CURVATURE or k == VALUES
            gathers, scatters = gathers or not output, scatters or output
    weight = item(arrays, CLASS_WEIGHT)
    weight_is_there = r[CODES + CLASS_WEIGHT] != ABSENT
    copies_weight = False
    if weight_is_there:
        if rank_of(weight) != 1 or at_address(shape_of(weight), 0)[0] != classes:
            return 0.0, UNFIT
        stride = at_address(strides_of(weight), 0)[0]
        copies_weight = r[CODES + CLASS_WEIGHT] != own or (stride != size and classes != 1)
        gathers = gathers or copies_weight
    # What the rows count for, and whether all labels are classes.
    if rows == 0:
        by = given[DIVISOR] if r[DIVIDE] == BY_NUMBER else 1.0
        return (np.nan if r[DIVIDE] == BY_COUNT else 0.0 / by), OK
    missing = 0
    if kind == IN_ROWS:
        missing += (r[ROW_BLOCK] == 0) << ROW_BLOCK
    else:
        missing += (r[COLUMN_BLOCK] == 0) << COLUMN_BLOCK
    missing += (gathers and r[GATHER] == 0) << GATHER
    missing += (scatters and r[SCATTER] == 0) << SCATTER
    missing += (integers and r[GATHER_INTEGERS] == 0) << GATHER_INTEGERS
    missing += (kind == TURNED and r[TURN_TO] == 0) << TURN_TO
    missing += (kind == TURNED and r[TURN_FROM] == 0) << TURN_FROM
    if missing:
        return 0.0, MISSING - missing
    made = 0
    weights = 0
    if r[WEIGHTS]:
        if weight_is_there and not copies_weight:
            weights = data_of(weight)
        else:
            made = allocate(classes * size)
            weights = made
            if weight_is_there:
                move = r[CODES + CLASS_WEIGHT], data_of(weight), shape_of(weight), strides_of(weight), 1, 0, made, classes
                transfer(r[GATHER], move)
            else:
                fill_ones(made, classes, size)
    room = stack(8 * 512)
    room_of_weights = stack(8 * 512)
    target, row_weight = layouts + 8 * LAYOUT * TARGET, layouts + 8 * LAYOUT * ROW_WEIGHT
    weighs_rows = r[CODES + ROW_WEIGHT] != ABSENT
    divisor = 0.0
    if not r[PROBABILITIES]:
        ignore, counted, wrong = r[IGNORED], 0, 0
        for start in range(0, rows, CHUNK):
            n = min(CHUNK, rows - start)
            labels = at_address(rows_at(r[GATHER_INTEGERS], target, INT64, 8, start, n, room), 0)
            for i in range(n):
                counts = labels[i] != ignore
                counted += counts
                wrong += counts & (np.uint64(labels[i]) >= np.uint64(classes))
            if wrong:
                for i in range(n):
                    if labels[i] != ignore and (labels[i] < 0 or labels[i] >= classes):
                        if made:
                            release(made)
                        return 0.0, start + i
        divisor = float(counted)
    else:
        divisor = float(rows)
    by_class = weight_is_there and not r[PROBABILITIES]
    if r[DIVIDE] == BY_COUNT and (by_class or weighs_rows):
        divisor = 0.0
        for start in range(0, rows, CHUNK):
            n = min(CHUNK, rows - start)
            w, y = 0, 0
            if weighs_rows:
                w = rows_at(r[GATHER], row_weight, own, size, start, n, room_of_weights)
            if not r[PROBABILITIES]:
                y = rows_at(r[GATHER_INTEGERS], target, INT64, 8, start, n, room)
            for i in range(n):
                counts = 1.0
                if not r[PROBABILITIES]:
                    label = at_address(y, 0)[i]
                    if label == r[IGNORED]:
                        continue
                    if by_class:
                        counts = read_number(weights, label, size)
                if weighs_rows:
                    counts = counts * read_number(w, i, size)
                divisor += counts
    if r[DIVIDE] == BY_ONE:
        divisor = 1.0
    elif r[DIVIDE] == BY_NUMBER:
        divisor = given[DIVISOR]
    filled = stack(8 * 64)
    of_block = at_address(filled, 0.0)
    of_block[SCALE] = given[FACTOR] / divisor
    of_block[KEEP], of_block[SPREAD] = 1 - given[SMOOTHING], given[SMOOTHING] / classes
    of_block[CAP], of_block[SQUARE], of_block[WEIGHT_SUM] = given[MOST], given[OF_SQUARE], float(classes)
    if weight_is_there:
        weight_sum = 0.0
        for k in range(classes):
            weight_sum += read_number(weights, k, size)
        of_block[WEIGHT_SUM] = weight_sum
    for k in range(at_address(shape_of(numbers), 0)[0] - FIRST_OPTION):
        of_block[OPTIONS + k] = given[FIRST_OPTION + k]
    # Tiles. Columns an odd number of cache lines apart do not fall on the same places in cache.
    across = 1
    if kind == IN_ROWS:
        height = max(1, min(batch, most))
        pitch = 1
        tiles = (batch + height - 1) // height
    else:
        height = max(NARROW, min(most, batch if inner == 1 else inner) // 16 * 16)
        pitch = (height // 16 | 1) * 16
        if kind == TURNED:
            tiles = (batch + height - 1) // height
        else:
            across = (inner + height - 1) // height
            tiles = batch * across
    context = stack(8 * 14)
    c = at_address(context, 0)
    c[RECIPE], c[LAYOUTS], c[KIND], c[CLASSES_], c[INNER] = data_of(recipe), layouts, kind, classes, inner
    c[BATCH], c[HEIGHT], c[PITCH_], c[ACROSS], c[TILES] = batch, height, pitch, across, tiles
    c[NUMBERS_], c[CLASS_WEIGHTS], c[SHARES] = filled, weights, 1
    few = stack(8 * 16)
    sums = few if tiles <= 16 else allocate(8 * tiles)
    c[SUMS] = sums
    if fork and tiles > 1:
        c[SHARES] = min(tiles, r[WORKERS])
        run_fork(fork, (task, context, c[SHARES]))
    else:
        run_task(task, (context, 0))
    total = 0.0
    for k in range(tiles):
        total += at_address(sums, 0.0)[k]
    if sums != few:
        release(sums)
    if made:
        release(made)
    return total / divisor, OK


@cache
def driver() -> tuple[Any, int]:
    """`drive`, and the address of its task."""
    task = compile_function(worker_tiles, {}, "scores", "scores", TASK)
    return compile_entry(drive, {}, "scores", "scores", ENTRY), task


# ---- a call ------------------------------------------------------------------------------------------------

PARALLEL_FROM = 8192  # scores from which two threads beat one

# What was compiled already, by all that it depends on: later recipes have it from the start.
_compiled: dict[tuple[Any, ...], int] = {}


def request_of(problem: Scores, outputs: dict[str, Any]) -> ScoreRequest:
    """What a call asks of its block."""
    p = problem
    smoothed = not p.probabilities and p.label_smoothing != 0
    return ScoreRequest(
        probabilities=p.probabilities,
        weighted=not p.probabilities and (smoothed or p.class_weight is not None),
        smoothed=smoothed,
        row_factors=p.sample_weight is not None or p.upstream is not None,
        grad="input" in outputs,
        target_grad="target" in outputs or "distances" in outputs,
        by_weight="distances" in outputs,
        curvature="curvature" in outputs,
        softcap=p.softcap is not None,
        lse_square=p.lse_square_scale != 0,
    )


def makers(problem: Scores, outputs: dict[str, Any]) -> list[tuple[tuple[Any, ...], Callable[[], int]]]:
    """Of the recipe's first slots: a name, and a function that compiles what goes there."""
    request, dtype, functions = request_of(problem, outputs), problem.arithmetic, problem.functions
    return [
        (("rows", functions, request, dtype), lambda: compile_block(functions, request, False, dtype)),
        (("columns", functions, request, dtype), lambda: compile_block(functions, request, True, dtype)),
        (("gather", dtype), lambda: gatherer(dtype)),
        (("scatter", dtype), lambda: scatterer(dtype)),
        (("gather integers",), integer_gatherer),
        (("turn", dtype), lambda: compile_turn(False, dtype)),
        (("turn back", dtype), lambda: compile_turn(True, dtype)),
    ]


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array over the rows of scores."""
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def launch(problem: Scores, outputs: dict[str, Any], new: tuple[str, ...] = ()) -> Launch:
    """Pack a call for the driver.

    Parameters
    ----------
    problem : Scores
        Its float arrays have dtypes that the arithmetic holds; weights of others are converted here.
    outputs : dict
        Arrays to be written: gradients by ``"input"`` and ``"target"``, ``"curvature"``, the rows' ``"terms"``; or, in
        place of the target's gradient, ``"distances"``: see `weight_gradient`.
    new : tuple of names
        The outputs that were made for this call.
    """
    p, own = problem, np.dtype(problem.arithmetic)

    def as_floats(array: Any) -> Any:
        if array is None or (array.dtype.name in FLOAT_CODES and array.dtype.itemsize <= own.itemsize):
            return array
        return array.astype(own)

    slots = {"input": GRAD, "target": TARGET_GRAD, "distances": TARGET_GRAD, "curvature": CURVATURE, "terms": VALUES}
    arrays: list[Any] = [None] * ARRAYS
    arrays[INPUT], arrays[TARGET] = p.input, p.target
    arrays[CLASS_WEIGHT], arrays[ROW_WEIGHT] = as_floats(p.class_weight), as_floats(p.sample_weight)
    arrays[UPSTREAM] = as_floats(p.upstream)
    for name, array in outputs.items():
        arrays[slots[name]] = array
    codes = [ABSENT if a is None else FLOAT_CODES.get(a.dtype.name, ABSENT) for a in arrays]
    if not p.probabilities:
        codes[TARGET] = INTEGERS[p.target.dtype.char.replace("l", "q").replace("L", "Q")]
    request = request_of(p, outputs)
    divide = BY_COUNT if p.divisor is None else BY_ONE if p.divisor == 1 else BY_NUMBER
    recipe = [_compiled.get(name, 0) for name, _ in makers(p, outputs)]
    recipe += [order_axes_address(), lay_address(), p.probabilities, request.weighted or p.probabilities]
    recipe += [request.row_factors, request.softcap, divide, p.ignore_index, own.itemsize]
    recipe += [FLOAT_CODES[own.name], 4 * numba.config.NUMBA_NUM_THREADS, *codes]
    numbers = [1.0 if p.divisor is None else p.divisor, p.factor, p.label_smoothing]
    numbers += [1.0 if p.softcap is None else p.softcap, p.lse_square_scale, *p.options]
    entry, task = driver()
    made = tuple(
        New(slots[n], TARGET if n in ("target", "distances") else INPUT, rows_of if n == "terms" else None) for n in new
    )
    return Launch(
        entry, np.array(recipe, np.int64), np.array(numbers), tuple(arrays), task, PARALLEL_FROM, made
    )  # fmt: skip


def complete(packed: Launch, problem: Scores, outputs: dict[str, Any], status: int) -> None:
    """Compile what a recipe misses, and put it there."""
    missing = MISSING - status
    for slot, (name, make) in enumerate(makers(problem, outputs)):
        if missing >> slot & 1:
            packed.recipe[slot] = _compiled[name] = make()


def run(problem: Scores, outputs: dict[str, Any], new: tuple[str, ...] = ()) -> tuple[float, int, Launch]:
    """Compute a call: the value, the status (never one of what is missing), and the launch."""
    packed = launch(problem, outputs, new)
    while True:
        value, status = launches.run(packed)
        if status > MISSING:
            return value, status, packed
        complete(packed, problem, outputs, status)


def wrong_label(problem: Scores) -> tuple[int, ...]:
    """The index of the first label, in C order, that is no class."""
    t, classes = problem.target, problem.input.shape[min(1, problem.input.ndim - 1)]
    wrong = (t != problem.ignore_index) & ((t < 0) | (t >= classes))
    return tuple(int(k) for k in np.unravel_index(np.argmax(wrong), t.shape))


def weight_gradient(problem: Scores) -> np.ndarray:
    """The gradient by the class weights, of a call with probabilities: sum over rows of B q'_c (lse - x_c).

    B is the slope by the cross entropy, with all that multiplies a row's gradient; q' the smoothed probability.
    """
    p = problem
    distances = np.empty(p.input.shape, p.arithmetic)
    run(p, {"distances": distances})
    axis = min(1, p.input.ndim - 1)
    q = (1 - p.label_smoothing) * p.target.astype(np.float64) + p.label_smoothing / p.input.shape[axis]
    products = np.multiply(q, distances, where=q != 0, out=np.zeros(q.shape))
    return products.sum(axis=tuple(k for k in range(q.ndim) if k != axis))
