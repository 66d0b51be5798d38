"""Margin losses between scores of classes and one class, or several, for each row."""

from functools import cache
from typing import Any

import numpy as np

from ..arguments import Operand, choice, class_indices, real, reduction, scores, soft_labels, weights
from ..arrays import as_array, check_broadcasts, floating
from ..call import (
    Evaluation,
    RowLoss,
    Settings,
    call_arguments,
    dtypes_of,
    resolve_normalizer,
    resolve_upstream,
    resolve_wrt,
)
from ..families.elementwise import ElementwiseLoss
from ..families.scores import MarginLoss
from ..kernels import inside
from ..kernels import math as nm
from ..kernels.devices import is_device_array
from ..kernels.spec import EXACT, GRAD, MANY, MISSING, OF_CURVATURES, SOFT, Margins, arithmetic_dtype
from ..loss import COUNT, OF_DERIVATIVES, Binding
from ..quick import never


class MultiMarginLoss(MarginLoss, function="multi_margin_loss"):
    r"""How far a row's class is from leading all others by a margin.

    .. math:: \ell = \frac{w_y}{C} \sum_{c \ne y} \max(0, \text{margin} - x_y + x_c)^p

    The mean divides by the number of rows, whatever the class weights. At exactly the clamp the gradient is
    zero, as in PyTorch; a NaN score makes its row NaN (PyTorch: no contribution). Every class index is
    checked, that of a row whose weight is zero too.

    Parameters
    ----------
    input : array, shape (C) or (N, C)
        Scores; () is a single one.
    target : array, shape () or (N)
        Class indices of any integer dtype. Of a single row's it may be (1), and then the terms are.
    p : {1, 2}, default 1
        Power of the hinges.
    margin : float, default 1.0
        How far the own class's score should be above the others.
    weight : array, optional, shape (C)
        Of the classes.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    IndexError
        If a class index is out of range; nothing is written then.
    TypeError
        If the target holds no integers.
    ValueError
        If shapes do not fit, an option is out of its domain, or the curvature is asked for with ``p=1``,
        where it is zero wherever it is defined.

    References
    ----------
    PyTorch, ``torch.nn.functional.multi_margin_loss``. K. Crammer and Y. Singer, On the algorithmic
    implementation of multiclass kernel-based vector machines, JMLR 2 (2001).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.multi_margin_loss.value_and_grad(np.array([[0.0, 0.5, 2.0, -1.0]]), np.array([2]), margin=2.0)
    (np.float64(0.125), array([[ 0.  ,  0.25, -0.25,  0.  ]]))
    """

    p: int = choice(1, (1, 2), annotation="int")
    margin: float = real(1.0)
    weight: object = weights()
    reduction: str = reduction()

    operands = {"input": scores(), "target": class_indices()}

    def terms(score, own, p, margin):
        hinge = nm.maximum(0, margin - own + score)
        return hinge if p == 1 else nm.square(hinge)

    def finish(total, classes, weight):
        return weight / classes * total

    @classmethod
    def _check_curvature(cls, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
        if options["p"] == 1:
            raise ValueError(
                f"{cls.function.__name__}: value_grad_hess needs p=2: with p=1 the curvature is zero"
            )


def _label_lists(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of distinct class indices, each ended by -1 where it is not full."""
    order = rng.random(shape).argsort(axis=-1)
    counts = rng.integers(0, shape[-1] + 1, shape[:-1])
    return np.where(np.arange(shape[-1]) < counts[..., np.newaxis], order, -1)


class MultiLabelMarginLoss(MarginLoss, function="multilabel_margin_loss"):
    r"""How far each of a row's classes is from leading by one all that are not its classes.

    .. math:: \ell = \frac{1}{C} \sum_{y \in Y} \sum_{c \notin Y} \max(0, 1 - x_y + x_c)

    :math:`Y` are the target's class indices before its first -1. One that is given twice counts twice. At
    exactly the clamp the gradient is zero, as in PyTorch; a NaN score makes its row NaN (PyTorch: no
    contribution). What stands after the first -1 does not count, yet must be a class index or -1.

    Parameters
    ----------
    input : array, shape (C) or (N, C)
        Scores; () is a single one.
    target : array
        Of the input's shape, of a single score () or (1): class indices of any signed integer dtype, or of an
        unsigned one where all classes count; the first -1 ends a row's list.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    IndexError
        If a class index is out of range; nothing is written then.
    TypeError
        If the target holds no integers.
    ValueError
        If shapes do not fit, or the curvature is asked for: it is zero wherever it is defined.

    References
    ----------
    PyTorch, ``torch.nn.functional.multilabel_margin_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> value = nl.multilabel_margin_loss(np.array([[0.1, 0.2, 0.4, 0.8]]), np.array([[3, 0, -1, 1]]))
    >>> round(float(value), 4)
    0.85
    """

    reduction: str = reduction()

    operands = {"input": scores(), "target": Operand(draw=_label_lists)}
    classes_of_a_row = MANY

    def terms(score, own):
        return nm.maximum(0, 1 - own + score)

    def finish(total, classes, weight):
        return weight / classes * total

    @classmethod
    def _check_curvature(cls, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
        raise ValueError(f"{cls.function.__name__}: has no value_grad_hess: its curvature is zero")


class _Terms(ElementwiseLoss, function="multilabel_soft_margin_loss"):
    """What `multilabel_soft_margin_loss` averages over a row's classes."""

    weight: object = weights()
    reduction: str = reduction()
    domains = {"target": soft_labels()}

    def value(input, target):
        return target * nm.softplus(-input) + (1 - target) * nm.softplus(input)

    def slope_target(input, target):
        return -input

    # As those of binary cross entropy of logits.
    def majorizer_input(input, target):
        x = nm.maximum(abs(input), 1e-30)
        return nm.tanh(0.5 * x) / (2 * x)

    def fisher_input(input, target):
        return nm.sigmoid(input) * nm.sigmoid(-input)


class MultiLabelSoftMarginLoss(RowLoss, function="multilabel_soft_margin_loss"):
    r"""Binary cross entropy of logits, averaged over the classes of each row.

    .. math:: \ell = -\frac{1}{C} \sum_c
        w_c \left(y_c \log \sigma(x_c) + (1 - y_c) \log(1 - \sigma(x_c))\right)

    computed from ``softplus``, without overflow or cancellation. The mean divides by the number of rows,
    whatever ``weight`` is.

    Parameters
    ----------
    input, target : array, shape (..., C)
        Of the same shape: logits, and targets usually in [0, 1].
    weight : array, optional
        Multiplies each class's term; broadcasts to the input's shape, usually one a class.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If shapes do not fit.

    References
    ----------
    PyTorch, ``torch.nn.functional.multilabel_soft_margin_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.multilabel_soft_margin_loss(np.zeros((2, 3)), np.eye(2, 3), reduction="none").round(4)
    array([0.6931, 0.6931])
    """

    weight: object = weights()
    reduction: str = reduction()

    operands = _Terms.operands
    differentiable = (*_Terms.operands, "weight")

    @classmethod
    @cache
    def _jit(cls) -> Any:
        return inside.of_classes_apart(cls.function.__name__, _Terms._scalars((), 2))

    @classmethod
    def _problem(cls, settings: Settings, call: dict[str, Any], backend: Any) -> Margins:
        name = cls.function.__name__
        floats: dict[str, Any] = {}
        x = floats["input"] = floating(name, "input", as_array(name, "input", call["input"]))
        target = cls._weak("target", call, floats, settings.wrt)
        if target is None or target.shape != x.shape:
            got = None if target is None else target.shape
            raise ValueError(f"{name}: target must have input's shape {x.shape}, got {got}")
        weight = cls._weak("weight", call, floats)
        if weight is not None:
            check_broadcasts(name, "weight", weight, x.shape)
        weighting = cls._weighting(settings, call, x.shape[:-1], floats)
        return Margins(name, SOFT, None, (), x, target, weight, 1, 1.0, weighting, *dtypes_of(floats))

    @classmethod
    def _shapes_of_scores(cls, call: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"input": np.shape(call["target"])}

    @classmethod
    def _check_curvature(cls, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
        pass  # what the kernel of rows does not give is computed by elements

    @classmethod
    def _evaluate(cls, mode: str, binding: Binding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if mode == COUNT:
            return super()._evaluate(mode, binding, args, kwargs)
        call = call_arguments(binding, args, kwargs)
        name, x = cls.function.__name__, call["input"]
        how = cls.fields["reduction"].check(name, "reduction", call.get("reduction", "mean"))
        shape = tuple(np.shape(x if is_device_array(x) else as_array(name, "input", x)))
        if not shape or not shape[-1]:
            raise ValueError(f"{name}: input must have shape (..., C), C at least 1, got {shape}")
        if how == "mean" and call.get("sample_weight") is None and call.get("normalizer") is None:
            return _Terms.function._run(mode, args, kwargs)  # the mean over all elements
        return super()._evaluate(mode, binding, args, kwargs)

    @classmethod
    def _evaluation(cls, mode: str, call: dict[str, Any], backend: Any) -> Any:
        if mode == COUNT:  # of rows, whatever computes them
            return super()._evaluation(mode, call, backend)
        wrt = resolve_wrt(cls, call.get("wrt"))[0] if mode in OF_DERIVATIVES else ()
        if (
            backend.HAS_SOFT_MARGINS
            and "weight" not in wrt
            and (mode not in OF_CURVATURES or wrt == ("input",))
            and call.get("curvature", EXACT) == EXACT
            and call.get("floor") is None
        ):
            return super()._evaluation(mode, call, backend)
        return _ByElements(mode, call, backend)


class _ByElements:
    """A call that is evaluated as elements: each has its row's weight, over the number of classes."""

    def __init__(self, mode: str, call: dict[str, Any], backend: Any) -> None:
        name = _Terms.function.__name__
        x = as_array(name, "input", call["input"])
        self.mode, self.backend, self.shape = mode, backend, x.shape
        self.summed = call.get("reduction", "mean") == "none"  # over each row, when the terms are there
        weights = call.get("sample_weight")
        self.sample_weight = None if type(weights) is float else weights  # a number promotes no array
        rows, classes, how = x.shape[:-1], x.shape[-1], call.get("reduction", "mean")
        factor, up = resolve_upstream(name, call.get("grad_output"), rows, how)
        self.call = call = dict(call)
        if self.sample_weight is not None:
            weights = as_array(name, "sample_weight", self.sample_weight)
            check_broadcasts(name, "sample_weight", weights, rows)
            call["sample_weight"] = over_classes(weights, rows)
        # A mean over elements divides by the sum of their weights: that of the rows', times the classes.
        normalizer = resolve_normalizer(name, call.get("normalizer"))
        call["normalizer"] = None if normalizer is None else normalizer * classes
        if how == "sum":
            call["reduction"], call["normalizer"] = "mean", float(classes)
        if how == "none":
            call["normalizer"] = None
            if mode in OF_DERIVATIVES:
                call["grad_output"] = factor / classes
                if up is not None:
                    up = backend.masked_product(up, np.asarray(1 / classes), arithmetic_dtype(up.dtype))
                    call["grad_output"] = np.broadcast_to(up[..., np.newaxis], x.shape) if up.ndim else up
        self.upstream = up
        self.elements = self.part = Evaluation(_Terms, mode, call, backend)

    def result(self) -> Any:
        """Write the outputs, and return what the mode gives."""
        result = self.elements.result()
        return of_rows(result, self.mode, self.backend) if self.summed else result

    def prepared(self, values: tuple[Any, ...]) -> Any:
        """Return a function that serves other calls of this one's signature and number of classes."""
        weighted = [k for k, v in enumerate(values) if v is self.sample_weight and v is not None]
        first = next((k for k, v in enumerate(values) if v is self.call["input"]), None)
        if first is None or self.upstream is not None or len(weighted) != (self.sample_weight is not None):
            return never
        # What is returned is kept: it must hold no array, so not `self`.
        classes, summed, mode, backend = self.shape[-1], self.summed, self.mode, self.backend

        def elements(values: tuple[Any, ...], weights: Any) -> tuple[Any, ...]:
            return values if not weighted else (*values[: weighted[0]], weights, *values[weighted[0] + 1 :])

        evaluate = self.elements.prepared(elements(values, self.call.get("sample_weight")))
        if evaluate is None:
            return never

        def again(values: tuple[Any, ...]) -> Any:
            shape, weights = values[first].shape, None
            if not shape or shape[-1] != classes:
                return MISSING
            if weighted:
                weights = values[weighted[0]]
                if weights.shape != shape[:-1]:
                    return MISSING
                weights = weights[..., np.newaxis]
            result = evaluate(elements(values, weights))
            return of_rows(result, mode, backend) if summed and result is not MISSING else result

        return again


def of_rows(result: Any, mode: str, backend: Any) -> Any:
    """Return the result of elements as that of rows."""
    if mode == GRAD:
        return result
    terms, *gradients = result if mode in OF_DERIVATIVES else (result,)
    value = backend.mean_of_rows(terms)
    return (value, *gradients) if mode in OF_DERIVATIVES else value


def over_classes(weights: Any, rows: tuple[int, ...]) -> Any:
    """Return rows' weights as those of their elements."""
    return np.broadcast_to(weights, rows)[..., np.newaxis]


multi_margin_loss = MultiMarginLoss.function
multilabel_margin_loss = MultiLabelMarginLoss.function
multilabel_soft_margin_loss = MultiLabelSoftMarginLoss.function
