"""Sums of losses: ``0.7 * nl.MSELoss() + 0.3 * nl.L1Loss()`` is a loss.

Parts that are functions of the same elements, or of the same rows of class scores, become one definition,
whose value is the weighted sum of theirs. Factors and the parts' options are its options: one kernel serves
them all. Other parts are evaluated one after the other, and their gradients added.
"""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from . import arguments
from .arguments import Operand
from .families.elementwise import ElementwiseLoss
from .families.scores import ScoreLoss
from .kernels import inside
from .kernels.spec import (
    EXACT,
    FISHER,
    GERSHGORIN,
    GRAD,
    GRAD_HESS,
    MAJORIZER,
    OF_CURVATURES,
    STATISTICS,
    VALUE,
    VALUE_GRAD_HESS,
    Memo,
)
from .loss import COUNT, OF_DERIVATIVES, PARTIAL, Loss, Modes, plain_function

Terms = tuple[tuple[float, Loss], ...]
# What a subclass may state anew, and then computes something else than its definition.
METHODS = (*(n for n in vars(Modes) if not n.startswith("_")), "__call__", "_run")
# Attributes of a sum that are made of its terms.
MADE = ("_options", "_given", "_required", "_prototypes", "_kept", "_parts")


class SumLoss(Loss):
    """A weighted sum of losses, made by ``+``, ``-``, ``*`` and ``/`` of criteria and numbers.

    It has the criteria's methods and takes what all of them take, ``sample_weight``, ``wrt`` and ``out``
    among it. Each part divides by its own count if its reduction is ``'mean'``, or by ``normalizer`` if that
    is given. A sum keeps the options that its parts had when it was made.

    Parts of elements, or of rows of class scores, are computed in one pass if they take the same arrays and
    reduce alike, and state no gradient of their own (as `BCELoss` does) by what a call differentiates.

    Raises
    ------
    TypeError
        If the parts take different arrays, or a factor is no number.
    ValueError
        If one part has ``reduction='none'`` and another has not; in a call if terms differ in shape.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> criterion = 0.5 * nl.MSELoss() + 2 * nl.L1Loss()
    >>> criterion
    0.5 * MSELoss(reduction='mean') + 2.0 * L1Loss(reduction='mean')
    >>> criterion.value_and_grad(np.array([2.0, -1.0]), np.zeros(2))
    (np.float64(4.25), array([ 2. , -1.5]))
    """

    @property
    def terms(self) -> Terms:
        """Each part with its factor."""
        return self._terms()

    @property
    def link(self) -> str:
        """That of the parts, if they have one."""
        found = {part.link for _, part in self.terms}
        return found.pop() if len(found) == 1 else "identity"

    def __repr__(self) -> str:
        text = ""
        for factor, part in self.terms:
            size = "" if abs(factor) == 1 else f"{abs(factor)!r} * "
            sign = ("-" if factor < 0 else "") if not text else " - " if factor < 0 else " + "
            text += f"{sign}{size}{part!r}"
        return text

    def __reduce__(self) -> Any:
        own = {n: v for n, v in self.__dict__.items() if n not in MADE}
        return weighted_sum, (self.terms,), own or None


def weighted_sum(terms: Terms) -> Loss:
    """Return the sum of losses times their factors, those of one definition joined."""
    names = terms[0][1]._required
    for factor, part in terms:
        arguments.number(type(part).__name__, "factor", factor)
        if part._required != names:
            raise TypeError(
                f"a sum's losses must take the same arrays: {type(terms[0][1]).__name__} takes "
                f"{', '.join(names)}, but {type(part).__name__} takes {', '.join(part._required)}"
            )
    reductions = {part.reduction for _, part in terms}
    if "none" in reductions and len(reductions) > 1:
        raise ValueError(
            f"a sum's losses must all have reduction='none' or none of them, got {sorted(reductions)}"
        )
    groups: dict[Any, list[tuple[float, Loss]]] = {}
    for factor, part in terms:
        groups.setdefault(_likeness(part), []).append((factor, copy(part)))
    if len(groups) == 1 and _likeness(terms[0][1])[0] is not None:
        return _Fused._of(tuple(*groups.values()))
    # Of one part there is nothing to join, and its kernel may be there.
    parts = tuple(
        (1.0, _Fused._of(tuple(group))) if len(group) > 1 and key[0] is not None else group[0]
        for key, group in groups.items()
    )
    return _Separate(tuple((factor, copy(part)) for factor, part in terms), parts)


