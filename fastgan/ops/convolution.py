"""Convolution and transposed convolution with bias, eval-mode BatchNorm and activation in one operator.

`conv` gives the activated result, `conv_statistics` the plain result with its batch statistics for a BatchNorm that
follows (see batch_norm.py). `transposed` chooses the direction; the input gradient of either is `conv` the other way.

The weight may have another dtype than x: float32 parameters under mixed precision. `weight_copy`, if given, holds the
same values in the dtype of x (somebody keeps them, to save a cast at each use), and the weight's gradient comes out in
the weight's own dtype, never rounded to x's.

Backward is made of these operators and of plain torch, each with a gradient of its own, so gradients of any order can
be had; except of layers that are linked (`fastgan.first_order`), whose backward has none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan.backend import is_batched
from fastgan.ops.choice import choose, conv_problem, weight_grad_problem, what_follows
from fastgan.ops.geometry import backward_conv_args, out_size, output_padding_for
from fastgan.ops.implementations import (
    channels_last,
    empty_result,
    in_dtype_of,
    run_conv,
    run_conv_statistics,
    run_weight_grad,
)
from fastgan.ops.input_grads import conv_activation_grad, conv_batch_norm_grad
from fastgan.ops.operators import as_operator, operator
from fastgan.ops.reference import activation_backward
from fastgan.wanted import differentiable, is_wanted, refuse_second_order

# Arguments of `conv` where there is no eval-mode BatchNorm: mean, var, gamma, beta, eps.
NO_BATCH_NORM = (None, None, None, None, 0.0)
# The last arguments of `conv` and `conv_statistics` where x is not the result of a linked layer: x_normalized,
# x_activation, x_slope.
ALONE = ([], None, 0.0)


def plain_conv(x, weight, weight_copy, transposed, stride, padding, output_padding, form=as_operator):
    """conv(x, weight) and nothing after it."""
    if is_batched(x, weight):
        weight = in_dtype_of(x, weight, weight_copy)
        return torch.convolution(x, weight, None, stride, padding, (1, 1), transposed, output_padding, 1)
    conv_args = (transposed, stride, padding, output_padding)
    return form(conv)(x, weight, weight_copy, None, *NO_BATCH_NORM, *conv_args, None, 0.0, *ALONE, False)


def weight_grad_of(x, dz, weight, transposed, stride, padding, form=as_operator):
    """The weight's gradient of a convolution of x, for the gradient dz of its result."""
    if is_batched(x, dz):
        extra = output_padding_for(dz.shape[2:], x.shape[2:], weight.shape[2:], transposed, stride, padding)
        options = (stride, padding, (1, 1), transposed, extra, 1)
        like = in_dtype_of(x, weight, None)
        grads = torch.ops.aten.convolution_backward(dz, x, like, None, *options, (False, True, False))
        return grads[1].to(weight.dtype)
    low, high = (x, dz) if transposed else (dz, x)
    return form(conv_weight_grad)(low, high, weight, stride, padding)


@operator("fastgan::conv")
def conv(
    x: Tensor,
    weight: Tensor,
    weight_copy: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    activation: str | None,
    slope: float,
    x_normalized: Sequence[Tensor],
    x_activation: str | None,
    x_slope: float,
    gets_dz: bool,
) -> Tensor:
    """act(γ·(y − mean)/sqrt(var + eps) + β) with y = conv(x, weight) + bias; no mean means no BatchNorm.

    Differentiable in x, weight and bias where there is no BatchNorm. The result is channels_last.

    Of two operators in a row the second can take over the activation's part of the first one's backward: `gets_dz` says
    that what comes back to this one is the gradient for z of its result act(z), and `x_activation`, `x_slope` that x is
    act(z) of such a one. Where x is a result of `batch_norm_act_carrier`, `x_normalized` is (y, mean, invstd, carrier),
    or (y, mean, invstd, carrier, gamma, beta), and takes over the sums of BatchNorm's backward, too. They then have no
    gradients of gradients (see `fastgan.first_order`).
    """
    size = out_size(x, weight, transposed, stride, padding, output_padding)
    then = what_follows(False, bias, mean, activation)
    problem = conv_problem(x, weight, transposed, stride, padding, size, then=then)
    return run_conv(
        choose(problem, x.device),
        x,
        in_dtype_of(x, weight, weight_copy),
        size,
        transposed=transposed,
        stride=stride,
        padding=padding,
        bias=bias,
        batch_norm=(mean, var, gamma, beta),
        eps=eps,
        activation=activation,
        slope=slope,
    )


@conv.register_fake
def _(
    x,
    weight,
    weight_copy,
    bias,
    mean,
    var,
    gamma,
    beta,
    eps,
    transposed,
    stride,
    padding,
    output_padding,
    activation,
    slope,
    x_normalized,
    x_activation,
    x_slope,
    gets_dz,
):
    return empty_result(x, weight, transposed, stride, padding, output_padding)


