"""Margin losses between scores of classes and one class, or several, for each row."""

import math
from functools import cache
from typing import Any, ClassVar

import numpy as np

from . import dispatch
from .arguments import Operand, choice, class_indices, real, reduction, scores, soft_labels, weights
from .classes import INT64, ClassLoss, Problem
from .elementwise import ElementwiseLoss, broadcasts
from .kernels import math as nm
from .loss import (
    GRAD,
    VALUE,
    Recipe,
    call_arguments,
    resolve_normalizer,
    upstream,
)
from .rows import RowLoss, flat, places, workers


@cache
def margin_kernel(plain: bool, many: bool, dtype: np.dtype, parallel: bool) -> Any:
    from .kernels.cpu import margins  # on the first call, so that importing the library stays quick

    return (margins.compile_plain if plain else margins.compile_margins)(many, dtype, parallel)


class MarginLoss(ClassLoss):
    """A loss of each row's own classes against all its others: scores are (C) or (N, C)."""

    # Hinges: starting two threads costs about 6 us.
    _parallel_from = 32768
    _many: ClassVar[bool]  # whether a row has several classes, ended by -1; what a loss states

    @classmethod
    def _complete(cls) -> bool:
        return hasattr(cls, "_many")

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return ("input",)

    @classmethod
    def _kernel(cls, plain: bool, dtype: np.dtype, parallel: bool) -> Any:
        return margin_kernel(plain, cls._many, dtype, parallel)

    @classmethod
    def _extents(cls, shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...] | None:
        return shape if len(shape) == 2 and target == (shape if cls._many else shape[:1]) else None

    @classmethod
    def _settings(cls, options: dict[str, Any], factor: float, divisor: float) -> Any:
        return options.get("p", 1), options.get("margin", 1.0), factor, divisor

    @classmethod
    def _check(cls, call: dict[str, Any], options: dict[str, Any], wrt: tuple[str, ...]) -> Problem:
        shape = np.shape(call["input"])
        if len(shape) not in (1, 2):
            raise ValueError(f"{cls.function.__name__}: input must have shape (C) or (N, C), got {shape}")
        return super()._check(call, options, wrt)

    @classmethod
    def _compute(cls, p: Problem, options: dict[str, Any], outputs: dict[str, np.ndarray]) -> Any:
        shape = p.input.shape
        rows = shape[:-1]
        terms = np.empty(math.prod(rows) if options["reduction"] == "none" else 0, p.arithmetic)
        arrays = [p.input, outputs.get("input"), outputs.get("curvature")]
        where = places(arrays)
        target = p.target
        if target.dtype.kind == "u" and target.dtype.itemsize == 8:
            target = np.minimum(target, np.uint64(2**63 - 1))  # no class has that index
        arguments = (
            *where,
            (math.prod(rows), shape[-1]),
            flat(target, target.shape, INT64),
            flat(p.weight, shape[-1:], p.arithmetic),
            flat(p.terms.sample_weight, rows, p.arithmetic),
            flat(p.terms.upstream, rows, p.arithmetic),
            terms,
            cls._settings(options, p.terms.factor, p.terms.divisor),
            workers(),
        )
        value, wrong = cls._run_kernel(False, p.arithmetic, p.input.size, arguments)
        if wrong >= 0:
            cls._refuse_index(p, tuple(map(int, np.unravel_index(wrong, p.target.shape))))
        if options["reduction"] == "none":
            return terms.reshape(rows).astype(p.dtype, copy=False)
        return p.dtype.type(value)


