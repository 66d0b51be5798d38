"""Kernels below the losses: half precision, fingerprints, rules of differentiation, what is compiled."""

import math
import pickle
import re

import numpy as np
import pytest
from numba import cfunc, njit
from sweeps import sweep

import numbaloss as nl
from numbaloss.kernels import jets
from numbaloss.kernels.cpu import elementwise, halves, native
from numbaloss.kernels.cpu.target import derivatives
from numbaloss.kernels.freeze import fingerprint
from numbaloss.kernels.spec import Request


def converter(function, result):
    @njit
    def convert(x):
        out = np.empty(x.size, result)
        for i in range(x.size):
            out[i] = function(x[i])
        return out

    return convert


@pytest.fixture(scope="module")
def bfloat16():
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


PATTERNS = np.arange(65536, dtype=np.uint16)


def test_every_float16_is_widened_exactly():
    got = converter(halves.from_float16, np.float32)(PATTERNS)
    np.testing.assert_array_equal(got, PATTERNS.view(np.float16).astype(np.float32))
    assert (np.signbit(got) == (PATTERNS >> 15).astype(bool)).all()


def test_every_bfloat16_is_widened_exactly(bfloat16):
    got = converter(halves.from_bfloat16, np.float32)(PATTERNS)
    np.testing.assert_array_equal(got, PATTERNS.view(bfloat16).astype(np.float32))


def narrow_cases(widened):
    """Each number, each midpoint to its neighbour (ties), and what lies just beside both."""
    x = np.unique(widened[np.isfinite(widened)])
    middle = ((x[:-1].astype(np.float64) + x[1:]) / 2).astype(np.float32)
    exact = np.concatenate([x, middle])
    cases = [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))]
    huge = np.float32([65519.99, 65520, 65536, 3.4e38, np.inf, -np.inf, 1e-45, -1e-45, 0.0, -0.0])
    return np.concatenate([*cases, huge])


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_narrowing_rounds_to_nearest_ties_to_even(name, bfloat16):
    dtype = np.dtype(np.float16) if name == "float16" else bfloat16
    to = converter(getattr(halves, f"to_{name}"), np.uint16)
    x = narrow_cases(PATTERNS.view(dtype).astype(np.float32))
    with np.errstate(over="ignore"):
        wanted = x.astype(dtype)
    np.testing.assert_array_equal(to(x), wanted.view(np.uint16))
    nan = to(np.array([np.nan, -np.nan], np.float32)).view(dtype).astype(np.float32)
    assert np.isnan(nan).all()


SCALE = 2.0


def fingerprint_of(source, **scope):
    scope = {"nl": nl, "np": np, "SCALE": SCALE, **scope}
    exec(source, scope)
    return fingerprint(scope["f"])


BASE = "def f(x, t):\n    return SCALE * (x - t) * 3.0\n"


@pytest.mark.parametrize(
    ("source", "scope", "same"),
    [
        ("# a comment\n\n" + BASE, {}, True),
        (BASE.replace("3.0", "4.0"), {}, False),
        (BASE.replace("x - t", "x + t"), {}, False),
        (BASE, {"SCALE": 5.0}, False),
        (BASE, {"unused": 1}, True),
        (BASE.replace("(x, t)", "(x, t, k=1.0)"), {}, False),
        (BASE.replace("SCALE", "np.pi"), {}, False),
    ],
)
def test_a_fingerprint_says_what_is_computed(source, scope, same):
    assert (fingerprint_of(source, **scope) == fingerprint_of(BASE)) == same


def test_a_fingerprint_follows_helpers_and_closures():
    def make(k, helper):
        def f(x, t):
            return helper(x - t) * k

        return f

    @njit
    def twice(x):
        return 2 * x

    @njit
    def thrice(x):
        return 3 * x

    prints = {fingerprint(make(k, h)) for k in (1.0, 2.0) for h in (twice, thrice)}
    assert len(prints) == 4
    assert fingerprint(make(1.0, twice)) == fingerprint(make(1.0, twice))


NAMES = {spellings[0].__name__: spellings for spellings in jets.UNARY.values()}


