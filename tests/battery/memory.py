"""Memory that does not grow, calls that are interrupted, calls for which memory is not there: on Linux."""

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

from . import Tally, Trial
from .scripts import run

SETUP = """
import gc, itertools, os, signal, subprocess, sys, threading, time, numpy as np, numba, numbaloss as nl
from numbaloss import testing
from numbaloss.loss import registry

one, zero = np.ones(5), np.zeros(5)

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = [int(n) for n in file.read().split()]
    # Not those of files: the system takes pages of libraries that nobody reads, and brings them back.
    return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE") / 1e6

def grows(step, warm, count, bound):
    \"\"\"Do a step many times; what the process holds more at the end, in MB, is to be below a bound.\"\"\"
    for k in range(warm): step(k)
    before = resident()
    for k in range(warm, warm + count): step(k)
    grown = resident() - before
    print("tried", count)
    print(f"note {WHAT}: {grown:.2f} MB after {count}")
    if grown > bound: print(f"lost {grown:.2f} MB after {count}, more than {bound}")

def bits(result):
    value, gradients = result
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return [np.asarray(a).tobytes() for a in (value, *gradients)]
"""

SMALL_CALLS = """
rng, calls = np.random.default_rng(0), []
for name, loss in registry.items():
    given = testing.samples(loss, rng)
    wrt = loss.Class._default_wrt()
    out = np.empty_like(given[wrt]) if isinstance(wrt, str) else tuple(np.empty_like(given[n]) for n in wrt)
    fields = {n: f for n, f in loss.Class.fields.items() if not f.array and n not in ("reduction", "options")}
    for options in ({}, *({n: v} for n, f in fields.items() for v in f.samples[:2] if v is not None)):
        calls.append((loss, given, {**options, "reduction": "sum"}))
        calls.append((loss, given, {**options, "out": out}))
wanted = [None] * len(calls)

def step(k):
    loss, given, options = calls[k % len(calls)]
    new = {n: a.copy() for n, a in given.items()}  # another address each time
    value, _ = loss.value_and_grad(**new, **options)
    if k < len(calls):
        wanted[k] = value
    elif value != wanted[k % len(calls)] and value == value:
        print("lost", loss.__name__, value)

grows(step, 10 * len(calls), COUNT, 4)
"""

SAME = """
def step(k):
    @nl.elementwise_loss
    def mine(input, target, scale=2.0):
        return scale * (input - target)
    if mine.value_and_grad(one, zero)[0] != 2: print("lost redefinition", k)

grows(step, 100, COUNT, 8)
"""

# Each is another definition, whose machine code stays: told, and not lost.
DIFFERENT = """
def step(k):
    scope = {"nl": nl}
    exec(f"def mine(input, target): return {k + 1} * (input - target)", scope)
    if nl.elementwise_loss(scope["mine"]).value_and_grad(one, zero)[0] != k + 1: print("lost definition", k)

grows(step, 2, COUNT, 8 * COUNT)
"""

OPTIONS = """
scores, labels, rng = np.random.default_rng(0).normal(size=(5, 4)), np.arange(5) % 4, np.random.default_rng(1)
criterion = nl.HuberLoss()
logs = np.log(np.exp(scores) / np.exp(scores).sum(1, keepdims=True))
right, others = -logs[range(5), labels].mean(), -logs.mean()

def step(k):
    criterion.delta = delta = rng.random()
    wanted = delta * (1 - delta / 2)
    for found in (nl.huber_loss.value_and_grad(one, zero, delta=delta)[0], criterion(one, zero)):
        if abs(found - wanted) > 1e-14: print("lost delta", delta)
    smooth = rng.random()
    found, _ = nl.cross_entropy.value_and_grad(scores, labels, label_smoothing=smooth)
    if abs(found - (1 - smooth) * right - smooth * others) > 1e-13: print("lost smoothing", smooth)

# The latest 4096 calls are remembered.
grows(step, 5000, COUNT, 4)
"""

