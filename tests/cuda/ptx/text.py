"""PTX's text as blocks of instructions.

:func:`parse` reads a module: an entry point, its parameters, registers and shared variables. Functions that
it calls are put in place of the calls. Of what is not known here it raises `Unknown`.

A block ends at a branch, a label, or an instruction by which threads wait for each other.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class Unknown(Exception):
    """Something of PTX that is not known here."""


DTYPES = {
    f"{kind}{8 * size}": np.dtype(f"{'u' if kind == 'b' else 'i' if kind == 's' else kind}{size}")
    for kind, sizes in {"b": (1, 2, 4, 8), "u": (1, 2, 4, 8), "s": (1, 2, 4, 8), "f": (2, 4, 8)}.items()
    for size in sizes
}
DTYPES |= {"pred": np.dtype(bool), "bf16": np.dtype("u2")}

WAITS = ("shfl", "bar", "vote")  # instructions by which threads wait for each other
NO_RESULT = ("st", "bra", "ret", "bar", "membar", "red")
GAP = 256  # bytes that are nobody's between two shared or local variables


@dataclass
class Ins:
    """An instruction.

    An operand is a register's name, a number ``("i", 3)`` (bits of float32 ``"f"``, of float64 ``"d"``), an
    address ``("at", base, offset)``, a negated predicate ``("not", name)``, or a list of these.
    """

    op: str
    args: list[Any]
    pred: str | None = None
    negated: bool = False
    text: str = ""

    @property
    def head(self) -> str:
        return self.op.split(".")[0]

    @property
    def results(self) -> list[Any]:
        return [] if self.head in NO_RESULT and ".red." not in self.op else self.args[:1]


@dataclass
class Block:
    index: int
    code: list[Ins] = field(default_factory=list)
    end: Ins | None = None  # a branch, `ret`, or what threads wait at; without one it falls through
    made: dict[bool, Any] = field(default_factory=dict)


@dataclass
class Module:
    name: str = ""
    parameters: list[tuple[str, str]] = field(default_factory=list)  # names and types
    registers: dict[str, np.dtype] = field(default_factory=dict)
    temporary: set[str] = field(default_factory=set)  # registers that one block alone uses
    blocks: list[Block] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # where each variable is, and its size
    tables: dict[str, bytes] = field(default_factory=dict)  # constants, as libdevice's coefficients of sin
    shared_size: int = 0  # with the gaps
    shared_real: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_size: int = 0
    maxntid: int = 0
    # The smallest access to each state space.
    granule: dict[str, int] = field(default_factory=lambda: {"global": 16, "shared": 16})


def split(text: str) -> list[str]:
    """Operands at commas, but for those within brackets."""
    return [p.strip() for p in re.findall(r"(?:[^,{\[(]|\{[^}]*\}|\[[^\]]*\]|\([^)]*\))+", text) if p.strip()]


class Function:
    """A function's text: its name, parameters, what it returns, and its body."""

    def __init__(self, header: str, body: str) -> None:
        self.body, self.entry = body, ".entry" in header
        found = re.search(r"\.(?:entry|func)\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?", header)
        assert found is not None
        returned, self.name, listed = found.groups()
        parameter = r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[\d+\])?"
        self.returns = [m[2] for r in split(returned or "") if (m := re.fullmatch(parameter, r))]
        assert len(self.returns) == len(split(returned or ""))
        self.parameters = []
        for p in split(listed or ""):
            one = re.fullmatch(parameter, p)
            if not one or ("[" in p and self.entry):
                raise Unknown(f"parameter {p!r}")
            self.parameters.append((one[2], one[1]))
        most = re.search(r"\.maxntid\s+(\d+)", header)
        self.maxntid = int(most[1]) if most else 0