@pytest.mark.parametrize("name", sweep(NAMES, "exp", "sqrt"))
@pytest.mark.more
def test_rules_of_functions(name):
    """First and second derivative of each function, by every spelling, against differences."""
    domains = {
        "log": (0.2, 2.5), "sqrt": (0.2, 2.5), "log1p": (0.2, 2.5), "arccosh": (0.9, 2.5),
        "arcsin": (-0.6, 0.6), "arccos": (-0.6, 0.6), "arctanh": (-0.6, 0.6), "log1mexp": (-2.0, -0.1),
    }  # fmt: skip
    x = np.linspace(*domains.get(name, (-1.97, 2.03)), 21)
    t = np.zeros_like(x)

    def loss_of(k):
        function = NAMES[name][k]

        def value(input, target):
            return function(input * 1.5 + target)

        value.__name__ = f"{name}_{k}"
        return nl.elementwise_loss(value)

    loss = loss_of(0)
    terms, slope, curvature = loss.value_grad_hess(x, t, reduction="none")
    h = 1e-6
    up, down = loss(x + h, t, reduction="none"), loss(x - h, t, reduction="none")
    np.testing.assert_allclose(slope, (up - down) / (2 * h), rtol=1e-7, atol=1e-8)
    up, down = loss.grad(x + h, t, reduction="none"), loss.grad(x - h, t, reduction="none")
    np.testing.assert_allclose(curvature, (up - down) / (2 * h), rtol=1e-7, atol=1e-8)
    plain = [float(NAMES[name][0](1.5 * v)) for v in x]  # the same function, run as plain Python
    np.testing.assert_allclose(terms, plain, rtol=1e-14, atol=1e-15)
    for k in range(1, len(NAMES[name])):
        for ours, theirs in zip(
            loss_of(k).value_grad_hess(x, t, reduction="none"), (terms, slope, curvature), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def slope_and_curvature(value, x):
    """Of a function of one number, by the jets."""
    jet = derivatives()
    function, seed, parts = jet.jit(value), jet.seed(1, 0), jet.parts

    @njit
    def at(x):
        return parts(function(*seed(x, x, x)), x)[1:]

    return at(float(x))


@pytest.mark.parametrize(
    ("value", "slope", "curvature"),
    [
        (lambda x: x ** (0.0 * 1), 0, 0),
        (lambda x: x ** (1.0 * 1), 1, 0),
        (lambda x: x ** (2.0 * 1), 0, 2),
        (lambda x: x ** (3.0 * 1), 0, 0),
        (lambda x: x**1.5, 0, np.inf),
        (lambda x: x**0.5, np.inf, -np.inf),
        # Infinity times 0 of the chain rule.
        (lambda x: abs(x) ** 0.5, 0, 0),
        (lambda x: abs(x) ** 1.5, 0, 0),
        (lambda x: nl.math.sqrt(abs(x)), 0, 0),
        (lambda x: nl.math.sqrt(x * x), 0, np.inf),
        (lambda x: nl.math.sqrt(x**4), 0, 0),
        (lambda x: nl.math.sqrt(x), np.inf, -np.inf),
        # Exponents that move.
        (lambda x: x ** (x + 1), 1, -np.inf),
        (lambda x: x ** (x + 2), 0, 2),
        (lambda x: 0.0 ** (x + 1), 0, 0),
        (lambda x: 2.0**x, np.log(2), np.log(2) ** 2),
    ],
)
def test_powers_at_zero(value, slope, curvature):
    np.testing.assert_allclose(slope_and_curvature(value, 0.0), (slope, curvature), rtol=1e-15)


@pytest.mark.parametrize("y", [2.0, -1.0, 0.5, 3.0])
@pytest.mark.parametrize("x", [0.3, 1.0, 4.0])
def test_powers_whose_exponents_move(x, y):
    """In a moving base and exponent, by hand."""

    def value(v):
        return v ** (y * v)

    log = np.log(x)
    first = x ** (y * x) * y * (log + 1)
    wanted = first, first * y * (log + 1) + x ** (y * x) * y / x
    np.testing.assert_allclose(slope_and_curvature(value, x), wanted, rtol=1e-13)


def test_functions_by_other_names():
    def value(x):
        return np.clip(x, -0.5, 0.5) + pow(abs(x), 1.5) + math.cosh(x) * np.sinh(x)

    for x in (0.3, 0.7, -1.2):
        inside = abs(x) < 0.5
        slope = inside + 1.5 * abs(x) ** 0.5 * np.sign(x) + np.cosh(2 * x)
        curvature = 0.75 * abs(x) ** -0.5 + 2 * np.sinh(2 * x)
        np.testing.assert_allclose(slope_and_curvature(value, x), (slope, curvature), rtol=1e-13)


def test_a_float32_kernel_computes_in_float32(monkeypatch):
    """It has float64 only where the runs' sums are added, in vectors too, and where options are read."""
    scalars = nl.huber_loss.Class._scalars((None,), 2)
    # Numba keeps no assembly of a kernel from its cache.
    monkeypatch.setattr(elementwise, "kept_c", cfunc)
    kernel = elementwise.compile_block(scalars, Request(wrt=(0,)), np.dtype(np.float32))
    assembly = kernel._library.get_asm_str()
    vectors = set(re.findall(r"\bv(?:sub|mul|div|fmadd\d*|fmsub\d*)p([sd])\b", assembly))
    if not re.search(r"\b[yz]mm\d", assembly):
        pytest.skip("not the assembly of an x86 processor with AVX")
    assert vectors == {"s"}


def test_code_for_other_kernels_is_not_taken_from_the_disk(monkeypatch):
    kept = pickle.dumps(native.Needed(("a", "b"), min, (1, 2)))
    assert pickle.loads(kept).names == ("a", "b")
    monkeypatch.setattr(native, "sources", lambda: "an edited file's")
    with pytest.raises(OSError, match="other kernels"):  # Numba compiles the code anew
        pickle.loads(kept)
