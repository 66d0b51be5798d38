"""Elementwise losses: each term depends on one element of two or three arrays.

`loop` is the template: a run of contiguous elements of one dtype. `compile_block` binds it to a loss's scalar
functions and gives the C function that `drive` calls for each block. What a call does not ask for (a third
operand, weights, an upstream gradient, an output) is None in `loop`, and gone when compiled.
"""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from ..bind import bind
from ..compiler import DistinctArrays
from ..errors import at_users_line
from ..freeze import fingerprint, frozen
from ..layout import is_same_memory
from ..lift import lift_curvature
from ..math import select
from ..spec import (
    BLOCK,
    BY_ROWS,
    BY_TERMS,
    BY_WEIGHTS,
    Elements,
    Memo,
    Request,
    Scalars,
    code_of,
    out_of_domain,
)
from . import blocks
from .arrange import lay_address, order_axes_address
from .disk import kept_c
from .launch import CURVATURE, INCOMPLETE, TERMS, UNFIT, Launch, New
from .native import LINKED, smaller
from .strided import gatherer, scatterer
from .target import (
    LOOP,
    SCALAR,
    WIDTH,
    add_lanes,
    derivatives,
    interleave,
    new_lanes,
    prefer_widest_vectors,
    sum_of_lanes,
)

# Bound by `compile_block`; named here for readers and checkers.
T: Any = np.float32
value: Any = None
at0: Any = None
at1: Any = None
at2: Any = None
valid: Any = None
options: Any = None
one: Any = None
LANES: Any = 32
Z: Any = np.int32
CHECKED: Any = True
FLOORED: Any = False
FLOOR: Any = 1
unpack: Any = None
overwrite: Any = None
run: Any = None

# Elements that are summed in the arithmetic dtype, 16 or 32 a lane, before the sum goes on in float64: few
# enough that a float32 sum is right to its last bits. A float64 sum in the loop would halve the vectors
# (Huber, in cache: twice the time).
RUN = 1024

SCRATCH = -1  # in place of a pointer's number


def element(k, start, part, outside, x, t, u, w, c, terms, g0, g1, g2, h, o, scale, floor):
    """Add one element's term to lane `k`, and 1 where it is outside of the domain; write derivatives."""
    zero = T(0)
    i = np.uintp(start + k)
    xi, ti = x[i], t[i]
    ui = zero if u is None else u[i]
    if at0 is None:  # Numba would compile both branches of a test of an array
        v = value(xi, ti, ui, o)
    else:
        v, d0, h0 = at0(xi, ti, ui, o)
    ok = valid(xi, ti, ui)
    f = scale
    keep = True
    if w is not None:
        # A zero weight gives exactly zero, also where the loss is NaN or infinite. A branch here, beside
        # those of a definition, would keep LLVM from vectorising the loop.
        wi = w[i]
        keep = wi != zero
        ok = ok | (wi == zero)
        v = select(keep, v * wi, zero)
        f = f * wi
    if c is not None:
        f = f * c[i]
    if g0 is not None:
        g0[i] = select(keep, d0 * f, zero)
    if g1 is not None:
        d1 = at1(xi, ti, ui, o)[1]
        g1[i] = select(keep, d1 * f, zero)
    if g2 is not None:
        d2 = at2(xi, ti, ui, o)[1]
        g2[i] = select(keep, d2 * f, zero)
    if h is not None:
        if FLOORED:
            h0 = select(h0 < floor, floor, h0)
        h[i] = select(keep, h0 * f, zero)
    if terms is not None:
        terms[i] = v
    part[k] += v
    outside[k] += Z(0) if ok else Z(1)


def loop(x, t, u, w, c, terms, g0, g1, g2, h, numbers, sums, wrong):
    """One run: read operands `x t u`, weights `w`, upstream `c`; write `terms`, gradients, curvature.

    `numbers` points to the gradient's scale, then the options and the curvature's floor. Each of the sums in
    `sums` gets every so many-th term, whatever the processor's vectors and whatever else is computed; LLVM
    keeps those of a run in registers. The number of elements outside of the loss's domain is added to
    `wrong`.
    """
    prefer_widest_vectors()
    zero, none = T(0), Z(0)
    scale, floor = T(numbers[0]), zero
    if FLOORED:
        floor = T(numbers[FLOOR])
    o = options(numbers, zero)
    part, outside = new_lanes(LANES, zero), new_lanes(LANES, none)
    n = x.size
    whole = n - n % LANES
    for start in range(0, whole, LANES):
        interleave(one, LANES, (start, part, outside, x, t, u, w, c, terms, g0, g1, g2, h, o, scale, floor))
    if whole < n:
        rest, outside_rest = new_lanes(LANES, zero), new_lanes(LANES, none)
        for k in range(n - whole):
            one(k, whole, rest, outside_rest, x, t, u, w, c, terms, g0, g1, g2, h, o, scale, floor)
        add_lanes(part, rest, LANES)
        if CHECKED:
            for k in range(LANES):
                wrong[0] += outside_rest[k]
    add_lanes(sums, part, LANES)
    if CHECKED:
        for k in range(LANES):
            wrong[0] += outside[k]


