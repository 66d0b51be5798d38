"""The block interpreter finds what it promises to find, and runs right kernels right in every order."""

import interpreter
import numpy as np
import pytest
from interpreter import ORDERS, At, Fault, Jet, View, launch

from numbaloss.kernels.cuda import reduce
from numbaloss.kernels.cuda.target import (
    FAULT_MOST,
    atomic_max,
    cuda,
    device,
    each,
    record,
    recorded,
    shared,
    storage,
)
from numbaloss.kernels.spec import FLOAT32, FLOAT64

F = np.float32
array = storage(FLOAT32)
wide = storage(FLOAT64)


@device
def thread():
    return cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x


def floats(n):
    return np.arange(n, dtype=F)


# What must be refused.


def reads_beyond(x, y):
    y[thread()] = x[thread() + 1]


def reads_before(x, y):
    y[thread()] = x[thread() - 1]


def reads_vector_beyond(x, y):
    array.load_vectors(x, (4 * thread(), 4 * thread() + 4))


def reads_between_vectors(x, y):
    array.load_vectors(x, (4 * thread() + 2,))


def writes_between_vectors(x, y):
    array.store_vectors(y, (4 * thread() + 1,), (True,), array.load_vectors(x, (0,)))


def reads_as_float64(x, y):
    wide.load(x, thread())


def stores_float64(x, y):
    array.store(y, thread(), np.float64(array.load(x, thread())))


def shuffles_literal(x, y):
    cuda.shfl_xor_sync(0xFFFFFFFF, 0.5, 1)


def reads_unwritten(x, y):
    s = shared(64, F(0))
    y[thread()] = s[thread()]


def reads_neighbour_too_early(x, y):
    s = shared(64, F(0))
    s[thread()] = x[thread()]
    y[thread()] = s[thread() ^ 32]


def reads_lane_too_early(x, y):
    s = shared(64, F(0))
    s[thread()] = x[thread()]
    y[thread()] = s[thread() ^ 1]


def overwrites_neighbour_too_early(x, y):
    s = shared(64, F(0))
    s[thread()] = x[thread()]
    cuda.syncthreads()
    y[thread()] = s[63 - thread()]
    s[thread()] = F(0)


def writes_one_place(x, y):
    y[0] = x[thread()]


def overwrites_what_another_reads(x, y):
    y[thread()] = y[thread() ^ 1]


def half_reach_a_barrier(x, y):
    if thread() < 32:
        cuda.syncthreads()


def reach_different_barriers(x, y):
    if thread() < 32:
        cuda.syncthreads()
    else:
        cuda.syncthreads()


def half_a_warp_shuffles(x, y):
    if thread() & 31 < 16:
        cuda.shfl_xor_sync(0xFFFFFFFF, x[thread()], 1)


def shuffles_from_no_lane(x, y):
    if thread() & 31 < 16:
        cuda.shfl_xor_sync(0xFFFF, x[thread()], 16)


WRONG = [
    (reads_beyond, "index 64 of 64"),
    (reads_before, "index -1 of 64"),
    (reads_vector_beyond, "out of bounds"),
    (reads_between_vectors, "is not aligned"),
    (writes_between_vectors, "is not aligned"),
    (reads_as_float64, "through a pointer to float32"),
    (stores_float64, "a float64 is stored where the kernel computes in float32"),
    (shuffles_literal, "a float literal"),
    (reads_unwritten, "before it is written"),
    (reads_lane_too_early, "race|before it is written"),
    (reads_neighbour_too_early, "race|before it is written"),
    (overwrites_neighbour_too_early, "race"),
    (writes_one_place, "race"),
    (overwrites_what_another_reads, "race"),
    (half_reach_a_barrier, "not reached by all"),
    (reach_different_barriers, "different barriers"),
    (half_a_warp_shuffles, "do not all reach"),
    (shuffles_from_no_lane, "which takes no part"),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel, message", WRONG, ids=[k.__name__ for k, _ in WRONG])
def test_refuses(kernel, message, order):
    with pytest.raises(Fault, match=message):
        launch(kernel, 1, 64, floats(64), floats(64), order=order)


def test_blocks_race_whatever_the_barriers():
    def kernel(y):
        cuda.syncthreads()
        y[0] = F(cuda.blockIdx.x)

    with pytest.raises(Fault, match="of block 0 and thread 0 of block 1 race"):
        launch(kernel, 2, 1, floats(1))


def test_what_another_thread_wrote_through_another_pointer_is_no_number():
    def kernel(x, y):  # in place: a neighbour's score may be a gradient already
        y[thread()] = x[thread() ^ 1]

    x = floats(64)
    launch(kernel, 1, 64, x, y := floats(64))
    assert not np.isnan(y).any()
    for order in ORDERS:
        launch(kernel, 1, 64, x, x, order=order)
        assert np.isnan(x).any()


def test_an_unaligned_array_is_read_by_elements_only():
    x = floats(65)[1:]

    def kernel(array, x, y):
        y[thread()] = array.load_vectors(x, (thread() * array.width,))[0]

    with pytest.raises(Fault, match="not aligned"):
        launch(lambda x, y: kernel(array, x, y), 1, 16, x, floats(16))
    y = np.zeros(16, F)
    unaligned = storage(FLOAT32, vectors=False)
    launch(lambda x, y: kernel(unaligned, x, y), 1, 16, x, y)
    np.testing.assert_array_equal(y, x[:16])


def twice(x, n, y):
    """Two sums over a block, one after the other."""
    i = thread()
    hi, lo = reduce.block_sum(x[i], F(0))
    hi, lo = reduce.block_sum(hi * x[i], lo)
    y[i] = hi


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [32, 64, 256])
def test_block_sum_gives_every_thread_the_sum(threads, order):
    x, y = np.random.default_rng(0).uniform(size=threads).astype(F), np.zeros(threads, F)
    launch(twice, 1, threads, x, threads, y, order=order)
    np.testing.assert_allclose(y, np.full(threads, x.sum(dtype=float) ** 2), rtol=2e-7)
    assert len(set(y.tolist())) == 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("removed", [1, 2, 3])
