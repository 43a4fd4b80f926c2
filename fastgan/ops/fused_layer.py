"""A layer, convolution + BatchNorm + activation, by the implementation that its tensors ask for.

`fastgan.functional` has the two operators that people call; modules and graphs call what is here.
"""

from typing import NamedTuple

import torch

from fastgan import backend
from fastgan.ops import batch_norm, convolution, running
from fastgan.ops.chain import run_chain
from fastgan.ops.operators import is_traced
from fastgan.ops.reference import conv_bn_act_reference


class Link(NamedTuple):
    """Of two calls of `linked_conv_bn_act` in a row, what the second needs for a part of the first one's backward."""

    activation: str | None  # of the first
    slope: float
    # Of the first one's BatchNorm: (y, mean, invstd, carrier), or (y, mean, invstd, carrier, gamma, beta).
    normalized: tuple[torch.Tensor, ...] = ()


def conv_bn_act(x, weight, *vectors, layer):
    """act(BatchNorm(conv(x))): what `fastgan.functional` has two functions for.

    Args:
        vectors: bias, gamma, beta, running_mean and running_var, each (C,) or None.
        layer: a `fastgan.ops.layer_spec.LayerSpec`.
    """
    return linked_conv_bn_act(x, weight, *vectors, layer=layer)[0]


def linked_conv_bn_act(
    x, weight, *vectors, layer, weight_copy=None, num_batches_tracked=None, x_link=None, gives_link=False
):
    """(result of `conv_bn_act`, its Link or None).

    `weight_copy` holds the weight's values in the dtype that is computed in, or None: see `fastgan.weight_copies`.
    `num_batches_tracked`, if any, counts the batches that the running statistics are updated with.

    With a `process_group` of several processes, BatchNorm in training normalises with the statistics of the batches of
    all of them, as torch.nn.SyncBatchNorm does, each of the `batch_groups` with the same one of the others. Gradients
    are of the sum of the processes' losses; those of the parameters are this process's part of them (of a bias right
    before BatchNorm it is given as zero, which the parts sum to). It has no double backward, torch.compile breaks its
    graph there, and an empty batch is refused.

    `gives_link` says that the result goes to nothing but another call, which gets the Link as its `x_link`: then the
    kernel that makes the gradient for the result multiplies it by the activation's derivative and adds up what
    BatchNorm's backward needs, so that nobody reads it again for that. Both calls or none run kernels. Such a pair has
    no gradients of gradients: see `fastgan.first_order`.
    """
    layer.check(x, weight, *vectors)
    implementation, _ = backend.select(x.device, compute_dtype(x))
    # An empty batch has nothing to launch; stock knows what to say of it, and of a weight that autocast leaves alone.
    if implementation == "reference" or x.numel() == 0 or weight.dtype not in backend.KERNEL_DTYPES:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(layer.batch_groups)
        return conv_bn_act_reference(x, weight, *vectors, layer), None
    return _by_kernels(x, weight, weight_copy, vectors, num_batches_tracked, layer, x_link, gives_link)


def has_kernels_for(x):
    """Whether `conv_bn_act` of `x` runs our kernels for layers of a module.

    Not while hooks on all modules are registered: they are for the calls of the layers. And what is no tensor is for
    the layers to refuse.
    """
    return _may_be_of_kernels(x) and x.dim() == 4 and backend.select(x.device, compute_dtype(x))[0] == "triton"


def may_have_kernels(x):
    """Whether it may for what somebody makes of `x`: latents are of other dimensions, and labels of another dtype."""
    return _may_be_of_kernels(x) and backend.select(x.device, torch.float32)[0] == "triton"


def _may_be_of_kernels(x):
    return isinstance(x, torch.Tensor) and backend.may_run_kernels(x) and not any(backend.HOOKS_OF_ALL)


