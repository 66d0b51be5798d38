"""The cases, the peers, and how both are measured and reported."""

import csv
import importlib.machinery
import io
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")

import numbaloss as nl
from numbaloss import bench, reference, testing
from numbaloss.bench import gpu, measure, readme, report, speed
from numbaloss.bench.cases import FAMILIES, MODES, Case, cases, family_of
from numbaloss.bench.devices import CUDA, HOST, Absent
from numbaloss.bench.formulas import FORMULAS
from numbaloss.bench.measure import COPY, OURS, Quartiles, Side, interleave, plan
from numbaloss.bench.peers import PEERS
from numbaloss.bench.report import Report, slower
from numbaloss.bench.session import benchmark

LOSSES = list(nl.registry)
BENCH = Path(bench.__file__).resolve().parent


def tiny(loss, **settings):
    return Case(loss, family_of(nl.registry[loss]).tiny, **settings)


def peer_names(*wanted):
    return [n for n in wanted if PEERS[n].missing() is None]


@pytest.fixture(scope="module")
def made():
    """A report of two cases, measured beside NumPy."""
    todo = cases(["mse_loss"], shapes=[(1000,)]) + cases(["huber_loss"], sizes=[64], mode="value")
    return benchmark(todo, {"cpu": HOST}, {"cpu": [PEERS["numpy"]]}, threads=1, budget=0.02)