def _likeness(part: Loss) -> tuple[Any, ...]:
    """Return what parts must have in common to be one definition; of one that is joined with none, itself."""
    cls = type(part)
    alone = None, id(part)
    if any(getattr(cls, n) is not getattr(Loss, n) for n in METHODS):
        return alone
    if issubclass(cls, ElementwiseLoss):
        held = any(f.array and n in part._given for n, f in cls.fields.items())
        if held or cls._broadcast.__func__ is not ElementwiseLoss._broadcast.__func__:  # type: ignore[attr-defined]
            return alone
        wrt = cls._default_wrt()
        stated = tuple(n for n in cls._slopes if n in wrt)
        broadcast = tuple(cls.operands[n].broadcast for n in cls._required)
        return ElementwiseLoss, part.reduction, broadcast, stated
    if issubclass(cls, ScoreLoss) and cls._record.__func__ is ScoreLoss._record.__func__:  # type: ignore[attr-defined]
        beyond = [n for n in cls.fields if n not in ScoreLoss.fields and n not in cls._option_names]
        if any(part._options[n] != cls.fields[n].default for n in beyond):
            return alone  # scores that are capped first, say
        shared = tuple(part._options[n] for n in ("ignore_index", "label_smoothing"))
        return ScoreLoss, part.reduction, _Array(part._options["weight"]), *shared
    return alone


class _Array:
    """An array as a key: equal to another of the same elements."""

    def __init__(self, array: Any) -> None:
        self.array = array
        on_host = type(array) is np.ndarray
        self.key = (array.dtype, array.shape, array.tobytes()) if on_host else id(array)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Array) and self.key == other.key


# ---- one definition of several --------------------------------------------------------------------------


