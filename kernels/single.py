"""high → low where low has one channel: the layer that ends a discriminator with a logit for each image or patch.

As a matrix product (down.py) it would fill one of the matrix unit's sixteen columns, and with a few images run on a few
multiprocessors only. Here a program multiplies and adds the long vectors of a row or a few as they come from memory.
"""

import triton
import triton.language as tl

from fastgan.kernels.launch import FEWEST_READERS, MatrixTile, cdiv, clamped_power_of_2, geometry, launch, needs_int64
from fastgan.kernels.pieces import conv_epilogue, wait_for_previous

ONE_COLUMN = 1  # as block_n: a tile of this kernel's

# What a tuner may try, as `launch.TILES`, for operands of any size.
TILES = (
    MatrixTile(1, ONE_COLUMN, 1024, 4, 3),
    MatrixTile(1, ONE_COLUMN, 2048, 8, 3),
    MatrixTile(2, ONE_COLUMN, 1024, 4, 3),
    MatrixTile(4, ONE_COLUMN, 1024, 8, 3),
    MatrixTile(8, ONE_COLUMN, 512, 8, 3),
)


@triton.jit
def down_single_kernel(
    high_ptr,  # (N, HO, WO, B)
    weight_ptr,  # (1, KH, KW, B)
    low_ptr,  # (N, H, W, 1)
    bias_ptr,  # (1,) or None
    mean_ptr,  # (1,) or None: the statistics of an eval-mode BatchNorm, and its parameters
    var_ptr,
    gamma_ptr,
    beta_ptr,
    eps,
    rows,
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
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    n, base_h, base_w = row // (H * W), row % (H * W) // W * SH - PH, row % W * SW - PW
    if INT64:
        n = n.to(tl.int64)
    high_offset = ((n * HO + base_h) * WO + base_w) * B
    whole_image: tl.constexpr = KH == HO and KW == WO and H * W == 1 and PH == 0 and PW == 0

    depth: tl.constexpr = KH * KW * B
    lane = tl.arange(0, BLOCK_K)
    products = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in tl.range((depth + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):  # it waits for memory: read ahead
        k = step * BLOCK_K + lane
        k_ok = k < depth
        inside = row_ok[:, None] & k_ok[None, :]
        if not whole_image:
            in_h, in_w = base_h[:, None] + (k // (KW * B))[None, :], base_w[:, None] + (k // B % KW)[None, :]
            inside = inside & (in_h >= 0) & (in_h < HO) & (in_w >= 0) & (in_w < WO)
        high_step = k // (KW * B) * (WO * B) + k % (KW * B)
        y = tl.load(high_ptr + (high_offset[:, None] + high_step[None, :]), mask=inside, other=0.0)
        w = tl.load(weight_ptr + k, mask=k_ok, other=0.0)
        products += y.to(tl.float32) * w.to(tl.float32)[None, :]

    column = tl.arange(0, 1)
    column_ok = column < A
    out = tl.sum(products, 1)[:, None]
    out = conv_epilogue(
        out, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, column, column_ok, ACTIVATION, SLOPE
    )
    if INT64:
        row = row.to(tl.int64)
    tl.store(low_ptr + (row[:, None] + column[None, :]), out.to(low_ptr.dtype.element_ty), mask=row_ok[:, None])


def down_single(high, weight, low, *, stride, padding, bias, batch_norm, eps, activation, slope, tile=None):
    """down() into `low` of one channel; `tile`: one of this kernel's, or of down's own, which means nothing here."""
    rows, depth = low.numel(), weight.numel()
    if tile is None or tile.block_n != ONE_COLUMN:
        block_k = clamped_power_of_2(depth, 16, 2048)
        block_m = clamped_power_of_2(rows // FEWEST_READERS, 1, 4)
        tile = MatrixTile(block_m, ONE_COLUMN, block_k, 8 if block_k > 1024 else 4, 3)
    launch(
        down_single_kernel,
        (cdiv(rows, tile.block_m),),
        *(high, weight, low, bias, *batch_norm, eps, rows),
        device=high.device,
        num_warps=tile.num_warps,
        ACTIVATION=activation,
        SLOPE=slope,
        INT64=needs_int64(low, high),
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        STAGES=tile.num_stages,
        **geometry(low, weight, high, stride, padding),
    )
