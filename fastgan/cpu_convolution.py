"""Convolutions on a CPU as matrix products, where that is faster than PyTorch's own kernels for them.

In float32 what gives the same bits (a GAN's first steps make a difference in the last one visible within fifty), and
the weight gradients of very wide layers, where PyTorch spends up to half of its time on putting the result in order.
"""

import functools

import torch
import torch.nn.functional as F

from fastgan import backend
from fastgan.layout import suggests_channels_last
from fastgan.ops.geometry import conv_size, conv_transpose_size
from fastgan.patterns import unfit_setting

_HALF_DTYPES = (torch.bfloat16, torch.float16)
# Of the matrix of all taps: beyond what caches hold the product gains nothing.
_MOST_ELEMENTS = 2**23
_LEAST_CHANNELS = 16  # a narrow product leaves the CPU's vectors half empty
# In float32 a layer is wide from 512×512 channels of 4×4 taps on. Where its low side is as small as that, PyTorch takes
# 1.4 to 1.6 times as long for its weight's gradient (two threads of an AMD EPYC), for that of 512×1024 channels 2.1 to
# 2.4 times; for that of 256×512 as long, in a whole step.
_WIDE_ELEMENTS, _FEW_POSITIONS = 2**22, 16


def convolve(x, conv, forward):
    """The result of `forward`, which is that of the Conv2d or ConvTranspose2d `conv`, for x on any device."""
    if x.is_cuda or conv.bias is not None:
        return forward(x)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    half, of_one_position = dtype in _HALF_DTYPES, conv.transposed and x.shape[2:] == (1, 1)
    if not (half or of_one_position or _is_wide(conv)) or not _is_plain(x, conv):
        return forward(x)
    weight = conv.weight
    if x.shape[1] != weight.shape[0 if conv.transposed else 1] or not _are_cast(x, weight):
        return forward(x)
    if not half and not (dtype == x.dtype == weight.dtype == torch.float32 and _multiplies_in_float32()):
        return forward(x)
    unpadded = not any((*conv.padding, *conv.output_padding))
    if of_one_position and unpadded:
        if half or _has_same_bits(x, weight):
            return from_one_position(x, weight)
    elif half and not conv.transposed and unpadded and x.shape[2:] == weight.shape[2:]:
        return to_one_position(x, weight)
    elif _gains(x, weight, conv, dtype):
        where = (conv.transposed, conv.stride, conv.padding, conv.output_padding)
        return Convolution.apply(x.to(dtype), weight.to(dtype), *where)
    return forward(x)


