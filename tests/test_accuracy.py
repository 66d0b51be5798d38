"""Every loss against its definition in mpmath's arithmetic, at a few points that are hard."""

import numpy as np
import pytest
from mpmath import mp
from sweeps import sweep

import numbaloss as nl
from numbaloss.bench import accuracy

SOME = "mse_loss", "cross_entropy"


@pytest.mark.parametrize("dtype", sweep(["float32", "float64"], "float32"))
@pytest.mark.parametrize("loss", sweep(nl.registry, *SOME))
@pytest.mark.more
def test_a_loss_is_close_to_its_mathematics(loss, dtype):
    found = list(accuracy.findings(loss, np.dtype(dtype), few=True))
    for kind in ([f for f in found if f.name is None], [f for f in found if f.name is not None]):
        faults = accuracy.Summary.of(kind).faults
        assert not faults, "\n".join(map(str, faults))


def test_every_loss_has_points():
    assert set(accuracy.SETTINGS) == set(nl.registry)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ulps_are_those_of_numpy(dtype):
    kind = np.dtype(dtype).type
    info, format = np.finfo(dtype), accuracy.Format(np.dtype(dtype))
    for x in (0, 1, 1.5, -3.75, info.tiny, info.tiny / 2, info.max / 4, 1e-30):
        assert format.ulp(mp.mpf(float(kind(x)))) == float(np.spacing(abs(kind(x))))
    assert format.error(np.inf, 2 * mp.mpf(float(info.max))) == 0
    assert format.error(np.nan, mp.one) == mp.inf


def term(loss, **arrays):
    """One term in float64."""
    exactly = {n: accuracy.exactly(np.float64(a)) for n, a in arrays.items()}
    return accuracy.Term(loss, exactly, {}, accuracy.Format(np.dtype("float64")))


def finding(term, got, name=None):
    """A result that is said to be `got`, beside the exact one."""
    return accuracy.Finding(term, name, 0, got, term.result(name, 0), "")


def test_errors_are_seen():
    square = term("mse_loss", input=0.1, target=0.75)
    right = (0.1 - 0.75) ** 2
    assert finding(square, right).ulps <= 1.5
    wrong = finding(square, right * (1 + 100 * np.finfo(float).eps))
    assert wrong.ulps > 50 and wrong.condition() > accuracy.FAULT
    lost = finding(square, np.inf)
    summary = accuracy.Summary.of([lost, wrong])
    assert summary.lost == 1 and summary.faults == [lost, wrong]
    assert not finding(term("mse_loss", input=1e200, target=0), np.inf).lost


def test_slopes_are_derivatives_but_at_kinks():
    sigmoid = 1 / (1 + mp.exp(-mp.mpf(0.3)))
    assert abs(term("soft_margin_loss", input=0.3, target=-1).slope("input", 0) - sigmoid) < 1e-15
    assert mp.isnan(term("l1_loss", input=0.3, target=0.3).slope("input", 0))


def test_what_is_badly_conditioned_is_no_fault():
    # exp(x) - 1, where half an ulp more of the target is more than all of it.
    small = finding(term("poisson_nll_loss", input=1e-17, target=1), 0.0, "input")
    assert small.ulps > 1e15 and small.condition() < 1
