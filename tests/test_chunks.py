"""The plan of `linear_cross_entropy`: rows of scores at a time."""

import numpy as np
import pytest
from numba import njit

from numbaloss.kernels.chunks import CUDA_ROWS, LEAST, ROWS, SCRATCH, TILE, chunk_rows, product_columns

SHAPES = [(0, 4), (1, 1), (7, 4000), (512, 120_000), (4096, 400), (100_000, 128_000), (8192, 4_000_000)]


@pytest.mark.parametrize(("rows", "row_bytes"), SHAPES)
@pytest.mark.parametrize("budget", [0, 1, 5000, 1 << 20, 1 << 26, 1 << 34])
@pytest.mark.parametrize(("most", "scratch"), [(ROWS, SCRATCH), (CUDA_ROWS, 0)])
def test_a_chunk_fits_its_budget(rows, row_bytes, budget, most, scratch):
    height, room = chunk_rows(rows, row_bytes, 0, budget, most, scratch)
    assert 1 <= height <= max(1, rows)
    assert 0 <= room <= scratch
    limit = budget or max(LEAST, most * row_bytes)
    assert height == 1 or height * row_bytes + room <= limit
    # Chunks are of about one height: another tile in each would do with one chunk less, or not fit.
    chunks = -(-rows // height)
    if height >= TILE and chunks > 1:
        assert height % TILE == 0
        assert chunks * (height - TILE) < rows


@pytest.mark.parametrize(("chosen", "height"), [(1, 1), (16, 16), (17, 17), (99, 40)])
def test_chosen_rows(chosen, height):
    assert chunk_rows(40, 1000, chosen) == (height, SCRATCH)


def test_little_is_not_cut_and_much_by_a_fraction():
    assert chunk_rows(5000, 4000) == (5000, SCRATCH)
    assert chunk_rows(6000, 4000) == (3008, SCRATCH)
    assert chunk_rows(1 << 20, 200_000)[0] <= ROWS < chunk_rows(1 << 20, 200_000, most=CUDA_ROWS)[0]


def test_columns_of_a_product():
    assert product_columns(50, 100, 1000) == 10
    assert product_columns(5, 100, 1000) == 5
    assert product_columns(5, 10**6, 1000) == product_columns(5, 0, 0) == 1


def test_compiled_code_has_the_same_plan():
    plan, columns = njit(chunk_rows), njit(product_columns)
    rng = np.random.default_rng(0)
    for _ in range(50):
        given = 1, 1, *rng.integers(0, 2, 2), 1, 1
        numbers = tuple(int(n) for n in given * 10 ** rng.uniform(0, [5, 6, 4, 9, 4, 7]))
        assert plan(*numbers) == chunk_rows(*numbers)
        assert columns(*numbers[:3]) == product_columns(*numbers[:3])
