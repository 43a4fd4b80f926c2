"""The patches of an image that has few channels: its rows are loaded once, in whole vectors, and patches picked there.

As columns of a matrix product, patches of such an image are single numbers, each loaded by itself and several times.
A block is of ROWS rows of low. Of high it sees TAPS_H rows for each, as SEGMENT numbers: a margin of zeros, the row,
and what taps find right of it. All of that is in one dimension, because `gather` then goes through shared memory, where
shuffles took six times the instructions.
"""

import triton
import triton.language as tl

from fastgan.kernels.launch import cdiv, next_power_of_2

WHOLE_PATCH = 1  # in a MatrixTile as block_k (`down`) or block_n (weight gradients): a program has all of a patch
MOST_CHANNELS = 8  # of high
MOST_COLUMNS = 128  # of a patch: taps × channels, each rounded up to a power of two
MOST_WIDTH = 128  # of low: a block holds whole rows
MOST_NUMBERS = 4 * 1536  # of high, that a row of low sees: several times as many have to fit in shared memory
ALIGNMENT = 8  # numbers of two bytes that a load takes at once
HALF_OF_BANKS = 64  # bytes of shared memory
NO_BLOCK = dict.fromkeys(("ROWS", "WIDTH", "TAPS_H", "TAPS_W", "MARGIN", "SKEW", "SEGMENT"), 0)


@triton.jit
def seen_numbers(
    LENGTH: tl.constexpr,  # of high's rows, in numbers
    KH: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS_H: tl.constexpr,
    SEGMENT: tl.constexpr,
    MARGIN: tl.constexpr,
    SKEW: tl.constexpr,
):
    """Of all that a block sees: row of low, tap along the height, number in a row of high, whether it is there."""
    place = tl.arange(0, ROWS * TAPS_H * SEGMENT)
    tap_h = place // SEGMENT % TAPS_H
    number = place % SEGMENT - MARGIN - tap_h % 2 * SKEW
    return place // (TAPS_H * SEGMENT), tap_h, number, (tap_h < KH) & (number >= 0) & (number < LENGTH)


@triton.jit
def patch_sources(
    W: tl.constexpr,
    B: tl.constexpr,
    KW: tl.constexpr,
    SW: tl.constexpr,
    PW: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    MARGIN: tl.constexpr,
    SKEW: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Where among those the block's patches stand, (ROWS, WIDTH, TAPS_H, TAPS_W); what is not there is a zero."""
    place = tl.arange(0, ROWS * WIDTH * TAPS_H * TAPS_W)
    w, tap_h, tap_w = place // (TAPS_H * TAPS_W) % WIDTH, place // TAPS_W % TAPS_H, place % TAPS_W
    row = place // (WIDTH * TAPS_H * TAPS_W) * TAPS_H + tap_h
    source = row * SEGMENT + MARGIN + tap_h % 2 * SKEW + (w * SW - PW) * B + tap_w
    return tl.where((w < W) & (tap_w < KW * B), source, 0)


def fits_patches(weight, low_width, high_width):
    """Whether the patches' numbers are few enough for one program, and rows short enough for a block."""
    _, b, kh, kw = weight.shape
    taps_h = next_power_of_2(kh)
    few_columns = b <= MOST_CHANNELS and 16 <= taps_h * next_power_of_2(kw * b) <= MOST_COLUMNS
    return few_columns and low_width <= MOST_WIDTH and taps_h * high_width * b <= MOST_NUMBERS


def block_constants(positions, low_size, weight, high, stride, padding):
    """The sizes of a block of so many positions, or a few more, as constants of a kernel; all powers of two but MARGIN.

    ROWS and WIDTH hold low's, TAPS_H the taps along the height, and TAPS_W those along the width, of all channels.
    What odd taps along the height see stands SKEW further on, where there is room: half a warp picks from there, and
    would else wait for the banks that the other half picks from.
    """
    (h, w), (_, b, kh, kw) = low_size, weight.shape
    width = next_power_of_2(w)
    least = cdiv(16, width)  # matrix units take 16 positions
    margin = cdiv(max(padding[1] * b, 1), ALIGNMENT) * ALIGNMENT
    reach = ((w - 1) * stride[1] - padding[1] + kw) * b
    numbers = margin + max(high.shape[3] * b, reach)
    segment, skew = next_power_of_2(numbers), HALF_OF_BANKS // high.element_size()
    return dict(
        ROWS=max(least, min(positions // width, next_power_of_2(h))),
        WIDTH=width,
        TAPS_H=next_power_of_2(kh),
        TAPS_W=next_power_of_2(kw * b),
        MARGIN=margin,
        SKEW=skew if numbers + skew <= segment else 0,
        SEGMENT=segment,
    )
