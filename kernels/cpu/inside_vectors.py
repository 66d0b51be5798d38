"""Losses of vectors inside the caller's own compiled code, each made of its definition.

``jit(<vectors>, <row arrays>, <options>, reduction='mean', out=None)`` returns the value; `out` is a tuple of
arrays, or of None where a gradient is not wanted. Driver and blocks are those of the library's own calls: the
bits are the same.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from ..bind import bind, gathered
from ..spec import (
    FLOAT32,
    FLOAT64,
    LARGEST,
    POWER,
    ROOT_OF_SQUARES,
    SUM,
    Distance,
    VectorFunctions,
    VectorRequest,
)
from . import vector_definitions as definitions
from . import vector_tiles as tiles
from . import vectors as driver
from .arrange import lay_address
from .disk import kept
from .inside_arrays import (
    PART,
    apart,
    compile_check,
    divisor_of,
    flat,
    gradient,
    in_turn,
    is_float,
    link,
    may_write,
    nothing,
    outputs_for,
    same_shape,
    with_unset,
)
from .native import (
    DESCRIPTION,
    addresses,
    at_address,
    compile_drive,
    describe,
    run_drive,
    stack,
    store,
    tuple_at,
)

# Bound by `compile_rows`: what `compile_functions` gives; the kinds of distance, and how many swaps each has;
# how many vectors, row arrays, and numbers of a row's state (0: by distances) there are.
function_address: Any = None
KINDS: Any = (0,)
SWAPS: Any = 1
ARITY: Any = 2
ROW_COUNT: Any = 0
FIELDS: Any = 0

MOST_ARRAYS = driver.ROWS + 3 + 2 * driver.MOST_ROW_ARRAYS
RECIPE_SIZE, MOST_NUMBERS = driver.FIRST_CODE + MOST_ARRAYS, 4 + driver.MOST_OPTIONS
NUMBERS_AT = 8 * RECIPE_SIZE  # in the memory of a call: after the recipe
OBJECTS_AT = NUMBERS_AT + 8 * MOST_NUMBERS
MEMORY = OBJECTS_AT + 8 * MOST_ARRAYS + DESCRIPTION * (MOST_ARRAYS + 2)  # bytes


def inside(x, kept, places, extents, settings, options):
    """The divided sum of the rows' values, of contiguous arrays of one dtype.

    Parameters
    ----------
    x : array
        Its dtype is that of all.
    kept : tuple
        Of the arrays: they live as long as this call.
    places : array of int64
        Addresses of three vectors, of their gradients (0 for those that are not wanted), and of row arrays.
    extents : (int, int)
        Rows and coordinates.
    settings : (int, float, float, bool, float)
        The distance's kind, p, eps and swap; the divisor, NaN for the number of rows.
    options : array of float64
        Of the definition.
    """
    kind, p, eps, swap, divisor = settings
    if kind == POWER and p > (2.0**30 if x.itemsize == 4 else 2.0**59):
        kind = LARGEST  # to the last bit the same
    memory = stack(MEMORY)
    r, numbers, objects = at_address(memory, 0), memory + NUMBERS_AT, memory + OBJECTS_AT
    free = objects + 8 * MOST_ARRAYS
    for k in range(RECIPE_SIZE):
        r[k] = 0 if k < driver.FIRST_CODE else -1
    first = 3
    for k in range(len(KINDS)):
        if KINDS[k] == kind:
            first = 3 + 3 * (SWAPS * k + (1 if swap and SWAPS == 2 else 0))
    r[driver.MEASURE], r[driver.CONCLUDE] = function_address(first), function_address(first + 1)
    r[driver.PULL] = function_address(first + 2)
    r[driver.DISTANCES] = 1 if ARITY == 2 else 3 if swap else 2
    r[driver.FIELDS] = FIELDS if FIELDS else r[driver.DISTANCES] * tiles.FIELDS
    r[driver.ROW_COUNT], r[driver.ITEM], r[driver.SHARES] = ROW_COUNT, x.itemsize, 1
    r[driver.DIVIDE] = driver.BY_ROWS if divisor != divisor else driver.BY_NUMBER
    r[driver.LAY] = function_address(2)
    first_numbers = divisor, 1.0, p, eps
    for k in range(len(first_numbers)):
        store(numbers + 8 * k, first_numbers[k])
    for k in range(options.size):
        store(numbers + 32 + 8 * k, options[k])
    for k in range(driver.CURVED + ROW_COUNT):
        place = places[k]
        slot = k if k < driver.CURVED else k + 1
        if place:
            r[driver.FIRST_CODE + slot] = FLOAT32 if x.itemsize == 4 else FLOAT64
            if k < driver.CURVED:
                store(objects + 8 * slot, describe(free, place, extents, x.itemsize))
            else:
                store(objects + 8 * slot, describe(free, place, extents[:1], x.itemsize))
        free += DESCRIPTION
    recipe = describe(free, memory, (RECIPE_SIZE,), 8)
    of_numbers = describe(free + DESCRIPTION, numbers, (4 + options.size,), 8)
    value, _ = run_drive(function_address(0), recipe, of_numbers, tuple_at(objects), function_address(1))
    return value


def compile_functions(
    f: VectorFunctions, request: VectorRequest, kinds: tuple[int, ...], dtype: np.dtype
) -> tuple[int, ...]:
    """Return the addresses of the driver, its task, `lay`, and three blocks for each distance and swap."""
    blocks = [
        block
        for kind in kinds
        for swap in swaps_of(f)
        for block in driver.select_blocks(f, request, kind, swap, dtype)
    ]
    return compile_drive(driver.rows_of_vectors), driver.task_address(), lay_address(), *blocks


def swaps_of(f: VectorFunctions) -> tuple[bool, ...]:
    return (False, True) if f.terms is None and f.arity == 3 else (False,)


@cache
def compile_rows(f: VectorFunctions, wrt: tuple[int, ...], kinds: tuple[int, ...], dtype: np.dtype) -> Any:
    """Return `inside` of a definition, whose distance is of one of these kinds (or it has terms).

    `wrt` are the vectors whose gradients are written.
    """
    request = VectorRequest(wrt, integers=(False,) * len(f.row_arrays))
    scope = dict(
        function_address=addresses(compile_functions, f, request, kinds, dtype),
        KINDS=kinds,
        SWAPS=len(swaps_of(f)),
        ARITY=f.arity,
        ROW_COUNT=len(f.row_arrays),
        FIELDS=0 if f.terms is None else definitions.fields(f),
    )
    name, identity = (
        f"{f.name}_{dtype.name}",
        (definitions.identity_of(f, dtype.name), kinds, request, "inside"),
    )
    return bind(inside, scope, name, identity, kept(nogil=True, error_model="numpy"))


# ---- arguments ----------------------------------------------------------------------------------------
def same_vectors(x, y):
    """Whether two arrays of vectors have one shape."""


@overload(same_vectors)
def same_vectors_of(x, y):
    for a in (x, y):
        if not is_float(a) or not a.ndim or a.dtype != x.dtype:
            raise TypingError(f"vectors must be arrays of one dtype, float32 or float64, got {x} and {y}")
    return lambda x, y: same_shape(x, y)


def one_a_vector(target, x):
    """Whether there is a number for each vector."""


@overload(one_a_vector)
def one_a_vector_of(target, x):
    if not isinstance(getattr(target, "dtype", target), types.Number):
        raise TypingError(f"target must hold numbers, got {target}")
    if getattr(target, "ndim", 0) != x.ndim - 1:
        return lambda target, x: False
    if x.ndim == 1:
        return lambda target, x: True
    return lambda target, x: target.shape == x.shape[:-1]


def metric_of(named: tuple[tuple[str, Distance], ...]) -> Any:
    """Return a function to call in compiled code: kind and eps of a distance by its name."""

    def metric(distance):
        pass

    @overload(metric)
    def metric_of_name(distance):
        if isinstance(distance, types.NoneType):
            kind, eps = named[0][1].kind, named[0][1].eps
            return lambda distance: (kind, eps)
        if not isinstance(distance, types.UnicodeType | types.StringLiteral):
            raise TypingError(
                f"distance_function must be None or a name in compiled code, not a function; got {distance}"
            )
        return lambda distance: search(distance)

    def step(before, name, kind, eps):
        @njit(**PART)
        def found(distance):
            return (kind, eps) if distance == name else before(distance)

        return found

    search = njit(**PART)(lambda distance: (-1, 0.0))
    for name, d in named:
        search = step(search, name, d.kind, d.eps)
    return metric


def distance_by(options: dict[str, int], fixed: Distance, named: Any) -> tuple[Any, tuple[int, ...]]:
    """Return a function of a call's arguments that gives kind, p, eps and swap, and the kinds it may give.

    Parameters
    ----------
    options : dict
        Positions of the options.
    fixed : Distance
        That of the defaults.
    named : tuple of pairs
        Names and their distances; empty where the distance goes by `p`.
    """
    swap_at = options.get("swap", -1)
    kind, eps = fixed.kind, fixed.eps
    if named:
        at, metric = options["distance_function"], metric_of(named)

        @njit(**PART)
        def by_name(arguments):
            kind, eps = metric(arguments[at])
            return kind, 2.0, eps, bool(arguments[swap_at])

        return by_name, tuple(dict.fromkeys(d.kind for _, d in named))
    if "p" in options:
        p_at, eps_at = options["p"], options["eps"]

        @njit(**PART)
        def by_norm(arguments):
            kind, p = norm_of(arguments[p_at])
            return kind, p, float(arguments[eps_at]), bool(arguments[swap_at])

        return by_norm, (POWER, SUM, ROOT_OF_SQUARES, LARGEST)
    return njit(**PART)(lambda arguments: (kind, 2.0, eps, False)), (kind,)


def norm_of(p):
    """The kind of a norm's distance, and its p."""


