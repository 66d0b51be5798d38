"""Long tests, each of whose cases is compiled: some cases run always, all of them in CI."""

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Parameters of a test, of which those kept run always, the others with ``pytest -m sweep``."""
    return [v if v in kept else pytest.param(v, marks=pytest.mark.sweep) for v in values]
