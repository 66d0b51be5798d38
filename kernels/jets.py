"""Derivatives of a loss from its value, by a Numba type.

A :class:`Jet` carries value, first and second derivative with respect to one variable through ordinary
Python arithmetic, branches included; a :class:`Const` is an array element or an option that is not
differentiated. A definition's function is compiled as it stands. Literals take the type of the Jet or Const
that they meet, so float32 stays float32. LLVM removes whatever a kernel does not use of a Jet.

The rules are written once, here, as functions of a :class:`Dual` in plain Python. :func:`install` has a
target's compiler generate their code (see `straight`): the same text serves the CPU and CUDA. Conventions at
kinks are PyTorch's: the slope of ``abs`` at zero is zero, and ``maximum(a, b)`` takes the slope of its first
argument at a tie, as ``clamp`` does.
"""

import builtins
import math as _libm
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from . import math
from .straight import Code, Functions, Number, wider

nm: Any = Functions()  # the functions of `math`, of numbers

# Functions of one variable: value, first and second derivative, in terms of a number.


def _exp(x):
    y = nm.exp(x)
    return y, y, y


def _log(x):
    r = 1 / x
    return nm.log(x), r, -r * r


def _log1p(x):
    r = 1 / (1 + x)
    return nm.log1p(x), r, -r * r


def _expm1(x):
    y = nm.expm1(x)
    e = nm.exp(x)
    return y, e, e


def _sqrt(x):
    y = nm.sqrt(x)
    d = 0.5 / y
    return y, d, -d / (2 * x)


def _sigmoid(x):
    # 1 - y cancels for large x; sigmoid(-x) is the same number without the cancellation.
    y = nm.sigmoid(x)
    z = nm.sigmoid(-x)
    return y, y * z, y * z * (z - y)


def _softplus(x):
    y = nm.sigmoid(x)
    return nm.softplus(x), y, y * nm.sigmoid(-x)


def _log_sigmoid(x):
    z = nm.sigmoid(-x)
    return nm.log_sigmoid(x), z, -z * nm.sigmoid(x)


def _tanh(x):
    y = nm.tanh(x)
    d = 1 - y * y
    return y, d, -2 * y * d


def _sinh(x):
    y = nm.sinh(x)
    return y, nm.cosh(x), y


def _cosh(x):
    y = nm.cosh(x)
    return y, nm.sinh(x), y


def _sin(x):
    y = nm.sin(x)
    return y, nm.cos(x), -y


def _cos(x):
    y = nm.cos(x)
    return y, -nm.sin(x), -y


def _arctan(x):
    d = 1 / (1 + x * x)
    return nm.arctan(x), d, -2 * nm.where(d == 0, d, x * d) * d  # at infinity too


def _tan(x):
    y = nm.tan(x)
    d = 1 + y * y
    return y, d, 2 * y * d


def _arcsin(x):
    d = 1 / nm.sqrt((1 - x) * (1 + x))
    return nm.arcsin(x), d, x * d * d * d


def _arccos(x):
    d = -1 / nm.sqrt((1 - x) * (1 + x))
    return nm.arccos(x), d, x * d * d * d


def _arcsinh(x):
    r = 1 / nm.maximum(1, abs(x))  # the square of a large x would overflow
    d = r / nm.sqrt(r * r + nm.where(abs(x) > 1, 1, x * x))
    return nm.arcsinh(x), d, -nm.where(d == 0, d, x * d) * d * d


def _arccosh(x):
    d = 1 / (nm.sqrt(x - 1) * nm.sqrt(x + 1))
    return nm.arccosh(x), d, -nm.where(d == 0, d, x * d) * d * d


def _arctanh(x):
    d = 1 / ((1 - x) * (1 + x))
    return nm.arctanh(x), d, 2 * x * d * d


def _erf(x):
    d = 1.1283791670955126 * nm.exp(-x * x)
    return nm.erf(x), d, -2 * nm.where(d == 0, d, x * d)


def _erfc(x):
    d = nm.erfc_slope(x)
    return nm.erfc(x), d, -2 * nm.where(d == 0, d, x * d)  # at infinity too


def _log_ndtr(x):
    return nm.log_ndtr(x), nm.log_ndtr_slope(x), nm.log_ndtr_bend(x)


def _log1mexp(x):
    d = 1 / nm.expm1(x)
    return nm.log1mexp(x), d, -d * (1 + d)


def _lgamma(x):
    return nm.lgamma(x), nm.digamma(x), nm.trigamma(x)


def _digamma(x):
    return nm.digamma(x), nm.trigamma(x), nm.tetragamma(x)


def _square(x):
    return x * x, 2 * x, 0 * x + 2


