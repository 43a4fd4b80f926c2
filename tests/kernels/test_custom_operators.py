"""The operators as PyTorch sees them: registrations, torch.compile without graph breaks, autocast, whole networks."""

import copy

import pytest
import torch
from torch.library import opcheck

import fastgan
from fastgan.ops.batch_norm import (
    batch_norm_act,
    batch_norm_act_carrier,
    batch_norm_act_grad,
    batch_norm_grad_of_sums,
)
from fastgan.ops.convolution import activation_grad, conv, conv_statistics, conv_weight_grad
from fastgan.ops.input_grads import conv_activation_grad, conv_batch_norm_grad
from fastgan.ops.losses import bce
from fastgan.ops.running import update_running

pytestmark = pytest.mark.usefixtures("triton_backend")


def _operands(device):
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    vector = torch.rand(4, device=device, requires_grad=True)
    return x, weight, vector


def _operator_calls(device):
    x, weight, vector = _operands(device)
    constant = vector.detach()
    y = torch.randn(2, 4, 4, 5, device=device, requires_grad=True)
    high = torch.randn(2, 3, 8, 10, device=device, requires_grad=True)
    where = ([1, 1], [1, 1])
    plain, alone = (None, None, None, None, 0.0), ([], None, 0.0)
    carrier = torch.zeros(2, 2, 4, device=device, requires_grad=True)
    of_groups = [y.detach(), torch.zeros(2, 4, device=device), torch.ones(2, 4, device=device)]
    normalized = [*of_groups, carrier, constant + 1, vector]
    return {
        "conv": (conv, (x, weight, None, vector, *plain, False, *where, [0, 0], "leaky_relu", 0.2, *alone, False)),
        "conv_transposed": (
            conv,
            (y, weight, None, None, *plain, True, [2, 2], [1, 1], [1, 1], "tanh", 0.0, *alone, False),
        ),
        "conv_statistics": (
            conv_statistics,
            (x, weight, None, vector, 1e-5, False, *where, [0, 0], None, 0.0, 2, *alone),
        ),
        "conv_statistics_activated": (
            conv_statistics,
            (y, weight, None, vector.detach()[:3].requires_grad_(), 1e-5, True, *where, [0, 0], "tanh", 0.0, 1, *alone),
        ),
        "conv_activation_grad": (
            conv_activation_grad,
            (y.detach(), weight.detach(), None, high.detach(), True, [2, 2], [1, 1], [1, 0], "tanh", 0.0),
        ),
        "conv_of_first_order": (
            conv,
            (x, weight, None, vector, *plain, False, *where, [0, 0], "relu", 0.0, [], "leaky_relu", 0.2, True),
        ),
        "conv_statistics_of_first_order": (
            conv_statistics,
            (x, weight, None, vector, 1e-5, False, *where, [0, 0], None, 0.0, 1, [], "sigmoid", 0.0),
        ),
        "conv_of_normalized": (
            conv,
            (y, weight, None, None, *plain, True, *where, [0, 0], None, 0.0, normalized, "relu", 0.0, False),
        ),
        "conv_statistics_of_normalized": (
            conv_statistics,
            (y, weight, None, None, 1e-5, True, *where, [0, 0], None, 0.0, 1, normalized[:4], None, 0.0),
        ),
        "conv_batch_norm_grad": (
            conv_batch_norm_grad,
            (x.detach(), weight.detach(), None, of_groups, False, *where, [0, 0], "leaky_relu", 0.2),
        ),
        "batch_norm_act_carrier": (batch_norm_act_carrier, (y, *of_groups[1:], vector, vector, "tanh", 0.0)),
        "batch_norm_grad_of_sums": (
            batch_norm_grad_of_sums,
            (y.detach(), *of_groups, constant, carrier.detach()),
        ),
        "conv_weight_grad": (conv_weight_grad, (y, x, weight.detach(), *where)),
        "conv_weight_grad_transposed": (conv_weight_grad, (y, high, weight.detach(), [2, 2], [1, 1])),
        "activation_grad": (activation_grad, (y, y.detach().requires_grad_(), "sigmoid", 0.0)),
        "activation_grad_straight": (activation_grad, (y, y.detach(), "leaky_relu", 0.2)),
        "update_running": (
            update_running,
            (constant.clone(), constant + 1, constant.new_ones(2, 4), constant.new_ones(2, 4), None, 0.1),
        ),
        "batch_norm_act": (batch_norm_act, (y, constant, constant + 1, vector, None, True, "relu", 0.0)),
        "batch_norm_act_grad": (
            batch_norm_act_grad,
            (y.detach(), y.detach(), constant, constant + 1, None, constant, False, "tanh", 0.0),
        ),
        "bce": (bce, (x, y, 0.9, 0.1, False)),
        "bce_one_set": (bce, (x, None, 1.0, 0.0, False)),
        "bce_half_grads": (bce, (x.detach().half(), y.detach().half(), 1.0, 0.0, True)),
    }


