"""Activations whose gradient is in the kernel that makes what reaches them, against stock in float64."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.first_order import first_order, only_first_order
from fastgan.kernels import batch_norm
from fastgan.kernels.launch import MatrixTile
from fastgan.ops import input_grads
from fastgan.ops.choice import Choice
from fastgan.ops.geometry import out_size
from fastgan.ops.input_grads import conv_activation_grad, conv_batch_norm_grad
from fastgan.ops.replay import Replayed
from tests.accuracy import assert_as_accurate_as_stock
from tests.conftest import DTYPES

pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned")

# transposed (of the way back), channels of the gradient and of the result, its size, kernel, stride, padding, extra:
# every kernel, with tiles that end inside of the matrix, and those of images and of one position
WAYS_BACK = {
    "up": (True, 18, 17, (4, 5), 4, 2, 1, 0),
    "up, rest": (True, 5, 20, (5, 4), 3, 2, 1, 1),
    "to an image": (True, 9, 3, (5, 7), 4, 2, 1, 0),
    "to one position": (True, 10, 5, (1, 1), 4, 1, 0, 0),
    "down": (False, 17, 18, (8, 10), 4, 2, 1, 0),
    "down, wide": (False, 3, 70, (6, 6), 3, 1, 1, 0),
}
ACTIVATIONS = {"relu": torch.relu, "leaky_relu": lambda z: F.leaky_relu(z, 0.2), "tanh": torch.tanh}
ACTIVATIONS["sigmoid"] = torch.sigmoid


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS_BACK)
@pytest.mark.parametrize("implementation", ("triton", "cudnn"))
def test_way_back(implementation, way, activation, dtype, device, choose_in):
    choose_in(input_grads, lambda problem, device: Choice(implementation))
    transposed, a, b, size, kernel, stride, padding, extra = WAYS_BACK[way]
    random = torch.Generator().manual_seed(0)
    dz = torch.randn(2, a, *size, generator=random).to(device, dtype)
    shape = (a, b) if transposed else (b, a)
    weight = (torch.randn(*shape, kernel, kernel, generator=random) / (a * kernel)).to(device, dtype)
    where = (transposed, [stride] * 2, [padding] * 2, [extra] * 2)

    def stock(dz, weight, z):
        if transposed:
            way_back = F.conv_transpose2d(dz, weight, None, stride, padding, extra)
        else:
            way_back = F.conv2d(dz, weight, None, stride, padding)
        z = z.requires_grad_()
        (gradient,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, way_back)
        return gradient

    shape = out_size(dz, weight, *where)
    z = torch.randn(2, b, *shape, generator=random).to(device, dtype)
    out = ACTIVATIONS[activation](z)
    ours = conv_activation_grad(dz, weight, None, out, *where, activation, 0.2)
    exact = stock(dz.double(), weight.double(), z.double())
    assert_as_accurate_as_stock(way, ours, stock(dz, weight, z), exact, computed_in=dtype)


TO_BATCH_NORM = [way for way in WAYS_BACK if way != "to an image"]
# Of its 128 outputs a thread no sums are made in registers: they are read again.
LARGE_TILE = MatrixTile(128, 128, 16, 4, 2)
BY = {
    "triton": Choice("triton"),
    "triton, large tile": Choice("triton", LARGE_TILE._asdict()),
    "cudnn": Choice("cudnn"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way, activation", list(zip(TO_BATCH_NORM, [*ACTIVATIONS, None], strict=True)))
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("groups, affine", [(1, True), (2, True), (2, False)])
def test_way_back_to_batch_norm(groups, affine, by, way, activation, dtype, device, choose_in):
    """The sums that BatchNorm's backward needs come with the gradient, each group's apart."""
    choose_in(input_grads, lambda problem, device: BY[by])
    assert not LARGE_TILE.has_room()
    transposed, a, b, size, kernel, stride, padding, extra = WAYS_BACK[way]
    random = torch.Generator().manual_seed(0)
    dz = torch.randn(4, a, *size, generator=random).to(device, dtype)
    shape = (a, b) if transposed else (b, a)
    weight = (torch.randn(*shape, kernel, kernel, generator=random) / (a * kernel)).to(device, dtype)
    where = (transposed, [stride] * 2, [padding] * 2, [extra] * 2)
    y = (torch.randn(4, b, *out_size(dz, weight, *where), generator=random) + 2).to(device, dtype)
    vectors = [torch.rand(b, generator=random).to(device) + more for more in (0.5, -0.5)] if affine else []
    mean = y.double().view(groups, -1, *y.shape[1:]).mean((1, 3, 4)).float()
    invstd = torch.rand(groups, b, generator=random).to(device) + 0.5

    def stock(dz, weight, y, mean, invstd, gamma=1.0, beta=0.0):
        if transposed:
            way_back = F.conv_transpose2d(dz, weight, None, stride, padding, extra)
        else:
            way_back = F.conv2d(dz, weight, None, stride, padding)
        in_groups = y.to(mean.dtype).view(groups, -1, *y.shape[1:])
        x_hat = (in_groups - mean[:, None, :, None, None]) * invstd[:, None, :, None, None]
        z = x_hat.transpose(2, -1) * gamma + beta
        z = z.transpose(2, -1).detach().requires_grad_()
        out = z if activation is None else ACTIVATIONS[activation](z)
        (grad,) = torch.autograd.grad(out, z, way_back.to(z.dtype).view(z.shape))
        return grad.flatten(0, 1), torch.stack([grad.sum((1, 3, 4)), (grad * x_hat).sum((1, 3, 4))], 1)

    ours, sums = conv_batch_norm_grad(dz, weight, None, [y, mean, invstd, *vectors], *where, activation, 0.2)
    exact = stock(*(tensor.double() for tensor in (dz, weight, y, mean, invstd, *vectors)))
    grad, stock_sums = stock(dz, weight, y, mean, invstd, *vectors)
    assert ours.dtype == dtype and sums.dtype == torch.float32 and sums.shape == (groups, 2, b)
    assert_as_accurate_as_stock(way, ours, grad.to(dtype), exact[0], computed_in=dtype)
    assert_as_accurate_as_stock(f"{way}: sums", sums, stock_sums, exact[1], computed_in=dtype)


def critic():
    """Activations between convolutions and before BatchNorm, to and from an image, with and without bias."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 6, 3, 1, 1, bias=False),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 5, 4, 2, 1),
        nn.Sigmoid(),
        nn.Conv2d(5, 4, 3, 1, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
        nn.ReLU(),
        nn.BatchNorm2d(3),  # the tutorials' order: this activation's gradient is of what BatchNorm gives back
        nn.Conv2d(3, 4, 2, 2),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 1, 4),
    )


