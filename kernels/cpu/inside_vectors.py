"""Losses of vectors inside the caller's own compiled code, each made of its definition.

``jit(<vectors>, <row arrays>, <options>, reduction='mean', out=None)`` returns the value; `out` is a tuple of
arrays, or of None where a gradient is not wanted. The blocks are those of the library's own calls, linked in
place of being called by address: the bits are the same.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import NumbaError, TypingError
from numba.extending import intrinsic, overload

from ..bind import bind, gathered
from ..errors import at_users_line
from ..spec import LARGEST, POWER, ROOT_OF_SQUARES, SUM, Distance, VectorFunctions, VectorRequest
from . import vector_definitions as definitions
from . import vector_distances as distances
from . import vector_tiles as tiles
from . import vectors as driver
from .inside_rows import (
    ENTRY,
    apart,
    by_dtype,
    divisor_of,
    flat,
    gradient,
    is_float,
    may_write,
    outputs_for,
    same_shape,
)
from .native import HELPER, at_address, release, stack

# Bound by `compile_rows`: how many vectors, row arrays and numbers of a row's state there are; and functions.
ARITY: Any = 2
ROW_COUNT: Any = 0
FIELDS: Any = 0
share: Any = None


@intrinsic
def allocate_zeros(typingctx, size):
    """The address of `size` bytes of zeros."""

    def codegen(context, builder, sig, args):
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word, word])
        return builder.call(
            cgutils.get_or_insert_function(builder.module, kind, "calloc"), [args[0], ir.Constant(word, 1)]
        )

    return types.int64(types.int64), codegen


def rows_of_vectors(x, kept, addresses, extents, settings, options):
    """The divided sum of the rows' values, of contiguous arrays of one dtype.

    Parameters
    ----------
    x : array
        Its dtype is that of all.
    kept : tuple
        Of the arrays: they live as long as this call.
    addresses : array of int64
        Of three vectors, their gradients (0 for those that are not wanted), and the row arrays.
    extents : (int, int)
        Rows and coordinates.
    settings : (int, float, float, bool, float)
        The distance's kind, p, eps and swap; the divisor, NaN for the number of rows.
    options : array of float64
        Of the definition.
    """
    count, size = extents
    kind, p, eps, swap, divisor = settings
    if kind == POWER and p > (2.0**30 if x.itemsize == 4 else 2.0**59):
        kind = LARGEST  # to the last bit the same
    context, recipe, table, numbers = stack(8 * 11), stack(8 * 16), stack(8 * 6 * 18), stack(8 * 32)
    c, r, t, n = at_address(context, 0), at_address(recipe, 0), at_address(table, 0), at_address(numbers, 0.0)
    by = float(count) if divisor != divisor else divisor
    n[tiles.SCALE], n[tiles.P], n[tiles.EPS] = 1 / by, p, eps
    for k in range(options.size):
        n[tiles.OPTIONS + k] = options[k]
    graded = False
    for k in range(driver.GRADIENTS, driver.CURVED):
        graded = graded or addresses[k] != 0
    spare, room = 0, count * size * x.itemsize
    if graded:
        spare = allocate_zeros(ARITY * room)
    for k in range(driver.ROWS + 3 + 2 * ROW_COUNT):
        by_row = k >= driver.ROWS
        place = 0
        if k < driver.CURVED:
            place = addresses[k]
        elif by_row and k < driver.ROWS + ROW_COUNT:
            place = addresses[k - 1]
        if graded and driver.GRADIENTS <= k < driver.GRADIENTS + ARITY and place == 0:
            place = spare + (k - driver.GRADIENTS) * room
        mode = driver.DIRECT if place else driver.ABSENT
        if mode and driver.GRADIENTS <= k < driver.CURVED and place == addresses[k - driver.GRADIENTS]:
            mode = driver.COPIED
        at = k * driver.SLOT
        t[at + driver.MODE], t[at + driver.PLACE] = mode, place
        t[at + driver.WIDTH], t[at + driver.BYTES] = 1 if by_row else size, x.itemsize
    # Addresses of blocks are numbers here by which `choose` knows them.
    r[driver.MEASURE], r[driver.CONCLUDE], r[driver.PULL] = kind + 1, swap, kind + 1 if graded else 0
    r[driver.FIELDS], r[driver.ROW_COUNT], r[driver.ITEM] = FIELDS, ROW_COUNT, x.itemsize
    r[driver.DISTANCES] = 1 if ARITY == 2 else 3 if swap else 2
    height = 1 if size > driver.TILE else min(count, driver.TILE // size)
    cut = (count + height - 1) // height
    sums = allocate_zeros(8 * cut)
    c[driver.RECIPE], c[driver.NUMBERS], c[driver.COUNT], c[driver.SIZE] = recipe, numbers, count, size
    c[driver.HEIGHT], c[driver.TILES], c[driver.WORKERS] = height, cut, 1
    c[driver.SUMS], c[driver.TABLE] = sums, table
    share(context, 0)
    total = 0.0
    for k in range(cut):
        total += at_address(sums, 0.0)[k]
    release(sums)
    if graded:
        release(spare)
    return total / by


def choose(blocks: dict[int, Any]) -> Any:
    """Return a function that calls the block of a number: ``(number, arguments)``."""
    (_, first), *others = blocks.items()

    @njit(**HELPER)
    def only(number, arguments):
        return first(*arguments)

    def more(before, wanted, block):
        @njit(**HELPER)
        def chosen(number, arguments):
            return block(*arguments) if number == wanted else before(number, arguments)

        return chosen

    found = only
    for wanted, block in others:
        found = more(found, wanted, block)
    return found


@cache
def compile_rows(f: VectorFunctions, kinds: tuple[int, ...], dtype: np.dtype) -> Any:
    """Return `rows_of_vectors` of a definition, whose distance is of one of these kinds (or it has terms)."""
    everything = tuple(range(f.arity))
    request = VectorRequest(everything, integers=(False,) * len(f.row_arrays))
    if f.terms is None:
        # The gradients of a swap serve calls without one, too: the third distance's factor is zero there.
        count = driver.count_distances(f, True)
        fields = count * tiles.FIELDS
        measures = {k + 1: distances.measure(k, dtype).linked for k in kinds}
        pulls = {k + 1: distances.pull(k, count, everything, dtype).linked for k in kinds}
    else:
        fields = definitions.fields(f)
        measures = {1: definitions.measure(f, dtype).linked}
        pulls = {1: definitions.pull(f, request, dtype).linked}
    swaps = (False, True) if f.terms is None and f.arity == 3 else (False,)
    concludes = {int(s): definitions.conclusion(f, request, s, dtype).linked for s in swaps}
    name, identity = f"{f.name}_{dtype.name}", (definitions.identity_of(f, dtype.name), kinds, "inside")
    inner = dict(
        allocate=allocate_zeros,
        run_measure=choose(measures),
        run_conclude=choose(concludes),
        run_pull=choose(pulls),
    )
    scope = dict(
        ARITY=f.arity,
        ROW_COUNT=len(f.row_arrays),
        FIELDS=fields,
        share=bind(driver.share_of_tiles, inner, name, identity, njit(**tiles.LINKED)),
    )
    decorate = njit(nogil=True, cache=True, error_model="numpy")
    return bind(rows_of_vectors, scope, name, identity, decorate)


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
        @njit(**ENTRY)
        def found(distance):
            return (kind, eps) if distance == name else before(distance)

        return found

    search = njit(**ENTRY)(lambda distance: (-1, 0.0))
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

        @njit(**ENTRY)
        def by_name(arguments):
            kind, eps = metric(arguments[at])
            return kind, 2.0, eps, bool(arguments[swap_at])

        return by_name, tuple(dict.fromkeys(d.kind for _, d in named))
    if "p" in options:
        p_at, eps_at = options["p"], options["eps"]

        @njit(**ENTRY)
        def by_norm(arguments):
            p = float(arguments[p_at])
            kind = POWER
            if p == 1:
                kind = SUM
            elif p == 2:
                kind = ROOT_OF_SQUARES
            elif p == np.inf:
                kind = LARGEST
            return kind, p, float(arguments[eps_at]), bool(arguments[swap_at])

        return by_norm, (POWER, SUM, ROOT_OF_SQUARES, LARGEST)
    return njit(**ENTRY)(lambda arguments: (kind, 2.0, eps, False)), (kind,)


# Functions of a call's arguments, made of one for each.


def every(test: Callable[..., Any], positions: list[int], like: int = 0) -> Any:
    """Return whether a test holds for some arguments beside the one at `like`."""

    def step(before, k):
        @njit(**ENTRY)
        def both(arguments):
            return before(arguments) and test(arguments[k], arguments[like])

        return both

    found = njit(**ENTRY)(lambda arguments: True)
    for k in positions:
        found = step(found, k)
    return found


def flats(positions: list[int]) -> Any:
    """Return a function that gives some arguments as flat arrays of the first one's dtype."""

    def step(before, k):
        @njit(**ENTRY)
        def more(arguments):
            # A tuple of one array is added: the others are of the same type.
            return before(arguments) + (flat(arguments[k], arguments[0].dtype.type),)  # noqa: RUF005

        return more

    found = njit(**ENTRY)(lambda arguments: ())
    for k in positions:
        found = step(found, k)
    return found