@pytest.mark.parametrize("name", _operator_calls("cpu"))
def test_opcheck(name, device):
    operator, arguments = _operator_calls(device)[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "batch_norm_act_carrier":  # of whose second result nothing but the shape has a meaning
        checks.append("test_aot_dispatch_dynamic")
    opcheck(operator.registered, arguments, test_utils=checks)


def _networks(device):
    torch.manual_seed(0)
    generator = fastgan.models.Generator(image_size=8, nc=3, nz=5, ngf=4).to(device)
    discriminator = fastgan.models.Discriminator(image_size=8, nc=3, ndf=4).to(device)
    return generator, discriminator


def _losses_and_grads(generator, discriminator, latent):
    fake = generator(latent)
    loss = fastgan.functional.generator_bce(discriminator(fake))
    loss.backward()
    parameters = [*generator.parameters(), *discriminator.parameters()]
    return [loss.detach(), fake.detach(), *(parameter.grad for parameter in parameters)]


@pytest.mark.parametrize("compiled", (False, True))
def test_whole_networks(compiled, device, monkeypatch):
    """Our G and D through the kernels, forward and backward, against stock; compiled, without a graph break."""
    networks = _networks(device)
    latent = torch.randn(4, 5, device=device)
    fused = [fastgan.fuse(copy.deepcopy(network)) for network in networks]
    assert all(row.fused and row.implementation == "triton" for network in fused for row in fastgan.explain(network))
    run = [torch.compile(network, fullgraph=True, dynamic=False) for network in fused] if compiled else fused
    actual = _losses_and_grads(*run, latent)
    for network, stock in zip(fused, networks, strict=True):
        for parameter, stock_parameter in zip(network.parameters(), stock.parameters(), strict=True):
            assert parameter.grad is not None and stock_parameter.grad is None
    monkeypatch.setenv("FASTGAN_BACKEND", "reference")
    for ours, reference in zip(actual, _losses_and_grads(*networks, latent), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5)
    for network, stock in zip(fused, networks, strict=True):
        for ours, reference in zip(network.buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(ours, reference)


def test_autocast(device):
    """Under autocast the kernels compute in its dtype and the parameters' gradients keep theirs."""
    generator, _ = (fastgan.fuse(network) for network in _networks(device))
    with torch.autocast(device.type, torch.float16):
        images = generator(torch.randn(4, 5, device=device))
    assert images.dtype == torch.float16
    images.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in generator.parameters())


def test_eval_mode_batch_norm_inside_the_kernel_refuses_a_gradient(device):
    x, weight, vector = _operands(device)
    statistics = (vector.detach(),) * 4
    alone = ([], None, 0.0, False)
    out = conv(x, weight, None, None, *statistics, 1e-5, False, [1, 1], [1, 1], [0, 0], None, 0.0, *alone)
    with pytest.raises(RuntimeError, match="batch_norm_act"):
        out.sum().backward()


@pytest.mark.parametrize("operator", ("conv", "conv_statistics"))
def test_float32_weights_of_half_precision_inputs(operator, device):
    """The same result as with a weight of the input's dtype, and a gradient that is not rounded to it."""
    x, weight, _ = _operands(device)
    x, results = x.detach().half(), []
    half, alone = weight.detach().half(), ([], None, 0.0)
    for parameter, kept in ((half.clone(), None), (half.float(), None), (half.float(), half)):
        parameter.requires_grad_()
        if operator == "conv":
            y = conv(x, parameter, kept, *[None] * 5, 0.0, False, [1, 1], [1, 1], [0, 0], "relu", 0.0, *alone, False)
        else:
            y = conv_statistics(x, parameter, kept, None, 1e-5, False, [1, 1], [1, 1], [0, 0], None, 0.0, 1, *alone)[0]
        y.backward(torch.cos(torch.arange(y.numel(), device=device)).view_as(y).half())
        assert parameter.grad.dtype == parameter.dtype
        results.append((y.detach(), parameter.grad))
    (y, grad), *others = results
    for other_y, other_grad in others:
        assert torch.equal(y, other_y) and torch.equal(grad, other_grad.half())
        assert not torch.equal(other_grad, grad.float())
