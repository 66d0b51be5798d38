"""Scalar mathematics for losses: plain NumPy when called from Python, SIMD polynomials inside Numba.

Every public function is ordinary Python, so a loss can be read and run undecorated. In code compiled for
the CPU, floats take the implementations below, one text for float32 and float64: branch-free, free of
libm, in the argument's own precision, so LLVM vectorises the loop around them. `sin`, `cos`, `tan`, `arctan`,
`erf` and the float64 `power` call libm and do not vectorise. An integer counts as float64, beside a float
as that float. Other targets and types bring overloads of the same public names.

Largest errors seen, in ulp: over all 2**32 inputs for float32 (from `sqrt` on samples), over samples for
float64; tests/test_math.py holds them to bounds, a quarter higher on processors that do not fuse a product
and a sum (SSE4.2):

    ===========  =======  =======
    function     float32  float64
    ===========  =======  =======
    exp          0.92     0.9
    expm1        1.54     1.9
    log          0.94     1.3
    log1p        1.55     1.8
    sigmoid      2.41     2.3
    softplus     1.88     1.8
    log_sigmoid  1.88     1.8
    tanh         2.57     2.6
    sqrt         0.50     0.5
    lgamma       2.60     2.5
    digamma      4.48     2.6
    sinh         2.19     2.3
    cosh         1.50     1.5
    arcsin       2.33     2.1
    arccos       1.76     1.9
    arctan2      0.97     1.1
    arcsinh      1.71     2.1
    arccosh      2.05     2.5
    arctanh      1.98     2.3
    erfc         4.68     4.3
    log_ndtr     5.45     5.1
    log1mexp     1.76     2.4
    logaddexp    2.02     1.9
    ===========  =======  =======

Those of `lgamma` and `digamma` are for x > 0, close to their zeros too. For x < 0 the errors seen are 5.2 and
7.2, in ulp of the largest of 1, f(x) and f(1 - x), as reflection subtracts. Those of `logaddexp` are in
ulp of the largest of its arguments and its result, which may be nearly 0.
"""

import math as libm
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .compiler import Linked

# `reassoc` would cancel rounding constants and two-part constants, `nsz` would lose -0.0, `nnan` and
# `ninf` would delete the handling of special values, and `contract` would fuse a product and a sum or not by
# what else uses the product: fused are those that say `multiply_add`. Flags travel with the instruction, so a
# caller's loop may be compiled with more.
STRICT: dict[str, Any] = {
    "forceinline": True,
    "fastmath": False,  # what is not said is taken from the caller
    "error_model": "numpy",
    "no_cpython_wrapper": True,  # nobody calls these from Python: two functions less for each
    "no_cfunc_wrapper": True,
    "pipeline_class": Linked,
}


# Public functions, as plain Python.


def exp(x):
    """e**x."""
    return np.exp(x)


def expm1(x):
    """e**x - 1, accurate near 0."""
    return np.expm1(x)


def log(x):
    """Natural logarithm."""
    return np.log(x)


def log1p(x):
    """log(1 + x), accurate near 0."""
    return np.log1p(x)


def sigmoid(x):
    """1 / (1 + e**-x)."""
    return np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))


def softplus(x):
    """log(1 + e**x)."""
    return np.logaddexp(0, x)


def log_sigmoid(x):
    """log(sigmoid(x))."""
    return -np.logaddexp(0, -x)


def tanh(x):
    """Hyperbolic tangent."""
    return np.tanh(x)


def sqrt(x):
    """Square root."""
    return np.sqrt(x)


def sinh(x):
    """Hyperbolic sine."""
    return np.sinh(x)


def cosh(x):
    """Hyperbolic cosine."""
    return np.cosh(x)


def sin(x):
    """Sine of radians."""
    return np.sin(x)


def cos(x):
    """Cosine of radians."""
    return np.cos(x)


def arctan(x):
    """Inverse tangent in radians."""
    return np.arctan(x)


def tan(x):
    """Tangent of radians."""
    return np.tan(x)


def arcsin(x):
    """Inverse sine in radians."""
    return np.arcsin(x)


def arccos(x):
    """Inverse cosine in radians."""
    return np.arccos(x)


def arcsinh(x):
    """Inverse hyperbolic sine."""
    return np.arcsinh(x)


def arccosh(x):
    """Inverse hyperbolic cosine, not negative."""
    return np.arccosh(x)


def arctanh(x):
    """Inverse hyperbolic tangent."""
    return np.arctanh(x)


def arctan2(y, x):
    """The angle of the point (x, y) in radians, from -pi to pi; its slopes at the origin are 0."""
    return np.arctan2(y, x)


def erf(x):
    """Error function."""
    x = np.asarray(x)  # a number, too, has a dtype
    return np.vectorize(libm.erf, otypes=[np.result_type(x, np.float16)])(x)[()]


def erfc(x):
    """1 - erf(x), accurate where that is small."""
    return plain("erfc", x)


def erfc_slope(x):
    """Derivative of erfc; in definitions for slopes only, as it has none itself."""
    return plain("erfc_slope", x)


def log_ndtr(x):
    """Logarithm of the standard normal distribution's probability below x, accurate in both tails."""
    return plain("log_ndtr", x)


def log_ndtr_slope(x):
    """Derivative of log_ndtr; in definitions for slopes only, as it has none itself."""
    return plain("log_ndtr_slope", x)


def log_ndtr_bend(x):
    """Second derivative of log_ndtr; in definitions for slopes only, as it has none itself."""
    return plain("log_ndtr_bend", x)


def log1mexp(x):
    """log(1 - e**-x) for x >= 0, accurate near 0 and far from it, as `jax.nn.log1mexp`; NaN for x < 0."""
    return plain("log1mexp", x)


def logaddexp(x, y):
    """log(e**x + e**y); of two equal infinities that infinity, with slopes of 1/2."""
    return np.logaddexp(x, y)


def lgamma(x):
    """Logarithm of the gamma function's magnitude; infinity at the poles."""
    return plain("lgamma", x)


