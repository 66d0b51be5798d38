"""Derivatives of a loss from its value, by a Numba type.

A :class:`Jet` carries value, first and second derivative with respect to one variable through ordinary
Python arithmetic, branches included; a :class:`Const` is an array element or an option that is not
differentiated. A definition's function is compiled as it stands. Literals take the type of the Jet or Const
that they meet, so float32 stays float32. LLVM removes whatever a kernel does not use of a Jet.

The rules are written once, here, and installed into a target's type system by :func:`install`: the same
text serves the CPU and CUDA. Conventions at kinks are PyTorch's: the slope of ``abs`` at zero is zero, and
``maximum(a, b)`` takes the slope of its first argument at a tie, as ``clamp`` does.
"""

import builtins
import math as _libm
import operator
from typing import Any

import numpy as np

from . import math as nm

# Functions of one variable: value, first and second derivative, in terms of a Const.


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
    _exp: (nm.exp, np.exp, _libm.exp),
    _log: (nm.log, np.log, _libm.log),
    _log1p: (nm.log1p, np.log1p, _libm.log1p),
    _expm1: (nm.expm1, np.expm1, _libm.expm1),
    _sqrt: (nm.sqrt, np.sqrt, _libm.sqrt),
    _sigmoid: (nm.sigmoid,),
    _softplus: (nm.softplus,),
    _log_sigmoid: (nm.log_sigmoid,),
    _tanh: (nm.tanh, np.tanh, _libm.tanh),
    _sinh: (nm.sinh, np.sinh, _libm.sinh),
    _cosh: (nm.cosh, np.cosh, _libm.cosh),
    _sin: (nm.sin, np.sin, _libm.sin),
    _cos: (nm.cos, np.cos, _libm.cos),
    _tan: (nm.tan, np.tan, _libm.tan),
    _arcsin: (nm.arcsin, np.arcsin, _libm.asin),
    _arccos: (nm.arccos, np.arccos, _libm.acos),
    _arctan: (nm.arctan, np.arctan, _libm.atan),
    _arcsinh: (nm.arcsinh, np.arcsinh, _libm.asinh),
    _arccosh: (nm.arccosh, np.arccosh, _libm.acosh),
    _arctanh: (nm.arctanh, np.arctanh, _libm.atanh),
    _erf: (nm.erf, _libm.erf),
    _erfc: (nm.erfc, _libm.erfc),
    _log_ndtr: (nm.log_ndtr,),
    _log1mexp: (nm.log1mexp,),
    _lgamma: (nm.lgamma, _libm.lgamma),
    _digamma: (nm.digamma,),
    _square: (nm.square, np.square),
}

# Slope and second derivative are one number: it multiplies a sum, so that an infinite one is not multiplied
# by the 0 that bends a straight line.
EXPONENTIAL = (_exp, _expm1)

# Their slopes may be infinite where inner ones are 0.
STEEP = (_sqrt, _sinh, _cosh, _log_ndtr, _log1mexp, _arcsin, _arccos, _arccosh, _arctanh)


