"""One element of each row of class scores: the negative log-likelihood, of log-probabilities that are given.

- `pick` gives the terms: a thread takes a row, and reads one element of it.
- `put` writes the gradient, which does not depend on the scores: zeros, and one element a row. Threads are
  dealt to rows as `rows.plan` says; none reads what another writes. `put_columns` is for strided classes.
"""

from typing import Any, NamedTuple

import numpy as np

from ..bind import bind
from . import rows
from .reduce import THREADS, Launch, add, partial_sum, quotient
from .reduce import launch as launch_of_elements
from .rows import COLUMNS, TEAM, look, vector_at
from .target import Binary, compile, cuda, device, each, select, storage, types

# Bound by `pick_kernel` and `put_kernel`; named here for readers and checkers.
array: Any = None
T: Any = np.float32
WIDTH: Any = 4
AHEAD: Any = (0,)
LANES: Any = (0, 1, 2, 3)
TOGETHER: Any = True
at_row_lane: Any = None
at_look_column: Any = None
at_column_lane: Any = None
store_partial: Any = None


class Request(NamedTuple):
    """What one kernel is given."""

    weighted: bool = False  # classes have weights
    sample_weighted: bool = False  # rows have
    upstream: bool = False
    terms: bool = False


def pick(x, labels, weight, sample_weight, terms, n, classes, inner, ignore, partials, faults):
    """The terms of `n` rows, or their partial sums."""
    hi = lo = T(0)
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    while i < n:
        live, v, label, share, own_weight, _ = look(
            labels, weight, sample_weight, None, i, n, classes, ignore, T(1), True, True, faults
        )
        if live:
            outer = i // inner
            v = -(own_weight * share) * array.load(x, (outer * classes + label) * inner + (i - outer * inner))
        array.store(terms, i, v)
        hi, lo = add(hi, lo, v)
        i += cuda.gridDim.x * THREADS
    if partials is not None:
        store_partial(partials, hi, lo)


