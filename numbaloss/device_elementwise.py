"""The elementwise family on CUDA devices: which kernels a call takes, and what they are given."""

import math
from typing import Any, NamedTuple

import numpy as np

from . import device, dispatch, launcher
from .device import DeviceArray, Queue
from .elementwise import Call, Plan, _broadcast_to, _inverse
from .kernels.spec import Request, Scalars
from .loss import GRAD, MISSING, VALUE, VALUE_AND_GRAD, VALUE_GRAD_HESS, upstream


def _product(a, b):
    return a * b


def _ratio(a, b):
    return a / b


def _sum(a, b):
    return a + b


def _difference(a, b):
    return a - b


# Arithmetic with arrays, by the kernel that losses have. EXCESS is its own slope: its gradient is the
# difference times scale, weights and upstream gradient.
PRODUCT = Scalars("product", 2, _product)
RATIO = Scalars("ratio", 2, _ratio)
SUM = Scalars("sum", 2, _sum)
EXCESS = Scalars("excess", 2, _difference, ((0, _difference),))


class Quick(NamedTuple):
    """What serves quick calls on arrays of one shape and dtype."""

    kernel: launcher.Kernel
    blocks: int
    threads: int
    finish: launcher.Kernel
    finish_threads: int
    scale: float
    fault: tuple[Any, Any] | None


def quick(plan: Plan, operands: tuple[Any, ...], out: Any) -> Any:
    """The commonest call: contiguous arrays of one library, dtype and shape, and a reduced value.

    Returns MISSING where the call is not of that kind; whatever is wrong with it is found there.
    """
    first = operands[0]
    kind = first.__class__
    library = device.library_of(kind)
    look = library.look
    if look is None or len(plan.positions) < len(plan.wrt):
        return MISSING
    address, dtype, shape, on, plain = look(first)
    addresses = [address]
    together = address
    for a in operands[1:]:
        if a.__class__ is not kind:
            return MISSING
        address, *rest = look(a)
        if rest != [dtype, shape, on, True]:
            return MISSING
        addresses.append(address)
        together |= address
    n = math.prod(shape)
    if not plain or not n or dtype is None or dispatch.code_of(dtype) is None or together % dtype.itemsize:
        return MISSING
    driver = launcher.driver()
    entered = driver.enter(on)
    try:
        outputs: Any = ()
        if plan.outputs:
            if out is None:
                outputs = [library.empty(shape, dtype, on) for _ in range(plan.outputs)]
                places = [library.address(o) for o in outputs]
            else:
                outputs = (out,) if plan.outputs == 1 and plan.single else out
                found = _may_write(plan, outputs, addresses, (kind, dtype, shape, on), n * dtype.itemsize)
                if found is None:
                    return MISSING
                places = found
            for address in places:
                together |= address
        vectors = not together % device.VECTOR_BYTES
        key = plan, dtype, shape, on, vectors
        made = launcher.recipes.get(key)
        if made is None:
            made = launcher.recipes[key] = _prepare(*key)
        arithmetic = dispatch.arithmetic_dtype(dtype)
        partials = value = 0
        if plan.mode != GRAD:
            scratch = library.empty((2 * made.blocks,), arithmetic, on)
            result = library.empty((), dtype, on)
            partials, value = library.address(scratch), library.address(result)
        faults = 0
        if made.fault is not None:
            faults = device.faults(on).place(*made.fault)
        absent = [0] * (3 - len(operands))
        arguments = [*addresses, *absent, 0, 0, 0]
        if plan.outputs:
            curved = plan.mode == VALUE_GRAD_HESS
            gradients = places[:1] if curved else places
            arguments += [*gradients, *[0] * (3 - len(gradients)), places[1] if curved else 0]
        else:
            arguments += [0, 0, 0, 0]
        stream = library.stream(on)
        driver.launch(
            made.kernel,
            made.blocks,
            made.threads,
            stream,
            (*arguments, n, made.scale, 0, *plan.numbers, partials, faults),
        )
        if value:
            driver.launch(
                made.finish, 1, made.finish_threads, stream, (partials, made.blocks, made.scale, 0, value)
            )
        if faults and device.SYNCHRONOUS:
            device.faults(on).check()
    finally:
        if entered:
            driver.leave()
    if plan.mode == VALUE:
        return result
    if plan.mode == VALUE_GRAD_HESS:
        return result, *outputs
    gradient = outputs[0] if plan.single else tuple(outputs)
    return gradient if plan.mode == GRAD else (result, gradient)


