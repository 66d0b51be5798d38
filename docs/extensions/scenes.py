"""Scenes of losses: one argument moves, the others stay, and the loss gives value, slope and curvature.

Which argument moves, over which numbers, and which options are shown comes from the loss's own arguments and
their domains, so a new loss has its picture; `SHOWN` names options that tell more than the first one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import numbaloss as nl
from numbaloss.families.elementwise import ElementwiseLoss
from numbaloss.families.linear import LinearLoss
from numbaloss.families.scores import RowLoss
from numbaloss.families.sequences import SequenceLoss
from numbaloss.families.vectors import VectorLoss

POINTS = 241
CLASSES = 3
SHOWN: dict[str, tuple[str, tuple[Any, ...]]] = {
    "cross_entropy": ("label_smoothing", (0.0, 0.1, 0.3)),
    "linear_cross_entropy": ("softcap", (None, 4.0, 2.0)),
    "tweedie_nll_loss": ("power", (1.5, 1.1, 1.9)),
    "sigmoid_focal_loss": ("gamma", (2.0, 0.0, 5.0)),
    "general_robust_loss": ("alpha", (1.0, 2.0, 0.0, -2.0)),
    "poly1_cross_entropy": ("epsilon", (1.0, 0.0, -1.0)),
    "focal_cross_entropy": ("gamma", (2.0, 0.0, 5.0)),
    "generalized_cross_entropy": ("q", (0.7, 0.1, 1.0)),
    "multi_margin_loss": ("p", (1, 2)),
}
FIXED = {"mape_loss": {"target": (2.0,)}}  # an error's share of 0 tells nothing


@dataclass(frozen=True)
class Line:
    """A loss along one axis, an array each: `curvature` is None where the loss has none."""

    label: str
    value: np.ndarray
    slope: np.ndarray
    curvature: np.ndarray | None


@dataclass(frozen=True)
class Curves:
    """Lines over the numbers that one argument takes."""

    x: np.ndarray
    axis: str  # the argument that moves, in words
    fixed: str  # the others, in words
    lines: list[Line]


@dataclass(frozen=True)
class Panel:
    """A number for each place of a grid, and what falls fastest from there, if that is known."""

    title: str
    x: np.ndarray
    y: np.ndarray
    height: np.ndarray
    arrows: tuple[np.ndarray, np.ndarray] | None = None
    points: dict[str, tuple[float, float]] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Maps:
    """Panels side by side."""

    said: str
    panels: list[Panel]


def scene(loss: Any) -> Curves | Maps:
    """The scene of a loss, by its family."""
    for family, make in SCENES.items():
        if issubclass(loss.Class, family):
            return make(loss)
    raise TypeError(f"{loss.__name__}: no scene for its family")


def variants(loss: Any) -> list[dict[str, Any]]:
    """Options to show: the defaults first, then others of one option that matters."""
    if loss.__name__ in SHOWN:
        name, values = SHOWN[loss.__name__]
        return [{name: v} for v in values]
    for name, option in loss.Class.fields.items():
        default = option.default
        if option.annotation != "float" or not option.samples or 0 < default < 1e-3:
            continue  # neither flags nor guards against a division by zero
        low, high = getattr(option.domain, "low", -np.inf), getattr(option.domain, "high", np.inf)
        if np.isfinite(high - low):
            others = (low + 0.1 * (high - low), high - 0.1 * (high - low))
        else:
            others = (0.25 * default, 2 * default) if low >= 0 and default else option.samples
        values = dict.fromkeys(float(f"{v:.2g}") if v != default else v for v in (default, *others))
        return [{name: v} for v in list(values)[:3]]
    return [{}]


def words(options: dict[str, Any]) -> str:
    """Options as they are typed."""
    return ", ".join(f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in options.items())


def computed(loss: Any, label: str, arrays: dict[str, Any], options: dict[str, Any], by: str) -> Line:
    """The terms of a loss and their derivatives by one argument, each in the arrays' shape."""
    given = {**arrays, **options, "reduction": "none", "wrt": by}
    try:
        value, slope, curvature = loss.value_grad_hess(**given)
    except ValueError:
        (value, slope), curvature = loss.value_and_grad(**given), None
    return Line(label, value, slope, curvature)