# Options differ from step to step, as a loss scale does; the arrays of a call are its own.
ARRAYS = """
n = 500_000

def step(k):
    x, t = np.ones(n, np.float32), np.zeros(n, np.float32)
    nl.huber_loss.value_and_grad(x, t, delta=1 + k / 100)
    nl.mse_loss.value_and_grad(x, t, normalizer=1.0 + k)
    nl.mse_loss.value_and_grad(x, t, grad_output=1.0 + k)
    nl.cross_entropy.value_and_grad(x.reshape(-1, 10), np.zeros(n // 10, int), label_smoothing=k / 1000)

grows(step, 3, COUNT, 24)
"""

REFUSED = """
def step(k):
    for bad, error in ((np.ones(k % 7 + 6), ValueError), (object(), TypeError), (one + 1j, TypeError)):
        try:
            nl.huber_loss.value_and_grad(one, bad)
        except error:
            continue
        print("lost an error", bad)

grows(step, 500, COUNT, 4)
"""

THREADS = """
x = np.ones(200_000, np.float32)

def call():
    value, gradient = nl.mse_loss.value_and_grad(x, 0 * x)
    if value != 1: print("lost", value)

def step(k):
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

grows(step, 100, COUNT, 12)
"""

# A process that was started in a shell's background takes no SIGINT by itself.
INTERRUPT = """
signal.signal(signal.SIGINT, signal.default_int_handler)
tried = 0

def interrupted(work, after):
    \"\"\"Whether ^C ends a work that is repeated.\"\"\"
    global tried
    tried += 1
    sender = subprocess.Popen(["sh", "-c", f"sleep {after}; kill -INT {os.getpid()}"])
    until = time.monotonic() + after + 20
    try:
        while time.monotonic() < until: work()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sender.wait()
"""

CALLS = """
rng = np.random.default_rng(0)
large = rng.normal(size=(2, SIZE)).astype(np.float32)
buffer = np.empty(SIZE, np.float32)
scores, labels = rng.normal(size=(20_000, 100)), rng.integers(0, 100, 20_000)
small = [(loss, testing.samples(loss, rng)) for loss in registry.values()]
number = itertools.count(2)

def redefined():
    scope, k = {"nl": nl}, next(number)
    exec(f"def mine(input, target): return {k} * (input - target)", scope)
    assert nl.elementwise_loss(scope["mine"]).value_and_grad(one, zero)[0] == k

works = {
    "a long call": lambda: [nl.mse_loss(*large)],
    "calls that write to out": lambda: bits(nl.huber_loss.value_and_grad(*large, out=buffer)),
    "new gradients": lambda: bits(nl.cross_entropy.value_and_grad(scores, labels)),
    "small calls": lambda: [bits(loss.value_and_grad(**given)) for loss, given in small],
    "definitions": redefined,
}
work = works[WORK]
wanted = work()

def busy():
    x = np.ones(300_000)
    while True:
        if nl.mse_loss(x, 0 * x) != 1: print("lost a call of another thread", flush=True)

for others in (0, 2):
    for _ in range(others): threading.Thread(target=busy, daemon=True).start()
    for _ in range(COUNT):
        what = f"{WORK}, beside {others} threads"
        print("trying", what, flush=True)
        if not interrupted(work, 0.02 + 0.1 * rng.random()): print("lost the interrupt of", what)
        if work() != wanted: print("lost", what, "after an interrupt")
print("tried", tried)
sys.stdout.flush()
os._exit(0)
"""

FIRST = """
scores, labels = np.log(np.array([[0.5, 0.25, 0.25]])), np.array([1])

def call():
    return nl.cross_entropy.value_and_grad(scores, labels)

if not interrupted(call, AFTER): print("lost the interrupt")
value, gradient = call()
if not np.allclose([value, *gradient[0]], [np.log(4), 0.5, -0.75, 0.25]): print("lost", value, gradient)
print("tried", tried)
"""

