"""Margin losses of class scores: each of a row's own classes against all that are not.

A definition says what one other class adds, and what a row makes of the sum (`spec.MarginFunctions`).
`one_label` and `many_labels` are the blocks: some rows of contiguous scores, and their gradients. `margins`
is the driver, compiled once for all of them. It works where the arrays lie, or else gathers a tile of rows
into scratch memory that stays in cache and scatters the gradient from there. Tiles depend on the shape alone
and their sums are added in order: the same bits for any number of threads.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import njit, types

from ..bind import bind
from ..freeze import fingerprint, frozen
from ..math import select
from ..spec import MANY, MarginFunctions, Margins, bad_index
from .arrange import ADDRESS, CODE, LAYOUT_BYTES, STRIDES, call_lay, lay_address
from .blocks import ENTRY
from .disk import kept
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
    NUMBERS_AT,
    OPTIONS,
    READING,
    SAMPLE_WEIGHT,
    SCATTER,
    TARGET,
    TERMS,
    UPSTREAM,
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
    number,
    numbers_of,
    rounded,
)
from .launch import CURVATURE as OUT_CURVATURE
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
    stack,
    store,
)
from .parallel import TASK, run_fork, run_task
from .target import derivatives, plus, prefer_widest_vectors

TILE = 4096  # elements of a tile: with its copies it stays in the first-level cache, nearly
RUN = 4096  # elements that are summed in the arithmetic dtype, before the sum goes on in float64
PARALLEL_FROM = 32768  # scores: starting two threads costs about 6 us

# Of a recipe, further than what all families of class scores have.
BLOCK = FURTHER  # the address of a block
HAS_LISTS = FURTHER + 1  # whether a row has a list of labels
WORKERS = FURTHER + 2  # shares into which parallel calls cut the tiles
RECIPE = FURTHER + 3

# A task's context, in int64.
RECIPE_AT = 0  # addresses: of the recipe, the options, the arrays' layouts, the tiles' sums
OPTIONS_AT = 1
LAYOUTS_AT = 2
SUMS_AT = 3
SCALE_AT = 4  # of the gradient's scale, a float64
ROWS = 5
CLASSES = 6
HEIGHT = 7  # rows of a tile
SHARES = 8
SCRATCH_AT = 9  # of the first share; and bytes that each has
SCRATCH_BYTES = 10

# A block's places, in int64: addresses of the tile's contiguous rows, unless said otherwise.
X = 0  # scores
G = 1  # gradients; may be `X`, and is anything where none is asked for
H = 2  # curvatures
LABELS = 3  # int64
WEIGHT = 4  # a row's weight, in float64
SCALE = 5  # of a row's gradient, in float64
TERM = 6  # a row's loss
SPARE = 7  # two rows of scratch, for lists of labels
NUMBERS = 8  # the options
COUNT = 9  # a number: the classes

# Bound by `compile_block`.
T: Any = np.float32
ITEM: Any = 4
WITH_GRADIENT: Any = True
WITH_CURVATURE: Any = False
options: Any = None
value: Any = None  # `terms`: its value; with derivatives by the score
by_score: Any = None
finish: Any = None  # its value and slope


# ---- blocks ----------------------------------------------------------------------------------------------


def one_label(places_at, rows):
    """Compute rows with one class each; their losses' sum."""
    prefer_widest_vectors()
    places = at_address(places_at, 0)
    zero, classes = T(0), places[COUNT]
    o = options(at_address(places[NUMBERS], 0.0), zero)
    labels, terms = at_address(places[LABELS], 0), at_address(places[TERM], zero)
    weights, scales = at_address(places[WEIGHT], 0.0), at_address(places[SCALE], 0.0)
    sum_of_rows = 0.0
    for row in range(rows):
        there = row * classes * ITEM
        x_at, g_at, h_at = places[X] + there, places[G] + there, places[H] + there
        weight, label = T(weights[row]), labels[row]
        if weight == zero:  # whatever the scores are
            if WITH_GRADIENT:
                for i in range(classes):
                    at_address(g_at, zero)[i] = zero
            if WITH_CURVATURE:
                for i in range(classes):
                    at_address(h_at, zero)[i] = zero
            terms[row] = zero
            continue
        own = at_address(x_at, zero)[label]
        factor = T(scales[row]) * finish(zero, T(classes), weight)[1]
        total = slope = curvature = 0.0  # of all other classes
        for part in range(2):  # the classes below the own one, and those above
            start = label + 1 if part else 0
            stop = classes if part else label
            part_total = part_slope = part_curvature = 0.0
            while start < stop:
                left = stop - start
                n = left if left < RUN else RUN
                x, g = at_address(x_at + start * ITEM, zero), at_address(g_at + start * ITEM, zero)
                run_total = run_slope = run_curvature = zero
                # A loop of its own, the same for every request: so are the sum's bits.
                for i in range(n):
                    run_total = plus(run_total, value(x[i], own, o))
                if WITH_GRADIENT:
                    if x_at != g_at:
                        for i in range(n):
                            g[i] = x[i]
                    if WITH_CURVATURE:
                        h = at_address(h_at + start * ITEM, zero)
                        for i in range(n):
                            h[i] = g[i]
                        for i in range(n):
                            c = by_score(h[i], own, o)[2]
                            run_curvature = plus(run_curvature, c)
                            h[i] = factor * c
                    for i in range(n):
                        d = by_score(g[i], own, o)[1]
                        run_slope = plus(run_slope, d)
                        g[i] = factor * d
                part_total += run_total
                part_slope += run_slope
                part_curvature += run_curvature
                start += n
            total += part_total
            slope += part_slope
            curvature += part_curvature
        if WITH_GRADIENT:
            at_address(g_at, zero)[label] = -factor * T(slope)
        if WITH_CURVATURE:
            at_address(h_at, zero)[label] = factor * T(curvature)
        term = finish(T(total), T(classes), weight)[0]
        terms[row] = term
        sum_of_rows += term
    return sum_of_rows


