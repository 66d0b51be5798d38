"""How far each loss is from its mathematics, at points that are hard for floating-point numbers.

    python -m numbaloss.bench.accuracy [LOSS ...] [--dtypes NAME ...] [--points small|all] [--markdown FILE]

Terms, and the gradient by each argument, are compared with the definitions of `exact` at the very numbers
that the arrays hold; slopes there are difference quotients, of as many digits as it takes. Points where the
quotients of both sides disagree (kinks), and those whose gradient is a convention, are left out of the
gradient.

The error is told in ulps of the result, and in *conditioned* ulps: divided by an ulp of the result and what
the exact result moves by when each argument moves by half an ulp (and by the smallest number times the
largest argument, as a factor may underflow). A small difference of large numbers may have many of the first
kind; many of the second are a fault, or a small difference that the definition takes on its way.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise, product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from mpmath import mp

import numbaloss as nl
from numbaloss.kernels.spec import arithmetic_dtype

from . import exact
from .cases import dtype_of, family_of
from .report import markdown

Point = dict[str, Any]  # the arguments of one term
Options = dict[str, Any]
DIGITS = (120, 500, 1400)
FAULT = 10.0  # conditioned ulps from which a point is listed


# ---- points ----------------------------------------------------------------------------------------


class Numbers:
    """Hard numbers of a dtype, and random ones."""

    def __init__(self, dtype: Any, few: bool) -> None:
        finfo = limits(dtype)
        self.dtype, self.few, self.rng = dtype, few, np.random.default_rng(0)
        self.eps, self.tiny, self.max = (float(getattr(finfo, n)) for n in ("eps", "tiny", "max"))
        self.smallest = float(finfo.smallest_subnormal)

    def cast(self, values: Iterable[float]) -> list[float]:
        """Those numbers that the dtype holds, each once."""
        with np.errstate(over="ignore", under="ignore"):
            array = np.array(list(values), np.float64).astype(self.dtype).astype(np.float64)
        return list(dict.fromkeys(array[np.isfinite(array)].tolist()))

    def positive(self) -> list[float]:
        """Zero and above."""
        if self.few:
            return self.cast([0, 1e-8, 0.5, 1, 20, 700, 1e10])
        near = [x * f for x in (0.25, 0.5, 1, 2) for f in (1 - self.eps / 2, 1, 1 + self.eps)]
        sizes = [
            1e-30,
            1e-12,
            1e-8,
            0.1,
            3,
            20,
            37,
            88.7,
            104,
            700,
            745,
            1e4,
            1e10,
            1e30,
            1e150,
            1e200,
            1e300,
        ]
        ends = [0, self.smallest, self.tiny, self.eps, self.eps / 2, self.max]
        return self.cast([*near, *sizes, *ends])

    def real(self) -> list[float]:
        """Of both signs."""
        return self.cast([s * x for x in self.positive() for s in (1, -1)])

    def logs(self) -> list[float]:
        """Logarithms of probabilities, and a little above."""
        return [x for x in self.real() if x <= 1]

    def unit(self) -> list[float]:
        """Between 0 and 1, both among them."""
        low = [x for x in self.positive() if x <= 0.5]
        return self.cast([*low, *(1 - x for x in low), 0.3, 1 - self.eps / 2, 1 - 4 * self.eps])

    def signs(self) -> list[float]:
        """Labels."""
        return [-1.0, 1.0]

    def drawn(self, kind: str, near: float | None = None) -> float:
        """A random number of a kind, of any size; sometimes close to another."""
        rng, way = self.rng, self.rng.integers(4)
        if kind == "signs":
            return rng.choice([-1.0, 1.0])
        if kind == "unit":
            x = rng.random() if way < 2 else 10 ** -rng.uniform(0, 20)
            return 1 - x if way == 3 else x
        x = rng.normal() * 4 if way < 3 else rng.choice([-1, 1]) * 10 ** rng.uniform(-12, 12)
        if near is not None and way == 0:
            x = near * (1 + rng.integers(-3, 4) * self.eps)
        return abs(x) if kind == "positive" else -abs(x) if kind == "logs" else x


def limits(dtype: Any) -> Any:
    """The limits of a dtype, bfloat16 among them."""
    if dtype.name != "bfloat16":
        return np.finfo(dtype)
    import ml_dtypes

    return ml_dtypes.finfo(dtype)


Points = Callable[[Numbers, tuple[str, ...]], Iterator[Point]]


def elements(*kinds: str) -> Points:
    """Products of hard numbers, neighbours, and random numbers, of a kind for each argument."""

    def points(numbers: Numbers, names: tuple[str, ...]) -> Iterator[Point]:
        count, drawn = (30, 20) if numbers.few else (1000, 400)
        grid = list(product(*(getattr(numbers, kind)() for kind in kinds)))
        for k in numbers.rng.permutation(len(grid))[:count]:
            yield dict(zip(names, grid[k], strict=True))
        for _ in range(drawn):
            first = numbers.drawn(kinds[0])
            yield dict(zip(names, [first, *(numbers.drawn(k, first) for k in kinds[1:])], strict=True))

    return points


def score_rows(numbers: Numbers) -> Iterator[np.ndarray]:
    """Rows of scores: equal, one far ahead, all of them large, close to each other, random."""
    rng = numbers.rng
    for classes in (3,) if numbers.few else (2, 3, 5, 10):
        steps = np.arange(classes) / 4
        for offset in (0, 1e4) if numbers.few else (0, -1e4, 1e10, 1e30, -1e30):
            yield np.full(classes, float(offset))
            yield offset * (1 + steps * 4 * numbers.eps) + steps
        for ahead in (20, 80) if numbers.few else (1e-8, 1, 20, 90, 104, 700, 745, 1e4, 1e30):
            yield np.where(np.arange(classes) == 1, ahead, steps)
        yield 1 + np.arange(classes) * numbers.eps
        for size in (3,) if numbers.few else (0.01, 3, 3, 3, 30, 300):
            yield rng.normal(0, size, classes)
        yield rng.choice([-1, 1], classes) * 10 ** rng.uniform(-10, 4, classes)


def rows(target: str) -> Points:
    """Rows of scores, with a class for a target, a probability for each class, or a list of classes."""

    def points(numbers: Numbers, names: tuple[str, ...]) -> Iterator[Point]:
        input, labels = names[:2]
        rng = numbers.rng
        for row in score_rows(numbers):
            classes = len(row)
            if target == "class":
                for c in range(classes) if classes < 4 else rng.permutation(classes)[:2]:
                    yield {input: row, labels: int(c)}
            elif target == "list":
                order = rng.permutation(classes)
                yield {input: row, labels: np.where(np.arange(classes) < rng.integers(1, classes), order, -1)}
            else:
                q = rng.random(classes) if target == "unit" else np.exp(row - row.max())
                yield {input: row, labels: rng.permutation(q) if target == "unit" else q / q.sum()}
                yield {input: row, labels: np.eye(classes)[1]}

    return points


def vectors(
    labels: tuple[float, ...] = (), more: tuple[float, ...] = (1e-200, 1e-30, 1e-10, 3, 1e10, 1e30, 1e200)
) -> Points:
    """Vectors that are close, parallel, orthogonal, opposite or random, of many lengths."""

    def points(numbers: Numbers, names: tuple[str, ...]) -> Iterator[Point]:
        rng, count = numbers.rng, len(names) - bool(labels)
        for dimension in (3,) if numbers.few else (3, 8):
            for scale in (0.1, 1, 1e5, *(() if numbers.few else more)):
                x, z = rng.normal(size=(2, dimension))
                x, z = x * scale, z * scale
                across = np.array([x[1], -x[0], *np.zeros(dimension - 2)])
                others = [x * (1 + 4 * numbers.eps), x + z / 1e4, 3 * x, across, -x, z, x * 0]
                others += [] if numbers.few else [x / 1e10]
                for k, y in enumerate(others):
                    point = dict(zip(names, (x, y, others[(k + 3) % len(others)])[:count], strict=False))
                    for label in labels or (None,):
                        yield {**point, **({names[-1]: label} if label is not None else {})}

    return points


def sequences(numbers: Numbers, names: tuple[str, ...]) -> Iterator[Point]:
    """A few frames and labels, some twice in a row; likely, certain and all but impossible ones."""
    rng = numbers.rng
    for frames in (3,) if numbers.few else (2, 3, 4, 6):
        for labels in ([], [1], [1, 2], [1, 1], [2, 1, 1]):
            if frames < len(labels) + sum(a == b for a, b in pairwise(labels)):
                continue
            for size in (1, 30) if numbers.few else (0, 1, 1, 30, 300, 3000, 1e6, 1e30):
                scores = rng.normal(size=(frames, 3)) * size
                log_probs = scores - scores.max(axis=1, keepdims=True)
                log_probs -= np.log(np.exp(log_probs).sum(axis=1, keepdims=True))
                lengths = np.array(frames), np.array(len(labels))
                values = (log_probs, np.array(labels, np.int64), *lengths)
                yield dict(zip(names, values, strict=True))


def layers(numbers: Numbers, names: tuple[str, ...]) -> Iterator[Point]:
    """A row of features, a weight and a bias that make the scores of `score_rows`, about."""
    rng = numbers.rng
    for row in score_rows(numbers):
        if abs(row).max() > 1e5 or len(row) > 5:  # no sum of products comes close to those
            continue
        for features in (2,) if numbers.few else (1, 5):
            weight = rng.normal(size=(len(row), features))
            x = rng.normal(size=features)
            weight[:, 0] = (row - weight[:, 1:] @ x[1:]) / x[0]
            target = int(rng.integers(len(row)))
            yield dict(zip(names, (x, weight, target), strict=True)) | {
                "linear_bias": rng.normal(size=len(row))
            }


CLASS = rows("class")
TRIPLETS = vectors(more=(3, 1e10, 1e30, 1e200))  # where eps, added to each difference, counts little
SMOOTH: Options = {"label_smoothing": 0.25, "weight": True}
CAPPED: Options = {"softcap": 30.0, "lse_square_scale": 0.25}
# Options, and points, of each loss; a few points are of the first two. A weight is of the row's classes.
SETTINGS: dict[str, list[tuple[Options, Points]]] = {
    "l1_loss": [({}, elements("real", "real"))],
    "mse_loss": [({}, elements("real", "real"))],
    "smooth_l1_loss": [({"beta": b}, elements("real", "real")) for b in (1.0, 0.0, 0.25, 1e4)],
    "huber_loss": [({"delta": d}, elements("real", "real")) for d in (1.0, 0.25, 1e4)],
    "poisson_nll_loss": [
        ({}, elements("real", "positive")),
        ({"full": True}, elements("real", "positive")),
        ({"log_input": False}, elements("positive", "positive")),
    ],
    "gaussian_nll_loss": [
        ({}, elements("real", "real", "positive")),
        ({"full": True, "eps": 0.25}, elements("real", "real", "positive")),
    ],
    "margin_ranking_loss": [({"margin": m}, elements("real", "real", "signs")) for m in (0.0, 0.75)],
    "binary_cross_entropy": [({}, elements("unit", "unit"))],
    "binary_cross_entropy_with_logits": [({}, elements("real", "unit", "positive"))],
    "kl_div": [
        ({}, elements("logs", "unit")),
        ({"log_target": True}, elements("logs", "logs")),
    ],
    "soft_margin_loss": [({}, elements("real", "signs"))],
    "hinge_embedding_loss": [({"margin": m}, elements("real", "signs")) for m in (1.0, -0.25)],
    "quantile_loss": [({}, elements("real", "real", "unit"))],
    "expectile_loss": [({"expectile": e}, elements("real", "real")) for e in (0.5, 0.75)],
    "pseudo_huber_loss": [({"delta": d}, elements("real", "real")) for d in (1.0, 0.25, 1e4)],
    "log_cosh_loss": [({}, elements("real", "real"))],
    **{
        name: [({"c": c}, elements("real", "real")) for c in (1.0, 0.25, 1e4)]
        for name in (
            "cauchy_loss", "arctan_loss", "geman_mcclure_loss", "welsch_loss", "tukey_biweight_loss",
            "fair_loss",
        )
    },
    "general_robust_loss": [
        ({"alpha": a}, elements("real", "real"))
        for a in (1.0, 2.0 - 2.0**-20, 2.0, 0.0, 1e-6, -1e-6, -2.0, 1.5, -20.0, -np.inf, 3.0)
    ],
    "gamma_nll_loss": [({}, elements("real", "positive"))],
    "tweedie_nll_loss": [({"power": p}, elements("real", "positive")) for p in (1.5, 1.0625, 1.9375)],
    "mape_loss": [({"eps": e}, elements("real", "real")) for e in (2.0**-52, 1.0)],
    "msle_loss": [({}, elements("positive", "positive"))],
    "squared_hinge_loss": [({}, elements("real", "signs"))],
    "exponential_loss": [({}, elements("real", "signs"))],
    "sigmoid_focal_loss": [
        (o, elements("real", "unit"))
        for o in ({}, {"alpha": -1.0, "gamma": 0.25}, {"alpha": 0.75, "gamma": 0.0})
    ],
    "cross_entropy": [
        ({}, CLASS), (SMOOTH, CLASS), (SMOOTH, rows("unit")), (CAPPED, CLASS), ({}, rows("softmax")),
    ],
    "focal_cross_entropy": [({}, CLASS), ({"gamma": 0.5, **SMOOTH}, CLASS), ({"gamma": 1.0}, CLASS)],
    "poly1_cross_entropy": [
        ({}, CLASS), ({"epsilon": 2.5, **SMOOTH}, CLASS), ({"epsilon": -1.0}, CLASS),
    ],
    "generalized_cross_entropy": [({"q": q}, CLASS) for q in (0.75, 1.0, 0.0625)],
    "nll_loss": [({}, CLASS), ({"weight": True}, CLASS)],
    "linear_cross_entropy": [({}, layers), (SMOOTH, layers)],
    "multi_margin_loss": [({}, CLASS), ({"p": 2, "margin": 0.25, "weight": True}, CLASS)],
    "multilabel_margin_loss": [({}, rows("list"))],
    "multilabel_soft_margin_loss": [({}, rows("unit")), ({"weight": True}, rows("unit"))],
    "cosine_embedding_loss": [({"margin": m}, vectors((1.0, -1.0))) for m in (0.0, -0.25)],
    "contrastive_loss": [({"margin": m}, vectors((1.0, 0.0, 0.25))) for m in (1.0, 1e10)],
    "triplet_margin_loss": [
        ({}, TRIPLETS), ({"p": 1.5, "swap": True}, vectors(more=())),  # slow in so many digits
        *(({"p": p, "swap": p == 1}, TRIPLETS) for p in (1.0, np.inf)), ({"p": 3.0}, vectors(more=())),
    ],
    "triplet_margin_with_distance_loss": [
        ({"distance_function": d}, TRIPLETS) for d in (None, "sqeuclidean", "cosine", "manhattan")
    ],
    "ctc_loss": [({}, sequences)],
}  # fmt: skip


# ---- the exact side --------------------------------------------------------------------------------


class Format:
    """Where a dtype's numbers lie."""

    def __init__(self, dtype: Any) -> None:
        info = limits(dtype)
        self.mantissa = info.nmant
        self.lowest = info.minexp - info.nmant  # exponent of the smallest number
        self.top = mp.ldexp(1, info.maxexp)  # what would be next to the largest

    def ulp(self, x: Any) -> Any:
        """The distance of the dtype's numbers about a number."""
        exponent = mp.mag(min(abs(x), self.top / 2)) - 1 if x else self.lowest
        return mp.ldexp(1, max(exponent - self.mantissa, self.lowest))

    def error(self, got: float, wanted: Any) -> Any:
        """How far a number is off; beyond the largest, infinity is right."""
        if np.isnan(got):
            return mp.inf
        got, wanted = (max(-self.top, min(self.top, mp.mpf(x))) for x in (got, wanted))
        return abs(got - wanted)