# ^C comes where Python looks for it, in a first call and in a later one, in a child for each place.
PLACES = """
import dis
x = np.linspace(-3, 3, 1_000_001)
scores, labels = x[:1_000_000].reshape(-1, 100), np.arange(10_000) % 100
works = {
    "elements": lambda: bits(nl.huber_loss.value_and_grad(x, 0 * x)),
    "rows": lambda: bits(nl.cross_entropy.value_and_grad(scores, labels)),
}
ours = os.path.dirname(nl.__file__)

LOOKS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME"}  # after these instructions

def traced(work, at=None):
    \"\"\"Count the places in the library where a work can be interrupted, or interrupt it at one.\"\"\"
    count = 0
    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(ours): return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        code, before = frame.f_code.co_code, ""
        def local(frame, event, argument):
            nonlocal count, before
            if event == "opcode":
                count += before in LOOKS
                if count == at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                before = dis.opname[code[frame.f_lasti]]
            return local
        return local
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count

def child(function):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # which ends a child that waits for ever
        try:
            os.write(write, repr(function()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read().decode()
    return eval(said) if os.waitpid(pid, 0)[1] == 0 and said else None

def digest(work):
    return [hash(part) for part in work()]

def interrupted(work, warm, at, wanted):
    for _ in range(warm): work()
    swallowed = True
    try:
        traced(work, at)
    except KeyboardInterrupt:
        swallowed = False
    return swallowed, digest(work) == wanted and digest(work) == wanted

def places(work, warm):
    for _ in range(warm): work()
    return traced(work)

tried = swallowed = 0
for (name, work), warm in itertools.product(works.items(), (0, 3)):
    child(lambda: digest(work))  # compiles
    wanted, whole = child(lambda: digest(work)), child(lambda: places(work, warm))
    for at in np.unique(np.linspace(1, whole, COUNT).astype(int)):
        tried += 1
        told = child(lambda: interrupted(work, warm, at, wanted))
        where = f"{name}, after {warm} calls, at {at} of {whole}:"
        if told is None: print("lost", where, "the process dies, or waits for ever")
        elif not told[1]: print("lost", where, "another number")
        elif told[0]: swallowed += 1
print("tried", tried)
print("note interrupts that Python could not raise:", swallowed)
"""

NO_MEMORY = """
import ctypes, resource
rng = np.random.default_rng(0)
rows = rng.normal(size=(2, 40_000, 250)).astype(np.float32)  # 40 MB each
labels, flat = rng.integers(0, 250, 40_000), rows.reshape(2, -1)
signs = np.sign(labels - 124.5).astype(np.float32)
calls = {
    "elements": (nl.huber_loss, flat[0], flat[1]),
    "slices": (nl.mse_loss, rows[0, ::2], rows[1, 1::2]),
    "Fortran's_order": (nl.l1_loss, rows[0].T, rows[1].T),
    "halves": (nl.mse_loss, flat[0].astype(np.float16), flat[1].astype(np.float16)),
    "scores": (nl.cross_entropy, rows[0], labels),
    "log-probabilities": (nl.nll_loss, rows[0], labels),
    "margins": (nl.multi_margin_loss, rows[0], labels),
    "vectors": (nl.cosine_embedding_loss, rows[0], rows[1, ::-1], signs),
    "products": (nl.linear_cross_entropy, rows[0], rows[1, :500], labels),
}

def limited(call, more):
    \"\"\"How a call ends where the process may take so many MB more.\"\"\"
    nl.free_memory()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(more * 1e6), -1))
    try:
        call()
        return "done"
    except MemoryError:
        return "refused"
    except BaseException as error:
        return repr(error)[:200]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

refused, (loss, *arrays) = 0, calls[NAME]
# Compiled, and threads started, by a call that takes less: LLVM ends a process for which it finds no memory.
few = [a[: len(a) // 10] if a.shape != (500, 250) else a for a in arrays]
wrt = loss.Class._default_wrt()
places = [loss.Class._required.index(n) for n in ((wrt,) if isinstance(wrt, str) else wrt)]
for given in (few, arrays):
    outs = tuple(np.zeros_like(given[k]) for k in places)
    with_out = {"out": outs if len(outs) > 1 else outs[0]}
    if given is few:
        loss.value_and_grad(*few)
        loss.value_and_grad(*few, **with_out)
for more in (0, 0.05, 0.3, 1, 4, 16, 30, 60, 100):
    for options in ({}, with_out):
        call = lambda: loss.value_and_grad(*arrays, **options)
        what = f"{NAME}{' with out' if options else ''}, {more} MB more"
        print("trying", what, flush=True)
        before, ended = [a.tobytes() for a in arrays], limited(call, more)
        refused += ended == "refused"
        if ended not in ("done", "refused"): print("lost", what, ended)
        if [a.tobytes() for a in arrays] != before: print("lost", what, "an argument was written")
        if bits(call()) != bits(call()): print("lost", what, "another number")
        print("tried 1", flush=True)
print(f"note {NAME}: {refused} calls of 18 refused for want of memory")
"""
SHORT = [
    "elements",
    "scores",
    "slices",
    "halves",
    "log-probabilities",
    "margins",
    "vectors",
    "products",
    "Fortran's_order",
]