def many_labels(places_at, rows):
    """Compute rows with lists of classes that end at the first -1; their losses' sum."""
    prefer_widest_vectors()
    places = at_address(places_at, 0)
    zero, classes = T(0), places[COUNT]
    o = options(at_address(places[NUMBERS], 0.0), zero)
    terms = at_address(places[TERM], zero)
    weights, scales = at_address(places[WEIGHT], 0.0), at_address(places[SCALE], 0.0)
    scores_at, other_at = places[SPARE], places[SPARE] + classes * ITEM
    scores, other = at_address(scores_at, zero), at_address(other_at, zero)
    if classes < 1:  # which the driver refuses: rows without classes need no loop of their own
        return 0.0
    sum_of_rows = 0.0
    for row in range(rows):
        there = row * classes * ITEM
        x, g_at = at_address(places[X] + there, zero), places[G] + there
        g, labels = at_address(g_at, zero), at_address(places[LABELS] + row * classes * 8, 0)
        weight = T(weights[row])
        count = 0
        while count < classes and labels[count] >= 0:
            count += 1
        if weight == zero:
            if WITH_GRADIENT:
                for i in range(classes):
                    g[i] = zero
            terms[row] = zero
            continue
        for i in range(classes):
            scores[i] = x[i]
        for i in range(classes):
            other[i] = T(1)
        for k in range(count):
            other[labels[k]] = zero
        if WITH_GRADIENT:
            for i in range(classes):
                g[i] = zero
        total = 0.0
        for k in range(count):
            own = scores[labels[k]]
            own_slope = 0.0
            for start in range(0, classes, RUN):
                left = classes - start
                n = left if left < RUN else RUN
                s, mask = (
                    at_address(scores_at + start * ITEM, zero),
                    at_address(other_at + start * ITEM, zero),
                )
                slopes = at_address(g_at + start * ITEM, zero)
                run_total = run_slope = zero
                for i in range(n):
                    v = value(s[i], own, o)
                    run_total = plus(run_total, select(mask[i] == zero, zero, v))
                if WITH_GRADIENT:
                    for i in range(n):
                        d = select(mask[i] == zero, zero, by_score(s[i], own, o)[1])
                        run_slope = plus(run_slope, d)
                        slopes[i] += d
                total += run_total
                own_slope += run_slope
            if WITH_GRADIENT:
                g[labels[k]] -= T(own_slope)
        term, slope, _ = finish(T(total), T(classes), weight)
        if WITH_GRADIENT:
            factor = T(scales[row]) * slope
            for i in range(classes):
                g[i] *= factor
        terms[row] = term
        sum_of_rows += term
    return sum_of_rows


