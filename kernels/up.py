"""low → high: the forward of a transposed convolution, and the input gradient of a convolution.

Output position o receives input i through tap k exactly when o = i·stride − padding + k. With r = (o + padding) mod
stride and q = (o + padding) div stride that is k = r + stride·t, i = q − t: every residue r is an ordinary stride-1
convolution, called a phase, and no product with an inserted zero is ever made.
"""

import torch
import triton
import triton.language as tl

from fastgan.kernels.backward_epilogue import backward_epilogue, store_grad_and_sums
from fastgan.kernels.launch import (
    blocks_together,
    cdiv,
    channels_last,
    empty_nhwc,
    geometry,
    launch,
    matrix_tile,
    needs_int64,
)
from fastgan.kernels.narrow import fits_one_program, up_narrow
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
from fastgan.kernels.statistics import TileStatistics


@triton.jit
def up_kernel(
    low_ptr,  # (N, H, W, A)
    weight_ptr,  # (A, KH, KW, B)
    high_ptr,  # (N, HO, WO, B)
    bias_ptr,  # (B,) or None
    mean_ptr,  # (B,) or None: the statistics of an eval-mode BatchNorm, and its parameters; (groups, CHANNELS) beside y
    var_ptr,
    gamma_ptr,
    beta_ptr,
    activated_ptr,  # (N, HO, WO, B) or None: see `activated` of up()
    y_ptr,  # (N, HO, WO, B) or None: see `normalized` of up(); invstd: (groups, CHANNELS), sums: (groups, 2, tiles, B)
    invstd_ptr,
    sums_ptr,
    count_ptr,  # (groups, tiles) or None; mean and m2 (groups, tiles, B): statistics to write
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
    CHANNELS: tl.constexpr,  # of bias and so on: B, or a divisor of it where B holds an image's positions too
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AGAIN: tl.constexpr,  # beside y: the rows at a time that are read again for the sums; 0: all are in registers
    BY_POSITION: tl.constexpr,  # see `rows_of_tile`
):
    wait_for_previous()
    # The phases and column tiles of the same rows run side by side, so that they share the rows in L2.
    phases: tl.constexpr = SH * SW
    column_tiles: tl.constexpr = (B + BLOCK_N - 1) // BLOCK_N
    phase = tl.program_id(0) % phases
    pid_n = tl.program_id(0) // phases % column_tiles
    pid_m, group = tl.program_id(0) // (phases * column_tiles), tl.program_id(1)
    # The first output position of this phase, and how many positions it has along each axis. A small output can
    # leave a phase empty: its rows are then all masked.
    residue_h, residue_w = phase // SW, phase % SW
    first_h, first_w = (residue_h + PH * (SH - 1)) % SH, (residue_w + PW * (SW - 1)) % SW
    count_h, count_w = HO // SH, WO // SW
    if HO % SH != 0 or WO % SW != 0:  # some phases have a position more
        count_h, count_w = (HO - first_h + SH - 1) // SH, (WO - first_w + SW - 1) // SW
    rows = N * count_h * count_w

    first_row, row_step, _, row_ok, n, out_h, out_w = rows_of_tile(
        pid_m, N, count_h, count_w, first_h, first_w, SH, SW, together, BLOCK_M, BY_POSITION
    )
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < B
    n += group * N
    if INT64:
        n = n.to(tl.int64)

    taps_h, taps_w = KH // SH, KW // SW
    if KH % SH != 0 or KW % SW != 0:  # some phases have a tap more
        taps_h, taps_w = (KH - residue_h + SH - 1) // SH, (KW - residue_w + SW - 1) // SW
    base_h, base_w = (out_h + PH) // SH, (out_w + PW) // SW
    first_tap_h, first_tap_w = 0, 0
    if BY_POSITION:  # none but the taps that see the image
        first_tap_h, first_tap_w = tl.maximum(base_h - (H - 1), 0), tl.maximum(base_w - (W - 1), 0)
        taps_h = tl.maximum(tl.minimum(taps_h, base_h + 1) - first_tap_h, 0)
        taps_w = tl.maximum(tl.minimum(taps_w, base_w + 1) - first_tap_w, 0)
    taps = taps_h * taps_w
    blocks: tl.constexpr = (A + BLOCK_K - 1) // BLOCK_K
    most: tl.constexpr = ((KH + SH - 1) // SH) * ((KW + SW - 1) // SW) * blocks
    steps = steps_of(taps * blocks, most, N)
    if KH < SH or KW < SW or BY_POSITION:
        # A phase or a position without taps takes no step. But from a division by its taps the compiler would conclude
        # that every one has some, and read ahead for a first step that never comes.
        taps, taps_w = tl.maximum(taps, 1), tl.maximum(taps_w, 1)
    lane = tl.arange(0, BLOCK_K)
    low_offset = (((n * H + base_h) * W + base_w) * A)[:, None] + lane[None, :]
    weight_offset = (lane * (KH * KW * B))[:, None] + column[None, :]
    if not BY_POSITION:
        base_h = tl.where(row_ok, base_h, NOWHERE)
    weight_column_ok = None if B % BLOCK_N == 0 else column_ok

    # One loop over channels and taps: a loop for each tap would fill and drain the pipeline again.
    transposed: tl.constexpr = BLOCK_N >= 64 and low_ptr.dtype.element_ty.primitive_bitwidth == 16
    acc = new_accumulator(BLOCK_M, BLOCK_N, transposed)
    for step in range(steps):
        a, tap = step // taps * BLOCK_K, step % taps
        step_h, step_w = first_tap_h + tap // taps_w, first_tap_w + tap % taps_w
        if BY_POSITION:
            inside = None
        else:
            in_h, in_w = base_h - step_h, base_w - step_w
            inside = (in_h >= 0) & (in_h < H) & (in_w >= 0) & (in_w < W)
        a_ok = None if A % BLOCK_K == 0 else lane < A - a
        low_step = a - (step_h * W + step_w) * A
        weight_step = (a * KH + residue_h + step_h * SH) * (KW * B) + (residue_w + step_w * SW) * B
        x = load_block(low_ptr + low_step + low_offset, inside, a_ok)
        w = load_block(weight_ptr + weight_step + weight_offset, a_ok, weight_column_ok)
        acc = multiply_add(acc, x, w, PRECISION, transposed)

    acc = tl.trans(acc) if transposed else acc
    cell = (((n * HO + out_h) * WO + out_w) * B)[:, None] + column[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    vectors = column % CHANNELS
    row_tiles = tl.num_programs(0) // (phases * column_tiles)
    tile, tiles = phase * row_tiles + pid_m, phases * row_tiles
    if y_ptr is not None:
        store_grad_and_sums(
            acc,
            high_ptr,
            y_ptr,
            mean_ptr + group * CHANNELS,
            invstd_ptr + group * CHANNELS,
            gamma_ptr,
            beta_ptr,
            sums_ptr,
            group=group,
            tile=tile,
            tiles=tiles,
            vectors=vectors,
            column=column,
            column_ok=column_ok,
            cell=cell,
            ok=ok,
            first_image=group * N,
            first_row=first_row,
            row_step=row_step,
            rows=rows,
            count_h=count_h,
            count_w=count_w,
            first_h=first_h,
            first_w=first_w,
            SH=SH,
            SW=SW,
            HEIGHT=HO,
            WIDTH=WO,
            COLUMNS=B,
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
                acc, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, vectors, column_ok, ACTIVATION, SLOPE
            )
        tl.store(high_ptr + cell, acc.to(high_ptr.dtype.element_ty), mask=ok)
    if count_ptr is not None:
        acc = acc.to(high_ptr.dtype.element_ty).to(tl.float32)  # the numbers that BatchNorm will normalise
        count = tl.minimum(tl.maximum(rows - pid_m * BLOCK_M, 0), BLOCK_M).to(tl.float32)
        tile += group * tiles
        store_tile_statistics(
            acc, row_ok, count, tile, column, column_ok, B, CHANNELS, count_ptr, tile_mean_ptr, tile_m2_ptr
        )


def is_product_with_all(low_size, kernel, out_size, padding):
    """Whether each image of high is the product of one vector and the whole weight."""
    return tuple(low_size) == (1, 1) and tuple(padding) == (0, 0) and tuple(out_size) == tuple(kernel)


def picks_narrow(weight, stride, summed):
    """Whether narrow.py makes the result; sums beside it (`summed`) it knows none."""
    return not summed and fits_one_program(weight, stride)


def fits_one_position(tile, images, out_size, stride):
    """Whether rows of a tile can be one position of its images: all tiles are full, and phases of one size."""
    return images % tile.block_m == 0 and all(size % step == 0 for size, step in zip(out_size, stride, strict=True))


def up(
    low,
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
    """conv_transpose2d(low, weight) + bias, then an eval-mode BatchNorm and an activation.

    Args:
        low: (N, A, H, W) channels_last.
        weight: (A, B, KH, KW), same dtype; copied where it is not channels_last.
        out_size: (Ho, Wo).
        batch_norm: (mean, var, gamma, beta), each (B,) or None; no mean means no BatchNorm.
        activated: None, or act(z) in the shape of the result, which then is the convolution times act'(z): the
            gradient for z, of a convolution's input act(z). Nothing else follows the convolution.
        normalized: None, or (y, mean, invstd, gamma, beta) where act(z) with z = gamma·(y − mean)·invstd + beta has the
            shape of the result, which then is the convolution times act'(z); mean and invstd are (groups, B), and
            also returned are parts of the sums that this BatchNorm's backward needs.
        statistics: whether also to return the TileStatistics of the result.
        groups: into how many equal parts the batch is cut for statistics.
        tile: a MatrixTile, or None for an untuned one.

    Returns:
        high (N, B, Ho, Wo) channels_last, or (high, TileStatistics), or (high, parts (groups, 2, tiles, B) float32 of
        Σ high and Σ high·(y − mean)·invstd).
    """
    (n, a, *low_size), (_, channels, kh, kw) = low.shape, weight.shape
    weight = channels_last(weight)
    result = high = empty_nhwc((n, channels, *out_size), low)
    y = invstd = None
    if normalized is not None:
        y, mean, invstd, gamma, beta = normalized
        batch_norm, groups = (mean, None, gamma, beta), len(mean)
    if is_product_with_all(low_size, (kh, kw), out_size, padding):
        # The weight's memory is that matrix as it stands: every element of the image is a column of its own.
        weight, high = as_columns(weight), as_columns(high)
        activated = None if activated is None else as_columns(activated)
        y = None if y is None else as_columns(y)
        stride = (1, 1)
    elif picks_narrow(weight, stride, summed=statistics or normalized is not None):
        epilogue = dict(
            bias=bias, batch_norm=batch_norm, eps=eps, activation=activation, slope=slope, activated=activated
        )
        up_narrow(low, weight, high, stride=stride, padding=padding, precision=precision, tile=tile, **epilogue)
        return result
    columns = weight.shape[1]
    phases = stride[0] * stride[1]
    rows = n // groups * cdiv(high.shape[2], stride[0]) * cdiv(high.shape[3], stride[1])
    if tile is None:
        tile = matrix_tile(rows, columns, a, low.dtype, groups * phases)
        tile = tile if y is None else tile.with_room()
    together = 0
    if tile.by_position and fits_one_position(tile, n // groups, high.shape[2:], stride):
        row_bytes = cdiv(kh, stride[0]) * low.shape[3] * a * low.itemsize
        together = blocks_together(tile.block_m, n // groups, row_bytes)
    row_tiles = cdiv(rows, tile.block_m)
    count = row_tiles * phases * (columns // channels)
    tiles = TileStatistics.empty(groups, count, channels, low.device) if statistics else (None, None, None)
    sums = None if y is None else torch.empty((groups, 2, count, channels), dtype=torch.float32, device=low.device)
    launch(
        up_kernel,
        (phases * cdiv(columns, tile.block_n) * row_tiles, groups),
        *(low, weight, high, bias, *batch_norm, activated, y, invstd, sums, *tiles, eps, n // groups, together),
        device=low.device,
        CHANNELS=channels,
        ACTIVATION=activation,
        SLOPE=slope,
        PRECISION=precision,
        INT64=needs_int64(low, high),
        AGAIN=0 if y is None or tile.has_room() else tile.rows_again(),
        BY_POSITION=together > 0,
        **geometry(low, weight, high, stride, padding),
        **tile.options(),
    )
    if y is not None:
        return result, sums
    return (result, tiles) if statistics else result


def as_columns(tensor):
    """(N, C, H, W) in channels_last memory seen as (N, H·W·C, 1, 1)."""
    return tensor.permute(0, 2, 3, 1).reshape(len(tensor), -1, 1, 1)
