"""The epilogue of a convolution as a pass of its own, for a convolution that another library computed."""

import triton
import triton.language as tl

from fastgan.kernels.launch import cdiv, launch, needs_int64, rows_tile, warps_for
from fastgan.kernels.pieces import conv_epilogue, program_from_the_end, wait_for_previous


@triton.jit
def conv_epilogue_kernel(
    y_ptr,  # (rows, C), changed in place
    bias_ptr,  # (C,) or None, as all that follow; no mean means no BatchNorm
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    eps,
    rows,
    C,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_previous()
    row = program_from_the_end(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < C
    ok = (row < rows)[:, None] & column_ok[None, :]
    if INT64:
        row = row.to(tl.int64)
    cell = row[:, None] * C + column[None, :]
    y = tl.load(y_ptr + cell, mask=ok, other=0.0).to(tl.float32)
    z = conv_epilogue(y, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, column, column_ok, ACTIVATION, SLOPE)
    tl.store(y_ptr + cell, z.to(y_ptr.dtype.element_ty), mask=ok)


def conv_epilogue_(y, *, bias, batch_norm, eps, activation, slope):
    """y ← act(BatchNorm(y + bias)) in place, for y (N, C, H, W) channels_last; see `up` for the arguments."""
    rows, channels = y.numel() // y.shape[1], y.shape[1]
    block_r, block_c = rows_tile(rows, channels)
    launch(
        conv_epilogue_kernel,
        (cdiv(rows, block_r), cdiv(channels, block_c)),
        *(y, bias, *batch_norm, eps, rows, channels),
        device=y.device,
        num_warps=warps_for(block_r, block_c),
        ACTIVATION=activation,
        SLOPE=slope,
        INT64=needs_int64(y),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