@operator("fastgan::conv_statistics")
def conv_statistics(
    x: Tensor,
    weight: Tensor,
    weight_copy: Tensor | None,
    bias: Tensor | None,
    eps: float,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    activation: str | None,
    slope: float,
    groups: int,
    x_normalized: Sequence[Tensor],
    x_activation: str | None,
    x_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = act(conv(x, weight) + bias) and, per channel in float32: mean, 1/sqrt(var + eps), unbiased variance of y.

    The statistics are (groups, C): the batch consists of that many equal parts, each normalised by itself.
    Only y is differentiable, and its gradient must come through `batch_norm_act(..., batch_statistics=True)`: it is
    then the whole gradient, the statistics' part included, and sums to zero over each channel (over that of all
    processes with `synchronised.batch_norm_act`). Hence bias's is zero where there is no activation.
    `x_normalized`, `x_activation` and `x_slope` are those of `conv`.
    """
    size = out_size(x, weight, transposed, stride, padding, output_padding)
    problem = conv_problem(x, weight, transposed, stride, padding, size, then="statistics")
    return run_conv_statistics(
        choose(problem, x.device),
        x,
        in_dtype_of(x, weight, weight_copy),
        size,
        transposed=transposed,
        stride=stride,
        padding=padding,
        bias=bias,
        activation=activation,
        slope=slope,
        eps=eps,
        groups=groups,
    )


@conv_statistics.register_fake
def _(
    x,
    weight,
    weight_copy,
    bias,
    eps,
    transposed,
    stride,
    padding,
    output_padding,
    activation,
    slope,
    groups,
    x_normalized,
    x_activation,
    x_slope,
):
    y = empty_result(x, weight, transposed, stride, padding, output_padding)
    return y, *(x.new_empty((groups, y.shape[1]), dtype=torch.float32) for _ in range(3))


@operator("fastgan::conv_weight_grad")
def conv_weight_grad(
    low: Tensor, high: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The gradient for `weight`; (low, high) are (dout, x) of a convolution and (x, dout) of a transposed one."""
    choice = choose(weight_grad_problem(low, high, weight, stride, padding), low.device)
    return run_weight_grad(choice, low, high, weight, stride=stride, padding=padding)


@conv_weight_grad.register_fake
def _(low, high, weight, stride, padding):
    return torch.empty_like(weight)


def _save_weight_grad(ctx, inputs, output):
    low, high, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(low, high)


def _weight_grad_backward(ctx, grad):
    """The weight's gradient is linear in low and in high: its own gradients are convolutions with `grad` as weight."""
    low, high = ctx.saved_tensors
    stride, padding = ctx.stride, ctx.padding
    low_grad = high_grad = None
    if is_wanted(ctx, 0):
        low_grad = plain_conv(high, grad, None, False, stride, padding, [0, 0])
    if is_wanted(ctx, 1):
        extra = output_padding_for(high.shape[2:], low.shape[2:], grad.shape[2:], True, stride, padding)
        high_grad = plain_conv(low, grad, None, True, stride, padding, extra)
    return low_grad, high_grad, None, None, None


conv_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save_weight_grad)


@operator("fastgan::activation_grad")
def activation_grad(grad: Tensor, out: Tensor, activation: str, slope: float) -> Tensor:
    """grad · act'(z) where out = act(z)."""
    from fastgan.kernels.batch_norm import activation_input_grad

    return activation_input_grad(channels_last(grad), channels_last(out), activation=activation, slope=slope)


@activation_grad.register_fake
def _(grad, out, activation, slope):
    return torch.empty_like(out, memory_format=torch.channels_last)


def through_activation(grad, out, activation, slope):
    """`activation_grad`, of gradients that are batched, too."""
    return (activation_backward if is_batched(grad) else activation_grad)(grad, out, activation, slope)


def _save_activation_grad(ctx, inputs, output):
    grad, out, ctx.activation, ctx.slope = inputs
    ctx.save_for_backward(grad, out)


def _activation_grad_backward(ctx, d):
    grad, out = ctx.saved_tensors
    grad_grad = through_activation(d, out, ctx.activation, ctx.slope) if ctx.needs_input_grad[0] else None
    out_grad = None
    if ctx.needs_input_grad[1] and ctx.activation in ("tanh", "sigmoid"):  # the others are straight lines
        wide = out.float()
        derivative = -2.0 * wide if ctx.activation == "tanh" else 1.0 - 2.0 * wide  # of act' in act
        out_grad = (d.float() * grad.float() * derivative).to(out.dtype)
    return grad_grad, out_grad, None, None


