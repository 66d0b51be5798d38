"""Run cases on the machine, or look whether they notice mutants of the kernels.

    python -m tests.cuda.ptx [--level 2] [--cc 8.0] [--only TEXT] [family ...]
    python -m tests.cuda.ptx --mutants rule [--every 7] [--only TEXT] [family ...]

Level 0 is what `pytest` runs, 1 a sweep's, 2 all: half an hour. The last line is 'passed/total'.
"""

import argparse
import re
import sys
import time
import traceback
import warnings

import pytest

from . import cases, device, mutants

FAMILIES = {f.__name__: f for f in cases.FAMILIES}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.ptx", description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], help="of all: " + ", ".join(FAMILIES))
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose names match a regular expression")
    parser.add_argument("--cc", default="9.0", help="the compute capability that is compiled for")
    parser.add_argument(
        "--mutants", choices=["rule", "lines"], help="made by rule, or without one instruction each"
    )
    parser.add_argument("--every", type=int, default=1, help="mutants: one of so many")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    passed = total = 0
    with pytest.MonkeyPatch.context() as patch:
        major, minor = options.cc.split(".")
        device.install(patch).cc = int(major), int(minor)
        for name in options.families or FAMILIES:
            found = cases.cases(FAMILIES[name])
            chosen = [c for c in found if c.level <= options.level and re.search(options.only, str(c))]
            start = time.perf_counter()
            if options.mutants:
                make = mutants.by_rule if options.mutants == "rule" else mutants.without_lines
                for kernel, (count, silent) in mutants.unnoticed(chosen, make, options.every).items():
                    passed, total = passed + count - len(silent), total + count
                    print(f"{kernel}: {count - len(silent)}/{count}", *silent, sep="\n    ", flush=True)
                continue
            good = 0
            for c in chosen:
                try:
                    cases.check(c, cpu=True)
                    good += 1
                except Exception as error:
                    print(f"{c}: {type(error).__name__}: {error}"[:600], flush=True)
                    if options.only:
                        traceback.print_exc()
            passed, total = passed + good, total + len(chosen)
            print(f"{name}: {good}/{len(chosen)}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{passed}/{total}")
    return int(passed != total and not options.mutants)


if __name__ == "__main__":
    sys.exit(main())
