"""BatchNorm's element-wise passes with the activation in them, and the sums that its backward needs.

All of them see an (N, C, H, W) channels_last tensor as a matrix of N·H·W rows and C columns. The batch can consist of
equal groups with statistics of their own: mean and invstd are (groups, C), and `rows` counts those of one group.
"""

import torch
import triton
import triton.language as tl

from fastgan.kernels.backward_epilogue import normalized_and_grad
from fastgan.kernels.launch import (
    MOST_PARTS,
    cdiv,
    empty_nhwc,
    launch,
    needs_int64,
    next_power_of_2,
    reduction_tile,
    rows_tile,
    warps_for,
)
from fastgan.kernels.pieces import (
    activate,
    channel_vector,
    column_sums,
    normalize,
    program_from_the_end,
    scale_and_shift,
    through_activation,
    wait_for_previous,
)
from fastgan.kernels.statistics import sum_rows

MOST_PROGRAMS = MOST_PARTS  # enough to fill a GPU, and no more than are summed up in one launch
BLOCK = 2048  # numbers of a program that sees no channels


@triton.jit
def cells(group, rows, row, column, C, INT64: tl.constexpr):
    """Offsets of a tile: `row` counts from the group's first."""
    if INT64:
        group, row = group.to(tl.int64), row.to(tl.int64)
    return (group * rows + row)[:, None] * C + column[None, :]


