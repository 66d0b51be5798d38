"""Connectionist temporal classification: the terms of sequences, and the gradient by their log probabilities.

The states of a sequence of S labels are its labels with a blank before, between and after them: 2 S + 1. A
sum over all its alignments, in logarithms, runs forward over its frames, which gives the term, and backward:
together they are the probability that a state has at a frame. As in PyTorch, the gradient is that of log
probabilities that a softmax makes: ``exp(x) - p``, p what a class's states have together, in their order.

Three kernels. Log probabilities are (frames, batch, classes), in C order; sequences' labels lie in one array,
joined or padded, each from its start. Integers are int64; weights of sequences and upstream gradients are of
the arithmetic type, as is scratch.

- `starts`, where labels are joined: their sequences' lengths and number, the labels in all, and the starts.
- `align`: a block has a sequence, a thread a state, or some. Its arguments: log probabilities, labels, their
  starts, the lengths of sequences and of their labels, weights, upstream gradients; terms; the numbers of
  frames, sequences and classes, of labels in all and at most of a sequence's (the columns of padded ones),
  and the blank; the gradient's factor and a pointer to its divisor; partial sums; faults; scratch: `lines`,
  and where a gradient is asked for `occupied`, `factors` and `chains`, as :func:`scratch` says.
- `put`, where a gradient is asked for: a part of a warp has a frame of a sequence. Its arguments: log
  probabilities, the starts, the lengths of sequences and of their labels; the gradient, which may lie over
  the log probabilities; frames, sequences, classes, labels in all, the blank, the plan's `deal`; `occupied`,
  `factors` and `chains`.

A fault's position is ``3 * sequence + k``, k saying which of `WRONG` is out of range, and its number what it
is. The sequence is NaN.
"""

from typing import Any, NamedTuple

import numpy as np

from ..layout import InOrder
from ..math import exp, log
from ..spec import INT64, Sequences, bad_label, bad_length, wrong_length
from . import faults, rows
from .arrays import DeviceArray, aligned, flat
from .reduce import MOST_BLOCKS, THREADS, Launch, add, block_max, quotient, whole
from .rows import (
    INTEGERS,
    LANES,
    WIDTH,
    T,
    array,
    filled,
    lanes,
    optional,
    row_team,
    store_own_partial,
    team_sum,
)
from .target import WARP, Binary, as_kernels, compile, cuda, device, each, record, shared, storage, types

# What else these kernels are bound to, by `kernels`.
ROOM: Any = 256  # states that two lines in shared memory have together
SPILLS: Any = False  # there may be more
GRAD: Any = True
MEAN: Any = True
ZERO_INFINITY: Any = True

WRONG = ("input_lengths", "target_lengths", "targets")
PERIOD = 8  # frames after which logarithms are taken relative to the largest, lest they lose their digits
MOST_THREADS = 512
MOST_SHARED = 32768  # bytes of a block for its two lines of states; of more they lie in memory


class Request(NamedTuple):
    """What the kernels compute."""

    mean: bool = False  # a term is divided by its number of labels, at least 1
    zero_infinity: bool = False
    weighted: bool = False  # sequences have weights
    upstream: bool = False
    terms: bool = False
    grad: bool = False


class Plan(NamedTuple):
    """How `align` is launched, a block for each partial sum, and `put`."""

    align: Launch
    room: int  # states of which a block has two lines in shared memory
    spills: bool  # whether a sequence may have more, so that `lines` are needed
    put: Launch
    deal: int  # the logarithm of the threads to a frame of a sequence


class Scratch(NamedTuple):
    """Elements of scratch."""

    lines: int  # numbers of the arithmetic type; 0: none
    occupied: int
    factors: int
    chains: int  # of int32


# ---- where labels start -------------------------------------------------------------------------------


def starts(lengths, batch, most, begins):
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < batch:
        start = 0
        for k in range(i):
            start += min(max(lengths[k], 0), most)  # of one out of range too, no sum overflows
        begins[i] = start


# ---- a sequence ---------------------------------------------------------------------------------------


@device
def log_sum(a, b, c):
    """The logarithm of a sum of three exponentials."""
    top = max(a, max(b, c))
    if top == type(top)(-np.inf):
        return a + b + c  # NaN, if one is
    return top + log(exp(a - top) + exp(b - top) + exp(c - top))


