"""Definitions of losses of vectors: `terms` of a coordinate, summed over a row, and `finish` of the sums.

Both are differentiated by jets: one for each sum, and one for each vector.
"""

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .. import math
from ..freeze import fingerprint
from ..lift import lift_bend, lift_finish, lift_row_bend, lift_terms
from ..math import bits, select
from ..spec import VectorFunctions, VectorRequest
from .native import HELPER, at_address
from .target import derivatives, prefer_widest_vectors
from .vector_tiles import (
    ARRAYS,
    CURVATURE,
    FACTOR,
    FIELDS,
    GRADIENTS,
    OPTIONS,
    PITCH,
    ROW_ARRAYS,
    ROW_GRADIENTS,
    ROWS,
    RUN,
    SCALE,
    SIZE,
    STATE,
    TERMS,
    UPSTREAM,
    VALUE,
    WEIGHT,
    Block,
    by_vector,
    larger,
    least,
    over_coordinates,
    scope_of,
)
from .vector_tuples import (
    gradients_of,
    moderate,
    narrow_each,
    plus_each,
    reader,
    row_reader,
    row_writer,
    weigh,
    widen_each,
    writer,
    zeros_of,
)

# Bound by `measure`, `conclusion` and `pull`.
T: Any = np.float32
ITEM: Any = 4
WIDE: Any = 2.0**60  # a sum above it, or below its inverse, may have lost terms, or lose its gradient
ARITY: Any = 2
SUMS: Any = 1
ROW_COUNT: Any = 0
SWAP: Any = False
DERIVED: Any = True
BY0: Any = True
BY1: Any = True
BY2: Any = False
CURVED: Any = False  # whether the second derivative by a vector is asked for
ROW_CURVED: Any = False  # by a row array
HAS_LENGTHS: Any = False  # whether options are lengths,
LENGTHS: Any = (0,)  # and where these are among the numbers
SCALED: Any = False  # whether rows are scaled where their sums would overflow or underflow
DEGREE: Any = 0  # a row's value goes with this power of the scale
stretch: Any = None
options: Any = None
terms: Any = None
at0: Any = None
at1: Any = None
at2: Any = None
bend: Any = None
row_bend: Any = None
finish: Any = None
read_numbers: Any = None
read_factors: Any = None
read_rows: Any = None
write_numbers: Any = None
write_factors: Any = None
write_row_gradients: Any = None
zeros: Any = None
run: Any = None


