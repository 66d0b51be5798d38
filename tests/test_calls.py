"""Calls drawn at random end in a right result or a declared error: a little of what `tests/battery` tries."""

import sys

import pytest
from battery import calls
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeps import sweep

# Few, for each kind of call is compiled; ``python -m tests.battery calls`` makes calls of all.
LOSSES = ("mse_loss", "cross_entropy", "multi_margin_loss")


@pytest.mark.parametrize("name", sweep(LOSSES, "mse_loss"))
@settings(max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
@given(form=st.randoms(use_true_random=False), k=st.randoms(use_true_random=False))
def test_calls(name, form, k):
    call = calls.draw(form, k, [name])
    wrong = calls.judge(call)
    assert wrong is None, f"{wrong}: {call}"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is forbidden by Linux's mprotect")
def test_a_guard_page_ends_a_process_that_reads_beyond(python):
    script = """
import os, sys
import numpy as np
sys.path.insert(0, "tests")
from battery.guard import guarded
for before in (False, True):
    a = guarded(np.arange(5.0), before)
    assert a.sum() == 10
    pid = os.fork()
    if pid == 0:
        beyond = np.lib.stride_tricks.as_strided(a, (7,), (-8 if before else 8,))
        os._exit(int(beyond.sum()) * 0)
    assert os.waitpid(pid, 0)[1] != 0
"""
    python(script)
