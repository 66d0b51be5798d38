"""Calls a compiled block over whole arrays of elements, serially or on all threads.

The work is cut into blocks of a fixed size. A block's sum depends on its elements alone, and the blocks' sums
are added in their order: the result has the same bits for any number of threads.

- `direct`: arrays that are contiguous in one order of axes and of the arithmetic dtype, where they lie.
- `staged`: any strides, any floating dtype, broadcast or not. Each block is gathered into contiguous scratch
  memory that stays in cache, computed there, and its outputs scattered back: no temporary array is ever made.

Neither knows what a block computes, so both are compiled once for all losses. They take a tuple of arrays: the
block's inputs, then its outputs; see `native`.

A `recipe` is an array of int64, which depends on no extent: the block's address; how many arrays there are, and
how many of them are inputs; what divides (`BY_*`), and for `BY_WEIGHTS` which array holds the weights; the
bytes of an element of the arithmetic; the addresses of `strided`'s functions (0 where none is needed); and the
arrays' codes. `numbers` are float64: a divisor, the gradient's factor, and the loss's options.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit, types

from ..spec import BLOCK
from .launch import OK, UNFIT
from .native import (
    HELPER,
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
from .strided import transfer

# Of a recipe.
FUNCTION, COUNT, INPUTS, DIVIDE, WEIGHTS, ITEM, GATHER, SCATTER, CODES = range(9)
# What divides the sum and the gradients: 1, the number in `numbers`, the number of elements or of rows, or the
# sum of an array of weights.
BY_ONE, BY_NUMBER, BY_ELEMENTS, BY_ROWS, BY_WEIGHTS = range(5)
DIVISOR, FACTOR, OPTIONS = range(3)  # of `numbers`
MOST_ARRAYS, MOST_AXES, MOST_NUMBERS = 16, 64, 32

run_block = caller(types.float64, 4)

# A task's context: int64.
CONTEXT = BLOCK_AT, ARRAYS, POINTERS, NUMBERS, SIZE, ITEMSIZE, SUMS, WRONG = range(8)
STAGED = AXES, SHAPE, STRIDES, CODES_AT, READ, GATHER_AT, SCATTER_AT, SCRATCH, WORKERS = range(8, 17)


def block_at(context, b):
    """The task of `direct`: one block."""
    c = at_address(context, 0)
    start = b * BLOCK
    n = min(BLOCK, c[SIZE] - start)
    moved = stack(8 * 16)
    for k in range(c[ARRAYS]):
        at_address(moved, 0)[k] = at_address(c[POINTERS], 0)[k] + start * c[ITEMSIZE]
    wrong = c[WRONG] + 8 * b
    store(wrong, 0)
    store(c[SUMS] + 8 * b, run_block(c[BLOCK_AT], (moved, c[NUMBERS], n, wrong)))
    return 0


def share_of_blocks(context, worker):
    """The task of `staged`: one worker's blocks, through scratch memory of its own."""
    c = at_address(context, 0)
    arrays, item, size = c[ARRAYS], c[ITEMSIZE], c[SIZE]
    blocks = (size + BLOCK - 1) // BLOCK
    rows = c[SCRATCH] + worker * arrays * BLOCK * item
    table = stack(8 * 16)
    for k in range(arrays):
        at_address(table, 0)[k] = rows + k * BLOCK * item
    pointers, codes = at_address(c[POINTERS], 0), at_address(c[CODES_AT], 0)
    for b in range(worker * blocks // c[WORKERS], (worker + 1) * blocks // c[WORKERS]):
        start = b * BLOCK
        n = min(BLOCK, size - start)
        wrong = c[WRONG] + 8 * b
        store(wrong, 0)
        for k in range(arrays):
            if k == c[READ]:
                store(c[SUMS] + 8 * b, run_block(c[BLOCK_AT], (table, c[NUMBERS], n, wrong)))
            move = c[GATHER_AT] if k < c[READ] else c[SCATTER_AT]
            strides = c[STRIDES] + k * 8 * MOST_AXES
            transfer(
                move, (codes[k], pointers[k], c[SHAPE], strides, c[AXES], start, rows + k * BLOCK * item, n)
            )
        if arrays == c[READ]:
            store(c[SUMS] + 8 * b, run_block(c[BLOCK_AT], (table, c[NUMBERS], n, wrong)))
    return 0


@njit(**HELPER)
def weights_sum(address, n, single):
    """The sum of contiguous weights, in float64."""
    total = 0.0
    if single:
        w32 = at_address(address, np.float32(0))
        for start in range(0, n, 64):
            part = 0.0
            for i in range(start, min(start + 64, n)):
                part += w32[i]
            total += part
    else:
        w64 = at_address(address, 0.0)
        for start in range(0, n, 64):
            part = 0.0
            for i in range(start, min(start + 64, n)):
                part += w64[i]
            total += part
    return total


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

    `task` is the address of `block_at`, `fork` that of `parallel.fork`, or 0 to stay on this thread.
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
    by = 1.0
    if r[DIVIDE] == BY_NUMBER:
        by = at_address(data_of(numbers), 0.0)[DIVISOR]
    elif r[DIVIDE] == BY_ELEMENTS:
        by = float(n)
    elif r[DIVIDE] == BY_ROWS:
        by = float(at_address(shape_of(first), 0)[0] if rank else 1)
    elif r[DIVIDE] == BY_WEIGHTS:
        by = weights_sum(at_address(pointers, 0)[r[WEIGHTS]], n, r[ITEM] == 4)
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
    context = stack(8 * 17)
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


ENTRY = types.Tuple((types.float64, types.int64))(held, held, held, types.int64, types.int64)


@cache
def direct_task() -> int:
    """The address of `block_at`."""
    return compile_function(block_at, {}, "elements", "elements", TASK)


@cache
def direct_entry() -> Any:
    """`direct`, compiled."""
    return compile_entry(direct, {}, "elements", "elements", ENTRY)
