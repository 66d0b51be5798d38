"""What a run of the benchmark says: as JSON, CSV, Markdown or a table, and against an earlier run."""

import argparse
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .cases import dimensions, dtype_of
from .measure import PeerTime, Quartiles, Row

SCHEMA = "numbaloss-bench/1"
FORMATS = ("table", "json", "csv", "markdown")
TOLERANCE = 0.1  # by which the quartiles must be apart for a row to count as slower


@dataclass
class Report:
    """Rows, and where, when and how they were measured. `bench/schema.json` describes it as JSON."""

    stamp: dict[str, Any]  # date, machine, versions
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def to_json(self) -> str:
        content = {
            "schema": SCHEMA,
            **self.stamp,
            "settings": self.settings,
            "interrupted": self.interrupted,
            "notes": self.notes,
            "rows": [_jsonable(asdict(row)) for row in self.rows],
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read a report; raises a ValueError that says what is wrong with it."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"is no JSON: {error}") from error
        found = content.get("schema") if isinstance(content, dict) else None
        if found != SCHEMA:
            raise ValueError(f"has the schema {found!r}, wanted {SCHEMA!r}")
        try:
            rows = [_row(r) for r in content["rows"]]
            stamp = {k: content[k] for k in ("date", "machine", "versions")}
            return cls(stamp, content["settings"], rows, content["notes"], content["interrupted"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"is not as its schema says: {error}") from error


def _jsonable(value: Any) -> Any:
    """Quartiles by name, which `asdict` leaves as tuples."""
    if isinstance(value, Quartiles):
        return value._asdict()
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    return value


def _row(content: dict[str, Any]) -> Row:
    times = {n: Quartiles(**content[n]) for n in ("seconds", "copy_seconds", "relative")}
    peers = {n: PeerTime(Quartiles(**p["seconds"]), p["ratio"]) for n, p in content["peers"].items()}
    return Row(**{**content, **times, "shape": tuple(content["shape"]), "peers": peers})


# ---- cells -----------------------------------------------------------------------------------------


def scaled(number: float, units: Sequence[str], step: float = 1000.0) -> str:
    """A number of a unit to three digits: 1234.0 of ("B", "kB") is "1.23 kB"."""
    for unit in units[:-1]:
        if abs(number) < 0.9995 * step:
            return f"{number:.3g} {unit}"
        number /= step
    return f"{number:.3g} {units[-1]}"


def duration(seconds: float) -> str:
    return scaled(seconds * 1e9, ("ns", "µs", "ms", "s"))


def amount(count: float) -> str:
    return scaled(count, ("B", "kB", "MB", "GB", "TB"))


def _error(row: Row) -> str:
    """In units of the dtype's last place."""
    from numbaloss.testing import finfo

    eps = float(finfo(dtype_of(row.dtype)).eps)
    return " / ".join("-" if e is None else f"{e / eps:.1f}" for e in row.error.values())


def _first(row: Row) -> str:
    if row.compile_s is not None:
        return f"compiled {row.compile_s:.2f} s"
    return f"loaded {row.load_s:.2f} s" if row.load_s and row.load_s >= 0.005 else ""


Column = tuple[str, Callable[[Row], str]]
NAMING = ("loss", "shape", "dtype", "mode", "device")


def columns(rows: Sequence[Row]) -> list[Column]:
    """Headings and cells; what all rows have in common is left to the caption."""
    made: list[Column] = [("loss", lambda r: r.loss), ("shape", lambda r: dimensions(r.shape))]
    for name in NAMING[2:]:
        if len({getattr(r, name) for r in rows}) > 1:
            made.append((name, lambda r, name=name: getattr(r, name)))  # type: ignore[misc]
    made += [
        ("time", lambda r: duration(r.seconds.median)),
        ("±", lambda r: f"{r.seconds.spread:.0%}"),
        ("GB/s", lambda r: f"{r.gb_per_s:.2f}"),
        ("of copy", lambda r: f"{r.share_of_copy:.0%}"),
    ]
    for peer in dict.fromkeys(p for r in rows for p in r.peers):
        made.append(
            (peer, lambda r, peer=peer: f"{r.peers[peer].ratio:.1f}x" if peer in r.peers else "-")  # type: ignore[misc]
        )
    made += [
        ("error, ulp", _error),
        ("memory", lambda r: amount(r.peak_bytes)),
        ("first call", _first),
    ]
    return made


def caption(report: Report) -> str:
    """What all rows have in common, and what the columns mean."""
    rows = report.rows
    common = [
        getattr(rows[0], name)
        for name in ("mode", "dtype", "device")
        if len({getattr(r, name) for r in rows}) == 1
    ]
    common += ["in place"] * rows[0].in_place
    lines = [
        f"{', '.join(common)}, {rows[0].threads} threads, {report.stamp['machine']['processor']}.",
        "time: median, ± half of the distance of the quartiles. GB/s: of the bytes that must move; of copy: "
        "against a copy that moves as many.",
    ]
    if any(r.peers for r in rows):
        lines.append("Peers: how many times as long they take.")
    lines.append("error: of value / gradient against float64. memory: beyond the arguments.")
    return "\n".join(lines)


# ---- formats ---------------------------------------------------------------------------------------


def render(report: Report, form: str) -> str:
    """The report in one of `FORMATS`, the table as plain text."""
    if form == "json":
        return report.to_json()
    if form == "csv":
        return as_csv(report.rows)
    if not report.rows:
        return ""
    if form == "markdown":
        head, cells = zip(*columns(report.rows), strict=True)
        return markdown(head, [[cell(r) for cell in cells] for r in report.rows]) + f"\n{caption(report)}\n"
    file = io.StringIO()
    print_table(report, Console(file=file, width=400))
    return file.getvalue()


def print_table(report: Report, console: Console) -> None:
    """The table; in several, each with the columns that name a row, where the terminal is narrow."""
    made = [[name, *(cell(row) for row in report.rows)] for name, cell in columns(report.rows)]
    named = [c for c in made if c[0] in NAMING]
    parts = [list(named)]
    for column in made[len(named) :]:
        width = sum(max(map(len, c)) + 3 for c in (*parts[-1], column))
        if width > console.width and len(parts[-1]) > len(named):
            parts.append(list(named))
        parts[-1].append(column)
    for part in parts:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, *_ in part:
            table.add_column(name, justify="left" if name in NAMING else "right", no_wrap=True)
        for row in zip(*(cells for _, *cells in part), strict=True):
            table.add_row(*row)
        console.print(table)
    console.print(caption(report), highlight=False, soft_wrap=True)


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def read_tables(text: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The tables of a text in Markdown: the heading above each, and its rows, cells by column."""
    heading = ""
    columns: list[str] = []
    rows: list[dict[str, str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not columns:
                columns = cells
            elif not cells[0].startswith("---"):
                rows.append(dict(zip(columns, cells, strict=True)))
        elif columns:
            yield heading, rows
            columns, rows = [], []
        if line.startswith("#"):
            heading = line.lstrip("# ")


def tables_of_losses(about: str | None, tables: Callable[[list[str]], str], losses: Iterable[str]) -> None:
    """Run a command that prints tables, in Markdown, of the losses that it is given or of all."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("losses", metavar="LOSS", nargs="*", help="default: all")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write the tables there")
    options = parser.parse_args()
    text = tables(options.losses or list(losses))
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, keys joined by dots."""
    made: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            made |= flat(value, f"{prefix}{key}.")
        else:
            made[prefix + key] = dimensions(value) if isinstance(value, tuple | list) else value
    return made


def as_csv(rows: Sequence[Row]) -> str:
    """A line a row, under the names of the JSON's fields."""
    lines = [flat(_jsonable(asdict(row))) for row in rows]
    names = dict.fromkeys(name for line in lines for name in line)
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


# ---- against an earlier run ------------------------------------------------------------------------


def slower(old: Row, new: Row, tolerance: float = TOLERANCE) -> bool:
    """Whether a row got slower beyond the noise.

    Even its faster quarter takes longer than the slower quarter did, by more than the tolerance: in seconds,
    and in copies of as many bytes made in the same run. So a slower or busier machine does not count.
    """
    return all(
        n.low > o.high * (1 + tolerance)
        for o, n in ((old.seconds, new.seconds), (old.relative, new.relative))
    )


def change(old: Row, new: Row) -> float:
    """How many times as long as before a row takes, for a copy of the same speed."""
    return new.relative.median / old.relative.median
