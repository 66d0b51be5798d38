"""Losses of the user's own: a function becomes what the built-in ones are, by the same mechanism."""

import inspect
from collections.abc import Callable
from typing import Any

from .. import arguments
from ..families.elementwise import ElementwiseLoss
from ..families.scores import ScoreLoss
from ..families.vectors import VectorLoss
from ..loss import LossFunction


def elementwise_loss(value: Callable[..., Any]) -> LossFunction:
    """Make a loss of a function that gives one term.

    Parameters
    ----------
    value : function
        ``value(input, target, <options>)``: two or three arguments without defaults, which stand for one
        element of each array, then options with defaults (a number, a bool, or a kind of
        ``numbaloss.arguments``). Ordinary arithmetic, ``if``, ``abs``, ``min``, ``max`` and the functions of
        ``numbaloss.math`` (or their NumPy namesakes). The derivatives are derived. It may read globals,
        attributes of modules and closure cells that hold numbers, arrays, members of enumerations or
        compiled functions: they are compiled in, and a change of one shows at the next call (of an array's
        elements it does not).

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
        compiled or differentiated, or if it reads something of which a change could not be noticed.

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


def vector_loss(
    terms: Callable[..., Any], finish: Callable[..., Any], name: str | None = None
) -> LossFunction:
    """Make a loss of vectors of two functions: the terms of a coordinate, and the value of their sums.

    Parameters
    ----------
    terms : function
        ``terms(anchor, positive, negative, <options>)``: two or three arguments without defaults, which stand
        for one coordinate of each vector, then options with defaults. It gives the numbers that are added up
        over a row: a tuple, or one number.
    finish : function
        ``finish(<sums>, <row arrays>, <options>)``: a row's value. Its arguments without defaults beyond the
        sums are arrays of one number for each row. An option that both functions take has a default in one of
        them, or the same in both.
    name : str, optional
        The loss's; that of `finish` if it is not given. To be pickled, the loss has to be a global of this
        name in the module of `finish`.

    Returns
    -------
    LossFunction
        With all that a built-in loss has: ``value_and_grad``, ``grad``, ``value_grad_hess``, ``wrt``,
        ``out``, weights, reductions, every dtype, ``jit``, the disk cache, and its class as ``Class``.

    Raises
    ------
    TypeError
        If the parameters are not of this form; at the first call, with the line, if a function cannot be
        compiled or differentiated.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> def squares(x, y):
    ...     return (x - y) ** 2
    >>> def spring(total, same, margin=1.0):
    ...     apart = nl.math.maximum(margin - nl.math.sqrt(total), 0.0)
    ...     return nl.math.where(same == 1, total, apart**2)
    >>> contrastive = nl.vector_loss(squares, spring, name="contrastive")
    >>> x, y = np.zeros((2, 2)), np.array([[3.0, 4.0], [0.3, 0.4]])
    >>> contrastive(x, y, np.array([1, 0]), reduction="none")
    array([25.  ,  0.25])
    """
    for function in (terms, finish):
        if not inspect.isfunction(function):
            raise TypeError(f"vector_loss wants two functions, got {function!r}")
    name = finish.__name__ if name is None else name
    fields = _options(terms)
    for n, default in _options(finish).items():
        if fields.setdefault(n, default) is not default and fields[n] != default:
            raise TypeError(f"{name}: {n} has two defaults, {fields[n]!r} and {default!r}")
    stated = {"terms": terms, "finish": finish}
    return _definition(VectorLoss, name, finish, stated, {**fields, "reduction": arguments.reduction()})


def _from_function(
    decorator: str, family: type, value: Callable[..., Any], more: dict[str, Any]
) -> LossFunction:
    """Return the loss that a family makes of a function, whose parameters with defaults are its options."""
    if not inspect.isfunction(value):
        raise TypeError(f"{decorator} wants a function, got {value!r}")
    return _definition(family, value.__name__, value, {"value": value}, {**_options(value), **more})


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters with defaults."""
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise TypeError(f"{function.__name__}: {name} must be an ordinary parameter, not {parameter}")
        if parameter.default is not parameter.empty:
            fields[name] = parameter.default
    return fields


def _definition(
    family: type, name: str, main: Callable[..., Any], stated: dict[str, Any], fields: dict[str, Any]
) -> LossFunction:
    """Return the loss that a class statement would make; docs and module are those of its main function."""
    body = {
        "__doc__": main.__doc__,
        "__module__": main.__module__,
        "__qualname__": f"{main.__qualname__.removesuffix(main.__name__)}{name}.Class",
        "__annotations__": dict.fromkeys(fields, Any),
        **stated,
        **fields,
    }
    class_name = "".join(part.capitalize() for part in name.split("_"))
    definition: Any = type(class_name, (family,), body, function=name)
    return definition.function
