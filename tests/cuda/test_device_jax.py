"""Buffers of JAX's programs on a device whose PTX is executed: they are used on the program's stream."""

from types import SimpleNamespace

import numpy as np
import pytest
from ptx.device import Plain, host, put

pytest.importorskip("jax")  # which README's test command does not install; ml_dtypes comes along with it

import ml_dtypes

import numbaloss as nl
import numbaloss.jax as module
from numbaloss.kernels.spec import GRAD, VALUE, VALUE_AND_GRAD

STREAM = SimpleNamespace(stream=9)


class Buffer:
    """A buffer as a callback is given it."""

    def __init__(self, values):
        self.array = put(Plain, values)
        self.shape, self.dtype = values.shape, values.dtype

    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__

    def __array__(self, *_, **__):
        raise ValueError("is on a device")


def computed(task, outs, *arrays):
    buffers = [Buffer(o) for o in outs]
    task(STREAM, buffers, *map(Buffer, arrays))
    return [host(b.array) for b in buffers]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradient(gpu, rng, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x, y = rng.normal(size=(2, 6, 8)).astype(dtype)
    names = "input", "target"
    wanted = nl.huber_loss.value_and_grad(x, y, delta=0.5)
    task = module.Task(nl.huber_loss, VALUE_AND_GRAD, names, ("input",), (("delta", 0.5),))
    value, gradient = computed(task, (np.zeros((), dtype), np.zeros_like(x)), x, y)
    eps = 2.0**-7 if dtype.itemsize == 2 else 1e-6
    np.testing.assert_allclose(value.astype("f8"), float(wanted[0]), rtol=eps)
    np.testing.assert_allclose(gradient.astype("f8"), wanted[1].astype("f8"), rtol=eps, atol=1e-9)
    assert set(gpu.used) == {9} and not gpu.waits
    task = module.Task(nl.huber_loss, VALUE, names, (), (("reduction", "none"),))
    (terms,) = computed(task, (np.zeros_like(x),), x, y)
    wanted = nl.huber_loss(x, y, reduction="none").astype("f8")
    np.testing.assert_allclose(terms.astype("f8"), wanted, rtol=eps, atol=1e-9)


def test_rows_with_labels_and_weights(gpu, rng):
    x, y = rng.normal(size=(6, 8)).astype("f4"), rng.integers(0, 8, 6).astype("i4")
    w, up = np.linspace(1, 2, 8, dtype="f4"), np.linspace(-1, 1, 6, dtype="f4")
    wanted = nl.cross_entropy.grad(x, y, weight=w, reduction="none", grad_output=up)
    names = "input", "target", "weight", "grad_output"
    task = module.Task(nl.cross_entropy, GRAD, names, ("input",), (("reduction", "none"),))
    (gradient,) = computed(task, (np.zeros_like(x),), x, y, w, up)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_what_lies_elsewhere_is_refused():
    class Elsewhere:
        def __array__(self, *_, **__):
            raise ValueError("is on a TPU")

    task = module.Task(nl.l1_loss, VALUE, ("input", "target"), (), ())
    with pytest.raises(NotImplementedError, match="computes on CPUs and CUDA devices"):
        task(STREAM, [Elsewhere()], Elsewhere(), Elsewhere())
