"""Derivatives of anyone's scalar function, for compiled code and for Python."""

import inspect
import types
from collections.abc import Callable
from typing import Any

from .kernels import inside


def derive(function: Callable[..., Any], order: int = 1) -> Any:
    """Return a compiled function that gives a function's value and its derivatives.

    Parameters
    ----------
    function : function
        Takes up to ten numbers by position and returns one. It is written as a loss's value is: with
        arithmetic, branches, the functions of `numbaloss.math`, NumPy and `math`, and ``@njit`` functions
        that are written likewise. It is compiled as it stands at this call.
    order : int
        1 for the gradient, 2 for the Hessian too.

    Returns
    -------
    compiled function of the same arguments
        It returns ``(value, gradient)``, the gradient a tuple of one number for each argument; of order 2
        ``(value, gradient, hessian)``, the Hessian a tuple of rows. To call from Python, in ``@njit`` and
        ``@vectorize`` functions and in CUDA kernels. Numbers are computed in float64, in float32 if all
        floats among the arguments are.

    Raises
    ------
    TypeError
        If the function takes no number, more than ten, or any other than by position; or is none of Python's.
    ValueError
        If the order is neither 1 nor 2.

    Notes
    -----
    Derivatives are those of the branch that is taken: at a kink of ``abs`` 0, of ``maximum(a, b)`` that of
    `a`. All come by forward differentiation: the time grows with the number of arguments, and for the Hessian
    with its square.

    Examples
    --------
    >>> import numbaloss as nl
    >>> value_and_slopes = nl.derive(lambda x, y: x * x * y)
    >>> value_and_slopes(3.0, 2.0)
    (18.0, (12.0, 9.0))
    >>> nl.derive(lambda x, y: x * x * y, order=2)(3.0, 2.0)
    (18.0, (12.0, 9.0), ((4.0, 6.0), (6.0, 0.0)))
    """
    if order not in (1, 2):
        raise ValueError(f"derive: order must be 1 or 2, got {order!r}")
    called = getattr(function, "py_func", function)  # of a compiled one what it was compiled of
    if not isinstance(called, types.FunctionType):
        raise TypeError(f"derive: function must be a Python function, got {type(function).__name__}")
    parameters = inspect.signature(called).parameters.values()
    odd = [p.name for p in parameters if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if odd or not parameters:
        wanted = "its arguments by position" if odd else "at least one number"
        raise TypeError(f"derive: function must take {wanted}" + (f", got {', '.join(odd)}" if odd else ""))
    defaults = tuple(p.default for p in parameters if p.default is not p.empty)
    return inside.derived(called, tuple(p.name for p in parameters), defaults, order)
