"""Elementwise losses: each term depends on one element of two or three arrays.

`loop` is the template: a run of contiguous elements of one dtype. `compile_block` binds it to a loss's scalar
functions and gives the C function that `drive` calls for each block. What a call does not ask for (a third
operand, weights, an upstream gradient, an output) is None in `loop`, and gone when compiled.
"""

import linecache
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from ..bind import adopted, bind, fingerprint
from ..layout import address_of, aligned_axes, is_same_memory, merged_axes
from ..spec import (
    BLOCK,
    DOUBLE,
    MISSING,
    SINGLE,
    VALUE,
    VALUE_GRAD_HESS,
    Elements,
    Memo,
    Quick,
    Request,
    Scalars,
    arithmetic_dtype,
    code_of,
    out_of_domain,
)
from . import drive, threads
from .arithmetic import inverse
from .packing import new, writeable
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


# ---- launching ----------------------------------------------------------------------------------------

# Elements from which two threads beat one: starting them costs about 6 us.
PARALLEL_FROM = 4 * BLOCK


@cache
def direct(parallel: bool) -> Any:
    """Return the driver of blocks over contiguous arrays."""
    return drive.compile_direct(parallel)


@cache
def staged(dtype: np.dtype, parallel: bool) -> Any:
    """Return the driver of blocks over arrays of any layout."""
    return drive.compile_staged(dtype, parallel)


def run_direct(function: int, arrays: tuple[np.ndarray, ...], numbers: tuple[float, ...]) -> Any:
    """Run a block kernel over flat, contiguous arrays of the arithmetic dtype."""
    if arrays[0].size < PARALLEL_FROM:
        return direct(False)(function, arrays, numbers)
    return threads.run(lambda: direct(False), lambda: direct(True), (function, arrays, numbers))


def run_blocks(
    kernel: Callable[[bool], int],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    in_place: Sequence[bool],
    numbers: tuple[float, ...],
    arithmetic: np.dtype,
) -> tuple[float, int]:
    """Run a block kernel over arrays of one shape and any layout.

    Parameters
    ----------
    kernel : callable
        ``kernel(in_place)`` gives the address of the kernel that overwrites its operands, or of the one that
        writes every output apart.
    inputs, outputs : sequences of arrays
        In the kernel's order, all of one shape; an input may be a broadcast view.
    in_place : sequence of bool
        Per output, whether it is the memory of one of the inputs.
    numbers : tuple of float
        The gradient's scale, then the options.

    Returns
    -------
    total, invalid : float, int
        The sum of the terms and the number of elements out of their domain.
    """
    arrays = aligned_axes([*inputs, *outputs])
    if all(a.dtype == arithmetic and a.flags.c_contiguous for a in arrays):
        kept = arrays[: len(inputs)] + [
            a for a, same in zip(arrays[len(inputs) :], in_place, strict=True) if not same
        ]
        flat = tuple(writeable(a.reshape(-1)) for a in kept)
        return run_direct(kernel(any(in_place)), flat, _padded(numbers))
    shape, strides = merged_axes(arrays)
    arguments = (
        kernel(False),
        np.array([address_of(a) for a in arrays], np.int64),
        np.array([code_of(a.dtype) for a in arrays], np.int64),
        np.array(shape, np.int64),
        np.array(strides, np.int64),
        len(inputs),
        np.array(numbers, np.float64),
        4 * numba.config.NUMBA_NUM_THREADS,
    )
    if arrays[0].size < PARALLEL_FROM:
        return staged(arithmetic, False)(*arguments)
    return threads.run(lambda: staged(arithmetic, False), lambda: staged(arithmetic, True), arguments)


def _padded(numbers: tuple[float, ...]) -> tuple[float, ...]:
    """Return numbers, to a multiple of four: the driver is compiled for the length of this tuple."""
    return numbers + (0.0,) * (-len(numbers) % 4)


_blocks = Memo()


