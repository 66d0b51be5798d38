"""Pictures of a report: speed against size under the copy's bandwidth, and ratios to the peers.

Colours are Okabe and Ito's, which the colour-blind can tell apart; each side has its own marker too. Both
themes have a solid background, so that either can be read on any page.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .cases import dimensions
from .measure import OURS, Row
from .report import Report

SUFFIXES = (".png", ".svg")
PANELS = 4  # in a line
GAP = 0.8  # between groups of bars, in bars

MARKERS = {
    OURS: "o",
    "numpy": "s",
    "torch": "^",
    "torch-compile": "v",
    "jax": "D",
    "sklearn": "P",
    "cupy": "X",
    "liger": "h",
}


@dataclass(frozen=True)
class Theme:
    background: str
    text: str
    grid: str
    ours: str

    def color(self, side: str) -> str:
        peers = {
            "numpy": "#E69F00",
            "torch": "#D55E00",
            "torch-compile": "#CC79A7",
            "jax": "#009E73",
            "sklearn": "#56B4E9",
            "cupy": "#999999",
            "liger": "#F0E442",
        }
        return peers.get(side, self.ours)


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#d8dee4", "#0072B2"),
    "dark": Theme("#0d1117", "#e6edf3", "#30363d", "#58a6ff"),
}


def draw(report: Report, path: Path, theme: str = "light", what: Sequence[str] = ("speed", "ratios")) -> None:
    """Write a picture of a report.

    Parameters
    ----------
    report : Report
        With at least one row.
    path : Path
        Its suffix, one of `SUFFIXES`, decides the format.
    theme : {'light', 'dark'}
    what : sequence of {'speed', 'ratios'}
        Ratios are left out where no peer was measured.
    """
    look = THEMES[theme]
    groups = _groups(report.rows)
    sides = list(dict.fromkeys([OURS, *(p for r in report.rows for p in r.peers)]))
    bars = [rows[-1] for _, rows in groups if rows[-1].peers]
    parts = [w for w in what if w == "speed" or bars]
    columns = min(PANELS, len(groups))
    heights = {
        "speed": 0.9 + 1.75 * math.ceil(len(groups) / columns),
        "ratios": 0.9 + 0.16 * max(map(_bars, _ratio_columns(bars)), default=0),
    }
    style: Any = {
        "font.size": 8,
        "font.family": "DejaVu Sans",
        "text.color": look.text,
        "axes.labelcolor": look.text,
        "axes.edgecolor": look.grid,
        "axes.facecolor": look.background,
        "xtick.color": look.text,
        "ytick.color": look.text,
        "svg.hashsalt": "numbaloss",  # the same report gives the same file
    }
    with rc_context(style):
        width = max(2.3 * columns + 0.6, 5.2 * len(_ratio_columns(bars)) if "ratios" in parts else 0)
        figure = Figure(
            figsize=(width, sum(heights[w] for w in parts)), facecolor=look.background, layout="constrained"
        )
        subfigures = figure.subfigures(
            len(parts), 1, height_ratios=[heights[w] for w in parts], squeeze=False
        )
        for part, subfigure in zip(parts, subfigures[:, 0], strict=True):
            subfigure.set_facecolor(look.background)
            if part == "speed":
                _draw_speed(subfigure, groups, sides, columns, look)
            else:
                _draw_ratios(subfigure, bars, sides[1:], look)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that differ in nothing but their size, smallest first, under a name."""
    named = ("dtype", "mode", "device", "in_place")
    differ = [n for n in named if len({getattr(r, n) for r in rows}) > 1]

    def name(row: Row) -> str:
        parts = [("in place" if row.in_place else "") if n == "in_place" else getattr(row, n) for n in differ]
        return " ".join([row.loss, *filter(None, parts)])

    order = {n: k for k, n in enumerate(dict.fromkeys(map(name, rows)))}
    ordered = sorted(rows, key=lambda r: (order[name(r)], r.bytes))
    return [(n, list(found)) for n, found in groupby(ordered, name)]


