"""Gradients of gradients, as WGAN-GP and R1 take them, through the kernels and in plain torch."""

import copy

import pytest
import torch
from torch import nn

import fastgan
from fastgan import functional as fused
from fastgan.ops import batch_norm, convolution
from fastgan.ops.choice import Choice
from fastgan.ops.fused_layer import linked_conv_bn_act
from fastgan.ops.layer_spec import LayerSpec
from tests.accuracy import assert_as_accurate_as_stock, error
from tests.kernels.comparison import PLAIN, draw, gradient_of_norms, leaves, ours, stock, stock_convolution

SMALL = PLAIN._replace(in_channels=3, out_channels=4, size=(4, 5), bias=True)
ACTIVATIONS = (None, "relu", "leaky_relu", "tanh", "sigmoid")
CASES = [
    SMALL._replace(
        transposed=transposed,
        batch_norm=mode != "none",
        training=mode == "train",
        activation=activation,
        activation_first=activation_first,
        output_padding=int(transposed),
        kernel=3,
    )
    for transposed in (True, False)
    for mode in ("none", "train", "eval")
    for activation in ACTIVATIONS
    for activation_first in (False, True)
    if not activation_first or (activation and mode != "none")
]
_NAMES = ("x", "weight", "bias", "gamma", "beta")


