"""high → low: the forward of a convolution, and the input gradient of a transposed convolution.

The sum goes over KH·KW·B products in the order of weight's memory, (KH, KW, B); in the image, too, the KW·B products of
one row of taps stand side by side.
"""

import torch
import triton
import triton.language as tl

from fastgan.kernels.backward_epilogue import backward_epilogue, store_grad_and_sums
from fastgan.kernels.launch import (
    MatrixTile,
    blocks_together,
    cdiv,
    channels_last,
    clamped_power_of_2,
    empty_nhwc,
    geometry,
    launch,
    matrix_tile,
    needs_int64,
    next_power_of_2,
)
from fastgan.kernels.patches import NO_BLOCK, WHOLE_PATCH, block_constants, fits_patches, patch_sources, seen_numbers
from fastgan.kernels.pieces import (
    NOWHERE,
    conv_epilogue,
    load_block,
    multiply_add,
    new_accumulator,
    rows_of_tile,
    steps_of,
    store_tile_statistics,
    wait_for_previous,
)
from fastgan.kernels.single import down_single
from fastgan.kernels.statistics import TileStatistics

# What a tuner may try beside `launch.TILES` where high is an image of few channels.
PATCH_TILES = {
    2: (
        MatrixTile(128, 64, WHOLE_PATCH, 4, 1),
        MatrixTile(64, 64, WHOLE_PATCH, 4, 1),
        MatrixTile(128, 64, WHOLE_PATCH, 8, 1),
        MatrixTile(128, 128, WHOLE_PATCH, 8, 1),
    ),
    4: (MatrixTile(64, 64, WHOLE_PATCH, 4, 1), MatrixTile(128, 64, WHOLE_PATCH, 8, 1)),
}