def _may_write(plan: Plan, outputs: Any, addresses: list[int], like: Any, size: int) -> list[int] | None:
    """The outputs' addresses; None unless each is plainly its operand, or memory of its own."""
    if outputs.__class__ is not tuple or len(outputs) != plan.outputs:
        return None
    kind, *wanted = like
    look = device.library_of(kind).look
    assert look is not None
    found: list[int] = []
    for k, o in enumerate(outputs):
        if o.__class__ is not kind:
            return None
        address, *rest = look(o)
        if rest != [*wanted, True]:
            return None
        own = plan.positions[k] if k < len(plan.positions) else -1
        for j, other in enumerate((*addresses, *found)):
            if abs(other - address) < size and (j != own or other != address):
                return None
        found.append(address)
    return found


def _prepare(plan: Plan, dtype: np.dtype, shape: tuple[int, ...], on: int, vectors: bool) -> Quick:
    """What quick calls on such arrays need."""
    names = plan.cls._required
    scalars = plan.cls._scalars(plan.statics, len(names))
    request = Request(wrt=plan.positions, curvature=plan.mode == VALUE_GRAD_HESS)
    code, n = dispatch.code_of(dtype), math.prod(shape)
    reduce, elementwise = launcher.templates("reduce"), launcher.templates("elementwise")
    grid = reduce.launch(n, dispatch.arithmetic_dtype(dtype))
    (kernel,) = launcher.kernels(
        on,
        elementwise.compile_kernel,
        scalars=scalars,
        request=request,
        code=code,
        summed=plan.mode != GRAD,
        divided=False,
        vectors=vectors,
    )
    (finish,) = launcher.kernels(on, reduce.compile_finish, code=code, divided=False)
    count = n if plan.reduction == "mean" else shape[0] if shape else 1
    scale = 1.0 if plan.reduction == "sum" else 1.0 / count
    fault = None
    if any(scalars.domains):
        fault = _fault(scalars, dict.fromkeys(names, shape), shape, tuple(range(len(shape))))
    return Quick(kernel, grid.blocks, grid.threads, finish, reduce.FINISH_THREADS, scale, fault)


def evaluate(plan: Plan, call: dict[str, Any]) -> Any:
    """A call with arrays on a device."""
    name = plan.cls.function.__name__
    described, queue = device.begin(name, call)
    for n in plan.wrt:
        if call.get(n) is not None and not isinstance(described[n], DeviceArray):
            raise TypeError(f"{name}: {n} must be an array on the device to be differentiated")
    with queue.current():
        result = _evaluate(plan, described, call, queue)
    return owner(result)


def owner(result: Any) -> Any:
    """Results as the caller's library has them."""
    if isinstance(result, DeviceArray):
        return result.owner
    return tuple(map(owner, result)) if isinstance(result, tuple) else result


def _evaluate(plan: Plan, call: dict[str, Any], given: dict[str, Any], queue: Queue) -> Any:
    cls, mode, reduction = plan.cls, plan.mode, plan.reduction
    name = cls.function.__name__
    c = cls._check(plan, call)
    arithmetic = dispatch.arithmetic_dtype(c.dtype)
    # A divisor that the data makes stays on the device.
    divisor = c.divisor if isinstance(c.divisor, DeviceArray) else None
    scale = 1.0 if reduction in ("none", "sum") or divisor is not None else _inverse(c.divisor)
    up: Any = call.get("grad_output")
    scaled_by, factor = None, 1.0
    if not isinstance(up, DeviceArray):
        factor, up = upstream(name, up, c.shape, reduction)
    else:
        up = dispatch.floating(name, "grad_output", up.as_upstream(name, c.shape, reduction))
        if not up.ndim:
            up, scaled_by = None, up
    gradients_by = over(divisor, scaled_by, arithmetic, queue) if mode != VALUE else None
    if "weight" in plan.wrt:
        return _with_weight_gradient(plan, call, given, c, scale * factor, gradients_by, up, queue)

    inputs: list[Any] = [_broadcast_to(c.operands[n], c.shape) for n in cls._arrays if n in c.operands]
    if c.weights is not None:
        inputs.append(c.weights)
    if up is not None:
        inputs.append(up)
    made: Any = cls._gradient_arrays(plan, call, c, arithmetic)
    results, targets, _ = made
    terms = None
    if reduction == "none" and mode != GRAD:
        first = next(a for a in inputs if isinstance(a, DeviceArray))
        terms = first.empty_like(c.dtype)
    request = Request(
        weighted=c.weights is not None,
        upstream=up is not None,
        terms=terms is not None,
        wrt=tuple(map(cls._arrays.index, plan.wrt)),
        curvature=mode == VALUE_GRAD_HESS,
    )
    summed = terms is None and mode != GRAD
    outputs = ([] if terms is None else [terms]) + targets
    partials = None
    if math.prod(c.shape):
        scalars = cls._scalars(plan.statics, len(c.operands))
        partials = _run(
            scalars, request, c, inputs, outputs, scale * factor, gradients_by, plan.numbers, summed, queue
        )
    names = plan.wrt * 2 if mode == VALUE_GRAD_HESS else plan.wrt
    for n, r, t in zip(names, results, targets, strict=True):
        if r is not t:
            result: Any = cls._broadcast(name, n, r, c.shape)
            device.fold(t, result)
    gradient = results[0] if plan.single and mode != VALUE_GRAD_HESS and results else tuple(results)
    if mode == GRAD:
        return gradient
    value = terms
    if value is None:
        value = queue.empty((), c.dtype)
        if partials is None:
            queue.fill(value, math.nan if divisor is not None else 0.0 * scale)
        else:
            device.finish(queue, partials, scale, divisor, value)
    if mode == VALUE:
        return value
    return (value, *results) if mode == VALUE_GRAD_HESS else (value, gradient)


