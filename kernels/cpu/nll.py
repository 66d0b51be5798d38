"""Losses of one score of each row, that of its class: the negative log-likelihood of given log-probabilities.

A definition says what the score comes to (`spec.NllFunctions`). `nll_terms` and `nll_gradient` are the
blocks, for one dtype of the scores; `nll` is the driver, compiled once for all. Only the elements that the
class indices name are read, where they lie: any strides, any floating dtype. All of it is serial: most time
goes into the gradient's zeros.
"""

import sys
from functools import cache
from typing import Any

import numpy as np
from numba import njit, types

from ..bind import bind
from ..freeze import fingerprint, frozen
from ..layout import class_axis, class_rows
from ..math import select
from ..spec import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, NllFunctions, Picks, bad_index, code_of
from .arrange import (
    ADDRESS,
    AXES,
    CODE,
    LAYOUT_BYTES,
    SHAPE,
    STRIDES,
    call_lay,
    call_order_axes,
    lay_address,
    order_axes_address,
)
from .blocks import ENTRY
from .disk import kept
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
    complete,
    describe_call,
    first_wrong,
    is_contiguous,
    lacks,
    make_contiguous,
    move_elements,
    new_outputs,
    numbers_of,
)
from .launch import INCOMPLETE, OK, UNFIT, Launch, New
from .native import (
    HELPER,
    NO_MEMORY,
    addresses,
    allocate,
    at_address,
    caller,
    compile_drive,
    compile_entry,
    compile_function,
    data_of,
    item,
    rank_of,
    release,
    run_drive,
    shape_of,
    smaller,
    stack,
    store,
    strides_of,
)
from .strided import locate
from .target import add_lanes, derivatives, new_lanes, sum_of_lanes

# Of a recipe, further than what all families of class scores have.
TERMS_BLOCK = FURTHER  # the addresses of the blocks; 0 for one that is not asked for
GRADIENT_BLOCK = FURTHER + 1  # that of the gradient, then of the curvature
ORDER_AXES = FURTHER + 3  # the address of `arrange.order_axes`; 0 where all arrays are in C order
IGNORE = FURTHER + 4  # the label of rows that do not count
RECIPE = FURTHER + 5

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
UPSTREAM_AT = 9
UPSTREAM_STRIDE = 10
LOSSES = 11  # the address of the rows' losses, contiguous; 0 if they are not asked for
REAL_AT = 12  # of a float64: `nll_terms` gives what the rows count for, `nll_gradient` takes its scale
WHOLE_AT = 13  # of the layout of the whole gradient
COUNT = 14  # elements of the gradient

SOME = 256  # rows whose losses are computed before they are added up
SOME_BYTES = 8 * SOME
LANES = 16

# Bound by `compile_block`.
T: Any = np.float32
ITEM: Any = 4
S: Any = np.float32  # as which elements are stored
STORED: Any = 4
load: Any = None  # to the arithmetic dtype, and from it
save: Any = None
value: Any = None  # with its slope


# ---- blocks ----------------------------------------------------------------------------------------------


@njit(**HELPER)
def weights_of_rows(places, start, count, into, zero, one):
    """Store rows' weights: the class's times the row's own, 1 for one that is absent; 0 of ignored rows."""
    labels, ignored = at_address(places[LABELS], 0), places[IGNORED]
    weights, weight_step = places[WEIGHT], places[WEIGHT_STRIDE]
    row_weights, row_weight_step = places[ROW_WEIGHT], places[ROW_WEIGHT_STRIDE]
    if weights or row_weights:
        for i in range(count):
            label, w = labels[start + i], zero
            if label != ignored:
                w = at_address(weights + label * weight_step, zero)[0] if weights else one
                if row_weights:
                    w *= at_address(row_weights + (start + i) * row_weight_step, zero)[0]
            into[i] = w
    else:
        for i in range(count):
            into[i] = select(labels[start + i] != ignored, one, zero)


@njit(**HELPER)
def place_of_label(labels, row, ignored, class_step):
    """Bytes from a row's first class to its own; 0 where its label is ignored."""
    return labels[row] * class_step if labels[row] != ignored else 0