@triton.jit
def down_kernel(
    high_ptr,  # (N, HO, WO, B)
    weight_ptr,  # (A, KH, KW, B)
    low_ptr,  # (N, H, W, A)
    bias_ptr,  # (A,) or None
    mean_ptr,  # (A,) or None: the statistics of an eval-mode BatchNorm, and its parameters; (groups, A) beside y
    var_ptr,
    gamma_ptr,
    beta_ptr,
    activated_ptr,  # (N, H, W, A) or None: see `activated` of down()
    y_ptr,  # (N, H, W, A) or None: see `normalized` of down(); invstd: (groups, A), sums: (groups, 2, tiles, A)
    invstd_ptr,
    sums_ptr,
    count_ptr,  # (groups, tiles) or None; mean and m2 (groups, tiles, A): statistics to write
    tile_mean_ptr,
    tile_m2_ptr,
    eps,
    N,  # images of one group: no tile holds rows of two
    together,  # see `rows_of_tile`
    A: tl.constexpr,
    B: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AGAIN: tl.constexpr,  # beside y: the rows at a time that are read again for the sums; 0: all are in registers
    BY_POSITION: tl.constexpr,  # see `rows_of_tile`
    ROWS: tl.constexpr,  # of images with few channels, all that follow: see patches.py
    WIDTH: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    MARGIN: tl.constexpr,
    SKEW: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    wait_for_previous()
    column_tiles: tl.constexpr = (A + BLOCK_N - 1) // BLOCK_N
    pid_n, pid_m = tl.program_id(0) % column_tiles, tl.program_id(0) // column_tiles
    group, rows = tl.program_id(1), N * (H * W)
    first_row, row_step, row, row_ok, n, base_h, base_w = rows_of_tile(
        pid_m, N, H, W, -PH, -PW, SH, SW, together, BLOCK_M, BY_POSITION
    )
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < A
    n += group * N
    if INT64:
        n = n.to(tl.int64)

    depth: tl.constexpr = KH * KW * B
    lane = tl.arange(0, BLOCK_K)
    high_offset = ((n * HO + base_h) * WO + base_w) * B
    weight_offset = lane[:, None] + (column * depth)[None, :]
    if not BY_POSITION:
        base_h = tl.where(row_ok, base_h, NOWHERE)
    weight_column_ok = None if A % BLOCK_N == 0 else column_ok

    transposed: tl.constexpr = BLOCK_N >= 64 and high_ptr.dtype.element_ty.primitive_bitwidth == 16
    acc = new_accumulator(BLOCK_M, BLOCK_N, transposed)
    if SEGMENT > 0:
        low_row, tap_h, number, seen = seen_numbers(WO * B, KH, ROWS, TAPS_H, SEGMENT, MARGIN, SKEW)
        low_row += pid_m * ROWS
        image, high_row = group * N + low_row // H, low_row % H * SH + tap_h - PH
        if INT64:
            image = image.to(tl.int64)
        seen = seen & (low_row < N * H) & (high_row >= 0) & (high_row < HO)
        numbers = tl.load(high_ptr + (image * HO + high_row) * (WO * B) + number, mask=seen, other=0.0)
        source = patch_sources(W, B, KW, SW, PW, ROWS, WIDTH, TAPS_H, TAPS_W, MARGIN, SKEW, SEGMENT)
        y = tl.reshape(tl.gather(numbers, source, 0), (BLOCK_M, TAPS_H * TAPS_W))
        k = tl.arange(0, TAPS_H * TAPS_W)
        tap_h, tap_w = k // TAPS_W, k % TAPS_W
        weight_offset = (tap_h * (KW * B) + tap_w)[:, None] + (column * depth)[None, :]
        w = load_block(weight_ptr + weight_offset, (tap_h < KH) & (tap_w < KW * B), weight_column_ok)
        acc = multiply_add(acc, y, w, PRECISION, transposed)
    else:
        steps: tl.constexpr = (depth + BLOCK_K - 1) // BLOCK_K
        first_tap_h, first_tap_w, taps_w, taken = 0, 0, KW, steps
        if BY_POSITION:  # none but the taps that see the image
            first_tap_h, first_tap_w = tl.maximum(-base_h, 0), tl.maximum(-base_w, 0)
            taps_h = tl.maximum(tl.minimum(HO - base_h, KH) - first_tap_h, 0)
            taps_w = tl.maximum(tl.minimum(WO - base_w, KW) - first_tap_w, 0)
            taken = taps_h * taps_w * (B // BLOCK_K)
            taps_w = tl.maximum(taps_w, 1)  # as in `up_kernel`
        for step in range(steps_of(taken, steps, N)):
            if B % BLOCK_K == 0:  # all of a step's products are of one tap
                tap, b = step // (B // BLOCK_K), step % (B // BLOCK_K) * BLOCK_K
                tap_h, tap_w = first_tap_h + tap // taps_w, first_tap_w + tap % taps_w
                if BY_POSITION:
                    inside = None
                else:
                    in_h, in_w = base_h + tap_h, base_w + tap_w
                    inside = (in_h >= 0) & (in_h < HO) & (in_w >= 0) & (in_w < WO)
                high_step, weight_step = (tap_h * WO + tap_w) * B + b, (tap_h * KW + tap_w) * B + b
                y = load_block(high_ptr + high_step + (high_offset[:, None] + lane[None, :]), inside, None)
                w = load_block(weight_ptr + weight_step + weight_offset, None, weight_column_ok)
            else:
                k = step * BLOCK_K + lane
                k_ok = None if depth % BLOCK_K == 0 else k < depth
                in_h, in_w = base_h[:, None] + (k // (KW * B))[None, :], base_w[:, None] + (k // B % KW)[None, :]
                inside = (in_h >= 0) & (in_h < HO) & (in_w >= 0) & (in_w < WO)
                if depth % BLOCK_K != 0:
                    inside = inside & k_ok[None, :]
                high_step = k // (KW * B) * (WO * B) + k % (KW * B)
                y = tl.load(high_ptr + high_offset[:, None] + high_step[None, :], mask=inside, other=0.0)
                w = load_block(weight_ptr + step * BLOCK_K + weight_offset, k_ok, weight_column_ok)
            acc = multiply_add(acc, y, w, PRECISION, transposed)

    acc = tl.trans(acc) if transposed else acc
    first_cell = group * rows
    if INT64:
        first_cell = first_cell.to(tl.int64)
    cell = ((first_cell + row) * A)[:, None] + column[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    tiles = tl.num_programs(0) // column_tiles
    if y_ptr is not None:
        store_grad_and_sums(
            acc,
            low_ptr,
            y_ptr,
            mean_ptr + group * A,
            invstd_ptr + group * A,
            gamma_ptr,
            beta_ptr,
            sums_ptr,
            group=group,
            tile=pid_m,
            tiles=tiles,
            vectors=column,
            column=column,
            column_ok=column_ok,
            cell=cell,
            ok=ok,
            first_image=group * N,
            first_row=first_row,
            row_step=row_step,
            rows=rows,
            count_h=H,
            count_w=W,
            first_h=0,
            first_w=0,
            SH=1,
            SW=1,
            HEIGHT=H,
            WIDTH=W,
            COLUMNS=A,
            ACTIVATION=ACTIVATION,
            SLOPE=SLOPE,
            INT64=INT64,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            ACROSS_WARPS=transposed,  # float32 products leave no registers for sums across warps
            AGAIN=AGAIN,
        )
    else:
        if activated_ptr is not None:
            acc = backward_epilogue(acc, activated_ptr, cell, ok, ACTIVATION, SLOPE)
        else:
            acc = conv_epilogue(
                acc, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, column, column_ok, ACTIVATION, SLOPE
            )
        tl.store(low_ptr + cell, acc.to(low_ptr.dtype.element_ty), mask=ok)
    if count_ptr is not None:
        acc = acc.to(low_ptr.dtype.element_ty).to(tl.float32)  # the numbers that BatchNorm will normalise
        count = tl.minimum(rows - pid_m * BLOCK_M, BLOCK_M).to(tl.float32)
        tile = group * tiles + pid_m
        store_tile_statistics(acc, row_ok, count, tile, column, column_ok, A, A, count_ptr, tile_mean_ptr, tile_m2_ptr)


def picks_patches(weight, low_width, high_width):
    """Whether tiles of whole rows of low, and patches.py for high, are a choice: rows are to fill the tiles."""
    return fits_patches(weight, low_width, high_width) and low_width == next_power_of_2(low_width)


def fits_one_position(tile, images, high_channels):
    """Whether rows of a tile can be one position of its images: all tiles are full, and a step is of one tap."""
    return images % tile.block_m == 0 and high_channels % tile.block_k == 0


def down(
    high,
    weight,
    out_size,
    *,
    stride,
    padding,
    precision,
    bias=None,
    batch_norm=(None, None, None, None),
    eps=0.0,
    activation=None,
    slope=0.0,
    activated=None,
    normalized=None,
    statistics=False,
    groups=1,
    tile=None,
):
    """conv2d(high, weight) + bias, then an eval-mode BatchNorm and an activation.

    Args:
        high: (N, B, Ho, Wo) channels_last.
        weight: (A, B, KH, KW), same dtype; copied where it is not channels_last.
        out_size: (H, W).
        batch_norm: (mean, var, gamma, beta), each (A,) or None; no mean means no BatchNorm.
        activated: None, or act(z) in the shape of the result, which then is the convolution times act'(z): the
            gradient for z, of a transposed convolution's input act(z). Nothing else follows the convolution.
        normalized: None, or (y, mean, invstd, gamma, beta) where act(z) with z = gamma·(y − mean)·invstd + beta has the
            shape of the result, which then is the convolution times act'(z); mean and invstd are (groups, A), and
            also returned are parts of the sums that this BatchNorm's backward needs.
        statistics: whether also to return the TileStatistics of the result.
        groups: into how many equal parts the batch is cut for statistics.
        tile: a MatrixTile, or None for an untuned one.

    Returns:
        low (N, A, H, W) channels_last, or (low, TileStatistics), or (low, parts (groups, 2, tiles, A) float32 of
        Σ low and Σ low·(y − mean)·invstd).
    """
    n, (a, b, kh, kw) = high.shape[0], weight.shape
    weight = channels_last(weight)
    low = empty_nhwc((n, a, *out_size), high)
    if a == 1 and not statistics and activated is None and normalized is None:
        epilogue = dict(bias=bias, batch_norm=batch_norm, eps=eps, activation=activation, slope=slope)
        down_single(high, weight, low, stride=stride, padding=padding, tile=tile, **epilogue)
        return low
    y = invstd = sums = None
    if normalized is not None:
        y, mean, invstd, gamma, beta = normalized
        batch_norm, groups = (mean, None, gamma, beta), len(mean)
    rows = n // groups * out_size[0] * out_size[1]
    patches_fit = picks_patches(weight, out_size[1], high.shape[3])
    if tile is not None and tile.block_k == WHOLE_PATCH and not patches_fit:
        tile = None  # a tile of patches, which means nothing here
    if tile is None and patches_fit:
        tile = PATCH_TILES[high.dtype.itemsize][0]._replace(block_n=clamped_power_of_2(a, 16, 64))
    if tile is None:
        tile = matrix_tile(rows, a, kh * kw * b, high.dtype, groups)
        tile = tile if y is None else tile.with_room()
    patches = NO_BLOCK
    if tile.block_k == WHOLE_PATCH:
        patches = block_constants(tile.block_m, out_size, weight, high, stride, padding)
        tile = tile._replace(block_m=patches["ROWS"] * patches["WIDTH"])
    together = 0
    if tile.by_position and fits_one_position(tile, n // groups, b):
        together = blocks_together(tile.block_m, n // groups, kh * high.shape[3] * b * high.itemsize)
    row_tiles = cdiv(rows, tile.block_m)
    tiles = TileStatistics.empty(groups, row_tiles, a, high.device) if statistics else (None, None, None)
    if y is not None:
        sums = torch.empty((groups, 2, row_tiles, a), dtype=torch.float32, device=high.device)
    launch(
        down_kernel,
        (cdiv(a, tile.block_n) * row_tiles, groups),
        *(high, weight, low, bias, *batch_norm, activated, y, invstd, sums, *tiles, eps, n // groups, together),
        device=high.device,
        ACTIVATION=activation,
        SLOPE=slope,
        PRECISION=precision,
        INT64=needs_int64(low, high),
        AGAIN=0 if y is None or tile.has_room() else tile.rows_again(),
        BY_POSITION=together > 0,
        **patches,
        **geometry(low, weight, high, stride, padding),
        **tile.options(),
    )
    if y is not None:
        return low, sums
    return (low, tiles) if statistics else low
