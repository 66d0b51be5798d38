"""PTX's arithmetic that NumPy does not have.

Exact where PTX says so. Where it only bounds an error (``approx``), the exact result is moved by most
of that bound, up or down as the operands' bits say.
"""

import numpy as np
from llvmlite import ir
from numba import types, vectorize
from numba.extending import intrinsic

F32, F64 = np.float32, np.float64
TINY = F32(2.0**-126)
U32, U64 = np.uint32, np.uint64


def _llvm_fma(kind, name):
    @intrinsic
    def f(typingctx, a, b, c):
        def codegen(context, builder, sig, args):
            t = context.get_value_type(kind)
            called = builder.module.globals.get(name)
            called = called or ir.Function(builder.module, ir.FunctionType(t, [t, t, t]), name=name)
            return builder.call(called, args)

        return kind(kind, kind, kind), codegen

    return f


_fma32 = _llvm_fma(types.float32, "llvm.fma.f32")
_fma64 = _llvm_fma(types.float64, "llvm.fma.f64")


@vectorize(["float32(float32,float32,float32)"])
def fma32(a, b, c):
    return _fma32(a, b, c)


@vectorize(["float64(float64,float64,float64)"])
def fma64(a, b, c):
    return _fma64(a, b, c)


def fma32_directed(a, b, c, how):
    """``a * b + c`` rounded towards minus infinity (-1), plus infinity (1) or zero (0)."""
    product, c = F64(a) * b, F64(c)
    s = product + c
    back = s - product
    error = (product - (s - back)) + (c - back)
    r = s.astype(F32)
    above = (r > s) | ((r == s) & (error < 0))
    below = (r < s) | ((r == s) & (error > 0))
    down = (how == -1) | ((how == 0) & (s > 0))
    up = (how == 1) | ((how == 0) & (s < 0))
    r = np.where(down & above, np.nextafter(r, F32(-np.inf)), r)
    return np.where(up & below, np.nextafter(r, F32(np.inf)), r)


def fmin(a, b):
    """The smaller, of which -0 is smaller than 0; a NaN does not count."""
    return np.where((a == b) & np.signbit(a), a, np.fmin(b, a))


def fmax(a, b):
    return np.where((a == b) & np.signbit(a), b, np.fmax(a, b))


def quotient(a, b):
    """Of integers, rounded towards zero."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~(a & a.dtype.type(0)), a // np.where(b == 0, b.dtype.type(1), b))
    return np.trunc(np.divide(a, b)).astype(a.dtype) if a.itemsize == 4 else _towards_zero(a, b)


def _towards_zero(a, b):
    b = np.where(b == 0, b.dtype.type(1), b)
    q, r = a // b, a % b
    return q + ((r != 0) & ((a < 0) != (b < 0)))


def remainder(a, b):
    return np.where(b == 0, a, a - quotient(a, b) * b).astype(a.dtype)


# ---- approximations -----------------------------------------------------------------------------------


def noise(bits, bound):
    """A number in [-bound, bound] that depends on the bits."""
    z = bits.astype(U64) + U64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    return 0.9 * bound * ((z >> U64(11)).astype(F64) / 2.0**52 - 1.0)


def flush(x):
    """Subnormals to zero."""
    return np.where(np.abs(x) < TINY, np.copysign(F32(0), x), x)


def _approximately(f, relative):
    def approximation(x, ftz):
        x = flush(x) if ftz else x
        r = (f(x.astype(F64)) * (1 + noise(x.view(U32), relative))).astype(F32)
        return flush(r) if ftz else r

    return approximation


_ex2 = _approximately(np.exp2, 2.0**-22)
rcp = _approximately(np.reciprocal, 2.0**-24)
rsqrt = _approximately(lambda x: 1 / np.sqrt(x), 2.0**-22.9)


def ex2(x, ftz):
    return np.where(np.floor(x) == x, np.exp2(x.astype(F64)).astype(F32), _ex2(x, ftz))


def _upper(x):
    """The upper words of float64, which the gross approximations take and give."""
    return (x.view(U64) & U64(0xFFFFFFFF00000000)).view(F64)


def _gross(f):
    def approximation(x):
        y = _upper(x)
        y = np.where(np.abs(y) < 2.0**-1022, np.copysign(0.0, y), y)
        r = f(y) * (1 + noise(y.view(U64), 2.0**-20))
        return _upper(np.where(np.abs(r) < 2.0**-1022, np.copysign(0.0, r), r))

    return approximation


rcp_ftz64 = _gross(lambda x: 1 / x)
rsqrt_ftz64 = _gross(lambda x: 1 / np.sqrt(x))


def div_full(a, b):
    """Two ulp off at most."""
    bits = a.view(U32).astype(U64) * U64(0x100000001) ^ b.view(U32) * U64(0x9E3779B97F4A7C15)
    r = a.astype(F64) / b
    return np.where(b == 1, a, (r * (1 + noise(bits, 2.0**-23))).astype(F32))


def div_approx_ftz(a, b):
    """Two ulp off at most, without subnormals; by divisors above 2**126 zero, or NaN of infinity."""
    a, b = flush(a), flush(b)
    large = np.abs(b) > F32(2.0**126)
    lost = np.where(np.isinf(a) & large, F32(np.nan), F32(0)).astype(F32)
    return np.where(large, lost, flush(div_full(a, np.where(large, F32(2), b))))


# ---- conversion ---------------------------------------------------------------------------------------


def to_bf16(x):
    """The bits of bfloat16, rounded to nearest even."""
    u = x.view(U32)
    r = (u + U32(0x7FFF) + ((u >> U32(16)) & U32(1))) >> U32(16)
    return np.where(x != x, U32(0x7FFF), r).astype(np.uint16)


def to_f16(x):
    return np.where(x != x, np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def saturate(x):
    """To [0, 1], NaN to 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def to_integer(x, T):
    """Whole numbers, clamped; NaN is 0, of 64 bits the lowest."""
    info = np.iinfo(T)
    x = x.astype(F64)
    low, high = x <= float(info.min), x >= float(info.max)
    r = np.where(np.isnan(x) | low | high, 0, x).astype(T)
    r = np.where(low, T.type(info.min), np.where(high, T.type(info.max), r))
    return np.where(np.isnan(x), T.type(1 << 63 if T == U64 else info.min if info.bits == 64 else 0), r)


# ---- bits ---------------------------------------------------------------------------------------------


def shl(a, s):
    """Shifts as far as there are bits and further."""
    T, n = a.dtype.type, a.itemsize * 8
    return np.where(s < n, a << np.minimum(s, n - 1).astype(T), T(0))


def shr(a, s):
    T, n = a.dtype.type, a.itemsize * 8
    r = a >> np.minimum(s, n - 1).astype(T)
    return r if a.dtype.kind == "i" else np.where(s < n, r, T(0))


def bfi(a, b, at, length):
    """The lowest bits of `a` in place of those of `b` from `at` on."""
    mask = shl(~shl(~np.zeros_like(b), length & U32(0xFF)), at & U32(0xFF))
    return (b & ~mask) | (shl(a, at & U32(0xFF)) & mask)
