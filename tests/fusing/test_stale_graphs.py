"""fuse inside forwards whose way depends on what can change: after the change they do as stock does."""

import copy
import functools
import sys
import threading
import types

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import fastgan
from fastgan.fusing.graph_forward import MOST_PLANS
from fastgan.fusing.tracing import trace as tracing
from tests.forwards import Layers
from tests.pairs import assert_same, count_operator_calls, make_pair, suppose_kernels


class Base(Layers):
    """With children, buffers and attributes for the forwards below to read."""

    gain = 1.0

    def __init__(self):
        super().__init__()
        self.child = nn.Identity()
        self.child.gain = 1.0
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1)])
        self.named = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)})
        self.register_buffer("alpha", torch.tensor(0.5))
        self.register_module("extra", None)
        self.register_parameter("scale", None)

    def head(self, x):
        return F.relu(self.bn1(self.conv1(x)))


def more():
    torch.manual_seed(7)
    return nn.Conv2d(4, 4, 1).double()


FACTOR = 2.0


def helper(x):
    return x * FACTOR


def _set(name, value):
    return lambda model: setattr(model, name, value)


def buffer_item(self, x):
    return self.head(x) * self.alpha.item()


def child_attribute(self, x):
    return self.head(x) * self.child.gain


def child_mode(self, x):
    return self.head(x) * 2 if self.bn2.training else self.head(x)


def class_attribute(self, x):
    return self.head(x) * self.gain


def iterates(self, x):
    x = self.head(x)
    for block in self.blocks:
        x = block(x)
    return x


def iterates_over_named(self, x):
    x = self.head(x)
    for block in self.named.values():
        x = block(x)
    return x


def module_or_none(self, x):
    x = self.head(x)
    return x if self.extra is None else self.extra(x)


def parameter_or_none(self, x):
    x = self.head(x)
    return x if self.scale is None else self.scale * x


def not_there_yet(self, x):
    return self.head(x) * getattr(self, "factor", 2.0)


def a_global(self, x):
    return helper(self.head(x))


def list_of_numbers(self, x):
    return self.head(x) * self.numbers[0]


def a_partial(self, x):
    return self.resize(self.head(x))


def an_option(self, x):
    return self.head(x) * self.options.first.gain


def an_option_that_is_not_there(self, x):
    return self.head(x) * (self.options.gain if hasattr(self.options, "gain") else 2.0)


def a_list_of_options(self, x):
    return self.head(x) * self.options.slopes[0]


def other_options(self, x):
    return self.head(x) * self.options.slopes[0]


def plain(self, x):
    return self.head(x)


def with_global(value):
    return lambda model: globals().__setitem__("FACTOR", value)


CHANGES = {
    buffer_item: lambda model: model.alpha.fill_(2.0),
    child_attribute: lambda model: setattr(model.child, "gain", 5.0),
    child_mode: lambda model: setattr(model.bn2, "training", not model.bn2.training),
    class_attribute: _set("gain", 5.0),
    iterates: lambda model: model.blocks.append(more()),
    iterates_over_named: lambda model: model.named.update({"b": more()}),
    module_or_none: lambda model: setattr(model, "extra", more()),
    parameter_or_none: lambda model: setattr(model, "scale", nn.Parameter(torch.tensor(3.0).double())),
    not_there_yet: _set("factor", 0.5),
    list_of_numbers: lambda model: model.numbers.__setitem__(0, 3.0),
    a_partial: lambda model: model.resize.keywords.update(scale_factor=3),
    a_global: with_global(3.0),
    an_option: lambda model: setattr(model.options.first, "gain", 5.0),
    an_option_that_is_not_there: lambda model: setattr(model.options, "gain", 5.0),
    a_list_of_options: lambda model: model.options.slopes.__setitem__(0, 3.0),
    other_options: _set("options", types.SimpleNamespace(slopes=[4.0])),
    plain: lambda model: model.conv1.__dict__.update(padding_mode="circular"),
}


def network(function):
    cls = type(function.__name__, (Base,), {"forward": function})
    stock, model = make_pair(cls)
    for each in (stock, model):
        each.options.first.gain = 1.0
        each.numbers, each.resize = [2.0], functools.partial(F.interpolate, scale_factor=2)
    return stock, model


@pytest.mark.parametrize("function", CHANGES, ids=lambda f: f.__name__)
def test_change(function, monkeypatch):
    stock, model = network(function)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    # Not assert_same, which switches the mode and would have every call traced anew.
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(model(x), stock(x))
    assert calls
    with torch.no_grad():
        for changed in (stock, model):
            CHANGES[function](changed)
    for _ in range(2):
        torch.testing.assert_close(model(x), stock(x))
    assert_same(model, stock)


COMPILED = [
    class_attribute,
    child_attribute,
    child_mode,
    iterates,
    module_or_none,
    parameter_or_none,
    a_partial,
    a_global,
    an_option,
    an_option_that_is_not_there,
    other_options,
]


