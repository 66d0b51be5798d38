"""What bare Numba dies of and this library does not: each fault has a script without it, and one with it."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import Tally, Trial
from .scripts import COUNT, FULL_DISK, Outcome, installation, lock, nowhere, rewrite, run

# A user's module with a function that is kept on disk, and the same as a loss.
BARE = """
import numpy as np
from numba import njit, prange
@njit(cache=True)
def squares(x, t):
    total = 0.0
    for i in range(x.size):
        total += (x[i] - t[i]) ** 2
    return total / x.size
"""
OURS = """
import numpy as np, numbaloss as nl
@nl.elementwise_loss
def squares(input, target):
    return (input - target) ** 2
"""
CALL = """
import numpy as np, {module} as user
assert user.squares(np.full(3, 2.0), np.zeros(3)) == {wanted}
print("tried 1")
"""
ALONE: dict[str, Any] = {"PYTHONDONTWRITEBYTECODE": "1"}

# A loss, or loop, of the user on all threads.
PARALLEL = """
import os, signal, threading, time, numpy as np, numba
from numba import njit, prange
x = np.ones(1_000_000)
"""
BARE_PARALLEL = (
    PARALLEL
    + """
@njit(parallel=True)
def right():
    total = 0.0
    for i in prange(x.size):
        total += x[i] * x[i]
    return total == x.size
"""
)
OURS_PARALLEL = (
    PARALLEL
    + """
import numbaloss as nl
def right():
    return nl.mse_loss.value_and_grad(x, 0 * x)[0] == 1
"""
)
FORK = """
assert right()
pid = os.fork()
if pid == 0:
    os._exit(0 if right() else 3)
