"""One element of each row of class scores: the negative log-likelihood, of log-probabilities that are given.

- `nll_terms`: a thread takes a row, and reads one element of it.
- `nll_gradient` does not depend on the scores: zeros, and one element a row. Threads are dealt to rows as
  `rows.plan` says; none reads what another writes. `gradient_columns` is for strided classes.
"""

from typing import Any, NamedTuple

import numpy as np

from ..layout import Axes, class_rows
from ..spec import INT64, Picks
from . import faults, rows
from .arrays import aligned, flat
from .reduce import THREADS, Launch, add, partial_sum, quotient
from .reduce import launch as launch_of_elements
from .rows import (
    AHEAD,
    COLUMNS,
    LANES,
    TEAM,
    TOGETHER,
    WIDTH,
    T,
    array,
    lanes,
    row_state,
    row_team,
    vector_at,
)
from .target import Binary, as_kernel, compile, cuda, each, select, storage, types


class Request(NamedTuple):
    """What one kernel is given."""

    weighted: bool = False  # classes have weights
    sample_weighted: bool = False  # rows have
    upstream: bool = False
    terms: bool = False


def nll_terms(x, labels, weight, row_weights, terms, n, classes, inner, ignore, partials, faults):
    """The terms of `n` rows, or their partial sums."""
    hi = lo = T(0)
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    while i < n:
        live, v, label, row_weight, own_weight, _ = row_state(
            labels, weight, row_weights, None, i, n, classes, ignore, T(1), True, True, faults
        )
        if live:
            outer = i // inner
            at = (outer * classes + label) * inner + (i - outer * inner)
            v = -(own_weight * row_weight) * array.load(x, at)
        array.store(terms, i, v)
        hi, lo = add(hi, lo, v)
        i += cuda.gridDim.x * THREADS
    if partials is not None:
        partial_sum(partials, hi, lo)


