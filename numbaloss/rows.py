"""What the families with one term for each row share: weights of terms, outputs, and the order of a call."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from . import dispatch, memory
from .elementwise import broadcasts
from .loss import (
    GRAD,
    MISSING,
    VALUE,
    VALUE_GRAD_HESS,
    Loss,
    Recipe,
    call_arguments,
    resolve_normalizer,
    resolve_wrt,
    upstream,
)


class Terms(NamedTuple):
    """What multiplies and divides a call's terms."""

    sample_weight: np.ndarray | None
    upstream: np.ndarray | None
    factor: float  # of the gradient: grad_output, where it is a number
    normalizer: float | None
    divisor: float  # NaN for what the rows count for


class RowLoss(Loss):
    """A loss with one term for each row of its arrays."""

    @classmethod
    def _evaluate(cls, mode: str, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if recipe.plain:
            result = cls._evaluate_quick(mode, recipe, args, kwargs)
            if result is not MISSING:
                return result
        call = call_arguments(recipe, args, kwargs)
        if any(map(dispatch.is_device_array, call.values())):
            from . import device_losses  # on the first call with an array on a device

            return device_losses.evaluate(cls, mode, call)
        return cls._evaluate_call(mode, call, cls._compute)

    @classmethod
    def _jit(cls) -> Any:
        from .kernels.cpu import inside_rows

        return getattr(inside_rows, cls.function.__name__)

    @classmethod
    def _evaluate_quick(cls, mode: str, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The commonest call, with nothing that it does not need.

        Returns MISSING where the call is not of that kind; whatever is wrong with it is found there.
        """
        return MISSING

    @classmethod
    def _evaluate_call(
        cls,
        mode: str,
        call: dict[str, Any],
        compute: Callable[..., Any],
        check: Callable[..., Any] | None = None,
    ) -> Any:
        options = cls._options_of(call)
        wrt, single = ((), True) if mode == VALUE else resolve_wrt(cls, call.get("wrt"))
        p = (check or cls._check)(call, options, wrt)
        if mode == VALUE_GRAD_HESS:
            cls._check_curvature(options, wrt)
        outputs = cls._outputs(mode, call, wrt, single)
        value = compute(p, options, outputs)
        if mode == VALUE:
            return value
        gradients = tuple(outputs[n] for n in wrt)
        if mode == VALUE_GRAD_HESS:
            return value, gradients[0], outputs["curvature"]
        result = gradients[0] if single else gradients
        return result if mode == GRAD else (value, result)

    # ---- what a family states ----------------------------------------------------------------------
    @classmethod
    def _check(cls, call: dict[str, Any], options: dict[str, Any], wrt: tuple[str, ...]) -> Any:
        """A call's arrays, checked: libraries, dtypes, shapes, and what the mean divides by."""
        raise NotImplementedError

    @classmethod
    def _check_curvature(cls, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
        raise ValueError(f"{cls.function.__name__}: has no value_grad_hess")

    @classmethod
    def _compute(cls, p: Any, options: dict[str, Any], outputs: dict[str, np.ndarray]) -> Any:
        """Write the outputs; return the value."""
        raise NotImplementedError

    # ---- shared ------------------------------------------------------------------------------------
    @classmethod
    def _options_of(cls, call: dict[str, Any]) -> dict[str, Any]:
        name = cls.function.__name__
        options = {n: f.check(name, n, call.get(n, f.default)) for n, f in cls.fields.items() if not f.array}
        cls._check_options(options)
        return options

    @classmethod
    def _terms(
        cls,
        call: dict[str, Any],
        options: dict[str, Any],
        rows: tuple[int, ...],
        floats: dict[str, np.ndarray],
    ) -> Terms:
        """What multiplies and divides the terms; `sample_weight` joins `floats`, which make the dtype."""
        name = cls.function.__name__
        sample_weight = cls._weak("sample_weight", call, floats)
        if sample_weight is not None and not broadcasts(sample_weight.shape, rows):
            raise ValueError(
                f"{name}: sample_weight of shape {sample_weight.shape} does not broadcast to {rows}"
            )
        up: Any = call.get("grad_output")
        if dispatch.described(up):
            factor, up = 1.0, up.as_upstream(name, rows, options["reduction"])
        else:
            factor, up = upstream(name, up, rows, options["reduction"])
        if up is not None:
            up = dispatch.floating(name, "grad_output", up)
        normalizer = resolve_normalizer(name, call.get("normalizer"))
        divisor = 1.0 if options["reduction"] != "mean" else math.nan if normalizer is None else normalizer
        return Terms(sample_weight, up, factor, normalizer, divisor)

    @classmethod
    def _weak(
        cls, argument: str, call: dict[str, Any], floats: dict[str, np.ndarray], wrt: tuple[str, ...] = ()
    ) -> np.ndarray | None:
        """An optional array that joins `floats`; as in NumPy, a number or integer array promotes no float."""
        given = call.get(argument)
        if given is None:
            return None
        name = cls.function.__name__
        array = dispatch.as_array(name, argument, given)
        if argument in wrt or not (array.dtype.kind in "iub" or type(given) in (int, float)):
            array = floats[argument] = dispatch.floating(name, argument, array)
        return array

    @classmethod
    def _outputs(
        cls, mode: str, call: dict[str, Any], wrt: tuple[str, ...], single: bool
    ) -> dict[str, np.ndarray]:
        """The arrays to write: gradients by their argument's name, and ``"curvature"``."""
        name = cls.function.__name__
        names = (*wrt, "curvature") if mode == VALUE_GRAD_HESS else wrt
        out = call.get("out")
        if out is None:
            outs: tuple[Any, ...] = (None,) * len(names)
        elif len(names) == 1 and single:
            outs = (out,)
        elif isinstance(out, tuple | list) and len(out) == len(names):
            outs = tuple(out)
        else:
            raise TypeError(f"{name}: out must be a tuple of {len(names)} arrays, got {type(out).__name__}")
        arguments = (*cls._required, *(n for n, f in cls.fields.items() if f.array))
        inputs = [
            (n, dispatch.as_array(name, n, call[n]))
            for n in (*arguments, "sample_weight", "grad_output")
            if call.get(n) is not None
        ]
        made: dict[str, np.ndarray] = {}
        for n, o in zip(names, outs, strict=True):
            like = dispatch.as_array(name, n, call[wrt[0] if n == "curvature" else n])
            if o is None:
                o = empty_like(like)
            else:
                dispatch.check_out(name, n, o, like, inputs)
                for other in made.values():
                    if dispatch.share_memory(o, other):
                        raise ValueError(f"{name}: two arrays in out overlap")
            made[n] = o
        return made


def empty_like(array: Any) -> Any:
    """A new array for a gradient: laid out as its argument, where no element shares its memory."""
    if dispatch.described(array):
        return array.empty_like()
    if array.flags.c_contiguous and array.dtype.isnative:
        return memory.empty(array.shape, array.dtype)
    made = np.empty_like(array, subok=False)
    if dispatch.overlaps_itself(made) or not made.dtype.isnative:
        made = np.empty(array.shape, array.dtype.newbyteorder("="))
    return made


def flat(array: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An optional array over rows, as kernels take it: broadcast, contiguous, empty for none."""
    if array is None:
        return np.empty(0, dtype)
    return dispatch._writeable(np.ascontiguousarray(np.broadcast_to(array, shape), dtype).reshape(-1))


class Places(NamedTuple):
    """Where a call's arrays lie, as kernels take it."""

    addresses: np.ndarray
    codes: np.ndarray  # of the elements; -1 for an absent array
    shape: np.ndarray  # common, axes merged
    strides: np.ndarray  # in bytes, a row an array


def places(arrays: list[np.ndarray | None]) -> Places:
    """Describe arrays of one shape, some of them absent."""
    shape, packed = dispatch._collapse([a for a in arrays if a is not None])
    strides = np.zeros((len(arrays), len(shape)), np.int64)
    strides[[a is not None for a in arrays]] = packed
    return Places(
        np.array([0 if a is None else dispatch.address_of(a) for a in arrays], np.int64),
        np.array([-1 if a is None else dispatch.code_of(a.dtype) for a in arrays], np.int64),
        np.array(shape, np.int64),
        strides,
    )


def workers() -> int:
    """Into how many shares the tiles are cut; the result does not depend on it."""
    return 4 * numba.config.NUMBA_NUM_THREADS