def row_lane(lane, own, slope, fill):
    return (select(own[lane // WIDTH] == lane % WIDTH, slope, fill),)


def put(
    labels, weight, sample_weight, upstream, g, batch, classes, inner, deal, ignore, factor, divisor, faults
):
    """The gradient, where rows are contiguous."""
    scale = factor if divisor is None else quotient(factor, divisor[0])
    if TOGETHER is not None:
        team, height = 1 << deal, cuda.blockDim.x >> deal
        i, step = cuda.blockIdx.x * height + (cuda.threadIdx.x >> deal), cuda.gridDim.x * height
        lane = cuda.threadIdx.x & (team - 1)
    else:
        parts = max(deal, 1)
        team, step = parts * cuda.blockDim.x, cuda.gridDim.x // parts
        i = cuda.blockIdx.x // parts
        lane = (cuda.blockIdx.x - i * parts) * cuda.blockDim.x + cuda.threadIdx.x
    vectors = classes // WIDTH
    while i < batch:
        live, fill, label, share, own_weight, up = look(
            labels, weight, sample_weight, upstream, i, batch, classes, ignore, scale, True, lane == 0, faults
        )
        slope = -(own_weight * share) * up if live else fill
        v = lane
        while v < vectors:
            at, there, own = each(vector_at, (AHEAD,), (v, team, vectors, i * classes, label, WIDTH))
            array.store_vectors(g, at, there, each(at_row_lane, (LANES,), (own, slope, fill))[0])
            v += team
        i += step


def look_column(lane, i, labels, weight, sample_weight, upstream, n, classes, ignore, scale, reports, faults):
    live, fill, label, share, own_weight, up = look(
        labels, weight, sample_weight, upstream, i + lane, n, classes, ignore, scale, True, reports, faults
    )
    return label, -(own_weight * share) * up if live else fill, fill


def column_lane(label, slope, fill, c):
    return (select(label == c, slope, fill),)


def put_columns(
    labels, weight, sample_weight, upstream, g, batch, classes, inner, deal, ignore, factor, divisor, faults
):
    """The gradient, where classes are strided: a thread writes a vector of rows, or a part of its classes."""
    scale = factor if divisor is None else quotient(factor, divisor[0])
    n, slices = batch * inner, 1 << deal
    across = cuda.blockDim.x >> deal
    part = cuda.threadIdx.x // across
    i = (cuda.blockIdx.x * across + cuda.threadIdx.x - part * across) * WIDTH
    while i < n:
        label, slope, fill = each(
            at_look_column,
            (LANES,),
            (i, labels, weight, sample_weight, upstream, n, classes, ignore, scale, part == 0, faults),
        )
        outer = i // inner
        base = outer * classes * inner + (i - outer * inner)
        c = part
        while c < classes:
            vector = each(at_column_lane, (label, slope, fill), (c,))[0]
            array.store_vectors(g, (base + c * inner,), (True,), vector)
            c += slices
        i += cuda.gridDim.x * across * WIDTH


def pick_launch(n: int) -> Launch:
    """The blocks of `pick` for `n` rows; each stores one partial sum, of two numbers."""
    return launch_of_elements(n, np.float32)


def pick_kernel(code: int) -> Any:
    """`pick` for scores of one storage."""
    array = storage(code)
    scope = dict(array=array, T=array.T, store_partial=device(partial_sum))
    return bind(pick, scope, "nll_loss", code, lambda f: f)


def put_kernel(code: int, variant: str, vectors: bool = True) -> Any:
    """`put`, or `put_columns`, for scores of one storage, in plain Python."""
    array = storage(code, vectors)
    together = variant == TEAM
    identity = (code, together, vectors)
    scope: dict[str, Any] = dict(
        array=array,
        T=array.T,
        WIDTH=array.width,
        LANES=tuple(range(array.width)),
        TOGETHER=True if together else None,
    )
    for name, lane in (
        ("at_row_lane", row_lane),
        ("at_look_column", look_column),
        ("at_column_lane", column_lane),
    ):
        scope[name] = bind(lane, scope, "nll_loss", identity, device)
    return bind(put_columns if variant == COLUMNS else put, scope, "nll_loss", identity, lambda f: f)


def compile_pick(request: Request, code: int, cc: tuple[int, int], summed: bool = True) -> Binary:
    """Compile `pick`.

    Its arguments: scores, class indices, weights of classes and of rows, terms; the numbers of rows, of
    classes and of inner positions, the ignored index; partial sums, faults.
    """
    pointer, numbers = storage(code).pointer, types.CPointer(storage(code).arithmetic)
    arguments = (
        pointer,
        rows.INTEGERS,
        numbers if request.weighted else types.none,
        numbers if request.sample_weighted else types.none,
        pointer if request.terms else types.none,
        *[types.int64] * 4,
        numbers if summed else types.none,
        rows.INTEGERS,
    )
    return compile(pick_kernel(code), arguments, cc, THREADS)


def compile_put(
    request: Request,
    code: int,
    cc: tuple[int, int],
    plan: rows.Plan,
    divided: bool = False,
    vectors: bool = True,
) -> Binary:
    """Compile `put` or `put_columns`, as the plan says.

    Its arguments: class indices, weights of classes and of rows, upstream gradients, the gradient; batch,
    classes, inner positions, the plan's `deal`, the ignored index; the gradient's factor, a pointer to its
    divisor, faults.
    """
    pointer, numbers = storage(code).pointer, types.CPointer(storage(code).arithmetic)
    arguments = (
        rows.INTEGERS,
        numbers if request.weighted else types.none,
        numbers if request.sample_weighted else types.none,
        numbers if request.upstream else types.none,
        pointer,
        *[types.int64] * 5,
        storage(code).arithmetic,
        numbers if divided else types.none,
        rows.INTEGERS,
    )
    return compile(put_kernel(code, plan.variant, vectors), arguments, cc, plan.threads)
