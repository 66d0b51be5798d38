"""Kernels on disk: processes at once on a cache in any state, versions side by side, edits of anything."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import copytree, rmtree
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from . import Tally, Trial
from .scripts import FULL_DISK, Outcome, installation, nowhere, rewrite, run

# Each loss of NAMES against the reference; all bits, to compare with other processes'.
CALLS = """
import hashlib, warnings, numpy as np
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "numbaloss cannot keep", RuntimeWarning)
import numbaloss as nl
from numbaloss import reference, testing
from numbaloss.loss import registry
digest = hashlib.sha256()
for name in NAMES:
    given = testing.samples(registry[name], np.random.default_rng(0))
    wanted = getattr(reference, name)(**given)
    value, gradients = registry[name].value_and_grad(**given)
    if not np.allclose(value, wanted, rtol=1e-9) or registry[name](**given) != value:
        print("lost", name, value, "in place of", wanted)
    for array in (value, *(gradients if isinstance(gradients, tuple) else (gradients,))):
        digest.update(np.asarray(array).tobytes())
print("bits", digest.hexdigest())
print("tried", 2 * len(NAMES))
"""
NAMES = ["huber_loss", "cross_entropy", "triplet_margin_loss", "ctc_loss"]


def part(share: float, whole: int, least: int = 1) -> int:
    """How many of so many to do."""
    return max(least, round(share * whole))


def calls(share: float) -> str:
    """The script of a process."""
    return f"NAMES = {NAMES[: part(share, len(NAMES))]!r}\n{CALLS}"


def together(count: int, script: str, cache: Path, **environment: Any) -> list[Outcome]:
    """Run a script in processes at the same time."""
    with ThreadPoolExecutor(count) as pool:
        made = [pool.submit(run, script, NUMBA_CACHE_DIR=str(cache), **environment) for _ in range(count)]
        return [m.result() for m in made]


def agreed(outcomes: list[Outcome], what: str) -> Tally:
    """Count what processes told, that have to find the same bits."""
    tally = Tally()
    for outcome in outcomes:
        tally += outcome.tally(what)
    found = {line for outcome in outcomes for line in outcome.lines if line.startswith("bits ")}
    return tally if len(found) == 1 else Tally(tally.tried, [*tally.lost, f"{what}: the bits differ"])


def spoiled(damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A state of a cache in which each file was damaged."""

    def spoil(cache: Path) -> None:
        for path in cache.rglob("*.nb?"):
            path.write_bytes(damage(path.read_bytes()))

    return spoil


def garbage(data: bytes) -> bytes:
    return np.random.default_rng(len(data)).bytes(len(data))


def a_file(cache: Path) -> None:
    """A file where the folder should be."""
    rmtree(cache)
    cache.write_text("")


