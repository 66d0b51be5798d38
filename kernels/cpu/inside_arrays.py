"""Arrays and options of calls inside the caller's own compiled code, shared by the losses of rows.

A loss's function has the loss's own parameters and then `out`, which receives the gradient: an array, or for
several gradients a tuple of arrays, or of None where one is not wanted. It may be the very array that it is
the gradient of. The value is of the input's dtype, float32 or float64, which all is computed in. Losses run
on the calling thread, through the serial kernels that the library's own calls run.

What cannot be is a TypingError, when the caller's function is compiled. What is raised at run time has
constant messages: that is all that Numba can do where the GIL is not held.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload, typeof_impl

from ..bind import bind
from ..compiler import Linked
from ..spec import ScoreOption
from .inside import apart

ENTRY: dict[str, Any] = dict(nogil=True, error_model="numpy")
# Of functions that only entries call.
PART: dict[str, Any] = ENTRY | {"pipeline_class": Linked}


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


def weight_fits(weight, classes):
    """Whether there is a weight for each class, or none."""


@overload(weight_fits)
def weight_fits_classes(weight, classes):
    if isinstance(weight, types.NoneType):
        return lambda weight, classes: True
    if not isinstance(weight, types.Array) or weight.ndim != 1:
        raise TypingError(f"weight must be an array with one axis, got {weight}")
    return lambda weight, classes: weight.size == classes


def entry(template: Any, name: str, identity: Any, **scope: Any) -> Any:
    """Return a template as a loss's function; its messages say the loss's name for ``{loss}``."""
    code = template.__code__
    said = tuple(c.replace("{loss}", name) if isinstance(c, str) else c for c in code.co_consts)
    of_loss = FunctionType(code.replace(co_consts=said), template.__globals__, name, template.__defaults__)
    return bind(of_loss, scope, "inside", (name, identity), njit(**ENTRY))


# ---- options ----------------------------------------------------------------------------------------
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
