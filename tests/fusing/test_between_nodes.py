"""What stands between a convolution and its BatchNorm in a forward of its own happens there, as it does in stock."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from tests.forwards import Layers
from tests.pairs import assert_close, count_operator_calls, make_pair


class Block(nn.Sequential):
    """One node of a graph: its forward is its own."""

    def forward(self, x):
        return super().forward(x)


class Shared(Layers):
    """The BatchNorm of the first convolution is in a child, too."""

    def __init__(self):
        super().__init__()
        self.inner = Block(nn.Identity(), self.bn1)
        self.other = nn.BatchNorm2d(4)
        self.free = Block(nn.Identity(), nn.BatchNorm2d(4))


def reads_mean(self, x):
    y = self.conv1(x)
    old = self.bn1.running_mean.clone()
    return F.relu(self.bn1(y)) + old.sum()


def reads_variance(self, x):
    variance = self.bn1.running_var.view(1, -1, 1, 1)
    y = self.conv1(x)
    noise = variance + x.mean()
    return self.bn1(y).relu() + noise


def reads_count(self, x):
    y = F.leaky_relu(self.conv1(x), 0.2)
    before = self.bn1.num_batches_tracked + 0
    return self.bn1(y) * before


def reads_of_the_child(self, x):
    y = self.conv1(x)
    old = self.inner[1].running_mean * 1
    return self.bn1(y) + old.sum()


def multiplies(self, x):
    y = self.conv1(x)
    self.bn1.weight.data.mul_(2.0)
    return F.relu(self.bn1(y))


def adds_to_a_part(self, x):
    first = self.bn1.bias.data[:1]
    y = self.conv1(x)
    first.add_(1.0)
    return F.relu(self.bn1(y))


def copies(self, x):
    y = self.conv1(x)
    self.bn1.running_var.copy_(self.other.weight.detach() * 3)
    return self.bn1(y)


def writes_as_out(self, x):
    y = self.conv1(x)
    torch.mul(self.other.weight.detach(), 2.0, out=self.bn1.running_mean)
    return self.bn1(y)


def calls_it_in_a_child(self, x):
    y = self.conv1(x)
    z = self.inner(x[:, :1].expand(-1, 4, -1, -1))
    return F.relu(self.bn1(y)) + z


def calls_one_with_its_statistics(self, x):
    y = self.conv1(x)
    z = self.other(x[:, :1].expand(-1, 4, -1, -1))
    return F.relu(self.bn1(y)) + z


IN_BETWEEN = {
    reads_mean: "uses tensors of bn1 in between",
    reads_variance: "uses tensors of bn1 in between",
    reads_count: "uses tensors of bn1 in between",
    reads_of_the_child: "uses tensors of bn1 in between",
    multiplies: "uses tensors of bn1 in between",
    adds_to_a_part: "uses tensors of bn1 in between",
    copies: "uses tensors of bn1 in between",
    writes_as_out: "uses tensors of bn1 in between",
    calls_it_in_a_child: "inner is called in between, and has tensors of bn1",
    calls_one_with_its_statistics: "other is called in between, and has tensors of bn1",
}


def of_the_convolution(self, x):
    """Which runs where it stands."""
    y = self.conv1(x)
    size = self.conv1.weight.square().sum()
    z = self.conv1(x.flip(3))
    return F.relu(self.bn1(y)) + z * size


def before_and_after(self, x):
    old = self.bn1.running_mean.clone()
    y = self.bn1(self.conv1(x))
    new = self.bn1.running_mean.clone()
    self.bn1.running_var.add_(1.0)
    return F.relu(y) + (new - old).sum()


def in_the_input(self, x):
    x = x * self.bn1.weight.sum()
    return self.bn1(F.relu(self.conv1(x)))


def others(self, x):
    y = self.conv1(x)
    z = self.bn2(x) * self.bn2.running_var.sum()
    return F.relu(self.bn1(y)) + z.mean()


def looked_up_only(self, x):
    y = self.conv1(x)
    mean = self.bn1.running_mean
    return F.relu(self.bn1(y)) + mean.sum()


def assert_equal_calls(model, stock):
    torch.manual_seed(1)
    for training in (True, True, False):
        model.train(training), stock.train(training)
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        assert_close(model(x), stock(x))
        assert_close(model.state_dict(), stock.state_dict())


def pair_of(function):
    stock, model = make_pair(type(function.__name__, (Shared,), {"forward": function}))
    if function is calls_one_with_its_statistics:
        for network in (stock, model):
            network.other.running_mean = network.bn1.running_mean
    return stock, model


@pytest.mark.parametrize("function", IN_BETWEEN, ids=lambda f: f.__name__)
def test_stays_stock(function, monkeypatch):
    stock, model = pair_of(function)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert_equal_calls(model, stock)
    assert calls and not any(layer.batch_statistics for layer in calls)
    row = next(row for row in fastgan.explain(model) if row.path == "conv1")
    assert "BatchNorm2d" not in row.pattern and IN_BETWEEN[function] in row.reason


@pytest.mark.parametrize(
    "function", [of_the_convolution, before_and_after, in_the_input, others, looked_up_only], ids=lambda f: f.__name__
)
def test_does_not_matter(function, monkeypatch):
    stock, model = pair_of(function)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert_equal_calls(model, stock)
    assert any(layer.activation == "relu" and layer.batch_statistics for layer in calls)


def norm_of_the_second(self, x):
    y = self.conv1(x)
    z = self.bn2(x)
    return self.bn2(self.conv2(F.relu(self.bn1(y)))) + z.mean()


def weight_of_the_second(self, x):
    y = self.conv1(x)
    self.conv2.weight.data.clamp_(-0.01, 0.01)
    return self.bn2(self.conv2(F.relu(self.bn1(y))))


def statistics_of_the_second(self, x):
    y = self.conv1(x)
    old = self.bn2.running_mean * 1
    return self.bn2(self.conv2(F.relu(y))) + old.sum()


def weight_of_the_third(self, x):
    y = self.conv2(self.bn1(self.conv1(x)).relu())
    self.up.weight.data.mul_(2)
    return self.up(self.conv1(self.bn2(y)).tanh())


@pytest.mark.parametrize(
    "function",
    [norm_of_the_second, weight_of_the_second, statistics_of_the_second, weight_of_the_third],
    ids=lambda f: f.__name__,
)
def test_layers_in_a_row(function, monkeypatch):
    """What stands within one of them may have to do with those after it."""
    stock, model = pair_of(function)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert_equal_calls(model, stock)
    assert calls


def calls_a_child(self, x):
    y = self.conv1(x)
    z = self.free(x[:, :1].expand(-1, 4, -1, -1))
    return F.relu(self.bn1(y)) + z


def test_a_child_that_gets_it_later(monkeypatch):
    stock, model = pair_of(calls_a_child)
    count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert_equal_calls(model, stock)
    assert "BatchNorm2d" in fastgan.explain(model)[0].pattern
    for network in (stock, model):
        network.free[1] = network.bn1
    assert_equal_calls(model, stock)
    assert "free is called in between" in fastgan.explain(model)[0].reason
