"""CTC: against PyTorch, the reference and all alignments written out, at every edge of lengths and memory."""

import itertools
import pickle
import re

import numba
import numpy as np
import pytest

import numbaloss as nl
from numbaloss import reference, testing
from numbaloss.kernels.cpu import ctc, launch
from numbaloss.kernels.spec import Sequences, Weighting

FRAMES, BATCH, CLASSES, LABELS = 17, 6, 7, 5
REDUCTIONS = ("none", "mean", "sum")
BOTH = pytest.mark.parametrize("dtype", [np.float64, np.float32])
# PyTorch adds logarithms in float32: it, not we, is off by their last digit a frame.
CLOSE = {np.float64: dict(rtol=1e-11, atol=1e-12), np.float32: dict(rtol=2e-5, atol=2e-5)}


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def sample(frames=FRAMES, batch=BATCH, classes=CLASSES, labels=LABELS, dtype=np.float64, blank=0, spread=2.0):
    """Log-probabilities, padded labels that are no blanks, lengths; the last sequence has no labels."""
    rng = np.random.default_rng(frames + classes)
    x = log_softmax(rng.normal(0, spread, (frames, batch, classes))).astype(dtype)
    targets = (blank + rng.integers(1, classes, (batch, labels))) % classes
    input_lengths = rng.integers(2 * labels, frames, batch, endpoint=True)
    target_lengths = rng.integers(1, labels, batch, endpoint=True)
    target_lengths[-1] = 0
    return x, targets, input_lengths, target_lengths


def joined(targets, lengths):
    return np.concatenate([row[:n] for row, n in zip(targets, lengths, strict=True)])


def by_torch(torch, x, targets, input_lengths, target_lengths, grad_output=1.0, **options):
    tensor = torch.tensor(x, requires_grad=True)
    lengths = (torch.tensor(n) for n in (input_lengths, target_lengths))
    value = torch.nn.functional.ctc_loss(tensor, torch.tensor(targets), *lengths, **options)
    value.backward(torch.as_tensor(np.asarray(grad_output, x.dtype)).expand(value.shape))
    return value.detach().numpy(), tensor.grad.numpy()


def agree(got, wanted, **close):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, **close)


# ---- values and gradients ----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("blank", [0, 3, CLASSES - 1])
@pytest.mark.parametrize("form", ["padded", "joined"])
def test_torch(form, blank, dtype, torch):
    x, targets, *lengths = sample(dtype=dtype, blank=blank)
    if form == "joined":
        targets = joined(targets, lengths[1])
    for reduction, zero_infinity in itertools.product(REDUCTIONS, (False, True)):
        options = {"blank": blank, "reduction": reduction, "zero_infinity": zero_infinity}
        up = np.linspace(-1, 2, BATCH, dtype=dtype) if reduction == "none" else -1.5
        found = nl.ctc_loss.value_and_grad(x, targets, *lengths, grad_output=up, **options)
        agree(found, by_torch(torch, x, targets, *lengths, up, **options), **CLOSE[dtype])
        assert found[0].dtype == found[1].dtype == dtype
        np.testing.assert_array_equal(nl.ctc_loss(x, targets, *lengths, **options), found[0])
        assert nl.CTCLoss(**options)(x, targets, *lengths).tobytes() == found[0].tobytes()


@BOTH
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_a_batch(reduction, shape, dtype, torch):
    x, targets, frames, labels = sample(dtype=dtype)
    x, targets = x[:, 1], targets[1, : labels[1]]
    lengths = [np.reshape(n[1], shape) for n in (frames, labels)]
    value, gradient = nl.ctc_loss.value_and_grad(x, targets, *lengths, reduction=reduction)
    agree((value, gradient), by_torch(torch, x, targets, *lengths, reduction=reduction), **CLOSE[dtype])
    assert np.shape(value) == () and gradient.shape == x.shape
    for form in (int, lambda n: (int(n),), lambda n: [int(n)]):
        again = nl.ctc_loss.value_and_grad(
            x, targets, *map(form, map(np.squeeze, lengths)), reduction=reduction
        )
        agree(again, (value, gradient), rtol=0)
    agree(
        nl.ctc_loss.value_and_grad(x, targets[None], *lengths, reduction=reduction), (value, gradient), rtol=0
    )


