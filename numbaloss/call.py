"""The one order of every call, whatever its loss and its device.

Arguments by name, described by the backend of their device; options and arrays checked, which makes a
problem; outputs; the backend's run; results for the caller's library. Calls of a signature that was seen
before go straight to what was prepared for them.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from . import arguments, shared
from .arguments import Option
from .arrays import (
    as_array,
    as_plain,
    check_broadcasts,
    check_out,
    floating,
    is_foreign,
    is_weak,
    library_of,
    taken,
)
from .distributed.communicators import communicator
from .kernels import devices, inside
from .kernels.layout import overlaps_itself, share_memory
from .kernels.spec import (
    CODES,
    CURVATURES,
    DOUBLE,
    EXACT,
    GRAD,
    MISSING,
    OF_CURVATURES,
    ScoreOption,
    Weighting,
    arithmetic_dtype,
    common_dtype,
    is_described,
)
from .loss import COUNT, OF_DERIVATIVES, PARTIAL, VALUED, Binding, Loss
from .quick import Prepared, is_said, never, prepare, signature, with_outputs

MEAN = shared.MEAN
ADDS: arguments.Option = arguments.flag(False)
POLICY: arguments.Option = arguments.choice(EXACT, CURVATURES)
FLOOR: arguments.Option = arguments.non_negative(0.0)


class Settings:
    """A call's checked options and `wrt`.

    Attributes
    ----------
    mode : str
    options : dict
        All but the arrays, by name.
    wrt : tuple of str
        Arguments to differentiate.
    single : bool
        Whether `wrt` was a name, and no tuple.
    adds : bool
        Whether outputs are added to what is there.
    policy : str
        What stands for the curvature.
    floor : float or None
        That it is not below.
    """

    def __init__(self, cls: type[Loss], mode: str, call: Mapping[str, Any]) -> None:
        name = cls.function.__name__
        self.mode = mode
        self.options: dict[str, Any] = {
            n: f.check(name, n, call[n]) if n in call else f.default
            for n, f in cls.fields.items()
            if not f.array
        }
        cls._check_options(self.options)
        self.wrt, self.single = resolve_wrt(cls, call.get("wrt")) if mode in OF_DERIVATIVES else ((), True)
        self.reduction: str = self.options["reduction"]
        self.adds: bool = ADDS.check(name, "accumulate", call.get("accumulate", False))
        self.policy: str = POLICY.check(name, "curvature", call.get("curvature", EXACT))
        floor = call.get("floor")
        self.floor: float | None = None if floor is None else FLOOR.check(name, "floor", floor)


# ---- the order of a call ------------------------------------------------------------------------------


def evaluate(cls: Any, mode: str, binding: Binding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluate a loss: as a call seen before, or from the beginning."""
    values: tuple[Any, ...] = (*args, *kwargs.values()) if kwargs else args
    on_device = values[0].__class__ is not np.ndarray and devices.is_device_array(values[0])
    sign = devices.signature if on_device else signature
    prepared = None
    if binding.out < 0:
        key: Any = sign(values)
    else:
        values, key = with_outputs(values, binding.out, sign)
    try:
        prepared = binding.prepared.get(key)
    except TypeError:  # a value has no hash
        key = None
    if prepared is not None:
        result = prepared(values)
        if result is not MISSING:
            return result
    if (
        kwargs.get("comm") is not None
        and kwargs.get("classes") is None
        and communicator(kwargs["comm"]).size == 1
    ):
        return cls.function._run(mode, args, {n: v for n, v in kwargs.items() if n != "comm"})
    call = call_arguments(binding, args, kwargs)
    if any(is_foreign(v) for n, v in call.items() for v in (v if n == "out" and type(v) is tuple else (v,))):
        return evaluate_foreign(cls, mode, binding, call, len(args), kwargs)
    numbers = {} if on_device or prepared is not None else numbers_of(cls, call)
    if numbers:  # a signature tells numbers, and not those in arrays: none would be seen to change
        every = [numbers.get(n, v) for n, v in call.items()]
        return evaluate(
            cls, mode, binding, tuple(every[: len(args)]), dict(zip(kwargs, every[len(args) :], strict=True))
        )
    if mode in (COUNT, PARTIAL):
        return (count if mode == COUNT else partial)(cls, call)
    if call.get("classes") is not None:
        return cls._evaluate_classes(mode, call)
    if call.get("comm") is not None:
        return shared.evaluate(cls, mode, call)
    backend = devices.of(call.values())
    keeps = key is not None and prepared is None and on_device == (backend is not devices.cpu())
    with backend.describe(cls.function.__name__, call, cls._may_be_on_host) as described:
        evaluation = cls._evaluation(mode, described, backend)
        result = evaluation.result()
        if keeps and is_said((v for n, v in call.items() if n != "out"), on_device):
            made = evaluation.prepared(values)
            if made is not None:
                binding.prepared[key] = made
    return backend.give(result)


