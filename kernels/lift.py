"""A definition of one row's value, as the compiled functions of value and derivatives that a kernel calls.

A row of class scores x, with p = softmax(x), own class y, class weights w and the targets t_c (own class,
smoothing and weights in them; W is their sum), has these statistics:

================  ==========================================================  =====================
`log_prob`        log p_y                                                     gradient d_cy - p_c
`rest`            1 - p_y, without cancellation                               goes along
`class_weight`    w_y                                                         constant
`cross_entropy`   -sum_c t_c log p_c                                          W p_c - t_c
`logsumexp`       log sum_c e^(x_c)                                           p_c
================  ==========================================================  =====================

So the gradient of any function of them has three numbers a row: its slopes by each. The jets give those, and
second derivatives for the curvature; mixed ones by moving two statistics at once.
"""

import inspect
import types
from functools import cache
from itertools import combinations
from typing import Any

from .freeze import frozen
from .spec import (
    ABSOLUTE,
    EXACT,
    FISHER,
    GERSHGORIN,
    GRADIENT,
    MAJORIZER,
    STATISTICS,
    Linear,
    Scalars,
    ScoreFunctions,
    Scores,
    VectorFunctions,
)
from .straight import Functions, Number

OWN, MIXED, NORM = range(3)  # what moves together
MOVES = {"log_prob": OWN, "rest": OWN, "cross_entropy": MIXED, "logsumexp": NORM}
# Behind the statistics, in the numbers that arguments are placed from.
ONE, ZERO, MINUS_P = range(5, 8)


def moves(functions: ScoreFunctions) -> set[int]:
    """The groups of statistics that a definition depends on."""
    return {MOVES[n] for n in functions.statistics if n in MOVES}


def settle(slope: Number, factor: Number, value: Number) -> Number:
    """Return a slope; 0 in place of an infinite one of a finite value where the factor to come is 0.

    The factor falls to 0 as the variable comes to where the slope is infinite; as long as the value is
    finite, the slope grows slower than that.
    """
    lost = (factor == 0) & (value - value == 0) & (slope - slope != 0)
    return Functions.where(lost, 0, slope)


@cache
def lift_scores(functions: ScoreFunctions, jets: Any, second: bool, lse_square: bool) -> Any:
    """Compile a definition's value and its derivatives by a row's statistics.

    Parameters
    ----------
    functions : ScoreFunctions
    jets : namespace
        Of a target, from `jets.install`.
    second : bool
        Whether second derivatives are wanted.
    lse_square : bool
        Whether ``square * logsumexp**2`` is added.

    Returns
    -------
    function ``(log_prob, rest, p, class_weight, cross_entropy, logsumexp, square, options)``
        Gives the value and the slopes by `OWN`, `MIXED`, `NORM`; with `second` also the second derivatives by
        each, and twice the mixed ones by `OWN` and `MIXED`, `OWN` and `NORM`, `MIXED` and `NORM`. Derivatives
        by what the definition does not ask for are zero.
    """
    definition, parts, jit = jets.jit(frozen(functions.value)), jets.parts, jets.jit
    asked = moves(functions)

    def along(*groups: int) -> Any:
        """Value, slope and second derivative, as the statistics of some groups move."""
        moving = asked.intersection(groups)
        if not moving and asked:
            return nothing
        slots: list[tuple[int, ...]] = []
        for name in functions.statistics:
            k = STATISTICS.index(name)
            if MOVES.get(name) not in moving:
                slots.append((k,))
            else:  # d(1 - p) = -p d(log p), and once more
                slots.append((k, MINUS_P, MINUS_P) if name == "rest" else (k, ONE, ZERO))
        place = jets.place(tuple(slots))

        @jit
        def at(numbers, o):
            return parts(definition(*(place(numbers) + o)), numbers[0])

        return at

    nothing = jets.nothing
    own, mixed, norm = along(OWN), along(MIXED), along(NORM)
    lead = min(asked, default=OWN)

    # A slope by `OWN` is multiplied by `rest`, or by less: by probabilities that it is the sum of.
    settled = jets.straight(settle if OWN in asked else lambda slope, factor, value: slope)

    @jit
    def first(log_prob, rest, p, class_weight, cross_entropy, logsumexp, square, o):
        T = type(p)
        numbers = (log_prob, rest, class_weight, cross_entropy, logsumexp, T(1), T(0), -p)
        each = own(numbers, o), mixed(numbers, o), norm(numbers, o)
        value = each[lead][0]
        return value, settled(each[0][1], rest, value), each[1][1], each[2][1]

    def pair(a: int, b: int) -> Any:
        return along(a, b) if {a, b} <= asked else nothing

    if second:
        own_mixed, own_norm, mixed_norm = pair(OWN, MIXED), pair(OWN, NORM), pair(MIXED, NORM)
        flags = {OWN, MIXED} <= asked, {OWN, NORM} <= asked, {MIXED, NORM} <= asked

    @jit
    def both(log_prob, rest, p, class_weight, cross_entropy, logsumexp, square, o):
        T = type(p)
        numbers = (log_prob, rest, class_weight, cross_entropy, logsumexp, T(1), T(0), -p)
        each = own(numbers, o), mixed(numbers, o), norm(numbers, o)
        value, a, b, r = each[lead][0], each[0][2], each[1][2], each[2][2]
        ab = own_mixed(numbers, o)[2] - a - b if flags[0] else T(0)
        ar = own_norm(numbers, o)[2] - a - r if flags[1] else T(0)
        br = mixed_norm(numbers, o)[2] - b - r if flags[2] else T(0)
        slope, a = settled(each[0][1], rest, value), settled(a, rest, value)
        ab, ar = settled(ab, rest, value), settled(ar, rest, value)
        return value, slope, each[1][1], each[2][1], a, b, r, ab, ar, br

    lifted = both if second else first
    if not lse_square:
        return lifted

    @jit
    def squared_first(log_prob, rest, p, class_weight, cross_entropy, logsumexp, square, o):
        v, a, b, r = lifted(log_prob, rest, p, class_weight, cross_entropy, logsumexp, square, o)
        slope = square * logsumexp
        return v + slope * logsumexp, a, b, r + (slope + slope)

    @jit
    def squared_both(log_prob, rest, p, class_weight, cross_entropy, logsumexp, square, o):
        d = lifted(log_prob, rest, p, class_weight, cross_entropy, logsumexp, square, o)
        slope = square * logsumexp
        return (
            d[0] + slope * logsumexp, d[1], d[2], d[3] + (slope + slope),
            d[4], d[5], d[6] + (square + square), d[7], d[8], d[9],
        )  # fmt: skip

    return squared_both if second else squared_first


