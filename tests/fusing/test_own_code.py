"""Layers that compute by other code than torch's: it runs, fused or not."""

import copy
import functools
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.cpu.convolution import convolve

pytestmark = pytest.mark.usefixtures("each_backend")


class InCode(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = in_a_row()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


def in_a_row():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def wide():
    """Products on a CPU."""
    return nn.Sequential(nn.ConvTranspose2d(3, 4, 4), nn.Tanh())


def tileable(self, x, weight, bias):
    """What a texture that has no seams is made with."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, self.stride)


def assert_same(stock, model, size=5):
    x = torch.randn(2, 3, size, size, device=next(model.parameters()).device)
    found = []
    for network in (stock, model):
        y = network(x)
        y.pow(2).sum().backward()
        found.append((y.detach(), [p.grad for p in network.parameters()]))
        network.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("make", [in_a_row, InCode])
def test_convolution_of_an_instance(make, when, device):
    torch.manual_seed(0)
    stock = make().to(device)
    model = copy.deepcopy(stock)
    if when == "after":
        assert_same(stock, fastgan.fuse(model))
        assert fastgan.explain(model)[0].fused
    for network in (stock, model):
        conv = next(network.children())
        conv._conv_forward = types.MethodType(tileable, conv)
    assert_same(stock, fastgan.fuse(model))
    row = fastgan.explain(model)[0]
    assert not row.fused and row.reason == "the convolution has hooks or code of its own"
    for network in (stock, model):
        del next(network.children())._conv_forward
    assert_same(stock, model)
    assert fastgan.explain(fastgan.fuse(model))[0].fused


def test_products_know_of_it():
    conv = nn.Conv2d(3, 4, 4)
    x = torch.randn(2, 3, 4, 4)
    assert convolve(x, conv, lambda x: None) is not None
    conv._conv_forward = types.MethodType(tileable, conv)
    assert convolve(x, conv, lambda x: None) is None


class Signs(torch.Tensor):
    """Only the signs of weights count, as a quantizer of them may have it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.conv_transpose2d:
            x, weight, *rest = args
            args = (x, weight.as_subclass(torch.Tensor).sign(), *rest)
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_products_leave_tensors_of_other_classes_to_stock(name):
    conv = nn.ConvTranspose2d(3, 4, 4)
    x = torch.randn(2, 3, 1, 1)
    assert convolve(x, conv, lambda x: None) is not None
    setattr(conv, name, nn.Parameter(getattr(conv, name).detach().as_subclass(Signs)))
    assert convolve(x, conv, lambda x: None) is None
    assert torch.equal(convolve(x, conv, conv.forward), conv(x))


def doubled(method):
    return lambda self, *args, **options: 2 * method(self, *args, **options)


PATCHES = {
    "forward": (in_a_row, nn.Conv2d, "forward", doubled),
    "wrapped": (in_a_row, nn.Conv2d, "forward", lambda method: functools.wraps(method)(doubled(method))),
    "_conv_forward": (in_a_row, nn.Conv2d, "_conv_forward", doubled),
    "transposed": (wide, nn.ConvTranspose2d, "forward", doubled),
    "BatchNorm2d": (in_a_row, nn.BatchNorm2d, "forward", doubled),
    "ReLU": (in_a_row, nn.ReLU, "forward", doubled),
    "partial": (in_a_row, nn.ReLU, "forward", lambda method: functools.partialmethod(doubled(method))),
    "Tanh": (wide, nn.Tanh, "forward", doubled),
    "in code": (InCode, nn.ReLU, "forward", doubled),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PATCHES)
def test_layers_of_a_type(name, when, device, monkeypatch):
    make, layer_type, method, patched = PATCHES[name]
    torch.manual_seed(0)
    stock = make().to(device)
    model, size = copy.deepcopy(stock), 1 if make is wide else 5
    if when == "after":
        assert_same(stock, fastgan.fuse(model), size)
    monkeypatch.setattr(layer_type, method, patched(getattr(layer_type, method)))
    assert_same(stock, fastgan.fuse(model), size)
    groups = [row.pattern for row in fastgan.explain(model) if row.fused]
    assert not any(layer_type.__name__ in pattern for pattern in groups)
