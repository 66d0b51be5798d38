"""The library's PTX, executed without a GPU."""

import numpy as np
import pytest
from ptx import device
from ptx.device import CuPyArray, host, put

import numbaloss as nl
from numbaloss import reference


@pytest.fixture
def gpu(monkeypatch):
    return device.install(monkeypatch)


def test_huber(gpu):
    x, y = np.random.default_rng(0).normal(size=(2, 1301)).astype("f4")
    value, gradient = nl.huber_loss.value_and_grad(put(CuPyArray, x), put(CuPyArray, y))
    np.testing.assert_allclose(host(value), reference.huber_loss(x, y), rtol=1e-6)
    np.testing.assert_allclose(host(gradient), np.clip(x - y, -1, 1) / 1301, rtol=1e-6)
