"""What convolutions are computed by on a CPU: matrix products, where those are faster than PyTorch's own kernels.

Between sides of many channels PyTorch's convolutions in float32 run as fast as the CPU multiplies. They are slow at the
ends of a GAN, a side of one position and one of three channels, and where large weights are put in order for few
positions. As a product each of these adds up in another order than PyTorch does, with errors no larger than its. In
half precision all of them are slow where the CPU has no instructions for it: there float32 computes what is rounded at
the end.
"""

import functools

import torch

from fastgan import backend
from fastgan.cpu.products import (
    from_one_position,
    to_high,
    to_low,
    to_one_position,
    weight_grad_of_all_taps,
    weight_grad_tap_by_tap,
)
from fastgan.first_order import only_first_order
from fastgan.fusing.layer_code import has_own_code
from fastgan.fusing.layout import default_layout, suggests_channels_last
from fastgan.fusing.patterns import unfit_setting
from fastgan.ops.geometry import backward_conv_args, out_size
from fastgan.wanted import is_wanted

# Half precisions, and what multiplies them: Intel's tiles (AMX) and vectors (AVX-512), as torch.cpu.get_capabilities
# calls them.
_HALF_INSTRUCTIONS = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
# Weight gradients in half precision: PyTorch puts each in order again, which counts where it is large beside what it is
# summed up of. A product copies that, all taps of it: at 8 positions (of all images) a channel both take the same time.
_POSITIONS_A_CHANNEL = 8
_LEAST_CHANNELS = 16  # a narrow product leaves the CPU's vectors half empty
# In float32 PyTorch's wait for copies of large weights, from 256×512 channels of 4×4 taps on, where a low side of few
# positions makes their arithmetic small. How many times as long as products they take (two threads, cold caches as in a
# step, stride 2, batches of 1 to 32 on the last CPU; – was not measured):
#
#     channels                    EPYC, AVX-512   Xeon          EPYC without AVX-512
#     weight gradient   256×512   1.2             –             1.1 to 8, for all sizes; more for one position
#                       512×1024  2.1 to 2.4      –
#     from the low side 256×512   –               1.3 to 1.4    0.7 to 1.0
#                       512×512   –               1.3 to 1.4    0.7 to 1.9, mostly above 1; one position up to 4.6
#                       512×1024  –               1.3 to 1.4    0.9 to 2.9
#     to the low side             –               1.1 to 1.3    1.1 to 2.8; for 512×1024 twice that
#
# 512×512 at two positions a side and fewer: 2 on the Xeon, where weights in the default layout are the same. Without
# AVX-512 and without strides (3×3 taps): weight gradients of more than one image 1.0 to 10, the others 0.6 to 1.8.
_WIDE_ELEMENTS, _FEW_POSITIONS = 2**21, 16
_WIDE_ELEMENTS_UPWARDS = 2**22  # without AVX-512, from the low side
# PyTorch pads an image's channels to eight. Up to so many of them the product is 1.3 to 5 times as fast in float32, if
# the low side has _LEAST_LOW numbers for each; with fewer it is faster in a loop of nothing else, but not in a training
# step. Half precision, whose product is in float32, stops at one channel.
_IMAGE_CHANNELS, _IMAGE_CHANNELS_IN_HALF, _LEAST_LOW = 3, 1, 2**17


def convolve(x, conv, forward, *, keeps_memory=False, may_be_view=True):
    """The result of `forward`, which is that of the Conv2d or ConvTranspose2d `conv`, for x on any device.

    Args:
        keeps_memory: whether stock hands on the convolution's own tensor: nothing follows, or an activation in place.
            Of one channel or one position it then needs stock's strides, which the next layer goes by.
        may_be_view: whether nobody but a BatchNorm gets the result. Other code may call ``detach_()`` of it, which
            fails on a view.
    """
    if not isinstance(x, torch.Tensor) or not x.is_cpu or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return forward(x)
    parameters = conv._parameters  # without those of a parametrized layer, which would be computed
    weight = parameters.get("weight")
    if weight is None or _surely_gains_nothing(x, weight, conv):
        return forward(x)
    bias = parameters.get("bias")
    if "bias" not in parameters or x.dim() != 4 or unfit_setting(conv) or has_own_code(conv.__dict__):
        return forward(x)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    working = torch.float32 if _gains_in_float32(dtype, trains) else dtype
    compute, conv_args = _one_position(x, weight, conv), ()
    if compute is None:
        by_products = _any_product_gains(x, weight, conv, working)
        if not by_products and working == dtype:
            return forward(x)
        compute = Convolution.apply if by_products else _convolution
        conv_args = (conv.transposed, conv.stride, conv.padding, conv.output_padding)
    if not (_is_plain(x, weight, bias, conv) and _are_cast(dtype, x, weight, bias) and _multiplies_in(working)):
        return forward(x)
    with backend.without_autocast("cpu"):  # or products of float32 would be of less
        # Autocast's weights are copies, so that the weight may be updated before a backward of this result.
        y = compute(x.to(working), weight.to(working, copy=trains and weight.dtype != dtype), *conv_args)
        y = (y if bias is None else y + bias.to(working)[:, None, None]).to(dtype)
    n, channels, *size = y.shape
    either = (channels == 1) != (size == [1, 1])  # the numbers lie alike in both layouts, strides tell which it is
    if keeps_memory and either and (suggests_channels_last(weight) or suggests_channels_last(x)):
        y = y.flatten(1).view(n, *size, channels).permute(0, 3, 1, 2)
    return y if may_be_view or not y._is_view() or only_first_order() else y.clone()


