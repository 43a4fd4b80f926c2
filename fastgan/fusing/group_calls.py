"""Running groups of layers: as fused operators on their modules' tensors, or by the layers' own forwards."""

import functools

import torch
import torch.distributed as dist
from torch import nn

from fastgan import backend
from fastgan.batch_groups import current_batch_groups
from fastgan.cpu.convolution import convolve
from fastgan.first_order import only_first_order
from fastgan.fusing.layer_code import hooks_compute_weight
from fastgan.fusing.layout import with_stock_gradient
from fastgan.fusing.patterns import padding_of, unfit_number, unfit_setting
from fastgan.memory_format import default_layout
from fastgan.ops import fused_layer
from fastgan.ops.chain import run_chain
from fastgan.ops.layer_spec import LayerSpec
from fastgan.ops.operators import is_traced
from fastgan.ops.reference import activate_
from fastgan.weight_copies import weight_copy

_VECTORS = {"weight", "bias"}  # of a BatchNorm


def run_layers(x, conv, forwards, batch_norm, keeps_memory):
    """The result of a group without kernels, by the forwards of its own layers.

    Where the module `batch_norm` itself stands among `forwards` it is called once for each part of the batch (see
    `fastgan.batch_groups`). `keeps_memory`: see `patterns.Group`.
    """
    x = convolve(x, conv, forwards[0], keeps_memory=keeps_memory, may_be_view=batch_norm is not None)
    if not keeps_memory and isinstance(x, torch.Tensor) and not torch.jit.is_tracing():
        if conv.out_channels == 1 or x.shape[-2:] == (1, 1):
            x = default_layout(x)  # stock's next layer gives it so; ours may write to it instead
    for forward in forwards[1:]:
        if forward is not batch_norm:
            x = forward(x)
        elif (parts := current_batch_groups()) > 1 and _statistics_of(batch_norm)[-1]:
            x = torch.cat([batch_norm.forward(part) for part in x.chunk(parts)])
        else:
            x = batch_norm.forward(x)
    return x


def run_stock(x, part):
    """`run_layers` of a group of which the activation is known by its name."""
    conv, batch_norm = part.conv, part.batch_norm
    act = functools.partial(activate_, activation=part.activation, negative_slope=part.negative_slope)
    acts, norms = [act] if part.activation else [], [] if batch_norm is None else [batch_norm]
    forwards = [conv, *acts, *norms] if part.activation_first else [conv, *norms, *acts]
    return run_layers(x, conv, forwards, batch_norm, keeps_memory=len(forwards) == 1)


def run_parts(x, parts):
    """Fused groups in a row, of which nobody else sees the results between, by operators."""
    links = only_first_order()
    result = None if links else run_as_chain(x, parts)
    if result is not None:
        return result
    link = None
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        gives_link = links and after is not None and not _why_not_operator(after)
        x, link = _run_operator(x, part, x_link=link, gives_link=gives_link)
    return x


def _why_not_operator(part):
    """The setting with which the layers of a group, as they are now, are no operator's; "" if there is none."""
    norm = part.batch_norm
    if norm is not None and norm.momentum is None and current_batch_groups() > 1:
        return "momentum=None"  # each part of a batch then counts less than the one before
    return unfit_setting(part.conv) or unfit_number(norm, part.negative_slope)


def _run_operator(x, part, **links):
    """(result, its Link or None) of the group as one operator.

    If a layer's setting was changed after matching to one that no operator supports, the layers run by themselves.
    `links`: x_link and gives_link of `fastgan.ops.fused_layer.linked_conv_bn_act`.
    """
    if _why_not_operator(part):
        return run_stock(x, part), None
    conv, batch_norm = part.conv, part.batch_norm
    if conv._forward_pre_hooks and hooks_compute_weight(conv):
        for hook in conv._forward_pre_hooks.values():
            hook(conv, (x,))
    vectors, batches, settings = (None,) * 4, None, {}
    if batch_norm is not None:
        vectors, batches, settings = _batch_norm_arguments(batch_norm)
    layer = LayerSpec(**_constants(part), **settings)
    if links["x_link"] is None:
        x = with_stock_gradient(x, conv)
    weight = conv.weight  # once: a parametrized one is computed each time
    more = dict(weight_copy=weight_copy(conv), num_batches_tracked=batches, **links)
    return fused_layer.linked_conv_bn_act(x, weight, conv.bias, *vectors, layer=layer, **more)


def _constants(part):
    """The fields of a group's LayerSpec that do not come from a BatchNorm."""
    conv = part.conv
    return dict(
        transposed=conv.transposed,
        stride=conv.stride,
        padding=padding_of(conv),
        output_padding=conv.output_padding,
        activation=part.activation,
        slope=part.negative_slope,
        batch_norm=part.batch_norm is not None,
        activation_first=part.activation_first,
        name=part.name,
    )


