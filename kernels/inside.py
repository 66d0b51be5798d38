"""Losses to call inside the caller's own compiled code: the one place that asks both devices for them."""

import importlib
import importlib.util
from typing import Any

from .spec import (
    Distance,
    MarginFunctions,
    NllFunctions,
    Scalars,
    ScoreFunctions,
    ScoreOption,
    VectorFunctions,
)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{name}")


def scalar(scalars: Scalars, names: tuple[str, ...], defaults: tuple[Any, ...]) -> Any:
    """Return the function of one element, to call in ``@njit`` functions and CUDA kernels."""
    return _on_both("compile_scalar", scalars, names, defaults)


def _on_both(compile_it: str, *definition: Any) -> Any:
    """Return a function of numbers that CUDA kernels may call too, where numba-cuda is installed."""
    function = getattr(_module("cpu.inside"), compile_it)(*definition)
    if importlib.util.find_spec("numba_cuda") is not None:
        compiled = getattr(_module("cuda.elementwise"), compile_it)(*definition)
        _module("cuda.target").also_for_cuda(function, compiled)
    return function


def part(function: Any) -> Any:
    """Return a definition's function as one that other definitions may call, on both devices."""
    return _module("cpu.inside").compile_part(function)


def derived(function: Any, names: tuple[str, ...], defaults: tuple[Any, ...], order: int) -> Any:
    """Return a function of numbers with its derivatives, to call in ``@njit`` functions and CUDA kernels."""
    return _on_both("compile_derived", function, names, defaults, order)


def of_elements(
    scalars: Scalars, names: tuple[str, ...], defaults: tuple[Any, ...], options: tuple[str, ...]
) -> Any:
    """Return the compiled function of an elementwise loss over whole arrays."""
    return _module("cpu.inside").compile_whole(scalars, names, defaults, options)


def of_sequences(name: str) -> Any:
    """Return the compiled function of a loss of sequences of labels."""
    return _module("cpu.inside_sequences").compile_sequences(name)


def of_product(name: str, functions: ScoreFunctions, options: tuple[ScoreOption, ...]) -> Any:
    """Return the compiled function of a loss of class scores that are a matrix product."""
    return _module("cpu.inside_linear").compile_product(name, functions, options)


def of_classes_apart(name: str, scalars: Scalars) -> Any:
    """Return the compiled function of an elementwise loss that is averaged over the classes of a row."""
    return _module("cpu.inside_scores").compile_soft_margins(name, scalars)


def of_picks(functions: NllFunctions, *signature: Any) -> Any:
    """Return the compiled function of a loss of one score a row: see `cpu.inside_scores.compile_picks`."""
    return _module("cpu.inside_scores").compile_picks(functions, *signature)


def of_margins(definitions: tuple[MarginFunctions, ...], *signature: Any) -> Any:
    """Return the compiled function of a loss of margins: see `cpu.inside_scores.compile_margins`."""
    return _module("cpu.inside_scores").compile_margins(definitions, *signature)


def of_scores(
    definitions: tuple[ScoreFunctions, ...],
    names: tuple[str, ...],
    defaults: tuple[Any, ...],
    options: tuple[ScoreOption, ...],
    own: tuple[str, ...],
) -> Any:
    """Return the compiled function of a loss of class scores: see `cpu.inside_scores.compile_score_loss`."""
    return _module("cpu.inside_scores").compile_score_loss(definitions, names, defaults, options, own)


def of_vectors(
    functions: VectorFunctions,
    vectors: tuple[str, ...],
    names: tuple[str, ...],
    defaults: tuple[Any, ...],
    domains: dict[str, Any],
    distance: Distance | None,
    named: tuple[tuple[str, Distance], ...] = (),
    axes: int | None = None,
) -> Any:
    """Return the compiled function of a loss of vectors over whole arrays."""
    return _module("cpu.inside_vectors").compile_whole(
        functions, vectors, names, defaults, domains, distance, named, axes
    )


def descents(scalars: Scalars, options: tuple[Any, ...], policy: str, floor: float | None) -> Any:
    """Return the compiled derivatives of minus a loss of elements: see `cpu.descent.compile_descents`."""
    return _module("cpu.descent").compile_descents(scalars, options, policy, floor)


def row_descent(functions: ScoreFunctions, options: tuple[Any, ...], *more: Any) -> Any:
    """Return the same of a row of class scores: see `cpu.descent.compile_row_descent`."""
    return _module("cpu.descent").compile_row_descent(functions, options, *more)
