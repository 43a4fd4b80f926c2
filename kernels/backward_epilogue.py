"""Epilogues of a gradient: back through an activation, and with the sums that a BatchNorm's backward needs."""

import triton
import triton.language as tl

from fastgan.kernels.pieces import (
    activate,
    channel_vector,
    column_sums,
    normalize,
    position,
    scale_and_shift,
    through_activation,
)


@triton.jit
def backward_epilogue(acc, activated_ptr, cell, ok, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """acc · act'(z), where act(z) stands at `cell`: a gradient on its way back through that activation."""
    activated = tl.load(activated_ptr + cell, mask=ok, other=0.0).to(tl.float32)
    return through_activation(acc, activated, ACTIVATION, SLOPE)


@triton.jit
def normalized_and_grad(
    grad,
    y_ptr,
    cell,
    ok,
    mean_ptr,
    invstd_ptr,
    gamma_ptr,
    beta_ptr,
    columns,
    column_ok,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """x̂ and dz = grad · act'(z) of a tile where z = γ·x̂ + β is BatchNorm of y at `cell`, both recomputed from y.

    dz is zero where grad is, as it is outside of the tile.
    """
    y = tl.load(y_ptr + cell, mask=ok, other=0.0).to(tl.float32)
    x_hat = normalize(y, mean_ptr, invstd_ptr, columns, column_ok)
    z = scale_and_shift(x_hat, gamma_ptr, beta_ptr, columns, column_ok)
    return x_hat, through_activation(grad, activate(z, ACTIVATION, SLOPE), ACTIVATION, SLOPE)


@triton.jit
def store_grad_and_sums(
    acc,
    out_ptr,  # (images, HEIGHT, WIDTH, COLUMNS), as y
    y_ptr,
    mean_ptr,
    invstd_ptr,
    gamma_ptr,
    beta_ptr,
    sums_ptr,  # (groups, 2, tiles, COLUMNS)
    group,
    tile,  # its number among `tiles` of the group
    tiles,
    vectors,  # of each column, its channel: where its mean, γ and so on are
    column,  # of the result
    column_ok,
    cell,  # offsets of the tile in out and y
    ok,
    first_image,  # of the group
    first_row,  # of the tile
    row_step,  # from one of its rows to the next
    rows,
    count_h,  # as `position` has them
    count_w,
    first_h,
    first_w,
    SH: tl.constexpr,
    SW: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACROSS_WARPS: tl.constexpr,  # how to add up over rows: see `column_sums`
    AGAIN: tl.constexpr,
):
    """Write dz of a tile, of the gradients in acc, and Σ dz and Σ dz·x̂ over its rows: see `normalized_and_grad`.

    Where y and what comes of it would not fit in registers beside the tile, the gradients are stored as they are, read
    again AGAIN rows at a time, and replaced by dz.
    """
    if AGAIN > 0:
        tl.store(out_ptr + cell, acc.to(out_ptr.dtype.element_ty), mask=ok)
        tl.debug_barrier()  # what other threads have stored
        mean = channel_vector(mean_ptr, vectors, column_ok, 0.0)
        invstd = channel_vector(invstd_ptr, vectors, column_ok, 1.0)
        gamma, beta = tl.full(mean.shape, 1.0, tl.float32), tl.zeros(mean.shape, tl.float32)
        if gamma_ptr is not None:
            gamma = channel_vector(gamma_ptr, vectors, column_ok, 1.0)
        if beta_ptr is not None:
            beta = channel_vector(beta_ptr, vectors, column_ok, 0.0)
        sum_dz = tl.zeros((AGAIN, BLOCK_N), tl.float32)
        sum_dz_x_hat = tl.zeros((AGAIN, BLOCK_N), tl.float32)
        for start in tl.range(0, BLOCK_M, AGAIN, num_stages=3):
            row = first_row + (start + tl.arange(0, AGAIN)) * row_step
            n, h, w = position(row, count_h, count_w, first_h, first_w, SH, SW)
            n += first_image
            if INT64:
                n = n.to(tl.int64)
            again = (((n * HEIGHT + h) * WIDTH + w) * COLUMNS)[:, None] + column[None, :]
            again_ok = (row < rows)[:, None] & column_ok[None, :]
            grad = tl.load(out_ptr + again, mask=again_ok, other=0.0).to(tl.float32)
            x_hat = (tl.load(y_ptr + again, mask=again_ok, other=0.0).to(tl.float32) - mean) * invstd
            activated = activate(gamma * x_hat + beta, ACTIVATION, SLOPE)
            dz = through_activation(grad, activated, ACTIVATION, SLOPE)
            tl.store(out_ptr + again, dz.to(out_ptr.dtype.element_ty), mask=again_ok)
            sum_dz += dz
            sum_dz_x_hat += dz * x_hat
        total_dz, total_dz_x_hat = column_sums(sum_dz), column_sums(sum_dz_x_hat)
    else:
        x_hat, dz = normalized_and_grad(
            acc, y_ptr, cell, ok, mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, vectors, column_ok, ACTIVATION, SLOPE
        )
        total_dz, total_dz_x_hat = column_sums(dz, ACROSS_WARPS), column_sums(dz * x_hat, ACROSS_WARPS)
        tl.store(out_ptr + cell, dz.to(out_ptr.dtype.element_ty), mask=ok)
    sums_ptr += (group * 2 * tiles + tile) * COLUMNS
    tl.store(sums_ptr + column, total_dz, mask=column_ok)
    tl.store(sums_ptr + tiles * COLUMNS + column, total_dz_x_hat, mask=column_ok)