class _Fused(SumLoss):
    """A sum that is a definition: its options are factors, and those of its parts with the parts' numbers."""

    _classes: ClassVar[tuple[type[Any], ...]] = ()
    _shared: ClassVar[tuple[str, ...]] = ()  # options that all parts have in common
    # Operands by which some parts state a gradient, and others do not.
    _differs: ClassVar[frozenset[str]] = frozenset()
    _accepted: ClassVar[frozenset[str]] = frozenset()

    @staticmethod
    def _of(terms: Terms) -> "_Fused":
        cls = _definition(tuple(type(part) for _, part in terms))
        options: dict[str, Any] = {n: terms[0][1]._options[n] for n in cls._shared}
        for k, (factor, part) in enumerate(terms, 1):
            options[f"factor{k}"] = factor
            options |= {f"{n}_{k}": part._options[n] for n in _own(type(part))}
        made = cls(**options)
        made.__dict__["_prototypes"] = terms
        return made

    def _terms(self) -> Terms:
        found = []
        for k, (_, part) in enumerate(self._prototypes, 1):
            part = copy(part)
            options = {n: self._options[f"{n}_{k}"] for n in _own(type(part))}
            part._set({**part._options, **{n: self._options[n] for n in self._shared}, **options})
            found.append((self._options[f"factor{k}"], part))
        return tuple(found)

    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> None:
        shared = {n: options[n] for n in cls._shared if n in options}
        for k, part in enumerate(cls._classes, 1):
            own = {n: options[f"{n}_{k}"] for n in _own(part)}
            fields = {n: f.default for n, f in part.fields.items()}
            part._check_options({**fields, **shared, **own})

    @classmethod
    def _check_policy(cls, settings: Any) -> None:
        super()._check_policy(settings)  # type: ignore[misc]
        factors = [settings.options[f"factor{k}"] for k in range(1, 1 + len(cls._classes))]
        if settings.policy in (MAJORIZER, GERSHGORIN) and min(factors) < 0:
            raise ValueError(
                f"a sum of losses has a curvature {settings.policy!r} where no factor is negative, "
                f"got {factors}"
            )

    def _run(self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._differs and mode in OF_DERIVATIVES:
            wrt = kwargs.get("wrt") or self._default_wrt()
            if self._differs.intersection((wrt,) if isinstance(wrt, str) else wrt):
                return _evaluate(self.terms, mode, args, kwargs)
        if not kwargs.keys() <= self._accepted:
            return _evaluate(self.terms, mode, args, kwargs)
        return super()._run(mode, args, kwargs)


def _own(cls: type[Loss]) -> tuple[str, ...]:
    """Return the options of a part that a sum has for that part alone."""
    if issubclass(cls, ScoreLoss):
        return tuple(n for n in cls._option_names if not cls.fields[n].array)
    return tuple(n for n, f in cls.fields.items() if not f.array and n != "reduction")


_definitions = Memo()


def _definition(classes: tuple[type[Any], ...]) -> type[_Fused]:
    """Return the definition of a sum, made once; a part whose functions were replaced makes another."""
    stated = tuple(plain_function(c, n) for c in classes for n in c._stated)
    key = classes, stated
    if key not in _definitions:
        _definitions[key] = (
            _elements(classes) if issubclass(classes[0], ElementwiseLoss) else _scores(classes)
        )
    return _definitions[key]


def _elements(classes: tuple[type[ElementwiseLoss], ...]) -> type[_Fused]:
    first = classes[0]
    names = first._required
    slopes = [{n for n in c._slopes if n in names} for c in classes]
    common = set.intersection(*slopes)
    curvatures = set.intersection(*({f"{p}_{n}" for p, n in c._curvatures if n in names} for c in classes))
    weighted = all("weight" in c.fields and c.fields["weight"].call_only for c in classes)
    alike = len({c.weight_in_divisor for c in classes}) == 1
    reductions: list[Any] = [c.fields["reduction"].domain for c in classes]
    more = set.intersection(*map(set, reductions))
    fields: dict[str, Any] = {
        "reduction": arguments.reduction(*sorted(more.difference(arguments.REDUCTIONS)))
    }
    if weighted and alike:
        fields["weight"] = arguments.weights(call_only=True)
    absent = [tuple(c.operands[n].absent for n in c._arrays[len(names) :]) for c in classes]
    body = {
        "value": _sum_of("value", classes, names, absent),
        **{f"slope_{n}": _sum_of(f"slope_{n}", classes, names, absent) for n in sorted(common)},
        **{s: _sum_of(s, classes, names, absent) for s in sorted(curvatures)},
        "residual": all(c.residual and _bounded(c) for c in classes),
        "domains": {n: _narrowest([c.operands[n] for c in classes]) for n in names},
        "weight_in_divisor": first.weight_in_divisor and alike,
        "_differs": frozenset(set.union(*slopes) - common),
        "_shared": ("reduction",),
    }
    return _class(classes, ElementwiseLoss, fields, body)


def _bounded(cls: type[ElementwiseLoss]) -> bool:
    """Return whether a loss has its majorizer whatever its options are."""
    return cls._check_policy.__func__ is ElementwiseLoss._check_policy.__func__  # type: ignore[attr-defined]


def _scores(classes: tuple[type[ScoreLoss], ...]) -> type[_Fused]:
    asked = {n for c in classes for n in c._statistics}
    order = [n for n in STATISTICS if n in asked]
    body = {"value": _sum_of("value", classes, tuple(order)), "_shared": tuple(ScoreLoss.fields)}
    return _class(classes, ScoreLoss, dict(ScoreLoss.fields), body)


def _class(
    classes: tuple[type[Any], ...], family: type[Any], fields: dict[str, Any], body: dict[str, Any]
) -> type[_Fused]:
    for k, c in enumerate(classes, 1):
        fields[f"factor{k}"] = arguments.real(1.0)
        fields |= {f"{n}_{k}": c.fields[n] for n in _own(c)}
    name = "_plus_".join(c.function.__name__ for c in classes)
    if len(name) > 60:  # it is in the names of files
        name = f"sum_of_{len(classes)}_losses"
    made: Any = type(
        "Sum",
        (_Fused, family),
        {
            "__module__": "sum",  # no module: the class is found again by its parts, and is no built-in loss
            "__doc__": SumLoss.__doc__,
            "__annotations__": dict.fromkeys(fields, Any),
            "_classes": classes,
            **fields,
            **body,
        },
        function=name,
    )
    made._accepted = frozenset(made._signature(VALUE_GRAD_HESS).parameters)
    return made


def _sum_of(
    stated: str,
    classes: tuple[type[Any], ...],
    names: tuple[str, ...],
    absent: Iterable[tuple[Any, ...]] = (),
) -> Callable[..., Any]:
    """Return a function of elements or statistics: the sum of a function that each part states.

    It is written out, as a definition's parameters have names. The parts' functions are its globals, so that
    it is frozen, and compiled, with them.
    """
    scope: dict[str, Any] = {"__name__": "sum"}
    terms, parameters = [], list(names)
    for k, (c, missing) in enumerate(zip(classes, absent or [()] * len(classes), strict=True), 1):
        scope[f"{stated}{k}"] = inside.part(plain_function(c, stated))
        arrays = names if issubclass(c, ElementwiseLoss) else c._statistics
        options = [f"{n}_{k}" for n in c._option_names]
        parameters += [f"factor{k}", *options]
        terms.append(f"factor{k} * {stated}{k}({', '.join([*arrays, *map(repr, missing), *options])})")
    exec(f"def {stated}({', '.join(parameters)}):\n    return {' + '.join(terms)}", scope)
    return scope[stated]


def _narrowest(operands: list[Operand]) -> Operand:
    """Return the operand that suits all parts, with samples of the one whose domain is the smallest."""
    narrow = min(operands, key=lambda o: (o.high - o.low, not o.model))
    return replace(
        narrow,
        low=max(o.low for o in operands),
        high=min(o.high for o in operands),
        nan=all(o.nan for o in operands),
        model=any(o.model for o in operands),
    )


# ---- one after the other --------------------------------------------------------------------------------


class _Separate(SumLoss):
    """A sum of parts that are no single definition."""

    def __init__(self, terms: Terms, parts: Terms) -> None:
        # What is asked for, and what is evaluated: some of the terms are joined.
        self.__dict__.update(
            _kept=terms, _parts=parts, _required=terms[0][1]._required, _options={}, _given={}
        )

    def _terms(self) -> Terms:
        return self._kept

    @property
    def reduction(self) -> str:
        """The parts' reduction, where all have the same."""
        found = {part.reduction for _, part in self._kept}
        if len(found) > 1:
            raise ValueError(f"the parts' reductions differ: {', '.join(sorted(found))}")
        return found.pop()

    @reduction.setter
    def reduction(self, value: str) -> None:
        for _, part in (*self._kept, *self._parts):
            part.reduction = value

    def _run(self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _evaluate(self._parts, mode, args, kwargs)


def _evaluate(terms: Terms, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluate parts by themselves, and add up what they give."""
    if mode == VALUE:
        return _total([factor * part(*args, **kwargs) for factor, part in terms])
    if mode in (COUNT, PARTIAL):
        found = [part._run(mode, args, kwargs) for _, part in terms]
        counts = {count for _, count in found} if mode == PARTIAL else {*found}
        if len(counts) > 1:
            raise ValueError(f"the parts of a sum of losses count differently: {sorted(counts)}")
        (count,) = counts
        if mode == COUNT:
            return count
        return sum(factor * value for (factor, _), (value, _) in zip(terms, found, strict=True)), count
    policy = kwargs.get("curvature", EXACT)
    if kwargs.get("floor") is not None or (policy not in (EXACT, FISHER) and mode in OF_CURVATURES):
        raise ValueError(
            "a sum of losses that are not computed in one pass has the curvatures 'exact' and 'fisher', "
            f"without a floor, got {policy!r} and {kwargs.get('floor')}"
        )
    kwargs = {**kwargs, "wrt": kwargs.get("wrt") or _default_wrt(terms)}
    up = kwargs.pop("grad_output", None)
    first, rest = terms[0], terms[1:]
    others = {n: v for n, v in kwargs.items() if n not in ("out", "accumulate")}

    def run(factor: float, part: Loss, given: dict[str, Any]) -> list[Any]:
        scale = factor if up is None else factor * up
        found = part._run(mode, args, {**given, "grad_output": scale})
        found = [None, found] if mode == GRAD else list(found)
        if found[0] is not None:
            found[0] = factor * found[0]
        return found

    # What is written may be an argument, which the others read before.
    found = [run(*term, others) for term in rest]
    value, *derivatives = run(*first, kwargs)
    for more in found:
        for sums, parts in zip(derivatives, more[1:], strict=True):
            single = not isinstance(sums, tuple)
            for a, b in zip((sums,) if single else sums, (parts,) if single else parts, strict=True):
                a += b
    if mode == GRAD:
        return derivatives[0]
    values = None if mode == GRAD_HESS else _total([value, *(more[0] for more in found)])
    return (values, *derivatives) if mode in OF_CURVATURES else (values, derivatives[0])


def _default_wrt(terms: Terms) -> Any:
    """Return the arguments that some part differentiates by default."""
    wanted: set[str] = set()
    for _, part in terms:
        names = _default_wrt(part.terms) if isinstance(part, SumLoss) else part._default_wrt()
        wanted |= {names} if isinstance(names, str) else set(names)
    ordered = tuple(n for n in (*terms[0][1]._required, *sorted(wanted)) if n in wanted)
    names = tuple(dict.fromkeys(ordered))
    return names[0] if len(names) == 1 else names


def _total(values: list[Any]) -> Any:
    shapes = {np.shape(v) for v in values}
    if len(shapes) > 1:
        raise ValueError(
            f"a sum's losses with reduction='none' must have terms of one shape, got {sorted(shapes)}"
        )
    return sum(values[1:], values[0])


Loss._weighted_sum = staticmethod(weighted_sum)
