"""Threads, forks and pools, on each of Numba's threading layers: right results, to the bit, and no death."""

import importlib.util
import os
import sys
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from numbaloss.loss import registry

from . import Tally, Trial
from .scripts import run

# TBB has rows where it is installed; by pip it lies where the loader does not look.
LIBRARIES = Path(sys.prefix, "lib")
TBB = (LIBRARIES / "libtbb.so.12").exists() or find_library("tbb")
LAYERS = ["omp", "workqueue", *(["tbb"] if TBB else [])]
THREADS = "4"  # more than the cores that many machines have for a test

# With NAMES of losses. `own` is a parallel loop of the user's.
SETUP = """
import itertools, os, sys, threading, traceback, numpy as np, numba, numbaloss as nl
from numbaloss import testing
from numbaloss.loss import registry

def bits(name, given):
    value, gradients = registry[name].value_and_grad(**given)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return [np.asarray(a).tobytes() for a in (value, *gradients)]

@numba.njit(parallel=True)
def own(x):
    total = 0.0
    for i in numba.prange(x.size):
        total += x[i]
    return total

ones = np.ones(100_000)
calls = [
    (name, testing.samples(registry[name], np.random.default_rng(0), shape))
    for name in NAMES
    for shape in ((7, 19), (400, 301))
]
tried, lost = itertools.count(), []

def wrong(k, bits_of_parent=None):
    \"\"\"Call a loss; its name if it is not what one thread finds.\"\"\"
    try:
        next(tried)
        same = bits(*calls[k]) == (bits_of_parent or wanted[k])
        return "" if same else f"{calls[k][0]} is another number"
    except BaseException as error:
        return f"{calls[k][0]} raised {error!r}"

def try_all(where):
    lost.extend(f"{where}: {w}" for w in map(wrong, range(len(calls))) if w)

def tell():
    print("tried", next(tried))
    for line in sorted(set(lost)):
        print("lost", line)
"""

# What one thread finds: of the library's own, as Numba's are not started.
ALONE = """
from numbaloss.kernels.cpu import parallel
count, parallel.count = parallel.count, lambda: 1
wanted = [bits(*call) for call in calls]
parallel.count = count
"""

MANY_THREADS = """
done = threading.Event()

def caller(k):
    for turn in range(ROUNDS * len(calls)):
        w = wrong((turn + k * 5) % len(calls))
        if w:
            lost.append(f"thread {k}: {w}")

def loops():
    while not done.is_set():
        next(tried)
        if own(ones) != ones.size:
            lost.append("the user's own loop is wrong")

threads = [threading.Thread(target=caller, args=(k,)) for k in range(16)]
user = threading.Thread(target=loops)
for thread in (user, *threads): thread.start()
for thread in threads: thread.join()
done.set()
user.join()
assert numba.threading_layer() == LAYER, numba.threading_layer()
tell()
"""

SET_THREADS = """
def caller(k):
    for turn in range(ROUNDS * len(calls)):
        numba.set_num_threads((1, 2, 4)[(turn + k) % 3])
        w = wrong((turn + k) % len(calls))
        if w:
            lost.append(f"thread {k}: {w}")

threads = [threading.Thread(target=caller, args=(k,)) for k in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
tell()
"""

# One caller of the process's threads forks; in children there are only ours to call.
FORKS = """
def fork(where, work=try_all):
    pid = os.fork()
    if pid == 0:
        try:
            lost.clear()
            work(where)
            for line in lost: print(line, file=sys.stderr)
            os._exit(min(len(lost), 100))
        except BaseException:
            traceback.print_exc()
            os._exit(101)
    status = os.waitpid(pid, 0)[1]
    for _ in calls: next(tried)
    if status:
        lost.append(f"{where}: status {status}")

fork("a child before any call")
try_all("the parent")
fork("a child after calls")
assert own(ones) == ones.size
fork("a child after the user's own loop")
fork("a grandchild", lambda where: fork(where))
thread = threading.Thread(target=fork, args=("a child of a thread",))
thread.start()
thread.join()

# While other threads call, and so hold what a child could wait for.
done = threading.Event()
def busy():
    while not done.is_set():
        try_all("a thread beside forks")
threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(FORKED): fork("a child while threads call")
done.set()
for thread in threads: thread.join()
try_all("the parent at the end")
tell()
"""