@device
def peak(x):
    """The largest of a block's numbers, in each of its threads; 0 if it is not finite."""
    zero, x = type(x)(0), block_max(x)
    return x if x - x == zero else zero


@device
def peak_of_line(line, base, states, top):
    s = cuda.threadIdx.x
    while s < states:
        top = max(top, line[base + s])
        s += cuda.blockDim.x
    return peak(top)


@device
def class_of(targets, start, state, blank):
    """The class of a state."""
    return targets[start + (state >> 1)] if state & 1 else blank


@device
def skips(targets, start, state):
    """Whether a path may come to a state from the one before the last: to a label, from another one."""
    if state & 1 == 0 or state < 3:
        return False
    k = start + (state >> 1)
    return targets[k] != targets[k - 1]


def line_of(lines, states, start, n):
    """The memory of a sequence's two lines of states, and where they start."""
    near = shared(ROOM, T(0))
    if SPILLS and 2 * states > ROOM:
        return lines, 2 * (2 * start + n)
    return near, 0


@device
def link(targets, start, count, classes, heads, links, chains):
    """Of each class the first of its labels, and of each label the next one of its class."""
    c = cuda.threadIdx.x
    while c < classes:
        chains[heads + c] = np.int32(-1)
        c += cuda.blockDim.x
    cuda.syncthreads()  # and until all have read the last line, which is written next
    k = cuda.threadIdx.x
    while k < count:
        label = targets[start + k]
        after = k + 1
        while after < count and targets[start + after] != label:
            after += 1
        chains[links + k] = np.int32(after if after < count else -1)
        before = k - 1
        while before >= 0 and targets[start + before] != label:
            before -= 1
        if before < 0:
            chains[heads + label] = np.int32(k)
        k += cuda.blockDim.x


@device
def check(targets, start, n, length, count, frames, classes, size, most, faults):
    """Whether a sequence's lengths and labels are in range."""
    leads = cuda.threadIdx.x == 0
    wrong = 0
    if length < 0 or length > frames:
        wrong = 1
        if leads:
            record(faults, 3 * n, length)
    if count < 0 or count > most or start + count > size:
        wrong = 1
        if leads:
            record(faults, 3 * n + 1, count)
    k = cuda.threadIdx.x if wrong == 0 else count
    while k < count:
        label = targets[start + k]
        if label < 0 or label >= classes:
            wrong = 1
            record(faults, 3 * n + 2, label)
        k += cuda.blockDim.x
    return cuda.syncthreads_or(wrong) == 0


