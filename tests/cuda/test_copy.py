"""Copies between strides and dtypes, in the block interpreter against NumPy."""

import numpy as np
import pytest
from interpreter import ORDERS, At, launch

from numbaloss.kernels.cuda import copy, reduce


def flat(a):
    """All memory of the array that `a` is a view of, flat, and where in it `a` begins."""
    owner = a
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    memory = owner.ravel(order="K")
    assert np.shares_memory(memory, owner) or not owner.size
    start = a.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    return At(memory, start // a.itemsize)


def copied(a, b, order="forward", wide=False):
    """Copy `a` to `b` by the kernel."""
    strides = ([s // x.itemsize for s in x.strides] for x in (a, b))
    axes = copy.collapse(a.shape, *strides)
    kernel = copy.kernel(a.dtype, b.dtype, wide)
    launch(kernel, *copy.launch(a.size), flat(a), flat(b), a.size, *axes, order=order)
    return axes[0]


def values(*shape, dtype=np.float32):
    return np.random.default_rng(0).integers(0, 2 if dtype is bool else 100, shape).astype(dtype)


VIEWS = {
    "contiguous": (lambda a: a, 1),
    "transposed": (lambda a: a.transpose(2, 0, 1), 2),
    "reversed": (lambda a: a[:, ::-1], 3),
    "skipping": (lambda a: a[::2, 1:, ::3], 3),
    "broadcast": (lambda a: np.broadcast_to(a[:, :1], a.shape), 3),
    "one element": (lambda a: a[1:2, 2:3, 3:4], 1),
    "empty": (lambda a: a[:, 3:3], 2),
    "scalar": (lambda a: a[1, 1, 1, ...], 1),
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("view, axes", VIEWS.values(), ids=VIEWS)
def test_layouts(view, axes, wide):
    a = view(values(5, 7, 40))
    for order in ORDERS:
        b = np.full(a.shape, np.nan, np.float32)
        assert len(copied(a, b, order, wide)) == axes
        np.testing.assert_array_equal(b, a)


def test_back_into_a_strided_array():
    a, room = values(6, 10), np.full((10, 13), np.nan, np.float32)
    copied(a, room[:, ::-2][:, :6].T)
    np.testing.assert_array_equal(room[:, ::-2][:, :6].T, a)
    assert np.isnan(room[:, 1::2]).all()


@pytest.mark.parametrize("to", ["float64", "float32", "float16", "bfloat16", "int64"])
@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int8", "uint16", "int32", "uint64", "bool"]
)
def test_dtypes(dtype, to, bfloat16):
    def dtype_of(name):
        return bfloat16 if name == "bfloat16" else np.dtype(name)

    if to == "int64" and "float" in dtype:
        return
    a = values(70, dtype=bool if dtype == "bool" else np.float32).astype(dtype_of(dtype))
    b = np.zeros(70, dtype_of(to))
    copied(a, b)
    np.testing.assert_array_equal(b, a.astype(b.dtype))


def test_more_elements_than_threads(monkeypatch):
    monkeypatch.setattr(copy, "MOST_BLOCKS", 2)
    a = values(7001)
    b = np.zeros_like(a)
    copied(a, b)
    np.testing.assert_array_equal(b, a)


def test_launches_follow_from_the_shape_alone():
    assert copy.launch(0).blocks == copy.launch(1024).blocks == 1 and copy.launch(1025).blocks == 2
    assert reduce.launch(0, np.float32).blocks == 1
    assert reduce.launch(2**40, np.float32).blocks == reduce.MOST_BLOCKS
