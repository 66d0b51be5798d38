"""Distances between rows of vectors, and their gradients: blocks that know no loss, so all losses share them.

A sum that lost terms to overflow or underflow, or would lose its gradient, is formed again of what is scaled
by its largest magnitude.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from .. import math
from ..bind import bind
from ..math import bits, multiply_add, select, unbits
from ..spec import COSINE, LARGEST, POWER, ROOT_OF_SQUARES, SQUARES, SUM
from .native import HELPER, at_address
from .target import plus, plus_product, prefer_widest_vectors
from .vector_tiles import (
    ARRAYS,
    DISTANCES,
    EPS,
    FACTOR,
    FIELDS,
    FIRST,
    GRADIENTS,
    OTHER,
    OWN,
    PITCH,
    ROWS,
    RUN,
    SECOND,
    SIZE,
    SLOPE,
    STATE,
    Block,
    P,
    by_vector,
    inverse,
    larger,
    least,
    over_coordinates,
    scope_of,
)

# Bound by `measure` and `pull`.
T: Any = np.float32
ITEM: Any = 4
WIDE: Any = 2.0**60  # a sum above it, or below its inverse, may have lost terms, or lose its gradient
MOST: Any = float(np.finfo(np.float32).max)
KIND: Any = ROOT_OF_SQUARES
ARITY: Any = 2
SWAP: Any = False
BY0: Any = True
BY1: Any = True
BY2: Any = False
one_pull: Any = None
run: Any = None


def measure_cosine(tile_at, numbers_at):
    """1 less the cosine of the angle between rows."""
    prefer_widest_vectors()
    tile, numbers = at_address(tile_at, 0), at_address(numbers_at, 0.0)
    zero, one, wide, most = T(0), T(1), T(WIDE), T(MOST)
    eps, size, pitch = np.float64(T(numbers[EPS])), tile[SIZE], tile[PITCH]
    for k in range(tile[DISTANCES]):
        first, second = tile[ARRAYS + (k == 2)], tile[ARRAYS + 1 + (k != 0)]
        at = tile[STATE] + k * FIELDS * pitch
        value, slope = at_address(at, zero), at_address(at + SLOPE * pitch, zero)
        own, other = at_address(at + OWN * pitch, zero), at_address(at + OTHER * pitch, zero)
        rs, rys = at_address(at + FIRST * pitch, zero), at_address(at + SECOND * pitch, zero)
        for i in range(tile[ROWS]):
            x = at_address(first + i * size * ITEM, zero)
            y = at_address(second + i * size * ITEM, zero)
            r = ry = one
            again, tried = True, False
            while again:
                a = b = c = 0.0
                start = 0
                while start < size:
                    stop = least(start + RUN, size)
                    xx = yy = xy = zero
                    for j in range(start, stop):
                        u, v = x[j] * r, y[j] * ry
                        xx = plus_product(xx, u, u)
                        yy = plus_product(yy, v, v)
                        xy = plus_product(xy, u, v)
                    a += xx
                    b += yy
                    c += xy
                    start = stop
                value[i], slope[i], own[i] = T(a), T(c), T(b)
                again = not tried and not (T(a) <= wide and T(b) <= wide)
                if again:
                    tried = True
                    p = q = bits(zero)
                    for j in range(size):
                        p, q = larger(p, x[j]), larger(q, y[j])
                    r = one if T(a) <= wide else inverse(unbits(p), most)
                    ry = one if T(b) <= wide else inverse(unbits(q), most)
            rs[i], rys[i] = r, ry
        for i in range(tile[ROWS]):  # in float64, for where it is near 0
            r64, ry64 = np.float64(rs[i]), np.float64(rys[i])
            xx64 = np.float64(value[i]) + eps * r64 * r64
            yy64 = np.float64(own[i]) + eps * ry64 * ry64
            s = 1 / (math.square_root(xx64) * math.square_root(yy64))
            cosine = np.float64(slope[i]) * s
            value[i], slope[i] = T(1 - cosine), T(s)
            own[i], other[i] = T(cosine / xx64), T(cosine / yy64)
    return 0.0


def measure_differences(tile_at, numbers_at):
    """The sum of powers of the differences of rows, or its root."""
    prefer_widest_vectors()
    tile, numbers = at_address(tile_at, 0), at_address(numbers_at, 0.0)
    zero, one, wide = T(0), T(1), T(WIDE)
    p, eps, size, pitch = T(numbers[P]), T(numbers[EPS]), tile[SIZE], tile[PITCH]
    for k in range(tile[DISTANCES]):
        first, second = tile[ARRAYS + (k == 2)], tile[ARRAYS + 1 + (k != 0)]
        at = tile[STATE] + k * FIELDS * pitch
        value, slope = at_address(at, zero), at_address(at + SLOPE * pitch, zero)
        rs = at_address(at + FIRST * pitch, zero)
        for i in range(tile[ROWS]):
            x = at_address(first + i * size * ITEM, zero)
            y = at_address(second + i * size * ITEM, zero)
            r = one
            again, tried = True, False
            while again:
                whole, start = 0.0, 0
                while start < size:
                    stop = least(start + RUN, size)
                    total = zero
                    for j in range(start, stop):
                        u = x[j] - y[j] + eps
                        if KIND == SUM:
                            total = plus(total, abs(u))
                        elif KIND == POWER:
                            total = plus(total, math.power(abs(u) * r, p))
                        else:
                            v = u * r
                            total = plus_product(total, v, v)
                    whole += total
                    start = stop
                s = T(whole)
                again = False
                if KIND == ROOT_OF_SQUARES or KIND == POWER:  # noqa: SIM109
                    again = not tried and not (s <= wide and s * wide >= one)
                    if again:
                        tried = True
                        m = bits(zero)
                        for j in range(size):
                            m = larger(m, x[j] - y[j] + eps)
                        r = inverse(unbits(m), T(MOST))
            value[i], rs[i] = s, r
        for i in range(tile[ROWS]):
            if KIND == SUM:
                slope[i] = one
            elif KIND == SQUARES:
                slope[i] = T(2)
            else:
                s = value[i]
                root = math.square_root(s) if KIND == ROOT_OF_SQUARES else math.power(s, one / p)
                value[i], slope[i] = root / rs[i], select(s == zero, zero, root / s)
    return 0.0


def measure_largest(tile_at, numbers_at):
    """The largest difference of rows; its slope is shared by those that are as large."""
    prefer_widest_vectors()
    tile, numbers = at_address(tile_at, 0), at_address(numbers_at, 0.0)
    zero, one = T(0), T(1)
    eps, size, pitch = T(numbers[EPS]), tile[SIZE], tile[PITCH]
    for k in range(tile[DISTANCES]):
        first, second = tile[ARRAYS + (k == 2)], tile[ARRAYS + 1 + (k != 0)]
        at = tile[STATE] + k * FIELDS * pitch
        value, slope = at_address(at, zero), at_address(at + SLOPE * pitch, zero)
        rs = at_address(at + FIRST * pitch, zero)
        for i in range(tile[ROWS]):
            x = at_address(first + i * size * ITEM, zero)
            y = at_address(second + i * size * ITEM, zero)
            m = bits(zero)
            for j in range(size):
                m = larger(m, x[j] - y[j] + eps)
            largest, count = unbits(m), zero
            for j in range(size):
                count = plus(count, select(abs(x[j] - y[j] + eps) == largest, one, zero))
            value[i], rs[i] = largest, one
            slope[i] = largest if count == zero else one / count  # none is as large as a NaN
    return 0.0


@njit(**HELPER)
def pull_of_cosine(a, b, by, k, r, old):
    """Add to a gradient that by a vector, of a coordinate scaled by `r`, and of the other vector's."""
    return multiply_add(multiply_add(by, a, -(k * b)), r, old)