def functions(text: str) -> tuple[dict[str, Function], list[str]]:
    """A module's functions by name, and its other statements."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"^\.(version|target|address_size).*$", "", text, flags=re.M)
    found, rest, at = {}, [], 0
    begins = re.compile(r"(?:\.(?:visible|extern|weak)\s+)*\.(?:entry|func)\b")
    while m := begins.search(text, at):
        rest += re.findall(r"[^;]+;", text[at : m.start()])
        brace, semicolon = text.index("{", m.start()), text.find(";", m.start())
        if -1 < semicolon < brace:  # a declaration
            at = semicolon + 1
            continue
        depth, at = 1, brace + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        made = Function(text[m.start() : brace], text[brace + 1 : at - 1])
        found[made.name] = made
    return found, [r.strip() for r in rest if r.strip()]


class Reader:
    """Reads statements in order; `out` is labels and instructions."""

    def __init__(self, text: str) -> None:
        self.functions, others = functions(text)
        self.module, self.out, self.count = Module(), [], 0
        for v in others:
            self.variable(v, "", {})

    def variable(self, text: str, prefix: str, scope: dict[str, str]) -> None:
        m = re.fullmatch(
            r"(?:\.(?:visible|extern|weak)\s+)*\.(shared|local|global)\s+(?:\.align\s+(\d+)\s+)?"
            r"\.(\w+)\s+([\w$]+)((?:\[\d+\])*)(?:\s*=\s*\{([^}]*)\})?;?",
            text,
            re.S,
        )
        # Memory that all launches of a module share is read if it comes with its numbers: it is not written.
        if not m or (m[1] == "global") != bool(m[6]):
            raise Unknown(f"variable {text!r}")
        space, align_, kind, name, dims, numbers = m.groups()
        module, size = self.module, DTYPES[kind].itemsize
        if numbers:
            given = [int(n.rstrip("U"), 0) & ((1 << 8 * size) - 1) for n in split(numbers)]
            module.tables[name] = np.array(given, f"u{size}").tobytes()
            return
        align = int(align_ or size)
        for d in re.findall(r"\d+", dims):
            size *= int(d)
        if space == "shared":
            at = -(-module.shared_size // align) * align
            module.shared[name] = (at, size)
            module.shared_size = at + size + GAP
            module.shared_real = -(-module.shared_real // align) * align + size
        else:
            scope[name] = prefix + name
            module.local[prefix + name] = -(-module.local_size // align) * align
            module.local_size = -(-(module.local[prefix + name] + size + GAP) // 16) * 16

    def emit(self, f: Function, prefix: str, formal: dict[str, str], done: str) -> None:
        """Add a function's instructions; its registers and labels get a prefix."""
        scopes: list[dict[str, str]] = [{}]

        def name(x: str) -> str:
            return next((s[x] for s in reversed(scopes) if x in s), x)

        # Braces of scopes, labels, and statements, in which braces are operands.
        for brace, label, text in re.findall(r"\s*(?:([{}])|([\w$]+):|((?:[^;{}]|\{[^;{}]*\})*);)", f.body):
            said = " ".join(text.split())
            if brace:
                scopes = [*scopes, {}] if brace == "{" else scopes[:-1]
            elif label:
                self.out.append(prefix + label)
            elif said.startswith(".reg"):
                _, kind, listed = said.split(None, 2)
                for r in split(listed):
                    ranged = re.fullmatch(r"(%?[\w$]+)<(\d+)>", r)
                    for x in [f"{ranged[1]}{k}" for k in range(int(ranged[2]))] if ranged else [r]:
                        self.count += len(scopes) > 1
                        own = f"{prefix}{x}" + (f"~{self.count}" if len(scopes) > 1 else "")
                        scopes[-1][x] = own
                        self.module.registers[own] = DTYPES[kind[1:]]
            elif said.startswith(".param"):
                self.count += 1
                variable = re.sub(r"\[\d+\]$", "", said.split()[-1])
                scopes[-1][variable] = f"{prefix}{variable}~{self.count}"
            elif re.match(r"\.(shared|local|const|global)\b", said):
                self.variable(said, prefix, scopes[-1])
            elif said and not said.startswith((".loc", ".pragma", ".file")):
                self.statement(said, f, prefix, formal, done, name)

    def statement(
        self, said: str, f: Function, prefix: str, formal: dict[str, str], done: str, name: Any
    ) -> None:
        m = re.fullmatch(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", said)
        if not m:
            raise Unknown(said)
        negated, pred, op, args = m[1] == "!", m[2] and name(m[2]), m[3], split(m[4])

        def add(op: str, args: list[Any]) -> None:
            self.out.append(Ins(op, args, pred, negated, said))

        if op.startswith("call") and not pred:
            self.call(said, args, prefix, name)
        elif op == "ret" and not f.entry:
            add("bra", [done])
        elif op.startswith("bra"):
            add("bra", [prefix + args[0]])
        elif op.startswith(("ld.param.", "st.param.")):
            kind, load = op.split(".")[2], op.startswith("ld")
            place = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", args[0 if not load else 1])
            if not place or op.count(".") > 2:
                raise Unknown(said)
            if load and f.entry and place[1] in dict(f.parameters):
                add("ldparam." + kind, [name(args[0]), place[1]])
                return
            register = f"&{formal.get(place[1], name(place[1]))}+{place[2] or 0}"
            known = self.module.registers.setdefault(register, DTYPES[kind])
            if known.itemsize != DTYPES[kind].itemsize:
                raise Unknown(f"{said}: of another width than before")
            add("mov." + kind, [name(args[0]), register] if load else [register, self.operand(args[1], name)])
        else:
            add(op, [self.operand(a, name) for a in args])

    def call(self, said: str, args: list[str], prefix: str, name: Any) -> None:
        returns = split(args.pop(0)[1:-1]) if args[0].startswith("(") else []
        function = self.functions.get(args[0])
        if function is None:
            raise Unknown(said)
        self.count += 1
        inner = f"{prefix}{function.name}@{self.count}."
        formal = dict(zip(function.returns, map(name, returns), strict=True))
        given = split(args[1][1:-1]) if len(args) > 1 else []
        formal.update((p, name(a)) for (p, _), a in zip(function.parameters, given, strict=True))
        self.emit(function, inner, formal, inner + "done")
        self.out.append(inner + "done")

    def operand(self, a: str, name: Any) -> Any:
        if a.startswith("{"):
            return [self.operand(x, name) for x in split(a[1:-1])]
        if m := re.fullmatch(r"\[\s*([%\w$.~]+)\s*(?:\+\s*(-?\d+))?\s*\]", a):
            return "at", name(m[1]), int(m[2] or "0")
        if "|" in a:
            return [name(x) for x in a.split("|")]
        if a.startswith("!"):
            return "not", name(a[1:])
        if m := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", a):
            return m[1].lower(), int(m[2], 16)
        if re.match(r"-?\d", a):
            return "i", int(a.rstrip("U"), 0)
        return name(a)


def parse(text: str) -> Module:
    reader = Reader(text)
    (entry,) = (f for f in reader.functions.values() if f.entry)
    module = reader.module
    module.name, module.parameters, module.maxntid = entry.name, entry.parameters, entry.maxntid
    reader.emit(entry, "", {}, "")
    blocks = module.blocks

    def begin() -> Block:
        blocks.append(Block(len(blocks)))
        return blocks[-1]

    now = begin()
    for x in reader.out:
        if isinstance(x, str):
            if now.code:
                now = begin()
            module.labels[x] = now.index
            continue
        if x.head in ("bra", "ret", *WAITS):
            if x.head in WAITS and x.pred:
                raise Unknown(f"{x.text}: predicated")
            if x.head in WAITS and now.code:
                now = begin()
            now.end = x
            now = begin()
            continue
        now.code.append(x)
        kinds = x.op.split(".")
        spaces = [s for s in module.granule if s in kinds]
        if x.head in ("ld", "st", "atom", "red"):
            for space in spaces or module.granule:
                module.granule[space] = min(module.granule[space], DTYPES[kinds[-1]].itemsize)
    now.end = Ins("ret", [], text="(end)")
    find_temporary(module)
    return module


def registers_of(x: Any, known: Any) -> Iterable[str]:
    if isinstance(x, list):
        return [r for y in x for r in registers_of(y, known)]
    if isinstance(x, tuple) and x[0] in ("at", "not"):
        return registers_of(x[1], known)
    return [x] if isinstance(x, str) and x in known else []


def find_temporary(module: Module) -> None:
    """Find the registers of one block alone that are written there before they are read."""
    known = module.registers
    places: dict[str, set[int]] = {}
    kept: set[str] = set()
    for b in module.blocks:
        written: set[str] = set()
        for i in [*b.code, *([b.end] if b.end else [])]:
            results = set(registers_of(i.results, known))
            uses = set(registers_of(i.args[len(i.results) :], known)) | ({i.pred} if i.pred else set())
            kept |= uses - written
            if i.pred or i.head in WAITS:
                kept |= results - written
            written |= results
            for r in (*uses, *results):
                places.setdefault(r, set()).add(b.index)
        if b.end is not None and b.end.head in WAITS:
            kept |= set(registers_of(b.end.args, known))
    module.temporary = {r for r, where in places.items() if len(where) == 1} - kept
