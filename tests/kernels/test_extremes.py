"""Numbers at the ends: channels that hold one number, infinite gradients, confident logits, a momentum of one."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan import functional as fused
from fastgan.ops import convolution
from fastgan.ops.choice import Choice
from fastgan.ops.running import update_running
from tests.conftest import DTYPES

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.mark.parametrize("transposed", (True, False))
@pytest.mark.parametrize("activation", (None, "sigmoid"), ids=str)
@pytest.mark.parametrize("implementation", ("triton", "cudnn"))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_channel_of_one_number_is_normalised_to_zero(
    transposed, activation, implementation, dtype, device, choose_in, poisoned
):
    """The statistics are of the numbers that are normalised: else 1/√eps would magnify what rounding took from them."""
    choose_in(convolution, lambda problem, device: Choice(implementation))
    x = torch.full((4, 3, 6, 6), 0.37, device=device, dtype=dtype)
    weight, bias = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((3, 3, 1, 1), (3,)))
    gamma, beta = torch.rand(3, device=device) + 0.5, torch.randn(3, device=device)
    gamma.requires_grad_()
    operator = fused.conv_transpose2d_bn_act if transposed else fused.conv2d_bn_act
    options = dict(stride=1, padding=0, training=True, activation=activation, activation_first=bool(activation))
    y = operator(x, weight, bias, gamma, beta, **options)
    expected = beta.to(dtype)[:, None, None].expand(y.shape)
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
    y.backward(torch.randn_like(y))
    assert gamma.grad.abs().max() < 1e-3


@pytest.mark.parametrize("momentum", (1.0, 0.9, 0.1))
@pytest.mark.parametrize("before, batch", ((1.0, 8e-9), (1e8, 0.71), (0.0, 3.0)))
def test_running_statistics_keep_their_digits(momentum, before, batch, device):
    running = [torch.full((5,), before, device=device) for _ in range(2)]
    own = [torch.full((1, 5), batch, device=device) for _ in range(2)]
    update_running(*running, *own, None, momentum)
    expected = torch.full((5,), (1 - momentum) * before + momentum * batch, device=device, dtype=torch.float64)
    for statistic in running:
        torch.testing.assert_close(statistic.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("logit", (8.0, 12.0, 16.0, 24.0, 60.0, -8.0, -24.0, -60.0))
def test_the_losses_of_confident_logits(logit, device):
    logits = torch.full((3,), logit, device=device)
    exact = F.softplus(-logits.double()).mean()
    options = dict(rtol=4e-6, atol=0)  # of exp(−60) a GPU loses two bits and more, when it makes a power of two of it
    torch.testing.assert_close(fused.generator_bce(logits).double(), exact, **options)
    torch.testing.assert_close(fused.discriminator_bce(logits, -logits).double(), 2 * exact, **options)


@pytest.mark.parametrize("logit", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("target", (0.0, 0.9, 1.0))
def test_the_losses_of_logits_that_are_not_finite(logit, target, device):
    logits = torch.tensor([0.5, logit], device=device)
    ours = fused.discriminator_bce(logits, torch.zeros(2, device=device), real_target=target)
    stock = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target)) + math.log(2.0)
    torch.testing.assert_close(ours, stock, equal_nan=True)


@pytest.mark.parametrize("layers", ("conv", "conv, norm", "conv, act, norm"))
@pytest.mark.parametrize("extreme", (math.inf, math.nan))
def test_what_is_not_finite_does_not_come_through_a_dead_relu(layers, extreme, device):
    torch.manual_seed(0)
    norm = [nn.BatchNorm2d(4)] if "norm" in layers else []
    order = [nn.ReLU(), *norm] if "act" in layers else [*norm, nn.ReLU()]
    stock = nn.Sequential(nn.Conv2d(2, 4, 1), *order).to(device)
    ours = fastgan.fuse(copy.deepcopy(stock))
    x = torch.randn(3, 2, 5, 5, device=device)
    grad = torch.randn(3, 4, 5, 5, device=device)
    if "act" not in layers:
        grad[stock(x) == 0] = extreme
    else:
        grad[0, 0, 0, 0] = extreme  # BatchNorm spreads it over its channel
    found = []
    for model in (stock, ours):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        model(inputs).backward(grad)
        found.append([inputs.grad, *(parameter.grad for parameter in model.parameters())])
    assert "act" in layers or all(each.isfinite().all() for each in found[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4, equal_nan=True)


CONSTANT = {  # layers, mode, what does not learn
    "a frozen weight": ([nn.Conv2d(2, 3, 3)], True, "0.weight"),
    "beta alone": ([nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)], False, "0.weight 0.bias 1.weight"),
    "LeakyReLU": ([nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(0.2)], True, ""),
    "LeakyReLU in eval": ([nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(0.2)], False, ""),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_gradients_that_are_constants_have_the_gradients_that_stock_gives(name, device):
    layers, training, frozen = CONSTANT[name]
    stock = nn.Sequential(*copy.deepcopy(layers)).to(device).train(training)
    ours = fastgan.fuse(copy.deepcopy(stock))
    x, found = torch.randn(3, 2, 5, 5, device=device), []
    for model in (stock, ours):
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path not in frozen.split())
        learning = [x.clone().requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
        first = torch.autograd.grad(model(learning[0]).sum(), learning, create_graph=True)
        assert all(grad.requires_grad for grad in first)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), learning, allow_unused=True)
        found.append((first, second))
    (first, second), (ours_first, ours_second) = found
    torch.testing.assert_close(ours_first, first, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(ours_second, second, strict=True):
        if theirs is None:  # zeros will do
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