activation_grad.register_autograd(_activation_grad_backward, setup_context=_save_activation_grad)


def _backward(ctx, x, weight, weight_copy, out, x_normalized, dout):
    """(dx, dweight, dz) of out = act(z), z = conv(x, weight) + bias, and the gradients for `x_normalized`.

    dx and dweight are None where not wanted.
    """
    if ctx.gets_dz or ctx.x_activation or x_normalized:
        refuse_second_order("fused layers that ran in a TrainStep")
    dz = dout
    if ctx.activation and not ctx.gets_dz:
        dz = through_activation(dout, out, ctx.activation, ctx.slope)
    transposed, stride, padding = ctx.transposed, ctx.stride, ctx.padding
    dx = dweight = sums = None
    if is_wanted(ctx, 1):  # first, so that dx need not wait in memory, or outside of the cache
        dweight = weight_grad_of(x, dz, weight, transposed, stride, padding)
    if is_wanted(ctx, 0):
        conv_args = backward_conv_args(x.shape[2:], weight.shape[2:], transposed, stride, padding)
        if x_normalized:
            y, mean, invstd, _, *vectors = x_normalized
            act = (ctx.x_activation, ctx.x_slope)
            dx, sums = conv_batch_norm_grad(dz, weight, weight_copy, [y, mean, invstd, *vectors], *conv_args, *act)
        elif ctx.x_activation:
            dx = conv_activation_grad(dz, weight, weight_copy, x, *conv_args, ctx.x_activation, ctx.x_slope)
        else:
            dx = differentiable(plain_conv(dz, weight, weight_copy, *conv_args), x)
    return dx, dweight, dz, [None, None, None, sums, None, None][: len(x_normalized)]


def _save_conv(ctx, inputs, output):
    x, weight, weight_copy, bias, mean, *_, transposed, stride, padding, _, activation, slope = inputs[:15]
    x_normalized, ctx.x_activation, ctx.x_slope, ctx.gets_dz = inputs[15:]
    ctx.with_batch_norm = mean is not None
    ctx.transposed, ctx.stride, ctx.padding = transposed, stride, padding
    ctx.activation, ctx.slope = activation, slope
    # A linear result is not needed again; every activation's derivative can be told from its output.
    ctx.save_for_backward(x, weight, weight_copy, output if activation and not ctx.gets_dz else None, *x_normalized)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _in_order(operator, **grads):
    """Gradients in the order of the operator's arguments: None for those that are not named."""
    code = operator.function.__code__
    return tuple([grads.get(name) for name in code.co_varnames[: code.co_argcount]])


def _conv_backward(ctx, dout):
    if ctx.with_batch_norm:
        raise RuntimeError("fastgan::conv with an eval-mode BatchNorm inside has no gradient: use batch_norm_act")
    x, weight, weight_copy, out, *x_normalized = ctx.saved_tensors
    dx, dweight, dz, for_normalized = _backward(ctx, x, weight, weight_copy, out, x_normalized, dout)
    dbias = None
    if ctx.needs_input_grad[3]:
        dbias = differentiable(dz.sum((0, 2, 3), dtype=ctx.bias_dtype), weight, x)
    return _in_order(conv, x=dx, weight=dweight, bias=dbias, x_normalized=for_normalized)


conv.register_autograd(_conv_backward, setup_context=_save_conv)


def _save_conv_statistics(ctx, inputs, output):
    x, weight, weight_copy, bias, _, transposed, stride, padding, _, activation, slope, _ = inputs[:12]
    x_normalized, ctx.x_activation, ctx.x_slope = inputs[12:]
    ctx.gets_dz = False
    ctx.transposed, ctx.stride, ctx.padding = transposed, stride, padding
    ctx.activation, ctx.slope = activation, slope
    ctx.save_for_backward(x, weight, weight_copy, output[0] if activation else None, *x_normalized)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros are written for the statistics, which have no gradients


def _conv_statistics_backward(ctx, dy, *_):
    x, weight, weight_copy, y, *x_normalized = ctx.saved_tensors
    dx, dweight, dz, for_normalized = _backward(ctx, x, weight, weight_copy, y, x_normalized, dy)
    dbias = None
    if ctx.needs_input_grad[3]:
        if ctx.activation or torch.is_grad_enabled():  # with create_graph=True it is to have a gradient
            dbias = dz.sum((0, 2, 3), dtype=ctx.bias_dtype)
        else:
            dbias = dz.new_zeros(dz.shape[1], dtype=ctx.bias_dtype)
    return _in_order(conv_statistics, x=dx, weight=dweight, bias=dbias, x_normalized=for_normalized)


conv_statistics.register_autograd(_conv_statistics_backward, setup_context=_save_conv_statistics)
