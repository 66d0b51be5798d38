"""Transposing a tile: rows of few classes to columns, and back.

Two squares of elements at once are loaded, exchanged by shuffles and stored: a vector is a row of both, or a
column of both. At the edges they overlap those before; only tiles smaller than two squares are copied one
element at a time.
"""

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..compiler import Rolled
from .native import at_address, compile_function, smaller

# ``transpose(source, source_step, into, into_step, rows, columns)``: addresses, and bytes from a row of the
# source, or of the result, to the next.
TRANSPOSE = types.int64(*[types.int64] * 6)
LANE = 16  # bytes within which a shuffle of AVX costs least

# Bound by `transposer`.
T: Any = np.float32
ITEM: Any = 4
LANES: Any = 4  # elements of a lane
TWO: Any = 8  # and of two


@intrinsic(prefer_literal=True)
def transpose_squares_at(typingctx, source, source_step, into, into_step, tall, like):
    """Transpose two squares as wide as a lane.

    They lie one below the other where `tall`, a literal, is 1, else side by side.
    """
    lane, is_tall = LANE * 8 // like.bitwidth, tall.literal_value == 1
    count = 2 * lane

    def codegen(context, builder, sig, args):
        element, number = context.get_value_type(like), ir.IntType(32)
        align = like.bitwidth // 8

        def place(start, step, k, size, first=0):
            address = builder.add(start, builder.mul(step, ir.Constant(step.type, k)))
            address = builder.add(address, ir.Constant(step.type, first * align))
            return builder.inttoptr(address, ir.VectorType(element, size).as_pointer())

        def shuffle(a, b, places):
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(number, len(places)), places))

        def load(k):
            if not is_tall:
                return builder.load(place(source_, source_step_, k, count), align=align)
            halves = [builder.load(place(source_, source_step_, k + h, lane), align=align) for h in (0, lane)]
            return shuffle(*halves, list(range(count)))

        source_, source_step_, into_, into_step_ = args[:4]
        rows = [load(k) for k in range(lane)]
        # Within lanes, rows whose numbers differ in one bit exchange halves: of elements, of pairs.
        width = 1
        while width < lane:
            for k in range(lane):
                if not k & width:
                    a, b = rows[k], rows[k | width]
                    for high in (0, 1):
                        rows[k | high * width] = shuffle(a, b, [
                            start + high * (lane // 2) + group + of_b * count + e
                            for start in (0, lane)
                            for group in range(0, lane // 2, width)
                            for of_b in (0, 1)
                            for e in range(width)
                        ])  # fmt: skip
            width *= 2
        bits = lane.bit_length() - 1
        for k, row in enumerate(rows):
            column = sum((k >> b & 1) << bits - 1 - b for b in range(bits))  # the bits of k, backwards
            if is_tall:
                builder.store(row, place(into_, into_step_, column, count), align=align)
                continue
            for h in (0, lane):
                half = shuffle(row, row, list(range(h, h + lane)))
                builder.store(half, place(into_, into_step_, column + h, lane), align=align)
        return context.get_dummy_value()

    return types.void(source, source_step, into, into_step, tall, like), codegen


def transpose(source, source_step, into, into_step, rows, columns):
    """Copy rows to columns."""
    is_tall = rows >= TWO and columns >= LANES
    if is_tall or (rows >= LANES and columns >= TWO):
        high, wide = (TWO, LANES) if is_tall else (LANES, TWO)
        for start in range(0, rows, high):
            i = smaller(start, rows - high)
            for c in range(0, columns, wide):
                k = smaller(c, columns - wide)
                a, b = source + i * source_step + k * ITEM, into + k * into_step + i * ITEM
                if is_tall:
                    transpose_squares_at(a, source_step, b, into_step, 1, T(0))
                else:
                    transpose_squares_at(a, source_step, b, into_step, 0, T(0))
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
    scope = dict(T=dtype.type, ITEM=dtype.itemsize, LANES=lane, TWO=2 * lane)
    return compile_function(transpose, scope, dtype.name, dtype.name, TRANSPOSE, pipeline_class=Rolled)
