"""The fused operators: convolution + BatchNorm + activation, and the GAN losses on logits.

Each runs our Triton kernels on CUDA and the plain-torch reference that stands beside it elsewhere; the environment
variable FASTGAN_BACKEND (auto, triton or reference) forces one. See `fastgan.backend.select`.
"""

from typing import NamedTuple

import torch

from fastgan import backend
from fastgan.checks import check_conv_bn_act, pair
from fastgan.losses import backward_bce, discriminator_bce, generator_bce
from fastgan.ops import batch_norm, convolution, running, synchronised
from fastgan.ops.chain import Layer, run_chain
from fastgan.ops.operators import is_watched
from fastgan.ops.reference import conv_bn_act_reference

__all__ = ["backward_bce", "conv2d_bn_act", "conv_transpose2d_bn_act", "discriminator_bce", "generator_bce"]


def conv_transpose2d_bn_act(
    x,
    weight,
    bias=None,
    gamma=None,
    beta=None,
    running_mean=None,
    running_var=None,
    *,
    training=False,
    momentum=0.1,
    eps=1e-5,
    stride=1,
    padding=0,
    output_padding=0,
    activation=None,
    negative_slope=0.01,
    activation_first=False,
    batch_groups=1,
):
    """act(BatchNorm(conv_transpose2d(x, weight, bias))), forward and backward in fused kernels.

    Args:
        x: (N, in_channels, H, W); float32, float16 or bfloat16 for the kernels, any floating dtype otherwise.
        weight: (in_channels, out_channels, kh, kw), the dtype of x (autocast casts both).
        bias: (out_channels,) or None.
        gamma, beta: BatchNorm's weight and bias, (out_channels,) or None for ones and zeros.
        running_mean, running_var: (out_channels,), both or neither; updated in place when `training`. With all four
            of gamma, beta and the running statistics None there is no BatchNorm.
        training: normalise with the batch's statistics rather than the running ones.
        momentum: weight of the new batch in the running statistics: a number, or a 0-dim tensor (a module with
            ``momentum=None`` passes 1 / num_batches_tracked).
        eps: added to the variance.
        stride, padding, output_padding: an int or a pair.
        activation: "relu", "leaky_relu", "tanh", "sigmoid" or None.
        negative_slope: of leaky_relu, ≥ 0.
        activation_first: the other order, BatchNorm(act(conv(x, weight) + bias)): the statistics are of the activated
            values. It needs a BatchNorm and an activation.
        batch_groups: the batch consists of so many equal parts, one after the other, and BatchNorm in training takes
            each part by itself: the same numbers, and running statistics, as a call for each part in that order.

    Returns:
        (N, out_channels, Ho, Wo) in the dtype of x; channels_last in memory where the kernels ran.

    Gradients of any order can be had (WGAN-GP, R1), in eager mode: torch.compile has no double backward. Within the
    transforms of torch.func and forward-mode differentiation plain torch runs.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; said before any work starts.

    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167) for BatchNorm; Radford et al. 2015 (arXiv:1511.06434).
    """
    return conv_bn_act(
        *(x, weight, bias, gamma, beta, running_mean, running_var),
        training=training,
        momentum=momentum,
        eps=eps,
        transposed=True,
        stride=pair("stride", stride),
        padding=pair("padding", padding),
        output_padding=pair("output_padding", output_padding),
        activation=activation,
        negative_slope=negative_slope,
        activation_first=activation_first,
        batch_groups=batch_groups,
    )


def conv2d_bn_act(
    x,
    weight,
    bias=None,
    gamma=None,
    beta=None,
    running_mean=None,
    running_var=None,
    *,
    training=False,
    momentum=0.1,
    eps=1e-5,
    stride=1,
    padding=0,
    activation=None,
    negative_slope=0.01,
    activation_first=False,
    batch_groups=1,
):
    """act(BatchNorm(conv2d(x, weight, bias))): as `conv_transpose2d_bn_act`, with weight (out, in, kh, kw)."""
    return conv_bn_act(
        *(x, weight, bias, gamma, beta, running_mean, running_var),
        training=training,
        momentum=momentum,
        eps=eps,
        transposed=False,
        stride=pair("stride", stride),
        padding=pair("padding", padding),
        output_padding=[0, 0],
        activation=activation,
        negative_slope=negative_slope,
        activation_first=activation_first,
        batch_groups=batch_groups,
    )


