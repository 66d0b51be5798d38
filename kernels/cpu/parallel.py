"""Tasks on all threads: a pool of the library's own, which waits in compiled code.

Numba's thread layers cost more than they give here. Threads of GNU's OpenMP spin for milliseconds after each
loop, and take the cores from BLAS and from other processes; Numba's own workqueue kills the process when two
threads enter it, and on two cores is slower than one; all wait for each thread, also for one that the system
does not let run.

The pool does one job at a time: a task, a C function ``f(context, k)``, for each k below a count. The caller
takes numbers itself, and helpers join in, each taking the next one. A helper that comes late finds none left:
the caller waits only for those that have begun. A helper looks for a job for a moment, then sleeps; it is
woken where jobs follow each other closely, or where one takes longer than waking. Whoever calls while the
pool is taken does all tasks on its own thread; so does a child that was forked from a process with helpers:
it has none.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import njit, types
from numba.np.ufunc import parallel as numba_parallel

from ..bind import undisturbed
from .native import (
    HELPER,
    add_atomic,
    at_address,
    caller,
    compile_function,
    exchange_atomic,
    load_atomic,
    pause,
    smaller,
    stack,
    store,
    store_atomic,
)

# A task ``f(context, k)``.
TASK = types.int64(types.int64, types.int64)
run_task = caller(types.int64, 2)

# Of a pool, in int64; what different threads write lies on different lines of memory.
TAKEN = 0  # 1 while a caller has the pool
JOB = 8  # the number of the job: odd while it is open
JOB_TASK, JOB_CONTEXT, JOB_COUNT = 9, 10, 11
JOB_HELPERS = 12  # how many may join
NEXT = 16  # of the tasks' numbers
INSIDE = 24  # helpers that have joined
MUTEX = 32  # of the system, zeros at first, as a condition is
ENDED = 48  # 1 to let helpers return
LOCK, UNLOCK, WAIT, WAKE, YIELD, CLOCK = range(49, 55)  # addresses of the system's functions
CLOCK_NAME, CLOCK_UNIT = 56, 57  # the clock's first argument, and nanoseconds of its first number
LAST = 58  # nanoseconds, on that clock, at which the last job was done
TOOK = 59  # nanoseconds that it would have taken on one thread, by its first task
ALONE_UNTIL = 60  # until when the caller does jobs alone
# Of Linux, zeros elsewhere: addresses, the caller's core, a bit for each core that the process may use.
GET_CORE, GET_THREAD, SET_CORES, CORE, CORES = range(61, 66)
WORDS = 16  # of such bits
FIRST_HELPER = 88
# Of a helper: its condition, whether it sleeps, and its thread's number.
CONDITION, ASLEEP, THREAD, HELPER_SIZE = 0, 8, 9, 16
# Of what a helper's thread is given: the pool's address, and which helper it is.
POOL, NUMBER = 0, 1
# Of what a driver is given: the addresses of `fork` and of the pool, and how many helpers may join.
FORK, FORKS_IN, HELPERS = 0, 1, 2

LOOKING = 300_000  # ns for which a helper looks for a job before it sleeps
KEEPING = 15_000  # ns of these for which it keeps the core; then it lets others run who want it
AWAY = 5_000  # ns in which others ran when a helper let them: it leaves the core to them, and sleeps
CLOSE = 250_000  # ns between two jobs for the second of which helpers that sleep are woken at once
WAKING = 60_000  # ns that a job must take on one thread, for helpers to be woken: several times waking one
# Where the last tasks of a job were long in coming, other processes have the cores: helpers that they stop in
# a task cost a caller milliseconds. So it goes on alone for many times as long as it had to wait.
LATE = 200_000  # ns, beyond the time of two tasks
TIMES = 50
SPINS = 100  # looks for the helpers' end before other threads are let run

one_address = caller(types.int64, 1)
four_addresses = caller(types.int64, 4)


@njit(**HELPER)
def now(pool):
    """Nanoseconds on a steady clock."""
    p, at = at_address(pool, 0), stack(16)
    store(at + 8, 0)
    four_addresses(p[CLOCK], (p[CLOCK_NAME] if p[CLOCK_NAME] else at, at, 0, 0))
    return at_address(at, 0)[0] * p[CLOCK_UNIT] + at_address(at, 0)[1]


@njit(**HELPER)
def wake(pool, i):
    """Wake a helper, if it may join and sleeps: on another core than the caller's.

    By itself Linux may put it there and leave it for milliseconds, while others are idle: in a virtual
    machine an idle core counts as taken.
    """
    p, me = at_address(pool, 0), pool + 8 * (FIRST_HELPER + HELPER_SIZE * i)
    if i < p[JOB_HELPERS] and load_atomic(me + 8 * ASLEEP):
        if p[SET_CORES]:
            core, cores = p[CORE], stack(8 * 16)
            for k in range(WORDS):
                store(cores + 8 * k, p[CORES + k])
            at_address(cores, 0)[core // 64] &= ~(1 << core % 64)
            four_addresses(p[SET_CORES], (at_address(me, 0)[THREAD], 8 * WORDS, cores, 0))
        one_address(p[LOCK], (pool + 8 * MUTEX,))
        one_address(p[WAKE], (me + 8 * CONDITION,))
        one_address(p[UNLOCK], (pool + 8 * MUTEX,))


@njit(**HELPER)
def take(pool):
    """Do tasks of the open job until none is left."""
    p = at_address(pool, 0)
    task, context, count = p[JOB_TASK], p[JOB_CONTEXT], p[JOB_COUNT]
    k = add_atomic(pool + 8 * NEXT, 1)
    while k < count:
        run_task(task, (context, k))
        k = add_atomic(pool + 8 * NEXT, 1)


@njit(**HELPER)
def is_new(job, last):
    """Whether a job is open that a helper has not seen."""
    return (job & 1 != 0) & (job != last)


def help(record):
    """A helper's thread: join one job after the other."""
    pool, i = at_address(record, 0)[POOL], at_address(record, 0)[NUMBER]
    p, me, last = at_address(pool, 0), pool + 8 * (FIRST_HELPER + HELPER_SIZE * i), 0
    if p[GET_THREAD]:
        store(me + 8 * THREAD, one_address(p[GET_THREAD], (0,)) & 0xFFFFFFFF)
    while load_atomic(pool + 8 * ENDED) == 0:
        job, at = load_atomic(pool + 8 * JOB), now(pool)
        begin, until = at, at + LOOKING
        while not is_new(job, last) and at < until:
            if at - begin < KEEPING:
                pause()
                then = now(pool)
            else:
                one_address(p[YIELD], (0,))
                then = now(pool)
                if then - at > AWAY:
                    until = 0
            job, at = load_atomic(pool + 8 * JOB), then
        if not is_new(job, last):
            one_address(p[LOCK], (pool + 8 * MUTEX,))
            # Whoever opens a job looks at this after that: one of the two sees the other.
            store_atomic(me + 8 * ASLEEP, 1)
            job = load_atomic(pool + 8 * JOB)
            if not is_new(job, last) and load_atomic(pool + 8 * ENDED) == 0:
                # POSIX takes the first two; Windows more: no time limit, no flags.
                four_addresses(p[WAIT], (me + 8 * CONDITION, pool + 8 * MUTEX, 0xFFFFFFFF, 0))
            store_atomic(me + 8 * ASLEEP, 0)
            one_address(p[UNLOCK], (pool + 8 * MUTEX,))
            if p[SET_CORES]:  # from where it was woken it may go anywhere
                four_addresses(p[SET_CORES], (0, 8 * WORDS, pool + 8 * CORES, 0))
            continue
        last = job
        wake(pool, 2 * i + 1)  # each wakes two: many are awake soon
        wake(pool, 2 * i + 2)
        if i < p[JOB_HELPERS]:
            add_atomic(pool + 8 * INSIDE, 1)
            if load_atomic(pool + 8 * JOB) == job:  # else it was closed meanwhile
                take(pool)
            add_atomic(pool + 8 * INSIDE, -1)
    return 0


