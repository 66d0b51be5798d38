"""Losses of one score of each row, that of its class: the negative log-likelihood of given log-probabilities.

A definition says what the score comes to (`spec.NllFunctions`). `nll_terms` and `nll_gradient` are the
blocks, for one dtype of the scores and of the gradient; `nll` is the driver, compiled once for all. Only the
elements that the class indices name are read, where they lie: any strides, any floating dtype. All of it is
serial: most time goes into the gradient's zeros.
"""

import sys
from functools import cache
from typing import Any

import numpy as np
from numba import njit, types

from ..bind import adopted, bind, fingerprint
from ..layout import class_axis, class_rows
from ..spec import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, NllFunctions, Picks, bad_index, code_of
from .arrange import (
    ADDRESS,
    AXES,
    CODE,
    SHAPE,
    STRIDES,
    call_lay,
    call_order_axes,
    lay,
    order_axes_address,
)
from .blocks import ENTRY
from .halves import from_bfloat16, from_float16, to_bfloat16, to_float16
from .labels import (
    ABSENT,
    ARRAYS,
    BY_ROWS,
    CLASS_WEIGHT,
    CODE_OF_OWN,
    CODES,
    CURVATURE,
    DIVIDE,
    DIVISOR,
    FACTOR,
    FURTHER,
    GATHER,
    GATHER_INTEGERS,
    GRADIENT,
    INPUT,
    INT64,
    INTEGERS,
    ITEM_SIZE,
    LAY,
    LAYOUT_BYTES,
    LAYOUTS,
    MEMORY,
    READING,
    SAMPLE_WEIGHT,
    SCATTER,
    TARGET,
    TERMS,
    WRITING,
    arrays_of,
    begin_recipe,
    bind_calls,
    bind_linked,
    complete,
    describe_call,
    first_wrong,
    is_contiguous,
    lacks,
    make_contiguous,
    move_elements,
    new_outputs,
    number,
    numbers_of,
)
from .launch import CURVATURE as OUT_CURVATURE
from .launch import INCOMPLETE, OK, UNFIT, Launch, New
from .native import (
    HELPER,
    allocate,
    at_address,
    caller,
    compile_entry,
    compile_function,
    data_of,
    item,
    rank_of,
    release,
    shape_of,
    stack,
    store,
    strides_of,
)
from .strided import locate
from .target import derivatives

# Of a recipe, further than what all families of class scores have.
TERMS_BLOCK = FURTHER  # the addresses of the blocks; 0 for one that is not asked for
GRADIENT_BLOCK = FURTHER + 1
ORDER_AXES = FURTHER + 2  # the address of `arrange.order_axes`; 0 where all arrays are in C order
IGNORE = FURTHER + 3  # the label of rows that do not count
RECIPE = FURTHER + 4

# A block's places, in int64.
SCORES = 0  # the address of the scores, or of the gradient
CLASS_STRIDE = 1  # bytes from one class to the next
ROWS_AT = 2  # the address of the rows' layout: the scores' without the axis of the classes
LABELS = 3  # the address of contiguous int64
IGNORED = 4
WEIGHT = 5  # addresses of weights and bytes from one to the next, in the arithmetic dtype; 0 for none
WEIGHT_STRIDE = 6
ROW_WEIGHT = 7
ROW_WEIGHT_STRIDE = 8
SCALES = 9
SCALES_STRIDE = 10
LOSSES = 11  # the address of the rows' losses, contiguous; 0 if they are not asked for
SLOPES = 12  # of the rows' slopes, contiguous, for the gradient; 0 for none
SCALE_AT = 13  # of the gradient's scale, in float64
WHOLE_AT = 14  # of the layout of the whole gradient
COUNT = 15  # elements of the gradient
PLACES = 16

# Bound by `compile_terms` and `compile_gradient`.
T: Any = np.float32
ITEM: Any = 4
S: Any = np.float32  # as which elements are stored
STORED: Any = 4
load: Any = None  # to the arithmetic dtype, and from it
save: Any = None
value: Any = None  # with its slope


