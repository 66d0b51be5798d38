"""What a loss takes: kinds of options and of operands, each with its check, its samples and its bad examples.

A definition states its arguments with these; the checks that users meet, the sampling that tests and
benchmarks do and the errors that tests provoke all come from here.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .kernels.layout import class_axis, class_rows

REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class Interval:
    """The numbers that an argument may be; a bound that is open is not among them, NaN never is."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: float) -> bool:
        above = self.low < x if self.open_low else self.low <= x
        return above and (x < self.high if self.open_high else x <= self.high)

    def __str__(self) -> str:
        if self.high < math.inf:
            left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
            return f"in {left}{self.low:g}, {self.high:g}{right}"
        if self.low > -math.inf:
            return f"{'>' if self.open_low else '>='} {self.low:g}"
        return "a number"

    @property
    def bad(self) -> tuple[float, ...]:
        """Numbers just outside, and NaN."""
        found = [self.low] * self.open_low + [self.high] * self.open_high
        found += [x for x in (self.low - 1, self.high + 1) if math.isfinite(x)]
        return (*found, math.nan)


@dataclass(frozen=True)
class Option:
    """An option of a loss.

    Attributes
    ----------
    default : object
    check : callable
        ``check(loss, name, value)`` returns the value in canonical form, or raises a TypeError or
        ValueError that names both.
    samples : tuple
        Values worth testing, the bounds of the domain among them.
    bad : tuple of (value, exception type, part of the message)
    domain : Interval, tuple or None
        The numbers, or the values, that it may be; compiled code checks it too. None where only `check`
        knows.
    array : bool
        Whether it is an array (class or element weights), not a setting.
    call_only : bool
        Whether only the function, and the call of the class, take it: the constructor does not.
    """

    default: Any
    check: Callable[[str, str, Any], Any]
    samples: tuple[Any, ...] = ()
    bad: tuple[tuple[Any, type[Exception], str], ...] = ()
    domain: Interval | tuple[Any, ...] | None = None
    array: bool = False
    call_only: bool = False
    annotation: str = "Any"


def number(loss: str, name: str, value: Any) -> float:
    """Return a real number as a float; a TypeError for anything else."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, numbers.Real | np.floating | np.integer) or isinstance(value, bool | np.bool_):
        raise TypeError(f"{loss}: {name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{loss}: {name} must be a number that float64 holds") from None


def within(default: float, domain: Interval, samples: tuple[float, ...]) -> Any:
    """A number in an interval."""

    def check(loss: str, name: str, value: Any) -> float:
        x = number(loss, name, value)
        if x not in domain:
            raise ValueError(f"{loss}: {name} must be {domain}, got {x}")
        return x

    bad = (*((b, ValueError, str(domain)) for b in domain.bad), ("1", TypeError, "number"))
    return Option(default, check, (default, *samples), bad, domain, annotation="float")


def positive(default: float) -> Any:
    """A number above zero."""
    return within(default, Interval(0.0, open_low=True), (0.25, 2.0))


def length(default: float) -> Any:
    """A number above zero that residuals are divided by: samples are about as large as those."""
    return within(default, Interval(0.0, open_low=True), (1.0, 4.0))


def non_negative(default: float) -> Any:
    """A number, zero or above."""
    return within(default, Interval(0.0), (0.0, 0.25, 2.0))


def real(default: float, samples: tuple[float, ...] = (0.0, 0.7, -0.3)) -> Any:
    """Any number but NaN."""
    return within(default, Interval(), samples)


def between(default: float, low: float, high: float) -> Any:
    """A number in a closed interval."""
    return within(default, Interval(low, high), (low, (low + high) / 2, high))


def integer(default: int) -> Any:
    """A whole number that an int64 holds."""

    def check(loss: str, name: str, value: Any) -> int:
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value[()]
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise TypeError(f"{loss}: {name} must be an integer, got {value!r}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{loss}: {name} must fit in 64 bits, got {value}")
        return int(value)

    bad = ((0.5, TypeError, "integer"), ("1", TypeError, "integer"), (2**63, ValueError, "64 bits"))
    return Option(default, check, (default, 1), bad, annotation="int")


def order(default: float) -> Any:
    """The p of a norm: at least 1, or infinite."""
    return within(default, Interval(1.0), (1.0, 1.5, 3.0, math.inf))


DISTANCES = ("euclidean", "sqeuclidean", "cosine", "manhattan")


def distance() -> Any:
    """None, a name in `DISTANCES`, or the caller's own function over rows."""

    def check(loss: str, name: str, value: Any) -> Any:
        if isinstance(value, str) and value in DISTANCES:
            return DISTANCES[DISTANCES.index(value)]
        if value is None or (callable(value) and not isinstance(value, str)):
            return value
        wanted = ", ".join(map(repr, DISTANCES))
        raise ValueError(f"{loss}: {name} must be None, {wanted} or a function over rows, got {value!r}")

    bad = (("nearest", ValueError, "function over rows"), (2, ValueError, "function over rows"))
    return Option(None, check, (None, *DISTANCES), bad)