POOLS = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def pools():
    for method in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context(method)
        with context.Pool(2) as pool:
            yield f"a Pool by {method}", pool.starmap
        with ProcessPoolExecutor(2, context) as pool:
            yield f"an executor by {method}", lambda f, jobs: pool.map(f, *zip(*jobs))

if __name__ == "__main__":
    try_all("the parent")
    assert own(ones) == ones.size
    for where, starmap in pools():
        for w in starmap(wrong, list(enumerate(wanted))):
            next(tried)
            if w: lost.append(f"{where}: {w}")
    try_all("the parent at the end")
    tell()
"""

SENT = """
import importlib, pickle, subprocess

SCALE = 3.0

@nl.elementwise_loss
def scaled(input, target, power=2.0):
    return SCALE * power * (input - target)

def found(loss, n):
    return float(loss(np.ones(n), np.zeros(n), power=5.0))

def arrived(where, numbers):
    for number in numbers:
        next(tried)
        if number != 15: lost.append(f"{where}: {number}")

if __name__ == "__main__":
    assert own(ones) == ones.size
    arrived("here", [found(scaled, n) for n in (3, 300_000)])
    if importlib.util.find_spec("joblib"):
        import joblib
        arrived("joblib", joblib.Parallel(2)(joblib.delayed(found)(scaled, n) for n in (3, 300_000) * 4))
        sent = [(name, testing.samples(registry[name], np.random.default_rng(0))) for name in NAMES]
        jobs = [joblib.delayed(registry[name].value_and_grad)(**given) for name, given in sent]
        got = joblib.Parallel(2)(jobs)
        for (name, given), (value, _) in zip(sent, got):
            next(tried)
            if value != registry[name](**given): lost.append(f"joblib: {name} is another number")
    if importlib.util.find_spec("cloudpickle"):
        import cloudpickle
        sent = cloudpickle.dumps((found, scaled))
        script = "import pickle, sys; found, loss = pickle.load(sys.stdin.buffer);"
        script += "print(found(loss, 3), found(loss, 300_000))"
        got = subprocess.run([sys.executable, "-c", script], input=sent, stdout=subprocess.PIPE, check=True)
        arrived("cloudpickle", map(float, got.stdout.split()))
    tell()
"""

LOADER = """
import torch

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 2 * len(calls)
    def __getitem__(self, k):
        return k % len(calls), wrong(k % len(calls))

def collated(items):
    return [w or wrong(k) for k, w in items]

if __name__ == "__main__":
    assert own(ones) == ones.size
    try_all("the parent")
    for method in ("fork", "spawn"):
        loaded = torch.utils.data.DataLoader(
            Data(), batch_size=3, num_workers=2, collate_fn=collated, multiprocessing_context=method
        )
        for w in itertools.chain.from_iterable(loaded):
            next(tried)
            if w: lost.append(f"a worker by {method}: {w}")
    try_all("the parent at the end")
    tell()
