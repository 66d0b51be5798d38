"""How wide the vectors of the compiled kernels are, read from their assembly.

    python -m numbaloss.bench.widths [LOSS ...] [--all]

Compiles each loss for the processor at hand, or the one that ``NUMBA_CPU_NAME`` names (with
``NUMBA_CPU_FEATURES=``), without its disk cache, and prints a line for each kernel whose work is not done in
vectors of full width; ``--all`` prints the others too. Nothing is run on another processor: what is asked is
compiled by calls on small arrays, which any x86-64 processor that has the instructions can make.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

# Floating arithmetic of x86-64, with or without VEX, and of aarch64.
X86 = re.compile(r"\s+v?(add|sub|mul|div|sqrt|min|max|fn?m(?:add|sub)(?:132|213|231))(ps|pd|ss|sd)\s+(.*)")
ARM = re.compile(r"\s+f(add|sub|mul|div|sqrt|minnm|maxnm|ml[as]|n?m(?:add|sub))\s+(.*)")
ARM_VECTOR = re.compile(r"v\d+\.(4s|2d)")
LABEL = re.compile(r"^(\.?L\w+):")
JUMP = re.compile(r"\s+(?:j\w+|b(?:\.\w+)?|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+(\.?L\w+)")
CALL = re.compile(r"\s+(?:call\w*|blr?)\s+(\S+)")
ADDRESS = re.compile(r"\s+movabsq\s+\$(\w+), (%\w+)")
HEAVY = {"fma", "mul", "div", "sqrt"}  # kinds that the same source has in vectors and alone


@dataclass
class Loop:
    """An innermost loop: how many operations of each kind, in vectors of each width and alone."""

    vectors: Counter[int]  # by bytes
    kinds: dict[int, Counter[str]]
    calls: list[str]


def operation(line: str) -> tuple[str, int] | None:
    """The kind of an instruction of floating arithmetic, and the bytes of its vectors, 0 for one number."""
    if m := X86.match(line):
        kind = "fma" if m[1].startswith("f") else m[1]
        if m[2] in ("ss", "sd"):
            return kind, 0
        return kind, 64 if "zmm" in m[3] else 32 if "ymm" in m[3] else 16
    if m := ARM.match(line):
        kind = "fma" if m[1][0] in "mn" and "m" in m[1][1:] else m[1]
        return kind, 16 if ARM_VECTOR.search(m[2]) else 0
    return None


def innermost_loops(assembly: str) -> Iterator[Loop]:
    """The loops of a function that hold no other."""
    lines = assembly.split("\n")
    labels: dict[str, int] = {}
    spans, symbols = [], {}
    for k, line in enumerate(lines):
        if m := ADDRESS.match(line):
            symbols["*" + m[2]] = m[1]
        if m := LABEL.match(line):
            labels[m[1]] = k
        elif (m := JUMP.match(line)) and m[1] in labels:
            spans.append((labels[m[1]], k))
    for first, last in spans:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            continue
        loop = Loop(Counter(), {}, [])
        for line in lines[first : last + 1]:
            if found := operation(line):
                kind, width = found
                loop.vectors[width] += 1
                loop.kinds.setdefault(width, Counter())[kind] += 1
            elif (m := CALL.match(line)) and not symbols.get(m[1], m[1]).startswith(("mem", "__mem")):
                loop.calls.append(symbols.get(m[1], m[1]))
        yield loop


@dataclass
class Verdict:
    """What was read of a kernel: bytes of its widest vectors, and what is wrong with it, if anything."""

    widest: int
    complaint: str


def verdict(assembly: str, full: int) -> Verdict:
    """Judge a kernel: some loop works in full vectors, and each narrower one is the rest of a full one.

    A loop over the last elements, too few for a vector, has the kinds of operations of the vectors' loop.
    """
    loops = [loop for loop in innermost_loops(assembly) if loop.vectors]
    widest = max((w for loop in loops for w in loop.vectors), default=0)
    whole = [loop for loop in loops if loop.vectors[full]]
    for loop in loops:
        kinds = HEAVY & set().union(*loop.kinds.values())
        if not kinds:
            continue
        if loop.calls:
            return Verdict(widest, f"a loop of {loop.vectors.total()} operations calls {loop.calls[0]}")
        if loop not in whole and not any(kinds <= set(other.kinds[full]) for other in whole):
            width = max(loop.vectors)
            said = f"in vectors of {width} bytes" if width else "one number at a time"
            return Verdict(widest, f"a loop of {loop.vectors.total()} operations works {said}")
    return Verdict(widest, "")


def full_width() -> int:
    """Bytes of the widest vectors of the processor that is compiled for."""
    from numba.core.registry import cpu_target

    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    if "x86" not in triple:
        return 16
    if features:
        return 64 if "+avx512f" in features else 32 if "+avx," in features else 16
    if "avx512" in name or name in ("x86-64-v4", "znver4", "znver5"):
        return 64
    return 16 if name in ("generic", "x86-64", "x86-64-v2", "nehalem", "westmere") else 32


def compiled(calls: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Make calls; for each C function that they compile, the call, the function's name and its assembly."""
    from numba.core.ccallback import CFunc

    made: list[Any] = []
    compile_it = CFunc.compile

    def compile_and_keep(self: Any) -> None:
        compile_it(self)
        if not self.cache_hits:  # else another loss's call has compiled it
            made.append(self)

    with mock.patch.object(CFunc, "compile", compile_and_keep):
        for name, call in calls:
            call()
            for function in made:
                yield name, function._pyfunc.__name__, function._library.get_asm_str()
            made.clear()


