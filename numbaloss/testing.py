"""What every loss must pass, one of ours or one of a user's own: :func:`check_loss`.

It knows nothing of a loss but its public interface, its arguments' samples and its options' samples. What
the loss should be worth is not its matter: the tests compare that with a reference.

>>> import numbaloss as nl
>>> nl.testing.check_loss(nl.huber_loss)
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

try:
    from ml_dtypes import bfloat16, finfo
except ImportError:
    from numpy import finfo

    NARROW: tuple[Any, ...] = (np.float32, np.float16)
else:
    NARROW = (np.float32, np.float16, bfloat16)

SHAPE = (7, 19)  # long enough for whole SIMD vectors and a remainder, in float32 too
POINTS = 24  # elements that are compared with finite differences, per argument
STEP = 1e-6  # of a finite difference, relative above 1
ROUNDINGS = 16  # of an input or a result, that float32 arithmetic may amount to

Arrays = dict[str, np.ndarray]


def samples(
    loss: Any, rng: np.random.Generator, shape: tuple[int, ...] = SHAPE, dtype: Any = np.float64
) -> Arrays:
    """Arrays for a loss, drawn from their domains, by name.

    Parameters
    ----------
    loss : LossFunction
    rng : numpy.random.Generator
    shape : tuple of int
    dtype : dtype
        Of the floating arrays; class indices stay integers.
    """
    drawn = {n: np.asarray(operand.draw(rng, shape)) for n, operand in loss.Class.operands.items()}
    return {n: a if a.dtype.kind in "iu" else a.astype(dtype) for n, a in drawn.items()}


def combinations(loss: Any, **fixed: Any) -> Iterator[dict[str, Any]]:
    """Every combination of the options' samples, the defaults first; `fixed` options stay as they are.

    Arrays and the reduction are left out: they are no matter of one term. So is what the loss refuses.
    """
    every = loss.Class.fields
    fields = {n: f for n, f in every.items() if not f.array and n not in ("reduction", *fixed)}
    choices = [list(dict.fromkeys((f.default, *f.samples))) for f in fields.values()]
    for chosen in itertools.product(*choices):
        options = {**fixed, **dict(zip(fields, chosen, strict=True))}
        try:
            loss.Class._check_options({n: options.get(n, f.default) for n, f in every.items()})
        except ValueError:
            continue
        yield options


def slopes(
    function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, positions: Sequence[int], step: float = STEP
) -> tuple[np.ndarray, np.ndarray]:
    """One-sided differences of a function of a whole array, moving one of its elements at a time.

    Returns
    -------
    left, right : arrays of shape ``(len(positions), *function(x).shape)``
        The quotients towards smaller and larger elements: they agree where the function is smooth.
    """
    centre = function(x)

    def quotient(k: int, direction: int) -> np.ndarray:
        moved = x.copy()
        moved.flat[k] += direction * step * max(1.0, abs(x.flat[k]))
        return (function(moved) - centre) / (moved.flat[k] - x.flat[k])

    left, right = (np.array([quotient(k, d) for k in positions]) for d in (-1, 1))
    return left, right


def smooth(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where one-sided differences agree as far as those of a smooth function would."""
    gap, size = np.abs(right - left), np.abs(right) + np.abs(left)
    return gap <= 1e-3 * size + 1e-4  # false for NaN


def check_loss(loss: Any, *, seed: int = 0, roundings: float = ROUNDINGS, **options: Any) -> None:
    """Check a loss's derivatives, and all that its interface promises whatever the loss.

    Parameters
    ----------
    loss : LossFunction, or subclass of Loss
        For instance ``nl.huber_loss``, ``nl.HuberLoss`` or a loss of one's own.
    seed : int
        Of the samples.
    roundings : float
        What float32 may differ by from float64, in roundings of an input or a result. A value or slope that
        is a small difference of large terms needs more than the default.
    **options
        Options to hold at a value; the others go through all combinations of their samples.

    Raises
    ------
    AssertionError
        It names the loss with its options, the property and the worst point.
    """
    loss = getattr(loss, "function", loss)
    for number, combination in enumerate(combinations(loss, **options)):
        rng = np.random.default_rng(seed)
        case = Case(loss, combination, samples(loss, rng), roundings)
        checks = PER_COMBINATION if number else PER_COMBINATION + ONCE
        for check in checks:
            check(case, np.random.default_rng(seed + 1))