@triton.jit
def normalize_activate_kernel(
    y_ptr,  # (groups · rows, C)
    mean_ptr,  # (groups, C), as invstd
    invstd_ptr,
    gamma_ptr,  # (C,), as beta, or None
    beta_ptr,
    out_ptr,  # (groups · rows, C)
    rows,
    C,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_previous()
    group = program_from_the_end(2)
    row = program_from_the_end(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < C
    ok = (row < rows)[:, None] & column_ok[None, :]
    cell = cells(group, rows, row, column, C, INT64)
    y = tl.load(y_ptr + cell, mask=ok, other=0.0).to(tl.float32)
    z = scale_and_shift(
        normalize(y, mean_ptr + group * C, invstd_ptr + group * C, column, column_ok),
        gamma_ptr,
        beta_ptr,
        column,
        column_ok,
    )
    tl.store(out_ptr + cell, activate(z, ACTIVATION, SLOPE).to(out_ptr.dtype.element_ty), mask=ok)


def group_rows(y, mean):
    """(groups, rows of one, channels) of y (N, C, H, W) with statistics (groups, C)."""
    channels = y.shape[1]
    groups = mean.numel() // channels
    return groups, y.numel() // (groups * channels), channels


def normalize_activate(y, mean, invstd, gamma, beta, *, activation, slope):
    """act(γ·(y − mean)·invstd + β) for y (N, C, H, W) channels_last.

    mean and invstd are (groups, C) for a batch of that many equal parts; gamma and beta (C,) or None.
    """
    return _like_y(normalize_activate_kernel, (y, mean, invstd, gamma, beta), y, mean, activation, slope)


def _like_y(kernel, arguments, y, mean, activation, slope):
    """Launch an element-wise pass over y, with statistics like `mean`, that writes a tensor like y, and return that."""
    out = empty_nhwc(y.shape, y)
    groups, rows, channels = group_rows(y, mean)
    block_r, block_c = rows_tile(rows, channels)
    launch(
        kernel,
        (cdiv(rows, block_r), cdiv(channels, block_c), groups),
        *(*arguments, out, rows, channels),
        device=y.device,
        ACTIVATION=activation,
        SLOPE=slope,
        INT64=needs_int64(y),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
    return out


@triton.jit
def batch_norm_grad_sums_kernel(
    grad_ptr,  # (groups · rows, C)
    y_ptr,  # (groups · rows, C)
    mean_ptr,  # (groups, C), as invstd
    invstd_ptr,
    gamma_ptr,  # (C,), as beta, or None
    beta_ptr,
    dz_ptr,  # None, or where to write dz: (groups · rows, C), grad's own memory allowed
    sums_ptr,  # (groups, programs along rows, 2, C): Σ dz and Σ dz·x̂ of each program's rows
    rows,
    C,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_previous()
    pid_r, group = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < C
    # Summed over the rows of a block only at the end: in the loop that would keep the next loads waiting.
    sum_dz = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_dz_x_hat = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for block in tl.range(BLOCKS, num_stages=3):  # three blocks on their way: it waits for memory, not for sums
        row = (pid_r * BLOCKS + block) * BLOCK_R + tl.arange(0, BLOCK_R)
        ok = (row < rows)[:, None] & column_ok[None, :]
        cell = cells(group, rows, row, column, C, INT64)
        x_hat, dz = normalized_and_grad(
            tl.load(grad_ptr + cell, mask=ok, other=0.0).to(tl.float32),
            y_ptr,
            cell,
            ok,
            mean_ptr + group * C,
            invstd_ptr + group * C,
            gamma_ptr,
            beta_ptr,
            column,
            column_ok,
            ACTIVATION,
            SLOPE,
        )
        if dz_ptr is not None:
            tl.store(dz_ptr + cell, dz.to(dz_ptr.dtype.element_ty), mask=ok)
        sum_dz += dz
        sum_dz_x_hat += dz * x_hat
    sums_ptr += (group * tl.num_programs(0) + pid_r) * 2 * C
    tl.store(sums_ptr + column, column_sums(sum_dz), mask=column_ok)
    tl.store(sums_ptr + C + column, column_sums(sum_dz_x_hat), mask=column_ok)


@triton.jit
def batch_norm_input_grad_kernel(
    grad_ptr,  # (groups · rows, C)
    y_ptr,  # (groups · rows, C)
    mean_ptr,  # (groups, C), as invstd
    invstd_ptr,
    gamma_ptr,  # (C,), as beta, or None
    beta_ptr,
    sums_ptr,  # (groups, 2, C): Σ dz and Σ dz·x̂ over a group's rows, or None where mean and invstd are constants
    count_ptr,  # (groups,) float32: how many rows those are, or None: `rows`
    out_ptr,  # (groups · rows, C)
    rows,
    C,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dy = γ·invstd·(dz − Σdz/M − x̂·Σ(dz·x̂)/M), without the two means where the statistics are constants."""
    wait_for_previous()
    group = program_from_the_end(2)
    row = program_from_the_end(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < C
    ok = (row < rows)[:, None] & column_ok[None, :]
    cell = cells(group, rows, row, column, C, INT64)
    mean_ptr += group * C
    invstd_ptr += group * C
    grad = tl.load(grad_ptr + cell, mask=ok, other=0.0).to(tl.float32)
    x_hat, dy = normalized_and_grad(
        grad, y_ptr, cell, ok, mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, column, column_ok, ACTIVATION, SLOPE
    )
    if sums_ptr is not None:
        sums_ptr += group * 2 * C
        count = tl.full((1,), 0.0, tl.float32)
        if count_ptr is None:
            count += rows
        else:
            count += tl.load(count_ptr + group)
        mean_dz = channel_vector(sums_ptr, column, column_ok, 0.0) / count
        mean_dz_x_hat = channel_vector(sums_ptr + C, column, column_ok, 0.0) / count
        dy = dy - mean_dz - x_hat * mean_dz_x_hat
    dy = dy * channel_vector(invstd_ptr, column, column_ok, 1.0)
    if gamma_ptr is not None:
        dy = dy * channel_vector(gamma_ptr, column, column_ok, 1.0)
    tl.store(out_ptr + cell, dy.to(out_ptr.dtype.element_ty), mask=ok)


def batch_norm_grad(grad, y, mean, invstd, gamma, beta, *, activation, slope, batch_statistics):
    """The backward of `normalize_activate`.

    Args:
        grad, y: (N, C, H, W) channels_last: the gradient of its output, and its input.
        mean, invstd: (groups, C) for a batch of that many equal parts; gamma, beta: (C,) or None.
        batch_statistics: whether mean and invstd are y's own, so that the gradient flows through them.

    Returns:
        dy (N, C, H, W) channels_last in y's dtype; sums (groups, 2, C) float32, each group's part of dβ and dγ.
    """
    tensors, act = (grad, y, mean, invstd, gamma, beta), dict(activation=activation, slope=slope)
    sums = batch_norm_grad_sums(*tensors, **act)
    return batch_norm_input_grad(*tensors, sums if batch_statistics else None, **act), sums


def batch_norm_grad_sums(grad, y, mean, invstd, gamma, beta, *, activation, slope, dz=None):
    """[Σ dz, Σ dz·x̂] of each group and channel, (groups, 2, C) float32; see `batch_norm_grad`.

    dz: None, or a tensor like grad, also grad itself, to write dz to.
    """
    groups, rows, channels = group_rows(y, mean)
    block_r, block_c = reduction_tile(rows, channels)
    most = max(1, MOST_PROGRAMS // (groups * cdiv(channels, block_c)))
    blocks = next_power_of_2(cdiv(rows, block_r * most))
    programs = cdiv(rows, block_r * blocks)
    parts = torch.empty((groups, programs, 2 * channels), dtype=torch.float32, device=y.device)
    launch(
        batch_norm_grad_sums_kernel,
        (programs, cdiv(channels, block_c), groups),
        *(grad, y, mean, invstd, gamma, beta, dz, parts, rows, channels),
        device=y.device,
        num_warps=warps_for(block_r, block_c),
        ACTIVATION=activation,
        SLOPE=slope,
        INT64=needs_int64(y),
        BLOCKS=blocks,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
    sums = torch.empty((groups, 2 * channels), dtype=torch.float32, device=y.device)
    sum_rows(parts, out=sums)
    return sums.view(groups, 2, channels)


def batch_norm_input_grad(grad, y, mean, invstd, gamma, beta, sums, count=None, *, activation, slope):
    """dy of `batch_norm_grad`; sums: as `batch_norm_grad_sums` gives them, or None for constant statistics.

    `count`, (groups,) float32, says of how many rows the statistics and the sums are, if of more than are here.
    """
    arguments = (grad, y, mean, invstd, gamma, beta, sums, count)
    return _like_y(batch_norm_input_grad_kernel, arguments, y, mean, activation, slope)


@triton.jit
def activation_input_grad_kernel(
    grad_ptr,
    out_ptr,
    dz_ptr,
    elements,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    pid = program_from_the_end(0)
    if INT64:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    ok = i < elements
    grad = tl.load(grad_ptr + i, mask=ok, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + i, mask=ok, other=0.0).to(tl.float32)
    dz = through_activation(grad, out, ACTIVATION, SLOPE)
    tl.store(dz_ptr + i, dz.to(dz_ptr.dtype.element_ty), mask=ok)


def activation_input_grad(grad, out, *, activation, slope):
    """grad · act'(z) where out = act(z); both (N, C, H, W) channels_last."""
    dz = empty_nhwc(out.shape, out)
    launch(
        activation_input_grad_kernel,
        (cdiv(out.numel(), BLOCK),),
        *(grad, out, dz, out.numel()),
        device=out.device,
        ACTIVATION=activation,
        SLOPE=slope,
        INT64=needs_int64(out),
        BLOCK=BLOCK,
    )
    return dz
