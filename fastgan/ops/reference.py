"""Convolution + BatchNorm + activation in plain torch: what the kernels are tested against."""

import torch
from torch.nn import functional as F

from fastgan import backend
from fastgan.ops.running import lerp_running


def conv_bn_act_reference(x, weight, bias, gamma, beta, running_mean, running_var, layer):
    """What the operators of a `fastgan.ops.layer_spec.LayerSpec` compute."""
    if layer.transposed:
        y = F.conv_transpose2d(x, weight, bias, layer.stride, layer.padding, layer.output_padding)
    else:
        y = F.conv2d(x, weight, bias, layer.stride, layer.padding)
    y = activate_(y, *layer.before())
    if layer.batch_norm:
        training, momentum, eps = layer.batch_statistics, layer.momentum, layer.eps
        if training and layer.process_group is not None:
            from fastgan.ops import synchronised  # imports Dynamo, which takes as long as torch itself

            shared = (layer.batch_groups, layer.process_group)
            y, mean, var = synchronised.batch_norm_reference(y, gamma, beta, eps, *shared)
            if running_mean is not None:
                lerp_running(running_mean, running_var, mean, var, momentum)
            return activate_(y, *layer.after())
        parts = y.chunk(layer.batch_groups) if training else (y,)
        # In order, because each part updates the running statistics.
        parts = [F.batch_norm(p, running_mean, running_var, gamma, beta, training, float(momentum), eps) for p in parts]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return activate_(y, *layer.after())


def activate_(y, activation, negative_slope):
    """The activation, in place: nothing else needs the result of a convolution or a BatchNorm.

    Not leaky_relu: backward would then need the result, which others may change in place, as they may stock's. Not
    where a dispatch mode may keep what went in, and not within torch.func's transforms: linearize takes the result for
    a constant.
    """
    if activation == "leaky_relu":
        return F.leaky_relu(y, negative_slope)
    if activation is None:
        return y
    in_place = "" if backend.transformed() or backend.has_dispatch_mode() else "_"
    return getattr(torch, activation + in_place)(y)


def activation_backward(grad, out, activation, negative_slope):
    """grad · act'(z) from out = act(z), by what PyTorch's own backward consists of; differentiable as that is."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, out, 0)
    if activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(grad, out, negative_slope, True)
    if activation == "tanh":
        return torch.ops.aten.tanh_backward(grad, out)
    return grad if activation is None else torch.ops.aten.sigmoid_backward(grad, out)
