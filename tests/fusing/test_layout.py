"""Results of fused layers lie in memory as stock's do: what follows may view them, and dropout masks are the same."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

import fastgan
from fastgan.memory_format import suggests_channels_last

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 3, 4, 4), (1, 1, 1, 1), (2, 3, 1, 4)])
def test_as_aten_sees_it(shape):
    """Its own convolutions show it: they give the layout of their input, where that of the weight does not decide."""
    _, c, h, w = shape
    weight = torch.empty(4, c, 2, 2)
    by_channel = torch.empty_strided(shape, (h * w * c, 1, w * c, c))
    for tensor in (torch.empty(shape), by_channel, by_channel.transpose(2, 3), torch.empty(2 * shape[0], c, h, w)[::2]):
        out = F.conv2d(tensor, weight, padding=1)
        assert suggests_channels_last(tensor) == (not out.is_contiguous()), (shape, tensor.stride())


def test_neither():
    for tensor in (torch.empty(2, 3, 0, 4), torch.empty(2, 3), torch.empty(1, 1, 1, 1).expand(2, 3, 4, 4)):
        assert not suggests_channels_last(tensor)


class Flattens(nn.Module):
    """What discriminators do: convolutions in a row, then a view."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, 1, 1))
        self.norm = nn.BatchNorm2d(4)
        self.last = parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, 1, 1))
        self.drop = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, 1, 1), nn.Dropout(0.5), nn.Conv2d(4, 2, 1), nn.Tanh())
        self.linear = nn.Linear(2 * 16, 1)

    def forward(self, x):
        x = self.features(x)
        skip = F.relu(self.norm(self.last(x)))
        x = self.drop(skip) + skip[:, :2] * F.dropout(x, 0.5, self.training)[:, 2:]
        return self.linear(x.view(x.size(0), -1)) if self.training or x.is_contiguous() else x


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("weights, images", list(product(LAYOUTS, LAYOUTS)), ids=str)
@pytest.mark.parametrize("how", ["fuse", "fuse and compile", "backend"])
def test_views_and_dropout_after_fused_layers(how, weights, images, backend, device, monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    torch.manual_seed(0)
    stock = Flattens().to(device, memory_format=weights)
    model = copy.deepcopy(stock)
    run = model if how == "backend" else fastgan.fuse(model)
    if how == "backend":
        from torch._dynamo.backends.debugging import aot_eager

        from fastgan.compile_backend import rewrite

        def backend_without_inductor(graph_module, example_inputs):
            rewrite(graph_module)
            return aot_eager(graph_module, example_inputs)

        run = torch.compile(model, backend=backend_without_inductor, fullgraph=True)
    elif how == "fuse and compile":
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 3, 8, 8, device=device).to(memory_format=images)
    for network in (stock, model):
        network.train(weights is images is torch.contiguous_format)  # stock itself cannot view the others
    results = []
    for network in (stock, run):
        torch.manual_seed(1)
        results.append(network(x))
    theirs, ours = results
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert model.features(x).stride() == stock.features(x).stride()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("weights, images", list(product(LAYOUTS, LAYOUTS)), ids=str)
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("follows", [True, False])
def test_gradients_of_images(follows, create_graph, leaf, weights, images, backend, device, monkeypatch):
    """Gradient penalties view them: `gradient.view(len(gradient), -1)`."""
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 4))
    stock = nn.Sequential(Forwards(layers) if follows else layers).to(device, memory_format=weights)
    model, found = fastgan.fuse(copy.deepcopy(stock)), []
    for network in (stock, model):
        torch.manual_seed(1)
        x = torch.randn(2, 3, 8, 8, device=device).to(memory_format=images).requires_grad_()
        x = x if leaf else x * 1.0
        found.append(torch.autograd.grad(network(x).sum(), x, create_graph=create_graph)[0])
    theirs, ours = found
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


class Forwards(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.first, _, self.last = layers

    def forward(self, x):
        return self.last(F.leaky_relu(self.first(x), 0.2))


@pytest.mark.parametrize("weights", LAYOUTS, ids=str)
def test_from_one_position_of_channels_last_images(weights, device):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    decoder = nn.Sequential(nn.ConvTranspose2d(8, 8, 4), nn.BatchNorm2d(8), nn.ReLU()).to(memory_format=weights)
    stock = nn.Sequential(encoder, decoder).to(device)
    model = fastgan.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 8, 8, device=device).to(memory_format=torch.channels_last)
    assert model(x).stride() == stock(x).stride()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "layers",
    [
        lambda: [
            nn.ConvTranspose2d(3, 8, 4),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1),
            nn.Tanh(),
        ],
        lambda: [nn.Conv2d(3, 1, 1, bias=False), nn.Sigmoid()],
        lambda: [nn.Conv2d(3, 1, 1, bias=False)],
        lambda: [nn.ConvTranspose2d(3, 4, 4, bias=False), nn.ReLU()],
    ],
    ids=("one channel", "one position", "one position alone", "from one position"),
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_results_are_no_views(layout, layers, backend, device, monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    stock = nn.Sequential(*layers()).to(device, memory_format=layout)
    model = fastgan.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 1, 1, device=device).to(memory_format=layout)
    assert not model(x).detach_().requires_grad
    with torch.no_grad():
        results = [network(x) for network in (stock, model)]
    share = torch.ones(1, device=device, requires_grad=True)
    torch.testing.assert_close(*(result.mul_(share) for result in results), rtol=1e-3, atol=1e-5)


