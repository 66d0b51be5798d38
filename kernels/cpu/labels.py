"""Class indices and weights of rows, as drivers read them: shared by the losses of class scores.

A driver's arrays are those of one order, and its recipe begins with the same entries; `arrays_of` and
`begin_recipe` make them of a problem.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from ..spec import CODES as FLOATS
from ..spec import FLOAT32, FLOAT64, code_of
from . import launch, strided
from .arrange import ADDRESS, AXES, CODE, LAYOUT_BYTES, SHAPE, STRIDES, lay_address
from .launch import INCOMPLETE
from .native import DESCRIPTION, HELPER, at_address, describe, store, tuple_at
from .strided import transfer

# The arrays of a call, in the order of its tuple.
INPUT, TARGET, CLASS_WEIGHT, SAMPLE_WEIGHT, UPSTREAM, TERMS, GRADIENT, CURVATURE = range(8)
ARRAYS = 8

# Of a recipe, in int64.
LAY = 0  # the address of `arrange.lay`
GATHER = 1  # the addresses of `strided`'s functions; 0 for one that no array has needed
SCATTER = 2
GATHER_INTEGERS = 3
DIVIDE = 4  # what divides the sum and the gradients
ITEM_SIZE = 5  # bytes of an element of the arithmetic dtype
CODE_OF_OWN = 6  # its code
CODES = 7  # each array's code, or `ABSENT`
FURTHER = CODES + ARRAYS  # what a family adds

BY_NUMBER, BY_ROWS = range(2)  # the number in `numbers`, or what the rows count for
DIVISOR, FACTOR, OPTIONS = range(3)  # of `numbers`, in float64

READING, WRITING, INTEGERS = 1, 2, 4  # what stands for `strided`'s functions, in a status below `INCOMPLETE`

ABSENT = -1  # the code of an array that a call does not have
INT64 = strided.INTEGERS["q"]
LAYOUTS = LAYOUT_BYTES * ARRAYS


@njit(**HELPER)
def number(address, single):
    """Read a float32 or a float64, as float64."""
    if single:
        return np.float64(at_address(address, np.float32(0))[0])
    return at_address(address, 0.0)[0]


@njit(**HELPER)
def rounded(x, single):
    """Round a float64 to the arithmetic dtype."""
    return np.float64(np.float32(x)) if single else x


@njit(**HELPER)
def is_contiguous(layout_at, code, itemsize):
    """Whether an array's elements are of a code, and lie one after the other in the order of the axes."""
    layout = at_address(layout_at, 0)
    if layout[CODE] != code or layout[AXES] != 1:
        return False
    return layout[STRIDES] == itemsize or layout[SHAPE] == 1


@njit(**HELPER)
def move_elements(function, layout_at, start, row, count):
    """Gather elements of a layout to a row, or scatter them from it."""
    layout = at_address(layout_at, 0)
    shape, strides = layout_at + 8 * SHAPE, layout_at + 8 * STRIDES
    transfer(function, (layout[CODE], layout[ADDRESS], shape, strides, layout[AXES], start, row, count))


@njit(**HELPER)
def make_contiguous(function, layout_at, row, count, code, itemsize):
    """Gather all elements of a layout to a row, and let the layout be that of the row."""
    move_elements(function, layout_at, 0, row, count)
    layout = at_address(layout_at, 0)
    layout[ADDRESS], layout[CODE], layout[AXES], layout[SHAPE] = row, code, 1, count
    layout[STRIDES] = itemsize


@njit(**HELPER)
def first_wrong(labels_at, count, lowest, classes, ignored):
    """The position of the first label outside of [lowest, classes) that is not `ignored`, or -1."""
    labels, span = at_address(labels_at, 0), np.uint64(classes - lowest)
    wrong = 0
    for i in range(count):
        wrong += (np.uint64(labels[i] - lowest) >= span) & (labels[i] != ignored)
    if wrong:
        for i in range(count):
            if (np.uint64(labels[i] - lowest) >= span) & (labels[i] != ignored):
                return i
    return -1


@njit(**HELPER)
def lacks(recipe, needed):
    """Which of the functions that are needed a recipe lacks."""
    lacking = 0
    for k in range(GATHER, GATHER_INTEGERS + 1):
        lacking |= (recipe[k] == 0) << (k - GATHER)
    return needed & lacking


# ---- launching ----------------------------------------------------------------------------------------


def readable_weights(array: Any, dtype: np.dtype) -> Any:
    """Return optional weights in a dtype that drivers read: integers become floats."""
    if array is None or (array.dtype.name in FLOATS and array.dtype.isnative and array.flags.aligned):
        return array
    return np.array(array, dtype)


def readable_labels(array: np.ndarray) -> np.ndarray:
    """Return class indices in native byte order, aligned."""
    if array.dtype.isnative and array.flags.aligned:
        return array
    return np.array(array, array.dtype.newbyteorder("="))


