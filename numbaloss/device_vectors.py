"""The losses of vectors and of sequences on CUDA devices: a call's kernels, and what they are given."""

import math
from typing import Any, NamedTuple

import numpy as np

from . import device, dispatch, embedding, launcher
from .classes import INT64
from .device import DeviceArray, Queue
from .device_elementwise import SUM, combined, launch, owner
from .device_rows import InOrder, Rows, shape_free, whole_vectors
from .embedding import VectorLoss
from .kernels import math as nm
from .kernels.spec import Request, Scalars
from .rows import Terms

# ---- vectors ------------------------------------------------------------------------------------------


def vector_loss(
    cls: type[VectorLoss], p: Any, options: dict[str, Any], outputs: dict[str, Any], queue: Queue
) -> Any:
    if callable(options.get("distance_function")):
        return measured_loss(cls, p, options, outputs, queue)
    templates, shape = launcher.templates("vectors"), p.vectors[0].shape
    outs = [outputs.get(n) for n in cls._vector_names()]
    arrays = [*p.vectors, *(a for a in outs if a is not None)]
    rows = Rows(p, options, arrays, shape[:-1], InOrder(len(shape)), queue)
    terms = rows.terms()
    if not rows.count:
        return rows.finish(None, 1.0, None) if terms is None else terms
    divisor, by = rows.divisors()
    gradients_by = rows.gradients_by(by) if outputs else None
    straight, written = [rows.straight(v) for v in p.vectors], [rows.written(a) for a in outs]
    vectors = whole_vectors(shape[-1], 1, rows.storage) and device.aligned([*straight, *written])
    plan = templates.plan(rows.count, shape[-1], rows.code, vectors)
    metric = cls._metric(options)
    request = templates.Request(
        templates.kind_of(metric.kind, metric.p, rows.code),
        three=len(straight) == 3,
        swap=options.get("swap", False),
        weighted=rows.sample_weight is not None,
        upstream=rows.upstream is not None,
        terms=terms is not None,
        wrt=tuple(k for k, a in enumerate(outs) if a is not None),
    )
    partials = None if terms is not None else queue.empty((2 * plan.partials,), p.arithmetic)
    absent = [None] * (3 - len(straight))
    labels = rows.over_rows(p.labels, p.arithmetic)
    queue.launch(
        (plan.blocks, plan.threads),
        templates.compile_kernel,
        (
            *(*straight, *absent, labels, rows.sample_weight, rows.upstream, terms, *written, *absent),
            *(rows.count, shape[-1], plan.deal, metric.p, metric.eps, options["margin"]),
            *(rows.factor / divisor, gradients_by, partials),
        ),
        request=request,
        code=rows.code,
        plan=shape_free(plan),
        summed=partials is not None,
        divided=gradients_by is not None,
        vectors=vectors,
    )
    for array, w in zip(outs, written, strict=True):
        rows.deliver(array, w)
    return rows.finish(partials, divisor, by) if terms is None else terms


# ---- vectors, by a distance of the caller's own ----------------------------------------------------------


def _hinge(near, far, swapped, margin, swap):
    h = margin + near - (nm.minimum(far, swapped) if swap else far)
    return nm.where(h < 0, 0, h)


def _by_near(near, far, swapped, margin, swap):
    h = margin + near - (nm.minimum(far, swapped) if swap else far)
    return nm.minimum(nm.sign(h) + 1, 1)  # it passes at exactly the clamp


def _by_far(near, far, swapped, margin, swap):
    h = margin + near - (nm.minimum(far, swapped) if swap else far)
    share = nm.sign(swapped - far) * 0.5 + 0.5 if swap else 1  # of equal distances a half each
    return nm.where(h < 0, 0, -share * nm.minimum(nm.sign(h) + 1, 1))


def _by_swapped(near, far, swapped, margin, swap):
    h = margin + near - (nm.minimum(far, swapped) if swap else far)
    share = nm.sign(far - swapped) * 0.5 + 0.5 if swap else 0
    return nm.where(h < 0, 0, -share * nm.minimum(nm.sign(h) + 1, 1))


def _chained(factor, derivative):
    return nm.where(factor == 0, 0, factor * derivative)


