"""The families of class scores: each row of scores, with its class or classes, gives one term."""

import inspect
from collections.abc import Callable
from itertools import product
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .. import class_shards
from ..arguments import between, class_indices, integer, reduction, scores, weights
from ..arrays import as_array, floating
from ..call import RowLoss, Settings, compiled_options, dtypes_of
from ..kernels import inside
from ..kernels.layout import class_axis, class_rows
from ..kernels.lift import is_linear
from ..kernels.spec import (
    ABSOLUTE,
    EXACT,
    FISHER,
    GRAD_HESS,
    GRADIENT,
    MANY,
    ONE,
    STATISTICS,
    MarginFunctions,
    Margins,
    NllFunctions,
    Picks,
    ScoreFunctions,
    ScoreOption,
    Scores,
    Weighting,
)
from ..loss import plain_function


class Rows(NamedTuple):
    """The checked arrays of a call."""

    input: Any
    target: Any
    has_probabilities: bool  # the target holds probabilities, not indices
    weight: Any  # of the classes, or None
    weighting: Weighting
    dtype: Any  # that the arrays promote to
    arithmetic: Any


class ClassLoss(RowLoss):
    """A loss with one term for each row of class scores.

    Scores are (C), (N, C) or (N, C, d1, ...); a class index, or a distribution, belongs to each row.
    """

    takes_probabilities: ClassVar[bool] = False
    differentiable: ClassVar[tuple[str, ...]] = ("input",)
    _shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((4,), (1, 4), (2, 3, 4), (0, 3))

    @classmethod
    def _record(cls, options: dict[str, Any], rows: Rows) -> Any:
        """Return the problem of checked arrays: what a loss states."""
        raise NotImplementedError

    @classmethod
    def _problem(cls, settings: Settings, call: dict[str, Any], backend: Any) -> Any:
        return cls._record(settings.options, cls._check(settings, call))

    @classmethod
    def _compiled_signature(cls) -> tuple[tuple[str, ...], tuple[Any, ...], tuple[ScoreOption, ...]]:
        """Return names and defaults of `jit`'s parameters, and the options that it checks or is given."""
        fields = cls.fields
        defaults = (*(f.default for f in fields.values()), None)
        return (*cls._required, *fields, "out"), defaults, compiled_options(fields)

    @classmethod
    def _shapes_of_scores(cls, call: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        target, weight = call["target"], call.get("weight")
        rows = np.shape(target)
        if as_array(cls.function.__name__, "target", target).dtype.kind not in "iu":
            return {"input": rows}  # probabilities
        classes = 1 if weight is None else (*np.shape(weight), 1)[0]
        return {"input": (*rows[:1], classes, *rows[1:])}

    @classmethod
    def _check(cls, settings: Settings, call: dict[str, Any]) -> Rows:
        """Check a call's arrays: libraries, dtypes, shapes, and what the mean divides by."""
        name, wrt = cls.function.__name__, settings.wrt
        x = floating(name, "input", as_array(name, "input", call["input"]))
        target = as_array(name, "target", call["target"])
        if not x.ndim:
            raise ValueError(f"{name}: input must have shape (C), (N, C) or (N, C, d1, ...), got ()")
        classes, rows = x.shape[class_axis(x.shape)], class_rows(x.shape)
        if not classes:
            raise ValueError(f"{name}: input must have at least one class, got shape {x.shape}")
        has_probabilities = cls.takes_probabilities and target.shape == x.shape
        if has_probabilities:
            if target.dtype.kind in "iub":
                raise TypeError(
                    f"{name}: target has the input's shape {x.shape}, so it holds class probabilities and "
                    f"must be floating, got {target.dtype.name}"
                )
            target = floating(name, "target", target)
            if settings.options["ignore_index"] >= 0:
                raise ValueError(
                    f"{name}: ignore_index must not be given with class probabilities, "
                    f"got {settings.options['ignore_index']}"
                )
        else:
            if target.shape != rows:
                wanted = f"{rows}, one class index for each row of the input {x.shape}"
                if cls.takes_probabilities:
                    wanted += ", or the input's shape, for class probabilities"
                raise ValueError(f"{name}: target must have shape {wanted}; got {target.shape}")
            # Boosters have class numbers as floats, which kernels check.
            if target.dtype.kind not in ("iuf" if settings.mode == GRAD_HESS else "iu"):
                raise TypeError(f"{name}: target must hold integers, got {target.dtype.name}")
        for n in wrt:
            if n != "input" and not has_probabilities:
                raise ValueError(f"{name}: wrt may hold {n!r} only where target holds class probabilities")
        if "weight" in wrt and call.get("weight") is None:
            raise ValueError(f"{name}: wrt names 'weight', which is not given")

        floats = {"input": x} | ({"target": target} if has_probabilities else {})
        weight = cls._weak("weight", call, floats, wrt)
        if weight is not None and weight.shape != (classes,):
            raise ValueError(
                f"{name}: weight must have shape ({classes},), one per class, got {weight.shape}"
            )
        weighting = cls._weighting(settings, call, rows, floats)
        return Rows(x, target, has_probabilities, weight, weighting, *dtypes_of(floats))

    @classmethod
    def _check_curvature(cls, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
        if wrt != ("input",):
            got = wrt[0] if len(wrt) == 1 else wrt
            raise ValueError(f"{cls.function.__name__}: value_grad_hess takes wrt='input', got {got!r}")


class ScoreLoss(ClassLoss):
    """A loss of rows of class scores by their softmax: subclass it and define ``value``.

    ``value(<statistics>, <options>)`` gives one row's value, in ordinary arithmetic and the functions of
    ``numbaloss.math``. It asks for statistics of the row by name:

    - ``log_prob``: the logarithm of the target class's probability;
    - ``rest``: one less that probability, without cancellation;
    - ``class_weight``: the target class's weight, 1 without ``weight``;
    - ``cross_entropy``: ``-sum(w * q * log(p))`` over the classes: indices or probabilities, label smoothing
      and class weights are in it;
    - ``logsumexp``: the logarithm of the sum of the exponentiated scores.

    Its other parameters are fields. The gradients and the curvature are derived. It takes all that
    ``cross_entropy`` takes: scores (C), (N, C) or (N, C, d1, ...), class indices or probabilities,
    ``weight``, ``ignore_index``, ``label_smoothing``; ``'mean'`` divides as there. Class weights enter
    through ``cross_entropy`` and ``class_weight`` alone. With probabilities a definition that asks for
    ``log_prob``, ``rest`` or ``class_weight`` is refused: they are of one class.
    """

    weight: object = weights()
    ignore_index: int = integer(-100)
    reduction: str = reduction()
    label_smoothing: float = between(0.0, 0.0, 1.0)

    link = "softmax"
    value: ClassVar[Callable[..., Any]]
    _stated = ("value",)
    operands = {"input": scores(), "target": class_indices()}
    differentiable = ("input", "target", "weight")
    takes_probabilities = True
    _shares_classes = True

    _statistics: ClassVar[tuple[str, ...]] = ()
    _option_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def _complete(cls) -> bool:
        return hasattr(cls, "value")

    @classmethod
    def _prepare(cls) -> None:
        super()._prepare()
        names = list(inspect.signature(plain_function(cls, "value")).parameters)
        cls._statistics = tuple(n for n in names if n in STATISTICS)
        cls._option_names = tuple(names[len(cls._statistics) :])
        own = [n for n, f in cls.fields.items() if n not in ScoreLoss.fields]
        unknown = [n for n in cls._option_names if n not in own]
        if not cls._statistics or unknown or tuple(names[: len(cls._statistics)]) != cls._statistics:
            raise TypeError(
                f"{cls.__name__}.value must take statistics of a row ({', '.join(STATISTICS)}), "
                f"then options; got {', '.join(names)}"
            )

    @classmethod
    def _evaluate_classes(cls, mode: str, call: dict[str, Any]) -> Any:
        return class_shards.evaluate(class_shards.Part, cls, mode, call)

    @classmethod
    def _functions(cls, options: dict[str, Any]) -> tuple[ScoreFunctions, tuple[float, ...]]:
        """Return the definition as kernels take it, and the options that are given at run time."""
        values = [options[n] for n in cls._option_names]
        statics = tuple(v if isinstance(v, bool) else None for v in values)
        numbers = tuple(float(v) for v in values if not isinstance(v, bool))
        value = cls._function("value")
        return ScoreFunctions(cls.function.__name__, value, cls._statistics, statics), numbers

    @classmethod
    def _record(cls, options: dict[str, Any], rows: Rows) -> Scores:
        name = cls.function.__name__
        of_one_class = [n for n in cls._statistics if n in ("log_prob", "rest", "class_weight")]
        if rows.has_probabilities and of_one_class:
            raise TypeError(
                f"{name}: target holds class probabilities, but the loss asks for {', '.join(of_one_class)}, "
                "which a single class has; pass class indices, or define it by cross_entropy"
            )
        functions, numbers = cls._functions(options)
        return Scores(
            name,
            functions,
            numbers,
            rows.input,
            rows.target,
            rows.has_probabilities,
            rows.weight,
            options["ignore_index"],
            options["label_smoothing"],
            None if "softcap" in cls._option_names else options.get("softcap"),
            0.0 if "lse_square_scale" in cls._option_names else options.get("lse_square_scale", 0.0),
            rows.weighting,
            rows.dtype,
            rows.arithmetic,
        )

    @classmethod
    def _problem(cls, settings: Settings, call: dict[str, Any], backend: Any) -> Scores:
        problem = cls._record(settings.options, cls._check(settings, call))
        if settings.policy == FISHER and problem.weight is not None:
            raise ValueError(
                f"{cls.function.__name__}: there is no curvature {FISHER!r} with class weights, as it would "
                "have to weigh each class that the model may draw"
            )
        valued = settings.mode != GRAD_HESS  # a gradient alone shares the kernel of value and gradient
        return problem._replace(curvature=settings.policy, floor=settings.floor, valued=valued)

    @classmethod
    def _check_policy(cls, settings: Settings) -> None:
        options, policy = settings.options, settings.policy
        if policy in (EXACT, ABSOLUTE, GRADIENT):
            return
        capped, squared = options.get("softcap") is not None, options.get("lse_square_scale", 0) != 0
        if capped or squared or not is_linear(cls._functions(options)[0])[0]:
            raise ValueError(
                f"{cls.function.__name__}: there is no curvature {policy!r}: it is known of losses that are "
                "linear in the cross entropy, log_prob and logsumexp, without a cap of scores"
            )

    @classmethod
    def _jit(cls) -> Any:
        fields = cls.fields
        own = cls._option_names
        flags = [n for n in own if isinstance(fields[n].default, bool)]
        usual = {n: fields[n].default for n in own}
        definitions = tuple(
            cls._functions({**usual, **dict(zip(flags, values, strict=True))})[0]
            for values in product((False, True), repeat=len(flags))
        )
        return inside.of_scores(definitions, *cls._compiled_signature(), own)


class PickLoss(ClassLoss):
    """A loss of the score of each row's class alone: subclass it and define ``value``.

    ``value(score, class_weight)`` gives a row's term, linear in the score.
    """

    value: ClassVar[Callable[..., Any]]
    _stated = ("value",)

    @classmethod
    def _functions(cls) -> NllFunctions:
        return NllFunctions(cls.function.__name__, cls._function("value"))

    @classmethod
    def _record(cls, options: dict[str, Any], rows: Rows) -> Picks:
        return Picks(
            cls.function.__name__,
            cls._functions(),
            rows.input,
            rows.target,
            rows.weight,
            options["ignore_index"],
            rows.weighting,
            rows.dtype,
            rows.arithmetic,
        )

    @classmethod
    def _jit(cls) -> Any:
        return inside.of_picks(cls._functions(), *cls._compiled_signature())


class MarginLoss(ClassLoss):
    """A loss of each row's own classes against all its others: subclass it, define ``terms`` and ``finish``.

    ``terms(score, own, <options>)`` is what another class's score adds to that of an own one; it depends on
    their difference alone. ``finish(total, classes, weight)`` is the row's term, linear in the sum. Scores
    are (), (C) or (N, C).
    """

    terms: ClassVar[Callable[..., Any]]
    finish: ClassVar[Callable[..., Any]]
    _stated = ("terms", "finish")
    _shapes = ((4,), (1, 4), (0, 3))
    classes_of_a_row: ClassVar[str] = ONE  # or MANY: a list as long as the scores, or ended by -1

    @classmethod
    def _functions(cls, options: dict[str, Any]) -> tuple[MarginFunctions, tuple[float, ...]]:
        """Return the definition for options, and those that kernels are given at run time."""
        terms, finish = cls._function("terms"), cls._function("finish")
        names, choices = list(inspect.signature(terms).parameters)[2:], cls._choices()
        compiled = tuple(options[n] if n in choices else None for n in names)
        many = cls.classes_of_a_row == MANY
        functions = MarginFunctions(cls.function.__name__, terms, finish, compiled, many)
        return functions, tuple(options[n] for n in names if n not in choices)

    @classmethod
    def _choices(cls) -> dict[str, tuple[Any, ...]]:
        """Return the values of the options that kernels are compiled for: those with a few."""
        return {
            n: f.domain
            for n, f in cls.fields.items()
            if n != "reduction" and not f.array and isinstance(f.domain, tuple)
        }

    @classmethod
    def _jit(cls) -> Any:
        defaults, choices = {n: f.default for n, f in cls.fields.items()}, cls._choices()
        chosen = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
        definitions = tuple(cls._functions(defaults | c)[0] for c in chosen)
        return inside.of_margins(definitions, *cls._compiled_signature())

    @classmethod
    def _record(cls, options: dict[str, Any], rows: Rows) -> Margins:
        return Margins(
            cls.function.__name__,
            cls.classes_of_a_row,
            *cls._functions(options),
            rows.input,
            rows.target,
            rows.weight,
            options.get("p", 1),
            options.get("margin", 1.0),
            rows.weighting,
            rows.dtype,
            rows.arithmetic,
        )

    @classmethod
    def _shapes_of_scores(cls, call: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        if cls.classes_of_a_row == MANY:
            return {"input": np.shape(call["target"])}
        return super()._shapes_of_scores(call)

    @classmethod
    def _check(cls, settings: Settings, call: dict[str, Any]) -> Rows:
        name, many = cls.function.__name__, cls.classes_of_a_row == MANY
        x = floating(name, "input", as_array(name, "input", call["input"]))
        target = as_array(name, "target", call["target"])
        alone = x.ndim < 2 and target.ndim < 2 and target.size == 1
        if many and target.shape != x.shape and not (alone and x.size == 1):
            raise ValueError(f"{name}: target must have input's shape {x.shape}, got {target.shape}")
        if x.ndim > 2:
            raise ValueError(f"{name}: input must have shape (), (C) or (N, C), got {x.shape}")
        # Further it is checked as a batch of one where its terms are: as in PyTorch, a lone row's label and a
        # lone score's list may have an axis more or less.
        given = x if x.ndim else x[np.newaxis]
        if many:
            labels = np.zeros(given.shape[:-1], target.dtype)
        else:
            labels = target
            given = given[np.newaxis] if alone and target.ndim else given
        rows = super()._check(settings, {**call, "input": given, "target": labels})
        return rows._replace(input=x, target=target)
