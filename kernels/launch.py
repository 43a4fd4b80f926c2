"""What every launch has in common: the device, the compiler options, and the sizes of tiles."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton

INT32_ELEMENTS = 2**31  # tensors of more elements need 64-bit offsets
FEWEST_PROGRAMS = 1024  # a few for each multiprocessor of a large GPU


def launch(kernel, grid, *args, device, num_warps=4, num_stages=2, **constexprs):
    """Start `kernel` on the device that holds its tensors, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Fused multiply-add is named explicitly because Triton's default for it differs between releases.
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constexprs)


class MatrixTile(NamedTuple):
    """One program's share of a matrix product: block_m × block_n outputs, block_k of the sum at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self):
        """The tile as keyword arguments of a launch."""
        return {key.upper() if key.startswith("block") else key: value for key, value in self._asdict().items()}


def matrix_tile(rows, columns, depth, dtype):
    """An untuned tile for a (rows × depth) · (depth × columns) product; 16 is the least that matrix units take."""
    block_m = _power_of_two(rows, 16, 128)
    block_n = _power_of_two(columns, 16, 128)
    block_k = _power_of_two(depth, 16, 64 if dtype.itemsize == 2 else 32)
    return MatrixTile(block_m, block_n, block_k, num_warps=8 if block_m * block_n >= 128 * 128 else 4, num_stages=3)


def geometry(weight, stride, padding):
    """The compile-time constants that all three matrix kernels take."""
    a, b, kh, kw = weight.shape
    return dict(A=a, B=b, KH=kh, KW=kw, SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[1])


def rows_tile(rows, columns):
    """(block_rows, block_columns) for passes over a (rows, columns) matrix: some 4,096 elements a program."""
    block_columns = _power_of_two(columns, 1, 128)
    return _power_of_two(rows, 1, 4096 // block_columns), block_columns


def reduction_tile(rows, columns):
    """(block_rows, block_columns) for sums over many rows of activations."""
    return _power_of_two(rows, 1, 128), _power_of_two(columns, 1, 64)


def merge_tile(parts, columns):
    """(block_parts, block_columns) for putting (parts, columns) partial results together.

    Up to 512 parts at once, by narrow programs: that takes less than a second launch.
    """
    block_parts = _power_of_two(parts, 1, 512) if parts <= 512 else 64
    return block_parts, _power_of_two(columns, 1, max(16, 4096 // block_parts))


def statistics_tile(rows, columns, groups):
    """(block_rows, block_columns, blocks a program) to read `groups` matrices of (rows, columns) once.

    8,192 elements at a time, 128 bytes and more of a row: that keeps enough loads in flight. Small matrices are cut
    finer, so that every multiprocessor has work; of large ones a program takes several blocks, to leave few tiles.
    """
    block_columns = _power_of_two(columns, 1, 64)
    block_rows = _power_of_two(rows, 1, 8192 // block_columns)
    across = groups * triton.cdiv(columns, block_columns)
    while block_rows > 16 and across * triton.cdiv(rows, block_rows) < FEWEST_PROGRAMS:
        block_rows //= 2
    blocks = 1
    while across * triton.cdiv(rows, 2 * blocks * block_rows) >= 2 * FEWEST_PROGRAMS:
        blocks *= 2
    return block_rows, block_columns, min(blocks, 16)


def needs_int64(*tensors):
    """Whether element offsets into any of the tensors pass 2^31."""
    return any(tensor.numel() >= INT32_ELEMENTS for tensor in tensors)


def _power_of_two(n, least, most):
    return min(max(triton.next_power_of_2(n), least), most)


def empty_nhwc(shape, like):
    """An unwritten (N, C, H, W) tensor in channels_last memory, with the dtype and device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