# Every spelling of a function that a definition may use, and its rule.
UNARY = {
    _exp: (math.exp, np.exp, _libm.exp),
    _log: (math.log, np.log, _libm.log),
    _log1p: (math.log1p, np.log1p, _libm.log1p),
    _expm1: (math.expm1, np.expm1, _libm.expm1),
    _sqrt: (math.sqrt, np.sqrt, _libm.sqrt),
    _sigmoid: (math.sigmoid,),
    _softplus: (math.softplus,),
    _log_sigmoid: (math.log_sigmoid,),
    _tanh: (math.tanh, np.tanh, _libm.tanh),
    _sinh: (math.sinh, np.sinh, _libm.sinh),
    _cosh: (math.cosh, np.cosh, _libm.cosh),
    _sin: (math.sin, np.sin, _libm.sin),
    _cos: (math.cos, np.cos, _libm.cos),
    _tan: (math.tan, np.tan, _libm.tan),
    _arcsin: (math.arcsin, np.arcsin, _libm.asin),
    _arccos: (math.arccos, np.arccos, _libm.acos),
    _arctan: (math.arctan, np.arctan, _libm.atan),
    _arcsinh: (math.arcsinh, np.arcsinh, _libm.asinh),
    _arccosh: (math.arccosh, np.arccosh, _libm.acosh),
    _arctanh: (math.arctanh, np.arctanh, _libm.atanh),
    _erf: (math.erf, _libm.erf),
    _erfc: (math.erfc, _libm.erfc),
    _log_ndtr: (math.log_ndtr,),
    _log1mexp: (math.log1mexp,),
    _lgamma: (math.lgamma, _libm.lgamma),
    _digamma: (math.digamma,),
    _square: (math.square, np.square),
}

# Slope and second derivative are one number: it multiplies a sum, so that an infinite one is not multiplied
# by the 0 that bends a straight line.
EXPONENTIAL = (_exp, _expm1)

# Their slopes may be infinite where inner ones are 0.
STEEP = (_sqrt, _sinh, _cosh, _log_ndtr, _log1mexp, _arcsin, _arccos, _arccosh, _arctanh)


# ---- numbers that move -------------------------------------------------------------------------------------


class Pair:
    """Slopes by two variables; the product of two is half of what the mixed second derivative gains."""

    __slots__ = ("d", "e")

    def __init__(self, d: Any, e: Any) -> None:
        self.d, self.e = d, e

    def like(self, x: float) -> "Pair":
        return Pair(self.d.like(x), self.e.like(x))

    def __add__(self, other):
        return Pair(self.d + other.d, self.e + other.e)

    def __sub__(self, other):
        return Pair(self.d - other.d, self.e - other.e)

    def __mul__(self, other):
        if isinstance(other, Pair):
            return 0.5 * (self.d * other.e + self.e * other.d)
        return Pair(self.d * other, self.e * other)

    def __rmul__(self, other):
        return Pair(other * self.d, other * self.e)

    def __truediv__(self, other):
        return Pair(self.d / other, self.e / other)

    def __neg__(self):
        return Pair(-self.d, -self.e)


class Dual:
    """A number with its slope and second derivative: a Jet; without them it does not move: a Const.

    `whole` is the number that the source states, of a literal.
    """

    __slots__ = ("d", "h", "v", "whole")

    def __init__(self, v: Any, d: Any = None, h: Any = None, whole: int | None = None) -> None:
        self.v, self.d, self.h, self.whole = v, d, h, whole

    @property
    def moves(self) -> bool:
        return self.d is not None

    def like(self, x: Any) -> "Dual":
        """Return a literal as one that does not move; a Dual as it is."""
        return x if isinstance(x, Dual) else Dual(self.v.like(x))

    def moving(self, like: "Dual") -> "Dual":
        """Return this one with slopes of 0, if it has none."""
        return self if self.moves else Dual(self.v, like.d.like(0), like.h.like(0))

    def __add__(self, other):
        return _add(self, self.like(other))

    def __radd__(self, other):
        return _add(self.like(other), self)

    def __mul__(self, other):
        return _multiply(self, self.like(other))

    def __rmul__(self, other):
        return _multiply(self.like(other), self)

    def __rtruediv__(self, other):
        return _divide(self.like(other), self)


# ---- rules -------------------------------------------------------------------------------------------------

Rule = Callable[..., Any]


def _of_two(both: Rule, first: Rule, second: Rule, neither: Rule) -> Rule:
    """Return a rule of two numbers, by which of them move."""

    def rule(a: Dual, b: Dual) -> Dual:
        of = (both if b.moves else first) if a.moves else second if b.moves else neither
        return of(a, b)

    return rule