def test_finds_each_removed_barrier_of_block_sum(removed, order, monkeypatch):
    passed = {}

    def syncthreads(self):
        thread = self._grid.running
        passed[thread] = passed.get(thread, -1) + 1
        if passed[thread] != removed:
            self._grid.wait("block", None, 0)

    monkeypatch.setattr(View, "syncthreads", syncthreads)
    with pytest.raises(Fault, match="race|before it is written"):
        launch(twice, 1, 64, floats(64), 64, floats(64), order=order)


# What must be right.


def test_votes_shuffles_and_barriers_that_count():
    def kernel(y):
        i = thread()
        y[i] = cuda.shfl_sync(0xFFFFFFFF, i, 3) + cuda.shfl_up_sync(0xFFFFFFFF, i, 1)
        y[64 + i] = cuda.shfl_down_sync(0xFFFFFFFF, i, 1)
        y[128 + i] = cuda.ballot_sync(0xFFFFFFFF, i & 1)
        y[192 + i] = cuda.syncthreads_count(i < 5) + cuda.syncthreads_or(i == 7)

    y = np.zeros(256, np.int64)
    launch(kernel, 1, 64, y, order="random")
    i = np.arange(64)
    np.testing.assert_array_equal(y[:64], i // 32 * 32 + 3 + np.where(i % 32, i - 1, i))
    np.testing.assert_array_equal(y[64:128], np.where(i % 32 < 31, i + 1, i))
    assert set(y[128:192].tolist()) == {0xAAAAAAAA}
    assert set(y[192:].tolist()) == {6}


def test_a_pointer_may_be_into_an_array():
    def kernel(x, y):
        y[thread()] = x[-thread()]

    y = np.zeros(4, F)
    launch(kernel, 1, 4, At(floats(8), 5), y)
    np.testing.assert_array_equal(y, [5, 4, 3, 2])


def test_max_and_min_pass_over_nan():
    def kernel(x, y):
        y[0], y[1] = max(x[0], x[1]), min(x[1], x[0])
        y[2] = F(max(2, 3))

    y = np.zeros(3, F)
    launch(kernel, 1, 1, np.array([np.nan, 1], F), y)
    np.testing.assert_array_equal(y, [1, 1, 3])


@device
def scaled(x, y, by):
    return x * by, y, x > F(1)


def test_each_calls_a_function_for_every_lane():
    def kernel(out):
        a, b, c = each(scaled, ((F(1), F(2)), None), (F(3),))
        assert b is None and c == (False, True)
        out[0], out[1] = a

    out = np.zeros(2, F)
    launch(kernel, 1, 1, out)
    np.testing.assert_array_equal(out, [3, 6])


@pytest.mark.parametrize("order", ORDERS)
def test_the_first_fault_is_kept(order):
    def kernel(bad, faults):
        if bad[thread()]:
            record(faults, thread(), bad[thread()])

    bad, faults = np.zeros(128, np.int64), np.zeros(1, np.int64)
    launch(kernel, 2, 64, bad, faults, order=order)
    assert recorded(int(faults[0])) is None
    bad[[100, 7, 31]] = 5, -100, 9
    launch(kernel, 2, 64, bad, faults, order=order)
    assert recorded(int(faults[0])) == (7, -100)
    bad[3] = 2**40
    launch(kernel, 2, 64, bad, faults, order=order)
    assert recorded(int(faults[0])) == (3, FAULT_MOST)


def test_atomics_stay_in_bounds():
    def kernel(faults):
        atomic_max(faults, 1, 5)

    with pytest.raises(Fault, match="index 1 of 1"):
        launch(kernel, 1, 1, np.zeros(1, np.int64))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x * 3 - x / (1 + x * x),
        lambda x: 2 / x - abs(-x) ** 3,
        lambda x: interpreter.MATH.exp(-x) * interpreter.MATH.softplus(2 * x) + interpreter.MATH.sigmoid(x),
        lambda x: interpreter.MATH.maximum(x, 0.1) * interpreter.MATH.log(x) - interpreter.MATH.xlogy(x, x),
        lambda x: interpreter.MATH.where(x > 0.5, interpreter.MATH.sqrt(x), x**1.5),
    ],
)
def test_jets_are_derivatives(function):
    x, h = 0.7, 1e-4
    y = function(Jet(np.float64(x), np.float64(1), np.float64(0)))
    low, mid, high = (np.float64(function(np.float64(x + d))) for d in (-h, 0, h))
    np.testing.assert_allclose(
        [y.v, y.d, y.h], [mid, (high - low) / (2 * h), (high - 2 * mid + low) / h**2], rtol=1e-6
    )
    single = function(Jet(F(x), F(1), F(0)))
    assert {type(single.v), type(single.d), type(single.h)} == {F}