def run_as_chain(x, parts):
    """The result of fused groups in a row as one chain (see `fastgan.ops.chain`), or None where they are not one.

    That is for eager code, and for layers whose tensors are their own Parameters and buffers. It looks at modules as
    little as it can: what it finds is what a small network waits for.
    """
    if x.numel() == 0 or torch.compiler.is_compiling():
        return None
    tensors, layers, batch_groups, dtype = [], [], current_batch_groups(), fused_layer.compute_dtype(x)
    casts = torch.is_autocast_enabled(x.device.type)
    for part in parts:
        found = _tensors_and_layer(part, dtype, casts, batch_groups)
        if found is None:
            return None
        tensors += found[0]
        layers.append(found[1])
    given = [tensor for tensor in tensors if tensor is not None]
    if is_traced([x, *given]):
        return None
    pairs = zip(parts, layers, strict=True)
    known = any([part.batch_norm is not None and not layer.batch_statistics for part, layer in pairs])
    if known and torch.is_grad_enabled() and any([tensor.requires_grad for tensor in (x, *given)]):
        return None  # the operator with known statistics inside has no gradient
    x = with_stock_gradient(x, parts[0].conv)
    return run_chain(x.to(dtype, memory_format=torch.channels_last), tensors, tuple(layers))


def _tensors_and_layer(part, dtype, casts, batch_groups):
    """(the tensors of `run_chain`, the LayerSpec) of a group as it is now, None where it is none of a chain.

    Args:
        dtype: that is computed in.
        casts: whether weights of another one are cast to it.
    """
    conv, bn = part.conv, part.batch_norm
    own, copy = conv._parameters, weight_copy(conv)
    weight = own.get("weight")
    if weight is None or "bias" not in own or conv._forward_pre_hooks or _why_not_operator(part):
        return None  # a parametrized weight, or a hook's, is computed at each look at it
    if weight.dtype not in backend.KERNEL_DTYPES or (weight.dtype != dtype and not casts):
        return None
    bias = own["bias"]
    if bias is not None and not bias.is_contiguous():
        return None
    learned = (weight, bias)
    copy = copy if copy is not None and copy.dtype == dtype else None
    if bn is None:
        return (*learned, None, None, copy, None, None, None), LayerSpec(**_constants(part))
    own = bn._parameters
    running_mean, running_var, batches, batch_statistics = _statistics_of(bn)
    updates = bn.training and running_mean is not None
    if (updates and type(bn.momentum) not in (float, int)) or (part.activation_first and not batch_statistics):
        return None
    gamma, beta = own.get("weight"), own.get("bias")
    if not own.keys() >= _VECTORS or isinstance(bn, nn.SyncBatchNorm):
        return None
    for vector in (gamma, beta, running_mean, running_var):
        if vector is not None and not vector.is_contiguous():
            return None
    if running_mean is not None and (running_mean.requires_grad or running_var.requires_grad):
        return None  # the operator says what is wrong with that
    layer = LayerSpec(
        **_constants(part),
        batch_statistics=batch_statistics,
        momentum=float(bn.momentum) if updates else 0.0,
        eps=bn.eps,
        batch_groups=batch_groups if batch_statistics else 1,
    )
    return (*learned, gamma, beta, copy, running_mean, running_var, batches), layer


def _statistics_of(bn):
    """(running_mean, running_var, num_batches_tracked, whether the batch's own statistics are taken), as stock does."""
    used = bn.track_running_stats or not bn.training
    running_mean, running_var = (bn.running_mean, bn.running_var) if used else (None, None)
    batches = bn.num_batches_tracked if bn.training and bn.track_running_stats else None
    return running_mean, running_var, batches, bool(bn.training) or running_mean is None


def _batch_norm_arguments(bn):
    """A BatchNorm's (gamma, beta, running_mean, running_var), what counts its batches, and fields of its LayerSpec.

    As stock does: count the batch first, update only statistics that are tracked, and take the batch's own where
    there are none to use.
    """
    running_mean, running_var, batches, batch_statistics = _statistics_of(bn)
    momentum = bn.momentum
    if batches is not None and momentum is None:
        batches.add_(1)
        # On a GPU a tensor: reading it would wait. In float64, as stock divides.
        momentum = 1.0 / (batches.double() if batches.is_cuda else float(batches))
        batches = None
    settings = dict(
        batch_statistics=batch_statistics,
        momentum=0.0 if momentum is None else momentum,
        eps=bn.eps,
        batch_groups=current_batch_groups() if batch_statistics else 1,
        process_group=_processes(bn),
    )
    return (bn.weight, bn.bias, running_mean, running_var), batches, settings


def _processes(bn):
    """The torch.distributed group with which a BatchNorm shares its statistics, or None."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and is_distributed()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def is_distributed():
    """Whether there is a torch.distributed group of processes to share statistics with."""
    return dist.is_available() and dist.is_initialized()
