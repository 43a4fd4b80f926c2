"""A fused layer's result that something changes in place, while other fused layers read it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from tests.forwards import Layers
from tests.pairs import assert_close, assert_same, count_operator_calls, make_pair
from tests.test_compile_backend import assert_equal_steps, rewritten  # noqa: F401  the second is a fixture


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x):
        return x.mul_(self.scale.detach())


class Blocks(Layers):
    def __init__(self):
        super().__init__()
        self.relu, self.doubling, self.side = nn.ReLU(inplace=True), Doubling(), nn.Conv2d(4, 3, 1)


def activated(self, x):
    """The shortcut of a block that activates first."""
    y = self.conv1(x)
    return self.conv2(self.relu(y)) + self.side(y)


def multiplied(self, x):
    y = self.bn1(self.conv1(x))
    y.mul_(2)
    return self.conv2(y)


def activated_as_a_function(self, x):
    y = self.bn1(self.conv1(x))
    F.elu_(y)
    return self.conv2(y)


def through_a_view(self, x):
    y = self.conv1(x)
    y.flatten(1).mul_(2)
    return self.conv2(y) + self.side(y)


def through_its_data(self, x):
    y = self.conv1(x)
    y.data.mul_(2)
    return self.conv2(y)


def by_a_child(self, x):
    y = self.conv1(x)
    return self.side(self.doubling(y)) + self.conv2(y)


CHANGED = [activated, multiplied, activated_as_a_function, through_a_view, through_its_data, by_a_child]


def pair_of(function):
    return make_pair(type(function.__name__, (Blocks,), {"forward": function}))


@pytest.mark.parametrize("function", CHANGED, ids=lambda f: f.__name__)
def test_fused(function, monkeypatch):
    stock, model = pair_of(function)
    calls = count_operator_calls(monkeypatch)
    assert_same(fastgan.fuse(model), stock)
    assert len(calls) >= 4


def test_a_mask_of_the_caller(monkeypatch):
    def masked(self, x, mask):
        mask |= x.mean(1, keepdim=True) > 0
        return F.relu(self.conv1(x)) * mask

    stock, model = pair_of(masked)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    masks = torch.zeros(2, 2, 1, 4, 4, dtype=torch.bool)
    assert_close(model(x, masks[0]), stock(x, masks[1]))
    assert calls and masks[0].any() and torch.equal(*masks)


@pytest.mark.parametrize("function", CHANGED, ids=lambda f: f.__name__)
def test_captured(function, rewritten, monkeypatch):  # noqa: F811
    stock, model = pair_of(function)
    calls = count_operator_calls(monkeypatch)
    assert_equal_steps(torch.compile(model, backend=rewritten), model, stock)
    assert calls and rewritten.calls
