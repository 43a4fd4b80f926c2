"""BatchNorm + activation of a tensor whose statistics are already known, and its backward."""

import torch
from torch import Tensor

from fastgan.ops.implementations import channels_last


@torch.library.custom_op("fastgan::batch_norm_act", mutates_args=())
def batch_norm_act(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    batch_statistics: bool,
    activation: str | None,
    slope: float,
) -> Tensor:
    """act(γ·(y − mean)·invstd + β), differentiable in y, γ and β.

    mean and invstd are (C,), or (groups, C) for a batch of that many equal parts with statistics of their own.
    With `batch_statistics` they are y's own, and y's gradient is the one through them as well;
    otherwise they are constants.
    """
    from fastgan.kernels.batch_norm import normalize_activate

    return normalize_activate(channels_last(y), mean, invstd, gamma, beta, activation=activation, slope=slope)


@batch_norm_act.register_fake
def _(y, mean, invstd, gamma, beta, batch_statistics, activation, slope):
    return torch.empty_like(y, memory_format=torch.channels_last)


@torch.library.custom_op("fastgan::batch_norm_act_grad", mutates_args=())
def batch_norm_act_grad(
    dout: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    batch_statistics: bool,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """(dy, [dβ, dγ] of each group); the second is (groups, 2, C) float32."""
    from fastgan.kernels.batch_norm import batch_norm_grad

    return batch_norm_grad(
        channels_last(dout),
        channels_last(y),
        mean,
        invstd,
        gamma,
        beta,
        activation=activation,
        slope=slope,
        batch_statistics=batch_statistics,
    )


@batch_norm_act_grad.register_fake
def _(dout, y, mean, invstd, gamma, beta, batch_statistics, activation, slope):
    dy = torch.empty_like(y, memory_format=torch.channels_last)
    return dy, y.new_empty((mean.numel() // y.shape[1], 2, y.shape[1]), dtype=torch.float32)


def _save(ctx, inputs, output):
    *tensors, ctx.batch_statistics, ctx.activation, ctx.slope = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    y, mean, invstd, gamma, beta = ctx.saved_tensors
    dy, sums = batch_norm_act_grad(dout, y, mean, invstd, gamma, beta, ctx.batch_statistics, ctx.activation, ctx.slope)
    sums = sums.sum(0) if len(sums) > 1 else sums[0]
    dgamma = sums[1].to(gamma.dtype) if ctx.needs_input_grad[3] else None
    dbeta = sums[0].to(beta.dtype) if ctx.needs_input_grad[4] else None
    return dy, None, None, dgamma, dbeta, None, None, None


batch_norm_act.register_autograd(_backward, setup_context=_save)
