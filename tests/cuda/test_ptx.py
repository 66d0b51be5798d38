"""Losses on a device whose PTX is executed, against the reference: see `ptx.cases`."""

import pytest
from ptx.cases import cases, check

CASES = [pytest.param(c, id=str(c), marks=[pytest.mark.sweep] * c.level) for c in cases() if c.level < 2]


@pytest.mark.parametrize("case", CASES)
def test_case(gpu, case):
    check(case, cpu=case.level > 0 and len(str(case)) % 3 == 0)
