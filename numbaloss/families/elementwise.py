"""The elementwise family: each term depends on one element of two or three arrays."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from .. import arguments
from ..arguments import Operand, like_scores, scores
from ..arrays import as_array, check_broadcasts, floating, is_weak
from ..call import (
    MEAN,
    Evaluation,
    Settings,
    compute,
    dtypes_of,
    evaluate,
    resolve_normalizer,
    resolve_upstream,
)
from ..kernels import inside
from ..kernels.spec import (
    ABSOLUTE,
    BY_DATA,
    BY_ROWS,
    BY_TERMS,
    BY_WEIGHTS,
    EXACT,
    FISHER,
    GERSHGORIN,
    GRADIENT,
    MAJORIZER,
    OF_CURVATURES,
    VALUE,
    Elements,
    Scalars,
    Weighting,
)
from ..loss import OF_CURVATURE, OF_GRADIENT, VALUED, Binding, Loss, plain_function

# Settings of a gradient's call, beside `wrt`.
HOW = ("accumulate", *OF_CURVATURE)


class ElementSettings(Settings):
    """A call's checked options, and what kernels make of them.

    Attributes
    ----------
    numbers : tuple of float
        The options that are given at run time.
    scalars : dict
        The functions of one element, by how many operands the call gives.
    """

    def __init__(self, cls: "type[ElementwiseLoss]", mode: str, call: Mapping[str, Any]) -> None:
        super().__init__(cls, mode, call)
        if mode in OF_CURVATURES and not self.single:
            raise ValueError(
                f"{cls.function.__name__}: value_grad_hess takes one name in wrt, got {self.wrt!r}"
            )
        values = [self.options[n] for n in cls._option_names]
        self.numbers = tuple(float(v) for v in values if not isinstance(v, bool))
        statics = tuple(v if isinstance(v, bool) else None for v in values)
        arities = range(len(cls._required), len(cls._arrays) + 1)
        self.scalars = {arity: cls._scalars(statics, arity) for arity in arities}


class Arrays:
    """A call's checked arrays.

    Attributes
    ----------
    operands : dict
        Those of the value, by name.
    weight, sample_weight : array or None
    shape : tuple of int
        Of the terms.
    dtype, arithmetic : dtype
    """

    def __init__(self, cls: "type[ElementwiseLoss]", wrt: tuple[str, ...], call: dict[str, Any]) -> None:
        name, first = cls.function.__name__, cls._arrays[0]
        arrays: dict[str, Any] = {}
        for n in (*cls._arrays, "weight", "sample_weight"):
            if call.get(n) is not None:
                arrays[n] = as_array(name, n, call[n])
            elif n in cls._required:
                raise TypeError(f"{name}: {n} must be an array, got None")
        floats = {}
        for n, a in arrays.items():
            if n in (first, *wrt) or not is_weak(a, call[n]):
                floats[n] = arrays[n] = floating(name, n, a)
        self.dtype, self.arithmetic = dtypes_of(floats)
        for n in arrays.keys() - floats.keys():
            arrays[n] = arrays[n].astype(self.arithmetic)
        for n in wrt:
            if n not in arrays:
                raise ValueError(f"{name}: wrt names {n!r}, which is not given")
        self.shape = shape = arrays[first].shape
        for n in cls._arrays:
            if n not in arrays or arrays[n].shape == shape:
                continue
            if not cls.operands[n].broadcast:
                raise ValueError(f"{name}: {n} must have {first}'s shape {shape}, got {arrays[n].shape}")
            arrays[n] = cls._broadcast(name, n, arrays[n], shape)
        for n in ("weight", "sample_weight"):
            if n in arrays:
                check_broadcasts(name, n, arrays[n], shape)
        self.operands = {n: arrays[n] for n in cls._arrays if n in arrays}
        self.weight, self.sample_weight = arrays.get("weight"), arrays.get("sample_weight")


class ElementwiseLoss(Loss):
    """A loss whose terms depend on one element of each array: subclass it and define ``value``.

    ``value(input, target, <options>)`` gives one term, in ordinary arithmetic and the functions of
    ``numbaloss.math``; ``if`` is welcome. Its arguments that are no fields are the arrays. The derivatives
    are derived. One that is better stated by hand is given as ``slope_<argument>``, which takes the same
    arguments; so may be ``majorizer_<argument>`` and ``fisher_<argument>``, which `value_grad_hess` gives in
    place of the curvature when asked for. ``check(<options>)``, where there is one, raises a ValueError for
    options that do not go together.

    Attributes
    ----------
    domains : dict
        Operands by name (see ``numbaloss.arguments``) where the default, any number, does not fit.
    residual : bool
        Whether the loss is an even function of input - target, the first two operands, and concave in its
        square: then slope / (input - target) is a majorizer.
    """

    domains: ClassVar[dict[str, Operand]] = {}
    residual: ClassVar[bool] = False
    value: ClassVar[Callable[..., Any]]
    # Whether the sum of `weight` is the divisor of reduction='mean'.
    weight_in_divisor: ClassVar[bool] = False

    _option_names: ClassVar[tuple[str, ...]] = ()
    _arrays: ClassVar[tuple[str, ...]] = ()  # value's operands, in order
    _slopes: ClassVar[tuple[str, ...]] = ()  # operands whose slope is stated by hand
    _curvatures: ClassVar[tuple[tuple[str, str], ...]] = ()  # the same of what stands for the curvature

    @classmethod
    def _complete(cls) -> bool:
        return "value" in cls.__dict__ or hasattr(cls, "value")

    @classmethod
    def _prepare(cls) -> None:
        if "reduction" not in cls.fields:
            cls.fields = {**cls.fields, "reduction": arguments.reduction()}
        value = plain_function(cls, "value")
        names = list(inspect.signature(value).parameters)
        arrays = [n for n in names if n not in cls.fields or cls.fields[n].array]
        options = names[len(arrays) :]
        if names[: len(arrays)] != arrays or not 2 <= len(arrays) <= 3:
            raise TypeError(
                f"{cls.__name__}.value must take two or three arrays, then options; got {', '.join(names)}"
            )
        defaults = {n: scores() if k == 0 else like_scores() for k, n in enumerate(arrays)}
        cls.operands = {n: cls.domains.get(n, defaults[n]) for n in arrays}
        cls._arrays = tuple(arrays)
        cls._required = tuple(n for n in arrays if n not in cls.fields)
        cls._option_names = tuple(options)
        cls._slopes = tuple(n for n in arrays if hasattr(cls, f"slope_{n}"))
        cls._curvatures = tuple(
            (policy, n) for n in arrays for policy in (MAJORIZER, FISHER) if hasattr(cls, f"{policy}_{n}")
        )
        cls._stated = (
            "value",
            *(f"slope_{n}" for n in cls._slopes),
            *(f"{policy}_{n}" for policy, n in cls._curvatures),
        )

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return (*cls._arrays, *(("weight",) if "weight" in cls.fields else ()))

    @classmethod
    def _scalars(cls, statics: tuple[bool | None, ...], arity: int) -> Scalars:
        operands = [cls.operands[n] for n in cls._arrays]
        domains = [o.domain for o in operands[:arity]] + [None] * (3 - arity)
        return Scalars(
            cls.function.__name__,
            arity,
            cls._function("value"),
            tuple((cls._arrays.index(n), cls._function(f"slope_{n}")) for n in cls._slopes),
            statics,
            tuple(domains),
            tuple(o.absent for o in operands[arity:]),
            tuple((p, cls._arrays.index(n), cls._function(f"{p}_{n}")) for p, n in cls._curvatures),
        )

    @classmethod
    def _scalar(cls) -> Any:
        scalars = cls._scalars((None,) * len(cls._option_names), len(cls._required))
        names = (*cls._required, *cls._option_names)
        defaults = tuple(cls.fields[n].default for n in cls._option_names)
        return inside.scalar(scalars, names, defaults)

    @classmethod
    def _jit(cls) -> Any:
        scalars = cls._scalars((None,) * len(cls._option_names), len(cls._required))
        options = [n for n, f in cls.fields.items() if not f.array]
        defaults = (*(cls.fields[n].default for n in options), None)
        names = (*cls._required, *options, "out")
        return inside.of_elements(scalars, names, defaults, cls._option_names)

    @classmethod
    def _shapes_of_scores(cls, call: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        given = [np.shape(call[n]) for n in cls._required if call.get(n) is not None]
        return dict.fromkeys(cls._required, np.broadcast_shapes(*given))

    # ---- the call ----------------------------------------------------------------------------------
    @classmethod
    def _evaluate(cls, mode: str, binding: Binding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return evaluate(cls, mode, binding, args, kwargs)

    @classmethod
    def _evaluation(cls, mode: str, call: dict[str, Any], backend: Any) -> Evaluation:
        return Evaluation(cls, mode, call, backend)

    @classmethod
    def _settings(cls, mode: str, call: Mapping[str, Any]) -> ElementSettings:
        """Check a call's options and `wrt`, or find them checked."""
        given = [(n, call[n]) for n, f in cls.fields.items() if not f.array and n in call]
        wrt = call.get("wrt")
        given += [(n, call[n]) for n in HOW if n in call]
        key = mode, tuple(wrt) if isinstance(wrt, list) else wrt, *((n, type(v), v) for n, v in given)
        try:
            found = cls._made.settled.get(key)
        except TypeError:  # not hashable: its check says so
            return ElementSettings(cls, mode, call)
        if found is None:
            found = cls._made.settled[key] = ElementSettings(cls, mode, call)
        return found

    @classmethod
    def _problem(cls, settings: ElementSettings, call: dict[str, Any], backend: Any) -> Elements:
        name, mode = cls.function.__name__, settings.mode
        arrays = Arrays(cls, settings.wrt, call)
        if "weight" in settings.wrt and mode in OF_CURVATURES:
            raise ValueError(f"{name}: the loss is linear in weight; value_grad_hess needs another wrt")
        weighting, counts = cls._weighting(settings, arrays, call, backend)
        return Elements(
            name,
            settings.scalars[len(arrays.operands)],
            tuple(arrays.operands.values()),
            tuple(arrays.operands),
            settings.numbers,
            weighting,
            counts,
            mode in VALUED,
            arrays.shape,
            arrays.dtype,
            arrays.arithmetic,
            settings.policy,
            settings.floor,
        )

    @classmethod
    def _weighting(
        cls, settings: ElementSettings, arrays: Arrays, call: dict[str, Any], backend: Any
    ) -> tuple[Weighting, str]:
        """Return what multiplies the terms, and what the mean counts."""
        name, reduction, shape = cls.function.__name__, settings.reduction, arrays.shape
        weight, sample_weight = arrays.weight, arrays.sample_weight
        product = sample_weight if weight is None else weight
        if weight is not None and sample_weight is not None:
            product = backend.masked_product(sample_weight, weight, arrays.arithmetic)
        counted = product if cls.weight_in_divisor else sample_weight
        counts = BY_TERMS if counted is None else BY_WEIGHTS
        divisor: Any = resolve_normalizer(name, call.get("normalizer"))
        if reduction in ("none", "sum"):
            divisor = 1.0
        elif divisor is None and reduction == "batchmean":
            # It counts rows where the mean counts terms; without axes it is not divided.
            counts = BY_ROWS
            if counted is not None:
                counts, divisor = BY_DATA, 1.0
                if shape:
                    divisor = backend.total(counted, shape[0] / max(1, counted.size), arrays.arithmetic)
        elif divisor is None and counted is not None and counted is not product:
            counts, size = BY_DATA, math.prod(shape)
            divisor = backend.total(counted, size / counted.size, arrays.arithmetic) if size else 0.0
        factor, upstream = resolve_upstream(name, call.get("grad_output"), shape, reduction)
        return Weighting(reduction, product, upstream, factor, divisor), counts

    @classmethod
    def _broadcast(cls, name: str, argument: str, array: Any, shape: tuple[int, ...]) -> Any:
        """Return a smaller operand with the axes it needs to broadcast to the terms' shape."""
        check_broadcasts(name, argument, array, shape)
        return array

    @classmethod
    def _check_curvature(cls, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
        pass  # there is one by every operand

    @classmethod
    def _check_policy(cls, settings: Settings) -> None:
        (by,), policy = settings.wrt, settings.policy
        by_residual = policy == MAJORIZER and cls.residual and by in cls._arrays[:2]
        if policy in (EXACT, ABSOLUTE, GRADIENT) or (policy, by) in cls._curvatures or by_residual:
            return
        why = "the definition states none"
        if policy == GERSHGORIN:
            why = "it is of class scores"
        elif policy == MAJORIZER:
            why = "the loss is not of the residual alone, and the definition states none"
        raise ValueError(f"{cls.function.__name__}: there is no curvature {policy!r} by {by!r}: {why}")

    @classmethod
    def _run_problem(
        cls,
        settings: Settings,
        problem: Elements,
        outputs: dict[str, Any],
        call: dict[str, Any],
        backend: Any,
    ) -> Any:
        """Write the gradients; of an operand that is broadcast it is the sum over where it was used."""
        by_weight = None
        if "weight" in outputs:
            # Computed before its arguments may be overwritten, and written when they are no longer needed.
            by_weight = cls._by_weight(settings, problem, call, backend)
        others = {n: o for n, o in outputs.items() if n != "weight"}
        full = {
            n: o if o.shape == problem.shape else backend.empty_like(o, problem.arithmetic, problem.shape)
            for n, o in others.items()
        }
        value = backend.run(problem, full) if others or problem.valued else None
        for n, o in others.items():
            if full[n] is not o:
                argument = settings.wrt[0] if n == "curvature" else n
                backend.fold(full[n], cls._broadcast(problem.name, argument, o, problem.shape))
        if by_weight is not None:
            backend.fold(by_weight, outputs["weight"])
        return value

    @classmethod
    def _runs_once(cls, problem: Elements, outputs: dict[str, Any]) -> bool:
        """Return whether a call is one run of the backend, with the outputs as they are."""
        if problem.counts == BY_DATA:
            return False
        return all(n != "weight" and o.shape == problem.shape for n, o in outputs.items())

    @classmethod
    def _weights_have_part(cls, settings: Any, call: dict[str, Any]) -> bool:
        reduced = settings.reduction not in ("none", "sum")
        return reduced and cls.weight_in_divisor and call.get("normalizer") is None

    @classmethod
    def _by_weight(cls, settings: Settings, problem: Elements, call: dict[str, Any], backend: Any) -> Any:
        """Return each term's part of the gradient by `weight`: ``(term - value) * sample_weight / divisor``.

        The value is there where the divisor is a sum of weights too: then d(sum w l / sum w) is
        (l - value) / sum w.
        """
        valued = {n: v for n, v in call.items() if n not in (*OF_GRADIENT, *OF_CURVATURE)}
        # Terms and value of the arithmetic's dtype, which may be the weight's alone.
        first = cls._arrays[0]
        valued[first] = as_array(problem.name, first, call[first]).astype(problem.arithmetic, copy=False)
        bare = {n: v for n, v in valued.items() if n not in ("weight", "sample_weight", "normalizer")}
        terms = compute(cls, VALUE, {**bare, "reduction": "none"}, backend)
        less = None
        if MEAN in call:  # of all ranks
            less = call[MEAN]
        elif cls._weights_have_part(settings, call):
            less = compute(cls, VALUE, valued, backend)
        weighting = problem.weighting._replace(
            sample_weight=Arrays(cls, settings.wrt, call).sample_weight, divisor=backend.divisor(problem)
        )
        return backend.excess(terms, less, weighting, problem.arithmetic)