def all_alignments(x, labels, blank):
    """The probability of the labels, and of each class in each frame, by writing out every path."""
    whole, posterior = 0.0, np.zeros(x.shape)
    for path in itertools.product(range(x.shape[1]), repeat=len(x)):
        if [c for c, _ in itertools.groupby(path) if c != blank] == list(labels):
            p = np.exp(sum(frame[c] for frame, c in zip(x, path, strict=True)))
            whole += p
            posterior[range(len(x)), path] += p
    return whole, posterior / whole


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("labels", [[], [1], [1, 1], [1, 3], [3, 1, 3], [1, 1, 3], [3, 3, 3]], ids=str)
def test_all_alignments_written_out(labels, blank):
    x = log_softmax(np.random.default_rng(len(labels)).normal(size=(5, 4)))
    whole, posterior = all_alignments(x, labels, blank)
    found = nl.ctc_loss.value_and_grad(x, labels, 5, len(labels), blank=blank, reduction="sum")
    agree(found, (-np.log(whole), np.exp(x) - posterior), rtol=1e-13, atol=1e-15)


def test_a_label_that_is_the_blank(torch):
    """Its value is PyTorch's; its gradient is the value's, which PyTorch's is not."""
    x, targets, frames, labels = sample(8, 3, 5, 4)
    targets[:], labels[:] = [[1, 0, 0, 2], [0, 0, 1, 1], [0, 3, 3, 0]], [4, 3, 4]
    value, gradient = nl.ctc_loss.value_and_grad(x, targets, frames, labels, reduction="sum")
    np.testing.assert_allclose(
        value, by_torch(torch, x, targets, frames, labels, reduction="sum")[0], rtol=1e-13
    )

    def of_scores(log_probs):
        return reference.ctc_loss(log_softmax(log_probs), targets, frames, labels, reduction="sum")

    np.testing.assert_allclose(
        gradient, reference.gradient(of_scores, {"log_probs": x}, "log_probs"), atol=1e-8
    )


@BOTH
@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_lengths_at_their_edges(reduction, zero_infinity, dtype, torch):
    """No frames, no labels, frames that just suffice, and one too few; repeated labels need one more."""
    cases = [(0, 0), (0, 2), (9, 0), (1, 1), (3, 3), (2, 3), (5, 4), (4, 4), (9, 4)]
    x = sample(9, len(cases), labels=4, dtype=dtype)[0]
    targets = np.array([[1, 2, 3, 3]] * len(cases))
    call = (x, targets, *np.array(cases).T)
    options = {"reduction": reduction, "zero_infinity": zero_infinity}
    found = nl.ctc_loss.value_and_grad(*call, **options)
    wanted = by_torch(torch, *call, **options)
    agree(found, wanted, **CLOSE[dtype])
    assert np.isinf(wanted[0]).any() != zero_infinity
    np.testing.assert_allclose(found[0], reference.ctc_loss(*call, **options), rtol=1e-6)


def test_no_sequences_and_no_frames():
    none = np.zeros(0, int)
    for lengths in (none, (), []):
        for targets in (np.zeros((0, 3), int), none, []):
            call = np.zeros((4, 0, 3)), targets, lengths, lengths
            assert np.isnan(nl.ctc_loss(*call))
            value, gradient = nl.ctc_loss.value_and_grad(*call, reduction="sum")
            assert value == 0 and gradient.shape == (4, 0, 3)
            assert nl.ctc_loss(*call, reduction="none").shape == (0,)
    call = np.zeros((0, 2, 3)), np.ones((2, 1), int), (0, 0), (0, 1)
    value, gradient = nl.ctc_loss.value_and_grad(*call, reduction="none")
    assert value.tolist() == [0, np.inf] and gradient.shape == (0, 2, 3)


