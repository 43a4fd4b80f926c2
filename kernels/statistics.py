"""Putting the parts that many programs wrote together, in a fixed order: no atomics, the same bits every time."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgan.kernels.launch import cdiv, clamped_power_of_2, launch, merge_tile, needs_int64, statistics_tile, warps_for
from fastgan.kernels.pieces import activate, channel_vector, column_sums, mean_and_m2, wait_for_previous

WIDE = 64  # columns of a block from which `column_sums` is quicker than `sum`
# Of sums by single warps: the numbers that one of them holds, the columns that are enough of them to fill a GPU, and
# the parts that one still adds up in little time.
WARP_TILE, MANY_COLUMNS, FEW_PARTS = 2048, 2**15, 64


class TileStatistics(NamedTuple):
    """Per tile of rows: how many, and per channel their mean and centred sum of squares M2, in float32.

    A batch can be normalised in several groups; every tile belongs to one of them, and each has as many tiles.
    """

    count: torch.Tensor  # (groups, tiles)
    mean: torch.Tensor  # (groups, tiles, C)
    m2: torch.Tensor  # (groups, tiles, C)

    @classmethod
    def empty(cls, groups, tiles, channels, device):
        shapes = (groups, tiles), (groups, tiles, channels), (groups, tiles, channels)
        return cls(*(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes))


@triton.jit
def tile_statistics_kernel(
    y_ptr,  # (groups · rows, C); changed in place where there is a bias or an activation
    bias_ptr,  # (C,) or None
    count_ptr,  # (groups, programs along rows)
    mean_ptr,  # (groups, programs along rows, C)
    m2_ptr,
    rows,  # of one group: no tile holds rows of two
    C,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each program takes BLOCKS blocks of rows; each is centred in registers and merged by Chan's rule."""
    wait_for_previous()
    pid_r, group = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < C
    first = group * rows
    if INT64:
        first = group.to(tl.int64) * rows

    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for block in range(BLOCKS):
        start = (pid_r * BLOCKS + block) * BLOCK_R
        row = start + tl.arange(0, BLOCK_R)
        ok = (row < rows)[:, None] & column_ok[None, :]
        cell = (first + row)[:, None] * C + column[None, :]
        y = tl.load(y_ptr + cell, mask=ok, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y = y + channel_vector(bias_ptr, column, column_ok, 0.0)
        if bias_ptr is not None or ACTIVATION is not None:
            stored = activate(y, ACTIVATION, SLOPE).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + cell, stored, mask=ok)
            y = stored.to(tl.float32)  # the numbers that BatchNorm will normalise

        block_count = tl.minimum(tl.maximum(rows - start, 0), BLOCK_R).to(tl.float32)
        block_mean, block_m2 = mean_and_m2(y, ok, block_count, ACROSS_WARPS=True)
        total = count + block_count
        offset = block_mean - mean
        share = block_count / tl.maximum(total, 1.0)
        mean += offset * share
        m2 += block_m2 + offset * offset * (count * share)
        count = total

    tile = group * tl.num_programs(0) + pid_r
    tl.store(count_ptr + tile, count)
    tl.store(mean_ptr + tile * C + column, mean, mask=column_ok)
    tl.store(m2_ptr + tile * C + column, m2, mask=column_ok)


