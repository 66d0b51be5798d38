"""What is asked of a kernel, whatever the device. Light to import: no kernel is compiled for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

# Elements that a CPU kernel handles at once: large enough to amortise a call, small enough for a block's
# operands to stay in the second-level cache.
BLOCK = 8192

# How an array's elements are stored.
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = range(4)
CODES = {"float64": FLOAT64, "float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}


class Scalars(NamedTuple):
    """A loss's functions of one element, and what they take.

    `value`, and `slopes` that replace derived ones (by operand), take the operands, then the options.
    An entry of `options` is None for a number given at run time, else the bool it is compiled with.
    `domains` has, per operand, the closed interval it must lie in and whether NaN may pass, or None; `absent`
    has the numbers that stand for operands which the call does not give.
    """

    name: str
    arity: int
    value: Callable[..., Any]
    slopes: tuple[tuple[int, Callable[..., Any]], ...] = ()
    options: tuple[bool | None, ...] = ()
    domains: tuple[tuple[float, float, bool] | None, ...] = (None, None, None)
    absent: tuple[float | None, ...] = ()


class Request(NamedTuple):
    """What one kernel computes. Arrays are passed in this order: operands, weights, upstream, outputs."""

    weighted: bool = False  # an array multiplies each term
    upstream: bool = False  # an array multiplies each gradient
    terms: bool = False  # the terms are an output, and not summed
    wrt: tuple[int, ...] = ()  # operands to differentiate: an output each
    in_place: tuple[bool, ...] = ()  # per entry of `wrt`: the gradient overwrites its operand
    curvature: bool = False  # the second derivative by the one operand in `wrt` is the last output


class ScoreFunctions(NamedTuple):
    """A loss of one row of class scores, as a function of the row's statistics.

    `value` takes the statistics that it asks for (`kernels.lift.STATISTICS`), then the options. An entry of
    `options` is None for a number given at run time, else the bool it is compiled with.
    """

    name: str
    value: Callable[..., Any]
    statistics: tuple[str, ...]
    options: tuple[bool | None, ...] = ()


class ScoreRequest(NamedTuple):
    """What one kernel of class scores computes: the rest of a call is bound away."""

    probabilities: bool = False  # the target holds probabilities of the classes, not labels
    weighted: bool = False  # labels: classes have weights
    smoothed: bool = False  # labels: label smoothing, and class weights
    row_factors: bool = False  # an array multiplies the rows' values, another one their gradients
    grad: bool = False  # the gradient by the scores
    target_grad: bool = False  # that by the probabilities
    by_weight: bool = False  # `target_grad` is for the class weights: without them and without smoothing
    curvature: bool = False  # the diagonal of the Hessian
    softcap: bool = False  # scores are capped first
    lse_square: bool = False  # the squared logsumexp is added to the value


class Scores(NamedTuple):
    """A checked call of a loss of class scores."""

    functions: ScoreFunctions
    options: tuple[float, ...]  # the numbers among the definition's options
    input: Any  # (C), (N, C) or (N, C, d1, ...)
    target: Any  # integers, the rows' classes; or probabilities, of the input's shape
    probabilities: bool
    arithmetic: Any  # dtype
    class_weight: Any = None  # (C)
    sample_weight: Any = None  # broadcasts to the rows
    upstream: Any = None  # of the rows' gradients, as well
    factor: float = 1.0  # of the gradient
    divisor: float | None = 1.0  # None for the sum of what the rows count for
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    lse_square_scale: float = 0.0
