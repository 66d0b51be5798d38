"""Elementwise losses: each term depends on one element of two or three arrays.

`loop` is the template: a run of contiguous elements of one dtype. `compile_block` binds it to a loss's scalar
functions and gives the C function that `drive` calls for each block. What a call does not ask for (a third
operand, weights, an upstream gradient, an output) is None in `loop`, and gone when compiled.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from ..bind import adopted, bind, fingerprint
from ..spec import Request, Scalars
from .target import LOOP, SCALAR, DistinctArrays, derivatives, prefer_widest_vectors

# Bound by `compile_block`; named here for readers and checkers.
T: Any = np.float32
value: Any = None
at0: Any = None
at1: Any = None
at2: Any = None
valid: Any = None
options: Any = None
unpack: Any = None
overwrite: Any = None
run: Any = None

# Elements that are summed in the arithmetic dtype before the sum goes on in float64: few enough that a
# float32 sum is right to its last bits. A float64 sum in the loop itself would halve the vectors (Huber, in
# cache: twice the time); the length of a run, from 256 to 4096 elements, makes no difference in speed.
RUN = 256

SCRATCH = -1  # in place of a pointer's number


def loop(x, t, u, w, c, terms, g0, g1, g2, h, numbers, invalid):
    """One run: read operands `x t u`, weights `w`, upstream `c`; write `terms`, gradients, curvature.

    `numbers` points to the gradient's scale and then the options. The number of elements outside of the
    loss's domain is added to `invalid`. Returns the sum of the terms.
    """
    prefer_widest_vectors()
    zero = T(0)
    scale = T(numbers[0])
    o = options(numbers, zero)
    total = zero
    outside = 0
    for i in range(x.size):
        xi, ti = x[i], t[i]
        ui = zero if u is None else u[i]
        if g0 is None:
            v = value(xi, ti, ui, o)
        else:
            v, d0, h0 = at0(xi, ti, ui, o)
        ok = valid(xi, ti, ui)
        f = scale
        keep = True
        if w is not None:
            # A zero weight gives exactly zero, also where the loss is NaN or infinite.
            wi = w[i]
            keep = wi != zero
            ok = ok | (wi == zero)
            v = v * wi if keep else zero
            f = f * wi
        if c is not None:
            f = f * c[i]
        if g0 is not None:
            g0[i] = d0 * f if keep else zero
        if g1 is not None:
            d1 = at1(xi, ti, ui, o)[1]
            g1[i] = d1 * f if keep else zero
        if g2 is not None:
            d2 = at2(xi, ti, ui, o)[1]
            g2[i] = d2 * f if keep else zero
        if h is not None:
            h[i] = h0 * f if keep else zero
        if not ok:
            outside += 1
        if terms is not None:
            terms[i] = v
        else:
            total += v
    invalid[0] += outside
    return total


def entry(pointers, numbers, n, invalid):
    total = 0.0
    for start in range(0, n, RUN):
        count = min(RUN, n - start)
        x, t, u, w, c, terms, g0, g1, g2, h = unpack(pointers, start, count)
        total += run(x, t, u, w, c, terms, g0, g1, g2, h, numbers, invalid)
        overwrite(pointers, start, count, (g0, g1, g2))
    return total


SIGNATURE = types.float64(
    types.CPointer(types.int64), types.CPointer(types.float64), types.int64, types.CPointer(types.int64)
)


def _slots(arity: int, request: Request) -> list[int | None]:
    """For each array argument of `loop`: which pointer it is, or None; SCRATCH for what is copied later."""
    count = 0

    def take(present: bool) -> int | None:
        nonlocal count
        if not present:
            return None
        count += 1
        return count - 1

    operands = [take(k < arity) for k in range(3)]
    weights, upstream = take(request.weighted), take(request.upstream)
    terms = take(request.terms)
    gradients = [SCRATCH if same else take(True) for same in _in_place(request)]
    gradients += [None] * (3 - len(gradients))
    return [*operands, weights, upstream, terms, *gradients, take(request.curvature)]


def _in_place(request: Request) -> tuple[bool, ...]:
    return request.in_place or (False,) * len(request.wrt)


def _element(builder: Any, pointers: Any, slot: int, start: Any, kind: Any) -> Any:
    """The address of an array's element, from the table of pointers."""
    base = builder.load(builder.gep(pointers, [kind.context.get_constant(types.intp, slot)]))
    return builder.gep(builder.inttoptr(base, kind.pointer), [start])