# ---- accuracy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "labels", "spread"), [(200, 40, 2.0), (2000, 300, 6.0), (300, 149, 20.0), (100, 2, 0.1)]
)
def test_float32_against_float64(frames, labels, spread, torch):
    """Relative errors of a probability grow as the root of its roundings: 2000 frames have some 1e-5."""
    x, targets, input_lengths, target_lengths = sample(frames, 2, 30, labels, np.float32, spread=spread)
    input_lengths[:], target_lengths[0] = frames, labels
    call = targets, input_lengths, target_lengths
    value, gradient = nl.ctc_loss.value_and_grad(x, *call, reduction="none")
    exact = nl.ctc_loss.value_and_grad(x.astype(np.float64), *call, reduction="none")
    np.testing.assert_allclose(value, exact[0], rtol=2e-7)
    np.testing.assert_allclose(gradient, exact[1], atol=5e-6)
    wanted = by_torch(torch, x.astype(np.float64), *call, reduction="none")
    np.testing.assert_allclose(exact[0], wanted[0], rtol=1e-13)
    np.testing.assert_allclose(exact[1], wanted[1], atol=1e-9)  # a logarithm's 13 digits, exponentiated


@BOTH
def test_improbable_frames(dtype, torch):
    """Log-probabilities down to -1e4, over 2000 frames; and some of a mask, which alignments can avoid."""
    rng = np.random.default_rng(0)
    x = (-1e4 * rng.random((2000, 3, 5))).astype(dtype)
    x[::7, 1, 3:] = -1e30
    x[5::7, 2, 4] = np.finfo(dtype).min
    targets, labels = rng.integers(1, 3, (3, 60)), np.array([60, 60, 0])
    call = targets, np.full(3, 2000), labels
    value, gradient = nl.ctc_loss.value_and_grad(x, *call, reduction="none")
    wanted = by_torch(torch, x.astype(np.float64), *call, reduction="none")
    np.testing.assert_allclose(value, wanted[0], rtol=2e-7)
    # PyTorch's logarithms have an error of 1e7 roundings of float64; here the posteriors are shares.
    np.testing.assert_allclose(gradient, wanted[1], atol=2e-3 if dtype == np.float32 else 1e-7)
    np.testing.assert_allclose((np.exp(x) - gradient).sum(axis=-1), 1, rtol=1e-5)


def test_posteriors_do_not_depend_on_a_common_factor(fused):
    """Of 2000 frames it adds 4e8 to exponents, of which float32 holds the whole numbers up to 2**24."""
    x, targets, frames, labels = sample(2000, 2, 9, 120, np.float32)
    x = np.round(x * 64) / 64  # of which, less 2**17, no digit is lost
    frames[:] = 2000
    # Multiples of log 2 are exact up to 2**15, or if the product is not rounded.
    gradient = nl.ctc_loss.grad(x - (2**17 if fused else 2**13), targets, frames, labels, reduction="sum")
    wanted = nl.ctc_loss.grad(x, targets, frames, labels, reduction="sum") - np.exp(x)
    np.testing.assert_allclose(gradient, wanted, atol=5e-6)


@BOTH
@pytest.mark.parametrize("size", [1e7, 1e12, 1e30])
def test_improbable_frames_that_cannot_be_avoided(size, dtype):
    x = np.full((20, 1, 3), -size, dtype)
    value, gradient = nl.ctc_loss.value_and_grad(x, [[1, 2]], [20], [2], reduction="sum")
    np.testing.assert_allclose(value, 20 * size, rtol=1e-6)
    np.testing.assert_allclose(gradient.sum(axis=-1), -1, rtol=1e-5)


@BOTH
def test_scores_that_are_no_log_probabilities(dtype, torch):
    x, *call = sample(dtype=dtype)
    found = nl.ctc_loss.value_and_grad(x * 3 + 5, *call)
    agree(found, by_torch(torch, x * 3 + 5, *call), rtol=1e-4, atol=1e-4 if dtype == np.float32 else 1e-9)
    assert nl.ctc_loss(np.full((3, 1, 2), 5000, dtype), [[1]], [3], [1]) == pytest.approx(-15000 - np.log(6))


