"""Released memory of large gradients is used again, and never while an array still lies in it."""

import gc
import threading

import numpy as np
import pytest

import numbaloss as nl
from numbaloss.kernels.cpu import memory

F32 = np.dtype(np.float32)
SHAPE = (memory.FROM_BYTES // 4,)


def address(a):
    return a.__array_interface__["data"][0]


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    nl.free_memory()
    yield
    nl.free_memory()


def test_a_released_block_is_used_again():
    a = memory.empty(SHAPE, F32)
    where = address(a)
    del a
    b = memory.empty(SHAPE, F32)
    assert address(b) == where
    assert b.shape == SHAPE and b.dtype == F32 and b.flags.carray


@pytest.mark.more
def test_a_view_keeps_its_block():
    a = memory.empty(SHAPE, F32)
    where, view = address(a), a.reshape(2, -1)[1, ::7]
    del a
    assert address(memory.empty(SHAPE, F32)) != where
    del view
    assert address(memory.empty(SHAPE, F32)) == where


def test_what_is_kept_is_bounded_and_can_be_freed():
    arrays = [memory.empty(SHAPE, F32) for _ in range(5)]
    del arrays
    assert nl.free_memory() == memory.KEPT_BLOCKS * memory.FROM_BYTES
    assert nl.free_memory() == 0
    small = memory.empty((10,), F32)
    assert small.flags.owndata


def test_gradients_of_successive_calls_are_distinct():
    n = SHAPE[0]
    x, t = np.ones(n, np.float32), np.zeros(n, np.float32)
    first = nl.mse_loss.grad(x, t, reduction="sum")
    second = nl.mse_loss.grad(2 * x, t, reduction="sum")
    assert (first == 2).all() and (second == 4).all()


@pytest.mark.more
def test_threads_never_share_a_block():
    failures = []

    def work(k):
        for _ in range(30):
            a = memory.empty(SHAPE, F32)
            a[:] = k
            if not (a == k).all():
                failures.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