def evaluate_foreign(
    cls: Any, mode: str, binding: Binding, call: dict[str, Any], count: int, names: Iterable[str]
) -> Any:
    """Evaluate a loss of other libraries' arrays, where they lie; results are of the first one's library."""
    loss, first = cls.function.__name__, None
    originals: dict[int, tuple[Any, Any]] = {}

    def plain(name: str, value: Any) -> Any:
        nonlocal first
        if name == "out" and isinstance(value, tuple | list):
            return tuple(plain(name, v) for v in value)
        if not is_foreign(value):
            return value
        # An argument that is its own output stays one array.
        known = next((a for a, v in originals.values() if v is value), None)
        array = taken(loss, name, value) if known is None else known
        originals[id(array)] = array, value
        first = first if first is not None else value
        return array

    every = [plain(n, v) for n, v in call.items()]
    result = evaluate(cls, mode, binding, tuple(every[:count]), dict(zip(names, every[count:], strict=True)))
    take = library_of(first)

    def give(found: Any) -> Any:
        if type(found) is float:  # a count
            return found
        if isinstance(found, tuple):
            return tuple(map(give, found))
        if id(found) in originals:
            return originals[id(found)][1]
        return take(found if devices.is_device_array(found) else np.asarray(found))

    return give(result)


def count(cls: Any, call: dict[str, Any]) -> float:
    """Return what a mean divides by."""
    call = {n: v for n, v in call.items() if v is not None}
    if call.get("reduction") in ("none", "sum"):
        del call["reduction"]
    backend = devices.of(call.values())
    with backend.describe(cls.function.__name__, call, cls._may_be_on_host) as described:
        missing = [n for n in cls._required if n not in described]
        shapes = cls._shapes_of_scores(described) if missing else {}
        for n in missing:
            one = backend.empty((1,) * len(shapes[n]), DOUBLE)
            described[n] = np.broadcast_to(one, shapes[n])
        return cls._evaluation(COUNT, described, backend).part.divisor()


def partial(cls: Any, call: dict[str, Any]) -> tuple[float, float]:
    """Return the sum of the terms, and what a mean divides by."""
    if call.get("reduction") in ("none", "sum"):
        call = {n: v for n, v in call.items() if n != "reduction"}
    backend = devices.of(call.values())
    with backend.describe(cls.function.__name__, call, cls._may_be_on_host) as described:
        evaluation = cls._evaluation(PARTIAL, described, backend)
        divisor = evaluation.part.divisor()
        evaluation.part.share(1.0)
        return backend.as_float(evaluation.result()), divisor


def compute(cls: Any, mode: str, call: dict[str, Any], backend: Any) -> Any:
    """Evaluate a loss of arrays that are described; what it gives is not yet the caller's."""
    return Evaluation(cls, mode, call, backend).result()


