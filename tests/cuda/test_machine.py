"""The machine refuses what kernels must not do, does right what they may, and notices mutants of kernels."""

import math

import numpy as np
import pytest
from numba.core.errors import TypingError
from ptx import arithmetic, mutants
from ptx.device import MACHINE, Plain, host, put
from ptx.machine import Fault
from ptx.text import Unknown
from sweeps import sweep

from numbaloss.kernels.cuda import reduce
from numbaloss.kernels.cuda.target import (
    FAULT_MOST,
    atomic_max,
    compile,
    cuda,
    device,
    each,
    record,
    recorded,
    shared,
    storage,
    types,
)
from numbaloss.kernels.spec import FLOAT32, FLOAT64

pytestmark = pytest.mark.usefixtures("gpu")
F = np.float32
array, wide = storage(FLOAT32), storage(FLOAT64)


@device
def thread():
    return cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x


def floats(n=64):
    return np.arange(n, dtype=F)


def run(kernel, blocks, threads, *arrays, units=1):
    """Launch a kernel of some arrays, which it may overwrite; they are returned."""
    types_of = {a.dtype: types.CPointer(getattr(types, a.dtype.name)) for a in arrays}
    binary = compile(kernel, tuple(types_of[a.dtype] for a in arrays), (9, 0), threads)
    given = [put(Plain, a) for a in arrays]
    MACHINE.units = units
    addresses = [int(x.address).to_bytes(8, "little") for x in given]
    MACHINE.launch(MACHINE.program(binary.ptx), blocks, threads, addresses)
    return [host(x) for x in given]


# ---- what is refused ----------------------------------------------------------------------------------


def reads_beyond(x, y):
    y[thread()] = x[thread() + 1]


def reads_before(x, y):
    y[thread()] = x[thread() - 1]


def reads_vector_beyond(x, y):
    y[thread()] = array.load_vectors(x, (4 * (thread() & 15) + 4,))[3]


def reads_between_vectors(x, y):
    y[thread()] = array.load_vectors(x, (4 * (thread() & 7) + 2,))[0]


def writes_between_vectors(x, y):
    array.store_vectors(y, (4 * (thread() & 7) + 1,), (True,), array.load_vectors(x, (0,)))


def reads_unwritten(x, y):
    s = shared(64, F(0))
    y[thread()] = s[thread()]


def reads_lane_too_early(x, y):
    s = shared(64, F(0))
    s[thread()] = x[thread()]
    y[thread()] = s[thread() ^ 1]


def reads_neighbour_too_early(x, y):
    s = shared(64, F(0))
    s[thread()] = x[thread()]
    cuda.syncwarp()
    y[thread()] = s[thread() ^ 32]


def overwrites_neighbour_too_early(x, y):
    s = shared(64, F(0))
    s[thread()] = x[thread()]
    cuda.syncthreads()
    y[thread()] = s[63 - thread()]
    s[thread()] = F(0)
    cuda.syncthreads()
    y[thread()] += s[thread() ^ 1]


def writes_one_place(x, y):
    y[0] = x[thread()]


def overwrites_what_another_reads(x, y):
    y[thread()] = y[thread() ^ 1]


def half_reach_a_barrier(x, y):
    y[thread()] = x[thread()]
    if thread() < 32:
        cuda.syncthreads()
        y[thread()] = x[63 - thread()]


def reach_different_barriers(x, y):
    if thread() < 32:
        cuda.syncthreads()
        y[thread()] = x[63 - thread()]
    else:
        y[thread()] = x[thread()] + F(2)
        cuda.syncthreads()
        y[thread()] += x[thread() - 32]


def half_a_warp_shuffles(x, y):
    if thread() & 31 < 16:
        y[thread()] = cuda.shfl_xor_sync(0xFFFFFFFF, x[thread()], 1)
    cuda.syncthreads()


def shuffles_from_no_lane(x, y):
    if thread() & 31 < 16:
        y[thread()] = cuda.shfl_xor_sync(0xFFFF, x[thread()], 16)


def never_ends(x, y):
    k = 0
    while x[thread()] >= F(0):
        y[thread()] = F(k)
        k += 1


