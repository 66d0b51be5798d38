"""Elements of any stride and any dtype, to and from contiguous rows of one dtype.

C functions that the drivers call by address, each compiled when a call first needs it.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit, types

from ..math import select
from ..spec import FLOAT16, FLOAT32, FLOAT64
from .halves import from_bfloat16, from_float16, to_bfloat16, to_float16
from .native import HELPER, at_address, caller, compile_function

# Of `code, address, shape, strides, axes, start, row, count`: move `count` elements, the first at index
# `start` in C order of an array of `axes` extents and strides in bytes, between that array and a row.
SIGNATURE = types.int64(*[types.int64] * 8)
transfer = caller(types.int64, 8)

# Bound by `gatherer` and `scatterer`: the row's dtype and the bytes of its elements.
T: Any = np.float32
ITEM: Any = 4

# Integer dtypes by code, in the order of NumPy's characters; and floats that hold class numbers.
INTEGERS = {c: k for k, c in enumerate("bBhHiIqQ")}
OF_FLOAT32, OF_FLOAT64 = 8, 9
CLASS_NUMBERS = INTEGERS | {"f": OF_FLOAT32, "d": OF_FLOAT64}

NO_NUMBER = np.int64(-(2**63))  # for a float that is no whole number


@njit(**HELPER)
def locate(shape_at, strides_at, axes, flat):
    """Byte offset of a flat C-order index, and how many elements are left on its last axis."""
    shape, strides = at_address(shape_at, 0), at_address(strides_at, 0)
    last = axes - 1
    column = flat % shape[last]
    left, offset = shape[last] - column, column * strides[last]
    flat //= shape[last]
    for k in range(last):
        axis = last - 1 - k
        offset += (flat % shape[axis]) * strides[axis]
        flat //= shape[axis]
    return offset, left


def gather(code, address, shape, strides, axes, start, row, count):
    """Copy a floating array's elements to a row."""
    step = at_address(strides, 0)[axes - 1]
    done = 0
    while done < count:
        offset, n = locate(shape, strides, axes, start + done)
        n = min(n, count - done)
        into, source = at_address(row + done * ITEM, T(0)), address + offset
        done += n
        if code == FLOAT32:  # the constant stride lets each first loop vectorise
            if step == 4:
                for i in range(n):
                    into[i] = at_address(source, np.float32(0))[i]
            else:
                for i in range(n):
                    into[i] = at_address(source + i * step, np.float32(0))[0]
        elif code == FLOAT64:
            if step == 8:
                for i in range(n):
                    into[i] = at_address(source, 0.0)[i]
            else:
                for i in range(n):
                    into[i] = at_address(source + i * step, 0.0)[0]
        elif code == FLOAT16:
            if step == 2:
                for i in range(n):
                    into[i] = from_float16(at_address(source, np.uint16(0))[i])
            else:
                for i in range(n):
                    into[i] = from_float16(at_address(source + i * step, np.uint16(0))[0])
        elif step == 2:
            for i in range(n):
                into[i] = from_bfloat16(at_address(source, np.uint16(0))[i])
        else:
            for i in range(n):
                into[i] = from_bfloat16(at_address(source + i * step, np.uint16(0))[0])
    return 0


def scatter(code, address, shape, strides, axes, start, row, count):
    """Store a row in a floating array's elements."""
    step = at_address(strides, 0)[axes - 1]
    done = 0
    while done < count:
        offset, n = locate(shape, strides, axes, start + done)
        n = min(n, count - done)
        source, into = at_address(row + done * ITEM, T(0)), address + offset
        done += n
        if code == FLOAT32:
            if step == 4:
                for i in range(n):
                    at_address(into, np.float32(0))[i] = source[i]
            else:
                for i in range(n):
                    at_address(into + i * step, np.float32(0))[0] = source[i]
        elif code == FLOAT64:
            if step == 8:
                for i in range(n):
                    at_address(into, 0.0)[i] = source[i]
            else:
                for i in range(n):
                    at_address(into + i * step, 0.0)[0] = source[i]
        elif code == FLOAT16:
            if step == 2:
                for i in range(n):
                    at_address(into, np.uint16(0))[i] = to_float16(np.float32(source[i]))
            else:
                for i in range(n):
                    at_address(into + i * step, np.uint16(0))[0] = to_float16(np.float32(source[i]))
        elif step == 2:
            for i in range(n):
                at_address(into, np.uint16(0))[i] = to_bfloat16(np.float32(source[i]))
        else:
            for i in range(n):
                at_address(into + i * step, np.uint16(0))[0] = to_bfloat16(np.float32(source[i]))
    return 0


@njit(**HELPER)
def as_class_number(x):
    """Return a whole number as int64; `NO_NUMBER` for any other."""
    if not abs(x) < 2.0**63:
        return NO_NUMBER
    k = np.int64(x)
    return k if k == x else NO_NUMBER


def gather_integers(code, address, shape, strides, axes, start, row, count):
    """Copy an array's elements to a row of int64: of integers, or of floats that are class numbers.

    A uint64 above the range becomes the largest, a float that is no whole number `NO_NUMBER`.
    """
    step = at_address(strides, 0)[axes - 1]
    done = 0
    while done < count:
        offset, n = locate(shape, strides, axes, start + done)
        n = min(n, count - done)
        source, into = address + offset, at_address(row + done * 8, 0)
        done += n
        if code == OF_FLOAT32 and step == 4:  # by way of int32, for which there are vector instructions
            far, floats = 0, at_address(source, np.float32(0))
            for i in range(n):
                number = floats[i]
                near = abs(number) < np.float32(2.0**31)
                k = np.int32(select(near, number, np.float32(0)))
                far += not near
                into[i] = select(near & (np.float32(k) == number), np.int64(k), NO_NUMBER)
            if not far:
                continue
        for i in range(n):
            at = source + i * step
            if code == 6:
                x = at_address(at, 0)[0]
            elif code == 4:
                x = np.int64(at_address(at, np.int32(0))[0])
            elif code == 7:
                x = at_address(at, 0)[0]
                x = x if x >= 0 else 0x7FFFFFFFFFFFFFFF
            elif code == 5:
                x = np.int64(at_address(at, np.uint32(0))[0])
            elif code == 2:
                x = np.int64(at_address(at, np.int16(0))[0])
            elif code == 3:
                x = np.int64(at_address(at, np.uint16(0))[0])
            elif code == 0:
                x = np.int64(at_address(at, np.int8(0))[0])
            elif code == 1:
                x = np.int64(at_address(at, np.uint8(0))[0])
            elif code == OF_FLOAT32:
                x = as_class_number(np.float64(at_address(at, np.float32(0))[0]))
            else:
                x = as_class_number(at_address(at, 0.0)[0])
            into[i] = x
    return 0


@cache
def address_of(template: Any, dtype: np.dtype) -> int:
    """The address of a template's C function for rows of one dtype."""
    scope = dict(T=dtype.type, ITEM=dtype.itemsize)
    return compile_function(template, scope, dtype.name, dtype.name, SIGNATURE)


def gatherer(dtype: np.dtype) -> int:
    """The address of `gather` to rows of an arithmetic dtype."""
    return address_of(gather, dtype)


def scatterer(dtype: np.dtype) -> int:
    """The address of `scatter` from rows of an arithmetic dtype."""
    return address_of(scatter, dtype)


def integer_gatherer() -> int:
    """The address of `gather_integers`."""
    return address_of(gather_integers, np.dtype(np.int64))
