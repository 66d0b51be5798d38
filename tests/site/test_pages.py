"""Pages and pictures of losses, without building the site."""

import sys
from pathlib import Path

import pytest

import numbaloss as nl

pytest.importorskip("sphinx", reason="Sphinx is in the extra docs")
pytest.importorskip("numpydoc", reason="numpydoc is in the extra docs")
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def extensions(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    import drawings
    import loss_pages
    import scenes

    yield loss_pages, drawings, scenes
    for name in ("drawings", "loss_pages", "scenes"):
        del sys.modules[name]


class Hinges(nl.ElementwiseLoss):
    r"""How far a number is below another.

    Parameters
    ----------
    input, target : array
        Of the same shape.
    slack : float, default 0.5
        Costs nothing.
    """

    slack: float = nl.arguments.positive(0.5)

    def value(input, target, slack):
        return nl.math.maximum(target - input - slack, 0.0)


def test_a_new_loss_has_its_page(extensions, tmp_path, monkeypatch):
    pages, _, _ = extensions
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    text = pages.page(Hinges.function)
    for part in ("hinges\n======", "slack=0.5", "Costs nothing.", "return nl.math.maximum", "> 0"):
        assert part in text, part
    for kind in ("value", "slope", "curvature", "small"):
        for theme in ("light", "dark"):
            assert (tmp_path / "pictures" / f"hinges-{kind}-{theme}.svg").stat().st_size > 1000
    assert "The value of hinges by input, with target = 0: slack=0.5 falls from 3.5 at -4 to 0 at 4" in text


def test_a_line_in_words(extensions):
    import numpy as np

    _, drawings, _ = extensions
    x = np.linspace(-2, 2, 5)
    assert drawings.shape(x, 0 * x) == "is 0 throughout"
    assert drawings.shape(x, x) == "rises from -2 at -2 to 2 at 2"
    assert drawings.shape(x, x * x) == "goes from 4 at -2 to 4 at 2, is least, 0, at 0"


def luminance(colour):
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_stand_out(extensions, theme):
    """3 to 1 from the page, as WCAG asks of graphics; each has dashes of its own too."""
    _, drawings, _ = extensions
    page = luminance({"light": "#ffffff", "dark": "#14181e"}[theme])
    for colour in drawings.LINES[theme]:
        bright, dim = sorted((page, luminance(colour)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 3, colour
    assert len({str(d) for d in drawings.DASHES}) == len(drawings.LINES[theme])


def test_a_report_s_columns(extensions):
    pages, _, _ = extensions
    rows = [{"loss": "x", "shape": "4", "dtype": "f4", "ns": "2.5 (3)", "more": "*"}]
    made = list(pages.table(rows, ("shape", "dtype", "ns")))
    assert made[3:] == [
        "   * - shape",
        "     - dtype",
        "     - ns",
        "   * - 4",
        "     - f4",
        "     - 2.5",
        "",
    ]
    assert not list(pages.table(rows, ("shape", "dtype")))
