"""What stands for the curvature on a device whose PTX is executed: as on the CPU."""

import numpy as np
import pytest
from ptx.device import CuPyArray, host, put

import numbaloss as nl

pytestmark = pytest.mark.usefixtures("gpu")

ELEMENTS = [
    (nl.huber_loss, "majorizer", 0.3),
    (nl.huber_loss, "exact", 0.3),
    (nl.binary_cross_entropy_with_logits, "majorizer", None),
    (nl.poisson_nll_loss, "fisher", None),
    (nl.poisson_nll_loss, "gradient", None),
]
# By teams of threads, and in columns; a label, and probabilities.
SCORES = [
    ((9, 12), False, "majorizer", 0.6),
    ((9, 12), True, "gershgorin", None),
    ((3, 5, 8), False, "gradient", None),
    ((3, 5, 8), True, "exact", 0.1),
]


def compare(loss, arrays, **options):
    common = dict(reduction="none", **options)
    wanted = loss.value_grad_hess(**arrays, **common)
    up = common.pop("grad_output")
    given = {n: put(CuPyArray, a) for n, a in arrays.items()}
    found = loss.value_grad_hess(**given, grad_output=put(CuPyArray, up), **common)
    nl.synchronize()
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(host(got), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("loss", "curvature", "floor"), ELEMENTS)
@pytest.mark.thin(5)
def test_elements(loss, curvature, floor, rng):
    x, t = rng.normal(size=(2, 37)).astype(np.float32)
    t = abs(t) % 1
    x[3] = t[3]
    w = rng.choice([0, 0.5, 2], 37).astype(np.float32)
    up = rng.choice([-2, 1], 37).astype(np.float32)
    arrays = {"input": x, "target": t, "sample_weight": w}
    compare(loss, arrays, grad_output=up, curvature=curvature, floor=floor)


@pytest.mark.parametrize(("shape", "probabilities", "curvature", "floor"), SCORES)
@pytest.mark.thin(4)
def test_class_scores(shape, probabilities, curvature, floor, rng):
    x, rows = rng.normal(0, 2, shape).astype(np.float32), shape[:1] + shape[2:]
    target = rng.uniform(size=shape).astype(np.float32) if probabilities else rng.integers(0, shape[1], rows)
    w, up = rng.choice([0, 0.5, 2], rows), rng.choice([-2, 1], rows)
    arrays = {"input": x, "target": target, "sample_weight": w.astype(np.float32)}
    compare(nl.cross_entropy, arrays, grad_output=up.astype(np.float32), curvature=curvature, floor=floor)
