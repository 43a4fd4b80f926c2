"""Layers in a row, each convolution + BatchNorm + activation, in eager code: all of them one `autograd.Function`.

Its forward and its backward are each remembered and replayed as a whole (`fastgan.ops.replay`), so that the Python
around a layer is paid once for a network. And as nobody else sees what goes from layer to layer, the way back through a
convolution goes on through the activation and to the BatchNorm before it in the same kernel (`input_grads.py`).
"""

import functools

import torch

from fastgan.backend import is_batched
from fastgan.ops.batch_norm import batch_norm_act, batch_norm_act_grad, batch_norm_grad_of_sums, vector_grads
from fastgan.ops.convolution import ALONE, activation_grad, conv, conv_statistics, plain_conv, weight_grad_of
from fastgan.ops.geometry import backward_conv_args
from fastgan.ops.implementations import channels_last
from fastgan.ops.input_grads import conv_activation_grad, conv_batch_norm_grad
from fastgan.ops.operators import as_function, as_operator, is_traced
from fastgan.ops.reference import conv_bn_act_reference
from fastgan.ops.replay import Replayed
from fastgan.ops.running import update_running
from fastgan.wanted import are_wanted

TENSORS = 8  # of a layer: weight, bias, gamma, beta, weight_copy, running_mean, running_var, num_batches_tracked
LEARNED = 4  # the first of these
KEPT = 5  # of each layer for backward: the weight as the kernels read it, y, mean, invstd, result


def run_chain(x, tensors, layers):
    """The result of `layers` in a row on x, differentiable in x, weights, biases, gammas and betas, to any order.

    Args:
        x: in the dtype that is computed in.
        tensors: TENSORS for each layer, one layer after the other, None where there is none. A BatchNorm has one of
            gamma, beta and the running statistics at least, and those contiguous.
        layers: a tuple of LayerSpecs. One without `batch_statistics` has no BatchNorm, or takes its running statistics,
            and then nothing of the chain has a gradient.
    """
    wanted = [each is not None and each.requires_grad for each in (x, *tensors)]
    if not (torch.is_grad_enabled() and any(wanted)):
        return _forward(x, list(tensors), layers, False)
    frozen = 0 if wanted[0] else (wanted.index(True) - 1) // TENSORS  # layers that backward never comes to
    if frozen:
        x = _forward(x, list(tensors[: frozen * TENSORS]), layers[:frozen], False)
    return _Chain.apply(x, *tensors[frozen * TENSORS :], layers[frozen:])


class _Chain(torch.autograd.Function):
    """apply(x, *tensors, layers): see `run_chain`."""

    @staticmethod
    def forward(ctx, x, *tensors_and_layers):
        *tensors, layers = tensors_and_layers
        result, *kept = _forward(x, tensors, layers, True)
        learned = [each for own in _by_layer(tensors, TENSORS) for each in own[:LEARNED]]
        ctx.layers, ctx.given = layers, [each is not None for each in tensors]
        if layers[-1].batch_statistics or not layers[-1].activation:
            kept[-1] = None  # backward has no use for it, and who gets it may change it in place
        ctx.save_for_backward(x, *learned, *kept)
        return result

    @staticmethod
    def backward(ctx, dout):
        layers, saved = ctx.layers, list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()
        wants_x, *rest = are_wanted(ctx, [True, *ctx.given])
        wanted = (wants_x, *(each for own in _by_layer(rest, TENSORS) for each in own[:LEARNED]))
        if torch.is_grad_enabled() or is_batched(dout):  # create_graph=True, or many gradients at once
            grads = _differentiable_grads(dout, saved, wanted, layers)
        elif is_traced([dout]):  # compiled autograd, for one
            grads = _grads(as_operator, dout, saved, wanted, layers)
        else:
            grads = _backward(dout, saved, wanted, layers)
        dx, *rest = grads
        others = [None] * (TENSORS - LEARNED)
        return dx, *(each for own in _by_layer(rest, LEARNED) for each in (*own, *others)), None


@Replayed
def _forward(x, tensors, layers, keeps):
    """The result; with `keeps` also what backward needs: of each layer the KEPT tensors, one layer after the other."""
    kept = []
    for layer, own in zip(layers, _by_layer(tensors, TENSORS), strict=True):
        *learned, copy, running_mean, running_var, batches = own
        copy = _as_read(learned[0], copy, x.dtype)
        if not layer.checked:
            layer.check(x, learned[0] if copy is None else copy, *learned[1:], running_mean, running_var)
        x, y, mean, invstd, var = _layer(as_function, x, *learned, copy, running_mean, running_var, layer)
        if var is not None and running_mean is not None:
            update_running.function(running_mean, running_var, mean, var, batches, layer.momentum)
        elif batches is not None:
            batches.add_(layer.batch_groups)
        if keeps:
            kept += copy, y, mean, invstd, x
    return (x, *kept) if keeps else x


def _by_layer(values, count):
    """What there is of layers in a row, so many of each, as one list (or tuple) for each layer."""
    return [values[i : i + count] for i in range(0, len(values), count)]


def _as_read(weight, copy, dtype):
    """The weight as kernels read it, made once for forward and backward; None where that is the weight itself."""
    if copy is None:
        copy = weight.to(dtype, memory_format=torch.channels_last)
    return None if copy is weight else copy


