"""Long tests, each of whose cases is compiled: some cases run always, some of the others in CI."""

from collections.abc import Iterable
from typing import Any

import pytest
from llvmlite import binding


def some(cases: Iterable[tuple[Any, ...]], every: int = 4) -> list[Any]:
    """Parameter sets of a test, of which the first and each so many-th after it run always."""
    return [pytest.param(*case, marks=[pytest.mark.sweep] * bool(k % every)) for k, case in enumerate(cases)]


# Modules of losses that have tests of their own, `test_robust_losses`: those of all losses take them in the
# sweep.
APART = ("robust", "quantiles", "amounts", "margins")


def apart(function: Any) -> bool:
    """Whether a loss is one of those."""
    return function.__module__.rpartition(".")[2] in APART


# Processors that tests compile for, and what this one must have to run that.
PROCESSORS = {"nehalem": "sse4.2", "haswell": "avx2", "skylake-avx512": "avx512f"}


def processors(*kept: str) -> list[Any]:
    """Parameters of a test: the processors that this one can stand for, of which those kept run always."""
    here = binding.get_host_cpu_features()
    return sweep([name for name, feature in PROCESSORS.items() if here.get(feature)], *kept)


def sweep(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Parameters of a test, of which those kept run always, the others with ``pytest -m sweep``."""
    return [v if v in kept else pytest.param(v, marks=pytest.mark.sweep) for v in values]
