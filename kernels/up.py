"""low → high: the forward of a transposed convolution, and the input gradient of a convolution.

Output position o receives input i through tap k exactly when o = i·stride − padding + k. With r = (o + padding) mod
stride and q = (o + padding) div stride that is k = r + stride·t, i = q − t: every residue r is an ordinary stride-1
convolution, called a phase, and no product with an inserted zero is ever made.
"""

import triton
import triton.language as tl

from fastgan.kernels.launch import empty_nhwc, geometry, launch, matrix_tile, needs_int64
from fastgan.kernels.pieces import conv_epilogue, store_tile_statistics
from fastgan.kernels.statistics import TileStatistics


@triton.jit
def up_kernel(
    low_ptr,  # (N, H, W, A)
    weight_ptr,  # (A, B, KH, KW) by strides
    high_ptr,  # (N, Ho, Wo, B)
    bias_ptr,  # (B,) or None
    mean_ptr,  # (B,) or None: the statistics of an eval-mode BatchNorm, and its parameters
    var_ptr,
    gamma_ptr,
    beta_ptr,
    count_ptr,  # (groups, tiles) or None; mean and m2 (groups, tiles, B): statistics to write
    tile_mean_ptr,
    tile_m2_ptr,
    eps,
    N,  # images of one group: no tile holds rows of two
    H,
    W,
    Ho,
    Wo,
    stride_wa,
    stride_wb,
    stride_wh,
    stride_ww,
    A: tl.constexpr,
    B: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles: tl.constexpr = (B + BLOCK_N - 1) // BLOCK_N
    pid_n, pid_m = tl.program_id(0) % column_tiles, tl.program_id(0) // column_tiles
    phase, group = tl.program_id(1), tl.program_id(2)
    # The first output position of this phase, and how many positions it has along each axis. A small output can
    # leave a phase empty: its rows are then all masked, and `maximum` keeps the divisions defined.
    residue_h, residue_w = phase // SW, phase % SW
    first_h, first_w = (residue_h + PH * (SH - 1)) % SH, (residue_w + PW * (SW - 1)) % SW
    count_h, count_w = (Ho - first_h + SH - 1) // SH, (Wo - first_w + SW - 1) // SW
    rows = N * count_h * count_w
    per_row, per_image = tl.maximum(count_w, 1), tl.maximum(count_h * count_w, 1)

    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = row < rows, column < B
    n = group * N + row // per_image
    out_h = first_h + (row % per_image) // per_row * SH
    out_w = first_w + row % per_row * SW
    if INT64:
        n = n.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step_h in range((KH + SH - 1) // SH):
        for step_w in range((KW + SW - 1) // SW):
            tap_h, tap_w = residue_h + step_h * SH, residue_w + step_w * SW
            in_h, in_w = (out_h + PH) // SH - step_h, (out_w + PW) // SW - step_w
            inside = row_ok & (in_h >= 0) & (in_h < H) & (in_w >= 0) & (in_w < W)
            # A phase with fewer taps than the most spends its last step on no channels at all.
            channels = tl.where((tap_h < KH) & (tap_w < KW), A, 0)
            low_row = ((n * H + in_h) * W + in_w) * A
            weight_tap = tap_h * stride_wh + tap_w * stride_ww
            for k in range(0, A, BLOCK_K):
                a = k + tl.arange(0, BLOCK_K)
                x = tl.load(
                    low_ptr + low_row[:, None] + a[None, :], mask=inside[:, None] & (a < channels)[None, :], other=0.0
                )
                w = tl.load(
                    weight_ptr + weight_tap + a[:, None] * stride_wa + column[None, :] * stride_wb,
                    mask=(a < channels)[:, None] & column_ok[None, :],
                    other=0.0,
                )
                acc = tl.dot(x, w, acc, input_precision=PRECISION)

    acc = conv_epilogue(
        acc, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, column, column_ok, ACTIVATION, SLOPE
    )
    high = ((n * Ho + out_h) * Wo + out_w) * B
    tl.store(
        high_ptr + high[:, None] + column[None, :],
        acc.to(high_ptr.dtype.element_ty),
        mask=row_ok[:, None] & column_ok[None, :],
    )
    if count_ptr is not None:
        count = tl.minimum(tl.maximum(rows - pid_m * BLOCK_M, 0), BLOCK_M).to(tl.float32)
        tile = (group * tl.num_programs(1) + phase) * (tl.num_programs(0) // column_tiles) + pid_m
        store_tile_statistics(acc, row_ok, count, tile, column, column_ok, B, count_ptr, tile_mean_ptr, tile_m2_ptr)


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
    statistics=False,
    groups=1,
    tile=None,
):
    """conv_transpose2d(low, weight) + bias, then an eval-mode BatchNorm and an activation.

    Args:
        low: (N, A, H, W) channels_last.
        weight: (A, B, KH, KW), same dtype.
        out_size: (Ho, Wo).
        batch_norm: (mean, var, gamma, beta), each (B,) or None; no mean means no BatchNorm.
        statistics: also return the TileStatistics of the result,
        groups: with those of so many equal parts of the batch apart.
        tile: a MatrixTile, or None for an untuned one.

    Returns:
        high (N, B, Ho, Wo) channels_last, or (high, TileStatistics).
    """
    (n, a, h, w), b = low.shape, weight.shape[1]
    high = empty_nhwc((n, b, *out_size), low)
    phases = stride[0] * stride[1]
    rows = n // groups * triton.cdiv(out_size[0], stride[0]) * triton.cdiv(out_size[1], stride[1])
    tile = tile or matrix_tile(rows, b, a, low.dtype)
    row_tiles = triton.cdiv(rows, tile.block_m)
    tiles = TileStatistics.empty(groups, row_tiles * phases, b, low.device) if statistics else (None, None, None)
    launch(
        up_kernel,
        (triton.cdiv(b, tile.block_n) * row_tiles, phases, groups),
        *(low, weight, high, bias, *batch_norm, *tiles, eps),
        *(n // groups, h, w, *out_size, *weight.stride()),
        device=low.device,
        ACTIVATION=activation,
        SLOPE=slope,
        PRECISION=precision,
        INT64=needs_int64(low, high),
        **geometry(weight, stride, padding),
        **tile.options(),
    )
    return (high, tiles) if statistics else high