def _unpacker(slots: list[int | None], dtype: types.Type) -> Any:
    """An intrinsic: `count` elements behind each pointer, as the arrays (or Nones) that `loop` takes."""
    array = types.Array(dtype, 1, "C")

    @intrinsic
    def unpack(typingctx, pointers, start, count):
        result = types.Tuple([types.none if s is None else array for s in slots])

        def codegen(context, builder, sig, args):
            kind = SimpleNamespace(context=context, pointer=context.get_data_type(dtype).as_pointer())
            size = context.get_constant(types.intp, dtype.bitwidth // 8)
            out = []
            for slot in slots:
                if slot is None:
                    out.append(context.get_dummy_value())
                    continue
                if slot == SCRATCH:
                    room = context.get_constant(types.intp, RUN)
                    data = cgutils.alloca_once(builder, context.get_data_type(dtype), size=room)
                else:
                    data = _element(builder, args[0], slot, args[1], kind)
                made = context.make_array(array)(context, builder)
                populate_array(made, data=data, shape=[args[2]], strides=[size], itemsize=size, meminfo=None)
                out.append(made._getvalue())
            return context.make_tuple(builder, sig.return_type, out)

        return result(pointers, types.intp, types.intp), codegen

    return unpack


def _overwriter(request: Request, dtype: types.Type) -> Any:
    """An intrinsic: copy the gradients that were computed in scratch memory over their operands.

    LLVM does not vectorise a loop that reads and writes one array through two arguments; the copy stays in
    the first-level cache.
    """

    @intrinsic
    def overwrite(typingctx, pointers, start, count, gradients):
        def codegen(context, builder, sig, args):
            kind = SimpleNamespace(context=context, pointer=context.get_data_type(dtype).as_pointer())
            for k, same in enumerate(_in_place(request)):
                if same:
                    array = context.make_array(sig.args[3][k])
                    source = array(context, builder, builder.extract_value(args[3], k)).data
                    target = _element(builder, args[0], request.wrt[k], args[1], kind)
                    cgutils.raw_memcpy(builder, target, source, args[2], dtype.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(pointers, types.intp, types.intp, gradients), codegen

    return overwrite


def checker(domains: tuple[tuple[float, float, bool] | None, ...], T: Any) -> Any:
    """Whether an element's operands lie in their domains."""

    def inside(domain):
        if domain is None:
            return njit(**SCALAR)(lambda x: True)
        low, high, nan = T(domain[0]), T(domain[1]), domain[2]
        if nan:
            return njit(**SCALAR)(lambda x: (not (x < low)) & (not (x > high)))
        return njit(**SCALAR)(lambda x: (x >= low) & (x <= high))

    first, second, third = map(inside, domains)
    return njit(**SCALAR)(lambda x, t, u: first(x) & second(t) & third(u))


def lift(scalars: Scalars, variable: int | None) -> Any:
    """The compiled function ``(x, t, u, options) -> value, slope, curvature`` in one operand.

    With no variable: the value alone.
    """
    jets = derivatives()
    definition = jets.jit(adopted(scalars.value))
    constant, parts = jets.seed(scalars.arity, None, scalars.absent), jets.parts

    @njit(**SCALAR)
    def value(x, t, u, o):
        return parts(definition(*(constant(x, t, u) + o)), x)[0]

    if variable is None:
        return value
    seed = jets.seed(scalars.arity, variable, scalars.absent)
    override = dict(scalars.slopes).get(variable)
    if override is None:

        @njit(**SCALAR)
        def derived(x, t, u, o):
            return parts(definition(*(seed(x, t, u) + o)), x)

        return derived
    slope = jets.jit(adopted(override))

    @njit(**SCALAR)
    def stated(x, t, u, o):
        d = parts(slope(*(seed(x, t, u) + o)), x)
        return value(x, t, u, o), d[0], d[1]

    return stated


def compile_block(scalars: Scalars, request: Request, dtype: np.dtype) -> Any:
    """The kernel of one loss for one request and arithmetic dtype, as a C function over one block."""
    T = dtype.type
    identity = (
        scalars.name,
        scalars.arity,
        fingerprint(scalars.value),
        [(k, fingerprint(f)) for k, f in scalars.slopes],
        scalars.options,
        scalars.domains,
        scalars.absent,
        tuple(request),
        dtype.name,
    )
    jets = derivatives()
    dtype_ = types.float32 if dtype == np.float32 else types.float64
    slopes: list[Any] = [lift(scalars, k) for k in request.wrt]
    slopes += [None] * (3 - len(slopes))
    inner = njit(pipeline_class=DistinctArrays, forceinline=True, **LOOP)
    scope = dict(
        T=T,
        value=lift(scalars, None),
        at0=slopes[0],
        at1=slopes[1],
        at2=slopes[2],
        valid=checker(scalars.domains, T),
        options=jets.options(scalars.options, start=1),
    )
    outer = dict(
        unpack=_unpacker(_slots(scalars.arity, request), dtype_),
        overwrite=_overwriter(request, dtype_),
        run=bind(loop, scope, scalars.name, identity, inner),
    )
    return bind(entry, outer, scalars.name, identity, cfunc(SIGNATURE, cache=True, **LOOP))
