"""Arrays of a library that knows no more than DLPack, on a device whose PTX is executed: by way of CuPy."""

import sys
import types

import numpy as np
import pytest
from ptx.device import CuPyArray, Plain, host, put

import numbaloss as nl
from numbaloss.kernels import devices

pytestmark = pytest.mark.usefixtures("gpu")


class Lent:
    """An array on a CUDA device."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array

    def __dlpack_device__(self):
        return (2, 0)

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=Lent)


def test_results_are_of_its_library(rng, monkeypatch):
    cupy = sys.modules.get("cupy") or types.ModuleType("cupy")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cupy, "from_dlpack", lambda lent: lent.__dlpack__(), raising=False)
    x, t = rng.normal(size=(2, 6, 4)).astype(np.float32)
    lent = Lent(put(CuPyArray, x))
    value, gradient = nl.huber_loss.value_and_grad(lent, Lent(put(CuPyArray, t)))
    assert type(value) is type(gradient) is Lent
    wanted = nl.huber_loss.value_and_grad(x, t)
    np.testing.assert_allclose(host(value.array), wanted[0], rtol=1e-6)
    np.testing.assert_allclose(host(gradient.array), wanted[1], rtol=1e-6, atol=1e-9)
    _, written = nl.huber_loss.value_and_grad(lent, put(CuPyArray, t), out=lent)
    assert written is lent
    np.testing.assert_allclose(host(lent.array), wanted[1], rtol=1e-6, atol=1e-9)


def test_of_both_interfaces_with_and_without_cupy(rng, monkeypatch):
    """As JAX's arrays on a GPU: DLPack's way where CuPy is there, for results of their library."""
    x = rng.normal(size=(6, 4)).astype(np.float32)

    class Both(Lent):
        __cuda_array_interface__ = property(lambda self: put(Plain, x).__cuda_array_interface__)

    for there in (True, False):
        monkeypatch.setattr(devices, "_has_cupy", lambda there=there: there)
        assert devices.is_device_array(Both(x)) is not there
