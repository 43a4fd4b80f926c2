"""The weight's gradient where high has few channels: an image, and what a layer next to it learns (see patches.py)."""

import triton
import triton.language as tl

from fastgan.kernels.launch import MatrixTile, clamped_power_of_2
from fastgan.kernels.patches import WHOLE_PATCH, patch_sources, seen_numbers
from fastgan.kernels.pieces import multiply_add, wait_for_previous

# What a tuner may try beside `launch.TILES`.
TILES = {
    2: (
        MatrixTile(64, WHOLE_PATCH, 64, 4, 3),
        MatrixTile(64, WHOLE_PATCH, 64, 8, 4),
        MatrixTile(64, WHOLE_PATCH, 128, 4, 3),
        MatrixTile(64, WHOLE_PATCH, 128, 8, 3),
    ),
    4: (
        MatrixTile(64, WHOLE_PATCH, 32, 4, 3),
        MatrixTile(64, WHOLE_PATCH, 64, 4, 3),
        MatrixTile(64, WHOLE_PATCH, 64, 8, 3),
    ),
}


@triton.jit
def weight_grad_narrow_kernel(
    low_ptr,  # (N, H, W, A)
    high_ptr,  # (N, HO, WO, B)
    grad_ptr,  # (splits, *weight): weight's (A, B, KH, KW) by strides
    N,
    steps,  # blocks of low's rows for each program
    stride_split,
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
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    ROWS: tl.constexpr,  # see patches.py
    WIDTH: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    MARGIN: tl.constexpr,
    SKEW: tl.constexpr,
    SEGMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    DENSE: tl.constexpr,  # whether weight lies as (A, KH, KW, B), which strides at run time do not tell the compiler
    BLOCK_M: tl.constexpr,
):
    wait_for_previous()
    row_tiles: tl.constexpr = (A + BLOCK_M - 1) // BLOCK_M
    blocks: tl.constexpr = (H + ROWS - 1) // ROWS  # of an image
    pid_m, split = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    a = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, ROWS * WIDTH)
    row, w = lane // WIDTH, lane % WIDTH
    low_offset = ((row * W + w) * A)[None, :] + a[:, None]

    low_row, tap_h, number, of_image = seen_numbers(WO * B, KH, ROWS, TAPS_H, SEGMENT, MARGIN, SKEW)
    high_row = low_row * SH + tap_h - PH
    high_offset = high_row * (WO * B) + number
    source = patch_sources(W, B, KW, SW, PW, ROWS, WIDTH, TAPS_H, TAPS_W, MARGIN, SKEW, SEGMENT)

    acc = tl.zeros((BLOCK_M, TAPS_H * TAPS_W), tl.float32)
    for step in range(steps):
        block = split * steps + step
        n, first = block // blocks, block % blocks * ROWS
        rows_left = tl.where(n < N, H - first, 0)
        low_ok = (w < W) & (row < rows_left)
        high_ok = (high_row >= -first * SH) & (high_row < HO - first * SH) & (low_row < rows_left)
        if INT64:
            n = n.to(tl.int64)
        x = tl.load(
            low_ptr + (n * H + first) * (W * A) + low_offset, mask=(a < A)[:, None] & low_ok[None, :], other=0.0
        )
        rows = tl.load(high_ptr + (n * HO + first * SH) * (WO * B) + high_offset, mask=high_ok & of_image, other=0.0)
        patches = tl.reshape(tl.gather(rows, source, 0), (ROWS * WIDTH, TAPS_H * TAPS_W))
        acc = multiply_add(acc, x, patches, PRECISION)

    column = tl.arange(0, TAPS_H * TAPS_W)
    tap_h, tap_w = column // TAPS_W, column % TAPS_W
    if DENSE:
        offset = (a * (KH * KW * B))[:, None] + (tap_h * (KW * B) + tap_w)[None, :]
    else:
        taps_offset = tap_h * stride_wh + tap_w // B * stride_ww + tap_w % B * stride_wb
        offset = a[:, None] * stride_wa + taps_offset[None, :]
    tl.store(
        grad_ptr + split * stride_split + offset,
        acc.to(grad_ptr.dtype.element_ty),
        mask=(a < A)[:, None] & ((tap_h < KH) & (tap_w < KW * B))[None, :],
    )


def narrow_tile(low):
    """The MatrixTile for a narrow weight gradient that nobody has tuned."""
    return MatrixTile(clamped_power_of_2(low.shape[1], 16, 64), WHOLE_PATCH, 128 // low.dtype.itemsize, 4, 3)
