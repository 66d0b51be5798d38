"""Transposing a tile: rows of few classes to columns, and back.

Squares of elements are loaded a row a vector, exchanged by shuffles and stored a column a vector. At the
edges a square overlaps the one before; only tiles smaller than a square are copied one element at a time.
"""

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ..bind import bind
from .native import LINKED, at_address, compile_function, smaller

# ``transpose(source, source_step, into, into_step, rows, columns)``: addresses, and bytes from a row of the
# source, or of the result, to the next.
TRANSPOSE = types.int64(*[types.int64] * 6)
LANE = 16  # bytes within which a shuffle of AVX costs least

# Bound by `transposer`.
T: Any = np.float32
ITEM: Any = 4
SMALL: Any = 4
LARGE: Any = 8
SIDE: Any = 4
in_small: Any = None  # `transpose_squares` of these sides
in_large: Any = None


@intrinsic(prefer_literal=True)
def transpose_square(typingctx, source, source_step, into, into_step, size, like):
    """Transpose `size` rows, a literal, of as many elements: those of one or two lanes."""
    count, lane = size.literal_value, LANE * 8 // like.bitwidth

    def codegen(context, builder, sig, args):
        kind = ir.VectorType(context.get_value_type(like), count)

        def place(start, step, k):
            address = builder.add(start, builder.mul(step, ir.Constant(step.type, k)))
            return builder.inttoptr(address, kind.as_pointer())

        def shuffle(a, b, places):
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), count), places))

        rows = [builder.load(place(*args[:2], k), align=like.bitwidth // 8) for k in range(count)]
        # Within lanes, rows whose numbers differ in one bit exchange halves: of elements, of pairs.
        columns, width = list(range(count)), 1
        while width < lane:
            for k in range(count):
                if not k & width:
                    a, b = rows[k], rows[k | width]
                    for high in (0, 1):
                        rows[k | high * width] = shuffle(a, b, [
                            start + high * (lane // 2) + group + of_b * count + e
                            for start in range(0, count, lane)
                            for group in range(0, lane // 2, width)
                            for of_b in (0, 1)
                            for e in range(width)
                        ])  # fmt: skip
            width *= 2
        for k in range(count):  # the column of which row k now holds part: the bits of k, backwards
            bits = lane.bit_length() - 1
            columns[k] = sum((k >> b & 1) << bits - 1 - b for b in range(bits))
        if count == 2 * lane:  # the other half of a row's column is in the row `lane` below
            low = [*range(lane), *range(count, count + lane)]
            for k in range(lane):
                a, b = rows[k], rows[k + lane]
                rows[k], rows[k + lane] = shuffle(a, b, low), shuffle(a, b, [i + lane for i in low])
                columns[k + lane] = columns[k] + lane
        for row, column in zip(rows, columns, strict=True):
            builder.store(row, place(*args[2:4], column), align=like.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(source, source_step, into, into_step, size, like), codegen


def transpose_squares(source, source_step, into, into_step, rows, columns):
    """Copy rows to columns, at least `SIDE` of each."""
    for start in range(0, rows, SIDE):
        i = smaller(start, rows - SIDE)
        for c in range(0, columns, SIDE):
            k = smaller(c, columns - SIDE)
            a, b = source + i * source_step + k * ITEM, into + k * into_step + i * ITEM
            transpose_square(a, source_step, b, into_step, SIDE, T(0))


def transpose(source, source_step, into, into_step, rows, columns):
    """Copy rows to columns."""
    if rows >= LARGE and columns >= LARGE:
        in_large(source, source_step, into, into_step, rows, columns)
    elif rows >= SMALL and columns >= SMALL:
        in_small(source, source_step, into, into_step, rows, columns)
    else:
        for c in range(columns):
            column = at_address(into + c * into_step, T(0))
            for i in range(rows):
                column[i] = at_address(source + i * source_step, T(0))[c]
    return 0


@cache
def transposer(dtype: np.dtype) -> int:
    """Return the address of `transpose` for a dtype."""
    lane = LANE // dtype.itemsize
    scope: dict[str, Any] = dict(T=dtype.type, ITEM=dtype.itemsize, SMALL=lane, LARGE=2 * lane)
    for name, side in (("in_small", lane), ("in_large", 2 * lane)):
        of_side = scope | {"SIDE": side}
        scope[name] = bind(transpose_squares, of_side, dtype.name, (dtype.name, side), njit(**LINKED))
    return compile_function(transpose, scope, dtype.name, dtype.name, TRANSPOSE)
