"""Elementwise losses: each term depends on one element of two or three arrays.

`loop` is the kernel: contiguous arrays of one dtype. It calls `element` for each of theirs; `compile_kernel`
binds both to a loss's scalar functions. What a call does not ask for (a third operand, weights, an upstream
gradient, an output) is None, and gone when compiled.
"""

import math
from typing import Any

import numpy as np

from ..bind import gathered
from ..freeze import fingerprint, frozen
from ..layout import axes_in_order, index_at
from ..lift import lift_curvature, lift_function
from ..spec import (
    BY_ROWS,
    BY_WEIGHTS,
    Elements,
    Request,
    Scalars,
    arithmetic_dtype,
    code_of,
    out_of_domain,
)
from . import faults, reduce
from .arrays import DeviceArray, aligned, current_queue, flat, store_sum, total
from .reduce import (
    AHEAD,
    LANES,
    REPEAT,
    THREADS,
    WIDTH,
    T,
    add,
    array,
    counted,
    partial_sum,
    place,
    quotient,
    tiles,
)
from .target import (
    Binary,
    as_kernel,
    cgutils,
    compile,
    cuda,
    derivatives,
    device,
    each,
    floor_of,
    intrinsic,
    options,
    record,
    storage,
    tree_sum,
    types,
)

# What else the kernel is bound to, by `kernel`.
value: Any = None  # the definition
at0: Any = None  # the same with its derivatives by the first operand to differentiate,
at1: Any = None  # the second
at2: Any = None  # and the third, where there are so many
CURVED: Any = False  # the second derivative is asked for
last_if_floored: Any = None  # gives the number that it is not below, or None
outside: Any = None  # the operand that is out of its domain
unpack: Any = None  # gives the options as the definition takes them


def element(x, t, u, w, c, scale, o, floor):
    """Term, gradients, curvature of one element, and the operand that is out of its domain, or -1."""
    zero = T(0)
    if u is None:
        u = zero
    d0 = d1 = d2 = h = bad = None
    if at0 is None:
        v = value(x, t, u, o)
    else:
        v, slope, curvature = at0(x, t, u, o)
    f = scale
    keep = True
    if w is not None:
        # A zero weight gives exactly zero, also where the loss is NaN or infinite.
        keep = w != zero
        v = v * w
        f = f * w
    if outside is not None:
        bad = outside(x, t, u) if keep else -1
        if bad >= 0:
            v = f = T(np.nan)
    if w is not None:
        v = v if keep else zero
    if c is not None:
        f = f * c
    if at0 is not None:
        d0 = slope * f if keep else zero
    if at1 is not None:
        d1 = at1(x, t, u, o)[1] * f if keep else zero
    if at2 is not None:
        d2 = at2(x, t, u, o)[1] * f if keep else zero
    if CURVED:
        if floor is not None:
            curvature = floor if curvature < floor else curvature
        h = curvature * f if keep else zero
    return v, d0, d1, d2, h, bad


