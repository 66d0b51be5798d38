"""A definition is compiled as it stands when it is called: nothing that it reads is ever stale."""

import enum
import pickle
import sys
import types

import numpy as np
import pytest
from numba import njit
from numba.core.serialize import dumps
from sweeps import sweep

import numbaloss as nl
from numbaloss.kernels.freeze import fingerprint, freeze, has_changed

ONE, TWO = np.array([1.0, 2.0]), np.zeros(2)


def module(name="helpers", **contents):
    made = types.ModuleType(name)
    for n, v in contents.items():
        setattr(made, n, v)
    return made


class Kind(enum.Enum):
    PLAIN = 1
    TENFOLD = 10


class Power(enum.IntEnum):
    TWO = 2


def defined(source, **scope):
    """A loss whose function reads a scope."""
    scope = {"nl": nl, "np": np, "__name__": "somewhere", **scope}
    exec(source, scope)
    return nl.elementwise_loss(scope["f"]), scope


def value(loss):
    """The loss by a kernel of value and gradient, which must agree."""
    found, grad = loss.value_and_grad(ONE, TWO, reduction="sum")
    assert grad[1] * ONE[1] + grad[0] * ONE[0] == 2 * found  # of a multiple of squares
    return float(found)


def test_members_of_integer_enumerations_are_numbers():
    loss, _ = defined(
        "def f(input, target):\n"
        "    d = input - target\n"
        "    if target == Power.TWO:\n"
        "        return Power.TWO\n"
        "    low = nl.math.maximum(d, Power.TWO) / Power.TWO\n"
        "    return nl.math.where(d > Power.TWO, Power.TWO * d**Power.TWO, low - Power.TWO)",
        Power=Power,
    )
    value, grad = loss.value_and_grad(
        np.array([3.0, 2.5, 1.0, 9.0]), np.array([0.0, 0, 0, 2]), reduction="none"
    )
    assert value.tolist() == [18, 12.5, -1, 2]
    assert grad.tolist() == [12, 10, 0, 0]


def values(loss):
    """The loss in every mode; the gradient says the same as the value."""
    value, grad = loss.value_and_grad(ONE, TWO, reduction="sum")
    more = loss.value_grad_hess(ONE, TWO, reduction="sum")
    assert value == more[0] == loss(ONE, TWO, reduction="sum") == loss.Class(reduction="sum")(ONE, TWO)
    np.testing.assert_array_equal(grad, more[1])
    np.testing.assert_array_equal(grad, loss.grad(ONE, TWO, reduction="sum"))
    assert loss.jit(ONE, TWO, "sum") == value
    assert loss.scalar(2.0, 0.0) == grad[1]
    return float(value)


SQUARE = "def f(input, target):\n    return {} * (input - target) ** 2 / 2\n"


READ = "SCALE", "config.SCALE", "outer.config.SCALE", "of(1.0)", "config.of(1.0)"


@pytest.mark.parametrize("read", sweep(READ, "outer.config.SCALE"))
@pytest.mark.more
def test_what_is_read_is_read_anew(read):
    def change(number):
        @njit
        def of(x):
            return x * number

        scope["SCALE"] = config.SCALE = number
        scope["of"] = config.of = of

    config = module("config")
    loss, scope = defined(SQUARE.format(read), config=config, outer=module("outer", config=config))
    for number in (1.0, 10.0, 3.0, 10.0):
        change(number)
        assert values(loss) == number * 2.5


def test_a_helper_is_followed_to_what_it_reads():
    config = module("config", SCALE=2.0)
    scope = {"njit": njit, "config": config}
    exec("@njit\ndef square(d):\n    return config.SCALE * d * d\n", scope)
    loss, _ = defined(
        "def f(input, target):\n    return helpers.square(input - target) / 2\n",
        helpers=module(square=scope["square"]),
    )
    assert value(loss) == 5.0
    config.SCALE = 20.0
    assert value(loss) == 50.0


@pytest.mark.more
def test_closures_defaults_and_members():
    number = 1.0

    @njit
    def helper(x, by=2.0):
        return x * by

    @nl.elementwise_loss
    def loss(input, target):
        return helper(number * (input - target) ** 2) / 4

    assert value(loss) == 2.5
    number = 4.0
    assert value(loss) == 10.0
    helper.py_func.__defaults__ = (4.0,)
    assert value(loss) == 20.0
    loss, scope = defined(SQUARE.format("kind.value"), kind=Kind.PLAIN)
    assert value(loss) == 2.5
    scope["kind"] = Kind.TENFOLD
    assert value(loss) == 25.0


