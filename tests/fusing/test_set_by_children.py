"""What a forward reads after a module that it calls has set it: fuse sees that, and leaves such a forward stock."""

import re
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from tests.forwards import Counting
from tests.pairs import assert_close, count_operator_calls, make_pair

STEPS = 1.0


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.child = nn.Conv2d(3, 4, 3, padding=1), self.Child()

    def start(self, x):
        return self.child(F.relu(self.conv(x)))


class Skips(Parent):
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.skips = nn.Conv2d(4, 4, 3, padding=1), []

        def forward(self, x):
            self.skips = []
            x = torch.relu(self.conv(x))
            self.keep(x)
            return x

        def keep(self, x):
            self.skips.append(x)

    def forward(self, x):
        x = self.start(x)
        for skip in self.child.skips:
            x = x + skip
        return x


class Loss(Parent):
    class Child(nn.Module):
        kl = 0.0

        def forward(s, x):
            s.kl = x.square().mean()
            return x

    def forward(self, x):
        return self.start(x) + self.child.kl


class Counter(Parent):
    Child = Counting

    def forward(self, x):
        return self.start(x) * min(1.0, self.child.calls / 10)


class Global(Parent):
    class Child(nn.Module):
        def forward(self, x):
            count()
            return x

    def forward(self, x):
        return self.start(x) * STEPS


def count():
    global STEPS
    STEPS = 2.0 if STEPS == 1.0 else 1.0


class Buffer(Parent):
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("positions", None)

        def forward(self, x):
            if self.positions is None:
                self.positions = torch.linspace(0, 1, x.shape[3], dtype=x.dtype)
            return x + self.positions

    def forward(self, x):
        x = self.start(x)
        return x if self.child.positions is None else x * self.child.positions


class Hooked(Parent):
    def __init__(self):
        super().__init__()
        self.features = None
        self.child[1].register_forward_hook(self.keep)

    def Child(self):
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def keep(self, module, inputs, output):
        self.features = output

    def forward(self, x):
        x = self.start(x)
        return x if self.features is None else x + self.features


class ByName(Parent):
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = 1.0

        def forward(self, x):
            setattr(self, "scale", self.scale + 1)  # noqa: B010
            return x

    def forward(self, x):
        return self.start(x) * self.child.scale


class InDict(ByName):
    class Child(ByName.Child):
        def forward(self, x):
            self.__dict__.update(scale=self.scale + 1)
            return x


class Bump:
    def bump(self, module):
        module.scale += 1


class ByAnother(ByName):
    class Child(ByName.Child):
        def __init__(self):
            super().__init__()
            self.other = Bump()

        def forward(self, x):
            self.other.bump(self)
            return x


class HookedByName(ByName):
    def __init__(self):
        super().__init__()
        self.child.scale = 1.0
        self.child.register_forward_hook(lambda module, inputs, output: setattr(module, "scale", module.scale + 1))

    Child = nn.Identity


class Option(Parent):
    """One of the options that both have."""

    def __init__(self):
        super().__init__()
        self.options = self.child.options = Namespace(scale=1.0)

    class Child(nn.Module):
        def forward(self, x):
            self.options.scale += 1
            return x

    def forward(self, x):
        x = self.start(x)
        return self.child(x) * self.options.scale


class Own(Parent):
    """The child sets its own attribute of that name, and the parent's at nobody's call."""

    def __init__(self):
        super().__init__()
        self.scale = 2.0

    class Child(nn.Module):
        def forward(self, x):
            self.scale = x.mean()
            return x

        def set_scale(self, parent, scale):
            parent.scale = scale

    def forward(self, x):
        return self.start(x) * self.scale


def assert_equal_calls(model, stock):
    global STEPS
    torch.manual_seed(1)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        before = STEPS
        theirs = stock(x)
        STEPS = before
        assert_close(model(x), theirs)


@pytest.mark.parametrize(
    "kind", [Skips, Loss, Counter, Global, Buffer, Hooked, ByName, InDict, ByAnother, HookedByName, Option]
)
def test_stays_stock(kind, monkeypatch):
    stock, _ = make_pair(kind)
    model = kind().double()  # a copy would have the hook of the first
    model.load_state_dict(stock.state_dict())
    count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert_equal_calls(model, stock)
    (row,) = (row for row in fastgan.explain(kind()) if row.path == "conv")
    assert not row.fused and re.search(r"child(\.1)? may set", row.reason)


def test_does_not_matter(monkeypatch):
    stock, model = make_pair(Own)
    calls = count_operator_calls(monkeypatch)
    assert_equal_calls(fastgan.fuse(model), stock)
    assert calls