def report(bad, lane, at, faults):
    if bad >= 0:
        record(faults, at[lane // WIDTH] + lane % WIDTH, bad)
    return ()


def loop(x, t, u, w, c, terms, g0, g1, g2, h, n, factor, divisor, numbers, partials, faults):
    """Operands `x t u`, weights `w`, upstream `c`: write `terms`, gradients, curvature, partial sums, faults.

    A gradient is scaled by ``factor / divisor[0]``; `numbers` are the loss's options, and the curvature's
    floor. A gradient may lie over its operand: a thread reads what it needs before it writes.
    """
    scale = factor if divisor is None else quotient(factor, divisor[0])
    o, floor = unpack(numbers, scale), last_if_floored(numbers)
    hi = lo = T(0)
    vectors = n // WIDTH
    first = cuda.blockIdx.x * (THREADS * REPEAT) + cuda.threadIdx.x
    while first < vectors:
        at, there = each(place, (AHEAD,), (first, vectors))
        xs, ts, us = array.load_vectors(x, at), array.load_vectors(t, at), array.load_vectors(u, at)
        ws, cs = array.load_vectors(w, at), array.load_vectors(c, at)
        v, d0, d1, d2, k, bad = each(element, (xs, ts, us, ws, cs), (scale, o, floor))
        array.store_vectors(terms, at, there, v)
        array.store_vectors(g0, at, there, d0)
        array.store_vectors(g1, at, there, d1)
        array.store_vectors(g2, at, there, d2)
        array.store_vectors(h, at, there, k)
        if faults is not None:
            each(report, (bad, LANES), (at, faults))
        if partials is not None:
            hi, lo = add(hi, lo, tree_sum(each(counted, (v, LANES), (there,))[0]))
        first += cuda.gridDim.x * (THREADS * REPEAT)
    rest = vectors * WIDTH + cuda.threadIdx.x
    if cuda.blockIdx.x == 0 and rest < n:
        xi, ti, ui = array.load(x, rest), array.load(t, rest), array.load(u, rest)
        wi, ci = array.load(w, rest), array.load(c, rest)
        v, d0, d1, d2, k, bad = element(xi, ti, ui, wi, ci, scale, o, floor)
        array.store(terms, rest, v)
        array.store(g0, rest, d0)
        array.store(g1, rest, d1)
        array.store(g2, rest, d2)
        array.store(h, rest, k)
        if faults is not None:
            report(bad, 0, (rest,), faults)
        if partials is not None:
            hi, lo = add(hi, lo, v)
    if partials is not None:
        partial_sum(partials, hi, lo)


def finder(domains: tuple[tuple[float, float, bool] | None, ...], T: Any) -> Any:
    """The number of an element's first operand that is out of its domain, or -1; None if none can be."""

    def wrong(domain):
        if domain is None:
            return device(lambda x: False)
        low, high, nan = T(domain[0]), T(domain[1]), domain[2]
        if nan:
            return device(lambda x: (x < low) | (x > high))
        return device(lambda x: not ((x >= low) & (x <= high)))

    if not any(domains):
        return None
    first, second, third = map(wrong, domains)
    return device(lambda x, t, u: 0 if first(x) else 1 if second(t) else 2 if third(u) else -1)


def lift(scalars: Scalars, variable: int | None) -> Any:
    """The device function ``(x, t, u, options) -> value, slope, curvature`` in one operand.

    With no variable: the value alone.
    """
    jets = derivatives()
    definition = jets.jit(frozen(scalars.value))
    constant, parts = jets.seed(scalars.arity, None, scalars.absent), jets.parts

    @device
    def value(x, t, u, o):
        return parts(definition(*(constant(x, t, u) + o)), x)[0]

    if variable is None:
        return value
    seed = jets.seed(scalars.arity, variable, scalars.absent)
    override = dict(scalars.slopes).get(variable)
    if override is None:

        @device
        def derived(x, t, u, o):
            return parts(definition(*(seed(x, t, u) + o)), x)

        return derived
    slope = jets.jit(frozen(override))

    @device
    def stated(x, t, u, o):
        d = parts(slope(*(seed(x, t, u) + o)), x)
        return value(x, t, u, o), d[0], d[1]

    return stated


def kernel(scalars: Scalars, request: Request, code: int, vectors: bool = True) -> Any:
    """The kernel of one loss, for one request and storage, in plain Python.

    Gradients in place need none of their own: what a thread has read it has in registers.
    """
    array = storage(code, vectors)
    identity = (
        scalars.name,
        scalars.arity,
        fingerprint(scalars.value),
        [(k, fingerprint(f)) for k, f in scalars.slopes],
        scalars.options,
        scalars.domains,
        scalars.absent,
        [(p, k, fingerprint(f)) for p, k, f in scalars.curvatures],
        tuple(request._replace(in_place=())),
        code,
        vectors,
    )
    slopes: list[Any] = [lift(scalars, k) for k in request.wrt]
    if request.curvature:
        slopes[0] = lift_curvature(slopes[0], scalars, request.policy, request.wrt[0], derivatives())
    scope = dict(
        **tiles(array),
        value=lift(scalars, None),
        at0=None,
        at1=None,
        at2=None,
        CURVED=request.curvature,
        last_if_floored=floor_of(request.floored),
        outside=finder(scalars.domains, array.T),
        unpack=options(scalars.options),
    )
    scope.update(zip(("at0", "at1", "at2"), slopes, strict=False))
    return as_kernel(loop, scope, scalars.name, identity)


def signature(scalars: Scalars, request: Request, code: int, summed: bool, divided: bool) -> tuple[Any, ...]:
    """The types of `loop`'s arguments; ``none`` is passed as a null pointer."""
    array = storage(code)

    def given(present: Any, kind: Any = array.pointer) -> Any:
        return kind if present else types.none

    numbers = types.CPointer(array.arithmetic)
    arrays = [given(scalars.arity > k) for k in range(3)]
    arrays += [given(request.weighted), given(request.upstream), given(request.terms)]
    arrays += [given(len(request.wrt) > k) for k in range(3)]
    arrays += [given(request.curvature), types.int64, array.arithmetic, given(divided, numbers)]
    options = types.UniTuple(array.arithmetic, scalars.options.count(None) + request.floored)
    faults = given(any(scalars.domains), types.CPointer(types.int64))
    return (*arrays, options, given(summed, numbers), faults)


def compile_kernel(
    scalars: Scalars,
    request: Request,
    code: int,
    cc: tuple[int, int],
    summed: bool = True,
    divided: bool = False,
    vectors: bool = True,
) -> Binary:
    """Compile a loss's kernel for one request, storage and compute capability.

    Parameters
    ----------
    code : int
        The storage of all arrays (`kernels.spec`).
    summed : bool
        Whether the terms' partial sums are asked for.
    divided : bool
        Whether the gradient is divided by a number on the device.
    vectors : bool
        Whether all arrays start at multiples of 16 bytes.
    """
    types_ = signature(scalars, request, code, summed, divided)
    return compile(kernel(scalars, request, code, vectors), types_, cc, THREADS)


def compile_scalar(scalars: Scalars, names: tuple[str, ...], defaults: tuple[Any, ...]) -> Any:
    """The value of one element, to call in ``@cuda.jit`` code: ``scalar(input, target, <options>)``.

    It takes and gives what the function of `kernels.cpu.inside` does; `target.also_for_cuda` joins them.
    """
    jets = derivatives()
    definition, arity, parts = jets.jit(frozen(scalars.value)), scalars.arity, jets.parts
    arithmetic_of = jets.arithmetic_of

    @intrinsic
    def prepare(typingctx, arguments):
        """A zero of the arithmetic type, and the definition's arguments, those that are absent included."""
        given = tuple(arguments)
        arithmetic = arithmetic_of(given[:arity])
        const = jets.Const(arithmetic)
        kinds = [const] * (arity + len(scalars.absent))
        kinds += [t if isinstance(t, types.Boolean) else const for t in given[arity:]]
        result = types.Tuple([arithmetic, types.Tuple(kinds)])

        def codegen(context, builder, sig, args):
            values = cgutils.unpack_tuple(builder, args[0])
            constants = [context.get_constant(arithmetic, x) for x in scalars.absent]
            values[arity:arity] = constants
            origins = [*given[:arity], *[arithmetic] * len(constants), *given[arity:]]
            cast = [context.cast(builder, *of) for of in zip(values, origins, kinds, strict=True)]
            arguments = context.make_tuple(builder, types.Tuple(kinds), cast)
            zero = context.get_constant(arithmetic, 0)
            return context.make_tuple(builder, sig.return_type, [zero, arguments])

        return result(arguments), codegen

    @device
    def value(arguments):
        like, prepared = prepare(arguments)
        return parts(definition(*prepared), like)[0]

    return device(gathered(value, names, defaults, scalars.name))


def compile_derived(function: Any, names: tuple[str, ...], defaults: tuple[Any, ...], order: int) -> Any:
    """A function's value and derivatives, to call in ``@cuda.jit`` code."""
    lifted = lift_function(function, len(names), order, derivatives)
    return device(gathered(lifted, names, defaults, function.__name__))


# ---- launching ----------------------------------------------------------------------------------------


def _ratio(a, b):
    return a / b


def _sum(a, b):
    return a + b


def _difference(a, b):
    return a - b


# Arithmetic with arrays, by the kernel that losses have. EXCESS is its own slope: its gradient is the
# difference times scale, weights and upstream gradient.
RATIO = Scalars("ratio", 2, _ratio)
SUM = Scalars("sum", 2, _sum)
EXCESS = Scalars("excess", 2, _difference, ((0, _difference),))


def run(p: Elements, outputs: dict[str, DeviceArray]) -> Any:
    """Write the gradients by their operands' names, and ``"curvature"``; return the value.

    Outputs are of the terms' shape.
    """
    w, queue, arithmetic = p.weighting, current_queue(), p.arithmetic
    # A divisor that the data makes stays on the device.
    divisor: Any = divisor_of(p)
    scale = 1.0
    if not isinstance(divisor, DeviceArray):
        scale, divisor = inverse(divisor), None
    upstream, scaled_by = w.upstream, None
    if upstream is not None and not upstream.ndim:
        upstream, scaled_by = None, upstream
    inputs: list[Any] = [np.broadcast_to(a, p.shape) for a in p.operands]
    if w.sample_weight is not None:
        inputs.append(np.broadcast_to(w.sample_weight, p.shape))
    if upstream is not None:
        inputs.append(upstream)
    terms = None
    if p.valued and w.reduction == "none":
        terms = next(a for a in inputs if isinstance(a, DeviceArray)).empty_like(p.dtype)
    request = Request(
        weighted=w.sample_weight is not None,
        upstream=upstream is not None,
        terms=terms is not None,
        wrt=tuple(p.names.index(n) for n in outputs if n != "curvature"),
        curvature="curvature" in outputs,
    )
    if request.curvature:
        request = request._replace(policy=p.curvature, floored=p.floor is not None)
    partials = None
    if math.prod(p.shape):
        gradients_by = over(divisor, scaled_by, arithmetic) if outputs else None
        written = [*([] if terms is None else [terms]), *outputs.values()]
        partials = _run_request(p, request, inputs, written, scale * w.factor, gradients_by)
    if not p.valued or terms is not None:
        return terms
    value = queue.empty((), p.dtype)
    if partials is None:
        queue.fill(value, math.nan if divisor is not None else 0.0 * scale)
    else:
        store_sum(queue, partials, scale, divisor, value)
    return value


def divisor_of(p: Elements) -> Any:
    """Return what divides a problem's sum: a number, or what the weights sum to, a 0-d array."""
    if p.weighting.divisor is not None:
        return p.weighting.divisor
    size = math.prod(p.shape)
    if p.counts != BY_WEIGHTS or not size:
        return float(0 if p.counts == BY_WEIGHTS else (*p.shape, 1)[0] if p.counts == BY_ROWS else size)
    weights = p.weighting.sample_weight
    if not isinstance(weights, DeviceArray):
        return float(weights.sum(dtype=np.float64)) * (size / weights.size)
    return total(weights, size / weights.size, p.arithmetic)


def inverse(divisor: float) -> float:
    """Return 1 / divisor, as IEEE has it: a mean of nothing is NaN."""
    return 1.0 / divisor if divisor else math.nan


def _run_request(
    p: Elements,
    request: Request,
    inputs: list[Any],
    outputs: list[DeviceArray],
    factor: float,
    divisor: DeviceArray | None,
) -> DeviceArray | None:
    """Run the kernel over arrays of any layout and dtype; return the partial sums, if any."""
    queue, arithmetic = current_queue(), p.arithmetic
    given = [a for a in (*inputs, *outputs) if isinstance(a, DeviceArray)]
    storage = p.dtype if all(a.dtype == p.dtype for a in (*inputs, *outputs)) else arithmetic
    axes = axes_in_order(given)
    shape = tuple(p.shape[k] for k in axes)
    contiguous = [
        flat(a.transpose(axes) if isinstance(a, DeviceArray) else a, shape, storage, queue) for a in inputs
    ]
    ordered = [o.transpose(axes) for o in outputs]
    written = [
        o if o.dtype == storage and o.flags.c_contiguous else queue.empty(shape, storage) for o in ordered
    ]
    partials = None
    if p.valued and not request.terms:
        blocks = reduce.launch(math.prod(shape), arithmetic).blocks
        partials = queue.empty((2 * blocks,), arithmetic)
    slot = None
    if any(p.scalars.domains):
        shapes = {n: a.shape for n, a in zip(p.names, p.operands, strict=True)}
        slot = queue.slot(*_fault(p.scalars, shapes, p.shape, axes))
    numbers = (*p.numbers, p.floor) if request.floored and p.floor is not None else p.numbers
    launch(p.scalars, request, contiguous, written, factor, divisor, numbers, partials, slot)
    for o, w in zip(ordered, written, strict=True):
        if o is not w:
            o.assign(w)
    if slot is not None:
        faults.check_now(queue.device)
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
    slot: int | None,
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
    first.queue.launch(
        reduce.launch(first.size, arithmetic_dtype(first.dtype)),
        compile_kernel,
        (*arrays, first.size, factor, divisor, *numbers, partials, slot),
        scalars=scalars,
        request=request,
        code=code_of(first.dtype),
        summed=partials is not None,
        divided=divisor is not None,
        vectors=aligned(arrays),
    )


def _fault(
    scalars: Scalars, operands: dict[str, tuple[int, ...]], shape: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[Any, Any]:
    """Return a kind of call, and the error for a position and an operand's number."""
    names, shapes, domains, name = tuple(operands), tuple(operands.values()), scalars.domains, scalars.name

    def error(position: int, operand: int) -> ValueError:
        index, own = index_at(position, shape, axes), shapes[operand]
        at = tuple(0 if n == 1 else k for k, n in zip(index[len(index) - len(own) :], own, strict=True))
        return out_of_domain(name, names[operand], at, domains[operand])

    return (name, shape, axes, shapes), error


def combined(
    scalars: Scalars, a: Any, b: Any, dtype: np.dtype, numbers: tuple[float, ...] = ()
) -> DeviceArray:
    """Return the terms that a value of two operands gives."""
    queue = current_queue()
    shape = np.broadcast_shapes(a.shape, b.shape)
    arrays = [flat(x, shape, dtype, queue) for x in (a, b)]
    result = queue.empty(shape, dtype)
    if result.size:
        launch(scalars, Request(terms=True), arrays, [result], 1.0, None, numbers, None, None)
    return result


def over(divisor: Any, scaled_by: Any, dtype: np.dtype) -> DeviceArray | None:
    """Return the number that gradients are divided by, ``divisor / scaled_by``: 0-d arrays or None."""
    if scaled_by is None:
        return divisor
    return combined(RATIO, np.ones(()) if divisor is None else divisor, scaled_by, dtype)
