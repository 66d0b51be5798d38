"""Losses of rows of class scores, inside the caller's own compiled code."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from ..bind import gathered
from ..spec import MarginFunctions, NllFunctions, Scalars, ScoreFunctions, ScoreOption
from . import margins, nll, scores
from .elementwise import identity_of
from .inside import apart, compile_runs, flat_or_none
from .inside_arrays import (
    PART,
    by_dtype,
    checks_of,
    divisor_of,
    entry,
    flat,
    gradient,
    is_float,
    is_label,
    link,
    may_write,
    one_a_row,
    same_shape,
    weight_fits,
    with_unset,
)


# ---- arguments ----------------------------------------------------------------------------------------
def extents_of(x):
    """Batch, classes and inner positions of scores."""


@overload(extents_of)
def extents_of_scores(x):
    if not is_float(x) or not x.ndim:
        raise TypingError(f"input must be an array of float32 or float64 with an axis of classes, got {x}")
    if x.ndim == 1:
        return lambda x: (1, x.size, 1)
    if x.ndim == 2:
        return lambda x: (x.shape[0], x.shape[1], 1)

    def impl(x):
        inner = 1
        for n in x.shape[2:]:
            inner *= n
        return x.shape[0], x.shape[1], inner

    return impl


def target_fits(target, x):
    """Whether there is a label, or a distribution over the classes, for each row of scores."""


@overload(target_fits)
def target_fits_scores(target, x):
    if is_float(target):
        return lambda target, x: same_shape(target, x)
    return lambda target, x: one_a_row(target, x)


def lists_fit(target, x):
    """Whether there is a list of labels for each row, as long as the row."""


@overload(lists_fit)
def lists_fit_scores(target, x):
    if not isinstance(target, types.Array) or not is_label(target):
        raise TypingError(f"target must be an array of integers, got {target}")
    return lambda target, x: same_shape(target, x)


def flat_target(target, dtype):
    """Class indices, or probabilities, in C order."""


@overload(flat_target)
def flat_target_of(target, dtype):
    if is_float(target):
        return lambda target, dtype: flat(target, dtype)
    return lambda target, dtype: flat(target, np.int64)


def may_ignore(target, index):
    """Whether an index may be ignored: none may with probabilities."""


@overload(may_ignore)
def may_ignore_index(target, index):
    if not isinstance(index, types.Integer):
        raise TypingError(f"ignore_index must be an integer, got {index}")
    if is_float(target):
        return lambda target, index: index < 0
    return lambda target, index: True


# ---- one function for all -------------------------------------------------------------------------------


MOST_AXES = 64  # NumPy's limit


class Parts(NamedTuple):
    """What differs from loss to loss in its function.

    Attributes
    ----------
    fits : function
        ``fits(target, input)``: whether the target has the shape that it must have; a TypingError for one of
        a type that the loss has no terms for.
    target : str
        That shape, in words.
    check : function
        ``check(arguments)`` raises where an option is out of its domain.
    rows : function
        ``rows(arguments, target, input, others)`` calls the kernel: gives the value and a status.
    settings : function
        ``settings(arguments, divisor)``: the kernel's arguments after `target`, gradient, class weights and
        extents, as a tuple.
    axes : int
        The most that the input may have.
    """

    fits: Any
    target: str
    check: Any
    rows: Any
    settings: Any
    axes: int = MOST_AXES


def compile_rows(name: str, names: tuple[str, ...], defaults: tuple[Any, ...], parts: Parts) -> Any:
    """Return a loss of rows of class scores over arrays, as a function to call in ``@njit`` code.

    `names` and `defaults` are those of all parameters; the defaults belong to the last ones.
    """
    fits, shape_of_target, check, rows, settings, axes = parts
    reduction_at, out_at = names.index("reduction"), len(names) - 1
    weight_at = names.index("weight") if "weight" in names else -1
    no_class = f"{name}: input must have at least one class"
    if axes < MOST_AXES:
        no_class += f", and at most {axes} axes"
    no_target = f"{name}: target must have {shape_of_target}"
    no_weight = f"{name}: weight must have one element per class"
    no_out = f"{name}: out must have input's shape"
    overlap = f"{name}: out overlaps an argument; it may be input itself"
    no_label = f"{name}: target holds a class index that is out of range"

    @njit(**PART)
    def enter(arguments):
        x_, target, out = arguments[0], arguments[1], arguments[out_at]
        weight = arguments[weight_at] if weight_at >= 0 else None
        divisor = divisor_of(arguments[reduction_at])
        extents = extents_of(x_)
        if extents[1] == 0 or x_.ndim > axes:
            raise ValueError(no_class)
        if not fits(target, x_):
            raise ValueError(no_target)
        if not weight_fits(weight, extents[1]):
            raise ValueError(no_weight)
        check(arguments)
        if not same_shape(out, x_):
            raise ValueError(no_out)
        T = x_.dtype.type
        if x_.size == 0:
            return T(0 * divisor)
        x, g, t, w = flat(x_, T), gradient(out, x_), flat_target(target, T), flat(weight, T)
        if not (may_write((g,), (x, w)) and apart(g, t)):
            raise ValueError(overlap)
        value, status = rows(arguments, t, x, (t, g, w, extents, *settings(arguments, divisor)))
        if status >= 0:
            raise IndexError(no_label)
        return T(value)

    return njit(nogil=True)(gathered(enter, names, defaults, name))


def kernel_rows(compile_kernel: Callable[[np.dtype], Any]) -> Any:
    """Return the `rows` of a kernel for which only the input's dtype counts."""
    kernel = by_dtype(compile_kernel)

    @njit(**PART)
    def rows(arguments, target, x, others):
        return kernel(x, others)

    return rows