STATES = {
    "empty": lambda cache: rmtree(cache),
    "truncated": spoiled(lambda data: data[: len(data) // 2]),
    "of garbage": spoiled(garbage),
    "of empty files": spoiled(lambda data: b""),
    "that is a file": a_file,
}


@contextmanager
def filled(script: str) -> Iterator[tuple[Path, Outcome]]:
    """A cache that one process has filled, and what that told."""
    with TemporaryDirectory() as made:
        cache = Path(made, "cache")
        cache.mkdir()
        yield cache, run(script, NUMBA_CACHE_DIR=str(cache))


def in_a_state(state: str) -> Callable[[float], Tally]:
    def start_together(share: float) -> Tally:
        script = calls(share)
        with filled(script) as (cache, first):
            STATES[state](cache)
            outcomes = together(part(share, 8, 2), script, cache)
            return agreed([first, *outcomes, run(script, NUMBA_CACHE_DIR=str(cache))], f"a cache {state}")

    return start_together


def full(share: float) -> Tally:
    """Files that cannot be opened, and files that end after some bytes."""
    script = calls(share)
    short = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
    with filled(script) as (cache, first):
        rmtree(cache)
        count = part(share, 8, 2)
        outcomes = together(count, FULL_DISK + script, cache) + together(count, short + script, cache)
        return agreed([first, *outcomes, run(script, NUMBA_CACHE_DIR=str(cache))], "a full disk")


def read_only(share: float) -> Tally:
    script = calls(share)
    with filled(script) as (cache, first), installation(read_only=True) as place:
        outcomes = together(part(share, 8, 2), nowhere(place, script), cache, PYTHONDONTWRITEBYTECODE="1")
        return agreed([first, *outcomes], "nowhere to write")


def removed_meanwhile(share: float) -> Tally:
    script = calls(share)
    with filled(script) as (cache, first):
        done = threading.Event()

        def remove() -> None:
            while not done.wait(0.05):
                rmtree(cache, ignore_errors=True)

        remover = threading.Thread(target=remove)
        remover.start()
        outcomes = together(part(share, 8, 2), script, cache)
        done.set()
        remover.join()
        return agreed([first, *outcomes], "a cache that is removed meanwhile")


def killed(share: float) -> Tally:
    """Processes that die while they write: those after them find what they left."""
    script = calls(share)
    with filled(script) as (cache, first):
        rmtree(cache)
        outcomes = [first]
        for turn in range(part(share, 6)):
            after = 1 + turn / 2 + np.random.default_rng(turn).random()
            end = f"import os, threading\nthreading.Timer({after}, os.kill, (os.getpid(), 9)).start()\n"
            together(3, end + script + "os._exit(0)\n", cache)
            outcomes.append(run(script, NUMBA_CACHE_DIR=str(cache)))
        return agreed(outcomes, "a cache whose writers were killed")


# ---- versions ----------------------------------------------------------------------------------------------

VERSION = """
import numpy as np, numbaloss as nl
assert nl.__file__.startswith(PLACE), nl.__file__
x, zero = np.array([0.5, 4.0]), np.zeros(2)
value, gradient = nl.huber_loss.value_and_grad(x, zero, reduction="sum")
ranking = nl.margin_ranking_loss(x, zero, zero + 1, margin=1.0, reduction="none")
found = [float(value), *gradient.tolist(), *ranking.tolist()]
if found != WANTED:
    print("lost", found, "in place of", WANTED)
print("tried 2")
"""
# What is edited, and what the script finds then: of a definition, of the derivatives' mathematics.
VERSIONS = [
    ((), [0.125 + 3.5, 0.5, 1, 0.5, 0]),
    ((("losses/regression.py", "0.5 * d * d", "1.5 * d * d"),), [0.375 + 3.5, 1.5, 1, 0.5, 0]),
    ((("kernels/jets.py", "_extreme(operator.ge)", "_extreme(operator.le)"),), [3.625, 0.5, 1, 0, -3]),
]


def versions(share: float) -> Tally:
    """Checkouts that use one cache: each in its place, at once, and one after the other in the same place."""
    tally = Tally()
    with ExitStack() as stack:
        cache, shared = (stack.enter_context(TemporaryDirectory()) for _ in range(2))
        a, b, c = (stack.enter_context(installation()) for _ in VERSIONS)
        places = [a, b, c][: part(share, 3, 2)]
        for place, (edits, _) in zip(places, VERSIONS, strict=False):
            for name, old, new in edits:
                source = (place / "numbaloss" / name).read_text()
                assert old in source and len(old) == len(new)
                (place / "numbaloss" / name).write_text(source.replace(old, new))
            for path in place.rglob("*.py"):
                os.utime(path, (1e9, 1e9))

        def use(k: int, place: Path) -> Tally:
            script = f"PLACE, WANTED = {str(place)!r}, {VERSIONS[k][1]!r}\n{VERSION}"
            outcome = run(script, NUMBA_CACHE_DIR=cache, PYTHONPATH=str(place), PYTHONDONTWRITEBYTECODE="1")
            return outcome.tally(f"version {k} in {'its own' if place in places else 'the same'} place")

        numbers = list(range(len(places)))
        with ThreadPoolExecutor(part(share, 9, 2)) as pool:
            for told in pool.map(use, numbers * part(share, 3), places * part(share, 3)):
                tally += told
        current = Path(shared, "current")
        for k in numbers * part(share, 3):
            tally += use(k, places[k])
            if current.exists():
                rmtree(current)
            copytree(places[k], current)
            tally += use(k, current)
    return tally


# ---- edits -------------------------------------------------------------------------------------------------

# The files of a user, each with numbers in braces.
FILES = {
    "constants.py": "SCALE = {attribute}.0\nTABLE = (1.0, {item}.0)\n",
    "numbers_.py": "import numpy as np\nFACTOR = {far}.0\nARRAY = np.array([1.0, {array}.0])\n",
    "kinds.py": "import enum\nclass Kind(enum.IntEnum):\n    ONE = {member}\n",
    "helpers.py": """import numba, numbers_
@numba.njit
def square(d):
    return numbers_.FACTOR * d * d
@numba.njit
def times(x, by={argument}.0):
    return x * by * {body}.0
""",
    "losses.py": """import numbaloss as nl, constants, helpers, kinds, numbers_
from helpers import times
GLOBAL = {name}.0
class Settings:
    SCALE = {unseen}.0
def made(cell):
    @nl.elementwise_loss
    def loss(input, target, power={default}.0):
        d = helpers.square(input - target) * GLOBAL * constants.SCALE * constants.TABLE[1]
        return times(d) * cell * power * kinds.Kind.ONE.value * numbers_.ARRAY[1] * {code}.0
    return loss
loss = made({cell}.0)
class Own(nl.ElementwiseLoss):
    factor: float = {field}.0
    def value(input, target, factor):
        return factor * (input - target)
@nl.elementwise_loss
def refused(input, target):
    return Settings.SCALE * (input - target)
""",
}
PARTS = ["attribute", "item", "far", "array", "member", "argument", "body", "name", "default", "code", "cell"]
FOUND = """
import numpy as np, losses
one, zero = np.ones(2), np.zeros(2)
for loss, wanted in ((losses.loss, PRODUCT), (losses.Own.function, FIELD)):
    value, gradient = loss.value_and_grad(one, zero, reduction="sum")
    slope = (2 if loss is losses.loss else 1) * wanted
    found = [loss(one, zero), value / 2, *gradient, loss.jit(one, zero), *loss(one, zero, reduction="none")]
    if found != [wanted] * 2 + [slope] * 2 + [wanted] * 3:
        print("lost", loss.__name__, found, "in place of", wanted)
    print("tried 5")
try:  # what would not be noticed is refused, or right
    if losses.refused(one, zero) != UNSEEN:
        print("lost the number of a class")
except TypeError as error:
    if "could not be noticed" not in str(error):
        raise
print("tried 1")
"""


def edits(share: float) -> Tally:
    """All that a user's definition reaches is edited in turn, each file to one of the same size and age."""
    tally, numbers = Tally(), dict.fromkeys([*PARTS, "field", "unseen"], 1)
    with TemporaryDirectory() as cache, TemporaryDirectory() as made:

        def use(what: str) -> None:
            nonlocal tally
            for name, text in FILES.items():
                filled_in = text
                for part_, number in numbers.items():
                    filled_in = filled_in.replace(f"{{{part_}}}", str(number))
                rewrite(Path(made, name), filled_in)
            wanted = float(np.prod([numbers[p] for p in PARTS]))
            script = f"PRODUCT, FIELD, UNSEEN = {wanted}, {numbers['field']}, {numbers['unseen']}\n{FOUND}"
            outcome = run(script, place=Path(made), NUMBA_CACHE_DIR=cache, PYTHONDONTWRITEBYTECODE="1")
            tally += outcome.tally(what)

        use("before any edit")
        names = list(numbers)
        for k, name in enumerate(names[: part(share, len(names), 2)]):
            before, numbers[name] = numbers[name], 2 + k % 7
            use(f"{name} edited")
            if share == 1 and k % 4 == 0:
                after, numbers[name] = numbers[name], before
                use(f"{name} edited back")
                numbers[name] = after
                use(f"{name} edited again")
    return tally


SIZE = """
import os, pathlib, numpy as np, numbaloss as nl
one, zero = np.ones(2), np.zeros(2)
path = pathlib.Path("mine.py").absolute()

def sizes():
    return [f.stat().st_size for f in pathlib.Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*.nb?")]

for k in range(1, EDITS + 1):
    source = "import numbaloss as nl\\n@nl.elementwise_loss\\ndef mine(input, target):\\n"
    source += f"    return {k} * (input - target)\\n"
    path.write_text(source)
    scope = {"__name__": "mine"}
    exec(compile(source, str(path), "exec"), scope)
    if scope["mine"].value_and_grad(one, zero)[0] != k:
        print("lost edit", k)
    if k == 1:
        before = sizes()
files = sizes()
grown, more = sum(files) - sum(before), len(files) - len(before)
print("tried", EDITS)
print(f"note {EDITS} edits of one loss added {more} files, {grown / 1e6:.1f} MB")
"""


def size(share: float) -> Tally:
    """Numbers of an edited loss; what is left of earlier ones is told."""
    with TemporaryDirectory() as cache:
        outcome = run(f"EDITS = {part(share, 200, 2)}\n{SIZE}", NUMBA_CACHE_DIR=cache)
    print(outcome.remark())
    return outcome.tally("edits of one loss")


TRIALS = [
    *(Trial(f"8 processes at once, a cache {state}", in_a_state(state)) for state in STATES),
    Trial("8 processes at once, a full disk", full),
    Trial("8 processes at once, nowhere to write", read_only),
    Trial("8 processes at once, a cache removed meanwhile", removed_meanwhile),
    Trial("processes killed while they compile", killed),
    Trial("versions side by side, moved, at once", versions),
    Trial("edits of all that a definition reads", edits),
    Trial("one loss edited 200 times", size),
]
