"""The gradient of a loss of class scores by the class weights, through its cross entropy. On any device.

Each function takes the device's module of arithmetic: `kernels.cpu.arithmetic`, or its twin.
"""

from collections.abc import Callable
from typing import Any

from .layout import class_axis
from .spec import Scores

# An output in place of the target's gradient: each class's -log softmax, times the slope by the cross
# entropy and all that multiplies the row's gradient.
DISTANCES = "distances"


def run(p: Scores, outputs: dict[str, Any], run: Callable[..., Any], arithmetic: Any) -> Any:
    """Write the outputs, the gradient by ``"weight"`` among them, and return the value."""
    # Computed before its arguments may be overwritten, and written when they are no longer needed.
    distances = arithmetic.empty_like(p.target, p.arithmetic)
    run(p, {DISTANCES: distances})
    products = attributed(distances, p.target, p.label_smoothing, p.input.shape, p.arithmetic, arithmetic)
    value = run(p, {n: o for n, o in outputs.items() if n != "weight"})
    arithmetic.fold(products, outputs["weight"], (class_axis(p.input.shape),))
    return value


def attributed(
    distances: Any, target: Any, smoothing: float, shape: tuple[int, ...], dtype: Any, arithmetic: Any
) -> Any:
    """Return each class's part of each row's gradient: its probability, smoothed, times `DISTANCES`."""
    classes = shape[class_axis(shape)]
    return arithmetic.masked_product(
        target, distances, arithmetic.sum_dtype(dtype), 1 - smoothing, smoothing / classes
    )