class Link(NamedTuple):
    """Of two calls of `linked_conv_bn_act` in a row, what the second needs for a part of the first one's backward."""

    activation: str | None  # of the first
    slope: float
    # Of the first one's BatchNorm: (y, mean, invstd, carrier), or (y, mean, invstd, carrier, gamma, beta).
    normalized: tuple[torch.Tensor, ...] = ()


def conv_bn_act(x, weight, *tensors, **options):
    """Both of them in one: `linked_conv_bn_act` without anything before or after it."""
    return linked_conv_bn_act(x, weight, *tensors, **options)[0]


def linked_conv_bn_act(
    x,
    weight,
    *tensors,
    weight_copy=None,
    num_batches_tracked=None,
    activation_first=False,
    process_group=None,
    x_link=None,
    gives_link=False,
    **options,
):
    """(result, its Link or None): `transposed` says which of both it is, and strides and paddings are pairs.

    `weight_copy` holds the weight's values in the dtype that is computed in, or None: see `fastgan.weight_copies`.
    `num_batches_tracked`, if any, counts the batches that the running statistics are updated with.

    With a torch.distributed `process_group`, BatchNorm in training normalises with the statistics of the batches of all
    its processes, as torch.nn.SyncBatchNorm does, each of `batch_groups` with the same one of the others. Gradients are
    of the sum of the processes' losses; those of the parameters are this process's part of them (of a bias right before
    BatchNorm it is given as zero, which the parts sum to). It has no double backward, torch.compile breaks its graph
    there, and an empty batch is refused.

    `gives_link` says that the result goes to nothing but another call, which gets the Link as its `x_link`: then the
    kernel that makes the gradient for the result multiplies it by the activation's derivative and adds up what
    BatchNorm's backward needs, so that nobody reads it again for that. Both calls or none run kernels. Such a pair has
    no gradients of gradients: see `fastgan.first_order`.
    """
    if process_group is not None and torch.distributed.get_world_size(process_group) == 1:
        process_group = None
    options.update(activation_first=activation_first, process_group=process_group)
    check_conv_bn_act(x, weight, *tensors, **options)
    implementation, _ = backend.select(x.device, compute_dtype(x))
    # An empty batch has nothing to launch; stock knows what to say of it, and of a weight that autocast leaves alone.
    if implementation == "reference" or x.numel() == 0 or weight.dtype not in backend.KERNEL_DTYPES:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(options["batch_groups"])
        return conv_bn_act_reference(x, weight, *tensors, **options), None
    more = dict(weight_copy=weight_copy, num_batches_tracked=num_batches_tracked)
    more |= dict(x_link=x_link or Link(None, 0.0), gives_link=gives_link)
    return _conv_bn_act_fused(x, weight, *tensors, **more, **options)


def has_kernels_for(x):
    """Whether `conv_bn_act` of `x` runs our kernels for layers of a module.

    Not while hooks on all modules are registered: they are for the calls of the layers. And what is no tensor is for
    the layers to refuse.
    """
    if not isinstance(x, torch.Tensor) or not (x.is_cuda or backend.forces_triton()):
        return False  # for nothing else: a CPU step of a small network feels every question
    if x.dim() != 4 or any(backend.HOOKS_OF_ALL):
        return False
    return backend.select(x.device, compute_dtype(x))[0] == "triton"