def entry(pointers, numbers, n, invalid):
    sums = new_lanes(LANES, 0.0)
    for start in range(0, n, RUN):
        count = smaller(RUN, n - start)
        x, t, u, w, c, terms, g0, g1, g2, h = unpack(pointers, start, count)
        run(x, t, u, w, c, terms, g0, g1, g2, h, numbers, sums, invalid)
        overwrite(pointers, start, count, (g0, g1, g2))
    return sum_of_lanes(sums, LANES)


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

    anything = njit(**SCALAR)(lambda x: True)

    def inside(domain):
        if domain is None:
            return anything
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
    definition = jets.jit(frozen(scalars.value))
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
    slope = jets.jit(frozen(override))

    @njit(**SCALAR)
    def stated(x, t, u, o):
        d = parts(slope(*(seed(x, t, u) + o)), x)
        return value(x, t, u, o), d[0], d[1]

    return stated


def identity_of(scalars: Scalars) -> object:
    """Return all that a loss's kernels depend on."""
    return (
        scalars.name,
        scalars.arity,
        fingerprint(scalars.value),
        [(k, fingerprint(f)) for k, f in scalars.slopes],
        *scalars[4:7],
        [(p, k, fingerprint(f)) for p, k, f in scalars.curvatures],
    )


def compile_block(scalars: Scalars, request: Request, dtype: np.dtype) -> Any:
    """The kernel of one loss for one request and arithmetic dtype, as a C function over one block."""
    T = dtype.type
    identity = identity_of(scalars), tuple(request), dtype.name
    jets = derivatives()
    dtype_ = types.float32 if dtype == np.float32 else types.float64
    slopes: list[Any] = [lift(scalars, k) for k in request.wrt]
    if request.curvature:
        slopes[0] = lift_curvature(slopes[0], scalars, request.policy, request.wrt[0], jets)
    slopes += [None] * (3 - len(slopes))
    inner = njit(**LOOP | {"pipeline_class": DistinctArrays, "forceinline": True})
    lanes = dict(T=T, Z=np.int32 if dtype == np.float32 else np.int64, LANES=WIDTH // dtype.itemsize)
    scope = dict(
        lanes,
        value=lift(scalars, None),
        at0=slopes[0],
        at1=slopes[1],
        at2=slopes[2],
        valid=checker(scalars.domains, T),
        FLOORED=request.floored,
    )
    inside = dict(
        lanes,
        one=bind(element, scope, scalars.name, identity, njit(forceinline=True, **LINKED)),
        options=jets.options(scalars.options, start=1),
        CHECKED=any(scalars.domains),
        FLOORED=request.floored,
        FLOOR=1 + scalars.options.count(None),
    )
    outer = dict(
        lanes,
        unpack=_unpacker(_slots(scalars.arity, request), dtype_),
        overwrite=_overwriter(request, dtype_),
        run=bind(loop, inside, scalars.name, identity, inner),
    )
    return bind(entry, outer, scalars.name, identity, kept_c(SIGNATURE, **LOOP))


# ---- launching ----------------------------------------------------------------------------------------

# Elements from which two threads beat one: starting them costs about 6 us.
PARALLEL_FROM = 4 * BLOCK

_blocks = Memo()


def block(scalars: Scalars, request: Request, dtype: np.dtype) -> int:
    """Return the address of the kernel that serves a request."""
    key = scalars, request, dtype
    if key not in _blocks:
        try:
            _blocks[key] = compile_block(scalars, request, dtype)
        except NumbaError as error:
            stated = (f for _, f in scalars.slopes), (f for *_, f in scalars.curvatures)
            functions = scalars.value, *stated[0], *stated[1]
            raise at_users_line(scalars.name, functions, error) from error
    return _blocks[key].address


def new_terms(p: Elements) -> np.ndarray | None:
    """Return a new array for the terms, if they are asked for."""
    if not p.valued or p.weighting.reduction != "none":
        return None
    first = p.operands[0]
    if first.shape == p.shape and not first.flags.c_contiguous:
        return np.empty_like(first, dtype=p.dtype, subok=False)
    return np.empty(p.shape, p.dtype)


DIVIDE = {BY_TERMS: blocks.BY_ELEMENTS, BY_ROWS: blocks.BY_ROWS, BY_WEIGHTS: blocks.BY_WEIGHTS}


def pack(p: Elements, outputs: dict[str, np.ndarray], made: tuple[str, ...]) -> Launch:
    """Pack a problem for the driver of blocks: direct where arrays lie alike, else staged."""
    weighting, arithmetic = p.weighting, p.arithmetic
    inputs = [a for a in (*p.operands, weighting.sample_weight, weighting.upstream) if a is not None]
    wrt = tuple(p.names.index(n) for n in outputs if n not in (CURVATURE, TERMS))
    over = [n in p.names and is_same_memory(o, p.operands[p.names.index(n)]) for n, o in outputs.items()]
    request = Request(
        weighted=weighting.sample_weight is not None,
        upstream=weighting.upstream is not None,
        terms=TERMS in outputs,
        wrt=wrt,
        curvature=CURVATURE in outputs,
    )
    if request.curvature:
        request = request._replace(policy=p.curvature, floored=p.floor is not None)
    written = list(outputs.values())
    before = None
    if any(over):
        if any(p.scalars.domains):  # nothing is overwritten before all is found to be right
            before = pack(p._replace(valued=True, weighting=weighting._replace(upstream=None)), {}, ())
        if lie_alike([*inputs, *written], arithmetic):
            request = request._replace(in_place=tuple(over[request.terms : request.terms + len(wrt)]))
            written = [o for o, same in zip(written, over, strict=True) if not same]
            over = [False] * len(written)
    arrays = [*inputs, *written]
    alike = lie_alike(arrays, arithmetic)
    driver, task = (blocks.direct_entry(), 0) if alike else blocks.staged_driver()
    codes = [code_of(a.dtype) for a in arrays]
    spread = tuple(k for k, a in enumerate(p.operands) if a.shape != p.shape)
    for k in range(len(inputs)):  # weights may be broadcast in any call
        if k not in spread and inputs[k] is not weighting.sample_weight:
            codes[k] += blocks.EXACT
    codes[len(inputs) :] = [
        c + blocks.APART * same for c, same in zip(codes[len(inputs) :], over, strict=True)
    ]
    by = blocks.BY_NUMBER
    if weighting.divisor is None or weighting.divisor == 1:
        by = DIVIDE[p.counts] if weighting.divisor is None else blocks.BY_ONE
    recipe = [block(p.scalars, request, arithmetic), len(arrays), len(inputs), by, len(p.operands)]
    recipe += [arithmetic.itemsize, 0, 0, blocks.weights_address() if by == blocks.BY_WEIGHTS else 0, 0]
    recipe += [0, 0] if alike else [order_axes_address(), lay_address()]
    recipe += [4 * numba.config.NUMBA_NUM_THREADS, *codes]
    numbers = [1.0 if weighting.divisor is None else weighting.divisor, weighting.factor, *p.numbers]
    numbers += [p.floor] if request.floored else []
    slots = {n: next(k for k, a in enumerate(arrays) if a is outputs[n]) for n in made}
    like = {CURVATURE: wrt[0] if wrt else 0, TERMS: 0}
    new = tuple(New(slots[n], like[n] if n in like else p.names.index(n)) for n in made)
    return Launch(
        driver, np.array(recipe), np.array(numbers), tuple(arrays), task, PARALLEL_FROM, new,
        complete(arithmetic), before, spread,
    )  # fmt: skip


def lie_alike(arrays: Sequence[np.ndarray], dtype: np.dtype) -> bool:
    """Return whether arrays are of one shape and dtype, and contiguous in the same order of axes."""
    shape = arrays[0].shape
    return all(a.dtype == dtype and a.shape == shape for a in arrays) and (
        all(a.flags.c_contiguous for a in arrays) or all(a.flags.f_contiguous for a in arrays)
    )


@cache
def complete(dtype: np.dtype) -> Any:
    """Return a function that compiles what a recipe misses."""

    def with_missing(recipe: np.ndarray, status: int) -> None:
        missing = INCOMPLETE - status
        if missing & blocks.NO_GATHER:
            recipe[blocks.GATHER] = gatherer(dtype)
        if missing & blocks.NO_SCATTER:
            recipe[blocks.SCATTER] = scatterer(dtype)
        if missing & blocks.NO_TASK:
            recipe[blocks.BLOCK_TASK] = blocks.block_task()

    return with_missing


def refuse(p: Elements, status: int) -> Exception:
    """Return the error for a call that a driver refused."""
    if status == UNFIT:
        shapes = ", ".join(str(a.shape) for a in p.operands)
        return ValueError(f"{p.name}: arrays of shapes {shapes} do not fit together")
    return _refused(p.scalars, p.names, p.operands, p.weighting.sample_weight)


def _refused(
    scalars: Scalars, names: Sequence[str], operands: Sequence[np.ndarray], weights: Any
) -> ValueError:
    """Return the error for the first element out of its domain."""
    for n, a, domain in zip(names, operands, scalars.domains, strict=False):
        if domain is None:
            continue
        low, high, nan = domain
        x = np.asarray(a, dtype=np.float64)
        bad = ~((x >= low) & (x <= high))
        if nan:
            bad &= ~np.isnan(x)
        if weights is not None:
            shape = np.broadcast_shapes(weights.shape, x.shape)
            bad = np.broadcast_to(bad, shape) & (weights != 0)
            x = np.broadcast_to(x, shape)
        if bad.any():
            index = tuple(map(int, np.argwhere(bad)[0]))
            return out_of_domain(scalars.name, n, index, domain, x[index])
    raise AssertionError("a kernel found an element out of its domain that NumPy does not find")
