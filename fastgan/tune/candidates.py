"""The tiles of our matrix kernels that are worth measuring for a Problem."""

import triton

from fastgan.kernels.launch import MatrixTile
from fastgan.tune.workloads import DTYPES

# block_m, block_n, block_k (of 16-bit numbers; half of it for float32), warps, stages
_TILES = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (256, 64, 64, 8, 4),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (128, 128, 32, 8, 4),
)


def candidates(problem):
    """[MatrixTile] for `problem`, without blocks larger than the matrices."""
    rows, columns, depth = _matrix(problem)
    wide = DTYPES[problem.dtype].itemsize == 4
    tiles = []
    for block_m, block_n, block_k, num_warps, num_stages in _TILES:
        block_k = block_k // 2 if wide else block_k
        blocks = (_fit(block_m, rows), _fit(block_n, columns), _fit(block_k, depth))
        tiles.append(MatrixTile(*blocks, num_warps, num_stages))
    return list(dict.fromkeys(tiles))


def _fit(block, size):
    return max(16, min(block, triton.next_power_of_2(size)))


def _matrix(problem):
    """(rows, columns, depth) of the matrix product that a Problem is."""
    low = problem.batch * problem.low[0] * problem.low[1]
    if problem.operation == "weight_grad":
        return problem.a, problem.b, low
    if problem.operation == "down":
        return low, problem.a, problem.b
    phase = [triton.cdiv(size, stride) for size, stride in zip(problem.high, problem.stride, strict=True)]
    return problem.batch * phase[0] * phase[1], problem.b, problem.a
