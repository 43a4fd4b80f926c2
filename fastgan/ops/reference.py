"""Convolution + BatchNorm + activation in plain torch: what the kernels are tested against."""

import torch
from torch.nn import functional as F

from fastgan import backend
from fastgan.ops.running import lerp_running


def conv_bn_act_reference(
    x,
    weight,
    bias,
    gamma,
    beta,
    running_mean,
    running_var,
    *,
    training,
    momentum,
    eps,
    transposed,
    stride,
    padding,
    output_padding,
    activation,
    negative_slope,
    activation_first,
    batch_groups,
    process_group,
):
    """`functional.conv2d_bn_act` and its transposed twin where no kernels run."""
    if transposed:
        y = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    else:
        y = F.conv2d(x, weight, bias, stride, padding)
    if activation_first:
        y = activate_(y, activation, negative_slope)
        activation = None
    if not (gamma is None and beta is None and running_mean is None and running_var is None):
        if training and process_group is not None:
            from fastgan.ops import synchronised  # imports Dynamo, which takes as long as torch itself

            y, mean, var = synchronised.batch_norm_reference(y, gamma, beta, eps, batch_groups, process_group)
            if running_mean is not None:
                lerp_running(running_mean, running_var, mean, var, momentum)
            return activate_(y, activation, negative_slope)
        parts = y.chunk(batch_groups) if training else (y,)
        # In order, because each part updates the running statistics.
        parts = [F.batch_norm(p, running_mean, running_var, gamma, beta, training, float(momentum), eps) for p in parts]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return activate_(y, activation, negative_slope)


def activate_(y, activation, negative_slope):
    """The activation, in place: nothing else needs the result of a convolution or a BatchNorm.

    Not leaky_relu: backward would then need the result, which others may change in place, as they may stock's. And not
    within torch.func's transforms: linearize takes the result for a constant.
    """
    if activation == "leaky_relu":
        return F.leaky_relu(y, negative_slope)
    if activation is None:
        return y
    in_place = "" if backend.transformed() else "_"
    return getattr(torch, activation + in_place)(y)