# ---- losses of elements ---------------------------------------------------------------------------------


def choices(operand: Any) -> tuple[float, ...]:
    """Typical numbers of an operand: both labels, or one number."""
    drawn = np.asarray(operand.draw(np.random.default_rng(0), (1000,)))
    values = np.unique(drawn)
    if len(values) <= 2:
        return tuple(values[::-1])
    if values[0] == 0 and values[-1] == 1:
        return 1.0, 0.0
    return (round(float(np.median(drawn))),)


def reach(operand: Any) -> tuple[float, float]:
    """Where an operand moves."""
    low = operand.low + 0.004 if np.isfinite(operand.low) else -4.0
    return low, operand.high - 0.004 if np.isfinite(operand.high) else max(4.0, low + 4)


def elementwise(loss: Any) -> Curves:
    """The first argument moves; targets are at their labels or at a typical number."""
    cls = loss.Class
    moving, *others = cls._required
    x = np.linspace(*reach(cls.operands[moving]), POINTS)
    typical = {n: choices(cls.operands[n]) for n in others} | FIXED.get(loss.__name__, {})
    first = {n: v[0] for n, v in typical.items()}
    last = {n: v[-1] for n, v in typical.items()}
    defaults, *more = variants(loss)
    cases = [(first, defaults)] + [(last, defaults)] * (last != first) + [(last, options) for options in more]
    if len(cases) == 1 and len(others) > 1:  # another number of the last argument: a variance
        cases += [({**first, others[-1]: v}, {}) for v in (0.25, 4.0)]
    several = {n for n in others if len({case[0][n] for case in cases}) > 1}
    lines = []
    for numbers, options in cases:
        arrays = {moving: x, **{n: np.full(POINTS, float(v)) for n, v in numbers.items()}}
        label = words({n: float(v) for n, v in numbers.items() if n in several} | options)
        lines.append(computed(loss, label or "defaults", arrays, options, moving))
    fixed = ", ".join(f"{n} = {first[n]:g}" for n in others if n not in several)
    return Curves(x, moving, fixed, lines)


# ---- losses of rows of scores ---------------------------------------------------------------------------


def row_target(loss: Any) -> np.ndarray:
    """Targets that name the first class, in the form that the loss takes."""
    drawn = np.asarray(loss.Class.operands["target"].draw(np.random.default_rng(0), (2, CLASSES)))
    if drawn.ndim == 1:
        return np.zeros(POINTS, np.int64)
    rest = -1 if drawn.dtype.kind in "iu" else 0
    row = np.full(CLASSES, rest, drawn.dtype)
    row[0] = 0 if rest else 1
    return np.tile(row, (POINTS, 1))


def rows(loss: Any) -> Curves:
    """The score of the target's class moves, beside others of 0."""
    x = np.linspace(-6, 6, POINTS)
    scores = np.zeros((POINTS, CLASSES))
    scores[:, 0] = x
    arrays = {"input": scores, "target": row_target(loss)}
    lines = []
    for options in variants(loss):
        line = computed(loss, words(options) or "defaults", arrays, options, "input")
        curvature = None if line.curvature is None else line.curvature[:, 0]
        lines.append(Line(line.label, line.value, line.slope[:, 0], curvature))
    return Curves(x, "score of the target's class", f"the other {CLASSES - 1} scores = 0", lines)


def linear(loss: Any) -> Curves:
    """One feature moves, which is the score of the target's class."""
    x = np.linspace(-6, 6, POINTS)
    weight = np.zeros((CLASSES, 1))
    weight[0] = 1
    arrays = {"input": x[:, None], "linear_weight": weight, "target": np.zeros(POINTS, np.int64)}
    lines = []
    for options in variants(loss):
        values = loss(**arrays, **options, reduction="none")
        slope = loss.grad(**arrays, **options, wrt="input", reduction="sum")[:, 0]
        lines.append(Line(words(options), values, slope, None))
    fixed = f"a weight of 1 for the target's class, of 0 for the other {CLASSES - 1}"
    return Curves(x, "input, one feature", fixed, lines)