def _one_channel(*follows):
    return nn.Sequential(nn.ConvTranspose2d(3, 1, 4, 2, 1), *follows)


class Writes(Forwards):
    """As functions and methods, and a layer whose result lies as the convolution's."""

    def forward(self, x):
        return self.last(F.relu(self.first(x), inplace=True)).relu_()


ONES = {
    "one channel": lambda: _one_channel(nn.Tanh()),
    "one channel and BatchNorm": lambda: _one_channel(nn.BatchNorm2d(1), nn.ReLU()),
    "one channel alone": _one_channel,
    "one channel within": lambda: _one_channel(nn.Tanh(), nn.Conv2d(1, 4, 3), nn.ReLU()),
    "one channel in a graph": lambda: Forwards(_one_channel(nn.Tanh(), nn.Conv2d(1, 4, 3))),
    "one position": lambda: nn.Sequential(nn.Conv2d(3, 4, 6), nn.LeakyReLU(0.2)),
    "one position and BatchNorm": lambda: nn.Sequential(nn.Conv2d(3, 4, 6), nn.BatchNorm2d(4), nn.ReLU()),
    "one position in place": lambda: nn.Sequential(nn.Conv2d(3, 4, 6), nn.LeakyReLU(0.2, inplace=True)),
    "one position in place by itself": lambda: nn.Sequential(nn.Conv2d(3, 4, 6), nn.ReLU(inplace=True)),
    "one channel in place": lambda: _one_channel(nn.LeakyReLU(0.2, inplace=True)),
    "one channel in place, BatchNorm": lambda: _one_channel(nn.BatchNorm2d(1), nn.LeakyReLU(0.2, inplace=True)),
    "one channel in place within": lambda: _one_channel(nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(1, 4, 3)),
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()),
    "weight_norm of hooks": lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()),
    "one position of padded images": lambda: nn.Sequential(nn.Conv2d(3, 4, 6, 8, 1), nn.Sigmoid()),
    "from one position to one channel": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 6), nn.ConvTranspose2d(8, 1, 2), nn.LeakyReLU(0.2, inplace=True)
    ),
    "from one position to one": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 6), nn.ConvTranspose2d(8, 2, 1), nn.LeakyReLU(0.2, inplace=True)
    ),
    "one position within": lambda: _one_position(nn.ReLU()),
    "one position within, of two layers": lambda: _one_position(),
    "one position in place within": lambda: _one_position(nn.LeakyReLU(0.2, inplace=True)),
    "one position and BatchNorm within": lambda: _one_position(nn.BatchNorm2d(8), nn.ReLU()),
    "one position in a graph": lambda: Forwards(_one_position(nn.ReLU())),
    "one position in a graph, in place": lambda: Writes(_one_position(nn.ReLU())),
    "one channel in a graph, in place": lambda: Writes(_one_channel(nn.ReLU(), nn.Conv2d(1, 4, 3))),
    "layers in a graph": lambda: Graph(_one_position(nn.ReLU(inplace=True))),
    "layers in a graph, anew": lambda: Graph(_one_position(nn.ReLU())),
}


def _one_position(*follows):
    return nn.Sequential(nn.Conv2d(3, 8, 6), *follows, nn.ConvTranspose2d(8, 4, 4))


class Graph(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.first, self.act, self.last = layers

    def forward(self, x):
        return self.last(self.act(self.first(x)))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("weights, images", list(product(LAYOUTS, LAYOUTS)), ids=str)
@pytest.mark.parametrize("name", ONES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_results_that_could_lie_either_way(name, weights, images, backend, device, monkeypatch):
    """Of one channel or position both layouts are the same, until a stock layer after it takes its own from them."""
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    # The older weight_norm's layers cannot be copied.
    stock, model = (ONES[name]().to(device, memory_format=weights) for _ in range(2))
    fastgan.fuse(model)
    x = torch.randn(2, 3, 6, 6, device=device).to(memory_format=images)
    theirs, ours = stock(x), model(x)
    assert ours.stride() == theirs.stride()
    after = nn.Conv2d(theirs.shape[1], 8, 1).to(device)
    assert after(ours).stride() == after(theirs).stride()


def test_gradients_of_wide_layers_lie_as_their_images(device):
    stock = nn.Sequential(nn.Conv2d(256, 512, 4, 2, 1), nn.LeakyReLU(0.2)).to(device)
    after = nn.Conv2d(512, 1, 1).to(device, memory_format=torch.channels_last)
    for create_graph in (False, True):
        found = []
        for network in (stock, fastgan.fuse(copy.deepcopy(stock))):
            x = torch.ones(2, 256, 4, 6, device=device, requires_grad=True)
            found.append(torch.autograd.grad(after(network(x)).sum(), x, create_graph=create_graph)[0].stride())
        assert found[0] == found[1] == x.stride()
