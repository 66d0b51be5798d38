"""Drawings of scenes: a figure for each of value, slope and curvature, or for each map, in both themes.

Figures are small and stand side by side where there is room, so that a phone shows them one below another at
a readable size. Colours are Okabe and Ito's, for the colour-blind; each line has its own dashes too.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from scenes import Curves, Line, Maps, Panel, convex

from numbaloss.bench.plots import THEMES, Theme

SIZE = 3.2, 2.6  # inches
LINES = {
    "light": ("#0072B2", "#D55E00", "#007A59", "#8A4B7D"),
    "dark": ("#58A6FF", "#E69F00", "#2FBF8F", "#E08CC3"),
}
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MAPS = {"light": "Blues", "dark": "Blues_r"}
KINDS = ("value", "slope", "curvature")


def style(look: Theme) -> dict[str, Any]:
    """Matplotlib's settings for a theme."""
    text = {f"{a}color": look.text for a in ("text.", "axes.label", "xtick.", "ytick.")}
    return text | {
        "font.size": 10,
        "axes.edgecolor": look.text,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "grid.color": look.grid,
        "svg.hashsalt": "numbaloss",
    }


def saved(figure: Figure, path: Path) -> None:
    """Write a figure; the same one gives the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def curve(curves: Curves, kind: str, path: Path, theme: str, thumbnail: bool = False) -> None:
    """Draw one of value, slope and curvature."""
    look = THEMES[theme]
    with rc_context(style(look)):
        figure = Figure(figsize=(1.6, 1.0) if thumbnail else SIZE, layout="constrained")
        axes = figure.subplots()
        for k, line in enumerate(curves.lines[: 1 if thumbnail else None]):
            y = getattr(line, kind)
            if y is not None:
                colour = LINES[theme][k % 4]
                axes.plot(curves.x, y, color=colour, linestyle=DASHES[k % 4], linewidth=2, label=line.label)
        if thumbnail:
            axes.set(xticks=[], yticks=[])
        else:
            axes.grid(linewidth=0.6)
            axes.set_title(kind)
            axes.set_xlabel(curves.axis)
            if len(curves.lines) > 1 and kind == "value":
                axes.legend(frameon=False, fontsize=8)
        saved(figure, path)


def panel(shown: Panel, path: Path, theme: str, thumbnail: bool = False) -> None:
    """Draw a map."""
    look = THEMES[theme]
    with rc_context(style(look)):
        figure = Figure(figsize=(1.6, 1.0) if thumbnail else SIZE, layout="constrained")
        axes = figure.subplots()
        image = axes.pcolormesh(shown.x, shown.y, shown.height, cmap=MAPS[theme], rasterized=True)
        if thumbnail:
            axes.set(xticks=[], yticks=[])
        else:
            figure.colorbar(image, ax=axes)
            axes.set_title(shown.title, fontsize=10)
            axes.set(xlabel=shown.axes[0], ylabel=shown.axes[1])
            if shown.arrows:
                every = slice(4, None, 10)
                u, v = (a[every, every] for a in shown.arrows)
                longest = float(np.hypot(u, v).max()) or 1.0
                arrows = shown.x[every, every], shown.y[every, every], u / longest, v / longest
                axes.quiver(*arrows, color=LINES[theme][1], scale=14, width=0.007)
            else:
                axes.set_yticks(np.unique(shown.y))
            for name, (x, y) in shown.points.items():
                axes.plot(x, y, "o", color=look.text, markeredgecolor=look.background, markersize=7)
                axes.annotate(
                    name,
                    (x, y),
                    xytext=(0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                    bbox={"facecolor": look.background, "edgecolor": "none", "pad": 1},
                )
        saved(figure, path)


def pictures(
    name: str, scene: Curves | Maps, folder: Path, changed: float = math.inf
) -> list[tuple[str, str]]:
    """Draw a loss; return each picture's stem and its text for those who do not see it.

    A picture that is newer than `changed`, a time, stays.
    """
    draw: Callable[..., None]
    if isinstance(scene, Maps):
        drawn = {str(k): (panel, (shown,)) for k, shown in enumerate(scene.panels)}
        said = {str(k): said_of_panel(name, shown, scene.said) for k, shown in enumerate(scene.panels)}
        small = panel, (scene.panels[0],)
    else:
        kinds = [k for k in KINDS if any(getattr(line, k) is not None for line in scene.lines)]
        drawn = {kind: (curve, (scene, kind)) for kind in kinds}
        said = {kind: said_of_curve(name, scene, kind) for kind in kinds}
        small = curve, (scene, "value")
    for stem, (draw, what) in (drawn | {"small": small}).items():
        for theme in THEMES:
            path = folder / f"{name}-{stem}-{theme}.svg"
            if not path.exists() or path.stat().st_mtime < changed:
                draw(*what, path, theme, thumbnail=stem == "small")
    return [(f"{name}-{stem}", text) for stem, text in said.items()]


# ---- the pictures in words ------------------------------------------------------------------------------


def shape(x: np.ndarray, y: np.ndarray) -> str:
    """A line in words: where it ends, where it is least and largest, whether it rises."""
    y = y + 0.0  # -0 is 0
    steps = np.diff(y)
    slack = 1e-9 * (np.ptp(y) + 1e-300)
    if np.ptp(y) < 1e-12:
        return f"is {y[0]:.3g} throughout"
    ends = f"from {y[0]:.3g} at {x[0]:.3g} to {y[-1]:.3g} at {x[-1]:.3g}"
    if (steps >= -slack).all():
        return f"rises {ends}"
    if (steps <= slack).all():
        return f"falls {ends}"
    low, high = int(np.argmin(y)), int(np.argmax(y))
    parts = [f"goes {ends}"]
    if low not in (0, len(y) - 1):
        parts.append(f"is least, {y[low]:.3g}, at {x[low]:.3g}")
    if high not in (0, len(y) - 1):
        parts.append(f"is largest, {y[high]:.3g}, at {x[high]:.3g}")
    return ", ".join(parts)


def said_of_curve(name: str, curves: Curves, kind: str) -> str:
    """A picture of lines in words."""
    lines: list[Line] = [line for line in curves.lines if getattr(line, kind) is not None]
    first = lines[0]
    text = f"The {kind} of {name} by {curves.axis}"
    text += f", with {curves.fixed}" if curves.fixed else ""
    text += f": {first.label} " if len(lines) > 1 else ": it "
    text += shape(curves.x, getattr(first, kind))
    if len(lines) > 1:
        text += "; also " + "; ".join(line.label for line in lines[1:])
    if kind == "curvature" and convex(curves):
        text += "; nowhere negative"
    return text + "."


def said_of_panel(name: str, shown: Panel, said: str) -> str:
    """A map in words."""
    low = np.unravel_index(int(np.argmin(shown.height)), shown.height.shape)
    high = np.unravel_index(int(np.argmax(shown.height)), shown.height.shape)
    at = [f"({shown.x[k]:.2g}, {shown.y[k]:.2g})" for k in (low, high)]
    return (
        f"A map of {name}, {shown.title}: {said}. It is least, {shown.height.min():.3g}, at {at[0]}, "
        f"and largest, {shown.height.max():.3g}, at {at[1]}."
    )
