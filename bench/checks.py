"""Is it right on this machine? Values against the reference, gradients against its differences."""

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np

from numbaloss import reference, testing

from .cases import Arrays, casted, dtype_of, family_of
from .devices import Device

POINTS = 24  # elements of a gradient that are compared with differences
SHARED = 1 << 16  # elements that all threads work on together
HELD = {"blank": 0}  # the labels of a sequence are drawn with this blank


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# As in PyTorch, some gradients are those by the input of what made the argument.
MADE_BY = {"log_probs": log_softmax}


class Failure(AssertionError):
    """What a loss got wrong."""


def variations(loss: Any) -> Iterator[dict[str, Any]]:
    """The default options, then each option at each of its samples, the others at their defaults."""
    yield {}
    for name, option in loss.Class.fields.items():
        if option.array or name in ("reduction", *HELD):
            continue
        for value in option.samples:
            if value != option.default:
                yield {name: value}


def check(loss: Any, dtype: str, device: Device) -> None:
    """Compare a loss with the float64 reference on a few samples, for every option; raise a `Failure`.

    In float64 the gradient is compared with differences of the reference. In a narrower dtype it is compared
    with what it is in float64, and may be off by a few roundings, as the value may.
    """
    family = family_of(loss)
    drawn = casted(family.draw(loss, np.random.default_rng(0), family.tiny), dtype_of(dtype))
    for options in variations(loss):
        value, gradients = _results(loss, drawn, options, device)
        wide = casted(drawn, dtype_of("float64"))
        terms = getattr(reference, loss.__name__)(**wide, **options, reduction="none")
        limits = testing.finfo(dtype_of(dtype))
        roundings = testing.ROUNDINGS * float(limits.eps)
        if np.sum(terms) < float(limits.max):
            _agree(loss, options, "sum", value, np.sum(terms), roundings * np.sum(np.abs(terms)))
        if dtype == "float64":
            _check_differences(loss, options, wide, gradients)
            continue
        _, exact = _results(loss, wide, options, device)
        for name, wanted in exact.items():
            bound = roundings * (np.abs(wanted) + np.mean(np.abs(wanted)))
            _agree(loss, options, f"gradient by {name}", gradients[name], wanted, bound)
    if device.name == "cpu":
        _check_threads(loss, dtype, device)


def _check_threads(loss: Any, dtype: str, device: Device) -> None:
    """All threads together get the bits that one gets alone."""
    family, threads = family_of(loss), numba.get_num_threads()
    arrays = casted(family.draw(loss, np.random.default_rng(0), family.sized(SHARED)), dtype_of(dtype))
    value, gradients = _results(loss, arrays, {}, device)
    numba.set_num_threads(1)
    try:
        alone, by_one = _results(loss, arrays, {}, device)
    finally:
        numba.set_num_threads(threads)
    if value != alone or any(gradients[n].tobytes() != by_one[n].tobytes() for n in gradients):
        raise Failure(f"{_named(loss, {})}: {threads} threads get other bits than one")


def _results(loss: Any, arrays: Arrays, options: dict[str, Any], device: Device) -> tuple[float, Arrays]:
    """The sum of the terms, and its gradients by the arguments that a model produces."""
    wrt = loss.Class._default_wrt()
    operands = [device.put(a) for a in arrays.values()]
    with np.errstate(over="ignore"):  # a sum that float16 does not hold
        value, gradient = loss.value_and_grad(*operands, **options, reduction="sum")
    names, found = ((wrt,), (gradient,)) if isinstance(wrt, str) else (wrt, gradient)
    return float(value), {n: device.get(g) for n, g in zip(names, found, strict=True)}


def _check_differences(loss: Any, options: dict[str, Any], arrays: Arrays, gradients: Arrays) -> None:
    oracle = getattr(reference, loss.__name__)
    for name, gradient in gradients.items():
        rng = np.random.default_rng(1)
        positions = rng.choice(gradient.size, min(POINTS, gradient.size), replace=False).tolist()

        def terms(x: np.ndarray, name: str = name) -> np.ndarray:
            x = MADE_BY[name](x) if name in MADE_BY else x
            return oracle(**{**arrays, name: x}, **options, reduction="none")

        left, right = (
            q.reshape(len(positions), -1).sum(axis=1) for q in testing.slopes(terms, arrays[name], positions)
        )
        use = testing.smooth(left, right)  # a kink has no derivative to compare with
        if np.mean(use) < 0.5:
            raise Failure(f"{_named(loss, options)}: gradient by {name}: too many kinks to check the rest")
        wanted = ((left + right) / 2)[use]
        got = gradient.reshape(-1)[positions][use]
        _agree(loss, options, f"gradient by {name}", got, wanted, 1e-5 * np.abs(wanted) + 1e-6)


def _agree(loss: Any, options: dict[str, Any], what: str, got: Any, wanted: Any, bound: Any) -> None:
    got, wanted = (np.atleast_1d(a).astype(np.float64) for a in (got, wanted))
    with np.errstate(invalid="ignore"):
        excess = np.where(got == wanted, -np.inf, np.abs(got - wanted) - bound)
    excess = np.where(np.isnan(excess), np.inf, excess)
    if excess.size and excess.max() > 0:
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        raise Failure(
            f"{_named(loss, options)}: {what}: got {got[worst]:.9g}, wanted {wanted[worst]:.9g} "
            f"({np.sum(excess > 0)} of {excess.size} are off)"
        )


def _named(loss: Any, options: dict[str, Any]) -> str:
    return f"{loss.__name__}({', '.join(f'{n}={v!r}' for n, v in options.items())})"