class Affine:
    """Stands for a number while a definition is tried: is it a linear function, or one plus a constant?"""

    def __init__(self, degree: int, constant: bool) -> None:
        self.degree = degree  # 0: an option or a constant; 1: moves with the statistics
        self.constant = constant  # whether there may be a part that does not move

    def _add(self, other: Any) -> "Affine":
        other = as_affine(other)
        return Affine(max(self.degree, other.degree), self.constant or other.constant)

    def _multiply(self, other: Any) -> "Affine":
        other = as_affine(other)
        if self.degree and other.degree:
            raise TypeError("not affine")
        moving = self if self.degree else other
        return Affine(moving.degree, moving.constant)

    def _over(self, other: Any) -> "Affine":
        if as_affine(other).degree:
            raise TypeError("not affine")
        return self

    def _unknown(self, *others: Any) -> Any:
        raise TypeError("depends on a number's value")

    __add__ = __radd__ = __sub__ = __rsub__ = _add
    __mul__ = __rmul__ = _multiply
    __truediv__ = _over
    __neg__ = __pos__ = lambda self: self
    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __float__ = _unknown
    __array_ufunc__ = None


def as_affine(x: Any) -> Affine:
    return x if isinstance(x, Affine) else Affine(0, bool(x + 0))


def in_python(function: Any) -> Any:
    """Return a definition's function with the compiled functions that it calls as Python's."""
    scope = {n: in_python(v.py_func) if hasattr(v, "py_func") else v for n, v in function.__globals__.items()}
    return types.FunctionType(function.__code__, scope, function.__name__, None, function.__closure__)


@cache
def is_linear(functions: ScoreFunctions) -> tuple[bool, bool]:
    """Whether a definition is affine in its statistics; and whether it is a multiple of `cross_entropy`.

    Of an affine one all second derivatives by the statistics are zero, and no kernel computes them.
    """
    arguments = [
        Affine(0, True) if n == "class_weight" else object() if n == "rest" else Affine(1, False)
        for n in functions.statistics
    ]
    options = [Affine(0, True) if o is None else o for o in functions.options]
    try:
        result = as_affine(in_python(functions.value)(*arguments, *options))
    except Exception:
        return False, False
    multiple = result.degree == 1 and not result.constant and moves(functions) == {MIXED}
    return True, multiple


def scales_with_masses(p: Scores | Linear) -> bool:
    """Whether a problem's rows are zero where their target's classes have no weight."""
    return not p.lse_square_scale and is_linear(p.functions)[1]


# ---- what stands for the curvature --------------------------------------------------------------------