def _is_plain(x, conv):
    """Whether nothing but numbers depends on how the result comes about; stock refuses what does not fit."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.dim() == 4
        and x.numel() > 0
        and "weight" in conv._parameters
        and not unfit_setting(conv)
        and not torch.compiler.is_compiling()
        and not backend.transformed()
    )


def _are_cast(x, weight):
    """Whether stock takes them: tensors of one dtype, and under autocast those that it casts, which no float64 is."""
    if torch.is_autocast_enabled("cpu"):
        return {x.dtype, weight.dtype} <= {torch.float32, *_HALF_DTYPES}
    return x.dtype == weight.dtype


def _is_wide(conv):
    """By its sizes: the question comes with every call, and a parametrized weight would be computed for it."""
    return conv.in_channels * conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1] >= _WIDE_ELEMENTS


def _multiplies_in_float32():
    """Whether products are what convolutions are: torch.set_float32_matmul_precision("medium") makes them less."""
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


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


def _gains(x, weight, conv, dtype):
    """Whether anything of a convolution runs another way as a `Convolution`, forward or backward."""
    if not all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, weight)):
        return False
    learns = torch.is_grad_enabled() and weight.requires_grad
    low = x.shape[2:] if conv.transposed else conv_size(x.shape[2:], conv.kernel_size, conv.stride, conv.padding)
    of_image = _is_of_image(weight, dtype) and (conv.transposed or (torch.is_grad_enabled() and x.requires_grad))
    return of_image or (learns and _weight_grad_for(len(x), low, weight.shape, dtype) is not None)


def _is_of_image(weight, dtype):
    """Whether the side with more positions is an image of one channel: of its vectors all but one number is empty."""
    return dtype != torch.float32 and weight.shape[1] == 1 and weight[0, 0].numel() > 1


def _weight_grad_for(batch, low_size, weight_shape, dtype):
    """The function for a weight gradient of such a low side by products, or None where that gains nothing."""
    positions = low_size[0] * low_size[1]
    if dtype == torch.float32:
        few = positions <= _FEW_POSITIONS and weight_shape.numel() >= _WIDE_ELEMENTS
        return _weight_grad_tap_by_tap if few else None
    elements = batch * positions * weight_shape[1:].numel()
    fits = min(weight_shape[:2]) >= _LEAST_CHANNELS and elements <= _MOST_ELEMENTS
    return _weight_grad_of_all_taps if fits else None


class Convolution(torch.autograd.Function):
    """conv(x, weight) by products that in half precision are up to 4 times as fast: its weight gradient is one over all
    taps, and what comes to an image of one channel is one for all its taps, which are then added up. In float32 a
    weight gradient only, of a product for each tap.

    For both directions: (low, high), the sides with fewer and with more positions, are (result, x) of a convolution
    and (x, result) of a transposed one, and the weight is (low channels, high channels, kh, kw).
    """

    @staticmethod
    def forward(ctx, x, weight, transposed, stride, padding, output_padding):
        ctx.save_for_backward(x, weight)
        ctx.where = transposed, stride, padding, output_padding
        if not transposed:
            return F.conv2d(x, weight, None, stride, padding)
        if _is_of_image(weight, x.dtype):
            size = conv_transpose_size(x.shape[2:], weight.shape[2:], stride, padding, output_padding)
            return _to_image(x, weight, size, stride, padding)
        return F.conv_transpose2d(x, weight, None, stride, padding, output_padding)

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        transposed, stride, padding, output_padding = ctx.where
        low, high = (x, dout) if transposed else (dout, x)
        dx_by_taps = ctx.needs_input_grad[0] and not transposed and _is_of_image(weight, x.dtype)
        weight_grad = _weight_grad_for(len(low), low.shape[2:], weight.shape, x.dtype)
        if not ctx.needs_input_grad[1] or (weight_grad is _weight_grad_tap_by_tap and torch.is_grad_enabled()):
            weight_grad = None  # whose steps autograd cannot follow
        stock = (ctx.needs_input_grad[0] and not dx_by_taps, ctx.needs_input_grad[1] and weight_grad is None, False)
        dx = dweight = None
        if any(stock):
            where = (stride, padding, (1, 1), transposed, output_padding, 1)
            dx, dweight, _ = torch.ops.aten.convolution_backward(dout, x, weight, None, *where, stock)
        if dx_by_taps:
            dx = _to_image(dout, weight, x.shape[2:], stride, padding)
        if weight_grad is not None:
            dweight = weight_grad(low, high, weight.shape, stride, padding)
        return dx, dweight, None, None, None, None


def _to_image(low, weight, size, stride, padding):
    """conv_transpose2d of `low` to one channel of `size`; in float32 until all is added up."""
    wide = torch.promote_types(low.dtype, torch.float32)
    taps = weight.flatten(1).t().to(wide) @ low.flatten(2).to(wide)  # (N, kh·kw, low positions)
    image = F.fold(taps, size, weight.shape[2:], padding=padding, stride=stride)
    return image.to(low.dtype)


def _weight_grad_of_all_taps(low, high, weight_shape, stride, padding):
    low_channels, high_channels, kh, kw = weight_shape
    low, high = low.permute(0, 2, 3, 1), high.permute(0, 2, 3, 1)
    high = F.pad(high, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    taps = high.unfold(1, kh, stride[0]).unfold(2, kw, stride[1])  # (N, h, w, high channels, kh, kw), of low's h and w
    taps = taps.permute(0, 1, 2, 4, 5, 3).reshape(-1, kh * kw * high_channels)
    product = low.reshape(-1, low_channels).t() @ taps
    return product.view(low_channels, kh, kw, high_channels).permute(0, 3, 1, 2)


def _weight_grad_tap_by_tap(low, high, weight_shape, stride, padding):
    """Each tap of those positions only that have one there: of a 4×4 kernel on a side of 4×4, of 9 to 16 of them."""
    low_channels, high_channels, *kernel_size = weight_shape
    dweight = low.new_empty(low_channels, *kernel_size, high_channels)
    low, high = low.permute(2, 3, 0, 1), high.permute(2, 3, 0, 1)  # (height, width, N, channels)
    rows, columns = (
        [_meeting(tap, low.shape[axis], high.shape[axis], stride[axis], padding[axis]) for tap in range(taps)]
        for axis, taps in enumerate(kernel_size)
    )
    for i, (low_rows, high_rows) in enumerate(rows):
        for j, (low_columns, high_columns) in enumerate(columns):
            a = low[low_rows, low_columns].reshape(-1, low_channels)
            b = high[high_rows, high_columns].reshape(-1, high_channels)
            torch.mm(a.t(), b, out=dweight[:, i, j])
    return dweight.permute(0, 3, 1, 2)


def _meeting(tap, low, high, stride, padding):
    """(slice of low, slice of high) along one axis: the positions that meet at a tap of the kernel, pair by pair."""
    offset = tap - padding
    first = max(0, -(offset // stride))
    last = min(low - 1, (high - 1 - offset) // stride)
    return slice(first, last + 1), slice(first * stride + offset, max(0, last * stride + offset + 1), stride)
