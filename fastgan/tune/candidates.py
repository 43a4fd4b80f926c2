"""The tiles of our matrix kernels that are worth measuring for a Problem."""

import torch

from fastgan.kernels import down, narrow, patches, single, up, weight_grad_narrow
from fastgan.kernels.launch import TILES, MatrixTile, cdiv, next_power_of_2
from fastgan.tune.workloads import DTYPES


def candidates(problem):
    """[MatrixTile] for `problem`, without blocks larger than the matrices."""
    itemsize = DTYPES[problem.dtype].itemsize
    weight = torch.empty((problem.a, problem.b, *problem.kernel), device="meta")
    summed = problem.then in ("statistics", "normalized")
    if problem.operation == "up" and not _one_position(problem) and up.picks_narrow(weight, problem.stride, summed):
        return list(narrow.TILES[itemsize])
    if problem.operation == "down" and problem.a == 1 and problem.then in ("", "epilogue"):
        return list(single.TILES)
    rows, columns, depth = _matrix(problem)
    tiles = []
    for tile in TILES[itemsize]:
        blocks = (_fit(tile.block_m, rows), _fit(tile.block_n, columns), _fit(tile.block_k, depth))
        tiles.append(MatrixTile(*blocks, tile.num_warps, tile.num_stages))
    tiles += [tile._replace(by_position=True) for tile in tiles if _gains_by_position(tile, problem)]
    if problem.operation == "down" and down.picks_patches(weight, problem.low[1], problem.high[1]):
        tiles += [tile._replace(block_n=_fit(tile.block_n, columns)) for tile in down.PATCH_TILES[itemsize]]
    if problem.operation == "weight_grad":
        if patches.fits_patches(weight, problem.low[1], problem.high[1]):
            tiles += [tile._replace(block_m=_fit(tile.block_m, rows)) for tile in weight_grad_narrow.TILES[itemsize]]
        tiles += [tile._replace(share=1) for tile in tiles]  # fewer parts, and half as many programs
    return list(dict.fromkeys(tiles))


def _one_position(problem):
    return up.is_product_with_all(problem.low, problem.kernel, problem.high, problem.padding)


def _gains_by_position(tile, problem):
    """Whether rows of a tile can be one position of its images, and some taps then left out."""
    if problem.operation == "up" and not _one_position(problem):
        return up.fits_one_position(tile, problem.batch, problem.high, problem.stride)
    if problem.operation == "down" and any(problem.padding):
        return down.fits_one_position(tile, problem.batch, problem.b)
    return False


def _fit(block, size):
    return max(16, min(block, next_power_of_2(size)))


def _matrix(problem):
    """(rows, columns, depth) of the matrix product that a Problem is; taps count as columns or depth where they can."""
    taps = problem.kernel[0] * problem.kernel[1]
    low = problem.batch * problem.low[0] * problem.low[1]
    if problem.operation == "weight_grad":
        return problem.a, taps * problem.b, low
    if problem.operation == "down":
        return low, problem.a, taps * problem.b
    phase = [cdiv(size, stride) for size, stride in zip(problem.high, problem.stride, strict=True)]
    return problem.batch * phase[0] * phase[1], problem.b * (taps if _one_position(problem) else 1), problem.a
