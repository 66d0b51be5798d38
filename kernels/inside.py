"""Losses to call inside the caller's own compiled code: the one place that asks both devices for them."""

import importlib
import importlib.util
from typing import Any

from .spec import Distance, Scalars, ScoreFunctions, ScoreOption, VectorFunctions


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


def of_rows(kind: str, *definitions: Any) -> Any:
    """Return the compiled function of a loss with a term for each row.

    Its kind is ``'picks'``, ``'margins'``, ``'soft_margins'``, ``'product'`` or ``'sequences'``: see
    `cpu.inside_rows`.
    """
    return getattr(_module("cpu.inside_rows"), f"compile_{kind}")(*definitions)


def of_scores(
    definitions: tuple[ScoreFunctions, ...],
    names: tuple[str, ...],
    defaults: tuple[Any, ...],
    options: tuple[ScoreOption, ...],
    own: tuple[str, ...],
) -> Any:
    """Return the compiled function of a loss of class scores: see `cpu.inside_rows.compile_score_loss`."""
    return _module("cpu.inside_rows").compile_score_loss(definitions, names, defaults, options, own)


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