def run_of_cosines(vectors, gradients, near, far, third, size):
    """The gradients of one row's vectors, through the angles between them."""
    prefer_widest_vectors()
    x, y, z = vectors
    g0, g1, g2 = gradients
    zero = T(0)
    k0, own0, other0, r0, s0, live0 = near
    k1, own1, other1, r1, s1, live1 = far
    k2, own2, other2, r2, s2, live2 = third
    for j in range(size):
        a, b = x[j] * r0, y[j] * s0
        if BY0:
            d0 = select(live0, multiply_add(own0, a, -(k0 * b)) * r0, zero)
            if ARITY == 3:
                d0 = select(live1, pull_of_cosine(x[j] * r1, z[j] * s1, own1, k1, r1, d0), d0)
            g0[j] = d0
        if BY1:
            d1 = select(live0, multiply_add(other0, b, -(k0 * a)) * s0, zero)
            if SWAP:
                d1 = select(live2, pull_of_cosine(y[j] * r2, z[j] * s2, own2, k2, r2, d1), d1)
            g1[j] = d1
        if BY2:
            c = z[j] * s1
            d2 = select(live1, multiply_add(other1, c, -(k1 * (x[j] * r1))) * s1, zero)
            if SWAP:
                d2 = select(live2, pull_of_cosine(z[j] * s2, y[j] * r2, other2, k2, s2, d2), d2)
            g2[j] = d2


@njit(**HELPER)
def angle(at, pitch, i, zero):
    """A row's factors and scales of one cosine's gradients, and whether there are any."""
    factor = at_address(at + FACTOR * pitch, zero)[i]
    k = factor * at_address(at + SLOPE * pitch, zero)[i]
    own = factor * at_address(at + OWN * pitch, zero)[i]
    other = factor * at_address(at + OTHER * pitch, zero)[i]
    r, s = at_address(at + FIRST * pitch, zero)[i], at_address(at + SECOND * pitch, zero)[i]
    return k, own, other, r, s, factor != zero