def over(divisor: Any, scaled_by: Any, dtype: np.dtype, queue: Queue) -> DeviceArray | None:
    """What gradients are divided by: ``divisor / scaled_by``, of 0-d arrays or None."""
    if scaled_by is None:
        return divisor
    return combined(RATIO, np.ones(()) if divisor is None else divisor, scaled_by, dtype, queue)


def multiplied(a: Any, b: Any, dtype: np.dtype, queue: Queue) -> DeviceArray:
    """The product of two arrays, or an array and a number."""
    return combined(PRODUCT, a, b, dtype, queue)


def combined(
    scalars: Scalars, a: Any, b: Any, dtype: np.dtype, queue: Queue, numbers: tuple[float, ...] = ()
) -> DeviceArray:
    """The terms that a value of two operands gives."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    arrays = [device.flat(x, shape, dtype, queue) for x in (a, b)]
    result = queue.empty(shape, dtype)
    if result.size:
        launch(scalars, Request(terms=True), arrays, [result], 1.0, None, numbers, None, None, queue)
    return result


def _run(
    scalars: Scalars,
    request: Request,
    c: Call,
    inputs: list[Any],
    outputs: list[DeviceArray],
    factor: float,
    divisor: DeviceArray | None,
    numbers: tuple[float, ...],
    summed: bool,
    queue: Queue,
) -> DeviceArray | None:
    """Run a loss's kernel over arrays of any layout and dtype; give the partial sums, if asked for."""
    given = [a for a in (*inputs, *outputs) if isinstance(a, DeviceArray)]
    arithmetic = dispatch.arithmetic_dtype(c.dtype)
    storage = c.dtype if all(a.dtype == c.dtype for a in (*inputs, *outputs)) else arithmetic
    axes = dispatch.axes_in_order(given)
    shape = tuple(c.shape[k] for k in axes)
    straight = [
        device.flat(a.transpose(axes) if isinstance(a, DeviceArray) else a, shape, storage, queue)
        for a in inputs
    ]
    ordered = [o.transpose(axes) for o in outputs]
    written = [
        o if o.dtype == storage and o.flags.c_contiguous else queue.empty(shape, storage) for o in ordered
    ]
    partials = None
    if summed:
        blocks = launcher.templates("reduce").launch(math.prod(shape), arithmetic).blocks
        partials = queue.empty((2 * blocks,), arithmetic)
    found = place = None
    if any(scalars.domains):
        found = device.faults(queue.device)
        place = found.place(*_fault(scalars, {n: a.shape for n, a in c.operands.items()}, c.shape, axes))
    launch(scalars, request, straight, written, factor, divisor, numbers, partials, place, queue)
    for o, w in zip(ordered, written, strict=True):
        if o is not w:
            o.assign(w)
    if found is not None and device.SYNCHRONOUS:
        found.check()
    return partials


def launch(
    scalars: Scalars,
    request: Request,
    inputs: list[DeviceArray],
    outputs: list[DeviceArray],
    factor: float,
    divisor: DeviceArray | None,
    numbers: tuple[float, ...],
    partials: DeviceArray | None,
    faults: int | None,
    queue: Queue,
) -> None:
    """Launch the kernel over contiguous arrays of one dtype."""
    first = inputs[0]
    arrays: list[Any] = [*inputs[: scalars.arity], *[None] * (3 - scalars.arity)]
    rest = iter(inputs[scalars.arity :])
    arrays += [next(rest) if wanted else None for wanted in (request.weighted, request.upstream)]
    rest = iter(outputs)
    arrays.append(next(rest) if request.terms else None)
    arrays += [next(rest) if k < len(request.wrt) else None for k in range(3)]
    arrays.append(next(rest) if request.curvature else None)
    queue.launch(
        launcher.templates("reduce").launch(first.size, dispatch.arithmetic_dtype(first.dtype)),
        launcher.templates("elementwise").compile_kernel,
        (*arrays, first.size, factor, divisor, *numbers, partials, faults),
        scalars=scalars,
        request=request,
        code=dispatch.code_of(first.dtype),
        summed=partials is not None,
        divided=divisor is not None,
        vectors=device.aligned(arrays),
    )