def align(
    x, targets, begins, input_lengths, target_lengths, weights, upstream, terms, frames, batch, classes, size,
    most, blank, factor, divisor, partials, faults, lines, occupied, factors, chains,
):  # fmt: skip
    zero, one, never = T(0), T(1), T(-np.inf)
    scale = factor if divisor is None else quotient(factor, divisor[0])
    hi = lo = zero
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    n = cuda.blockIdx.x
    while n < batch:
        start, length, count = begins[n], input_lengths[n], target_lengths[n]
        right = check(targets, start, n, length, count, frames, classes, size, most, faults)
        share = optional(weights, n, one)
        live = right and share != zero
        length = length if live else 0
        states = 2 * count + 1 if live else 0
        if MEAN:
            share = share / T(max(count, 1))
        line, base = line_of(lines, states, start, n)
        step = batch * classes
        has = thread < states and length > 0
        own = n * classes + (class_of(targets, start, thread, blank) if has else 0)
        own_skips = skips(targets, start, thread) if has else False
        shifts = rest = zero
        ahead = array.load(x, own) if has else zero
        for t in range(length):
            now, before = base + (t & 1) * states, base + (1 - (t & 1)) * states
            score, may = ahead, own_skips
            shift = zero
            if t % PERIOD == 0 and t > 0:
                shift = peak_of_line(line, before, states, never)
                shifts, rest = add(shifts, rest, shift)
            if has and t + 1 < length:
                ahead = array.load(x, own + (t + 1) * step)  # on its way while this frame is computed
            s = thread
            while s < states:
                if s != thread:
                    score = array.load(x, t * step + n * classes + class_of(targets, start, s, blank))
                    may = skips(targets, start, s)
                if t == 0:
                    a = score if s < 2 else never
                else:
                    a = line[before + s]
                    b = line[before + s - 1] if s > 0 else never
                    c = line[before + s - 2] if may else never
                    a = log_sum(a, b, c) + (score - shift)
                line[now + s] = a
                if GRAD:
                    occupied[frames * (2 * start + n) + t * states + s] = a
                s += threads
            cuda.syncthreads()
        total = zero if count == 0 else never
        if length > 0:
            last = base + ((length - 1) & 1) * states + states - 1
            total = log_sum(line[last], line[last - 1] if states > 1 else never, never)
        shifts, rest = add(shifts, rest, total)
        v, f = -whole(shifts, rest), scale * share * optional(upstream, n, one)
        if ZERO_INFINITY and v == T(np.inf):
            v = f = zero
        elif v - v != zero:
            f = T(np.nan)
        v = share * v
        if not live:
            v = f = zero if right else T(np.nan)
        if GRAD:
            if thread == 0:
                factors[n] = f
            if f == f and f != zero:
                link(targets, start, count, classes, n * classes, batch * classes + start, chains)
                own_skips = skips(targets, start, thread + 2) if thread + 2 < states else False
                for back in range(length):
                    t = length - 1 - back
                    now, after = base + (t & 1) * states, base + (1 - (t & 1)) * states
                    score, may = ahead, own_skips
                    row = frames * (2 * start + n) + t * states
                    shift = zero
                    if (t + 1) % PERIOD == 0 and back > 0:
                        shift = peak_of_line(line, after, states, never)
                        total += peak_of_line(occupied, row, states, never) - shift
                    if has and t > 0:
                        ahead = array.load(x, own + (t - 1) * step)
                    s = thread
                    while s < states:
                        if s != thread:
                            score = array.load(x, t * step + n * classes + class_of(targets, start, s, blank))
                            may = skips(targets, start, s + 2) if s + 2 < states else False
                        if back == 0:
                            b = zero if s > states - 3 else never
                        else:
                            b = line[after + s]
                            c = line[after + s + 1] if s + 1 < states else never
                            d = line[after + s + 2] if may else never
                            b = log_sum(b, c, d) - shift
                        line[now + s] = b + score
                        occupied[row + s] = exp(occupied[row + s] + b - total)
                        s += threads
                    cuda.syncthreads()
        if thread == 0:
            array.store(terms, n, v)
            hi, lo = add(hi, lo, v)
        n += cuda.gridDim.x
    if partials is not None:
        store_own_partial(partials, hi, lo)


# ---- the gradient -------------------------------------------------------------------------------------


def slope(x, lane, c, blank, blanks, f, inverse, heads, links, at, occupied, chains):
    """The gradient by one class."""
    p = blanks if c + lane == blank else T(0)
    k = chains[heads + c + lane]
    while k >= 0:
        p += occupied[at + 2 * k + 1]
        k = chains[links + k]
    return (f * (exp(x) - p * inverse),)


def put(
    x, begins, input_lengths, target_lengths, g, frames, batch, classes, size, blank, deal, occupied, factors,
    chains,
):  # fmt: skip
    team, height, of_block, lane = row_team(deal)
    vectors = classes // WIDTH
    first = cuda.blockIdx.x * height
    while first < frames * batch:
        i = first + of_block
        there = i < frames * batch
        i = i if there else 0
        t = i // batch
        n = i - t * batch
        start, f, length = begins[n], factors[n], input_lengths[n]
        counts = f == f and f != T(0)
        live = there and counts and t < length
        states = 2 * target_lengths[n] + 1
        at = frames * (2 * start + n) + t * states
        blanks = labels = T(0)
        s = 2 * lane if live else states
        while s < states:
            blanks += occupied[at + s]
            labels += occupied[at + s + 1] if s + 1 < states else T(0)
            s += 2 * team
        blanks, labels = team_sum(blanks, team), team_sum(labels, team)
        inverse = T(1) / (blanks + labels)
        # An infeasible sequence's frames are NaN, and all of one that is out of range.
        fill = f if f != f and (t < length or length < 0 or length > frames) else T(0)
        v = lane if there else vectors
        while v < vectors:
            place = (i * classes + v * WIDTH,)
            ds = each(filled, (LANES,), (fill,))[0]
            if live:
                xs = array.load_vectors(x, place)
                row = blanks, f, inverse, n * classes, batch * classes + start, at
                ds = each(slope, (xs, LANES), (v * WIDTH, blank, *row, occupied, chains))[0]
            array.store_vectors(g, place, (True,), ds)
            v += team
        first += cuda.gridDim.x * height