def flag(default: bool) -> Any:
    """True or False."""

    def check(loss: str, name: str, value: Any) -> bool:
        if not isinstance(value, bool | np.bool_ | int) or value not in (0, 1):
            raise TypeError(f"{loss}: {name} must be True or False, got {value!r}")
        return bool(value)

    bad = (("yes", TypeError, "True or False"),)
    return Option(default, check, (False, True), bad, (False, True), annotation="bool")


def choice(default: Any, allowed: Sequence[Any], annotation: str = "Any") -> Any:
    """One of a few values."""

    def check(loss: str, name: str, value: Any) -> Any:
        for a in allowed:  # np.str_ and members of enumerations are strings, 2.0 is 2, True is no number
            kind = str if isinstance(a, str) else numbers.Real
            if isinstance(value, kind) and not isinstance(value, bool) and value == a:
                return a
        wanted = ", ".join(map(repr, allowed))
        raise ValueError(f"{loss}: {name} must be one of {wanted}, got {value!r}")

    values = tuple(allowed)
    return Option(
        default, check, values, (("nonsense", ValueError, "one of"),), values, annotation=annotation
    )


def reduction(*more: str) -> Any:
    """How the terms are reduced: ``'none'``, ``'mean'`` (the default) or ``'sum'``, and what a loss adds."""
    return choice("mean", (*REDUCTIONS, *more), annotation="str")


def softcap() -> Any:
    """None, or a number above zero that scores stay below."""
    above = positive(30.0)

    def check(loss: str, name: str, value: Any) -> float | None:
        return None if value is None else above.check(loss, name, value)

    return Option(None, check, (None, 2.0, 30.0), above.bad, above.domain, annotation="float | None")


def weights(*, call_only: bool = False) -> Any:
    """An optional array that multiplies terms or classes."""
    return Option(
        None, lambda loss, name, value: value, array=True, call_only=call_only, annotation="Array | None"
    )


def as_option(where: str, stated: Any) -> Option:
    """An option as a definition states it: a kind, or just a number or bool."""
    if isinstance(stated, Option):
        return stated
    if isinstance(stated, bool):
        return flag(stated)
    if isinstance(stated, int | float):
        # Of a number's domain nothing is said, so it is sampled close to the one that is known to be right.
        return real(float(stated), (0.5 * stated, 2.0 * stated))
    raise TypeError(
        f"{where}: state an option as a number, a bool or a kind of numbaloss.arguments, got {stated!r}"
    )


@dataclass(frozen=True)
class Operand:
    """An array that a loss takes.

    Attributes
    ----------
    low, high : float
        The closed interval its elements must lie in; an element outside is a ValueError.
    nan : bool
        Whether NaN may stand there (it gives NaN), or counts as outside.
    draw : callable
        ``draw(rng, shape)``: float64 samples from the domain, its bounds among them.
    broadcast : bool
        Whether it may have a smaller shape that broadcasts to the input's.
    absent : float or None
        The number that stands for it when it is not given; None where it must be given.
    model : bool
        Whether a model produces it, so that it is differentiated by default.
    """

    low: float = -math.inf
    high: float = math.inf
    nan: bool = True
    draw: Callable[[np.random.Generator, Any], np.ndarray] = field(
        default=lambda rng, shape: rng.normal(0, 2, shape), repr=False
    )
    broadcast: bool = False
    absent: float | None = None
    model: bool = False

    @property
    def domain(self) -> tuple[float, float, bool] | None:
        """What a kernel checks, if anything."""
        if self.low == -math.inf and self.high == math.inf and self.nan:
            return None
        return self.low, self.high, self.nan


