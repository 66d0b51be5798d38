"""Losses with one term for each row, inside the caller's own compiled code.

Each function here has its loss's own parameters and then `out`, which receives the gradient: an array, or for
vectors a tuple of arrays, or of None where a gradient is not wanted. It may be the very array that it is the
gradient of. The value is of the input's dtype, float32 or float64, which all is computed in. They run on the
calling thread, through the serial kernels that the library's own calls run.

What cannot be is a TypingError, when the caller's function is compiled. What is raised at run time has
constant messages: that is all that Numba can do where the GIL is not held.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload, typeof_impl

from ..bind import bind, gathered
from ..chunks import chunk_rows, product_columns
from ..freeze import fingerprint
from ..spec import MarginFunctions, NllFunctions, Scalars, ScoreFunctions, ScoreOption
from . import ctc, margins, nll, scores
from .disk import kept
from .elementwise import identity_of
from .inside import apart, compile_runs, flat_or_none
from .labels import first_wrong
from .native import HELPER, addresses, at_address, caller, compile_function, stack, store, store_all
from .target import Linked

ENTRY: dict[str, Any] = dict(nogil=True, error_model="numpy")
# Of functions that only entries call.
PART: dict[str, Any] = ENTRY | {"pipeline_class": Linked}


# ---- arguments -------------------------------------------------------------------------------------
def flat(array, dtype):
    """The elements in C order: the array's own memory where it can be, else a copy; empty for None."""


@overload(flat)
def flat_of(array, dtype):
    if isinstance(array, types.NoneType):
        return lambda array, dtype: np.empty(0, dtype)
    if not isinstance(array, types.Array):
        return lambda array, dtype: np.full(1, array, dtype)
    if array.ndim == 0:
        return lambda array, dtype: flat(array.reshape(1), dtype)
    # Kernels are compiled for arrays that may be written.
    if array.dtype == dtype.dtype and array.layout == "C" and array.mutable:
        return lambda array, dtype: array.reshape(array.size)
    unsigned = array.dtype == types.uint64 and dtype.dtype == types.int64

    def impl(array, dtype):
        made = np.empty(array.size, dtype)
        for i, element in enumerate(array.flat):
            # No class has the largest index, nor is it ignored.
            made[i] = min(element, np.uint64(2**63 - 1)) if unsigned else element
        return made

    return impl


def gradient(out, like):
    """The flat memory of an output, empty for None."""


@overload(gradient)
def gradient_of(out, like):
    if isinstance(out, types.NoneType):
        return lambda out, like: np.empty(0, like.dtype)
    check_out(out, like)
    return lambda out, like: out.reshape(out.size)


def check_out(out: Any, like: Any) -> None:
    if not isinstance(out, types.Array):
        raise TypingError(f"out must be an array or None, got {out}")
    if out.layout != "C" or not out.mutable or out.dtype != like.dtype:
        raise TypingError(f"out must be a C-contiguous array of {like.dtype} that may be written, got {out}")


def same_shape(a, b):
    """Whether two arrays have one shape; None has any."""


@overload(same_shape)
def same_shape_of(a, b):
    if isinstance(a, types.NoneType):
        return lambda a, b: True
    if a.ndim != b.ndim:
        return lambda a, b: False
    return lambda a, b: a.shape == b.shape


def outputs_for(count: int) -> Any:
    """A function to call in compiled code: what was given as `out`, one for each gradient."""
    nothing = (None,) * count

    def outputs(out):
        pass

    @overload(outputs)
    def outputs_of(out):
        if isinstance(out, types.NoneType):
            return lambda out: nothing
        if not isinstance(out, types.BaseTuple) or len(out) != count:
            raise TypingError(f"out must be None or a tuple of {count}, got {out}")
        return lambda out: out

    return outputs


pair = outputs_for(2)


def is_float(array: Any) -> bool:
    return isinstance(array, types.Array) and array.dtype in (types.float32, types.float64)


def is_label(array: Any) -> bool:
    """An array of integers, or the integer that is the one row's."""
    return isinstance(getattr(array, "dtype", array), types.Integer)


@njit(**PART)
def may_write(gradients, arguments):
    """Whether each gradient goes into its own argument's memory, or into some that is nothing else's."""
    for j in range(len(gradients)):
        g = gradients[j]
        for k in range(len(arguments)):
            a = arguments[k]
            own = j == k and g.ctypes.data == a.ctypes.data and g.size == a.size
            if not own and not apart(g, a):
                return False
        for k in range(j):
            if not apart(g, gradients[k]):
                return False
    return True