class Jets:
    """What `install` gives. It has a hash, unlike Python's own namespaces."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


def install(target: Any, mixed: bool = False) -> Any:
    """Teach one target the two types.

    Parameters
    ----------
    target : object with ``types, TypingError, cgutils, intrinsic, models, register_model, overload,
        lower_cast, jit``: the parts of the target's Numba, its type classes and its extension decorators.
    mixed : bool
        Whether Jets carry slopes by two variables and the mixed second derivative. The rules are the same:
        a slope is then a `Pair`, and the product of two slopes is half of what the mixed derivative gains.

    Returns
    -------
    namespace with ``Jet``, ``Const`` (the types), ``seed``, ``place``, ``options``, ``parts`` (called by
    kernels), the same for tuples of any length (``vary``, ``alike``, ``join``, ``pick``, ``stretch``,
    ``split``), ``arithmetic_of`` (numbers' types), and ``jit`` (compiles a definition's function for this
    target).
    """
    types, cgutils, intrinsic, jit = target.types, target.cgutils, target.intrinsic, target.jit
    overload = target.overload
    Number = types.Number | types.IntEnumMember  # the latter is an integer, but no number to Numba

    class Dual(types.Type):  # type: ignore[name-defined]
        fields: tuple[str, ...] = ()

        def __init__(self, T):
            self.T = T
            super().__init__(f"{'Mixed' * mixed}{type(self).__name__}({T})")

        @property
        def key(self):
            return self.T

        def can_convert_from(self, typingctx, other):
            if isinstance(other, Number) or (isinstance(self, Jet) and isinstance(other, Const)):
                return typingctx.can_convert(types.int64, types.float64)  # safe, and worse than exact
            return None

        def unify(self, typingctx, other):
            if isinstance(other, Number) or (isinstance(self, Jet) and isinstance(other, Const)):
                return self
            return None

    class Jet(Dual):
        """Value, first and second derivative."""

        fields = ("v", "d", "h")

    class Const(Dual):
        """A number that is not differentiated, and gives its type to literals."""

        fields = ("v",)

    class Pair(types.Type):  # type: ignore[name-defined]
        """Slopes by two variables."""

        fields = ("d", "e")

        def __init__(self, T):
            self.T = T
            super().__init__(f"Pair({T})")

    def kind_of_field(type_, field):
        return Pair(type_.T) if mixed and isinstance(type_, Jet) and field == "d" else type_.T

    for kind in (Jet, Const, Pair):

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
        if isinstance(type_, Dual):
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

    @intrinsic
    def jet(typingctx, v, d, h):
        def codegen(context, builder, sig, args):
            return build(context, builder, sig.return_type, *args)

        return Jet(v)(v, d, h), codegen

    @intrinsic
    def const(typingctx, v):
        def codegen(context, builder, sig, args):
            return build(context, builder, sig.return_type, *args)

        return Const(v)(v), codegen

    @intrinsic
    def val(typingctx, x, like):
        """The plain value of `x`, in the arithmetic type of `like` (or of `x`, a Jet or Const itself)."""
        T = x.T if isinstance(x, Dual) else like.T

        def codegen(context, builder, sig, args):
            return number(context, builder, sig.args[0], args[0], sig.return_type)

        return T(x, like), codegen

    def getter(field):
        @intrinsic
        def getfield(typingctx, x):
            def codegen(context, builder, sig, args):
                return get(context, builder, sig.args[0], args[0], field)

            return kind_of_field(x, field)(x), codegen

        return getfield

    V, D, H = map(getter, "vdh")

    @intrinsic
    def choose(typingctx, condition, a, b):
        """`a` where the condition holds, else `b`, without a branch."""
        duals = [x for x in (a, b) if isinstance(x, Dual)]
        result = next((x for x in duals if isinstance(x, Jet)), duals[0])

        def codegen(context, builder, sig, args):
            a, b = (context.cast(builder, x, t, result) for x, t in zip(args[1:], sig.args[1:], strict=True))
            c = context.cast(builder, args[0], sig.args[0], types.boolean)
            return build(
                context,
                builder,
                result,
                *(
                    builder.select(
                        c, get(context, builder, result, a, f), get(context, builder, result, b, f)
                    )
                    for f in result.fields
                ),
            )

        return result(condition, a, b), codegen

    # ---- pairs ------------------------------------------------------------------------------------
    @intrinsic
    def pair(typingctx, d, e):
        def codegen(context, builder, sig, args):
            return build(context, builder, sig.return_type, *args)

        return Pair(d)(d, e), codegen

    def of_pairs(function, both, first=None, second=None):
        """Rules for two Pairs, a Pair and a number, a number and a Pair."""

        def rule(a, b):
            kinds = isinstance(a, Pair), isinstance(b, Pair)
            if not all(isinstance(t, Pair | types.Float) for t in (a, b)):
                return None
            return {(True, True): both, (True, False): first, (False, True): second}.get(kinds)

        overload(function)(rule)

    E = getter("e")
    if mixed:
        of_pairs(operator.add, lambda a, b: pair(D(a) + D(b), E(a) + E(b)))
        of_pairs(operator.sub, lambda a, b: pair(D(a) - D(b), E(a) - E(b)))
        of_pairs(
            operator.mul,
            lambda a, b: type(D(a))(0.5) * (D(a) * E(b) + E(a) * D(b)),
            lambda a, b: pair(D(a) * b, E(a) * b),
            lambda a, b: pair(a * D(b), a * E(b)),
        )
        of_pairs(operator.truediv, None, lambda a, b: pair(D(a) / b, E(a) / b))
        overload(operator.neg)(
            lambda a: (lambda a: pair(-D(a), -E(a))) if isinstance(a, Pair) else None,
        )

    # ---- arithmetic -------------------------------------------------------------------------------
    def teach(spellings: tuple[Any, ...], rule: Any, **options: Any) -> None:
        for f in spellings:
            overload(f, **options)(rule)

    def kind_of(t):
        if isinstance(t, Jet):
            return "j"
        if isinstance(t, Const):
            return "c"
        return "n" if isinstance(t, Number | types.Boolean) else ""

    def binary(spellings, jj, jc, cj, cc):
        """Rules for two Jets, Jet and constant, constant and Jet, two constants, for every spelling."""
        rules = {"jj": jj, "jc": jc, "jn": jc, "cj": cj, "nj": cj, "cc": cc, "cn": cc, "nc": cc}
        teach(spellings, lambda a, b: rules.get(kind_of(a) + kind_of(b)))

    binary(
        (operator.add, operator.iadd, np.add),
        lambda a, b: jet(V(a) + V(b), D(a) + D(b), H(a) + H(b)),
        lambda a, b: jet(V(a) + val(b, a), D(a), H(a)),
        lambda a, b: jet(val(a, b) + V(b), D(b), H(b)),
        lambda a, b: const(val(a, b) + val(b, a)),
    )
    binary(
        (operator.sub, operator.isub, np.subtract),
        lambda a, b: jet(V(a) - V(b), D(a) - D(b), H(a) - H(b)),
        lambda a, b: jet(V(a) - val(b, a), D(a), H(a)),
        lambda a, b: jet(val(a, b) - V(b), -D(b), -H(b)),
        lambda a, b: const(val(a, b) - val(b, a)),
    )

    def times(a, b):
        cross = D(a) * D(b)
        return jet(V(a) * V(b), V(a) * D(b) + D(a) * V(b), V(a) * H(b) + H(a) * V(b) + (cross + cross))

    binary(
        (operator.mul, operator.imul, np.multiply),
        times,
        lambda a, b: jet(V(a) * val(b, a), D(a) * val(b, a), H(a) * val(b, a)),
        lambda a, b: jet(val(a, b) * V(b), val(a, b) * D(b), val(a, b) * H(b)),
        lambda a, b: const(val(a, b) * val(b, a)),
    )

    # From q b = a: q' = (a' - q b') / b and q'' = (a'' - 2 q' b' - q b'') / b.
    def over(a, b):
        q = V(a) / V(b)
        d = (D(a) - q * D(b)) / V(b)
        cross = d * D(b)
        return jet(q, d, (H(a) - (cross + cross) - q * H(b)) / V(b))

    def over_jet(a, b):
        q = val(a, b) / V(b)
        d = -q * D(b) / V(b)
        cross = d * D(b)
        return jet(q, d, -((cross + cross) + q * H(b)) / V(b))

    binary(
        (operator.truediv, operator.itruediv, np.divide, np.true_divide),
        over,
        lambda a, b: jet(V(a) / val(b, a), D(a) / val(b, a), H(a) / val(b, a)),
        over_jet,
        lambda a, b: const(val(a, b) / val(b, a)),
    )

    # In second derivatives the outer one multiplies the inner slope twice, and not its square, which may
    # overflow where it is 0.

    @jit
    def along(slope, inner):
        """The chain rule for a slope that may be infinite where the value is finite: 0 where the inner is 0.

        So the square root of a square has slope 0 at 0, and not infinity times 0.
        """
        zero = type(inner)(0)
        return nm.where(inner == zero, zero, slope * inner)

    @jit
    def along_pair(slope, inner):
        return pair(along(slope, D(inner)), along(slope, E(inner)))

    along_slope = along_pair if mixed else along

    @jit
    def three_powers(x, n, n1, n2):
        return nm.power(x, n), nm.power(x, n1), nm.power(x, n2)

    powers = getattr(target, "powers", three_powers)

    @jit
    def powered(a, p):
        """a ** p for a constant p: the slopes stay right at a = 0 for p = 0, 1 and 2, where 0 ** 0 is 1."""
        n, x, zero = V(p), V(a), V(0 * p)
        n1, n2 = V(p - 1), V(p - 2)
        y, y1, y2 = powers(x, n, n1, n2)
        d1 = zero if n == zero else n * y1
        d2 = zero if n * n1 == zero else n * n1 * y2
        return jet(y, along_slope(d1, D(a)), along_slope(d2, D(a)) * D(a) + along(d1, H(a)))

    @jit
    def power_of_jets(a, b):
        """a ** b, both of which move: at a = 0 as `powered`, and b's slope is 0 where the power is."""
        x, n = V(a), V(b)
        zero, one = type(n)(0), type(n)(1)
        n1 = n - one
        y, y1, y2 = powers(x, n, n1, n1 - one)
        log = nm.log(x)
        by_a = zero if n == zero else n * y1
        by_b = nm.where(y == zero, zero, y * log)
        by_aa = zero if n * n1 == zero else n * n1 * y2
        by_ab = y1 + n * nm.where(y1 == zero, zero, y1 * log)
        by_bb = nm.where(y == zero, zero, by_b * log)
        cross = along(by_ab, D(a) * D(b))
        h = along_slope(by_aa, D(a)) * D(a) + (cross + cross) + along_slope(by_bb, D(b)) * D(b)
        d = along_slope(by_a, D(a)) + along_slope(by_b, D(b))
        return jet(y, d, h + along(by_a, H(a)) + along(by_b, H(b)))

    def power_of_constant(a, b):
        x = val(a, b)
        return power_of_jets(jet(x, D(b) - D(b), H(b) - H(b)), b)

    def power_literal(exponent):
        """Small whole exponents as products: exact, and no power function in the kernel."""
        return {
            0: lambda a, b: 0 * a + 1,
            1: lambda a, b: a + 0,
            2: lambda a, b: a * a,
            3: lambda a, b: a * a * a,
            4: lambda a, b: (a * a) * (a * a),
            -1: lambda a, b: 1 / a,
            -2: lambda a, b: 1 / (a * a),
        }.get(exponent)

    def power_rule(a, b):
        kinds = kind_of(a) + kind_of(b)
        if isinstance(b, types.IntegerLiteral) and kinds in ("jn", "cn"):
            rule = power_literal(b.literal_value)
            if rule is not None:
                return rule
        if kinds in ("jc", "jn"):
            return lambda a, b: powered(a, const(val(b, a)))
        if kinds == "jj":
            return lambda a, b: power_of_jets(a, b)
        if kinds in ("cj", "nj"):
            return power_of_constant
        if kinds in ("cc", "cn", "nc"):
            return lambda a, b: const(nm.power(val(a, b), val(b, a)))
        return None

    powers_by_name = operator.pow, operator.ipow, builtins.pow, np.power, _libm.pow, nm.power
    teach(powers_by_name, power_rule, prefer_literal=True)

    def meet(a, b):
        """Whether these are two operands of which one at least is a Jet or a Const."""
        return kind_of(a) + kind_of(b) not in ("", "n", "nn", "j", "c")

    def comparison(compare):
        def rule(a, b):
            return (lambda a, b: compare(val(a, b), val(b, a))) if meet(a, b) else None

        overload(compare)(rule)

    for f in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
        comparison(f)

    overload(bool)(lambda a: (lambda a: V(a) != V(0 * a)) if isinstance(a, Dual) else None)

    def negative(a):
        return {"j": lambda a: jet(-V(a), -D(a), -H(a)), "c": lambda a: const(-V(a))}.get(kind_of(a))

    teach((operator.neg, np.negative), negative)
    overload(operator.pos)(lambda a: (lambda a: a + 0) if isinstance(a, Dual) else None)

    def absolute(a):
        def of_jet(a):
            s = val(nm.sign(V(a)), a)
            return jet(abs(V(a)), s * D(a), s * H(a))

        return {"j": of_jet, "c": lambda a: const(abs(V(a)))}.get(kind_of(a))

    teach((builtins.abs, np.abs, _libm.fabs, np.fabs), absolute)
    teach(
        (nm.sign, np.sign),
        lambda a: (lambda a: const(nm.sign(V(a)))) if isinstance(a, Dual) else None,
    )
    teach(
        (nm.isnan, np.isnan, _libm.isnan),
        lambda a: (lambda a: V(a) != V(a)) if isinstance(a, Dual) else None,
    )

    def unary(derivatives, spellings):
        at, function = jit(derivatives), spellings[0]

        def of_jet(a):
            y, d1, d2 = at(const(V(a)))
            return jet(V(y), V(d1) * D(a), V(d2) * D(a) * D(a) + V(d1) * H(a))

        def of_steep(a):
            y, d1, d2 = at(const(V(a)))
            return jet(V(y), along_slope(V(d1), D(a)), along_slope(V(d2), D(a)) * D(a) + along(V(d1), H(a)))

        def of_exponential(a):
            y, d, _ = at(const(V(a)))
            return jet(V(y), V(d) * D(a), V(d) * (D(a) * D(a) + H(a)))

        def of_const(a):
            return const(function(V(a)))

        rule = of_steep if derivatives in STEEP else of_exponential if derivatives in EXPONENTIAL else of_jet
        teach(spellings, lambda a: {"j": rule, "c": of_const}.get(kind_of(a)))

    for derivatives, spellings in UNARY.items():
        unary(derivatives, spellings)

    def slope_only(function):
        """A function that occurs in derivatives of others, and has none here."""
        rule = {"c": lambda a: const(function(V(a)))}
        teach((function,), lambda a: rule.get(kind_of(a)))

    for function in (nm.trigamma, nm.tetragamma, nm.erfc_slope, nm.log_ndtr_slope, nm.log_ndtr_bend):
        slope_only(function)

    # ---- functions of two variables ----------------------------------------------------------------
    @intrinsic
    def still(typingctx, x, like):
        """A number or a Const as a Jet that does not move."""

        def codegen(context, builder, sig, args):
            return context.cast(builder, args[0], sig.args[0], sig.return_type)

        return like(x, like), codegen

    def of_two(spellings, rule):
        at, function = jit(rule), spellings[0]
        binary(
            spellings,
            lambda a, b: at(a, b),
            lambda a, b: at(a, still(b, a)),
            lambda a, b: at(still(a, b), b),
            lambda a, b: const(function(val(a, b), val(b, a))),
        )

    def logaddexp(a, b):
        x, y = V(a), V(b)
        gap = nm.where(x == y, type(x)(0), x - y)  # of two infinities too
        by_a, by_b, apart = nm.sigmoid(gap), nm.sigmoid(-gap), D(a) - D(b)
        h = along(by_a * by_b, apart * apart) + along(by_a, H(a)) + along(by_b, H(b))
        return jet(nm.logaddexp(x, y), along_slope(by_a, D(a)) + along_slope(by_b, D(b)), h)

    def arctan2(a, b):
        y, x = V(a), V(b)
        zero, one = type(x)(0), type(x)(1)
        size = nm.maximum(abs(y), abs(x))  # no square overflows or vanishes
        no_angle = (size == zero) | (size == type(x)(np.inf))  # no slope there is, or all are 0
        size = nm.where(no_angle, one, size)
        u, v = nm.where(no_angle, zero, y) / size, nm.where(no_angle, zero, x) / size
        square = nm.where(no_angle, one, u * u + v * v)
        by_a, by_b, fourth = v / square / size, -u / square / size, square * square
        by_aa = -(u + u) * v / fourth / size / size
        cross = along((u - v) * (u + v) / fourth / size / size, D(a) * D(b))
        h = along(by_aa, D(a) * D(a) - D(b) * D(b)) + (cross + cross)
        d = along_slope(by_a, D(a)) + along_slope(by_b, D(b))
        return jet(nm.arctan2(y, x), d, h + along(by_a, H(a)) + along(by_b, H(b)))

    of_two((nm.logaddexp, np.logaddexp), logaddexp)
    of_two((nm.arctan2, np.arctan2, _libm.atan2), arctan2)

    # ---- functions without slopes -------------------------------------------------------------------
    def flat(spellings, function):
        teach(spellings, lambda a: (lambda a: const(function(V(a)))) if isinstance(a, Dual) else None)

    flat((nm.floor, np.floor, _libm.floor), nm.floor)
    flat((nm.stop_gradient,), nm.stop_gradient)

    # ---- choices ----------------------------------------------------------------------------------
    def extreme(spellings, first):
        def rule(a, b):
            if not meet(a, b):
                return None
            # A NaN is taken wherever it stands, as NumPy's maximum does.
            return lambda a, b: choose(first(val(a, b), val(b, a)) | (val(a, b) != val(a, b)), a, b)

        def rule_of_three(a, b, c):
            if any(isinstance(t, Dual) for t in (a, b, c)):
                return lambda a, b, c: function(function(a, b), c)
            return None

        function = spellings[0]
        teach(spellings, rule)
        teach(spellings[:1], rule_of_three)

    extreme((builtins.max, nm.maximum, np.maximum), operator.ge)
    extreme((builtins.min, nm.minimum, np.minimum), operator.le)

    def clip(a, low, high):
        if any(isinstance(t, Dual) for t in (a, low, high)):
            return lambda a, low, high: nm.minimum(nm.maximum(a, low), high)
        return None

    teach((np.clip,), clip)

    def where(condition, a, b):
        if isinstance(condition, Number | types.Boolean) and meet(a, b):
            return lambda condition, a, b: choose(condition, a, b)
        return None

    teach((nm.where, np.where), where)

    def xlogy(a, b):
        return (lambda a, b: nm.where(a == 0, 0, a * nm.log(b))) if meet(a, b) else None

    overload(nm.xlogy)(xlogy)

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
        if not isinstance(y, Dual | Number | types.Boolean):
            raise target.TypingError(f"value must return one number, not {y}")

        def codegen(context, builder, sig, args):
            y_type, T = sig.args[0], like
            if isinstance(y_type, Jet):
                out = [get(context, builder, y_type, args[0], f) for f in "vdh"]
                if mixed:
                    out[1] = get(context, builder, Pair(y_type.T), out[1], "d")
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
                        slopes = [build(context, builder, Pair(type_.T), *slopes)]
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
            if len(kinds) != count or not all(isinstance(t, Dual | Number) for t in kinds):
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
        Jet=Jet, Const=Const, seed=seed, place=place, options=options, parts=parts, jit=jit,
        vary=vary, alike=alike, arithmetic_of=arithmetic_of, join=join, pick=pick, stretch=stretch,
        split=split,
    )  # fmt: skip