# ---- blocks ----------------------------------------------------------------------------------------------


def nll_terms(places_at, rows):
    """Compute the rows' losses and slopes; the losses' sum."""
    places = at_address(places_at, 0)
    zero, one = T(0), T(1)
    layout = places[ROWS_AT]
    axes = at_address(layout, 0)[AXES]
    step, class_step = at_address(layout, 0)[STRIDES + axes - 1], places[CLASS_STRIDE]
    labels, ignored = at_address(places[LABELS], 0), places[IGNORED]
    scale = T(at_address(places[SCALE_AT], 0.0)[0])
    total, start = 0.0, 0
    while start < rows:
        offset, n = locate(layout + 8 * SHAPE, layout + 8 * STRIDES, axes, start)
        for i in range(n):
            row = start + i
            term = slope = zero
            label = labels[row]
            if label != ignored:
                w = one
                if places[WEIGHT]:
                    w = at_address(places[WEIGHT] + label * places[WEIGHT_STRIDE], zero)[0]
                if places[ROW_WEIGHT]:
                    w *= at_address(places[ROW_WEIGHT] + row * places[ROW_WEIGHT_STRIDE], zero)[0]
                if w != zero:  # else the score is not read
                    at = places[SCORES] + offset + i * step + label * class_step
                    term, slope, _ = value(T(load(at_address(at, S(0))[0])), w)
                    if places[SCALES]:
                        slope *= at_address(places[SCALES] + row * places[SCALES_STRIDE], zero)[0]
                    slope *= scale
            if places[LOSSES]:
                at_address(places[LOSSES], zero)[row] = term
            if places[SLOPES]:
                at_address(places[SLOPES], zero)[row] = slope
            total += term
        start += n
    return total


def nll_gradient(places_at, rows):
    """Store zeros, and the slopes, if any, where the labels are."""
    places = at_address(places_at, 0)
    whole, count = places[WHOLE_AT], places[COUNT]
    axes, base = at_address(whole, 0)[AXES], at_address(whole, 0)[ADDRESS]
    step, start = at_address(whole, 0)[STRIDES + axes - 1], 0
    while start < count:
        offset, n = locate(whole + 8 * SHAPE, whole + 8 * STRIDES, axes, start)
        if step == STORED:
            into = at_address(base + offset, S(0))
            for i in range(n):
                into[i] = S(0)
        else:
            for i in range(n):
                at_address(base + offset + i * step, S(0))[0] = S(0)
        start += n
    if not places[SLOPES]:
        return 0.0
    layout = places[ROWS_AT]
    axes = at_address(layout, 0)[AXES]
    step, start = at_address(layout, 0)[STRIDES + axes - 1], 0
    labels, slopes = at_address(places[LABELS], 0), at_address(places[SLOPES], T(0))
    while start < rows:
        offset, n = locate(layout + 8 * SHAPE, layout + 8 * STRIDES, axes, start)
        for i in range(n):
            label = labels[start + i]
            if label != places[IGNORED]:
                at = places[SCORES] + offset + i * step + label * places[CLASS_STRIDE]
                at_address(at, S(0))[0] = save(slopes[start + i])
        start += n
    return 0.0


def lift(functions: NllFunctions) -> Any:
    """A definition's compiled function ``(score, weight) -> value, slope, curvature``."""
    jets = derivatives()
    definition, seed, parts = njit(**HELPER)(adopted(functions.value)), jets.seed(2, 0), jets.parts

    @njit(**HELPER)
    def value(score, weight):
        return parts(definition(*seed(score, weight, weight)), score)

    return value


@njit(**HELPER)
def unchanged(x):
    return x


@njit(**HELPER)
def narrowed(x):
    """A float32; of arithmetic in float64 that is a rounding."""
    return np.float32(x)


BLOCK = types.float64(types.int64, types.int64)
run_block = caller(types.float64, 2)