@intrinsic
def power_of_two(typingctx, key, like):
    """A power of two that scales a magnitude, given by its bits, to about 1; 1 for infinity and NaN."""
    mantissa, top = (23, 255) if like == types.float32 else (52, 2047)

    def codegen(context, builder, sig, args):
        kind = args[0].type
        one, two, last = (ir.Constant(kind, k) for k in (1, top - 1, top))
        field = builder.lshr(args[0], ir.Constant(kind, mantissa))
        field = builder.select(builder.icmp_signed("<", field, one), one, field)
        e = builder.sub(two, field)
        e = builder.select(builder.icmp_signed("<", e, one), one, e)
        e = builder.select(builder.icmp_signed("==", field, last), ir.Constant(kind, top // 2), e)
        return builder.bitcast(builder.shl(e, ir.Constant(kind, mantissa)), args[1].type)

    return like(key, like), codegen


@njit(**HELPER)
def rescaled(x, r, power):
    """x * r**power, for a power of -2 to 2."""
    s = type(r)(1) / r if power < 0 else r
    x = x * s if power != 0 else x
    return x * s if power * power == 4 else x


def measure_terms(tile_at, numbers_at):
    """The sums of a definition's terms over rows."""
    prefer_widest_vectors()
    tile, zero = at_address(tile_at, 0), T(0)
    o = options(at_address(numbers_at, 0.0), zero)
    size, width = tile[SIZE], tile[SIZE] * ITEM
    for i in range(tile[ROWS]):
        x = at_address(tile[ARRAYS] + i * width, zero)
        y = at_address(tile[ARRAYS + 1] + i * width, zero)
        z = at_address(tile[ARRAYS + 2] + i * width, zero) if ARITY == 3 else y
        r, stretched = T(1), o
        again, tried = True, False
        while again:
            whole, start = zeros(0.0), 0
            while start < size:
                stop = least(start + RUN, size)
                total = zeros(zero)
                for j in range(start, stop):
                    if SCALED:
                        a, b, c = x[j] * r, y[j] * r, z[j] * r
                        total = plus_each(total, terms(a, b, c, stretched))
                    else:
                        total = plus_each(total, terms(x[j], y[j], z[j], o))
                whole = widen_each(whole, total)
                start = stop
            sums = narrow_each(whole, zeros(zero))
            again = False
            if SCALED:
                again = not tried and not moderate(sums, T(WIDE))
                if again:
                    tried = True
                    m = bits(zero)
                    if HAS_LENGTHS:  # which must not become infinite where vectors are tiny
                        for k in range(len(LENGTHS)):
                            m = larger(m, T(at_address(numbers_at, 0.0)[LENGTHS[k]]) / T(WIDE))
                    for j in range(size):
                        m = larger(larger(larger(m, x[j]), y[j]), z[j])
                    r = power_of_two(m, zero)
                    stretched = stretch(o, r)
        write_numbers(tile[STATE] + i * ITEM, tile[PITCH], sums)
        if SCALED:
            at_address(tile[STATE] + i * ITEM + (2 * SUMS + 1) * tile[PITCH], zero)[0] = r
    return 0.0


@intrinsic
def row_number(typingctx, address, i, like):
    """A row's number in an optional array: 1 where there is none."""

    def codegen(context, builder, sig, args):
        kind = args[2].type
        out = cgutils.alloca_once_value(builder, ir.Constant(kind, 1))
        with builder.if_then(builder.icmp_signed("!=", args[0], ir.Constant(args[0].type, 0))):
            x = builder.gep(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
            builder.store(builder.load(x), out)
        return builder.load(out)

    return like(types.int64, types.int64, like), codegen


def conclude(tile_at, numbers_at):
    """The values of a tile's rows, and the factors of their gradients; the sum of the values."""
    tile, numbers = at_address(tile_at, 0), at_address(numbers_at, 0.0)
    zero, half, one = T(0), T(0.5), T(1)
    o, scale, pitch = options(numbers, zero), T(numbers[SCALE]), tile[PITCH]
    last = ARRAYS + ROW_ARRAYS + ROW_COUNT
    weights, upstream, values = tile[last + WEIGHT], tile[last + UPSTREAM], tile[last + TERMS]
    total = 0.0
    for i in range(tile[ROWS]):
        state = tile[STATE] + i * ITEM
        weight = row_number(weights, i, zero)
        sums = read_numbers(state, pitch, zero)
        share = one
        if SWAP:
            far, third = sums[1], at_address(state + (2 * FIELDS + VALUE) * pitch, zero)[0]
            share = one if far < third else half if far == third else zero
            sums = (sums[0], math.minimum(far, third))
        rows, r, stretched = read_rows(tile, i, zero), one, o
        if SCALED:
            r = at_address(state + (2 * SUMS + 1) * pitch, zero)[0]
            stretched = stretch(o, r)
        value, slopes = finish(sums + rows, stretched)
        if SCALED:
            value = rescaled(value, r, -DEGREE)
        live = weight != zero
        value = weight * value if live else zero
        total += value
        if values:
            at_address(values + i * ITEM, zero)[0] = value
        if DERIVED:
            factor = scale * row_number(upstream, i, zero) * weight if live else zero
            row_factor = rescaled(factor, r, -DEGREE) if SCALED else factor
            if ROW_CURVED:  # before a gradient may overwrite what it is of
                curve = row_bend(sums + rows, stretched)
                curve = curve * row_factor if row_factor != zero else zero
                at_address(tile[ARRAYS + CURVATURE] + i * ITEM, zero)[0] = curve
            write_row_gradients(tile, i * ITEM, gradients_of(slopes, row_factor))
            found = gradients_of(slopes, rescaled(factor, r, 1 - DEGREE) if SCALED else factor)
            if SCALED:
                factor = rescaled(factor, r, 2 - DEGREE)
            if SWAP:
                far_factor = found[1]
                write_factors(state, pitch, (found[0], far_factor * share, far_factor * (one - share)))
            else:
                write_factors(state, pitch, found)
            if CURVED:
                at_address(state + 2 * SUMS * pitch, zero)[0] = factor
    return total


def run_of_terms(vectors, gradients, factors, o, r, size):
    """The gradients of one row's vectors, through the sums of a definition's terms."""
    x, y, z = vectors
    g0, g1, g2 = gradients
    for j in range(size):
        a, b, c = x[j], y[j], z[j]
        if SCALED:
            a, b, c = a * r, b * r, c * r
        if BY0:
            g0[j] = weigh(factors, at0(a, b, c, o)[0])
        if BY1:
            g1[j] = weigh(factors, at1(a, b, c, o)[0])
        if BY2:
            g2[j] = weigh(factors, at2(a, b, c, o)[0])


def run_of_curves(vectors, outs, state, rows, o, r, size):
    """The gradient of one row's one vector, and the second derivatives by its coordinates."""
    x, y, z = vectors
    g, h = outs
    sums, factors, factor = state
    zero = T(0)
    for j in range(size):
        a, b, c = x[j], y[j], z[j]
        if SCALED:
            a, b, c = a * r, b * r, c * r
        slopes, curvatures = at0(a, b, c, o)
        g[j] = weigh(factors, slopes)
        h[j] = select(factor == zero, zero, factor * bend(sums, slopes, curvatures, rows, o))


def pull_terms(tile_at, numbers_at):
    """The gradients of a tile's vectors, of its rows' factors."""
    prefer_widest_vectors()
    tile, zero = at_address(tile_at, 0), T(0)
    o = options(at_address(numbers_at, 0.0), zero)
    size, pitch, width = tile[SIZE], tile[PITCH], tile[SIZE] * ITEM
    for i in range(tile[ROWS]):
        x = at_address(tile[ARRAYS] + i * width, zero)
        y = at_address(tile[ARRAYS + 1] + i * width, zero)
        z = at_address(tile[ARRAYS + 2] + i * width, zero) if ARITY == 3 else y
        factors = read_factors(tile[STATE] + i * ITEM, pitch, zero)
        r, stretched = T(1), o
        if SCALED:
            r = at_address(tile[STATE] + i * ITEM + (2 * SUMS + 1) * pitch, zero)[0]
            stretched = stretch(o, r)
        if CURVED:
            by = 0 if BY0 else 1 if BY1 else 2
            g = at_address(tile[ARRAYS + GRADIENTS + by] + i * width, zero)
            h = at_address(tile[ARRAYS + CURVATURE] + i * width, zero)
            sums = read_numbers(tile[STATE] + i * ITEM, pitch, zero)
            factor = at_address(tile[STATE] + i * ITEM + 2 * SUMS * pitch, zero)[0]
            state = sums, factors, factor
            run((x, y, z), (g, h), state, read_rows(tile, i, zero), stretched, r, size)
        else:
            g0 = at_address(tile[ARRAYS + GRADIENTS] + i * width, zero)
            g1 = at_address(tile[ARRAYS + GRADIENTS + 1] + i * width, zero)
            g2 = at_address(tile[ARRAYS + GRADIENTS + 2] + i * width, zero)
            run((x, y, z), (g0, g1, g2), factors, stretched, r, size)
    return 0.0


# ---- blocks -------------------------------------------------------------------------------------------


def identity_of(f: VectorFunctions, *more: Any) -> tuple[Any, ...]:
    """Return all that a definition's blocks depend on beside their templates."""
    digest = f.terms and fingerprint(f.terms)
    return (f.arity, digest, fingerprint(f.finish), *f[4:], *more)


def _sums_of(f: VectorFunctions) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where a row's state has the sums, and where it has their factors."""
    if f.terms is None:
        return tuple(range(0, f.sums * FIELDS, FIELDS)), tuple(range(FACTOR, f.sums * FIELDS, FIELDS))
    return tuple(range(f.sums)), tuple(range(f.sums, 2 * f.sums))


def fields(f: VectorFunctions) -> int:
    """Return how many numbers a row's state has: sums, their factors, the row's factor and scale."""
    return 2 * f.sums + 2


def _options(f: VectorFunctions) -> dict[str, Any]:
    """Return the names that blocks of a definition are bound to for its options and its scale."""
    jets, is_scaled = derivatives(), f.homogeneous is not None
    flags = f.flags or (None,) * len(f.options)
    given = [n for n, flag in zip(f.options, flags, strict=True) if flag is None]
    return dict(
        options=jets.options(flags, start=OPTIONS),
        SUMS=f.sums,
        SCALED=is_scaled,
        DEGREE=f.homogeneous or 0,
        stretch=jets.stretch(tuple(n in f.lengths for n in f.options)) if is_scaled else None,
        HAS_LENGTHS=bool(f.lengths),
        LENGTHS=tuple(OPTIONS + given.index(n) for n in f.lengths) or (0,),
    )


@cache
def measure(f: VectorFunctions, dtype: np.dtype) -> Block:
    """Return the block that adds up a definition's terms."""
    scope = scope_of(
        dtype,
        ARITY=f.arity,
        **_options(f),
        terms=lift_terms(f, derivatives(), None),
        zeros=zeros_of(f.sums),
        write_numbers=writer(tuple(range(f.sums))),
    )
    return Block(measure_terms, scope, f.name, identity_of(f, dtype.name))


@cache
def conclusion(f: VectorFunctions, request: VectorRequest, swap: bool, dtype: np.dtype) -> Block:
    """Return the block that makes values and factors of a definition's sums."""
    derived = bool(request.wrt or request.row_wrt)
    sums, factors = _sums_of(f)
    if swap:
        factors = (*factors, factors[-1] + FIELDS)
    variables = (*range(f.sums), *(f.sums + k for k in request.row_wrt)) if derived else ()
    chosen = tuple((k, f.sums + n) for n, k in enumerate(request.row_wrt))
    slot = ARRAYS + ROW_ARRAYS + len(f.row_arrays) + ROW_GRADIENTS
    by_row = request.curvature and bool(request.row_wrt)
    scope = scope_of(
        dtype,
        SWAP=swap,
        DERIVED=derived,
        CURVED=request.curvature and not by_row,
        ROW_CURVED=by_row,
        ROW_COUNT=len(f.row_arrays),
        **_options(f),
        finish=lift_finish(f, derivatives(), variables),
        row_bend=lift_row_bend(f, derivatives(), request.row_wrt[0]) if by_row else None,
        read_numbers=reader(sums),
        write_factors=writer(factors),
        read_rows=row_reader(request.integers, dtype.itemsize),
        write_row_gradients=row_writer(chosen, slot),
    )
    identity = identity_of(f, derived, request.row_wrt, request.curvature, request.integers, swap, dtype.name)
    return Block(conclude, scope, f.name, identity)


@cache
def pull(f: VectorFunctions, request: VectorRequest, dtype: np.dtype) -> Block:
    """Return the block that gives the gradients of vectors through a definition's terms."""
    identity = identity_of(f, tuple(request), dtype.name)
    sums, factors = _sums_of(f)
    lifted = {k: lift_terms(f, derivatives(), k) for k in request.wrt}
    scope = scope_of(
        dtype,
        ARITY=f.arity,
        CURVED=request.curvature,
        **_options(f),
        at0=lifted.get(0),
        at1=lifted.get(1),
        at2=lifted.get(2),
        read_numbers=reader(sums),
        read_factors=reader(factors),
        read_rows=row_reader(request.integers, dtype.itemsize),
        **by_vector(request.wrt),
    )
    if request.curvature:
        scope |= dict(at0=lifted[request.wrt[0]], bend=lift_bend(f, derivatives()))
    loop = run_of_curves if request.curvature else run_of_terms
    scope["run"] = over_coordinates(loop, scope, f.name, identity)
    return Block(pull_terms, scope, f.name, identity)
