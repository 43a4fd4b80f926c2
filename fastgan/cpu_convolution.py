"""Convolutions on a CPU as matrix products, where those are faster than PyTorch's own kernels for them.

Between sides of many channels PyTorch's convolutions in float32 run as fast as the CPU multiplies. They are slow at the
ends of a GAN, a side of one position and one of three channels, and at putting large weight gradients in order. As a
product each of these adds up in another order than PyTorch does, with errors no larger than its. In half precision all
of them are slow where the CPU has no instructions for it: there float32 computes what is rounded at the end.
"""

import functools
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from fastgan import backend
from fastgan.layout import suggests_channels_last
from fastgan.ops.geometry import out_size
from fastgan.patterns import unfit_setting

# Half precisions, and what multiplies them: Intel's tiles (AMX) and vectors (AVX-512), as torch.cpu.get_capabilities
# calls them.
_HALF_INSTRUCTIONS = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
# Weight gradients in half precision: PyTorch puts each in order again, which counts where it is large beside what it is
# summed up of. A product copies that, all taps of it: at 8 positions (of all images) a channel both take the same time.
_POSITIONS_A_CHANNEL = 8
_LEAST_CHANNELS = 16  # a narrow product leaves the CPU's vectors half empty
# In float32 PyTorch's wait for copies of large weights, from 256×512 channels of 4×4 taps on, where a low side of few
# positions makes their arithmetic small: they take 1.2 times as long as products, for 512×1024 channels 2.1 to 2.4
# times (two threads of an AMD EPYC, with cold caches as in a step).
_WIDE_ELEMENTS, _FEW_POSITIONS = 2**21, 16
# PyTorch computes eight channels of an image, whatever it has. Up to so many of them the product is ahead (1.3 to 5
# times as fast in float32), if the low side has so many numbers for each; with fewer it is in a loop of nothing else,
# but not in a training step. Half precision, whose product is in float32, stops at one channel.
_IMAGE_CHANNELS, _IMAGE_CHANNELS_IN_HALF, _LEAST_LOW = 3, 1, 2**17


def convolve(x, conv, forward):
    """The result of `forward`, which is that of the Conv2d or ConvTranspose2d `conv`, for x on any device."""
    if not x.is_cpu or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return forward(x)
    weight = conv._parameters.get("weight")  # none of a parametrized layer, for which it would be computed
    if weight is None or conv.bias is not None or x.dim() != 4 or unfit_setting(conv):
        return forward(x)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    working = torch.float32 if _gains_in_float32(dtype, trains) else dtype
    # By sizes first: most layers are none of these, and every call asks.
    compute, where = _one_position(x, weight, conv), ()
    if compute is None:
        by_products = _gains(x, weight, conv, working)
        if not by_products and working == dtype:
            return forward(x)
        compute = Convolution.apply if by_products else _convolution
        where = (conv.transposed, conv.stride, conv.padding, conv.output_padding)
    if not (_is_plain(x, weight, conv) and _are_cast(x, weight, dtype) and _multiplies_in(working)):
        return forward(x)
    with _without_autocast():
        return compute(x.to(working), weight.to(working), *where).to(dtype)


@contextmanager
def _without_autocast():
    """Products of float32 are what they say: autocast would cast their operands."""
    enabled = torch.is_autocast_enabled("cpu")
    torch.set_autocast_enabled("cpu", False)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", enabled)


@functools.cache
def _gains_in_float32(dtype, trains):
    """Whether the CPU convolves numbers of a half precision faster as float32, conversions included.

    Without instructions for them oneDNN converts each number again and again (4 to 5 times float32's time) or, before
    AVX-512, PyTorch's slow convolutions are all there is (5 times and more): so it is on a Xeon if oneDNN is told to
    use no others. Intel's AVX-512 for bfloat16 takes up to twice float32's time there, and for weight gradients in
    float16 hundreds of times; forward alone it is the faster one where images are few. AMD's is faster than float32.
    Of other CPUs than x86 nothing is known.
    """
    if dtype not in _HALF_INSTRUCTIONS:
        return False
    has = torch.cpu.get_capabilities()
    matrices, vectors = _HALF_INSTRUCTIONS[dtype]
    if has.get("architecture") != "x86_64" or has.get(matrices):
        return False
    return not has.get(vectors) or (trains and "Intel" in has.get("cpu_name", ""))


