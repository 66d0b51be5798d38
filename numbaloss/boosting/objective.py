"""A loss of raw scores, as any booster needs it: gradient and curvature, the mean, the best constant."""

import copy
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from ..families.elementwise import ElementwiseLoss
from ..families.scores import ScoreLoss
from ..kernels.spec import EXACT, GRAD_HESS, VALUE_GRAD_HESS
from ..loss import Loss, LossFunction
from ..sums import SumLoss
from .constant import minimum, root


class Objective:
    """A loss of raw scores for one host.

    Attributes
    ----------
    loss : Loss
        The criterion, summed.
    how : dict
        The curvature, if it is another than the exact one, and its floor, if there is one.
    """

    host: ClassVar[str]

    def __init__(self, loss: Any, curvature: str, floor: float | None, options: dict[str, Any]) -> None:
        self.loss = criterion_of(self.host, loss, options)
        how = {"curvature": None if curvature == EXACT else curvature, "floor": floor}
        self.how: dict[str, Any] = {n: v for n, v in how.items() if v is not None}
        kind: Any = type(self.loss)
        kind._check_policy(kind._settings(VALUE_GRAD_HESS, {**self.loss._given, **self.how}))
        self.spare = Spare()

    def __repr__(self) -> str:
        return f"{self.host}({', '.join([repr(self.loss), *(f'{k}={v!r}' for k, v in self.how.items())])})"

    @property
    def name(self) -> str:
        """The loss's name."""
        return self.loss.function.__name__

    @property
    def link(self) -> str:
        """How raw scores become predictions: the loss's ``link``."""
        return self.loss.link

    @property
    def is_of_classes(self) -> bool:
        return isinstance(self.loss, ScoreLoss)

    def transform(self, raw: Any) -> Any:
        """Return predictions: raw scores, rates or probabilities, as the loss's ``link`` says.

        Parameters
        ----------
        raw : array, (N) or (N, C)
        """
        return LINKS[self.link](raw)

    def derivatives(self, raw: Any, target: Any, weight: Any = None, out: Any = None) -> tuple[Any, Any]:
        """Return the gradient and the curvature of the weighted sum.

        Parameters
        ----------
        raw : array, (N) or (N, C)
            It is not written.
        target : array
            Of the raw scores' shape; or (N), of class numbers in any dtype.
        weight : array, (N), optional
        out : pair of arrays, optional
            Receives both. Without it they are float32 and lie in memory as the raw scores do: the arrays that
            were given last, where nobody has them any more.
        """
        raw, target, weight = self.arranged(raw, target, weight, readable=(np.float32, np.float64))
        made = self.spare.take(raw) if out is None else out
        if raw.shape[0]:
            call = {"out": made, **self.how, **weighing(weight)}
            self.loss._run(GRAD_HESS, (raw, target), call)
        if out is None:
            self.spare.keep(*made)
        return made

    def mean(self, raw: Any, target: Any, weight: Any = None) -> float:
        """Return the weighted mean of the terms, of `derivatives`' arguments; NaN where there are no rows."""
        raw, target, weight = self.arranged(raw, target, weight)
        if not raw.shape[0]:
            return float("nan")
        return float(self.loss(raw, target, reduction="mean", **weighing(weight)))

    def sums(self, raw: Any, target: Any, weight: Any = None) -> tuple[float, float]:
        """Return the mean times the sum of the weights, and that sum: parts of all rows are added up so."""
        total = float(len(raw) if weight is None or not weight.size else weight.sum(dtype=np.float64))
        return (self.mean(raw, target, weight) * total if total else 0.0), total

    def arranged(
        self, raw: Any, target: Any, weight: Any, readable: tuple[Any, ...] = ()
    ) -> tuple[Any, Any, Any]:
        """Return a call's arrays as the loss takes them, all in one place.

        Class numbers become integers, but on the host those of dtypes that are `readable` as they are.
        """
        raw, target, weight = together(raw, target, weight)
        if not raw.shape[0]:
            return raw, target, None
        if self.is_of_classes:
            if raw.ndim != 2:
                wanted = f"raw scores must have shape (N, C), got {raw.shape}"
                raise ValueError(f"{self.name}: {wanted}; tell {self.host} the number of classes")
            if target.shape != raw.shape:
                as_they_are = isinstance(target, np.ndarray) and target.dtype in readable
                target = target.reshape(-1) if as_they_are else labels_of(self.name, target)
        elif target.shape != raw.shape and target.size == raw.size:
            target = target.reshape(raw.shape)
        elif raw.ndim == 2 and target.ndim == 1 and self.loss.operands[self.loss._required[1]].broadcast:
            target = target.reshape(-1, 1)  # of several quantiles, say
        if weight is not None and not weight.size:  # so XGBoost says that there is none
            weight = None
        if weight is not None and raw.ndim == 2 and not self.is_of_classes:
            weight = weight.reshape(-1, 1)
        return raw, target, weight

    # ---- the best constant -------------------------------------------------------------------------
    def initial_score(self, target: Any, weight: Any = None, classes: int | None = None) -> Any:
        """Return the raw score that, the same for all rows, minimises the weighted sum.

        Found by Newton's method over sums of gradients and curvatures. Where the minimum lies at infinity, as
        for labels of a single class, it is a number beyond which almost nothing is gained.

        Parameters
        ----------
        target : array, (N) or (N, C)
            Of (N, C) numbers, each column has a score of its own; so has each of several quantiles.
        weight : array, (N), optional
        classes : int, optional
            How many, of a loss of class scores. Default: the highest class number of `target`, and one.

        Returns
        -------
        float, or array, (C)
            The latter of float64. They sum to 0 where a loss is the same if all scores of a row move alike.

        Raises
        ------
        ValueError
            If there are no rows.
        """
        target = np.asarray(on_host(target))
        weight = None if weight is None else np.asarray(on_host(weight), np.float64).reshape(-1)
        if not len(target):
            raise ValueError(f"{self.name}: initial_score needs a row at least")
        if self.is_of_classes:
            return self._scores_of_classes(target, weight, classes)
        held = np.broadcast_shapes(*(np.shape(v) for v in self.loss._given.values() if np.ndim(v)))
        if target.ndim == 2 or held:
            columns = np.broadcast_shapes(target.shape[1:], held[-1:])[0]
            target = np.broadcast_to(target.reshape(len(target), -1), (len(target), columns))
            return np.array([self._of_column(k).initial_score(target[:, k], weight) for k in range(columns)])
        target, more = target.astype(np.float64, copy=False), weighing(weight)

        def sums(score: float) -> tuple[float, float, float]:
            raw = np.full(target.shape, score)
            value, gradient, curvature = self.loss.value_grad_hess(raw, target, **more)
            return float(value), float(gradient.sum()), float(curvature.sum())

        return root(sums)

    def _of_column(self, k: int) -> "Objective":
        """Return the objective of one column of scores: of arrays that the criterion holds, that column."""
        one = copy.copy(self)
        one.loss = copy.copy(self.loss)
        for n, v in self.loss._given.items():
            if np.ndim(v):
                setattr(one.loss, n, np.asarray(on_host(v))[..., k if np.shape(v)[-1] > 1 else 0])
        return one

    def _scores_of_classes(
        self, target: np.ndarray, weight: np.ndarray | None, classes: int | None
    ) -> np.ndarray:
        if target.ndim == 2:  # probabilities
            frequency = np.average(target, axis=0, weights=weight)
        else:
            target = labels_of(self.name, target)
            counted = target != self.loss.ignore_index
            target, weight = target[counted], None if weight is None else weight[counted]
            found = int(target.max(initial=0)) + 1
            given = self.loss._given.get("weight")
            count = classes if classes is not None else found if given is None else len(given)
            if count < found or target.min(initial=0) < 0:
                wrong = target[(target < 0) | (target >= count)][0]
                raise IndexError(f"{self.name}: target holds {wrong}, but there are {count} classes")
            # Rows of one class have one term: each class is a row, with all their weight.
            frequency = weight = np.bincount(target, weight, count).astype(np.float64)
            target = np.arange(count)
        total = float(len(target) if weight is None else weight.sum())
        if not total > 0:
            return np.zeros(len(frequency))
        start = np.log(np.maximum(frequency / frequency.sum(), 1e-10))
        more = weighing(weight)

        def sums(scores: np.ndarray) -> tuple[float, np.ndarray]:
            raw = np.repeat(scores[None], len(target), axis=0)
            value, gradient = self.loss.value_and_grad(raw, target, **more)
            return float(value), gradient.sum(axis=0)

        return minimum(sums, start - start.mean(), total)