# ---- cases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_takes_its_family_s_arguments(loss):
    family = family_of(nl.registry[loss])
    for shape in (family.tiny, family.sized(64)):
        arrays = Case(loss, shape).arrays()
        assert tuple(arrays) == nl.registry[loss].Class._required
        assert np.isfinite(getattr(reference, loss)(**arrays))
        assert {a.dtype for a in arrays.values() if a.dtype.kind == "f"} == {np.dtype(np.float32)}
        again = Case(loss, shape).arrays()
        assert all(np.array_equal(a, again[n]) for n, a in arrays.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    family = FAMILIES[name]
    for shape in (*family.shapes, *family.quick, family.tiny, family.sized(1), family.sized(12345)):
        assert family.ndim[0] <= len(shape) <= family.ndim[1] and min(shape) >= 1
    for size in (10**4, 10**6):
        assert 0.2 * size < family.elements(family.sized(size)) < 4 * size
    assert max(map(family.elements, family.quick)) <= max(map(family.elements, family.shapes))


def test_the_bytes_that_must_move():
    mse, cross_entropy = Case("mse_loss", (1000,)), Case("cross_entropy", (32, 10))
    assert mse.traffic(mse.arrays()) == 3 * 4000
    assert replace(mse, mode="value").traffic(mse.arrays()) == 2 * 4000
    assert replace(mse, dtype="float16").traffic(replace(mse, dtype="float16").arrays()) == 3 * 2000
    assert cross_entropy.traffic(cross_entropy.arrays()) == 2 * 1280 + 32 * 8
    nll = replace(cross_entropy, loss="nll_loss", mode="value")
    assert nll.traffic(nll.arrays()) == 32 * 4 + 32 * 8
    triplet = Case("triplet_margin_loss", (16, 8))
    assert triplet.traffic(triplet.arrays()) == 6 * 512


def test_cases_are_those_asked_for():
    assert {c.shape for c in cases(["mse_loss"], quick=True)} == set(FAMILIES["elementwise"].quick)
    assert [c.shape for c in cases(["mse_loss"], [(3, 4)], [7])] == [(3, 4), (7,)]
    with pytest.raises(ValueError, match="cosine_embedding_loss cannot take the shape 3x4x5: wanted N x D"):
        cases(["mse_loss", "cosine_embedding_loss"], [(3, 4, 5)])
    assert str(Case("mse_loss", (3, 4), in_place=True)) == "mse_loss 3x4 float32 value_and_grad in place"


def test_heads_are_cut_along_the_batch():
    arrays = {"log_probs": np.zeros((8, 3, 5)), "targets": np.zeros((3, 4)), "input_lengths": np.zeros(3)}
    cut = FAMILIES["sequence"].head(arrays, 2)
    assert [a.shape for a in cut.values()] == [(8, 2, 5), (2, 4), (2,)]
    whole = {"input": np.zeros((5, 4)), "linear_weight": np.zeros((7, 4))}
    assert [a.shape for a in FAMILIES["linear"].head(whole, 2).values()] == [(2, 4), (7, 4)]


# ---- peers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", FORMULAS)
def test_array_code_is_the_loss(loss):
    """Its value is the reference's, and its gradient that of differences."""
    if loss not in nl.registry:
        pytest.skip(f"{loss} is not in this version")
    case = tiny(loss, dtype="float64")
    arrays = case.arrays()
    oracle = getattr(reference, loss)
    value, gradients = PEERS["numpy"].build(case, arrays)()
    assert value == pytest.approx(oracle(**arrays), rel=1e-9)
    assert PEERS["numpy"].build(replace(case, mode="value"), arrays)() == pytest.approx(value, rel=1e-12)
    for name, gradient in zip(case.wrt, gradients if len(case.wrt) > 1 else (gradients,), strict=True):

        def terms(x, name=name):
            return oracle(**{**arrays, name: x}, reduction="none")

        left, right = testing.slopes(terms, arrays[name], range(gradient.size))
        # Each term's own differences, whose mean is good to six digits; that of the mean would not be.
        left, right = (q.reshape(gradient.size, -1).mean(axis=1) for q in (left, right))
        use = testing.smooth(left, right)
        assert use.mean() > 0.5 and gradient.shape == arrays[name].shape
        np.testing.assert_allclose(gradient.reshape(-1)[use], ((left + right) / 2)[use], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("peer", peer_names("torch"))
@pytest.mark.filterwarnings("ignore")  # PyTorch's, of kl_div's mean and of a value that keeps its graph
def test_torch_computes_the_same(peer, loss):
    if not hasattr(importlib.import_module("torch.nn.functional"), loss):
        assert PEERS[peer].build(tiny(loss), tiny(loss).arrays()) is None
        return
    agrees_with_array_code(PEERS[peer], tiny(loss))


@pytest.mark.parametrize("loss", ["poisson_nll_loss", "cross_entropy", "triplet_margin_loss"])
@pytest.mark.parametrize("peer", peer_names("jax"))
def test_jax_computes_the_same(peer, loss):
    agrees_with_array_code(PEERS[peer], tiny(loss))


def agrees_with_array_code(peer, case):
    arrays = case.arrays()
    value, gradients = peer.build(case, arrays)()
    exact = getattr(reference, case.loss)(**arrays)
    assert float(value) == pytest.approx(exact, rel=1e-5)
    plain = PEERS["numpy"].build(case, arrays)
    if plain is not None:
        single = len(case.wrt) == 1
        wanted = plain()[1]
        pairs = [(gradients, wanted)] if single else zip(gradients, wanted, strict=True)
        for got, want in pairs:
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", PEERS["sklearn"].LOSSES)
@pytest.mark.parametrize("peer", peer_names("sklearn"))
def test_sklearn_computes_the_same_up_to_its_scale(peer, loss):
    case = tiny(loss)
    arrays = case.arrays()
    got = np.reshape(PEERS[peer].build(case, arrays)()[1], -1)
    wanted = np.reshape(PEERS["numpy"].build(case, arrays)()[1], -1)
    scale = got[abs(wanted).argmax()] / wanted[abs(wanted).argmax()]
    assert scale > 0
    np.testing.assert_allclose(got, scale * wanted, rtol=1e-4, atol=1e-6 * scale)


def test_a_missing_peer_says_how_to_get_it(monkeypatch):
    assert PEERS["numpy"].missing("cuda") == "runs on cpu only"
    monkeypatch.setattr(type(PEERS["torch"]), "module", "no_such_module")
    assert PEERS["torch"].missing() == "not installed: pip install torch"
    assert PEERS["torch-compile"].missing() == "not installed: pip install torch"


# ---- measuring -------------------------------------------------------------------------------------


def test_sides_take_turns():
    order = []
    sides = {n: Side(lambda n=n: order.append(n), runs) for n, runs in (("a", 4), ("b", 4), ("c", 2))}
    times = interleave(sides)
    assert "".join(order) == "ababcababc"
    assert [len(t) for t in times.values()] == [4, 4, 2]


def test_an_argument_is_put_back_outside_of_the_clock():
    order = []
    side = Side(lambda: order.append("call"), 2, prepare=lambda: order.append("ready"))
    interleave({"a": side})
    assert order == ["ready", "call"] * 2


def test_runs_follow_the_budget(monkeypatch):
    clock = {OURS: 0.1, "copy": 1e-6, "fast": 1e-3, "slow": 1.0}
    calls = {n: lambda: None for n in clock}
    names = {id(c): n for n, c in calls.items()}
    monkeypatch.setattr(type(HOST), "seconds", lambda self, call, n=1: clock[names[id(call)]])
    sides = plan(calls, {}, HOST, 16.0)
    assert [s.calls for s in sides.values()] == [1, 2000, 2, 1]
    assert [s.runs for s in sides.values()] == [40, 40, 101, 4]
    assert [s.runs for s in plan(calls, {}, HOST, 1e-9).values()] == [5, 5, 1, 1]


def test_a_first_call_that_compiles_does_not_count(monkeypatch):
    clock = {OURS: iter([9.0, 1e-5, 2e-5]), COPY: iter([1e-5] * 3)}
    calls = {n: lambda: None for n in clock}
    names = {id(c): n for n, c in calls.items()}
    monkeypatch.setattr(type(HOST), "seconds", lambda self, call, n=1: next(clock[names[id(call)]]))
    assert [s.calls for s in plan(calls, {}, HOST, 1.0).values()] == [200, 200]


def test_a_row(made):
    row = made.rows[0]
    assert row.case == Case("mse_loss", (1000,)) and row.bytes == 12000 and row.family == "elementwise"
    assert 0 < row.seconds.low <= row.seconds.median <= row.seconds.high < 0.1
    assert row.gb_per_s == pytest.approx(12e-6 / row.seconds.median)
    assert row.share_of_copy == pytest.approx(1 / row.relative.median)
    assert row.peers["numpy"].ratio == pytest.approx(row.peers["numpy"].seconds.median / row.seconds.median)
    assert row.runs >= 5 and (row.compile_s is None) != (row.load_s is None)
    assert 0 <= row.error["value"] < 1e-6 and 0 < row.error["gradient"] < 1e-6
    assert 4000 <= row.peak_bytes < 20_000  # the gradient
    assert made.rows[1].error["gradient"] is None and made.rows[1].mode == "value"


def test_an_error_is_seen(monkeypatch):
    case = Case("mse_loss", (1000,))
    monkeypatch.setattr(reference, "mse_loss", lambda **a: 1.01 * np.mean((a["input"] - a["target"]) ** 2.0))
    assert measure.errors(case, case.arrays(), HOST)["value"] == pytest.approx(0.01 / 1.01, rel=1e-3)


def test_relative_errors():
    assert measure.relative_error(np.array([1.0, 0.0, 0.0]), [1.0, 0.0, 0.3]) == pytest.approx(
        0.3 / (1.3 / 3)
    )
    assert measure.relative_error(np.zeros(3), np.zeros(3)) == 0


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.more
def test_in_place_stays_in_the_domain(mode):
    case = Case("binary_cross_entropy", (100,), mode=mode, in_place=True)
    row = measure.measure(case, HOST, budget=0.001)
    assert row.in_place and row.peak_bytes < 8_000 and row.error["gradient"] < 1e-6


def test_a_peer_that_fails_costs_its_column_only(made):
    class Broken(type(PEERS["numpy"])):
        name = "broken"

        def build(self, case, arrays):
            raise RuntimeError("no such thing\nand more")

    notes = []
    row = measure.measure(Case("mse_loss", (10,)), HOST, [Broken(), PEERS["numpy"]], 0.001, notes.append)
    assert list(row.peers) == ["numpy"]
    assert notes == ["broken, mse_loss 10 float32 value_and_grad: RuntimeError: no such thing"]


def test_cuda_is_measured_by_events(monkeypatch):
    """With a module in CuPy's place: what is asked of it, and in which order."""
    log = []

    class Event:
        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

    class Pool:
        held = 0

        def free_all_blocks(self):
            Pool.held = 0

        def total_bytes(self):
            Pool.held += 512
            return Pool.held

    cupy = types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    cupy.__dict__.update(vars(np))
    cupy.__dict__.update(
        asnumpy=np.asarray,
        get_default_memory_pool=Pool,
        cuda=types.SimpleNamespace(
            Event=Event,
            get_elapsed_time=lambda start, end: 2.0,
            runtime=types.SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=OSError),
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    case = Case("mse_loss", (1000,), device="cuda")
    row = measure.measure(case, CUDA(), [PEERS["cupy"]], 0.001)
    assert log[:3] == ["record", "record", "synchronize"]
    assert row.seconds.median == 2e-3 and row.peak_bytes == 512 and row.peers["cupy"].ratio == 1
    assert PEERS["numpy"].missing("cuda") and not PEERS["cupy"].missing("cuda")


# ---- reports ---------------------------------------------------------------------------------------


def test_json_is_as_its_schema_says(made):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((BENCH / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    content = json.loads(made.to_json())
    jsonschema.validate(content, schema)
    assert schema["properties"]["schema"]["const"] == report.SCHEMA
    row = schema["$defs"]["row"]
    assert set(row["required"]) == set(row["properties"]) == set(content["rows"][0])
    assert row["properties"]["family"]["enum"] == list(FAMILIES)


def test_json_comes_back(made):
    again = Report.from_json(made.to_json())
    assert again.rows == made.rows and again.to_json() == made.to_json()
    for text, message in (
        ("{", "is no JSON"),
        ("[]", "has the schema None"),
        ('{"schema": "numbaloss-bench/99"}', "has the schema 'numbaloss-bench/99', wanted"),
        (json.dumps({"schema": report.SCHEMA}), "is not as its schema says"),
    ):
        with pytest.raises(ValueError, match=message):
            Report.from_json(text)


def test_csv_has_a_line_a_row(made):
    lines = list(csv.DictReader(io.StringIO(report.render(made, "csv"))))
    assert [line["loss"] for line in lines] == ["mse_loss", "huber_loss"]
    assert float(lines[0]["seconds.median"]) == made.rows[0].seconds.median
    assert float(lines[0]["peers.numpy.ratio"]) == made.rows[0].peers["numpy"].ratio
    assert lines[1]["error.gradient"] == "" and lines[1]["shape"] == "64"


def test_tables(made):
    plain, marked = report.render(made, "table"), report.render(made, "markdown")
    for text in ("mse_loss", "1000", "numpy", "of copy", "1 threads"):
        assert text in plain and text in marked
    lines = [line for line in marked.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


def test_a_narrow_terminal_gets_several_tables(made):
    from rich.console import Console

    file = io.StringIO()
    report.print_table(made, Console(file=file, width=70))
    lines = file.getvalue().splitlines()
    table = [line for line in lines if "mse_loss" in line]
    assert len(table) > 1 and max(map(len, table)) <= 70 and "…" not in file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.2e-8, "12 ns"), (9.994e-7, "999 ns"), (9.996e-7, "1 µs"), (0.0123, "12.3 ms"), (61, "61 s")],
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def timed(row, seconds=1.0, relative=1.0, spread=0.01):
    def around(x):
        return Quartiles(x * (1 - spread), x, x * (1 + spread))

    return replace(row, seconds=around(seconds), relative=around(relative))


@pytest.mark.parametrize(
    ("new", "is_slower"),
    [
        (dict(seconds=1.0, relative=1.0), False),
        (dict(seconds=1.1, relative=1.1), False),  # within the tolerance
        (dict(seconds=1.2, relative=1.2), True),
        (dict(seconds=1.2, relative=1.2, spread=0.2), False),  # within the noise
        (dict(seconds=3.0, relative=1.0), False),  # a slower machine
        (dict(seconds=0.9, relative=2.0), False),  # a quieter one: the copy gained more
    ],
)
def test_what_counts_as_slower(made, new, is_slower):
    old = timed(made.rows[0])
    assert slower(old, timed(old, **new)) is is_slower


def test_a_row_that_seems_slower_is_measured_again(made, monkeypatch):
    from numbaloss.bench import session

    old = timed(made.rows[0])
    measured = iter([timed(old, 2.0, 2.0), timed(old, 1.0, 1.0)])
    monkeypatch.setattr(session, "measure", lambda *_: next(measured))
    again = benchmark([old.case], {"cpu": HOST}, {"cpu": []}, threads=1, budget=1.0, earlier=[old])
    assert again.rows[0].seconds.median == 1.0


# ---- pictures and the README -----------------------------------------------------------------------


def swept(made):
    """A report of a few losses and sizes, with made-up peers."""
    rows = []
    for loss in ("mse_loss", "cross_entropy"):
        for k, size in enumerate((10**4, 10**6, 10**8)):
            peers = {
                p: replace(made.rows[0].peers["numpy"], ratio=r + k)
                for p, r in (("numpy", 2), ("torch", 0.5))
            }
            rows.append(replace(made.rows[0], loss=loss, bytes=size, peers=peers))
    return replace(made, rows=rows)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.thin(4)
def test_pictures(made, tmp_path, suffix, theme):
    plots = pytest.importorskip("numbaloss.bench.plots")
    paths = [tmp_path / f"{k}{suffix}" for k in range(2)]
    for path in paths:
        plots.draw(swept(made), path, theme)
    first, second = (p.read_bytes() for p in paths)
    assert first == second and len(first) > 10_000
    assert first.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_a_picture_of_one_row_without_peers(made, tmp_path):
    plots = pytest.importorskip("numbaloss.bench.plots")
    plots.draw(replace(made, rows=[replace(made.rows[0], peers={})]), tmp_path / "one.svg")
    assert (tmp_path / "one.svg").stat().st_size > 5_000


def test_colours_differ():
    plots = pytest.importorskip("numbaloss.bench.plots")
    for theme in plots.THEMES.values():
        assert len({theme.color(side) for side in (OURS, *PEERS)}) == 1 + len(PEERS)
    assert set(plots.MARKERS) == {OURS, *PEERS} and len(set(plots.MARKERS.values())) == 1 + len(PEERS)


def test_rows_of_the_speed_report_are_cases():
    for work in speed.WORK:
        if work.loss in nl.registry:
            family = family_of(nl.registry[work.loss])
            assert family.ndim[0] <= len(work.shape) <= family.ndim[1]


def test_a_row_of_the_speed_report(monkeypatch):
    monkeypatch.setattr(speed, "plan", lambda sides, *_: {n: Side(c, 3) for n, c in sides.items()})
    monkeypatch.setattr(speed, "with_peers", lambda case, sides, *_: sides)
    work = speed.Work("multi_margin_loss", (32, 10), "in place", 3, jax=2, copy=0.5, memory=1e6)
    cells = speed.rows(work)
    assert cells[0] == "multi_margin_loss (32x10), in place" and cells[2:6] == ["-", "- (3)", "-", "- (2)"]
    assert cells[6].endswith("% (50%)") and cells[7].endswith("(1.0)")


def test_claims_are_of_a_report_s_rows():
    text = "## A\n\n| loss | torch |\n| --- | --- |\n| x | 2.0 (4) |\n| y | - |\n\nend\n"
    ((heading, rows),) = report.read_tables(text)
    assert heading == "A" and [readme.number(row["torch"]) for row in rows] == [2.0, None]


def test_the_suite_is_of_the_same_cases():
    pytest.importorskip("pytest_benchmark")
    from numbaloss.bench import test_losses

    (marks,) = (
        m for m in test_losses.test_loss.pytestmark if m.name == "parametrize" and m.args[0] == "case"
    )
    assert marks.args[1] == cases(nl.registry, quick=True)


# ---- the command for GPUs, on the host ----------------------------------------------------------------


def test_gpu_needs_a_device(capsys, monkeypatch):
    def absent(name):
        raise Absent("no device")

    monkeypatch.setattr(gpu, "open_device", absent)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "numbaloss: no device\n"


def test_gpu_needs_the_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "open_device", lambda name: HOST)
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 2
    assert "run this where" in capsys.readouterr().err


@pytest.mark.more
def test_gpu_table(capsys, monkeypatch, tmp_path):
    work = (
        gpu.Work("mse_loss", (1 << 21,), "float32", True, 0.9),
        gpu.Work("cross_entropy", (7, 1000), "float32", True, 0.85, 1.5, 2, 1),
    )
    tests = tmp_path / "test_trivial.py"
    tests.write_text("def test_trivial():\n    pass\n")
    monkeypatch.setattr(gpu, "open_device", lambda name: HOST)
    monkeypatch.setattr(gpu, "WORK", work)
    monkeypatch.setattr(gpu, "EVERY", 1 << 10)
    monkeypatch.setattr(gpu, "FEWER", 1 << 8)
    monkeypatch.setattr(gpu, "EVERY_DTYPES", ("float32",))
    monkeypatch.setattr(nl, "registry", {n: nl.registry[n] for n in ("mse_loss", "cross_entropy")})
    monkeypatch.setattr(gpu, "BUDGET", 0.1)
    monkeypatch.setattr(gpu, "COMPARED", ())
    monkeypatch.setattr(gpu, "TESTS", tests)
    monkeypatch.setattr(gpu, "launch_seconds", lambda call, device: 2e-6)
    monkeypatch.setattr(gpu, "driver_version", lambda: "13.0")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.main(["--folder", str(tmp_path)]) == 0
    text = (tmp_path / "cuda.md").read_text()
    assert "1 passed" in text and "driver 13.0" in text and "| compute-sanitizer | not installed |" in text
    rows = Report.from_json((tmp_path / "cuda.json").read_text()).rows
    assert [r.loss for r in rows] == ["mse_loss", "cross_entropy"] and all(r.in_place for r in rows)
    assert f"| {1.5 * rows[1].share_of_copy:.0%} (85%) | - (2) | - (1) |" in text
    assert "| mse_loss 1000 float32 | 2 µs |" in text
    assert "| mse_loss 1024 float32 |" in text and "| cross_entropy 1x1000 float32 |" in text
    tests.write_text("def test_trivial():\n    assert False\n")
    assert gpu.main(["--folder", str(tmp_path)]) == 1


def test_gpu_arrays_repeat_a_drawn_part():
    case = gpu.Large("mse_loss", (gpu.DRAWN + 3,))
    for a in case.arrays().values():
        assert a.shape == case.shape and a.dtype == np.float32
        np.testing.assert_array_equal(a[gpu.DRAWN :], a[:3])