WRONG = {
    reads_beyond: "read of 4 bytes out of bounds",
    reads_before: "out of bounds",
    reads_vector_beyond: "read of 16 bytes out of bounds",
    reads_between_vectors: "16 bytes not aligned",
    writes_between_vectors: "16 bytes not aligned",
    reads_unwritten: "that nothing wrote",
    reads_lane_too_early: "race: read after write|that nothing wrote",
    reads_neighbour_too_early: "race: read after write|that nothing wrote",
    overwrites_neighbour_too_early: "race",
    writes_one_place: "race: two writes at once",
    overwrites_what_another_reads: "race: write after read",
    half_reach_a_barrier: "not reached by all",
    reach_different_barriers: "different barriers|not reached by all",
    half_a_warp_shuffles: "not all lanes of a mask",
    shuffles_from_no_lane: "takes no part",
    never_ends: "does not end",
}


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("kernel", WRONG, ids=lambda k: k.__name__)
def test_refuses(kernel, units, monkeypatch):
    monkeypatch.setattr(MACHINE, "limit", MACHINE.steps + 1000)
    with pytest.raises(Fault, match=WRONG[kernel]):
        run(kernel, 1, 64, floats(), floats(), units=units)


def test_blocks_race_whatever_the_barriers():
    def kernel(y):
        cuda.syncthreads()
        y[0] = F(cuda.blockIdx.x)

    with pytest.raises(Fault, match="race"):
        run(kernel, 2, 32, floats(1))


def test_atomics_stay_in_bounds():
    def kernel(faults):
        atomic_max(faults, 1, 5)

    with pytest.raises(Fault, match="out of bounds"):
        run(kernel, 1, 32, np.zeros(1, np.int64))


def test_pointers_are_typed():
    def reads_as_float64(x, y):
        y[0] = F(wide.load(x, thread()))

    with pytest.raises(TypingError):
        run(reads_as_float64, 1, 32, floats(), floats())


def test_unknown_instructions_are_named():
    text = ".visible .entry k()\n{\n\tret;\n}\n"
    MACHINE.launch(MACHINE.program(text), 1, 32, [])
    with pytest.raises(Unknown, match="tanh.approx.f32"):
        text = text.replace("\tret", "\t.reg .f32 %f<2>;\n\ttanh.approx.f32 %f1, 0f3F800000;\n\tret")
        MACHINE.launch(MACHINE.program(text), 1, 32, [])


# ---- what is right ------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("threads", [32, 64, 256])
def test_block_sum_gives_every_thread_the_sum(threads, units):
    def twice(x, y):
        i = thread()
        hi, lo = reduce.block_sum(x[i], F(0))
        hi, lo = reduce.block_sum(hi * x[i], lo)
        y[i] = hi

    x = np.random.default_rng(0).uniform(size=threads).astype(F)
    _, y = run(twice, 1, threads, x, floats(threads), units=units)
    np.testing.assert_allclose(y, np.full(threads, x.sum(dtype=float) ** 2), rtol=2e-7)
    assert len(set(y.tolist())) == 1


@pytest.mark.parametrize("blocks", [1023, 1025, 3000])
def test_a_sum_of_more_blocks_than_finish_has_threads(blocks):
    rng = np.random.default_rng(0)
    sums = np.stack([rng.normal(size=blocks), 1e-8 * rng.normal(size=blocks)], 1).astype(F)
    binary = reduce.compile_finish(FLOAT32, (9, 0), True)
    partials, divisor, result = put(Plain, sums.ravel()), put(Plain, F([7])), put(Plain, F([np.nan]))
    pointers = [int(x.address).to_bytes(8, "little") for x in (partials, divisor, result)]
    numbers = blocks.to_bytes(8, "little"), np.float64(3).tobytes()
    MACHINE.launch(
        MACHINE.program(binary.ptx), 1, reduce.FINISH_THREADS, [pointers[0], *numbers, *pointers[1:]]
    )
    np.testing.assert_allclose(host(result), sums.astype(np.float64).sum() * 3 / 7, rtol=1e-7)