def lift_curvature(derived: Any, scalars: Scalars, policy: str, variable: int, jets: Any) -> Any:
    """Compile what stands for an element's second derivative by an operand, in that one's place.

    Parameters
    ----------
    derived : function
        ``(x, t, u, options) -> value, slope, second derivative``; what is returned is such a function too.
    """
    if policy == EXACT:
        return derived
    stands = _element_curvature(scalars, policy, variable, jets)

    @jets.jit
    def with_curvature(x, t, u, o):
        value, slope, curvature = derived(x, t, u, o)
        return value, slope, stands(x, t, u, o, slope, curvature)

    return with_curvature


def _element_curvature(scalars: Scalars, policy: str, variable: int, jets: Any) -> Any:
    """``(x, t, u, options, slope, curvature)``: what a policy other than `EXACT` gives."""
    stated = [f for p, k, f in scalars.curvatures if (p, k) == (policy, variable)]
    if stated:
        definition, constant = jets.jit(frozen(stated[0])), jets.seed(scalars.arity, None, scalars.absent)
        parts = jets.parts

        @jets.jit
        def by_hand(x, t, u, o, slope, curvature):
            return parts(definition(*(constant(x, t, u) + o)), x)[0]

        return by_hand

    @jets.jit
    def quotient(x, t, u, o, slope, curvature):
        """The slope over the residual; where that is 0, the limit, which the other is nowhere above."""
        bound = slope / (x - t if variable == 0 else t - x)
        return bound if bound > curvature else curvature

    @jets.jit
    def absolute(x, t, u, o, slope, curvature):
        return abs(curvature)

    @jets.jit
    def gradient(x, t, u, o, slope, curvature):
        return abs(slope)

    return {MAJORIZER: quotient, ABSOLUTE: absolute, GRADIENT: gradient}[policy]


def lift_score_curvature(policy: str, floored: bool, jets: Any) -> Any:
    """Compile what stands for the second derivative by a score.

    Of losses that are linear in their row's statistics the Hessian is `most` times diag(p) - p p', so it is
    its own mean under the model; the sum of absolute values of its row is twice the diagonal; and its largest
    eigenvalue is at most half of `most` (Böhning 1992).

    Returns
    -------
    function ``(gradient, curvature, up, most, low)``, or None where that is the second derivative itself
        `up` has multiplied gradient and curvature; `low` is what is not fallen below without it.
    """
    if policy in (EXACT, FISHER) and not floored:
        return None
    is_signed = policy in (EXACT, FISHER)

    @jets.jit
    def size(gradient, curvature, most):
        if policy == GRADIENT:
            return abs(gradient)
        if policy == MAJORIZER:
            return abs(most) * type(most)(0.5)
        if policy == ABSOLUTE:
            return abs(curvature)
        if policy == GERSHGORIN:
            return abs(curvature) + abs(curvature)
        return curvature

    @jets.jit
    def stands(gradient, curvature, up, most, low):
        found, negative = size(gradient, curvature, most), up < type(up)(0)
        if not is_signed:
            found = -found if negative else found
        if floored:
            least = low * up
            if negative:
                found = least if found > least else found
            else:
                found = least if found < least else found
        return found

    return stands


# ---- functions of numbers -----------------------------------------------------------------------------


def lift_function(function: Any, count: int, order: int, derivatives: Any) -> Any:
    """``(tuple of numbers) -> value, gradient`` of a function of numbers; of order 2 the Hessian is third.

    The gradient is a tuple, the Hessian one of rows. Each of the `count` arguments moves by itself, and for
    the Hessian each two. `derivatives` gives a target's jets, those of mixed derivatives if asked to.
    """
    jets, source = derivatives(), frozen(function)
    jit, alike = jets.jit, jets.alike

    def moved(of: Any, *variables: int) -> Any:
        body, vary, parts = of.jit(source), of.vary(*variables), of.parts

        @jit
        def at(numbers):
            return parts(body(*vary(numbers)), numbers[0])

        return at

    def start() -> Any:
        at = moved(jets, 0)

        @jit
        def found(numbers):
            value, slope, bend = at(numbers)
            return value, (slope,), (bend,)

        return found

    def with_slope(before: Any, k: int) -> Any:
        at = moved(jets, k)

        @jit
        def found(numbers):
            value, slopes, bends = before(numbers)
            _, slope, bend = at(numbers)
            return value, slopes + (slope,), bends + (bend,)  # noqa: RUF005

        return found

    def with_bend(before: Any, i: int, k: int) -> Any:
        at = moved(derivatives(mixed=True), i, k)

        @jit
        def found(numbers):
            value, slopes, bends = before(numbers)
            return value, slopes, bends + (at(numbers)[2],)  # noqa: RUF005

        return found

    found = start()
    for k in range(1, count):
        found = with_slope(found, k)
    if order == 1:

        @jit
        def first(numbers):
            value, slopes, _ = found(alike(numbers))
            return value, slopes

        return first
    place = {(k, k): k for k in range(count)}  # in the tuple of second derivatives
    for at, (i, k) in enumerate(combinations(range(count), 2), count):
        found = with_bend(found, i, k)
        place[i, k] = place[k, i] = at

    def rows(i: int) -> Any:
        pick = jets.pick(tuple(place[i, k] for k in range(count)))
        before = rows(i - 1) if i else None
        if before is None:
            return jit(lambda bends: (pick(bends),))
        return jit(lambda bends: before(bends) + (pick(bends),))  # noqa: RUF005

    hessian = rows(count - 1)

    @jit
    def second(numbers):
        value, slopes, bends = found(alike(numbers))
        return value, slopes, hessian(bends)

    return second


