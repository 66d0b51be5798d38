"""What only shows in a process of its own: threads, forks, caches, imports, memory."""

import pytest

SETUP = """
import os, threading, numpy as np, numba, numbaloss as nl
n = 300_001
rng = np.random.default_rng(0)
x, t = rng.normal(size=(2, n)).astype(np.float32)
wanted = np.where(abs(x - t) <= 1, x - t, np.sign(x - t)).astype(np.float32)

def right():
    value, gradient = nl.huber_loss.value_and_grad(x, t, reduction="sum")
    r = abs(x.astype(float) - t)
    return (gradient == wanted).all() and abs(value / np.where(r <= 1, r * r / 2, r - 0.5).sum() - 1) < 1e-6

assert right()
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Kernels that the scripts of this file share."""
    return str(tmp_path_factory.mktemp("cache"))


def test_a_forked_child_gets_right_results(python, cache):
    script = """
pid = os.fork()
if pid == 0:
    os._exit(0 if right() else 3)
assert os.waitpid(pid, 0)[1] == 0
assert right()

import multiprocessing
if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(lambda_free, range(4)) == [True] * 4
"""
    script = "def lambda_free(_):\n    return bool(right())\n" + SETUP + script
    python(script, NUMBA_CACHE_DIR=cache)


def test_sixteen_threads_get_right_results(python, cache):
    script = """
results = []
threads = [threading.Thread(target=lambda: results.extend(right() for _ in range(40))) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(results) == 640 and all(results)
"""
    python(SETUP + script, NUMBA_CACHE_DIR=cache)


def test_numbas_threads_are_not_started(python, cache):
    """They would spin after each parallel loop."""
    script = """
from numba.np.ufunc import parallel
assert not parallel._is_initialized
numba.set_num_threads(1)
assert right()
"""
    python(SETUP + script, NUMBA_CACHE_DIR=cache)


def test_each_task_is_done_once(python, cache):
    """More helpers than cores, callers that meet in the pool, jobs of few tasks and many, pauses between."""
    script = """
import threading, time
from numba import types
from numbaloss.kernels.cpu import parallel
from numbaloss.kernels.cpu.native import add_atomic, compile_function

def count_one(context, k):
    add_atomic(context + 8 * k, 1)
    return 0

task = compile_function(count_one, {}, "count", "count", parallel.TASK)
record = parallel.record_of(7)
assert record[2] == 7
fork = parallel.compile_function(parallel.fork, {}, "pool", "pool", parallel.FORK_BY_RECORD)
from ctypes import CFUNCTYPE, c_int64
fork = CFUNCTYPE(*[c_int64] * 5)(fork)  # which lets other Python threads run

def jobs(seed):
    rng = np.random.default_rng(seed)
    for _ in range(3000):
        counts = np.zeros(rng.integers(1, 40), np.int64)
        fork(record.ctypes.data, task, counts.ctypes.data, counts.size)
        assert (counts == 1).all(), counts
        if rng.random() < 0.02:
            time.sleep(rng.random() * 2e-3)
    done.append(seed)

done = []
callers = [threading.Thread(target=jobs, args=(seed,)) for seed in range(3)]
for caller in callers: caller.start()
for caller in callers: caller.join()
assert sorted(done) == [0, 1, 2]
"""
    python(SETUP + script, NUMBA_NUM_THREADS="8", NUMBA_CACHE_DIR=cache)


def test_a_process_ends_while_threads_compute(python, cache):
    script = """
def forever():
    while True:
        right()

threading.Thread(target=forever, daemon=True).start()
import time
time.sleep(0.2)
"""
    after = "import atexit\natexit.register(lambda: print(right()))\n"  # when the helpers have gone
    assert python(after + SETUP + script, NUMBA_CACHE_DIR=cache)[-1] == "True"


def test_the_same_bits_for_any_number_of_threads(python, cache):
    script = """
def digest():
    parts = [*nl.huber_loss.value_and_grad(x, t), nl.kl_div(x, abs(t)), nl.mse_loss(x[::2], t[::2])]
    parts += nl.mse_loss.value_and_grad(x, t, sample_weight=abs(t))
    return repr([np.asarray(p).tobytes() for p in parts])

found = set()
for threads in (1, 2, 8):
    numba.set_num_threads(threads)
    found.add(digest())
assert len(found) == 1
"""
    python(SETUP + script, NUMBA_NUM_THREADS="8", NUMBA_CACHE_DIR=cache)


COUNT = """
from numba.core import event
compiled = []

class Count(event.Listener):
    def on_start(self, e): compiled.append(str(e.data["dispatcher"]) if "dispatcher" in e.data else "?")
    def on_end(self, e): pass

event.register("numba:compile", Count())
"""