def gradients(count: int) -> Any:
    """Return a function that gives the outputs' flat memory; empty for None."""

    def step(before, k):
        @njit(**ENTRY)
        def more(outs, like):
            return before(outs, like) + (gradient(outs[k], like),)  # noqa: RUF005

        return more

    found = njit(**ENTRY)(lambda outs, like: ())
    for k in range(count):
        found = step(found, k)
    return found


def fit(count: int) -> Any:
    """Return whether all outputs have the vectors' shape."""

    def step(before, k):
        @njit(**ENTRY)
        def both(outs, like):
            return before(outs, like) and same_shape(outs[k], like)

        return both

    found = njit(**ENTRY)(lambda outs, like: True)
    for k in range(count):
        found = step(found, k)
    return found


def numbers(positions: list[int]) -> Any:
    """Return a function that gives some arguments as an array of float64."""

    def step(before, k, position):
        @njit(**ENTRY)
        def more(arguments):
            found = before(arguments)
            found[k] = 1.0 * arguments[position]  # of a bool, too
            return found

        return more

    count = len(positions)
    found = njit(**ENTRY)(lambda arguments: np.empty(count))
    for k, position in enumerate(positions):
        found = step(found, k, position)
    return found


def check_domains(name: str, domains: dict[str, Any], positions: dict[str, int]) -> Any:
    """Return a function that raises where an option is out of its domain, an interval."""

    def step(before, k, domain, message):
        low, high, open_low, open_high = domain.low, domain.high, domain.open_low, domain.open_high

        @njit(**ENTRY)
        def both(arguments):
            before(arguments)
            x = float(arguments[k])
            above = x > low if open_low else x >= low
            if not (above and (x < high if open_high else x <= high)):
                raise ValueError(message)

        return both

    found = njit(**ENTRY)(lambda arguments: None)
    for n, domain in domains.items():
        found = step(found, positions[n], domain, f"{name}: {n} must be {domain}")
    return found


@njit(**ENTRY)
def fill(addresses, arrays, start):
    """Store the addresses of some flat arrays; 0 for one that is empty."""
    for k in range(len(arrays)):
        if arrays[k].size:
            addresses[start + k] = arrays[k].ctypes.data


@njit(**ENTRY)
def all_apart(gradients, arrays):
    """Whether no gradient shares memory with one of the arrays."""
    for j in range(len(gradients)):
        for k in range(len(arrays)):
            if not apart(gradients[j], arrays[k]):
                return False
    return True


@njit(**ENTRY)
def nothing_to_fill(addresses, arrays, start):
    """`fill` of no arrays."""


@njit(**ENTRY)
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
    call = by_dtype(lambda dtype: compiled(dtype))
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

    functions = tuple(g for g in (f.terms, f.finish) if g is not None)

    def compiled(dtype):
        try:
            return compile_rows(f, kinds, dtype)
        except NumbaError as error:
            raise at_users_line(name, functions, error, "finish") from error

    @njit(**ENTRY)
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
        return T(call(xs[0], (kept, addresses, extents, settings, options_of(arguments))))

    return njit(nogil=True)(gathered(whole, names, defaults, name))