# ---- picks and margins ----------------------------------------------------------------------------------


@cache
def compile_picks(
    functions: NllFunctions,
    names: tuple[str, ...],
    defaults: tuple[Any, ...],
    options: tuple[ScoreOption, ...],
) -> Any:
    """A loss of the score of each row's class alone; the options are all that are no arrays."""
    ignore_at = names.index("ignore_index")

    @njit(**PART)
    def settings(arguments, divisor):
        return ((np.int64(arguments[ignore_at]), divisor),)

    parts = Parts(
        fits=one_a_row,
        target="input's shape without the axis of classes",
        check=checks_of(functions.name, names, options),
        rows=kernel_rows(partial(nll.compile_inside, functions)),
        settings=settings,
    )
    return compile_rows(functions.name, names, defaults, parts)


def place_in(values: tuple[Any, ...]) -> Any:
    """A function: the place of a number among values."""
    numbers = tuple(map(float, values))

    @njit(**PART)
    def place(x):
        for k in range(len(numbers)):
            if numbers[k] == x:
                return k
        return 0

    return place


@cache
def compile_margins(
    definitions: tuple[MarginFunctions, ...],
    names: tuple[str, ...],
    defaults: tuple[Any, ...],
    options: tuple[ScoreOption, ...],
) -> Any:
    """A loss of each row's own classes against its others.

    There is a definition for each value of the option that has a few, if one has; the other is a number.
    """
    name, many = definitions[0].name, definitions[0].many
    chosen = [o for o in options if isinstance(o.domain, tuple)]
    numbers = [o for o in options if not isinstance(o.domain, tuple)]
    choice_at = names.index(chosen[0].name) if chosen else -1
    number_at = names.index(numbers[0].name) if numbers else -1
    place = place_in(chosen[0].domain if chosen else ())

    @njit(**PART)
    def settings(arguments, divisor):
        variant = place(arguments[choice_at]) if choice_at >= 0 else 0
        number = float(arguments[number_at]) if number_at >= 0 else 0.0
        return ((np.int64(variant), number, divisor),)

    parts = Parts(
        fits=lists_fit if many else one_a_row,
        target="input's shape" if many else "one class index for each row of input",
        check=checks_of(name, names, options),
        rows=kernel_rows(partial(margins.compile_inside, definitions)),
        settings=settings,
        axes=2,
    )
    return compile_rows(name, names, defaults, parts)