def told(what: str, script: str, **numbers: Any) -> Callable[[float], Tally]:
    """Run a script with numbers; COUNT and SIZE are those of the whole."""

    def run_share(share: float) -> Tally:
        given = {n: max(2, round(v * share)) if n in ("COUNT", "SIZE") else v for n, v in numbers.items()}
        first = "\n".join(f"{n} = {v!r}" for n, v in {"WHAT": what, **given}.items())
        outcome = run(first + SETUP + script, 600, NUMBA_NUM_THREADS="4")
        if outcome.remark():
            print(outcome.remark())
        return outcome.tally(what)

    return run_share


def interrupts(*works: str) -> Callable[[float], Tally]:
    """Interrupt works that are repeated, each in a process of its own."""

    def run_each(share: float) -> Tally:
        tally = Tally()
        for work in works:
            script = told("^C", INTERRUPT + CALLS, WORK=work, COUNT=20, SIZE=50_000_000)
            tally += script(share)
        return tally

    return run_each


def first_calls(share: float) -> Tally:
    """Interrupt the compilation of a process's first call at several times."""
    tally = Tally()
    for k in range(max(1, round(16 * share))):
        with TemporaryDirectory() as cache:
            script = f"AFTER = {0.1 + 0.3 * k}{SETUP}{INTERRUPT}{FIRST}"
            tally += run(script, NUMBA_CACHE_DIR=cache).tally(f"^C {0.1 + 0.3 * k:.1f} s into a first call")
    return tally


def short(share: float) -> Tally:
    tally = Tally()
    for name in SHORT[: max(1, round(len(SHORT) * share))]:
        tally += told("no memory", NO_MEMORY, NAME=name)(share)
    return tally


TRIALS = [
    Trial("memory held after small calls", told("small calls", SMALL_CALLS, COUNT=100_000)),
    Trial("memory held after the same definition", told("the same definition", SAME, COUNT=1000)),
    Trial("memory held after other definitions", told("other definitions", DIFFERENT, COUNT=50)),
    Trial("memory held after values of options", told("options", OPTIONS, COUNT=10_000)),
    Trial("memory held after arrays with other options", told("arrays", ARRAYS, COUNT=100)),
    Trial("memory held after refused calls", told("refused calls", REFUSED, COUNT=10_000)),
    Trial("memory held after threads", told("threads", THREADS, COUNT=1000)),
    Trial(
        "^C during calls",
        interrupts("a long call", "calls that write to out", "new gradients", "small calls"),
    ),
    Trial("^C while definitions are compiled", interrupts("definitions")),
    Trial("^C during a first call", first_calls),
    Trial("^C wherever Python looks for it", told("^C", PLACES, COUNT=150)),
    Trial("no memory for a gradient", short),
]
