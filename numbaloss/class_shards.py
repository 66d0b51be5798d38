"""A call of class scores of which each rank has some classes of every row.

Each rank reads its scores once, for four numbers a row; one exchange of these gives every rank the statistics
of whole rows, and with them the value, and the gradient of its own scores. Labels and weights are of all
classes on every rank.
"""

import math
import operator
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np

from .arrays import as_array, as_plain, floating
from .call import make_outputs
from .kernels import devices
from .kernels.chunks import chunk_rows
from .kernels.layout import class_axis
from .kernels.powers import between
from .kernels.spec import DEAD, ELSEWHERE, GRAD, NUMBERS_OF_ROW, VALUE, VALUE_AND_GRAD, bad_index
from .loss import OF_RANKS
from .shared import Ranks

# Ranks up to which each tells all others its numbers, once; what is sent grows with their number. More of
# them find the largest score together, and then add up.
FEW = 16


def evaluate(kind: Any, cls: Any, mode: str, call: dict[str, Any]) -> Any:
    """Evaluate a loss of rows whose classes are shared out: `kind` is `Part` or `LinearPart`."""
    name = cls.function.__name__
    if call.get("comm") is None:
        raise TypeError(f"{name}: classes= needs comm=, the ranks that have the other classes")
    ranks = Ranks(name, call["comm"])
    call, classes = {n: v for n, v in call.items() if n not in OF_RANKS}, call["classes"]
    if ranks.comm.size == 1 and checked_range(name, classes) == (0, kind.own_classes(call)):
        return cls.function._run(mode, (), call)  # there is one pass for that
    with ExitStack() as stack:

        def begin() -> Any:
            backend = devices.of(call.values())
            described = stack.enter_context(backend.describe(name, call, cls._may_be_on_host))
            return kind(cls, mode, {**described, "classes": classes}, backend, ranks)

        part: Any = ranks.attempt(begin)
        ranks.meet(0.0, 0.0)
        return part.backend.give(part.result(part.exchange()))