def nll_terms(places_at, rows):
    """Compute the rows' losses, and what the rows count for; the losses' sum."""
    places = at_address(places_at, 0)
    zero, one = T(0), T(1)
    layout = places[ROWS_AT]
    axes = at_address(layout, 0)[AXES]
    step, class_step = at_address(layout, 0)[STRIDES + axes - 1], places[CLASS_STRIDE]
    # Read once: LLVM cannot know that no store changes them.
    labels, ignored, losses = at_address(places[LABELS], 0), places[IGNORED], places[LOSSES]
    terms_at, counts_at = stack(SOME_BYTES), stack(SOME_BYTES)
    terms, counts = at_address(terms_at, zero), at_address(counts_at, zero)
    total, counted = new_lanes(LANES, 0.0), new_lanes(LANES, 0.0)
    start = 0
    while start < rows:
        offset, n = locate(layout + 8 * SHAPE, layout + 8 * STRIDES, axes, start)
        n, scores = smaller(n, SOME), places[SCORES] + offset
        weights_of_rows(places, start, n, counts, zero, one)
        for i in range(n):
            at = scores + i * step + place_of_label(labels, start + i, ignored, class_step)
            term = value(T(load(at_address(at, S(0))[0])), counts[i])[0]
            terms[i] = select(counts[i] == zero, zero, term)
        if losses:
            for i in range(n):
                at_address(losses, zero)[start + i] = terms[i]
        for i in range(n, (n + LANES - 1) // LANES * LANES):
            counts[i] = terms[i] = zero
        for i in range(0, n, LANES):
            add_lanes(total, at_address(terms_at + i * ITEM, zero), LANES)
            add_lanes(counted, at_address(counts_at + i * ITEM, zero), LANES)
        start += n
    store(places[REAL_AT], sum_of_lanes(counted, LANES))
    return sum_of_lanes(total, LANES)


def nll_gradient(places_at, rows):
    """Store zeros and, where the labels are, the slopes: of a loss linear in the score, whatever that is."""
    places = at_address(places_at, 0)
    zero, one = T(0), T(1)
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
    layout = places[ROWS_AT]
    axes = at_address(layout, 0)[AXES]
    step, start = at_address(layout, 0)[STRIDES + axes - 1], 0
    labels, ignored, class_step = at_address(places[LABELS], 0), places[IGNORED], places[CLASS_STRIDE]
    upstream, upstream_step = places[UPSTREAM_AT], places[UPSTREAM_STRIDE]
    scale = T(at_address(places[REAL_AT], 0.0)[0])
    slopes = at_address(stack(SOME_BYTES), zero)
    while start < rows:
        offset, n = locate(layout + 8 * SHAPE, layout + 8 * STRIDES, axes, start)
        n, into = smaller(n, SOME), places[SCORES] + offset
        weights_of_rows(places, start, n, slopes, zero, one)
        for i in range(n):
            slope = value(zero, slopes[i])[1]
            if upstream:
                slope *= at_address(upstream + (start + i) * upstream_step, zero)[0]
            slopes[i] = select(slopes[i] == zero, zero, slope * scale)
        for i in range(n):
            at = into + i * step + place_of_label(labels, start + i, ignored, class_step)
            at_address(at, S(0))[0] = save(slopes[i])
        start += n
    return 0.0


@cache
def lift(functions: NllFunctions) -> Any:
    """A definition's compiled function ``(score, weight) -> value, slope, curvature``."""
    jets = derivatives()
    definition, seed, parts = njit(**HELPER)(frozen(functions.value)), jets.seed(2, 0), jets.parts

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
def compile_block(template: Any, functions: NllFunctions, code: int, dtype: np.dtype) -> int:
    """Return the address of a definition's `nll_terms` or `nll_gradient`, of elements stored as one code."""
    scope = storage(code, dtype) | dict(value=lift(functions))
    identity = identity_of(functions), code, dtype.name
    return compile_function(template, scope, functions.name, identity, BLOCK)


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
    classes, size = at_address(shape_of(x), 0)[axis], r[ITEM_SIZE]
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
    room = allocate(8 * ((4 * rows if needed else 0) + classes))
    if not room:
        return 0.0, NO_MEMORY
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
    real = stack(8)
    store(real, 0.0)
    terms = layouts + TERMS * LAYOUT_BYTES
    places[SCORES] = data_of(x)
    places[CLASS_STRIDE] = at_address(strides_of(x), 0)[axis]
    places[ROWS_AT] = layouts
    places[LABELS] = labels
    places[IGNORED] = r[IGNORE]
    places[REAL_AT] = real
    places[LOSSES] = 0
    if r[CODES + TERMS] != ABSENT:
        places[LOSSES] = free if needed & WRITING else at_address(terms, 0)[ADDRESS]
    total = 0.0
    if rows:
        total = run_block(r[TERMS_BLOCK], (places_at, rows))
        if needed & WRITING:
            move_elements(r[SCATTER], terms, 0, places[LOSSES], rows)
    divisor = given[DIVISOR]
    if r[DIVIDE] == BY_ROWS:
        divisor = at_address(real, 0.0)[0]
    store(real, np.inf if divisor == 0 else given[FACTOR] / divisor)
    for k in range(GRADIENT, ARRAYS):
        if rows and r[CODES + k] != ABSENT:
            array = item(arrays, k)
            call_lay(r[LAY], (array, x, order, -1, 0, whole))
            places[SCORES] = data_of(array)
            places[CLASS_STRIDE] = at_address(strides_of(array), 0)[axis]
            places[ROWS_AT] = layouts + k * LAYOUT_BYTES
            places[WHOLE_AT] = whole
            places[COUNT] = rows * classes
            # The curvature is zero.
            run_block(r[GRADIENT_BLOCK + k - GRADIENT], (places_at, rows if k == GRADIENT else 0))
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
    """Pack a problem for the driver."""
    arrays = arrays_of(p, outputs)
    recipe = begin_recipe(p, arrays, RECIPE)
    recipe[TERMS_BLOCK] = compile_block(nll_terms, p.functions, code_of(p.input.dtype), p.arithmetic)
    for k in range(GRADIENT, ARRAYS):
        if recipe[CODES + k] != ABSENT:
            block = compile_block(nll_gradient, p.functions, int(recipe[CODES + k]), p.arithmetic)
            recipe[GRADIENT_BLOCK + k - GRADIENT] = block
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

# Bound by `compile_inside`: what `compile_functions` gives.
function_address: Any = None


def inside(x, labels, g, weight, extents, settings):
    """The value and the status of contiguous arrays: scores of (batch, classes, inner).

    `settings` are the label to ignore, and the divisor (NaN for what the rows count for).
    """
    ignored, divisor = settings
    memory = stack(MEMORY)
    rows = extents[0], extents[2]
    recipe, numbers, arrays = describe_call(memory, x, labels, weight, g, extents, rows, divisor)
    r = at_address(memory, 0)
    r[LAY], r[TERMS_BLOCK], r[GRADIENT_BLOCK] = function_address(1), function_address(2), function_address(3)
    r[ORDER_AXES], r[IGNORE] = 0, ignored
    return run_drive(function_address(0), recipe, numbers, arrays, 0)


def compile_functions(functions: NllFunctions, dtype: np.dtype) -> tuple[int, ...]:
    """Return the addresses of the driver and the functions that it calls."""
    blocks = (compile_block(t, functions, code_of(dtype), dtype) for t in (nll_terms, nll_gradient))
    return compile_drive(nll), lay_address(), *blocks


@cache
def compile_inside(functions: NllFunctions, dtype: np.dtype) -> Any:
    """`inside` for a definition and a dtype: ``inside(...) -> (value, status)``."""
    name, identity = functions.name, (identity_of(functions), dtype.name)
    scope = dict(function_address=addresses(compile_functions, functions, dtype))
    return bind(inside, scope, name, identity, kept(nogil=True, error_model="numpy"))