@overload(norm_of)
def norm_of_number(p):
    if isinstance(p, types.NoneType):
        return lambda p: (ROOT_OF_SQUARES, 2.0)

    def impl(p):
        kind = POWER
        if p == 1:
            kind = SUM
        elif p == 2:
            kind = ROOT_OF_SQUARES
        elif p == np.inf:
            kind = LARGEST
        return kind, float(p)

    return impl


# Functions of a call's arguments, made of one for each.


def every(test: Callable[..., Any], positions: list[int], like: int = 0) -> Any:
    """Return whether a test holds for some arguments beside the one at `like`."""

    def step(before, k):
        @njit(**PART)
        def both(arguments):
            return before(arguments) and test(arguments[k], arguments[like])

        return both

    found = njit(**PART)(lambda arguments: True)
    for k in positions:
        found = step(found, k)
    return found


def flats(positions: list[int]) -> Any:
    """Return a function that gives some arguments as flat arrays of the first one's dtype."""

    def step(before, k):
        @njit(**PART)
        def more(arguments):
            # A tuple of one array is added: the others are of the same type.
            # Numba joins tuples, but unpacks none whose types differ.
            return before(arguments) + (flat(arguments[k], arguments[0].dtype.type),)  # noqa: RUF005

        return more

    found = njit(**PART)(lambda arguments: ())
    for k in positions:
        found = step(found, k)
    return found


