"""The loss kernel against stock binary cross-entropy in float64."""

import pytest
import torch
from torch.nn import functional as F

from fastgan import functional as fused
from fastgan.losses import backward_bce, backward_bce_of_torch
from tests.accuracy import assert_as_accurate_as_stock
from tests.conftest import DTYPES

pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned")


def stock(real, fake, real_target, fake_target):
    loss = F.binary_cross_entropy_with_logits(real, torch.full_like(real, real_target))
    if fake is not None:
        loss = loss + F.binary_cross_entropy_with_logits(fake, torch.full_like(fake, fake_target))
    return loss


def with_grads(loss_of, *logits):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in logits]
    loss = loss_of(*leaves)
    (3.0 * loss).backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("real_shape, fake_shape", (((7,), (7,)), ((1030,), (5, 1, 3, 3)), ((1,), (2500, 1))))
def test_discriminator_loss(dtype, real_shape, fake_shape, device):
    real, fake = (torch.randn(shape, device=device, dtype=dtype) * 4 for shape in (real_shape, fake_shape))
    targets = (0.9, 0.1)
    actual = with_grads(lambda r, f: fused.discriminator_bce(r, f, real_target=0.9, fake_target=0.1), real, fake)
    plain = with_grads(lambda r, f: stock(r.float(), f.float(), *targets), real, fake)
    exact = with_grads(lambda r, f: stock(r, f, *targets), real.double(), fake.double())
    for name, ours, theirs, reference in zip(("loss", "real", "fake"), actual, plain, exact, strict=True):
        assert_as_accurate_as_stock(name, ours, theirs, reference)

    _, real_mean, fake_mean = fused.discriminator_bce(real, fake, return_means=True)
    torch.testing.assert_close(real_mean, torch.sigmoid(real.float()).mean())
    torch.testing.assert_close(fake_mean, torch.sigmoid(fake.float()).mean())


@pytest.mark.parametrize("wide", (0, 1))
def test_logits_of_two_dtypes(wide, device):
    """One in float64 makes the loss float64, as the sum of both would be."""
    logits = [torch.randn(7, device=device, dtype=torch.float64 if i == wide else torch.float32) for i in range(2)]
    ours, theirs = (with_grads(loss, *logits) for loss in (fused.discriminator_bce, lambda r, f: stock(r, f, 1.0, 0.0)))
    assert ours[0].dtype == torch.float64
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generator_loss(dtype, device):
    fake = torch.randn(33, device=device, dtype=dtype)
    actual = with_grads(fused.generator_bce, fake)
    plain = with_grads(lambda f: stock(f.float(), None, 1.0, 0.0), fake)
    exact = with_grads(lambda f: stock(f, None, 1.0, 0.0), fake.double())
    for name, ours, theirs, reference in zip(("loss", "fake"), actual, plain, exact, strict=True):
        assert_as_accurate_as_stock(name, ours, theirs, reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", ((1.0, 0.0), (1.0,), (0.1,)))
@pytest.mark.parametrize("backend", ("triton", "reference"))
@pytest.mark.parametrize("scaled", (True, False))
def test_backward_of_a_training_step(scaled, backend, targets, dtype, device, monkeypatch):
    """The loss, the means and the gradients that autograd would give, with and without the scale of mixed precision."""
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=scaled)
    x = torch.randn(2 * 514, 1, 1, 1, device=device, dtype=dtype).mul_(4).requires_grad_()
    weights = torch.linspace(0.5, 2.0, x.numel(), device=device, dtype=dtype).view_as(x)
    loss, *means = backward_bce((x * weights).flatten(1), targets, scaler)
    assert not loss.requires_grad and len(means) == len(targets)

    def reference(kind):
        leaf = x.detach().to(kind).requires_grad_()
        parts = (leaf * weights.to(kind)).to(dtype).to(kind).chunk(len(targets))
        value = sum(stock(part, None, target, 0.0) for part, target in zip(parts, targets, strict=True))
        scaler.scale(value).backward()
        return value.detach(), leaf.grad, [part.detach().sigmoid().mean() for part in parts]

    (plain, plain_grad, _), (exact, exact_grad, exact_means) = map(reference, (torch.float32, torch.float64))
    assert_as_accurate_as_stock("loss", loss, plain, exact)
    assert_as_accurate_as_stock("gradient", x.grad, plain_grad, exact_grad, computed_in=dtype)
    for mean, wanted in zip(means, exact_means, strict=True):
        torch.testing.assert_close(mean.double(), wanted, rtol=1e-5, atol=1e-6)
    assert len(backward_bce((x * weights).flatten(1), targets, scaler, means=False)) == 1


@pytest.mark.parametrize("backward", (backward_bce, backward_bce_of_torch))
@pytest.mark.parametrize("backend", ("triton", "reference"))
def test_backward_from_one_number(backend, backward, device, monkeypatch):
    """What a batch of one leaves after squeeze()."""
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    x = torch.tensor([[0.7]], device=device, requires_grad=True)
    loss, mean = backward(x.squeeze(), (0.9,), torch.amp.GradScaler(device.type, enabled=False))
    found = loss, mean, x.grad
    leaf = x.detach().requires_grad_()
    value = F.binary_cross_entropy_with_logits(leaf.squeeze(), torch.tensor(0.9, device=device))
    expected = value.detach(), x.detach().sigmoid()[0, 0], torch.autograd.grad(value, leaf)[0]
    torch.testing.assert_close(found, expected)


def test_extreme_logits_keep_their_gradient(device):
    fake = torch.tensor([-120.0, 120.0, -1000.0, 1000.0], device=device, requires_grad=True)
    loss = fused.generator_bce(fake)
    loss.backward()
    assert loss.item() == pytest.approx((120 + 1000) / 4)
    torch.testing.assert_close(fake.grad, torch.tensor([-0.25, 0.0, -0.25, 0.0], device=device))
