"""How the scores of a linear layer are cut into chunks of rows: one plan for all devices and compiled code.

Plain integers in and out: Numba compiles these functions as they are.
"""

# A chunk that the caller did not choose has a fraction of the scores, but at most so many rows, with which
# matrix products run at full speed, and at least so many bytes, below which cutting costs more than it saves.
CHUNK_FRACTION, LEAST = 11, 24_000_000
ROWS = 512  # on the CPU
CUDA_ROWS = 2048  # even the product with the fewest columns, the features, then makes tiles for all of a GPU
TILE = 16  # rows that a matrix product does at a time: a chunk has a multiple of them
SCRATCH = 2 << 20  # bytes for products that are added up: they stay in the second-level cache


def chunk_rows(rows, row_bytes, chosen=0, budget=0, most=ROWS, scratch=SCRATCH):
    """Return the rows of a chunk, and the bytes to make products in.

    Parameters
    ----------
    rows : int
        Of all scores.
    row_bytes : int
        Of a row of scores, with all arrays of its size that are made of it.
    chosen : int
        Rows of a chunk, as the caller chose; 0 if not.
    budget : int
        Bytes that a chunk and its scratch memory may take, as the caller chose; 0 if not.
    most : int
        Rows of a chunk, at most, if the caller chose nothing.
    scratch : int
        Bytes to make products in, at most; 0 on a device whose products add to their result.
    """
    rows, row_bytes = max(1, rows), max(1, row_bytes)
    if chosen:
        return min(chosen, rows), scratch
    if not budget:
        budget = max(LEAST, min(most * row_bytes, rows * row_bytes // CHUNK_FRACTION))
    scratch = min(budget // 8, scratch)
    height = (budget - scratch) // row_bytes
    if height >= TILE:
        # As few chunks as fit, of about one height.
        count = -(-rows // (height - height % TILE))
        even = -(-rows // count)
        height = even + -even % TILE
    return min(max(1, height), rows), scratch


def product_columns(columns, column_bytes, scratch):
    """Return how many columns of a product to make at a time, in scratch memory of so many bytes.

    The gradient of the weight is a sum over chunks of ``scores.T @ input``: a column is that of one score.
    """
    return max(1, min(columns, scratch // max(1, column_bytes)))
