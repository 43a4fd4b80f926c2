"""What convolutions are computed by on a CPU: matrix products, where those are faster than PyTorch's own kernels.

As a product each adds up in another order than PyTorch does, with errors no larger than its. In half precision all
convolutions are slow where the CPU has no instructions for it: there float32 computes what is rounded at the end.
"""

import torch

from fastgan import backend
from fastgan.cpu.capabilities import HALF_INSTRUCTIONS, gains_in_float32
from fastgan.cpu.choice import products_for, surely_gains_nothing
from fastgan.cpu.products import from_one_position, to_one_position
from fastgan.first_order import only_first_order
from fastgan.fusing.layer_code import has_own_code
from fastgan.fusing.patterns import padding_of, unfit_setting
from fastgan.memory_format import default_layout, suggests_channels_last
from fastgan.ops.geometry import backward_conv_args
from fastgan.wanted import is_wanted


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
    casts = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if casts else x.dtype
    x_learns, weight_learns = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight))
    trains = x_learns or weight_learns
    working = torch.float32 if gains_in_float32(dtype, trains) else dtype
    if not _multiplies_in(working):
        return forward(x)
    compute, arguments = _one_position(x, weight, conv), ()
    if compute is None:
        conv_args = (conv.transposed, conv.stride, padding_of(conv), conv.output_padding)
        products = products_for(x, weight, working, *conv_args)
        if _any_is_used(products, conv.transposed, x_learns, weight_learns):
            compute, arguments = Convolution.apply, (products, *conv_args)
        elif working != dtype:
            compute, arguments = _convolution, conv_args
        else:
            return forward(x)
    if not (_is_plain(x, weight, bias, conv) and _are_cast(dtype, casts, x, weight, bias)):
        return forward(x)
    if casts or working != dtype:
        with backend.without_autocast("cpu"):  # or products of float32 would be of less
            # Autocast's weights are copies, so that the weight may be updated before a backward of this result.
            y = compute(x.to(working), weight.to(working, copy=trains and weight.dtype != dtype), *arguments)
            y = (y if bias is None else y + bias.to(working)[:, None, None]).to(dtype)
    else:
        y = compute(x, weight, *arguments)
        y = y if bias is None else y + bias[:, None, None]
    n, channels, *size = y.shape
    either = (channels == 1) != (size == [1, 1])  # the numbers lie alike in both layouts, strides tell which it is
    if keeps_memory and either and (suggests_channels_last(weight) or suggests_channels_last(x)):
        y = y.flatten(1).view(n, *size, channels).permute(0, 3, 1, 2)
    return y if may_be_view or not y._is_view() or only_first_order() else y.clone()


def _surely_gains_nothing(x, weight, conv):
    """Whether dtype and a few sizes tell that no product gains: most layers are such, and every call asks."""
    return (
        x.dtype == torch.float32
        and surely_gains_nothing(x, weight, conv)
        and not _has_one_position(x, weight, conv)
        and not torch.is_autocast_enabled("cpu")
    )


def _has_one_position(x, weight, conv):
    """Whether the low side has one position, if nothing is padded."""
    return x.shape[2:] == ((1, 1) if conv.transposed else weight.shape[2:])


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


def _are_cast(dtype, casts, *tensors):
    """Whether stock computes them in `dtype`; under autocast it casts no float64."""
    castable = (torch.float32, *HALF_INSTRUCTIONS) if casts else (dtype,)
    return all([tensor is None or tensor.dtype in castable for tensor in tensors])


def _multiplies_in(dtype):
    """Whether products are what convolutions are: torch.set_float32_matmul_precision("medium") makes them less."""
    if dtype != torch.float32:
        return dtype in HALF_INSTRUCTIONS
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


def _one_position(x, weight, conv):
    """`from_one_position` or `to_one_position` if that is what the convolution is, otherwise None."""
    if not _has_one_position(x, weight, conv) or any((*padding_of(conv), *conv.output_padding)):
        return None
    return from_one_position if conv.transposed else to_one_position


def _any_is_used(products, transposed, x_learns, weight_learns):
    """Whether anything of a convolution is one of its products, forward or backward."""
    forward, back = (products.to_high, products.to_low) if transposed else (products.to_low, products.to_high)
    return bool(forward or (x_learns and back) or (weight_learns and products.weight_grad))


def _convolution(x, weight, transposed, stride, padding, output_padding):
    """PyTorch's convolution, without a bias."""
    return torch.convolution(x, weight, None, stride, padding, (1, 1), transposed, output_padding, 1)


class Convolution(torch.autograd.Function):
    """conv(x, weight) with what gains by `products` as such, forward and backward.

    For both directions: (low, high), the sides with fewer and with more positions, are (result, x) of a convolution
    and (x, result) of a transposed one, and the weight is (low channels, high channels, kh, kw). So the gradient for x,
    which goes the other way, has the same products.
    """

    @staticmethod
    def forward(ctx, x, weight, products, transposed, stride, padding, output_padding):
        ctx.save_for_backward(x, weight)
        ctx.products, ctx.conv_args = products, (transposed, stride, padding, output_padding)
        product = products.to_high if transposed else products.to_low
        if product is None:
            return _convolution(x, weight, *ctx.conv_args)
        return product(x, weight, stride, padding, (x, weight))

    @staticmethod
    @backend.without_autocast("cpu")
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        products, (transposed, stride, padding, output_padding) = ctx.products, ctx.conv_args
        wants_x, wants_weight = is_wanted(ctx, 0), is_wanted(ctx, 1)
        dx = dweight = None
        if backend.is_batched(dout):
            pass  # it maps what PyTorch has for both of them
        elif torch.is_grad_enabled():  # create_graph=True: autograd follows what gives the gradients
            if wants_x:
                back = backward_conv_args(x.shape[2:], weight.shape[2:], transposed, stride, padding)
                dx = Convolution.apply(dout, weight, products, *back)
                if not (suggests_channels_last(x) or suggests_channels_last(weight)):
                    dx = default_layout(dx)
        else:
            product = products.to_low if transposed else products.to_high
            if wants_x and product:
                dx = product(dout, weight, stride, padding, (x, weight))
            if wants_weight and products.weight_grad:
                low, high = (x, dout) if transposed else (dout, x)
                dweight = products.weight_grad(low, high, weight, stride, padding)
        left = (wants_x and dx is None, wants_weight and dweight is None, False)
        if any(left):
            options = (stride, padding, (1, 1), transposed, output_padding, 1)
            found = torch.ops.aten.convolution_backward(dout, x, weight, None, *options, left)
            dx, dweight = (found[0] if left[0] else dx), (found[1] if left[1] else dweight)
        return dx, dweight, *[None] * 5
