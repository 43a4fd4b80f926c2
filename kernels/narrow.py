"""low → high where high has few channels: the layer that makes an image, and the gradient that reaches one.

As a matrix product for each phase (up.py) such a layer would read low once for every tap, to fill a few of the matrix
unit's columns. Here a program reads a patch of low once and multiplies it by all of the weight, whose columns, (KH, KW,
B), are as they stand in memory. An output is then picked up: the sum of the products of its phase's taps, each from the
row of the neighbour that the tap reads. The outputs that a position has in one row of high are its slots, all channels.
"""

import math

import triton
import triton.language as tl

from fastgan.kernels.backward_epilogue import backward_epilogue
from fastgan.kernels.launch import MatrixTile, cdiv, clamped_power_of_2, geometry, launch, needs_int64, next_power_of_2
from fastgan.kernels.pieces import conv_epilogue, load_block, multiply_add, wait_for_previous

# What a tuner may try, as `launch.TILES`; block_n is the kernel's own affair.
TILES = {
    2: (MatrixTile(256, 16, 64, 8, 1), MatrixTile(128, 16, 64, 4, 1), MatrixTile(128, 16, 64, 8, 1)),
    4: (MatrixTile(256, 16, 32, 8, 1), MatrixTile(128, 16, 32, 4, 1), MatrixTile(128, 16, 32, 8, 1)),
}
MOST_CHANNELS = 8  # of high
MOST_COLUMNS = 128  # of the products, and of what a position picks up from them