# ---- launching ----------------------------------------------------------------------------------------


def plan(frames: int, batch: int, classes: int, size: int, most: int, code: int, vectors: bool) -> Plan:
    """The launch for so many labels in all, and at most of a sequence's.

    With `vectors` the log probabilities and the gradient start at multiples of 16 bytes, and the classes are
    a multiple of the storage's width.
    """
    room = min(_power_of_two(2 * most + 1), MOST_SHARED // (2 * np.dtype(storage(code).T).itemsize))
    usual = min(most, 2 * -(-size // max(batch, 1)))  # joined labels are anyone's
    threads = max(WARP, min(MOST_THREADS, _power_of_two(2 * usual + 1)))
    deal = min(5, _power_of_two(-(-classes // storage(code, vectors).width)).bit_length() - 1)
    blocks = max(1, min(MOST_BLOCKS, -(-((frames * batch) << deal) // THREADS)))
    return Plan(
        Launch(max(1, min(MOST_BLOCKS, batch)), threads),
        room,
        2 * most + 1 > room,
        Launch(blocks, THREADS),
        deal,
    )


def _power_of_two(n: int) -> int:
    """The smallest that is not less."""
    return 1 << max(n - 1, 0).bit_length()


def scratch(frames: int, batch: int, classes: int, size: int, spills: bool, grad: bool) -> Scratch:
    """What the kernels need for `size` labels in all."""
    states = 2 * size + batch
    lines = 2 * states if spills else 0
    return Scratch(lines, frames * states, batch, batch * classes + size) if grad else Scratch(lines, 0, 0, 0)


def starts_launch(batch: int) -> Launch:
    """The blocks of `starts`."""
    return Launch(max(1, -(-batch // THREADS)), THREADS)


def kernels(request: Request, code: int, room: int, spills: bool, vectors: bool = True) -> tuple[Any, ...]:
    """`align` and `put`, in plain Python."""
    scope = dict(
        lanes(code, vectors, 1, True),
        ROOM=2 * room,
        SPILLS=spills,
        GRAD=request.grad,
        MEAN=request.mean,
        ZERO_INFINITY=request.zero_infinity,
    )
    return as_kernels((align, put), scope, "ctc", (tuple(request), code, vectors))


def signatures(request: Request, code: int, spills: bool, summed: bool, divided: bool) -> tuple[Any, Any]:
    """The types of the arguments of `align` and `put`; ``none`` is passed as a null pointer."""
    arithmetic, pointer = storage(code).arithmetic, storage(code).pointer
    numbers, chains = types.CPointer(arithmetic), types.CPointer(types.int32)

    def given(present: Any, kind: Any = pointer) -> Any:
        return kind if present else types.none

    r = request
    forward = (
        pointer,
        *[INTEGERS] * 4,
        given(r.weighted, numbers),
        given(r.upstream, numbers),
        given(r.terms),
        *[types.int64] * 6,
        arithmetic,
        given(divided, numbers),
        given(summed, numbers),
        INTEGERS,
        given(spills, numbers),
        given(r.grad, numbers),
        given(r.grad, numbers),
        given(r.grad, chains),
    )
    gradient = (pointer, *[INTEGERS] * 3, pointer, *[types.int64] * 6, numbers, numbers, chains)
    return forward, gradient


def compile_align(
    request: Request,
    code: int,
    cc: tuple[int, int],
    room: int,
    spills: bool,
    threads: int,
    summed: bool = True,
    divided: bool = False,
) -> Binary:
    """Compile `align` for a request, storage, a plan's room and threads, and compute capability."""
    arguments = signatures(request, code, spills, summed, divided)[0]
    return compile(kernels(request, code, room, spills)[0], arguments, cc, threads)


def compile_put(code: int, cc: tuple[int, int], vectors: bool = True) -> Binary:
    """Compile `put` for a storage and compute capability."""
    request = Request(grad=True)
    arguments = signatures(request, code, False, False, False)[1]
    return compile(kernels(request, code, 1, False, vectors)[1], arguments, cc, THREADS)


def compile_starts(cc: tuple[int, int]) -> Binary:
    """Compile `starts`."""
    return compile(starts, (INTEGERS, types.int64, types.int64, INTEGERS), cc, THREADS)


# ---- launching ----------------------------------------------------------------------------------------


def run(p: Sequences, outputs: dict[str, Any]) -> Any:
    """Write the gradient by ``"log_probs"``; return the value."""
    wrong = wrong_length(p)
    if wrong is not None:
        raise wrong
    gradient = outputs.get("log_probs")
    arrays = [a for a in (p.log_probs, gradient) if a is not None]
    these = rows.Rows(p, arrays, p.shape, InOrder(p.log_probs.ndim, len(p.shape)))
    terms, queue = these.terms(), these.queue
    if not these.count:
        return these.finish(None, 1.0, None) if terms is None else terms
    frames, batch, classes = p.log_probs.shape[0], these.count, p.log_probs.shape[-1]
    columns, size = p.targets.shape[-1], p.targets.size
    spans, counts = (
        a if isinstance(a, DeviceArray) else a.reshape(-1).astype(INT64)
        for a in (p.input_lengths, p.target_lengths)
    )
    of_input, of_labels = (
        flat(a, a.shape, INT64, queue) if isinstance(a, DeviceArray) else queue.array(a)
        for a in (spans, counts)
    )
    most = columns if isinstance(counts, DeviceArray) else int(counts.max())
    if p.targets.ndim == 2 or not p.shape:
        begins = queue.array(np.arange(batch) * columns)
    elif not isinstance(counts, DeviceArray):
        begins = queue.array(np.cumsum(counts) - counts)
    else:
        begins = queue.empty((batch,), INT64)
        queue.launch(starts_launch(batch), compile_starts, (of_labels, batch, columns, begins))
    labels = flat(p.targets, p.targets.shape, INT64, queue)
    divisor, by = these.divisors()
    gradients_by = these.gradients_by(by) if gradient is not None else None
    x, written = these.as_kernel_input(p.log_probs), these.output_buffer(gradient)
    vectors = rows.whole_vectors(classes, 1, these.storage) and aligned([x, written])
    launch = plan(frames, batch, classes, size, most, these.code, vectors)
    room = scratch(frames, batch, classes, size, launch.spills, gradient is not None)
    request = Request(
        mean=these.reduction == "mean",
        zero_infinity=p.zero_infinity,
        weighted=these.sample_weight is not None,
        upstream=these.upstream is not None,
        terms=terms is not None,
        grad=gradient is not None,
    )
    lines, occupied, factors = (
        queue.empty((n,), p.arithmetic) if wanted else None
        for n, wanted in (
            (room.lines, launch.spills),
            (room.occupied, request.grad),
            (room.factors, request.grad),
        )
    )
    chains = queue.empty((room.chains,), np.int32) if request.grad else None
    partials = None if terms is not None else queue.empty((2 * launch.align.blocks,), p.arithmetic)
    slot = queue.slot(*_fault(p, most))
    queue.launch(
        launch.align,
        compile_align,
        (
            *(x, labels, begins, of_input, of_labels, these.sample_weight, these.upstream, terms),
            *(frames, batch, classes, size, most, p.blank),
            *(these.factor / divisor, gradients_by, partials, slot, lines, occupied, factors, chains),
        ),
        request=request,
        code=these.code,
        room=launch.room,
        spills=launch.spills,
        threads=launch.align.threads,
        summed=partials is not None,
        divided=gradients_by is not None,
    )
    if gradient is not None and gradient.size:
        queue.launch(
            launch.put,
            compile_put,
            (
                *(x, begins, of_input, of_labels, written, frames, batch, classes, size),
                *(p.blank, launch.deal, occupied, factors, chains),
            ),
            code=these.code,
            vectors=vectors,
        )
    these.copy_back(gradient, written)
    faults.check_now(queue.device)
    return these.finish(partials, divisor, by) if terms is None else terms


def _fault(p: Sequences, most: int) -> tuple[Any, Any]:
    """Return a kind of call, and its errors: three positions a sequence, as `WRONG` has them."""
    name, shape, batched = p.name, p.log_probs.shape, bool(p.shape)

    def error(position: int, number: int) -> Exception:
        n, argument = position // 3, WRONG[position % 3]
        if argument == "targets":
            return bad_label(name, n, number, shape[-1])
        limit = shape[0] if argument == "input_lengths" else most
        return bad_length(name, argument, (n,) if batched else (), limit, number)

    return (name, shape, most), error
