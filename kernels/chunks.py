"""How the scores of a linear layer are cut into chunks of rows, whatever the device."""

from collections.abc import Iterator

import numpy as np

from .spec import Chunking

# A chunk, where the caller does not say: an eleventh of the scores, but at most so many rows, with which
# matrix products run at full speed, and at least so many bytes, below which cutting costs more than it saves.
CHUNK_FRACTION, ROWS, LEAST = 11, 512, 24_000_000
TILE = 16  # rows that a matrix product does at a time: of a chunk, a multiple
SCRATCH = 2 << 20  # bytes that products are made in to be added up: they stay in cache

Index = slice | np.ndarray


def chunk_rows(
    chosen: Chunking, rows: int, row_bytes: int, most: int = ROWS, scratch: int = SCRATCH
) -> tuple[int, int]:
    """Return the rows of a chunk, and the bytes to add up products in.

    Parameters
    ----------
    chosen : Chunking
        By the caller.
    rows, row_bytes : int
        Of all scores, with what is made of them.
    most : int
        Rows of a chunk, if the caller chose nothing.
    scratch : int
        Bytes for products, at most.
    """
    rows, row_bytes = max(1, rows), max(1, row_bytes)
    if chosen.rows:
        return chosen.rows, scratch
    budget = chosen.memory or max(LEAST, min(most * row_bytes, rows * row_bytes // CHUNK_FRACTION))
    scratch = min(budget // 8, scratch)
    height = (budget - scratch) // row_bytes
    if height < TILE:
        return max(1, height), scratch
    count = -(-rows // (height - height % TILE))
    even = -(-rows // count)
    return even + -even % TILE, scratch


def chunks(rows: np.ndarray, total: int, height: int) -> Iterator[Index]:
    """Yield the rows that count, `height` at a time."""
    for k in range(0, len(rows), height):
        yield slice(k, min(k + height, total)) if len(rows) == total else rows[k : k + height]


def pieces(live: np.ndarray) -> Iterator[tuple[Index, slice]]:
    """Yield rows and positions of each product: all at once; by position, where some do not count."""
    positions = live.shape[1]
    if live.all():
        yield slice(None), slice(0, positions)
        return
    for k in range(positions):
        rows = np.flatnonzero(live[:, k])
        if rows.size:
            yield rows, slice(k, k + 1)
