"""Running a group of layers: as one fused operator on its modules' tensors, or by the layers' own forwards."""

import functools

import torch
import torch.distributed as dist
from torch import nn

from fastgan import functional as fused
from fastgan.batch_groups import current_groups
from fastgan.cpu_convolution import convolve
from fastgan.patterns import hooks_compute_weight, unfit_number, unfit_setting
from fastgan.weight_copies import weight_copy

_NO_VECTORS = (None,) * 4
_NO_BATCH_NORM = dict(training=False, momentum=0.0, eps=0.0, batch_groups=1)


def run_layers(x, conv, forwards, batch_norm):
    """The group without kernels, by the forwards of its own layers.

    Among `forwards` the module `batch_norm`, if any, stands for its own.
    """
    groups = current_groups()
    x = convolve(x, conv, forwards[0])
    for forward in forwards[1:]:
        if forward is not batch_norm:
            x = forward(x)
        elif groups > 1 and batch_norm.training:
            x = torch.cat([batch_norm.forward(part) for part in x.chunk(groups)])
        else:
            x = batch_norm.forward(x)
    return x


def run_stock(x, conv, batch_norm, activation, negative_slope, activation_first):
    """`run_layers` of a group of which the activation is known by its name."""
    act = functools.partial(fused.activate_, activation=activation, negative_slope=negative_slope)
    norm = [] if batch_norm is None else [batch_norm]
    return run_layers(x, conv, [conv, act, *norm] if activation_first else [conv, *norm, act], batch_norm)


def why_not_operator(conv, batch_norm, negative_slope):
    """The setting with which the layers of a group, as they are now, are no operator's; "" if there is none."""
    return unfit_setting(conv) or unfit_number(batch_norm, negative_slope)


def run_operator(x, conv, batch_norm, activation, negative_slope, activation_first, layer, **links):
    """(result, its Link or None) of the group as one operator; `layer` names it where the operator refuses its input.

    By its layers where a setting that was changed since the group was matched is none of the operator's.
    `links`: x_link and gives_link of `fastgan.functional.linked_conv_bn_act`.
    """
    changed = why_not_operator(conv, batch_norm, negative_slope)
    if changed and links.get("x_link") is not None:  # the layer before counts on this one's operator for its gradient
        raise RuntimeError(f"layer {layer!r} was given {changed} after it was fused: fastgan.unfuse and fuse it again")
    if changed:
        return run_stock(x, conv, batch_norm, activation, negative_slope, activation_first), None
    if conv._forward_pre_hooks and hooks_compute_weight(conv):
        for hook in conv._forward_pre_hooks.values():
            hook(conv, (x,))
    vectors, options = _batch_norm_arguments(batch_norm, x) if batch_norm is not None else (_NO_VECTORS, _NO_BATCH_NORM)
    if activation_first:
        options["activation_first"] = True
    try:
        return fused.linked_conv_bn_act(
            x,
            conv.weight,  # once: a parametrized one is computed each time
            conv.bias,
            *vectors,
            transposed=conv.transposed,
            stride=conv.stride,
            padding=conv.padding,
            output_padding=conv.output_padding,
            activation=activation,
            negative_slope=negative_slope,
            weight_copy=weight_copy(conv),
            **options,
            **links,
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"layer {layer!r}: {error}") from error


def _batch_norm_arguments(bn, x):
    """A BatchNorm as the operator's (gamma, beta, running_mean, running_var) and options.

    As stock does: count the batch first, update only statistics that are tracked, and take the batch's own where
    there are none to use.
    """
    momentum, batches = bn.momentum, None
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        batches = bn.num_batches_tracked
        if momentum is None:
            batches.add_(current_groups())
            # On a GPU a tensor: reading it would wait. In float64, as stock divides.
            momentum = 1.0 / (batches.double() if batches.is_cuda else float(batches))
            batches = None
    momentum = 0.0 if momentum is None else momentum
    used = bn.track_running_stats or not bn.training
    running_mean, running_var = (bn.running_mean, bn.running_var) if used else (None, None)
    gamma = gamma_of_ones(bn.weight, bn.bias, running_mean, bn.num_features, x)
    training = bn.training or bn.running_mean is None
    options = dict(
        training=training,
        momentum=momentum,
        eps=bn.eps,
        batch_groups=current_groups() if training else 1,
        num_batches_tracked=batches,
    )
    if isinstance(bn, nn.SyncBatchNorm) and bn.training and is_distributed():
        options["process_group"] = bn.process_group or dist.group.WORLD
    return (gamma, bn.bias, running_mean, running_var), options


def gamma_of_ones(gamma, beta, running_mean, channels, like):
    """A BatchNorm's γ, or ones where all of its vectors are missing: to the operator that means no BatchNorm."""
    if gamma is None and beta is None and running_mean is None:
        return torch.ones(channels, device=like.device, dtype=like.dtype)
    return gamma


def is_distributed():
    """Whether there is a torch.distributed group of processes to share statistics with."""
    return dist.is_available() and dist.is_initialized()
