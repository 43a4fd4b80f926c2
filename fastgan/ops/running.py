"""The running statistics of a BatchNorm in training, updated in place."""

import torch
from torch import Tensor

from fastgan.ops.operators import operator


@operator("fastgan::update_running", mutates_args=("running_mean", "running_var", "batches"))
def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, batches: Tensor | None, momentum: float
) -> None:
    """running ← (1 − momentum)·running + momentum·batch for each of the batch's groups in turn; no gradients.

    mean and the unbiased var are (groups, C) float32, as `conv_statistics` gives them; `batches`, a 0-dim int64, counts
    the groups.
    """
    from fastgan.kernels.running import update_running as kernel

    kernel(running_mean, running_var, mean, var, batches, momentum)


@update_running.register_fake
def _(running_mean, running_var, mean, var, batches, momentum):
    return None


@torch.no_grad()
def lerp_running(running_mean, running_var, mean, var, momentum):
    """`update_running` in plain torch: for a momentum that is a tensor, and statistics that are not contiguous."""
    for statistic, batch in ((running_mean, mean), (running_var, var)):
        for part in batch.to(statistic.dtype):  # lerp_ takes no other
            weight = momentum.to(statistic.dtype) if isinstance(momentum, torch.Tensor) else momentum
            statistic.lerp_(part, weight)