def digamma(x):
    """Derivative of lgamma; NaN at the poles but 0."""
    return plain("digamma", x)


def trigamma(x):
    """Derivative of digamma; in definitions for slopes only, as it has none itself."""
    return plain("trigamma", x)


def tetragamma(x):
    """Derivative of trigamma; in definitions for slopes only, as it has none itself."""
    return plain("tetragamma", x)


def power(x, y):
    """x**y."""
    return np.power(x, y)


def powers(x, y, y1, y2):
    """x**y, x**y1 and x**y2: of one logarithm where powers are made of that."""
    return np.power(x, y), np.power(x, y1), np.power(x, y2)


def xlogy(x, y):
    """x * log(y), and 0 where x is 0 unless y is NaN."""
    y = np.where((x == 0) & (y == y), 1, y)
    return x * np.log(y)


def maximum(x, y):
    """The larger, NaN if either is."""
    return np.maximum(x, y)


def minimum(x, y):
    """The smaller, NaN if either is."""
    return np.minimum(x, y)


def where(c, a, b):
    """a where c holds, else b; both are evaluated."""
    return np.where(c, a, b)[()]


def sign(x):
    """-1, 0 or 1; NaN for NaN."""
    return np.sign(x)


def square(x):
    """x * x."""
    return np.square(x)


def floor(x):
    """The largest whole number that is not larger; its slope is 0."""
    return np.floor(x)


def stop_gradient(x):
    """x itself, whose slopes count as 0: derivatives take it for a constant."""
    return x


def isnan(x):
    """Whether x is not a number."""
    return np.isnan(x)


# CPU only: instructions that Numba does not offer.


@intrinsic
def bits(context, x):
    """The bits of a float as an integer of its width."""
    kind = {types.float32: types.int32, types.float64: types.int64}[x]
    return kind(x), lambda c, b, s, a: b.bitcast(a[0], c.get_value_type(s.return_type))


@intrinsic
def unbits(context, i):
    """The float that has the bits of an integer."""
    kind = {types.int32: types.float32, types.int64: types.float64}[i]
    return kind(i), lambda c, b, s, a: b.bitcast(a[0], c.get_value_type(s.return_type))


@intrinsic
def select(context, c, a, b):
    """a if c else b, as one instruction: a conditional expression may stay a branch, which stops SIMD."""
    return a(types.boolean, a, a), lambda c, b, s, a: b.select(*a)


