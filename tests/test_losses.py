"""The losses on logits against torch's binary cross-entropy, on the reference path."""

import pytest
import torch
from torch.nn import functional as F

from fastgan.functional import discriminator_bce, generator_bce


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", "reference")


def logits(*shape, seed=0, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()


def stock(x, target):
    return F.binary_cross_entropy_with_logits(x, torch.full_like(x, target))


def assert_equal(ours, theirs, *inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


SHAPES = [((8,), (8,)), ((5,), (9,)), ((1,), (1,)), ((2, 1, 3, 3), (4,)), ((), (3, 2)), ((6, 1), (2, 1, 1, 1))]
TARGETS = [(1.0, 0.0), (0.9, 0.0), (0.9, 0.1), (1, 0), (0.5, 0.5), (0.0, 1.0)]


@pytest.mark.parametrize(("real_shape", "fake_shape"), SHAPES)
@pytest.mark.parametrize(("real_target", "fake_target"), TARGETS)
def test_discriminator(real_shape, fake_shape, real_target, fake_target):
    real, fake = logits(*real_shape), logits(*fake_shape, seed=1)
    ours = discriminator_bce(real, fake, real_target=real_target, fake_target=fake_target)
    assert ours.shape == () and ours.dtype == torch.float64
    assert_equal(ours, stock(real, real_target) + stock(fake, fake_target), real, fake)


@pytest.mark.parametrize("shape", [(8,), (1,), (), (2, 1, 3, 3)])
def test_generator(shape):
    fake = logits(*shape)
    ours = generator_bce(fake)
    assert ours.shape == () and ours.dtype == torch.float64
    assert_equal(ours, stock(fake, 1.0), fake)


def test_default_targets_and_strided_logits():
    real, fake = logits(6, 4), logits(5, 2, seed=1)
    ours = discriminator_bce(real[::2, 1:], fake.t())
    assert_equal(ours, stock(real[::2, 1:], 1.0) + stock(fake.t(), 0.0), real, fake)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [120.0, 1000.0])
def test_extreme_logits(size, dtype):
    fake = torch.tensor([-size, size], dtype=dtype, requires_grad=True)
    loss = generator_bce(fake)
    assert loss.item() == size / 2  # mean of softplus(size) and softplus(−size)
    (grad,) = torch.autograd.grad(loss, fake)
    # σ(x) − 1: −1 where the discriminator is sure of the fake, 0 where it is fooled
    assert (2 * grad[0]).item() == -1.0 and abs(grad[1].item()) < 1e-50

    real = torch.tensor([-size, size], dtype=dtype, requires_grad=True)
    loss = discriminator_bce(real, fake)
    assert loss.item() == size
    real_grad, fake_grad = torch.autograd.grad(loss, (real, fake))
    assert (2 * real_grad[0]).item() == -1.0 and abs(real_grad[1].item()) < 1e-50
    assert (2 * fake_grad[1]).item() == 1.0 and abs(fake_grad[0].item()) < 1e-50


@pytest.mark.parametrize("size", [120.0, 1000.0])
def test_extreme_logits_with_smoothing(size):
    real = torch.tensor([-size, size], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([size], dtype=torch.float64, requires_grad=True)
    ours = discriminator_bce(real, fake, real_target=0.9, fake_target=0.1)
    assert torch.isfinite(ours)
    assert_equal(ours, stock(real, 0.9) + stock(fake, 0.1), real, fake)


def test_means():
    real, fake = logits(5, 2), logits(3, seed=1)
    loss, d_x, d_g_z = discriminator_bce(real, fake, real_target=0.9, return_means=True)
    assert_equal(loss, stock(real, 0.9) + stock(fake, 0.0), real, fake)
    torch.testing.assert_close(d_x, torch.sigmoid(real).mean().detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(d_g_z, torch.sigmoid(fake).mean().detach(), rtol=1e-12, atol=0)
    assert loss.requires_grad and not d_x.requires_grad and not d_g_z.requires_grad
    assert d_x.shape == d_g_z.shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    real = logits(64).detach().to(dtype).requires_grad_()
    fake = logits(32, seed=1).detach().to(dtype).requires_grad_()
    loss = discriminator_bce(real, fake)
    assert loss.dtype == torch.float32 and generator_bce(fake).dtype == torch.float32
    expected = stock(real.double(), 1.0) + stock(fake.double(), 0.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(loss, (real, fake))
    assert all(grad.dtype == dtype for grad in grads)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, (real, fake)))


def test_gradcheck():
    real, fake = logits(4, scale=2.0), logits(3, 2, seed=1, scale=2.0)
    for options in ({}, dict(real_target=0.9, fake_target=0.1)):
        function = lambda *x, options=options: discriminator_bce(*x, **options)  # noqa: E731
        assert torch.autograd.gradcheck(function, (real, fake))
        assert torch.autograd.gradgradcheck(function, (real, fake))
    assert torch.autograd.gradcheck(generator_bce, (fake,))
    assert torch.autograd.gradgradcheck(generator_bce, (fake,))
