"""Losses between scores of classes and class indices or probabilities."""

import math
import sys
from functools import cache
from typing import Any

import numpy as np

from . import dispatch
from .arguments import (
    between,
    class_indices,
    class_rows,
    integer,
    log_probabilities,
    reduction,
    scores,
    weights,
)
from .classes import INT64, Axes, ClassLoss, Problem
from .rows import flat, places, workers


@cache
def softmax_kernel(plain: bool, dtype: np.dtype, parallel: bool) -> Any:
    from .kernels.cpu import softmax  # on the first call, so that importing the library stays quick

    return (softmax.compile_plain if plain else softmax.compile_softmax)(dtype, parallel)


@cache
def pick_kernels(dtype: np.dtype) -> Any:
    from .kernels.cpu import pick

    return pick.compile_pick(dtype), pick.compile_put(dtype), pick.compile_plain(dtype)


class CrossEntropyLoss(ClassLoss, function="cross_entropy"):
    r"""Softmax of the scores against class indices or class probabilities.

    .. math:: \ell = -\sum_c w_c\, q_c \log \frac{e^{x_c}}{\sum_k e^{x_k}}, \qquad
        q_c = (1 - \epsilon)\, [c = y] + \epsilon / C

    With class probabilities the target stands for :math:`[c = y]`. What is computed is
    :math:`(m - x_c) + \log \sum_k e^{x_k - m}`, with m the largest score, which loses nothing where scores
    are large; the gradient of the true class is formed from the other classes' terms, so that it does not
    cancel.

    With indices the mean divides by the sum of the weights of the rows' classes, under label smoothing too;
    with probabilities by the number of rows. A row is never read where its index is ``ignore_index`` or its
    sample weight is zero. Its index is checked unless it is ``ignore_index``. Where all rows are ignored the
    mean is NaN and the gradient zero. A product with a class weight or a probability of zero is zero, also
    where a score is -inf (PyTorch: NaN). A row of nothing but -inf is NaN.

    Parameters
    ----------
    input : array, shape (C), (N, C) or (N, C, d1, ...)
        Scores. The class axis is used where it is: nothing is transposed.
    target : array
        Class indices of any integer dtype, of the input's shape without the class axis; or floating
        probabilities of the input's shape, which need not sum to 1. The shape decides.
    weight : array, optional, shape (C)
        Of the classes.
    ignore_index : int, default -100
        Rows with this index count nothing. It may be a class, which stays in the softmax. With probabilities
        it must be left negative.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    label_smoothing : float, default 0.0
        In [0, 1].

    Raises
    ------
    IndexError
        If a class index is out of range; nothing is written then.
    TypeError
        If the target has the input's shape and holds integers, or has not and holds none.
    ValueError
        If shapes do not fit, or an option is out of its domain.

    References
    ----------
    PyTorch, ``torch.nn.functional.cross_entropy``. C. Szegedy et al., Rethinking the Inception Architecture
    for Computer Vision, CVPR 2016 (label smoothing).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> value, gradient = nl.cross_entropy.value_and_grad(np.zeros((1, 4)), np.array([2]))
    >>> float(value.round(4)), gradient.tolist()
    (1.3863, [[0.25, 0.25, -0.75, 0.25]])
    """

    weight: object = weights()
    ignore_index: int = integer(-100)
    reduction: str = reduction()
    label_smoothing: float = between(0.0, 0.0, 1.0)

    takes_probabilities = True
    _parallel_from = 8192

    @classmethod
    def _complete(cls) -> bool:
        return True

    @classmethod
    def _prepare(cls) -> None:
        cls.operands = {"input": scores(), "target": class_indices()}
        cls._required = tuple(cls.operands)

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return "input", "target", "weight"

    @classmethod
    def _kernel(cls, plain: bool, dtype: np.dtype, parallel: bool) -> Any:
        return softmax_kernel(plain, dtype, parallel)

    @classmethod
    def _settings(cls, options: dict[str, Any], factor: float, divisor: float) -> Any:
        return options["ignore_index"], options["label_smoothing"], factor, divisor

    @classmethod
    def _compute(cls, p: Problem, options: dict[str, Any], outputs: dict[str, np.ndarray]) -> Any:
        if "weight" in outputs:
            # Computed before its arguments may be overwritten, and written when they are no longer needed.
            by_weight = cls._weight_gradient(p, options)
            value = cls._compute(p, options, {n: o for n, o in outputs.items() if n != "weight"})
            outputs["weight"][...] = by_weight
            return value
        rows = class_rows(p.input.shape)
        arrays: list[np.ndarray | None] = [
            p.input,
            p.target if p.probable else None,
            outputs.get("input"),
            outputs.get("target"),
            outputs.get("curvature"),
        ]
        present = [a for a in arrays if a is not None]
        axes = Axes(present)
        terms = np.empty(math.prod(rows) if options["reduction"] == "none" else 0, p.arithmetic)
        if not math.prod(rows):
            value = np.float64(0) / (p.terms.divisor if p.terms.divisor == p.terms.divisor else math.nan)
            return (
                terms.reshape(rows).astype(p.dtype) if options["reduction"] == "none" else p.dtype.type(value)
            )
        smoothing = options["label_smoothing"]
        weight = flat(p.weight, axes.shape[axes.position : axes.position + 1], p.arithmetic)
        if p.weight is None and (p.probable or smoothing):
            weight = np.ones(axes.shape[axes.position], p.arithmetic)
        sorted_arrays = [None if a is None else a.transpose(axes.order) for a in arrays]
        where = places(sorted_arrays)
        arguments = (
            where.addresses,
            where.codes,
            np.array(
                [a is not None and a.dtype == p.arithmetic and a.flags.c_contiguous for a in sorted_arrays],
                np.int64,
            ),
            where.shape,
            where.strides,
            axes.extents,
            np.empty(0, np.int64) if p.probable else axes.flat(p.target, INT64),
            weight,
            axes.optional(p.terms.sample_weight, rows, p.arithmetic),
            axes.optional(p.terms.upstream, rows, p.arithmetic),
            terms,
            cls._settings(options, p.terms.factor, p.terms.divisor),
            workers(),
        )
        value, wrong = cls._run_kernel(False, p.arithmetic, p.input.size, arguments)
        if wrong >= 0:
            cls._refuse_index(p, axes.place(wrong))
        if options["reduction"] == "none":
            return axes.unflat(terms).astype(p.dtype, copy=False)
        return p.dtype.type(value)

    @classmethod
    def _weight_gradient(cls, p: Problem, options: dict[str, Any]) -> np.ndarray:
        """The gradient by the class weights, in which the loss is linear."""
        # d/dq of the unweighted, unsmoothed loss is -log softmax, times what multiplies the row.
        distances = cls.function.grad(
            p.input,
            p.target.astype(p.arithmetic),
            reduction=options["reduction"],
            sample_weight=p.terms.sample_weight,
            normalizer=p.terms.normalizer,
            wrt="target",
            grad_output=p.terms.factor if p.terms.upstream is None else p.terms.upstream,
        )
        axis = min(1, p.input.ndim - 1)
        smoothing = options["label_smoothing"]
        q = (1 - smoothing) * p.target.astype(np.float64) + smoothing / p.input.shape[axis]
        products = np.multiply(q, distances, where=q != 0, out=np.zeros(q.shape))
        return products.sum(axis=tuple(k for k in range(q.ndim) if k != axis))