# ---- losses by the softmax ------------------------------------------------------------------------------

# Options by which scores' blocks go.
OF_BLOCKS = "weight", "softcap", "label_smoothing", "lse_square_scale"


def given_in(options: dict[str, Any], grad: bool = True, probabilities: bool = False) -> scores.Given:
    """Return what a call gives, from its options' types."""
    known = {n: not isinstance(t, types.NoneType) for n, t in options.items()}
    return scores.Given(grad, probabilities, **known)


def score_numbers(names: tuple[str, ...], options: tuple[ScoreOption, ...]) -> Any:
    """An intrinsic: of a call's arguments what a block takes from `scores.SMOOTHING` on."""
    own = {"label_smoothing": 0.0, "softcap": 1.0, "lse_square_scale": 0.0}
    places = [(names.index(n) if n in names else -1, absent) for n, absent in own.items()]
    places += [(names.index(o.name), 0.0) for o in options if not o.is_flag]

    @intrinsic
    def numbers(typingctx, arguments):
        result = types.UniTuple(types.float64, len(places))

        def codegen(context, builder, sig, args):
            def number(place, absent):
                kind = tuple(arguments)[place] if place >= 0 else types.none
                if isinstance(kind, types.NoneType):
                    return context.get_constant(types.float64, absent)
                given = builder.extract_value(args[0], place)
                return context.cast(builder, given, kind, types.float64)

            made = [number(place, absent) for place, absent in places]
            return context.make_tuple(builder, sig.return_type, made)

        return result(arguments), codegen

    return numbers


def number_of_flags(places: list[int]) -> Any:
    """An intrinsic: bools of a call's arguments as the bits of a number, the first the highest."""

    @intrinsic
    def number(typingctx, arguments):
        def codegen(context, builder, sig, args):
            made = context.get_constant(types.int64, 0)
            for k in places:
                given = builder.extract_value(args[0], k)
                flag = context.cast(builder, given, tuple(arguments)[k], types.boolean)
                flag = context.cast(builder, flag, types.boolean, types.int64)
                made = builder.add(builder.shl(made, made.type(1)), flag)
            return made

        return types.int64(arguments), codegen

    return number


def score_rows(definitions: tuple[ScoreFunctions, ...], places: dict[str, int]) -> Any:
    """An intrinsic that calls the kernel for a call's types: ``rows(arguments, target, x, others)``.

    `places` are those of options among the arguments.
    """

    @intrinsic
    def call(typingctx, arguments, target, x, others):
        options = {n: tuple(arguments)[k] for n, k in places.items()}
        out, probabilities = tuple(arguments)[-1], isinstance(target.dtype, types.Float)
        given = given_in(options, not isinstance(out, types.NoneType), probabilities)
        kernel = scores.compile_inside(definitions, given, np.dtype(x.dtype.name))
        result, codegen = link(typingctx, kernel, (x, *others))
        return result(arguments, target, x, others), codegen

    return call


