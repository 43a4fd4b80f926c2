"""Putting the parts that many programs wrote together, in a fixed order: no atomics, the same bits every time."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgan.kernels.launch import launch, reduction_tile


class TileStatistics(NamedTuple):
    """Per tile of rows: how many, and per channel their mean and centred sum of squares M2, in float32."""

    count: torch.Tensor  # (tiles,)
    mean: torch.Tensor  # (tiles, C)
    m2: torch.Tensor  # (tiles, C)

    @classmethod
    def empty(cls, tiles, channels, device):
        shapes = (tiles,), (tiles, channels), (tiles, channels)
        return cls(*(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes))


@triton.jit
def merge_statistics_kernel(
    count_ptr,  # (T,)
    mean_ptr,  # (T, C)
    m2_ptr,  # (T, C)
    out_count_ptr,  # (programs along T,)
    out_mean_ptr,  # (programs along T, C)
    out_m2_ptr,
    invstd_ptr,  # (C,), (C,) or None: what the last merge gives
    var_ptr,
    eps,
    T,
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's rule over BLOCK_T tiles at once: M2 = Σ M2_i + Σ n_i (mean_i − mean)²."""
    pid_t = tl.program_id(0)
    t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    ok = (t < T)[:, None] & c_ok[None, :]
    cell = t[:, None] * C + c[None, :]
    count = tl.load(count_ptr + t, mask=t < T, other=0.0)
    mean = tl.load(mean_ptr + cell, mask=ok, other=0.0)
    m2 = tl.load(m2_ptr + cell, mask=ok, other=0.0)

    total = tl.sum(count, 0)
    # Averaging differences from the first tile's mean keeps the digits that averaging large means would lose.
    origin = tl.load(mean_ptr + pid_t * BLOCK_T * C + c, mask=c_ok, other=0.0)
    merged = origin + tl.sum(count[:, None] * (mean - origin[None, :]), 0) / tl.maximum(total, 1.0)
    offset = mean - merged[None, :]
    merged_m2 = tl.sum(m2 + count[:, None] * offset * offset, 0)

    tl.store(out_mean_ptr + pid_t * C + c, merged, mask=c_ok)
    if invstd_ptr is not None:
        tl.store(invstd_ptr + c, 1.0 / tl.sqrt_rn(merged_m2 / total + eps), mask=c_ok)
        tl.store(var_ptr + c, merged_m2 / tl.maximum(total - 1.0, 1.0), mask=c_ok)
    else:
        tl.store(out_count_ptr + pid_t, total)
        tl.store(out_m2_ptr + pid_t * C + c, merged_m2, mask=c_ok)


def merge_statistics(tiles, eps):
    """TileStatistics of a whole batch → (mean, 1/sqrt(biased variance + eps), unbiased variance), each (C,) float32."""
    while True:
        count, channels = tiles.mean.shape
        block_t, block_c = reduction_tile(count, channels)
        programs = triton.cdiv(count, block_t)
        merged = TileStatistics.empty(programs, channels, tiles.mean.device)
        last = programs == 1
        invstd, var = (torch.empty_like(merged.mean[0]) if last else None for _ in range(2))
        launch(
            merge_statistics_kernel,
            (programs, triton.cdiv(channels, block_c)),
            *(*tiles, *merged, invstd, var, eps, count, channels),
            device=tiles.mean.device,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
        )
        if last:
            return merged.mean.view(channels), invstd, var
        tiles = merged


@triton.jit
def sum_rows_kernel(
    x_ptr,  # (T, C)
    out_ptr,  # (programs along T, C)
    T,
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid_t = tl.program_id(1)
    t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.load(
        x_ptr + t[:, None].to(tl.int64) * C + c[None, :], mask=(t < T)[:, None] & (c < C)[None, :], other=0.0
    ).to(tl.float32)
    tl.store(out_ptr + pid_t * C + c, tl.sum(x, 0).to(out_ptr.dtype.element_ty), mask=c < C)


def sum_rows(parts, out):
    """out (C,) = the sum over the rows of parts (T, C) float32, rounded once to out's dtype."""
    while True:
        count, columns = parts.shape
        block_t, block_c = reduction_tile(count, columns)
        programs = triton.cdiv(count, block_t)
        # More rows than one program takes: sum in stages.
        target = out if programs == 1 else parts.new_empty((programs, columns))
        launch(
            sum_rows_kernel,
            (triton.cdiv(columns, block_c), programs),
            *(parts, target, count, columns),
            device=parts.device,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
        )
        if programs == 1:
            return
        parts = target
