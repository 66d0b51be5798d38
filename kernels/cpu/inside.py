"""Losses inside the caller's own compiled code: a function of one element, and one over whole arrays.

The function of one element becomes a part of the caller's; that of arrays calls the library's kernels. Both
take options by position or keyword, with the loss's defaults.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from ..bind import bind, gathered
from ..freeze import frozen
from ..lift import lift_function
from ..spec import Request, Scalars
from . import blocks
from .disk import kept
from .elementwise import block, identity_of
from .launch import OK
from .native import (
    DESCRIPTION,
    addresses,
    at_address,
    compile_drive,
    describe,
    run_drive,
    stack,
    store,
    tuple_at,
)
from .target import PUBLIC, SCALAR, derivatives


def compile_part(function: Any) -> Any:
    """A definition's function that other definitions call; CUDA's compiler takes it too, by what it is of."""
    return function if hasattr(function, "py_func") else njit(forceinline=True)(function)


def compile_scalar(scalars: Scalars, names: tuple[str, ...], defaults: tuple[Any, ...]) -> Any:
    """The value of one element, to call in ``@njit`` code: ``scalar(input, target, <options>)``."""
    jets = derivatives()
    definition, arity, parts = jets.jit(frozen(scalars.value)), scalars.arity, jets.parts
    arithmetic_of = jets.arithmetic_of

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


def compile_derived(function: Any, names: tuple[str, ...], defaults: tuple[Any, ...], order: int) -> Any:
    """A function's value and derivatives, to call in ``@njit`` code and from Python."""
    lifted = lift_function(function, len(names), order, derivatives)
    return njit(**PUBLIC)(gathered(lifted, names, defaults, function.__name__))


def _flat(array, dtype):
    """An array's elements in C order: a view where it is contiguous and of the dtype, else a copy."""


@overload(_flat)
def _flat_of(array, dtype):
    if array.dtype == dtype.dtype and array.layout == "C":
        return lambda array, dtype: array.reshape(array.size)
    if array.dtype == dtype.dtype:
        return lambda array, dtype: np.ascontiguousarray(array).reshape(array.size)
    return lambda array, dtype: np.ascontiguousarray(array).reshape(array.size).astype(dtype)


# Bound by `compile_inside`: what `compile_functions` gives.
function_address: Any = None
ARRAYS: Any = ()  # which of five arrays there are: three operands, weights, the gradient
CHECKED: Any = False  # whether an operand has a domain

RECIPE, MOST_NUMBERS = 32, 32
NUMBERS_AT = 8 * RECIPE  # in the memory of a call: after the recipe
OBJECTS_AT = NUMBERS_AT + 8 * MOST_NUMBERS
MEMORY = OBJECTS_AT + 8 * 5 + 7 * DESCRIPTION  # bytes
DRIVE, TASK, APART, IN_PLACE, VALUE = range(5)


def inside(x, others, scale, options):
    """The sum of the terms of flat arrays, and the status; the gradient by `x` is the sum's times `scale`.

    `others` are the other operands, the weights and the array of the gradient, which may lie over `x`; behind
    the options comes a number that is not read, for Numba knows no type of an element of no numbers.
    """
    memory = stack(MEMORY)
    r, numbers, objects = at_address(memory, 0), memory + NUMBERS_AT, memory + OBJECTS_AT
    free = objects + 8 * 5
    for k in range(RECIPE):
        r[k] = 0
    count = 1
    store(objects, describe(free, x.ctypes.data, (x.size,), x.itemsize))
    for k in range(len(others)):
        if ARRAYS[k + 1]:
            at = free + DESCRIPTION * count
            store(objects + 8 * count, describe(at, others[k].ctypes.data, (x.size,), x.itemsize))
            count += 1
    inputs = count - 1 if ARRAYS[4] else count
    over = ARRAYS[4] and others[3].ctypes.data == x.ctypes.data
    r[blocks.DIVIDE], r[blocks.ITEM] = blocks.BY_ONE, x.itemsize
    store(numbers + 8 * blocks.DIVISOR, 1.0)
    store(numbers + 8 * blocks.FACTOR, scale)
    count_of_options = len(options) - 1
    for k in range(count_of_options):
        store(numbers + 8 * (blocks.OPTIONS + k), options[k])
    r[blocks.COUNT], r[blocks.INPUTS] = inputs if over else count, inputs
    recipe = describe(free + 5 * DESCRIPTION, memory, (RECIPE,), 8)
    of_numbers = describe(free + 6 * DESCRIPTION, numbers, (blocks.OPTIONS + count_of_options,), 8)
    drive, r[blocks.BLOCK_TASK] = function_address(DRIVE), function_address(TASK)
    if over and CHECKED:  # nothing is overwritten before all is found to be right
        r[blocks.FUNCTION] = function_address(VALUE)
        value, status = run_drive(drive, recipe, of_numbers, tuple_at(objects), 0)
        if status != OK:
            return value, status
    r[blocks.FUNCTION] = function_address(IN_PLACE) if over else function_address(APART)
    return run_drive(drive, recipe, of_numbers, tuple_at(objects), 0)


