"""A call of class scores of which each rank has some classes of every row.

Each rank reads its scores once, for four numbers a row; one exchange of these gives every rank the statistics
of whole rows, and with them the value, and the gradient of its own scores. Labels and weights are of all
classes on every rank.
"""

import math
import operator
from contextlib import ExitStack
from typing import Any

import numpy as np

from .arrays import as_array, as_plain, floating
from .call import make_outputs
from .kernels import devices
from .kernels.layout import class_axis, class_rows
from .kernels.spec import GRAD, VALUE, VALUE_AND_GRAD, Scores, bad_index
from .shared import Ranks


def evaluate(cls: Any, mode: str, call: dict[str, Any]) -> Any:
    """Evaluate a loss of rows whose classes are shared out."""
    name = cls.function.__name__
    if call.get("comm") is None:
        raise TypeError(f"{name}: classes= needs comm=, the ranks that have the other classes")
    ranks = Ranks(name, call["comm"])
    call = {n: v for n, v in call.items() if n != "comm"}
    with ExitStack() as stack:

        def begin() -> Part:
            backend = devices.of(call.values())
            described = stack.enter_context(backend.describe(name, call, cls._may_be_on_host))
            return Part(cls, mode, described, backend, ranks)

        part: Any = ranks.attempt(begin)
        ranks.meet(0.0, 0.0)
        return part.backend.give(part.result(part.exchange()))


