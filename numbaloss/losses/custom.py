"""Losses of the user's own: a function becomes what the built-in ones are, by the same mechanism."""

import inspect
from collections.abc import Callable
from typing import Any

from .. import arguments
from ..families.elementwise import ElementwiseLoss
from ..families.scores import ScoreLoss
from ..loss import LossFunction


def elementwise_loss(value: Callable[..., Any]) -> LossFunction:
    """Make a loss of a function that gives one term.

    Parameters
    ----------
    value : function
        ``value(input, target, <options>)``: two or three arguments without defaults, which stand for one
        element of each array, then options with defaults (a number, a bool, or a kind of
        ``numbaloss.arguments``). Ordinary arithmetic, ``if``, ``abs``, ``min``, ``max`` and the functions of
        ``numbaloss.math`` (or their NumPy namesakes). The derivatives are derived.

    Returns
    -------
    LossFunction
        With all that a built-in loss has: ``value_and_grad``, ``grad``, ``value_grad_hess``, ``wrt``,
        ``out``, weights, reductions, every dtype, ``scalar`` and ``jit``, the disk cache, and its class as
        ``Class``.

    Raises
    ------
    TypeError
        If the parameters are not of this form; at the first call, with the line, if the function cannot be
        compiled or differentiated.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> @nl.elementwise_loss
    ... def log_cosh(input, target, scale=1.0):
    ...     d = abs((input - target) / scale)
    ...     return d + nl.math.log1p(nl.math.exp(-2 * d)) - 0.6931471805599453
    >>> float(round(log_cosh(np.array([0.0, 1.0]), np.zeros(2), scale=0.5), 6))
    0.662501
    """
    return _from_function("elementwise_loss", ElementwiseLoss, value, {"reduction": arguments.reduction()})


def score_loss(value: Callable[..., Any]) -> LossFunction:
    """Make a loss of a function that gives the value of one row of class scores.

    Parameters
    ----------
    value : function
        ``value(<statistics>, <options>)``: statistics of the row, asked for by name, without defaults:
        ``log_prob``, ``rest``, ``class_weight``, ``cross_entropy``, ``logsumexp`` (see `ScoreLoss`); then
        options with defaults (a number, a bool, or a kind of ``numbaloss.arguments``).

    Returns
    -------
    LossFunction
        With all that ``cross_entropy`` takes and has: scores (C), (N, C) or (N, C, d1, ...), indices or
        probabilities, ``weight``, ``ignore_index``, ``label_smoothing``, and its class as ``Class``.

    Raises
    ------
    TypeError
        If the parameters are not of this form; at the first call, with the line, if the function cannot be
        compiled or differentiated.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> @nl.score_loss
    ... def focal(log_prob, rest, class_weight, gamma=2.0):
    ...     return -class_weight * rest**gamma * log_prob
    >>> scores = np.array([[2.0, 0.0], [0.0, 3.0]])
    >>> float(focal(scores, np.array([0, 1]), gamma=0.0) - nl.cross_entropy(scores, np.array([0, 1])))
    0.0
    """
    return _from_function("score_loss", ScoreLoss, value, {})


def _from_function(
    decorator: str, family: type, value: Callable[..., Any], more: dict[str, Any]
) -> LossFunction:
    """Return the loss that a family makes of a function, whose parameters with defaults are its options."""
    if not inspect.isfunction(value):
        raise TypeError(f"{decorator} wants a function, got {value!r}")
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(value).parameters.items():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise TypeError(f"{value.__name__}: {name} must be an ordinary parameter, not {parameter}")
        if parameter.default is not parameter.empty:
            fields[name] = parameter.default
    body = {
        "__doc__": value.__doc__,
        "__module__": value.__module__,
        "__qualname__": f"{value.__qualname__}.Class",
        "__annotations__": dict.fromkeys((*fields, *more), Any),
        "value": value,
        **fields,
        **more,
    }
    name = "".join(part.capitalize() for part in value.__name__.split("_"))
    definition: Any = type(name, (family,), body, function=value.__name__)
    return definition.function