def compile_functions(scalars: Scalars, weighted: bool, graded: bool, dtype: np.dtype) -> tuple[int, ...]:
    """Return the addresses of the driver, its task, and the blocks; 0 for one that is not needed."""
    value = block(scalars, Request(weighted=weighted), dtype)
    apart = over = value
    if graded:
        apart = block(scalars, Request(weighted=weighted, wrt=(0,)), dtype)
        over = block(scalars, Request(weighted=weighted, wrt=(0,), in_place=(True,)), dtype)
    return compile_drive(blocks.direct), blocks.block_task(), apart, over, value


@cache
def compile_inside(scalars: Scalars, three: bool, weighted: bool, graded: bool, dtype: np.dtype) -> Any:
    """Return `inside` of a definition, for the arrays that there are."""
    scope = dict(
        function_address=addresses(compile_functions, scalars, weighted, graded, dtype),
        ARRAYS=(True, True, three, weighted, graded),
        CHECKED=any(scalars.domains),
    )
    identity = identity_of(scalars), three, weighted, graded, dtype.name
    return bind(inside, scope, scalars.name, identity, kept(nogil=True, error_model="numpy"))


def compile_runs(scalars: Scalars) -> Any:
    """The sum of the terms of flat arrays, as a function to call in ``@njit`` code.

    ``runs(x, t, u, w, out, scale, options)``: the third operand `u`, the weights `w` and `out`, which
    receives the gradient by `x` times `scale`, may each be None.
    """
    complaint = f"{scalars.name}: an element is out of its domain"
    overlap = f"{scalars.name}: out overlaps an argument; it may be input itself"

    def runs(x, t, u, w, out, scale, options):
        pass

    @overload(runs)
    def runs_of(x, t, u, w, out, scale, options):
        graded, three, weighted = (not isinstance(a, types.NoneType) for a in (out, u, w))
        kernel = compile_inside(scalars, three, weighted, graded, np.dtype(x.dtype.name))

        def impl(x, t, u, w, out, scale, options):
            # What is not there is not read.
            others = t, u if three else t, w if weighted else t, out if graded else t
            if graded:
                over = out.ctypes.data == x.ctypes.data
                if not (over or apart(out, x)):
                    raise ValueError(overlap)
                for k in range(3):
                    if not apart(out, others[k]):
                        raise ValueError(overlap)
            total, status = kernel(x, others, scale, (*options, 0.0))
            if status != OK:
                raise ValueError(complaint)
            return total

        return impl

    return runs


@njit(nogil=True, error_model="numpy")
def apart(a, b):
    """Whether two flat arrays share no memory."""
    p, q = a.ctypes.data, b.ctypes.data
    return a.size == 0 or b.size == 0 or p >= q + b.nbytes or q >= p + a.nbytes


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
        graded = not isinstance(out, types.NoneType | types.Omitted)
        if graded and not (
            isinstance(out, types.Array)
            and out.layout == "C"
            and out.mutable
            and out.dtype == arrays[0].dtype
        ):
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