@cache
def lift(functions: MarginFunctions) -> dict[str, Any]:
    """A definition's compiled functions, by the blocks' names for them.

    Terms depend on the scores' difference: the slope by the own score is the opposite, the curvature the
    same. Where the difference is NaN so is the slope; jets would give that of the branch that is taken.
    """
    jets = derivatives()
    parts = jets.parts
    terms, last = (njit(**HELPER)(frozen(f)) for f in (functions.terms, functions.finish))
    constant, seed_score = jets.seed(2, None), jets.seed(2, 0)
    seed_total = jets.seed(3, 0)

    @njit(**HELPER)
    def value(score, own, o):
        return parts(terms(*(constant(score, own, own) + o)), score)[0]

    @njit(**HELPER)
    def by_score(score, own, o):
        v, d, h = parts(terms(*(seed_score(score, own, own) + o)), score)
        z = score - own
        return v, select(z == z, d, z), select(z == z, h, z)

    @njit(**HELPER)
    def finish(total, classes, weight):
        return parts(last(*seed_total(total, classes, weight)), total)

    return dict(value=value, by_score=by_score, finish=finish)


def identity_of(functions: MarginFunctions) -> tuple[Any, ...]:
    """Return all that a definition's blocks depend on."""
    of_code = fingerprint(functions.terms), fingerprint(functions.finish)
    return (functions.name, *of_code, functions.options)


def scope_of(functions: MarginFunctions, gradient: bool, curvature: bool, dtype: np.dtype) -> dict[str, Any]:
    """Return the names that are bound in a definition's block."""
    return lift(functions) | dict(
        T=dtype.type,
        ITEM=dtype.itemsize,
        WITH_GRADIENT=gradient or curvature,
        WITH_CURVATURE=curvature,
        options=derivatives().options(functions.options),
    )


@cache
def compile_block(functions: MarginFunctions, gradient: bool, curvature: bool, dtype: np.dtype) -> int:
    """Return the address of a definition's block."""
    if functions.many and curvature:
        raise NotImplementedError("the curvature of rows with many labels")
    template = many_labels if functions.many else one_label
    scope = scope_of(functions, gradient, curvature, dtype)
    identity = identity_of(functions), gradient, curvature, dtype.name
    signature = types.float64(types.int64, types.int64)
    return compile_function(template, scope, functions.name, identity, signature)


# ---- the driver ------------------------------------------------------------------------------------------

run_block = caller(types.float64, 2)


