"""The README's claims of speed, from the last reports: python -m numbaloss.bench.readme

Each is PyTorch's time over ours, eager forward and backward, the geometric mean over a report's rows. The
README's lines between its marks are written anew, and those of first calls; a test tells if they are not of
the reports.
"""

import re
from pathlib import Path
from statistics import geometric_mean

from .report import markdown, read_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
# A report, the beginning of a section's heading, the column of the ratio, and the words for it.
CLAIMS = (
    ("speed.md", "value_and_grad, 10 million", "torch / out", "10 million elements, into a buffer"),
    ("speed.md", "value_and_grad, 100 float32", "torch / ours", "100 elements"),
    ("speed.md", "value_and_grad, float32: rows", "torch / ours", "rows of scores, vectors, sequences"),
    ("roofline.md", "Losses", "torch, one", "40,000 elements, both on one thread"),
)


def number(cell: str) -> float | None:
    """The number at the beginning of a cell; None where nothing was measured."""
    found = re.match(r"[\d.]+", cell)
    return float(found[0]) if found else None


def claims() -> str:
    """The table for the README."""
    lines = []
    for name, heading, column, words in CLAIMS:
        text = (RESULTS / name).read_text()
        date, machine = text.split(", ")[:2]
        (rows,) = (rows for title, rows in read_tables(text) if title.startswith(heading))
        ratios = [r for row in rows if (r := number(row[column])) is not None]
        mean, least = f"{geometric_mean(ratios):.0f}", f"{min(ratios):.1f}"
        lines.append([f"{machine}, {date}", words, mean, least, str(len(ratios))])
    return markdown(["machine", "float32", "PyTorch's time / ours", "least", "of"], lines)


def first_calls() -> str:
    """The table of first calls, and where and when it was measured."""
    text = (RESULTS / "first_calls.md").read_text()
    ((_, rows),) = read_tables(text)
    return f"{text.splitlines()[0]}\n\n" + markdown(list(rows[0]), [list(row.values()) for row in rows])


BLOCKS = {"speed": claims, "first calls": first_calls}


def between(name: str) -> re.Pattern[str]:
    """The pattern of the README's lines between two marks."""
    return re.compile(f"(?s)(?<=<!-- {name} -->\n).*(?=<!-- /{name} -->)")


def main() -> None:
    text = README.read_text()
    for name, made in BLOCKS.items():
        found = between(name).search(text)
        assert found, name
        text = text[: found.start()] + made() + text[found.end() :]
    README.write_text(text)


if __name__ == "__main__":
    main()
