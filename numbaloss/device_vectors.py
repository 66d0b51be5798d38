"""The losses of vectors and of sequences on CUDA devices: a call's kernels, and what they are given."""

import math
from typing import Any, NamedTuple

import numpy as np

from . import device, dispatch, launcher
from .classes import INT64
from .device import DeviceArray, Queue
from .device_elementwise import owner
from .device_rows import InOrder, Rows, shape_free, whole_vectors
from .embedding import VectorLoss
from .rows import Terms

# ---- vectors ------------------------------------------------------------------------------------------


def vector_loss(
    cls: type[VectorLoss], p: Any, options: dict[str, Any], outputs: dict[str, Any], queue: Queue
) -> Any:
    if callable(options.get("distance_function")):
        raise TypeError(
            f"{cls.function.__name__}: a distance_function of one's own is computed on the CPU only"
        )
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