def calls(names: list[str]) -> Iterator[tuple[str, Any]]:
    """Calls of losses that ask for kernels of their own: value, gradients and curvature in both dtypes."""
    import numbaloss as nl

    from .cases import casted, family_of

    for name in names or list(nl.registry):
        loss = nl.registry[name]
        family = family_of(loss)
        drawn = family.draw(loss, np.random.default_rng(0), family.tiny)
        for dtype in (np.float32, np.float64):
            arrays = casted(drawn, np.dtype(dtype))
            kind = np.dtype(dtype).name
            yield f"{name} {kind} value", lambda loss=loss, arrays=arrays: loss(**arrays)
            yield f"{name} {kind}", lambda loss=loss, arrays=arrays: loss.value_and_grad(**arrays)
            if loss.Class._curved and len(loss.Class._default_wrt()) != 2:
                yield (
                    f"{name} {kind} curvature",
                    lambda loss=loss, arrays=arrays: loss.value_grad_hess(**arrays),
                )


def main(arguments: list[str] | None = None) -> int:
    """Print the kernels; the exit status is 1 where one is not of full width."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("losses", nargs="*")
    parser.add_argument("--all", action="store_true", help="print kernels of full width too")
    options = parser.parse_args(arguments)
    full, count, wrong = full_width(), 0, 0
    for call, function, assembly in compiled(calls(options.losses)):
        found = verdict(assembly, full)
        if not found.widest and not found.complaint:
            continue  # it does no arithmetic in a loop
        count += 1
        wrong += bool(found.complaint)
        if found.complaint or options.all:
            print(f"{call}: {function}: {found.complaint or 'full width'}")
    print(f"{count} kernels, vectors of {full} bytes, {wrong} not of full width")
    return int(wrong > 0)


if __name__ == "__main__":
    # What the disk holds has no assembly; the folder is named before Numba is imported.
    with tempfile.TemporaryDirectory() as folder:
        if os.environ.get("NUMBALOSS_WIDTHS") != "1":
            import subprocess

            environment = {**os.environ, "NUMBALOSS_WIDTHS": "1", "NUMBA_CACHE_DIR": folder}
            command = [sys.executable, "-m", "numbaloss.bench.widths", *sys.argv[1:]]
            sys.exit(subprocess.run(command, env=environment, check=False).returncode)
        sys.exit(main())
