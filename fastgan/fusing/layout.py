"""Memory layouts: the fused operators give channels_last, and what follows a fused layer may count on stock's."""

import torch

from fastgan.backend import is_batched
from fastgan.fusing.layer_code import has_weight_norm
from fastgan.fusing.patterns import padding_of, unfit_setting
from fastgan.memory_format import default_layout, suggests_channels_last
from fastgan.ops.geometry import size_after


def in_stock_layout(y, x, convolutions, keep_memory):
    """The result `y` of a run of fused layers in the layout in which stock would give it.

    A stock convolution's result is channels_last where its input or its weight is. What makes another tensor of it
    keeps that, except of one channel or one position, which it takes for the default layout and gives in that.

    Args:
        x: the input of the first.
        convolutions: the modules of the run.
        keep_memory: for each of them, whether stock leaves its result where it is: nothing follows, or an activation in
            place.
    """
    return y if _stock_gives_channels_last(y, x, convolutions, keep_memory) else default_layout(y)


def _stock_gives_channels_last(y, x, convolutions, keep_memory):
    last = len(convolutions) - 1
    # From which one on it is so, whatever was before: most often the last, and then nothing else is asked.
    since = next((i for i in range(last, -1, -1) if _has_channels_last_weight(convolutions[i])), None)
    if since is None:
        if not suggests_channels_last(x):
            return False
        since = 0
    anew = [i for i in range(since, last + 1) if not keep_memory[i]]
    if any([convolutions[i].out_channels == 1 for i in anew]):
        return False
    sizes = {} if anew in ([], [last]) else _sizes(x, convolutions)
    sizes[last] = y.shape[2:]
    return not any([tuple(sizes.get(i, ())) == (1, 1) for i in anew])


def _sizes(x, convolutions):
    """{index: the (h, w) of its result} of convolutions in a row, as far as they are such that operators compute."""
    size, sizes = x.shape[2:], {}
    for i, conv in enumerate(convolutions):
        if unfit_setting(conv):
            break
        conv_args = (conv.transposed, conv.stride, padding_of(conv), conv.output_padding)
        sizes[i] = size = size_after(size, conv.kernel_size, *conv_args)
    return sizes


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
        return grad if is_batched(grad) else default_layout(grad)


def _has_channels_last_weight(conv):
    weight = conv._parameters.get("weight")
    if weight is not None:
        return suggests_channels_last(weight)
    # Of a parametrized weight what it is computed from: to look at itself would compute it. weight_norm's has the
    # default layout, whatever that has.
    return not has_weight_norm(conv) and any([suggests_channels_last(each) for each in conv.parameters()])
