"""A GPU that executes PTX: memory whose every byte has bounds and a history, and threads as arrays of lanes.

A launch runs its blocks in chunks. The warps of a chunk are dealt to units; a unit runs its lanes together,
those at the smallest program counter first, until all are finished or wait at a barrier. Then comes another
unit. So with several units the warps of a block are as far apart in time as barriers let them.

Whatever is wrong raises a `Fault`: an access out of bounds, not aligned or of what nothing wrote; a race;
lanes that wait for others, which do not come.
"""

import bisect
import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic
from .code import SHARED_WINDOW, SPECIAL, Coder
from .text import DTYPES, WAITS, Ins, Unknown, parse

READ, WRITE, INIT = 1, 2, 4  # of a byte: what may be done, and whether something has written it
NONE = -1
TABLES = 8192  # bytes for the constants of modules
LIBC = ctypes.CDLL(None, use_errno=True)
U4, BOOL = np.dtype("u4"), np.dtype(bool)

# A moment in a number: block, barriers that it has passed, warp, barriers that that has passed, lane.
AT_WARP, AT_STEP, AT_BLOCK = 15, 21, 37


class Fault(Exception):
    """What a kernel must not do."""


def said(moment: int) -> str:
    return f"block {moment >> AT_BLOCK}, warp {moment >> AT_WARP & 63}, lane {moment & 31}"


