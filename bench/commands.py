"""The commands of `numbaloss`; where these libraries are missing, `numbaloss.cli` says what to install."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numba
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import numbaloss as nl
from numbaloss import testing
from numbaloss.kernels.spec import VALUE

from . import machine, options
from .cases import DTYPES, FAMILIES, MODES, Case, Shape, cases, family_of
from .checks import check as check_loss
from .devices import CPU, Absent, Device, open_device
from .measure import Row, first_call
from .peers import DEFAULT, PEERS, Peer
from .report import FORMATS, Report, amount, change, duration, print_table, render, slower
from .session import benchmark

FAILED, INTERRUPTED = 1, 130

BUDGET, QUICK_BUDGET = 60.0, 15.0  # seconds of timing


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what is wrong with an option is one line on standard error."""
    try:
        code = numbaloss.main(arguments, prog_name="numbaloss", standalone_mode=False)
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        print(f"numbaloss: {' '.join(error.format_message().split())}", file=sys.stderr)
        return error.exit_code
    return code if isinstance(code, int) else 0


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    invoke_without_command=True,
)
@click.version_option(nl.__version__)
@click.pass_context
def numbaloss(ctx: click.Context) -> None:
    """PyTorch's losses for NumPy arrays: are they right here, and how fast?

    Exit codes: 0 if all is well, 1 if a check failed or a row got slower, 2 for a bad option, 130 after
    Ctrl-C.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


LOSS = options.listed(
    "--loss",
    options.ListOf("names", options.losses),
    default=["all"],
    show_default=True,
    help=f"Functions, classes, families ({', '.join(FAMILIES)}) or all.",
)
CHECKED = nl.ElementwiseLoss, nl.VectorLoss  # those that `testing.check_loss` knows
FORMAT = click.option(
    "--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True
)


def device_option(default: str) -> Any:
    return options.listed(
        "--device",
        options.names_of("device", ("cpu", "cuda", "all")),
        default=[default],
        show_default=True,
        help="cpu, cuda, or all that are there.",
    )


def dtype_option(*default: str) -> Any:
    return options.listed(
        "--dtype",
        options.ListOf("names", options.dtypes),
        default=[",".join(default)],
        show_default=True,
        help=f"{', '.join(DTYPES)} or all.",
    )


def open_devices(names: Sequence[str]) -> list[Device]:
    """The devices by name; `all` stands for those that are there."""
    opened = []
    for name in ("cpu", "cuda") if "all" in names else names:
        try:
            opened.append(open_device(name))
        except Absent as absent:
            if "all" not in names:
                raise click.UsageError(f"--device {name}: {absent}") from absent
    return opened


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """A bar on a terminal, nothing in a pipe; gives a function that takes what is done, and what is next.

    It is drawn at each step and by no thread, which would take time from what is measured.
    """
    console = Console(stderr=True)
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *parts, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, what: bar.update(task, completed=done, description=escape(what), refresh=True)


def console() -> Console:
    """Standard output: as wide as its terminal, or as what is written to a pipe."""
    out = Console()
    return out if out.is_terminal else Console(width=400)


def note(text: str) -> None:
    click.echo(f"numbaloss: {text}", err=True)


# ---- list, info ------------------------------------------------------------------------------------


@numbaloss.command("list", short_help="Losses, families, options, dtypes, devices.")
@LOSS
@FORMAT
def list_losses(loss: list[str], form: str) -> None:
    """The losses: function, class, family, arrays and options; dtypes and devices."""
    entries: list[dict[str, Any]] = [
        {
            "function": name,
            "class": (cls := nl.registry[name].Class).__name__,
            "family": family_of(nl.registry[name]).name,
            "shape": family_of(nl.registry[name]).axes,
            "arrays": list(cls._required),
            "options": {n: f.default for n, f in cls.fields.items()},
        }
        for name in loss
    ]
    devices = [d.name for d in open_devices(["all"])]
    if form == "json":
        content = {"losses": entries, "dtypes": DTYPES, "devices": devices}
        click.echo(json.dumps(content, indent=1, default=str))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("function", "class", "family", "arrays", "options"):
        table.add_column(heading, overflow="fold")
    for e in entries:
        given = ", ".join(n if v is None else f"{n}={v!r}" for n, v in e["options"].items())
        table.add_row(e["function"], e["class"], e["family"], ", ".join(e["arrays"]), given)
    console().print(table)
    click.echo(f"\nshapes: {'; '.join(f'{f.name} {f.axes}' for f in FAMILIES.values())}")
    click.echo(f"dtypes: {', '.join(DTYPES)}\ndevices here: {', '.join(devices)}")


@numbaloss.command(short_help="Versions, CPU, threads, cache, GPUs; what is missing.")
@FORMAT
def info(form: str) -> None:
    """Versions, CPU, threads, cache and GPUs; what is missing, and how to get it."""
    found = machine.info()
    if form == "json":
        click.echo(json.dumps(found, indent=1))
        return
    at, cache = found["machine"], found["cache"]
    lines = {
        "versions": ", ".join(f"{n} {v}" for n, v in found["versions"].items()),
        "system": at["system"],
        "processor": f"{at['processor']}, {at['cpus']} CPUs, SIMD of {at['simd_bits']} bits",
        "threads": f"{found['threads']['used']} of {found['threads']['most']}",
        "cache": f"{cache['path']}: {cache['kernels']} kernels, {amount(cache['bytes'])}",
        "GPUs": "; ".join(found["gpus"]) or found["gpus_absent"],
    }
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        table.add_row(name, escape(value))
    for k, (name, how) in enumerate(found["missing"].items()):
        table.add_row("" if k else "missing", escape(f"{name}, for {how}"))
    console().print(table)


# ---- check, warmup ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Checked:
    """What a check of a loss came to."""

    loss: str
    dtype: str
    device: str
    seconds: float
    passed: bool
    message: str | None


@dataclasses.dataclass
class Warmed:
    """What compiling a loss, or finding it in the cache, took."""

    loss: str
    dtype: str
    device: str
    seconds: float
    compiled: bool


@numbaloss.command(short_help="Is every loss right on this machine?")
@LOSS
@dtype_option("float64", "float32")
@device_option("all")
@click.option("--thorough", is_flag=True, help="Also all that numbaloss.testing.check_loss has for a loss.")
@FORMAT
def check(loss: list[str], dtype: list[str], device: list[str], thorough: bool, form: str) -> int:
    """Is every loss right on this machine? The first thing to run after installing.

    Values are compared with a plain float64 reference, gradients with its finite differences, at every sample
    of every option; then all threads with one. Returns 1 if a loss fails.
    """
    jobs = [(n, d, t, thorough) for n in loss for d in open_devices(device) for t in dtype]
    workers = min(os.cpu_count() or 1, len(jobs) // A_WORKERS_CHECKS)
    on_host = all(isinstance(where, CPU) for _, where, _, _ in jobs)
    results = []
    with progress(len(jobs)) as show, ExitStack() as stack:
        found: Iterator[Checked] = itertools.starmap(checked, jobs)
        if on_host and workers > 1:  # most of the time is the compiler's
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)
            found = pool.map(checked, *zip(*jobs, strict=True))
        for done, (name, _, narrow, _) in enumerate(jobs):
            show(done, f"{name} {narrow}")
            results.append(next(found))
    failed = [r for r in results if not r.passed]
    if form == "json":
        content = {"passed": not failed, "results": list(map(dataclasses.asdict, results))}
        click.echo(json.dumps(content, indent=1))
        return FAILED if failed else 0
    for r in failed:
        click.echo(f"FAILED {r.loss} {r.dtype} {r.device}: {r.message}")
    names = {r.loss for r in failed}
    kinds = ", ".join(dict.fromkeys(f"{r.dtype} on {r.device}" for r in results))
    click.echo(f"{len(loss) - len(names)} losses passed, {len(names)} failed: {kinds}")
    return FAILED if failed else 0


A_WORKERS_CHECKS = 8  # checks that are worth the start of a process


def checked(name: str, where: Device, dtype: str, thorough: bool) -> Checked:
    """Check one loss."""
    start, message = time.perf_counter(), None
    function = nl.registry[name]
    try:
        check_loss(function, dtype, where)
        if thorough and dtype == "float64" and issubclass(function.Class, CHECKED):
            testing.check_loss(function)
    except Exception as error:  # whatever it is, it is the loss that fails
        message = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    return Checked(name, dtype, where.name, time.perf_counter() - start, message is None, message)


@numbaloss.command(short_help="Compile into the cache.")
@LOSS
@dtype_option("float32")
@device_option("cpu")
@FORMAT
def warmup(loss: list[str], dtype: list[str], device: list[str], form: str) -> None:
    """Compile into the cache, so that later processes need not: for images and CI.

    Values, gradients, and gradients in place, of a small and of a large batch.
    """
    jobs = [(n, d, t) for n in loss for d in open_devices(device) for t in dtype]
    results = []
    with progress(len(jobs)) as show:
        for done, (name, where, kind) in enumerate(jobs):
            show(done, f"{name} {kind}")
            seconds, compiled = 0.0, False
            family = family_of(nl.registry[name])
            for shape in (family.tiny, family.sized(1 << 16)):
                for mode, in_place in [*((m, False) for m in MODES), (MODES[-1], True)]:
                    case = Case(name, shape, kind, mode, in_place, where.name)
                    arrays = {n: where.put(a) for n, a in case.arrays().items()}
                    took, new = first_call(case.call(arrays, case.out(arrays) if in_place else None))
                    seconds, compiled = seconds + took, compiled or new
            results.append(Warmed(name, kind, where.name, seconds, compiled))
    cache = machine.cache()
    if form == "json":
        content = {"results": list(map(dataclasses.asdict, results)), "cache": cache}
        click.echo(json.dumps(content, indent=1))
        return
    table = Table("loss", "dtype", "device", "", box=None, pad_edge=False)
    for r in results:
        how = "compiled" if r.compiled else "loaded"
        table.add_row(r.loss, r.dtype, r.device, f"{how} in {duration(r.seconds)}")
    console().print(table)
    click.echo(f"\n{cache['path']}: {cache['kernels']} kernels, {amount(cache['bytes'])}")


# ---- bench -----------------------------------------------------------------------------------------

# Options that choose what is measured: without any of them, --compare measures what the earlier run did.
CHOICE = ("loss", "shape", "size", "dtype", "device", "mode", "in_place", "quick", "threads")
BY_SUFFIX = {".json": "json", ".csv": "csv", ".md": "markdown"}


@numbaloss.command(short_help="How fast, how far from the limit, against what you use today?")
@LOSS
@options.listed(
    "--shape",
    options.ListOf("shapes", options.shapes),
    help="Such as 32x10,4096x1000, for all chosen losses.",
)
@options.listed(
    "--size",
    options.ListOf("numbers", options.sizes),
    help="Numbers of elements, such as 1000,1e6; a sweep in steps of ten, such as 1k:10M.",
)
@dtype_option("float32")
@device_option("cpu")
@options.listed(
    "--mode",
    options.names_of("mode", MODES),
    default=[MODES[-1]],
    show_default=True,
    help=f"{', '.join(MODES)}.",
)
@click.option("--in-place", is_flag=True, help="The gradient overwrites its argument.")
@click.option("--threads", type=click.IntRange(1, numba.config.NUMBA_NUM_THREADS), help="Of all sides.")
@options.listed(
    "--peer",
    options.names_of("peer", (*PEERS, "none")),
    default=[",".join(DEFAULT)],
    show_default=True,
    help=f"What to compare with: {', '.join(PEERS)}; or none.",
)
@click.option("--quick", is_flag=True, help="Fewer and smaller shapes, and less time.")
@click.option(
    "--time-budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help=f"Of timing, shared by the rows [default: {BUDGET:g}, or {QUICK_BUDGET:g} with --quick]. "
    "Compiling comes on top, and so do the fewest runs that say anything.",
)
@click.option(
    "--format", "form", type=click.Choice(FORMATS), help="[default: by --output's suffix, else table]"
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    callback=options.writable,
    help="Write the report there; the table is printed then.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    callback=options.writable,
    multiple=True,
    metavar="FILE.png|.svg",
    help="Draw speed against size, and ratios to the peers.",
)
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="OLD.json",
    help="Say what got slower than in an earlier report; without a choice of cases, measure its own.",
)
@click.pass_context
def bench(
    ctx: click.Context,
    loss: list[str],
    shape: list[Shape],
    size: list[int],
    dtype: list[str],
    device: list[str],
    mode: list[str],
    in_place: bool,
    threads: int | None,
    peer: list[str],
    quick: bool,
    time_budget: float | None,
    form: str | None,
    output: Path | None,
    plot: tuple[Path, ...],
    compare: Path | None,
) -> int:
    """How fast are the losses here, how far from the limit, and against what you use today?

    A row for each loss and shape: median time and spread; GB/s of the bytes that must move, and their share
    of what a copy of as many bytes moves in the same run; how many times as long each peer takes; error
    against float64; memory beyond the arguments; what compiling, or loading from the cache, took. All sides
    of a row run in this process, one after the other, warmed up.

    With --compare a row got slower if even the faster quarter of its runs takes more than 10% longer than the
    slower quarter did in the earlier report, both in seconds and in copies of as many bytes made in the same
    run (so a slower or busier machine does not count), and if it does so again in two more measurements.
    Returns 1 then.
    """
    draw = _drawing(plot)
    old = _earlier(compare) if compare else None
    if old and not any(_given(ctx, n) for n in CHOICE):
        todo, threads = [row.case for row in old.rows], old.settings["threads"]
        peer = peer if _given(ctx, "peer") else old.settings["peers"]
    else:
        todo = _cases(loss, shape, size, quick, [d.name for d in open_devices(device)], dtype, mode, in_place)
    devices = {n: open_devices([n])[0] for n in dict.fromkeys(c.device for c in todo)}
    threads = threads or numba.get_num_threads()
    if threads > numba.config.NUMBA_NUM_THREADS:
        raise click.UsageError(f"{compare} was measured with {threads} threads, more than there are")
    earlier = {row.key: row for row in old.rows} if old else {}
    if old and not any((case, threads) in earlier for case in todo):
        raise click.UsageError(f"no row of {compare} is among those to be measured")

    with progress(len(todo)) as show:
        report = benchmark(
            todo,
            devices,
            {n: _peers(peer, n, _given(ctx, "peer")) for n in devices},
            threads=threads,
            budget=time_budget or (QUICK_BUDGET if quick else BUDGET),
            earlier=earlier.values(),
            show=show,
        )
    for line in report.notes:
        note(line)
    _write(report, form, output)
    if draw and report.rows:
        for path in plot:
            draw(report, path)
    slow = _say_changes(earlier, old.settings["peers"], report) if old else False
    return INTERRUPTED if report.interrupted else FAILED if slow else 0


def _cases(
    losses: list[str],
    shapes: list[Shape],
    sizes: list[int],
    quick: bool,
    devices: list[str],
    dtypes: list[str],
    modes: list[str],
    in_place: bool,
) -> list[Case]:
    if in_place and VALUE in modes:
        raise click.UsageError("--in-place needs a gradient, which --mode value has not")
    todo = []
    try:
        for name, device, mode, dtype in itertools.product(losses, devices, modes, dtypes):
            settings = dict(dtype=dtype, mode=mode, in_place=in_place, device=device)
            todo += cases([name], shapes, sizes, quick=quick, **settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for case in todo:
        # float64 samples, the case's arrays, and as many again for a peer's own
        need = 8 * 6 * case.family.elements(case.shape)
        if need > memory:
            raise click.UsageError(f"{case} needs about {amount(need)}; this machine has {amount(memory)}")
    return todo


def _given(ctx: click.Context, option: str) -> bool:
    return ctx.get_parameter_source(option) is not ParameterSource.DEFAULT


def _peers(names: list[str], device: str, given: bool) -> list[Peer]:
    """The peers that are here; of those that are not, a line each says how to get them."""
    found = []
    for name in names:
        if name == "none":
            continue
        why = PEERS[name].missing(device)
        if why is None:
            found.append(PEERS[name])
        elif device in PEERS[name].devices or given:
            note(f"without {name}: {why}")
    return found


def _earlier(path: Path) -> Report:
    try:
        return Report.from_json(path.read_text())
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else error
        raise click.UsageError(f"--compare: {path}: {text}") from error


def _drawing(paths: Sequence[Path]) -> Any:
    """What draws a report, or None; whether it can is found before anything is measured."""
    if not paths:
        return None
    try:
        from . import plots
    except ModuleNotFoundError as error:
        raise click.UsageError(f'--plot needs {error.name}: pip install "numbaloss[bench]"') from error
    for path in paths:
        if path.suffix not in plots.SUFFIXES:
            raise click.UsageError(f"--plot: {path} must end in {' or '.join(plots.SUFFIXES)}")
    return plots.draw


def _write(report: Report, form: str | None, output: Path | None) -> None:
    if output:
        try:
            output.write_text(render(report, form or BY_SUFFIX.get(output.suffix, "table")))
        except OSError as error:
            raise click.ClickException(f"cannot write {output}: {error.strerror}") from error
    if not output and form not in (None, "table"):
        click.echo(render(report, form), nl=False)
    elif report.rows:
        print_table(report, console())


def _say_changes(earlier: Mapping[Any, Row], then: list[str], report: Report) -> bool:
    """Say what got slower, and faster, than in the earlier report; whether anything got slower."""
    pairs = [(earlier[row.key], row) for row in report.rows if row.key in earlier]
    words = {"slower": [p for p in pairs if slower(*p)], "faster": [p for p in pairs if slower(*p[::-1])]}
    for word, found in words.items():
        for old, new in found:
            note(
                f"{word}: {new.case}: {change(old, new):.2f} times as long as before for a copy's time "
                f"({duration(old.seconds.median)} then, {duration(new.seconds.median)} now)"
            )
    note(f"{len(pairs)} rows compared, {len(words['slower'])} slower, {len(words['faster'])} faster")
    if report.settings["peers"] != then:
        note(f"beside other peers than then ({', '.join(then) or 'none'}): small calls are not of one speed")
    return bool(words["slower"])
