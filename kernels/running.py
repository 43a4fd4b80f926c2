"""The running statistics of a BatchNorm in training."""

import triton
import triton.language as tl

from fastgan.kernels.launch import cdiv, launch
from fastgan.kernels.pieces import wait_for_previous

BLOCK = 256


@triton.jit
def _moved(running, batch_ptr, GROUPS: tl.constexpr, c, c_ok, C, momentum):
    for group in range(GROUPS):
        batch = tl.load(batch_ptr + group * C + c, mask=c_ok, other=0.0)
        running = running * (1.0 - momentum) + batch * momentum  # of both in full, whichever is the larger
    return running


@triton.jit
def update_running_kernel(
    running_mean_ptr,  # (C,), running_var too; any floating dtype
    running_var_ptr,
    mean_ptr,  # (groups, C) float32, var too
    var_ptr,
    batches_ptr,  # one int64, or None
    momentum,
    C,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c_ok = c < C
    mean = tl.load(running_mean_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    var = tl.load(running_var_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    mean = _moved(mean, mean_ptr, GROUPS, c, c_ok, C, momentum)
    var = _moved(var, var_ptr, GROUPS, c, c_ok, C, momentum)
    if batches_ptr is not None and tl.program_id(0) == 0:
        batches = tl.load(batches_ptr) + GROUPS
        tl.debug_barrier()  # all warps read it, one writes
        tl.store(batches_ptr, batches)
    tl.store(running_mean_ptr + c, mean.to(running_mean_ptr.dtype.element_ty), mask=c_ok)
    tl.store(running_var_ptr + c, var.to(running_var_ptr.dtype.element_ty), mask=c_ok)


def update_running(running_mean, running_var, mean, var, batches, momentum):
    """running ← (1 − momentum)·running + momentum·batch, in place, for each group of the batch in turn.

    Args:
        running_mean, running_var: (C,), contiguous.
        mean, var: (groups, C) float32: the batch's mean and unbiased variance.
        batches: 0-dim int64 that counts them, or None.
        momentum: weight of a new batch.
    """
    groups, channels = mean.shape
    launch(
        update_running_kernel,
        (cdiv(channels, BLOCK),),
        *(running_mean, running_var, mean, var, batches, momentum, channels),
        device=mean.device,
        GROUPS=groups,
        BLOCK=BLOCK,
    )
