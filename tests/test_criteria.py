"""Criteria are Python objects: options can be set; copies, pickles and other processes keep everything."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context

import numpy as np
import pytest

import numbaloss as nl
from numbaloss.loss import registry

X, T = np.array([0.0, 1.0, 3.0]), np.zeros(3)


class Scaled(nl.HuberLoss):
    """A subclass with a constructor of its own, and attributes."""

    def __init__(self, name, *, scale=1.0, **options):
        super().__init__(**options)
        self.name, self.scale = name, scale

    def __call__(self, *args, **kwargs):
        return self.scale * super().__call__(*args, **kwargs)


class Steep(nl.HuberLoss):
    delta = 0.5


@nl.elementwise_loss
def cubes(input, target, by=2.0):
    return by * abs(input - target) ** 3


class Fourth(nl.ElementwiseLoss):
    by: float = 1.0

    def value(input, target, by):
        return by * (input - target) ** 4


@pytest.mark.more
def test_options_that_are_set_are_used():
    criterion = nl.HuberLoss()
    assert criterion(X, T) == 1.0
    criterion.delta, criterion.reduction = 2.0, "none"
    np.testing.assert_array_equal(criterion(X, T), nl.huber_loss(X, T, delta=2.0, reduction="none"))
    assert repr(criterion) == "HuberLoss(reduction='none', delta=2.0)"
    assert (criterion.delta, criterion.reduction) == (2.0, "none")
    entropy = nl.CrossEntropyLoss()
    entropy.weight = np.array([1.0, 3.0])
    scores, labels = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([0, 1])
    assert entropy(scores, labels) == nl.cross_entropy(scores, labels, weight=entropy.weight)
    entropy.weight = None
    assert entropy(scores, labels) == nl.cross_entropy(scores, labels)
    linear = nl.LinearCrossEntropyLoss(4, 3, rng=0)
    linear.label_smoothing = 0.2
    x = np.ones((2, 4), np.float32)
    wanted = nl.linear_cross_entropy(x, linear.linear_weight, labels, label_smoothing=0.2)
    assert linear(x, labels) == wanted


def test_options_that_are_set_are_checked():
    criterion = nl.HuberLoss(delta=2.0)
    for name, value, error in (
        ("delta", -1.0, ValueError),
        ("delta", "1", TypeError),
        ("reduction", "x", ValueError),
    ):
        with pytest.raises(error, match=rf"HuberLoss: {name} must"):
            setattr(criterion, name, value)
    assert repr(criterion) == "HuberLoss(reduction='mean', delta=2.0)"
    criterion.note = "anything"
    assert criterion.note == "anything"

    class Early(nl.HuberLoss):
        def __init__(self):
            self.delta = 3.0

    with pytest.raises(AttributeError, match=r"super\(\).__init__"):
        Early()


def test_another_default():
    assert Steep()(X, T) == nl.huber_loss(X, T, delta=0.5) == Steep.function(X, T)
    assert Steep(delta=2.0).delta == 2.0 and nl.HuberLoss().delta == 1.0
    with pytest.raises(ValueError, match="delta must be > 0"):
        type("Wrong", (nl.HuberLoss,), {"delta": -1.0})


WAYS = [copy.copy, copy.deepcopy, *[lambda x, p=p: pickle.loads(pickle.dumps(x, p)) for p in range(2, 6)]]


@pytest.mark.parametrize("way", WAYS)
def test_copies_keep_everything(way):
    criterion = Scaled("mine", scale=3.0, delta=0.5)
    criterion.delta, criterion.history = 2.0, [1, 2]
    other = way(criterion)
    assert type(other) is Scaled and repr(other) == repr(criterion)
    assert (other.name, other.scale, other.history) == ("mine", 3.0, [1, 2])
    assert other(X, T) == criterion(X, T)
    other.delta = 1.0
    assert criterion.delta == 2.0 and other(X, T) == 3.0
    weighted = way(nl.CrossEntropyLoss(weight=np.array([1.0, 2.0])))
    np.testing.assert_array_equal(weighted.weight, [1.0, 2.0])
    linear = nl.LinearCrossEntropyLoss(4, 3, rng=0)
    np.testing.assert_array_equal(way(linear).linear_weight, linear.linear_weight)
    own = way(cubes.Class(by=4.0))
    assert own.by == 4.0 and own(X, T) == cubes(X, T, by=4.0)
    for loss in (*registry.values(), cubes, Fourth.function):
        assert way(loss) is loss and way(loss.Class) is loss.Class


DEFINITIONS = """
import sys
import numpy as np
import numbaloss as nl
from numba import njit

