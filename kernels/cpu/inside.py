"""Losses inside the caller's own compiled code: a function of one element, and one over whole arrays.

They are compiled with the caller's function and become part of it, cache included. Both take options by
position or keyword, with the loss's defaults.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from ..bind import adopted, bind, gathered
from ..spec import Scalars
from .elementwise import RUN, checker, lift, loop
from .target import LOOP, PUBLIC, SCALAR, derivatives


def arithmetic_of(operands: tuple[Any, ...]) -> Any:
    """The dtype that numbers are computed in: float64 if one of them is."""
    floats = [t for t in operands if isinstance(t, types.Float)]
    return types.float32 if floats and all(t == types.float32 for t in floats) else types.float64


def compile_scalar(scalars: Scalars, names: tuple[str, ...], defaults: tuple[Any, ...]) -> Any:
    """The value of one element, to call in ``@njit`` code: ``scalar(input, target, <options>)``."""
    jets = derivatives()
    definition, arity, parts = jets.jit(adopted(scalars.value)), scalars.arity, jets.parts

    @intrinsic
    def prepare(typingctx, arguments):
        """Operands and options as the definition takes them, operands that are absent included."""
        kinds_given = tuple(arguments)
        T = arithmetic_of(kinds_given[:arity])
        const = jets.Const(T)
        kinds = [const] * (arity + len(scalars.absent))
        kinds += [t if isinstance(t, types.Boolean) else const for t in kinds_given[arity:]]
        result = types.Tuple(kinds)

        def codegen(context, builder, sig, args):
            given = [builder.extract_value(args[0], k) for k in range(len(kinds_given))]
            values = [
                context.cast(builder, v, t, const) for v, t in zip(given, kinds_given[:arity], strict=False)
            ]
            values += [context.cast(builder, context.get_constant(T, x), T, const) for x in scalars.absent]
            values += [
                v if isinstance(t, types.Boolean) else context.cast(builder, v, t, const)
                for v, t in zip(given[arity:], kinds_given[arity:], strict=True)
            ]
            return context.make_tuple(builder, sig.return_type, values)

        return result(arguments), codegen

    @intrinsic
    def like(typingctx, arguments):
        T = arithmetic_of(tuple(arguments)[:arity])
        return T(arguments), lambda context, builder, sig, args: context.get_constant(T, 0)

    @njit(**SCALAR)
    def value(arguments):
        return parts(definition(*prepare(arguments)), like(arguments))[0]

    return njit(**PUBLIC)(gathered(value, names, defaults, scalars.name))


@intrinsic
def _data(typingctx, array):
    """A pointer to an array's elements."""

    def codegen(context, builder, sig, args):
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


def _flat(array, dtype):
    """An array's elements in C order: a view where it is contiguous and of the dtype, else a copy."""


@overload(_flat)
def _flat_of(array, dtype):
    if array.dtype == dtype.dtype and array.layout == "C":
        return lambda array, dtype: array.reshape(array.size)
    if array.dtype == dtype.dtype:
        return lambda array, dtype: np.ascontiguousarray(array).reshape(array.size)
    return lambda array, dtype: np.ascontiguousarray(array).reshape(array.size).astype(dtype)


