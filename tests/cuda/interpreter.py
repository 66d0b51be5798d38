"""Runs a CUDA kernel's own Python, thread by thread, and refuses what a GPU would do wrongly in silence.

:func:`launch` takes the function that is compiled (bound, not decorated), and NumPy arrays for its pointers::

    launch(kernel, blocks, threads, x, grad, n, np.float32(0.5), None, order="reverse")

Every thread is a greenlet that runs until it must wait: at a barrier for its block, at a shuffle for its
warp. What the kernel calls is found through its globals, and replaced: the intrinsics of `target` by Python,
``cuda`` by the running thread's view of it, device functions by their own Python, a definition's jets by
:class:`Jet`.

It raises :class:`Fault` for

- an index out of bounds, a vector that is not aligned, an array of another dtype than the kernel reads;
- a barrier or a shuffle that not all threads reach, or reach at different places;
- a read of shared memory that nobody wrote, and any access to memory that races with another thread's: one of
  them writes, and no barrier stands between;
- a float64 that a float32 kernel stores; a float literal that was to be a float32 and met none.

The order of threads and of blocks may be "forward", "reverse" or "random": results should not depend on it.
"""

import operator
import random
import sys
from collections.abc import Callable
from functools import cache, partial
from types import CellType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from greenlet import getcurrent, greenlet

from numbaloss.kernels import jets
from numbaloss.kernels import math as nm
from numbaloss.kernels.cuda import target
from numbaloss.kernels.spec import CODES

WARP = 32
ORDERS = ("forward", "reverse", "random")


class Fault(AssertionError):
    """What a GPU would not have told."""


# ---- memory -------------------------------------------------------------------------------------------


class Pointer:
    """A raw pointer to an array that knows its end, what is written, and who touched what since when."""

    def __init__(self, array: np.ndarray, grid: "Grid", written: bool = True, origin: int = 0) -> None:
        if array.ndim != 1 or (array.size > 1 and array.strides != (array.itemsize,)):
            raise Fault(f"a pointer is to a flat, contiguous array, not of shape {array.shape}")
        self.array, self.grid, self.origin = array, grid, origin
        self.code = CODES.get(array.dtype.name)
        self.written = np.full(array.size, written)
        self.writers: dict[int, Moment] = {}
        self.readers: dict[int, list[Moment]] = {}
        self.address, self.shared = array.ctypes.data, not written

    def _visit(self, i: Any, writes: bool) -> int:
        i = operator.index(i) + self.origin
        if not 0 <= i < self.array.size:
            raise Fault(f"index {i} of {self.array.size} is out of bounds")
        now = self.grid.now()
        for then in (self.writers.get(i), *(self.readers.get(i, ()) if writes else ())):
            if then is not None and then.races(now):
                raise Fault(f"{then} and {now} race for element {i}")
        if writes:
            self.writers[i], self.readers[i] = now, []
            self.written[i] = True
            if not self.shared:
                self.grid.writers[self.address + i * self.array.itemsize] = now
        else:
            readers = self.readers.setdefault(i, [])
            if not readers or readers[-1] != now:
                readers.append(now)
            if not self.written[i]:
                raise Fault(f"element {i} is read before it is written")
        return i

    def __getitem__(self, i: Any) -> Any:
        i = self._visit(i, writes=False)
        # Through another pointer a thread may have written here, as a gradient over its scores. Lanes without
        # work read what is another's and drop it: what they get must not matter, so it is NaN.
        then = None if self.shared else self.grid.writers.get(self.address + i * self.array.itemsize)
        if then is not None and then.races(self.grid.now()):
            if self.array.dtype.kind in "iub":
                raise Fault(f"{then} and {self.grid.now()} race for element {i}")
            return self.array.dtype.type(np.nan)
        x = self.array[i]
        return x.item() if self.array.dtype.kind in "iub" else x

    def __setitem__(self, i: Any, x: Any) -> None:
        kind = self.array.dtype
        if kind.kind == "f" and type(x) is not kind.type:
            raise Fault(f"a {type(x).__name__} is stored as {kind}")
        self.array[self._visit(i, writes=True)] = x

    def vector(self, i: Any, width: int) -> range:
        i = operator.index(i)
        if width > 1 and (self.array.ctypes.data + (i + self.origin) * self.array.itemsize) % 16:
            raise Fault(f"a vector of {width} elements at {i} is not aligned to 16 bytes")
        return range(i, i + width)