def exactly(a: Any) -> Any:
    """A floating array's numbers as mpmath's; indices as they are."""
    a = np.asarray(a)
    if a.dtype.kind in "iu":
        return a.tolist()
    numbers = [mp.mpf(float(x)) for x in a.flat]
    if not a.ndim:
        return numbers[0]
    made = np.empty(a.size, object)
    made[:] = numbers
    return made.reshape(a.shape)


class Term:
    """One term of a loss, exactly: its value, its slopes, and what they move by.

    Digits are added until what they leave uncertain is far below an ulp.
    """

    def __init__(self, loss: str, arrays: Point, options: Options, format: Format) -> None:
        self.loss, self.arrays, self.options, self.format = loss, arrays, options, format
        self.values = {n: np.ravel(a) for n, a in arrays.items() if isinstance(a, mp.mpf | np.ndarray)}
        sizes = [abs(x) for v in self.values.values() for x in v if x]
        largest = max([mp.one, *sizes])
        self.size = largest**2  # of what is subtracted, about
        self.underflow = largest * mp.ldexp(1, format.lowest)  # of a factor
        # Far less than the numbers are apart, each from another and from a bound.
        self.step = mp.mpf(10) ** (int(mp.floor(mp.log10(min([mp.one, *sizes])))) - 50)
        self.centres: dict[Any, Any] = {}

    def evaluate(self, function: Callable[..., Any], arrays: Point) -> Any:
        """The function with the digits that are set; NaN where it is no real number."""
        try:
            return mp.mpf(function(**arrays, **self.options))
        except (ZeroDivisionError, ValueError, TypeError):  # TypeError: a complex number
            return mp.nan

    def moved(self, name: str, index: int, by: Any) -> Point:
        """The arguments, with one of their numbers moved."""
        a = self.arrays[name]
        if isinstance(a, np.ndarray):
            a = a.copy()
            a.flat[index] += by
        else:
            a += by
        return {**self.arrays, name: a}

    def value(self) -> Any:
        """The term's value."""
        for digits in DIGITS:
            with mp.workdps(digits):
                value = self.evaluate(getattr(exact, self.loss), self.arrays)
                uncertain = max(self.size, abs(value)) * mp.mpf(10) ** -digits
                if not mp.isfinite(value) or uncertain < self.format.ulp(value) / 1000:
                    break
        return value

    def slope(self, name: str, index: int) -> Any:
        """The derivative by one number; NaN at a kink or a bound."""
        function = exact.ANTIDERIVATIVES.get(self.loss, getattr(exact, self.loss))
        for digits in DIGITS:
            with mp.workdps(digits):
                if digits not in self.centres:
                    self.centres[digits] = self.evaluate(function, self.arrays)
                centre = self.centres[digits]
                left, right = (
                    (self.evaluate(function, self.moved(name, index, by)) - centre) / by
                    for by in (-self.step, self.step)
                )
                slope = (left + right) / 2
                if mp.isnan(slope):
                    break
                ulp = self.format.ulp(slope) / 1000
                if max(self.size, abs(centre)) * mp.mpf(10) ** -digits / self.step < ulp:
                    return slope if abs(right - left) < 100 * ulp else mp.nan
        return mp.nan

    def stated(self, name: str) -> bool:
        """Whether the gradient by an argument is a convention here."""
        convention: Any = exact.CONVENTIONS.get((self.loss, name))
        return convention is not None and bool(convention(**self.arrays, **self.options))

    def result(self, name: str | None, index: int) -> Any:
        """The value, or a slope where there is a name."""
        return self.value() if name is None else self.slope(name, index)

    def moves(self, name: str | None, index: int) -> Iterator[Any]:
        """What a result moves by when one number of the arguments moves by half an ulp, for each in turn."""
        centre = self.result(name, index)
        for other, values in self.values.items():
            for k, x in enumerate(values):
                half, far = self.format.ulp(x) / 2, mp.zero
                for by in (-half, half):
                    there = Term(self.loss, self.moved(other, k, by), self.options, self.format)
                    move = abs(there.result(name, index) - centre)
                    far = far if mp.isnan(move) else max(far, move)
                yield far


