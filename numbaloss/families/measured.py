"""Triplets by a distance of the caller's own: a hinge of distances, and the chain to their derivatives."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import floating
from ..kernels import math as nm
from ..kernels.spec import BY_TERMS, Elements, Scalars, Vectors


def _hinge(near, far, swapped, margin, swap):
    h = margin + near - (nm.minimum(far, swapped) if swap else far)
    return nm.where(h < 0, 0, h)


def _by_near(near, far, swapped, margin, swap):
    h = margin + near - (nm.minimum(far, swapped) if swap else far)
    return nm.minimum(nm.sign(h) + 1, 1)  # it passes at exactly the clamp


def _by_far(near, far, swapped, margin, swap):
    h = margin + near - (nm.minimum(far, swapped) if swap else far)
    share = nm.sign(swapped - far) * 0.5 + 0.5 if swap else 1  # of equal distances a half each
    return nm.where(h < 0, 0, -share * nm.minimum(nm.sign(h) + 1, 1))


def _by_swapped(near, far, swapped, margin, swap):
    h = margin + near - (nm.minimum(far, swapped) if swap else far)
    share = nm.sign(far - swapped) * 0.5 + 0.5 if swap else 0
    return nm.where(h < 0, 0, -share * nm.minimum(nm.sign(h) + 1, 1))


NAMES = "near", "far", "swapped"
SLOPES = (0, _by_near), (1, _by_far), (2, _by_swapped)
HINGES = {s: Scalars("hinge", 3, _hinge, SLOPES, (None, s)) for s in (False, True)}


class Measured:
    """The caller's distance, checked."""

    def __init__(
        self, loss: str, function: Callable[..., Any], gradients: bool, backend: Any, dtype: Any
    ) -> None:
        self.loss, self.gradients, self.backend, self.dtype = loss, gradients, backend, dtype
        self.function = getattr(function, "value_and_grad", None) if gradients else function
        if self.function is None:
            raise TypeError(
                f"{loss}: distance_function must have an attribute value_and_grad for gradients, "
                f"a function that gives (distances, (by_x, by_y)); got {function!r}"
            )

    def __call__(self, x: Any, y: Any) -> tuple[Any, tuple[Any, Any]]:
        """Return the distances of rows, and their derivatives by both vectors; without gradients, any two."""
        found: Any = self.function(x, y)  # type: ignore[misc]
        by: tuple[Any, ...] = (x, y)
        if self.gradients:
            pair = isinstance(found, tuple) and len(found) == 2
            if not (pair and isinstance(found[1], tuple | list) and len(found[1]) == 2):
                got = f"a pair with {type(found[1]).__name__}" if pair else type(found).__name__
                raise TypeError(
                    f"{self.loss}: distance_function.value_and_grad must give (distances, (by_x, by_y)), "
                    f"got {got}"
                )
            found, by = found
        shape = tuple(x.shape)
        value = self.checked("distances", found, shape[:-1])
        return value, (self.checked("by_x", by[0], shape), self.checked("by_y", by[1], shape))

    def checked(self, what: str, found: Any, shape: tuple[int, ...]) -> Any:
        array = self.backend.taken_from_caller(self.loss, f"{what} of distance_function", found)
        if array.shape != shape:
            raise ValueError(
                f"{self.loss}: distance_function must give {what} of shape {shape}, got {array.shape}"
            )
        if array.dtype.kind not in "biu":
            array = floating(self.loss, f"{what} of distance_function", array)
        return array.astype(self.dtype, copy=False)


def run(p: Vectors, function: Callable[..., Any], swap: bool, outputs: dict[str, Any], backend: Any) -> Any:
    """Write the gradients by the vectors' names; return the value."""
    weighting, rows, numbers = p.weighting, p.vectors[0].shape[:-1], backend.sum_dtype(p.arithmetic)
    measured = Measured(p.name, function, bool(outputs), backend, numbers)
    divisor, weights = weighting.divisor, weighting.sample_weight
    if weights is not None:
        weights = np.broadcast_to(weights, rows).astype(numbers)
    if divisor is None:
        divisor = float(math.prod(rows))
        if weights is not None:
            divisor = backend.total(weights, 1.0, numbers) if math.prod(rows) else 0.0
    given = [backend.given_to_caller(v, p.arithmetic) for v in p.vectors]
    near, (near_a, near_b) = measured(given[0], given[1])
    far, (far_a, far_c) = measured(given[0], given[2])
    swapped, (swapped_b, swapped_c) = measured(given[1], given[2]) if swap else (far, (far_a, far_c))

    # The terms, and a factor of each row for each distance's derivative.
    factor, left = backend.over(weighting.factor, divisor)
    weighed = weighting._replace(reduction="none", sample_weight=weights, factor=factor, divisor=left)
    hinges = Elements(
        p.name,
        HINGES[swap],
        (near, far, swapped),
        NAMES,
        p.numbers,
        weighed,
        BY_TERMS,
        True,
        rows,
        numbers,
        numbers,
    )
    factors = {n: backend.empty(rows, numbers) for n in (NAMES if outputs else ())}
    terms = backend.run(hinges, factors)
    if outputs:
        by_near, by_far, by_swapped = (factors[n][..., np.newaxis] for n in NAMES)
        parts = {
            "anchor": [(by_near, near_a), (by_far, far_a)],
            "positive": [(by_near, near_b), *([(by_swapped, swapped_b)] if swap else [])],
            "negative": [(by_far, far_c), *([(by_swapped, swapped_c)] if swap else [])],
        }
        # All before the first is stored: a derivative may be a view of the other vector.
        found = {n: backend.sum_of_products(parts[n], numbers) for n in outputs}
        for n, out in outputs.items():
            backend.assign(out, found[n])
    if weighting.reduction == "none":
        return terms.astype(p.dtype, copy=False)
    return backend.number(backend.total(terms, 1.0, numbers, divisor), p.dtype)