@pytest.mark.parametrize("function", COMPILED, ids=lambda f: f.__name__)
def test_change_of_compiled(function, monkeypatch):
    stock, model = network(function)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    # Not count_operator_calls, whose count would have each call compiled anew.
    suppose_kernels(monkeypatch)
    compiled = torch.compile(fastgan.fuse(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), stock(x))
    for changed in (stock, model):
        CHANGES[function](changed)
    torch.testing.assert_close(compiled(x), stock(x))


def test_patched_layers(monkeypatch):
    """Of a class, after they were called."""
    stock, model = network(plain)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert_same(model, stock)
    assert calls
    unpatched = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: 2 * unpatched(self, x))
    assert_same(model, stock)


def test_children_in_a_loop(monkeypatch):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

        def forward(self, x):
            for child in self.children():
                x = child(x)
            return x

    stock, model = make_pair(Chain)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert_same(model, stock)
    for changed in (stock, model):
        changed.add_module("more", more())
    assert_same(model, stock)
    assert calls


@pytest.mark.parametrize("code_only", [False, True])
def test_replaced_forward(code_only, monkeypatch):
    """By assignment to the class, and as tools do that reload code."""
    stock, model = network(types.FunctionType(plain.__code__.replace(), globals(), "plain"))
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert_same(model, stock)
    cls = type(model)
    if code_only:
        cls.forward.__code__ = class_attribute.__code__.replace(co_consts=(None,))
    else:
        cls.forward = class_attribute
    cls.gain = 4.0
    del calls[:]
    assert_same(model, stock)
    assert calls


def test_edited_graph_module(monkeypatch):
    stock, model = make_pair(lambda: fx.symbolic_trace(type("Plain", (Base,), {"forward": plain})()))
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert_same(model, stock)
    for module in (stock, model):
        for node in module.graph.nodes:
            if node.target is F.relu:
                node.target, node.kwargs = torch.tanh, {}
        module.recompile()
    del calls[:]
    assert_same(model, stock)
    assert calls


def fading(self, x, share=None):
    return F.relu(self.conv1(x)) * (self.share if share is None else share)


@pytest.mark.parametrize("as_argument", [True, False])
def test_a_constant_that_comes_to_rest(as_argument, monkeypatch):
    """The share of a new layer in a network that grows: a number of its own in each step, until it is one for good."""
    stock, model = network(fading)
    stock.share = model.share = 0.0
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def call(share):
        for each in (stock, model):
            each.share = share
        arguments = (x, share) if as_argument else (x,)
        torch.testing.assert_close(model(*arguments), stock(*arguments))

    with pytest.warns(RuntimeWarning, match="most other new calls run stock"):
        for i in range(2 * MOST_PLANS + 3):
            call(i / 100)
    assert sum(map(len, model.forward._plans.values())) == MOST_PLANS
    del calls[:]
    for _ in range(MOST_PLANS + 3):
        call(1.0)
    assert calls


def test_numbers_that_are_equal_but_not_the_same(monkeypatch):
    """1 and 1.0 and True give other types, 0.0 and −0.0 other signs."""
    stock, model = network(class_attribute)
    count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for gain in (0.0, -0.0, 0, 0.0):
        stock.gain = model.gain = gain
        assert torch.equal(model(x).signbit(), stock(x).signbit())


def test_copies(monkeypatch):
    stock, model = network(iterates)
    count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    model = copy.deepcopy(model)
    model.load_state_dict(stock.state_dict())
    for changed in (stock, model):
        changed.blocks.append(more())
    assert_same(model, stock)


def test_first_calls_from_several_threads(monkeypatch):
    """fx changes every module while it traces: what other threads call meanwhile is none of the trace's."""
    suppose_kernels(monkeypatch)

    def call(barrier, network, x, results):
        barrier.wait()
        results.extend(network(x).detach() for _ in range(3))

    for _ in range(5):
        network = fastgan.fuse(Several())
        x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
        expected = fastgan.unfuse(copy.deepcopy(network))(x).detach()
        barrier, results = threading.Barrier(4), []
        threads = [threading.Thread(target=call, args=(barrier, network, x, results)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 12
        for result in results:
            torch.testing.assert_close(result, expected)


def test_a_call_from_another_thread_that_outlasts_the_trace(monkeypatch):
    """It is in fx's wrapper by then, which asks a tracer that has ended."""
    other, x, results = nn.Conv2d(4, 4, 3).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64), []
    thread = threading.Thread(target=lambda: results.append(other(x)))
    entered, ended = threading.Event(), threading.Event()
    call_module = tracing._Tracer.call_module

    def watched(tracer, *call):
        if threading.current_thread() is thread:
            entered.set()
            assert ended.wait(60)
        elif not entered.is_set():
            thread.start()
            assert entered.wait(60)
        return call_module(tracer, *call)

    monkeypatch.setattr(tracing._Tracer, "call_module", watched)
    suppose_kernels(monkeypatch)
    fastgan.fuse(Several())(x)
    ended.set()
    thread.join()
    torch.testing.assert_close(results, [other(x)])


class Several(nn.Module):
    gain = 2.0

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(6)])
        self.norm = nn.BatchNorm2d(4)
        self.double().eval()

    def forward(self, x):
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return self.norm(x) * self.gain