def _with_bounds(rng: np.random.Generator, x: np.ndarray, bounds: Iterable[float]) -> np.ndarray:
    """About one element in eight replaced by one of the bounds."""
    bounds = np.asarray(list(bounds))
    return np.where(rng.random(np.shape(x)) < 0.125, rng.choice(bounds, np.shape(x)), x)


def scores(**kwargs: Any) -> Operand:
    """Any real numbers."""
    return Operand(model=True, **kwargs)


def like_scores(**kwargs: Any) -> Operand:
    """Any real numbers, not differentiated by default."""
    return Operand(**kwargs)


def numbers_of_rows() -> Operand:
    """Any real numbers, one for each row of vectors: a sample of shape (..., D) is (...) of them."""
    return Operand(draw=lambda rng, shape: rng.normal(0, 2, shape[:-1]))


def probabilities(*, model: bool = False) -> Operand:
    """Numbers in [0, 1]."""
    return Operand(
        0.0,
        1.0,
        nan=False,
        model=model,
        draw=lambda rng, shape: (
            rng.uniform(0.01, 0.99, shape) if model else _with_bounds(rng, rng.random(shape), (0.0, 1.0))
        ),
    )


def soft_labels() -> Operand:
    """Targets in [0, 1] by custom, not by a check."""
    return Operand(draw=lambda rng, shape: _with_bounds(rng, rng.random(shape), (0.0, 1.0)))


def signs() -> Operand:
    """Labels -1 or 1."""
    return Operand(draw=lambda rng, shape: rng.choice([-1.0, 1.0], shape))


def counts() -> Operand:
    """Numbers of events."""
    return Operand(draw=lambda rng, shape: rng.poisson(3.0, shape).astype(float))


def rates() -> Operand:
    """Positive or any real numbers, as an option says: samples are positive."""
    return Operand(model=True, draw=lambda rng, shape: rng.uniform(0.05, 4.0, shape))


def non_negative_amounts() -> Operand:
    """Numbers >= 0, with a part of exactly 0."""
    return Operand(0.0, draw=lambda rng, shape: _with_bounds(rng, rng.gamma(1.5, 1.5, shape), (0.0,)))


def amounts(*, model: bool = False) -> Operand:
    """Numbers >= -1, of which losses take the logarithm of 1 more: samples are positive."""
    return Operand(-1.0, model=model, draw=lambda rng, shape: rng.gamma(1.5, 1.5, shape))


def away_from_zero() -> Operand:
    """Numbers to divide by: samples of both signs that are not small."""
    return Operand(draw=lambda rng, shape: rng.choice([-1.0, 1.0], shape) * rng.uniform(0.2, 4.0, shape))


def variances() -> Operand:
    """Numbers >= 0, of the input's shape or one that broadcasts to it."""
    return Operand(
        0.0,
        nan=True,
        broadcast=True,
        draw=lambda rng, shape: _with_bounds(rng, rng.uniform(0.2, 3.0, shape), (0.0,)),
    )


def positive_weights() -> Operand:
    """Factors >= 0 that broadcast to the input's shape; 1 where not given."""
    return Operand(broadcast=True, absent=1.0, draw=lambda rng, shape: rng.uniform(0.2, 3.0, shape))


def log_probabilities() -> Operand:
    """Logarithms of probabilities."""
    return Operand(model=True, draw=lambda rng, shape: np.log(rng.uniform(0.01, 1.0, shape)))


def class_indices() -> Operand:
    """Class indices, one for each row of scores: a sample of shape (N, C) is N of them."""
    return Operand(draw=lambda rng, shape: rng.integers(0, shape[class_axis(shape)], class_rows(shape)))