_add = _of_two(
    lambda a, b: Dual(a.v + b.v, a.d + b.d, a.h + b.h),
    lambda a, b: Dual(a.v + b.v, a.d, a.h),
    lambda a, b: Dual(a.v + b.v, b.d, b.h),
    lambda a, b: Dual(a.v + b.v),
)
_subtract = _of_two(
    lambda a, b: Dual(a.v - b.v, a.d - b.d, a.h - b.h),
    lambda a, b: Dual(a.v - b.v, a.d, a.h),
    lambda a, b: Dual(a.v - b.v, -b.d, -b.h),
    lambda a, b: Dual(a.v - b.v),
)


def _product(a: Dual, b: Dual) -> Dual:
    cross = a.d * b.d
    return Dual(a.v * b.v, a.v * b.d + a.d * b.v, a.v * b.h + a.h * b.v + (cross + cross))


_multiply = _of_two(
    _product,
    lambda a, b: Dual(a.v * b.v, a.d * b.v, a.h * b.v),
    lambda a, b: Dual(a.v * b.v, a.v * b.d, a.v * b.h),
    lambda a, b: Dual(a.v * b.v),
)


# From q b = a: q' = (a' - q b') / b and q'' = (a'' - 2 q' b' - q b'') / b.
def _quotient(a: Dual, b: Dual) -> Dual:
    q = a.v / b.v
    d = (a.d - q * b.d) / b.v
    cross = d * b.d
    return Dual(q, d, (a.h - (cross + cross) - q * b.h) / b.v)


def _quotient_of_constant(a: Dual, b: Dual) -> Dual:
    q = a.v / b.v
    d = -q * b.d / b.v
    cross = d * b.d
    return Dual(q, d, -((cross + cross) + q * b.h) / b.v)


_divide = _of_two(
    _quotient,
    lambda a, b: Dual(a.v / b.v, a.d / b.v, a.h / b.v),
    _quotient_of_constant,
    lambda a, b: Dual(a.v / b.v),
)


def _negative(a: Dual) -> Dual:
    return Dual(-a.v, -a.d, -a.h) if a.moves else Dual(-a.v)


def _absolute(a: Dual) -> Dual:
    if not a.moves:
        return Dual(abs(a.v))
    s = nm.sign(a.v)
    return Dual(abs(a.v), s * a.d, s * a.h)


# In second derivatives the outer one multiplies the inner slope twice, and not its square, which may
# overflow where it is 0.


def _along(slope: Any, inner: Any) -> Any:
    """The chain rule for a slope that may be infinite where the value is finite: 0 where the inner is 0.

    So the square root of a square has slope 0 at 0, and not infinity times 0.
    """
    if isinstance(inner, Pair):
        return Pair(_along(slope, inner.d), _along(slope, inner.e))
    return nm.where(inner == 0, 0, slope * inner)


def _three_powers(x: Number, n: Number, n1: Number, n2: Number) -> Any:
    if x.code.target.function(wider(x.kind, n.kind), "powers"):
        return nm.powers(x, n, n1, n2)
    return nm.power(x, n), nm.power(x, n1), nm.power(x, n2)


def _power_by_constant(a: Dual, p: Dual) -> Dual:
    """a ** p for a constant p: the slopes stay right at a = 0 for p = 0, 1 and 2, where 0 ** 0 is 1."""
    n, n1 = p.v, p.v - 1
    y, y1, y2 = _three_powers(a.v, n, n1, n - 2)
    d1, d2 = nm.where(n == 0, 0, n * y1), nm.where(n * n1 == 0, 0, n * n1 * y2)
    return Dual(y, _along(d1, a.d), _along(d2, a.d) * a.d + _along(d1, a.h))


def _power_of_two(a: Dual, b: Dual) -> Dual:
    """a ** b, both of which move: at a = 0 as by a constant, and b's slope is 0 where the power is."""
    x, n, n1 = a.v, b.v, b.v - 1
    y, y1, y2 = _three_powers(x, n, n1, n1 - 1)
    log = nm.log(x)
    by_a, by_b = nm.where(n == 0, 0, n * y1), nm.where(y == 0, 0, y * log)
    by_aa = nm.where(n * n1 == 0, 0, n * n1 * y2)
    by_ab = y1 + n * nm.where(y1 == 0, 0, y1 * log)
    by_bb = nm.where(y == 0, 0, by_b * log)
    cross = _along(by_ab, a.d * b.d)
    h = _along(by_aa, a.d) * a.d + (cross + cross) + _along(by_bb, b.d) * b.d
    d = _along(by_a, a.d) + _along(by_b, b.d)
    return Dual(y, d, h + _along(by_a, a.h) + _along(by_b, b.h))


