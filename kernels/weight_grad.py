"""The weight's gradient of a convolution (low is the output's gradient) and of a transposed one (low is the input)."""

import torch
import triton
import triton.language as tl

from fastgan.kernels.launch import geometry, launch, matrix_tile, needs_int64
from fastgan.kernels.statistics import sum_rows

WANTED_PROGRAMS = 512  # a few for each multiprocessor of a large GPU
FEWEST_STEPS = 4  # a program with fewer steps than this costs more in partial sums than it gains


@triton.jit
def weight_grad_kernel(
    low_ptr,  # (N, H, W, A)
    high_ptr,  # (N, Ho, Wo, B)
    grad_ptr,  # (splits, *weight): weight's (A, B, KH, KW) by strides
    N,
    H,
    W,
    Ho,
    Wo,
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
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles: tl.constexpr = (B + BLOCK_N - 1) // BLOCK_N
    pid_n, pid_m = tl.program_id(0) % column_tiles, tl.program_id(0) // column_tiles
    tap, split = tl.program_id(1), tl.program_id(2)
    tap_h, tap_w = tap // KW, tap % KW
    a = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = N * H * W

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        row = (split * steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        row_ok = row < rows
        n, low_h, low_w = row // (H * W), row % (H * W) // W, row % W
        if INT64:
            n = n.to(tl.int64)
        high_h, high_w = low_h * SH - PH + tap_h, low_w * SW - PW + tap_w
        inside = row_ok & (high_h >= 0) & (high_h < Ho) & (high_w >= 0) & (high_w < Wo)
        low_row = ((n * H + low_h) * W + low_w) * A
        high_row = ((n * Ho + high_h) * Wo + high_w) * B
        x = tl.load(low_ptr + low_row[None, :] + a[:, None], mask=row_ok[None, :] & (a < A)[:, None], other=0.0)
        y = tl.load(high_ptr + high_row[:, None] + b[None, :], mask=inside[:, None] & (b < B)[None, :], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)

    offset = split * stride_split + tap_h * stride_wh + tap_w * stride_ww
    tl.store(
        grad_ptr + offset + a[:, None] * stride_wa + b[None, :] * stride_wb,
        acc.to(grad_ptr.dtype.element_ty),
        mask=(a < A)[:, None] & (b < B)[None, :],
    )


def weight_grad(low, high, weight, *, stride, padding, precision, tile=None):
    """The gradient with respect to `weight`, in its dtype and memory layout.

    The sum over all positions is split among programs where the weight alone has too few tiles for a GPU; a second
    launch adds the parts in a fixed order, so the result does not depend on timing.

    Args:
        low: (N, A, H, W) channels_last.
        high: (N, B, Ho, Wo) channels_last.
        weight: (A, B, KH, KW), read for its shape, strides and dtype only.
        tile: a MatrixTile, or None for an untuned one.
    """
    (n, a, h, w), (_, b, kh, kw) = low.shape, weight.shape
    grad = torch.empty_like(weight)
    tile = tile or matrix_tile(a, b, n * h * w, low.dtype)
    tiles = triton.cdiv(a, tile.block_m) * triton.cdiv(b, tile.block_n)
    blocks = triton.cdiv(n * h * w, tile.block_k)
    splits = max(1, min(WANTED_PROGRAMS // (tiles * kh * kw), blocks // FEWEST_STEPS))
    steps = triton.cdiv(blocks, splits)
    parts = grad if splits == 1 else torch.empty((1, splits, grad.numel()), dtype=torch.float32, device=grad.device)
    launch(
        weight_grad_kernel,
        (tiles, kh * kw, splits),
        *(low, high, parts),
        *(n, h, w, *high.shape[2:], steps, grad.numel(), *grad.stride()),
        device=low.device,
        PRECISION=precision,
        INT64=needs_int64(low, high),
        **geometry(weight, stride, padding),
        **tile.options(),
    )
    if splits > 1:
        sum_rows(parts, out=grad.as_strided((1, grad.numel()), (0, 1)))
    return grad