@dataclass(frozen=True)
class Case:
    """A loss with its options, and arrays to call it with."""

    loss: Any
    options: dict[str, Any]
    arrays: Arrays
    roundings: float = ROUNDINGS

    @property
    def floating(self) -> tuple[str, ...]:
        return tuple(n for n, a in self.arrays.items() if a.dtype.kind not in "iu")

    @property
    def differentiated(self) -> tuple[str, ...]:
        """The arguments to differentiate: all that can be."""
        allowed = self.loss.Class._differentiable()
        return tuple(n for n in self.floating if n in allowed)

    @property
    def default_wrt(self) -> tuple[str, ...]:
        wrt = self.loss.Class._default_wrt()
        return (wrt,) if isinstance(wrt, str) else wrt

    def value(self, **more: Any) -> Any:
        return self.loss(**{**self.arrays, **self.options, **more})

    def terms(self, **more: Any) -> np.ndarray:
        return self.value(reduction="none", **more)

    def term_gradients(self, **more: Any) -> tuple[np.ndarray, Arrays]:
        """Each term, and the gradients of their sum by all floating arguments."""
        arguments = {**self.arrays, **self.options, "reduction": "none", "wrt": self.differentiated, **more}
        terms, gradients = self.loss.value_and_grad(**arguments)
        return terms, dict(zip(self.differentiated, gradients, strict=True))

    def with_arrays(self, **arrays: np.ndarray) -> "Case":
        return replace(self, arrays={**self.arrays, **arrays})

    def cast(self, dtype: Any) -> "Case":
        return self.with_arrays(**{n: self.arrays[n].astype(dtype) for n in self.floating})

    def bounded(self, name: str, x: np.ndarray, margin: float = 0.0) -> np.ndarray:
        """`x` moved into the argument's domain, by a margin."""
        operand = self.loss.Class.operands[name]
        return np.clip(x, operand.low + margin, operand.high - margin)

    def moved_off_bounds(self, name: str, rng: np.random.Generator) -> "Case":
        """One argument off the special points that samples reach (bounds, labels, whole numbers).

        Derivatives there are one-sided or a convention: the tests compare those with PyTorch.
        """
        x = self.arrays[name]
        x = self.bounded(name, x + rng.uniform(1e-3, 1e-2, x.shape), 1e-3)
        return self.with_arrays(**{name: x})

    def agree(self, what: str, got: Any, wanted: Any, tolerance: Any, names: Sequence[Any] = ()) -> None:
        """Raise where `got` is further from `wanted` than the tolerance; equal infinities and NaNs agree."""
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        if got.shape != wanted.shape:
            self.fail(f"{what}: shape {got.shape} in place of {wanted.shape}")
        with np.errstate(invalid="ignore"):
            excess = np.abs(got - wanted) - np.broadcast_to(tolerance, got.shape)
        same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
        excess = np.where(same, -np.inf, np.where(np.isnan(excess), np.inf, excess))
        if excess.size and excess.max() > 0:
            worst = np.unravel_index(np.argmax(excess), got.shape)
            index = names[int(worst[0])] if len(names) else tuple(map(int, worst))
            given = {n: float(a[index]) for n, a in self.arrays.items() if a.ndim == len(index) > 0}
            self.fail(f"{what} at {index}: got {got[worst]!r}, wanted {wanted[worst]!r}, with {given}")

    def fail(self, message: str) -> None:
        options = ", ".join(f"{n}={v!r}" for n, v in self.options.items())
        raise AssertionError(f"{self.loss.__name__}({options}): {message}")