def fork(record, task, context, count):
    """Run a task for each number below a count, on the threads of a pool."""
    pool, helpers = at_address(record, 0)[FORKS_IN], at_address(record, 0)[HELPERS]
    if exchange_atomic(pool + 8 * TAKEN, 1):
        for k in range(count):
            run_task(task, (context, k))
        return 0
    p, begin = at_address(pool, 0), now(pool)
    alike = (p[JOB_TASK] == task) & (p[JOB_COUNT] == count)  # to the last job
    at_once = (begin - p[LAST] < CLOSE) | (alike & (p[TOOK] > WAKING))
    p[JOB_TASK], p[JOB_CONTEXT], p[JOB_COUNT] = task, context, count
    p[JOB_HELPERS] = smaller(helpers, count - 1) if begin >= p[ALONE_UNTIL] else 0
    if p[GET_CORE]:
        p[CORE] = one_address(p[GET_CORE], (0,)) & 0xFFFF
    store_atomic(pool + 8 * NEXT, 0)
    job = load_atomic(pool + 8 * JOB) + 1
    store_atomic(pool + 8 * JOB, job)
    if at_once:
        wake(pool, 0)
    k = add_atomic(pool + 8 * NEXT, 1)
    if k < count:
        begin = now(pool)
        run_task(task, (context, k))
        p[TOOK] = (now(pool) - begin) * count
        if not at_once and p[TOOK] > WAKING:
            wake(pool, 0)
    take(pool)
    # No more helpers come in; those inside are at their last task.
    store_atomic(pool + 8 * JOB, job + 1)
    begin, looks = now(pool), 0
    while load_atomic(pool + 8 * INSIDE):
        looks += 1
        if looks < SPINS:
            pause()
        else:
            one_address(p[YIELD], (0,))
    p[LAST] = now(pool)
    waited = p[LAST] - begin
    if waited > LATE + 2 * p[TOOK] // count:
        p[ALONE_UNTIL] = p[LAST] + TIMES * waited
    store_atomic(pool + 8 * TAKEN, 0)
    return 0