def _fault(
    scalars: Scalars, operands: dict[str, tuple[int, ...]], shape: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[Any, Any]:
    """What `Faults.place` wants: a kind of call, and the error for a position and an operand's number."""
    names, shapes = tuple(operands), tuple(operands.values())

    def error(position: int, operand: int) -> ValueError:
        index, own = device.place_of(position, shape, axes), shapes[operand]
        at = [0 if n == 1 else k for k, n in zip(index[len(index) - len(own) :], own, strict=True)]
        domain = scalars.domains[operand]
        assert domain is not None
        low, high, _ = domain
        wanted = f"in [{low:g}, {high:g}]" if np.isfinite(high) else f">= {low:g}"
        n = names[operand]
        where = f"[{', '.join(map(str, at))}]" if at else ""
        return ValueError(f"{scalars.name}: {n} must be {wanted}, but {n}{where} is not")

    return (scalars.name, shape, axes, shapes), error


def _with_weight_gradient(
    plan: Plan,
    call: dict[str, Any],
    given: dict[str, Any],
    c: Call,
    factor: float,
    divisor: DeviceArray | None,
    up: DeviceArray | None,
    queue: Queue,
) -> Any:
    """Gradients that include the one by `weight`, which is ``(term - value) * sample_weight / divisor``.

    The value is there where the divisor is a sum of weights too: d(sum w l / sum w) = (l - value) / sum w.
    """
    cls = plan.cls
    name = cls.function.__name__
    if plan.mode == VALUE_GRAD_HESS:
        raise ValueError(f"{name}: the loss is linear in weight; value_grad_hess needs another wrt")
    if "weight" not in call or c.weight is None:
        raise ValueError(f"{name}: wrt names 'weight', which is not given")
    others = tuple(n for n in plan.wrt if n != "weight")
    position = plan.wrt.index("weight")
    outs = call.get("out")
    outs = (outs,) if plan.single and outs is not None else outs
    if outs is None:
        target: Any = np.empty_like(c.weight)
    else:
        if not isinstance(outs, tuple | list) or len(outs) != len(plan.wrt):
            raise TypeError(f"{name}: out must be a tuple of {len(plan.wrt)} arrays")
        target = outs[position]
        arrays = [(n, a) for n, a in (*c.operands.items(), ("weight", c.weight)) if a is not None]
        dispatch.check_out(name, "weight", target, c.weight, arrays)

    arithmetic = dispatch.arithmetic_dtype(c.dtype)
    valued = {k: v for k, v in given.items() if k not in ("wrt", "out", "grad_output")}
    bare = {n: v for n, v in valued.items() if n not in ("weight", "sample_weight", "normalizer")}
    terms = device.wrap(cls.function(**{**bare, "reduction": "none"}), queue)
    value = cls.function(**valued) if plan.mode == VALUE_AND_GRAD and not others else None
    subtracted: Any = np.zeros(())
    if plan.reduction not in ("none", "sum") and cls.weight_in_divisor and call.get("normalizer") is None:
        subtracted = device.wrap(cls.function(**valued) if value is None else value, queue)
    inputs = [device.flat(a, c.shape, arithmetic, queue) for a in (terms, subtracted)]
    if c.sample_weight is not None:
        inputs.append(device.flat(c.sample_weight, c.shape, arithmetic, queue))
    if up is not None:
        inputs.append(device.flat(up, c.shape, arithmetic, queue))
    full = queue.empty(c.shape, arithmetic)
    request = Request(weighted=c.sample_weight is not None, upstream=up is not None, wrt=(0,))
    if full.size:
        launch(EXCESS, request, inputs, [full], factor, divisor, (), None, None, queue)

    gradients: list[Any] = []
    if others:
        arguments = {**given, "wrt": others}
        if outs is not None:
            arguments["out"] = tuple(o for k, o in enumerate(given["out"]) if k != position)
        value, found = cls.function.value_and_grad(**arguments)
        gradients = list(found)
    device.fold(full, target)
    gradients.insert(position, target)
    result = gradients[0] if plan.single else tuple(gradients)
    return result if plan.mode == GRAD else (value, result)