def pull_cosine(tile_at, numbers_at):
    """The gradients of a tile's vectors, by the angles between them."""
    tile, zero = at_address(tile_at, 0), T(0)
    pitch, width = tile[PITCH], tile[SIZE] * ITEM
    for i in range(tile[ROWS]):
        near = angle(tile[STATE], pitch, i, zero)
        far = angle(tile[STATE] + FIELDS * pitch, pitch, i, zero) if ARITY == 3 else near
        third = angle(tile[STATE] + 2 * FIELDS * pitch, pitch, i, zero) if SWAP else near
        x = at_address(tile[ARRAYS] + i * width, zero)
        y = at_address(tile[ARRAYS + 1] + i * width, zero)
        z = at_address(tile[ARRAYS + 2] + i * width, zero) if ARITY == 3 else y
        g0 = at_address(tile[ARRAYS + GRADIENTS] + i * width, zero)
        g1 = at_address(tile[ARRAYS + GRADIENTS + 1] + i * width, zero)
        g2 = at_address(tile[ARRAYS + GRADIENTS + 2] + i * width, zero)
        run((x, y, z), (g0, g1, g2), near, far, third, tile[SIZE])
    return 0.0


def pull_of_difference(x, y, by, eps, p):
    """The gradient by the first of two coordinates; that by the second is its negative."""
    k, m, r, live = by
    zero = T(0)
    u = x - y + eps
    if KIND == SUM:
        t = k * math.sign(u)
    elif KIND == LARGEST:
        t = select(abs(u) < m, zero, k * math.sign(u))
    elif KIND == POWER:
        v = u * r
        power = math.power(abs(v), p - T(1))
        t = select(v == zero, zero, k * math.sign(v) * power)
    else:
        t = k * (u * r)
    return select(live, t, zero)


def run_of_differences(vectors, gradients, near, far, third, eps, p, size):
    """The gradients of one row's vectors, through the differences between them."""
    prefer_widest_vectors()
    x, y, z = vectors
    g0, g1, g2 = gradients
    for j in range(size):
        t = one_pull(x[j], y[j], near, eps, p)
        if ARITY == 2:
            if BY0:
                g0[j] = t
            if BY1:
                g1[j] = -t
        else:
            u = one_pull(x[j], z[j], far, eps, p)
            if BY0:
                g0[j] = t + u
            if SWAP:
                s = one_pull(y[j], z[j], third, eps, p)
                if BY1:
                    g1[j] = s - t
                if BY2:
                    g2[j] = -u - s
            else:
                if BY1:
                    g1[j] = -t
                if BY2:
                    g2[j] = -u


@njit(**HELPER)
def length(at, pitch, i, zero):
    """A row's factor, value and scale of one distance's gradients, and whether there are any."""
    factor = at_address(at + FACTOR * pitch, zero)[i]
    k = factor * at_address(at + SLOPE * pitch, zero)[i]
    return k, at_address(at, zero)[i], at_address(at + FIRST * pitch, zero)[i], factor != zero


def pull_differences(tile_at, numbers_at):
    """The gradients of a tile's vectors, by the differences between them."""
    prefer_widest_vectors()
    tile, numbers, zero = at_address(tile_at, 0), at_address(numbers_at, 0.0), T(0)
    p, eps, pitch, width = T(numbers[P]), T(numbers[EPS]), tile[PITCH], tile[SIZE] * ITEM
    for i in range(tile[ROWS]):
        near = length(tile[STATE], pitch, i, zero)
        far = length(tile[STATE] + FIELDS * pitch, pitch, i, zero) if ARITY == 3 else near
        third = length(tile[STATE] + 2 * FIELDS * pitch, pitch, i, zero) if SWAP else near
        x = at_address(tile[ARRAYS] + i * width, zero)
        y = at_address(tile[ARRAYS + 1] + i * width, zero)
        z = at_address(tile[ARRAYS + 2] + i * width, zero) if ARITY == 3 else y
        g0 = at_address(tile[ARRAYS + GRADIENTS] + i * width, zero)
        g1 = at_address(tile[ARRAYS + GRADIENTS + 1] + i * width, zero)
        g2 = at_address(tile[ARRAYS + GRADIENTS + 2] + i * width, zero)
        run((x, y, z), (g0, g1, g2), near, far, third, eps, p, tile[SIZE])
    return 0.0


# ---- blocks -------------------------------------------------------------------------------------------


@cache
def measure(kind: int, dtype: np.dtype) -> Block:
    """Return the block that measures distances of one kind."""
    template = {COSINE: measure_cosine, LARGEST: measure_largest}.get(kind, measure_differences)
    return Block(template, scope_of(dtype, KIND=kind), dtype.name, (kind, dtype.name))


@cache
def pull(kind: int, distances: int, wrt: tuple[int, ...], dtype: np.dtype) -> Block:
    """Return the block that gives the gradients of vectors through 1 to 3 distances; with a swap 3."""
    identity = kind, distances, wrt, dtype.name
    arity, swap = (2, False) if distances == 1 else (3, distances == 3)
    scope = scope_of(dtype, KIND=kind, ARITY=arity, SWAP=swap, **by_vector(wrt))
    if kind != COSINE:
        scope["one_pull"] = bind(pull_of_difference, scope, dtype.name, identity, njit(**HELPER))
    loop = run_of_cosines if kind == COSINE else run_of_differences
    scope["run"] = over_coordinates(loop, scope, dtype.name, identity)
    return Block(pull_cosine if kind == COSINE else pull_differences, scope, dtype.name, identity)