def test_votes_shuffles_and_barriers_that_count():
    def kernel(y):
        i = thread()
        y[i] = cuda.shfl_sync(0xFFFFFFFF, i, 3) + cuda.shfl_up_sync(0xFFFFFFFF, i, 1)
        y[64 + i] = cuda.shfl_down_sync(0xFFFFFFFF, i, 1)
        y[128 + i] = cuda.ballot_sync(0xFFFFFFFF, i & 1)
        y[192 + i] = cuda.syncthreads_count(np.int32(i < 5)) + cuda.syncthreads_or(np.int32(i == 7))

    (y,) = run(kernel, 1, 64, np.zeros(256, np.int64), units=2)
    i = np.arange(64)
    np.testing.assert_array_equal(y[:64], i // 32 * 32 + 3 + np.where(i % 32, i - 1, i))
    np.testing.assert_array_equal(y[64:128], np.where(i % 32 < 31, i + 1, i))
    assert set((y[128:192] & 0xFFFFFFFF).tolist()) == {0xAAAAAAAA}
    assert set(y[192:].tolist()) == {6}


def test_max_and_min_pass_over_nan():
    def kernel(x, y):
        if thread() == 0:
            y[0], y[1] = max(x[0], x[1]), min(x[1], x[0])
            y[2] = F(max(2, 3))

    x = np.array([np.nan, 1], F)
    np.testing.assert_array_equal(run(kernel, 1, 32, x, floats(3))[1], [1, 1, 3])


@pytest.mark.parametrize("units", [1, 4])
def test_the_first_fault_is_kept(units):
    def kernel(bad, faults):
        if bad[thread()]:
            record(faults, thread(), bad[thread()])

    bad, none = np.zeros(128, np.int64), np.zeros(1, np.int64)
    for places, wanted in (({}, None), ({100: 5, 7: -100, 31: 9}, (7, -100)), ({3: 2**40}, (3, FAULT_MOST))):
        for k, v in places.items():
            bad[k] = v
        assert recorded(int(run(kernel, 2, 64, bad, none, units=units)[1][0])) == wanted


def test_constants_of_a_module_are_read_and_not_written():
    """libdevice's sine of float64 reads its coefficients from a table."""

    def kernel(x):
        x[thread()] = math.sin(x[thread()])

    x = np.random.default_rng(0).normal(size=64) * 10.0 ** np.arange(-8, 5, 13 / 64)
    np.testing.assert_allclose(run(kernel, 2, 32, x)[0], np.sin(x), rtol=1e-14)
    (at, *_) = MACHINE.tables.values()
    with pytest.raises(Fault, match="write"):
        MACHINE.memory.store(np.array([at - MACHINE.base]), np.dtype("f8"), [1.0], np.zeros(1, np.int64))


@device
def scaled(x, y, by):
    return x * by, y, x > F(1)


def test_each_calls_a_function_for_every_lane():
    def kernel(out):
        a, _, c = each(scaled, ((F(1), F(2)), None), (F(3),))
        if thread() == 0:
            out[0], out[1] = a
            out[2] = F(c[1])

    np.testing.assert_array_equal(run(kernel, 1, 32, floats(3))[0], [3, 6, 1])


def test_arithmetic():
    a = np.array([-7, 7, 2**62, -(2**63)])
    b = np.array([2, -2, 3, 1])
    np.testing.assert_array_equal(arithmetic.quotient(a, b), [-3, -3, 2**62 // 3, -(2**63)])
    np.testing.assert_array_equal(arithmetic.remainder(a, b), [-1, 1, 2**62 % 3, 0])
    one, tiny = np.full(2, F(1)), np.array([2.0**-40, -(2.0**-40)], F)
    above, below = np.nextafter(F(1), F(2)), np.nextafter(F(1), F(0))
    for how, wanted in ((-1, (1, below)), (1, (above, 1)), (0, (1, below))):
        np.testing.assert_array_equal(arithmetic.fma32_directed(one, one, tiny, how), np.array(wanted, F))
    word, other = np.array([0x12345678], "u4"), np.array([0x9ABCDEF0], "u4")
    at, length = np.array([4], "u4"), np.array([8], "u4")
    assert arithmetic.bfi(word, other, at, length) == 0x9ABCD780
    halves = np.array([1 + 2.0**-9, 1 + 3 * 2.0**-9, np.inf], F)
    assert arithmetic.to_bf16(halves).tolist() == [0x3F80, 0x3F81, 0x7F80]


# ---- mutants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", sweep(mutants.GROUPS, "cross_entropy"))
@pytest.mark.more
def test_mutants_are_noticed(group):
    """All that move an address, take lanes from a shuffle or bytes from shared memory; most others.

    Barriers that others make needless change nothing, nor do bounds that are checked twice.
    """
    total = missed = 0
    for kernel, (count, silent) in mutants.unnoticed(mutants.of(group), mutants.by_rule).items():
        assert not [s for s in silent if not s.startswith(("without", "bound"))], kernel
        total, missed = total + count, missed + len(silent)
    assert total > 20 and missed < total / 3


def test_other_packings_are_noticed():
    assert not mutants.unnoticed_packings(mutants.of("huber_loss")[0])
