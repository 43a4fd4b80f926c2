"""high → low: the forward of a convolution, and the input gradient of a transposed convolution."""

import triton
import triton.language as tl

from fastgan.kernels.launch import empty_nhwc, geometry, launch, matrix_tile, needs_int64
from fastgan.kernels.pieces import conv_epilogue, store_tile_statistics
from fastgan.kernels.statistics import TileStatistics


@triton.jit
def down_kernel(
    high_ptr,  # (N, Ho, Wo, B)
    weight_ptr,  # (A, B, KH, KW) by strides
    low_ptr,  # (N, H, W, A)
    bias_ptr,  # (A,) or None
    mean_ptr,  # (A,) or None: the statistics of an eval-mode BatchNorm, and its parameters
    var_ptr,
    gamma_ptr,
    beta_ptr,
    count_ptr,  # (groups, tiles) or None; mean and m2 (groups, tiles, A): statistics to write
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
    column_tiles: tl.constexpr = (A + BLOCK_N - 1) // BLOCK_N
    pid_n, pid_m = tl.program_id(0) % column_tiles, tl.program_id(0) // column_tiles
    group, rows = tl.program_id(1), N * H * W
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = row < rows, column < A
    n, out_h, out_w = group * N + row // (H * W), row % (H * W) // W, row % W
    if INT64:
        n = n.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap_h in range(KH):
        for tap_w in range(KW):
            in_h, in_w = out_h * SH - PH + tap_h, out_w * SW - PW + tap_w
            inside = row_ok & (in_h >= 0) & (in_h < Ho) & (in_w >= 0) & (in_w < Wo)
            high_row = ((n * Ho + in_h) * Wo + in_w) * B
            weight_tap = tap_h * stride_wh + tap_w * stride_ww
            for k in range(0, B, BLOCK_K):
                b = k + tl.arange(0, BLOCK_K)
                y = tl.load(
                    high_ptr + high_row[:, None] + b[None, :], mask=inside[:, None] & (b < B)[None, :], other=0.0
                )
                w = tl.load(
                    weight_ptr + weight_tap + b[:, None] * stride_wb + column[None, :] * stride_wa,
                    mask=(b < B)[:, None] & column_ok[None, :],
                    other=0.0,
                )
                acc = tl.dot(y, w, acc, input_precision=PRECISION)

    acc = conv_epilogue(
        acc, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, column, column_ok, ACTIVATION, SLOPE
    )
    low = ((n * H + out_h) * W + out_w) * A
    tl.store(
        low_ptr + low[:, None] + column[None, :],
        acc.to(low_ptr.dtype.element_ty),
        mask=row_ok[:, None] & column_ok[None, :],
    )
    if count_ptr is not None:
        count = tl.minimum(rows - pid_m * BLOCK_M, BLOCK_M).to(tl.float32)
        tile = group * (tl.num_programs(0) // column_tiles) + pid_m
        store_tile_statistics(acc, row_ok, count, tile, column, column_ok, A, count_ptr, tile_mean_ptr, tile_m2_ptr)


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
    statistics=False,
    groups=1,
    tile=None,
):
    """conv2d(high, weight) + bias, then an eval-mode BatchNorm and an activation.

    Args:
        high: (N, B, Ho, Wo) channels_last.
        weight: (A, B, KH, KW), same dtype.
        out_size: (H, W).
        batch_norm: (mean, var, gamma, beta), each (A,) or None; no mean means no BatchNorm.
        statistics: also return the TileStatistics of the result,
        groups: with those of so many equal parts of the batch apart.
        tile: a MatrixTile, or None for an untuned one.

    Returns:
        low (N, A, H, W) channels_last, or (low, TileStatistics).
    """
    (n, b, ho, wo), a = high.shape, weight.shape[0]
    low = empty_nhwc((n, a, *out_size), high)
    rows = n // groups * out_size[0] * out_size[1]
    tile = tile or matrix_tile(rows, a, b, high.dtype)
    row_tiles = triton.cdiv(rows, tile.block_m)
    tiles = TileStatistics.empty(groups, row_tiles, a, high.device) if statistics else (None, None, None)
    launch(
        down_kernel,
        (triton.cdiv(a, tile.block_n) * row_tiles, groups),
        *(high, weight, low, bias, *batch_norm, *tiles, eps),
        *(n // groups, *out_size, ho, wo, *weight.stride()),
        device=high.device,
        ACTIVATION=activation,
        SLOPE=slope,
        PRECISION=precision,
        INT64=needs_int64(low, high),
        **geometry(weight, stride, padding),
        **tile.options(),
    )
    return (low, tiles) if statistics else low
