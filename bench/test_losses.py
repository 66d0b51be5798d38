"""The pytest-benchmark suite, of the same cases and peers as `numbaloss bench`:

pytest bench/ --benchmark-only
"""

import pytest

import numbaloss as nl
from numbaloss.bench.cases import cases
from numbaloss.bench.peers import DEFAULT, PEERS

pytest.importorskip("pytest_benchmark")

OURS = "numbaloss"
SIDES = [OURS, *(n for n in DEFAULT if PEERS[n].missing() is None)]


@pytest.mark.filterwarnings("ignore")  # other libraries', of how we use them
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", cases(nl.registry, quick=True), ids=str)
def test_loss(benchmark, case, side):
    arrays = case.arrays()
    call = case.call(arrays) if side == OURS else PEERS[side].build(case, arrays)
    if call is None:
        pytest.skip(f"{side} has no {case.loss}")
    benchmark.group = str(case)
    benchmark.extra_info["bytes"] = case.traffic(arrays)
    call()
    benchmark(call)