SLOPES = (0, _by_near), (1, _by_far), (2, _by_swapped)
HINGES = {s: Scalars("hinge", 3, _hinge, SLOPES, (None, s)) for s in (False, True)}
CHAINED = Scalars("chained", 2, _chained)


class Measured(embedding.Measured):
    """The caller's distance on a device, checked."""

    def __init__(self, loss: str, function: Any, gradients: bool, arithmetic: np.dtype, queue: Queue) -> None:
        super().__init__(loss, function, gradients)
        self.arithmetic, self.queue = arithmetic, queue

    def array(self, what: str, found: Any) -> DeviceArray:
        what = f"{what} of distance_function"
        if not dispatch.is_device_array(found):
            raise TypeError(
                f"{self.loss}: {what} must be an array on the vectors' device, got {type(found).__name__}"
            )
        library, place = device.described(self.loss, what, found)
        return DeviceArray(place, found, library, self.queue)

    def checked(self, what: str, found: Any, shape: tuple[int, ...]) -> DeviceArray:
        return device.flat(super().checked(what, found, shape), shape, self.arithmetic, self.queue)


def measured_loss(cls: Any, p: Any, options: dict[str, Any], outputs: dict[str, Any], queue: Queue) -> Any:
    """A triplet loss over the caller's distance: a hinge of distances, and the chain to its derivatives."""
    shape, T, swap = p.vectors[0].shape, p.arithmetic, options["swap"]
    rows = Rows(p, options, list(p.vectors), shape[:-1], InOrder(len(shape)), queue)
    terms = rows.terms()
    if not rows.count:
        return rows.finish(None, 1.0, None) if terms is None else terms
    measured = Measured(cls.function.__name__, options["distance_function"], bool(outputs), T, queue)
    a, b, c = (given_to_caller(v, T, queue) for v in p.vectors)
    near, (near_a, near_b) = measured(a, b)
    far, (far_a, far_c) = measured(a, c)
    swapped, (swapped_b, swapped_c) = measured(b, c) if swap else (far, (far_a, far_c))
    divisor, by = rows.divisors()
    gradients_by = rows.gradients_by(by) if outputs else None
    hinges = None if terms is None else queue.empty(rows.shape, T)
    factors = [queue.empty(rows.shape, T) for _ in range(3 if outputs else 0)]
    optional = (rows.sample_weight, rows.upstream if outputs else None)
    request = Request(
        weighted=optional[0] is not None,
        upstream=optional[1] is not None,
        terms=hinges is not None,
        wrt=tuple(range(len(factors))),
    )
    partials = None
    if hinges is None:
        partials = queue.empty((2 * launcher.templates("reduce").launch(rows.count, T).blocks,), T)
    launch(
        HINGES[swap],
        request,
        [near, far, swapped, *(o for o in optional if o is not None)],
        [*([] if hinges is None else [hinges]), *factors],
        rows.factor / divisor,
        gradients_by,
        (options["margin"],),
        partials,
        None,
        queue,
    )
    if outputs:
        by_near, by_far, by_swapped = factors
        parts = {
            "anchor": [(by_near, near_a), (by_far, far_a)],
            "positive": [(by_near, near_b), *([(by_swapped, swapped_b)] if swap else [])],
            "negative": [(by_far, far_c), *([(by_swapped, swapped_c)] if swap else [])],
        }
        # All before the first is stored: a derivative may be a view of the other vector.
        found = {n: chained(parts[n], T, queue) for n in outputs}
        for n, out in outputs.items():
            out.assign(found[n])
    if terms is None or hinges is None:
        return rows.finish(partials, divisor, by)
    terms.assign(hinges)
    return terms


def given_to_caller(vectors: DeviceArray, dtype: np.dtype, queue: Queue) -> Any:
    """Vectors as an array of the call's library: C-contiguous, in the arithmetic's dtype."""
    plain = vectors.dtype == dtype and vectors.flags.c_contiguous and vectors.library is queue.library
    return (vectors if plain else vectors.astype(dtype)).owner