assert os.waitpid(pid, 0)[1] == 0
print("tried 1")
"""
TWO_THREADS = """
assert right()
found = []
threads = [threading.Thread(target=lambda: found.extend(right() for _ in range(200))) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 400 and all(found)
print("tried 1")
"""
# The child compiles what its parent does not.
COMPILING = """
def until_done(pid):
    until = time.monotonic() + 20
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "it hangs"

compiling = threading.Thread(target=first)
compiling.start()
time.sleep(0.3)
pid = os.fork()
if pid == 0:
    os._exit(0 if second() == 6 else 3)
status = until_done(pid)
compiling.join()
assert status == 0, status
print("tried 1")
"""
BARE_COMPILING = """
import os, signal, threading, time, numpy as np
from numba import njit
first = lambda: njit(lambda a: np.linalg.svd(a)[1].sum())(np.eye(3))
second = lambda: njit(lambda x: x.sum())(np.ones(6))
"""
OURS_COMPILING = """
import os, signal, threading, time, numpy as np, numbaloss as nl
first = lambda: nl.cross_entropy(np.eye(3), np.arange(3))
second = lambda: nl.mse_loss(np.ones(6), np.zeros(6), reduction="sum")
"""
# Of a function that makes functions, with a compiled one in a closure.
BARE_FACTORY = """
from numba import njit
import numpy as np
def made(power):
    @njit
    def inner(d):
        return d**power
    @njit(cache=True)
    def squares(x, t):
        total = 0.0
        for i in range(x.size):
            total += inner(x[i] - t[i])
        return total / x.size
    return squares
squares = made(2)
"""
OURS_FACTORY = """
from numba import njit
import numpy as np, numbaloss as nl
def made(power):
    @njit
    def inner(d):
        return d**power
    @nl.elementwise_loss
    def squares(input, target):
        return inner(input - target)
    return squares
squares = made(2)
"""
NONE_COMPILED = 'assert not compiled, f"{len(compiled)} functions were compiled anew"\n'
BARE_HELPER = BARE.replace("(x[i] - t[i]) ** 2", "constants.SCALE * (x[i] - t[i]) ** 2")
OURS_HELPER = OURS.replace("(input - target) ** 2", "constants.SCALE * (input - target) ** 2")


def pair(bare: Outcome, ours: Outcome, what: str) -> Tally:
    """Count a pair: it is lost where ours fails, and told where bare Numba does not."""
    if not bare.fault:
        print(f"{what}: bare Numba goes on here")
    return Tally(1, ours.tally(what).lost)


def both(what: str, run_one: Callable[[bool], Outcome]) -> Trial:
    """A fault in a row of the table; `run_one` runs bare Numba's script or ours."""
    return Trial(f"{what}: bare, ours", lambda share: pair(run_one(False), run_one(True), what))


def scripts(what: str, bare: str, ours: str, **environment: Any) -> Trial:
    return both(what, lambda mine: run(ours if mine else bare, 120, **environment))


def on_disk(
    what: str,
    change: Callable[[Path, Path], None],
    bare: str = BARE,
    ours: str = OURS,
    wanted: int = 4,
    before: str = "",
    after: str = "",
) -> Trial:
    """A module is used by two processes; a change of its files or of the cache is between them."""

    def run_one(mine: bool) -> Outcome:
        with TemporaryDirectory() as made:
            place, cache = Path(made, "place"), Path(made, "cache")
            place.mkdir()
            cache.mkdir()
            for name, text in {
                "constants": "SCALE = 1.0\n",
                "bare_user": "import constants" + bare,
                "our_user": "import constants" + ours,
            }.items():
                rewrite(place / f"{name}.py", text)
            module = "our_user" if mine else "bare_user"
            first = run(
                CALL.format(module=module, wanted=4), place=place, NUMBA_CACHE_DIR=str(cache), **ALONE
            )
            if first.fault:
                return first
            change(place, cache)
            script = before + CALL.format(module=module, wanted=wanted) + after
            return run(script, place=place, NUMBA_CACHE_DIR=str(cache), **ALONE)

    return both(what, run_one)


def damage(ending: str, spoil: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def change(place: Path, cache: Path) -> None:
        for path in cache.rglob(f"*{ending}"):
            path.write_bytes(spoil(path.read_bytes()))

    return change


def empty(place: Path, cache: Path) -> None:
    for path in cache.rglob("*.nb?"):
        path.unlink()


def edit_constant(place: Path, cache: Path) -> None:
    rewrite(place / "constants.py", "SCALE = 5.0\n")


def nowhere_to_write(mine: bool) -> Outcome:
    with installation() as place:
        (place / "user.py").write_text(OURS if mine else BARE)
        lock(place)
        return run(nowhere(place, CALL.format(module="user", wanted=4)), **ALONE)


def fork_while_compiling(mine: bool) -> Outcome:
    with TemporaryDirectory() as cache:
        return run((OURS_COMPILING if mine else BARE_COMPILING) + COMPILING, NUMBA_CACHE_DIR=cache)


TRIALS = [
    both("nowhere to write", nowhere_to_write),
    on_disk(
        "a factory's function, next process",
        lambda place, cache: None,
        BARE_FACTORY,
        OURS_FACTORY,
        after=NONE_COMPILED,
        before=COUNT,
    ),
    on_disk("an imported constant edited", edit_constant, BARE_HELPER, OURS_HELPER, wanted=20),
    on_disk("a truncated index", damage(".nbi", lambda data: data[: len(data) // 2])),
    on_disk("an index of garbage", damage(".nbi", lambda data: b"garbage" * 50)),
    on_disk("truncated code", damage(".nbc", lambda data: data[: len(data) // 2])),
    on_disk("code of garbage", damage(".nbc", lambda data: b"garbage" * 500)),
    on_disk("a full disk", empty, before=FULL_DISK),
    scripts(
        "a fork after OpenMP's loop", BARE_PARALLEL + FORK, OURS_PARALLEL + FORK, NUMBA_THREADING_LAYER="omp"
    ),
    scripts(
        "two threads on workqueue",
        BARE_PARALLEL + TWO_THREADS,
        OURS_PARALLEL + TWO_THREADS,
        NUMBA_THREADING_LAYER="workqueue",
    ),
    both("a fork while a thread compiles", fork_while_compiling),
]