class Tracker:
    """Who has written and read which cell of memory, within a launch."""

    def __init__(self, size: int, granule: int) -> None:
        self.granule = granule
        n = size // granule + 1
        # Of each cell the last to write, and of those that have read it since a barrier the first and the
        # last moment; of all blocks that have read it, too.
        self.writer, self.low, self.high = (np.full(n, NONE, np.int64) for _ in range(3))
        self.low_block, self.high_block = (np.full(n, NONE, np.int32) for _ in range(2))

    def cells(self, a: np.ndarray, width: int, moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        k = max(1, width // self.granule)
        first = a // self.granule
        if k == 1:
            return first, moment
        return (first[:, None] + np.arange(k)).ravel(), np.repeat(moment, k)

    def compare(self, before: np.ndarray, now: np.ndarray, what: str, cells: np.ndarray) -> None:
        """Refuse accesses of two moments between which no barrier is."""
        pick = (before != NONE) & (before != now)
        if not pick.any():
            return
        b, c = before[pick], now[pick]
        bad = b >> AT_BLOCK != c >> AT_BLOCK
        bad |= (b >> AT_STEP == c >> AT_STEP) & ((b >> AT_WARP != c >> AT_WARP) | (b >> 5 == c >> 5))
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            at = int(cells[pick][k]) * self.granule
            raise Fault(f"race: {what}, {said(int(b[k]))} then {said(int(c[k]))}", at)

    def read(self, a: np.ndarray, width: int, moment: np.ndarray) -> None:
        cells, moment = self.cells(a, width, moment)
        self.compare(self.writer[cells], moment, "read after write", cells)
        old, block = self.high[cells], (moment >> AT_BLOCK).astype(np.int32)
        if (old == NONE).all():
            self.high[cells] = moment
            if (self.high[cells] == moment).all():
                self.low[cells], self.low_block[cells], self.high_block[cells] = moment, block, block
                return
            self.high[cells] = NONE
        elif (old == moment).all():
            return
        fresh = (old == NONE) | (old >> AT_STEP != moment >> AT_STEP)
        self.high[cells[fresh]] = NONE
        self.low[cells[fresh]] = np.iinfo(np.int64).max
        self.low_block[cells[self.low_block[cells] == NONE]] = np.iinfo(np.int32).max
        np.maximum.at(self.high, cells, moment)
        np.minimum.at(self.low, cells, moment)
        np.maximum.at(self.high_block, cells, block)
        np.minimum.at(self.low_block, cells, block)

    def write(self, a: np.ndarray, width: int, moment: np.ndarray) -> None:
        cells, moment = self.cells(a, width, moment)
        self.compare(self.writer[cells], moment, "write after write", cells)
        if (self.high[cells] != NONE).any():
            for before in (self.high, self.low):
                self.compare(before[cells], moment, "write after read", cells)
            for blocks in (self.low_block, self.high_block):
                before = blocks[cells].astype(np.int64)
                self.compare(
                    np.where(before == NONE, NONE, before << AT_BLOCK),
                    moment >> AT_BLOCK << AT_BLOCK,
                    "write after read",
                    cells,
                )
        self.writer[cells] = moment
        self.compare(self.writer[cells], moment, "two writes at once", cells)


class Space:
    """Memory, with what may be read and written of it."""

    def __init__(self, size: int, granule: int = 0) -> None:
        self.size = -(-size // 64) * 64 + 64
        self.bytes, self.flags = np.zeros(self.size, np.uint8), np.zeros(self.size, np.uint8)
        self.views: dict[Any, np.ndarray] = {}
        self.tracker = Tracker(self.size, granule) if granule else None

    def view(self, T: Any, flags: bool = False) -> np.ndarray:
        key = T, flags
        if key not in self.views:
            self.views[key] = (self.flags if flags else self.bytes).view(T)
        return self.views[key]

    def check(self, a: np.ndarray, width: int, need: int) -> None:
        for bad, what in (
            (a & (width - 1) != 0, "not aligned"),
            ((a < 0) | (a > self.size - width), "out of bounds"),
        ):
            if bad.any():
                raise Fault(f"{width} bytes {what}", int(a[bad][0]))
        word = min(width, 8)
        pattern = np.array(need * (0x0101010101010101 & ((1 << 8 * word) - 1)), f"u{word}")
        for k in range(width // word):
            found = self.view(pattern.dtype, flags=True)[a // word + k]
            bad = found & pattern != pattern
            if bad.any():
                at = int(a[bad][0])
                own = self.flags[at : at + width]
                basic = need & ~INIT
                what = "that nothing wrote" if (own & basic == basic).all() else "out of bounds"
                raise Fault(f"{'write' if need & WRITE else 'read'} of {width} bytes {what}", at)

    def load(self, a: np.ndarray, T: np.dtype, count: int, moment: np.ndarray) -> np.ndarray:
        width = T.itemsize * count
        self.check(a, width, READ | INIT)
        if self.tracker is not None:
            self.tracker.read(a, width, moment)
        if count == 1:
            return self.view(T)[a // width]
        return self.view(T)[(a // T.itemsize)[:, None] + np.arange(count)]

    def store(self, a: np.ndarray, T: np.dtype, values: Any, moment: np.ndarray) -> None:
        width = T.itemsize * len(values)
        self.check(a, width, WRITE)
        if self.tracker is not None:
            self.tracker.write(a, width, moment)
        word = min(width, 8)
        pattern = np.array(INIT * (0x0101010101010101 & ((1 << 8 * word) - 1)), f"u{word}")
        for k, v in enumerate(values):
            self.view(T)[a // T.itemsize + k] = v
        for k in range(width // word):
            self.view(pattern.dtype, flags=True)[a // word + k] |= pattern


def picked(v: Any, keep: Any) -> Any:
    return v[keep] if keep is not None and isinstance(v, np.ndarray) and v.ndim else v


class Unit:
    """Lanes that run together: whole warps."""

    def __init__(self, chunk: "Chunk", lanes: np.ndarray) -> None:
        self.chunk, self.machine, self.program = chunk, chunk.machine, chunk.program
        self.module = module = chunk.program.module
        n = self.n = lanes.size
        self.slot = lanes // chunk.threads  # the block within the chunk
        tid = lanes % chunk.threads
        self.tid, self.laneid = tid.astype(np.uint32), (tid & 31).astype(np.uint32)
        block = chunk.first + self.slot
        self.ctaid = block.astype(np.uint32)
        self.ntid = np.full(n, chunk.threads, np.uint32)
        self.nctaid = np.full(n, chunk.grid, np.uint32)
        self.warp = lanes // 32  # within the chunk
        self.base = (block << AT_BLOCK) | ((tid >> 5) << AT_WARP) | (tid & 31)
        self.local_base = np.arange(n) * module.local_size
        if module.local_size:
            self.local = Space(module.local_size * n)
            self.local.flags[:] = READ | WRITE
        fill = np.full(n, self.machine.poison, np.uint64).view(np.uint8).reshape(n, 8)
        self.R: list[Any] = [None] * len(module.registers)
        for r in self.program.kept:
            T = module.registers[r]
            raw = np.ascontiguousarray(fill[:, : T.itemsize])
            self.R[self.program.slots[r]] = np.zeros(n, bool) if T == BOOL else raw.view(T).reshape(n)
        self.ALL = np.ones(n, bool)
        self.ready: dict[int, np.ndarray] = {0: self.ALL}  # by the block of code that is next
        self.blocked: dict[int, np.ndarray] = {}  # at what lanes of a warp wait for
        self.waiting: dict[int, np.ndarray] = {}  # at barriers of the block
        self.exited = np.zeros(n, bool)
        self.advance()

    def advance(self) -> None:
        c = self.chunk
        self.moment = self.base + (c.steps[self.slot] << AT_STEP) + ((c.warp_steps[self.warp] & 1023) << 5)

    # ---- what the code of blocks calls
    def parameter(self, name: str, T: np.dtype, n: int) -> np.ndarray:
        return np.full(n, np.frombuffer(self.chunk.parameters[name], T, 1)[0])

    def _space(self, space: str, width: int, a: np.ndarray, lanes: Any) -> tuple[Space, np.ndarray]:
        """The memory of a state space, and where in it a lane's addresses are."""
        if space == "global":
            return self.machine.memory, a - self.machine.base
        if space == "local":
            return self.local, a + picked(self.local_base, lanes)
        size = self.chunk.shared_size
        if ((a < 0) | (a > size - width)).any():
            raise Fault(f"{width} bytes out of the shared window")
        return self.chunk.shared, a + picked(self.slot, lanes) * size

    def access(self, how: Any, space: str, where: Any, width: int, sel: Any, guard: Any, ins: Ins) -> Any:
        """Do `how(memory, places, moments, keep)` for the lanes whose guard holds: `keep` of `where`."""
        a = where.view(np.int64)
        keep = None if guard is None else np.flatnonzero(np.broadcast_to(guard, a.shape))
        lanes = sel if keep is None else keep if sel is None else sel[keep]
        a = picked(a, keep)
        if not a.size:
            return None, keep
        try:
            memory, a = self._space(space, width, a, lanes)
            return how(memory, a, picked(self.moment, lanes), keep), keep
        except Fault as fault:
            at = fault.args[1] if len(fault.args) > 1 else None
            place = self.machine.where(at) if at is not None and space == "global" else space
            raise Fault(f"{self.module.name}: {fault.args[0]} of {place} [{ins.text}]") from None

    def _spaces(self, where: np.ndarray, guard: Any) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Of generic addresses the lanes of each space, and the addresses there."""
        keep = np.ones(where.shape, bool) if guard is None else np.broadcast_to(guard, where.shape)
        shared = where >> np.uint64(48) == 1
        return [
            ("global", keep & ~shared, where),
            ("shared", keep & shared, where - np.uint64(SHARED_WINDOW)),
        ]

    def load(self, space: str, where: Any, T: Any, count: int, sel: Any, guard: Any, ins: Ins) -> Any:
        if not space:
            parts = [
                self.load(one, at, T, count, sel, keep, ins) for one, keep, at in self._spaces(where, guard)
            ]
            return np.where(where >> np.uint64(48) == 1, *parts[::-1])
        found, keep = self.access(
            lambda memory, a, moment, keep: memory.load(a, T, count, moment),
            space, where, T.itemsize * count, sel, guard, ins,
        )  # fmt: skip
        if keep is None:
            return found
        whole = np.zeros((where.size, count) if count > 1 else where.size, T)
        if found is not None:
            whole[keep] = found
        return whole

    def store(self, space: str, where: Any, T: Any, values: Any, sel: Any, guard: Any, ins: Ins) -> None:
        if not space:
            for one, keep, at in self._spaces(where, guard):
                self.store(one, at, T, values, sel, keep, ins)
            return
        self.access(
            lambda memory, a, moment, keep: memory.store(a, T, [picked(v, keep) for v in values], moment),
            space, where, T.itemsize * len(values), sel, guard, ins,
        )  # fmt: skip

    def atomic(self, where: Any, T: Any, how: str, value: Any, sel: Any, guard: Any, ins: Ins) -> None:
        def do(memory: Space, a: np.ndarray, moment: np.ndarray, keep: Any) -> None:
            memory.check(a, T.itemsize, READ | WRITE | INIT)
            {"max": np.maximum, "min": np.minimum, "add": np.add}[how].at(
                memory.view(T), a // T.itemsize, picked(value, keep)
            )

        self.access(do, "global", where, T.itemsize, sel, guard, ins)

    # ---- running
    def put(self, pc: int, mask: np.ndarray) -> None:
        mask = self.ready.get(pc, mask) | mask
        self.ready[pc] = self.ALL if mask.all() else mask

    def run(self) -> None:
        module = self.module
        while self.ready:
            while self.ready:
                pc = min(self.ready)
                self.step(pc, self.ready.pop(pc))
            # What waits for lanes that have meanwhile finished goes on.
            for pc in list(self.blocked):
                self.wait(pc, self.blocked.pop(pc), module.blocks[pc].end)
            if self.blocked and not self.ready:
                end = module.blocks[min(self.blocked)].end
                raise Fault(f"{module.name}: not all lanes of a mask come to [{end.text}]")

    def step(self, pc: int, mask: np.ndarray) -> None:
        """Run a block of code."""
        self.machine.steps += 1
        if self.machine.steps > self.machine.limit:
            raise Fault(f"{self.module.name}: does not end")
        block = self.module.blocks[pc]
        end, full, taken = block.end, mask is self.ALL, None
        if end is not None and end.head in WAITS:
            self.wait(pc, mask, end)
            return
        if block.code or (end is not None and end.pred):
            idx = None if full else np.flatnonzero(mask)
            given = self.program.compiled(block, full)(self, self.R, idx, self.n if full else idx.size)
            if given is not None:
                taken = given if full else np.zeros(self.n, bool)
                if not full:
                    taken[idx[given]] = True
        if end is None:
            self.put(pc + 1, mask)
            return
        taken = mask if taken is None else taken
        if end.op == "bra":
            if taken.any():
                self.put(self.module.labels[end.args[0]], taken)
        else:
            self.exited |= taken
        other = mask & ~taken
        if other.any():
            self.put(pc + 1, other)

    def operand(self, a: Any, T: np.dtype) -> np.ndarray:
        if isinstance(a, tuple):
            if a[0] == "not":
                return ~self.operand(a[1], T)
            return (
                np.full(self.n, a[1] & ((1 << 8 * T.itemsize) - 1), np.uint64)
                .astype(f"u{T.itemsize}")
                .view(T)
            )
        if a in SPECIAL:
            return getattr(self, SPECIAL[a][2:]).view(T)
        return self.R[self.program.slots[a]].view(T)

    def assign(self, r: Any, value: np.ndarray, mask: np.ndarray) -> None:
        if r != "_":
            k, value = self.program.slots[r], value.view(self.module.registers[r])
            self.R[k] = np.where(mask, value, self.R[k])

    def wait(self, pc: int, mask: np.ndarray, end: Ins) -> None:
        """Let lanes on that wait for others of their warp, if those are there; keep those at a barrier."""
        if end.head == "bar" and not end.op.startswith("bar.warp"):
            if end.args[-1 if end.op == "bar.sync" else 1] != ("i", 0):
                raise Unknown(end.text)
            before = self.waiting.get(pc)
            self.waiting[pc] = mask if before is None else before | mask
            return
        mask = mask | self.blocked.pop(pc, mask)
        warps, alive = mask.reshape(-1, 32), ~self.exited.reshape(-1, 32)
        # The lanes that must come: of the mask that each names.
        members = self.operand(end.args[{"shfl": 4, "vote": 2, "bar": 0}[end.head]], U4).reshape(-1, 32)
        each = np.arange(len(warps)), np.argmax(warps, axis=1)
        own = (members[each][:, None] >> np.arange(32, dtype=np.uint32)) & 1 != 0
        if (warps & (members != members[each][:, None])).any() or (warps & ~own).any():
            raise Fault(
                f"{self.module.name}: lanes of a warp name other masks, or not themselves [{end.text}]"
            )
        complete = ~(own & alive & ~warps).any(axis=1, keepdims=True)
        go, rest = (warps & complete).ravel(), warps & ~complete
        if rest.any():
            self.blocked[pc] = rest.ravel()
        if not go.any():
            return
        if end.head == "bar":
            self.chunk.warp_steps[np.unique(self.warp[go])] += 1
            self.advance()
        elif end.head == "shfl":
            self.shuffle(end, go)
        else:
            self.vote(end, go)
        self.put(pc + 1, go)

    def shuffle(self, end: Ins, mask: np.ndarray) -> None:
        _, _, how, kind = end.op.split(".")
        d, a, b, c = end.args[:4]
        value, b, c = (self.operand(x, U4) for x in (a, b, c))
        lane, b, c = (x.astype(np.int64) for x in (self.laneid, b & 31, c))
        segment, clamp = c >> 8 & 31, c & 31
        most = (lane & segment) | (clamp & ~segment)
        if how not in ("bfly", "down", "up", "idx") or kind != "b32":
            raise Unknown(end.text)
        j = {"bfly": lane ^ b, "down": lane + b, "up": lane - b, "idx": (lane & segment) | (b & ~segment)}[
            how
        ]
        inside = j >= most if how == "up" else j <= most
        source = np.arange(self.n) - lane + np.where(inside, j, lane)
        if (mask & ~mask[source]).any():
            raise Fault(f"{self.module.name}: a lane reads one that takes no part [{end.text}]")
        if isinstance(d, list):
            self.assign(d[1], inside, mask)
            d = d[0]
        self.assign(d, value[source], mask)

    def vote(self, end: Ins, mask: np.ndarray) -> None:
        how, kind = end.op.split(".")[2:]
        votes = self.operand(end.args[1], BOOL).reshape(-1, 32)
        here = mask.reshape(-1, 32)
        if kind == "pred":
            found = {"any": (votes & here).any(axis=1), "all": (votes | ~here).all(axis=1)}[how]
        else:
            found = ((votes & here) << np.arange(32, dtype=np.uint64)).sum(axis=1).astype(np.uint32)
        self.assign(end.args[0], np.repeat(found, 32), mask)


class Program:
    """A module with the code of its blocks, made when first needed."""

    def __init__(self, text: str, place: Callable[[bytes], int]) -> None:
        self.module = parse(text)
        self.slots = {r: k for k, r in enumerate(self.module.registers)}
        self.kept = [r for r in self.module.registers if r not in self.module.temporary]
        tables = {name: place(numbers) for name, numbers in self.module.tables.items()}
        self.scope: dict[str, Any] = dict(np=np, S=arithmetic, where=np.where, full=np.full, tables=tables)

    def compiled(self, block: Any, full: bool) -> Any:
        """The function that does a block, of all lanes of a unit or of some."""
        if full not in block.made:
            source = Coder(self.module, block, full, self.slots, self.scope).code()
            exec(compile(source, f"{self.module.name}:{block.index}", "exec"), self.scope)
            block.made[full] = self.scope.pop("block")
        return block.made[full]


class Chunk:
    """Some blocks of a launch."""

    def __init__(
        self,
        machine: "Machine",
        program: Program,
        first: int,
        blocks: int,
        grid: int,
        threads: int,
        given: Any,
    ) -> None:
        self.machine, self.program, self.parameters = machine, program, given
        self.first, self.blocks, self.grid, self.threads = first, blocks, grid, threads
        m = program.module
        self.shared_size = -(-m.shared_size // 16) * 16 + 16
        self.shared = Space(self.shared_size * blocks, m.granule["shared"])
        self.shared.bytes[:] = machine.poison & 0xFF
        for at, size in m.shared.values():
            for k in range(blocks):
                self.shared.flags[k * self.shared_size + at :][:size] = READ | WRITE
        self.steps = np.zeros(blocks, np.int64)
        lanes = np.arange(blocks * threads)
        self.warp_steps = np.zeros(lanes.size // 32, np.int64)
        owner = np.repeat(machine.rng.integers(0, machine.units, lanes.size // 32), 32)
        dealt = (lanes[owner == k] for k in range(machine.units))
        self.units = [Unit(self, d) for d in dealt if d.size]

    def run(self) -> None:
        while True:
            for k in self.machine.rng.permutation(len(self.units)):
                self.units[k].run()
            arrived, gone, yes = (np.zeros(self.blocks, np.int64) for _ in range(3))
            places = np.full(self.blocks, -1)
            for u in self.units:
                gone += np.bincount(u.slot[u.exited], minlength=self.blocks)
                for pc, mask in u.waiting.items():
                    slots, end = u.slot[mask], u.module.blocks[pc].end
                    arrived += np.bincount(slots, minlength=self.blocks)
                    if ((places[slots] != -1) & (places[slots] != pc)).any():
                        raise Fault(f"{u.module.name}: threads wait at different barriers [{end.text}]")
                    places[slots] = pc
                    if ".red" in end.op:
                        yes += np.bincount(u.slot[mask & u.operand(end.args[2], BOOL)], minlength=self.blocks)
            if not arrived.any():
                return
            if ((arrived > 0) & (arrived + gone != self.threads)).any() or ((arrived > 0) & (gone > 0)).any():
                raise Fault(f"{self.program.module.name}: a barrier is not reached by all threads")
            self.steps[arrived > 0] += 1
            for u in self.units:
                u.advance()
                for pc, mask in list(u.waiting.items()):
                    end = u.module.blocks[pc].end
                    if ".red" in end.op:
                        votes = {"or": yes > 0, "and": yes == arrived, "popc": yes.astype(np.uint32)}
                        u.assign(end.args[0], votes[end.op.split(".")[2]][u.slot], mask)
                    u.put(pc + 1, mask)
                u.waiting.clear()


class Machine:
    """Memory, and launches.

    Attributes
    ----------
    units : int
        Between which the warps of a launch are dealt.
    poison : int
        What memory and registers hold that nothing has written.
    """

    def __init__(self, size: int = 1 << 26) -> None:
        self.map = mmap.mmap(-1, size)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        if LIBC.mprotect(ctypes.c_void_p(self.base), ctypes.c_size_t(size), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self.memory = Space(size)
        self.programs: dict[str, Program] = {}
        self.units, self.poison, self.rng = 1, 0x7FF4DEADFFC0BEEF, np.random.default_rng(0)
        self.steps, self.limit = 0, 1 << 62  # blocks of code that were run; and may be
        self.chunk_lanes = 8192
        self.used = self.start = 256 + TABLES
        self.tables: dict[bytes, int] = {}
        self.blocks: list[tuple[int, int, str, int]] = []  # start, size, name, device

    def clear(self) -> None:
        """Forget all arrays."""
        self.memory.flags[self.start : self.used] = 0
        self.blocks.clear()
        self.used = self.start

    def allocate(self, size: int, name: str, on: int, room: int = 0) -> int:
        """Where new memory starts, `room` bytes after a multiple of 256."""
        at = self.used + room
        self.used += -(-max(size + room, 1) // 256) * 256 + 256
        assert self.used < self.memory.size, "out of memory"
        self.memory.bytes[at : at + size] = np.resize(np.uint64([self.poison]).view(np.uint8), size)
        self.memory.flags[at : at + size] = READ | WRITE
        self.blocks.append((at, size, name, on))
        return at

    def holds(self, x: int) -> bool:
        return self.base <= x < self.base + self.memory.size

    def block(self, address: int) -> tuple[int, int, str, int]:
        """The block of memory that an address is in, or after."""
        k = bisect.bisect_right(self.blocks, (address - self.base, 1 << 62)) - 1
        return self.blocks[k]

    def where(self, at: int) -> str:
        near = [b for b in self.blocks if b[0] - 256 <= at < b[0] + b[1] + 256]
        return ", ".join(f"{name}+{at - start} (of {size})" for start, size, name, _ in near) or f"{at}"

    def table(self, numbers: bytes) -> int:
        """The address of a module's constants, which can be read and not written."""
        if numbers not in self.tables:
            at = 256 + sum(-(-len(other) // 256) * 256 + 256 for other in self.tables)
            assert at + len(numbers) + 256 <= self.start, "no more room for tables"
            self.memory.bytes[at : at + len(numbers)] = np.frombuffer(numbers, np.uint8)
            self.memory.flags[at : at + len(numbers)] = READ | INIT
            self.tables[numbers] = self.base + at
        return self.tables[numbers]

    def program(self, text: str) -> Program:
        if text not in self.programs:
            self.programs[text] = Program(text, self.table)
        return self.programs[text]

    def launch(self, program: Program, grid: int, threads: int, given: list[bytes]) -> None:
        """Run a kernel; its parameters lie in 8 bytes each."""
        m = program.module
        assert not threads % 32 and 0 < threads <= (m.maxntid or 1024) and 0 < grid < 2**31, (grid, threads)
        assert m.shared_real <= 48 << 10
        parameters = {
            name: raw[: DTYPES[kind].itemsize] for (name, kind), raw in zip(m.parameters, given, strict=True)
        }
        self.memory.tracker = Tracker(self.used, m.granule["global"])
        per = max(1, self.chunk_lanes // threads)
        with np.errstate(all="ignore"):
            for first in self.rng.permutation(np.arange(0, grid, per)).tolist():
                Chunk(self, program, first, min(per, grid - first), grid, threads, parameters).run()
        self.memory.tracker = None