def arrays_of(p: Any, outputs: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """Return the arrays of a problem of class scores and labels, as a driver takes them."""
    w = p.weighting
    weights = [readable_weights(a, p.arithmetic) for a in (p.weight, w.sample_weight, w.upstream)]
    written = [outputs.get(n) for n in (launch.TERMS, "input", launch.CURVATURE)]
    return (p.input, readable_labels(p.target), *weights, *written)


def begin_recipe(p: Any, arrays: tuple[Any, ...], size: int) -> np.ndarray:
    """Return a recipe with what all families of class scores have in it, and zeros for the family's own."""
    recipe = np.zeros(size, np.int64)
    recipe[LAY], recipe[DIVIDE] = lay_address(), BY_ROWS if p.weighting.divisor is None else BY_NUMBER
    recipe[ITEM_SIZE], recipe[CODE_OF_OWN] = p.arithmetic.itemsize, code_of(p.arithmetic)
    codes = [code_of(a.dtype) if a is not None and a.dtype.kind not in "iu" else ABSENT for a in arrays]
    codes[TARGET] = integer_code(arrays[TARGET].dtype)
    recipe[CODES:FURTHER] = codes
    return recipe


def new_outputs(made: tuple[str, ...], terms: launch.New) -> tuple[launch.New, ...]:
    """Return what was made for a call, in order."""
    outputs = {
        launch.TERMS: terms,
        "input": launch.New(GRADIENT, INPUT),
        launch.CURVATURE: launch.New(CURVATURE, INPUT),
    }
    return tuple(outputs[n] for n in made)


def numbers_of(p: Any, options: tuple[float, ...] = ()) -> np.ndarray:
    """Return the numbers of a call."""
    w = p.weighting
    return np.array([1.0 if w.divisor is None else w.divisor, w.factor, *options])


def integer_code(dtype: np.dtype) -> int:
    """Return the code of an integer dtype for `strided.gather_integers`."""
    return 2 * (1, 2, 4, 8).index(dtype.itemsize) + (dtype.kind == "u")


@cache
def complete(dtype: np.dtype) -> Any:
    """Return a function that compiles what a recipe lacks."""

    def with_lacking(recipe: np.ndarray, status: int) -> None:
        lacking = INCOMPLETE - status
        if lacking & READING:
            recipe[GATHER] = strided.gatherer(dtype)
        if lacking & WRITING:
            recipe[SCATTER] = strided.scatterer(dtype)
        if lacking & INTEGERS:
            recipe[GATHER_INTEGERS] = strided.integer_gatherer()

    return with_lacking


# ---- inside compiled code -----------------------------------------------------------------------------

NUMBERS_AT = 8 * (FURTHER + 8)  # in the memory that `describe_call` takes: after the recipe
OBJECTS_AT = NUMBERS_AT + 8 * 8
MEMORY = OBJECTS_AT + 8 * ARRAYS + DESCRIPTION * (ARRAYS + 2)  # bytes


@njit(**HELPER)
def describe_call(memory, x, labels, weight, g, shape, rows, divisor):
    """Lay out a call of C-contiguous arrays for a driver; the addresses of its recipe, numbers and arrays.

    The recipe starts at `memory`, the numbers at `NUMBERS_AT`; what they have of the family's own is missing.
    """
    r, numbers, objects = at_address(memory, 0), memory + NUMBERS_AT, memory + OBJECTS_AT
    code = FLOAT32 if x.itemsize == 4 else FLOAT64
    for k in range(FURTHER):
        r[k] = ABSENT if k >= CODES else 0
    r[DIVIDE] = BY_ROWS if divisor != divisor else BY_NUMBER
    r[ITEM_SIZE], r[CODE_OF_OWN] = x.itemsize, code
    r[CODES + INPUT], r[CODES + TARGET] = code, INT64
    store(numbers + 8 * DIVISOR, divisor)
    store(numbers + 8 * FACTOR, 1.0)
    free = objects + 8 * ARRAYS
    store(objects + 8 * INPUT, describe(free, x.ctypes.data, shape, x.itemsize))
    store(objects + 8 * TARGET, describe(free + DESCRIPTION, labels.ctypes.data, rows, 8))
    if weight.size:
        r[CODES + CLASS_WEIGHT] = code
        at = free + 2 * DESCRIPTION
        store(objects + 8 * CLASS_WEIGHT, describe(at, weight.ctypes.data, (weight.size,), x.itemsize))
    if g.size:
        r[CODES + GRADIENT] = code
        at = free + 3 * DESCRIPTION
        store(objects + 8 * GRADIENT, describe(at, g.ctypes.data, shape, x.itemsize))
    recipe = describe(free + 4 * DESCRIPTION, memory, (FURTHER + 8,), 8)
    return recipe, describe(free + 5 * DESCRIPTION, numbers, (8,), 8), tuple_at(objects)
