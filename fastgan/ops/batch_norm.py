"""BatchNorm + activation of a tensor whose statistics are already known, and its backward."""

import functools

import torch
from torch import Tensor

from fastgan.backend import is_batched
from fastgan.ops.implementations import channels_last
from fastgan.ops.operators import operator
from fastgan.ops.reference import activation_backward
from fastgan.wanted import differentiable, refuse_second_order


@operator("fastgan::batch_norm_act")
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


@operator("fastgan::batch_norm_act_grad")
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
    return torch.empty_like(y, memory_format=torch.channels_last), _carrier(y, mean)


@operator("fastgan::batch_norm_act_carrier")
def batch_norm_act_carrier(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """`batch_norm_act` with batch statistics, and a carrier for the one operator that takes the result.

    That operator takes over a part of the backward: what comes back to the result act(z) is the gradient for z, dz, and
    to the carrier, (groups, 2, C) float32 without meaning, [Σ dz, Σ dz·x̂]. Without gradients of gradients: see
    `fastgan.first_order`.
    """
    from fastgan.kernels.batch_norm import normalize_activate

    act = dict(activation=activation, slope=slope)
    return normalize_activate(channels_last(y), mean, invstd, gamma, beta, **act), _carrier(y, mean)


@batch_norm_act_carrier.register_fake
def _(y, mean, invstd, gamma, beta, activation, slope):
    return torch.empty_like(y, memory_format=torch.channels_last), _carrier(y, mean)


def _carrier(y, mean):
    return y.new_empty((mean.numel() // y.shape[1], 2, y.shape[1]), dtype=torch.float32)


@operator("fastgan::batch_norm_grad_of_sums")
def batch_norm_grad_of_sums(
    dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None, sums: Tensor
) -> Tensor:
    """dy of BatchNorm with batch statistics from dz, the gradient of its result, and [Σ dz, Σ dz·x̂]."""
    from fastgan.kernels.batch_norm import batch_norm_input_grad

    tensors = (channels_last(dz), channels_last(y), mean, invstd, gamma)
    return batch_norm_input_grad(*tensors, None, sums, activation=None, slope=0.0)


@batch_norm_grad_of_sums.register_fake
def _(dz, y, mean, invstd, gamma, sums):
    return torch.empty_like(y, memory_format=torch.channels_last)


def differentiable_grad(dout, y, mean, invstd, gamma, beta, batch_statistics, activation, slope):
    """`batch_norm_act_grad` in plain torch, computed in float32 and differentiable in dout, y, γ and β."""
    channels = y.shape[1]
    groups = mean.numel() // channels

    def in_groups(tensor):
        return tensor.float().view(groups, -1, *tensor.shape[1:])  # (groups, N / groups, C, H, W)

    def of_channel(vector):
        return vector.float().reshape(-1, 1, channels, 1, 1)

    over_batch = dict(dim=(1, 3, 4), keepdim=True)
    wide, mean, invstd = in_groups(y), of_channel(mean), of_channel(invstd)
    if batch_statistics:
        # Their values stay what forward used; as functions of y they are made anew. What invstd holds beside y's own
        # variance, eps above all, is a constant.
        own_var, own_mean = torch.var_mean(wide, correction=0, **over_batch)
        mean = mean + (own_mean - own_mean.detach())
        invstd = (own_var + (invstd**-2 - own_var.detach())).rsqrt()
    x_hat = (wide - mean) * invstd
    scale = 1.0 if gamma is None else of_channel(gamma)
    z = x_hat * scale if beta is None else x_hat * scale + of_channel(beta)
    out = getattr(torch, activation)(z) if activation in ("tanh", "sigmoid") else z  # the others' signs will do
    dz = activation_backward(in_groups(dout), out, activation, slope)
    dx_hat = dz
    if batch_statistics:
        dx_hat = dz - dz.mean(**over_batch) - x_hat * (dz * x_hat).mean(**over_batch)
    dy = (dx_hat * invstd * scale).reshape(y.shape).to(y.dtype)
    return dy, torch.stack([dz.sum((1, 3, 4)), (dz * x_hat).sum((1, 3, 4))], 1)


def _save(ctx, inputs, output):
    *tensors, ctx.batch_statistics, ctx.activation, ctx.slope = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    y, mean, invstd, gamma, beta = ctx.saved_tensors
    # With create_graph=True the gradient is to have one of its own; the kernels have none, plain torch does.
    plain = torch.is_grad_enabled() or is_batched(dout)
    backward = differentiable_grad if plain else batch_norm_act_grad
    dy, sums = backward(dout, y, mean, invstd, gamma, beta, ctx.batch_statistics, ctx.activation, ctx.slope)
    grads = dy, *vector_grads(sums, gamma, beta, *ctx.needs_input_grad[3:5])
    dy, dgamma, dbeta = [differentiable(grad, y, gamma, beta) for grad in grads]
    return dy, None, None, dgamma, dbeta, None, None, None


def vector_grads(sums, gamma, beta, wants_gamma, wants_beta):
    """(dγ, dβ) from [Σ dz, Σ dz·x̂] of each group; None where not wanted."""
    # One group or two: a sum over them takes twice the time of adding them.
    dbeta, dgamma = functools.reduce(torch.add, sums).unbind()
    return dgamma.to(gamma.dtype) if wants_gamma else None, dbeta.to(beta.dtype) if wants_beta else None


batch_norm_act.register_autograd(_backward, setup_context=_save)


def _save_carrier(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])


def _carrier_backward(ctx, dz, sums):
    refuse_second_order("fused layers that ran in a TrainStep")
    y, mean, invstd, gamma, beta = ctx.saved_tensors
    dy = batch_norm_grad_of_sums(dz, y, mean, invstd, gamma, sums)
    return dy, None, None, *vector_grads(sums, gamma, beta, *ctx.needs_input_grad[3:5]), None, None


batch_norm_act_carrier.register_autograd(_carrier_backward, setup_context=_save_carrier)