# Small whole exponents as products: exact, and no power function in the kernel.
PRODUCTS: dict[int | None, Rule] = {
    0: lambda a: 0 * a + 1,
    1: lambda a: a + 0,
    2: lambda a: a * a,
    3: lambda a: a * a * a,
    4: lambda a: (a * a) * (a * a),
    -1: lambda a: 1 / a,
    -2: lambda a: 1 / (a * a),
}


def _power(a: Dual, b: Dual) -> Dual:
    if b.whole in PRODUCTS:
        return PRODUCTS[b.whole](a)
    if not b.moves:
        return _power_by_constant(a, b) if a.moves else Dual(nm.power(a.v, b.v))
    return _power_of_two(a.moving(b), b)


def _of_one(derivatives: Rule, name: str) -> Rule:
    """Return the rule of a function of one variable."""

    def rule(a: Dual) -> Dual:
        if not a.moves:
            return Dual(getattr(nm, name)(a.v))
        y, d1, d2 = derivatives(a.v)
        if derivatives in STEEP:
            return Dual(y, _along(d1, a.d), _along(d2, a.d) * a.d + _along(d1, a.h))
        if derivatives in EXPONENTIAL:
            return Dual(y, d1 * a.d, d1 * (a.d * a.d + a.h))
        return Dual(y, d1 * a.d, d2 * a.d * a.d + d1 * a.h)

    return rule


def _without_slope(name: str) -> Rule:
    """Return the rule of a function that occurs in derivatives of others, and has none here."""
    return lambda a: None if a.moves else Dual(getattr(nm, name)(a.v))


def _flat(name: str) -> Rule:
    """Return the rule of a function whose slope is 0."""
    return lambda a: Dual(getattr(nm, name)(a.v))


def _moving(rule: Rule, name: str) -> Rule:
    """Return a rule of two numbers from the one of two that move."""
    return _of_two(
        rule,
        lambda a, b: rule(a, b.moving(a)),
        lambda a, b: rule(a.moving(b), b),
        lambda a, b: Dual(getattr(nm, name)(a.v, b.v)),
    )


def _logaddexp(a: Dual, b: Dual) -> Dual:
    gap = nm.where(a.v == b.v, 0, a.v - b.v)  # of two infinities too
    by_a, by_b, apart = nm.sigmoid(gap), nm.sigmoid(-gap), a.d - b.d
    h = _along(by_a * by_b, apart * apart) + _along(by_a, a.h) + _along(by_b, b.h)
    return Dual(nm.logaddexp(a.v, b.v), _along(by_a, a.d) + _along(by_b, b.d), h)


def _arctan2(a: Dual, b: Dual) -> Dual:
    y, x = a.v, b.v
    size = nm.maximum(abs(y), abs(x))  # no square overflows or vanishes
    no_angle = (size == 0) | (size == np.inf)  # no slope there is, or all are 0
    size = nm.where(no_angle, 1, size)
    u, v = nm.where(no_angle, 0, y) / size, nm.where(no_angle, 0, x) / size
    square = nm.where(no_angle, 1, u * u + v * v)
    by_a, by_b, fourth = v / square / size, -u / square / size, square * square
    by_aa = -(u + u) * v / fourth / size / size
    cross = _along((u - v) * (u + v) / fourth / size / size, a.d * b.d)
    h = _along(by_aa, a.d * a.d - b.d * b.d) + (cross + cross)
    d = _along(by_a, a.d) + _along(by_b, b.d)
    return Dual(nm.arctan2(y, x), d, h + _along(by_a, a.h) + _along(by_b, b.h))


def _compare(relation: Rule) -> Rule:
    return lambda a, b: relation(a.v, b.v)


def _choose(condition: Number, a: Any, b: Any) -> Any:
    """`a` where the condition holds, else `b`, without a branch: of Duals, Pairs, or numbers."""
    if isinstance(a, Pair):
        return Pair(_choose(condition, a.d, b.d), _choose(condition, a.e, b.e))
    if isinstance(a, Number):
        return nm.where(condition, a, b)
    if a.moves or b.moves:
        a, b = a.moving(b), b.moving(a)
        return Dual(*(_choose(condition, getattr(a, f), getattr(b, f)) for f in "vdh"))
    return Dual(nm.where(condition, a.v, b.v))


def _extreme(first: Rule) -> Rule:
    # A NaN is taken wherever it stands, as NumPy's maximum does.
    return lambda a, b: _choose(first(a.v, b.v) | (a.v != a.v), a, b)


_maximum, _minimum = _extreme(operator.ge), _extreme(operator.le)

