"""Convolutions on a CPU as matrix products, where that is faster than PyTorch's own kernels for them.

In float32 only what gives the same bits: a GAN's first steps make a difference in the last one visible within fifty.
"""

import functools

import torch
import torch.nn.functional as F

from fastgan import backend
from fastgan.layout import suggests_channels_last

_HALF_DTYPES = (torch.bfloat16, torch.float16)
# Of the matrix of all taps: beyond what caches hold the product gains nothing.
_MOST_ELEMENTS = 2**23
_LEAST_CHANNELS = 16  # a narrow product leaves the CPU's vectors half empty


def convolve(x, conv, forward):
    """The result of `forward`, which is that of the Conv2d or ConvTranspose2d `conv`, for x on any device."""
    if x.is_cuda or conv.bias is not None or not _is_plain(x, conv):
        return forward(x)
    weight, kernel_size = conv.weight, tuple(conv.kernel_size)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    half, unpadded = dtype in _HALF_DTYPES, not any((*conv.padding, *conv.output_padding))
    if conv.transposed and unpadded and x.shape[2:] == (1, 1):
        if half or (dtype == x.dtype == weight.dtype == torch.float32 and _has_same_bits(x, weight)):
            return from_one_position(x, weight)
    elif half and not conv.transposed and unpadded and x.shape[2:] == kernel_size:
        return to_one_position(x, weight)
    elif half and weight.requires_grad and torch.is_grad_enabled() and _fits(x, weight, conv):
        where = (conv.transposed, conv.stride, conv.padding, conv.output_padding)
        return Convolution.apply(x.to(dtype), weight.to(dtype), *where)
    return forward(x)


def _is_plain(x, conv):
    """Whether nothing but numbers depends on how the result comes about; stock refuses what does not fit."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.dim() == 4
        and x.numel() > 0
        and x.shape[1] == conv.in_channels
        and "weight" in conv._parameters
        and not torch.compiler.is_compiling()
        and not backend.transformed()
    )


def from_one_position(x, weight):
    """conv_transpose2d of (N, in_channels, 1, 1) without padding: one product, in the layout of the weight."""
    in_channels, out_channels, *kernel_size = weight.shape
    if suggests_channels_last(weight):
        y = torch.mm(x.flatten(1), weight.permute(0, 2, 3, 1).reshape(in_channels, -1))
        return y.view(-1, *kernel_size, out_channels).permute(0, 3, 1, 2)
    return torch.mm(x.flatten(1), weight.reshape(in_channels, -1)).view(-1, out_channels, *kernel_size)


def to_one_position(x, weight):
    """conv2d of images as large as the kernel, without padding."""
    if suggests_channels_last(weight):
        x, weight = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
    return torch.mm(x.flatten(1), weight.flatten(1).t())[:, :, None, None]


def _has_same_bits(x, weight):
    """Whether `from_one_position` of tensors like these gives stock's bits on this CPU, gradients included."""
    layout = torch.channels_last if suggests_channels_last(weight) else torch.contiguous_format
    return _try_same_bits(tuple(x.shape), tuple(weight.shape), layout, x.requires_grad, torch.get_num_threads())


@functools.lru_cache(maxsize=256)
def _try_same_bits(x_shape, weight_shape, layout, with_input_grad, threads):
    """Try it: which sums in which order come to a number is decided from nothing but these arguments."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        random = torch.Generator().manual_seed(0)
        x = torch.randn(x_shape, generator=random).requires_grad_(with_input_grad)
        weight = torch.randn(weight_shape, generator=random).to(memory_format=layout).requires_grad_()
        dout = torch.randn(x_shape[0], *weight_shape[1:], generator=random).to(memory_format=layout)
        results = []
        for formula in (F.conv_transpose2d, from_one_position):
            y = formula(x, weight)
            results.append((y, *torch.autograd.grad(y, (weight, x) if with_input_grad else (weight,), dout)))
    return all(map(torch.equal, *results))


def _fits(x, weight, conv):
    """Whether `Convolution` is made for it."""
    high_channels = weight.shape[1]
    rows = len(x) * x.shape[2] * x.shape[3]
    if not conv.transposed:
        rows //= conv.stride[0] * conv.stride[1]
    return (
        min(weight.shape[:2]) >= _LEAST_CHANNELS
        and rows * weight.shape[2] * weight.shape[3] * high_channels <= _MOST_ELEMENTS
        and suggests_channels_last(weight)
        and suggests_channels_last(x)
    )


class Convolution(torch.autograd.Function):
    """conv(x, weight) whose weight gradient is one product over all taps: in half precision up to 4 times as fast.

    For both directions: (low, high), the sides with fewer and with more positions, are (result, x) of a convolution
    and (x, result) of a transposed one, and the weight is (low channels, high channels, kh, kw).
    """

    @staticmethod
    def forward(ctx, x, weight, transposed, stride, padding, output_padding):
        ctx.save_for_backward(x, weight)
        ctx.where = transposed, stride, padding, output_padding
        if transposed:
            return F.conv_transpose2d(x, weight, None, stride, padding, output_padding)
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        transposed, stride, padding, output_padding = ctx.where
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            where = (stride, padding, (1, 1), transposed, output_padding, 1)
            dx = torch.ops.aten.convolution_backward(dout, x, weight, None, *where, (True, False, False))[0]
        if ctx.needs_input_grad[1]:
            low, high = (x, dout) if transposed else (dout, x)
            dweight = _weight_grad(low, high, weight.shape, stride, padding)
        return dx, dweight, None, None, None, None


def _weight_grad(low, high, weight_shape, stride, padding):
    low_channels, high_channels, kh, kw = weight_shape
    low, high = low.permute(0, 2, 3, 1), high.permute(0, 2, 3, 1)
    high = F.pad(high, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    taps = high.unfold(1, kh, stride[0]).unfold(2, kw, stride[1])  # (N, h, w, high channels, kh, kw), of low's h and w
    taps = taps.permute(0, 1, 2, 4, 5, 3).reshape(-1, kh * kw * high_channels)
    product = low.reshape(-1, low_channels).t() @ taps
    return product.view(low_channels, kh, kw, high_channels).permute(0, 3, 1, 2)
