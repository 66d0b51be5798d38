"""The passes that kernels are compiled with, beside Numba's own."""

import io

import numpy as np
import pytest
from numba import njit
from numba.core.compiler import StateDict, run_frontend
from numba.core.registry import cpu_target
from numba.core.runtime import _nrt_python, rtsys
from numba.core.typed_passes import PreLowerStripPhis
from numba.core.untyped_passes import ReconstructSSA

from numbaloss.kernels.compiler import Brief, Joined, Versions
from numbaloss.kernels.cpu import blocks, ctc, nll, score_blocks, scores


def loops(n, flag):
    """Versions of variables that meet after branches, in loops, and at loops' ends."""
    total, last = 0, 1.5
    for i in range(n):
        if i == 3:
            continue
        if flag:
            total += i
            last = total / 2
        elif i > 7:
            last = last - 1
            break
        while total > 20:
            total -= n
            if last > total:
                last = total
    else:
        total = -total
    if flag > 1:
        extra = last
    if flag > 1:
        total += extra
    return total, last


TEMPLATES = (
    loops,
    scores.drive,
    scores.worker_tiles,
    score_blocks.rows_of_labels,
    score_blocks.columns_of_labels,
    score_blocks.columns_of_probabilities,
    blocks.direct,
    nll.nll,
    ctc.forward,
)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda f: f.__name__)
def test_versions_of_variables_are_those_of_numba(template):
    """The same statements, with the same names, after Numba's passes and after the quicker ones."""
    written = []
    for passes in ((ReconstructSSA, PreLowerStripPhis), (Versions, Joined)):
        state = StateDict()
        state.func_ir, state.locals = run_frontend(template), {}
        for each in passes:
            each().run_pass(state)
        file = io.StringIO()
        state.func_ir.dump(file)
        written.append(file.getvalue())
    assert written[0] == written[1]


@pytest.mark.parametrize("flag", [0, 1, 2])
@pytest.mark.parametrize("n", [0, 4, 12])
def test_branches_and_loops(n, flag):
    assert njit(pipeline_class=Brief)(loops)(n, flag) == loops(n, flag)


def test_arrays_are_given_back():
    """A function with arrays of its own says where they end, as those without any do not."""

    @njit(pipeline_class=Brief)
    def made(n):
        total = 0.0
        for k in range(n):
            a = np.full(k + 1, 0.5)
            if k % 2:
                a = a[1:] + 1
            total += a.sum()
        return total

    rtsys.initialize(cpu_target.target_context)
    _nrt_python.memsys_enable_stats()
    before = rtsys.get_allocation_stats()
    assert made(5) == made.py_func(5)
    after = rtsys.get_allocation_stats()
    _nrt_python.memsys_disable_stats()
    assert after.alloc - before.alloc == after.free - before.free > 0


def test_operators_of_each_kind():
    """Of integers and floats, in place and not, and powers by literals and by variables."""

    @njit(pipeline_class=Brief, error_model="numpy")
    def mixed(i, x):
        k = i
        k //= 2
        q = i
        q /= 4
        flag = (i > 2) & (x < 3) | (k == 1)
        return i + x, i * i, i / k, k - x, q, x**2, i**2, x**i, 2.0**x, i % 4 << 2, i >> 1, flag, -x, ~i

    assert mixed(7, 2.5) == mixed.py_func(7, 2.5)