def test_a_second_process_compiles_nothing(python, tmp_path):
    script = (
        COUNT
        + SETUP
        + """
nl.mse_loss.value_and_grad(x[::2], t[::2], sample_weight=abs(t[::2]))
print(len(compiled))
"""
    )
    first = int(python(script, NUMBA_CACHE_DIR=str(tmp_path / "cache"))[-1])
    second = int(python(script, NUMBA_CACHE_DIR=str(tmp_path / "cache"))[-1])
    assert first > 0 and second == 0


@pytest.mark.more
def test_an_edited_definition_is_not_stale(python, tmp_path):
    script = """
import numpy as np, numbaloss as nl
SCALE = {scale}

@nl.elementwise_loss
def scaled(input, target, power={power}):
    return {factor} * SCALE * (input - target) * power

print(float(scaled(np.ones(4), np.zeros(4))))
"""
    cache = str(tmp_path / "cache")
    for scale, factor, power in ((1.0, 2.0, 1.0), (3.0, 2.0, 1.0), (3.0, 5.0, 1.0), (3.0, 5.0, 7.0)):
        lines = python(script.format(scale=scale, factor=factor, power=power), NUMBA_CACHE_DIR=cache)
        assert float(lines[-1]) == scale * factor * power


@pytest.mark.more
def test_a_definition_that_moved_to_another_module_loads_from_the_cache(python, tmp_path):
    script = """
import sys, types
source = '''
import numbaloss as nl
@nl.elementwise_loss
def gap(input, target):
    return (input - target) * 2
'''
module = types.ModuleType("{name}")
sys.modules["{name}"] = module
exec(source, module.__dict__)
import numpy as np
assert module.gap(np.ones(4), np.zeros(4)) == 2
"""
    for name in ("first_home", "second_home"):
        python(script.format(name=name), NUMBA_CACHE_DIR=str(tmp_path / "cache"))


def test_in_place_allocates_no_array(python, cache):
    script = """
import tracemalloc
nl.huber_loss.value_and_grad(x, t, out=x)
tracemalloc.start()
nl.huber_loss.value_and_grad(x, t, out=x)
assert tracemalloc.get_traced_memory()[1] < 20_000
"""
    python(SETUP + script, NUMBA_CACHE_DIR=cache)


def test_importing_touches_no_gpu_and_no_framework(python):
    script = """
import sys, numbaloss
loaded = {m.split(".")[0] for m in sys.modules} & {"torch", "cupy", "jax", "sklearn", "ml_dtypes", "pytest"}
assert not loaded, loaded
assert "numba.cuda" not in sys.modules
"""
    python(script)


def test_a_bad_definition_kills_nothing(python, cache):
    script = """
class Device:
    __cuda_array_interface__ = {}

for bad, error in ((Device(), "CUDA device"), (object(), "NumPy or CuPy array"), (None, "must be an array")):
    try:
        nl.mse_loss(bad, t)
    except (TypeError, ImportError) as e:  # the latter without numba-cuda
        assert error in str(e), e
    else:
        raise AssertionError
"""
    python(SETUP + script, NUMBA_CACHE_DIR=cache)


@pytest.mark.sweep
def test_a_fork_while_a_thread_compiles(python, tmp_path):
    """The child compiles too; it would wait for a lock that a thread of its parent held."""
    script = """
import os, threading, time, numpy as np, numbaloss as nl
x, labels = np.eye(3), np.arange(3)
compiling = threading.Thread(target=lambda: nl.cross_entropy(x, labels))
compiling.start()
children = []
while compiling.is_alive():
    time.sleep(0.2)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if nl.huber_loss(x, x + 1) == 0.5 else 3)
    children.append(pid)
until = time.monotonic() + 90
for pid in children:
    done, status = os.waitpid(pid, os.WNOHANG)
    while not done and time.monotonic() < until:
        time.sleep(0.05)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, 9)
    assert done and status == 0
assert children
"""
    python(script, NUMBA_CACHE_DIR=str(tmp_path / "cache"))


def test_a_child_forked_before_has_threads_of_its_own(python, cache):
    script = """
import os, numba, numpy as np, numbaloss as nl
from numbaloss.kernels.cpu import parallel
x = np.ones(1_000_000, np.float32)
assert nl.mse_loss(x[:10], x[:10]) == 0 and parallel._pool is None
for generation in range(2):
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
        break
    # The first child starts helpers; a child of its own does without.
    assert nl.mse_loss(x, 0 * x) == 1
    assert parallel._pool is not None
    assert parallel.count() == (numba.config.NUMBA_NUM_THREADS, 1)[generation]
else:
    os._exit(0)
os._exit(0)
"""
    python(script, NUMBA_CACHE_DIR=cache)


def test_without_a_compiler(python):
    script = """
import numpy as np, numbaloss as nl
for _ in range(2):
    try:
        nl.mse_loss(np.ones(3), np.zeros(3))
    except RuntimeError as error:
        print(error)
"""
    said = python(script, NUMBA_DISABLE_JIT="1")
    assert len(said) == 2 and all("NUMBA_DISABLE_JIT=1 lets Numba compile none" in line for line in said)
