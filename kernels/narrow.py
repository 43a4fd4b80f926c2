"""low → high where high has few channels: the layer that makes an image, and the gradient that reaches one.

As a matrix product for each phase (up.py) such a layer would read low once for every tap, to fill a few of the matrix
unit's columns. Here a program reads a patch of low once and multiplies it by all taps: column (t, c) is the t-th tap
of output c = (phase_h, slot), where the slots of a position are its outputs in one row of high, all channels. What
belongs to the neighbour at a distance of one position is then picked up from the neighbour's row of the product, and
the taps are summed.
"""

import triton
import triton.language as tl

from fastgan.kernels.launch import MatrixTile, geometry, launch, needs_int64, power_of_two
from fastgan.kernels.pieces import backward_epilogue, conv_epilogue, load_block, multiply_add, wait_for_previous

# What a tuner may try, as `launch.TILES`; block_n is the kernel's own affair.
TILES = {
    2: (MatrixTile(256, 16, 64, 8, 1), MatrixTile(128, 16, 64, 4, 1), MatrixTile(128, 16, 64, 8, 1)),
    4: (MatrixTile(256, 16, 32, 8, 1), MatrixTile(128, 16, 32, 4, 1), MatrixTile(128, 16, 32, 8, 1)),
}
MOST_CHANNELS = 8
MOST_COLUMNS = 128


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
    STEPS_H: tl.constexpr,  # powers of two that hold all taps of an output, all outputs of a position,
    STEPS_W: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SLOTS: tl.constexpr,  # and those in one row of high
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

    # Column (step_h, step_w, c): as in up.py, tap residue + stride·step of phase c's outputs reads position
    # q + carry − step, where carry = (phase + padding) div stride.
    column = tl.arange(0, STEPS_H * STEPS_W * OUTPUTS)
    phase_h, slot = column % OUTPUTS // SLOTS, column % SLOTS
    tap_h = (phase_h + PH) % SH + column // (STEPS_W * OUTPUTS) * SH
    tap_w = (slot // B + PW) % SW + column // OUTPUTS % STEPS_W * SW
    column_ok = (phase_h < SH) & (slot < SW * B) & (tap_h < KH) & (tap_w < KW)

    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    lane = tl.arange(0, BLOCK_K)
    low_offset = (((n * H + h) * W + w) * A)[:, None] + lane[None, :]
    # Columns first, so that threads side by side load them: those of one channel are neighbours in memory.
    weight_offset = ((tap_h * KW + tap_w) * B + slot % B)[:, None] + (lane * (KH * KW * B))[None, :]
    products = tl.zeros((POSITIONS, STEPS_H * STEPS_W * OUTPUTS), tl.float32)
    for a in range(0, A, BLOCK_K):
        a_ok = None if A % BLOCK_K == 0 else lane < A - a
        x = load_block(low_ptr + a + low_offset, inside, a_ok)
        y = load_block(weight_ptr + a * (KH * KW * B) + weight_offset, column_ok, a_ok)
        products = multiply_add(products, x, tl.trans(y), PRECISION)

    # An output is the sum over steps of what the positions there made for it. All in one dimension, because `gather`
    # then goes through shared memory: eight columns of all positions after eight others, which a warp writes without
    # bank conflicts. It gives one row of high after the other, which a warp reads without conflicts and stores side by
    # side, and the steps one after the other, so that a thread adds up its own. A position outside of the patch is
    # outside of the image too, or the output is another program's.
    STEPS: tl.constexpr = STEPS_H * STEPS_W
    place = tl.arange(0, STEPS * OUTPUTS * POSITIONS)
    slot, position = place % SLOTS, place // SLOTS % POSITIONS
    phase_h, step = place // (SLOTS * POSITIONS) % (OUTPUTS // SLOTS), place // (OUTPUTS * POSITIONS)
    from_h = position // PATCH_W + (phase_h + PH) // SH - step // STEPS_W
    from_w = position % PATCH_W + (slot // B + PW) // SW - step % STEPS_W
    there = (from_h >= 0) & (from_h < PATCH_H) & (from_w >= 0) & (from_w < PATCH_W)
    column = step * OUTPUTS + phase_h * SLOTS + slot
    source = column // 8 * (POSITIONS * 8) + (from_h * PATCH_W + from_w) * 8 + column % 8
    products = tl.permute(tl.reshape(products, (POSITIONS, STEPS * OUTPUTS // 8, 8)), (1, 0, 2))
    products = tl.reshape(products, (POSITIONS * STEPS * OUTPUTS,))
    products = tl.where(there, tl.gather(products, tl.where(there, source, 0), 0), 0.0)
    out = tl.sum(tl.reshape(products, (STEPS, OUTPUTS * POSITIONS)), 0)
    out = tl.reshape(out, (OUTPUTS // SLOTS * POSITIONS, SLOTS))

    row, slot = tl.arange(0, OUTPUTS // SLOTS * POSITIONS), tl.arange(0, SLOTS)
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


def is_narrow(weight, stride):
    """Whether all taps of all outputs of a position are few enough columns for one program."""
    sizes = _columns(weight, stride)
    columns = sizes["STEPS_H"] * sizes["STEPS_W"] * sizes["OUTPUTS"]
    return weight.shape[1] <= MOST_CHANNELS and columns <= MOST_COLUMNS


def up_narrow(
    low, weight, high, *, stride, padding, precision, bias, batch_norm, eps, activation, slope, activated, tile=None
):
    """up() into `high`, for layers that are narrow; of `tile`, block_m, block_k, warps and stages count."""
    tile = tile or MatrixTile(256, 0, power_of_two(low.shape[1], 16, 64 if low.dtype.itemsize == 2 else 32), 8, 1)
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
    """The powers of two that hold the taps of an output along each axis, and the outputs of a position."""
    (_, b, kh, kw), (sh, sw) = weight.shape, stride
    steps_h, steps_w = (triton.next_power_of_2(triton.cdiv(k, s)) for k, s in ((kh, sh), (kw, sw)))
    slots = triton.next_power_of_2(sw * b)
    outputs = max(triton.next_power_of_2(sh) * slots, 16 // (steps_h * steps_w))  # the least that matrix units take
    return dict(STEPS_H=steps_h, STEPS_W=steps_w, OUTPUTS=outputs, SLOTS=slots)


def _patch(rows, low_shape, high_shape, kernel, stride, padding):
    """The patch of `rows` positions that reads the least of low: ({its constants}, how many there are)."""
    best = None
    for width in (2**i for i in range(rows.bit_length())):
        sizes, patches, names = (rows // width, width), low_shape[0], {}
        for axis, name in enumerate("HW"):
            k, s, p, size = kernel[axis], stride[axis], padding[axis], sizes[axis]
            count = triton.cdiv(high_shape[2 + axis], s)
            before, after = (k - 1 - p) // s, (p + s - 1) // s  # how far an output reaches back and ahead
            before, after = max(before, 0), max(after, 0)
            if size >= max(count, low_shape[2 + axis]):  # the whole image: beyond it there is nothing to read
                before = after = 0
            inner = size - before - after
            if inner <= 0:
                break
            patches *= triton.cdiv(count, inner)
            names.update({f"PATCH_{name}": size, f"BEFORE_{name}": before, f"AFTER_{name}": after})
        else:
            if best is None or patches <= best[1]:  # of equals, the widest: its memory lies together
                best = names, patches
    return best or _patch(2 * rows, low_shape, high_shape, kernel, stride, padding)