def _is_plain(x, weight, conv):
    """Whether nothing but numbers depends on how the result comes about; stock refuses what does not fit."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.numel() > 0
        and x.shape[1] == weight.shape[0 if conv.transposed else 1]
        and not backend.transformed()
    )


def _are_cast(x, weight, dtype):
    """Whether stock computes them in `dtype`; under autocast it casts no float64."""
    castable = {torch.float32, *_HALF_INSTRUCTIONS} if torch.is_autocast_enabled("cpu") else {dtype}
    return {x.dtype, weight.dtype} <= castable


def _multiplies_in(dtype):
    """Whether products are what convolutions are: torch.set_float32_matmul_precision("medium") makes them less."""
    if dtype != torch.float32:
        return dtype in _HALF_INSTRUCTIONS
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


def _one_position(x, weight, conv):
    """`from_one_position` or `to_one_position` if that is what the convolution is, otherwise None."""
    positions = x.shape[2:]
    if positions != ((1, 1) if conv.transposed else weight.shape[2:]) or any((*conv.padding, *conv.output_padding)):
        return None
    return from_one_position if conv.transposed else to_one_position


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
    return F.linear(x.flatten(1), weight.flatten(1))[:, :, None, None]


def _gains(x, weight, conv, dtype):
    """Whether anything of a convolution runs another way as a `Convolution`, forward or backward."""
    grows = torch.is_grad_enabled()
    to_image = weight.shape[1] <= _IMAGE_CHANNELS and (conv.transposed or (grows and x.requires_grad))
    learns = grows and weight.requires_grad and (dtype != torch.float32 or weight.numel() >= _WIDE_ELEMENTS)
    if not (to_image or learns):
        return False
    size = out_size(x, weight, conv.transposed, conv.stride, conv.padding, conv.output_padding)
    low, high = (x.shape[2:], size) if conv.transposed else (size, x.shape[2:])
    if to_image and _is_to_image(len(x), low, high, weight.shape, conv.stride, conv.padding, dtype):
        return True
    in_order = all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    return learns and in_order and _weight_grad_for(len(x), low, weight.shape, dtype) is not None


def _is_to_image(batch, low_size, high_size, weight_shape, stride, padding, dtype):
    """Whether going from such a low side to the other one is faster as a product: to an image of a few channels, which
    is larger by the stride in either direction."""
    low_channels, image_channels, *kernel_size = weight_shape
    most = _IMAGE_CHANNELS if dtype == torch.float32 else _IMAGE_CHANNELS_IN_HALF
    if image_channels > most or low_channels < _LEAST_CHANNELS or kernel_size == [1, 1]:
        return False
    if batch * low_size[0] * low_size[1] * low_channels < _LEAST_LOW * image_channels:
        return False
    return all(
        high == low * step and padded + step <= taps
        for low, high, taps, step, padded in zip(low_size, high_size, kernel_size, stride, padding, strict=True)
    )


def _weight_grad_for(batch, low_size, weight_shape, dtype):
    """The function for a weight gradient of such a low side by products, or None where that gains nothing."""
    positions = low_size[0] * low_size[1]
    if dtype == torch.float32:
        few = positions <= _FEW_POSITIONS and weight_shape.numel() >= _WIDE_ELEMENTS
        return _weight_grad_tap_by_tap if few else None
    fits = min(weight_shape[:2]) >= _LEAST_CHANNELS and batch * positions <= _POSITIONS_A_CHANNEL * weight_shape[0]
    return _weight_grad_of_all_taps if fits else None


def _convolution(x, weight, transposed, stride, padding, output_padding):
    """PyTorch's."""
    return torch.convolution(x, weight, None, stride, padding, (1, 1), transposed, output_padding, 1)