@triton.jit
def up_narrow_kernel(
    low_ptr,  # (N, H, W, A)
    weight_ptr,  # (A, KH, KW, B)
    high_ptr,  # (N, HO, WO, B)
    bias_ptr,  # (B,) or None
    mean_ptr,  # (B,) or None: the statistics of an eval-mode BatchNorm, and its parameters
    var_ptr,
    gamma_ptr,
    beta_ptr,
    activated_ptr,  # (N, HO, WO, B) or None: see `activated` of up()
    eps,
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
    PATCH_H: tl.constexpr,  # positions of a patch, and how many of them at its edges only serve their neighbours
    PATCH_W: tl.constexpr,
    BEFORE_H: tl.constexpr,
    BEFORE_W: tl.constexpr,
    AFTER_H: tl.constexpr,
    AFTER_W: tl.constexpr,
    COLUMNS: tl.constexpr,  # powers of two that hold the weight's columns,
    STEPS_H: tl.constexpr,  # all taps of an output,
    STEPS_W: tl.constexpr,
    PHASES: tl.constexpr,  # and the rows of high and the slots of a position
    SLOTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous()
    # Position q makes the outputs q·stride + phase.
    count_h: tl.constexpr = (HO + SH - 1) // SH
    count_w: tl.constexpr = (WO + SW - 1) // SW
    inner_h: tl.constexpr = PATCH_H - BEFORE_H - AFTER_H
    inner_w: tl.constexpr = PATCH_W - BEFORE_W - AFTER_W
    patches_h: tl.constexpr = (count_h + inner_h - 1) // inner_h
    patches_w: tl.constexpr = (count_w + inner_w - 1) // inner_w
    patch = tl.program_id(0) % (patches_h * patches_w)
    n = tl.program_id(0) // (patches_h * patches_w)
    if INT64:
        n = n.to(tl.int64)
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    first_h, first_w = patch // patches_w * inner_h - BEFORE_H, patch % patches_w * inner_w - BEFORE_W
    position = tl.arange(0, POSITIONS)
    h, w = first_h + position // PATCH_W, first_w + position % PATCH_W

    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    lane = tl.arange(0, BLOCK_K)
    low_offset = (((n * H + h) * W + w) * A)[:, None] + lane[None, :]
    column = tl.arange(0, COLUMNS)
    column_ok = column < KH * KW * B
    weight_offset = (lane * (KH * KW * B))[:, None] + column[None, :]
    products = tl.zeros((POSITIONS, COLUMNS), tl.float32)
    for a in range(0, A, BLOCK_K):
        a_ok = None if A % BLOCK_K == 0 else lane < A - a
        x = load_block(low_ptr + a + low_offset, inside, a_ok)
        y = load_block(weight_ptr + a * (KH * KW * B) + weight_offset, a_ok, column_ok)
        products = multiply_add(products, x, y, PRECISION)

    # As in up.py, tap residue + stride·step of a phase's outputs reads position q + carry − step, with carry = (phase +
    # padding) div stride. All in one dimension, because `gather` then goes through shared memory: eight columns of all
    # positions after eight others, which a warp writes without bank conflicts. It gives one row of high after the
    # other, which a warp reads without conflicts and stores side by side, and the steps one after the other, so that a
    # thread adds up its own. A position outside of the patch is outside of the image too, or the output is another
    # program's.
    place = tl.arange(0, STEPS_H * STEPS_W * PHASES * POSITIONS * SLOTS)
    position, phase_h = place // SLOTS % POSITIONS, place // (SLOTS * POSITIONS) % PHASES
    slot = tl.minimum(place % SLOTS, SW * B - 1)  # those that are too many read what the last one does
    step = place // (SLOTS * POSITIONS * PHASES)
    at_h, at_w = phase_h + PH, slot // B + PW
    from_h = position // PATCH_W + at_h // SH - step // STEPS_W
    from_w = position % PATCH_W + at_w // SW - step % STEPS_W
    tap_h, tap_w = at_h % SH + step // STEPS_W * SH, at_w % SW + step % STEPS_W * SW
    there = (from_h >= 0) & (from_h < PATCH_H) & (from_w >= 0) & (from_w < PATCH_W) & (tap_h < KH) & (tap_w < KW)
    column = (tap_h * KW + tap_w) * B + slot % B
    source = column // 8 * (POSITIONS * 8) + (from_h * PATCH_W + from_w) * 8 + column % 8
    products = tl.permute(tl.reshape(products, (POSITIONS, COLUMNS // 8, 8)), (1, 0, 2))
    products = tl.reshape(products, (POSITIONS * COLUMNS,))
    products = tl.where(there, tl.gather(products, tl.where(there, source, 0), 0), 0.0)
    out = tl.sum(tl.reshape(products, (STEPS_H * STEPS_W, PHASES * POSITIONS * SLOTS)), 0)
    out = tl.reshape(out, (PHASES * POSITIONS, SLOTS))

    row, slot = tl.arange(0, PHASES * POSITIONS), tl.arange(0, SLOTS)
    phase_h, row_h, row_w = row // POSITIONS, row % POSITIONS // PATCH_W, row % PATCH_W
    out_h, out_w = (first_h + row_h) * SH + phase_h, (first_w + row_w) * SW
    own_h = (row_h >= BEFORE_H) & (row_h < BEFORE_H + inner_h) & (phase_h < SH) & (out_h < HO)
    own = own_h & (row_w >= BEFORE_W) & (row_w < BEFORE_W + inner_w)
    slot_ok = slot < SW * B
    cell = (((n * HO + out_h) * WO + out_w) * B)[:, None] + slot[None, :]
    ok = own[:, None] & slot_ok[None, :] & (slot[None, :] < ((WO - out_w) * B)[:, None])
    if activated_ptr is None:
        out = conv_epilogue(
            out, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, slot % B, slot_ok, ACTIVATION, SLOPE
        )
    else:
        out = backward_epilogue(out, activated_ptr, cell, ok, ACTIVATION, SLOPE)
    tl.store(high_ptr + cell, out.to(high_ptr.dtype.element_ty), mask=ok)


def fits_one_program(weight, stride):
    """Whether the weight's columns, and all taps of all outputs of a position, are few enough for one program."""
    columns, *sizes = _columns(weight, stride).values()
    return weight.shape[1] <= MOST_CHANNELS and max(columns, math.prod(sizes)) <= MOST_COLUMNS


def up_narrow(
    low, weight, high, *, stride, padding, precision, bias, batch_norm, eps, activation, slope, activated, tile=None
):
    """up() into `high`, for layers that are narrow; of `tile`, block_m, block_k, warps and stages count."""
    tile = tile or MatrixTile(256, 0, clamped_power_of_2(low.shape[1], 16, 64 if low.dtype.itemsize == 2 else 32), 8, 1)
    patch, programs = _patch(tile.block_m, low.shape, high.shape, weight.shape[2:], stride, padding)
    launch(
        up_narrow_kernel,
        (programs,),
        *(low, weight, high, bias, *batch_norm, activated, eps),
        device=low.device,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        ACTIVATION=activation,
        SLOPE=slope,
        PRECISION=precision,
        INT64=needs_int64(low, high),
        BLOCK_K=tile.block_k,
        **patch,
        **_columns(weight, stride),
        **geometry(low, weight, high, stride, padding),
    )


def _columns(weight, stride):
    """The powers of two that hold the weight's columns, the taps of an output and the outputs of a position."""
    (_, b, kh, kw), (sh, sw) = weight.shape, stride
    return dict(
        COLUMNS=max(next_power_of_2(kh * kw * b), 16),  # the least that matrix units take
        STEPS_H=next_power_of_2(cdiv(kh, sh)),
        STEPS_W=next_power_of_2(cdiv(kw, sw)),
        PHASES=next_power_of_2(sh),
        SLOTS=next_power_of_2(sw * b),
    )


def _patch(rows, low_shape, high_shape, kernel, stride, padding):
    """The patch of `rows` positions that reads the least of low: ({its constants}, how many there are)."""
    best = None
    for width in (2**i for i in range(rows.bit_length())):
        sizes, patches, names = (rows // width, width), low_shape[0], {}
        for axis, name in enumerate("HW"):
            k, s, p, size = kernel[axis], stride[axis], padding[axis], sizes[axis]
            count = cdiv(high_shape[2 + axis], s)
            before, after = (k - 1 - p) // s, (p + s - 1) // s  # how far an output reaches back and ahead
            before, after = max(before, 0), max(after, 0)
            if size >= max(count, low_shape[2 + axis]):  # the whole image: beyond it there is nothing to read
                before = after = 0
            inner = size - before - after
            if inner <= 0:
                break
            patches *= cdiv(count, inner)
            names.update({f"PATCH_{name}": size, f"BEFORE_{name}": before, f"AFTER_{name}": after})
        else:
            if best is None or patches <= best[1]:  # of equals, the widest: its memory lies together
                best = names, patches
    return best or _patch(2 * rows, low_shape, high_shape, kernel, stride, padding)
