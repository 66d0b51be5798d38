"""Try all that can go wrong, at length, and print what was tried, how often, and what was lost.

    python -m tests.battery [--share 1.0] [--markdown FILE] [PART ...]

Two hours for all of it on two cores, most of which is compiling.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from numbaloss.bench.report import markdown

from . import Trial, bare, calls, disk, memory, processes, results

PARTS = {m.__name__.rpartition(".")[2]: m.TRIALS for m in (calls, results, processes, disk, memory, bare)}
HEADINGS = "tried", "times", "lost", "seconds"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.battery", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="of all: " + ", ".join(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="the part of each trial to do")
    parser.add_argument("--markdown", type=Path, help="a file to write the table to")
    options = parser.parse_args()
    trials: list[Trial] = [t for part in options.parts or PARTS for t in PARTS[part]]
    rows, lost = [], []
    for trial in trials:
        start = time.perf_counter()
        tally = trial.run(options.share)
        lost += [f"{trial.name}: {line}" for line in tally.lost]
        times = f"{tally.tried:,}" if tally.tried else "not here"
        rows.append((trial.name, times, str(len(tally.lost)), f"{time.perf_counter() - start:.0f}"))
        print(*rows[-1], *tally.lost[:20], sep="\n    ", file=sys.stderr, flush=True)
    table = Table(*HEADINGS, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(*lost, sep="\n")
    if options.markdown:
        options.markdown.write_text(markdown(HEADINGS, rows))
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