def tile_statistics(y, bias=None, *, activation=None, slope=0.0, groups=1):
    """The TileStatistics of act(y + bias), which takes the place of y (N, C, H, W) channels_last; bias: (C,) or None.

    The batch consists of `groups` equal parts, whose statistics stay apart.
    """
    channels = y.shape[1]
    rows = y.numel() // (groups * channels)
    block_r, block_c, blocks = statistics_tile(rows, channels, groups)
    programs = cdiv(rows, block_r * blocks)
    tiles = TileStatistics.empty(groups, programs, channels, y.device)
    launch(
        tile_statistics_kernel,
        (programs, cdiv(channels, block_c), groups),
        *(y, bias, *tiles, rows, channels),
        device=y.device,
        num_warps=warps_for(block_r, block_c),
        ACTIVATION=activation,
        SLOPE=slope,
        INT64=needs_int64(y),
        BLOCKS=blocks,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
    return tiles


@triton.jit
def merge_statistics_kernel(
    count_ptr,  # (groups, T)
    mean_ptr,  # (groups, T, C)
    m2_ptr,  # (groups, T, C)
    out_count_ptr,  # (groups, programs along T), or None where invstd is not
    out_mean_ptr,  # (groups, programs along T, C)
    out_m2_ptr,  # as the mean, or None as the count
    invstd_ptr,  # (groups, C), var too, or None: what the last merge gives
    var_ptr,
    eps,
    T,
    C,
    ACROSS_WARPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's rule over BLOCK_T tiles at once: M2 = Σ M2_i + Σ n_i (mean_i − mean)²."""
    wait_for_previous()
    pid_t, group = tl.program_id(0), tl.program_id(2)
    t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    ok = (t < T)[:, None] & c_ok[None, :]
    cell = (group * T + t)[:, None] * C + c[None, :]
    count = tl.load(count_ptr + group * T + t, mask=t < T, other=0.0)
    mean = tl.load(mean_ptr + cell, mask=ok, other=0.0)
    m2 = tl.load(m2_ptr + cell, mask=ok, other=0.0)

    total = tl.sum(count, 0)
    # Averaging differences from the first tile's mean keeps the digits that averaging large means would lose.
    origin = tl.load(mean_ptr + (group * T + pid_t * BLOCK_T) * C + c, mask=c_ok, other=0.0)
    merged = origin + column_sums(count[:, None] * (mean - origin[None, :]), ACROSS_WARPS) / tl.maximum(total, 1.0)
    offset = mean - merged[None, :]
    merged_m2 = column_sums(m2 + count[:, None] * offset * offset, ACROSS_WARPS)

    out = group * tl.num_programs(0) + pid_t
    tl.store(out_mean_ptr + out * C + c, merged, mask=c_ok)
    if invstd_ptr is not None:
        tl.store(invstd_ptr + group * C + c, 1.0 / tl.sqrt_rn(merged_m2 / total + eps), mask=c_ok)
        tl.store(var_ptr + group * C + c, merged_m2 / tl.maximum(total - 1.0, 1.0), mask=c_ok)
    else:
        tl.store(out_count_ptr + out, total)
        tl.store(out_m2_ptr + out * C + c, merged_m2, mask=c_ok)


def merge_statistics(tiles, eps):
    """TileStatistics of a whole batch → (mean, 1/sqrt(biased variance + eps), unbiased variance).

    Each of the three is (groups, C) float32.
    """
    while True:
        groups, count, channels = tiles.mean.shape
        block_t, block_c = merge_tile(count, channels)
        programs = cdiv(count, block_t)
        if last := programs == 1:
            mean, invstd, var = (tiles.mean.new_empty((groups, channels)) for _ in range(3))
            results = (None, mean, None, invstd, var)
        else:
            merged = TileStatistics.empty(groups, programs, channels, tiles.mean.device)
            results = (*merged, None, None)
        launch(
            merge_statistics_kernel,
            (programs, cdiv(channels, block_c), groups),
            *(*tiles, *results, eps, count, channels),
            device=tiles.mean.device,
            num_warps=8,
            ACROSS_WARPS=block_c >= WIDE,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
        )
        if last:
            return mean, invstd, var
        tiles = merged


@triton.jit
def sum_rows_kernel(
    x_ptr,  # (groups, T, C)
    out_ptr,  # (groups, programs along T, C)
    T,
    C,
    STEPS: tl.constexpr,  # of BLOCK_T rows each, for every program
    ACROSS_WARPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_previous()
    pid_t, group = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for step in range(STEPS):
        t = (pid_t * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        total += tl.load(
            x_ptr + (group * T + t)[:, None].to(tl.int64) * C + c[None, :],
            mask=(t < T)[:, None] & (c < C)[None, :],
            other=0.0,
        )
    out = group * tl.num_programs(1) + pid_t
    tl.store(out_ptr + out * C + c, column_sums(total, ACROSS_WARPS).to(out_ptr.dtype.element_ty), mask=c < C)


def sum_rows(parts, out):
    """out (groups, C) = the sums over the rows of each group of parts (groups, T, C) float32, rounded once."""
    while True:
        groups, count, columns = parts.shape
        steps, block_t, block_c, num_warps = _sum_tile(count, columns)
        programs = cdiv(count, steps * block_t)
        # More rows than one program takes: sum in stages.
        target = out if programs == 1 else parts.new_empty((groups, programs, columns))
        launch(
            sum_rows_kernel,
            (cdiv(columns, block_c), programs, groups),
            *(parts, target, count, columns),
            device=parts.device,
            num_warps=num_warps,
            STEPS=steps,
            ACROSS_WARPS=num_warps > 1 and block_c >= WIDE,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
        )
        if programs == 1:
            return
        parts = target


def _sum_tile(parts, columns):
    """(steps of a program, block_parts, block_columns, warps).

    Where columns are many, a weight's, programs are single warps whose threads each add up whole columns: between warps
    sums go through shared memory, which takes longer than the parts do to arrive.
    """
    if parts <= FEW_PARTS and columns >= MANY_COLUMNS:
        block_parts = clamped_power_of_2(parts, 1, 16)
        return cdiv(parts, block_parts), block_parts, WARP_TILE // block_parts, 1
    return 1, *merge_tile(parts, columns), 8