class Evaluation:
    """A call with arrays that are described: checked, and its outputs made."""

    def __init__(self, cls: Any, mode: str, call: dict[str, Any], backend: Any) -> None:
        self.cls, self.mode, self.call, self.backend = cls, mode, call, backend
        self.settings = settings = cls._settings(mode, call)
        for n in settings.wrt:
            if call.get(n) is not None and not backend.holds(call[n]):
                name = cls.function.__name__
                raise TypeError(f"{name}: {n} must be an array on the device to be differentiated")
        self.problem = cls._problem(settings, call, backend)
        if mode in OF_CURVATURES:
            cls._check_curvature(settings.options, settings.wrt)
            if settings.policy != EXACT or settings.floor is not None:
                cls._check_policy(settings)
        self.outputs = make_outputs(cls, settings, call, backend)

    @property
    def part(self) -> "Evaluation":
        """Itself: others are made of one."""
        return self

    def divisor(self) -> float:
        """Return what a mean divides by."""
        return float(self.backend.as_float(self.backend.divisor(self.problem)))

    def share(self, divisor: float) -> None:
        """Take the call for a part of one: gradients are divided, and the value is a sum, in float64."""
        w = self.problem.weighting
        factor, left = self.backend.over(w.factor, divisor)
        weighting = w._replace(factor=factor, divisor=left)
        self.problem = self.problem._replace(weighting=weighting, dtype=DOUBLE)

    def result(self) -> Any:
        """Write the outputs, and return what the mode gives."""
        outputs, settings, backend = self.outputs, self.settings, self.backend
        written = {n: as_plain(o) for n, o in outputs.items()}
        into = written
        if settings.adds:
            into = {n: backend.empty_like(o, self.problem.arithmetic) for n, o in written.items()}
        value = self.cls._run_problem(settings, self.problem, into, self.call, backend)
        if settings.adds:
            for n, o in written.items():
                backend.add(o, into[n])
        if self.mode not in OF_DERIVATIVES:
            return value
        gradients = tuple(outputs[n] for n in settings.wrt)
        if self.mode in OF_CURVATURES:
            return value, gradients[0], outputs["curvature"]
        result = gradients[0] if settings.single else gradients
        return result if self.mode == GRAD else (value, result)

    def prepared(self, values: tuple[Any, ...]) -> Prepared | None:
        """Return a function that serves other calls of this one's signature.

        None of a call that is more than one run: it may hold a function of the caller's, which is not kept.
        """
        outputs, repeat = self.outputs, self.backend.repeat
        if not self.cls._runs_once(self.problem, outputs):
            return None
        if self.settings.adds:
            return self._prepared_to_add(values)
        made = () if self.call.get("out") is not None else tuple(outputs)
        again = repeat(self.problem, outputs, made, values, self.mode in VALUED)
        if again is None:
            return never
        given = {n: self.backend.give(o) for n, o in outputs.items()}
        return prepare(self.mode, self.settings.single, given, made, values, again)

    def _prepared_to_add(self, values: tuple[Any, ...]) -> Prepared | None:
        """The same of a call that adds: new gradients, as if there were no `out`, are added to it."""
        backend, arrays = self.backend, tuple(self.outputs.values())
        if backend is not devices.cpu() or any(a.dtype != self.problem.arithmetic for a in arrays):
            return never
        inputs, mode, single = values[: -len(arrays)], self.mode, self.settings.single
        new = {n: backend.empty_like(as_plain(a)) for n, a in self.outputs.items()}
        again = backend.repeat(self.problem, new, tuple(new), inputs, mode in VALUED)
        if again is None:
            return never

        def adding(values: tuple[Any, ...]) -> Any:
            given, outs = values[: len(inputs)], values[len(inputs) :]
            for k, out in enumerate(outs):
                others = (*outs[:k], *(v for v in given if v.__class__ is np.ndarray and v is not out))
                if any(np.may_share_memory(out, v) for v in others) or overlaps_itself(out):
                    return MISSING
            found = again(given)
            if found is MISSING or any(
                out.shape != made.shape for out, made in zip(outs, found[1], strict=True)
            ):
                return MISSING
            for out, made in zip(outs, found[1], strict=True):
                backend.add(out, made)
            if mode in OF_CURVATURES:
                return found[0], *outs
            gradient = outs[0] if single else outs
            return gradient if mode == GRAD else (found[0], gradient)

        return adding


