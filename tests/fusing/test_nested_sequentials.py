"""Sequentials inside of others, and inside of forwards: their layers are fused as if they stood there themselves."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan import fusion
from fastgan.fusing import graph_forward
from tests.pairs import assert_same, count_operator_calls, make_pair, one_step


def conv_norm(in_channels, out_channels):
    """What helper functions of many networks return: the activation is for who calls it."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels))


def block(in_channels, out_channels, *more):
    return nn.Sequential(*conv_norm(in_channels, out_channels), nn.LeakyReLU(0.2), *more)


def nested():
    """A row of three convolutions, another layer, and one more."""
    inner = nn.Sequential(block(4, 6), nn.Sequential(), block(6, 4, nn.AvgPool2d(2)))
    return nn.Sequential(block(3, 4), inner, nn.Sequential(nn.Conv2d(4, 2, 3)), nn.Sigmoid())


class ByFunctions(nn.Module):
    """An activation after a Sequential, one in a Sequential after a convolution, and shortcuts that may be empty."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv_norm(3, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.after, self.shortcut, self.last = nn.Sequential(nn.BatchNorm2d(4), nn.Tanh()), nn.Sequential(), block(4, 3)

    def forward(self, x):
        x = F.leaky_relu(self.first(x), 0.05)
        return self.last(self.after(self.second(x)) + self.shortcut(x))


@pytest.fixture
def rows(monkeypatch):
    """A list that gets the names of the convolutions of each row of layers that run together."""
    count_operator_calls(monkeypatch)
    rows, run_parts = [], fusion.run_parts

    def noted(x, parts):
        rows.append([part.name for part in parts])
        return run_parts(x, parts)

    for module in (fusion, graph_forward):
        monkeypatch.setattr(module, "run_parts", noted)
    return rows


CASES = {
    "nested": (nested, [["0.0", "1.0.0", "1.2.0"], ["2.0"]]),
    "by functions": (ByFunctions, [["first.0"], ["second"], ["last.0"]]),
}


@pytest.mark.parametrize("name", CASES)
def test_rows(name, rows):
    make, expected = CASES[name]
    stock, model = make_pair(make)
    fastgan.fuse(model)
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert rows == expected
    stock.load_state_dict(model.state_dict())
    assert_same(model, stock)
    patterns = {row.path: row.pattern for row in fastgan.explain(model, torch.randn(2, 3, 8, 8).double())}
    assert list(patterns) == [path for row in expected for path in row]
    if make is ByFunctions:
        assert patterns["first.0"] == "Conv2d + BatchNorm2d + LeakyReLU"
        assert patterns["second"] == "Conv2d + BatchNorm2d + Tanh"


@pytest.mark.parametrize("name", CASES)
def test_compiled(name, rows):
    stock, model = make_pair(CASES[name][0])
    compiled = torch.compile(fastgan.fuse(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(one_step(compiled, x)[0], one_step(stock, x)[0])


def hook(inner, in_channels):
    inner.register_forward_hook(lambda module, inputs, output: output * 2)


def replace_forward(inner, in_channels):
    convolution = nn.Conv2d(in_channels, 4, 1).double()
    inner.forward = lambda x: convolution(x)


def append(inner, in_channels):
    inner.append(nn.Conv2d(4, 4, 1).double())


def exchange(inner, in_channels):
    inner[0] = nn.Conv2d(in_channels, 4, 5, padding=2).double()


INNER = {"nested": (nested, "0", 3), "by functions": (ByFunctions, "first", 3), "empty": (ByFunctions, "shortcut", 4)}
CHANGES = [(name, change) for name in INNER for change in (hook, replace_forward, append, exchange)]
CHANGES.remove(("empty", exchange))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_changes_of_an_inner_one(name, change, before, rows):
    make, path, in_channels = INNER[name]
    stock, model = make_pair(make)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    if not before:
        torch.testing.assert_close(one_step(fastgan.fuse(model), x), one_step(stock, x))
    for network in (stock, model):
        torch.manual_seed(3)
        change(network.get_submodule(path), in_channels)
    torch.testing.assert_close(one_step(fastgan.fuse(model), x), one_step(stock, x))
    assert rows


class Twice(nn.Sequential):
    def __call__(self, x):
        return 2 * super().__call__(x)


class TwiceWithin(nn.Sequential):
    def _call_impl(self, x):
        return 2 * super()._call_impl(x)


def call_otherwise(module):
    call = module._call_impl
    module._call_impl = lambda x: 2 * call(x)


@pytest.mark.parametrize("of", [Twice, TwiceWithin, "an inner one", "a convolution"])
def test_calls_of_their_own(of, rows):
    def make():
        inner = (nn.Sequential if isinstance(of, str) else of)(nn.Conv2d(3, 4, 3))
        return nn.Sequential(inner, nn.ReLU(), nn.Conv2d(4, 2, 3))

    stock, model = make_pair(make)
    for network in (stock, model):
        if isinstance(of, str):
            call_otherwise(network[0] if of == "an inner one" else network[0][0])
    assert_same(fastgan.fuse(model), stock)
    assert ["0.0"] not in rows and ["2"] in rows


def test_a_call_of_its_own_beside_hooks_that_compute_the_weight(rows):
    def make():
        return nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())

    stock, model = make_pair(make)
    assert_same(fastgan.fuse(model), stock)
    assert rows
    del rows[:]
    for network in (stock, model):
        call_otherwise(network[0])
    assert_same(model, stock)
    assert not rows


@pytest.mark.parametrize("before", [True, False])
def test_an_inner_one_that_is_compiled_in_place(before, rows):
    """Whoever compiles a part wants it to run compiled."""
    model, x = fastgan.fuse(nested()), torch.randn(2, 3, 8, 8)
    if not before:
        model(x)
    del rows[:]
    model[0].compile(backend="eager")
    model(x)
    assert ["0.0", "1.0.0", "1.2.0"] not in rows


def test_an_inner_one_that_is_called_by_itself(rows):
    stock, model = make_pair(nested)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model[0](x), stock[0](x))
    assert rows == [["0"]]


def test_explain_of_inner_ones_called_one_by_one(rows):
    class OneByOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nested()

        def forward(self, x):
            if x.sum() > 0:  # which no trace knows
                x = -x
            for each in self.blocks:
                x = each(x)
            return x

    model = fastgan.fuse(OneByOne())
    found = fastgan.explain(model, torch.randn(2, 3, 8, 8))
    assert all(row.fused for row in found)
    assert [row.pattern for row in found][:1] == ["Conv2d + BatchNorm2d + LeakyReLU"]


def test_copies(rows):
    stock, model = make_pair(nested)
    copied = copy.deepcopy(fastgan.fuse(model))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(one_step(copied, x), one_step(stock, x))
    assert rows == CASES["nested"][1]
