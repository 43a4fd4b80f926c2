"""Memory layouts: the fused operators give channels_last, and what follows a fused layer may count on stock's."""

import torch

from fastgan.backend import is_batched


def suggests_channels_last(tensor):
    """Whether ATen takes a 4-dimensional tensor for a channels_last one; where sizes of one make it both, for neither.

    Source: `is_channels_last_strides_2d` in PyTorch's c10/core/MemoryFormat.h.
    """
    if tensor.dim() != 4:
        return False
    sizes, strides = tensor.shape, tensor.stride()
    if strides[1] == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        if sizes[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(sizes[axis], 1)
    return True


def in_stock_layout(y, x, convolutions, followed):
    """The result `y` of a run of fused layers in the layout in which stock would give it.

    A stock convolution's result is channels_last where its input or its weight is. What follows keeps that, except of
    one channel or one position, which it takes for the default layout and gives in that.

    Args:
        x: the input of the first.
        convolutions: the modules of the run.
        followed: for each of them, whether a BatchNorm or an activation follows it in the run.
    """
    channels_last = suggests_channels_last(x)
    for conv, more in zip(convolutions, followed, strict=True):
        channels_last = channels_last or _has_channels_last_weight(conv)
        if more and conv.out_channels == 1:
            channels_last = False
    if followed[-1] and y.shape[2] == y.shape[3] == 1:
        channels_last = False
    return y if channels_last else contiguous(y)


def with_stock_gradient(x, conv):
    """x, the input of fused layers of which `conv` is the first, with a gradient that lies as stock would give it.

    Where neither of both is channels_last that is the default layout, which gradient penalties view. In compiled code
    stock's is channels_last, too, and a trace of torch.jit's must be the same without gradients.
    """
    if not x.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return x
    as_it_is = suggests_channels_last(x) or _has_channels_last_weight(conv)
    return x if as_it_is else _GradientInDefaultLayout.apply(x)


class _GradientInDefaultLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad if is_batched(grad) else contiguous(grad)


def _has_channels_last_weight(conv):
    weight = conv._parameters.get("weight")
    # Of a parametrized weight what it is computed from: to look at itself would compute it.
    return any([suggests_channels_last(each) for each in (conv.parameters() if weight is None else (weight,))])


def fastest_format(images):
    """The memory format that layers are fastest in: channels_last of images (N, C, H, W), else the default one."""
    return torch.channels_last if images.dim() == 4 else torch.contiguous_format


def contiguous(y):
    """y in the default layout, and with its strides: where sizes of one make a tensor contiguous as it is, too."""
    y = y.contiguous()
    # Left as they are they would make the next stock layer's result channels_last. No view, as stock's result is none.
    return y.clone(memory_format=torch.contiguous_format) if suggests_channels_last(y) else y