def storage(code: int, dtype: np.dtype) -> dict[str, Any]:
    """The names of the blocks that depend on how elements are stored."""
    stored: Any = {FLOAT64: np.float64, FLOAT32: np.float32}.get(code, np.uint16)
    loads = {FLOAT16: from_float16, BFLOAT16: from_bfloat16}
    saves = {FLOAT16: to_float16, BFLOAT16: to_bfloat16, FLOAT32: narrowed}
    return dict(
        T=dtype.type,
        ITEM=dtype.itemsize,
        S=stored,
        STORED=np.dtype(stored).itemsize,
        load=loads.get(code, unchanged),
        save=saves.get(code, unchanged),
    )


def identity_of(functions: NllFunctions) -> tuple[Any, ...]:
    """Return all that a definition's block depends on."""
    return functions.name, fingerprint(functions.value)


@cache
def compile_terms(functions: NllFunctions, code: int, dtype: np.dtype) -> int:
    """The address of a definition's `nll_terms`, for scores stored as one code."""
    scope = storage(code, dtype) | dict(value=lift(functions))
    identity = identity_of(functions), code, dtype.name
    return compile_function(nll_terms, scope, functions.name, identity, BLOCK)


@cache
def compile_gradient(code: int, dtype: np.dtype) -> int:
    """The address of `nll_gradient`, for gradients stored as one code."""
    return compile_function(nll_gradient, storage(code, dtype), dtype.name, (code, dtype.name), BLOCK)


# ---- the driver ------------------------------------------------------------------------------------------