class Convolution(torch.autograd.Function):
    """conv(x, weight) with what gains by products as such: what comes to an image, forward or backward, is one for all
    taps, which are then added up, and so is a weight gradient in half precision; in float32 that is one for each tap.

    For both directions: (low, high), the sides with fewer and with more positions, are (result, x) of a convolution
    and (x, result) of a transposed one, and the weight is (low channels, high channels, kh, kw).
    """

    @staticmethod
    def forward(ctx, x, weight, transposed, stride, padding, output_padding):
        ctx.save_for_backward(x, weight)
        ctx.where = transposed, stride, padding, output_padding
        if transposed:
            size = out_size(x, weight, transposed, stride, padding, output_padding)
            if _is_to_image(len(x), x.shape[2:], size, weight.shape, stride, padding, x.dtype):
                return _to_image(x, weight, stride, padding)
        return _convolution(x, weight, transposed, stride, padding, output_padding)

    @staticmethod
    @_without_autocast()
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        transposed, stride, padding, output_padding = ctx.where
        low, high = (x, dout) if transposed else (dout, x)
        sizes = len(low), low.shape[2:]
        dx_by_taps = ctx.needs_input_grad[0] and not transposed
        dx_by_taps = dx_by_taps and _is_to_image(*sizes, x.shape[2:], weight.shape, stride, padding, x.dtype)
        weight_grad = _weight_grad_for(*sizes, weight.shape, x.dtype)
        if not ctx.needs_input_grad[1] or (weight_grad is _weight_grad_tap_by_tap and torch.is_grad_enabled()):
            weight_grad = None  # whose steps autograd cannot follow
        stock = (ctx.needs_input_grad[0] and not dx_by_taps, ctx.needs_input_grad[1] and weight_grad is None, False)
        dx = dweight = None
        if any(stock):
            where = (stride, padding, (1, 1), transposed, output_padding, 1)
            dx, dweight, _ = torch.ops.aten.convolution_backward(dout, x, weight, None, *where, stock)
        if dx_by_taps:
            dx = _to_image(dout, weight, stride, padding)
        if weight_grad is not None:
            dweight = weight_grad(low, high, weight.shape, stride, padding)
        return dx, dweight, None, None, None, None


def _to_image(low, weight, stride, padding):
    """conv_transpose2d of `low` to images `stride` times as large, in float32 until all is added up."""
    layout = torch.channels_last if any(map(suggests_channels_last, (low, weight))) else torch.contiguous_format
    (n, low_channels, *size), (_, channels, *kernel_size) = low.shape, weight.shape
    wide = torch.promote_types(low.dtype, torch.float32)
    low, by_tap = low.to(wide), weight.flatten(1).t().to(wide)
    if low.is_contiguous(memory_format=torch.channels_last):
        taps = torch.mm(by_tap, low.permute(0, 2, 3, 1).reshape(-1, low_channels).t()).view(-1, *kernel_size, n, *size)
    else:
        taps = torch.bmm(by_tap.expand(n, -1, -1), low.flatten(2)).view(n, -1, *kernel_size, *size).movedim(0, 3)
    for axis in range(2):
        taps = _added_up(taps, axis, stride[axis], padding[axis])
    # A tensor of its own, not a view: an activation in place comes next.
    image_size = [positions * step for positions, step in zip(size, stride, strict=True)]
    image = torch.empty(n, channels, *image_size, dtype=weight.dtype, device=low.device, memory_format=layout)
    image.view(n, channels, size[0], stride[0], size[1], stride[1]).copy_(taps.permute(3, 0, 4, 1, 5, 2))
    return image


def _added_up(taps, axis, stride, padding):
    """What the taps come to along one axis of the images, in place.

    Args:
        taps: (channels, taps along one axis, along the other, N, height of the low side, its width).
    Returns:
        The same with only the taps that stay where they are: those to the `stride` positions of the image that lie
        at each one of the low side. The others were moved there and added.
    """
    size, image = taps.shape[4 + axis], taps.narrow(1 + axis, padding, stride)
    for tap in range(taps.shape[1 + axis]):
        shift, phase = divmod(tap - padding, stride)
        length = size - abs(shift)
        if shift != 0 and length > 0:
            moved = taps.select(1 + axis, tap).narrow(3 + axis, max(-shift, 0), length)
            image.select(1 + axis, phase).narrow(3 + axis, max(shift, 0), length).add_(moved)
    return image


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
