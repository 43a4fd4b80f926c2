"""Many gradients in one backward (is_grads_batched, vectorize=True), which PyTorch maps over after a usual forward."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F

import fastgan
from fastgan import functional as fused

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of PyTorch's own mapping
]
TOLERANCE = dict(rtol=1e-3, atol=1e-4)
NETWORKS = {
    "chain": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 5, 3, 1, 1),
        nn.BatchNorm2d(5),
        nn.Tanh(),
        nn.ConvTranspose2d(5, 3, 3, 2, 1, 1, bias=False),
        nn.ReLU(),
        nn.BatchNorm2d(3, affine=False),
    ),
    "layer": lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 2, 4, 2, 1), nn.LeakyReLU(0.2)),
    "known statistics": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid()).eval(),
}


def make_pair(name, device):
    torch.manual_seed(0)
    stock = NETWORKS[name]().to(device)
    return stock, fastgan.fuse(copy.deepcopy(stock)), torch.randn(2, 3, 6, 6, device=device)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name, create_graph, device):
    stock, model, x = make_pair(name, device)
    found = []
    for network in (stock, model):
        inputs = (x.clone().requires_grad_(), *network.parameters())
        y = network(inputs[0])
        torch.manual_seed(1)
        douts = torch.randn(3, *y.shape, device=device)
        grads = torch.autograd.grad(y, inputs, douts, is_grads_batched=True, create_graph=create_graph)
        assert all(grad.requires_grad == create_graph for grad in grads[:2])
        found.append([grad.detach() for grad in grads])
    torch.testing.assert_close(*found[::-1], **TOLERANCE)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_many_gradients(name, device):
    stock, model, x = make_pair(name, device)
    found = []
    for network in (stock, model):
        inputs = (x.clone().requires_grad_(), *network.parameters())
        y = network(inputs[0])
        douts = torch.randn(3, *y.shape, device=device, generator=torch.Generator(device).manual_seed(1))
        grads = torch.autograd.grad(y, inputs, douts, is_grads_batched=True, create_graph=True)
        second = torch.autograd.grad(sum(grad.sin().sum() for grad in grads), inputs, allow_unused=True)
        pairs = zip(inputs, second, strict=True)
        found.append([torch.zeros_like(each) if grad is None else grad for each, grad in pairs])
    # A bias before BatchNorm has one of zero, but for what rounding leaves of it.
    torch.testing.assert_close(*found[::-1], **TOLERANCE | {"atol": 1e-3})


def test_gradients_of_many_gradients_of_an_operator(device):
    x, weight = torch.randn(2, 3, 6, 6, device=device), torch.randn(4, 3, 3, 3, device=device) / 5
    found = []
    for layer in (lambda x, w: F.conv2d(x, w).tanh(), lambda x, w: fused.conv2d_bn_act(x, w, activation="tanh")):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        y = layer(*inputs)
        douts = torch.stack([torch.ones_like(y), 2 * torch.ones_like(y)])
        (grad,) = torch.autograd.grad(y, inputs[:1], douts, is_grads_batched=True, create_graph=True)
        found.append(torch.autograd.grad(grad.sin().sum(), inputs))
    torch.testing.assert_close(*found[::-1], **TOLERANCE)


@pytest.mark.parametrize("name", NETWORKS)
def test_jacobians_and_hessians(name, device):
    stock, model, x = make_pair(name, device)

    def results(network):
        def score(scale):
            return network(x * scale[0]).mul(scale[1]).tanh().pow(2).mean()

        scale = torch.ones(2, device=device)
        means = jacobian(lambda x: network(x).mul(x.mean()).mean((2, 3)), x, vectorize=True)
        return means, hessian(score, scale, vectorize=True)

    torch.testing.assert_close(results(model), results(stock), **TOLERANCE)


def test_mixed_precision(device):
    stock, model, x = make_pair("chain", device)
    found = []
    for network in (stock, model):
        with torch.autocast(device.type, torch.bfloat16):
            y = network(x)
        douts = torch.randn(3, *y.shape, device=device, generator=torch.Generator(device).manual_seed(1)).to(y.dtype)
        # Not the bias before BatchNorm: its gradient is zero, but for what rounding leaves of it.
        parameters = [p for name, p in network.named_parameters() if name != "2.bias"]
        found.append(torch.autograd.grad(y, parameters, douts, is_grads_batched=True))
    for ours, theirs in zip(*found[::-1], strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1 * theirs.abs().max().item() + 1e-3)


def test_losses(device):
    real, fake = torch.randn(2, 5, device=device, requires_grad=True).unbind()
    loss = fused.discriminator_bce(real, fake)
    scales = torch.tensor([1.0, -2.0], device=device)
    batched = torch.autograd.grad(loss, (real, fake), scales, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(loss, (real, fake), scale, retain_graph=True) for scale in scales]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*each, strict=True))))