def row_lane(lane, own, slope, fill):
    return (select(own[lane // WIDTH] == lane % WIDTH, slope, fill),)


def nll_gradient(
    labels, weight, row_weights, upstream, g, batch, classes, inner, deal, ignore, factor, divisor, faults
):
    """The gradient, where rows are contiguous."""
    scale = factor if divisor is None else quotient(factor, divisor[0])
    if TOGETHER:
        team, height, of_block, lane = row_team(deal)
        i, step = cuda.blockIdx.x * height + of_block, cuda.gridDim.x * height
    else:
        parts = max(deal, 1)
        team, step = parts * cuda.blockDim.x, cuda.gridDim.x // parts
        i = cuda.blockIdx.x // parts
        lane = (cuda.blockIdx.x - i * parts) * cuda.blockDim.x + cuda.threadIdx.x
    vectors = classes // WIDTH
    while i < batch:
        live, fill, label, row_weight, own_weight, up = row_state(
            labels, weight, row_weights, upstream, i, batch, classes, ignore, scale, True, lane == 0, faults
        )
        slope = -(own_weight * row_weight) * up if live else fill
        v = lane
        while v < vectors:
            at, there, own = each(vector_at, (AHEAD,), (v, team, vectors, i * classes, label, WIDTH))
            array.store_vectors(g, at, there, each(row_lane, (LANES,), (own, slope, fill))[0])
            v += team
        i += step


def column_state(lane, i, labels, weight, row_weights, upstream, n, classes, ignore, scale, reports, faults):
    live, fill, label, row_weight, own_weight, up = row_state(
        labels, weight, row_weights, upstream, i + lane, n, classes, ignore, scale, True, reports, faults
    )
    return label, -(own_weight * row_weight) * up if live else fill, fill


def column_lane(label, slope, fill, c):
    return (select(label == c, slope, fill),)


def gradient_columns(
    labels, weight, row_weights, upstream, g, batch, classes, inner, deal, ignore, factor, divisor, faults
):
    """The gradient, where classes are strided: a thread writes a vector of rows, or a part of its classes."""
    scale = factor if divisor is None else quotient(factor, divisor[0])
    n, slices = batch * inner, 1 << deal
    across = cuda.blockDim.x >> deal
    part = cuda.threadIdx.x // across
    i = (cuda.blockIdx.x * across + cuda.threadIdx.x - part * across) * WIDTH
    while i < n:
        label, slope, fill = each(
            column_state,
            (LANES,),
            (i, labels, weight, row_weights, upstream, n, classes, ignore, scale, part == 0, faults),
        )
        outer = i // inner
        base = outer * classes * inner + (i - outer * inner)
        c = part
        while c < classes:
            vector = each(column_lane, (label, slope, fill), (c,))[0]
            array.store_vectors(g, (base + c * inner,), (True,), vector)
            c += slices
        i += cuda.gridDim.x * across * WIDTH


def terms_launch(n: int) -> Launch:
    """The blocks of `nll_terms` for `n` rows; each stores one partial sum, of two numbers."""
    return launch_of_elements(n, np.float32)


def terms_kernel(code: int) -> Any:
    """`nll_terms` for scores of one storage."""
    array = storage(code)
    return as_kernel(nll_terms, dict(array=array, T=array.T), "picks", code)


def gradient_kernel(code: int, variant: str, vectors: bool = True) -> Any:
    """`nll_gradient`, or `gradient_columns`, for scores of one storage, in plain Python."""
    template = gradient_columns if variant == COLUMNS else nll_gradient
    return as_kernel(template, lanes(code, vectors, 1, variant == TEAM), "picks", (code, vectors))


def compile_terms(request: Request, code: int, cc: tuple[int, int], summed: bool = True) -> Binary:
    """Compile `nll_terms`.

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
    return compile(terms_kernel(code), arguments, cc, THREADS)


def compile_gradient(
    request: Request,
    code: int,
    cc: tuple[int, int],
    plan: rows.Plan,
    divided: bool = False,
    vectors: bool = True,
) -> Binary:
    """Compile `nll_gradient` or `gradient_columns`, as the plan says.

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
    return compile(gradient_kernel(code, plan.variant, vectors), arguments, cc, plan.threads)


# ---- launching ----------------------------------------------------------------------------------------


def run(p: Picks, outputs: dict[str, Any]) -> Any:
    """Write the gradient by ``"input"`` and the curvature, which is zero; return the value."""
    gradient, curvature = outputs.get("input"), outputs.get("curvature")
    arrays = [a for a in (p.input, gradient) if a is not None]
    axes = Axes(arrays)
    these = rows.Rows(p, arrays, class_rows(p.input.shape), axes)
    terms, queue = these.terms(), these.queue
    if curvature is not None:
        zero = queue.number(0, curvature.dtype)
        curvature.assign(zero.broadcast_to(curvature.shape))
    if not these.count:
        return these.finish(None, 1.0, None) if terms is None else terms
    batch, classes, inner = axes.extents
    weight = None if p.weight is None else flat(p.weight, (classes,), p.arithmetic, queue)
    labels, ignore = these.over_rows(p.target, INT64), p.ignore_index
    divisor, by = these.divisors(lambda: rows.count_rows(these, labels, weight, classes, ignore))
    slot = queue.slot(*rows.index_fault(p.name, p.input.shape, axes.order))
    request = Request(
        weighted=weight is not None,
        sample_weighted=these.sample_weight is not None,
        upstream=these.upstream is not None,
        terms=terms is not None,
    )
    grid = terms_launch(these.count)
    partials = None if terms is not None else queue.empty((2 * grid.blocks,), p.arithmetic)
    x = these.as_kernel_input(p.input)
    queue.launch(
        grid,
        compile_terms,
        (
            *(x, labels, weight, these.sample_weight, terms),
            *(these.count, classes, inner, ignore, partials, slot),
        ),
        request=request._replace(upstream=False),
        code=these.code,
        summed=partials is not None,
    )
    if gradient is not None:
        written = these.output_buffer(gradient)
        vectors = rows.whole_vectors(classes, inner, these.storage) and aligned([written])
        plan = rows.plan(batch, classes, inner, these.code, vectors)
        gradients_by = these.gradients_by(by)
        queue.launch(
            (plan.blocks, plan.threads),
            compile_gradient,
            (
                *(labels, weight, these.sample_weight, these.upstream, written),
                *(batch, classes, inner, plan.deal, ignore, these.factor / divisor, gradients_by, slot),
            ),
            request=request._replace(terms=False),
            code=these.code,
            plan=rows.shape_free(plan),
            divided=gradients_by is not None,
            vectors=vectors,
        )
        these.copy_back(gradient, written)
    faults.check_now(queue.device)
    return these.finish(partials, divisor, by) if terms is None else terms
