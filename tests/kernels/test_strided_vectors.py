"""Bias, γ, β and running statistics that are columns of a matrix, say, or one number for all channels."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan import functional as fused

pytestmark = pytest.mark.usefixtures("triton_backend")
TOLERANCE = dict(rtol=1e-3, atol=1e-4)
VECTORS = ("bias", "gamma", "beta", "running_mean", "running_var")


def column(vector):
    """The same numbers with another number after each."""
    return torch.stack([vector, vector + 7], 1)[:, 0]


def one_for_all(vector):
    return vector[0].expand(len(vector))


def draw(device):
    torch.manual_seed(0)
    vectors = {name: torch.rand(4, device=device) + 0.5 for name in VECTORS}
    return torch.randn(2, 3, 5, 5, device=device), torch.randn(4, 3, 3, 3, device=device) / 5, vectors


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", VECTORS)
def test_functional(name, training, grad, device, monkeypatch):
    x, weight, vectors = draw(device)
    found = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("FASTGAN_BACKEND", backend)
        given = {n: (column(v) if n == name else v.clone()) for n, v in vectors.items()}
        leaves = [given[n].requires_grad_(grad) for n in VECTORS[:3]]
        y = fused.conv2d_bn_act(x, weight, **given, training=training, activation="tanh")
        grads = torch.autograd.grad(y.pow(2).sum(), leaves) if grad else ()
        found.append((y.detach(), *grads, given["running_mean"], given["running_var"]))
    torch.testing.assert_close(*found, **TOLERANCE)


@pytest.mark.parametrize("activation_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lay", [column, one_for_all])
def test_layers(lay, training, activation_first, device):
    x, weight, vectors = draw(device)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()).to(device).train(training)
    if activation_first:
        stock = nn.Sequential(stock[0], stock[2], stock[1])
    stock[0].weight = nn.Parameter(weight)
    found = []
    for model in (stock, fastgan.fuse(copy.deepcopy(stock))):
        conv, norm = model[0], next(module for module in model if isinstance(module, nn.BatchNorm2d))
        conv.bias, norm.weight, norm.bias = (nn.Parameter(lay(vectors[name])) for name in VECTORS[:3])
        if lay is column:  # nobody can write to one number for all
            norm.running_mean, norm.running_var = (lay(vectors[name]) for name in VECTORS[3:])
        with torch.no_grad():
            known = model(x)
        y = model(x)
        y.pow(2).sum().backward()
        found.append((known, y.detach(), [p.grad for p in model.parameters()], list(model.buffers())))
    torch.testing.assert_close(*found, **TOLERANCE)


class Conditional(nn.Module):
    """γ and β come from elsewhere, side by side."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, vectors):
        return torch.relu(F.batch_norm(self.conv(x), None, None, vectors[:, 0], vectors[:, 1], True))


def test_compiled(device):
    torch.manual_seed(0)
    stock = Conditional().to(device)
    x, vectors = torch.randn(2, 3, 5, 5, device=device), torch.randn(4, 2, device=device)
    found = []
    for model in (stock, torch.compile(copy.deepcopy(stock), backend="fastgan", fullgraph=True)):
        given = vectors.clone().requires_grad_()
        y = model(x, given)
        y.pow(2).sum().backward()
        found.append((y.detach(), given.grad, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*found, **TOLERANCE)