def nll(recipe, numbers, arrays, task, fork):
    """The divided sum, and `OK`, `UNFIT` or the position, as rows are visited, of the first wrong label.

    It has no task: nothing is done in parallel.
    """
    r, given = at_address(data_of(recipe), 0), at_address(data_of(numbers), 0.0)
    x = item(arrays, INPUT)
    rank = rank_of(x)
    if rank == 0:
        return 0.0, UNFIT
    axis = 0 if rank == 1 else 1
    classes, size, single = at_address(shape_of(x), 0)[axis], r[ITEM_SIZE], r[ITEM_SIZE] == 4
    rows = 1
    for k in range(rank):
        if k != axis:
            rows *= at_address(shape_of(x), 0)[k]
    if classes == 0:
        return 0.0, UNFIT
    # Axes in the order in which they lie.
    layouts, whole, order = stack(LAYOUTS), stack(LAYOUT_BYTES), stack(512)
    objects, first = stack(16), stack(8)
    store(first, 0)  # the order of one axis
    for k in range(rank):
        at_address(order, 0)[k] = k
    if r[ORDER_AXES]:
        store(objects, x)
        if r[CODES + GRADIENT] != ABSENT:
            store(objects + 8, item(arrays, GRADIENT))
            if rank_of(item(arrays, GRADIENT)) != rank:
                return 0.0, UNFIT
        call_order_axes(r[ORDER_AXES], (objects, 2 if r[CODES + GRADIENT] != ABSENT else 1, order))
    needed = 0
    for k in range(ARRAYS):
        if r[CODES + k] == ABSENT:
            continue
        array, like, skip, ordered = item(arrays, k), x, axis, order
        at = layouts + k * LAYOUT_BYTES
        if k == CLASS_WEIGHT:
            like, skip, ordered = array, -1, first
            if rank_of(array) != 1 or at_address(shape_of(array), 0)[0] != classes:
                return 0.0, UNFIT
        elif k in (INPUT, GRADIENT, CURVATURE):
            skip = -2 - axis
            if rank_of(array) != rank or at_address(shape_of(array), 0)[axis] != classes:
                return 0.0, UNFIT
        if call_lay(r[LAY], (array, like, ordered, skip, 1 if k == SAMPLE_WEIGHT else 0, at)):
            return 0.0, UNFIT
        layout = at_address(at, 0)
        layout[CODE] = r[CODES + k]
        if k == TARGET:
            needed |= 0 if is_contiguous(at, INT64, 8) else INTEGERS
        elif k == TERMS:
            needed |= 0 if is_contiguous(at, r[CODE_OF_OWN], size) else WRITING
        elif CLASS_WEIGHT <= k < TERMS:  # read at one stride
            needed |= READING if layout[AXES] > 1 or layout[CODE] != r[CODE_OF_OWN] else 0
    lacking = lacks(r, needed)
    if lacking:
        return 0.0, INCOMPLETE - lacking
    # Labels are contiguous int64, weights of the arithmetic dtype at one stride: where they lie, or copied.
    room = allocate(8 * (6 * rows + classes) + 8)
    free, target = room, layouts + TARGET * LAYOUT_BYTES
    if needed & INTEGERS:
        make_contiguous(r[GATHER_INTEGERS], target, free, rows, INT64, 8)
        free += 8 * rows
    labels = at_address(target, 0)[ADDRESS]
    wrong = first_wrong(labels, rows, 0, classes, r[IGNORE])
    if wrong >= 0:
        release(room)
        return 0.0, wrong
    places_at = stack(128)
    places = at_address(places_at, 0)
    for k in range(CLASS_WEIGHT, TERMS):
        at, to = layouts + k * LAYOUT_BYTES, WEIGHT + 2 * (k - CLASS_WEIGHT)
        places[to] = 0
        if r[CODES + k] == ABSENT:
            continue
        count = classes if k == CLASS_WEIGHT else rows
        layout = at_address(at, 0)
        if layout[AXES] > 1 or layout[CODE] != r[CODE_OF_OWN]:
            make_contiguous(r[GATHER], at, free, count, r[CODE_OF_OWN], size)
            free += 8 * count
        places[to] = layout[ADDRESS]
        places[to + 1] = layout[STRIDES]
    divisor = given[DIVISOR]
    if r[DIVIDE] == BY_ROWS:
        divisor = 0.0
        if places[WEIGHT] or places[ROW_WEIGHT]:
            for i in range(rows):
                label = at_address(labels, 0)[i]
                if label != r[IGNORE]:
                    w = 1.0
                    if places[WEIGHT]:
                        w = number(places[WEIGHT] + label * places[WEIGHT_STRIDE], single)
                    if places[ROW_WEIGHT]:
                        w *= number(places[ROW_WEIGHT] + i * places[ROW_WEIGHT_STRIDE], single)
                    divisor += w
        else:
            counted = 0
            for i in range(rows):
                counted += at_address(labels, 0)[i] != r[IGNORE]
            divisor = float(counted)
    scale = stack(8)
    at_address(scale, 0.0)[0] = np.inf if divisor == 0 else given[FACTOR] / divisor
    places[SCORES] = at_address(layouts, 0)[ADDRESS]
    places[CLASS_STRIDE] = at_address(strides_of(x), 0)[axis]
    places[ROWS_AT] = layouts
    places[LABELS] = labels
    places[IGNORED] = r[IGNORE]
    places[SCALE_AT] = scale
    places[LOSSES] = 0
    places[SLOPES] = 0
    terms = layouts + TERMS * LAYOUT_BYTES
    if r[CODES + TERMS] != ABSENT:
        places[LOSSES] = free if needed & WRITING else at_address(terms, 0)[ADDRESS]
        free += 8 * rows
    if r[CODES + GRADIENT] != ABSENT:
        places[SLOPES] = free
    total = 0.0
    if rows:
        total = run_block(r[TERMS_BLOCK], (places_at, rows))
        if needed & WRITING:
            move_elements(r[SCATTER], terms, 0, places[LOSSES], rows)
        for k in range(GRADIENT, ARRAYS):
            if r[CODES + k] != ABSENT:
                array = item(arrays, k)
                call_lay(r[LAY], (array, x, order, -1, 0, whole))
                places[SCORES] = data_of(array)
                places[CLASS_STRIDE] = at_address(strides_of(array), 0)[axis]
                places[ROWS_AT] = layouts + k * LAYOUT_BYTES
                places[WHOLE_AT] = whole
                places[COUNT] = rows * classes
                if k == CURVATURE:
                    places[SLOPES] = 0
                run_block(r[GRADIENT_BLOCK], (places_at, rows))
    release(room)
    return total / divisor, OK


