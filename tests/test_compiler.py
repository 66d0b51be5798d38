"""The passes that kernels are compiled with, beside Numba's own."""

import io

import numpy as np
import pytest
from numba import njit
from numba.core.compiler import StateDict, run_frontend
from numba.core.errors import TypingError
from numba.core.registry import cpu_target
from numba.core.runtime import _nrt_python, rtsys
from numba.core.typed_passes import PreLowerStripPhis
from numba.core.untyped_passes import ReconstructSSA

from numbaloss.kernels.compiler import Brief, Joined, Linked, Versions
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


RANGES = [(5,), (0,), (-3,), (2, 7), (7, 2), (0, 10, 3), (1, 10, 3), (0, 9, 3), (9, 0, 3), (-5, 5, 4)]


@pytest.mark.parametrize("given", [*RANGES, (9, 0, -2), (0, 9, -2), (3, 3, -1)], ids=str)
def test_ranges(given):
    """With and without a step, that is known or not; changed inside, and looked at after the loop."""
    step = given[2] if given[2:] else 1

    @njit(pipeline_class=Brief)
    def known(given):
        found, last = 0, -99
        for i in range(given[0], given[1], step):
            last = i
            found = 10 * found + i
            i = 50
        return found, last

    @njit(pipeline_class=Brief)
    def unknown(given):
        found = 0
        for i in range(*given):
            for j in range(i):
                found += 7 * i + j
        return found

    @njit(pipeline_class=Brief)
    def one(n):
        again, total = range(n), 0
        for i in again:
            for j in again:
                total += 10 * i + j
        return total + len(again)

    whole = given if given[1:] else (0, *given)
    assert known(whole) == known.py_func(whole)
    assert unknown(given) == unknown.py_func(given)
    assert one(given[0]) == one.py_func(given[0])


def test_ranges_of_other_integers():
    """Of small and unsigned ones; their numbers are as wide as Numba has them."""

    @njit(pipeline_class=Brief)
    def count(n):
        total = n
        for i in range(n):
            total += i
        return total

    for kind in (np.int8, np.int32, np.uint32, np.uint64):
        ours, theirs = count(kind(9)), njit(count.py_func)(kind(9))
        assert ours == theirs
        assert type(ours) is type(theirs)


def test_types_that_grow_in_loops():
    """A variable whose type is known to be wider only after it has been read."""

    @njit(pipeline_class=Brief)
    def grows(n):
        a, b, c = 1, 2, 3
        for _ in range(n):
            c = b
            b = a
            a = a + 0.5
        return a, b, c

    assert grows(4) == grows.py_func(4)
    assert [type(x) for x in grows(1)] == [float] * 3


def test_types_that_do_not_fit_are_told():
    @njit(pipeline_class=Brief)
    def wrong(n):
        a = n
        for _ in range(n):
            a = (a, n)
        return a

    with pytest.raises(TypingError, match=r"Cannot unify .* for 'a"):
        wrong(3)


def test_parts_are_linked_once():
    """Helpers that call helpers, shared by two that are compiled, and by one of Numba's own."""

    @njit(pipeline_class=Linked)
    def low(x):
        return 2.0 * x

    @njit(pipeline_class=Linked)
    def left(x):
        return low(x) + 1

    @njit(pipeline_class=Linked)
    def right(x):
        return low(x) - left(x)

    def both(x):
        return left(x) * right(x)

    for options in ({"pipeline_class": Brief}, {}):
        assert njit(**options)(both)(3.5) == 8.0 * -1.0
