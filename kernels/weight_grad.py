"""The weight's gradient of a convolution (low is the output's gradient) and of a transposed one (low is the input).

It is the product of low's transpose (A, rows) with the (rows, KH·KW·B) patches of high, whose columns stand in the
order of a channels_last weight; the patches are gathered as they are needed, never written down.
"""

import torch
import triton
import triton.language as tl

from fastgan.kernels.launch import FEWEST_PROGRAMS, cdiv, geometry, launch, matrix_tile, needs_int64
from fastgan.kernels.patches import WHOLE_PATCH, block_constants, fits_patches
from fastgan.kernels.pieces import NOWHERE, load_block, multiply_add, wait_for_previous
from fastgan.kernels.statistics import sum_rows
from fastgan.kernels.weight_grad_narrow import narrow_tile, weight_grad_narrow_kernel

# 128×128 for each of an H100's 132 multiprocessors, times a tile's `share`: two such programs run there at once, and
# their sums fit the L2 cache.
WANTED_OUTPUTS = 132 * 128 * 128
FEWEST_STEPS = 4  # a program with fewer steps than this costs more in partial sums than it gains


@triton.jit
def weight_grad_kernel(
    low_ptr,  # (N, H, W, A)
    high_ptr,  # (N, HO, WO, B)
    grad_ptr,  # (splits, *weight): weight's (A, B, KH, KW) by strides
    N,
    steps,  # blocks of rows for each program
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
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous()
    # The tiles of the same rows run side by side, so that they share the rows in L2.
    patch: tl.constexpr = KH * KW * B
    column_tiles: tl.constexpr = (patch + BLOCK_N - 1) // BLOCK_N
    row_tiles: tl.constexpr = (A + BLOCK_M - 1) // BLOCK_M
    pid_n = tl.program_id(0) % column_tiles
    pid_m = tl.program_id(0) // column_tiles % row_tiles
    split = tl.program_id(0) // (column_tiles * row_tiles)
    a = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    a_ok = None if A % BLOCK_M == 0 else a < A
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tap_h, tap_w, b = column // (KW * B), column // B % KW, column % B
    high_column = tap_h * (WO * B) + column % (KW * B)
    rows = N * (H * W)
    if B % BLOCK_N == 0:  # all columns of the tile are of one tap
        shift_h, shift_w = pid_n * BLOCK_N // (KW * B) - PH, pid_n * BLOCK_N // B % KW - PW
    else:  # a column past the end reads nowhere, like a position outside of the image
        shift_h = tl.where(column < patch, tap_h - PH, NOWHERE)[None, :]
        shift_w = (tap_w - PW)[None, :]

    # Where blocks of rows and the image divide each other, a row's position is the block's plus one that never changes.
    aligned: tl.constexpr = (H * W % BLOCK_K == 0 or BLOCK_K % (H * W) == 0) and (W % BLOCK_K == 0 or BLOCK_K % W == 0)
    lane = tl.arange(0, BLOCK_K)
    low_offset = (lane * A)[None, :] + a[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        start = (split * steps + step) * BLOCK_K
        row_ok = lane < rows - start
        if aligned:
            block, row = start, lane
        else:
            block, row = start * 0, start + lane
        h, w = row % (H * W) // W * SH, row % W * SW
        high_offset = ((row // (H * W) * HO + h - PH) * WO + w - PW) * B
        block_n, block_h, block_w = block // (H * W), block % (H * W) // W * SH, block % W * SW
        if INT64:
            block_n, start = block_n.to(tl.int64), start.to(tl.int64)
            high_offset = (((row // (H * W)).to(tl.int64) * HO + h - PH) * WO + w - PW) * B
        block_offset = ((block_n * HO + block_h) * WO + block_w) * B
        high_h, high_w = h[:, None] + (block_h + shift_h), w[:, None] + (block_w + shift_w)
        inside = row_ok[:, None] & (high_h >= 0) & (high_h < HO) & (high_w >= 0) & (high_w < WO)
        x = load_block(low_ptr + start * A + low_offset, a_ok, row_ok)
        y = tl.load(
            high_ptr + block_offset + (high_offset[:, None] + high_column[None, :]),
            mask=inside,
            other=0.0,
        )
        acc = multiply_add(acc, x, y, PRECISION)

    offset = tap_h * stride_wh + tap_w * stride_ww + b * stride_wb
    tl.store(
        grad_ptr + split * stride_split + a[:, None] * stride_wa + offset[None, :],
        acc.to(grad_ptr.dtype.element_ty),
        mask=(a < A)[:, None] & (column < patch)[None, :],
    )


def weight_grad(low, high, weight, *, stride, padding, precision, tile=None):
    """The gradient with respect to `weight`, in its dtype and memory layout.

    The sum over all positions is split among programs where the weight alone has too few tiles for a GPU; a second
    launch adds the parts in a fixed order, so the result does not depend on timing.

    Args:
        low: (N, A, H, W) channels_last.
        high: (N, B, Ho, Wo) channels_last.
        weight: (A, B, KH, KW), read for its shape, strides and dtype only.
        tile: a MatrixTile of this kernel or, for a narrow layer, of weight_grad_narrow.py; or None for an untuned one.
    """
    (n, a, h, w), (_, b, kh, kw) = low.shape, weight.shape
    grad = torch.empty_like(weight)
    patches_fit = fits_patches(weight, w, high.shape[3])
    if tile is not None and tile.block_n == WHOLE_PATCH and not patches_fit:
        tile = None  # a tile of patches, which have no room here
    if tile is None and patches_fit:
        tile = narrow_tile(low)
    # With so many copies the tile's rows are not cut to have more programs: the sum is split for that, below.
    tile = tile or matrix_tile(a, kh * kw * b, n * h * w, low.dtype, copies=FEWEST_PROGRAMS)
    tiles = cdiv(a, tile.block_m)
    if tile.block_n == WHOLE_PATCH:
        constants = block_constants(tile.block_k, (h, w), weight, high, stride, padding)
        constants["DENSE"] = grad.stride() == (kh * kw * b, 1, kw * b, b)
        kernel, blocks = weight_grad_narrow_kernel, n * cdiv(h, constants["ROWS"])
        columns = constants["TAPS_H"] * constants["TAPS_W"]
    else:
        kernel, constants = weight_grad_kernel, dict(BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
        columns, blocks = tile.block_n, cdiv(n * h * w, tile.block_k)
        tiles *= cdiv(kh * kw * b, columns)
    wanted = tile.share * WANTED_OUTPUTS // (tiles * tile.block_m * columns)
    splits = max(1, min(wanted, blocks // FEWEST_STEPS))
    steps = cdiv(blocks, splits)
    parts = grad if splits == 1 else torch.empty((1, splits, grad.numel()), dtype=torch.float32, device=grad.device)
    launch(
        kernel,
        (tiles * splits,),
        *(low, high, parts, n, steps, grad.numel(), *grad.stride()),
        device=low.device,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        PRECISION=precision,
        INT64=needs_int64(low, high),
        BLOCK_M=tile.block_m,
        **constants,
        **geometry(low, weight, high, stride, padding),
    )
    if splits > 1:
        sum_rows(parts, out=grad.as_strided((1, grad.numel()), (0, 1)))
    return grad
