"""A block of PTX's instructions as Python over arrays of lanes.

It comes in two forms: for all lanes of a unit, or for some of them, which are gathered first.
"""

import re
from typing import Any

import numpy as np

from .text import DTYPES, Block, Ins, Module, Unknown

SHARED_WINDOW = 1 << 48  # where shared memory begins among generic addresses
BOOL, U2, U4, U8, F4, F8 = (np.dtype(t) for t in ("bool", "u2", "u4", "u8", "f4", "f8"))

SPECIAL = {
    "%tid.x": "U.tid", "%ctaid.x": "U.ctaid", "%ntid.x": "U.ntid", "%nctaid.x": "U.nctaid",
}  # fmt: skip
SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
OPPOSITES = {"eq": "!=", "lt": ">=", "le": ">", "gt": "<=", "ge": "<"}
WAYS = {"rz": 0, "rm": -1, "rp": 1}  # of directed rounding, as `arithmetic` has them
WHOLE = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}


def unsigned(T: np.dtype) -> np.dtype:
    return np.dtype(f"u{T.itemsize}")


class Coder:
    """Python source for a block. `scope` is what the source's names stand for."""

    def __init__(
        self, module: Module, block: Block, full: bool, slots: dict[str, int], scope: dict[str, Any]
    ) -> None:
        self.module, self.block, self.full, self.slots, self.scope = module, block, full, slots, scope
        self.lines: list[str] = []
        self.have: set[str] = set()
        self.written: dict[str, None] = {}  # registers that other blocks read

    def code(self) -> str:
        for i in self.block.code:
            how = getattr(self, "op_" + i.head, None)
            try:
                if how is None:
                    raise Unknown(i.op)
                how(i, i.op.split(".")[1:])
            except (KeyError, ValueError, IndexError, AttributeError) as error:
                raise Unknown(f"{i.text}: {error!r}") from error
        end = self.block.end
        given = self.guard(end) if end is not None else "None"
        for r in self.written:
            k = self.slots[r]
            save = f"R[{k}] = r{k}" if self.full else f"x = R[{k}].copy(); x[idx] = r{k}; R[{k}] = x"
            self.lines.append(save)
        return "\n    ".join(["def block(U, R, idx, n):", *self.lines, f"return {given}\n"])

    # ---- operands
    def bound(self, x: Any) -> str:
        """The name of an object in the source."""
        known = self.scope.setdefault("names", {})
        key = (type(x), x.tobytes()) if isinstance(x, np.generic) else (type(x), id(x))
        if key not in known:
            known[key] = f"K{len(known)}"
            self.scope[known[key]] = x
        return known[key]

    def register(self, r: str) -> str:
        k = self.slots[r]
        if r not in self.have:
            self.lines.append(f"r{k} = R[{k}]" + ("" if self.full else "[idx]"))
            self.have.add(r)
        return f"r{k}"

    def immediate(self, a: tuple[str, int], T: np.dtype) -> Any:
        kind, bits = a
        if T == BOOL:
            return np.bool_(bits != 0)
        if kind != "i":  # bits of a number
            made = np.array([bits], f"u{4 if kind == 'f' else 8}")
            if T.kind == "f":
                return T.type(made.view(f"f{made.itemsize}")[0])
            bits = int(made[0])
        if T.kind == "f":
            return T.type(bits)
        return np.array([bits & ((1 << 8 * T.itemsize) - 1)], unsigned(T)).view(T)[0]

    def source(self, a: Any, T: np.dtype, wider: bool = False) -> str:
        """An operand as numbers of a type; `wider`, of its lower bits if it has more."""
        if isinstance(a, tuple):
            return f"(~{self.source(a[1], T)})" if a[0] == "not" else self.bound(self.immediate(a, T))
        registers = self.module.registers
        if a in registers:
            C, v = registers[a], self.register(a)
            if C == T:
                return v
            if C.itemsize == T.itemsize and C != BOOL:
                return f"{v}.view({self.dtype(T)})"
            if C.itemsize > T.itemsize and wider and C.kind in "iu" and T.kind in "iu":
                return f"{v}.astype({self.dtype(unsigned(T))}).view({self.dtype(T)})"
            raise Unknown(f"{a} of {C} taken as {T}")
        if a in SPECIAL:
            return f"{SPECIAL[a]}{'' if self.full else '[idx]'}.view({self.dtype(T)})"
        for space in (self.module.shared, self.module.local, self.scope["tables"]):
            if a in space:
                place = space[a]
                return self.bound(T.type(place[0] if isinstance(place, tuple) else place))
        raise Unknown(f"operand {a!r}")

    def whole(self, a: Any, T: np.dtype) -> str:
        """As `source`, but an array even of a constant."""
        said = self.source(a, T)
        return f"full(n, {said})" if re.fullmatch(r"K\d+", said) else said

    def dtype(self, T: np.dtype) -> str:
        name = f"D{T.str[1:]}"
        self.scope[name] = T
        return name

    def result(self, r: Any, expression: str, T: np.dtype, i: Ins) -> None:
        """Give a register a value that is of a type."""
        C = self.module.registers[r]
        if C != T:
            if C.itemsize > T.itemsize and C.kind in "iu" and T.kind in "iu":  # extended by its sign
                wide = np.dtype(f"{T.kind}{C.itemsize}")
                expression = f"({expression}).astype({self.dtype(wide)})"
            elif C.itemsize != T.itemsize:
                raise Unknown(f"{i.text}: {T} to {r} of {C}")
            expression = f"({expression}).view({self.dtype(C)})"
        if i.pred:
            expression = f"where({self.guard(i)}, {expression}, {self.register(r)})"
        self.lines.append(f"r{self.slots[r]} = {expression}")
        self.have.add(r)
        if r not in self.module.temporary:
            self.written[r] = None

    def guard(self, i: Ins) -> str:
        """Which lanes an instruction is for: None, all."""
        if not i.pred:
            return "None"
        return ("~" if i.negated else "") + self.source(i.pred, BOOL)

    def call(self, i: Ins, form: str, T: np.dtype, *, like: Any = None) -> None:
        """An instruction whose operands are all of a type, `like` that or else of the result's."""
        given = [self.source(a, like or T) for a in i.args[1:]]
        if all(re.fullmatch(r"K\d+", g) for g in given):
            given[0] = f"full(n, {given[0]})"
        self.result(i.args[0], form.format(*given), T, i)

    # ---- movement
    def op_ldparam(self, i: Ins, kinds: list[str]) -> None:
        T = DTYPES[kinds[0]]
        self.result(i.args[0], f"U.parameter({i.args[1]!r}, {self.dtype(T)}, n)", T, i)

    def op_mov(self, i: Ins, kinds: list[str]) -> None:
        T = DTYPES[kinds[-1]]
        d, s = i.args
        U = unsigned(T)
        if isinstance(d, list):
            P = np.dtype(f"u{T.itemsize // len(d)}")
            for k, r in enumerate(d):
                shifted = f"({self.source(s, U)} >> {self.bound(U.type(8 * P.itemsize * k))})"
                if r != "_":
                    self.result(r, f"{shifted}.astype({self.dtype(P)})", P, i)
        elif isinstance(s, list):
            P = np.dtype(f"u{T.itemsize // len(s)}")
            parts = [
                f"({self.whole(x, P)}.astype({self.dtype(U)}) << {self.bound(U.type(8 * P.itemsize * k))})"
                for k, x in enumerate(s)
            ]
            self.result(d, " | ".join(parts), U, i)
        else:
            self.result(d, self.whole(s, T), T, i)

    def op_cvta(self, i: Ins, kinds: list[str]) -> None:
        if kinds not in (["to", "global", "u64"], ["global", "u64"], ["shared", "u64"]):
            raise Unknown(i.op)
        window = self.bound(np.uint64(SHARED_WINDOW if kinds[0] == "shared" else 0))
        self.result(i.args[0], f"{self.whole(i.args[1], U8)} + {window}", U8, i)

    def memory(self, i: Ins, kinds: list[str], address: Any) -> tuple[str, str, int, np.dtype, str]:
        """An access's space, addresses, vector, type, and what else is told of it."""
        space, count = "", 1
        for k in kinds[:-1]:
            if k in ("global", "shared", "local"):
                space = k
            elif re.fullmatch(r"v\d", k):
                count = int(k[1])
            elif k != "nc":
                raise Unknown(i.op)
        _, base, offset = address
        where = f"{self.whole(base, U8)} + {self.bound(np.int64(offset).astype(np.uint64))}"
        more = f"{'None' if self.full else 'idx'}, {self.guard(i)}, {self.bound(i)}"
        return space, where, count, DTYPES[kinds[-1]], more

    def op_ld(self, i: Ins, kinds: list[str]) -> None:
        d, a = i.args
        space, where, count, T, more = self.memory(i, kinds, a)
        self.lines.append(f"v = U.load({space!r}, {where}, {self.dtype(T)}, {count}, {more})")
        for k, r in enumerate(d if count > 1 else [d]):
            self.result(r, f"v[:, {k}]" if count > 1 else "v", T, i)

    def op_st(self, i: Ins, kinds: list[str]) -> None:
        a, s = i.args
        space, where, _, T, more = self.memory(i, kinds, a)
        given = [self.source(x, T, wider=True) for x in (s if isinstance(s, list) else [s])]
        self.lines.append(f"U.store({space!r}, {where}, {self.dtype(T)}, ({', '.join(given)},), {more})")

    def op_red(self, i: Ins, kinds: list[str]) -> None:
        if kinds[0] == "relaxed":
            kinds = kinds[2:]
        if kinds[0] != "global" or kinds[1] not in ("max", "min", "add"):
            raise Unknown(i.op)
        _, where, _, T, more = self.memory(i, [kinds[0], kinds[2]], i.args[0])
        value = self.whole(i.args[1], T)
        self.lines.append(f"U.atomic({where}, {self.dtype(T)}, {kinds[1]!r}, {value}, {more})")

    def op_atom(self, i: Ins, kinds: list[str]) -> None:
        """An atomic whose old value nothing reads."""
        if i.args[0] not in self.module.temporary:
            raise Unknown(f"{i.text}: its result is used")
        self.op_red(Ins(i.op, i.args[1:], i.pred, i.negated, i.text), kinds)

    # ---- integers and floats
    def arithmetic(self, i: Ins, kinds: list[str], sign: str) -> None:
        T, more = DTYPES[kinds[-1]], kinds[:-1]
        if T.kind in "iu" and not more:
            self.call(i, f"{{}} {sign} {{}}", unsigned(T))
        elif T.kind == "f" and more in ([], ["rn"]):
            self.call(i, f"{{}} {sign} {{}}", T)
        elif T == F4 and len(more) == 1 and more[0] in WAYS:
            form = (
                f"S.fma32_directed({{}}, np.float32(1), {'-' if sign == '-' else ''}({{}}), {WAYS[more[0]]})"
            )
            self.call(i, form, T)
        else:
            raise Unknown(i.op)

    def op_add(self, i: Ins, kinds: list[str]) -> None:
        self.arithmetic(i, kinds, "+")

    def op_sub(self, i: Ins, kinds: list[str]) -> None:
        self.arithmetic(i, kinds, "-")

    def op_mul(self, i: Ins, kinds: list[str]) -> None:
        T = DTYPES[kinds[-1]]
        if T.kind != "f":
            self.result(i.args[0], *self.product(i, kinds), i)
        elif kinds[:-1] in ([], ["rn"]):
            self.call(i, "{} * {}", T)
        else:
            raise Unknown(i.op)

    def product(self, i: Ins, kinds: list[str]) -> tuple[str, np.dtype]:
        how, T = kinds[0], DTYPES[kinds[-1]]
        if how == "lo":
            U = unsigned(T)
            return f"{self.whole(i.args[1], U)} * {self.source(i.args[2], U)}", U
        if how != "wide":
            raise Unknown(i.op)
        W = np.dtype(f"{T.kind}{2 * T.itemsize}")
        x, y = (f"{self.whole(a, T)}.astype({self.dtype(W)})" for a in i.args[1:3])
        return f"{x} * {y}", W

    def op_mad(self, i: Ins, kinds: list[str]) -> None:
        if "cc" in kinds:
            self.carrying(i, kinds, False)
            return
        said, T = self.product(i, kinds)
        U = unsigned(T)
        self.result(i.args[0], f"({said}).view({self.dtype(U)}) + {self.source(i.args[3], U)}", U, i)

    def carrying(self, i: Ins, kinds: list[str], into: bool) -> None:
        """32 bits of ``a * b + c``, and maybe the carry, which may be kept: within a block."""
        if kinds[0] not in ("lo", "hi") or kinds[-1] != "u32":
            raise Unknown(i.op)
        wide = self.dtype(U8)
        a, b, c = (f"{self.whole(x, U4)}.astype({wide})" for x in i.args[1:])
        half = "& np.uint64(0xFFFFFFFF)" if kinds[0] == "lo" else ">> np.uint64(32)"
        self.lines.append(f"wide = ({a} * {b} {half}) + {c}{' + carry' if into else ''}")
        if "cc" in kinds:
            self.lines.append("carry = wide >> np.uint64(32)")
        self.result(i.args[0], f"wide.astype({self.dtype(U4)})", U4, i)

    def op_madc(self, i: Ins, kinds: list[str]) -> None:
        self.carrying(i, kinds, True)

    def op_fma(self, i: Ins, kinds: list[str]) -> None:
        T = DTYPES[kinds[-1]]
        if kinds[:-1] == ["rn"]:
            self.call(i, f"S.fma{8 * T.itemsize}({{}}, {{}}, {{}})", T)
        elif T == F4 and len(kinds) == 2:
            self.call(i, f"S.fma32_directed({{}}, {{}}, {{}}, {WAYS[kinds[0]]})", T)
        else:
            raise Unknown(i.op)

    def op_div(self, i: Ins, kinds: list[str]) -> None:
        T = DTYPES[kinds[-1]]
        if T.kind != "f":
            self.call(i, "S.quotient({}, {})", T)
        elif kinds[:-1] == ["rn"]:
            self.call(i, "{} / {}", T)
        elif kinds[:-1] == ["full"] and T == F4:
            d, a, b = i.args
            self.result(d, f"S.div_full({self.whole(a, T)}, {self.whole(b, T)})", T, i)
        elif kinds == ["approx", "ftz", "f32"]:
            d, a, b = i.args
            self.result(d, f"S.div_approx_ftz({self.whole(a, T)}, {self.whole(b, T)})", T, i)
        else:
            raise Unknown(i.op)

    def op_rem(self, i: Ins, kinds: list[str]) -> None:
        self.call(i, "S.remainder({}, {})", DTYPES[kinds[-1]])

    def plain(self, i: Ins, kinds: list[str], form: str) -> None:
        """An instruction that has only a type."""
        if len(kinds) > 1:
            raise Unknown(i.op)
        self.call(i, form, DTYPES[kinds[0]])

    def op_neg(self, i: Ins, kinds: list[str]) -> None:
        self.plain(i, kinds, "-{}")

    def op_abs(self, i: Ins, kinds: list[str]) -> None:
        self.plain(i, kinds, "np.abs({})")

    def op_not(self, i: Ins, kinds: list[str]) -> None:
        self.plain(i, kinds, "~{}")

    def op_and(self, i: Ins, kinds: list[str]) -> None:
        self.plain(i, kinds, "{} & {}")

    def op_or(self, i: Ins, kinds: list[str]) -> None:
        self.plain(i, kinds, "{} | {}")

    def op_xor(self, i: Ins, kinds: list[str]) -> None:
        self.plain(i, kinds, "{} ^ {}")

    def op_copysign(self, i: Ins, kinds: list[str]) -> None:
        self.plain(i, kinds, "np.copysign({1}, {0})")

    def op_min(self, i: Ins, kinds: list[str]) -> None:
        self.plain(i, kinds, "S.fmin({}, {})" if kinds[0][0] == "f" else "np.minimum({}, {})")

    def op_max(self, i: Ins, kinds: list[str]) -> None:
        self.plain(i, kinds, "S.fmax({}, {})" if kinds[0][0] == "f" else "np.maximum({}, {})")

    def op_shl(self, i: Ins, kinds: list[str]) -> None:
        T = DTYPES[kinds[0]]
        self.result(i.args[0], f"S.shl({self.whole(i.args[1], T)}, {self.source(i.args[2], U4)})", T, i)

    def op_shr(self, i: Ins, kinds: list[str]) -> None:
        T = DTYPES[kinds[0]]
        self.result(i.args[0], f"S.shr({self.whole(i.args[1], T)}, {self.source(i.args[2], U4)})", T, i)

    def op_bfi(self, i: Ins, kinds: list[str]) -> None:
        T = DTYPES[kinds[0]]
        d, a, b, at, length = i.args
        into = f"{self.whole(a, T)}, {self.whole(b, T)}"
        self.result(d, f"S.bfi({into}, {self.source(at, U4)}, {self.source(length, U4)})", T, i)

    # ---- comparisons
    def op_setp(self, i: Ins, kinds: list[str]) -> None:
        how, *middle, kind = kinds
        T, (d, a, b, *c) = DTYPES[kind], i.args
        unordered = how not in SIGNS and how[-1] == "u" and how[:-1] in SIGNS
        if how in ("lo", "ls", "hi", "hs"):
            how, T = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}[how], unsigned(T)
        x, y = self.whole(a, T), self.source(b, T)
        if how == "ne" and T.kind == "f":
            said = f"(({x} < {y}) | ({x} > {y}))"
        elif how in SIGNS:
            said = f"({x} {SIGNS[how]} {y})"
        elif how == "equ":
            said = f"(~(({x} < {y}) | ({x} > {y})))"
        elif how == "neu":
            said = f"({x} != {y})"
        elif unordered:
            said = f"(~({x} {OPPOSITES[how[:-1]]} {y}))"
        else:
            said = {"num": f"(({x} == {x}) & ({y} == {y}))", "nan": f"(({x} != {x}) | ({y} != {y}))"}[how]
        if middle:
            sign = {"and": "&", "or": "|", "xor": "^"}[middle[0]]
            said = f"({said} {sign} {self.source(c[0], BOOL)})"
        self.result(d, said, BOOL, i)

    def op_selp(self, i: Ins, kinds: list[str]) -> None:
        T = DTYPES[kinds[0]]
        d, a, b, p = i.args
        self.result(d, f"where({self.source(p, BOOL)}, {self.source(a, T)}, {self.source(b, T)})", T, i)

    # ---- conversion
    def op_cvt(self, i: Ins, kinds: list[str]) -> None:
        *how, to, of = kinds
        d, *given = i.args
        if to in ("f16x2", "bf16x2", "bf16"):
            if how != ["rn"] or of != "f32":
                raise Unknown(i.op)
            made = [f"S.to_{to.removesuffix('x2')}({self.whole(x, F4)})" for x in given]
            if to == "bf16":
                self.result(d, made[0], U2, i)
            else:  # the first one above
                upper, lower = (f"{m}.astype({self.dtype(U4)})" for m in made)
                self.result(d, f"({upper} << np.uint32(16)) | {lower}", U4, i)
            return
        if of == "bf16":
            raise Unknown(i.op)
        T, F = DTYPES[to], DTYPES[of]
        x = self.source(given[0], F, wider=True)
        x = f"full(n, {x})" if re.fullmatch(r"K\d+", x) else x
        if T.kind in "iu" and F.kind in "iu" and not how:
            if T.itemsize <= F.itemsize:
                said = f"{x}.astype({self.dtype(T)})"
            else:  # extended as the source's type says
                said = f"{x}.astype({self.dtype(np.dtype(f'{F.kind}{T.itemsize}'))}).view({self.dtype(T)})"
            self.result(d, said, T, i)
        elif T.kind in "iu" and F.kind == "f" and len(how) == 1:
            self.result(d, f"S.to_integer(np.{WHOLE[how[0]]}({x}), {self.dtype(T)})", T, i)
        elif to == of and len(how) == 1:
            self.result(d, f"S.saturate({x})" if how == ["sat"] else f"np.{WHOLE[how[0]]}({x})", T, i)
        elif how == (["rn"] if F.kind in "iu" or T.itemsize < F.itemsize else []):
            self.result(d, f"{x}.astype({self.dtype(T)})", T, i)
        else:
            raise Unknown(i.op)

    # ---- approximations
    def approximate(self, i: Ins, kinds: list[str], name: str) -> None:
        if kinds not in (["approx", "f32"], ["approx", "ftz", "f32"]):
            raise Unknown(i.op)
        self.call(i, f"S.{name}({{}}, {'ftz' in kinds})", F4)

    def op_ex2(self, i: Ins, kinds: list[str]) -> None:
        self.approximate(i, kinds, "ex2")

    def op_rcp(self, i: Ins, kinds: list[str]) -> None:
        if kinds[0] == "rn":
            self.call(i, "1 / {}", DTYPES[kinds[-1]])
        elif kinds == ["approx", "ftz", "f64"]:
            self.call(i, "S.rcp_ftz64({})", F8)
        else:
            self.approximate(i, kinds, "rcp")

    def op_rsqrt(self, i: Ins, kinds: list[str]) -> None:
        if kinds == ["approx", "ftz", "f64"]:
            self.call(i, "S.rsqrt_ftz64({})", F8)
        else:
            self.approximate(i, kinds, "rsqrt")

    def op_sqrt(self, i: Ins, kinds: list[str]) -> None:
        if kinds[0] != "rn":
            raise Unknown(i.op)
        self.call(i, "np.sqrt({})", DTYPES[kinds[-1]])