def compute_dtype(x):
    """The dtype that a convolution computes in: autocast's where it is on and casts x, which float64 it never does."""
    device_type = x.device.type
    if x.dtype not in backend.KERNEL_DTYPES or x.is_meta or not torch.is_autocast_enabled(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def _by_kernels(x, weight, weight_copy, vectors, batches, layer, x_link, gives_link):
    # The operators take the weight and the vectors as they are: mixed precision casts no more than it must.
    x = x.to(compute_dtype(x))
    if weight_copy is not None and weight_copy.dtype != x.dtype:
        weight_copy = None
    # The kernels read these as if each lay in memory by itself. They write running statistics, which are not copied.
    *learned, running_mean, running_var = vectors
    bias, gamma, beta = map(_contiguous, learned)
    to_convolve = (x, weight, weight_copy, bias)
    of_x = convolution.ALONE if x_link is None else (list(x_link.normalized), x_link.activation, x_link.slope)
    vectors = (gamma, beta, running_mean, running_var)
    if not layer.batch_norm:
        return _without_batch_norm(*to_convolve, layer, of_x, gives_link)
    if not layer.batch_statistics:
        known = map(_contiguous, (running_mean, running_var))
        return _with_known_statistics(*to_convolve, gamma, beta, *known, layer, of_x), None
    return _with_batch_statistics(*to_convolve, *vectors, batches, layer, of_x, gives_link)


def _without_batch_norm(x, weight, weight_copy, bias, layer, of_x, gives_link):
    gets_dz = gives_link and layer.activation is not None
    act = (layer.activation, layer.slope)
    out = convolution.conv(
        x, weight, weight_copy, bias, *convolution.NO_BATCH_NORM, *layer.conv_args(), *act, *of_x, gets_dz
    )
    return out, Link(*act) if gets_dz else None


def _with_known_statistics(x, weight, weight_copy, bias, gamma, beta, running_mean, running_var, layer, of_x):
    """The result where BatchNorm normalises with its running statistics."""
    to_convolve = (x, weight, weight_copy, bias)
    # A trace of torch.jit's is made without gradients once more, to compare, and may be run with them.
    needs_grad = (torch.is_grad_enabled() or torch.jit.is_tracing()) and any(
        tensor is not None and tensor.requires_grad for tensor in (*to_convolve, gamma, beta)
    )
    if needs_grad or layer.activation_first:
        # γ's gradient needs what BatchNorm is of, so it is kept; and the epilogue activates last.
        y = convolution.conv(
            *to_convolve, *convolution.NO_BATCH_NORM, *layer.conv_args(), *layer.before(), *of_x, False
        )
        # A copy: until backward the running statistics may move on.
        mean, invstd = running_mean.to(torch.float32, copy=True), (running_var.float() + layer.eps).rsqrt()
        return batch_norm.batch_norm_act(y, mean, invstd, gamma, beta, False, *layer.after())
    known, act = (running_mean, running_var, gamma, beta, layer.eps), (layer.activation, layer.slope)
    return convolution.conv(*to_convolve, *known, *layer.conv_args(), *act, *of_x, False)


def _with_batch_statistics(
    x,
    weight,
    weight_copy,
    bias,
    gamma,
    beta,
    running_mean,
    running_var,
    batches,
    layer,
    of_x,
    gives_link,
):
    """(result, its Link or None) where BatchNorm normalises with the batch's own statistics."""
    momentum, process_group = layer.momentum, layer.process_group
    tensors = (weight, bias, gamma, beta, weight_copy, running_mean, running_var, batches)
    linked = gives_link or any(of_x)
    alone = not linked and process_group is None and not _updated_by_torch(running_mean, running_var, momentum)
    if alone and not is_traced([tensor for tensor in (x, *tensors) if tensor is not None]):
        # Without its name: calls of layers that differ in nothing else are replayed as one.
        layer = layer._replace(momentum=float(momentum), name=None, checked=True)
        return run_chain(x, tensors, (layer,)), None
    y, mean, invstd, var = convolution.conv_statistics(
        *(x, weight, weight_copy, bias, layer.eps, *layer.conv_args(), *layer.before(), layer.batch_groups, *of_x)
    )
    if process_group is not None:
        from fastgan.ops import synchronised  # imports Dynamo, which takes as long as torch itself

        rows = y.numel() // (layer.batch_groups * y.shape[1])
        mean, invstd, var, count = synchronised.share_statistics(mean, var, rows, layer.eps, process_group)
    if running_mean is not None:
        _update_running(running_mean, running_var, mean, var, momentum, batches)
    elif batches is not None:
        batches.add_(layer.batch_groups)
    after = layer.after()
    if process_group is not None:
        return synchronised.batch_norm_act(y, mean, invstd, gamma, beta, count, *after, process_group), None
    if gives_link and (gamma is None) == (beta is None):
        out, carrier = batch_norm.batch_norm_act_carrier(y, mean, invstd, gamma, beta, *after)
        vectors = () if gamma is None else (gamma, beta)
        return out, Link(*after, (y, mean, invstd, carrier, *vectors))
    return batch_norm.batch_norm_act(y, mean, invstd, gamma, beta, True, *after), None


def _contiguous(vector):
    return None if vector is None else vector.contiguous()


def _update_running(running_mean, running_var, mean, var, momentum, batches):
    """running ← (1 − momentum)·running + momentum·batch, for each group of the batch; `batches` counts them."""
    if not _updated_by_torch(running_mean, running_var, momentum):
        running.update_running(running_mean, running_var, mean.detach(), var.detach(), batches, float(momentum))
        return
    if batches is not None:
        batches.add_(len(mean))
    running.lerp_running(running_mean, running_var, mean, var, momentum)


def _updated_by_torch(running_mean, running_var, momentum):
    """Whether our kernel cannot update these running statistics."""
    if isinstance(momentum, torch.Tensor):
        return True
    return running_mean is not None and not (running_mean.is_contiguous() and running_var.is_contiguous())