def _draw_speed(
    figure: Any, groups: Sequence[tuple[str, list[Row]]], sides: Sequence[str], columns: int, look: Theme
) -> None:
    """A panel a loss: bytes that must move per second, against bytes that must move."""
    lines = math.ceil(len(groups) / columns)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for k, (axis, (name, rows)) in enumerate(zip(axes.flat, groups, strict=False)):
        sizes = [r.bytes for r in rows]
        ceiling = [r.copy_gb_per_s for r in rows]
        (handles["copy: the machine's bandwidth"],) = axis.plot(
            sizes, ceiling, color=look.text, linestyle=(0, (4, 2)), linewidth=1
        )
        for side in reversed(sides):  # ours on top
            points = [
                (r.bytes, r.gb_per_s if side == OURS else r.gb_per_s / r.peers[side].ratio)
                for r in rows
                if side == OURS or side in r.peers
            ]
            if points:
                (handles[side],) = axis.plot(
                    *zip(*points, strict=True),
                    color=look.color(side),
                    marker=MARKERS[side],
                    markersize=4.5 if side == OURS else 3.5,
                    linewidth=2 if side == OURS else 1.1,
                )
        axis.set_title(name, fontsize=7 if len(name) > 26 else 8, loc="left", pad=3)
        axis.set(xscale="log", yscale="log")
        _log_ticks(axis.xaxis, _bytes)
        _log_ticks(axis.yaxis, _plain)
        _tidy(axis, look)
        axis.grid(color=look.grid, linewidth=0.5)
        axis.tick_params(labelbottom=k + columns >= len(groups), labelleft=k % columns == 0)
    figure.supxlabel("bytes that must move", fontsize=8)
    figure.supylabel("GB/s, higher is better", fontsize=8)
    order = [s for s in (*sides, *handles) if s in handles]
    names = list(dict.fromkeys(order))
    _legend(figure, [handles[n] for n in names], names, look)


def _log_ticks(axis: Any, label: Callable[[float, int], str]) -> None:
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(label))
    axis.set_minor_locator(NullLocator())


def _plain(x: float, _: int) -> str:
    return f"{x:g}"


def _bytes(x: float, _: int) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= unit:
            return f"{x / unit:g}{name}"
    return f"{x:g}"


def _draw_ratios(figure: Any, rows: Sequence[Row], peers: Sequence[str], look: Theme) -> None:
    """A group of bars a loss: how many times as long as ours each peer takes, at the largest size."""
    columns = _ratio_columns(rows)
    axes = figure.subplots(1, len(columns), sharex=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    longest = max(map(_bars, columns))
    for axis, part in zip(axes, columns, strict=True):
        place, ticks = 0.0, []
        for row in part:
            mine = [p for p in peers if p in row.peers]
            ticks.append(place + (len(mine) - 1) / 2)
            for peer in mine:
                ratio = row.peers[peer].ratio
                handles[peer] = axis.barh(place, ratio - 1, left=1, height=0.9, color=look.color(peer))
                axis.annotate(
                    f"{ratio:.3g}x",
                    (ratio, place),
                    xytext=(3 if ratio >= 1 else -3, 0),
                    textcoords="offset points",
                    ha="left" if ratio >= 1 else "right",
                    va="center",
                    fontsize=6.5,
                )
                place += 1
            place += GAP
        axis.set_ylim(longest - GAP, -GAP)
        axis.set_yticks(ticks, [f"{r.loss}\n{dimensions(r.shape)}" for r in part], fontsize=7)
        axis.axvline(1, color=look.color(OURS), linewidth=2)
        axis.set_xscale("log")
        _log_ticks(axis.xaxis, _plain)
        _tidy(axis, look)
        axis.grid(axis="x", color=look.grid, linewidth=0.5)
        axis.tick_params(axis="y", length=0)
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(min(low / 1.5, 0.8), high * 1.6)
    figure.supxlabel("times as long as numbaloss (the line), log scale", fontsize=8)
    names = [p for p in peers if p in handles]
    _legend(figure, [handles[n] for n in names], names, look)


def _bars(rows: Sequence[Row]) -> float:
    """How many bars high the groups of some rows are, with the gaps between them."""
    return sum(len(r.peers) + GAP for r in rows)


def _ratio_columns(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Rows side by side where they are many."""
    half = (len(rows) + 1) // 2
    return [rows] if len(rows) <= 8 else [rows[:half], rows[half:]]


def _tidy(axis: Any, look: Theme) -> None:
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, handles: Sequence[Any], names: Sequence[str], look: Theme) -> None:
    figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=len(names),
        frameon=False,
        fontsize=8,
        labelcolor=look.text,
    )