def compile_runs(scalars: Scalars) -> Any:
    """The sum of the terms of flat arrays, as a function to call in ``@njit`` code.

    ``runs(x, t, u, w, out, scale, options)``: the third operand `u`, the weights `w` and `out`, which
    receives the gradient by `x` times `scale`, may each be None.
    """
    name = scalars.name
    complaint = f"{name}: an element is out of its domain"

    @cache
    def bound(dtype, graded):
        T = np.float32 if dtype == types.float32 else np.float64
        scope = dict(
            T=T,
            value=lift(scalars, None),
            at0=lift(scalars, 0) if graded else None,
            at1=None,
            at2=None,
            valid=checker(scalars.domains, T),
            options=derivatives().options(scalars.options, start=1),
        )
        # `out` may be the operand, so nothing is promised about memory.
        return bind(loop, scope, name, (name, dtype.name, graded), njit(forceinline=True, **LOOP))

    def runs(x, t, u, w, out, scale, options):
        pass

    @overload(runs)
    def runs_of(x, t, u, w, out, scale, options):
        graded, three, weighted = (not isinstance(a, types.NoneType) for a in (out, u, w))
        run = bound(x.dtype, graded)

        def impl(x, t, u, w, out, scale, options):
            numbers = np.array((scale, *options))
            invalid = np.zeros(1, np.int64)
            total = 0.0
            for start in range(0, x.size, RUN):
                stop = min(start + RUN, x.size)
                third = u[start:stop] if three else None
                weights = w[start:stop] if weighted else None
                gradient = out[start:stop] if graded else None
                total += run(
                    x[start:stop], t[start:stop], third, weights, None, None, gradient, None, None, None,
                    _data(numbers), _data(invalid),
                )  # fmt: skip
            if invalid[0]:
                raise ValueError(complaint)
            return total

        return impl

    return runs


def compile_whole(
    scalars: Scalars,
    names: tuple[str, ...],
    defaults: tuple[Any, ...],
    options: tuple[str, ...],
) -> Any:
    """The loss over arrays, as a function to call in ``@njit`` code.

    ``jit(input, target, <options>, reduction='mean', out=None)`` returns the value; an array given as `out`
    receives the gradient by the first operand. It runs on the calling thread: call it in a ``prange``.
    """
    arity = scalars.arity
    name = scalars.name
    shapes = f"{name}: the arrays must have one shape"
    out_shape = f"{name}: out must have the input's shape"
    runs = compile_runs(scalars)

    def whole(arguments):
        pass

    @overload(whole)
    def whole_of(arguments):
        arrays = tuple(arguments)[:arity]
        if not all(isinstance(a, types.Array) for a in arrays):
            raise TypingError(f"{name}: the first {arity} arguments must be arrays")
        float32 = all(a.dtype == types.float32 or not isinstance(a.dtype, types.Float) for a in arrays)
        T = np.float32 if float32 else np.float64
        out = tuple(arguments)[-1]
        graded = isinstance(out, types.Array)
        if graded and not (out.layout == "C" and out.mutable and out.dtype == arrays[0].dtype):
            raise TypingError(f"{name}: out must be a C-contiguous array of the input's dtype, not read-only")
        three = arity == 3
        third = 2 if three else 1
        reduction_at = names.index("reduction")
        pick = _picker([names.index(n) for n in options])
        last = len(names) - 1

        def impl(arguments):
            x = arguments[0]
            reduction = arguments[reduction_at]
            if x.shape != arguments[1].shape or x.shape != arguments[third].shape:
                raise ValueError(shapes)
            if graded and arguments[last].shape != x.shape:
                raise ValueError(out_shape)
            if reduction == "mean":
                scale = 1.0 / x.size if x.size else np.nan
            elif reduction == "sum":
                scale = 1.0
            else:
                raise ValueError("reduction must be 'mean' or 'sum' inside compiled code")
            total = runs(
                _flat(x, T),
                _flat(arguments[1], T),
                _flat(arguments[third], T) if three else None,
                None,
                flat_or_none(arguments[last]),
                scale,
                pick(arguments),
            )
            return T(total * scale)

        return impl

    @njit(nogil=True)
    def enter(arguments):
        return whole(arguments)

    return njit(nogil=True)(gathered(enter, names, defaults, name))


def flat_or_none(out):
    pass


@overload(flat_or_none)
def flat_or_none_of(out):
    if isinstance(out, types.Array):
        return lambda out: out.reshape(out.size)
    return lambda out: None


def _picker(positions: list[int]) -> Any:
    """An intrinsic: some of a tuple's numbers, as float64."""

    @intrinsic
    def pick(typingctx, arguments):
        result = types.UniTuple(types.float64, len(positions))

        def codegen(context, builder, sig, args):
            values = [
                context.cast(builder, builder.extract_value(args[0], k), tuple(arguments)[k], types.float64)
                for k in positions
            ]
            return context.make_tuple(builder, sig.return_type, values)

        return result(arguments), codegen

    return pick