# ---- losses of vectors, of sequences --------------------------------------------------------------------


def vectors(loss: Any) -> Maps:
    """The first vector moves over the plane; the others stay at (1, 0) and (-1, 0)."""
    cls = loss.Class
    moving, *others = cls.vectors
    ticks = np.linspace(-2.02, 2.02, 102)  # not through the points that stay
    x, y = np.meshgrid(ticks, ticks)
    plane = np.stack([x.ravel(), y.ravel()], axis=1)
    places = dict(zip(others, ((1.0, 0.0), (-1.0, 0.0)), strict=False))
    arrays: dict[str, Any] = {moving: plane} | {n: np.tile(p, (len(plane), 1)) for n, p in places.items()}
    labels = [n for n in cls._required if n not in cls.vectors]
    if labels:
        values = choices_of_rows(cls.operands[labels[0]])
        cases = [({labels[0]: v}, {}) for v in values]
    else:
        cases = [({}, {}), ({}, {"swap": True})]
    panels = []
    for numbers, options in cases:
        given = arrays | {n: np.full(len(plane), v) for n, v in numbers.items()} | options
        value, slope = loss.value_and_grad(**given, wrt=moving, reduction="none")
        arrows = tuple(-slope[:, k].reshape(x.shape) for k in range(2))
        title = words({n: float(v) for n, v in numbers.items()} | options) or "defaults"
        panels.append(
            Panel(title, x, y, value.reshape(x.shape), arrows, places, (f"{moving}[0]", f"{moving}[1]"))
        )
    stay = " and ".join(f"{n} at ({a:g}, {b:g})" for n, (a, b) in places.items())
    return Maps(
        f"{moving} moves over the plane, {stay}; arrows: where a step down the gradient leads", panels
    )


def choices_of_rows(operand: Any) -> tuple[float, ...]:
    """Both labels of rows, the larger first."""
    drawn = np.unique(operand.draw(np.random.default_rng(0), (1000, 2)))
    return float(drawn[-1]), float(drawn[0])


def sequences(loss: Any) -> Maps:
    """Twenty-four steps in which the labels 1, 2, 3 are likely one after another."""
    steps, kinds = 24, 4
    t = np.arange(steps)
    scores = np.zeros((steps, 1, kinds))
    for label, middle in ((1, 5), (2, 12), (3, 18)):
        scores[:, 0, label] = 3 * np.exp(-(((t - middle) / 2.5) ** 2))
    log_probs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    lengths = {"input_lengths": np.array([steps]), "target_lengths": np.array([3])}
    slope = loss.grad(log_probs, np.array([[1, 2, 3]]), **lengths, reduction="sum")
    x, y = np.meshgrid(t, np.arange(kinds))
    axes = ("step", "class, 0 is the blank")
    panels = [
        Panel("probabilities", x, y, np.exp(log_probs[:, 0].T), axes=axes),
        Panel("minus the gradient", x, y, -slope[:, 0].T, axes=axes),
    ]
    said = "twenty-four steps of four classes, labels 1, 2, 3; a step raises where it is above 0"
    return Maps(said, panels)


SCENES: dict[type, Callable[[Any], Curves | Maps]] = {
    ElementwiseLoss: elementwise,
    LinearLoss: linear,
    VectorLoss: vectors,
    SequenceLoss: sequences,
    RowLoss: rows,
}


def convex(curves: Curves) -> bool:
    """Whether the first line has no negative curvature."""
    found = curves.lines[0].curvature
    return found is not None and bool((found >= -1e-12).all())


def every() -> dict[str, Any]:
    """The registered losses, by name."""
    return dict(sorted(nl.registry.items()))