def block(scalars: Scalars, request: Request, dtype: np.dtype) -> int:
    """Return the address of the kernel that serves a request."""
    key = scalars, request, dtype
    if key not in _blocks:
        try:
            _blocks[key] = compile_block(scalars, request, dtype)
        except NumbaError as error:
            raise _at_users_line(scalars, error) from error
    return _blocks[key].address


def _at_users_line(scalars: Scalars, error: NumbaError) -> TypeError:
    """Return Numba's error as one that leads to the line of the definition."""
    functions = [scalars.value, *(f for _, f in scalars.slopes)]
    file, line = functions[0].__code__.co_filename, functions[0].__code__.co_firstlineno
    text = str(error)
    for found in re.finditer(r'File "([^"]+)", line (\d+)', text):
        for f in functions:
            if Path(found[1]).name == Path(f.__code__.co_filename).name:
                file, line = f.__code__.co_filename, int(found[2])
    ours = ("During", "Failed in", "Overload", "Rejected", "File ", "- ", "->", "^", "[", "Known sig", " * ")
    stated = re.search(r"TypingError: (value must .*)", text)  # by the jets
    lines = [x.strip() for x in re.sub(r"\x1b\[\d*m", "", text).splitlines()]
    reasons = [x for x in lines if x and not x.startswith(ours) and "resolving callee" not in x]
    source = linecache.getline(file, line).strip()
    return TypeError(
        f"{scalars.name}: cannot be compiled and differentiated as it stands\n"
        f'  File "{file}", line {line}\n    {source}\n'
        f"{stated[1] if stated else reasons[0] if reasons else text}\n"
        "A loss's value may use arithmetic, if, abs, min, max and the functions of numbaloss.math."
    )


def run(p: Elements, outputs: dict[str, np.ndarray]) -> Any:  # type: ignore[no-redef]  # noqa: F811
    """Write the gradients by their operands' names, and ``"curvature"``; return the value.

    Outputs are of the terms' shape. An element out of its domain is an error, before anything is overwritten.
    """
    weighting, numbers, arity = p.weighting, p.numbers, len(p.operands)
    reduced = weighting.reduction != "none"
    scale = inverse(weighting.divisor)
    inputs = [a if a.shape == p.shape else np.broadcast_to(a, p.shape) for a in p.operands]
    weights = weighting.sample_weight
    if weights is not None:
        inputs.append(weights)
    if weighting.upstream is not None:
        inputs.append(weighting.upstream)
    terms = None
    if p.valued and not reduced:
        terms = np.empty(p.shape, p.dtype)
        if inputs[0].ndim and not inputs[0].flags.c_contiguous:
            terms = np.empty_like(inputs[0], dtype=p.dtype, subok=False)
    wrt = tuple(p.names.index(n) for n in outputs if n != "curvature")
    request = Request(
        weighted=weights is not None,
        upstream=weighting.upstream is not None,
        terms=terms is not None,
        wrt=wrt,
        curvature="curvature" in outputs,
    )
    total = 0.0
    if math.prod(p.shape):
        written = [*([] if terms is None else [terms]), *outputs.values()]
        in_place = [False] * (terms is not None)
        in_place += [
            n != "curvature" and is_same_memory(o, p.operands[p.names.index(n)]) for n, o in outputs.items()
        ]
        total = _run_request(
            p, request, inputs, written, in_place, (scale * weighting.factor, *numbers), arity
        )
    if not p.valued:
        return None
    return p.dtype.type(total * scale) if terms is None else terms


def _run_request(
    p: Elements,
    request: Request,
    inputs: list[np.ndarray],
    outputs: list[np.ndarray],
    in_place: list[bool],
    numbers: tuple[float, ...],
    arity: int,
) -> float:
    """Run the kernel, and return the terms' sum."""
    arithmetic: Any = p.arithmetic
    if any(p.scalars.domains) and any(in_place):
        first = Request(weighted=request.weighted)
        some = inputs[: arity + request.weighted]
        _, invalid = run_blocks(
            lambda _: block(p.scalars, first, arithmetic), some, [], [], numbers, arithmetic
        )
        if invalid:
            raise _refused(p.scalars, p.names, p.operands, p.weighting.sample_weight)
    overwritten = tuple(in_place[request.terms : request.terms + len(request.wrt)])

    def kernel(same: bool) -> int:
        return block(p.scalars, request._replace(in_place=overwritten) if same else request, arithmetic)

    total, invalid = run_blocks(kernel, inputs, outputs, in_place, numbers, arithmetic)
    if invalid:
        raise _refused(p.scalars, p.names, p.operands, p.weighting.sample_weight)
    return total


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