@njit(**PART)
def divisor_of(reduction):
    """What the sum is divided by: NaN for what the rows count for."""
    if reduction == "mean":
        return np.nan
    if reduction != "sum":
        raise ValueError("reduction must be 'mean' or 'sum' inside compiled code")
    return 1.0


def link(typingctx: Any, function: Any, types_of: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the result's type, and a code generator, for an intrinsic that calls a function.

    The intrinsic's last two arguments are the function's first, and a tuple of its others.
    """
    dispatcher = types.Dispatcher(function)
    result = dispatcher.get_call_type(typingctx, types_of, {})

    def codegen(context, builder, sig, args):
        found = context.get_function(dispatcher, result)
        context.add_linking_libs(found.libs)
        return found(builder, (args[-2], *cgutils.unpack_tuple(builder, args[-1])))

    return result.return_type, codegen


def by_dtype(compile_kernel: Callable[[np.dtype], Any]) -> Any:
    """A function to call in compiled code: the kernel for its first argument's dtype, with a tuple's others.

    A function that is compiled around it, as by `overload`, would be optimised anew with all of the kernel.
    """

    @intrinsic
    def call(typingctx, x, arguments):
        result, codegen = link(typingctx, compile_kernel(np.dtype(x.dtype.name)), (x, *arguments))
        return result(x, arguments), codegen

    return call


def entry(template: Any, name: str, identity: Any, **scope: Any) -> Any:
    """Return a template as a loss's function; its messages say the loss's name for ``{loss}``."""
    code = template.__code__
    said = tuple(c.replace("{loss}", name) if isinstance(c, str) else c for c in code.co_consts)
    of_loss = FunctionType(code.replace(co_consts=said), template.__globals__, name, template.__defaults__)
    return bind(of_loss, scope, "inside", (name, identity), njit(**ENTRY))


rows_of: Any = None  # bound to the kernel


@njit(**PART)
def one():
    """How many share a kernel's work; a literal would have it compiled for that."""
    return np.int64(1)


# Bound by `compile_linear`.
whole: Any = None
add: Any = None
rows_of_chunk: Any = None
columns_of_product: Any = None


# ---- class scores ----------------------------------------------------------------------------------
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


def one_a_row(target, x):
    """Whether there is one label for each row of scores."""


@overload(one_a_row)
def one_a_row_of(target, x):
    if not is_label(target):
        raise TypingError(f"target must hold integers, got {target}")
    if getattr(target, "ndim", 0) != x.ndim - 1:
        return lambda target, x: False
    if x.ndim == 1:
        return lambda target, x: True
    if x.ndim == 2:
        return lambda target, x: target.size == x.shape[0]
    return lambda target, x: target.shape == x.shape[:1] + x.shape[2:]


def target_fits(target, x):
    """Whether there is a label, or a distribution over the classes, for each row of scores."""


@overload(target_fits)
def target_fits_scores(target, x):
    if is_float(target):
        return lambda target, x: same_shape(target, x)
    return lambda target, x: one_a_row(target, x)


def weight_fits(weight, classes):
    """Whether there is a weight for each class, or none."""


@overload(weight_fits)
def weight_fits_classes(weight, classes):
    if isinstance(weight, types.NoneType):
        return lambda weight, classes: True
    if not isinstance(weight, types.Array) or weight.ndim != 1:
        raise TypingError(f"weight must be an array with one axis, got {weight}")
    return lambda weight, classes: weight.size == classes


def compile_check(option: str, place: int, domain: Any, message: str) -> Any:
    """A function ``check(arguments)`` that raises where the option at a place is out of its domain."""
    if isinstance(domain, tuple):
        low, high, open_low, open_high, values = 0.0, 0.0, False, False, tuple(map(float, domain))
    else:
        low, high, open_low, open_high = domain.low, domain.high, domain.open_low, domain.open_high
        values = ()
    few = bool(values)

    def holds(x):
        pass

    @overload(holds)
    def holds_for(x):
        if isinstance(x, types.NoneType):
            return lambda x: True
        if not isinstance(x, types.Number | types.Boolean):
            raise TypingError(f"{option} must be a number, got {x}")
        if few and isinstance(x, types.Boolean):
            return lambda x: (1.0 if x else 0.0) in values
        if few:
            return lambda x: float(x) in values
        return lambda x: (x > low if open_low else x >= low) and (x < high if open_high else x <= high)

    @njit(**PART)
    def check(arguments):
        if not holds(arguments[place]):
            raise ValueError(message)

    return check


@njit(**PART)
def nothing(arguments):
    pass


def in_turn(first: Any, then: Any) -> Any:
    """Two checks as one."""

    @njit(**PART)
    def both(arguments):
        first(arguments)
        then(arguments)

    return both


def checks_of(name: str, names: tuple[str, ...], options: tuple[ScoreOption, ...]) -> Any:
    """A function ``check(arguments)`` that raises where an option is out of its domain."""
    check = nothing
    for option in options:
        if option.domain is not None:
            place = names.index(option.name)
            message = f"{name}: {option.name} must be {option.said}"
            check = in_turn(check, compile_check(option.name, place, option.domain, message))
    return check


# Options by which scores' blocks go.
OF_BLOCKS = "weight", "softcap", "label_smoothing", "lse_square_scale"


class Unset(float):
    """A default number that compiled code takes for None: only what goes by it is then compiled."""


ZERO = Unset(0.0)


@typeof_impl.register(Unset)
def type_of_unset(value, context):
    return types.none


def with_unset(names: tuple[str, ...], defaults: tuple[Any, ...], unset: dict[str, float]) -> tuple[Any, ...]:
    """The defaults of the last parameters, `Unset` where one is the number that its name stands for."""
    own = zip(names[len(names) - len(defaults) :], defaults, strict=True)
    return tuple(Unset(d) if n in unset and d == unset[n] else d for n, d in own)


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


def given_in(options: dict[str, Any], grad: bool = True, probabilities: bool = False) -> scores.Given:
    """Return what a call gives, from its options' types."""
    known = {n: not isinstance(t, types.NoneType) for n, t in options.items()}
    return scores.Given(grad, probabilities, **known)


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


@cache
def compile_score_loss(
    definitions: tuple[ScoreFunctions, ...],
    names: tuple[str, ...],
    defaults: tuple[Any, ...],
    options: tuple[ScoreOption, ...],
    own: tuple[str, ...],
) -> Any:
    """A loss of class scores over arrays, as a function to call in ``@njit`` code.

    Parameters
    ----------
    definitions : tuple of ScoreFunctions
        For each combination of the definition's flags, the first one's False before its True.
    names, defaults : tuples
        Of all parameters; the defaults are those of the last ones.
    options : tuple of ScoreOption
        All that have a domain.
    own : tuple of str
        The options that the definition takes.
    """
    name = definitions[0].name
    check = checks_of(name, names, options)
    by_name = {o.name: o for o in options}
    of_definition = tuple(by_name[n] for n in own)
    numbers_of = score_numbers(names, of_definition)
    definition_of = number_of_flags([names.index(o.name) for o in of_definition if o.is_flag])
    reduction_at, weight_at, ignore_at = (names.index(n) for n in ("reduction", "weight", "ignore_index"))
    out_at = len(names) - 1
    rows = score_rows(definitions, {n: k for k, n in enumerate(names) if n in OF_BLOCKS and n not in own})
    of_one_class = [n for n in definitions[0].statistics if n in ("log_prob", "rest", "class_weight")]
    no_class = f"{name}: input must have at least one class"
    no_target = (
        f"{name}: target must have input's shape without the axis of classes, or for class probabilities "
        "input's shape"
    )
    no_weight = f"{name}: weight must have one element per class"
    no_out = f"{name}: out must have input's shape"
    no_index = f"{name}: ignore_index must not be given with class probabilities"
    overlap = f"{name}: out overlaps an argument; it may be input itself"
    no_label = f"{name}: target holds a class index that is out of range"

    def known(target):
        pass

    @overload(known)
    def known_target(target):
        if is_float(target) and of_one_class:
            raise TypingError(
                f"{name}: target holds class probabilities, but the loss asks for {', '.join(of_one_class)}"
            )
        return lambda target: True

    @njit(**PART)
    def enter(arguments):
        x_, target, weight, out = arguments[0], arguments[1], arguments[weight_at], arguments[out_at]
        ignore_index = arguments[ignore_at]
        divisor = divisor_of(arguments[reduction_at])
        extents = extents_of(x_)
        known(target)
        if extents[1] == 0:
            raise ValueError(no_class)
        if not target_fits(target, x_):
            raise ValueError(no_target)
        if not weight_fits(weight, extents[1]):
            raise ValueError(no_weight)
        check(arguments)
        if not same_shape(out, x_):
            raise ValueError(no_out)
        T = x_.dtype.type
        if not may_ignore(target, ignore_index):
            raise ValueError(no_index)
        if x_.size == 0:
            return T(0 * divisor)
        x, g, t, w = flat(x_, T), gradient(out, x_), flat_target(target, T), flat(weight, T)
        if not (may_write((g,), (x, w)) and apart(g, t)):
            raise ValueError(overlap)
        numbers = (float(divisor), 1.0, *numbers_of(arguments))
        settings = definition_of(arguments), np.int64(ignore_index)
        value, status = rows(arguments, t, x, (t, g, w, extents, settings, numbers))
        if status >= 0:
            raise IndexError(no_label)
        return T(value)

    defaults = with_unset(names, defaults, {n: 0 for n in OF_BLOCKS if n not in own})
    return njit(nogil=True)(gathered(enter, names, defaults, name))


def picks(input, target, weight=None, ignore_index=-100, reduction="mean", out=None):
    divisor = divisor_of(reduction)
    extents = extents_of(input)
    if extents[1] == 0:
        raise ValueError("{loss}: input must have at least one class")
    if not one_a_row(target, input):
        raise ValueError("{loss}: target must have input's shape without the axis of classes")
    if not weight_fits(weight, extents[1]):
        raise ValueError("{loss}: weight must have one element per class")
    if not same_shape(out, input):
        raise ValueError("{loss}: out must have input's shape")
    T = input.dtype.type
    if input.size == 0:
        return T(0 * divisor)
    x, g, labels, w = flat(input, T), gradient(out, input), flat(target, np.int64), flat(weight, T)
    if not (may_write((g,), (x, w)) and apart(g, labels)):
        raise ValueError("{loss}: out overlaps an argument; it may be input itself")
    value, wrong = rows_of(x, (labels, g, w, extents, (np.int64(ignore_index), divisor)))
    if wrong >= 0:
        raise IndexError("{loss}: target holds a class index that is out of range")
    return T(value)


@cache
def compile_picks(functions: NllFunctions) -> Any:
    """Return a function of a definition."""
    kernel = by_dtype(partial(nll.compile_inside, functions))
    return entry(picks, functions.name, nll.identity_of(functions), rows_of=kernel)


def one_label_margins(input, target, p=1, margin=1.0, weight=None, reduction="mean", out=None):
    divisor = divisor_of(reduction)
    batch, classes, _ = extents_of(input)
    if classes == 0 or input.ndim > 2:
        raise ValueError("{loss}: input must have shape (C) or (N, C), C at least 1")
    if not one_a_row(target, input):
        raise ValueError("{loss}: target must have one class index for each row of input")
    if p != 1 and p != 2:
        raise ValueError("{loss}: p must be 1 or 2")
    if margin != margin:
        raise ValueError("{loss}: margin must be a number")
    if not weight_fits(weight, classes):
        raise ValueError("{loss}: weight must have one element per class")
    if not same_shape(out, input):
        raise ValueError("{loss}: out must have input's shape")
    T = input.dtype.type
    if input.size == 0:
        return T(0 * divisor)
    x, g, labels, w = flat(input, T), gradient(out, input), flat(target, np.int64), flat(weight, T)
    if not (may_write((g,), (x, w)) and apart(g, labels)):
        raise ValueError("{loss}: out overlaps an argument; it may be input itself")
    value, wrong = rows_of(x, (labels, g, w, (batch, classes), (np.int64(p == 2), float(margin), divisor)))
    if wrong >= 0:
        raise IndexError("{loss}: target holds a class index that is out of range")
    return T(value)


def many_label_margins(input, target, reduction="mean", out=None):
    divisor = divisor_of(reduction)
    batch, classes, _ = extents_of(input)
    if classes == 0 or input.ndim > 2:
        raise ValueError("{loss}: input must have shape (C) or (N, C), C at least 1")
    if not lists_fit(target, input):
        raise ValueError("{loss}: target must have input's shape")
    if not same_shape(out, input):
        raise ValueError("{loss}: out must have input's shape")
    T = input.dtype.type
    if input.size == 0:
        return T(0 * divisor)
    x, g, labels = flat(input, T), gradient(out, input), flat(target, np.int64)
    if not (may_write((g,), (x,)) and apart(g, labels)):
        raise ValueError("{loss}: out overlaps an argument; it may be input itself")
    value, wrong = rows_of(x, (labels, g, x[:0], (batch, classes), (np.int64(0), 0.0, divisor)))
    if wrong >= 0:
        raise IndexError("{loss}: target holds a class index that is out of range")
    return T(value)


@cache
def compile_margins(*definitions: MarginFunctions) -> Any:
    """Return a function of all definitions: with p = 1 and 2, where a row has one label."""
    template = many_label_margins if definitions[0].many else one_label_margins
    kernel = by_dtype(partial(margins.compile_inside, definitions))
    identity = [margins.identity_of(f) for f in definitions]
    return entry(template, definitions[0].name, identity, rows_of=kernel)


def lists_fit(target, x):
    """Whether there is a list of labels for each row, as long as the row."""


@overload(lists_fit)
def lists_fit_scores(target, x):
    if not isinstance(target, types.Array) or not is_label(target):
        raise TypingError(f"target must be an array of integers, got {target}")
    return lambda target, x: same_shape(target, x)


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


# ---- scores that are a matrix product --------------------------------------------------------------
def linear_fits(target, x, w, options):
    """Whether there is one label for each row of the input, and the features are as many as the weight's."""


@overload(linear_fits)
def linear_fits_scores(target, x, w, options):
    if find_spec("scipy") is None:
        raise TypingError("matrix products in compiled code need SciPy: pip install scipy")
    for a, name in ((x, "input"), (w, "linear_weight")):
        if not is_float(a) or a.dtype != x.dtype:
            raise TypingError(f"{name} must be an array of float32 or float64, of the input's dtype, got {a}")
    if x.ndim not in (1, 2) or w.ndim != 2:
        raise TypingError(
            f"in compiled code input has shape (F) or (N, F) and linear_weight (C, F), got {x} and {w}"
        )
    if not is_label(target):
        raise TypingError(f"in compiled code target must hold class indices, got {target}")
    if not isinstance(options, types.NoneType):
        raise TypingError(f"options must be None in compiled code, got {options}")
    last = x.ndim - 1
    return lambda target, x, w, options: one_a_row(target, x) and x.shape[last] == w.shape[1]


def ignored(index):
    """The class index that counts nothing."""


@overload(ignored)
def ignored_index(index):
    if isinstance(index, types.NoneType):
        return lambda index: np.int64(-100)
    return lambda index: np.int64(index)


def add_product(g, x, into, pieces, products):
    """Add ``g.T @ x``, made of some columns at a time in memory that stays in cache."""
    rows, features = x.shape
    step = products.size // features
    for start in range(0, into.shape[0], step):
        stop = min(start + step, into.shape[0])
        piece = pieces[: rows * (stop - start)].reshape(rows, stop - start)
        for i in range(rows):  # a slice takes seconds to compile
            for c in range(start, stop):
                piece[i, c - start] = g[i, c]
        product = products[: features * (stop - start)].reshape(stop - start, features)
        np.dot(piece.T, x, product)
        for c in range(start, stop):
            for k in range(features):
                into[c, k] += product[c - start, k]


def linear_rows(x, w, bias, labels, weight, gx, gw, settings):
    """Value and gradients over chunks of the rows that count; of others the input is not read.

    The gradients are empty where they are not wanted. Either may lie over what it is the gradient of.
    """
    ignore, divisor, smoothing, cap, square = settings
    features, classes = x.shape[1], w.shape[0]
    none = np.empty(0, x.dtype)
    wrong = first_wrong(labels.ctypes.data, labels.size, 0, classes, ignore)
    if wrong >= 0:
        return 0.0, wrong
    count, all_count = 0.0, smoothing != 0 or square != 0 or weight.size == 0
    live, dead = np.empty(labels.size, np.int64), np.empty(labels.size, np.int64)
    rows = 0
    for i in range(labels.size):
        label = labels[i]
        own = 0.0
        if label != ignore:
            own = float(weight[label]) if weight.size else 1.0
        count += own
        if label != ignore and (all_count or own != 0):
            live[rows] = i
            rows += 1
        else:
            dead[i - rows] = i
    if divisor != divisor:
        divisor = count
    gathers = rows < labels.size
    height, scratch = rows_of_chunk(rows, classes * x.itemsize)
    scores = np.empty(height * classes, x.dtype)
    chosen = np.empty((height if gathers else 0, features), x.dtype)
    sum_ = gw if apart(gw.reshape(gw.size), w.reshape(w.size)) else np.empty_like(gw)
    step = columns_of_product(classes, features * x.itemsize, scratch)
    adds = gw.size and rows > height
    pieces, products = np.empty(height * step * adds, x.dtype), np.empty(step * features * adds, x.dtype)
    if gathers and gx.size:
        for i in range(labels.size - rows):
            for k in range(features):
                gx[dead[i], k] = 0
    if rows == 0:
        for k in range(sum_.size):
            sum_.reshape(sum_.size)[k] = 0
    total = 0.0
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        part, own = x[start:stop], labels[start:stop]
        if gathers:
            part, own = chosen[: stop - start], np.empty(stop - start, np.int64)
            for i in range(stop - start):
                own[i] = labels[live[start + i]]
            for i in range(stop - start):
                for k in range(features):
                    part[i, k] = x[live[start + i], k]
        flat_scores = scores[: (stop - start) * classes]
        g = flat_scores.reshape(stop - start, classes)
        np.dot(part, w.T, g)
        if bias.size:
            for i in range(stop - start):
                for c in range(classes):
                    g[i, c] += bias[c]
        value, _ = whole(
            flat_scores,
            own,
            flat_scores if gx.size or gw.size else none,
            weight,
            (stop - start, classes, one()),
            (one() - 1, ignore),
            (1.0, 1 / divisor, smoothing, cap, square),
        )
        total += value
        if gw.size and start == 0:
            np.dot(g.T, part, sum_)
        elif gw.size:
            add(g, part, sum_, pieces, products)
        if gx.size and gathers:
            np.dot(g, w, part)
            for i in range(stop - start):
                for k in range(features):
                    gx[live[start + i], k] = part[i, k]
        elif gx.size:
            np.dot(g, w, gx[start:stop])
    for k in range(gw.size):
        gw.reshape(gw.size)[k] = sum_.reshape(gw.size)[k]
    return total / divisor, -1


# Bound by `compile_linear_rows`.
T: Any = np.float32
run: Any = None
function_address: Any = None


def linear_at(call, numbers, result):
    """`linear_rows` as a C function, of what `linear_inside` stores; the value goes into memory."""
    c, n = at_address(call, 0), at_address(numbers, 0.0)
    rows, features, classes, ignore = c[0], c[1], c[2], c[3]
    value, status = run(
        carray(at_address(c[4], T(0)), (rows, features)),
        carray(at_address(c[5], T(0)), (classes, features)),
        carray(at_address(c[6], T(0)), (c[11],)),
        carray(at_address(c[7], 0), (rows,)),
        carray(at_address(c[8], T(0)), (c[12],)),
        carray(at_address(c[9], T(0)), (c[13], features)),
        carray(at_address(c[10], T(0)), (c[14], features)),
        (ignore, n[0], n[1], n[2], n[3]),
    )
    at_address(result, 0.0)[0] = value
    return status


def linear_inside(x, w, bias, labels, weight, gx, gw, settings):
    """The value and the status of contiguous arrays; see `linear_rows`."""
    ignore, divisor, smoothing, cap, square = settings
    call, numbers, result = stack(8 * 15), stack(8 * 4), stack(8)
    store_all(call, (labels.size, x.shape[1], w.shape[0], ignore))
    store_all(call + 32, (x.ctypes.data, w.ctypes.data, bias.ctypes.data, labels.ctypes.data))
    store_all(call + 64, (weight.ctypes.data, gx.ctypes.data, gw.ctypes.data, bias.size, weight.size))
    store_all(call + 104, (gx.shape[0], gw.shape[0]))
    given = divisor, smoothing, cap, square
    for k in range(len(given)):
        store(numbers + 8 * k, given[k])
    store(result, 0.0)
    status = call_linear(function_address(0), (call, numbers, result))
    return at_address(result, 0.0)[0], status


call_linear = caller(types.int64, 3)


def compile_linear(functions: ScoreFunctions, given: scores.Given, dtype: np.dtype) -> tuple[int, ...]:
    """Return the address of `linear_at`."""
    kernels = dict(
        whole=scores.compile_inside((functions,), given, dtype),
        add=njit(**PART)(add_product),
        rows_of_chunk=njit(**HELPER)(chunk_rows),
        columns_of_product=njit(**HELPER)(product_columns),
    )
    name, identity = f"{functions.name}_{dtype.name}", (fingerprint(functions.value), given, dtype.name)
    scope = dict(T=dtype.type, run=bind(linear_rows, kernels, name, identity, njit(**PART)))
    return (compile_function(linear_at, scope, name, identity, types.int64(*[types.int64] * 3)),)


@cache
def compile_linear_rows(functions: ScoreFunctions, given: scores.Given, dtype: np.dtype) -> Any:
    """Return `linear_inside` of a definition."""
    scope = dict(function_address=addresses(compile_linear, functions, given, dtype))
    name, identity = f"{functions.name}_{dtype.name}", (fingerprint(functions.value), given, dtype.name)
    return bind(linear_inside, scope, name, identity, kept(nogil=True, error_model="numpy"))


def number_or(option, absent):
    """An option as a float, or what stands for None."""


@overload(number_or)
def number_or_absent(option, absent):
    if isinstance(option, types.NoneType):
        return lambda option, absent: absent
    return lambda option, absent: float(option)


# Bound by `compile_product`.
linear_of: Any = None
check: Any = None


def linear(
    input,
    linear_weight,
    target,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=None,
    label_smoothing=ZERO,
    options=None,
    softcap=None,
    lse_square_scale=ZERO,
    out=None,
):
    divisor = divisor_of(reduction)
    by_input, by_weight = pair(out)
    if not linear_fits(target, input, linear_weight, options):
        raise ValueError(
            "{loss}: shapes must be (N, F) or (F) of input, (C, F) of linear_weight and (N) or () of target"
        )
    classes, features = linear_weight.shape
    if classes == 0 or features == 0:
        raise ValueError("{loss}: linear_weight must have at least one class and one feature")
    if not weight_fits(linear_bias, classes):
        raise ValueError("{loss}: linear_bias must have one element per class")
    if not weight_fits(weight, classes):
        raise ValueError("{loss}: weight must have one element per class")
    check((label_smoothing, softcap, lse_square_scale))
    if not (same_shape(by_input, input) and same_shape(by_weight, linear_weight)):
        raise ValueError("{loss}: out must have the shapes of input and linear_weight")
    T = input.dtype.type
    x, w, b, c = flat(input, T), flat(linear_weight, T), flat(linear_bias, T), flat(weight, T)
    gx, gw, labels = gradient(by_input, input), gradient(by_weight, linear_weight), flat(target, np.int64)
    if not (may_write((gx, gw), (x, w, b, c)) and apart(gx, labels) and apart(gw, labels)):
        raise ValueError("{loss}: out overlaps an argument; it may be input and linear_weight themselves")
    settings = (
        ignored(ignore_index),
        divisor,
        number_or(label_smoothing, 0.0),
        number_or(softcap, 1.0),
        number_or(lse_square_scale, 0.0),
    )
    value, wrong = linear_of(
        (weight, softcap, label_smoothing, lse_square_scale),
        x.reshape(labels.size, features),
        (
            w.reshape(classes, features),
            b,
            labels,
            c,
            gx.reshape(gx.size // features, features),
            gw.reshape(gw.size // features, features),
            settings,
        ),
    )
    if wrong >= 0:
        raise IndexError("{loss}: target holds a class index that is out of range")
    return T(value)


@cache
def compile_product(loss: str, functions: ScoreFunctions, options: tuple[ScoreOption, ...]) -> Any:
    """Return a function of a loss's name, its definition, and its options' domains."""
    known = {o.name: o for o in options}
    names = "label_smoothing", "softcap", "lse_square_scale"

    @intrinsic
    def of_dtype(typingctx, options, x, arguments):
        given = given_in(dict(zip(OF_BLOCKS, options, strict=True)))
        kernel = compile_linear_rows(functions, given, np.dtype(x.dtype.name))
        result, codegen = link(typingctx, kernel, (x, *arguments))
        return result(options, x, arguments), codegen

    check = checks_of(loss, names, tuple(known[n] for n in names))
    return entry(linear, loss, fingerprint(functions.value), linear_of=of_dtype, check=check)


# ---- sequences -------------------------------------------------------------------------------------
def lengths_fit(lengths, batch, most):
    """Whether there is a length for each sequence, none above `most`."""


@overload(lengths_fit)
def lengths_fit_sequences(lengths, batch, most):
    if not is_label(lengths) or getattr(lengths, "ndim", 0) > 1:
        raise TypingError(f"lengths must be integers, one for each sequence, got {lengths}")

    def impl(lengths, batch, most):
        own = flat(lengths, np.int64)
        return own.size == batch and np.all((own >= 0) & (own <= most))

    return impl


def sequences_of(log_probs):
    """Frames, sequences and classes of log-probabilities."""


@overload(sequences_of)
def sequences_of_log_probs(log_probs):
    if not is_float(log_probs) or log_probs.ndim not in (2, 3):
        raise TypingError(
            f"log_probs must be an array of float32 or float64, (T, N, C) or (T, C), got {log_probs}"
        )
    if log_probs.ndim == 3:
        return lambda log_probs: log_probs.shape
    return lambda log_probs: (log_probs.shape[0], 1, log_probs.shape[1])


def width_of(targets, log_probs):
    """How many labels a row of targets has; 0 of joined ones; -1 where there are too few or many rows."""


@overload(width_of)
def width_of_targets(targets, log_probs):
    if not isinstance(targets, types.Array) or not is_label(targets) or targets.ndim not in (1, 2):
        raise TypingError(f"targets must be an array of integers with one or two axes, got {targets}")
    if targets.ndim == 2:
        return lambda targets, log_probs: (
            targets.shape[1] if targets.shape[0] == sequences_of(log_probs)[1] else -1
        )
    return lambda targets, log_probs: 0


ctc_of = by_dtype(ctc.compile_inside)


def sequences(
    log_probs,
    targets,
    input_lengths,
    target_lengths,
    blank=0,
    reduction="mean",
    zero_infinity=False,
    out=None,
):
    divisor = divisor_of(reduction)
    longest, batch, classes = sequences_of(log_probs)
    if classes == 0:
        raise ValueError("{loss}: log_probs must have shape (T, N, C) or (T, C), C at least 1")
    if not 0 <= blank < classes:
        raise ValueError("{loss}: blank must be a class")
    width = width_of(targets, log_probs)
    if width < 0:
        raise ValueError("{loss}: targets must have shape (N, S), or one axis with all sequences' labels")
    if not lengths_fit(input_lengths, batch, longest):
        raise ValueError("{loss}: input_lengths must be one for each sequence, at most the frames")
    if not lengths_fit(target_lengths, batch, targets.shape[targets.ndim - 1]):
        raise ValueError("{loss}: target_lengths must be one for each sequence, at most the labels")
    if not same_shape(out, log_probs):
        raise ValueError("{loss}: out must have log_probs's shape")
    T = log_probs.dtype.type
    x, g, labels = flat(log_probs, T), gradient(out, log_probs), flat(targets, np.int64)
    frame_counts, label_counts = flat(input_lengths, np.int64), flat(target_lengths, np.int64)
    if targets.ndim == 1 and log_probs.ndim == 3 and label_counts.sum() != labels.size:
        raise ValueError("{loss}: target_lengths must sum to the number of labels")
    if not (may_write((g,), (x,)) and apart(g, labels) and apart(g, frame_counts) and apart(g, label_counts)):
        raise ValueError("{loss}: out overlaps an argument; it may be log_probs itself")
    settings = np.int64(blank), bool(zero_infinity), reduction == "mean", 1.0, divisor
    value, status = ctc_of(
        x, (labels, label_counts, frame_counts, g, width, (longest, batch, classes), settings)
    )
    if status >= 0:
        raise IndexError("{loss}: targets holds a class index that is out of range")
    if status != ctc.OK:
        raise ValueError("{loss}: arrays do not fit together")
    return T(value)


@cache
def compile_sequences(name: str) -> Any:
    """Return a function of sequences of labels."""
    return entry(sequences, name, name)