def make_outputs(cls: Any, settings: Settings, call: dict[str, Any], backend: Any) -> dict[str, Any]:
    """Return the arrays to write: gradients by their argument's name, and ``"curvature"``."""
    name, wrt = cls.function.__name__, settings.wrt
    names = (*wrt, "curvature") if settings.mode in OF_CURVATURES else wrt
    out = call.get("out")
    if out is None:
        if settings.adds:
            raise TypeError(f"{name}: accumulate adds to out, which is not given")
        outs: tuple[Any, ...] = (None,) * len(names)
    elif len(names) == 1 and settings.single:
        outs = (out,)
    elif isinstance(out, tuple | list) and len(out) == len(names):
        outs = tuple(out)
    else:
        raise TypeError(f"{name}: out must be a tuple of {len(names)} arrays, got {type(out).__name__}")
    taken = () if out is None else arrays_of(cls, call)
    inputs = [(n, as_array(name, n, call[n])) for n in taken if call.get(n) is not None]
    made: dict[str, Any] = {}
    for n, o in zip(names, outs, strict=True):
        like = as_array(name, n, call[wrt[0] if n == "curvature" else n])
        if o is None:
            o = backend.empty_like(like)
        else:
            check_out(name, n, o, like, inputs)
            for other in made.values():
                if share_memory(o, other):
                    raise ValueError(f"{name}: two arrays in out overlap")
        made[n] = o
    return made


# ---- arguments ----------------------------------------------------------------------------------------