def chained(parts: list[tuple[DeviceArray, DeviceArray]], dtype: np.dtype, queue: Queue) -> DeviceArray:
    """The sum of derivatives, each row's times its factor."""
    total, *others = [combined(CHAINED, f[..., np.newaxis], by, dtype, queue) for f, by in parts]
    for other in others:
        total = combined(SUM, total, other, dtype, queue)
    return total


# ---- sequences ----------------------------------------------------------------------------------------


class Sequences(NamedTuple):
    """A checked call of `ctc_loss`."""

    log_probs: DeviceArray
    targets: DeviceArray
    frames: Any  # lengths: arrays on the device, or the host's in int64
    lengths: Any
    padded: bool
    terms: Terms
    shape: tuple[int, ...]  # of the terms
    dtype: np.dtype
    arithmetic: np.dtype


LENGTHS = "input_lengths", "target_lengths"


def run_ctc_loss(cls: Any, mode: str, call: dict[str, Any]) -> Any:
    """A call whose lengths may be on the host."""
    given = {n: call[n] for n in LENGTHS if not dispatch.is_device_array(call[n])}
    described, queue = device.begin(cls.function.__name__, {n: v for n, v in call.items() if n not in given})
    with queue.current():
        result = cls._evaluate_call(
            mode,
            {**described, **given},
            lambda p, options, outputs: ctc_loss(cls, p, options, outputs, queue),
            lambda call, options, wrt: check_sequences(cls, call, options),
        )
    return owner(result)


def check_sequences(cls: Any, call: dict[str, Any], options: dict[str, Any]) -> Sequences:
    """As `CTCLoss._check`, but for what only the data says; of lengths on the host that too."""
    name = cls.function.__name__
    x = dispatch.floating(name, "log_probs", dispatch.as_array(name, "log_probs", call["log_probs"]))
    if x.ndim not in (2, 3) or not x.shape[-1]:
        raise ValueError(
            f"{name}: log_probs must have shape (T, N, C) or (T, C), C at least 1, got {x.shape}"
        )
    rows, blank = x.shape[1:-1], options["blank"]
    if not 0 <= blank < x.shape[-1]:
        raise ValueError(f"{name}: blank must be a class, in [0, {x.shape[-1]}), got {blank}")
    targets = cls._integers("targets", call["targets"])
    count = math.prod(rows)
    padded = targets.ndim == 2 or not rows
    if targets.ndim not in (1, 2) or (targets.ndim == 2 and targets.shape[0] != count):
        wanted = f"({count}, S)" + (", or one axis with all labels" if rows else " or (S)")
        raise ValueError(f"{name}: targets must have shape {wanted}, got {targets.shape}")
    lengths = []
    for argument, most, what in (
        ("input_lengths", x.shape[0], "frames of log_probs"),
        ("target_lengths", targets.shape[-1], "labels of targets"),
    ):
        array = call[argument]
        if not isinstance(array, DeviceArray):
            array = cls._lengths(argument, call, rows, most, what)
        elif cls._integers(argument, array).shape != rows and (rows or array.shape != (1,)):
            wanted = f"{rows}, one for each sequence" if rows else "() or (1,)"
            raise ValueError(f"{name}: {argument} must have shape {wanted}, got {array.shape}")
        lengths.append(array)
    if not padded and not isinstance(lengths[1], DeviceArray) and lengths[1].sum() != targets.size:
        raise ValueError(
            f"{name}: target_lengths must sum to the {targets.size} labels of targets, got {lengths[1].sum()}"
        )
    floats = {"log_probs": x}
    terms = cls._terms(call, options, rows, floats)
    dtype = dispatch.common_dtype([a.dtype for a in floats.values()])
    return Sequences(
        x, targets, lengths[0], lengths[1], padded, terms, rows, dtype, dispatch.arithmetic_dtype(dtype)
    )