class NLLLoss(ClassLoss, function="nll_loss"):
    r"""Negative log-likelihood of class indices, of log-probabilities that are given.

    .. math:: \ell = -w_y\, x_y

    The mean divides by the sum of the weights of the rows' classes. A row is never read where its index is
    ``ignore_index``, or its weight is zero. Its index is checked unless it is ``ignore_index``.

    Parameters
    ----------
    input : array, shape (C), (N, C) or (N, C, d1, ...)
        Logarithms of probabilities.
    target : array
        Class indices of any integer dtype, of the input's shape without the class axis.
    weight : array, optional, shape (C)
        Of the classes.
    ignore_index : int, default -100
        Rows with this index count nothing.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    IndexError
        If a class index is out of range; nothing is written then.
    ValueError
        If shapes do not fit.

    References
    ----------
    PyTorch, ``torch.nn.functional.nll_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.nll_loss(np.log([[0.25, 0.75], [0.5, 0.5]]), np.array([1, 0]), reduction="none").round(4)
    array([0.2877, 0.6931])
    """

    weight: object = weights()
    ignore_index: int = integer(-100)
    reduction: str = reduction()

    _parallel_from = sys.maxsize  # it touches one element of a row

    @classmethod
    def _complete(cls) -> bool:
        return True

    @classmethod
    def _prepare(cls) -> None:
        cls.operands = {"input": log_probabilities(), "target": class_indices()}
        cls._required = tuple(cls.operands)

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return ("input",)

    @classmethod
    def _kernel(cls, plain: bool, dtype: np.dtype, parallel: bool) -> Any:
        return pick_kernels(dtype)[2]

    @classmethod
    def _settings(cls, options: dict[str, Any], factor: float, divisor: float) -> Any:
        return options["ignore_index"], 0.0, factor, divisor

    @classmethod
    def _compute(cls, p: Problem, options: dict[str, Any], outputs: dict[str, np.ndarray]) -> Any:
        rows = class_rows(p.input.shape)
        gradient = outputs.get("input")
        axes = Axes([p.input] if gradient is None else [p.input, gradient])
        terms = np.empty(math.prod(rows), p.arithmetic)
        labels = axes.flat(p.target, INT64)
        weight = flat(p.weight, axes.shape[axes.position : axes.position + 1], p.arithmetic)
        sample_weight = axes.optional(p.terms.sample_weight, rows, p.arithmetic)
        pick, put, _ = pick_kernels(p.arithmetic)
        value, divisor, wrong = pick(
            *_over_rows(p.input, axes),
            axes.extents[1],
            labels,
            weight,
            sample_weight,
            terms,
            options["ignore_index"],
            p.terms.divisor,
        )
        if wrong >= 0:
            cls._refuse_index(p, axes.place(wrong))
        if "curvature" in outputs:
            outputs["curvature"][...] = 0
        if gradient is not None:
            gradient[...] = 0
            put(
                *_over_rows(gradient, axes),
                labels,
                weight,
                sample_weight,
                axes.optional(p.terms.upstream, rows, p.arithmetic),
                options["ignore_index"],
                p.terms.factor / divisor if divisor else math.inf,
            )
        if options["reduction"] == "none":
            return axes.unflat(terms).astype(p.dtype, copy=False)
        return p.dtype.type(value)


def _over_rows(array: np.ndarray, axes: Axes) -> tuple[int, int, np.ndarray, np.ndarray, int]:
    """Where scores lie: address, element code, shape and strides of the rows, stride of the classes."""
    a = array.transpose(axes.order)
    k = axes.position
    shape, strides = axes.row_shape or (1,), (*a.strides[:k], *a.strides[k + 1 :]) or (0,)
    code = dispatch.code_of(a.dtype)
    assert code is not None
    return (
        dispatch.address_of(a), code, np.array(shape, np.int64), np.array(strides, np.int64), a.strides[k]
    )  # fmt: skip