def numbers_of(cls: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers that the caller gave as 0-d arrays."""
    arrays = (*arrays_of(cls, call), "out")
    return {
        n: v.item()
        for n, v in call.items()
        if v.__class__ is np.ndarray and not v.ndim and holds_numbers(v.dtype) and n not in arrays
    }


def holds_numbers(dtype: np.dtype) -> bool:
    return dtype.kind in "iuf" or dtype.name in CODES  # bfloat16 is of another kind


def arrays_of(cls: Any, call: dict[str, Any]) -> tuple[str, ...]:
    """Return the arguments that are arrays to a call; a number, 0-d on the host, stands for itself."""
    up = call.get("grad_output")
    is_number = up is None or (np.ndim(up) == 0 and not is_described(up))
    each = ("sample_weight",) if is_number else ("sample_weight", "grad_output")
    return (*cls._required, *(n for n, f in cls.fields.items() if f.array), *each)


def call_arguments(binding: Binding, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name."""
    return dict(zip(binding.names, (*args, *kwargs.values()), strict=True))


def resolve_wrt(cls: type[Loss], wrt: Any) -> tuple[tuple[str, ...], bool]:
    """Return the names to differentiate, and whether a single one was asked for."""
    if wrt is None:
        wrt = cls._default_wrt()
    single = isinstance(wrt, str)
    names = (wrt,) if single else tuple(wrt) if isinstance(wrt, tuple | list) else None
    name = cls.function.__name__
    allowed = cls._differentiable()
    if not names or not all(isinstance(n, str) for n in names):
        raise TypeError(f"{name}: wrt must be a name or a tuple of names, got {wrt!r}")
    for n in names:
        if n not in allowed:
            raise ValueError(f"{name}: wrt must be among {', '.join(map(repr, allowed))}, got {n!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{name}: wrt names an argument twice: {wrt!r}")
    return names, single


def resolve_normalizer(name: str, value: Any) -> float | None:
    """Return the number that stands for the mean's count, if one is given."""
    if value is None:
        return None
    x = arguments.number(name, "normalizer", value)
    if not x > 0:
        raise ValueError(f"{name}: normalizer must be > 0, got {x}")
    return x


def resolve_upstream(name: str, value: Any, shape: tuple[int, ...], reduction: str) -> tuple[float, Any]:
    """Return `grad_output` as a factor, and an array where one factor does not do.

    On a device the array may be 0-d: its number is not known here.
    """
    if value is None:
        return 1.0, None
    if np.ndim(value) == 0:
        if is_described(value):
            return 1.0, floating(name, "grad_output", value)
        number = value.item() if hasattr(value, "item") else value
        return arguments.number(name, "grad_output", number), None
    if reduction != "none":
        raise ValueError(f"{name}: grad_output must be a number with reduction={reduction!r}, got an array")
    if not (isinstance(value, np.ndarray) or is_described(value)) or value.shape != shape:
        raise ValueError(
            f"{name}: grad_output must have the value's shape {shape}, got {getattr(value, 'shape', value)!r}"
        )
    return 1.0, floating(name, "grad_output", as_plain(value))


# ---- losses with a term for each row ------------------------------------------------------------------


class RowLoss(Loss):
    """A loss with one term for each row of its arrays."""

    differentiable: ClassVar[tuple[str, ...]] = ()  # names that `wrt` may hold
    _curved = False

    @classmethod
    def _complete(cls) -> bool:
        return "reduction" in cls.fields

    @classmethod
    def _prepare(cls) -> None:
        cls._required = tuple(cls.operands)

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return cls.differentiable

    @classmethod
    def _jit(cls) -> Any:
        return inside.of_sequences(cls.function.__name__)

    @classmethod
    def _evaluate(cls, mode: str, binding: Binding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return evaluate(cls, mode, binding, args, kwargs)

    @classmethod
    def _evaluation(cls, mode: str, call: dict[str, Any], backend: Any) -> Any:
        return Evaluation(cls, mode, call, backend)

    @classmethod
    def _settings(cls, mode: str, call: Mapping[str, Any]) -> Settings:
        return Settings(cls, mode, call)

    @classmethod
    def _problem(cls, settings: Settings, call: dict[str, Any], backend: Any) -> Any:
        """Check a call's arrays, and return its problem."""
        raise NotImplementedError

    @classmethod
    def _check_curvature(cls, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
        raise ValueError(f"{cls.function.__name__}: has no value_grad_hess")

    @classmethod
    def _check_policy(cls, settings: Settings) -> None:
        """Refuse what cannot stand for the curvature, or a floor of it."""
        raise ValueError(
            f"{cls.function.__name__}: curvature must be {EXACT!r}, without a floor, got {settings.policy!r} "
            f"and {settings.floor}; others are of elements and of class scores"
        )

    @classmethod
    def _run_problem(
        cls, settings: Settings, problem: Any, outputs: dict[str, Any], call: dict[str, Any], backend: Any
    ) -> Any:
        """Write the outputs; return the value."""
        return backend.run(problem, outputs)

    @classmethod
    def _runs_once(cls, problem: Any, outputs: dict[str, Any]) -> bool:
        """Return whether a call is one run of the backend, with the outputs as they are."""
        return cls._run_problem.__func__ is RowLoss._run_problem.__func__  # type: ignore[attr-defined]

    # ---- shared ------------------------------------------------------------------------------------
    @classmethod
    def _weighting(
        cls, settings: Settings, call: dict[str, Any], rows: tuple[int, ...], floats: dict[str, Any]
    ) -> Weighting:
        """Return what weighs the terms; `sample_weight` joins `floats`, which make the dtype."""
        name = cls.function.__name__
        sample_weight = cls._weak("sample_weight", call, floats)
        if sample_weight is not None:
            check_broadcasts(name, "sample_weight", sample_weight, rows)
        factor, upstream = resolve_upstream(name, call.get("grad_output"), rows, settings.reduction)
        normalizer = resolve_normalizer(name, call.get("normalizer"))
        divisor = normalizer if settings.reduction == "mean" else 1.0
        return Weighting(settings.reduction, sample_weight, upstream, factor, divisor)

    @classmethod
    def _weak(
        cls, argument: str, call: dict[str, Any], floats: dict[str, Any], wrt: tuple[str, ...] = ()
    ) -> Any:
        """Return an optional array; it joins `floats`, unless it promotes no float."""
        given = call.get(argument)
        if given is None:
            return None
        name = cls.function.__name__
        array = as_array(name, argument, given)
        if argument in wrt or not is_weak(array, given):
            array = floats[argument] = floating(name, argument, array)
        return array


def dtypes_of(floats: dict[str, Any]) -> tuple[np.dtype, np.dtype]:
    """Return the dtype that arrays promote to, and that of the arithmetic."""
    dtype = common_dtype([a.dtype for a in floats.values()])
    return dtype, arithmetic_dtype(dtype)


# ---- inside compiled code -----------------------------------------------------------------------------


def compiled_options(fields: dict[str, Option]) -> tuple[ScoreOption, ...]:
    """Return the options that compiled code checks or is given: all but arrays and the reduction."""
    return tuple(
        ScoreOption(n, f.domain, domain_in_words(f.domain), isinstance(f.default, bool))
        for n, f in fields.items()
        if not f.array and n != "reduction"
    )


def domain_in_words(domain: Any) -> str:
    """Return a domain as messages name it."""
    return f"one of {', '.join(map(repr, domain))}" if isinstance(domain, tuple) else str(domain)