def gradients(count: int) -> Any:
    """Return a function that gives the outputs' flat memory; empty for None."""

    def step(before, k):
        @njit(**PART)
        def more(outs, like):
            # Numba joins tuples, but unpacks none whose types differ.
            return before(outs, like) + (gradient(outs[k], like),)  # noqa: RUF005

        return more

    found = njit(**PART)(lambda outs, like: ())
    for k in range(count):
        found = step(found, k)
    return found


def fit(count: int) -> Any:
    """Return whether all outputs have the vectors' shape."""

    def step(before, k):
        @njit(**PART)
        def both(outs, like):
            return before(outs, like) and same_shape(outs[k], like)

        return both

    found = njit(**PART)(lambda outs, like: True)
    for k in range(count):
        found = step(found, k)
    return found


def numbers(positions: list[int]) -> Any:
    """Return a function that gives some arguments as an array of float64."""

    def step(before, k, position):
        @njit(**PART)
        def more(arguments):
            found = before(arguments)
            found[k] = 1.0 * arguments[position]  # of a bool, too
            return found

        return more

    count = len(positions)
    found = njit(**PART)(lambda arguments: np.empty(count))
    for k, position in enumerate(positions):
        found = step(found, k, position)
    return found


def check_domains(name: str, domains: dict[str, Any], positions: dict[str, int]) -> Any:
    """Return a function that raises where an option is out of its domain."""
    check = nothing
    for n, domain in domains.items():
        check = in_turn(check, compile_check(n, positions[n], domain, f"{name}: {n} must be {domain}"))
    return check


@njit(**PART)
def fill(addresses, arrays, start):
    """Store the addresses of some flat arrays; 0 for one that is empty."""
    for k in range(len(arrays)):
        if arrays[k].size:
            addresses[start + k] = arrays[k].ctypes.data


@njit(**PART)
def all_apart(gradients, arrays):
    """Whether no gradient shares memory with one of the arrays."""
    for j in range(len(gradients)):
        for k in range(len(arrays)):
            if not apart(gradients[j], arrays[k]):
                return False
    return True


@njit(**PART)
def nothing_to_fill(addresses, arrays, start):
    """`fill` of no arrays."""


@njit(**PART)
def nothing_to_part(gradients, arrays):
    """`all_apart` of no arrays."""
    return True


