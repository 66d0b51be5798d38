"""Kernels on disk: whatever the disk does, a call computes, and never with another definition's code."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from battery import scripts
from sweeps import sweep

from numbaloss.kernels import room
from numbaloss.loss import registry

ONE_LOSS = """
import warnings, numpy as np
warnings.simplefilter("error")
import numbaloss as nl
x = np.array([0.0, 1.0, 3.0])
value, gradient = nl.huber_loss.value_and_grad(x, np.zeros(3), reduction="sum")
assert value == 3.0 and gradient.tolist() == [0, 1, 1]
print("right")
"""

# With one sample of its arguments each: right as in a process that can write.
EVERY_LOSS = """
import warnings, numpy as np
warnings.simplefilter("error")
warnings.filterwarnings("once", "numbaloss cannot keep", RuntimeWarning)
import numbaloss as nl
from numbaloss import reference, testing
from numbaloss.loss import registry
for name in NAMES or registry:
    loss = registry[name]
    given = testing.samples(loss, np.random.default_rng(0))
    wanted = getattr(reference, name)(**given)
    np.testing.assert_allclose(loss(**given), wanted, rtol=1e-9, err_msg=name)
    value, gradients = loss.value_and_grad(**given)
    np.testing.assert_allclose(value, wanted, rtol=1e-9, err_msg=name)
    print(name)
"""


def files(cache, ending):
    return sorted(Path(cache).rglob(f"*{ending}"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache that holds a loss's kernels, to copy."""
    return tmp_path_factory.mktemp("filled")


@pytest.fixture
def cache(filled, tmp_path, python):
    if not files(filled, ".nbc"):
        assert python(ONE_LOSS, NUMBA_CACHE_DIR=str(filled)) == ["right"]
    return Path(shutil.copytree(filled, tmp_path / "cache"))


def truncated(data):
    return data[: len(data) // 2]


def flipped(data):
    """One bit in the middle: of machine code, say."""
    k = len(data) // 2
    return data[:k] + bytes([data[k] ^ 1]) + data[k + 1 :]


def emptied(data):
    return b""


def zeroed(data):
    return b"\0" * len(data)


DAMAGES = [(".nbi", truncated), (".nbc", flipped), (".nbi", zeroed), (".nbc", emptied)]


@pytest.mark.parametrize("damage", sweep(DAMAGES, DAMAGES[1]))
@pytest.mark.more
def test_damaged_files(python, cache, damage):
    ending, spoil = damage
    spoiled = {path: spoil(path.read_bytes()) for path in files(cache, ending)}
    assert spoiled
    for path, data in spoiled.items():
        path.write_bytes(data)
    assert python(ONE_LOSS, NUMBA_CACHE_DIR=str(cache)) == ["right"]
    assert all(path.read_bytes() != data for path, data in spoiled.items())  # they were written anew


def test_a_full_disk(python, cache, tmp_path):
    """No file can be written: the call computes, and says so once."""
    script = """
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import numpy as np, numbaloss as nl
    x = np.array([0.0, 1.0, 3.0])
    for loss in (nl.huber_loss, nl.l1_loss):
        value, gradient = loss.value_and_grad(x, np.zeros(3), reduction="sum")
        assert value in (3.0, 4.0), value
(only,) = told
assert "No space left" in str(only.message) and "NUMBA_CACHE_DIR" in str(only.message)
print("right")
"""
    empty = str(tmp_path / "empty")
    assert python(scripts.FULL_DISK + script, NUMBA_CACHE_DIR=empty) == ["right"]


def test_kernels_used_longest_ago_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "LIMIT", 1000)
    names = "a.nbi", "a.1.nbc", "b.cubin", "c.nbc.tmp.0123", "module.pyc", "d.1.nbc"
    for k, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes(300))
        os.utime(tmp_path / name, (k, k))
    room.used(tmp_path / "a.nbi")
    room.used(tmp_path / "not there")
    room.stored(tmp_path / "d.1.nbc", 300)
    assert {p.name for p in tmp_path.iterdir()} == {"a.nbi", "c.nbc.tmp.0123", "module.pyc", "d.1.nbc"}
    (tmp_path / "e.1.nbc").write_bytes(bytes(60))
    room.stored(tmp_path / "e.1.nbc", 60)  # little came since: nobody looks
    assert len(list(tmp_path.iterdir())) == 5
    room.stored(tmp_path / "e.1.nbc", 60)
    assert len(list(tmp_path.iterdir())) == 5  # 960 bytes of kernels
    (tmp_path / "f.1.nbc").write_bytes(bytes(200))
    room.stored(tmp_path / "f.1.nbc", 200)
    assert "c.nbc.tmp.0123" not in {p.name for p in tmp_path.iterdir()}


@pytest.mark.sweep
def test_no_room_at_all(python, tmp_path):
    """Each kernel removes those before it: calls compute, and the next process compiles."""
    script = f"from numbaloss.kernels import room\nroom.LIMIT = 1\n{ONE_LOSS}"
    assert python(script, NUMBA_CACHE_DIR=str(tmp_path)) == ["right"]
    assert sum(p.stat().st_size for p in files(tmp_path, ".nbc")) < 1000
    assert python(script, NUMBA_CACHE_DIR=str(tmp_path)) == ["right"]


@pytest.mark.sweep
def test_several_processes_on_one_empty_cache(python, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        ran = [pool.submit(python, ONE_LOSS, NUMBA_CACHE_DIR=str(tmp_path / "cache")) for _ in range(3)]
        assert [r.result() for r in ran] == [["right"]] * 3


@pytest.fixture
def container():
    """An installation that can be read only."""
    with scripts.installation(read_only=True) as place:
        yield place


ONE = ("huber_loss",)


@pytest.mark.parametrize("names", sweep([(), ONE], ONE))
@pytest.mark.thin(3)
def test_a_user_who_can_write_nowhere(python, container, names):
    script = f"NAMES = {names!r}\n{EVERY_LOSS}\nassert nl.__file__.startswith({str(container)!r})"
    done = python(scripts.nowhere(container, script), PYTHONDONTWRITEBYTECODE="1")
    assert len(done) == len(names or registry)
    assert not files(container, ".nbi")


@pytest.mark.more
def test_compiled_files_alone(python, container):
    """An installation without its source: kernels live in memory."""
    import compileall

    for path in (container, *container.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert compileall.compile_dir(container, quiet=1, legacy=True)
    for path in container.rglob("*.py"):
        path.unlink()
    script = EVERY_LOSS.replace('"once"', '"ignore"')
    done = python(
        f"NAMES = ('huber_loss',)\nimport sys\nsys.path.insert(0, {str(container)!r})\n" + script,
        NUMBA_CACHE_DIR=str(container / "cache"),
    )
    assert done == ["huber_loss"]
