"""Elementwise losses: each term depends on one element of two or three arrays.

`loop` is the kernel: contiguous arrays of one dtype. It calls `element` for each of theirs; `compile_kernel`
binds both to a loss's scalar functions. What a call does not ask for (a third operand, weights, an upstream
gradient, an output) is None, and gone when compiled.
"""

from typing import Any

import numpy as np

from ..bind import adopted, bind, fingerprint
from ..cpu.inside import arithmetic_of, gathered
from ..spec import Request, Scalars
from .reduce import THREADS, add, quotient, tiles
from .target import (
    Binary,
    cgutils,
    compile,
    cuda,
    derivatives,
    device,
    each,
    intrinsic,
    options,
    record,
    storage,
    tree_sum,
    types,
)

# Bound by `kernel`; named here for readers and checkers.
array: Any = None
T: Any = np.float32
WIDTH: Any = 4
REPEAT: Any = 2
AHEAD: Any = (0, 256)
LANES: Any = (0, 1, 2, 3, 4, 5, 6, 7)
place: Any = None
counted: Any = None
store_partial: Any = None
value: Any = None
at0: Any = None
at1: Any = None
at2: Any = None
curved: Any = None
outside: Any = None
unpack: Any = None
at_element: Any = None
at_report: Any = None


def element(x, t, u, w, c, scale, o):
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
    if curved is not None:
        h = curvature * f if keep else zero
    return v, d0, d1, d2, h, bad


def report(bad, lane, at, faults):
    if bad >= 0:
        record(faults, at[lane // WIDTH] + lane % WIDTH, bad)
    return ()


def loop(x, t, u, w, c, terms, g0, g1, g2, h, n, factor, divisor, numbers, partials, faults):
    """Operands `x t u`, weights `w`, upstream `c`: write `terms`, gradients, curvature, partial sums, faults.

    A gradient is scaled by ``factor / divisor[0]``; `numbers` are the loss's options. A gradient may lie over
    its operand: a thread reads what it needs before it writes.
    """
    scale = factor if divisor is None else quotient(factor, divisor[0])
    o = unpack(numbers, scale)
    hi = lo = T(0)
    vectors = n // WIDTH
    first = cuda.blockIdx.x * (THREADS * REPEAT) + cuda.threadIdx.x
    while first < vectors:
        at, there = each(place, (AHEAD,), (first, vectors))
        xs, ts, us = array.load_vectors(x, at), array.load_vectors(t, at), array.load_vectors(u, at)
        ws, cs = array.load_vectors(w, at), array.load_vectors(c, at)
        v, d0, d1, d2, k, bad = each(at_element, (xs, ts, us, ws, cs), (scale, o))
        array.store_vectors(terms, at, there, v)
        array.store_vectors(g0, at, there, d0)
        array.store_vectors(g1, at, there, d1)
        array.store_vectors(g2, at, there, d2)
        array.store_vectors(h, at, there, k)
        if faults is not None:
            each(at_report, (bad, LANES), (at, faults))
        if partials is not None:
            hi, lo = add(hi, lo, tree_sum(each(counted, (v, LANES), (there,))[0]))
        first += cuda.gridDim.x * (THREADS * REPEAT)
    rest = vectors * WIDTH + cuda.threadIdx.x
    if cuda.blockIdx.x == 0 and rest < n:
        xi, ti, ui = array.load(x, rest), array.load(t, rest), array.load(u, rest)
        wi, ci = array.load(w, rest), array.load(c, rest)
        v, d0, d1, d2, k, bad = at_element(xi, ti, ui, wi, ci, scale, o)
        array.store(terms, rest, v)
        array.store(g0, rest, d0)
        array.store(g1, rest, d1)
        array.store(g2, rest, d2)
        array.store(h, rest, k)
        if faults is not None:
            at_report(bad, 0, (rest,), faults)
        if partials is not None:
            hi, lo = add(hi, lo, v)
    if partials is not None:
        store_partial(partials, hi, lo)


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
    definition = jets.jit(adopted(scalars.value))
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
    slope = jets.jit(adopted(override))

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
        tuple(request._replace(in_place=())),
        code,
        vectors,
    )
    slopes: list[Any] = [lift(scalars, k) for k in request.wrt]
    scope = dict(
        **tiles(array),
        value=lift(scalars, None),
        at0=None,
        at1=None,
        at2=None,
        curved=request.curvature or None,
        outside=finder(scalars.domains, array.T),
        unpack=options(scalars.options),
    )
    scope.update(zip(("at0", "at1", "at2"), slopes, strict=False))

    def made(template: Any, decorate: Any = device) -> Any:
        return bind(template, scope, scalars.name, identity, decorate)

    scope.update(at_element=made(element), at_report=made(report))
    return made(loop, lambda f: f)


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
    options = types.UniTuple(array.arithmetic, scalars.options.count(None))
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
    definition, arity, parts = jets.jit(adopted(scalars.value)), scalars.arity, jets.parts

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