class Part:
    """The classes that one rank has, checked."""

    def __init__(self, cls: Any, mode: str, call: dict[str, Any], backend: Any, ranks: Ranks) -> None:
        self.mode, self.backend, self.ranks, name = mode, backend, ranks, ranks.loss
        self.settings = settings = cls._settings(mode, call)
        if mode not in (VALUE, GRAD, VALUE_AND_GRAD):
            raise ValueError(f"{name}: with classes= there are values and gradients, but no {mode}")
        if settings.wrt not in ((), ("input",)):
            raise ValueError(f"{name}: with classes= wrt must be 'input', got {settings.wrt!r}")
        x = floating(name, "input", as_array(name, "input", call["input"]))
        target = as_array(name, "target", call["target"])
        if target.dtype.kind not in "iu":
            raise TypeError(f"{name}: with classes= target must hold class indices, got {target.dtype.name}")
        axis = class_axis(x.shape) if x.ndim else 0
        self.start, self.total = checked_range(name, call["classes"])
        self.stop = self.start + (x.shape[axis] if x.ndim else 0)
        if not x.ndim or self.stop > self.total:
            said = f"classes={call['classes']!r}"
            raise ValueError(
                f"{name}: input of shape {x.shape} does not go with {said}: (first, how many in all)"
            )
        # All that is checked of scores of all classes, and what a kernel would be given.
        shape = (*x.shape[:axis], self.total, *x.shape[axis + 1 :])
        one = np.broadcast_to(backend.empty((1,) * len(shape), x.dtype), shape)
        problem = cls._problem(
            settings, {n: v for n, v in call.items() if n != "out"} | {"input": one}, backend
        )
        self.problem: Scores = problem
        self.scores, self.axis, self.rows = x, axis, class_rows(shape)
        self.outputs = make_outputs(cls, settings, {**call, "input": x}, backend)
        self.labels = self.on_host(problem.target).astype(np.int64, copy=False).reshape(-1)
        wrong = (self.labels != problem.ignore_index) & ((self.labels < 0) | (self.labels >= self.total))
        if wrong.any():
            index = tuple(map(int, np.unravel_index(wrong.argmax(), self.rows)))
            raise bad_index(name, index, int(self.labels[wrong.argmax()]), self.total)
        options = [(n, v) for n, v in settings.options.items() if isinstance(v, bool | int | float | str)]
        dtypes = str(problem.dtype), str(problem.arithmetic), backend.__name__
        ranks.agree(name, mode, options, dtypes, self.total, self.rows, call.get("normalizer"))

    def on_host(self, array: Any) -> np.ndarray:
        return self.backend.to_host(array)

    def over_rows(self, array: Any) -> np.ndarray:
        """Return numbers of rows, 1 where there are none, in float64."""
        if array is None:
            return np.ones(self.labels.size)
        return np.broadcast_to(self.on_host(array), self.rows).astype(np.float64).reshape(-1)

    def exchange(self) -> np.ndarray:
        """Return all ranks' numbers; the first of each are its classes."""
        p, kernels = self.problem, self.backend.shards()
        self.row_weights = self.over_rows(p.weighting.sample_weight)
        dead = (self.labels == p.ignore_index) | (self.row_weights == 0)
        mine = (self.labels >= self.start) & (self.labels < self.stop)
        own = np.where(dead, DEAD, np.where(mine, self.labels - self.start, ELSEWHERE))
        self.weight = None if p.weight is None else self.on_host(p.weight).astype(np.float64)
        smoothed = None
        if p.label_smoothing:
            weight = np.ones(self.total) if self.weight is None else self.weight
            smoothed = weight[self.start : self.stop].astype(p.arithmetic)
        scores = rows_of_scores(self.scores, self.axis)
        self.shard = kernels.Shard(scores, own, smoothed, p.softcap, p.arithmetic)
        numbers = np.zeros((1 + own.size, STATISTICS))
        numbers[0, :2] = self.start, self.stop
        self.shard.statistics(numbers[1:])
        gathered = np.empty((self.ranks.comm.size, *numbers.shape))
        self.ranks.comm.all_gather(numbers, gathered)
        pieces = sorted(map(tuple, gathered[:, 0, :2].astype(int).tolist()))
        ends = [0, *(stop for _, stop in pieces)]
        if ends[:-1] != [start for start, _ in pieces] or ends[-1] != self.total:
            said = ", ".join(f"{start} to {stop}" for start, stop in pieces)
            raise ValueError(
                f"{self.ranks.loss}: ranks have the classes {said}, which are not the {self.total} once"
            )
        return gathered

    def result(self, gathered: np.ndarray) -> Any:
        """Write the gradient, and return what the mode gives."""
        p, w = self.problem, self.problem.weighting
        divisor = self.backend.as_float(self.backend.divisor(p))
        with np.errstate(all="ignore"):
            scale = float(w.factor / np.float64(divisor))
        ups = w.upstream
        if ups is not None and not ups.ndim:
            scale, ups = scale * self.backend.as_float(ups), None
        weight = np.ones(self.total) if self.weight is None else self.weight
        keep, spread = 1 - p.label_smoothing, p.label_smoothing / self.total
        numbers = np.array([scale, keep, spread, weight.sum(), p.lse_square_scale, *p.numbers])
        sums = np.array([weight[int(a) : int(b)].sum() for a, b in gathered[:, 0, :2]])
        own_weights = weight[np.where(self.labels == p.ignore_index, 0, self.labels)]
        values, factors = devices.cpu().shards().merged(
            p.functions, numbers, gathered, sums, self.shard.labels, own_weights, self.row_weights,
            self.over_rows(ups), p.lse_square_scale != 0,
        )  # fmt: skip
        if self.mode != VALUE:
            out = as_plain(self.outputs["input"])
            into = None if self.settings.adds else rows_of_scores(out, self.axis, copy=False)
            made = self.backend.empty(self.shard.scores.shape, p.arithmetic) if into is None else into
            self.shard.gradient(factors, made)
            if into is None:
                rest = tuple(n for k, n in enumerate(out.shape) if k != self.axis)
                laid = made.reshape(*rest, out.shape[self.axis]).transpose(placed(out.ndim, self.axis))
                (self.backend.add if self.settings.adds else self.backend.assign)(out, laid)
            if self.mode == GRAD:
                return self.outputs["input"]
        if w.reduction == "none":
            value = self.backend.from_host(values.reshape(self.rows), p.dtype)
        else:
            with np.errstate(all="ignore"):
                value = self.backend.constant(float(values.sum() / np.float64(divisor)), p.dtype)
        return value if self.mode == VALUE else (value, self.outputs["input"])


# Of the kernels: see `kernels.cpu.shards`.
STATISTICS, ELSEWHERE, DEAD = 4, -1, -2


def checked_range(name: str, classes: Any) -> tuple[int, int]:
    """Return the first of a rank's classes, and how many there are on all ranks."""
    try:
        start, total = map(operator.index, classes)
    except (TypeError, ValueError):
        start, total = -1, -1
    if not 0 <= start < total:
        raise ValueError(
            f"{name}: classes must be (first, how many in all), 0 <= first < how many, got {classes!r}"
        )
    return start, total


def placed(ndim: int, axis: int) -> tuple[int, ...]:
    """Return the axes by which an array with its classes last gets them back to their place."""
    return (*range(axis), ndim - 1, *range(axis, ndim - 1))


def rows_of_scores(array: Any, axis: int, copy: bool = True) -> Any:
    """Return scores as (rows, classes); None where that would be a copy, and there is to be none."""
    last = array.transpose(*(k for k in range(array.ndim) if k != axis), axis)
    shape = (math.prod(last.shape[:-1]), array.shape[axis])
    if last.flags.c_contiguous or last.ndim == 2:
        return last if last.ndim == 2 else last.reshape(shape)
    if not copy:
        return None
    return last.astype(last.dtype).reshape(shape)
