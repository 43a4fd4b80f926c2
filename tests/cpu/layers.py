"""Convolutions on a CPU: what one computes, and by whose formula."""

from contextlib import contextmanager

import torch

from fastgan.cpu.convolution import convolve

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS, OF_STOCK = "ConvolutionBackward", "ConvolutionBackward0"


def run(layer, x, dout, forward):
    """(result, gradients for x, the weight and the bias, if there is one)."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = forward(x)
    return (y, *torch.autograd.grad(y, (x, *layer.parameters()), dout.to(y.dtype)))


def is_stock(layer, x):
    """Whether its convolution is left to stock."""
    return convolve(x, layer, lambda x: None) is None


@contextmanager
def products_in_less_than_float32():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def layouts(tensor):
    """The names of the layouts that it has: of those without meaning where sizes are one, both."""
    return {name for name, layout in LAYOUTS.items() if tensor.is_contiguous(memory_format=layout)}


def assert_that_an_activation_in_place_may_follow(layer, x):
    x.requires_grad_()
    y = convolve(x, layer, layer.forward).tanh_()
    gradients = torch.autograd.grad(y.square().sum(), (x, layer.weight))
    stock = layer(x).tanh()
    torch.testing.assert_close(gradients, torch.autograd.grad(stock.square().sum(), (x, layer.weight)))