def compile_whole(
    f: VectorFunctions,
    vectors: tuple[str, ...],
    names: tuple[str, ...],
    defaults: tuple[Any, ...],
    domains: dict[str, Any],
    distance: Distance | None,
    named: tuple[tuple[str, Distance], ...] = (),
    axes: int | None = None,
) -> Any:
    """Return the loss over arrays, as a function to call in ``@njit`` code.

    Parameters
    ----------
    f : VectorFunctions
        Its options are all numbers.
    vectors, names : tuples of str
        The vectors; all parameters, the vectors and the row arrays first, `out` last.
    defaults : tuple
        Of the last parameters.
    domains : dict
        Intervals of the options that have one.
    distance : Distance or None
        With the options' defaults; None of a definition by terms.
    named : tuple of pairs
        Distances by the name that an option has.
    axes : int, optional
        The most that vectors may have.
    """
    name, arity, rows = f.name, f.arity, len(f.row_arrays)
    at = {n: k for k, n in enumerate(names)}
    row_at = list(range(arity, arity + rows))
    settings_of, kinds = distance_by(at, distance or Distance(0), named if distance else ())
    chosen_at = at.get("distance_function", at.get("p", -1))  # what goes by which kind is computed
    split, vectors_fit = outputs_for(arity), every(same_vectors, list(range(1, arity)))
    rows_fit, outs_fit = every(one_a_vector, row_at), fit(arity)
    flat_vectors, flat_rows, flat_outs = flats(list(range(arity))), flats(row_at), gradients(arity)
    check_options, options_of = check_domains(name, domains, at), numbers([at[n] for n in f.options])
    shapes = f"{name}: {' and '.join(vectors[1:])} must have {vectors[0]}'s shape"
    bad_size = f"{name}: {vectors[0]} must have {'one or two axes' if axes else 'an axis'}, D at least 1"
    bad_rows = f"{name}: {' and '.join(f.row_arrays)} must have one element for each vector"
    bad_name = f"{name}: distance_function has none of the names it may"
    bad_out = f"{name}: out must have the vectors' shape"
    overlap = f"{name}: out overlaps an argument; it may be the vectors themselves"
    most, length = axes or 64, 6 + rows
    # Of no arrays at all Numba cannot tell the type.
    fill_rows, rows_apart = (fill, all_apart) if rows else (nothing_to_fill, nothing_to_part)
    reduction_at, last = at["reduction"], len(names) - 1

    @intrinsic
    def call(typingctx, arguments, x, others):
        given = chosen_at >= 0 and not isinstance(tuple(arguments)[chosen_at], types.NoneType)
        known = kinds if given or distance is None else (distance.kind,)
        outs = tuple(arguments)[last]
        wanted = () if isinstance(outs, types.NoneType) else tuple(outs)
        wrt = tuple(k for k, out in enumerate(wanted) if not isinstance(out, types.NoneType))
        kernel = compile_rows(f, wrt, known, np.dtype(x.dtype.name))
        result, codegen = link(typingctx, kernel, (x, *others))
        return result(arguments, x, others), codegen

    @njit(**PART)
    def whole(arguments):
        divisor = divisor_of(arguments[reduction_at])
        outs = split(arguments[last])
        if not vectors_fit(arguments):
            raise ValueError(shapes)
        x = arguments[0]
        size = x.shape[x.ndim - 1]
        if size == 0 or x.ndim > most:
            raise ValueError(bad_size)
        if not rows_fit(arguments):
            raise ValueError(bad_rows)
        check_options(arguments)
        kind, p, eps, swap = settings_of(arguments)
        if kind < 0:
            raise ValueError(bad_name)
        if not outs_fit(outs, x):
            raise ValueError(bad_out)
        T = x.dtype.type
        if x.size == 0:
            return T(0 * divisor)
        xs, numbers_of_rows, gs = flat_vectors(arguments), flat_rows(arguments), flat_outs(outs, x)
        if not (may_write(gs, xs) and rows_apart(gs, numbers_of_rows)):
            raise ValueError(overlap)
        addresses = np.zeros(length, np.int64)
        fill(addresses, xs, 0)
        fill(addresses, gs, 3)
        fill_rows(addresses, numbers_of_rows, 6)
        kept = xs + gs + numbers_of_rows
        extents = x.size // size, size
        settings = np.int64(kind), float(p), float(eps), bool(swap), divisor
        return T(call(arguments, xs[0], (kept, addresses, extents, settings, options_of(arguments))))

    defaults = with_unset(names, defaults, {"p": 2})
    return njit(nogil=True)(gathered(whole, names, defaults, name))