# ---- the comparison --------------------------------------------------------------------------------


@dataclass
class Finding:
    """A result and what it should be."""

    term: Term
    name: str | None  # of the argument that it is the slope by; None for the value
    index: int
    got: float
    wanted: Any
    point: str
    conditioned: float = np.nan

    def __post_init__(self) -> None:
        self.error = self.term.format.error(self.got, self.wanted)
        self.unit = self.term.format.ulp(self.wanted)
        self.ulps = float(self.error / self.unit)

    def kind(self) -> tuple[str, bool]:
        """What it is, in the list of faults."""
        return self.name or "", self.lost

    @property
    def lost(self) -> bool:
        """Whether it is infinite or no number where the exact result is none of both."""
        top = self.term.format.top
        too_large = abs(self.wanted) > top - 8 * self.term.format.ulp(top)
        return np.isnan(self.got) or (np.isinf(self.got) and not too_large)

    def condition(self, enough: float = 0.0) -> float:
        """The error in conditioned ulps; where it is at most `enough`, a number between both."""
        with mp.workdps(50):
            unit = self.unit + self.term.underflow
            if self.name is not None and (self.term.loss, self.name) in exact.SIZES:
                unit += self.term.format.ulp(exact.SIZES[self.term.loss, self.name])
            for move in self.term.moves(self.name, self.index):
                if self.error <= enough * unit:
                    break
                unit += move
            self.conditioned = float(self.error / unit)
        return self.conditioned

    def __str__(self) -> str:
        what = "value" if self.name is None else f"by {self.name}[{self.index}]"
        error = "lost" if self.lost else f"{self.conditioned:.3g} conditioned"
        beyond = abs(self.wanted) >= self.term.format.top
        wanted = "too large" if beyond else mp.nstr(self.wanted, 17)
        return f"{self.point}: {what} {self.got!r}, exactly {wanted}; {error}"


