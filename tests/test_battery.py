"""A little of the battery's trials; most of them in the sweep. `test_calls.py` has those of calls."""

from pathlib import Path

import pytest
from battery import bare, disk, memory, processes
from sweeps import sweep

import numbaloss

ALWAYS = ["memory held after the same definition"]
SWEEP = [
    "16 threads and a loop of the user's, workqueue",
    "os.fork, omp",
    "PyTorch's DataLoader, workqueue",
    "8 processes at once, a cache of garbage",
    "versions side by side, moved, at once",
    "memory held after arrays with other options",
    "^C wherever Python looks for it",
    "no memory for a gradient",
    "a truncated index: bare, ours",
    "two threads on workqueue: bare, ours",
]
TRIALS = {t.name: t for part in (processes, disk, memory, bare) for t in part.TRIALS}


@pytest.mark.parametrize("name", sweep([*ALWAYS, *SWEEP], *ALWAYS))
def test_trial(name):
    tally = TRIALS[name].run(0.03)
    assert not tally.lost, "\n".join(tally.lost)
    if not tally.tried:
        pytest.skip("what it takes is not installed")


def test_what_versions_edit_is_there():
    """The trial of versions edits the library's files: its texts have to follow them."""
    for edits, _ in disk.VERSIONS:
        for name, old, new in edits:
            assert old in (Path(numbaloss.__file__).parent / name).read_text()
            assert len(old) == len(new)