@cache
def compile_score_loss(
    definitions: tuple[ScoreFunctions, ...],
    names: tuple[str, ...],
    defaults: tuple[Any, ...],
    options: tuple[ScoreOption, ...],
    own: tuple[str, ...],
) -> Any:
    """A loss of class scores by their softmax.

    Parameters
    ----------
    definitions : tuple of ScoreFunctions
        For each combination of the definition's flags, the first one's False before its True.
    names, defaults : tuples
        See `compile_rows`.
    options : tuple of ScoreOption
        All that are no arrays.
    own : tuple of str
        The options that the definition takes.
    """
    name = definitions[0].name
    checked = checks_of(name, names, options)
    by_name = {o.name: o for o in options}
    of_definition = tuple(by_name[n] for n in own)
    numbers_of = score_numbers(names, of_definition)
    definition_of = number_of_flags([names.index(o.name) for o in of_definition if o.is_flag])
    ignore_at = names.index("ignore_index")
    of_one_class = [n for n in definitions[0].statistics if n in ("log_prob", "rest", "class_weight")]
    no_index = f"{name}: ignore_index must not be given with class probabilities"

    def fits(target, x):
        pass

    @overload(fits)
    def fits_scores(target, x):
        if is_float(target) and of_one_class:
            raise TypingError(
                f"{name}: target holds class probabilities, but the loss asks for {', '.join(of_one_class)}"
            )
        return lambda target, x: target_fits(target, x)

    @njit(**PART)
    def check(arguments):
        checked(arguments)
        if not may_ignore(arguments[1], arguments[ignore_at]):
            raise ValueError(no_index)

    @njit(**PART)
    def settings(arguments, divisor):
        numbers = (float(divisor), 1.0, *numbers_of(arguments))
        return (definition_of(arguments), np.int64(arguments[ignore_at])), numbers

    parts = Parts(
        fits=fits,
        target="input's shape without the axis of classes, or for class probabilities input's shape",
        check=check,
        rows=score_rows(definitions, {n: k for k, n in enumerate(names) if n in OF_BLOCKS and n not in own}),
        settings=settings,
    )
    unset = {n: 0.0 for n in OF_BLOCKS if n not in own}
    return compile_rows(name, names, with_unset(names, defaults, unset), parts)


# ---- each class apart ---------------------------------------------------------------------------------
def marks_fit(target, x):
    """Whether there is a number for each score."""


@overload(marks_fit)
def marks_fit_scores(target, x):
    if not is_float(x) or not x.ndim:
        raise TypingError(f"input must be an array of float32 or float64 with an axis of classes, got {x}")
    if not isinstance(getattr(target, "dtype", None), types.Number | types.Boolean):
        raise TypingError(f"target must be an array of numbers, got {target}")
    return lambda target, x: same_shape(target, x)


def over(weight, x):
    """Weights of elements, of the shape of the scores; None for none."""


@overload(over)
def over_scores(weight, x):
    if isinstance(weight, types.NoneType):
        return lambda weight, x: None
    T = np.float32 if x.dtype == types.float32 else np.float64
    return lambda weight, x: flat(np.broadcast_to(weight, x.shape), T)


def broadcasts(weight, x):
    """Whether weights of elements, if there are any, broadcast to the shape of the scores."""


@overload(broadcasts)
def broadcasts_to_scores(weight, x):
    if isinstance(weight, types.NoneType):
        return lambda weight, x: True
    if not isinstance(weight, types.Array) or weight.ndim > x.ndim:
        raise TypingError(f"weight must be an array that broadcasts to the input's shape, got {weight}")
    skipped = x.ndim - weight.ndim

    def impl(weight, x):
        for k in range(weight.ndim):
            if weight.shape[k] != 1 and weight.shape[k] != x.shape[skipped + k]:
                return False
        return True

    return impl if weight.ndim else lambda weight, x: True


# Bound by `compile_soft_margins`.
runs: Any = None


def soft_margins(input, target, weight=None, reduction="mean", out=None):
    divisor = divisor_of(reduction)
    if not marks_fit(target, input):
        raise ValueError("{loss}: target must have input's shape")
    classes = input.shape[input.ndim - 1]
    if classes == 0:
        raise ValueError("{loss}: input must have shape (..., C), C at least 1")
    if not broadcasts(weight, input):
        raise ValueError("{loss}: weight must broadcast to input's shape")
    if not same_shape(out, input):
        raise ValueError("{loss}: out must have input's shape")
    T = input.dtype.type
    if input.size == 0:
        return T(0 * divisor)
    x, t, w = flat(input, T), flat(target, T), over(weight, input)
    if not may_write((gradient(out, input),), (x, t)):
        raise ValueError("{loss}: out overlaps an argument; it may be input itself")
    scale = 1 / classes if divisor == 1 else 1 / x.size
    return T(runs(x, t, None, w, flat_or_none(out), scale, ()) * scale)


@cache
def compile_soft_margins(name: str, scalars: Scalars) -> Any:
    """Return a function of the elementwise loss that it averages over classes."""
    return entry(soft_margins, name, identity_of(scalars), runs=compile_runs(scalars))
