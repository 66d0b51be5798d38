"""Calls a compiled block over whole arrays of elements, serially or on all threads.

The work is cut into blocks of a fixed size. A block's sum depends on its elements alone, and the blocks' sums
are added in their order: the result has the same bits for any number of threads.

- `direct`: arrays that are contiguous in one order of axes and of the arithmetic dtype, where they lie.
- `staged`: any strides, any floating dtype, broadcast or not. Each block is gathered into contiguous scratch
  memory that stays in cache, computed there, and its outputs scattered back: no temporary array is ever made.

Neither knows what a block computes, so both are compiled once for all losses. They take a tuple of arrays:
the block's inputs, then its outputs; see `native`.

A `recipe` is an array of int64, which depends on no extent: the block's address; how many arrays there are,
and how many of them are inputs; what divides (`BY_*`), and for `BY_WEIGHTS` which array holds the weights;
the bytes of an element of the arithmetic; the addresses of the functions of `strided` and `arrange`, of
`weights_sum` and of `block_at` (0 where none is needed); the most workers; and the arrays' codes. `numbers`
are float64: a divisor, the gradient's factor, and the loss's options.

A function that few calls need is compiled when one does: its address in the recipe is 0 before, and the
driver's status says what is missing. `launch.run` compiles that, and calls again.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit, types

from ..spec import BLOCK, FLOAT32, FLOAT64
from .arrange import ADDRESS, AXES, CODE, LAYOUT_BYTES, SHAPE, STRIDES, call_lay, call_order_axes
from .launch import INCOMPLETE, OK, UNFIT
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
    smaller,
    stack,
    store,
)
from .parallel import TASK, run_fork, run_task
from .strided import transfer
from .target import WIDTH, new_lanes, sum_of_lanes

# Of a recipe.
FUNCTION, COUNT, INPUTS, DIVIDE, WEIGHTS, ITEM, GATHER, SCATTER = range(8)
ADD_WEIGHTS, BLOCK_TASK, ORDER, LAY, WORKERS, CODES = range(8, 14)
# What may be missing, as the bits of a status.
NO_GATHER, NO_SCATTER, NO_TASK = 1, 2, 4
# What divides the sum and the gradients: 1, the number in `numbers`, the number of elements or of rows, or
# the sum of an array of weights.
BY_ONE, BY_NUMBER, BY_ELEMENTS, BY_ROWS, BY_WEIGHTS = range(5)
DIVISOR, FACTOR, OPTIONS = range(3)  # of `numbers`
APART = 16  # added to the code of an output that lies over an input: it goes through scratch memory
EXACT = 32  # added to the code of an input that must have the first one's shape, and is not broadcast
LANES = WIDTH // 8
LAYOUTS = 16 * LAYOUT_BYTES  # bytes of sixteen arrays' layouts, more than any block takes

run_block = caller(types.float64, 4)
ADDING = types.float64(types.int64, types.int64, types.int64)
add_weights = caller(types.float64, 3)

# Of a task's context, in int64: the block's address; how many arrays there are, and the address of their
# pointers (of `direct`) or layouts (of `staged`); that of the block's numbers; elements in all, bytes of one;
# the addresses of the blocks' sums and numbers of invalid elements. Of `staged` further: how many arrays are
# inputs; the addresses of `strided`'s functions and of the workers' scratch memory; how many workers.
BLOCK_AT, ARRAYS, POINTERS, NUMBERS, SIZE, ITEMSIZE, SUMS, WRONG = range(8)
READ, GATHER_AT, SCATTER_AT, SCRATCH, SHARES = range(8, 13)


def block_at(context, b):
    """The task of `direct`: one block."""
    c = at_address(context, 0)
    start = b * BLOCK
    n = smaller(BLOCK, c[SIZE] - start)
    moved = stack(8 * 16)
    for k in range(c[ARRAYS]):
        at_address(moved, 0)[k] = at_address(c[POINTERS], 0)[k] + start * c[ITEMSIZE]
    wrong = c[WRONG] + 8 * b
    store(wrong, 0)
    store(c[SUMS] + 8 * b, run_block(c[BLOCK_AT], (moved, c[NUMBERS], n, wrong)))
    return 0


def share_of_blocks(context, worker):
    """The task of `staged`: one worker's blocks, through scratch memory of its own where they need it."""
    c = at_address(context, 0)
    arrays, size, read, bytes_each = c[ARRAYS], c[SIZE], c[READ], c[ITEMSIZE]
    blocks, room = (size + BLOCK - 1) // BLOCK, bytes_each * BLOCK
    own = FLOAT32 if bytes_each == 4 else FLOAT64
    scratch = c[SCRATCH] + worker * arrays * room
    table = stack(8 * 16)
    for b in range(worker * blocks // c[SHARES], (worker + 1) * blocks // c[SHARES]):
        start = b * BLOCK
        n = smaller(BLOCK, size - start)
        for pass_ in range(2):  # inputs and the places of outputs; then, after the block, outputs
            for k in range(arrays):
                at = c[POINTERS] + LAYOUT_BYTES * k
                a = at_address(at, 0)
                if a[AXES] == 1 and a[STRIDES] == bytes_each and a[CODE] == own:
                    store(table + 8 * k, a[ADDRESS] + start * bytes_each)
                    continue
                row = scratch + k * room
                store(table + 8 * k, row)
                if (k < read) == (pass_ == 0):
                    move = c[GATHER_AT] if k < read else c[SCATTER_AT]
                    shape, strides, code = at + 8 * SHAPE, at + 8 * STRIDES, a[CODE] % APART
                    transfer(move, (code, a[ADDRESS], shape, strides, a[AXES], start, row, n))
            if pass_ == 0:
                wrong = c[WRONG] + 8 * b
                store(wrong, 0)
                store(c[SUMS] + 8 * b, run_block(c[BLOCK_AT], (table, c[NUMBERS], n, wrong)))
    return 0


@njit(**HELPER)
def sum_of_weights(w, n):
    """The sum of contiguous weights, in float64."""
    part = new_lanes(LANES, 0.0)
    whole = n - n % LANES
    for start in range(0, whole, LANES):
        for k in range(LANES):
            part[k] += w[start + k]
    for k in range(n - whole):
        part[k] += w[whole + k]
    return sum_of_lanes(part, LANES)


def weights_sum(address, n, size):
    """The sum of contiguous weights, floats of 4 or 8 bytes, in float64."""
    if size == 4:
        return sum_of_weights(at_address(address, np.float32(0)), n)
    return sum_of_weights(at_address(address, 0.0), n)


@njit(**HELPER)
def fill_numbers(numbers, filled, count, by):
    """Copy what a block is given: the gradient's scale, then the options."""
    source, into = at_address(numbers, 0.0), at_address(filled, 0.0)
    scale = 1 / by if by != 0 else np.nan
    into[0] = scale * source[FACTOR]
    for k in range(count):
        into[1 + k] = source[OPTIONS + k]
    return scale


@njit(**HELPER)
def add_up(sums, wrong, blocks):
    """The sum over blocks, in their order, and the number of invalid elements."""
    total, invalid = 0.0, 0
    for b in range(blocks):
        total += at_address(sums, 0.0)[b]
        invalid += at_address(wrong, 0)[b]
    return total, invalid


def direct(recipe, numbers, arrays, task, fork):
    """The divided sum, and `OK`, `UNFIT` or, where an element is out of its domain, 0.

    `fork` is the address of `parallel.fork`, or 0 to stay on this thread; `task` is not read.
    """
    r = at_address(data_of(recipe), 0)
    first = item(arrays, 0)
    rank = rank_of(first)
    n = 1
    for axis in range(rank):
        n *= at_address(shape_of(first), 0)[axis]
    pointers = stack(8 * 16)
    for k in range(r[COUNT]):
        array = item(arrays, k)
        if rank_of(array) != rank:
            return 0.0, UNFIT
        for axis in range(rank):
            if at_address(shape_of(array), 0)[axis] != at_address(shape_of(first), 0)[axis]:
                return 0.0, UNFIT
        store(pointers + 8 * k, data_of(array))
    task = r[BLOCK_TASK]
    if n > BLOCK and task == 0:
        return 0.0, INCOMPLETE - NO_TASK
    by = 1.0
    if r[DIVIDE] == BY_NUMBER:
        by = at_address(data_of(numbers), 0.0)[DIVISOR]
    elif r[DIVIDE] == BY_ELEMENTS:
        by = float(n)
    elif r[DIVIDE] == BY_ROWS:
        by = float(at_address(shape_of(first), 0)[0] if rank else 1)
    elif r[DIVIDE] == BY_WEIGHTS:
        by = 0.0
        for start in range(0, n, BLOCK):  # as `staged` adds them
            at = at_address(pointers, 0)[r[WEIGHTS]] + start * r[ITEM]
            by += add_weights(r[ADD_WEIGHTS], (at, smaller(BLOCK, n - start), r[ITEM]))
    filled = stack(8 * 32)
    scale = fill_numbers(data_of(numbers), filled, at_address(shape_of(numbers), 0)[0] - OPTIONS, by)
    if n <= BLOCK:
        wrong = stack(8)
        store(wrong, 0)
        total = 0.0
        if n:
            total = run_block(r[FUNCTION], (pointers, filled, n, wrong))
        return total * scale, 0 if at_address(wrong, 0)[0] else OK
    blocks = (n + BLOCK - 1) // BLOCK
    sums = allocate(16 * blocks)
    if not sums:
        return 0.0, NO_MEMORY
    context = stack(8 * 13)
    c = at_address(context, 0)
    c[BLOCK_AT], c[ARRAYS], c[POINTERS], c[NUMBERS] = r[FUNCTION], r[COUNT], pointers, filled
    c[SIZE], c[ITEMSIZE], c[SUMS], c[WRONG] = n, r[ITEM], sums, sums + 8 * blocks
    if fork:
        run_fork(fork, (task, context, blocks))
    else:
        for b in range(blocks):
            run_task(task, (context, b))
    total, invalid = add_up(sums, sums + 8 * blocks, blocks)
    release(sums)
    return total * scale, 0 if invalid else OK


def staged(recipe, numbers, arrays, task, fork):
    """As `direct`, for arrays of any strides and dtype; inputs may be broadcast to the first one's shape.

    `task` is the address of `share_of_blocks`.
    """
    r = at_address(data_of(recipe), 0)
    count, first = r[COUNT], item(arrays, 0)
    objects, order, layouts = stack(8 * 16), stack(8 * 64), stack(LAYOUTS)
    n, rank = 1, rank_of(first)
    for axis in range(rank):
        n *= at_address(shape_of(first), 0)[axis]
    same = 0  # arrays of the first one's rank settle the order of axes
    for k in range(count):
        array = item(arrays, k)
        if rank_of(array) == rank:
            store(objects + 8 * same, array)
            same += 1
    call_order_axes(r[ORDER], (objects, same, order))
    own = FLOAT32 if r[ITEM] == 4 else FLOAT64
    weights, missing = r[WEIGHTS] if r[DIVIDE] == BY_WEIGHTS else -1, 0
    for k in range(count):
        into = layouts + LAYOUT_BYTES * k
        array = item(arrays, k)
        code = r[CODES + k]
        if call_lay(r[LAY], (array, first, order, -1, k < r[INPUTS] and code < EXACT, into)) < 0:
            return 0.0, UNFIT
        a = at_address(into, 0)
        a[CODE] = code % EXACT
        if not (a[AXES] == 1 and a[STRIDES] == r[ITEM] and a[CODE] == own) or k == weights:
            missing |= NO_GATHER if k < r[INPUTS] else NO_SCATTER
    missing &= (r[GATHER] == 0) | (r[SCATTER] == 0) << 1
    if missing:
        return 0.0, INCOMPLETE - missing
    by = 1.0
    if r[DIVIDE] == BY_NUMBER:
        by = at_address(data_of(numbers), 0.0)[DIVISOR]
    elif r[DIVIDE] == BY_ELEMENTS:
        by = float(n)
    elif r[DIVIDE] == BY_ROWS:
        by = float(at_address(shape_of(first), 0)[0] if rank else 1)
    room = r[ITEM] * BLOCK
    if r[DIVIDE] == BY_WEIGHTS:
        by = 0.0
        scratch = allocate(room)
        if not scratch:
            return 0.0, NO_MEMORY
        w = at_address(layouts + LAYOUT_BYTES * r[WEIGHTS], 0)
        at = layouts + LAYOUT_BYTES * r[WEIGHTS]
        for start in range(0, n, BLOCK):
            size = smaller(BLOCK, n - start)
            shape, strides = at + 8 * SHAPE, at + 8 * STRIDES
            transfer(r[GATHER], (w[CODE], w[ADDRESS], shape, strides, w[AXES], start, scratch, size))
            by += add_weights(r[ADD_WEIGHTS], (scratch, size, r[ITEM]))
        release(scratch)
    filled = stack(8 * 32)
    scale = fill_numbers(data_of(numbers), filled, at_address(shape_of(numbers), 0)[0] - OPTIONS, by)
    if not n:
        return 0.0 * scale, OK
    blocks = (n + BLOCK - 1) // BLOCK
    workers = smaller(blocks, r[WORKERS]) if fork else 1
    sums = allocate(16 * blocks + workers * count * room)
    if not sums:
        return 0.0, NO_MEMORY
    context = stack(8 * 13)
    c = at_address(context, 0)
    c[BLOCK_AT], c[ARRAYS], c[POINTERS], c[NUMBERS] = r[FUNCTION], count, layouts, filled
    c[SIZE], c[ITEMSIZE], c[SUMS], c[WRONG] = n, r[ITEM], sums, sums + 8 * blocks
    c[READ], c[GATHER_AT], c[SCATTER_AT] = r[INPUTS], r[GATHER], r[SCATTER]
    c[SCRATCH], c[SHARES] = sums + 16 * blocks, workers
    if fork:
        run_fork(fork, (task, context, workers))
    else:
        run_task(task, (context, 0))
    total, invalid = add_up(sums, sums + 8 * blocks, blocks)
    release(sums)
    return total * scale, 0 if invalid else OK


ENTRY = types.Tuple((types.float64, types.int64))(held, held, held, types.int64, types.int64)


@cache
def direct_entry() -> Any:
    """Return `direct`, compiled."""
    return compile_entry(direct, {}, "elements", "elements", ENTRY)


@cache
def block_task() -> int:
    """Return the address of `block_at`."""
    return compile_function(block_at, {}, "elements", "elements", TASK)


@cache
def staged_driver() -> tuple[Any, int]:
    """Return `staged`, compiled, and its task."""
    task = compile_function(share_of_blocks, {}, "elements", "elements", TASK)
    return compile_entry(staged, {}, "elements", "elements", ENTRY), task


@cache
def weights_address() -> int:
    """Return the address of `weights_sum`."""
    return compile_function(weights_sum, {}, "elements", "elements", ADDING)