"""

# Each loss in a loop of the user's, row by row of samples that are stacked; the bits are those of a call.
INSIDE = """
for name in NAMES:
    loss = registry[name]
    shape = (12, 3, 7) if name == "ctc_loss" else (7, 19)
    rows = [testing.samples(loss, np.random.default_rng(k), shape) for k in range(COUNT)]
    if issubclass(loss.Class, nl.ElementwiseLoss):  # whose `jit` takes no array among the options
        rows = [{n: row[n] for n in loss.Class._required} for row in rows]
    given = {n: np.stack([row[n] for row in rows]) for n in rows[0]}
    # Of elements `jit` gives the gradient by the first argument alone.
    wrt = loss.Class._required[0] if issubclass(loss.Class, nl.ElementwiseLoss) else loss.Class._default_wrt()
    by = (wrt,) if isinstance(wrt, str) else wrt
    outs = ", ".join(f"g_{n}[i]" for n in by)
    names = [*given, *(f"g_{n}" for n in by)]
    source = f"def loop({', '.join(names)}, values):\\n"
    source += "    for i in prange(values.size):\\n        values[i] = loss("
    source += ", ".join(f"{n}=" * (k >= len(loss.Class._required)) + f"{n}[i]" for k, n in enumerate(given))
    source += f", out={outs if len(by) == 1 else f'({outs})'})\\n"
    scope = {"prange": numba.prange, "loss": loss.jit}
    exec(source, scope)
    try:
        values, gradients = np.empty(COUNT), [np.empty_like(given[n]) for n in by]
        numba.njit(parallel=True)(scope["loop"])(*given.values(), *gradients, values)
        for k, row in enumerate(rows):
            value, wanted = loss.value_and_grad(**row, wrt=wrt)
            next(tried)
            same = values[k] == value
            for g, w in zip(gradients, (wanted,) if isinstance(wrt, str) else wanted):
                # SciPy's BLAS in compiled code may round in another order than NumPy's.
                exact = name != "linear_cross_entropy"
                same &= (g[k] == w).all() if exact else np.allclose(g[k], w, rtol=1e-13, atol=1e-13)
            if not (same or not exact and abs(values[k] - value) < 1e-13 * abs(value)):
                lost.append(f"{name}: row {k} is another number")
    except BaseException as error:
        lost.append(f"{name} raised {error!r}"[:500])
tell()
"""


def losses(share: float) -> list[str]:
    """So many of all losses, of families that differ."""
    names = list(registry)
    return names[:: max(1, round(1 / share))] if share < 1 else names


def on(layer: str, script: str, **numbers: float) -> Callable[[float], Tally]:
    """Run a script on one of Numba's threading layers; `numbers` are what the whole of it takes."""

    def run_on(share: float) -> Tally:
        given = {n: max(1, round(v * share)) for n, v in numbers.items()}
        first = "\n".join(
            f"{n} = {v!r}" for n, v in {"NAMES": losses(share), "LAYER": layer, **given}.items()
        )
        environment: dict[str, Any] = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": THREADS}
        if layer == "tbb":
            search = str(LIBRARIES), os.environ.get("LD_LIBRARY_PATH", "")
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(search).rstrip(os.pathsep)
        return run(first + SETUP + script, 600, **environment).tally(layer)

    return run_on


def with_module(name: str, trial: Callable[[float], Tally]) -> Callable[[float], Tally]:
    """A trial that tries nothing where a module is not installed."""
    return trial if importlib.util.find_spec(name) else lambda share: Tally()


LOCKED = "" if getattr(sys, "_is_gil_enabled", lambda: True)() else ", without a GIL"

TRIALS = [
    trial
    for layer in LAYERS
    for trial in (
        Trial(
            f"16 threads and a loop of the user's, {layer}{LOCKED}",
            on(layer, ALONE + MANY_THREADS, ROUNDS=40),
        ),
        Trial(
            f"set_num_threads between calls of six threads, {layer}",
            on(layer, ALONE + SET_THREADS, ROUNDS=40),
        ),
        Trial(f"os.fork, {layer}", on(layer, ALONE + FORKS, FORKED=40)),
        Trial(f"pools by fork, spawn and forkserver, {layer}", on(layer, ALONE + POOLS)),
        Trial(f"joblib and cloudpickle, {layer}", on(layer, ALONE + SENT)),
        Trial(f"PyTorch's DataLoader, {layer}", with_module("torch", on(layer, ALONE + LOADER))),
        Trial(f"inside prange, {layer}", on(layer, INSIDE, COUNT=24)),
    )
]
