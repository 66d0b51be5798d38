"""The pictures of the README and of the guide, of a sweep over the sizes of all losses.

    python -m numbaloss.bench.pictures [--redraw] [--folder bench/results]

The sweep is written to `sweep.json` in the folder, and drawn as `speed-light.svg`, `ratios-dark.svg` and so
on. It takes some ten minutes; with `--redraw` the last one is drawn.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numba

import numbaloss as nl

from .cases import cases
from .devices import HOST
from .options import sizes
from .peers import PEERS
from .plots import THEMES, draw
from .report import Report
from .session import benchmark

SWEEP, BUDGET = "1k:10M", 300.0
COMPARED = ("numpy", "torch", "jax")
# A loss of each kind: bound by memory, by exponentials, by rows.
SHOWN = (
    "mse_loss",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "cross_entropy",
    "multi_margin_loss",
    "cosine_embedding_loss",
    "triplet_margin_loss",
    "ctc_loss",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("bench/results"))
    parser.add_argument("--redraw", action="store_true", help="draw what was measured before")
    options = parser.parse_args()
    path = options.folder / "sweep.json"
    if not options.redraw:
        todo = cases(nl.registry, sizes=sizes(SWEEP))
        report = benchmark(
            todo,
            {"cpu": HOST},
            {"cpu": [PEERS[n] for n in COMPARED if PEERS[n].missing() is None]},
            threads=numba.get_num_threads(),
            budget=BUDGET,
            show=lambda done, what: print(f"{done}/{len(todo)} {what}", flush=True),
        )
        path.write_text(report.to_json())
    report = Report.from_json(path.read_text())
    shown = replace(report, rows=[r for r in report.rows if r.loss in SHOWN])
    for theme in THEMES:
        draw(shown, options.folder / f"speed-{theme}.svg", theme, ["speed"])
        draw(report, options.folder / f"ratios-{theme}.svg", theme, ["ratios"])


if __name__ == "__main__":
    main()
