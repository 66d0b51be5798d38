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
