"""What the tests share: losses by name, PyTorch where it is installed, a place of one's own for caches."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from sweeps import apart, sweep

from numbaloss import testing
from numbaloss.families.elementwise import ElementwiseLoss
from numbaloss.kernels.math import multiply_add
from numbaloss.loss import registry

ELEMENTWISE = [name for name, loss in registry.items() if issubclass(loss.Class, ElementwiseLoss)]


# Those that differ from others in little: their tests run in the sweep.
ALIKE = ("l1_loss", "smooth_l1_loss", "soft_margin_loss", "hinge_embedding_loss")
KEPT = [n for n in ELEMENTWISE if n not in ALIKE and not apart(registry[n])]


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run each N-th case")
    parser.addoption(
        "--start", type=int, default=0, metavar="K", help="with --every: begin with the K-th case"
    )
    parser.addoption("--screenshots", metavar="FOLDER", help="keep pictures of the site's pages")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    mark_more(items)
    yield  # `-m` selects
    every, start = config.getoption("every"), config.getoption("start")
    if every > 1:
        kept = items[start::every]
        config.hook.pytest_deselected(items=[i for k, i in enumerate(items) if (k - start) % every])
        items[:] = kept


def mark_more(items):
    """Mark as `more` most cases of a test that is `thin`, and every other test that executes PTX."""
    seen: Counter[str] = Counter()
    tests: dict[str, int] = {}
    for item in items:
        executes = item.path.parent.name == "cuda" and item.path.name != "test_gpu.py"  # which has a GPU
        if executes and tests.setdefault(item.nodeid.partition("[")[0], len(tests)) % 2:
            item.add_marker(pytest.mark.more)
        thin = item.get_closest_marker("thin")
        if thin and not item.get_closest_marker("sweep"):
            test = item.nodeid.partition("[")[0]
            if seen[test] % thin.args[0]:
                item.add_marker(pytest.mark.more)
            seen[test] += 1


@pytest.fixture(params=sweep(ELEMENTWISE, *KEPT))
def loss(request):
    """Each elementwise loss of the registry in turn."""
    return registry[request.param]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch")


@njit
def _product_and_sum(a, b, c):
    return multiply_add(a, b, c)


@pytest.fixture(scope="session")
def fused():
    """Whether the processor that is compiled for rounds a product and a sum once."""
    return _product_and_sum(1 + 2.0**-30, 1 - 2.0**-30, -1.0) != 0


@pytest.fixture(scope="session")
def bfloat16():
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


@pytest.fixture
def case(loss, rng):
    """A loss with its default options, and float64 samples."""
    return testing.Case(loss, next(testing.combinations(loss)), testing.samples(loss, rng))


@pytest.fixture
def python(tmp_path):
    """Run a script in a fresh interpreter; its output's lines, or its error in the assertion."""

    def run(script, **environment):
        path = tmp_path / "script.py"
        path.write_text(script)
        root = str(Path(__file__).parent.parent)
        search = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        done = subprocess.run(
            [sys.executable, str(path)],
            env={**os.environ, "PYTHONPATH": search, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout.splitlines()

    return run