def ctc_loss(cls: Any, p: Sequences, options: dict[str, Any], outputs: dict[str, Any], queue: Queue) -> Any:
    templates, gradient = launcher.templates("ctc"), outputs.get("log_probs")
    arrays = [a for a in (p.log_probs, gradient) if a is not None]
    rows = Rows(p, options, arrays, p.shape, InOrder(p.log_probs.ndim, len(p.shape)), queue)
    terms = rows.terms()
    if not rows.count:
        return rows.finish(None, 1.0, None) if terms is None else terms
    frames, batch, classes = p.log_probs.shape[0], rows.count, p.log_probs.shape[-1]
    columns, size = p.targets.shape[-1], p.targets.size
    known = not isinstance(p.lengths, DeviceArray)
    most = int(p.lengths.max()) if known else columns
    of_input, of_labels = (
        device.flat(a, a.shape, INT64, queue) if isinstance(a, DeviceArray) else queue.array(a)
        for a in (p.frames, p.lengths)
    )
    if p.padded:
        begins = queue.array(np.arange(batch) * columns)
    elif known:
        begins = queue.array(np.cumsum(p.lengths) - p.lengths)
    else:
        begins = queue.empty((batch,), INT64)
        queue.launch(
            templates.starts_launch(batch), templates.compile_starts, (of_labels, batch, columns, begins)
        )
    labels = device.flat(p.targets, p.targets.shape, INT64, queue)
    divisor, by = rows.divisors()
    gradients_by = rows.gradients_by(by) if gradient is not None else None
    x, written = rows.straight(p.log_probs), rows.written(gradient)
    vectors = whole_vectors(classes, 1, rows.storage) and device.aligned([x, written])
    plan = templates.plan(frames, batch, classes, size, most, rows.code, vectors)
    room = templates.scratch(frames, batch, classes, size, plan.spills, gradient is not None)
    request = templates.Request(
        mean=rows.reduction == "mean",
        zero_infinity=options["zero_infinity"],
        weighted=rows.sample_weight is not None,
        upstream=rows.upstream is not None,
        terms=terms is not None,
        grad=gradient is not None,
    )
    lines, occupied, factors = (
        queue.empty((n,), p.arithmetic) if wanted else None
        for n, wanted in (
            (room.lines, plan.spills),
            (room.occupied, request.grad),
            (room.factors, request.grad),
        )
    )
    chains = queue.empty((room.chains,), np.int32) if request.grad else None
    partials = None if terms is not None else queue.empty((2 * plan.align.blocks,), p.arithmetic)
    faults = device.faults(queue.device).place(*_sequence_fault(cls, p, most))
    queue.launch(
        plan.align,
        templates.compile_align,
        (
            *(x, labels, begins, of_input, of_labels, rows.sample_weight, rows.upstream, terms),
            *(frames, batch, classes, size, most, options["blank"]),
            *(rows.factor / divisor, gradients_by, partials, faults, lines, occupied, factors, chains),
        ),
        request=request,
        code=rows.code,
        room=plan.room,
        spills=plan.spills,
        threads=plan.align.threads,
        summed=partials is not None,
        divided=gradients_by is not None,
    )
    if gradient is not None and gradient.size:
        queue.launch(
            plan.put,
            templates.compile_put,
            (
                *(x, begins, of_input, of_labels, written, frames, batch, classes, size),
                *(options["blank"], plan.deal, occupied, factors, chains),
            ),
            code=rows.code,
            vectors=vectors,
        )
    rows.deliver(gradient, written)
    if device.SYNCHRONOUS:
        device.faults(queue.device).check()
    return rows.finish(partials, divisor, by) if terms is None else terms


def _sequence_fault(cls: Any, p: Sequences, most: int) -> tuple[Any, Any]:
    """What `device.Faults.place` wants: three positions a sequence, for what may be wrong with it."""
    name, shape, wrong = cls.function.__name__, p.log_probs.shape, launcher.templates("ctc").WRONG

    def error(position: int, number: int) -> Exception:
        n, argument = position // 3, wrong[position % 3]
        at = f"[{n}]" if p.shape else ""
        if argument == "targets":
            return IndexError(
                f"{name}: {argument} has {number} for sequence {n}, but log_probs has {shape[-1]} classes"
            )
        limit, what = (
            (shape[0], "frames of log_probs") if argument == LENGTHS[0] else (most, "labels of targets")
        )
        return ValueError(f"{name}: {argument}{at} must be in [0, {limit}], the {what}, got {number}")

    return (name, shape, most), error