def _surely_gains_nothing(x, weight, conv):
    """Whether dtype and a few sizes tell that no product gains: most layers are such, and every call asks."""
    return (
        x.dtype == torch.float32
        and weight.numel() < _WIDE_ELEMENTS
        and not _goes_to_image(x, weight, conv)
        and not _has_one_position(x, weight, conv)
        and not torch.is_autocast_enabled("cpu")
    )


def _goes_to_image(x, weight, conv):
    """Whether the result or the gradient for x has an image's few channels."""
    few = weight.shape[1] <= _IMAGE_CHANNELS
    return few and (conv.transposed or (torch.is_grad_enabled() and x.requires_grad))


def _has_one_position(x, weight, conv):
    """Whether the low side has one position, if nothing is padded."""
    return x.shape[2:] == ((1, 1) if conv.transposed else weight.shape[2:])


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
    return not has.get(vectors) or (trains and _is_intel())


@functools.cache
def _is_intel():
    return "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")


@functools.cache
def lacks_avx512():
    """Whether it is an x86 CPU without AVX-512: PyTorch's convolutions have other code there, in bfloat16 slow code."""
    has = torch.cpu.get_capabilities()
    return has.get("architecture") == "x86_64" and not has.get("avx512_f")


def _is_slow_with_large_weights():
    """Whether more is slow on this CPU than weight gradients in channels_last."""
    return _is_intel() or lacks_avx512()


def _is_slow_with(weight, upwards, stride):
    """Whether PyTorch's convolution with so large a weight is slow, from the low side (`upwards`) or to it."""
    if lacks_avx512():
        return max(stride) > 1 and (not upwards or weight.numel() >= _WIDE_ELEMENTS_UPWARDS)
    return _is_intel()


def _is_plain(x, weight, bias, conv):
    """Whether nothing but numbers depends on how the result comes about; stock refuses what does not fit."""
    in_channels, out_channels = weight.shape[:2] if conv.transposed else weight.shape[1::-1]
    return (
        all([tensor is None or type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in (x, weight, bias)])
        and x.numel() > 0
        and x.shape[1] == in_channels
        and (bias is None or bias.shape == (out_channels,))
        and not (backend.transformed() or backend.has_dispatch_mode())
    )


def _are_cast(dtype, *tensors):
    """Whether stock computes them in `dtype`; under autocast it casts no float64."""
    castable = {torch.float32, *_HALF_INSTRUCTIONS} if torch.is_autocast_enabled("cpu") else {dtype}
    return all([tensor is None or tensor.dtype in castable for tensor in tensors])


def _multiplies_in(dtype):
    """Whether products are what convolutions are: torch.set_float32_matmul_precision("medium") makes them less."""
    if dtype != torch.float32:
        return dtype in _HALF_INSTRUCTIONS
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


def _one_position(x, weight, conv):
    """`from_one_position` or `to_one_position` if that is what the convolution is, otherwise None."""
    if not _has_one_position(x, weight, conv) or any((*conv.padding, *conv.output_padding)):
        return None
    return from_one_position if conv.transposed else to_one_position


def _any_product_gains(x, weight, conv, dtype):
    """Whether anything of a convolution runs another way as a `Convolution`, forward or backward."""
    learns = torch.is_grad_enabled() and weight.requires_grad
    to_image = _goes_to_image(x, weight, conv)
    if dtype == torch.float32:
        large = weight.numel() >= _WIDE_ELEMENTS and (learns or _is_slow_with_large_weights())
    else:
        large = learns
    if not (to_image or large):
        return False
    size = out_size(x, weight, conv.transposed, conv.stride, conv.padding, conv.output_padding)
    low, high = (x.shape[2:], size) if conv.transposed else (size, x.shape[2:])
    to_image = to_image and _is_to_image(len(x), low, weight.shape, dtype)
    if to_image and _fit(low, high, weight, conv.stride, conv.padding):
        return True
    if not large:
        return False
    if dtype == torch.float32:  # its results lie as the weight does, stock's as x, too
        as_stock = suggests_channels_last(weight) or not suggests_channels_last(x)
        return as_stock and _is_wide(low, weight, dtype)
    in_order = all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    return in_order and _weight_grad_for(len(x), low, weight, dtype) is not None


