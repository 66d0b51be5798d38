"""Calls seen before: straight to what was prepared for them, whatever the loss and the device.

A call's signature is all that decides how it is computed: of an array its type, dtype and layout, of anything
else its type and value. On the CPU extents are not in it: a batch that varies is prepared once. On a device
they are, since what is launched depends on them. A prepared call that finds anything wrong (shapes that do
not fit, a class index out of range) gives MISSING and has written nothing; the general call then says what is
wrong.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .kernels.spec import GRAD, MISSING, OF_CURVATURES, VALUE

ndarray = np.ndarray
LAYOUT = 0x1 | 0x2 | 0x100 | 0x400  # C or Fortran order, aligned, writeable: bits of NumPy's `flags.num`

CONSTANTS = str, bool, int, float, tuple, type(None), np.generic

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


def with_outputs(
    values: tuple[Any, ...], at: int, sign: Callable[[tuple[Any, ...]], Any]
) -> tuple[tuple[Any, ...], Any]:
    """Return a call's values with its outputs at the end, which stand at a position, and its signature.

    Which of the values each output is belongs to the signature: a gradient may overwrite its argument.
    """
    out, others = values[at], values[:at] + values[at + 1 :]
    outputs = out if out.__class__ is tuple else (out,)
    said = others
    places: tuple[int, ...] = ()
    for o in outputs:
        place = _place(said, o)
        places += (place,)
        if place < 0:
            said += (o,)
    key = sign(said)
    return others + outputs, None if key is None else (*key, out.__class__ is tuple, places)


def is_said(values: Iterable[Any], on_device: bool) -> bool:
    """Return whether a signature says all of a call: no array is given twice, and nothing else can change."""
    arrays = [v for v in values if not isinstance(v, CONSTANTS)]
    return len({id(v) for v in arrays}) == len(arrays) and (
        on_device or all(v.__class__ is ndarray for v in arrays)
    )


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
    at = [made.index(n) if n in made else count + _place(values, o) for n, o in outputs.items()]
    if single and mode not in OF_CURVATURES:
        place = at[0] - count

        def one(values: tuple[Any, ...]) -> Any:
            found = again(values)
            if found is MISSING:
                return found
            value, new = found
            gradient = new[0] if place < 0 else values[place]
            return gradient if mode == GRAD else (value, gradient)

        return one

    def several(values: tuple[Any, ...]) -> Any:
        found = again(values)
        if found is MISSING:
            return found
        value, new = found
        arrays = (*new, *values)
        written = tuple([arrays[k] for k in at])
        if mode in OF_CURVATURES:
            return value, *written
        return written if mode == GRAD else (value, written)

    return several


def never(values: tuple[Any, ...]) -> Any:
    """Serve no call: of some signatures each has to be worked out."""
    return MISSING


def _place(values: tuple[Any, ...], array: Any) -> int:
    """Return which of the values an array is; -1 of none."""
    for k, v in enumerate(values):
        if v is array:
            return k
    return -1