class Part:
    """The classes of every row that one rank has, checked."""

    differentiable: tuple[str, ...] = ("input",)

    def __init__(self, cls: Any, mode: str, call: dict[str, Any], backend: Any, ranks: Ranks) -> None:
        self.mode, self.backend, self.ranks, self.call, name = mode, backend, ranks, call, ranks.loss
        self.settings = settings = cls._settings(mode, call)
        if mode not in (VALUE, GRAD, VALUE_AND_GRAD):
            raise ValueError(f"{name}: with classes= there are values and gradients, but no {mode}")
        if not {*settings.wrt} <= {*self.differentiable}:
            allowed = ", ".join(map(repr, self.differentiable))
            raise ValueError(f"{name}: with classes= wrt must be among {allowed}, got {settings.wrt!r}")
        target = as_array(name, "target", call["target"])
        if target.dtype.kind not in "iu":
            raise TypeError(f"{name}: with classes= target must hold class indices, got {target.dtype.name}")
        self.start, self.total = checked_range(name, call["classes"])
        # All that is checked of scores of all classes, and what a kernel would be given.
        whole = {n: v for n, v in call.items() if n != "out"} | self.take(name)
        self.problem: Any = cls._problem(settings, whole, backend)
        self.rows = self.problem.target.shape
        self.outputs = make_outputs(cls, settings, call, backend)
        self.labels = backend.to_host(self.problem.target).astype(np.int64, copy=False).reshape(-1)
        ignored = self.labels == self.problem.ignore_index
        wrong = ~ignored & ((self.labels < 0) | (self.labels >= self.total))
        if wrong.any():
            index = tuple(map(int, np.unravel_index(wrong.argmax(), self.rows)))
            raise bad_index(name, index, int(self.labels[wrong.argmax()]), self.total)
        options = [(n, v) for n, v in settings.options.items() if isinstance(v, bool | int | float | str)]
        dtypes = str(self.problem.dtype), str(self.problem.arithmetic), backend.__name__
        more = self.total, self.rows, call.get("normalizer"), settings.wrt
        ranks.agree(name, mode, options, dtypes, more)

    @staticmethod
    def own_classes(call: dict[str, Any]) -> int:
        """Return how many classes a call's scores have, whether right or not."""
        shape = np.shape(call["input"])
        return shape[class_axis(shape)] if shape else 0

    def take(self, name: str) -> dict[str, Any]:
        """Check the own arrays; return what stands for those of all classes."""
        x = floating(name, "input", as_array(name, "input", self.call["input"]))
        self.axis = class_axis(x.shape) if x.ndim else 0
        self.check_classes(name, "input", x, self.axis)
        self.scores = rows_of_scores(x, self.axis)
        return {"input": self.of_all(x, self.axis)}

    def check_classes(self, name: str, argument: str, array: Any, axis: int) -> None:
        self.stop = self.start + (array.shape[axis] if array.ndim else 0)
        if not array.ndim or self.stop > self.total:
            said = f"classes={self.call['classes']!r}"
            raise ValueError(
                f"{name}: {argument} of shape {array.shape} does not go with {said}: (first, how many in all)"
            )

    def of_all(self, array: Any, axis: int) -> Any:
        """Return an array of no memory, with all classes along an axis."""
        shape = (*array.shape[:axis], self.total, *array.shape[axis + 1 :])
        return np.broadcast_to(self.backend.empty((1,) * len(shape), array.dtype), shape)

    def over_rows(self, array: Any) -> np.ndarray:
        """Return numbers of rows, 1 where there are none, in float64."""
        if array is None:
            return np.ones(self.labels.size)
        return np.broadcast_to(self.backend.to_host(array), self.rows).astype(np.float64).reshape(-1)

    def exchange(self) -> np.ndarray:
        """Return all ranks' numbers; the first of each are its classes."""
        p = self.problem
        self.row_weights = self.over_rows(p.weighting.sample_weight)
        dead = (self.labels == p.ignore_index) | (self.row_weights == 0)
        mine = (self.labels >= self.start) & (self.labels < self.stop)
        self.own = np.where(dead, DEAD, np.where(mine, self.labels - self.start, ELSEWHERE))
        self.weight = np.ones(self.total)
        if p.weight is not None:
            self.weight = self.backend.to_host(p.weight).astype(np.float64)
        self.smoothed = None
        if p.label_smoothing:
            self.smoothed = self.weight[self.start : self.stop].astype(p.arithmetic)
        numbers = np.zeros((1 + self.own.size, NUMBERS_OF_ROW))
        self.ranks.attempt(lambda: self.read(numbers[1:]))
        numbers[0, :3] = self.start, self.stop, self.ranks.error is not None
        comm = self.ranks.comm
        told = numbers if comm.size <= FEW else numbers[:1]
        gathered = np.empty((comm.size, *told.shape))
        comm.all_gather(told, gathered)
        self.ranks.check(gathered[:, 0, 2].sum())
        pieces = sorted(map(tuple, gathered[:, 0, :2].astype(int).tolist()))
        ends = [0, *(stop for _, stop in pieces)]
        if ends[:-1] != [start for start, _ in pieces] or ends[-1] != self.total:
            said = ", ".join(f"{start} to {stop}" for start, stop in pieces)
            raise ValueError(
                f"{self.ranks.loss}: ranks have the classes {said}, which are not the {self.total} once"
            )
        return gathered if comm.size <= FEW else self.reduce(numbers)

    @np.errstate(all="ignore")
    def reduce(self, numbers: np.ndarray) -> np.ndarray:
        """Return the numbers of whole rows, as if one rank had told them: of many ranks they are added up."""
        comm, m = self.ranks.comm, numbers[1:, 0].copy()
        top = m.copy()
        comm.all_reduce(top, "max")
        weight = self.weight[self.start : self.stop].sum()
        moved = (m != top) & (weight != 0)
        sums = numbers[1:, 1:].copy()
        sums[:, 0] *= np.where((m == top) | (sums[:, 0] == 0), 1, between(m, top))
        sums[:, 2] += np.where(moved, weight * (top - m), 0)
        comm.all_reduce(sums)
        numbers[0, :2] = 0, self.total
        numbers[1:, 0], numbers[1:, 1:] = top, sums
        return numbers[None]

    def shard(self, scores: Any, rows: slice = slice(None)) -> Any:
        """Return scores, (R, C), with what kernels need of these rows."""
        p = self.problem
        return self.backend.shards().Shard(scores, self.own[rows], self.smoothed, p.softcap, p.arithmetic)

    def read(self, numbers: np.ndarray) -> None:
        """Store each row's numbers."""
        self.shard(self.scores).statistics(numbers)

    def result(self, gathered: np.ndarray) -> Any:
        """Write the gradients, and return what the mode gives."""
        p, w = self.problem, self.problem.weighting
        divisor = self.backend.as_float(self.backend.divisor(p))
        with np.errstate(all="ignore"):
            scale = float(w.factor / np.float64(divisor))
        ups = w.upstream
        if ups is not None and not ups.ndim:
            scale, ups = scale * self.backend.as_float(ups), None
        keep, spread = 1 - p.label_smoothing, p.label_smoothing / self.total
        options = getattr(p, "numbers", ())
        numbers = np.array([scale, keep, spread, self.weight.sum(), p.lse_square_scale, *options])
        sums = np.array([self.weight[int(a) : int(b)].sum() for a, b in gathered[:, 0, :2]])
        own_weights = self.weight[np.where(self.own == DEAD, 0, self.labels)]
        values, factors = devices.cpu().shards().merged(
            p.functions, numbers, gathered, sums, self.own, own_weights, self.row_weights,
            self.over_rows(ups), p.lse_square_scale != 0, p.arithmetic,
        )  # fmt: skip
        if self.mode != VALUE:
            self.write(factors)
        if w.reduction == "none":
            value = self.backend.from_host(values.reshape(self.rows), p.dtype)
        else:
            with np.errstate(all="ignore"):
                value = self.backend.constant(float(values.sum() / np.float64(divisor)), p.dtype)
        if self.mode == VALUE:
            return value
        gradients = tuple(self.outputs[n] for n in self.settings.wrt)
        made = gradients[0] if self.settings.single else gradients
        return made if self.mode == GRAD else (value, made)

    def write(self, factors: np.ndarray) -> None:
        """Write the gradient of all rows."""
        out = as_plain(self.outputs["input"])
        into = None if self.settings.adds else rows_of_scores(out, self.axis, copy=False)
        made = self.backend.empty(self.scores.shape, self.problem.arithmetic) if into is None else into
        self.shard(self.scores).gradient(factors, made)
        if into is None:
            rest = tuple(n for k, n in enumerate(out.shape) if k != self.axis)
            self.store(out, made.reshape(*rest, out.shape[self.axis]).transpose(placed(out.ndim, self.axis)))

    def store(self, out: Any, made: Any) -> None:
        (self.backend.add if self.settings.adds else self.backend.assign)(out, made)