def _layer(form, x, weight, bias, gamma, beta, weight_copy, running_mean, running_var, layer):
    """(result, y, mean, invstd, var) by what `form` gives of the operators: `as_function`, or `as_operator`.

    The last four are of a BatchNorm with statistics of the batch.
    """
    if not layer.batch_statistics:
        known = (running_mean, running_var, gamma, beta, layer.eps)
        act = (layer.activation, layer.slope)
        result = form(conv)(x, weight, weight_copy, bias, *known, *layer.conv_args(), *act, *ALONE, False)
        return result, None, None, None, None
    y, mean, invstd, var = form(conv_statistics)(
        x, weight, weight_copy, bias, layer.eps, *layer.conv_args(), *layer.before(), layer.batch_groups, *ALONE
    )
    result = form(batch_norm_act)(y, mean, invstd, gamma, beta, True, *layer.after())
    return result, y, mean, invstd, var


def _grads(form, dout, saved, wanted, layers):
    """Gradients for x and LEARNED tensors of each layer, None where not wanted. `form`: see `_layer`.

    Args:
        saved: x, LEARNED tensors of each layer, then KEPT ones of each. The list is emptied.
        wanted: which of the results.
    """
    learned = _by_layer(saved[1 : len(wanted)], LEARNED)
    kept = [saved[:1], *_by_layer(saved[len(wanted) :], KEPT)]  # before each layer what it got
    saved.clear()
    grads = [None] * len(wanted)
    grad, sums, of_z = channels_last(dout), None, False  # see `_through`
    for i in reversed(range(len(layers))):
        layer, at = layers[i], 1 + LEARNED * i
        weight, bias, gamma, beta = learned[i]
        wants_weight, wants_bias, *wants_vectors = wanted[at : at + LEARNED]
        weight_copy, y, *after = kept.pop()
        grad, sums = _through_last(form, grad, sums, of_z, layer, gamma, beta, y, *after)
        if layer.activation_first:
            grad = form(activation_grad)(grad, y, layer.activation, layer.slope)
        del y, after
        if any(wants_vectors):
            grads[at + 2 : at + LEARNED] = vector_grads(sums, gamma, beta, *wants_vectors)
        came = kept[-1][-1]
        geometry = (layer.transposed, layer.stride, layer.padding)
        if wants_weight:  # first, so that the input's need not wait in memory, or outside of the cache
            grads[at] = weight_grad_of(came, grad, weight, *geometry, form)
        if wants_bias:  # right before BatchNorm it has no part in the result
            alone = layer.batch_statistics and not layer.activation_first
            grads[at + 1] = torch.zeros_like(bias) if alone else grad.sum((0, 2, 3), dtype=bias.dtype)
        if not any(wanted[:at]):
            break
        back = (weight, weight_copy), backward_conv_args(came.shape[2:], weight.shape[2:], *geometry)
        if i == 0:
            grads[0] = _through(form, grad, *back)[0]
        else:
            grad, sums, of_z = _through(form, grad, *back, layers[i - 1], learned[i - 1], kept[-1])
    return tuple(grads)


_backward = Replayed(functools.partial(_grads, as_function), consumes=True)


def _through_last(form, grad, sums, of_z, layer, gamma, beta, y, mean, invstd, result):
    """(gradient before the last of a layer's BatchNorm and activation, the sums of that BatchNorm's backward if any).

    BatchNorm with an activation after it is one. `grad`, `sums`, `of_z`: what `_through` gave of the layer that comes
    after this one; the rest is what forward had and kept.
    """
    if layer.batch_statistics:
        if sums is None:
            of_batch_norm = (y, mean, invstd, gamma, beta, True, *layer.after())
            grad, sums = form(batch_norm_act_grad)(grad, *of_batch_norm)
        else:
            grad = form(batch_norm_grad_of_sums)(grad, y, mean, invstd, gamma, sums)
    elif layer.activation and not of_z:
        grad = form(activation_grad)(grad, result, layer.activation, layer.slope)
    return grad, sums


def _through(form, grad, weights, conv_args, layer=None, learned=None, kept=None):
    """(gradient, sums, of_z) on the way back through a convolution and, as far as one kernel goes, the layer before.

    of_z: whether it is the gradient for that layer's z, with the sums of its BatchNorm, and not for its result act(z).
    """
    if layer is not None and layer.batch_statistics:
        *_, gamma, beta = learned
        if (gamma is None) == (beta is None):
            normalized = [*kept[1:4], *([] if gamma is None else [gamma, beta])]
            return *form(conv_batch_norm_grad)(grad, *weights, normalized, *conv_args, *layer.after()), True
    elif layer is not None and layer.activation:
        act = (layer.activation, layer.slope)
        return form(conv_activation_grad)(grad, *weights, kept[-1], *conv_args, *act), None, True
    return plain_conv(grad, *weights, *conv_args, form), None, False


def _differentiable_grads(dout, saved, wanted, layers):
    """The same as functions of dout and of what was given to forward, which runs again, by the operators.

    For gradients that are batched by plain torch, which is all that can be mapped.
    """
    layer_of = _plain_layer if is_batched(dout) else _operator_layer
    creates_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # On tensors of their own, or what reaches a weight through x as well would count twice.
        inputs = [None if each is None else each.view_as(each) for each in saved[: len(wanted)]]
        result = inputs[0]
        for i, (layer, copy) in enumerate(zip(layers, saved[len(wanted) :: KEPT], strict=True)):
            result = layer_of(result, *inputs[1 + LEARNED * i : 1 + LEARNED * (i + 1)], copy, layer)
    asked = [each for each, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(result, asked, dout, create_graph=creates_graph))
    return [next(found) if want else None for want in wanted]


def _operator_layer(x, weight, bias, gamma, beta, weight_copy, layer):
    return _layer(as_operator, x, weight, bias, gamma, beta, weight_copy, None, None, layer)[0]


def _plain_layer(x, weight, bias, gamma, beta, weight_copy, layer):
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return conv_bn_act_reference(x, weight, bias, gamma, beta, None, None, layer)