SCALE = 3.0

@njit
def helper(d):
    return SCALE * d * d

@nl.elementwise_loss
def own(input, target, by=1.0):
    return by * helper(input - target)

class Cubes(nl.ElementwiseLoss):
    by: float = 2.0
    def value(input, target, by):
        return by * abs(input - target) ** 3
    def __init__(self, note, **options):
        super().__init__(**options)
        self.note = note

@nl.score_loss
def entropy(cross_entropy, times=2.0):
    return times * cross_entropy

def total(x, y):
    return (x - y) ** 2
def root(s):
    return nl.math.sqrt(1 + s)
apart = nl.vector_loss(total, root, name="apart")

X, T = np.array([0.0, 1.0, 3.0]), np.zeros(3)
V = np.array([[1.0, 2.0], [3.0, 5.0]])
LOSSES = [own, own.Class(by=2.0), Cubes("here"), Cubes.function, entropy, apart, apart.Class(reduction="sum")]

def arguments(loss):
    if loss is entropy or getattr(loss, "__name__", "") == "entropy":
        return V, np.array([0, 1])
    named = getattr(loss, "__name__", type(loss).__name__)
    return (V, V[::-1].copy()) if named in ("apart", "Apart") else (X, T)

def both(loss, given):
    return loss(*given), loss.value_and_grad(*given)

def same(found, loss):
    value, (again, gradient) = found
    wanted = loss.value_and_grad(*arguments(loss))
    return value == again == wanted[0] and np.array_equal(gradient, wanted[1])
"""


def run(tmp_path, script):
    """Run definitions of `__main__` and a script after them."""
    path = tmp_path / "main.py"
    path.write_text(DEFINITIONS + script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.more
def test_cloudpickle_takes_definitions_of_main(tmp_path):
    """Into a process that has never seen them, as Dask does."""
    other = tmp_path / "other.py"
    other.write_text(
        "import sys, cloudpickle, pickle\nimport numpy as np\n"
        "for loss, given, both in pickle.load(open(sys.argv[1], 'rb')):\n"
        "    first, name = both(loss, given), getattr(loss, 'note', '')\n"
        "    print(repr(float(first[0])), repr(np.asarray(first[1][1]).tolist()), name)\n"
        "    again = pickle.loads(cloudpickle.dumps(loss))\n"
        "    assert both(again, given)[0] == first[0]\n"
    )
    script = f"""
import cloudpickle, subprocess
path = {str(tmp_path / "losses.pickle")!r}
with open(path, "wb") as file:
    cloudpickle.dump([(loss, arguments(loss), both) for loss in LOSSES], file)
ran = subprocess.run([sys.executable, {str(other)!r}, path], capture_output=True, text=True)
assert not ran.returncode, ran.stderr
for line, loss in zip(ran.stdout.splitlines(), LOSSES, strict=True):
    value, gradient = loss.value_and_grad(*arguments(loss))
    numbers = f"{{float(value)!r}} {{np.asarray(gradient).tolist()!r}}"
    assert line == f"{{numbers}} {{getattr(loss, 'note', '')}}", line
print("right")
"""
    assert run(tmp_path, script) == ["right"]


@pytest.mark.sweep
def test_joblib_takes_definitions_of_main(tmp_path):
    script = """
import joblib
if __name__ == "__main__":
    jobs = [joblib.delayed(both)(loss, arguments(loss)) for loss in LOSSES]
    found = joblib.Parallel(n_jobs=2)(jobs)
    assert all(same(f, loss) for f, loss in zip(found, LOSSES, strict=True))
    print("right")
"""
    assert run(tmp_path, script) == ["right"]


@pytest.mark.parametrize("method", get_all_start_methods())
@pytest.mark.more
def test_processes_take_definitions_of_main(tmp_path, method):
    script = f"""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context({method!r})) as pool:
        found = list(pool.map(both, LOSSES, map(arguments, LOSSES)))
    assert all(same(f, loss) for f, loss in zip(found, LOSSES, strict=True))
    print("right")
"""
    assert run(tmp_path, script) == ["right"]


def called(criterion):
    return criterion(X, T)


def test_criteria_of_modules_reach_a_pool():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert list(pool.map(called, [Scaled("mine", scale=2.0), cubes, Fourth()])) == [
            2.0,
            cubes(X, T),
            Fourth()(X, T),
        ]