class LinearPart(Part):
    """The rows of a linear layer's weight that one rank has; their scores are made some rows at a time."""

    differentiable = ("input", "linear_weight", "linear_bias")

    @staticmethod
    def own_classes(call: dict[str, Any]) -> int:
        """Return how many classes a call's weight has, whether right or not."""
        return (*np.shape(call["linear_weight"]), 0)[0]

    def take(self, name: str) -> dict[str, Any]:
        """Check the own arrays; return what stands for those of all classes."""
        if self.backend is not devices.cpu():
            raise ValueError(
                f"{name}: with classes= arrays must be on the CPU; on a device make the scores, and call "
                "cross_entropy"
            )
        x, w = (floating(name, n, as_array(name, n, self.call[n])) for n in ("input", "linear_weight"))
        if w.ndim != 2:
            raise ValueError(f"{name}: with classes= linear_weight must have shape (C, F), got {w.shape}")
        self.check_classes(name, "linear_weight", w, 0)
        whole, bias = {"linear_weight": self.of_all(w, 0)}, self.call.get("linear_bias")
        if bias is not None:
            bias = floating(name, "linear_bias", as_array(name, "linear_bias", bias))
            if bias.shape != w.shape[:1]:
                raise ValueError(f"{name}: linear_bias must have shape {w.shape[:1]}, got {bias.shape}")
            whole["linear_bias"] = self.of_all(bias, 0)
        self.arrays: Any = x, w, bias
        return whole

    def chunks(self) -> Iterator[tuple[slice, Any, Any]]:
        """Yield some rows at a time: where they are, their inputs and their scores."""
        x, w, bias = self.in_arithmetic
        height = chunk_rows(len(x), len(w) * w.itemsize, *self.problem.chunking)[0]
        for first in range(0, len(x), height):
            some = slice(first, min(first + height, len(x)))
            with np.errstate(all="ignore"):
                scores = x[some] @ w.T
                if bias is not None:
                    scores += bias
            yield some, x[some], np.ascontiguousarray(scores)

    def read(self, numbers: np.ndarray) -> None:
        """Store each row's numbers."""
        dtype = self.problem.arithmetic
        converted: Any = [a if a is None else a.astype(dtype, copy=False) for a in self.arrays]
        self.in_arithmetic: Any = np.atleast_2d(converted[0]), *converted[1:]
        for some, _, scores in self.chunks():
            self.shard(scores, some).statistics(numbers[some])

    def write(self, factors: np.ndarray) -> None:
        """Write the gradients; that by the input is added up over the ranks."""
        x, w, _ = self.in_arithmetic
        made = {"input": np.zeros(x.shape, x.dtype), "linear_weight": np.zeros(w.shape, w.dtype)}
        made["linear_bias"] = np.zeros(len(w))
        for some, inputs, scores in self.chunks():
            self.shard(scores, some).gradient(factors[some], scores)
            with np.errstate(all="ignore"):
                if "input" in self.outputs:
                    np.matmul(scores, w, out=made["input"][some])
                if "linear_weight" in self.outputs:
                    made["linear_weight"] += scores.T @ inputs
                if "linear_bias" in self.outputs:
                    made["linear_bias"] += scores.sum(axis=0, dtype=np.float64)
        if "input" in self.outputs:
            self.ranks.comm.all_reduce(made["input"])
        for n, out in self.outputs.items():
            self.store(as_plain(out), made[n].reshape(out.shape).astype(x.dtype, copy=False))


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