def penalty_grads(forward, case, tensors, dtype=None):
    """{name: gradient} of WGAN-GP's penalty, which is itself made of a gradient; zeros where nothing depends on it."""
    copies = leaves(tensors, dtype)
    _, norms = gradient_of_norms(forward(case, copies, case.activation), copies[0])
    found = {name: t for name, t in zip(_NAMES, copies, strict=False) if t is not None}
    grads = torch.autograd.grad(
        ((norms - 1) ** 2).mean(), list(found.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(found, grads, strict=True))


def assert_second_order(case, tensors):
    reference = penalty_grads(stock, case, tensors, torch.float64)
    plain, actual = penalty_grads(stock, case, tensors), penalty_grads(ours, case, tensors)
    assert reference["x"].any() or case.activation in (None, "relu", "leaky_relu")
    assert reference["weight"].any()
    for name, grad in actual.items():
        assert grad.dtype == plain[name].dtype
        if name == "bias":  # a sum of large terms that cancel: how near stock comes to it is a matter of luck
            assert error(grad, reference[name]) < 1e-4
        else:
            assert_as_accurate_as_stock(name, grad, plain[name], reference[name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case).partition("-contiguous")[0])
def test_gradient_penalty(case, device, triton_backend, poisoned):
    assert_second_order(case, draw(case, 3, device))


@pytest.mark.parametrize("transposed", (True, False))
def test_gradient_penalty_around_cudnn(transposed, device, choose_in, triton_backend, poisoned):
    choose_in(convolution, lambda problem, device: Choice("cudnn"))
    case = SMALL._replace(transposed=transposed, activation="tanh")
    assert_second_order(case, draw(case, 3, device))
    assert_second_order(case._replace(activation_first=True), draw(case, 3, device))


def test_gradient_penalty_of_groups(device, triton_backend, poisoned):
    """A batch of two parts in one call against two calls."""
    case = SMALL._replace(activation="tanh")
    x, *rest = leaves(draw(case, 4, device))
    options = dict(training=True, stride=2, padding=1, activation="tanh")
    grads = []
    for parts in (x.split(4), x.split(2)):
        options["batch_groups"] = 3 - len(parts)
        out = torch.cat([fused.conv_transpose2d_bn_act(p, *rest, **options) for p in parts])
        _, norms = gradient_of_norms(out, x)
        grads.append(torch.autograd.grad(((norms - 1) ** 2).mean(), [x, *rest[:4]]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", (True, False))
def test_third_order(training, device, triton_backend, poisoned):
    """Of which stock BatchNorm has none: the formula in its place."""
    case = SMALL._replace(activation="tanh", training=training)
    tensors = draw(case, 3, device)

    def by_hand(case, tensors, activation):
        y = stock_convolution(case, tensors)
        gamma, beta, mean, var = (tensor.view(-1, 1, 1) for tensor in tensors[3:])
        if training:
            var, mean = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
        return torch.tanh((y - mean) * (var + 1e-3).rsqrt() * gamma + beta)

    def third(forward, dtype=None):
        copies = leaves(tensors, dtype)
        grad, _ = gradient_of_norms(forward(case, copies, case.activation), copies[0])
        (grad,) = torch.autograd.grad((grad**3).sum(), copies[0], create_graph=True)
        return torch.autograd.grad((grad**2).sum(), [copies[i] for i in (0, 1, 3, 4)])

    for grad, plain, reference in zip(third(ours), third(by_hand), third(by_hand, torch.float64), strict=True):
        assert_as_accurate_as_stock("third order", grad, plain, reference)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("copied", (True, False))
def test_mixed_precision(copied, training, device, triton_backend, poisoned):
    """Float16 inputs and float32 parameters: each second gradient in the dtype of what it is for."""
    case = SMALL._replace(activation="tanh", training=training)
    tensors = draw(case, 3, device)
    reference = penalty_grads(stock, case, tensors, torch.float64)
    x, *rest = leaves(tensors)
    kept = rest[0].detach().half() if copied else None
    constants = LayerSpec(
        True, (2, 2), (1, 1), (0, 0), "tanh", 0.0, True, batch_statistics=training, momentum=0.3, eps=1e-3
    )
    with torch.autocast(device.type, torch.float16):
        out, _ = linked_conv_bn_act(x, *rest, layer=constants, weight_copy=kept)
    assert out.dtype == torch.float16
    _, norms = gradient_of_norms(out.float(), x)
    grads = torch.autograd.grad(((norms - 1) ** 2).mean(), [x, *rest[:4]])
    for name, grad in zip(_NAMES, grads, strict=True):
        assert grad.dtype == torch.float32
        scale = reference[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(grad.double() / scale, reference[name] / scale, rtol=0, atol=0.02)


@pytest.mark.parametrize("wanted", ("x", "weight", "bias only"))
def test_gradient_of_a_bias_that_is_a_constant(wanted, device, triton_backend):
    """It may be differentiated, and gives nothing, where stock's may."""
    case = SMALL._replace(batch_norm=False, activation=None)
    found = []
    for forward in (ours, stock):
        x, weight, bias, *rest = leaves(draw(case, 3, device))
        x.requires_grad_(wanted == "x")
        weight.requires_grad_(wanted == "weight")
        out = forward(case, [x, weight, bias, *rest], None)
        (grad,) = torch.autograd.grad(out.mean(), bias, create_graph=True)
        assert grad.requires_grad == (wanted != "bias only")
        if grad.requires_grad:
            grad.sum().backward()
        assert x.grad is weight.grad is bias.grad is None
        found.append(grad.detach())
    torch.testing.assert_close(*found)


def test_gradient_of_a_bias_before_batch_norm(device, triton_backend):
    """It is zero, but it can be differentiated, as stock's can."""
    x, weight, bias, *rest = leaves(draw(SMALL, 3, device))
    out = ours(SMALL, [x, weight, bias, *rest], "tanh")
    (grad,) = torch.autograd.grad((out**3).sum(), bias, create_graph=True)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-4)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, torch.zeros_like(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("strided", (False, True))
@pytest.mark.parametrize("both", (True, False))
def test_losses(both, strided, device, triton_backend):
    """The Hessian of the losses, also of what they were computed from."""
    real, fake = torch.randn(7, device=device), torch.randn(2, 5, device=device)
    if strided:
        real, fake = torch.randn(7, 2, device=device).t(), fake.t()

    def second(loss, real, fake):
        tensors = [tensor.clone(memory_format=torch.preserve_format).requires_grad_() for tensor in (real, fake)]
        value = loss(*(tensor * tensor for tensor in tensors))
        grads = torch.autograd.grad(value, tensors if both else tensors[1:], create_graph=True)
        return torch.autograd.grad(sum((grad**2).sum() for grad in grads), tensors if both else tensors[1:])

    def loss(real, fake):
        return fused.discriminator_bce(real, fake, real_target=0.9) if both else fused.generator_bce(fake)

    for actual, exact in zip(second(loss, real, fake), second(loss, real.double(), fake.double()), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_kernels_make_gradients_that_nobody_differentiates(device, monkeypatch, triton_backend):
    def refuse(*_):
        raise AssertionError("plain torch instead of the kernels")

    monkeypatch.setattr(batch_norm, "differentiable_grad", refuse)
    tensors = leaves(draw(SMALL, 3, device))
    ours(SMALL, tensors, "tanh").sum().backward()
    with pytest.raises(AssertionError, match="plain torch"):
        torch.autograd.grad(ours(SMALL, tensors, "tanh").sum(), tensors[0], create_graph=True)


@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: str(case).partition("-contiguous")[0])
def test_reference_in_float64(case):
    case = case._replace(in_channels=2, out_channels=2, size=(3, 3))
    generator = torch.Generator().manual_seed(0)
    tensors = leaves(draw(case, 2, torch.device("cpu")), torch.float64)
    learning = [tensor for tensor in tensors[:5] if tensor is not None]
    constants = tensors[5:]

    def operator(*learning):
        vectors = list(learning[3:]) if case.batch_norm else [None, None]
        statistics = [None if t is None else t.clone() for t in constants]
        return ours(case, [*learning[:3], *vectors, *statistics], case.activation)

    grad = torch.randn(operator(*learning).shape, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(operator, learning, grad, check_undefined_grad=False)


def critic(channels=3, width=4):
    """Two layers and a score for each image."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 2),
    )


def critic_loss(model, real, fake, penalty):
    """What a critic of WGAN-GP minimises, or a discriminator with the R1 penalty."""
    share = torch.linspace(0.1, 0.9, len(real), device=real.device, dtype=real.dtype).view(-1, 1, 1, 1)
    x = share * real + (1 - share) * fake if penalty == "WGAN-GP" else real
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    square = grad.flatten(1).square().sum(1)
    if penalty == "WGAN-GP":
        return model(fake).mean() - model(real).mean() + 10 * ((square.sqrt() - 1) ** 2).mean()
    return nn.functional.softplus(-model(real)).mean() + 5 * square.mean()


@pytest.mark.parametrize("penalty", ("WGAN-GP", "R1"))
def test_critic(penalty, device, triton_backend):
    torch.manual_seed(0)
    model = critic().to(device)
    models = dict(ours=fastgan.fuse(copy.deepcopy(model)), stock=model, exact=copy.deepcopy(model).double())
    real, fake = torch.randn(4, 3, 8, 8, device=device), torch.randn(4, 3, 8, 8, device=device)
    found = {}
    for name, one in models.items():
        batches = (batch.to(next(one.parameters()).dtype) for batch in (real, fake))
        loss = critic_loss(one, *batches, penalty)
        loss.backward()
        found[name] = [loss.detach(), *(p.grad for p in one.parameters()), *(b.detach() for b in one.buffers())]
    for ours_, stock_, exact in zip(*found.values(), strict=True):
        if exact.is_floating_point():
            assert_as_accurate_as_stock(penalty, ours_, stock_, exact)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_networks_refuse(backend, device, triton_backend):
    """PyTorch cannot differentiate a compiled region twice; it must say so rather than give wrong numbers."""
    model = torch.compile(fastgan.fuse(critic().to(device)), fullgraph=True, dynamic=False, backend=backend)
    real, fake = torch.randn(4, 3, 8, 8, device=device), torch.randn(4, 3, 8, 8, device=device)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        critic_loss(model, real, fake, "WGAN-GP").backward()


def test_penalty_that_is_compiled_with_its_gradient(device, triton_backend):
    """A whole function, the inner gradient included: right, or refused where it would be differentiated twice."""
    model = fastgan.fuse(critic().to(device))
    x = torch.randn(4, 3, 8, 8, device=device)

    def penalty(x):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return grad.square().sum()

    expected = penalty(x)
    compiled = torch.compile(penalty, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
    parameters = list(model.parameters())[:3]
    try:
        grads = torch.autograd.grad(compiled, parameters)
    except RuntimeError as refusal:
        assert "does not currently support double backward" in str(refusal)
    else:
        torch.testing.assert_close(grads, torch.autograd.grad(expected, parameters), rtol=1e-4, atol=1e-5)
