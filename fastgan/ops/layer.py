"""Convolution + BatchNorm in training + activation in eager code: its operators in a row as one `autograd.Function`."""

from typing import NamedTuple

import torch

from fastgan.ops.batch_norm import batch_norm_act, batch_norm_act_grad, vector_grads
from fastgan.ops.convolution import activation_grad, conv_statistics, plain_conv, weight_grad_of
from fastgan.ops.geometry import way_back
from fastgan.ops.operators import as_function, as_operator, is_watched
from fastgan.ops.replay import Replayed
from fastgan.ops.running import update_running
from fastgan.wanted import is_wanted

_ALONE = ([], None, 0.0)  # the input of `conv_statistics` is not the result of a linked layer


class Layer(NamedTuple):
    """The constants of `conv_statistics`, `update_running` and `batch_norm_act`."""

    momentum: float
    eps: float
    transposed: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    activation_before: str | None  # BatchNorm, with its slope; the other is after it
    slope_before: float
    activation: str | None
    slope: float
    groups: int


class ConvBatchNormAct(torch.autograd.Function):
    """apply(x, weight, weight_copy, bias, gamma, beta, running_mean, running_var, batches, layer) → the result.

    The tensors are those of `conv_statistics`, `update_running` and `batch_norm_act`; `layer` is a Layer.
    """

    @staticmethod
    def forward(ctx, x, weight, weight_copy, bias, gamma, beta, running_mean, running_var, batches, layer):
        running = (running_mean, running_var, batches)
        out, y, mean, invstd = _forward(x, weight, weight_copy, bias, gamma, beta, *running, layer)
        for tensor in running:
            if tensor is not None:
                torch.autograd.graph.increment_version(tensor)
        ctx.layer = layer
        ctx.save_for_backward(x, weight, weight_copy, bias, gamma, beta, y, mean, invstd)
        return out

    @staticmethod
    def backward(ctx, dout):
        *inputs, y, mean, invstd = ctx.saved_tensors
        wanted = (is_wanted(ctx, 0), is_wanted(ctx, 1), *ctx.needs_input_grad[2 : len(inputs)])
        if torch.is_grad_enabled():  # create_graph=True
            grads = _differentiable_grads(dout, inputs, wanted, ctx.layer)
        elif is_watched([dout]):  # compiled autograd, for one
            grads = _grads(as_operator, dout, *inputs, y, mean, invstd, wanted, ctx.layer)
        else:
            grads = _backward(dout, *inputs, y, mean, invstd, wanted, ctx.layer)
        return *grads, None, None, None, None


@Replayed
def _forward(x, weight, weight_copy, bias, gamma, beta, running_mean, running_var, batches, layer):
    """(out, y, mean, invstd): the result, and what backward needs."""
    out, y, mean, invstd, var = _layer(as_function, x, weight, weight_copy, bias, gamma, beta, layer)
    if running_mean is not None:
        update_running.function(running_mean, running_var, mean, var, batches, layer.momentum)
    elif batches is not None:
        batches.add_(layer.groups)
    return out, y, mean, invstd


def _layer(form, x, weight, weight_copy, bias, gamma, beta, layer):
    """(out, y, mean, invstd, var) by what `form` gives of the operators: `as_function`, or `as_operator`."""
    where = (layer.transposed, layer.stride, layer.padding, layer.output_padding)
    before, after = (layer.activation_before, layer.slope_before), (layer.activation, layer.slope)
    y, mean, invstd, var = form(conv_statistics)(
        x, weight, weight_copy, bias, layer.eps, *where, *before, layer.groups, *_ALONE
    )
    return form(batch_norm_act)(y, mean, invstd, gamma, beta, True, *after), y, mean, invstd, var


@Replayed
def _backward(*arguments):
    """`_grads` by the operators' functions."""
    return _grads(as_function, *arguments)


def _grads(form, dout, x, weight, weight_copy, bias, gamma, beta, y, mean, invstd, wanted, layer):
    """Gradients for x, weight, its copy (none), bias, gamma and beta; None where not wanted. `form`: see `_layer`."""
    wants_x, wants_weight, _, wants_bias, wants_gamma, wants_beta = wanted
    dy, sums = form(batch_norm_act_grad)(dout, y, mean, invstd, gamma, beta, True, layer.activation, layer.slope)
    before, dz, where = layer.activation_before, dy, (layer.transposed, layer.stride, layer.padding)
    if before:
        dz = form(activation_grad)(dy, y, before, layer.slope_before)
    dx = dweight = dbias = None
    if wants_weight:  # first, so that dx need not wait in memory, or outside of the cache
        dweight = weight_grad_of(x, dz, weight, *where, form)
    if wants_x:
        dx = plain_conv(dz, weight, weight_copy, *way_back(x.shape[2:], weight.shape[2:], *where), form)
    if wants_bias:  # right before BatchNorm it has no part in the result
        dbias = dz.sum((0, 2, 3), dtype=bias.dtype) if before else torch.zeros_like(bias)
    return dx, dweight, None, dbias, *vector_grads(sums, gamma, beta, wants_gamma, wants_beta)


def _differentiable_grads(dout, inputs, wanted, layer):
    """The same as functions of dout and of `inputs`: forward runs again, by the operators."""
    # On tensors of their own, or what reaches a weight through x as well would count twice.
    inputs = [None if each is None else each.view_as(each) for each in inputs]
    out, *_ = _layer(as_operator, *inputs, layer)
    asked = [each for each, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(out, asked, dout, create_graph=True))
    return [next(found) if want else None for want in wanted]