class MultiMarginLoss(MarginLoss, function="multi_margin_loss"):
    r"""How far a row's class is from leading all others by a margin.

    .. math:: \ell = \frac{w_y}{C} \sum_{c \ne y} \max(0, \text{margin} - x_y + x_c)^p

    The mean divides by the number of rows, whatever the class weights. At exactly the clamp the gradient is
    zero, as in PyTorch; a NaN score makes its row NaN (PyTorch: no contribution). Every class index is
    checked, that of a row whose weight is zero too.

    Parameters
    ----------
    input : array, shape (C) or (N, C)
        Scores.
    target : array, shape () or (N)
        Class indices of any integer dtype.
    p : {1, 2}, default 1
        Power of the hinges.
    margin : float, default 1.0
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

    _many = False

    @classmethod
    def _prepare(cls) -> None:
        cls.operands = {"input": scores(), "target": class_indices()}
        cls._required = tuple(cls.operands)

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
        Scores.
    target : array
        Of the input's shape: class indices of any signed integer dtype, or of an unsigned one where all
        classes count; the first -1 ends a row's list.
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

    _many = True

    @classmethod
    def _prepare(cls) -> None:
        cls.operands = {"input": scores(), "target": Operand(draw=_label_lists)}
        cls._required = tuple(cls.operands)

    @classmethod
    def _check(cls, call: dict[str, Any], options: dict[str, Any], wrt: tuple[str, ...]) -> Problem:
        name = cls.function.__name__
        x = dispatch.as_array(name, "input", call["input"])
        target = dispatch.as_array(name, "target", call["target"])
        if target.shape != x.shape:
            raise ValueError(f"{name}: target must have input's shape {x.shape}, got {target.shape}")
        # All but the target is as with one label a row.
        one = np.zeros(x.shape[:-1], target.dtype)
        return super()._check({**call, "target": one}, options, wrt)._replace(target=target)

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

    @classmethod
    def _complete(cls) -> bool:
        return True

    @classmethod
    def _prepare(cls) -> None:
        cls.operands = _Terms.operands
        cls._required = tuple(cls.operands)

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return (*cls.operands, "weight")

    @classmethod
    @cache
    def _jit(cls) -> Any:
        from .kernels.cpu.inside_rows import compile_multilabel_soft_margin

        return compile_multilabel_soft_margin(_Terms._scalars((), 2))

    @classmethod
    def _check(cls, call: dict[str, Any], options: dict[str, Any], wrt: tuple[str, ...]) -> Problem:
        name = cls.function.__name__
        floats: dict[str, np.ndarray] = {}
        x = floats["input"] = dispatch.floating(
            name, "input", dispatch.as_array(name, "input", call["input"])
        )
        target = cls._weak("target", call, floats, wrt)
        if target is None or target.shape != x.shape:
            got = None if target is None else target.shape
            raise ValueError(f"{name}: target must have input's shape {x.shape}, got {got}")
        weight = cls._weak("weight", call, floats)
        if weight is not None and not broadcasts(weight.shape, x.shape):
            raise ValueError(f"{name}: weight of shape {weight.shape} does not broadcast to {x.shape}")
        terms = cls._terms(call, options, x.shape[:-1], floats)
        dtype = dispatch.common_dtype([a.dtype for a in floats.values()])
        return Problem(x, target, True, weight, terms, dtype, dispatch.arithmetic_dtype(dtype))

    @classmethod
    def _check_curvature(cls, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
        pass  # what the kernel of rows does not give is computed by elements

    @classmethod
    def _evaluate(cls, mode: str, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = call_arguments(recipe, args, kwargs)
        name = cls.function.__name__
        how = cls.fields["reduction"].check(name, "reduction", call.get("reduction", "mean"))
        on_device = any(map(dispatch.is_device_array, call.values()))
        x = call["input"] if on_device else dispatch.as_array(name, "input", call["input"])
        shape = tuple(np.shape(x))
        if not shape or not shape[-1]:
            raise ValueError(f"{name}: input must have shape (..., C), C at least 1, got {shape}")
        if how == "mean" and call.get("sample_weight") is None and call.get("normalizer") is None:
            return _Terms.function._run(mode, args, kwargs)  # the mean over all elements
        if on_device:
            from . import device_classes  # on the first call with an array on a device

            return device_classes.soft_margin(cls, _Terms.function, mode, how, call)
        rows, classes = x.shape[:-1], x.shape[-1]
        sample_weight = None
        divisor = 1.0
        if call.get("sample_weight") is not None:
            sample_weight = dispatch.as_array(name, "sample_weight", call["sample_weight"])
            if not broadcasts(sample_weight.shape, rows):
                raise ValueError(
                    f"{name}: sample_weight of shape {sample_weight.shape} does not broadcast to {rows}"
                )
            call["sample_weight"] = np.broadcast_to(sample_weight, rows)[..., np.newaxis]
        given = resolve_normalizer(name, call.get("normalizer"))
        if how == "mean":
            divisor = float(call["sample_weight"].sum(dtype=np.float64)) if given is None else given
        # What may not stand as a normalizer, because it is no positive number, goes into the upstream factor.
        sign = math.copysign(1.0, divisor) if divisor and math.isfinite(divisor) else math.nan
        call["normalizer"] = (abs(divisor) if sign == sign else 1.0) * classes
        factor, up = upstream(name, call.get("grad_output"), rows, how)
        if how == "none":
            call["normalizer"], factor = None, factor / classes
        if mode != VALUE:
            call["grad_output"] = factor * sign
        if up is not None:
            arithmetic = dispatch.arithmetic_dtype(dispatch.floating(name, "grad_output", up).dtype)
            up = up.astype(arithmetic)[..., np.newaxis] * arithmetic.type(factor)
            call["grad_output"] = np.broadcast_to(up, x.shape)
        call["reduction"] = "none" if how == "none" else "mean"
        result = getattr(_Terms.function, mode if mode != VALUE else "__call__")(**call)
        if mode == GRAD:
            return result
        value, *gradients = result if mode != VALUE else (result,)
        if how == "none":
            value = value.mean(axis=-1, dtype=np.float64).astype(value.dtype)
        else:
            value = value.dtype.type(value * sign)
        return value if mode == VALUE else (value, *gradients)


multi_margin_loss = MultiMarginLoss.function
multilabel_margin_loss = MultiLabelMarginLoss.function
multilabel_soft_margin_loss = MultiLabelSoftMarginLoss.function