class Critic(nn.Module):
    """The same in a forward of its own, with one result that is used twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(critic())

    def forward(self, x):
        for layer in self.layers[:4]:
            x = layer(x)
        skip = F.leaky_relu(self.layers[2](F.leaky_relu(self.layers[0](F.interpolate(x[:, :3], scale_factor=2)), 0.3)))
        x = x + skip
        for layer in self.layers[4:]:
            x = layer(x)
        return x


@pytest.fixture
def passes(monkeypatch):
    """A list that grows by the name of every pass for nothing but an activation's gradient or BatchNorm's sums."""
    found = []

    def recording(name):
        original = getattr(batch_norm, name)

        def recorded(*args, **options):
            found.append(name)
            return original(*args, **options)

        return recorded

    for name in ("activation_input_grad", "batch_norm_grad_sums"):
        monkeypatch.setattr(batch_norm, name, recording(name))
    # A replay, on a GPU, starts the kernels and calls nothing by its name.
    monkeypatch.setattr(Replayed, "__call__", lambda replayed, *arguments: replayed.function(*arguments))
    return found


def gradients(network, x):
    network.zero_grad()
    x = x.clone().requires_grad_()
    out = network(x)
    (out * torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in network.parameters())]


@pytest.mark.parametrize("make", [critic, Critic])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_networks(make, frozen, compiled, device, passes):
    torch.manual_seed(0)
    stock = make().to(device)
    model = fastgan.fuse(copy.deepcopy(stock))
    for network in (stock, model):
        for layer in network.modules():
            if frozen and isinstance(layer, nn.Conv2d):
                layer.requires_grad_(False)
    x = torch.randn(3, 3, 8, 8, device=device)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    expected, counts = gradients(stock, x), []
    for scope in (contextlib.nullcontext, first_order):
        del passes[:]
        with scope():
            ours = gradients(run, x)
        counts.append([passes.count(name) for name in ("activation_input_grad", "batch_norm_grad_sums")])
        for actual, wanted in zip(ours, expected, strict=True):
            assert (actual is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)
    (activations, sums), within = counts
    if not compiled:  # chains, which know the layers before without being told
        assert [activations, sums] == within == [1 if make is critic else 3, 0]
    else:
        assert within == [activations - 4, sums - 2] and sums == 2


def test_gradients_of_gradients_are_refused(device):
    model = fastgan.fuse(critic()).to(device)
    x = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    assert not only_first_order()
    with first_order():
        assert only_first_order()
        out = model(x)
    assert not only_first_order()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_a_training_step_is_first_order(device, passes):
    """The discriminator's first activation costs no pass of its own; the step computes what it did."""
    from fastgan.training import TrainStep

    losses = []
    for fused in (True, False):
        torch.manual_seed(0)
        generator = fastgan.models.Generator(image_size=8, nz=5, ngf=4).to(device)
        discriminator = fastgan.models.Discriminator(image_size=8, ndf=4).to(device)
        step = TrainStep(generator, discriminator, latent_dim=5, fused=fused)
        torch.manual_seed(1)
        losses.append([step(torch.ones(4, 3, 8, 8, device=device) / 2) for _ in range(2)])
        # Of the generator's tanh: between two networks nobody knows what comes next. Of BatchNorm's sums not one.
        assert passes == ["activation_input_grad"] * 2
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