def compute_dtype(x):
    """The dtype that a convolution computes in: autocast's where it is on and casts x, which float64 it never does."""
    device_type = x.device.type
    if x.dtype not in backend.KERNEL_DTYPES or x.is_meta or not torch.is_autocast_enabled(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def _conv_bn_act_fused(
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
    weight_copy,
    num_batches_tracked,
    x_link,
    gives_link,
):
    # The operators take the weight and the vectors as they are: mixed precision casts no more than it must.
    x = x.to(compute_dtype(x))
    if weight_copy is not None and weight_copy.dtype != x.dtype:
        weight_copy = None
    weights = (weight, weight_copy)
    # The kernels read these as if each lay in memory by itself. They write running statistics, which are not copied.
    bias, gamma, beta = map(_contiguous, (bias, gamma, beta))
    if not training:
        running_mean, running_var = map(_contiguous, (running_mean, running_var))
    where = (transposed, stride, padding, output_padding)
    act, no_act, no_batch_norm = (activation, negative_slope), (None, 0.0), (None, None, None, None, 0.0)
    of_x = (list(x_link.normalized), x_link.activation, x_link.slope)
    # Before BatchNorm the convolution's kernel activates, after it BatchNorm's does.
    before, after = (act, no_act) if activation_first else (no_act, act)
    if all(tensor is None for tensor in (gamma, beta, running_mean, running_var)):
        gets_dz = gives_link and activation is not None
        out = convolution.conv(x, *weights, bias, *no_batch_norm, *where, *act, *of_x, gets_dz)
        return out, Link(*act) if gets_dz else None
    if training:
        tensors = (weight, bias, gamma, beta, weight_copy, running_mean, running_var, num_batches_tracked)
        linked = gives_link or x_link.activation is not None or x_link.normalized
        alone = not linked and process_group is None and not _updated_by_torch(running_mean, running_var, momentum)
        if alone and not is_watched([tensor for tensor in (x, *tensors) if tensor is not None]):
            sizes = (tuple(stride), tuple(padding), tuple(output_padding))
            layer = Layer(
                *(transposed, *sizes, activation, negative_slope, activation_first),
                batch_statistics=True,
                momentum=float(momentum),
                eps=eps,
                groups=batch_groups,
            )
            return run_chain(x, tensors, (layer,)), None
        y, mean, invstd, var = convolution.conv_statistics(x, *weights, bias, eps, *where, *before, batch_groups, *of_x)
        if process_group is not None:
            rows = y.numel() // (batch_groups * y.shape[1])
            mean, invstd, var, count = synchronised.share_statistics(mean, var, rows, eps, process_group)
        if running_mean is not None:
            _update_running(running_mean, running_var, mean, var, momentum, num_batches_tracked)
        elif num_batches_tracked is not None:
            num_batches_tracked.add_(batch_groups)
        if process_group is not None:
            return synchronised.batch_norm_act(y, mean, invstd, gamma, beta, count, *after, process_group), None
        if gives_link and (gamma is None) == (beta is None):
            out, carrier = batch_norm.batch_norm_act_carrier(y, mean, invstd, gamma, beta, *after)
            vectors = () if gamma is None else (gamma, beta)
            return out, Link(*after, (y, mean, invstd, carrier, *vectors))
        return batch_norm.batch_norm_act(y, mean, invstd, gamma, beta, True, *after), None
    # A trace of torch.jit's is made without gradients once more, to compare, and may be run with them.
    needs_grad = (torch.is_grad_enabled() or torch.jit.is_tracing()) and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *weights, bias, gamma, beta)
    )
    if needs_grad or activation_first:
        # γ's gradient needs what BatchNorm is of, so it is kept; and the epilogue activates last.
        y = convolution.conv(x, *weights, bias, *no_batch_norm, *where, *before, *of_x, False)
        # A copy: until backward the running statistics may move on.
        mean, invstd = running_mean.to(torch.float32, copy=True), (running_var.float() + eps).rsqrt()
        return batch_norm.batch_norm_act(y, mean, invstd, gamma, beta, False, *after), None
    known = (running_mean, running_var, gamma, beta, eps)
    return convolution.conv(x, *weights, bias, *known, *where, *act, *of_x, False), None


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