class At(NamedTuple):
    """A pointer to an element within an array, given to :func:`launch`."""

    array: np.ndarray
    origin: int


class Moment:
    """A thread between two barriers."""

    __slots__ = ("block", "since_block", "since_warp", "thread")

    def __init__(self, block: int, thread: int, since_block: int, since_warp: int) -> None:
        self.block, self.thread = block, thread
        self.since_block, self.since_warp = since_block, since_warp

    def _key(self) -> tuple[int, ...]:
        return self.block, self.thread, self.since_block, self.since_warp

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Moment) and self._key() == other._key()

    def __repr__(self) -> str:
        return f"thread {self.thread} of block {self.block}"

    def races(self, other: "Moment") -> bool:
        if self.block != other.block:
            return True
        if self.thread == other.thread or self.since_block != other.since_block:
            return False
        same_warp = self.thread // WARP == other.thread // WARP
        return not (same_warp and self.since_warp != other.since_warp)


# ---- threads ------------------------------------------------------------------------------------------


class Thread:
    """One thread of a block: a greenlet, and what it waits for."""

    def __init__(self, number: int, run: Callable[[], None]) -> None:
        self.number = number
        self.greenlet = greenlet(run)
        self.waits: tuple[Any, ...] | None = None  # (whom for, operation, mask, where in the source)
        self.offers: Any = None
        self.gets: Any = None


