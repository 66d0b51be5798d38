"""The command line: what it prints, where, and its exit codes."""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("click")
pytest.importorskip("rich")

from sweeps import sweep

import numbaloss as nl
from numbaloss import cli, loss
from numbaloss.bench import commands, session
from numbaloss.bench.devices import CPU
from numbaloss.bench.measure import measure
from numbaloss.bench.report import Report

# Enough to go through all of it: two small cases, the fewest runs.
QUICK = ["--loss", "mse_loss,huber_loss", "--size", "1000", "--time-budget", "0.01"]


@pytest.fixture
def run(capsys):
    """Run a command; its exit code, and what it wrote to standard output and error."""

    def run(*arguments):
        code = cli.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def bench(run, tmp_path):
    """Run the benchmark of a few small cases; its exit code, its report, and what it said."""

    def bench(*arguments):
        path = tmp_path / "report.json"
        code, out, err = run("bench", *(arguments or QUICK), "--output", path)
        return code, Report.from_json(path.read_text()), out + err

    return bench


# ---- help and mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["list"], ["info"], ["bench"], ["check"], ["warmup"]])
def test_help(run, command):
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "") and out.startswith(f"Usage: numbaloss {command[0] if command else '['}")
    assert run()[1] == run("--help")[1]


def test_version(run):
    assert run("--version")[1] == f"numbaloss, version {nl.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lists"], "No such command 'lists'"),
        (["bench", "--losses", "all"], "No such option"),
        (["bench", "--loss", "hubber_loss"], "unknown loss 'hubber_loss'; did you mean huber_loss?"),
        (["list", "--loss", "mse_loss,zzz"], "unknown loss 'zzz'; there are"),
        (["check", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["bench", "--mode", "hessian"], "unknown mode 'hessian'; there are value, grad, value_and_grad"),
        (["bench", "--peer", "tensorflow"], "unknown peer 'tensorflow'"),
        (["bench", "--device", "tpu"], "unknown device 'tpu'"),
        (["bench", "--format", "xml"], "'xml' is not one of 'table', 'json', 'csv', 'markdown'"),
        (["bench", "--shape", "32xten"], "'ten' is no whole number from 1 on"),
        (["bench", "--shape", "32x0"], "'0' is no whole number"),
        (["bench", "--size", "1.5"], "'1.5' is no whole number"),
        (["bench", "--size", "-3"], "'-3' is no whole number"),
        (
            ["bench", "--loss", "cosine_embedding_loss", "--shape", "10"],
            "cannot take the shape 10: wanted N x D",
        ),
        (["bench", "--loss", "multi_margin_loss", "--shape", "2x3x4"], "cannot take the shape 2x3x4"),
        (["bench", "--loss", "mse_loss", "--shape", "1gx1g"], "this machine has"),
        (["bench", "--threads", "0"], "0 is not in the range"),
        (["bench", "--threads", "100000"], "100000 is not in the range"),
        (["bench", "--time-budget", "0"], "not in the range"),
        (["bench", "--in-place", "--mode", "value"], "--in-place needs a gradient"),
        (["bench", "--output", "/no/such/folder/a.json"], "cannot write /no/such/folder/a.json"),
        (["bench", "--output", "/"], "cannot write /"),
        (["bench", "--plot", "a.gif"], "a.gif must end in .png or .svg"),
        (["bench", "--compare", "/no/such/old.json"], "/no/such/old.json: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert message in err and err.startswith("numbaloss: ") and err.count("\n") == 1


def test_an_absent_device_is_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in ("bench", "check", "warmup"):
        code, out, err = run(command, "--device", "cuda")
        assert code == 2 and out == "" and err.count("\n") == 1
        assert "--device cuda: CuPy is not installed: pip install cupy" in err


def test_a_report_that_is_none(run, tmp_path):
    path = tmp_path / "old.json"
    path.write_text("{}")
    code, _, err = run("bench", "--compare", path)
    assert code == 2 and "has the schema None, wanted 'numbaloss-bench/1'" in err


def test_bfloat16_without_its_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    code, _, err = run("bench", "--dtype", "bfloat16")
    assert code == 2 and 'bfloat16 needs ml_dtypes: pip install "numbaloss[bfloat16]"' in err


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra(run, monkeypatch, missing):
    for name in [n for n in sys.modules if n.startswith("numbaloss.bench.") or n.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delattr("numbaloss.bench.commands")
    code, out, err = run("list")
    assert (code, out) == (1, "")
    assert err == f'numbaloss: the command line needs {missing}: pip install "numbaloss[bench]"\n'


def test_a_plot_without_matplotlib(run, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "numbaloss.bench.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delattr("numbaloss.bench.plots", raising=False)
    code, _, err = run("bench", *QUICK, "--plot", tmp_path / "a.png")
    assert code == 2 and '--plot needs matplotlib: pip install "numbaloss[bench]"' in err


def test_as_a_module(python):
    lines = python(
        "import runpy, sys\n"
        "import numbaloss\n"
        "print(sorted({'click', 'rich', 'matplotlib', 'numbaloss.bench'} & set(sys.modules)))\n"
        "sys.argv = ['numbaloss', 'list', '--loss', 'MSELoss']\n"
        "runpy.run_module('numbaloss', run_name='__main__')\n"
    )
    assert lines[0] == "[]" and any(line.startswith("mse_loss") for line in lines)


# ---- list, info ------------------------------------------------------------------------------------


def test_list(run):
    _, out, _ = run("list")
    assert all(f.__name__ in out and f.Class.__name__ in out for f in nl.registry.values())
    _, out, _ = run("list", "--format", "json")
    content = json.loads(out)
    assert [e["function"] for e in content["losses"]] == list(nl.registry)
    huber = next(e for e in content["losses"] if e["function"] == "huber_loss")
    assert huber == {
        "function": "huber_loss",
        "class": "HuberLoss",
        "family": "elementwise",
        "shape": "N [x d1 x ...]",
        "arrays": ["input", "target"],
        "options": {"reduction": "mean", "delta": 1.0, "weight": None},
    }
    assert content["dtypes"][0] == "float32" and content["devices"][0] == "cpu"


def test_losses_by_family_class_and_repeated_option(run):
    def names(*arguments):
        return [e["function"] for e in json.loads(run("list", "--format", "json", *arguments)[1])["losses"]]

    assert names("--loss", "HuberLoss, mse_loss", "--loss", "huber_loss") == ["huber_loss", "mse_loss"]
    elementwise = names("--loss", "elementwise")
    assert "kl_div" in elementwise and "cross_entropy" not in elementwise
    assert names("--loss", "all") == list(nl.registry)


def test_info(run):
    code, out, _ = run("info", "--format", "json")
    content = json.loads(out)
    assert code == 0 and content["versions"]["numpy"] == np.__version__
    assert content["machine"]["simd_bits"] >= 64 and content["machine"]["cpus"] >= 1
    assert 1 <= content["threads"]["used"] <= content["threads"]["most"]
    assert content["cache"]["path"] and content["cache"]["bytes"] >= 0
    assert content["gpus"] or content["gpus_absent"]
    _, out, _ = run("info")
    assert content["machine"]["processor"] in out and content["cache"]["path"] in out


# ---- check, warmup ---------------------------------------------------------------------------------


def test_check_passes(run):
    code, out, err = run("check", "--loss", "mse_loss", "--dtype", "float64,float32")
    assert (code, err) == (0, "")
    assert out == "1 losses passed, 0 failed: float64 on cpu, float32 on cpu\n"


@pytest.mark.parametrize("loss", sweep(nl.registry, "huber_loss"))
def test_check_passes_for_every_loss(run, loss):
    code, out, _ = run("check", "--loss", loss, "--dtype", "float64")
    assert code == 0, out


def broken(monkeypatch, cls, value):
    """Change a definition as an edit would: nothing that was worked out for the old one is kept."""
    monkeypatch.setattr(cls, "value", value)
    made = loss.Made()
    made.function = cls.function
    monkeypatch.setattr(cls, "_made", made)
    monkeypatch.setattr(cls.function, "_bindings", {})


def test_check_finds_a_broken_value(run, monkeypatch):
    def value(input, target):
        d = input - target
        return 1.0001 * d * d

    broken(monkeypatch, nl.MSELoss, value)
    code, out, _ = run("check", "--loss", "mse_loss,l1_loss", "--dtype", "float64")
    assert code == 1 and out.startswith("FAILED mse_loss float64 cpu: mse_loss(): sum: got ")
    assert out.endswith("1 losses passed, 1 failed: float64 on cpu\n")
    code, out, _ = run("check", "--loss", "mse_loss", "--dtype", "float64", "--format", "json")
    content = json.loads(out)
    assert code == 1 and not content["passed"]
    assert content["results"][0]["loss"] == "mse_loss" and not content["results"][0]["passed"]


def test_check_finds_a_broken_gradient(run, monkeypatch):
    monkeypatch.setattr(
        nl.MSELoss, "slope_input", lambda input, target: 2.0001 * (input - target), raising=False
    )
    monkeypatch.setattr(nl.MSELoss, "_slopes", ("input",))
    monkeypatch.setattr(nl.MSELoss, "_stated", ("value", "slope_input"))
    broken(monkeypatch, nl.MSELoss, nl.MSELoss.__dict__["value"])
    code, out, _ = run("check", "--loss", "mse_loss", "--dtype", "float64")
    assert code == 1 and "mse_loss(): gradient by input: got" in out


def test_a_thorough_check(run, monkeypatch):
    asked = []
    monkeypatch.setattr(commands.testing, "check_loss", asked.append)
    assert run("check", "--loss", "mse_loss", "--dtype", "float64", "--thorough")[0] == 0
    assert asked == [nl.mse_loss]


def test_check_survives_a_loss_that_raises(run, monkeypatch):
    monkeypatch.setattr(commands, "check_loss", lambda *_: 1 / 0)
    code, out, _ = run("check", "--loss", "mse_loss", "--dtype", "float64")
    assert code == 1 and "FAILED mse_loss float64 cpu: ZeroDivisionError: division by zero" in out


@pytest.mark.more
def test_warmup_is_found_by_the_next_process(python, tmp_path):
    script = (
        "from numbaloss.cli import main\n"
        "assert main(['warmup', '--loss', 'l1_loss', '--format', 'json']) == 0\n"
    )
    first, second = (
        json.loads("\n".join(python(script, NUMBA_CACHE_DIR=str(tmp_path / "cache")))) for _ in range(2)
    )
    assert [r["compiled"] for r in first["results"] + second["results"]] == [True, False]
    assert first["cache"] == second["cache"] and first["cache"]["kernels"] > 0
    assert first["cache"]["path"].startswith(str(tmp_path))


# ---- bench -----------------------------------------------------------------------------------------


def test_bench(bench, tmp_path):
    code, report, said = bench(*QUICK, "--peer", "numpy", "--plot", tmp_path / "a.png")
    assert code == 0 and [r.loss for r in report.rows] == ["mse_loss", "huber_loss"]
    assert all(list(r.peers) == ["numpy"] for r in report.rows)
    assert "mse_loss" in said and "numpy" in said and "of copy" in said
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("form", ["json", "csv", "markdown", "table"])
def test_bench_in_a_pipe_prints_the_format_alone(run, form):
    code, out, err = run("bench", *QUICK, "--peer", "none", "--format", form)
    assert (code, err) == (0, "")
    if form == "json":
        assert len(json.loads(out)["rows"]) == 2
    else:
        start = {"csv": "loss,family,shape", "markdown": "| loss | shape |", "table": " loss"}[form]
        assert any(line.startswith(start) for line in out.splitlines()[:2])


def test_bench_takes_the_format_from_the_file(run, tmp_path):
    run("bench", *QUICK, "--peer", "none", "--output", tmp_path / "a.md")
    assert (tmp_path / "a.md").read_text().startswith("| loss | shape |")


def test_bench_of_many_kinds(bench):
    code, report, _ = bench(
        *("--loss", "mse_loss", "--shape", "10x20", "--size", "1k", "--peer", "none", "--threads", "1"),
        *("--dtype", "float32,float64", "--mode", "value", "--mode", "grad", "--time-budget", "0.01"),
    )
    found = {(r.shape, r.dtype, r.mode) for r in report.rows}
    assert code == 0 and len(report.rows) == len(found) == 8
    assert {r.threads for r in report.rows} == {1}


def test_a_sweep(bench):
    _, report, _ = bench("--loss", "mse_loss", "--size", "10:1k", "--peer", "none", "--time-budget", "0.01")
    assert [r.shape for r in report.rows] == [(10,), (100,), (1000,)]


def test_a_peer_that_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setattr(type(commands.PEERS["sklearn"]), "module", "no_such_module")
    code, _, err = run("bench", *QUICK, "--peer", "sklearn,liger")
    assert code == 0
    assert "numbaloss: without sklearn: not installed: pip install scikit-learn\n" in err
    assert "numbaloss: without liger: not installed: pip install liger-kernel\n" in err


def test_ctrl_c_prints_what_is_done(run, monkeypatch):
    def once(case, *rest):
        if case.loss == "huber_loss":
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(session, "measure", once)
    code, out, _ = run("bench", *QUICK, "--peer", "none", "--format", "json")
    content = json.loads(out)
    assert code == 130 and content["interrupted"] and [r["loss"] for r in content["rows"]] == ["mse_loss"]


def test_ctrl_c_elsewhere(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "check_loss", interrupt)
    assert run("check", "--loss", "mse_loss")[0] == 130


def faster(path, factor):
    """Make a report of one that was so many times as fast."""
    content = json.loads(path.read_text())
    for row in content["rows"]:
        for name in ("seconds", "relative"):
            row[name] = {k: v / factor for k, v in row[name].items()}
    path.write_text(json.dumps(content))


@pytest.mark.more
def test_compare(run, tmp_path, monkeypatch):
    # A clock of its own: a busy machine must not fail a test.
    monkeypatch.setattr(CPU, "seconds", lambda self, call, calls=1: 1e-5)
    path = tmp_path / "old.json"
    run("bench", *QUICK, "--peer", "none", "--output", path)
    code, _, err = run("bench", "--compare", path)
    assert code == 0, err
    assert "2 rows compared, 0 slower" in err
    faster(path, 5)
    code, _, err = run("bench", "--compare", path)
    assert code == 1 and "2 rows compared, 2 slower" in err
    assert "numbaloss: slower: mse_loss 1000 float32 value_and_grad: " in err
    # Of a choice of cases only those are compared that both have.
    code, _, err = run("bench", *QUICK, "--size", "10", "--peer", "none", "--compare", path)
    assert code == 1 and "2 rows compared, 2 slower" in err
    code, _, err = run("bench", "--loss", "l1_loss", "--compare", path)
    assert code == 2 and "no row of" in err
    faster(path, 1 / 100)
    code, _, err = run("bench", "--compare", path)
    assert code == 0 and "2 faster" in err
