"""The two ways to compute a convolution, forward and backward: our matrix kernels, or cuDNN with our passes around it.

Every `run_` function takes the Choice between them first. Activations come and go in channels_last memory. Kernels are
imported where they run, because the package must import where Triton is not installed.

cuDNN's weight gradient, and its transposed convolution, may add in an order that changes from run to run unless
`torch.backends.cudnn.deterministic` is set; our kernels give the same bits every time.
"""

import torch

from fastgan.backend import matmul_precision
from fastgan.kernels.launch import MatrixTile, channels_last, empty_nhwc
from fastgan.ops.geometry import out_size, output_padding_for


def empty_result(x, weight, transposed, stride, padding, output_padding):
    """An unwritten result of conv(x, weight), for shape, dtype and layout."""
    channels = weight.shape[1 if transposed else 0]
    shape = (x.shape[0], channels, *out_size(x, weight, transposed, stride, padding, output_padding))
    return empty_nhwc(shape, x)


def in_dtype_of(x, weight, copy):
    """The weight's values in the dtype of x: `copy`, where somebody keeps it."""
    return weight.to(x.dtype) if copy is None else copy


def run_conv(
    choice,
    x,
    weight,
    out_size,
    *,
    transposed,
    stride,
    padding,
    bias=None,
    batch_norm=(None, None, None, None),
    eps=0.0,
    activation=None,
    slope=0.0,
    activated=None,
):
    """act(BatchNorm(conv(x, weight) + bias)) with known statistics; see `fastgan.kernels.up` and `down`.

    Args:
        choice: see `fastgan.ops.choice`.
        out_size: the (h, w) of the result.
        batch_norm: (mean, var, gamma, beta), each (C,) or None; no mean means no BatchNorm.
        activated: None, or act(z) in the shape of the result, which then is conv(x, weight)·act'(z).
    """
    epilogue = dict(bias=bias, batch_norm=batch_norm, eps=eps, activation=activation, slope=slope)
    if choice.implementation == "triton":
        epilogue["activated"] = None if activated is None else channels_last(activated)
        return _matrix_kernel(choice, x, weight, out_size, transposed, stride, padding, **epilogue)
    y = _cudnn(x, weight, out_size, transposed, stride, padding)
    if activated is not None:
        from fastgan.kernels.batch_norm import activation_input_grad

        return activation_input_grad(y, channels_last(activated), activation=activation, slope=slope)
    if bias is not None or batch_norm[0] is not None or activation is not None:
        from fastgan.kernels.epilogue import conv_epilogue_

        conv_epilogue_(y, **epilogue)
    return y


def run_conv_statistics(
    choice,
    x,
    weight,
    out_size,
    *,
    transposed,
    stride,
    padding,
    bias=None,
    activation=None,
    slope=0.0,
    eps,
    groups=1,
):
    """y = act(conv(x, weight) + bias) with its batch statistics.

    Returns:
        y, and per group and channel (groups, C) in float32: mean, 1/sqrt(var + eps) and the unbiased variance.
    """
    from fastgan.kernels.statistics import merge_statistics, tile_statistics

    epilogue = dict(bias=bias, activation=activation, slope=slope, groups=groups)
    if choice.implementation == "triton":
        epilogue = dict(statistics=True, **epilogue)
        y, tiles = _matrix_kernel(choice, x, weight, out_size, transposed, stride, padding, **epilogue)
    else:
        y = _cudnn(x, weight, out_size, transposed, stride, padding)
        tiles = tile_statistics(y, **epilogue)
    return y, *merge_statistics(tiles, eps)


def run_conv_batch_norm_grad(
    choice, dz, weight, out_size, normalized, *, transposed, stride, padding, activation, slope
):
    """The gradient on its way back through a convolution and the activation and BatchNorm before that.

    Args:
        normalized: (y, mean, invstd, gamma, beta) of BatchNorm; see `fastgan.kernels.up` and `down`.

    Returns:
        conv(dz, weight)·act'(z) with z = γ·x̂ + β, and its sums [Σ dz, Σ dz·x̂], (groups, 2, C) float32.
    """
    y, *vectors = normalized
    normalized, act = (channels_last(y), *vectors), dict(activation=activation, slope=slope)
    geometry = (transposed, stride, padding)
    if choice.implementation == "triton":
        from fastgan.kernels.statistics import sum_rows

        dz, parts = _matrix_kernel(choice, dz, weight, out_size, *geometry, normalized=normalized, **act)
        groups, _, tiles, channels = parts.shape
        sums = parts.new_empty((groups, 2, channels))
        sum_rows(parts.view(groups * 2, tiles, channels), out=sums)
        return dz, sums
    from fastgan.kernels.batch_norm import batch_norm_grad_sums

    grad = _cudnn(dz, weight, out_size, *geometry)
    return grad, batch_norm_grad_sums(grad, *normalized, **act, dz=None if activation is None else grad)


def run_weight_grad(choice, low, high, weight, *, stride, padding):
    """The gradient for `weight`, in its dtype and its memory layout; see `fastgan.kernels.weight_grad`."""
    low, high = channels_last(low), channels_last(high)
    if choice.implementation == "triton":
        from fastgan.kernels.weight_grad import weight_grad

        options = dict(stride=stride, padding=padding, precision=matmul_precision(low.dtype))
        return weight_grad(low, high, weight, tile=_tile(choice), **options)
    # That of a transposed convolution is the same with the ends exchanged, as ours is.
    # Of the weight it reads the shape, and wants the dtype of the others.
    like = weight if weight.dtype == low.dtype else torch.empty_like(weight, dtype=low.dtype)
    _, grad, _ = torch.ops.aten.convolution_backward(
        low, high, like, None, stride, padding, [1, 1], False, [0, 0], 1, [False, True, False]
    )
    # cuDNN has its own idea of the layout: contiguous for the (1, 512, 4, 4) weight of a discriminator's end.
    out = torch.empty_like(weight)
    return grad if grad.dtype == out.dtype and grad.stride() == out.stride() else out.copy_(grad)


def _matrix_kernel(choice, x, weight, out_size, transposed, stride, padding, **epilogue):
    if transposed:
        from fastgan.kernels.up import up as kernel
    else:
        from fastgan.kernels.down import down as kernel
    options = dict(stride=stride, padding=padding, precision=matmul_precision(x.dtype), tile=_tile(choice))
    return kernel(channels_last(x), weight, out_size, **options, **epilogue)


def _tile(choice):
    return None if choice.tile is None else MatrixTile(**choice.tile)


def _cudnn(x, weight, out_size, transposed, stride, padding):
    """aten's convolution without bias, in the strides of a channels_last tensor."""
    x = channels_last(x)
    extra = output_padding_for(out_size, x.shape[2:], weight.shape[2:], transposed, stride, padding)
    y = torch.ops.aten.convolution(x, weight, None, stride, padding, [1, 1], transposed, extra, 1)
    channels, (h, w) = y.shape[1], y.shape[2:]
    strides = (h * w * channels, 1, w * channels, channels)
    # Where a size is one, other strides count as channels_last too; the operators promise these.
    return y if y.stride() == strides else channels_last(y).as_strided(y.shape, strides)