def share_of_tiles(context, share):
    """The driver's task: one share of the tiles, through scratch memory of its own."""
    c = at_address(context, 0)
    r = at_address(c[RECIPE_AT], 0)
    rows, classes, size = c[ROWS], c[CLASSES], r[ITEM_SIZE]
    height, single = c[HEIGHT], r[ITEM_SIZE] == 4
    each = classes if r[HAS_LISTS] else 1
    layouts, scale = c[LAYOUTS_AT], at_address(c[SCALE_AT], 0.0)[0]
    x, g, h = layouts, layouts + GRADIENT * LAYOUT_BYTES, layouts + CURVATURE * LAYOUT_BYTES
    terms = layouts + TERMS * LAYOUT_BYTES
    wants_g, wants_h = r[CODES + GRADIENT] != ABSENT, r[CODES + CURVATURE] != ABSENT
    wants_terms = r[CODES + TERMS] != ABSENT
    own_x = is_contiguous(x, r[CODE_OF_OWN], size)
    own_g = wants_g and is_contiguous(g, r[CODE_OF_OWN], size)
    own_h = wants_h and is_contiguous(h, r[CODE_OF_OWN], size)
    own_terms = wants_terms and is_contiguous(terms, r[CODE_OF_OWN], size)
    # Scratch: scores, which gradients overwrite; curvatures; rows' weights, scales and losses; two rows.
    span = height * classes * size
    scratch = c[SCRATCH_AT] + share * c[SCRATCH_BYTES]
    weights = scratch + 2 * span
    scales = weights + 8 * height
    losses = scales + 8 * height
    places_at = stack(80)
    places = at_address(places_at, 0)
    places[WEIGHT] = weights
    places[SCALE] = scales
    places[SPARE] = losses + 8 * height
    places[NUMBERS] = c[OPTIONS_AT]
    places[COUNT] = classes
    labels = at_address(layouts + TARGET * LAYOUT_BYTES, 0)[ADDRESS]
    tiles = (rows + height - 1) // height
    for tile in range(share * tiles // c[SHARES], (share + 1) * tiles // c[SHARES]):
        first = tile * height
        left = rows - first
        count = left if left < height else height
        start = first * classes
        for i in range(count):
            w, s = 1.0, scale
            if r[CODES + SAMPLE_WEIGHT] != ABSENT:
                a = at_address(layouts + SAMPLE_WEIGHT * LAYOUT_BYTES, 0)
                w = rounded(number(a[ADDRESS] + (first + i) * a[STRIDES], single), single)
            if r[CODES + CLASS_WEIGHT] != ABSENT:
                a = at_address(layouts + CLASS_WEIGHT * LAYOUT_BYTES, 0)
                label = at_address(labels, 0)[first + i]
                w = rounded(w * number(a[ADDRESS] + label * a[STRIDES], single), single)
            if r[CODES + UPSTREAM] != ABSENT:
                a = at_address(layouts + UPSTREAM * LAYOUT_BYTES, 0)
                s = rounded(s * number(a[ADDRESS] + (first + i) * a[STRIDES], single), single)
            at_address(weights, 0.0)[i] = w
            at_address(scales, 0.0)[i] = s
        places[X] = places[G] = scratch
        if own_x:
            places[X] = at_address(x, 0)[ADDRESS] + start * size
        else:
            move_elements(r[GATHER], x, start, scratch, count * classes)
        if own_g:
            places[G] = at_address(g, 0)[ADDRESS] + start * size
        places[H] = at_address(h, 0)[ADDRESS] + start * size if own_h else scratch + span
        places[LABELS] = labels + 8 * each * first
        places[TERM] = at_address(terms, 0)[ADDRESS] + first * size if own_terms else losses
        store(c[SUMS_AT] + 8 * tile, run_block(r[BLOCK], (places_at, count)))
        if wants_terms and not own_terms:
            move_elements(r[SCATTER], terms, first, losses, count)
        if wants_g and not own_g:
            move_elements(r[SCATTER], g, start, scratch, count * classes)
        if wants_h and not own_h:
            move_elements(r[SCATTER], h, start, scratch + span, count * classes)
    return 0


def margins(recipe, numbers, arrays, task, fork):
    """The divided sum, and `OK`, `UNFIT` or the position of the first wrong label in C order.

    `task` is the address of `share_of_tiles`, `fork` that of `parallel.fork`, or 0 to stay on this thread.
    """
    r, n = at_address(data_of(recipe), 0), at_address(data_of(numbers), 0.0)
    x, target = item(arrays, INPUT), item(arrays, TARGET)
    rank, target_rank = rank_of(x), rank_of(target)
    if rank > 2:
        return 0.0, UNFIT
    shape = at_address(shape_of(x), 0)
    classes = shape[rank - 1] if rank else 1
    rows = shape[0] if rank == 2 else 1
    single, size = r[ITEM_SIZE] == 4, r[ITEM_SIZE]
    if classes == 0:
        return 0.0, UNFIT
    # Layouts. A single row may have its label, or a single score its list of one, in an array of an axis more
    # or less; what has a number for each row is then of the label's shape.
    layouts, order = stack(LAYOUTS), stack(16)
    store(order, 0)
    store(order + 8, 1)
    lone = rank < 2 and target_rank < 2 and (classes == 1 or not r[HAS_LISTS])
    if lone and target_rank:
        lone = at_address(shape_of(target), 0)[0] == 1
    needed = 0
    for k in range(ARRAYS):
        if r[CODES + k] == ABSENT:
            continue
        array, like, skip = item(arrays, k), x, -1
        if k == CLASS_WEIGHT or (k == TARGET and lone):
            like = array
        elif k == TARGET:
            skip = -1 if r[HAS_LISTS] else rank - 1
        elif k in (SAMPLE_WEIGHT, UPSTREAM, TERMS):
            if r[HAS_LISTS]:
                skip = rank - 1
            else:
                like = target
        at = layouts + k * LAYOUT_BYTES
        if call_lay(r[LAY], (array, like, order, skip, 1 if k == SAMPLE_WEIGHT else 0, at)):
            return 0.0, UNFIT
        at_address(at, 0)[CODE] = r[CODES + k]
        if k == CLASS_WEIGHT and (rank_of(array) != 1 or at_address(shape_of(array), 0)[0] != classes):
            return 0.0, UNFIT
        if k == TARGET:
            needed |= 0 if is_contiguous(at, INT64, 8) else INTEGERS
        elif k != INPUT and k < TERMS:  # weights of the arithmetic dtype are read at any stride
            needed |= 0 if r[CODES + k] == r[CODE_OF_OWN] else READING
        elif not is_contiguous(at, r[CODE_OF_OWN], size):
            needed |= READING if k == INPUT else WRITING
    lacking = lacks(r, needed)
    if lacking:
        return 0.0, INCOMPLETE - lacking
    # Labels that are not contiguous int64 are copied, and weights of another dtype.
    count = rows * classes if r[HAS_LISTS] else rows
    height = TILE // classes if classes < TILE else 1
    height = height if height < rows or not rows else rows
    tiles = (rows + height - 1) // height
    own = 8 * ((count if needed & INTEGERS else 0) + classes + 2 * rows + tiles) + 64
    shares = (tiles if tiles < r[WORKERS] else r[WORKERS]) if fork else 1
    scratch = (2 * (height + 1) * classes * size + 3 * 8 * height + 63) // 64 * 64
    room = allocate(own + shares * scratch)
    if not room:
        return 0.0, NO_MEMORY
    sums = room
    free = sums + 8 * tiles
    if needed & INTEGERS:
        make_contiguous(r[GATHER_INTEGERS], layouts + TARGET * LAYOUT_BYTES, free, count, INT64, 8)
        free += 8 * count
    labels = at_address(layouts + TARGET * LAYOUT_BYTES, 0)[ADDRESS]
    lowest = -1 if r[HAS_LISTS] else 0
    wrong = first_wrong(labels, count, lowest, classes, lowest)
    if wrong >= 0:
        release(room)
        return 0.0, wrong
    for k in range(CLASS_WEIGHT, TERMS):
        if r[CODES + k] != ABSENT and r[CODES + k] != r[CODE_OF_OWN]:
            many = classes if k == CLASS_WEIGHT else rows
            if many:
                make_contiguous(r[GATHER], layouts + k * LAYOUT_BYTES, free, many, r[CODE_OF_OWN], size)
            free += 8 * many
    divisor = n[DIVISOR]
    if r[DIVIDE] == BY_ROWS:
        divisor = float(rows)
        if r[CODES + SAMPLE_WEIGHT] != ABSENT:
            divisor = 0.0
            a = at_address(layouts + SAMPLE_WEIGHT * LAYOUT_BYTES, 0)
            for i in range(rows):
                divisor += number(a[ADDRESS] + i * a[STRIDES], single)
    scale, context = stack(8), stack(88)
    at_address(scale, 0.0)[0] = rounded(n[FACTOR] / divisor, single)
    c = at_address(context, 0)
    c[RECIPE_AT] = data_of(recipe)
    c[OPTIONS_AT] = data_of(numbers) + 8 * OPTIONS
    c[LAYOUTS_AT] = layouts
    c[SUMS_AT] = sums
    c[SCALE_AT] = scale
    c[ROWS] = rows
    c[CLASSES] = classes
    c[HEIGHT] = height
    c[SHARES] = shares
    c[SCRATCH_AT] = (room + own) // 64 * 64
    c[SCRATCH_BYTES] = scratch
    if fork:
        run_fork(fork, (task, context, shares))
    elif rows:
        run_task(task, (context, 0))
    total = 0.0
    for tile in range(tiles):
        total += at_address(sums, 0.0)[tile]
    release(room)
    return total / divisor, OK


@cache
def task_address() -> int:
    """The address of `share_of_tiles`."""
    return compile_function(share_of_tiles, {}, "rows", "rows", TASK)


@cache
def entry() -> Any:
    """`margins`, compiled."""
    return compile_entry(margins, {}, "rows", "rows", ENTRY)


# ---- launching ----------------------------------------------------------------------------------------


def new_terms(p: Margins) -> np.ndarray | None:
    """Return a new array for the terms, if they are asked for."""
    if p.weighting.reduction != "none":
        return None
    return np.empty(p.input.shape[:-1] if p.kind == MANY else p.target.shape, p.dtype)


def pack(p: Margins, outputs: dict[str, np.ndarray], made: tuple[str, ...]) -> Launch:
    """Pack a problem of ONE or MANY labels a row for the driver."""
    assert p.functions is not None
    arrays = arrays_of(p, outputs)
    recipe = begin_recipe(p, arrays, RECIPE)
    recipe[BLOCK] = compile_block(p.functions, "input" in outputs, OUT_CURVATURE in outputs, p.arithmetic)
    recipe[HAS_LISTS], recipe[WORKERS] = p.kind == MANY, 4 * numba.config.NUMBA_NUM_THREADS
    terms = New(TERMS, INPUT, lambda shape: shape[:-1]) if p.kind == MANY else New(TERMS, TARGET)
    return Launch(
        entry(), recipe, numbers_of(p, p.numbers), arrays, task_address(), PARALLEL_FROM,
        new_outputs(made, terms), complete(p.arithmetic),
    )  # fmt: skip


def refuse(p: Margins, status: int) -> Exception:
    """Return the error for a call that the driver refused."""
    target = p.target
    if status == UNFIT:
        shapes = f"{p.input.shape} and {target.shape}"
        return ValueError(f"{p.name}: arrays of shapes {shapes} do not fit together")
    index = tuple(map(int, np.unravel_index(status, target.shape)))
    return bad_index(p.name, index, target[index], p.input.shape[-1] if p.input.ndim else 1)


# ---- inside compiled code -----------------------------------------------------------------------------

# Bound by `compile_inside`: what `compile_functions` gives, and whether a row has a list of labels.
function_address: Any = None
OF_LISTS: Any = False


def inside(x, labels, g, weight, extents, settings):
    """The value and the status of contiguous arrays: scores of (batch, classes, 1).

    `settings` are which of the definitions, its number at run time, and the divisor (NaN for the rows).
    """
    variant, option, divisor = settings
    memory = stack(MEMORY)
    shape = extents[0], extents[1]
    rows = shape if OF_LISTS else extents[:1]
    recipe, numbers, arrays = describe_call(memory, x, labels, weight, g, shape, rows, divisor)
    r = at_address(memory, 0)
    r[LAY], r[BLOCK] = function_address(2), function_address(3 + 2 * variant + (g.size > 0))
    r[HAS_LISTS], r[WORKERS] = OF_LISTS, 1
    store(memory + NUMBERS_AT + 8 * OPTIONS, option)
    return run_drive(function_address(0), recipe, numbers, arrays, function_address(1))


def compile_functions(definitions: tuple[MarginFunctions, ...], dtype: np.dtype) -> tuple[int, ...]:
    """Return the addresses of the driver, its task, and the functions that it calls."""
    blocks = (compile_block(f, gradient, False, dtype) for f in definitions for gradient in (False, True))
    return compile_drive(margins), task_address(), lay_address(), *blocks


@cache
def compile_inside(definitions: tuple[MarginFunctions, ...], dtype: np.dtype) -> Any:
    """`inside` for definitions and a dtype: ``inside(...) -> (value, status)``."""
    name, identity = definitions[0].name, [(identity_of(f), dtype.name) for f in definitions]
    scope = dict(
        function_address=addresses(compile_functions, definitions, dtype), OF_LISTS=definitions[0].many
    )
    return bind(inside, scope, name, identity, kept(nogil=True, error_model="numpy"))
