"""The gradient of cross entropy by the class weights, in which it is linear. On any device.

Each function takes the device's module of arithmetic: `kernels.cpu.arithmetic`, or its twin.
"""

from collections.abc import Callable
from typing import Any

from .layout import class_axis
from .spec import Scores


def run(p: Scores, outputs: dict[str, Any], run: Callable[..., Any], arithmetic: Any) -> Any:
    """Write the outputs, the gradient by ``"weight"`` among them, and return the value."""
    # Computed before its arguments may be overwritten, and written when they are no longer needed.
    distances = arithmetic.empty_like(p.target, p.arithmetic)
    run(p._replace(weight=None, label_smoothing=0.0), {"target": distances})
    products = attributed(distances, p.target, p.label_smoothing, p.input.shape, p.arithmetic, arithmetic)
    value = run(p, {n: o for n, o in outputs.items() if n != "weight"})
    arithmetic.fold(products, outputs["weight"], (class_axis(p.input.shape),))
    return value


def attributed(
    distances: Any, target: Any, smoothing: float, shape: tuple[int, ...], dtype: Any, arithmetic: Any
) -> Any:
    """Return each class's part of each row's loss: its probability, smoothed, times -log softmax.

    `distances` is d/dq of the unweighted, unsmoothed loss: -log softmax, times what multiplies the row.
    """
    classes = shape[class_axis(shape)]
    return arithmetic.masked_product(
        target, distances, arithmetic.sum_dtype(dtype), 1 - smoothing, smoothing / classes
    )