# ---- quick calls --------------------------------------------------------------------------------------


def quick(prepared: Quick, operands: tuple[Any, ...], out: Any) -> Any:
    """Serve the commonest call, plain arrays and a reduced value, with nothing that it does not need."""
    x = operands[0]
    dtype, shape, n = x.dtype, x.shape, x.size
    for a in operands:
        if a.__class__ is not np.ndarray or a.dtype is not dtype or a.shape != shape or not a.flags.carray:
            return MISSING
    in_place: tuple[bool, ...] = ()
    outputs: Any = ()
    if prepared.mode != VALUE:
        count = 2 if prepared.mode == VALUE_GRAD_HESS else len(prepared.wrt)
        if out is None:
            outputs = [new(shape, dtype, n) for _ in range(count)]
        else:
            outputs = (out,) if count == 1 and prepared.single else out
            found = _may_write(prepared, outputs, operands, count)
            if found is None:
                return MISSING
            in_place = found
    served = prepared.known.get((dtype, in_place))
    if served is None:
        served = prepared.known[(dtype, in_place)] = _prepare(prepared, dtype, in_place)
    function, padded, reduction = served
    if not function or not n:
        return MISSING
    arrays = (*operands, *outputs)
    if any(in_place):
        arrays = (*operands, *[o for o, same in zip(outputs, in_place, strict=True) if not same])
    if len(shape) != 1:
        arrays = tuple([a.reshape(-1) for a in arrays])
    scale = 1.0
    if reduction != "sum":
        scale = 1.0 / (n if reduction == "mean" else shape[0] if shape else 1)
    total, invalid = run_direct(function, arrays, (scale, *padded))
    if invalid:
        raise _refused(prepared.problem.scalars, prepared.problem.names, operands, None)
    return prepared.result(dtype.type(total * scale), outputs)


def _prepare(
    prepared: Quick, dtype: np.dtype, in_place: tuple[bool, ...]
) -> tuple[int, tuple[float, ...], str]:
    """Return the kernel's address, 0 where quick calls are not served; the options; and the reduction."""
    p = prepared.problem
    padded = p.numbers + (0.0,) * (-(len(p.numbers) + 1) % 4)
    if dtype not in (SINGLE, DOUBLE):
        return 0, padded, ""
    overwritten = in_place[: len(prepared.wrt)]
    request = Request(
        wrt=prepared.wrt,
        in_place=overwritten if any(overwritten) else (),
        curvature=prepared.mode == VALUE_GRAD_HESS,
    )
    return block(p.scalars, request, arithmetic_dtype(dtype)), padded, p.weighting.reduction


def _may_write(
    prepared: Quick, outputs: Any, operands: tuple[np.ndarray, ...], count: int
) -> tuple[bool, ...] | None:
    """Return which outputs are their operands; None unless each is plainly that, or memory of its own."""
    if outputs.__class__ is not tuple or len(outputs) != count:
        return None
    first = operands[0]
    in_place = []
    for k, o in enumerate(outputs):
        if (
            o.__class__ is not np.ndarray
            or o.dtype is not first.dtype
            or o.shape != first.shape
            or not o.flags.carray
        ):
            return None
        own = prepared.wrt[k] if k < len(prepared.wrt) else -1
        same = own >= 0 and o is operands[own]
        if same and any(prepared.problem.scalars.domains):
            return None
        for j, a in enumerate(operands):
            if not (same and j == own) and np.may_share_memory(o, a):
                return None
        for other in outputs[:k]:
            if np.may_share_memory(o, other):
                return None
        in_place.append(same)
    return tuple(in_place)
