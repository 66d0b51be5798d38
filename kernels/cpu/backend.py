"""The CPU's backend: what `kernels.devices` asks of a device."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from ..spec import Elements, Linear, Margins, Picks, Scores, Sequences, Vectors
from . import launch
from .arithmetic import (
    add,
    as_float,
    assign,
    constant,
    divisor,
    empty,
    empty_like,
    excess,
    fold,
    from_host,
    masked_product,
    mean_of_rows,
    number,
    over,
    sum_dtype,
    sum_of_products,
    to_host,
    total,
)
from .memory import free_memory

__all__ = [
    "add",
    "as_float",
    "assign",
    "constant",
    "describe",
    "divisor",
    "empty",
    "empty_like",
    "excess",
    "fold",
    "free_memory",
    "from_host",
    "give",
    "holds",
    "masked_product",
    "mean_of_rows",
    "number",
    "over",
    "repeat",
    "run",
    "shards",
    "sum_dtype",
    "sum_of_products",
    "synchronize",
    "to_host",
    "total",
]

FAMILIES = {
    Elements: "elementwise",
    Scores: "scores",
    Picks: "nll",
    Margins: "margins",
    Vectors: "vectors",
    Sequences: "ctc",
    Linear: "linear",
}

# Whether rows of soft margins have a kernel of their own; else they are computed by elements.
HAS_SOFT_MARGINS = False


@cache
def family(kind: Any) -> Any:
    """Return the module that computes a family of problems: imported, with its kernels, when asked for."""
    return import_module(f"{__package__}.{FAMILIES[kind]}")


def shards() -> Any:
    """Return the module that computes scores of which other ranks have other classes."""
    return import_module(f"{__package__}.shards")


def run(problem: Any, outputs: dict[str, Any]) -> Any:
    """Write the outputs that a problem is asked for, and return its value."""
    module = family(problem.__class__)
    if hasattr(module, "compute"):  # of its own: it may take more than one launch
        return module.compute(problem, outputs)
    return (
        launch.compute(module, problem, outputs) if hasattr(module, "pack") else module.run(problem, outputs)
    )


def repeat(
    problem: Any, outputs: dict[str, Any], made: tuple[str, ...], values: tuple[Any, ...], valued: bool
) -> Callable[[tuple[Any, ...]], Any] | None:
    """Return a function that computes the same problem of other arrays; None where there is none.

    Parameters
    ----------
    problem : record
    outputs : dict
        Arrays to write, by name.
    made : tuple of str
        The outputs that were made for the call.
    values : tuple
        What the caller gave.
    valued : bool
        Whether the value is asked for; here it costs nothing.

    Returns
    -------
    callable or None
        ``again(values)`` gives the value and the outputs that it made, in their order; or `MISSING`.
    """
    module = family(problem.__class__)
    if hasattr(module, "repeat"):
        return module.repeat(problem, outputs, made, values)
    return launch.repeat(module, problem, outputs, made, values) if hasattr(module, "pack") else None


def describe(loss: str, call: dict[str, Any], host: tuple[str, ...] = ()) -> Any:
    """Return a context with the call as it is."""
    return nullcontext(call)


def holds(value: Any) -> bool:
    """Return whether an argument lies on this device: all are at hand."""
    return True


def give(result: Any) -> Any:
    """Return results as the caller's library has them."""
    return result


def given_to_caller(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return an array for a function of the caller's: C-contiguous, in a dtype."""
    return np.ascontiguousarray(array, dtype)


def taken_from_caller(loss: str, what: str, value: Any) -> np.ndarray:
    """Return what a function of the caller's gave, as an array."""
    return np.asarray(value)


def synchronize() -> None:
    """Nothing is left to wait for when a call returns."""