def test_a_function_whose_code_is_replaced():
    """As IPython's autoreload does, also to the functions of classes."""

    class Squares(nl.ElementwiseLoss):
        def value(input, target):
            return (input - target) ** 2 / 2

    def other(input, target):
        return (input - target) ** 2 * 2

    assert value(Squares.function) == 2.5
    Squares.__dict__["value"].__code__ = other.__code__
    assert value(Squares.function) == 10.0
    Squares.value = lambda input, target: (input - target) ** 2 / 4
    assert value(Squares.function) == 1.25


@pytest.mark.more
def test_other_families():
    scores, labels = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]), np.array([0, 1])
    config = module("config", SCALE=1.0)
    by_scores = nl.score_loss(eval("lambda cross_entropy: config.SCALE * cross_entropy", {"config": config}))
    terms = eval("lambda x, y: config.SCALE * (x - y) ** 2", {"config": config})
    by_vectors = nl.vector_loss(terms, eval("lambda total: total"), name="apart")
    for number in (1.0, 3.0):
        config.SCALE = number
        wanted = nl.cross_entropy.value_and_grad(scores, labels)
        for got, want in zip(by_scores.value_and_grad(scores, labels), wanted, strict=True):
            np.testing.assert_allclose(got, number * want, rtol=1e-12)
        value, by = by_vectors.value_and_grad(scores, scores[::-1], wrt="x", reduction="sum")
        np.testing.assert_allclose(value, number * np.square(scores - scores[::-1]).sum())
        np.testing.assert_allclose(by, 2 * number * (scores - scores[::-1]))


@pytest.mark.parametrize(
    ("read", "scope"),
    [
        ("table['a']", {"table": {"a": 1.0}}),
        ("thing.scale", {"thing": types.SimpleNamespace(scale=1.0)}),
        ("of(config)", {"of": njit(lambda c: 1.0), "config": module("config", SCALE=1.0)}),
    ],
)
def test_things_that_could_change_unseen_are_refused(read, scope):
    loss, _ = defined(SQUARE.format(read), **scope)
    with pytest.raises(TypeError, match="could not be noticed"):
        loss(ONE, TWO)


def test_what_stays_is_compiled_once():
    loss, scope = defined(SQUARE.format("SCALE"), SCALE=3.0)
    again, _ = defined("# moved\n\n" + SQUARE.format("SCALE"), SCALE=3.0)
    first = freeze(loss.Class.__dict__["value"])
    assert freeze(first.function).function is first.function
    assert freeze(again.Class.__dict__["value"]).function is first.function
    assert fingerprint(again.Class.__dict__["value"]) == first.digest
    assert not has_changed(first.read)
    scope["SCALE"] = 4.0
    assert has_changed(first.read)


def test_a_copy_that_was_on_disk_is_the_same(monkeypatch):
    config = module("config", SCALE=3.0)
    monkeypatch.setitem(sys.modules, "config", config)
    loss, _ = defined(SQUARE.format("config.SCALE"), config=config)
    made = freeze(loss.Class.__dict__["value"])
    config.SCALE = 4.0
    back = pickle.loads(dumps(made.function))
    assert back is not made.function and freeze(back).digest == made.digest
    assert back(2.0, 0.0) == 6.0


@pytest.mark.sweep  # `test_an_edited_definition_is_not_stale` runs always
def test_edits_between_processes(tmp_path, python):
    """Kernels on disk are of the definition as it was: another one finds none of them."""
    (tmp_path / "constants.py").write_text("SCALE = 1.0\n")
    (tmp_path / "kinds.py").write_text("import enum\nclass Kind(enum.IntEnum):\n    ONE = 1\n")
    (tmp_path / "helpers.py").write_text(
        "import constants, numba\n@numba.njit\ndef square(d):\n    return constants.SCALE * d * d\n"
    )
    script = (
        "import numpy as np, numbaloss as nl, constants, helpers, kinds\n"
        "@nl.elementwise_loss\n"
        "def loss(input, target):\n"
        "    return constants.SCALE * kinds.Kind.ONE.value * helpers.square(input - target)\n"
        "x, t = np.array([2.0]), np.zeros(1)\n"
        "print(loss(x, t), loss.value_and_grad(x, t)[0], loss.jit(x, t))\n"
    )

    def run():
        return python(script, NUMBA_CACHE_DIR=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1")[0]

    assert run() == "4.0 4.0 4.0"
    (tmp_path / "constants.py").write_text("SCALE = 3.0\n")
    assert run() == run() == "36.0 36.0 36.0"
    (tmp_path / "kinds.py").write_text("import enum\nclass Kind(enum.IntEnum):\n    ONE = 2\n")
    assert run() == "72.0 72.0 72.0"
