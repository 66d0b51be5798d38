"""The families of class scores on CUDA devices: a call's kernels, and what they are given."""

import math
from typing import Any, NamedTuple

import numpy as np

from . import device, dispatch, launcher
from .arguments import class_rows
from .classes import INT64, Axes, ClassLoss, Problem
from .device import DeviceArray, Queue
from .device_elementwise import combined
from .device_rows import InOrder, Rows, index_error, run, shape_free, whole_vectors
from .elementwise import broadcasts
from .kernels import math as nm
from .kernels.spec import Scalars
from .loss import GRAD, MISSING, VALUE, VALUE_GRAD_HESS, Loss, resolve_normalizer, resolve_wrt, upstream
from .multiclass import CrossEntropyLoss
from .multilabel import MarginLoss


def index_fault(cls: type[Loss], p: Problem, axes: Axes, queue: Queue) -> int:
    """Where kernels record a class index out of range."""
    return device.faults(queue.device).place(*_index_fault(cls.function.__name__, p.input.shape, axes.order))


def _index_fault(name: str, shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[Any, Any]:
    """What `device.Faults.place` wants, for rows of scores whose axes are visited in an order."""
    axis = min(1, len(shape) - 1)
    rows = tuple(k - (k > axis) for k in order if k != axis)

    def error(position: int, label: int) -> IndexError:
        index = device.place_of(position, class_rows(shape), rows)
        return index_error(name, index, label, shape[axis])

    return (name, shape, order), error


# ---- softmax ------------------------------------------------------------------------------------------


def cross_entropy(
    cls: type[ClassLoss], p: Problem, options: dict[str, Any], outputs: dict[str, Any], queue: Queue
) -> Any:
    if "weight" in outputs:
        # Computed before its arguments may be overwritten, and written when they are no longer needed.
        by_weight = _by_weight(cls, p, options, queue)
        value = cross_entropy(cls, p, options, {n: o for n, o in outputs.items() if n != "weight"}, queue)
        outputs["weight"].assign(by_weight)
        return value
    templates, softmax = launcher.templates("rows"), launcher.templates("softmax")
    target = p.target if p.probable else None
    gradients = [outputs.get(n) for n in ("input", "target", "curvature")]
    arrays = [a for a in (p.input, target, *gradients) if a is not None]
    axes = Axes(arrays)
    rows = Rows(p, options, arrays, class_rows(p.input.shape), axes, queue)
    terms = rows.terms()
    if not rows.count:
        return rows.finish(None, 1.0, None) if terms is None else terms
    batch, classes, inner = axes.extents
    weight = None if p.weight is None else device.flat(p.weight, (classes,), p.arithmetic, queue)
    labels = None if p.probable else rows.over_rows(p.target, INT64)

    def counted() -> DeviceArray:
        return count_rows(rows, labels, weight, classes, options["ignore_index"])

    divisor, by = rows.divisors(None if p.probable else counted)
    gradients_by = rows.gradients_by(by) if any(a is not None for a in gradients) else None
    x, q = rows.straight(p.input), rows.straight(target)
    written = [rows.written(a) for a in gradients]
    vectors = whole_vectors(classes, inner, rows.storage)
    vectors = vectors and device.aligned([x, q, terms, weight, *written])
    plan = templates.plan(batch, classes, inner, rows.code, vectors)
    smoothing = options["label_smoothing"]
    request = softmax.Request(
        probable=p.probable,
        smoothed=smoothing > 0,
        weighted=weight is not None,
        sample_weighted=rows.sample_weight is not None,
        upstream=rows.upstream is not None,
        terms=terms is not None,
        grad=gradients[0] is not None,
        target_grad=gradients[1] is not None,
        curvature=gradients[2] is not None,
    )
    partials = None if terms is not None else queue.empty((2 * plan.partials,), p.arithmetic)
    split = plan.variant == templates.SPLIT
    scratch = queue.empty((plan.blocks * softmax.STATE,), p.arithmetic) if split else None
    faults = None if p.probable else index_fault(cls, p, axes, queue)
    queue.launch(
        (plan.blocks, plan.threads),
        softmax.compile_kernels,
        (
            *(x, q, labels, weight, rows.sample_weight, rows.upstream, terms, *written),
            *(batch, classes, inner, plan.deal, options["ignore_index"]),
            *(1 - smoothing, smoothing / classes if p.probable or smoothing else 0),
            *(rows.factor / divisor, gradients_by, partials, faults, scratch),
        ),
        request=request,
        code=rows.code,
        plan=shape_free(plan),
        summed=partials is not None,
        divided=gradients_by is not None,
        vectors=vectors,
    )
    for array, w in zip(gradients, written, strict=True):
        rows.deliver(array, w)
    if faults is not None and device.SYNCHRONOUS:
        device.faults(queue.device).check()
    return rows.finish(partials, divisor, by) if terms is None else terms


class Quick(NamedTuple):
    """What serves quick calls on arrays of one shape and dtype."""

    counts: tuple[launcher.Kernel, Any] | None  # what the mean divides by, with its grid
    number: launcher.Kernel  # the sum of its partial sums
    kernels: tuple[launcher.Kernel, ...]
    plan: Any
    finish: launcher.Kernel
    finish_threads: int
    fault: tuple[Any, Any]
    numbers: tuple[float, ...]  # from the batch to the gradient's factor, as the kernels take them
    scratch: int  # numbers of the arithmetic dtype


def quick(cls: type[ClassLoss], mode: str, plan: Any, x: Any, y: Any, out: Any) -> Any:
    """The commonest call: contiguous scores, int64 indices, no weights, a reduced value.

    Returns MISSING where the call is not of that kind; whatever is wrong with it is found there.
    """
    library = device.library_of(x.__class__)
    if cls is not CrossEntropyLoss or library.look is None or y.__class__ is not x.__class__:
        return MISSING
    address, dtype, shape, on, plain = library.look(x)
    labels, *rest = library.look(y)
    if not plain or rest[0] != INT64 or rest[2:] != [on, True] or dtype is None:
        return MISSING
    extents = cls._extents(shape, rest[1])
    if extents is None or not math.prod(shape) or dispatch.code_of(dtype) is None:
        return MISSING
    if address % dtype.itemsize or labels % INT64.itemsize:
        return MISSING
    driver = launcher.driver()
    entered = driver.enter(on)
    try:
        gradient = 0
        if plan.gradient:
            if out is None:
                out = library.empty(shape, dtype, on)
                gradient = library.address(out)
            elif out is x:
                gradient = address
            else:
                return MISSING
        vectors = not (address | gradient) % device.VECTOR_BYTES
        key = cls, plan, mode, dtype, shape, extents, on, vectors
        made = launcher.recipes.get(key)
        if made is None:
            made = launcher.recipes[key] = _prepare(*key)
        blocks, threads, size = made.plan.blocks, made.plan.threads, dispatch.arithmetic_dtype(dtype)
        counting = 0 if made.counts is None else 2 * made.counts[1].blocks
        partials = 0 if mode == GRAD else made.plan.partials
        scratch = library.empty((4 + counting + 2 * partials + made.scratch,), size, on)
        divisor = start = library.address(scratch)
        start += 4 * size.itemsize
        faults = device.faults(on).place(*made.fault)
        stream = library.stream(on)
        batch, classes, inner, deal, ignore, *numbers = made.numbers
        if made.counts is None:
            divisor = 0
        else:
            kernel, grid = made.counts
            counted = labels, 0, 0, batch * inner, classes, ignore, start
            driver.launch(kernel, *grid, stream, counted)
            summed = start, grid.blocks, 1.0, 0, divisor
            driver.launch(made.number, 1, made.finish_threads, stream, summed)
            start += counting * size.itemsize
        sums = start if partials else 0
        room = start + 2 * partials * size.itemsize if made.scratch else 0
        arguments = (
            *(address, 0, labels, 0, 0, 0, 0, gradient, 0, 0),
            *(batch, classes, inner, deal, ignore, *numbers, divisor if gradient else 0, sums, faults, room),
        )
        for kernel in made.kernels:
            driver.launch(kernel, blocks, threads, stream, arguments)
        value = None
        if partials:
            value = library.empty((), dtype, on)
            finished = sums, partials, 1.0, divisor, library.address(value)
            driver.launch(made.finish, 1, made.finish_threads, stream, finished)
        if device.SYNCHRONOUS:
            device.faults(on).check()
    finally:
        if entered:
            driver.leave()
    return value if mode == VALUE else out if mode == GRAD else (value, out)


def _prepare(
    cls: type[ClassLoss],
    plan: Any,
    mode: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    extents: tuple[int, ...],
    on: int,
    vectors: bool,
) -> Quick:
    """What quick calls on such arrays need."""
    templates, softmax = launcher.templates("rows"), launcher.templates("softmax")
    reduce = launcher.templates("reduce")
    ignore, smoothing, factor, divisor = plan.settings
    (batch, classes, inner), arithmetic = extents, dispatch.arithmetic_dtype(dtype)
    code, of_numbers = dispatch.code_of(dtype), dispatch.code_of(arithmetic)
    vectors = vectors and whole_vectors(classes, inner, dtype)
    dealt = templates.plan(batch, classes, inner, code, vectors)
    mean = divisor != divisor
    counts = None
    if mean:
        (count,) = launcher.kernels(
            on, templates.compile_counts, code=of_numbers, weighted=False, sample_weighted=False
        )
        counts = count, templates.counts_launch(batch * inner)
    (number,) = launcher.kernels(on, reduce.compile_finish, code=of_numbers, divided=False)
    (finish,) = launcher.kernels(on, reduce.compile_finish, code=code, divided=mean)
    kernels = launcher.kernels(
        on,
        softmax.compile_kernels,
        request=softmax.Request(smoothed=smoothing > 0, grad=plan.gradient),
        code=code,
        plan=shape_free(dealt),
        summed=mode != GRAD,
        divided=mean and plan.gradient,
        vectors=vectors,
    )
    spread = smoothing / classes if smoothing else 0
    numbers = batch, classes, inner, dealt.deal, ignore, 1 - smoothing, spread, factor
    scratch = dealt.blocks * softmax.STATE if dealt.variant == templates.SPLIT else 0
    fault = _index_fault(cls.function.__name__, shape, tuple(range(len(shape))))
    return Quick(
        counts, number, kernels, dealt, finish, reduce.FINISH_THREADS, fault, numbers, scratch
    )  # fmt: skip


def count_rows(rows: Rows, labels: Any, weight: Any, classes: int, ignore: int) -> DeviceArray:
    """The sum of the weights of the rows that are not ignored."""
    templates = launcher.templates("rows")
    grid = templates.counts_launch(rows.count)
    partials = rows.queue.empty((2 * grid.blocks,), rows.arithmetic)
    rows.queue.launch(
        grid,
        templates.compile_counts,
        (labels, weight, rows.sample_weight, rows.count, classes, ignore, partials),
        code=dispatch.code_of(rows.arithmetic),
        weighted=weight is not None,
        sample_weighted=rows.sample_weight is not None,
    )
    result = rows.queue.empty((), rows.arithmetic)
    device.finish(rows.queue, partials, 1.0, None, result)
    return result


def _attributed(distance, probability, keep, spread):
    q = keep * probability + spread
    return nm.where(q == 0, 0, q * distance)


# A class's part of a row's loss, by its weight: the probability that it has, smoothed, times -log softmax.
ATTRIBUTED = Scalars("attributed", 2, _attributed, options=(None, None))


def _by_weight(cls: type[ClassLoss], p: Problem, options: dict[str, Any], queue: Queue) -> DeviceArray:
    """The gradient by the class weights, in which the loss is linear."""
    # d/dq of the unweighted, unsmoothed loss is -log softmax, times what multiplies the row.
    distances = queue.empty(p.input.shape, p.arithmetic)
    plain = {**options, "label_smoothing": 0.0}
    cross_entropy(cls, p._replace(weight=None), plain, {"target": distances}, queue)
    axis = min(1, p.input.ndim - 1)
    smoothing = options["label_smoothing"]
    numbers = 1 - smoothing, smoothing / p.input.shape[axis]
    products = combined(ATTRIBUTED, distances, p.target, p.arithmetic, queue, numbers)
    result = queue.empty((p.input.shape[axis],), p.arithmetic)
    device.fold(products, result, (axis,))
    return result


# ---- nll_loss -----------------------------------------------------------------------------------------


def nll_loss(
    cls: type[ClassLoss], p: Problem, options: dict[str, Any], outputs: dict[str, Any], queue: Queue
) -> Any:
    templates, pick = launcher.templates("rows"), launcher.templates("pick")
    gradient, curvature = outputs.get("input"), outputs.get("curvature")
    arrays = [a for a in (p.input, gradient) if a is not None]
    axes = Axes(arrays)
    rows = Rows(p, options, arrays, class_rows(p.input.shape), axes, queue)
    terms = rows.terms()
    if curvature is not None:
        zero = queue.number(0, curvature.dtype)
        curvature.assign(zero.broadcast_to(curvature.shape))
    if not rows.count:
        return rows.finish(None, 1.0, None) if terms is None else terms
    batch, classes, inner = axes.extents
    weight = None if p.weight is None else device.flat(p.weight, (classes,), p.arithmetic, queue)
    labels, ignore = rows.over_rows(p.target, INT64), options["ignore_index"]
    divisor, by = rows.divisors(lambda: count_rows(rows, labels, weight, classes, ignore))
    faults = index_fault(cls, p, axes, queue)
    request = pick.Request(
        weighted=weight is not None,
        sample_weighted=rows.sample_weight is not None,
        upstream=rows.upstream is not None,
        terms=terms is not None,
    )
    grid = pick.pick_launch(rows.count)
    partials = None if terms is not None else queue.empty((2 * grid.blocks,), p.arithmetic)
    x = rows.straight(p.input)
    queue.launch(
        grid,
        pick.compile_pick,
        (
            *(x, labels, weight, rows.sample_weight, terms),
            *(rows.count, classes, inner, ignore, partials, faults),
        ),
        request=request._replace(upstream=False),
        code=rows.code,
        summed=partials is not None,
    )
    if gradient is not None:
        written = rows.written(gradient)
        vectors = whole_vectors(classes, inner, rows.storage) and device.aligned([written])
        plan = templates.plan(batch, classes, inner, rows.code, vectors)
        gradients_by = rows.gradients_by(by)
        queue.launch(
            (plan.blocks, plan.threads),
            pick.compile_put,
            (
                *(labels, weight, rows.sample_weight, rows.upstream, written),
                *(batch, classes, inner, plan.deal, ignore, rows.factor / divisor, gradients_by, faults),
            ),
            request=request._replace(terms=False),
            code=rows.code,
            plan=shape_free(plan),
            divided=gradients_by is not None,
            vectors=vectors,
        )
        rows.deliver(gradient, written)
    if device.SYNCHRONOUS:
        device.faults(queue.device).check()
    return rows.finish(partials, divisor, by) if terms is None else terms


# ---- margins ------------------------------------------------------------------------------------------


def margin_loss(
    cls: type[MarginLoss], p: Problem, options: dict[str, Any], outputs: dict[str, Any], queue: Queue
) -> Any:
    margins, shape = launcher.templates("margins"), p.input.shape
    outs = [outputs.get("input"), outputs.get("curvature")]
    arrays = [a for a in (p.input, *outs) if a is not None]
    rows = Rows(p, options, arrays, shape[:-1], InOrder(len(shape)), queue)
    terms = rows.terms()
    if not rows.count:
        return rows.finish(None, 1.0, None) if terms is None else terms
    classes, many = shape[-1], cls._many
    weight = None if p.weight is None else device.flat(p.weight, (classes,), p.arithmetic, queue)
    labels = device.flat(p.target, p.target.shape, INT64, queue)
    divisor, by = rows.divisors()
    gradients_by = rows.gradients_by(by) if outputs else None
    x, written = rows.straight(p.input), [rows.written(a) for a in outs]
    vectors = whole_vectors(classes, 1, rows.storage) and device.aligned([x, weight, *written])
    loss = margins.MANY if many else margins.ONE
    plan = margins.plan(loss, rows.count, classes, rows.code, vectors)
    request = margins.Request(
        loss,
        squared=options.get("p") == 2,
        weighted=weight is not None,
        sample_weighted=rows.sample_weight is not None,
        upstream=rows.upstream is not None,
        terms=terms is not None,
        grad=outs[0] is not None,
        curvature=outs[1] is not None,
    )
    partials = None if terms is not None else queue.empty((2 * plan.partials,), p.arithmetic)
    faults = _margin_fault(cls, shape)
    place = device.faults(queue.device).place(*faults)
    given = rows.sample_weight, rows.upstream, terms, written[0]
    ends = rows.factor / divisor, gradients_by, partials, place
    arguments: tuple[Any, ...]
    if many:
        scratch = queue.empty((margins.SCRATCH * classes * plan.blocks,), p.arithmetic)
        arguments = x, labels, *given, rows.count, classes, *ends, scratch
    else:
        numbers = rows.count, classes, plan.deal, options["margin"]
        arguments = x, labels, weight, *given, written[1], *numbers, *ends
    queue.launch(
        (plan.blocks, plan.threads),
        margins.compile_kernel,
        arguments,
        request=request,
        code=rows.code,
        plan=shape_free(plan),
        summed=partials is not None,
        divided=gradients_by is not None,
        vectors=vectors,
    )
    for array, w in zip(outs, written, strict=True):
        rows.deliver(array, w)
    if device.SYNCHRONOUS:
        device.faults(queue.device).check()
    return rows.finish(partials, divisor, by) if terms is None else terms


def _margin_fault(cls: type[MarginLoss], shape: tuple[int, ...]) -> tuple[Any, Any]:
    """What `device.Faults.place` wants; of several classes a row the position is that in the target."""
    name, indices = cls.function.__name__, shape if cls._many else shape[:-1]

    def error(position: int, label: int) -> IndexError:
        index = device.place_of(position, indices, tuple(range(len(indices))))
        return index_error(name, index, label, shape[-1])

    return (name, shape), error


def soft_margin(cls: Any, terms: Any, mode: str, how: str, call: dict[str, Any]) -> Any:
    """`multilabel_soft_margin_loss`, whose `terms` are an elementwise loss."""
    wrt = () if mode == VALUE else resolve_wrt(cls, call.get("wrt"))[0]
    if "weight" in wrt or (mode == VALUE_GRAD_HESS and wrt != ("input",)):
        return _soft_margin_by_elements(terms, mode, how, call)
    return run(cls, mode, call, soft_margin_by_rows)


def soft_margin_by_rows(
    cls: Any, p: Problem, options: dict[str, Any], outputs: dict[str, Any], queue: Queue
) -> Any:
    margins, shape = launcher.templates("margins"), p.input.shape
    outs = [outputs.get(n) for n in ("input", "target", "curvature")]
    arrays = [a for a in (p.input, p.target, *outs) if a is not None]
    rows = Rows(p, options, arrays, shape[:-1], InOrder(len(shape)), queue)
    terms = rows.terms()
    if not rows.count:
        return rows.finish(None, 1.0, None) if terms is None else terms
    classes, weight, pitch = shape[-1], None, 0
    if p.weight is not None:
        before = p.weight.shape[:-1]
        pitch = 0 if math.prod(before) == 1 else classes
        expanded = shape if pitch else (*before, classes)
        weight = device.flat(p.weight, expanded, p.arithmetic, queue)
    divisor, by = rows.divisors()
    gradients_by = rows.gradients_by(by) if outputs else None
    x, t = rows.straight(p.input), rows.straight(p.target)
    written = [rows.written(a) for a in outs]
    vectors = whole_vectors(classes, 1, rows.storage) and device.aligned([x, t, weight, *written])
    plan = margins.plan(margins.SOFT, rows.count, classes, rows.code, vectors)
    request = margins.Request(
        margins.SOFT,
        weighted=weight is not None,
        sample_weighted=rows.sample_weight is not None,
        upstream=rows.upstream is not None,
        terms=terms is not None,
        grad=outs[0] is not None,
        target_grad=outs[1] is not None,
        curvature=outs[2] is not None,
    )
    partials = None if terms is not None else queue.empty((2 * plan.partials,), p.arithmetic)
    queue.launch(
        (plan.blocks, plan.threads),
        margins.compile_kernel,
        (
            *(x, t, weight, rows.sample_weight, rows.upstream, terms, *written),
            *(rows.count, classes, pitch, plan.deal, rows.factor / divisor, gradients_by, partials),
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


def _soft_margin_by_elements(terms: Any, mode: str, how: str, call: dict[str, Any]) -> Any:
    name = terms.__name__
    call, queue = device.begin(name, call)
    shape = call["input"].shape
    rows, classes = shape[:-1], shape[-1]
    with queue.current():
        if call.get("sample_weight") is not None:
            weights = dispatch.as_array(name, "sample_weight", call["sample_weight"])
            if not broadcasts(weights.shape, rows):
                raise ValueError(
                    f"{name}: sample_weight of shape {weights.shape} does not broadcast to {rows}"
                )
            if isinstance(weights, DeviceArray):
                call["sample_weight"] = np.broadcast_to(weights, rows)[..., np.newaxis]
        # A mean over elements divides by the sum of their weights: that of the rows', times the classes.
        given = resolve_normalizer(name, call.get("normalizer"))
        call["reduction"], call["normalizer"] = "mean", None if given is None else given * classes
        if how == "sum":
            call["normalizer"] = float(classes)
        if how == "none":
            call["reduction"], call["normalizer"] = "none", None
            if mode != VALUE:
                call["grad_output"] = _averaged(name, call.get("grad_output"), shape)
        result = getattr(terms, mode if mode != VALUE else "__call__")(**call)
        if how != "none" or mode == GRAD:
            return result
        value, *gradients = result if mode != VALUE else (result,)
        found = device.wrap(value, queue)
        sums = queue.empty(rows, dispatch.arithmetic_dtype(found.dtype))
        device.fold(found.astype(found.dtype, copy=False), sums, range(len(rows)))
        means = queue.empty(rows, found.dtype)
        means.assign(sums * np.asarray(1 / classes))
        return means.owner if mode == VALUE else (means.owner, *gradients)


def _averaged(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    """`grad_output` of rows as that of their elements."""
    classes = shape[-1]
    if not isinstance(value, DeviceArray):
        factor, _ = upstream(name, value, shape[:-1], "none")
        return factor / classes
    up = dispatch.floating(name, "grad_output", value.as_upstream(name, shape[:-1], "none"))
    share = up.astype(dispatch.arithmetic_dtype(up.dtype)) * np.asarray(1 / classes)
    return np.broadcast_to(share[..., np.newaxis], shape) if share.ndim else share