def close(x: Any) -> np.ndarray:
    """What a few roundings amount to in float64 results, some of which may be small by cancellation."""
    size = np.abs(x)
    some = np.extract(size != 0, size)  # those that are zero say nothing of what was added up
    typical = np.median(some) if some.size else 0.0
    return ROUNDINGS * np.finfo(np.float64).eps * (size + typical)


def _against_differences(
    case: Case,
    what: str,
    x: str,
    function: Callable[[np.ndarray], np.ndarray],
    pick: Any,
    got: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Compare a derivative by the argument `x` with differences, at some points that are no kinks."""
    array = case.arrays[x]
    positions = rng.choice(array.size, min(POINTS, array.size), replace=False).tolist()
    left, right = (pick(q, positions) for q in slopes(function, array, positions))
    use = smooth(left, right)
    if np.mean(use) < 0.75:
        case.fail(f"{what}: {np.sum(~use)} of {use.size} points are kinks, too many to check the rest")
    wanted, got = (left + right) / 2, got.reshape(-1)[np.asarray(positions)]
    if hasattr(case.loss.Class, f"slope_{x}"):
        # A slope stated by hand may let the gradient pass a clamp, where the value is constant.
        use &= (left != 0) | (right != 0)
    index = [tuple(map(int, np.unravel_index(k, array.shape))) for k in np.array(positions)[use]]
    # A central difference of this step is good to nine digits of smooth, well scaled functions; a variance of
    # 1e-3 takes it to six.
    case.agree(what, got[use], wanted[use], 1e-5 * np.abs(wanted[use]) + 1e-6, index)


def check_gradient(case: Case, rng: np.random.Generator) -> None:
    """The gradient by every argument is the derivative of the value."""
    for name in case.differentiated:
        at = case.moved_off_bounds(name, rng)
        _, gradients = at.term_gradients()
        _against_differences(
            at,
            f"gradient by {name}",
            name,
            lambda x, at=at, name=name: at.terms(**{name: x}),  # type: ignore[misc]
            lambda quotients, positions: quotients.reshape(len(positions), -1).sum(axis=1),
            gradients[name],
            rng,
        )


def check_curvature(case: Case, rng: np.random.Generator) -> None:
    """The curvature, if there is one, is the derivative of the gradient's element by its argument's."""
    if not case.loss.Class._curved:
        return
    for name in case.default_wrt:
        at = case.moved_off_bounds(name, rng)
        terms, gradient, curvature = at.loss.value_grad_hess(
            **at.arrays, **at.options, reduction="none", wrt=name
        )
        expected, gradients = at.term_gradients()
        at.agree("value_grad_hess's value", terms, expected, close(expected))
        at.agree(f"value_grad_hess's gradient by {name}", gradient, gradients[name], close(gradients[name]))
        _against_differences(
            at,
            f"curvature by {name}",
            name,
            lambda x, at=at, name=name: at.term_gradients(**{name: x})[1][name],  # type: ignore[misc]
            lambda quotients, positions: quotients.reshape(len(positions), -1)[
                range(len(positions)), positions
            ],
            curvature,
            rng,
        )


def check_majorizer(case: Case, rng: np.random.Generator) -> None:
    """The parabola that the majorizer gives, if there is one, is nowhere below the loss."""
    if not case.loss.Class._curved:
        return
    for name in case.default_wrt:
        at = case.moved_off_bounds(name, rng)
        try:
            terms, gradient, curvature = at.loss.value_grad_hess(
                **at.arrays, **at.options, reduction="none", wrt=name, curvature="majorizer"
            )
        except ValueError:  # there is none
            continue
        x = at.arrays[name]
        for size in (1e-3, 0.1, 1.0, 10.0, 1e3):
            step = at.bounded(name, x + size * rng.choice([-1.0, 1.0], x.shape)) - x
            rise = (gradient * step + 0.5 * curvature * step * step).reshape(*terms.shape, -1).sum(axis=-1)
            there = at.terms(**{name: x + step})
            over = np.maximum(there - (terms + rise), 0)
            at.agree(f"loss above the majorizer by {name}", over, 0 * over, close(there) + close(rise))


def check_precision(case: Case, rng: np.random.Generator) -> None:
    """float32 and half precision agree with float64, as far as the problem's conditioning lets them.

    A result may be off by a few roundings of itself, and by what a few roundings of the inputs move it: all
    elements by the same share, and each by its own, which moves a loss that has no scale.
    """
    eps = float(np.finfo(np.float32).eps)
    for dtype in NARROW:
        narrow = case.cast(dtype)
        wide = narrow.cast(np.float64)

        def results(at: Case) -> list[np.ndarray]:
            terms, gradients = at.term_gradients()
            return [terms, *gradients.values()]

        exact = results(wide)
        sensitivity = [np.zeros(e.shape) for e in exact]
        for name, sign, each in itertools.product(wide.differentiated, (-eps, eps), (False, True)):
            x = wide.arrays[name]
            moved = wide.bounded(name, x * (1 + sign * (rng.choice((-1, 1), x.shape) if each else 1)))
            for s, a, b in zip(sensitivity, results(wide.with_arrays(**{name: moved})), exact, strict=True):
                np.maximum(s, np.abs(a - b), out=s)
        what = ["value", *(f"gradient by {n}" for n in case.differentiated)]
        limits = finfo(dtype)
        for label, got, wanted, s in zip(what, results(narrow), exact, sensitivity, strict=True):
            if got.dtype != dtype:
                case.fail(f"{label} of {np.dtype(dtype)} is {got.dtype}")
            bound = case.roundings * (s + eps * np.abs(wanted))
            if dtype is not np.float32:  # the result's own rounding, and its subnormals
                bound = bound + float(limits.eps) * np.abs(wanted) + float(limits.smallest_subnormal)
            fits = np.abs(wanted) + bound < float(limits.max)
            wide.agree(
                f"{label} in {np.dtype(dtype)}", np.where(fits, got, 0), np.where(fits, wanted, 0), bound
            )


def check_reductions(case: Case, rng: np.random.Generator) -> None:
    """Value and gradient agree between the reductions, calls and forms, and the inputs are not written."""
    before = {n: a.copy() for n, a in case.arrays.items()}
    terms, gradients = case.term_gradients()
    sizes = np.abs(terms).sum()
    case.agree("value_and_grad's value", terms, case.terms(), close(terms))
    total = case.value(reduction="sum")
    case.agree("sum", total, terms.sum(), close(sizes))
    case.agree("mean", case.value(reduction="mean"), total / terms.size, close(sizes / terms.size))
    case.agree("normalizer", case.value(reduction="mean", normalizer=3.0), total / 3, close(sizes / 3))

    wrt = case.default_wrt
    value, reduced = case.loss.value_and_grad(
        **case.arrays, **case.options, reduction="mean", normalizer=3.0, grad_output=-2.0, wrt=wrt
    )
    case.agree("value_and_grad's mean", value, total / 3, close(sizes / 3))
    for name, g in zip(wrt, reduced, strict=True):
        wanted = gradients[name] * -2 / 3
        case.agree(f"gradient by {name} of a mean, times grad_output", g, wanted, close(wanted))

    required = {n: a for n, a in case.arrays.items() if n not in case.loss.Class.fields}
    call_only = {n: a for n, a in case.arrays.items() if n not in required}
    in_constructor = {n: a for n, a in call_only.items() if not case.loss.Class.fields[n].call_only}
    criterion = case.loss.Class(**case.options, **in_constructor, reduction="sum")
    in_call = {n: a for n, a in call_only.items() if n not in in_constructor}
    case.agree("the class's value", criterion(*required.values(), **in_call), total, 0)
    for name, a in before.items():
        if not np.array_equal(a, case.arrays[name], equal_nan=name in case.floating):
            case.fail(f"{name} was written")


def check_weights(case: Case, rng: np.random.Generator) -> None:
    """A sample's weight multiplies its term, and one of zero hides NaN; grad_output multiplies gradients."""
    terms, gradients = case.term_gradients()
    weights = np.where(rng.random(terms.shape) < 0.25, 0.0, rng.uniform(0.5, 2.0, terms.shape))
    upstream = rng.normal(size=terms.shape)
    spoiled = case.with_arrays(
        **{
            n: np.where(_hidden(weights, case.arrays[n]), np.nan, case.arrays[n])
            for n in case.floating
            if case.arrays[n].shape[: terms.ndim] == terms.shape
        }
    )
    got, found = spoiled.term_gradients(sample_weight=weights, grad_output=upstream)
    weighted = weights * terms
    case.agree("value with sample_weight", got, weighted, close(weighted))
    for name in case.differentiated:
        shape = case.arrays[name].shape
        if shape[: terms.ndim] == terms.shape:
            factor = (weights * upstream).reshape(terms.shape + (1,) * (len(shape) - terms.ndim))
            wanted = np.where(factor == 0, 0, gradients[name] * factor)
            case.agree(
                f"gradient by {name} with sample_weight and grad_output", found[name], wanted, close(wanted)
            )
    value = spoiled.value(reduction="mean", sample_weight=weights)
    size = np.abs(weighted).sum() / weights.sum()
    case.agree("mean with sample_weight", value, weighted.sum() / weights.sum(), close(size))


def _hidden(weights: np.ndarray, array: np.ndarray) -> np.ndarray:
    """The elements of an array whose terms have no weight."""
    return np.broadcast_to(
        (weights == 0).reshape(weights.shape + (1,) * (array.ndim - weights.ndim)), array.shape
    )


def check_in_place(case: Case, rng: np.random.Generator) -> None:
    """A gradient that overwrites its argument is the gradient that does not."""
    wrt = case.default_wrt
    value, fresh = case.loss.value_and_grad(**case.arrays, **case.options, wrt=wrt)
    arrays = {n: a.copy() for n, a in case.arrays.items()}
    out = tuple(arrays[n] for n in wrt)
    again, gradients = case.loss.value_and_grad(**arrays, **case.options, wrt=wrt, out=out)
    case.agree("value in place", again, value, close(case.terms()).max())
    for name, g, o, wanted in zip(wrt, gradients, out, fresh, strict=True):
        if g is not o:
            case.fail(f"gradient by {name} in place is another array than out")
        case.agree(f"gradient by {name} in place", g, wanted, close(wanted))


def check_shapes(case: Case, rng: np.random.Generator) -> None:
    """Values and gradients have their shapes, whatever the number of axes; an empty mean is NaN."""
    for shape in case.loss.Class._shapes:
        at = Case(case.loss, case.options, samples(case.loss, rng, shape))
        terms, gradients = at.term_gradients()
        for name, g in gradients.items():
            if g.shape != at.arrays[name].shape:
                case.fail(f"gradient by {name} has shape {g.shape}, not {at.arrays[name].shape}")
        at.agree(f"sum for shape {shape}", at.value(reduction="sum"), terms.sum(), close(np.abs(terms).sum()))
        if terms.size == 0:
            at.agree("mean of nothing", at.value(reduction="mean"), np.nan, 0)


PER_COMBINATION = (check_gradient, check_curvature, check_precision)
# What no option changes is checked once: each of these asks for kernels of its own.
ONCE = (check_majorizer, check_reductions, check_weights, check_in_place, check_shapes)
