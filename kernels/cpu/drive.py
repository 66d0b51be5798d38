"""Calls a compiled block over whole arrays, serially or on all threads, from one template each.

The work is cut into blocks of a fixed size. A block's sum depends on its elements alone, and the blocks' sums
are added in their order: the result has the same bits for any number of threads.

- `direct`: arrays that are contiguous and of the arithmetic dtype, handed to the block as they lie.
- `staged`: any strides and any floating dtype. Each block is gathered into contiguous scratch memory that
  stays in cache, computed there, and its outputs scattered back: no temporary array is ever made.

Neither knows what a block computes, so both are compiled once for all losses.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..bind import bind
from ..spec import BLOCK, FLOAT16, FLOAT32, FLOAT64
from .halves import from_bfloat16, from_float16, to_bfloat16, to_float16
from .target import SCALAR


@intrinsic
def call_block(typingctx, function, arrays, numbers, start, count):
    """Call the block at address `function` on elements `start` to `start + count` of each array.

    Returns the block's sum, and how many of its elements were invalid.
    """

    def codegen(context, builder, sig, args):
        address, arrays, numbers, start, count = args
        i64, f64 = ir.IntType(64), ir.DoubleType()
        k = len(sig.args[1])
        pointers = cgutils.alloca_once(builder, i64, size=ir.Constant(i64, k))
        for j in range(k):
            type_ = sig.args[1][j]
            array = context.make_array(type_)(context, builder, builder.extract_value(arrays, j))
            element = builder.ptrtoint(builder.gep(array.data, [start]), i64)
            builder.store(element, builder.gep(pointers, [ir.Constant(i64, j)]))
        m = len(sig.args[2])
        values = cgutils.alloca_once(builder, f64, size=ir.Constant(i64, m))
        for j in range(m):
            builder.store(builder.extract_value(numbers, j), builder.gep(values, [ir.Constant(i64, j)]))
        invalid = cgutils.alloca_once(builder, i64)
        builder.store(ir.Constant(i64, 0), invalid)
        arguments = [pointers, values, count, invalid]
        signature = ir.FunctionType(f64, [a.type for a in arguments])
        total = builder.call(builder.inttoptr(address, signature.as_pointer()), arguments)
        return context.make_tuple(builder, sig.return_type, [total, builder.load(invalid)])

    result = types.Tuple((types.float64, types.int64))
    return result(types.int64, arrays, numbers, types.intp, types.intp), codegen


def direct(function, arrays, numbers):
    """Sum over all blocks and the number of invalid elements; `arrays` in the order the block wants."""
    n = arrays[0].size
    if n <= BLOCK:
        return call_block(function, arrays, numbers, 0, n)
    blocks = (n + BLOCK - 1) // BLOCK
    sums = np.empty(blocks, np.float64)
    invalid = 0
    for b in prange(blocks):
        start = b * BLOCK
        sums[b], wrong = call_block(function, arrays, numbers, start, min(BLOCK, n - start))
        invalid += wrong
    total = 0.0
    for b in range(blocks):
        total += sums[b]
    return total, invalid


@intrinsic
def at_address(typingctx, address, like):
    """A pointer to elements of the type of `like`."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return types.CPointer(like)(types.int64, like), codegen


@njit(**SCALAR)
def _load(code, address, like):
    if code == FLOAT32:
        return type(like)(at_address(address, np.float32(0))[0])
    if code == FLOAT64:
        return type(like)(at_address(address, 0.0)[0])
    if code == FLOAT16:
        return type(like)(from_float16(at_address(address, np.uint16(0))[0]))
    return type(like)(from_bfloat16(at_address(address, np.uint16(0))[0]))


@njit(**SCALAR)
def _store(code, address, x):
    if code == FLOAT32:
        at_address(address, np.float32(0))[0] = np.float32(x)
    elif code == FLOAT64:
        at_address(address, 0.0)[0] = np.float64(x)
    elif code == FLOAT16:
        at_address(address, np.uint16(0))[0] = to_float16(np.float32(x))
    else:
        at_address(address, np.uint16(0))[0] = to_bfloat16(np.float32(x))


# Bound by `drivers`: the scratch memory's dtype.
T: Any = np.float32

WIDTH = (8, 4, 2, 2)  # bytes an element, by code


@njit(nogil=True)
def _gather(code, address, stride, row):
    """A run of elements at a constant stride, as a contiguous row."""
    if stride == WIDTH[code]:  # the constant stride lets each of these loops vectorise
        if code == FLOAT32:
            p32 = at_address(address, np.float32(0))
            for i in range(row.size):
                row[i] = p32[i]
        elif code == FLOAT64:
            p64 = at_address(address, 0.0)
            for i in range(row.size):
                row[i] = p64[i]
        elif code == FLOAT16:
            p16 = at_address(address, np.uint16(0))
            for i in range(row.size):
                row[i] = from_float16(p16[i])
        else:
            pb = at_address(address, np.uint16(0))
            for i in range(row.size):
                row[i] = from_bfloat16(pb[i])
    else:
        for i in range(row.size):
            row[i] = _load(code, address + i * stride, row[0])