class Grid:
    """A launch: its blocks one after the other, and ``cuda`` as the running thread sees it."""

    def __init__(self, blocks: int, threads: int, order: str, seed: int) -> None:
        self.blocks, self.threads, self.order = blocks, threads, order
        self.random = random.Random(seed)
        self.hub = getcurrent()
        self.block = 0
        self.running: Any = None
        self.memory: dict[Any, Pointer] = {}  # shared, of the running block
        self.writers: dict[int, Moment] = {}  # of the arrays given to the kernel, by address
        self.barriers = 0
        self.warp_barriers: dict[int, int] = {}
        self.cuda = View(self)

    def now(self) -> Moment:
        thread = self.running.number
        return Moment(self.block, thread, self.barriers, self.warp_barriers.get(thread // WARP, 0))

    def arranged(self, things: list[Any]) -> list[Any]:
        if self.order == "reverse":
            return things[::-1]
        if self.order == "random":
            return self.random.sample(things, len(things))
        return things

    def run(self, kernel: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        def body() -> None:
            with np.errstate(all="ignore"):
                kernel(*arguments)

        for block in self.arranged(list(range(self.blocks))):
            self.block = block
            self.memory, self.barriers, self.warp_barriers = {}, 0, {}
            self._run_block([Thread(k, body) for k in range(self.threads)])

    def _run_block(self, threads: list[Thread]) -> None:
        ready = threads
        while ready:
            for thread in self.arranged(ready):
                self.running = thread
                thread.waits = None
                try:
                    thread.greenlet.switch()
                except Exception as error:
                    error.add_note(f"in thread {thread.number} of block {self.block}")
                    raise
            ready = self._released(threads)

    def _released(self, threads: list[Thread]) -> list[Thread]:
        """The threads that have what they waited for."""
        alive = [t for t in threads if not t.greenlet.dead]
        if not alive:
            return []
        released = []
        for start in range(0, len(threads), WARP):
            lanes = threads[start : start + WARP]
            waiting = [t for t in lanes if t.waits and t.waits[0] == "warp"]
            if waiting:
                released += self._exchange(lanes, waiting)
        if released:
            return released
        places = {t.waits for t in alive}
        if len(places) > 1:
            raise Fault(f"threads wait at different barriers: {sorted(map(str, places))}")
        if len(alive) < len(threads):
            raise Fault(f"a barrier is not reached by all threads: {alive[0].waits}")
        self.barriers += 1
        combine = alive[0].waits[1]
        result = combine([t.offers for t in alive]) if combine else None
        for t in alive:
            t.gets = result
        return alive

    def _exchange(self, lanes: list[Thread], waiting: list[Thread]) -> list[Thread]:
        """Let one warp's lanes have what the others offer; none, while a lane of the mask is on its way."""
        _, operation, mask, _ = waiting[0].waits
        taking_part = [t for k, t in enumerate(lanes) if mask >> k & 1]
        if any(t.waits != waiting[0].waits for t in taking_part) or len(taking_part) < len(waiting):
            raise Fault(f"a warp's threads do not all reach {waiting[0].waits}")
        offers = [t.offers if t in taking_part else None for t in lanes]
        if operation is None:
            number = lanes[0].number // WARP
            self.warp_barriers[number] = self.warp_barriers.get(number, 0) + 1
        for k, t in enumerate(lanes):
            if t in taking_part and operation is not None:
                t.gets = operation(offers, k)
        return taking_part

    def wait(self, whom: str, operation: Any, mask: int, offers: Any = None) -> Any:
        frame = sys._getframe(2)
        thread = self.running
        where = (frame.f_code.co_filename.rpartition("/")[2], frame.f_lineno)
        thread.waits, thread.offers, thread.gets = (whom, operation, mask, where), offers, None
        self.hub.switch()
        return thread.gets


def _shuffled(source: Callable[[int, int], int]) -> Callable[[list[Any], int], Any]:
    def take(offers: list[Any], lane: int) -> Any:
        _, by = offers[lane]
        at = source(lane, by)
        at = at if 0 <= at < WARP else lane
        if at >= len(offers) or offers[at] is None:
            raise Fault(f"lane {lane} shuffles from lane {at}, which takes no part")
        return offers[at][0]

    return take


_XOR = _shuffled(operator.xor)
_DOWN = _shuffled(operator.add)
_UP = _shuffled(operator.sub)
_INDEX = _shuffled(lambda lane, at: at & (WARP - 1))


def _ballot(offers: list[Any], lane: int) -> int:
    return sum(1 << k for k, p in enumerate(offers) if p)


def _and(offers: list[Any]) -> int:
    return int(all(offers))


def _or(offers: list[Any]) -> int:
    return int(any(offers))


def _count(offers: list[Any]) -> int:
    return sum(map(bool, offers))


class View:
    """``cuda``, for the running thread."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.blockDim = SimpleNamespace(x=grid.threads, y=1, z=1)
        self.gridDim = SimpleNamespace(x=grid.blocks, y=1, z=1)

    @property
    def threadIdx(self) -> Any:
        return SimpleNamespace(x=self._grid.running.number, y=0, z=0)

    @property
    def blockIdx(self) -> Any:
        return SimpleNamespace(x=self._grid.block, y=0, z=0)

    @property
    def laneid(self) -> int:
        return self._grid.running.number & (WARP - 1)

    def syncthreads(self) -> None:
        self._grid.wait("block", None, 0)

    def syncthreads_and(self, p: Any) -> int:
        return self._grid.wait("block", _and, 0, p)

    def syncthreads_or(self, p: Any) -> int:
        return self._grid.wait("block", _or, 0, p)

    def syncthreads_count(self, p: Any) -> int:
        return self._grid.wait("block", _count, 0, p)

    def syncwarp(self, mask: int = 0xFFFFFFFF) -> None:
        self._grid.wait("warp", None, mask)

    def ballot_sync(self, mask: int, p: Any) -> int:
        return self._grid.wait("warp", _ballot, mask, p)

    def any_sync(self, mask: int, p: Any) -> bool:
        return self._grid.wait("warp", _ballot, mask, p) != 0

    def all_sync(self, mask: int, p: Any) -> bool:
        return self._grid.wait("warp", _ballot, mask, not p) == 0

    def shfl_sync(self, mask: int, x: Any, lane: int) -> Any:
        return self._grid.wait("warp", _INDEX, mask, (_number(x), lane))

    def shfl_xor_sync(self, mask: int, x: Any, by: int) -> Any:
        return self._grid.wait("warp", _XOR, mask, (_number(x), by))

    def shfl_down_sync(self, mask: int, x: Any, by: int) -> Any:
        return self._grid.wait("warp", _DOWN, mask, (_number(x), by))

    def shfl_up_sync(self, mask: int, x: Any, by: int) -> Any:
        return self._grid.wait("warp", _UP, mask, (_number(x), by))


def _number(x: Any) -> Any:
    """A number as a register holds it: a Python float is a literal that met no float32."""
    if type(x) is float:
        raise Fault("a float literal met no number of the arithmetic type: it is a float64")
    return x


# ---- derivatives --------------------------------------------------------------------------------------


class Jet:
    """Value, slope and curvature, as `kernels.jets` has them; a Const is a plain number here."""

    __array_ufunc__ = None  # a NumPy number leaves arithmetic with a Jet to the Jet

    def __init__(self, v: Any, d: Any, h: Any) -> None:
        self.v, self.d, self.h = v, d, h

    @staticmethod
    def of(x: Any, like: "Jet") -> "Jet":
        zero = type(like.v)(0)
        return x if isinstance(x, Jet) else Jet(type(like.v)(x), zero, zero)

    def chain(self, y: Any, d1: Any, d2: Any) -> "Jet":
        return Jet(y, d1 * self.d, d2 * (self.d * self.d) + d1 * self.h)

    def __add__(self, other: Any) -> "Jet":
        b = Jet.of(other, self)
        return Jet(self.v + b.v, self.d + b.d, self.h + b.h)

    def __mul__(self, other: Any) -> "Jet":
        b = Jet.of(other, self)
        cross = self.d * b.d
        h = self.v * b.h + self.h * b.v + (cross + cross)
        return Jet(self.v * b.v, self.v * b.d + self.d * b.v, h)

    def __truediv__(self, other: Any) -> "Jet":
        b = Jet.of(other, self)
        q = self.v / b.v
        d = (self.d - q * b.d) / b.v
        return Jet(q, d, (self.h - 2 * d * b.d - q * b.h) / b.v)

    def __rtruediv__(self, other: Any) -> "Jet":
        return Jet.of(other, self) / self

    def __pow__(self, p: Any) -> "Jet":
        if isinstance(p, Jet):
            return MATH.exp(p * MATH.log(self))
        T = type(self.v)
        return self.chain(
            self.v**p, T(p * self.v ** (p - 1)), T(p * (p - 1) * self.v ** (p - 2) if p != 1 else 0)
        )

    def __rpow__(self, other: Any) -> "Jet":
        return Jet.of(other, self) ** self

    def __neg__(self) -> "Jet":
        return Jet(-self.v, -self.d, -self.h)

    def __sub__(self, other: Any) -> "Jet":
        return self + -other

    def __rsub__(self, other: Any) -> "Jet":
        return -self + other

    def __abs__(self) -> "Jet":
        s = np.sign(self.v)
        return Jet(abs(self.v), s * self.d, s * self.h)

    def __bool__(self) -> bool:
        return bool(self.v != 0)

    __radd__, __rmul__ = __add__, __mul__


def _plain(x: Any) -> Any:
    return x.v if isinstance(x, Jet) else x


def _comparison(compare: Any) -> Any:
    return lambda a, b: compare(_plain(a), _plain(b))


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Jet, f"__{_name}__", _comparison(getattr(operator, _name)))


def _unary(function: Any, rule: Any) -> Any:
    def call(x: Any) -> Any:
        return x.chain(*rule(x.v)) if isinstance(x, Jet) else type(x)(function(x))

    return call


def _pick(c: Any, a: Any, b: Any) -> Any:
    """One of two numbers, as the type that they have together."""
    a_or_b = a if c else b
    for x in (a, b):
        if isinstance(x, Jet):
            return Jet.of(a_or_b, x)
    return next((type(x) for x in (a, b) if isinstance(x, np.floating)), float)(a_or_b)


def _extreme(first: Any) -> Any:
    def call(*xs: Any) -> Any:
        result = xs[0]
        for x in xs[1:]:
            a, b = _plain(result), _plain(x)
            result = _pick(first(a, b) or a != a, result, x)
        return result

    return call


def _xlogy(a: Any, b: Any) -> Any:
    return _pick(a == 0 and _plain(b) == _plain(b), a * 0 if isinstance(a, Jet) else 0, a * MATH.log(b))


# `numbaloss.math`, of Jets too; the rules are those of `kernels.jets`.
MATH = SimpleNamespace(
    where=_pick,
    maximum=_extreme(operator.ge),
    minimum=_extreme(operator.le),
    sign=lambda x: np.sign(_plain(x)),
    isnan=lambda x: bool(np.isnan(_plain(x))),
    power=operator.pow,
    xlogy=_xlogy,
)


# ---- substitution -------------------------------------------------------------------------------------


@cache
def _storage(code: int, width: int) -> SimpleNamespace:
    """A `target.Storage`, over Pointers."""
    T = target.storage(code).T

    def check(p: Pointer, *xs: Any) -> None:
        if p.code != code:
            raise Fault(f"storage {code} is read or written through a pointer to {p.array.dtype}")
        for x in xs:
            if type(x) is not T:
                raise Fault(f"a {type(x).__name__} is stored where the kernel computes in {T.__name__}")

    def load(p: Pointer | None, i: Any) -> Any:
        if p is None:
            return None
        check(p)
        return T(p[i])

    def store(p: Pointer | None, i: Any, x: Any) -> None:
        if p is not None:
            check(p, x)
            p[i] = p.array.dtype.type(x)

    def load_vectors(p: Pointer | None, indices: tuple[Any, ...]) -> Any:
        if p is None:
            return None
        return tuple(load(p, k) for i in indices for k in p.vector(i, width))

    def store_vectors(p: Pointer | None, indices: Any, wanted: Any, xs: Any) -> None:
        for n, (i, want) in enumerate(zip(indices, wanted, strict=True)):
            if p is not None and want:
                for k, x in zip(p.vector(i, width), xs[n * width : (n + 1) * width], strict=True):
                    store(p, k, x)

    return SimpleNamespace(
        code=code, T=T, width=width, load=load, store=store, load_vectors=load_vectors,
        store_vectors=store_vectors,
    )  # fmt: skip


def _each(function: Any, vectors: tuple[Any, ...], common: tuple[Any, ...]) -> tuple[Any, ...]:
    width = next(len(v) for v in vectors if v is not None)
    lanes = [function(*(None if v is None else v[k] for v in vectors), *common) for k in range(width)]
    return tuple(None if x[0] is None else tuple(map(_number, x)) for x in zip(*lanes, strict=True))


def _tree_sum(xs: tuple[Any, ...]) -> Any:
    while len(xs) > 1:
        xs = (*(a + b for a, b in zip(xs[::2], xs[1::2], strict=False)), *xs[len(xs) & ~1 :])
    return xs[0]


def _shared(grid: Grid, count: int, like: Any) -> Pointer:
    frame = sys._getframe(1)
    place = frame.f_code, frame.f_lasti  # every call from one place gets the same memory
    if place not in grid.memory:
        poison = np.nan if isinstance(like, np.floating) else -(2**31)
        kind = type(_number(like)) if isinstance(like, np.floating) else np.int64
        grid.memory[place] = Pointer(np.full(count, poison, kind), grid, written=False)
    return grid.memory[place]


def _atomic_max(p: Pointer, i: int, x: int) -> None:
    i += p.origin
    if not 0 <= i < p.array.size:
        raise Fault(f"index {i} of {p.array.size} is out of bounds")
    p.array[i] = max(p.array[i], x)


def _seeded(intrinsic: Any) -> Any:
    """`jets.seed`: its operand `variable` as a Jet of slope one."""
    how = _cells(intrinsic._defn)

    def seed(*operands: Any) -> tuple[Any, ...]:
        one, zero = type(operands[0])(1), type(operands[0])(0)
        given = operands[: how["arity"]]
        seeded = (Jet(x, one, zero) if k == how["variable"] else x for k, x in enumerate(given))
        return *seeded, *map(type(operands[0]), how["absent"])

    return seed


def _placed(intrinsic: Any) -> Any:
    """`jets.place`: numbers of a tuple as they are, or by threes as Jets."""
    slots = _cells(intrinsic._defn)["slots"]

    def place(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(Jet(*(numbers[k] for k in s)) if len(s) == 3 else numbers[s[0]] for s in slots)

    return place


def _varied(intrinsic: Any) -> Any:
    """`jets.vary`: the number `variable` as a Jet of slope one."""
    variable = _cells(intrinsic._defn)["variable"]

    def vary(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(Jet(x, type(x)(1), type(x)(0)) if k == variable else x for k, x in enumerate(numbers))

    return vary


def _picked(intrinsic: Any) -> Any:
    """`jets.pick`."""
    indices = _cells(intrinsic._defn)["indices"]
    return lambda items: tuple(items[k] for k in indices)


def _stretched(intrinsic: Any) -> Any:
    """`jets.stretch`."""
    flags = _cells(intrinsic._defn)["flags"]
    return lambda o, r: tuple(x * r if flag else x for x, flag in zip(o, flags, strict=True))


def _parts_of(intrinsic: Any) -> Any:
    """`jets.split`: values, slopes and curvatures of several."""
    count = _cells(intrinsic._defn)["count"]

    def split(ys: Any, like: Any) -> tuple[Any, ...]:
        found = [_parts(y, like) for y in (ys if isinstance(ys, tuple) else (ys,))]
        assert len(found) == count
        return tuple(zip(*found, strict=True))

    return split


def _power_of_two(m: Any) -> Any:
    """`target.power_of_two`."""
    bits, bias = {np.float32: (23, 127), np.float64: (52, 1023)}[type(m)]
    field = max(int(m.view(f"i{m.itemsize}")) >> bits, 1)
    e = bias if field == 2 * bias + 1 else max(2 * bias - field, 1)
    return type(m)(np.ldexp(1.0, e - bias))


def _options(intrinsic: Any) -> Any:
    """`target.options`."""
    values = _cells(intrinsic._defn)["values"]

    def unpack(numbers: tuple[Any, ...], like: Any) -> tuple[Any, ...]:
        given = iter(numbers)
        return tuple(next(given) if v is None else v for v in values)

    return unpack


def _parts(y: Any, like: Any) -> tuple[Any, ...]:
    if isinstance(y, Jet):
        return y.v, y.d, y.h
    T = type(like)
    return T(y), T(0), T(0)


def _chosen(choose: Any, ordinary: Any) -> Any:
    """``max`` or ``min``, which on a GPU pass over NaNs."""

    def call(*xs: Any) -> Any:
        floats = [x for x in xs if isinstance(x, np.floating)]
        if not floats:
            return ordinary(*xs)
        return choose(*map(type(floats[0]), map(_number, xs)))

    return call


_larger, _smaller = _chosen(np.fmax, max), _chosen(np.fmin, min)


def _cells(function: Any) -> dict[str, Any]:
    return dict(
        zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True)
    )


# An intrinsic that is made anew for each loss is known by its name.
_MADE = {
    "seeded": _seeded,
    "placed": _placed,
    "unpack": _options,
    "varied": _varied,
    "picked": _picked,
    "stretched": _stretched,
    "parts_of": _parts_of,
}


class _Substitution:
    """Functions as they are, but that what they refer to is Python for `grid`."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.done: dict[Any, Any] = {}
        self.known = {
            id(target.cuda): grid.cuda,
            id(nm): MATH,
            id(target.each): _each,
            id(target.tree_sum): _tree_sum,
            id(target.select): lambda c, a, b: a if c else b,
            id(target.shared): partial(_shared, grid),
            id(target.atomic_max): _atomic_max,
            id(target.unravel): lambda i, shape: tuple(map(int, np.unravel_index(int(i), shape))),
            id(target.dot): lambda xs, ys: sum(map(operator.mul, xs, ys)),
            id(target.power_of_two): _power_of_two,
            id(target.derivatives().parts): _parts,
            id(target.derivatives().join): lambda *parts: tuple(Jet(*x) for x in zip(*parts, strict=True)),
            **{id(f): getattr(MATH, f.__name__) for f in vars(nm).values() if hasattr(MATH, _name_of(f))},
        }

    def __call__(self, x: Any) -> Any:
        if id(x) in self.known:
            return self.known[id(x)]
        if isinstance(x, target.Storage):
            return _storage(x.code, x.width)
        if hasattr(x, "_defn"):
            return _MADE[x._defn.__name__](x)
        if hasattr(x, "py_func") or isinstance(x, FunctionType):
            function = getattr(x, "py_func", x)
            package = function.__module__.partition(".")[0]
            if package in ("numpy", "numba") or package in sys.stdlib_module_names:
                return x
            if id(function) not in self.done:
                self.done[id(function)] = copy = self._blank(function)
                self._fill(copy, function)
            return self.done[id(function)]
        if isinstance(x, ModuleType) and x.__name__.partition(".")[0] == "numbaloss":
            return _Module(x, self)
        return x

    @staticmethod
    def _blank(function: FunctionType) -> FunctionType:
        cells = tuple(CellType() for _ in function.__closure__ or ()) or None
        scope = {**function.__globals__, "max": _larger, "min": _smaller}
        return FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)

    def _fill(self, copy: FunctionType, function: FunctionType) -> None:
        for name in _names(function.__code__):
            if name in copy.__globals__:
                copy.__globals__[name] = self(copy.__globals__[name])
        for cell, original in zip(copy.__closure__ or (), function.__closure__ or (), strict=True):
            cell.cell_contents = self(original.cell_contents)


class _Module:
    def __init__(self, module: ModuleType, substitute: _Substitution) -> None:
        self._module, self._substitute = module, substitute

    def __getattr__(self, name: str) -> Any:
        return self._substitute(getattr(self._module, name))


def _name_of(x: Any) -> str:
    return getattr(x, "__name__", "") if isinstance(x, FunctionType) else ""


def _names(code: CodeType) -> set[str]:
    nested = (_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*nested)


def launch(
    kernel: Callable[..., None],
    blocks: int,
    threads: int,
    *arguments: Any,
    order: str = "forward",
    seed: int = 0,
) -> None:
    """Run a kernel.

    Parameters
    ----------
    kernel : function
        As it is compiled: bound, and not decorated.
    blocks, threads : int
    *arguments
        For a pointer a flat array (float16 and bfloat16 as such) or None; for a scalar of the arithmetic type
        a NumPy number; ints; tuples of these.
    order : {'forward', 'reverse', 'random'}
        Of the threads of a block between two barriers, and of the blocks.
    seed : int
        Of the random order.
    """
    grid = Grid(blocks, threads, order, seed)

    def given(a: Any) -> Any:
        if isinstance(a, At):
            return Pointer(a.array, grid, origin=a.origin)
        if isinstance(a, tuple):
            return tuple(map(given, a))
        return Pointer(a, grid) if isinstance(a, np.ndarray) else a

    grid.run(_Substitution(grid)(kernel), tuple(map(given, arguments)))


for _rule, _spellings in jets.UNARY.items():
    _rule = FunctionType(_rule.__code__, {**_rule.__globals__, "nm": MATH})
    setattr(MATH, _spellings[0].__name__, _unary(_spellings[0], _rule))