# ---- vectors ------------------------------------------------------------------------------------------

# A row of vectors v, with sums S_k = sum_j t_k(v_j) over its coordinates and the value f(S): the gradient by
# a coordinate is sum_k f_k t_k'(v_j), of one jet for each sum and one for each vector; the second derivative
# is that of f with the sums' own slopes and second derivatives.


def _positions(function: Any, first: int, names: tuple[str, ...]) -> tuple[int, ...]:
    """Return each parameter's place among all numbers: the `first` by position, then by name in `names`."""
    asked = tuple(inspect.signature(function).parameters)
    return (*range(first), *(first + names.index(n) for n in asked[first:]))


def lift_terms(f: VectorFunctions, jets: Any, variable: int | None) -> Any:
    """``(x, y, z, options) -> values`` of terms; with a variable ``-> slopes, curvatures``."""
    assert f.terms is not None
    order = _positions(f.terms, f.arity, f.options)
    body, pick, split = jets.jit(frozen(f.terms)), jets.pick(order), jets.split(f.sums)
    seed = jets.seed(f.arity, variable)

    @jets.jit
    def values(x, y, z, o):
        return split(body(*pick(seed(x, y, z) + o)), x)[0]

    @jets.jit
    def derived(x, y, z, o):
        _, d, h = split(body(*pick(seed(x, y, z) + o)), x)
        return d, h

    return values if variable is None else derived


def _finish(f: VectorFunctions, jets: Any) -> tuple[Any, Any]:
    """A definition's compiled `finish`, and its arguments of all sums, row arrays and options."""
    order = _positions(f.finish, f.sums, (*f.row_arrays, *f.options))
    return jets.jit(frozen(f.finish)), jets.pick(order)


def lift_finish(f: VectorFunctions, jets: Any, wrt: tuple[int, ...]) -> Any:
    """``(sums and row arrays, options) -> value, slopes`` by some of the first."""
    body, pick = _finish(f, jets)
    constant, parts = jets.vary(None), jets.parts

    @jets.jit
    def value(numbers, o):
        return parts(body(*pick(constant(numbers) + o)), numbers[0])[0], ()

    def first(variable: int) -> Any:
        vary = jets.vary(variable)

        @jets.jit
        def derived(numbers, o):
            value, slope, _ = parts(body(*pick(vary(numbers) + o)), numbers[0])
            return value, (slope,)

        return derived

    def more(before: Any, variable: int) -> Any:
        vary = jets.vary(variable)

        @jets.jit
        def derived(numbers, o):
            value, slopes = before(numbers, o)
            # Numba joins tuples, but unpacks none whose types differ.
            return value, slopes + (parts(body(*pick(vary(numbers) + o)), numbers[0])[1],)  # noqa: RUF005

        return derived

    found = first(wrt[0]) if wrt else value
    for variable in wrt[1:]:
        found = more(found, variable)
    return found


def lift_bend(f: VectorFunctions, jets: Any) -> Any:
    """``(sums, slopes, curvatures, row arrays, options) -> second derivative`` by a coordinate."""
    body, pick = _finish(f, jets)
    constant, parts, join = jets.vary(None), jets.parts, jets.join

    @jets.jit
    def bend(sums, slopes, curvatures, rows, o):
        arguments = join(sums, slopes, curvatures) + constant(rows) + o
        return parts(body(*pick(arguments)), sums[0])[2]

    return bend


def lift_row_bend(f: VectorFunctions, jets: Any, row: int) -> Any:
    """``(sums and row arrays, options) -> second derivative`` by one of the row arrays."""
    body, pick = _finish(f, jets)
    vary, parts = jets.vary(f.sums + row), jets.parts

    @jets.jit
    def bend(numbers, o):
        return parts(body(*pick(vary(numbers) + o)), numbers[0])[2]

    return bend