@njit(nogil=True)
def _scatter(code, address, stride, row):
    if stride == WIDTH[code]:
        if code == FLOAT32:
            p32 = at_address(address, np.float32(0))
            for i in range(row.size):
                p32[i] = row[i]
        elif code == FLOAT64:
            p64 = at_address(address, 0.0)
            for i in range(row.size):
                p64[i] = row[i]
        elif code == FLOAT16:
            p16 = at_address(address, np.uint16(0))
            for i in range(row.size):
                p16[i] = to_float16(np.float32(row[i]))
        else:
            pb = at_address(address, np.uint16(0))
            for i in range(row.size):
                pb[i] = to_bfloat16(np.float32(row[i]))
    else:
        for i in range(row.size):
            _store(code, address + i * stride, row[i])


@njit(nogil=True)
def _locate(shape, strides, flat):
    """Byte offset of a flat C-order index, and how many elements are left on its last axis."""
    last = shape.size - 1
    column = flat % shape[last]
    offset = column * strides[last]
    flat //= shape[last]
    for axis in range(last - 1, -1, -1):
        offset += (flat % shape[axis]) * strides[axis]
        flat //= shape[axis]
    return offset, shape[last] - column


@njit(nogil=True)
def _transfer(code, address, shape, strides, start, row, outward):
    """Move elements `start` and on, in C order, to the row, or `outward` from it."""
    done = 0
    while done < row.size:
        offset, left = _locate(shape, strides, start + done)
        count = min(left, row.size - done)
        part = row[done : done + count]
        if outward:
            _scatter(code, address + offset, strides[shape.size - 1], part)
        else:
            _gather(code, address + offset, strides[shape.size - 1], part)
        done += count


@intrinsic
def call_rows(typingctx, function, rows, numbers, count):
    """Like `call_block`, on the first `count` elements of each row of a scratch matrix."""

    def codegen(context, builder, sig, args):
        address, rows, numbers, count = args
        i64, f64 = ir.IntType(64), ir.DoubleType()
        array = context.make_array(sig.args[1])(context, builder, rows)
        height = builder.extract_value(array.shape, 0)
        width = builder.extract_value(array.strides, 0)
        base = builder.ptrtoint(array.data, i64)
        pointers = cgutils.alloca_once(builder, i64, size=ir.Constant(i64, 16))
        with cgutils.for_range(builder, height) as it:
            builder.store(builder.add(base, builder.mul(it.index, width)), builder.gep(pointers, [it.index]))
        values = context.make_array(sig.args[2])(context, builder, numbers).data
        invalid = cgutils.alloca_once(builder, i64)
        builder.store(ir.Constant(i64, 0), invalid)
        arguments = [pointers, values, count, invalid]
        signature = ir.FunctionType(f64, [a.type for a in arguments])
        total = builder.call(builder.inttoptr(address, signature.as_pointer()), arguments)
        return context.make_tuple(builder, sig.return_type, [total, builder.load(invalid)])

    result = types.Tuple((types.float64, types.int64))
    return result(types.int64, rows, numbers, types.intp), codegen


def staged(function, addresses, codes, shape, strides, inputs, numbers, workers):
    """As `direct`, for arrays given by address, element code and byte strides over one common shape.

    The first `inputs` of them are read, the others written. Each of the `workers` has scratch memory of its
    own, and a share of the blocks.
    """
    n = 1
    for extent in shape:
        n *= extent
    blocks = (n + BLOCK - 1) // BLOCK
    sums = np.empty(blocks, np.float64)
    invalid = 0
    workers = min(blocks, workers)
    for worker in prange(workers):
        rows = np.empty((addresses.size, BLOCK), T)
        for b in range(worker * blocks // workers, (worker + 1) * blocks // workers):
            start = b * BLOCK
            count = min(BLOCK, n - start)
            for k in range(inputs):
                _transfer(codes[k], addresses[k], shape, strides[k], start, rows[k, :count], False)
            sums[b], wrong = call_rows(function, rows, numbers, count)
            invalid += wrong
            for k in range(inputs, addresses.size):
                _transfer(codes[k], addresses[k], shape, strides[k], start, rows[k, :count], True)
    total = 0.0
    for b in range(blocks):
        total += sums[b]
    return total, invalid


def compile_direct(parallel: bool) -> Any:
    """`direct`, for all arithmetic dtypes."""
    return bind(direct, {}, _kind(parallel), parallel, njit(nogil=True, parallel=parallel, cache=True))


def compile_staged(dtype: np.dtype, parallel: bool) -> Any:
    """`staged`, with scratch memory of one arithmetic dtype."""
    name = f"{dtype.name}_{_kind(parallel)}"
    decorate = njit(nogil=True, parallel=parallel, cache=True)
    return bind(staged, {"T": dtype.type}, name, name, decorate)


def _kind(parallel: bool) -> str:
    return "parallel" if parallel else "serial"
