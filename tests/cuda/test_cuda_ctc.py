"""The kernels of CTC, their own Python in the block interpreter, against the reference; and compiled."""

import itertools
import re

import numpy as np
import pytest
from interpreter import ORDERS, launch

from numbaloss import reference
from numbaloss.kernels.cuda import ctc, reduce
from numbaloss.kernels.cuda.ctc import Plan, Request
from numbaloss.kernels.cuda.reduce import Launch
from numbaloss.kernels.cuda.target import recorded, storage
from numbaloss.kernels.spec import CODES, FLOAT64

AMPERE, HOPPER = (8, 0), (9, 0)

# A thread has one state, or several; a sequence's lines are in shared memory, or in scratch if they are long.
PLANS = {
    "one": Plan(Launch(2, 64), 64, False, Launch(3, 64), 2),
    "several": Plan(Launch(2, 32), 64, False, Launch(3, 64), 5),
    "memory": Plan(Launch(2, 32), 16, True, Launch(2, 32), 0),
}


def aligned(a, offset=0):
    """A copy of an array, flat, that starts at a multiple of 16 bytes, or `offset` elements further."""
    a = np.asarray(a).reshape(-1)
    room = np.empty(a.size + offset + 16, a.dtype)
    start = -(room.ctypes.data // a.itemsize) % (16 // a.itemsize) + offset
    room[start : start + a.size] = a
    return room[start : start + a.size]


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def posterior(log_p, labels, blank):
    """The probability of each class at each frame, of all alignments; by sums over states in float64."""
    symbols = np.array([blank, *itertools.chain(*((k, blank) for k in labels))])
    skip = np.array([s > 2 and s % 2 == 1 and symbols[s] != symbols[s - 2] for s in range(len(symbols))])
    scores = log_p[:, symbols]

    def run(scores, skip):
        alpha = np.full(scores.shape, -np.inf)
        alpha[0, :2] = scores[0, :2]
        for t in range(1, len(scores)):
            one, two = np.full((2, len(symbols)), -np.inf)
            one[1:], two[2:] = alpha[t - 1, :-1], np.where(skip[2:], alpha[t - 1, :-2], -np.inf)
            alpha[t] = np.logaddexp.reduce([alpha[t - 1], one, two]) + scores[t]
        return alpha

    with np.errstate(all="ignore"):
        back_skip = np.concatenate([[False, False], skip[:1:-1]])
        both = run(scores, skip) + run(scores[::-1, ::-1], back_skip)[::-1, ::-1] - scores
        p = np.exp(both - np.logaddexp.reduce(both, axis=1, keepdims=True))
    made = np.zeros(log_p.shape)
    for s, symbol in enumerate(symbols):
        made[:, symbol] += p[:, s]
    return made


class Call:
    """Sequences, to be run by the kernels and by the reference."""

    def __init__(
        self, lengths, counts, classes=8, frames=None, dtype=np.float32, seed=0, joined=False, blank=0
    ):
        self.rng = rng = np.random.default_rng(seed)
        self.frames = frames or max(lengths, default=0) + 1
        self.batch, self.classes, self.blank, self.joined = len(lengths), classes, blank, joined
        self.dtype = np.dtype(dtype)
        self.code = CODES[self.dtype.name]
        self.T = storage(self.code).T
        x = 2 * rng.standard_normal((self.frames, self.batch, classes))
        self.x = log_softmax(x).astype(dtype)
        self.lengths, self.counts = np.array(lengths, np.int64), np.array(counts, np.int64)
        others = [c for c in range(classes) if c != blank]
        self.labels = [rng.choice(others, n) for n in counts]
        self.weights = self.upstream = None

    def weigh(self, weights=True, upstream=True):
        if weights:
            self.weights = np.arange(self.batch).astype(self.T) % 3
        if upstream:
            self.upstream = self.rng.uniform(-1, 1, self.batch).astype(self.T)
        return self

    def targets(self):
        """All labels, flat, and the columns of padded ones."""
        if self.joined:
            return np.concatenate([*self.labels, np.zeros(0, int)]).astype(np.int64), None
        columns = max(map(len, self.labels), default=0) + 1
        padded = np.full((self.batch, columns), -7)  # never read
        for row, labels in zip(padded, self.labels, strict=True):
            row[: len(labels)] = labels
        return padded.reshape(-1), columns

    def terms(self, mean=False, zero_infinity=False):
        """By the reference."""
        targets, columns = self.targets()
        return reference.ctc_loss(
            self.x.astype(np.float64), targets if self.joined else targets.reshape(self.batch, columns),
            self.lengths, self.counts, self.blank, "none", zero_infinity, sample_weight=self.weights,
        ) / (np.maximum(self.counts, 1) if mean else 1)  # fmt: skip

    def gradient(self, mean=False, zero_infinity=False):
        made = np.zeros(self.x.shape)
        x = self.x.astype(np.float64)
        weights, self.weights = self.weights, None
        terms, self.weights = self.terms(), weights
        for n in range(self.batch):
            f = 1.0 if self.upstream is None else float(self.upstream[n])
            f *= 1.0 if weights is None else float(weights[n])
            f /= max(self.counts[n], 1) if mean else 1
            frames = slice(0, self.lengths[n])
            if np.isinf(terms[n]):
                made[frames, n] = 0 if zero_infinity or (weights is not None and weights[n] == 0) else np.nan
            elif self.lengths[n] and f:
                p = posterior(x[frames, n], self.labels[n], self.blank)
                made[frames, n] = f * (np.exp(x[frames, n]) - p)
        return made

    def run(
        self, plan=None, grad=True, terms=True, summed=True, mean=False, zero_infinity=False, in_place=False,
        vectors=None, order="forward", seed=0, divisor=None, factor=1.0,
    ):  # fmt: skip
        """The outputs by name; `value` is that of `finish`."""
        shape = self.frames, self.batch, self.classes
        if vectors is None:
            vectors = self.classes % storage(self.code).width == 0
        targets, columns = self.targets()
        most = len(targets) if self.joined else columns
        plan = plan or ctc.plan(*shape, targets.size, most, self.code, vectors)
        request = Request(
            mean, zero_infinity, self.weights is not None, self.upstream is not None, terms, grad
        )
        begins = np.full(self.batch, -1)
        if self.joined:
            grid = ctc.starts_launch(self.batch)
            launch(ctc.starts, grid.blocks, 32, self.counts, self.batch, most, begins)
            if self.batch > 32:
                raise NotImplementedError
        else:
            begins[:] = np.arange(self.batch) * columns
        T, shift = self.T, 0 if vectors else 1
        room = ctc.scratch(*shape, targets.size, plan.spills, grad)
        lines, occupied, factors = (np.full(n, np.nan, T) if n else None for n in room[:3])
        if grad:
            occupied, factors = (np.full(n, np.nan, T) for n in room[1:3])
        chains = np.full(room.chains, -(2**31), np.int32) if grad else None
        x = aligned(self.x, shift)
        made = dict(
            terms=np.full(self.batch, np.nan, self.dtype) if terms else None,
            grad=None if not grad else x if in_place else aligned(np.full(x.size, np.nan, self.dtype), shift),
        )
        partials = np.full(2 * plan.align.blocks, np.nan, T) if summed else None
        faults = np.zeros(1, np.int64)
        align, put = ctc.kernels(request, self.code, plan.room, plan.spills, vectors)
        how = dict(order=order, seed=seed)
        launch(
            align, *plan.align, x, targets, begins, self.lengths, self.counts, self.weights, self.upstream,
            made["terms"], *shape, targets.size, most, self.blank, T(factor), divisor, partials, faults,
            lines, occupied, factors, chains, **how,
        )  # fmt: skip
        if grad:
            launch(
                put, *plan.put, x, begins, self.lengths, self.counts, made["grad"], *shape, targets.size,
                self.blank, plan.deal, occupied, factors, chains, **how,
            )  # fmt: skip
        results = {k: a.astype(np.float64) for k, a in made.items() if a is not None}
        if grad:
            results["grad"] = results["grad"].reshape(shape)
        if summed:
            value = np.full(1, np.nan, T)
            finish = reduce.finish_kernel(FLOAT64 if T is np.float64 else CODES["float32"])
            launch(finish, 1, 64, partials, plan.align.blocks, 1.0, None, value)
            results["value"] = float(value[0])
        results["fault"] = recorded(int(faults[0]))
        return results


def close(got, wanted, call, scale=1.0):
    """Within roundings of logarithms of `scale` at most, and one of the storage."""
    eps = {"bfloat16": 2**-8, "float16": 2**-11}.get(call.dtype.name, 0)
    tiny = 2.0**-24 if eps == 2**-11 else 1e-38
    size = np.where(np.isfinite(wanted), np.abs(wanted), 0)
    error = 8 * np.finfo(call.T).eps * (scale + size) + eps * size + tiny
    same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_less(np.where(same, 0, np.abs(got - wanted)), error)


def check(call, result, **how):
    terms, gradient = call.terms(**how), call.gradient(**how)
    finite = np.where(np.isfinite(terms), np.abs(terms), 0)
    if "terms" in result:
        close(result["terms"], terms, call, 20.0)
    if "value" in result:
        assert result["value"] == terms.sum() or abs(result["value"] - terms.sum()) <= 2e-6 * (
            20 + finite.sum()
        )
    if "grad" in result:
        close(result["grad"], gradient, call, 20.0)
    assert result["fault"] is None


# Lengths of sequences and of their labels: none, one, tight, repeated, more frames than needed.
LENGTHS = [9, 1, 5, 7, 0, 12, 3]
COUNTS = [3, 1, 0, 2, 0, 9, 1]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("blank", [0, 5])
@pytest.mark.parametrize("plan", PLANS)
def test_sequences(plan, blank, joined):
    call = Call(LENGTHS, COUNTS, blank=blank, joined=joined)
    check(call, call.run(PLANS[plan]))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_weights_means_and_infeasible_sequences(plan, zero_infinity, mean):
    """Too few frames for the labels, for what separates equal ones, and none for any."""
    call = Call([*LENGTHS, 2, 3, 0, 2, 0, 0], [*COUNTS, 3, 2, 2, 5, 0, 1], seed=2).weigh()
    call.labels[8][:] = 4
    call.weights[7:] = [1, 2, 1, 0, 1, 0]
    how = dict(mean=mean, zero_infinity=zero_infinity)
    result = call.run(PLANS[plan], **how)
    check(call, result, **how)
    assert (np.isinf(result["terms"]).sum() == 0) == zero_infinity


@pytest.mark.parametrize(
    "labels", [[1, 1], [1, 1, 1, 1, 1], [1, 2, 1, 2, 2, 1], [3, 3, 1, 1, 3, 3], [2, 1, 2, 1, 2]]
)
@pytest.mark.parametrize("plan", PLANS)
def test_repeated_labels(plan, labels):
    call = Call([14, 2 * len(labels)], [len(labels)] * 2, classes=4, seed=3)
    call.labels = [np.array(labels), np.array(labels[::-1])]
    check(call, call.run(PLANS[plan]))


def test_a_label_that_is_the_blank():
    call = Call([9, 9], [3, 4], seed=4)
    call.labels[1][2] = call.blank
    check(call, call.run(PLANS["one"]))


@pytest.mark.parametrize("mean", [False, True])
def test_the_gradient_is_the_references_derivative_through_log_softmax(mean):
    call = Call([5, 3, 4], [2, 1, 2], classes=4, dtype=np.float64, seed=5).weigh()
    call.weights[:] = [1, 2, 3]
    scores = np.random.default_rng(0).standard_normal(call.x.shape)

    def loss(scores):
        call.x = log_softmax(scores)
        return call.terms(mean)

    wanted = reference.gradient(loss, {"scores": scores}, "scores", call.upstream)
    call.x = log_softmax(scores)
    np.testing.assert_allclose(call.run(mean=mean)["grad"], wanted, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("plan", PLANS)
def test_storages_vectors_and_orders(plan, dtype, request):
    dtype = request.getfixturevalue("bfloat16") if dtype == "bfloat16" else np.dtype(dtype)
    for vectors in (True, False):
        results = []
        for order in ORDERS:
            call = Call([9, 11, 4], [3, 5, 1], classes=16 if vectors else 7, dtype=dtype, seed=6).weigh()
            results.append(call.run(PLANS[plan], vectors=vectors, order=order, seed=7))
            check(call, results[-1])
        for other in results[1:]:  # the same bits
            for name, array in results[0].items():
                np.testing.assert_array_equal(other[name], array)


@pytest.mark.parametrize("plan", PLANS)
def test_in_place(plan):
    def result(**how):
        return Call(LENGTHS, COUNTS, seed=8).weigh().run(PLANS[plan], order="reverse", **how)

    apart, over = result(), result(in_place=True)
    for name, array in apart.items():
        np.testing.assert_array_equal(over[name], array)


@pytest.mark.parametrize("grad, terms, summed", list(itertools.product((True, False), repeat=3)))
@pytest.mark.parametrize("plan", PLANS)
def test_outputs(plan, grad, terms, summed):
    call = Call([9, 6], [3, 2], seed=9)
    check(call, call.run(PLANS[plan], grad=grad, terms=terms, summed=summed))


@pytest.mark.parametrize("plan", PLANS)
def test_what_does_not_count_is_zero_whatever_it_holds(plan):
    call = Call(LENGTHS, COUNTS, seed=10).weigh()
    terms, gradient = call.terms(), call.gradient()
    for n, length in enumerate(call.lengths):
        call.x[length:, n] = np.nan
    call.x[:, call.weights == 0] = np.nan
    result = call.run(PLANS[plan])
    close(result["terms"], terms, call, 20.0)
    close(result["grad"], gradient, call, 20.0)
    assert np.isfinite(result["value"])


@pytest.mark.parametrize("plan", PLANS)
def test_nan_and_infinity_stay_in_their_sequence(plan):
    call = Call([9, 8, 7, 6], [3, 2, 2, 0], seed=11)
    good = call.run(PLANS[plan])
    call.x[3, 1, call.blank] = np.nan
    call.x[2, 2] = -np.inf
    call.x[1, 3, 4] = -np.inf  # not among its labels
    result = call.run(PLANS[plan])
    assert np.isnan(result["terms"][1]) and np.isnan(result["grad"][:8, 1]).all()
    assert result["terms"][2] == np.inf and np.isnan(result["grad"][:7, 2]).all()
    assert not result["grad"][8:, 1].any() and not result["grad"][7:, 2].any()
    assert result["grad"][1, 3, 4] == 0
    for name in ("terms", "grad"):
        got, wanted = (
            np.moveaxis(r[name], -2, 0)[[0]] if name == "grad" else r[name][[0, 3]] for r in (result, good)
        )
        np.testing.assert_array_equal(got, wanted)


BAD = [
    ("lengths", 2, -1), ("lengths", 2, 11), ("lengths", 2, 2**62), ("counts", 2, -1), ("counts", 2, 5),
    ("counts", 2, 2**62), ("labels", 2, -1), ("labels", 2, 8), ("labels", 2, 2**60),
]  # fmt: skip


@pytest.mark.parametrize("what, n, bad", BAD)
@pytest.mark.parametrize("plan", PLANS)
def test_what_is_out_of_range_is_nan_and_recorded(plan, what, n, bad):
    for weight in (1.0, 0.0):
        call = Call([9, 8, 7, 10], [3, 4, 2, 1], frames=10, seed=12).weigh(True, False)
        call.weights[:] = [1, 1, weight, 1]
        good = call.run(PLANS[plan])
        targets, columns = call.targets()
        call.targets = lambda made=(targets, columns): made  # as it was, whatever the lengths say
        if what == "labels":
            targets[n * columns + 1] = bad
        else:
            getattr(call, what)[n] = bad + (what == "counts" and bad == 5)
        for order in ORDERS[1:]:
            result = call.run(PLANS[plan], order=order)
            position, number = result["fault"]
            kind = {"lengths": 0, "counts": 1, "labels": 2}[what]
            assert divmod(position, 3) == (n, kind) and ctc.WRONG[kind]
            assert abs(bad) > 2**20 or number in (bad, bad + 1)
            assert np.isnan(result["value"]) and np.isnan(result["terms"][n])
            assert np.isnan(result["grad"][:7, n]).all()
            assert what != "lengths" or np.isnan(result["grad"][:, n]).all()
            rest = [0, 1, 3]
            np.testing.assert_array_equal(result["terms"][rest], good["terms"][rest])
            np.testing.assert_array_equal(result["grad"][:, rest], good["grad"][:, rest])


@pytest.mark.parametrize("bad", [-3, 100, 2**62])
def test_a_bad_length_among_joined_labels_harms_none_before(bad):
    call = Call([9, 8, 7, 10], [3, 4, 2, 1], seed=13, joined=True)
    good = call.run(PLANS["memory"])
    call.counts[1] = bad
    call.counts[2] = 2**62 if bad == 2**62 else 2
    result = call.run(PLANS["memory"])
    assert divmod(result["fault"][0], 3) == (1, 1) and np.isnan(result["terms"][1])
    assert result["terms"][0] == good["terms"][0]
    np.testing.assert_array_equal(result["grad"][:, 0], good["grad"][:, 0])


def test_long_sequences_keep_their_digits():
    """Logarithms grow to a thousand, whose float32 are 6e-5 apart."""
    call = Call([300], [40], classes=28, seed=14)
    result = call.run()
    close(result["terms"], call.terms(), call, 0.0)
    np.testing.assert_allclose(result["grad"], call.gradient(), atol=2e-5)


@pytest.mark.parametrize("divided", [False, True])
def test_factor_and_divisor(divided):
    call = Call([9, 6], [3, 2], seed=15)
    plain = call.run()
    divisor = np.array([8], np.float32) if divided else None
    result = call.run(factor=2.0, divisor=divisor)
    np.testing.assert_array_equal(result["grad"] * (8 if divided else 1), 2 * plain["grad"])


@pytest.mark.parametrize("lengths, counts", [([], []), ([0], [0]), ([40], [17]), ([3] * 20, [1] * 20)])
def test_the_plans_own_launch(lengths, counts):
    for joined in (False, True):
        call = Call(lengths, counts, classes=5, seed=16, joined=joined)
        check(call, call.run())


def test_plans():
    for code, vectors in itertools.product(CODES.values(), (True, False)):
        for shape, labels in itertools.product(
            ((0, 1, 1), (100, 32, 28), (1000, 64, 5000)), ((0, 0), (32 * 20, 20), (9000, 9000))
        ):
            plan = ctc.plan(*shape, *labels, code, vectors)
            assert plan.spills == (2 * labels[1] + 1 > plan.room)
            assert 2 * plan.room * storage(code).arithmetic.bitwidth // 8 <= 48 * 1024
            assert plan.align.threads % 32 == 0 and plan.align.threads <= 512 and plan.deal <= 5
            assert 1 <= plan.align.blocks <= reduce.MOST_BLOCKS and 1 <= plan.put.blocks <= reduce.MOST_BLOCKS


# ---- compiled -----------------------------------------------------------------------------------------

REQUESTS = {
    "value": Request(),
    "gradient": Request(mean=True, grad=True),
    "all": Request(True, True, True, True, True, True),
}


def instructions(binary):
    body = binary.ptx[binary.ptx.index("{") :]
    return re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][a-z0-9_.:]*)", body, re.M)


