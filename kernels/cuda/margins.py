"""Margin losses of class scores, contiguous rows of (rows, classes): terms, and gradients by the scores.

- `one_label`: each row's class against all its others, ``max(0, margin - x_y + x_c) ** p``.
- `soft_labels`: the binary cross entropy of a row's logits, averaged.
- `many_labels`: each of a row's classes against all that are not.

The first two deal threads to rows as `rows.plan` says, and read a row once: a part of a warp has a row, or a
block. `many_labels` has a block for a row and goes over the row once for each of its classes, twice: a warp
sums the hinges of a class; then a thread those of its scores.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ..layout import InOrder, index_at
from ..math import sigmoid, softplus
from ..spec import INT64, MANY, ONE, SOFT, Margins, bad_index
from . import faults, rows
from .arrays import aligned, flat
from .reduce import MOST_BLOCKS, THREADS, add, block_sum, quotient, whole
from .rows import (
    AHEAD,
    LANES,
    REPEAT,
    STREAM,
    TEAM,
    TOGETHER,
    WIDTH,
    Plan,
    T,
    array,
    fill_row,
    filled,
    lanes,
    load_weights,
    numbers,
    row_state,
    row_team,
    store_partial,
    team_sum,
    vector_at,
)
from .target import (
    EVERY_LANE,
    FAULT_MOST,
    WARP,
    Binary,
    as_kernel,
    compile,
    cuda,
    device,
    each,
    record,
    select,
    shared,
    storage,
    tree_sum,
    types,
)

# What else these kernels are bound to, by `kernel`.
NUMBERS: Any = 4  # elements of a vector of the arithmetic type
NUMBER_LANES: Any = (0, 1, 2, 3, 4, 5, 6, 7)
SQUARED: Any = True  # the hinges are

SCRATCH = 3  # numbers for each class, of a block of `many_labels`
MOST_SCRATCH = 2**26  # bytes of all blocks, if there are more than one


class Request(NamedTuple):
    """What one kernel computes."""

    loss: str  # a key of KERNELS
    squared: bool = False  # the hinges, with one label
    weighted: bool = False  # classes have weights; with soft labels elements may
    sample_weighted: bool = False
    upstream: bool = False
    terms: bool = False
    grad: bool = False
    target_grad: bool = False  # with soft labels
    curvature: bool = False  # with squared hinges, or soft labels


# ---- what the kernels share --------------------------------------------------------------------------------


@device
def block_total(x):
    """The sum over a block, in each of its threads."""
    hi, lo = block_sum(x, type(x)(0))
    return whole(hi, lo)


def row_total(x, team):
    """The sum over the threads that share a row, in each of them."""
    return team_sum(x, team) if TOGETHER else block_total(x)


def wait():
    """Wait for the threads that share a row."""
    if TOGETHER:
        cuda.syncwarp()
    else:
        cuda.syncthreads()


# ---- one class a row ----------------------------------------------------------------------------------


def hinge(x, lane, there, own, shift, f):
    """A score's hinge, slope, curvature, and the latter two times `f`."""
    zero, one = T(0), T(1)
    z = select(there[lane // WIDTH] & (own[lane // WIDTH] != lane % WIDTH), x + shift, zero)
    v = select(z <= zero, zero, z)  # a NaN stays, in the slope too
    d = select(z > zero, one, v)
    c = zero
    if SQUARED:
        c = select(z > zero, T(2), v)
        d = v + v
        v = v * v
    return v, d, c, f * d, f * c


def one_label(
    x, labels, weight, row_weights, upstream, terms, g, h, batch, classes, deal, margin, factor, divisor,
    partials, faults,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    hi = lo = T(0)
    team, height, of_block, lane = row_team(deal)
    vectors = classes // WIDTH
    first = cuda.blockIdx.x * height
    while first < batch:
        i = first + of_block
        live, fill, label, row_weight, own_weight, up = row_state(
            labels, weight, row_weights, upstream, i, batch, classes, None, scale, True, lane == 0, faults
        )
        base = i * classes
        loss = slope = curve = f = shift = T(0)
        if live:
            row_weight = own_weight * row_weight / T(classes)
            f = up * row_weight
            shift = margin - array.load(x, base + label)
        wait()  # until all have read their own class's score, which the gradient may overwrite
        v = lane if live else vectors
        while v < vectors:
            at, there, own = each(vector_at, (AHEAD,), (v, team, vectors, base, label, WIDTH))
            losses, slopes, curves, gs, hs = each(
                hinge, (array.load_vectors(x, at), LANES), (there, own, shift, f)
            )
            loss += tree_sum(losses)
            slope += tree_sum(slopes)
            curve += tree_sum(curves)
            array.store_vectors(g, at, there, gs)
            array.store_vectors(h, at, there, hs)
            v += REPEAT * team
        loss = row_total(loss, team)
        if g is not None:
            slope = row_total(slope, team)
        if h is not None:
            curve = row_total(curve, team)
        if live and label // WIDTH & (team - 1) == lane:  # who wrote the vector that it lies in
            array.store(g, base + label, -f * slope)
            array.store(h, base + label, f * curve)
        elif i < batch and not live:
            fill_row((g, h, None), base, lane, team, vectors, fill)
        if i < batch and lane == 0:
            fill = row_weight * loss if live else fill
            array.store(terms, i, fill)
            hi, lo = add(hi, lo, fill)
        first += cuda.gridDim.x * height
    if partials is not None:
        store_partial(partials, hi, lo)


# ---- the cross entropy of each class ------------------------------------------------------------------


def cross(x, t, w, lane, there, f):
    """A logit's term, and its gradients and curvature times `f`."""
    zero, one = T(0), T(1)
    keep = there[lane // WIDTH]
    if w is None:
        w = one
    else:
        keep = keep & (w != zero)
    f = f * w
    v = w * (t * softplus(-x) + (one - t) * softplus(x))
    p, q = sigmoid(x), sigmoid(-x)
    d = f * ((one - t) * p - t * q)
    return (
        select(keep, v, zero),
        select(keep, d, zero),
        select(keep, -f * x, zero),
        select(keep, f * p * q, zero),
    )


def soft_labels(
    x, t, weight, row_weights, upstream, terms, g, gt, h, batch, classes, pitch, deal, factor, divisor,
    partials,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    hi = lo = T(0)
    team, height, of_block, lane = row_team(deal)
    vectors = classes // WIDTH
    first = cuda.blockIdx.x * height
    while first < batch:
        i = first + of_block
        live, fill, _, row_weight, _, up = row_state(
            None, None, row_weights, upstream, i, batch, classes, None, scale, False, False, None
        )
        base = i * classes
        row_weight = row_weight / T(classes)
        loss = T(0)
        v = lane if live else vectors
        while v < vectors:
            at, there, _ = each(vector_at, (AHEAD,), (v, team, vectors, base, -1, WIDTH))
            xs, ts = array.load_vectors(x, at), array.load_vectors(t, at)
            ws = load_weights(weight, v, team, vectors, i * pitch)
            losses, ds, dts, hs = each(cross, (xs, ts, ws, LANES), (there, up * row_weight))
            loss += tree_sum(losses)
            array.store_vectors(g, at, there, ds)
            array.store_vectors(gt, at, there, dts)
            array.store_vectors(h, at, there, hs)
            v += REPEAT * team
        loss = row_total(loss, team)
        if i < batch and not live:
            fill_row((g, gt, h), base, lane, team, vectors, fill)
        if i < batch and lane == 0:
            fill = row_weight * loss if live else fill
            array.store(terms, i, fill)
            hi, lo = add(hi, lo, fill)
        first += cuda.gridDim.x * height
    if partials is not None:
        store_partial(partials, hi, lo)


# ---- several classes a row ----------------------------------------------------------------------------


@device
def block_least(n):
    """The least of a block's integers, in each of its threads; a barrier must stand between two calls."""
    least = shared(32, np.int64(0))
    for step in (16, 8, 4, 2, 1):
        n = min(n, cuda.shfl_xor_sync(EVERY_LANE, n, step))
    if cuda.threadIdx.x & 31 == 0:
        least[cuda.threadIdx.x >> 5] = n
    cuda.syncthreads()
    for warp in range(cuda.blockDim.x >> 5):
        n = min(n, least[warp])
    return n


def pair(x, there, shift):
    """The hinge of a score against a class, and its slope; -inf is a score that does not count."""
    zero, one = T(0), T(1)
    z = select(there, select(x == T(-np.inf), x, x + shift), zero)
    v = select(z <= zero, zero, z)  # a NaN stays, in the slope too
    return v, select(z > zero, one, v)


def pair_lane(x, lane, there, shift):
    return pair(x, there[lane // NUMBERS], shift)


def slope_lane(x, d, lane, own, shift, slope):
    """The slope of a score, after one class more."""
    d += pair(x, True, shift)[1]
    return (select(own[lane // WIDTH] == lane % WIDTH, d - slope, d),)


def scaled(x, f):
    return (x * f,)


def many_labels(
    x, labels, row_weights, upstream, terms, g, batch, classes, factor, divisor, partials, faults, scratch
):
    scale = factor if divisor is None else quotient(factor, divisor[0])
    hi = lo = T(0)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    # Of the row at hand: the scores of what are not its classes, then those of its classes, and their slopes.
    others = cuda.blockIdx.x * SCRATCH * classes
    mine, slopes = others + classes, others + 2 * classes
    vectors = classes // WIDTH
    i = cuda.blockIdx.x
    while i < batch:
        live, fill, _, row_weight, _, up = row_state(
            None, None, row_weights, upstream, i, batch, classes, None, scale, False, False, None
        )
        base = i * classes
        count, wrong = classes, 0
        k = thread
        while k < classes:
            label = labels[base + k]
            if label < -1 or label >= classes:
                wrong = 1
                record(faults, base + k, label)
            elif label == -1:
                count = min(count, k)
            k += threads
        count = block_least(count)
        if cuda.syncthreads_or(wrong) != 0:  # which has all read what they need of the row before
            live, fill = False, T(np.nan)
        row_weight = row_weight / T(classes)
        f = up * row_weight
        loss = T(0)
        if live:
            k = thread
            while k < classes:
                scratch[others + k] = array.load(x, base + k)
                k += threads
            cuda.syncthreads()
            k = thread
            while k < count:
                label = labels[base + k]
                scratch[mine + k] = array.load(x, base + label)
                scratch[others + label] = T(-np.inf)
                k += threads
            cuda.syncthreads()
            k = thread >> 5
            while k < count:
                shift = T(1) - scratch[mine + k]
                slope = T(0)
                v = thread & 31
                while v < classes // NUMBERS:
                    at, there, _ = each(
                        vector_at, (AHEAD,), (v, WARP, classes // NUMBERS, others, -1, NUMBERS)
                    )
                    losses, ds = each(
                        pair_lane, (numbers.load_vectors(scratch, at), NUMBER_LANES), (there, shift)
                    )
                    loss += tree_sum(losses)
                    slope += tree_sum(ds)
                    v += REPEAT * WARP
                slope = team_sum(slope, WARP)
                if thread & 31 == 0:
                    scratch[slopes + k] = slope
                k += threads >> 5
            loss = block_total(loss)
            v = thread if g is not None else vectors
            while v < vectors:
                at, there, _ = each(vector_at, (AHEAD,), (v, threads, vectors, base, -1, WIDTH))
                xs = load_weights(scratch, v, threads, vectors, others)
                ds = each(filled, (LANES,), (T(0),))[0]
                k = 0
                while k < count:
                    own = each(vector_at, (AHEAD,), (v, threads, vectors, base, labels[base + k], WIDTH))[2]
                    shift, slope = T(1) - scratch[mine + k], scratch[slopes + k]
                    ds = each(slope_lane, (xs, ds, LANES), (own, shift, slope))[0]
                    k += 1
                array.store_vectors(g, at, there, each(scaled, (ds,), (f,))[0])
                v += REPEAT * threads
        else:
            fill_row((g, None, None), base, thread, threads, vectors, fill)
        if thread == 0:
            fill = row_weight * loss if live else fill
            array.store(terms, i, fill)
            hi, lo = add(hi, lo, fill)
        i += cuda.gridDim.x
    if partials is not None:
        store_partial(partials, hi, lo)


# ---- launching ----------------------------------------------------------------------------------------

KERNELS = {ONE: one_label, SOFT: soft_labels, MANY: many_labels}


def plan(loss: str, batch: int, classes: int, code: int, vectors: bool) -> Plan:
    """The variant and the launch, from the shape alone.

    `many_labels` needs scratch of ``SCRATCH * classes`` numbers of the arithmetic type for each block.
    """
    if loss != MANY:
        return rows.plan(batch, classes, 1, code, vectors, split=False)
    room = MOST_SCRATCH // (SCRATCH * classes * np.dtype(storage(code).T).itemsize)
    blocks = max(1, min(batch, MOST_BLOCKS, room))
    threads = max(WARP, min(THREADS, 1 << (classes - 1).bit_length()))
    return Plan(STREAM, blocks, threads, 0, blocks)


def kernel(request: Request, code: int, variant: str, vectors: bool = True) -> Any:
    """The kernel, in plain Python."""
    width, repeat = rows.weights(code, vectors).width, rows.repeat(code, vectors, variant)
    scope = dict(
        lanes(code, vectors, repeat, variant == TEAM),
        NUMBERS=width,
        NUMBER_LANES=tuple(range(repeat * width)),
        SQUARED=request.squared,
    )
    return as_kernel(KERNELS[request.loss], scope, request.loss, (tuple(request), code, vectors))


def signature(request: Request, code: int, summed: bool, divided: bool) -> tuple[Any, ...]:
    """The types of the kernel's arguments; ``none`` is passed as a null pointer.

    Scores, class indices or soft labels, weights of classes (not with `many_labels`) and of rows, upstream
    gradients, terms, the gradient, with soft labels that by them, the curvature (not with `many_labels`); the
    numbers of rows and of classes; with soft labels, by how much weights are apart from row to row (0 if they
    are of classes); the plan's `deal` (not with `many_labels`); with one label, the margin; the gradient's
    factor and a pointer to its divisor; partial sums; with class indices faults; with `many_labels` scratch.
    """
    arithmetic, pointer = storage(code).arithmetic, storage(code).pointer
    numbers = types.CPointer(arithmetic)

    def given(present: Any, kind: Any = pointer) -> Any:
        return kind if present else types.none

    r = request
    soft, many = r.loss == SOFT, r.loss == MANY
    return (
        pointer,
        pointer if soft else rows.INTEGERS,
        *([] if many else [given(r.weighted, numbers)]),
        given(r.sample_weighted, numbers),
        given(r.upstream, numbers),
        given(r.terms),
        given(r.grad),
        *([given(r.target_grad)] if soft else []),
        *([] if many else [given(r.curvature)]),
        *[types.int64] * (2 if many else 4 if soft else 3),
        *([arithmetic] if r.loss == ONE else []),
        arithmetic,
        given(divided, numbers),
        given(summed, numbers),
        *([] if soft else [rows.INTEGERS]),
        *([numbers] if many else []),
    )


def compile_kernel(
    request: Request,
    code: int,
    cc: tuple[int, int],
    plan: Plan,
    summed: bool = True,
    divided: bool = False,
    vectors: bool = True,
) -> Binary:
    """Compile a loss's kernel for one request, storage, plan and compute capability."""
    arguments = signature(request, code, summed, divided)
    return compile(kernel(request, code, plan.variant, vectors), arguments, cc, plan.threads)


# ---- launching ----------------------------------------------------------------------------------------


def run(p: Margins, outputs: dict[str, Any]) -> Any:
    """Write the gradients by ``"input"`` and ``"target"`` and the curvature; return the value."""
    return _run_soft(p, outputs) if p.kind == SOFT else _run_hinges(p, outputs)


def _run_hinges(p: Margins, outputs: dict[str, Any]) -> Any:
    many = p.kind == MANY
    scores, *outs = (_in_batch(a) for a in (p.input, outputs.get("input"), outputs.get("curvature")))
    arrays = [a for a in (scores, *outs) if a is not None]
    of_terms = p.input.shape[:-1] if many else p.target.shape
    these = rows.Rows(p, arrays, of_terms, InOrder(2, len(of_terms)))
    terms, queue = these.terms(), these.queue
    if not these.count:
        return these.finish(None, 1.0, None) if terms is None else terms
    classes = scores.shape[-1]
    weight = None if p.weight is None else flat(p.weight, (classes,), p.arithmetic, queue)
    labels = flat(p.target, p.target.shape, INT64, queue)
    divisor, by = these.divisors()
    gradients_by = these.gradients_by(by) if outputs else None
    x, written = these.as_kernel_input(scores), [these.output_buffer(a) for a in outs]
    vectors = rows.whole_vectors(classes, 1, these.storage) and aligned([x, weight, *written])
    launch = plan(p.kind, these.count, classes, these.code, vectors)
    request = Request(
        p.kind,
        squared=p.p == 2,
        weighted=weight is not None,
        sample_weighted=these.sample_weight is not None,
        upstream=these.upstream is not None,
        terms=terms is not None,
        grad=outs[0] is not None,
        curvature=outs[1] is not None,
    )
    partials = None if terms is not None else queue.empty((2 * launch.partials,), p.arithmetic)
    slot = queue.slot(*_fault(p.name, p.target.shape, classes))
    given = these.sample_weight, these.upstream, terms, written[0]
    ends = these.factor / divisor, gradients_by, partials, slot
    arguments: tuple[Any, ...]
    if many:
        scratch = queue.empty((SCRATCH * classes * launch.blocks,), p.arithmetic)
        arguments = x, labels, *given, these.count, classes, *ends, scratch
    else:
        numbers = these.count, classes, launch.deal, p.margin
        arguments = x, labels, weight, *given, written[1], *numbers, *ends
    queue.launch(
        (launch.blocks, launch.threads),
        compile_kernel,
        arguments,
        request=request,
        code=these.code,
        plan=rows.shape_free(launch),
        summed=partials is not None,
        divided=gradients_by is not None,
        vectors=vectors,
    )
    for output, w in zip(outs, written, strict=True):
        these.copy_back(output, w)
    faults.check_now(queue.device)
    return these.finish(partials, divisor, by) if terms is None else terms


def _run_soft(p: Margins, outputs: dict[str, Any]) -> Any:
    shape = p.input.shape
    outs = [outputs.get(n) for n in ("input", "target", "curvature")]
    arrays = [a for a in (p.input, p.target, *outs) if a is not None]
    these = rows.Rows(p, arrays, shape[:-1], InOrder(len(shape)))
    terms, queue = these.terms(), these.queue
    if not these.count:
        return these.finish(None, 1.0, None) if terms is None else terms
    classes, weight, pitch = shape[-1], None, 0
    if p.weight is not None:
        before = p.weight.shape[:-1]
        pitch = 0 if math.prod(before) == 1 else classes
        expanded = shape if pitch else (*before, classes)
        weight = flat(p.weight, expanded, p.arithmetic, queue)
    divisor, by = these.divisors()
    gradients_by = these.gradients_by(by) if outputs else None
    x, t = these.as_kernel_input(p.input), these.as_kernel_input(p.target)
    written = [these.output_buffer(a) for a in outs]
    vectors = rows.whole_vectors(classes, 1, these.storage) and aligned([x, t, weight, *written])
    launch = plan(SOFT, these.count, classes, these.code, vectors)
    request = Request(
        SOFT,
        weighted=weight is not None,
        sample_weighted=these.sample_weight is not None,
        upstream=these.upstream is not None,
        terms=terms is not None,
        grad=outs[0] is not None,
        target_grad=outs[1] is not None,
        curvature=outs[2] is not None,
    )
    partials = None if terms is not None else queue.empty((2 * launch.partials,), p.arithmetic)
    queue.launch(
        (launch.blocks, launch.threads),
        compile_kernel,
        (
            *(x, t, weight, these.sample_weight, these.upstream, terms, *written),
            *(these.count, classes, pitch, launch.deal, these.factor / divisor, gradients_by, partials),
        ),
        request=request,
        code=these.code,
        plan=rows.shape_free(launch),
        summed=partials is not None,
        divided=gradients_by is not None,
        vectors=vectors,
    )
    for output, w in zip(outs, written, strict=True):
        these.copy_back(output, w)
    return these.finish(partials, divisor, by) if terms is None else terms


def _in_batch(array: Any) -> Any:
    """Return scores of shape (), (C) or (N, C), or None, as (N, C)."""
    return array if array is None or array.ndim == 2 else array[(np.newaxis,) * (2 - array.ndim)]


def _fault(name: str, shape: tuple[int, ...], classes: int) -> tuple[Any, Any]:
    """Return a kind of call, and the error for a class index, whose position is in a target of a shape."""

    def error(position: int, label: int) -> IndexError:
        index = index_at(position, shape, tuple(range(len(shape))))
        return bad_index(name, index, label, classes, most=FAULT_MOST)

    return (name, shape, classes), error
