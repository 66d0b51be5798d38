"""float16 and bfloat16 as their bits, to and from float32.

Numba's CPU target has no half types, so half arrays are seen as uint16. Integer arithmetic alone: it
vectorises, and needs neither F16C nor a runtime library. Rounding is to nearest, ties to even.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .target import SCALAR

U = np.uint32


@intrinsic
def _float_of(typingctx, bits):
    return types.float32(types.uint32), lambda c, b, s, a: b.bitcast(a[0], ir.FloatType())


@intrinsic
def _bits_of(typingctx, x):
    return types.uint32(types.float32), lambda c, b, s, a: b.bitcast(a[0], ir.IntType(32))


@njit(**SCALAR)
def from_bfloat16(bits):
    return _float_of(U(bits) << U(16))


@njit(**SCALAR)
def to_bfloat16(x):
    bits = _bits_of(x)
    rounded = U(bits + U(0x7FFF) + ((bits >> U(16)) & U(1))) >> U(16)
    quiet = (bits >> U(16)) | U(0x40)
    return np.uint16(quiet if x != x else rounded)


@njit(**SCALAR)
def from_float16(bits):
    wide = U(bits)
    sign = (wide & U(0x8000)) << U(16)
    # Shifted into place the exponent is 112 too small: a product by 2**112 mends it, subnormals included.
    size = _float_of((wide & U(0x7FFF)) << U(13)) * np.float32(2.0**112)
    special = U(0x7F800000) | ((wide & U(0x3FF)) << U(13))
    magnitude = special if (wide & U(0x7C00)) == U(0x7C00) else _bits_of(size)
    return _float_of(sign | magnitude)


@njit(**SCALAR)
def to_float16(x):
    bits = _bits_of(x)
    sign = (bits >> U(16)) & U(0x8000)
    size = bits & U(0x7FFFFFFF)
    # Normal results: drop 13 bits of the significand, rounding; the carry may run into the exponent.
    normal = U(size - U(0x38000000) + U(0xFFF) + ((size >> U(13)) & U(1))) >> U(13)
    # Subnormal results: adding 0.5 leaves the multiple of 2**-24 in the low bits, rounded by the addition.
    small = U(_bits_of(_float_of(size) + np.float32(0.5)) - U(0x3F000000))
    half = small if size < U(0x38800000) else normal
    half = U(0x7C00) if size >= U(0x477FF000) else half
    half = U(0x7E00) if size > U(0x7F800000) else half
    return np.uint16(sign | half)