def inspect(binary, code, most):
    used = instructions(binary)
    assert binary.image[:4] == b"\x7fELF"
    assert binary.local_bytes == 0 and not any(re.match(r"(ld|st)\.local", i) for i in used)
    assert code == FLOAT64 or not [i for i in used if ".f64" in i]
    assert binary.registers <= (most if code != FLOAT64 else 128)
    return used


def compiled(what, dtype, cc, spills):
    code, room = CODES[dtype], 256
    binary = ctc.compile_align(REQUESTS[what], code, cc, room, spills, 512, divided=what == "all")
    inspect(binary, code, 112)
    lines = 2 * room * storage(code).arithmetic.bitwidth // 8
    assert lines < binary.shared_bytes < lines + 2048 and len(binary.parameters) == 22


def compiled_put(dtype, cc, vectors):
    code = CODES[dtype]
    used = inspect(ctc.compile_put(code, cc, vectors), code, 80)
    assert any(i.startswith("ld.global.v") for i in used) == vectors
    assert any(i.startswith("st.global.v") for i in used) == vectors


@pytest.mark.parametrize(
    "what, dtype, cc, spills",
    [
        ("value", "float32", AMPERE, False),
        ("gradient", "float32", HOPPER, False),
        ("all", "bfloat16", AMPERE, True),
        ("all", "float64", HOPPER, True),
    ],
)
def test_compiled(what, dtype, cc, spills):
    compiled(what, dtype, cc, spills)
    compiled_put(dtype, cc, vectors=not spills)


@pytest.mark.exhaustive
@pytest.mark.parametrize("spills", [True, False])
@pytest.mark.parametrize("cc", [AMPERE, HOPPER])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("what", REQUESTS)
def test_compiled_exhaustive(what, dtype, cc, spills):
    compiled(what, dtype, cc, spills)
    compiled_put(dtype, cc, spills)


def test_starts_compiled():
    inspect(ctc.compile_starts(HOPPER), CODES["float32"], 64)