@cache
def entry() -> Any:
    """`nll`, compiled."""
    return compile_entry(nll, {}, "rows", "rows", ENTRY)


# ---- launching ----------------------------------------------------------------------------------------


def new_terms(p: Picks) -> np.ndarray | None:
    """Return a new array for the terms, if they are asked for."""
    return np.empty(class_rows(p.input.shape), p.dtype) if p.weighting.reduction == "none" else None


def pack(p: Picks, outputs: dict[str, np.ndarray], made: tuple[str, ...]) -> Launch:
    """Pack a problem for the driver. A gradient and a curvature are of one dtype."""
    arrays = arrays_of(p, outputs)
    recipe = begin_recipe(p, arrays, RECIPE)
    recipe[TERMS_BLOCK] = compile_terms(p.functions, code_of(p.input.dtype), p.arithmetic)
    for n in ("input", OUT_CURVATURE):
        if n in outputs:
            recipe[GRADIENT_BLOCK] = compile_gradient(code_of(outputs[n].dtype), p.arithmetic)
    if not all(a is None or a.flags.c_contiguous for a in (p.input, *arrays[GRADIENT:])):
        recipe[ORDER_AXES] = order_axes_address()
    recipe[IGNORE] = p.ignore_index
    return Launch(
        entry(), recipe, numbers_of(p), arrays, 0, sys.maxsize,
        new_outputs(made, New(TERMS, TARGET)), complete(p.arithmetic),
    )  # fmt: skip


def refuse(p: Picks, status: int) -> Exception:
    """Return the error for a call that the driver refused."""
    target, shape = p.target, p.input.shape
    if status == UNFIT:
        return ValueError(f"{p.name}: arrays of shapes {shape} and {target.shape} do not fit together")
    # Rows were not visited in C order.
    classes = shape[class_axis(shape)]
    wrong = (target != p.ignore_index) & ((target < 0) | (target >= classes))
    index = tuple(map(int, np.argwhere(wrong)[0]))
    return bad_index(p.name, index, target[index], classes)


# ---- inside compiled code -----------------------------------------------------------------------------

# Bound by `compile_inside`.
drive: Any = None


def inside(x, labels, g, weight, extents, settings):
    """The value and the status of contiguous arrays: scores of (batch, classes, inner).

    `settings` are the label to ignore, and the divisor (NaN for what the rows count for).
    """
    ignored, divisor = settings
    memory = stack(MEMORY)
    rows = extents[0], extents[2]
    recipe, numbers, arrays = describe_call(memory, x, labels, weight, g, extents, rows, divisor)
    r = at_address(memory, 0)
    r[TERMS_BLOCK], r[GRADIENT_BLOCK], r[ORDER_AXES], r[IGNORE] = 0, 1, 0, ignored
    return drive(recipe, numbers, arrays, 0, 0)


@cache
def compile_inside(functions: NllFunctions, dtype: np.dtype) -> Any:
    """`inside` for a definition and a dtype: ``inside(...) -> (value, status)``."""
    name, identity = functions.name, (identity_of(functions), dtype.name)
    stored = storage(code_of(dtype), dtype)
    blocks = (
        bind_linked(nll_terms, stored | dict(value=lift(functions)), name, identity),
        bind_linked(nll_gradient, stored, name, dtype.name),
    )
    scope = dict(
        call_lay=bind_calls((bind_linked(lay, {}, name, "lay"),), name, "lay"),
        run_block=bind_calls(blocks, name, identity),
    )
    whole = dict(drive=bind_linked(nll, scope, name, identity))
    return bind(inside, whole, name, identity, njit(nogil=True, cache=True, error_model="numpy"))
