"""Calls seen before: straight to what was prepared for them, whatever the loss and the device.

A call's signature is all that decides how it is computed: of an array its type, dtype and layout, of anything
else its type and value. Extents are not in it: a batch that varies is prepared once. A prepared call that
finds anything wrong (shapes that do not fit, a class index out of range) gives MISSING and has written
nothing; the general call then says what is wrong.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .kernels.spec import GRAD, MISSING, VALUE, VALUE_GRAD_HESS

ndarray = np.ndarray
LAYOUT = 0x1 | 0x2 | 0x100 | 0x400  # C or Fortran order, aligned, writeable: bits of NumPy's `flags.num`

Prepared = Callable[[tuple[Any, ...]], Any]


def signature(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the part of a call that decides how it is computed; it has no hash where a value has none."""
    key: list[Any] = []
    for v in values:
        if v.__class__ is ndarray:
            key += v.dtype, v.flags.num & LAYOUT
        else:
            key += v.__class__, v
    return tuple(key)


def with_outputs(values: tuple[Any, ...], at: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return a call's values with its outputs at the end, which stand at a position, and its signature.

    Which of the values each output is belongs to the signature: a gradient may overwrite its argument.
    """
    out, others = values[at], (*values[:at], *values[at + 1 :])
    outputs = out if out.__class__ is tuple else (out,)
    values = (*others, *outputs)
    count = len(others)
    places = tuple(
        [next((k for k, v in enumerate(values[: count + j]) if v is o), -1) for j, o in enumerate(outputs)]
    )
    return values, (*signature(values), out.__class__ is tuple, places)


def are_distinct(values: Iterable[Any]) -> bool:
    """Return whether no array is given twice: then each array of a launch is one argument's."""
    arrays = [id(v) for v in values if v.__class__ is ndarray]
    return len(set(arrays)) == len(arrays)


def prepare(
    mode: str,
    single: bool,
    outputs: dict[str, Any],
    made: tuple[str, ...],
    values: tuple[Any, ...],
    again: Callable[[tuple[Any, ...]], Any],
) -> Prepared:
    """Return a function that serves further calls of one signature.

    Parameters
    ----------
    mode : str
    single : bool
        Whether the gradient is an array, and no tuple.
    outputs : dict
        The call's gradients, and its curvature, in order.
    made : tuple of str
        Those that were made for the call, and will be for others.
    values : tuple
        What the caller gave, `out` among it.
    again : callable
        ``again(values)`` gives the value and what it made, or `MISSING`: see the backends' `repeat`.
    """
    if mode == VALUE:

        def value(values: tuple[Any, ...]) -> Any:
            found = again(values)
            return found if found is MISSING else found[0]

        return value
    # Each output among what was made, then the values.
    count = len(made)
    at = [made.index(n) if n in made else count + _index(values, o) for n, o in outputs.items()]
    if count == 1 and at == [0] and single and mode != VALUE_GRAD_HESS:

        def one(values: tuple[Any, ...]) -> Any:
            found = again(values)
            if found is MISSING:
                return found
            value, (gradient,) = found
            return gradient if mode == GRAD else (value, gradient)

        return one

    def several(values: tuple[Any, ...]) -> Any:
        found = again(values)
        if found is MISSING:
            return found
        value, new = found
        arrays = (*new, *values)
        written = tuple([arrays[k] for k in at])
        if mode == VALUE_GRAD_HESS:
            return value, *written
        gradient = written[0] if single else written
        return gradient if mode == GRAD else (value, gradient)

    return several


def never(values: tuple[Any, ...]) -> Any:
    """Serve no call: of some signatures each has to be worked out."""
    return MISSING


def _index(values: tuple[Any, ...], array: Any) -> int:
    return next(k for k, v in enumerate(values) if v is array)