@intrinsic
def square_root(context, x):
    """Square root; through libm's name it would also call libm, for errno."""

    def emit(context, builder, signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.sqrt", [args[0].type]), args)

    return x(x), emit


@intrinsic
def copysign(context, x, s):
    """The magnitude of x with the sign of s."""

    def emit(context, builder, signature, args):
        kind = args[0].type
        function = builder.module.declare_intrinsic(
            "llvm.copysign", [kind], ir.FunctionType(kind, [kind] * 2)
        )
        return builder.call(function, args)

    return x(x, x), emit


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once on each processor that has such an instruction, twice on any other."""
    kind = a.type
    muladd = builder.module.declare_intrinsic("llvm.fmuladd", [kind], ir.FunctionType(kind, [kind] * 3))
    return builder.call(muladd, [a, b, c])


@intrinsic
def multiply_add(context, a, b, c):
    """a * b + c, rounded once on each processor that has such an instruction, twice on any other."""
    return a(a, a, a), lambda context, builder, signature, args: fused(builder, *args)


@intrinsic
def polynomial(context, x, coefficients):
    """Horner's scheme, lowest coefficient first, unrolled here so that it never becomes a loop."""

    def emit(context, builder, signature, args):
        x, terms = args[0], cgutils.unpack_tuple(builder, args[1])
        y = terms[-1]
        for c in terms[-2::-1]:
            y = fused(builder, y, x, c)
        return y

    return x(x, coefficients), emit


@intrinsic
def polynomial_in_parallel(context, x, coefficients):
    """Estrin's scheme, lowest coefficient first: pairs of terms, then pairs of those, each by a fused step.

    For numbers that are computed one at a time: it takes a few steps' time where Horner's takes one for each
    coefficient.
    """

    def emit(context, builder, signature, args):
        x, terms = args[0], cgutils.unpack_tuple(builder, args[1])
        while len(terms) > 1:
            pairs = [fused(builder, b, x, a) for a, b in zip(terms[::2], terms[1::2], strict=False)]
            terms = pairs + terms[len(terms) // 2 * 2 :]
            x = builder.fmul(x, x)
        return terms[0]

    return x(x, coefficients), emit


# CPU only: the vectorisable functions.


@dataclass(frozen=True)
class Format:
    """What the functions need to know of a floating-point format.

    The polynomials are minimax fits of our own, their error relative to the function: by linear programming,
    each coefficient rounded in turn, lowest first, and the rest fitted again (float32); by Remez exchange in
    50 digits, then rounded (float64; `log1p_unit` in turn too). They are
    p in e**r = 1 + r + r**2 * p(r) for |r| <= log(2) / 2, and log(1 + m) = m + m**2 * p(m) for |m| <= 1/3
    (`log_near_1`) and for 0 <= m <= 1 (`log1p_unit`). Those of the gamma function, of u - 3/4 for
    0 <= u <= 3/2, are Chebyshev's interpolations in 60 digits (mpmath's `chebyfit`), then rounded:
    lgamma(1 + u) = u * (u - 1) * p and digamma(1 + u) = (u - root) * p. By linear programming (float32) and
    by Chebyshev's interpolation (float64): of the normal distribution's hazard, its density at t >= 0 over
    the probability above t, (hazard(t) - t) * (t + 5/4) = sqrt(2 / pi) * 5/4 + w * p(w - 1) with
    w = 2 * t / (t + 7/2); arctan(r) = r + r**3 * p(r**2) for 0 <= r <= 1.
    """

    float: type
    int: type
    mantissa: Any  # bits of it that are stored
    bias: Any  # of the exponent
    exp_range: tuple  # beyond it e**x is 0 or infinity
    log2: tuple  # log(2) as a part with trailing zeros, so that its multiples are exact, and the rest
    tanh_one: Any  # from here on tanh rounds to 1
    exp: tuple
    log_near_1: tuple
    log1p_unit: tuple
    series: Any  # terms of Stirling's series, from 9 on
    sine: Any  # terms of the sine's series, up to a quarter turn
    lgamma_near_2: tuple
    digamma_near_2: tuple
    normal: tuple  # from where on e**-(x**2 / 2) is 0; how many bits behind the point x keeps to be squared
    hazard: tuple
    arctan: tuple


SINGLE = Format(
    float=np.float32,
    int=np.int32,
    mantissa=23,
    bias=127,
    exp_range=(-104.0, 89.0),
    log2=(0.693359375, -2.12194440e-4),
    tanh_one=9.1,
    exp=(0.49999997, 0.16666546, 0.041667443, 0.008366258, 0.0013869802),
    log_near_1=(
        -0.5, 0.33333218, -0.249998, 0.2001031, -0.1668038, 0.14007194, -0.12185671, 0.13978662, -0.1288569,
    ),
    log1p_unit=(
        -0.49999934, 0.3333055, -0.24958937, 0.19696973, -0.1535943, 0.10686697, -0.057719324, 0.020231139,
        -0.0033238358,
    ),
    series=2,
    sine=7,
    lgamma_near_2=(
        0.4501393, -0.11948166, 0.044520486, -0.019051276, 0.008774939, -0.004252333, 0.0021094864,
        -0.0009587135, 0.00049054995, -0.000448429, 0.00023661427,
    ),
    digamma_near_2=(
        0.8581832, -0.3262546, 0.1571218, -0.08228655, 0.044764943, -0.024870222, 0.014241937, -0.008056777,
        0.003658333, -0.0020806277, 0.002634603, -0.0015038744,
    ),
    normal=(15.0, 8),
    hazard=(
        0.19675282, -0.33003634, 0.1419432, 0.030084822, -0.049050495, 0.0016194829, 0.015275796,
        -0.0025390587, -0.004474072, 0.0010482353, 0.0010313243, -0.00021865922, -0.0001149087,
    ),
    arctan=(
        -0.333333, 0.1999853, -0.14264016, 0.109508805, -0.08399306, 0.05788138, -0.031096961, 0.010868662,
        -0.0017828145,
    ),
)  # fmt: skip

DOUBLE = Format(
    float=np.float64,
    int=np.int64,
    mantissa=52,
    bias=1023,
    exp_range=(-746.0, 710.0),
    log2=(0.6931471803691238, 1.9082149292705877e-10),
    tanh_one=19.1,
    exp=(
        0.5, 0.16666666666666677, 0.04166666666666651, 0.00833333333332169, 0.0013888888888962296,
        0.00019841269885971345, 2.4801587172742277e-05, 2.7557244368149675e-06, 2.7557402424566143e-07,
        2.5108981168331867e-08, 2.0875410259634685e-09,
    ),
    log_near_1=(
        -0.5, 0.33333333333333154, -0.2499999999999916, 0.2000000000007733, -0.166666666668805,
        0.14285714274088898, -0.12499999975928111, 0.11111111974931052, -0.10000001476728809,
        0.0909087230650719, -0.08333278644977546, 0.07693272775087809, -0.07144145460816281,
        0.06650579180711537, -0.06230301409915583, 0.06052327993003525, -0.05749336364864732,
        0.04173107760054338, -0.03830635304412397, 0.0850374380540825, -0.08347773396003029,
    ),
    log1p_unit=(
        -0.499999999999999, 0.33333333333313436, -0.24999999998598327, 0.19999999949314698,
        -0.16666665556165403, 0.14285698076253747, -0.12499832424692282, 0.11109831010539878,
        -0.09992548884121524, 0.09057089170969324, -0.08211468292156439, 0.07338617523649069,
        -0.06305694619487366, 0.05031341803658523, -0.03578847552467246, 0.02172945655376512,
        -0.010754981058620166, 0.004113800887041367, -0.0011308100953480288, 0.00019759780989781072,
        -1.6418936892652805e-05,
    ),
    series=8,
    sine=11,
    lgamma_near_2=(
        0.4501393121092563, -0.11948158662524268, 0.044520447198509644, -0.019053957830260832,
        0.008776370425257302, -0.004226194125189418, 0.0020955338799232407, -0.0010605660937984334,
        0.0005448969907212743, -0.00028319036037842405, 0.0001485167612603942, -7.8464050392945e-05,
        4.170547456941329e-05, -2.226821449897537e-05, 1.194925036645649e-05, -6.487859797094674e-06,
        3.5071990932812468e-06, -1.76764375827818e-06, 9.597109616498142e-07, -7.562612463459416e-07,
        4.142761109248788e-07, 3.404324894896923e-08, -1.9561462574604242e-08, -1.577723410210679e-07,
        8.702854149462274e-08,
    ),
    digamma_near_2=(
        0.8581832171262995, -0.3262546278681057, 0.1571201133520356, -0.08228558635577421,
        0.04479965445346671, -0.024890048489327913, 0.013985786157589093, -0.007910468765597353,
        0.004491814230188876, -0.002556686700917371, 0.0014573685124658021, -0.0008314950930624974,
        0.000474727616562906, -0.00027110565826077765, 0.00015459265153371102, -8.831673837151642e-05,
        5.1398705126837106e-05, -2.9367803644173363e-05, 1.4487003402656893e-05, -8.277907777699667e-06,
        8.507077411101826e-06, -4.86113586531963e-06, -1.2335673403459895e-06, 7.049012638469318e-07,
        2.0776397503965925e-06, -1.1872212713245974e-06,
    ),
    normal=(40.0, 20),
    hazard=(
        0.19675280707049211, -0.3300363676972139, 0.1419443385208673, 0.0300851687107385,
        -0.04907013118620862, 0.0016226977935274787, 0.015396656472323259, -0.002580392187962553,
        -0.004816796979931016, 0.0011884896922912027, 0.0015235741049394816, -0.0004190357762761577,
        -0.00048240065403962553, 0.00012420988252170634, 0.0001489452824152973, -3.095101055663583e-05,
        -4.3158987265838366e-05, 6.269143005836394e-06, 1.1155619199791925e-05, -9.96399240630125e-07,
        -2.388678693987909e-06, 1.3282813774480899e-07, 3.7183661218562057e-07, -1.9301770457234204e-08,
        -3.094205658239671e-08, 2.3423531642035593e-09,
    ),
    arctan=(
        -0.3333333333333333, 0.1999999999999961, -0.1428571428565574, 0.11111111107616237,
        -0.0909090898006594, 0.07692305531825536, -0.06666638426383693, 0.05882090719264434,
        -0.05261357089010608, 0.04752484570095457, -0.043094448363131636, 0.03876056997497573,
        -0.03381873984093271, 0.027675340226283478, -0.020369193454791133, 0.012877881638748135,
        -0.006661119912458573, 0.0026666240233623223, -0.0007671565437423136, 0.0001401682342385201,
        -1.2160728623100972e-05,
    ),
)  # fmt: skip


BERNOULLI = tuple(a / b for a, b in (
    (1, 6), (-1, 30), (1, 42), (-1, 30), (5, 66), (-691, 2730), (7, 6), (-3617, 510),
))  # fmt: skip
DIGAMMA_ROOT = (0.46163214496836236, -1.5522348162858677e-17)  # minus 1: as two parts


def gamma_functions(format, jit, log, floor, select, polynomial):
    """lgamma and its derivatives in a format, by public name: one text for Python, the CPU and CUDA.

    From 9 on by Stirling's series. Below it, lgamma and digamma by a polynomial from 1 to 2.5, where their
    zeros are, and the factors of gamma(y) = (y - 1) (y - 2) ... gamma(1 + u); the others by the series of
    y + 8 and what lies between, as all terms have one sign. Negative numbers are reflected.
    """
    F = format.float
    ZERO, ONE, TWO, THREE, FOUR, FIVE, SIX, SEVEN, EIGHT, NINE, TEN = map(F, range(11))
    HALF, MIDDLE, SIXTEEN = F(0.5), F(0.75), F(16)
    TWO_AND_HALF, THREE_AND_HALF, FIVE_AND_HALF = F(2.5), F(3.5), F(5.5)
    INF, NAN, PI = F(np.inf), F(np.nan), F(np.pi)
    LGAMMA_NEAR_2, DIGAMMA_NEAR_2 = (tuple(map(F, c)) for c in (format.lgamma_near_2, format.digamma_near_2))
    ROOT = F(DIGAMMA_ROOT[0])
    ROOT_LOW = F(DIGAMMA_ROOT[0] - float(ROOT) + DIGAMMA_ROOT[1])
    CONSTANT = F(0.5 * libm.log(2 * libm.pi) - 0.5)
    SERIES = tuple(enumerate(BERNOULLI[: format.series], 1))
    LGAMMA = tuple(F(b / (2 * k * (2 * k - 1))) for k, b in SERIES)
    DIGAMMA = tuple(F(b / (2 * k)) for k, b in SERIES)
    TRIGAMMA = tuple(F(b) for k, b in SERIES)
    TETRAGAMMA = tuple(F(b * (2 * k + 1)) for k, b in SERIES)
    SINE = tuple(F((-1) ** k * libm.pi ** (2 * k) / libm.factorial(2 * k + 1)) for k in range(format.sine))

    @jit
    def lowered(y):
        """u of a y below 9, the product of gamma's factors, and the sum of their inverses times that."""
        high = y >= FIVE_AND_HALF
        g = y * (y - FIVE)
        product = select(high, (g + FOUR) * (g + SIX), ONE)  # (y - 1) (y - 2) (y - 3) (y - 4)
        slope = select(high, (y + y - FIVE) * (g + g + TEN), ZERO)
        z = select(high, y - FOUR, y)
        high = z >= THREE_AND_HALF
        two = select(high, (z - ONE) * (z - TWO), ONE)
        slope = slope * two + select(high, z + z - THREE, ZERO) * product
        product = product * two
        z = select(high, z - TWO, z)
        high = z >= TWO_AND_HALF
        z = select(high, z - ONE, z)
        one = select(high, z, ONE)
        slope = slope * one + select(high, product, ZERO)
        low = z < ONE  # one factor too many
        return select(low, z, z - ONE), select(low, z, product * one), select(low, -ONE, slope)

    @jit
    def parts(y):
        """u, the sum times the product; of that, or of a y from 9 on, the logarithm and the inverse."""
        u, product, slope = lowered(y)
        m = select(y < NINE, product, y)
        return u, slope, log(m), ONE / m

    @jit
    def lgamma_above_0(y):
        u, _, log_m, r = parts(y)
        near = u * (u - ONE) * polynomial(u - MIDDLE, LGAMMA_NEAR_2) + select(y < ONE, -log_m, log_m)
        far = (y - HALF) * (log_m - ONE) + (r * polynomial(r * r, LGAMMA) + CONSTANT)
        return select(y < NINE, near, far)

    @jit
    def digamma_above_0(y):
        u, slope, log_m, r = parts(y)
        near = (u - ROOT - ROOT_LOW) * polynomial(u - MIDDLE, DIGAMMA_NEAR_2) + slope * r
        far = log_m - (HALF * r + r * r * polynomial(r * r, DIGAMMA))
        return select(y < NINE, near, far)

    @jit
    def over_all(a, b, c, d, e, f, g):
        """The sum of the inverses of seven numbers, by one division."""
        ab, cd, ef = a * b, c * d, e * f
        four, three = (a + b) * cd + (c + d) * ab, (e + f) * g + ef
        ab, ef = ab * cd, ef * g
        return (four * ef + three * ab) / (ab * ef)

    @jit
    def square(x):
        return x * x

    @jit
    def cube(x):
        return x * x * x

    @jit
    def trigamma_above_0(y):
        low = y < SIXTEEN
        r = ONE / select(low, y + EIGHT, y)
        z = r * r
        far = r + HALF * z + r * z * polynomial(z, TRIGAMMA)
        near = over_all(
            square(y + ONE), square(y + TWO), square(y + THREE), square(y + FOUR), square(y + FIVE),
            square(y + SIX), square(y + SEVEN),
        )  # fmt: skip
        return select(low, square(ONE / y) + (near + far), far)

    @jit
    def tetragamma_above_0(y):
        low = y < SIXTEEN
        r = ONE / select(low, y + EIGHT, y)
        z = r * r
        far = z + z * r + z * z * polynomial(z, TETRAGAMMA)
        near = over_all(
            cube(y + ONE), cube(y + TWO), cube(y + THREE), cube(y + FOUR), cube(y + FIVE), cube(y + SIX),
            cube(y + SEVEN),
        )  # fmt: skip
        return -select(low, TWO * (cube(ONE / y) + near) + far, far)

    @jit
    def mirror(x):
        """x, or 1 - x where x is negative."""
        return select(x < ZERO, ONE - x, x)

    @jit
    def sine(x):
        """sin(pi x) / pi for 0 <= x <= 1/2."""
        return x * polynomial(x * x, SINE)

    @jit
    def turn(x):
        """The magnitude of sin(pi x) / pi, and cos(pi x) with the sign of sin(-pi x)."""
        x = abs(x)
        x = x - floor(x)
        before = x <= HALF
        x = select(before, x, ONE - x)
        c = PI * sine(HALF - x)
        return sine(x), select(before, c, -c)

    @jit
    def lgamma(x):
        y, s = lgamma_above_0(mirror(x)), turn(x)[0]
        return select(x < ZERO, select(s > ZERO, -log(s) - y, INF), y)

    @jit
    def digamma(x):
        y = digamma_above_0(mirror(x))
        s, c = turn(x)
        return select(x < ZERO, select(s > ZERO, y + c / s, NAN), y)

    @jit
    def trigamma(x):
        y, s = trigamma_above_0(mirror(x)), turn(x)[0]
        return select(x < ZERO, square(ONE / s) - y, y)

    @jit
    def tetragamma(x):
        y = tetragamma_above_0(mirror(x))
        s, c = turn(x)
        return select(x < ZERO, y + (c + c) * cube(ONE / s), y)

    return {"lgamma": lgamma, "digamma": digamma, "trigamma": trigamma, "tetragamma": tetragamma}


def normal_functions(format, jit, exp, expm1, log, log1p, select, polynomial):
    """erfc, log_ndtr, their derivatives and log1mexp in a format, by public name: one text, as above.

    All are of the normal distribution's hazard at t >= 0, its density over the probability above t, which has
    neither overflow nor cancellation: t and a positive rest. The density is e**x of a square in two parts.
    """
    F = format.float
    ZERO, ONE, TWO = map(F, range(3))
    HALF, MIDDLE, MORE = F(0.5), F(3.5), F(1.25)
    LIMIT, SHIFT = F(format.normal[0]), F(1.5 * 2.0 ** (format.mantissa - format.normal[1]))
    HUGE = F(2.0**64)  # of which the hazard's rest is lost beside it
    HAZARD = tuple(map(F, format.hazard))
    EXP = tuple(F((-1) ** k / libm.factorial(k)) for k in range(5))  # of -x where x is small
    LOG_2, SQRT_2, SQRT_TAU = F(libm.log(2)), F(libm.sqrt(2)), F(libm.sqrt(2 * libm.pi))
    START = F(MORE * libm.sqrt(2 / libm.pi))
    SQRT_2_OVER_PI, SLOPE = F(libm.sqrt(2 / libm.pi)), F(-2 / libm.sqrt(libm.pi))

    @jit
    def bell(x, half):
        """e**-x**2 for x >= 0, or of half the square: its rounding, as it stands, would be multiplied."""
        x = select(x > LIMIT, LIMIT, x)
        high = (x + SHIFT) - SHIFT  # its square is exact
        return exp(-half * (high * high)) * polynomial(half * ((x - high) * (x + high)), EXP)

    @jit
    def rest(t):
        """The hazard less t."""
        w = (t + t) / (t + MIDDLE)
        return (w * polynomial(w - ONE, HAZARD) + START) / (t + MORE)

    @jit
    def erfc(x):
        a = abs(x)
        a = select(a > LIMIT, LIMIT, a)
        t = SQRT_2 * a
        y = SQRT_2_OVER_PI * bell(a, ONE) / (t + rest(t))
        return select(x < ZERO, TWO - y, y)

    @jit
    def erfc_slope(x):
        return SLOPE * bell(abs(x), ONE)

    @jit
    def log_ndtr(x):
        a = abs(x)
        t = select(a > HUGE, HUGE, a)
        h = SQRT_TAU * (t + rest(t))
        return select(x < ZERO, -(HALF * a * a) - log(h), log1p(-bell(a, HALF) / h))

    @jit
    def above(t):
        """The density over the probability below t."""
        y = bell(t, HALF) / SQRT_TAU
        return y / (ONE - y / (t + rest(t)))

    @jit
    def log_ndtr_slope(x):
        a = abs(x)
        t = select(a > HUGE, HUGE, a)
        return select(x < ZERO, a + rest(t), above(t))

    @jit
    def log_ndtr_bend(x):
        t = abs(x)
        t = select(t > HUGE, HUGE, t)
        r, y = rest(t), above(t)
        return -select(x < ZERO, (t + r) * r, y * (y + t))

    @jit
    def log1mexp(x):
        return select(x < LOG_2, log(-expm1(-x)), log1p(-exp(-x)))

    return {
        "erfc": erfc, "erfc_slope": erfc_slope, "log_ndtr": log_ndtr, "log_ndtr_slope": log_ndtr_slope,
        "log_ndtr_bend": log_ndtr_bend, "log1mexp": log1mexp,
    }  # fmt: skip


def as_it_is(function):
    return function


PLAIN = gamma_functions(DOUBLE, as_it_is, np.log, np.floor, np.where, np.polynomial.polynomial.polyval)
PLAIN |= normal_functions(
    DOUBLE, as_it_is, np.exp, np.expm1, np.log, np.log1p, np.where, np.polynomial.polynomial.polyval
)


def plain(name, x):
    """One of these functions in plain Python: computed in float64, of the dtype of x."""
    x = np.asarray(x)
    with np.errstate(all="ignore"):
        return PLAIN[name](x.astype(np.float64)).astype(np.result_type(x, np.float16))[()]


def implement(format):
    """The vectorisable functions of one format, by public name."""
    F, Z = format.float, format.int  # reals, integers
    mantissa, bias = format.mantissa, format.bias
    ZERO, HALF, ONE = F(0), F(0.5), F(1)
    INF, NAN = F(np.inf), F(np.nan)
    NORMAL = F(2.0 ** (1 - bias))  # the smallest that is not subnormal
    TINY = F(2.0 ** (-mantissa - 2))  # below it x + x**2 / 2 rounds to x
    UPSCALE = F(2.0**mantissa)
    FIELD = Z(-1 << mantissa)  # sign and exponent
    EXPM1_LOW = F(libm.log(TINY / 2))  # below it e**x - 1 rounds to -1
    EXP_LOW, EXP_HIGH = (F(v) for v in format.exp_range)
    LOG2_E = F(1 / libm.log(2))
    LOG2_HIGH, LOG2_LOW = (F(v) for v in format.log2)
    TANH_ONE = F(format.tanh_one)
    EXP = tuple(F(v) for v in format.exp)
    ONE_ONE_EXP = (ONE, ONE, *EXP)
    LOG_NEAR_1 = tuple(F(v) for v in format.log_near_1)
    LOG1P_UNIT = tuple(F(v) for v in format.log1p_unit)
    ARCTAN = tuple(F(v) for v in format.arctan)
    TWO, LOG_2 = F(2), F(libm.log(2))
    LARGE = F(2.0**28)  # its square has no use for 1
    QUARTER, SINH_HIGH = F(0.25), F(format.exp_range[1] + 0.7)
    PI, PI_LOW = F(libm.pi), F(libm.pi - float(F(libm.pi)) + 1.2246467991473532e-16)
    # Adding 1.5 * 2**mantissa + b leaves round(v) + b in the low bits of the sum: an integer conversion for
    # one addition. b biases the integer to be an exponent field: doubled, to be halved; or for 2**(n - 1).
    SHIFT_TWICE = F(1.5 * 2.0**mantissa + 2 * bias)
    SHIFT_HALF = F(1.5 * 2.0**mantissa + bias - 1)
    SHIFT_QUARTER = F(1.5 * 2.0**mantissa + bias - 2)
    TWO_THIRDS = Z(np.array(2 / 3, F).view(Z))
    FOUR = Z(np.array(4, F).view(Z))
    # A 64-bit integer converts in SIMD only with AVX-512; its upper half does everywhere.
    UPPER = Z(Z(0).itemsize * 8 - 32)
    LOG2_SCALED = F(libm.log(2) / 2.0 ** (mantissa - int(UPPER)))
    UPSCALE_BITS = Z(mantissa << mantissa)

    table = {}

    def define(function):
        table[function.__name__] = njit(**STRICT)(function)
        return table[function.__name__]

    @njit(**STRICT)
    def exp_in_range(x):
        t = multiply_add(x, LOG2_E, SHIFT_TWICE)
        n = t - SHIFT_TWICE
        r = multiply_add(n, -LOG2_LOW, multiply_add(n, -LOG2_HIGH, x))
        y = polynomial(r, ONE_ONE_EXP)
        # 2**n as two factors: it may be beyond the largest, or below the smallest, when y * 2**n is not.
        i = bits(t)
        a = Z(Z(i << Z(mantissa - 1)) & FIELD)
        b = Z(Z(i << Z(mantissa)) - a)
        return y * unbits(a) * unbits(b)

    @define
    def exp(x):
        x = select(x < EXP_LOW, EXP_LOW, x)
        return exp_in_range(select(x > EXP_HIGH, EXP_HIGH, x))

    @njit(**STRICT)
    def exp_minus_abs(x):
        x = -abs(x)
        return exp_in_range(select(x < EXP_LOW, EXP_LOW, x))

    @njit(**STRICT)
    def half_expm1(x):
        """(e**x - 1) / 2 where 2**n is normal: half, because e**x - 1 may be finite when 2**n is not."""
        t = multiply_add(x, LOG2_E, SHIFT_HALF)
        n = t - SHIFT_HALF
        r = multiply_add(n, -LOG2_LOW, multiply_add(n, -LOG2_HIGH, x))
        p = multiply_add(polynomial(r, EXP), r * r, r)
        s = unbits(Z(bits(t) << Z(mantissa)))
        return multiply_add(p, s, s - HALF)

    @define
    def expm1(x):
        a = select(x < EXPM1_LOW, EXPM1_LOW, x)
        y = half_expm1(select(a > EXP_HIGH, EXP_HIGH, a))
        return select(abs(x) < TINY, x, y + y)  # also for -0.0, and subnormals that half would round

    @njit(**STRICT)
    def log_sum(e, m):
        """e * log(2) + log(1 + m), with e scaled as the upper bits of an exponent field."""
        return multiply_add(e, LOG2_SCALED, multiply_add(polynomial(m, LOG_NEAR_1), m * m, m))

    @define
    def log(x):
        low = x < NORMAL
        i = select(low, Z(bits(x * UPSCALE) - UPSCALE_BITS), bits(x))
        e = Z(Z(i - TWO_THIRDS) & FIELD)
        m = unbits(Z(i - e)) - ONE
        y = log_sum(F(np.int32(e >> UPPER)), m)
        y = select(x < INF, y, x)
        return select(x > ZERO, y, select(x == ZERO, -INF, NAN))

    @define
    def log1p(x):
        # With 1 + x = 2**k * (1 + m), m = 2**-k * x + (2**-k - 1) is exact where it matters, and k is only
        # nearly right when 1 + x rounds. 2**-k may be subnormal, 2**(2 - k) is not.
        e = Z(Z(bits(x + ONE) - TWO_THIRDS) & FIELD)
        m = unbits(Z(bits(x) - e)) + multiply_add(unbits(Z(FOUR - e)), F(0.25), -ONE)
        y = copysign(log_sum(F(np.int32(e >> UPPER)), m), x)  # -0.0
        y = select(x < INF, y, x)
        return select(x > -ONE, y, select(x == -ONE, -INF, NAN))

    @define
    def sigmoid(x):
        z = exp_minus_abs(x)
        return select(x < ZERO, z, ONE) / (ONE + z)

    @njit(**STRICT)
    def softplus_minus_abs(x):
        z = exp_minus_abs(x)
        return multiply_add(polynomial(z, LOG1P_UNIT), z * z, z)

    @define
    def softplus(x):
        return select(x < ZERO, ZERO, x) + softplus_minus_abs(x)

    @define
    def log_sigmoid(x):
        return select(x > ZERO, ZERO, x) - softplus_minus_abs(x)

    @define
    def tanh(x):
        a = abs(x)
        h = half_expm1(F(2) * select(a > TANH_ONE, TANH_ONE, a))
        return copysign(h / (h + ONE), x)

    @njit(**STRICT)
    def quarter_expm1(x):
        """(e**x - 1) / 4: as `half_expm1`, and finite for as large an x as the hyperbolic functions are."""
        x = select(x > SINH_HIGH, SINH_HIGH, x)
        t = multiply_add(x, LOG2_E, SHIFT_QUARTER)
        n = t - SHIFT_QUARTER
        r = multiply_add(n, -LOG2_LOW, multiply_add(n, -LOG2_HIGH, x))
        p = multiply_add(polynomial(r, EXP), r * r, r)
        s = unbits(Z(bits(t) << Z(mantissa)))
        return multiply_add(p, s, s - QUARTER)

    @define
    def sinh(x):
        a = abs(x)
        q = quarter_expm1(a)
        y = q + q / multiply_add(F(4), q, ONE)
        return select(a < TINY, x, copysign(y + y, x))

    @define
    def cosh(x):
        y = multiply_add(F(2), quarter_expm1(abs(x)), HALF)
        return y + QUARTER / y

    @define
    def arctan2(y, x):
        a, b = abs(y), abs(x)
        steep = a > b
        low, high = select(steep, b, a), select(steep, a, b)
        r = select(low == high, select(low == ZERO, ZERO, ONE), low / high)  # also of two infinities
        r = multiply_add(polynomial(r * r, ARCTAN), r * r * r, r)
        back = copysign(ONE, x) < ZERO
        turn = select(steep, HALF, select(back, ONE, ZERO))
        r = multiply_add(turn, PI, multiply_add(turn, PI_LOW, select(steep == back, r, -r)))
        return copysign(r, y)

    @define
    def arcsin(x):
        return arctan2(x, square_root((ONE - x) * (ONE + x)))

    @define
    def arccos(x):
        return arctan2(square_root((ONE - x) * (ONE + x)), x)

    @define
    def arcsinh(x):
        a = abs(x)
        large, s = a > LARGE, a * a
        y = log1p(select(large, a - ONE, a + s / (ONE + square_root(ONE + s))))
        return copysign(select(large, y + LOG_2, y), x)

    @define
    def arccosh(x):
        large, a = x > LARGE, x - ONE
        y = log1p(select(large, a, a + square_root(a * (a + TWO))))
        return select(x < ONE, NAN, select(large, y + LOG_2, y))

    @define
    def arctanh(x):
        a = abs(x)
        return copysign(HALF * log1p((a + a) / (ONE - a)), x)

    @define
    def logaddexp(x, y):
        gap = select(x == y, ZERO, x - y)
        return select(x > y, x, y) + softplus_minus_abs(gap)

    @define
    def xlogy(x, y):
        return select(x == ZERO, select(y == y, ZERO, y), x * log(y))

    @define
    def sign(x):
        return select(x > ZERO, ONE, select(x < ZERO, -ONE, select(x == ZERO, ZERO, x)))

    table |= normal_functions(format, njit(**STRICT), exp, expm1, log, log1p, select, polynomial)
    return table | gamma_functions(format, njit(**STRICT), log, np.floor, select, polynomial)


# CPU only: what needs no constants, and so no format.


@njit(**STRICT)
def _maximum(x, y):
    return select(x != x, x, select(x > y, x, y))


@njit(**STRICT)
def _minimum(x, y):
    return select(x != x, x, select(x < y, x, y))


@njit(**STRICT)
def _square(x):
    return x * x


@njit(**STRICT)
def _floor(x):
    return np.floor(x)


@njit(**STRICT)
def _stop_gradient(x):
    return x


@njit(**STRICT)
def _isnan(x):
    return x != x


@njit(**STRICT)
def _sqrt(x):
    return square_root(x)


@njit(**STRICT)
def _sin(x):
    return libm.sin(x)


@njit(**STRICT)
def _cos(x):
    return libm.cos(x)


@njit(**STRICT)
def _tan(x):
    return libm.tan(x)


@njit(**STRICT)
def _arctan(x):
    return libm.atan(x)


@njit(**STRICT)
def _erf(x):
    return libm.erf(x)


@njit(**STRICT)
def _power(x, y):
    return x**y


@njit(**STRICT)
def _powers(x, y, y1, y2):
    return x**y, x**y1, x**y2


# log2(1 + m) = m * p(m) for |m| <= 1/3, and 2**f = 1 + f * p(f) for |f| <= 1/2: our own fits, at Chebyshev's
# points, whose errors (2e-14 and 2e-12, relative) are far below what float32 rounds by.
LOG2_NEAR_1 = (
    1.4426950408889614,
    -0.7213475204437433,
    0.4808983469646333,
    -0.36067376054031325,
    0.2885390079915458,
    -0.24044913352402342,
    0.2060992925992897,
    -0.18033912690965082,
    0.1603000648477629,
    -0.14420285384457987,
    0.13112258719199646,
    -0.12133642666824562,
    0.11166672107684163,
    -0.09266351271922105,
    0.0884924397718492,
    -0.13952129948118241,
    0.12648264131234652,
)
EXP2 = (
    0.6931471805568327,
    0.2402265069588854,
    0.055504109063244156,
    0.009618129135234632,
    0.0013333478475345828,
    0.00015403475185848947,
    1.530370025193406e-05,
    1.3250805750431027e-06,
)


def vectorised_powers():
    """float32 power, and three of one base, in float64: nearly always correctly rounded, and no libm."""
    ONE, HALF, INF, NAN = (np.float64(v) for v in (1, 0.5, np.inf, np.nan))
    LOW, HIGH = np.float64(-160), np.float64(130)  # beyond it 2**x is 0 or infinity in float32
    MANTISSA, FIELD = np.int64(52), np.int64(-1 << 52)
    SHIFT = np.float64(1.5 * 2.0**52 + 1023)  # its sum with t has round(t) + 1023 in the low bits
    TWO_THIRDS = np.int64(np.float64(2 / 3).view(np.int64))

    @njit(**STRICT)
    def log2(size):
        """Of a float32, not negative: as a float64 it is never subnormal."""
        e = (bits(size) - TWO_THIRDS) & FIELD
        m = unbits(bits(size) - e) - ONE
        y = multiply_add(polynomial_in_parallel(m, LOG2_NEAR_1), m, np.float64(np.int32(e >> MANTISSA)))
        return select(size < INF, select(size == 0, -INF, y), size)

    @njit(**STRICT)
    def exp2(x):
        x = select(x < LOW, LOW, select(x > HIGH, HIGH, x))
        t = x + SHIFT
        f = x - (t - SHIFT)
        return multiply_add(polynomial_in_parallel(f, EXP2), f, ONE) * unbits(bits(t) << MANTISSA)

    @njit(**STRICT)
    def from_log(base, log_size, y):
        size, y = abs(base), np.float64(y)
        r = exp2(y * log_size)
        # What the product leaves as 0 * inf.
        r = select((y == 0) | (base == ONE) | ((size == ONE) & (abs(y) == INF)), ONE, r)
        whole = np.floor(y) == y
        half = y * HALF
        odd = whole & (np.floor(half) != half)
        r = select(odd, copysign(r, base), r)
        return np.float32(select((base < 0) & (size < INF) & ~whole, NAN, r))

    @njit(**STRICT)
    def power(x, y):
        base = np.float64(x)
        return from_log(base, log2(abs(base)), y)

    @njit(**STRICT)
    def powers(x, y, y1, y2):
        base = np.float64(x)
        log_size = log2(abs(base))
        return from_log(base, log_size, y), from_log(base, log_size, y1), from_log(base, log_size, y2)

    return {"power": power, "powers": powers}


COMMON = {
    "maximum": _maximum, "minimum": _minimum, "square": _square, "isnan": _isnan, "sqrt": _sqrt,
    "sin": _sin, "cos": _cos, "arctan": _arctan, "erf": _erf, "power": _power, "powers": _powers,
    "floor": _floor, "stop_gradient": _stop_gradient, "tan": _tan,
}  # fmt: skip
CPU = {types.float32: COMMON | implement(SINGLE), types.float64: COMMON | implement(DOUBLE)}
CPU[types.float32] |= vectorised_powers()


# Registration with Numba.


def common_float(*args):
    """The type to compute in, or None where an argument is no plain number."""
    if not all(isinstance(a, types.Float | types.Integer | types.Boolean) for a in args):
        return None
    floats = [a for a in args if isinstance(a, types.Float)]
    widest = max(floats, key=lambda a: a.bitwidth, default=types.float64)
    return widest if widest in CPU else None


def register(function):
    """Let compiled code that calls a public function find its implementation."""
    name = function.__name__

    def unary(x):
        kind = common_float(x)
        if kind is None:
            return None
        at = CPU[kind][name]
        return lambda x: at(kind(x))

    def binary(x, y):
        kind = common_float(x, y)
        if kind is None:
            return None
        at = CPU[kind][name]
        return lambda x, y: at(kind(x), kind(y))

    choose = unary if function.__code__.co_argcount == 1 else binary
    overload(function, jit_options=STRICT, target="cpu")(choose)


for _function in (
    exp, expm1, log, log1p, sigmoid, softplus, log_sigmoid, tanh, sqrt, sin, cos, arctan, erf, lgamma,
    digamma, trigamma, tetragamma, power, xlogy, maximum, minimum, sign, square, isnan, sinh, cosh, arctan2,
    erfc, erfc_slope, log_ndtr, log_ndtr_slope, log_ndtr_bend, log1mexp, logaddexp, floor, stop_gradient,
    tan, arcsin, arccos, arcsinh, arccosh, arctanh,
):  # fmt: skip
    register(_function)


@overload(where, jit_options=STRICT, target="cpu")
def _where(c, a, b):
    kind = common_float(a, b)
    if kind is None or not isinstance(c, types.Boolean):
        return None
    return lambda c, a, b: select(c, kind(a), kind(b))


@overload(powers, jit_options=STRICT, target="cpu")
def _three_powers(x, y, y1, y2):
    kind = common_float(x, y, y1, y2)
    if kind is None:
        return None
    at = CPU[kind]["powers"]
    return lambda x, y, y1, y2: at(kind(x), kind(y), kind(y1), kind(y2))