@BOTH
def test_impossible_classes(dtype, torch):
    """The value is PyTorch's; the gradient is that of very improbable classes, where PyTorch's is NaN."""
    x, targets, frames, labels = sample(dtype=dtype)
    x[2:4, 0, targets[0, 0]] = x[3, 1, 0] = x[5, 2, :4] = -np.inf
    x[1, 3] = -np.inf
    call = targets, frames, labels
    value, gradient = nl.ctc_loss.value_and_grad(x, *call, reduction="none")
    wanted = by_torch(torch, x, *call, reduction="none")
    np.testing.assert_allclose(value, wanted[0], **CLOSE[dtype])
    assert (
        np.isinf(value[3])
        and np.isnan(gradient[: frames[3], 3]).all()
        and np.isfinite(value[[0, 1, 4]]).all()
    )
    near = nl.ctc_loss.grad(np.maximum(x, -1e5), *call, reduction="none")
    finite = np.isfinite(value)
    np.testing.assert_allclose(gradient[:, finite], near[:, finite], **CLOSE[dtype])
    known = np.isfinite(wanted[1])
    np.testing.assert_allclose(gradient[known], wanted[1][known], **CLOSE[dtype])
    assert not np.isnan(nl.ctc_loss.grad(x, *call, zero_infinity=True)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_nan_and_infinity_are_of_their_own_sequence(bad, zero_infinity, torch):
    """Of one that alignments use: all is NaN. Of another class: its own element."""
    x, targets, frames, labels = sample()
    x[1, 0, targets[0, 0]] = x[-1, 1, 0] = x[6, 2, 0] = bad
    frames[1] = FRAMES - 1  # so that it is beyond
    unused = next(c for c in range(1, CLASSES) if c not in targets[3])
    x[0, 3, unused] = bad
    options = {"reduction": "none", "zero_infinity": zero_infinity}
    found = nl.ctc_loss.value_and_grad(x, targets, frames, labels, **options)
    agree(found, by_torch(torch, x, targets, frames, labels, **options), **CLOSE[np.float64])
    assert np.isnan(found[0]).tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.thin(2)
def test_halves(half, request):
    """Arithmetic is float32: what a result differs by is its own rounding."""
    dtype = request.getfixturevalue("bfloat16") if half == "bfloat16" else np.dtype(half)
    x, *call = sample(dtype=dtype)
    exact = nl.ctc_loss.value_and_grad(x.astype(np.float64), *call, grad_output=64.0)
    value, gradient = nl.ctc_loss.value_and_grad(x, *call, grad_output=64.0)
    rounding = float(testing.finfo(dtype).eps) / 2
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(float(value), exact[0], rtol=rounding + 1e-6)
    np.testing.assert_allclose(gradient.astype(float), exact[1], rtol=rounding + 1e-5, atol=1e-4)
    terms = nl.ctc_loss(x, *call, reduction="none").astype(float)
    wanted = nl.ctc_loss(x.astype(np.float64), *call, reduction="none")
    np.testing.assert_allclose(terms, wanted, rtol=rounding + 1e-6)


# ---- weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", [None, 40.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_and_normalizer(reduction, normalizer):
    x, *call = sample()
    weight = np.random.default_rng(1).uniform(0.5, 2, BATCH)
    options = {"reduction": reduction, "sample_weight": weight, "normalizer": normalizer}
    value, gradient = nl.ctc_loss.value_and_grad(x, *call, **options)
    np.testing.assert_allclose(value, reference.ctc_loss(x, *call, **options), rtol=1e-13)
    shares = weight.copy()
    if reduction == "mean":
        shares /= np.maximum(call[-1], 1) * (normalizer or weight.sum())
    terms = nl.ctc_loss.grad(x, *call, reduction="none")
    np.testing.assert_allclose(gradient, terms * shares[:, None], rtol=1e-12, atol=1e-15)
    one = nl.ctc_loss(
        x[:, 0], call[0][0], *[n[0] for n in call[1:]], **options | {"sample_weight": weight[0]}
    )
    wanted = reference.ctc_loss(
        x[:, :1], call[0][:1], *[n[:1] for n in call[1:]], **options | {"sample_weight": weight[:1]}
    )
    np.testing.assert_allclose(one, np.squeeze(wanted), rtol=1e-13)


def test_micro_batches_are_the_whole_batch():
    x, targets, *lengths = sample()
    value, gradient = nl.ctc_loss.value_and_grad(x, targets, *lengths)
    parts = [
        nl.ctc_loss.value_and_grad(x[:, k], targets[k], *[n[k] for n in lengths], normalizer=BATCH)
        for k in (slice(0, 2), slice(2, None))
    ]
    agree((sum(v for v, _ in parts), np.hstack([g for _, g in parts])), (value, gradient), rtol=1e-13)


def test_what_is_not_read():
    """Frames beyond a length, padding, and sequences that weigh nothing: but their labels are checked."""
    x, targets, frames, labels = sample()
    labels[0] = LABELS - 2
    frames[:3] = FRAMES - 3
    weight = np.array([1, 2, 0, 0, 1, 3.0])
    call = targets, frames, labels
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "sample_weight": weight}
        wanted = nl.ctc_loss.value_and_grad(x, *call, **options)
        spoiled, others = x.copy(), targets.copy()
        spoiled[FRAMES - 3 :, :3], spoiled[:, 2:4] = np.nan, np.nan
        others[0, LABELS - 2 :] = 1 << 40
        found = nl.ctc_loss.value_and_grad(spoiled, others, frames, labels, **options)
        agree(found, wanted, rtol=0)
        assert not found[1][:, 2:4].any() and not found[1][FRAMES - 3 :, :3].any()
        others[3, 0] = CLASSES
        with pytest.raises(IndexError, match=rf"targets\[3, 0\] is {CLASSES}"):
            nl.ctc_loss(x, others, frames, labels, **options)