class Spare:
    """The arrays that were given last, for the next round: to touch new memory takes as long as the pass.

    They are taken again if nobody else has one of them, or a view of it.
    """

    def __init__(self) -> None:
        self.pairs: list[list[np.ndarray]] = []

    def __reduce__(self) -> Any:
        return Spare, ()

    def take(self, raw: Any) -> tuple[Any, Any]:
        """Return two float32 arrays that lie in memory as the raw scores do."""
        try:
            pair = self.pairs.pop()  # at once, so that no two threads get it
        except IndexError:
            pair = []
        laid = tuple(n // raw.itemsize * 4 for n in raw.strides)
        fits = [a.shape == raw.shape and a.strides == laid for a in pair]
        # As many references as to arrays that nobody else has, counted in the same way.
        if all(fits) and references(pair) == references([np.empty(0), np.empty(0)]):
            return pair[0], pair[1]
        return np.empty_like(raw, dtype=np.float32), np.empty_like(raw, dtype=np.float32)

    def keep(self, gradient: Any, curvature: Any) -> None:
        """Have a pair for a later round."""
        if isinstance(gradient, np.ndarray):  # CuPy keeps memory itself
            self.pairs[:] = [[gradient, curvature]]


def references(pair: list[Any]) -> list[int]:
    """Return how many there are to each array, as seen from here."""
    return [sys.getrefcount(array) for array in pair]


def criterion_of(host: str, loss: Any, options: dict[str, Any]) -> Loss:
    """Return a summed criterion, of a function with options or a criterion; refuse what trees cannot fit."""
    if isinstance(loss, LossFunction):
        loss = loss.Class(**options)
    elif not isinstance(loss, Loss):
        got = loss.__name__ if isinstance(loss, type) else type(loss).__name__
        raise TypeError(f"{host}: loss must be one of numbaloss's, as a function or a criterion, got {got}")
    elif options:
        raise TypeError(f"{host}: a criterion has its options already, got {', '.join(options)}")
    if not isinstance(loss, ElementwiseLoss | ScoreLoss):
        raise TypeError(
            f"{host}: {loss!r} is neither a loss of elements nor of class scores by their softmax"
        )
    name = loss.function.__name__
    if len(loss._required) != 2:
        raise TypeError(f"{host}: {name} takes {', '.join(loss._required)}; there are scores and targets")
    domain = loss.operands[loss._required[0]].domain
    if domain is not None:
        raise ValueError(
            f"{host}: {name} is of numbers in [{domain[0]:g}, {domain[1]:g}], and trees give any: take a "
            "loss of scores, such as binary_cross_entropy_with_logits"
        )
    parts = [part for _, part in loss.terms] if isinstance(loss, SumLoss) else [loss]
    if loss.reduction not in ("sum", "none") and any("reduction" in part._named for part in parts):
        raise ValueError(
            f"{host}: reduction={loss.reduction!r} divides gradients by the number of rows, which makes them "
            "too small for min_child_weight and regularisation; leave it out: sums are taken"
        )
    if loss.link not in LINKS:
        raise ValueError(f"{name}: link must be one of {', '.join(map(repr, LINKS))}, got {loss.link!r}")
    loss = copy.copy(loss)
    loss.reduction = "sum"
    return loss


def weighing(weight: Any) -> dict[str, Any]:
    """Return a weight as an argument, where there is one."""
    return {} if weight is None else {"sample_weight": weight}


def labels_of(name: str, target: Any) -> Any:
    """Return class numbers, which hosts give as floats, as integers."""
    target = target.reshape(-1)
    if target.dtype.kind in "iu":
        return target
    with np.errstate(invalid="ignore"):
        labels = target.astype(np.int64)  # as kernels read them
    exact = labels.astype(target.dtype) == target  # a comparison of two dtypes is slow
    if not exact.all():
        wrong = target[~exact][0]
        raise ValueError(f"{name}: target must hold class numbers, got {wrong}")
    return labels


# ---- places -------------------------------------------------------------------------------------------


def is_on_device(array: Any) -> bool:
    return array.__class__ is not np.ndarray and hasattr(array, "__cuda_array_interface__")


def together(*arrays: Any) -> tuple[Any, ...]:
    """Bring arrays to where any of them is: XGBoost gives raw scores on the host, and labels on either side.

    The gradient is then made there, where XGBoost wants it, and not brought back.
    """
    there = next((a for a in arrays if is_on_device(a)), None)
    library = np if there is None else sys.modules[type(there).__module__.partition(".")[0]]
    return tuple(a if a is None else library.asarray(a) for a in arrays)


def on_host(array: Any) -> Any:
    return array.get() if is_on_device(array) else array


# ---- links --------------------------------------------------------------------------------------------


def sigmoid(raw: Any) -> Any:
    small = np.exp(-abs(np.asarray(raw)))  # of the less probable class, so that nothing overflows
    return np.where(np.asarray(raw) >= 0, 1 / (1 + small), small / (1 + small))


def softmax(raw: Any) -> Any:
    raw = np.asarray(raw)
    p = np.exp(raw - raw.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


LINKS: dict[str, Callable[[Any], Any]] = {
    "identity": np.asarray,
    "log": np.exp,
    "logit": sigmoid,
    "softmax": softmax,
}