def _is_wide(low_size, weight, dtype):
    """Whether a weight gradient is faster as products; so is then a convolution for which `_is_slow_with` is true."""
    positions = low_size[0] * low_size[1]
    large = dtype == torch.float32 and weight.numel() >= _WIDE_ELEMENTS
    if not large or positions > _FEW_POSITIONS:
        return False
    if suggests_channels_last(weight):
        return weight.is_contiguous(memory_format=torch.channels_last)
    return weight.is_contiguous() and _is_slow_with_large_weights()


def _is_to_image(batch, low_size, weight_shape, dtype):
    """Whether going from such a low side to the other one is faster as a product because that has few channels."""
    low_channels, image_channels, *kernel_size = weight_shape
    most = _IMAGE_CHANNELS if dtype == torch.float32 else _IMAGE_CHANNELS_IN_HALF
    if image_channels > most or low_channels < _LEAST_CHANNELS or kernel_size == [1, 1]:
        return False
    return batch * low_size[0] * low_size[1] * low_channels >= _LEAST_LOW * image_channels


def _fit(low_size, high_size, weight, stride, padding):
    """Whether the sides are such that `to_high` goes from one to the other: `stride` times as large, without gaps."""
    return all(
        high == low * step and padded + step <= taps
        for low, high, taps, step, padded in zip(low_size, high_size, weight.shape[2:], stride, padding, strict=True)
    )


def _weight_grad_for(batch, low_size, weight, dtype):
    """The function for a weight gradient of such a low side by products, or None where that gains nothing."""
    if dtype == torch.float32:
        if not _is_wide(low_size, weight, dtype):
            return None
        return weight_grad_tap_by_tap if suggests_channels_last(weight) else weight_grad_of_all_taps
    few = batch * low_size[0] * low_size[1] <= _POSITIONS_A_CHANNEL * len(weight)
    return weight_grad_of_all_taps if few and min(weight.shape[:2]) >= _LEAST_CHANNELS else None


def _convolution(x, weight, transposed, stride, padding, output_padding):
    """PyTorch's convolution, without a bias."""
    return torch.convolution(x, weight, None, stride, padding, (1, 1), transposed, output_padding, 1)


def _by_products(x, weight, upwards, size, stride, padding, layouts):
    """`x` brought to the other side, of that size, by products; None where those gain nothing.

    `layouts`: the tensors of which one at least is channels_last where the result is to be.
    """
    low = x.shape[2:] if upwards else size
    gains = _is_slow_with(weight, upwards, stride) and _is_wide(low, weight, x.dtype)
    if not upwards:
        return to_low(x, weight, stride, padding, layouts) if gains else None
    gains = gains or _is_to_image(len(x), low, weight.shape, x.dtype)
    fits = gains and _fit(low, size, weight, stride, padding)
    return to_high(x, weight, stride, padding, layouts) if fits else None


class Convolution(torch.autograd.Function):
    """conv(x, weight) with what gains by products as such, forward and backward.

    For both directions: (low, high), the sides with fewer and with more positions, are (result, x) of a convolution
    and (x, result) of a transposed one, and the weight is (low channels, high channels, kh, kw).
    """

    @staticmethod
    def forward(ctx, x, weight, transposed, stride, padding, output_padding):
        ctx.save_for_backward(x, weight)
        ctx.conv_args = transposed, stride, padding, output_padding
        size = out_size(x, weight, *ctx.conv_args)
        y = _by_products(x, weight, transposed, size, stride, padding, (x, weight))
        return _convolution(x, weight, *ctx.conv_args) if y is None else y

    @staticmethod
    @backend.without_autocast("cpu")
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        transposed, stride, padding, output_padding = ctx.conv_args
        low, high = (x, dout) if transposed else (dout, x)
        wants_x, wants_weight = is_wanted(ctx, 0), is_wanted(ctx, 1)
        dx = weight_grad = None
        if backend.is_batched(dout):
            pass  # it maps what PyTorch has for both of them
        elif torch.is_grad_enabled():  # create_graph=True: autograd follows what gives the gradients
            if wants_x:
                back = backward_conv_args(x.shape[2:], weight.shape[2:], transposed, stride, padding)
                dx = Convolution.apply(dout, weight, *back)
                if not (suggests_channels_last(x) or suggests_channels_last(weight)):
                    dx = default_layout(dx)
        else:
            if wants_x:
                dx = _by_products(dout, weight, not transposed, x.shape[2:], stride, padding, (x, weight))
            if wants_weight:
                weight_grad = _weight_grad_for(len(low), low.shape[2:], weight, x.dtype)
        dweight = None if weight_grad is None else weight_grad(low, high, weight, stride, padding)
        left = (wants_x and dx is None, wants_weight and dweight is None, False)
        if any(left):
            options = (stride, padding, (1, 1), transposed, output_padding, 1)
            found = torch.ops.aten.convolution_backward(dout, x, weight, None, *options, left)
            dx, dweight = (found[0] if left[0] else dx), (found[1] if left[1] else dweight)
        return dx, dweight, None, None, None, None