FORK_BY_RECORD = types.int64(*[types.int64] * 4)
call_fork = caller(types.int64, 4)


@njit(**HELPER)
def run_fork(record, task_and_more):
    """Run a task ``(task, context, count)`` by the record that `forker` gives."""
    task, context, count = task_and_more
    call_fork(at_address(record, 0)[FORK], (record, task, context, count))


# ---- the pool ----------------------------------------------------------------------------------------------


class System:
    """The operating system's threads, and the functions by which they wait."""

    def __init__(self) -> None:
        self.posix = os.name == "posix"
        self.library: Any = None
        if sys.platform == "win32":
            self.library = ctypes.WinDLL("kernel32")
        else:
            self.library = ctypes.CDLL(None)
        self.threads: list[ctypes.c_void_p] = []

    def functions(self) -> list[int]:
        """Addresses for a pool, from `LOCK` to `CLOCK`."""
        if self.posix:
            names = "pthread_mutex_lock pthread_mutex_unlock pthread_cond_wait pthread_cond_signal"
            names += " sched_yield clock_gettime"
        else:
            names = "AcquireSRWLockExclusive ReleaseSRWLockExclusive SleepConditionVariableSRW"
            names += " WakeConditionVariable SwitchToThread QueryPerformanceCounter"
        return self.addresses(names)

    def clock(self) -> tuple[int, int]:
        """The first argument of `CLOCK`, 0 where there is none, and its unit in nanoseconds."""
        if self.posix:
            return time.CLOCK_MONOTONIC, 10**9
        frequency = ctypes.c_int64()
        self.library.QueryPerformanceFrequency(ctypes.byref(frequency))
        return 0, max(1, 10**9 // frequency.value)

    def cores(self) -> list[int]:
        """From `GET_CORE` on; zeros where threads cannot be kept off a core, or need not."""
        usable = os.sched_getaffinity(0) if sys.platform == "linux" else ()
        names = "sched_getcpu gettid sched_setaffinity"
        there = all(hasattr(self.library, n) for n in names.split())
        if not there or len(usable) < 2 or max(usable) >= 64 * WORDS:
            return [0] * (CORES - GET_CORE + WORDS)
        bits = sum(1 << core for core in usable).to_bytes(8 * WORDS, "little")
        return [*self.addresses(names), 0, *np.frombuffer(bits, np.int64).tolist()]

    def addresses(self, names: str) -> list[int]:
        """Where the system's functions of these names are."""
        found = (ctypes.cast(getattr(self.library, n), ctypes.c_void_p).value for n in names.split())
        return [address or 0 for address in found]

    def start(self, function: int, argument: int) -> bool:
        """Start a thread that calls a C function by its address; False where none can be had."""
        thread, p, no = ctypes.c_void_p(), ctypes.c_void_p, None
        if self.posix:
            create = self.library.pthread_create
            create.argtypes = [p, p, p, p]
            done = create(ctypes.byref(thread), no, function, argument) == 0
        else:
            create = self.library.CreateThread
            create.argtypes, create.restype = [p, ctypes.c_size_t, p, p, ctypes.c_uint32, p], p
            thread = p(create(no, 0, function, argument, 0, no))
            done = bool(thread)
        if done:
            self.threads.append(thread)
        return done

    def join(self) -> None:
        """Wait until all threads have returned."""
        for thread in self.threads:
            if self.posix:
                self.library.pthread_join(thread, None)
            else:
                self.library.WaitForSingleObject(thread, 0xFFFFFFFF)
        self.threads.clear()


# A fault of a helper must be seen; all other signals are for Python's threads.
FAULTS = {"SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS"}


class Pool:
    """Helpers, and the memory by which they are told what to do."""

    def __init__(self, helpers: int) -> None:
        words = FIRST_HELPER + HELPER_SIZE * helpers
        self.room = np.zeros(words + 2 * helpers + 8, np.int64)
        self.words = self.room[-self.room.ctypes.data % 64 // 8 :]
        self.address = self.words.ctypes.data
        self.system, self.helpers = System(), 0
        self.words[LOCK : CLOCK + 1] = self.system.functions()
        self.words[CLOCK_NAME : CLOCK_UNIT + 1] = self.system.clock()
        self.words[GET_CORE : CORES + WORDS] = self.system.cores()
        if sys.platform == "darwin":  # elsewhere zeros are what these make
            library = self.system.library
            library.pthread_mutex_init(ctypes.c_void_p(self.address + 8 * MUTEX), None)
            for i in range(helpers):
                library.pthread_cond_init(ctypes.c_void_p(self.of_helper(i)), None)
        function = compile_function(help, {}, "pool", "pool", types.int64(types.int64))
        with masked_signals():
            for i in range(helpers):
                record = self.words[words + 2 * i :][:2]
                record[:] = self.address, i
                if not self.system.start(function, record.ctypes.data):
                    break
                self.helpers += 1

    def of_helper(self, i: int) -> int:
        return self.address + 8 * (FIRST_HELPER + HELPER_SIZE * i)

    def end(self) -> None:
        """Let the helpers return, before what they run and read is taken apart."""
        self.words[ENDED] = 1
        lock, unlock, _, wake = (
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(int(a)) for a in self.words[LOCK : WAKE + 1]
        )
        for i in range(self.helpers):
            lock(self.address + 8 * MUTEX)
            wake(self.of_helper(i))
            unlock(self.address + 8 * MUTEX)
        self.system.join()


@contextmanager
def masked_signals() -> Iterator[None]:
    """Start threads, meanwhile, that take no signals."""
    if os.name != "posix":
        yield
        return
    taken = {s for s in signal.valid_signals() if getattr(s, "name", "") not in FAULTS}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_pool: Pool | None = None
_alone = False  # in a child without the helpers that its parent has, and at the end of the process
_starting = threading.Lock()


def _after_fork() -> None:
    global _alone, _starting
    _alone, _starting = _pool is not None, threading.Lock()


def _at_exit() -> None:
    global _alone
    if _pool is not None and not _alone:
        _alone = True
        _pool.end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


@cache
def record_of(helpers: int) -> np.ndarray:
    """What `run_fork` takes, for so many helpers at most."""
    global _pool
    with _starting, undisturbed():  # threads that run must not lose the pool that they are of
        if _pool is None:
            _pool = Pool(numba.config.NUMBA_NUM_THREADS - 1)
    address = compile_function(fork, {}, "pool", "pool", FORK_BY_RECORD)
    return np.array([address, _pool.address, min(helpers, _pool.helpers)], np.int64)


@cache
def address_of(helpers: int) -> int:
    """Where that record is."""
    return record_of(helpers).ctypes.data


def count() -> int:
    """How many threads a call uses: as `numba.set_num_threads` says."""
    if _alone:
        return 1
    # Numba's answer starts its own threads: it is asked only where they are there.
    return numba.get_num_threads() if numba_parallel._is_initialized else numba.config.NUMBA_NUM_THREADS


def forker() -> int:
    """The address of the record by which a driver forks; 0 to stay on this thread."""
    threads = count()
    return address_of(threads - 1) if threads > 1 else 0
