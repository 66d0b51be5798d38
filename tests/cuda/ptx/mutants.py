"""Kernels spoiled on purpose: whether a case notices says whether it could fail.

Some mutants are made by rule: a barrier left out, a shuffle's mask, an address, a bound, the size of shared
memory, the packing of arguments. The others leave out one instruction each.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from numbaloss.kernels.cuda import binaries

from .cases import Case, Expected, cases, check, expected
from .device import MACHINE, MUTANTS

# Calls of a few kernels.
GROUPS = {
    "huber_loss": r"huber_loss (float32 (9|2047|2049|4101) offset 0|more tiles)",
    "cross_entropy": r"cross_entropy block (in place|ignored)",
    "triplet_margin_loss": r"triplet_margin_loss stream (float32|mean|in place).*'p': inf",
}


def of(group: str) -> list[Case]:
    return [c for c in cases() if re.match(GROUPS[group], str(c))]


class Edit(NamedTuple):
    """A part of a kernel's text in place of which another stands."""

    what: str
    start: int
    end: int
    by: str

    def of(self, text: str) -> str:
        return text[: self.start] + self.by + text[self.end :]

    def unreached(self, text: str) -> str:
        """The text with an unknown instruction there, which is found if it is come to."""
        start = text.rfind("\n", 0, self.start) + 1
        return f"{text[:start]}\tunreached;\n{text[text.find(chr(10), self.start) + 1 :]}"


def by_rule(text: str) -> Iterator[Edit]:
    def edit(what: str, m: re.Match[str], group: int, by: str) -> Edit:
        return Edit(what, m.start(group), m.end(group), by)

    for k, m in enumerate(re.finditer(r"\tbar\.(?:warp\.)?sync[^\n]*\n", text)):
        yield edit(f"without barrier {k}", m, 0, "")
    for k, m in enumerate(re.finditer(r"shfl\.sync\.bfly\.b32 [^;]*, 31, ([^;]+);", text)):
        if k % 7 == 0:
            yield edit(f"shuffle {k} of half a warp", m, 1, "65535")
    for kind in ("ld", "st"):
        for k, m in enumerate(re.finditer(rf"{kind}\.global(?:\.v\d)?\.\w+ [^;]*?\[%rd\d+()\]", text)):
            yield edit(f"{kind} {k} {(4, 16)[k % 2]} bytes on", m, 1, ("+4", "+16")[k % 2])
    for m in re.finditer(r"\.b8 (shared\S*)\[(\d+)\];", text):
        yield edit(f"{m[1]} of a part of its size", m, 2, str(max(4, int(m[2]) // 64)))
    for k, m in enumerate(re.finditer(r"setp\.(ge|lt|gt|le)\.s64", text)):
        if k < 8:
            by = {"ge": "gt", "lt": "le", "gt": "ge", "le": "lt"}[m[1]]
            yield edit(f"bound {k} off by one", m, 1, by)
    if m := re.search(r"cvt\.rn\.b?f16x2\.f32 %r\d+, (([^,]+), ([^;]+));", text):
        yield edit("halves exchanged", m, 1, f"{m[3]}, {m[2]}")


def without_lines(text: str) -> Iterator[Edit]:
    """Without one instruction each."""
    for m in re.finditer(r"^\s*(?:@!?%p\d+ )?(?!ret|bra|ld\.param)[a-z][\w.]*\s[^\n]*;\n", text, re.M):
        yield Edit(f"without [{' '.join(m[0].split())}]", m.start(), m.end(), "")


PACKINGS = {"float32 in the upper half": {"f32": "4xf"}, "float32 as float64": {"f32": "d"}}


def unnoticed(
    group: list[Case], make: Callable[[str], Iterator[Edit]], every: int = 1
) -> dict[str, tuple[int, list[str]]]:
    """By kernel how many mutants are come to, and those that no case of a group notices that launches it."""
    wanted = [expected(c) for c in group]
    launched: dict[str, list[int]] = {}
    for k, c in enumerate(group):
        for kernel in check(c, wanted=wanted[k]):
            launched.setdefault(kernel, []).append(k)
    found = {}
    for kernel, by in launched.items():
        text = next(t for t, p in MACHINE.programs.items() if p.module.name == kernel)

        def noticed(mutant: str, kernel: str = kernel, by: list[int] = by) -> bool:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(MUTANTS, kernel, mutant)
                patch.setattr(MACHINE, "limit", MACHINE.steps + 20000)
                seen = any(_noticed(group[k], wanted[k]) for k in by)
            MACHINE.programs.pop(mutant, None)
            return seen

        edits = list(make(text))[::every]
        silent = [e for e in edits if not noticed(e.of(text))]
        unreached = [e for e in silent if not noticed(e.unreached(text))]
        name = re.sub(r"_[0-9a-f]{16}$", "", kernel)
        found[name] = len(edits) - len(unreached), [e.what for e in silent if e not in unreached]
    return found


def unnoticed_packings(c: Case) -> list[str]:
    silent = []
    for what, formats in PACKINGS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(binaries.Kernel, "FORMATS", {**binaries.Kernel.FORMATS, **formats})
            patch.setattr(binaries, "_kernels", {})
            if not _noticed(c, expected(c)):
                silent.append(what)
    return silent


def _noticed(c: Case, wanted: Expected) -> bool:
    try:
        check(c, wanted=wanted)
    # A spoiled kernel may fail in any way, also by an error of the library's that does not come.
    except (Exception, pytest.fail.Exception):
        return True
    return False
