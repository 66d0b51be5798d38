"""A little of each of the battery's trials; most of them in the sweep. `test_calls.py` has those of calls."""

import pytest
from battery import bare, disk, memory, processes, results
from sweeps import sweep

# On one of Numba's layers: what a user's own loops do to calls is the same on all but for forks.
LEFT_OUT = (
    ", tbb",
    "calls of six threads, omp",
    "forkserver, omp",
    "cloudpickle, omp",
    "DataLoader, omp",
    "prange, omp",
)
TRIALS = [
    trial
    for part in (processes, disk, memory, bare, results)
    for trial in part.TRIALS
    if not trial.name.endswith(LEFT_OUT)
]
ALWAYS = {"memory held after the same definition"}


@pytest.mark.parametrize(
    "trial", sweep(TRIALS, *(t for t in TRIALS if t.name in ALWAYS)), ids=lambda trial: trial.name
)
def test_trial(trial):
    tally = trial.run(0.03)
    assert not tally.lost, "\n".join(tally.lost)
    if not tally.tried:
        pytest.skip("what it takes is not installed")