# Every spelling of an operation, how many numbers it takes, and its rule: a function of as many Duals.
RULES: list[tuple[tuple[Any, ...], int, Rule]] = [
    ((operator.add, operator.iadd, np.add), 2, _add),
    ((operator.sub, operator.isub, np.subtract), 2, _subtract),
    ((operator.mul, operator.imul, np.multiply), 2, _multiply),
    ((operator.truediv, operator.itruediv, np.divide, np.true_divide), 2, _divide),
    ((operator.pow, operator.ipow, builtins.pow, np.power, _libm.pow, math.power), 2, _power),
    *(
        ((relation,), 2, _compare(relation))
        for relation in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)
    ),
    ((bool,), 1, lambda a: a.v != 0),
    ((operator.neg, np.negative), 1, _negative),
    ((operator.pos,), 1, lambda a: a + 0),
    ((builtins.abs, np.abs, _libm.fabs, np.fabs), 1, _absolute),
    ((math.sign, np.sign), 1, _flat("sign")),
    ((math.floor, np.floor, _libm.floor), 1, _flat("floor")),
    ((math.stop_gradient,), 1, _flat("stop_gradient")),
    ((math.isnan, np.isnan, _libm.isnan), 1, lambda a: a.v != a.v),
    *((spellings, 1, _of_one(rule, spellings[0].__name__)) for rule, spellings in UNARY.items()),
    *(
        ((function,), 1, _without_slope(function.__name__))
        for function in (
            math.trigamma, math.tetragamma, math.erfc_slope, math.log_ndtr_slope, math.log_ndtr_bend,
        )
    ),
    ((math.logaddexp, np.logaddexp), 2, _moving(_logaddexp, "logaddexp")),
    ((math.arctan2, np.arctan2, _libm.atan2), 2, _moving(_arctan2, "arctan2")),
    ((builtins.max, math.maximum, np.maximum), 2, _maximum),
    ((builtins.min, math.minimum, np.minimum), 2, _minimum),
    ((builtins.max,), 3, lambda a, b, c: _maximum(_maximum(a, b), c)),
    ((builtins.min,), 3, lambda a, b, c: _minimum(_minimum(a, b), c)),
    ((np.clip,), 3, lambda a, low, high: _minimum(_maximum(a, low), high)),
    ((math.where, np.where), 3, _choose),  # the first of these three is a condition
    ((math.xlogy,), 2, lambda a, b: _choose(a.v == 0, a.like(0), a * _of_one(_log, "log")(b))),
]  # fmt: skip

# Numba takes a function's parameters from its own.
OF_NUMBERS: dict[int, Callable[[Any], Any]] = {
    1: lambda f: lambda typingctx, a: f(typingctx, a),
    2: lambda f: lambda typingctx, a, b: f(typingctx, a, b),
    3: lambda f: lambda typingctx, a, b, c: f(typingctx, a, b, c),
}


