"""Losses on a device whose PTX is executed, against the reference: see `ptx.cases`."""

import pytest
from ptx.cases import cases, check

# A third of level 0 runs always.
CASES = [
    pytest.param(c, id=str(c), marks=[pytest.mark.sweep] * bool(c.level or k % 3))
    for k, c in enumerate(c for level in (0, 1) for c in cases() if c.level == level)
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thin(36)
def test_case(gpu, case):
    check(case, cpu=case.level > 0 and len(str(case)) % 3 == 0)
