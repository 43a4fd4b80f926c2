"""The fused operators: convolution + BatchNorm + activation, and the GAN losses on logits.

On CUDA a convolution runs as our Triton kernel, or as cuDNN with our passes around it, whichever was measured to be the
faster (`fastgan.ops.choice`), and a loss as our kernel; elsewhere each is the plain torch of its reference. The
environment variable FASTGAN_BACKEND (auto, triton or reference) forces one: see `fastgan.backend.select`.
"""

from fastgan.checks import pair
from fastgan.losses import discriminator_bce, generator_bce
from fastgan.ops.fused_layer import conv_bn_act
from fastgan.ops.layer_spec import LayerSpec

__all__ = ["conv2d_bn_act", "conv_transpose2d_bn_act", "discriminator_bce", "generator_bce"]


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
        bias: (out_channels,) or None. As the four that follow, in the dtype of x or, beside half precision, float32.
        gamma, beta: BatchNorm's weight and bias, (out_channels,) or None for ones and zeros.
        running_mean, running_var: (out_channels,), both or neither; when `training` they become, in place,
            (1 − momentum)·running + momentum·batch, with the batch's unbiased variance. With all four of gamma, beta
            and the running statistics None there is no BatchNorm.
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
        Ho = (H − 1)·stride − 2·padding + kh + output_padding, and Wo likewise.

    Gradients of any order can be had (WGAN-GP, R1), in eager mode: torch.compile has no double backward. Within the
    transforms of torch.func and forward-mode differentiation plain torch runs.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; said before any work starts.

    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167) for BatchNorm; Radford et al. 2015 (arXiv:1511.06434).
    """
    tensors = (x, weight, bias, gamma, beta, running_mean, running_var)
    of_batch_norm = (training, momentum, eps, activation_first, batch_groups)
    return _run(True, tensors, stride, padding, output_padding, activation, negative_slope, *of_batch_norm)


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
    """act(BatchNorm(conv2d(x, weight, bias))), forward and backward in fused kernels.

    Args:
        weight: (out_channels, in_channels, kh, kw). All other arguments are those of `conv_transpose2d_bn_act`, which
            has an output_padding besides.

    Returns:
        (N, out_channels, Ho, Wo) in the dtype of x; channels_last in memory where the kernels ran.
        Ho = ⌊(H + 2·padding − kh) / stride⌋ + 1, and Wo likewise.

    Raises:
        ValueError, TypeError: as `conv_transpose2d_bn_act`.

    Source: as `conv_transpose2d_bn_act`.
    """
    tensors = (x, weight, bias, gamma, beta, running_mean, running_var)
    of_batch_norm = (training, momentum, eps, activation_first, batch_groups)
    return _run(False, tensors, stride, padding, 0, activation, negative_slope, *of_batch_norm)


def _run(
    transposed,
    tensors,
    stride,
    padding,
    output_padding,
    activation,
    negative_slope,
    training,
    momentum,
    eps,
    activation_first,
    batch_groups,
):
    """Either of the two; tensors: all seven of them."""
    layer = LayerSpec(
        transposed=transposed,
        stride=pair("stride", stride, least=1),
        padding=pair("padding", padding),
        output_padding=pair("output_padding", output_padding),
        activation=activation,
        slope=negative_slope,
        batch_norm=any([vector is not None for vector in tensors[3:]]),
        activation_first=activation_first,
        batch_statistics=training,
        momentum=momentum,
        eps=eps,
        batch_groups=batch_groups,
    )
    return conv_bn_act(*tensors, layer=layer)