class Jets:
    """What `install` gives. It has a hash, unlike Python's own namespaces."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


def install(target: Any, mixed: bool = False) -> Any:
    """Teach one target the two types.

    Parameters
    ----------
    target : object with ``types, TypingError, cgutils, intrinsic, models, register_model, lower_cast, jit``,
        the parts of the target's Numba, its type classes and its extension decorators; ``templates``, its
        module of typing templates; and ``function(kind, name)``: see `straight.Code`.
    mixed : bool
        Whether Jets carry slopes by two variables and the mixed second derivative. The rules are the same:
        a slope is then a `Pair`.

    Returns
    -------
    namespace with ``Jet``, ``Const`` (the types), ``straight``, ``nothing``, ``seed``, ``place``,
    ``options``, ``parts`` (called by kernels), the same for tuples of any length (``vary``, ``alike``,
    ``join``, ``pick``, ``stretch``, ``split``), ``arithmetic_of`` (numbers' types), and ``jit`` (compiles a
    definition's function for this target).
    """
    types, cgutils, intrinsic, jit = target.types, target.cgutils, target.intrinsic, target.jit
    templates = target.templates
    Plain = types.Number | types.IntEnumMember  # the latter is an integer, but no number to Numba

    class DualType(types.Type):  # type: ignore[name-defined]
        fields: tuple[str, ...] = ()

        def __init__(self, T):
            self.T = T
            super().__init__(f"{'Mixed' * mixed}{type(self).__name__}({T})")

        @property
        def key(self):
            return self.T

        def can_convert_from(self, typingctx, other):
            if isinstance(other, Plain) or (isinstance(self, Jet) and isinstance(other, Const)):
                return typingctx.can_convert(types.int64, types.float64)  # safe, and worse than exact
            return None

        def unify(self, typingctx, other):
            if isinstance(other, Plain) or (isinstance(self, Jet) and isinstance(other, Const)):
                return self
            return None

    class Jet(DualType):
        """Value, first and second derivative."""

        fields = ("v", "d", "h")

    class Const(DualType):
        """A number that is not differentiated, and gives its type to literals."""

        fields = ("v",)

    class PairType(types.Type):  # type: ignore[name-defined]
        """Slopes by two variables."""

        fields = ("d", "e")

        def __init__(self, T):
            self.T = T
            super().__init__(f"PairType({T})")

    def kind_of_field(type_, field):
        return PairType(type_.T) if mixed and isinstance(type_, Jet) and field == "d" else type_.T

    for kind in (Jet, Const, PairType):

        @target.register_model(kind)
        class Model(target.models.StructModel):
            def __init__(self, manager, fe_type):
                super().__init__(manager, fe_type, [(f, kind_of_field(fe_type, f)) for f in fe_type.fields])

    # ---- building and taking apart, at the level of LLVM -----------------------------------------
    def get(context, builder, type_, value, field):
        return getattr(cgutils.create_struct_proxy(type_)(context, builder, value=value), field)

    def build(context, builder, type_, *values):
        proxy = cgutils.create_struct_proxy(type_)(context, builder)
        for k, field in enumerate(type_.fields):
            zero = context.get_constant_null(kind_of_field(type_, field))
            setattr(proxy, field, values[k] if k < len(values) else zero)
        return proxy._getvalue()

    def number(context, builder, type_, value, T):
        """The plain value of a Jet, a Const or a number, in the arithmetic type."""
        if isinstance(type_, DualType):
            return get(context, builder, type_, value, "v")
        if isinstance(type_, types.IntEnumMember):
            value, type_ = context.cast(builder, value, type_, type_.dtype), type_.dtype
        return context.cast(builder, value, type_, T)

    @target.lower_cast(types.IntEnumMember, Const)
    @target.lower_cast(types.IntEnumMember, Jet)
    @target.lower_cast(types.Number, Const)
    @target.lower_cast(types.Number, Jet)
    @target.lower_cast(Const, Jet)
    def to_dual(context, builder, fromty, toty, value):
        return build(context, builder, toty, number(context, builder, fromty, value, toty.T))

    # ---- rules ------------------------------------------------------------------------------------
    def operand(code, kind, value, T):
        """An argument as a rule takes it; a plain number has the arithmetic type."""
        if isinstance(kind, types.IntegerLiteral):
            return Dual(code.constant(T, kind.literal_value), whole=kind.literal_value)

        def part(of, value, field):
            kind = kind_of_field(of, field)
            return code.number(kind, lambda: get(code.context, code.builder, of, value, field))

        if isinstance(kind, Const):
            return Dual(part(kind, value, "v"))
        if not isinstance(kind, Jet):
            return Dual(code.number(T, lambda: number(code.context, code.builder, kind, value, T)))
        v, d, h = (part(kind, value, field) for field in "vdh")
        return Dual(v, Pair(*(part(d.kind, d.value, field) for field in "de")) if mixed else d, h)

    def pack(code, made, T):
        """A rule's result as a value of its type."""
        if isinstance(made, Number):
            return made.cast(T).value
        kind = PairType(T) if isinstance(made, Pair) else kind_of(made)
        parts = (pack(code, getattr(made, field), kind.T) for field in kind.fields)
        return build(code.context, code.builder, kind, *parts)

    def kind_of(made):
        if isinstance(made, Number):
            return made.kind
        return (Jet if made.moves else Const)(made.v.kind)

    def taught(rule, chooses):
        """A rule as Numba asks for it: the types of a call, and how its code is generated."""

        def known(typingctx, *kinds):
            duals = [kind for kind in kinds if isinstance(kind, DualType)]
            plain = [kind for kind in kinds if not isinstance(kind, DualType)]
            if not duals or not all(isinstance(kind, Plain | types.Boolean) for kind in plain):
                return None
            if chooses and isinstance(kinds[0], DualType):
                return None  # a condition is true or false
            T = reduce(wider, (kind.T for kind in duals))

            def apply(code, values):
                operands = [operand(code, k, v, T) for k, v in zip(kinds, values, strict=True)]
                if chooses:
                    operands[0] = Number(code, kinds[0], values[0]).cast(types.boolean)
                return rule(*operands)

            result = apply(Code(target, typingctx), [None] * len(kinds))
            if result is None:
                return None

            def codegen(context, builder, sig, args):
                code = Code(target, context.typing_context, context, builder)
                made = apply(code, args)
                return pack(code, made, kind_of(made))

            return kind_of(result)(*kinds), codegen

        return known

    def straight(rule):
        """An intrinsic: the result of a rule of three numbers of one type, which is of it too."""

        @intrinsic
        def ruled(typingctx, x, y, z):
            def codegen(context, builder, sig, args):
                code = Code(target, context.typing_context, context, builder)
                return rule(*(Number(code, x, value) for value in args)).value

            return x(x, x, x), codegen

        return ruled

    @intrinsic
    def nothing(typingctx, numbers, options):
        """Value, slope and second derivative of 0."""
        result = types.UniTuple(numbers.dtype, 3)

        def codegen(context, builder, sig, args):
            return context.get_constant_null(sig.return_type)

        return result(numbers, options), codegen

    for spellings, count, rule in RULES:
        known = OF_NUMBERS[count](taught(rule, chooses=rule is _choose))
        for function in spellings:  # Numba asks `known`, as it asks an intrinsic
            template = templates.make_intrinsic_template(
                function, known, function.__name__, prefer_literal=rule is _power
            )
            templates.infer(template)
            templates.infer_global(function, types.Function(template))

    # ---- what kernels call ------------------------------------------------------------------------
    def seed(arity, variable, absent=()):
        """An intrinsic: the operands of one element as the definition's arguments.

        The one numbered `variable` (None: none) becomes a Jet with slope one, the others Consts; the numbers
        in `absent` stand for further operands.
        """

        @intrinsic
        def seeded(typingctx, x, t, u):
            operands = (x, t, u)[:arity]
            kinds = [(Jet if k == variable else Const)(T) for k, T in enumerate(operands)]
            result = types.Tuple(kinds + [Const(x)] * len(absent))

            def codegen(context, builder, sig, args):
                values = [*args[:arity], *(context.get_constant(x, number) for number in absent)]
                return context.make_tuple(
                    builder,
                    sig.return_type,
                    [
                        build(context, builder, type_, value, context.get_constant(type_.T, 1))
                        if isinstance(type_, Jet)
                        else build(context, builder, type_, value)
                        for type_, value in zip(sig.return_type, values, strict=True)
                    ],
                )

            return result(x, t, u), codegen

        return seeded

    def place(slots):
        """An intrinsic: numbers of a tuple as a definition's arguments.

        Each of `slots` has the index of one number, for a Const, or those of a Jet's value, slope and second
        derivative.
        """

        @intrinsic
        def placed(typingctx, numbers):
            kinds = [(Jet if len(slot) == 3 else Const)(numbers.dtype) for slot in slots]

            def codegen(context, builder, sig, args):
                values = cgutils.unpack_tuple(builder, args[0])
                made = [
                    build(context, builder, kind, *(values[k] for k in slot))
                    for kind, slot in zip(sig.return_type, slots, strict=True)
                ]
                return context.make_tuple(builder, sig.return_type, made)

            return types.Tuple(kinds)(numbers), codegen

        return placed

    def options(values, start=0):
        """An intrinsic: a pointer to float64 as a definition's options.

        An entry of `values` that is None is read from the next number, the first at index `start`; any other
        is a bool or a number known when the kernel is compiled, so that its branches cost nothing. As a
        number, a bool is 0 or 1: a Const tells true from false in an ``if``.
        """

        @intrinsic
        def unpack(typingctx, pointer, like):
            result = types.Tuple([types.boolean if type(v) is bool else Const(like) for v in values])

            def codegen(context, builder, sig, args):
                out, k = [], start
                for value, type_ in zip(values, sig.return_type, strict=True):
                    if type(value) is bool:
                        out.append(context.get_constant(types.boolean, value))
                        continue
                    if value is not None:
                        out.append(build(context, builder, type_, context.get_constant(type_.T, value)))
                        continue
                    address = builder.gep(args[0], [context.get_constant(types.intp, k)])
                    x = context.cast(builder, builder.load(address), types.float64, type_.T)
                    out.append(build(context, builder, type_, x))
                    k += 1
                return context.make_tuple(builder, sig.return_type, out)

            return result(pointer, like), codegen

        return unpack

    @intrinsic
    def parts(typingctx, y, like):
        """Value, slope and curvature as plain numbers; those of a constant are zero. Of a pair, the first."""
        if not isinstance(y, DualType | Plain | types.Boolean):
            raise target.TypingError(f"value must return one number, not {y}")

        def codegen(context, builder, sig, args):
            y_type, T = sig.args[0], like
            if isinstance(y_type, Jet):
                out = [get(context, builder, y_type, args[0], f) for f in "vdh"]
                if mixed:
                    out[1] = get(context, builder, PairType(y_type.T), out[1], "d")
            else:
                zero = context.get_constant(T, 0)
                out = [number(context, builder, y_type, args[0], T), zero, zero]
            return context.make_tuple(builder, sig.return_type, out)

        return types.UniTuple(like, 3)(y, like), codegen

    # ---- functions of tuples ----------------------------------------------------------------------
    def vary(*variables):
        """An intrinsic: a tuple of numbers as Consts, but the one that moves (None: none) a Jet of slope one.

        With `mixed` two are named: each has slope one by itself, and zero by the other.
        """

        @intrinsic
        def varied(typingctx, numbers):
            result = types.Tuple([(Jet if k in variables else Const)(T) for k, T in enumerate(numbers)])

            def codegen(context, builder, sig, args):
                out = []
                values = cgutils.unpack_tuple(builder, args[0], len(sig.return_type))
                for k, (type_, value) in enumerate(zip(sig.return_type, values, strict=True)):
                    slopes = [context.get_constant(type_.T, k == variable) for variable in variables]
                    if mixed:
                        slopes = [build(context, builder, PairType(type_.T), *slopes)]
                    out.append(build(context, builder, type_, value, *slopes))
                return context.make_tuple(builder, sig.return_type, out)

            return result(numbers), codegen

        return varied

    def arithmetic_of(operands):
        """The type that numbers are computed in: float64, or float32 if all floats are."""
        floats = {t for t in operands if isinstance(t, types.Float)}
        return types.float32 if floats == {types.float32} else types.float64

    @intrinsic
    def alike(typingctx, numbers):
        """A tuple of numbers in the one type that they are computed in."""
        for T in numbers:
            if not isinstance(T, types.Number):
                raise target.TypingError(f"takes numbers, not {T}")
        one = arithmetic_of(numbers)

        def codegen(context, builder, sig, args):
            values = cgutils.unpack_tuple(builder, args[0], len(sig.return_type))
            cast = [context.cast(builder, v, T, one) for v, T in zip(values, sig.args[0], strict=True)]
            return context.make_tuple(builder, sig.return_type, cast)

        return types.UniTuple(one, len(numbers))(numbers), codegen

    @intrinsic
    def join(typingctx, values, slopes, curvatures):
        """A tuple of Jets, of the tuples of their parts."""
        result = types.Tuple([Jet(T) for T in values])

        def codegen(context, builder, sig, args):
            count = len(sig.return_type)
            rows = zip(*(cgutils.unpack_tuple(builder, a, count) for a in args), strict=True)
            out = [build(context, builder, t, *row) for t, row in zip(sig.return_type, rows, strict=True)]
            return context.make_tuple(builder, sig.return_type, out)

        return result(values, slopes, curvatures), codegen

    def pick(indices):
        """An intrinsic: a tuple of some of a tuple's items."""

        @intrinsic
        def picked(typingctx, items):
            result = types.Tuple([items[k] for k in indices])

            def codegen(context, builder, sig, args):
                out = [builder.extract_value(args[0], k) for k in indices]
                return context.make_tuple(builder, sig.return_type, out)

            return result(items), codegen

        return picked

    def stretch(flags):
        """An intrinsic: a tuple of options, those that are flagged times a number."""

        @intrinsic
        def stretched(typingctx, options, r):
            def codegen(context, builder, sig, args):
                out = []
                for k, flag in enumerate(flags):
                    x = builder.extract_value(args[0], k)
                    if flag:
                        type_ = sig.return_type[k]
                        x = get(context, builder, type_, x, "v")
                        x = build(context, builder, type_, builder.fmul(x, args[1]))
                    out.append(x)
                return context.make_tuple(builder, sig.return_type, out)

            return options(options, r), codegen

        return stretched

    def split(count):
        """An intrinsic: values, slopes and curvatures, a tuple each, of `count` numbers (a tuple, or one)."""

        @intrinsic
        def parts_of(typingctx, ys, like):
            kinds = tuple(ys) if isinstance(ys, types.BaseTuple) else (ys,)
            if len(kinds) != count or not all(isinstance(t, DualType | Plain) for t in kinds):
                raise target.TypingError(f"terms must return {count} number(s), not {ys}")
            result = types.UniTuple(types.UniTuple(like, count), 3)

            def codegen(context, builder, sig, args):
                is_tuple = isinstance(sig.args[0], types.BaseTuple)
                items = cgutils.unpack_tuple(builder, args[0], count) if is_tuple else [args[0]]
                zero, rows = context.get_constant(like, 0), []
                for type_, y in zip(kinds, items, strict=True):
                    if isinstance(type_, Jet):
                        rows.append([get(context, builder, type_, y, f) for f in "vdh"])
                    else:
                        rows.append([number(context, builder, type_, y, like), zero, zero])
                inner = sig.return_type[0]
                out = [context.make_tuple(builder, inner, column) for column in zip(*rows, strict=True)]
                return context.make_tuple(builder, sig.return_type, out)

            return result(ys, like), codegen

        return parts_of

    return Jets(
        Jet=Jet, Const=Const, straight=straight, nothing=nothing, seed=seed, place=place, options=options,
        parts=parts, jit=jit,
        vary=vary, alike=alike, arithmetic_of=arithmetic_of, join=join, pick=pick, stretch=stretch,
        split=split,
    )  # fmt: skip