def written(point: Point, options: Options) -> str:
    """A point and its options in few characters."""

    def short(v: Any) -> str:
        if not np.ndim(v):
            return str(v)
        v = np.asarray(v)
        digits = (lambda x: f"{float(x):.4g}") if v.ndim == 1 else short
        return "[" + ", ".join(map(digits, v[:4])) + (", …]" if len(v) > 4 else "]")

    given = {n: v for n, v in point.items() if not n.endswith("_lengths")} | options
    return ", ".join(f"{n}={short(v)}" for n, v in given.items())


def group_key(point: Point) -> Any:
    """What points must share to be terms of one call."""
    return tuple((n, np.shape(v), np.asarray(v).dtype.kind) for n, v in point.items())


def groups(loss: str, dtype: Any, few: bool) -> Iterator[tuple[list[Point], Options, Options]]:
    """Points that may be terms of one call, with its options, and these as they are stated."""
    names = tuple(nl.registry[loss].Class.operands)
    for stated, points in SETTINGS[loss][: 2 if few else None]:
        made = [casted(p, dtype) for p in points(Numbers(dtype, few), names)]
        made = [p for p in made if all(np.isfinite(a.astype(np.float64)).all() for a in p.values())]
        kind = arithmetic_dtype(dtype).type
        options = {n: float(kind(v)) if isinstance(v, float) else v for n, v in stated.items()}
        for _, same in groupby(sorted(made, key=group_key), group_key):
            group = list(same)
            if "weight" in stated:
                classes = len(group[0]["linear_weight" if "linear_weight" in group[0] else "input"])
                options["weight"] = np.resize([0.5, 2.0, 1.25, 0.75], classes).astype(dtype)
            yield group, options, stated


