"""The weight's gradient where high has few channels: an image, and what a layer next to it learns.

As columns of a matrix product (weight_grad.py) the patches of such an image are single numbers: each is loaded by
itself, several times. Here a program loads the rows of the image that a few rows of low see, in whole vectors and once,
and picks the patches from those.
"""

import triton
import triton.language as tl

from fastgan.kernels.launch import MatrixTile, power_of_two
from fastgan.kernels.pieces import multiply_add

# What a tuner may try beside `launch.TILES`. A program has all columns, and ALL stands where others have block_n.
ALL = 1
TILES = {
    2: (
        MatrixTile(64, ALL, 64, 4, 3),
        MatrixTile(64, ALL, 64, 8, 4),
        MatrixTile(64, ALL, 128, 4, 3),
        MatrixTile(64, ALL, 128, 8, 3),
    ),
    4: (MatrixTile(64, ALL, 32, 4, 3), MatrixTile(64, ALL, 64, 4, 3), MatrixTile(64, ALL, 64, 8, 3)),
}
MOST_CHANNELS = 8
MOST_COLUMNS = 128
MOST_WIDTH = 128
ALIGNMENT = 8  # numbers of two bytes that a load takes at once


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
    ROWS: tl.constexpr,  # of low in a block; as all that follow, but MARGIN, a power of two
    WIDTH: tl.constexpr,  # holds a row of low
    TAPS_H: tl.constexpr,  # holds the taps along the height
    TAPS_W: tl.constexpr,  # holds those along the width, of all channels
    MARGIN: tl.constexpr,  # numbers before each row of high that are zero: what taps find left of the image, and more
    SEGMENT: tl.constexpr,  # holds the margin, a row of high and what taps find right of it
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row_tiles: tl.constexpr = (A + BLOCK_M - 1) // BLOCK_M
    blocks: tl.constexpr = (H + ROWS - 1) // ROWS  # of an image
    pid_m, split = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    a = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, ROWS * WIDTH)
    row, w = lane // WIDTH, lane % WIDTH
    low_offset = ((row * W + w) * A)[None, :] + a[:, None]

    # What a block sees of high, (ROWS, TAPS_H, SEGMENT) in one dimension, because `gather` then goes through shared
    # memory, where shuffles took six times its instructions. Row r of low sees row r·stride + tap − padding of high.
    place = tl.arange(0, ROWS * TAPS_H * SEGMENT)
    low_row, tap_h, number = place // (TAPS_H * SEGMENT), place // SEGMENT % TAPS_H, place % SEGMENT - MARGIN
    high_row = low_row * SH + tap_h - PH
    high_offset = high_row * (WO * B) + number
    of_image = (tap_h < KH) & (number >= 0) & (number < WO * B)
    # Where the patches stand in it, (ROWS, WIDTH, TAPS_H, TAPS_W); for what is not there, the margin's zero.
    place = tl.arange(0, ROWS * WIDTH * TAPS_H * TAPS_W)
    place_w, tap_w = place // (TAPS_H * TAPS_W) % WIDTH, place % TAPS_W
    source = place // (WIDTH * TAPS_H * TAPS_W) * TAPS_H + place // TAPS_W % TAPS_H
    source = source * SEGMENT + MARGIN + (place_w * SW - PW) * B + tap_w
    source = tl.where((place_w < W) & (tap_w < KW * B), source, 0)

    acc = tl.zeros((BLOCK_M, TAPS_H * TAPS_W), tl.float32)
    for step in range(steps):
        block = split * steps + step
        n, first = block // blocks, block % blocks * ROWS
        low_ok = (w < W) & (row < H - first) & (n < N)
        high_ok = (high_row >= -first * SH) & (high_row < HO - first * SH) & (low_row < H - first) & (n < N)
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
    tl.store(
        grad_ptr
        + split * stride_split
        + a[:, None] * stride_wa
        + (tap_h * stride_wh + tap_w // B * stride_ww + tap_w % B * stride_wb)[None, :],
        acc.to(grad_ptr.dtype.element_ty),
        mask=(a < A)[:, None] & ((tap_h < KH) & (tap_w < KW * B))[None, :],
    )


def is_narrow(weight, low):
    """Whether the columns are few enough for one program, and low's rows short enough for a block."""
    _, b, kh, kw = weight.shape
    columns = triton.next_power_of_2(kh) * triton.next_power_of_2(kw * b)
    return b <= MOST_CHANNELS and 16 <= columns <= MOST_COLUMNS and low.shape[3] <= MOST_WIDTH


def narrow_tile(low):
    """An untuned tile."""
    return MatrixTile(power_of_two(low.shape[1], 16, 64), ALL, 128 // low.dtype.itemsize, 4, 3)


def block_constants(low, weight, high, stride, padding, tile):
    """The sizes of a block of low's rows as the kernel's constants."""
    (h, w), (_, b, kh, kw), image_row = low.shape[2:], weight.shape, high.shape[3] * weight.shape[1]
    width = triton.next_power_of_2(w)
    least = triton.cdiv(16, width)  # matrix units take 16 positions
    rows = max(least, min(tile.block_k // width, triton.next_power_of_2(h)))
    margin = triton.cdiv(max(padding[1] * b, 1), ALIGNMENT) * ALIGNMENT
    reach = ((w - 1) * stride[1] - padding[1] + kw) * b
    return dict(
        ROWS=rows,
        WIDTH=width,
        TAPS_H=triton.next_power_of_2(kh),
        TAPS_W=triton.next_power_of_2(kw * b),
        MARGIN=margin,
        SEGMENT=triton.next_power_of_2(margin + max(image_row, reach)),
    )