# ---- memory --------------------------------------------------------------------------------------------


def wide(a):
    made = np.full([2 * n + 1 for n in a.shape], np.nan, a.dtype)
    made[1::2, 1::2, 1::2] = a
    return made[1::2, 1::2, 1::2]


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "strided": wide,
    "reversed": lambda a: a[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    "batch first": lambda a: a.transpose(1, 0, 2).copy().transpose(1, 0, 2),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "unaligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_layouts(dtype, layout):
    x, *call = sample(dtype=dtype)
    wanted = nl.ctc_loss.value_and_grad(x, *call)
    y = LAYOUTS[layout](x)
    if layout in ("Fortran", "strided"):
        y.flags.writeable = False
    before = y.copy()
    targets, *lengths = call
    for others in (call, [np.asfortranarray(targets), *[np.repeat(n, 2)[::2] for n in lengths]]):
        found = nl.ctc_loss.value_and_grad(y, *others)
        agree(found, wanted, rtol=0)
        assert found[1].dtype == dtype
    np.testing.assert_array_equal(y, before)


def test_a_broadcast_view():
    x, *call = sample()
    view = np.broadcast_to(x[:, :1], x.shape)
    agree(nl.ctc_loss.value_and_grad(view, *call), nl.ctc_loss.value_and_grad(view.copy(), *call), rtol=0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("layout", ["Fortran", "strided", "reversed", "batch first"])
def test_in_place(layout, dtype):
    x, targets, frames, labels = sample(dtype=dtype)
    frames[0], labels[0] = 1, 2  # no alignment
    call = targets, frames, labels
    for options in ({}, {"reduction": "none"}, {"zero_infinity": True, "sample_weight": np.arange(BATCH)}):
        value, gradient = nl.ctc_loss.value_and_grad(x, *call, **options)
        for y in (x.copy(), LAYOUTS[layout](x)):
            got, found = nl.ctc_loss.value_and_grad(y, *call, out=y, **options)
            assert found is y
            agree((got, found), (value, gradient), rtol=0)
    out = LAYOUTS[layout](np.ones_like(x))
    assert nl.ctc_loss.grad(x, *call, out=out) is out
    np.testing.assert_array_equal(out, nl.ctc_loss.grad(x, *call))


def test_out_and_wrt():
    x, *call = sample()
    gradient = nl.ctc_loss.grad(x, *call)
    (of_tuple,) = nl.ctc_loss.grad(x, *call, wrt=("log_probs",))
    np.testing.assert_array_equal(of_tuple, gradient)
    memory = np.zeros((FRAMES + 1, *x.shape[1:]))
    with pytest.raises(ValueError, match="^ctc_loss: out for log_probs overlaps log_probs"):
        nl.ctc_loss.grad(memory[1:], *call, out=memory[:-1])
    targets = np.zeros(x.shape, np.int64)[0, :, :LABELS]
    with pytest.raises(
        TypeError, match="^ctc_loss: out for log_probs must be float64 or a narrower float, got int32"
    ):
        nl.ctc_loss.grad(x, *call, out=np.zeros(x.shape, np.int32))
    for name in ("targets", "input_lengths"):
        with pytest.raises(ValueError, match=f"^ctc_loss: wrt must be among 'log_probs', got '{name}'"):
            nl.ctc_loss.grad(x, targets, *call[1:], wrt=name)
    with pytest.raises(ValueError, match="^ctc_loss: has no value_grad_hess"):
        nl.ctc_loss.value_grad_hess(x, *call)


def test_dtypes_promote():
    x, *call = sample(dtype=np.float32)
    value, gradient = nl.ctc_loss.value_and_grad(x, *call, sample_weight=np.ones(BATCH))
    assert value.dtype == np.float64 and gradient.dtype == np.float32
    np.testing.assert_allclose(value, nl.ctc_loss(x.astype(np.float64), *call), rtol=1e-13)
    assert nl.ctc_loss(x, *call, sample_weight=2).dtype == np.float32


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4"])
def test_integer_dtypes(dtype):
    x, *call = sample()
    wanted = nl.ctc_loss.value_and_grad(x, *call)
    agree(nl.ctc_loss.value_and_grad(x, *[a.astype(dtype) for a in call]), wanted, rtol=0)
    agree(nl.ctc_loss.value_and_grad(x, *[a.tolist() for a in call]), wanted, rtol=0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_bits_do_not_depend_on_threads(dtype):
    x, *call = sample(60, 23, 20, 12, dtype)
    value, gradient = nl.ctc_loss.value_and_grad(x, *call)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        alone = nl.ctc_loss.value_and_grad(x, *call)
    finally:
        numba.set_num_threads(threads)
    assert value.tobytes() == alone[0].tobytes() and gradient.tobytes() == alone[1].tobytes()
    # Nor does a sequence's gradient on which other sequences there are.
    one = nl.ctc_loss.grad(x[:, 5:6], *[a[5:6] for a in call], reduction="none")
    np.testing.assert_array_equal(one, nl.ctc_loss.grad(x, *call, reduction="none")[:, 5:6])


# ---- errors --------------------------------------------------------------------------------------------

HUGE = 2**64 - 1


def labels_of(value, dtype=np.int64):
    return {"targets": np.full((2, 5), value, dtype)}


BAD = {
    "frames above T": ({"input_lengths": (18, 1)}, ValueError, "input_lengths[0] must be in [0, 17]"),
    "frames below 0": ({"input_lengths": (1, -1)}, ValueError, "input_lengths[1] must be in [0, 17]"),
    "labels above S": ({"target_lengths": (2, 6)}, ValueError, "target_lengths[1] must be in [0, 5]"),
    "labels below 0": ({"target_lengths": (-2, 1)}, ValueError, "target_lengths[0] must be in [0, 5]"),
    "huge length": ({"target_lengths": np.full(2, HUGE, np.uint64)}, ValueError, f"got {HUGE}"),
    "one length for two": ({"input_lengths": (9,)}, ValueError, "input_lengths must have shape (2,)"),
    "lengths for three": ({"target_lengths": (1, 1, 1)}, ValueError, "target_lengths must have shape (2,)"),
    "float lengths": (
        {"input_lengths": (9.0, 9.0)},
        TypeError,
        "input_lengths must hold integers, got float",
    ),
    "float labels": (labels_of(1, np.float64), TypeError, "targets must hold integers, got float64"),
    "bool labels": (labels_of(1, bool), TypeError, "targets must hold integers, got bool"),
    "labels for three": ({"targets": np.ones((3, 5), int)}, ValueError, "targets must have shape (2, S)"),
    "three axes": ({"targets": np.ones((1, 2, 5), int)}, ValueError, "targets must have shape (2, S)"),
    "joined too short": ({"targets": [1] * 5}, ValueError, "must sum to the 5 labels of targets, got 6"),
    "joined too long": ({"targets": [1] * 7}, ValueError, "must sum to the 7 labels of targets, got 6"),
    "label C": (
        {"targets": [[1] * 5, [1, 7] * 2 + [1]]},
        IndexError,
        "targets[1, 1] is 7, but log_probs has 7",
    ),
    "label -1": (labels_of(-1, np.int8), IndexError, "targets[0, 0] is -1, but log_probs has 7 classes"),
    "label of int16": (labels_of(-(2**15), np.int16), IndexError, "targets[0, 0] is -32768"),
    "label of int64": (labels_of(-(2**63)), IndexError, f"targets[0, 0] is {-(2**63)}"),
    "label of uint8": (labels_of(255, np.uint8), IndexError, "targets[0, 0] is 255, but"),
    "label of uint64": (labels_of(HUGE, np.uint64), IndexError, f"targets[0, 0] is {HUGE}, but"),
    "joined label": (
        {"targets": [1] * 5 + [9]},
        IndexError,
        "targets[5] is 9, but log_probs has 7 classes (label 1",
    ),
    "blank C": ({"blank": 7}, ValueError, "blank must be a class, in [0, 7), got 7"),
    "blank -1": ({"blank": -1}, ValueError, "blank must be a class, in [0, 7), got -1"),
    "blank 0.5": ({"blank": 0.5}, TypeError, "blank must be an integer, got 0.5"),
    "no classes": ({"log_probs": np.zeros((17, 2, 0))}, ValueError, "log_probs must have shape (T, N, C)"),
    "one axis": ({"log_probs": np.zeros(17)}, ValueError, "log_probs must have shape (T, N, C) or (T, C)"),
    "four axes": ({"log_probs": np.zeros((1, 17, 2, 7))}, ValueError, "log_probs must have shape"),
    "integer scores": ({"log_probs": np.zeros((17, 2, 7), int)}, TypeError, "log_probs must be float64"),
    "weights for three": ({"sample_weight": np.ones(3)}, ValueError, "sample_weight of shape (3,)"),
    "zero_infinity": ({"zero_infinity": "yes"}, TypeError, "zero_infinity must be True or False"),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
    "grad_output": ({"grad_output": np.ones(2)}, ValueError, "grad_output must be a number"),
}


def bad_call(what):
    x = sample(batch=2)[0]
    call = {
        "log_probs": x,
        "targets": np.ones((2, 5), int),
        "input_lengths": (17, 17),
        "target_lengths": (4, 2),
    }
    call |= BAD[what][0]
    call["targets"] = np.array(call["targets"])
    return call


@pytest.mark.parametrize("what", BAD)
def test_errors(what):
    """Of the same message in every mode; what would be overwritten is as it was."""
    _, error, message = BAD[what]
    call = bad_call(what)
    before = call["log_probs"].copy()
    if "grad_output" not in call:
        with pytest.raises(error, match=f"^ctc_loss: .*{re.escape(message)}"):
            nl.ctc_loss(**call)
    out = call["log_probs"] if call["log_probs"].dtype == np.float64 else None
    with pytest.raises(error, match=f"^ctc_loss: .*{re.escape(message)}"):
        nl.ctc_loss.value_and_grad(**call, out=out)
    np.testing.assert_array_equal(call["log_probs"], before)


MISFITS = {
    "frames": {"input_lengths": np.array([18, 1])},
    "labels": {"target_lengths": np.array([-1, 5])},
    "three lengths": {"input_lengths": np.ones(3, int)},
    "one length": {"target_lengths": np.array(2)},
    "narrow lengths": {"input_lengths": np.array([18, 1], np.int16)},
    "three rows": {"targets": np.ones((3, 5), int)},
    "joined": {"targets": np.ones(7, int)},
    "blank": {"blank": 7},
    "weights": {"weighting": Weighting("mean", np.ones(3), None, 1.0, None)},
}


@pytest.mark.parametrize("what", [*MISFITS, None])
def test_the_driver_finds_what_does_not_fit(what):
    """By itself, since a prepared call is not checked again; nothing is written then."""
    x = sample(batch=2)[0]
    p = Sequences(
        *("ctc_loss", x, np.ones((2, 5), int), np.array([17, 9]), np.array([4, 2]), 0, False),
        *(Weighting("mean", None, None, 1.0, None), (2,), x.dtype, x.dtype),
    )
    out = np.full_like(x, 7)

    def status(problem):
        return launch.run(ctc.pack(problem, {"log_probs": out}, ()))[1]

    assert status(p._replace(**MISFITS.get(what, {}))) == (launch.OK if what is None else launch.UNFIT)
    assert (out == 7).all() == (what is not None)
    labels = p.targets.copy()
    labels[1, 1] = 9
    for targets in (labels, labels.astype(np.int8), np.asfortranarray(labels)):
        assert status(p._replace(targets=targets)) == 6


def wider(array, axis):
    """The same elements, every second of an array along an axis."""
    return np.moveaxis(np.moveaxis(np.repeat(array, 2, axis), axis, 0)[::2], 0, axis)


def test_a_call_seen_before_takes_any_layout_and_extent():
    """Arrays that are contiguous in no order have one signature, wherever their elements lie."""
    x, targets, frames, labels = sample(batch=4)
    layouts = [(x, targets)]
    for axis in (0, 1, 2):
        layouts.append((wider(x, axis), wider(targets, axis % 2)))
        layouts.append((wider(x, axis)[:, :3], wider(targets, axis % 2)[:3]))
    layouts += layouts[::-1]
    for how in REDUCTIONS:
        for y, t in layouts:
            n = y.shape[1]
            call = y.copy(), t.copy(), frames[:n].tolist(), labels[:n].tolist()
            wanted = nl.ctc_loss.value_and_grad(*call, reduction=how)
            for got in (
                nl.ctc_loss.value_and_grad(y, t, frames[:n], labels[:n], reduction=how),
                nl.ctc_loss.value_and_grad(y, t, frames[:n].astype(np.uint8), labels[:n], reduction=how),
            ):
                np.testing.assert_array_equal(got[0], wanted[0])
                np.testing.assert_array_equal(got[1], wanted[1])
            with pytest.raises(ValueError, match=r"target_lengths\[1\] must be in \[0, 5\]"):
                nl.ctc_loss(y, t, frames[:n], labels[:n] + 6 * (np.arange(n) == 1), reduction=how)
            with pytest.raises(IndexError, match=r"targets\[1, 0\] is 9, but log_probs has 7 classes"):
                kept, t[1, 0] = t[1, 0], 9
                nl.ctc_loss.value_and_grad(y, t, frames[:n], np.full(n, 1), reduction=how)
            t[1, 0] = kept


@pytest.mark.more
def test_nothing_is_read_or_written_out_of_bounds(python, tmp_path):
    """With Numba's checks, and between guards: everything that is bad, and lengths at all their edges."""
    python(
        f"""
import sys
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
import numpy as np
import numbaloss as nl
from test_sequence import BAD, bad_call
for what in BAD:
    call = bad_call(what)
    for dtype in (np.float32, np.float64):
        if call["log_probs"].dtype == np.float64:
            call["log_probs"] = call["log_probs"].astype(dtype)
        try:
            nl.ctc_loss.value_and_grad(**call)
        except BAD[what][1]:
            continue
        raise SystemExit(f"no error: {{what}}")
rng = np.random.default_rng(0)
for labels in (0, 1, 14, 15, 16, 17, 40):
    lengths = [(f, n) for f in (0, 1, labels, 2 * labels + 1) for n in (0, labels // 2, labels)]
    frames, counts = np.array(lengths).T
    longest = max(2 * labels + 1, 1)
    memory = np.full((longest + 2, len(lengths), 5), 7, np.float32)
    x = memory[1:-1]
    x[:] = -rng.random(x.shape)
    for n in range(3):  # one label over and over, and all of them
        targets = rng.integers(1, 5, (len(lengths), labels)) if n else np.ones((len(lengths), labels), int)
        nl.ctc_loss(x, targets, frames, counts)
        nl.ctc_loss.grad(x, targets, frames, counts, out=x)
        assert (memory[[0, -1]] == 7).all()
        x[:] = -rng.random(x.shape)
""",
        NUMBA_BOUNDSCHECK="1",
        NUMBA_CACHE_DIR=str(tmp_path),
    )


# ---- the library's own conventions ---------------------------------------------------------------------


def test_samples_have_alignments(rng):
    for shape in [(12, 4, 5), (3, 2, 2), (40, 6)]:
        arrays = testing.samples(nl.ctc_loss, rng, shape)
        assert np.isfinite(nl.ctc_loss(**arrays, reduction="none")).all()


def test_class_and_function():
    x, *call = sample(blank=2)
    criterion = nl.CTCLoss(2, "sum", zero_infinity=True)
    assert repr(criterion) == "CTCLoss(blank=2, reduction='sum', zero_infinity=True)"
    value, gradient = nl.ctc_loss.value_and_grad(x, *call, 2, "sum", True)
    for same in (criterion, pickle.loads(pickle.dumps(criterion))):
        agree(same.value_and_grad(x, *call), (value, gradient), rtol=0)
        out = x.copy()
        assert same.grad(x, *call, out=out) is out