def computed(loss: str, group: list[Point], options: Options, wrt: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """The library's value and slopes at each point: in one call, if there is a batch's axis that all have."""
    function = nl.registry[loss]
    single = family_of(function).name in ("sequence", "linear")
    results: list[tuple[Any, ...]] = []
    for arrays in group if single else [{n: np.stack([p[n] for p in group]) for n in group[0]}]:
        value = function(**arrays, **options, reduction="none")
        slopes = function.grad(**arrays, **options, reduction="sum", wrt=wrt)
        results += [(value, *slopes)] if single else zip(value, *slopes, strict=True)
    return results


def findings(loss: str, dtype: Any, few: bool) -> Iterator[Finding]:
    """Every result of a loss at its points, beside the exact one."""
    differentiable = (*nl.registry[loss].Class._differentiable(), "linear_bias")
    format = Format(dtype)
    for group, options, stated in groups(loss, dtype, few):
        wrt = tuple(n for n, a in group[0].items() if a.dtype.kind not in "iu" and n in differentiable)
        made = {n: exactly(v) if isinstance(v, float | np.ndarray) else v for n, v in options.items()}
        results = computed(loss, group, options, wrt)
        for point, (value, *slopes) in zip(group, results, strict=True):
            arrays = {n: exactly(a) for n, a in point.items() if not n.endswith("_lengths")}
            term, text = Term(loss, arrays, made, format), written(point, stated)
            wanted = term.value()
            if not mp.isfinite(wanted):
                continue
            yield Finding(term, None, 0, float(value), wanted, text)
            for n, slope in zip(wrt, slopes, strict=True):
                for k, got in enumerate(np.ravel(slope)):
                    wanted = mp.nan if term.stated(n) else term.slope(n, k)
                    if not mp.isnan(wanted):
                        yield Finding(term, n, k, float(got), wanted, text)


@dataclass
class Summary:
    """What is said of a loss's values, or of its gradients.

    Attributes
    ----------
    ulps, conditioned : Finding
        The worst in either unit, but for those that are lost.
    faults : list of Finding
        Those with too many conditioned ulps, and those that are lost.
    lost : int
        How many are infinite or no number where the exact result is none of both.
    """

    ulps: Finding
    conditioned: Finding
    faults: list[Finding]
    lost: int

    @classmethod
    def of(cls, found: list[Finding]) -> "Summary":
        faults = [f for f in found if f.lost]
        lost, kept = len(faults), sorted((f for f in found if not f.lost), key=lambda f: -f.ulps)
        worst = kept[0]
        worst.condition()
        for f in kept[1:]:  # conditioned ulps are never more than ulps
            if f.ulps <= min(worst.conditioned, FAULT):
                break
            if f.condition(min(worst.conditioned, FAULT)) > worst.conditioned:
                worst = f
        faults += [f for f in kept if f.conditioned > FAULT]
        return cls(kept[0], worst, faults, lost)


def casted(point: Point, dtype: Any) -> dict[str, np.ndarray]:
    """A point's arrays in a dtype; labels as they are."""
    arrays = {n: np.asarray(v) for n, v in point.items()}
    with np.errstate(over="ignore", under="ignore"):
        return {n: a if a.dtype.kind in "iu" else a.astype(dtype) for n, a in arrays.items()}


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, and a point of each kind of result that has too many conditioned ulps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("losses", nargs="*", metavar="LOSS")
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32"], metavar="NAME")
    parser.add_argument("--points", choices=("small", "all"), default="all")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    tables: dict[str, list[list[str]]] = {"Values": [], "Gradients": []}
    faults = []
    for loss, name in product(options.losses or nl.registry, options.dtypes):
        start = perf_counter()
        found = list(findings(loss, dtype_of(name), options.points == "small"))
        for (title, rows), of_values in zip(tables.items(), (True, False), strict=True):
            kind = [f for f in found if (f.name is None) == of_values]
            made = Summary.of(kind)
            plain, worst, beyond = made.ulps, made.conditioned, len(made.faults) - made.lost
            row = [loss, name, f"{len(kind):,}", f"{plain.ulps:.3g}", plain.point]
            rows.append([*row, f"{worst.conditioned:.2g}", worst.point, str(beyond), str(made.lost)])
            by_kind = groupby(sorted(made.faults, key=Finding.kind), Finding.kind)
            faults += [[loss, name, title, str(next(same))] for _, same in by_kind]
        print(f"{loss} {name}: {perf_counter() - start:.1f} s", file=sys.stderr)
    head = ["loss", "dtype", "results", "ulps", "at", "conditioned", "at", f"> {FAULT:g}", "lost"]
    parts = [f"## {title}\n\n{markdown(head, rows)}" for title, rows in tables.items()]
    parts.append(f"## An example of each kind that is beyond {FAULT:g}, or lost\n\n")
    parts[-1] += markdown(["loss", "dtype", "of", "point"], faults)
    text = "\n".join(parts)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
