"""fuse inside forwards of their own: what is followed, what is refused, and that it always equals stock."""

import copy
import enum
import random

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import fastgan
from fastgan.fusing import graph_forward
from tests.forwards import (
    FOLLOWED,
    REFUSED,
    Layers,
    any_number,
    branches,
    by_attribute,
    forward_of,
    functions,
    input_changed_in_between,
    methods,
    modules_of_its_own,
    normalised_used_twice,
    output_size,
    own_functions,
    residual,
    residual_of_an_activation,
    skip,
    swish,
    told_by_position,
    used_twice,
)
from tests.pairs import assert_close, assert_same, count_operator_calls, make_pair, one_step, suppose_kernels


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", "reference")


@pytest.mark.parametrize("function", FOLLOWED, ids=lambda f: f.__name__)
def test_followed(function, monkeypatch):
    stock, model = make_pair(forward_of(function))
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert_same(model, stock)
    assert len(calls) == 6 * FOLLOWED[function]  # forward with and without gradients, in three modes


@pytest.mark.parametrize("function", FOLLOWED, ids=lambda f: f.__name__)
def test_compiled(function, monkeypatch):
    """The operators are in the compiled graph, whichever forward it was, without a graph break."""
    stock, model = make_pair(forward_of(function))
    calls = count_operator_calls(monkeypatch)
    compiled = torch.compile(fastgan.fuse(model), fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    for training in (True, False):
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        assert_close(one_step(compiled.train(training), x)[:1], one_step(stock.train(training), x)[:1])
    assert_close(model.state_dict(), stock.state_dict())
    assert_close([p.grad for p in model.parameters()], [p.grad for p in stock.parameters()])
    assert len(calls) == 2 * FOLLOWED[function]


class FromLabels(nn.Module):
    """What it is given are integers, and what the kernels would get it makes itself."""

    def __init__(self):
        super().__init__()
        self.latents, self.up, self.norm = nn.Embedding(5, 16), nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.BatchNorm2d(4)
        self.to_images = nn.ConvTranspose2d(4, 3, 4, 2, 1)

    def forward(self, labels):
        x = self.latents(labels).view(-1, 4, 2, 2)
        return torch.tanh(self.to_images(F.relu(self.norm(self.up(x)))))


def test_kernels_for_what_a_forward_makes(device, monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", "triton")
    torch.manual_seed(0)
    stock = FromLabels().to(device)
    model, rows = fastgan.fuse(copy.deepcopy(stock)), []
    run_parts = graph_forward.run_parts
    monkeypatch.setattr(graph_forward, "run_parts", lambda x, parts: rows.append(len(parts)) or run_parts(x, parts))
    labels = torch.tensor([3, 1, 4], device=device)
    torch.testing.assert_close(model(labels), stock(labels), rtol=1e-3, atol=1e-3)
    assert rows == [2]


def patterns(function):
    return {row.path: row.pattern for row in fastgan.explain(fastgan.fuse(forward_of(function)()))}


def test_input_changed_in_between(monkeypatch):
    """Without gradients, which stock has none of there either."""
    stock, model = make_pair(forward_of(input_changed_in_between))
    suppose_kernels(monkeypatch)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(model(x), stock(x))
    assert_close(model.state_dict(), stock.state_dict())


def test_patterns():
    conv, norm, leaky = "Conv2d", "Conv2d + BatchNorm2d", "Conv2d + BatchNorm2d + LeakyReLU"
    relu = "Conv2d + BatchNorm2d + ReLU"
    expected = {
        functions: (leaky, relu),
        methods: (relu, "Conv2d + Sigmoid"),
        residual: (relu, norm),
        residual_of_an_activation: ("Conv2d + LeakyReLU", conv),
        used_twice: (conv, conv),
        normalised_used_twice: (norm, conv),
        branches: (conv, conv),
        input_changed_in_between: (leaky, conv),
        by_attribute: (leaky, conv),
        swish: (norm, conv),
        modules_of_its_own: (leaky, "Conv2d + Sigmoid"),
        own_functions: (conv, "Conv2d + ReLU"),
    }
    for function, (first, second) in expected.items():
        found = patterns(function)
        assert (found["conv1"], found["conv2"]) == (first, second), function.__name__
    assert patterns(skip)["conv1"] == norm and patterns(skip)["up"] == "ConvTranspose2d"


def test_reasons():
    rows = {
        function: {row.path: row.reason for row in fastgan.explain(fastgan.fuse(forward_of(function)()))}
        for function in (used_twice, branches, residual, residual_of_an_activation, output_size, skip, swish)
    }
    assert "its result is used 2 times" in rows[used_twice]["conv1"]
    assert "bn1 is called in between" in rows[branches]["conv1"]
    assert "changes its result in place" in rows[residual_of_an_activation]["conv2"]
    (row,) = (r for r in fastgan.explain(fastgan.fuse(forward_of(told_by_position)())) if r.path == "up")
    assert row.pattern == "ConvTranspose2d" and "changes its result in place" in row.reason
    assert "called with more than its input" in rows[output_size]["up"]
    assert "does not call conv2" in rows[skip]["conv2"]
    assert "silu after it stays stock" in rows[swish]["conv1"]
    assert rows[residual]["conv1"] == "FASTGAN_BACKEND=reference"  # all of it is in the operator: nothing to explain


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid, torch.special.expit], ids=lambda f: f.__name__)
def test_results_with_a_place_of_their_own(function, monkeypatch):
    """An operator would not write them there."""

    class Out(Layers):
        def __init__(self):
            super().__init__()
            self.register_buffer("result", torch.zeros(2, 4, 8, 8))

        def forward(self, x):
            function(self.conv1(x), out=self.result)
            return self.conv2(self.result)

    stock, model = make_pair(Out)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(model(x), stock(x))
    assert_close(model.state_dict(), stock.state_dict())
    assert [layer.activation for layer in calls] == [None, None]
    reasons = {row.path: row.reason for row in fastgan.explain(model)}
    assert f"{function.__name__} after it stays stock" in reasons["conv1"]


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_refused(function, monkeypatch, capsys):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model = forward_of(function)().double()
    state = torch.get_rng_state(), random.getstate()
    attributes = dict(vars(model))
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert vars(model) == attributes and model.skips == []
    assert type(model).__name__ == function.__name__
    assert capsys.readouterr().out == ""
    for row in fastgan.explain(model):
        assert (not row.fused and REFUSED[function] in row.reason) or row.path == "up"
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert calls == []


class Unpacking(Layers):
    def __init__(self):
        super().__init__()
        self.splits = nn.Identity()

    def forward(self, x):
        a, b = self.splits(self.bn1(self.conv1(x)).relu())
        return a * b


class Splits(nn.Module):
    """Gives what two can be unpacked from, in one way or another."""

    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, x):
        return self.give(x)


@pytest.mark.parametrize(
    "give",
    [
        lambda x: x[:2],
        lambda x: x,
        lambda x: (x, x + 1),
        lambda x: (x, x, x),
        lambda x: [x],
        lambda x: map(torch.abs, (x, -x)),
        lambda x: x.chunk(2),
        lambda x: 3,
    ],
    ids=["rows", "more rows", "tuple", "three", "one", "iterator", "chunks", "number"],
)
def test_unpacking(give, monkeypatch):
    stock, model = make_pair(Unpacking)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    x, found = torch.randn(4, 3, 8, 8, dtype=torch.float64), []
    for network in (model, stock):
        network.splits = Splits(give)
        try:
            found.append(network(x))
        except (TypeError, ValueError) as error:
            found.append(type(error))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12) if torch.is_tensor(found[1]) else None
    assert torch.is_tensor(found[1]) or found[0] is found[1]
    assert calls


def test_any_number_of_arguments_runs_stock(monkeypatch):
    calls = count_operator_calls(monkeypatch)
    stock, model = make_pair(forward_of(any_number))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(fastgan.fuse(model)(x), stock(x)) and calls == []
    assert "takes any number of arguments" in fastgan.explain(model)[0].reason


class Options(Layers):
    """Arguments of many kinds decide what it does."""

    def forward(self, x, y=None, *, scale: float = 1.0, flip=False, also=()):
        x = F.relu(self.bn1(self.conv1(x)))
        if y is not None:
            x = x + self.conv1(y)
        if flip:
            x = x.flip(2)
        return self.conv2(x) * scale + len(also)


@pytest.mark.parametrize("compiled", [False, True])
def test_arguments(compiled, monkeypatch):
    stock, model = make_pair(Options)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x, y = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    for args, kwargs in (
        ((x,), {}),
        ((x, y), {}),
        ((x, None), dict(flip=True)),
        ((x,), dict(y=y, scale=0.5)),
        ((x,), dict(scale=0.25, flip=True)),
        ((), dict(x=x)),
        ((x,), dict(also=(1, 2))),
    ):
        del calls[:]
        assert_close(run(*args, **kwargs), stock(*args, **kwargs))
        assert calls, (args, kwargs)
    with pytest.raises(TypeError):
        model()
    with pytest.raises(TypeError):
        model(x, z=1)
    with pytest.raises(TypeError):
        model(x, y, y)
    assert_close(model(x, also=[y]), stock(x, also=[y]))  # nothing to trace: a list of tensors


@pytest.mark.parametrize("compiled", [False, True])
def test_attributes_that_change(compiled, monkeypatch):
    stock, model = make_pair(forward_of(by_attribute))
    suppose_kernels(monkeypatch)
    fastgan.fuse(model)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for slope in (0.3, 0.7, 0.3, -0.5):
        stock.slope = model.slope = slope
        assert_close(run(x), stock(x))
    stock.depth = model.depth = 5  # which it does not read
    assert_close(run(x), stock(x))


def test_kinds_of_numbers(monkeypatch):
    """Those of NumPy are what `1 / np.sqrt(2)` is; of others the graph cannot tell."""
    stock, model = make_pair(Options)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert_close(model(x, scale=1 / np.sqrt(2)), stock(x, scale=1 / np.sqrt(2)))
    assert calls
    for scale in (enum.IntEnum("Scale", "ONE TWO").TWO, np.float32(0.5), float("nan"), float("-inf")):
        torch.testing.assert_close(model(x, scale=scale), stock(x, scale=scale), equal_nan=True)


def test_ever_new_constants_end_in_stock(monkeypatch):
    stock, model = make_pair(Options)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"Options.forward\(x, scale=.*run stock") as warned:
        for step in range(40):
            assert_close(model(x, scale=step / 40), stock(x, scale=step / 40))
    assert len(warned) == 1 and 2 * 25 < len(calls) < 2 * 40
    del calls[:]
    model(x, scale=0.0)
    assert calls  # known ones stay fused


def test_changes_of_layers_take_effect(monkeypatch):
    stock, model = make_pair(forward_of(functions))
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert_close(model(x), stock(x))
    handles = [network.bn1.register_forward_hook(lambda m, args, out: 2 * out) for network in (stock, model)]
    del calls[:]
    assert_close(model(x), stock(x))
    assert len(calls) == 2  # convolution alone
    assert "hooks" in fastgan.explain(model)[-3].reason
    for handle in handles:
        handle.remove()
    for network in (stock, model):
        torch.manual_seed(5)
        network.conv1 = nn.Conv2d(3, 4, 1).double()
        network.bn2 = nn.InstanceNorm2d(3).double()
        network.conv2.forward = lambda x, layer=network.conv2: 3 * nn.Conv2d.forward(layer, x)
    assert_same(model, stock)


def test_layers_below_the_children():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)) for _ in range(2))
            self.norms = nn.ModuleDict({"a:b": nn.BatchNorm2d(3)})
            self.last = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            for block in self.blocks:
                x = F.relu(block[1](block[0](x)))
            return self.norms["a:b"](self.last(x))

    stock, model = make_pair(Deep)
    fastgan.fuse(model)
    rows = {row.path: row.pattern for row in fastgan.explain(model)}
    assert rows == {
        "blocks.0.0": "Conv2d + BatchNorm2d + ReLU",
        "blocks.1.0": "Conv2d + BatchNorm2d + ReLU",
        "last": "Conv2d + BatchNorm2d",
    }
    assert_same(model, stock)
    for network in (stock, model):
        network.blocks[1] = nn.Sequential(nn.Conv2d(3, 3, 5, padding=1), nn.Identity()).double()
        nn.init.ones_(network.blocks[1][0].weight)
        nn.init.ones_(network.blocks[1][0].bias)
    assert_same(model, stock)


def test_lazy_layers(monkeypatch):
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()
            self.rest = nn.Sequential(nn.LazyConvTranspose2d(3, 4, 2, 1), nn.ReLU())

        def forward(self, x):
            return self.rest(F.relu(self.bn(self.conv(x))))

    torch.manual_seed(0)
    model = fastgan.fuse(Lazy())
    calls = count_operator_calls(monkeypatch)
    x = torch.randn(2, 3, 8, 8)
    model(x)
    assert not calls
    stock = fastgan.unfuse(copy.deepcopy(model))
    torch.testing.assert_close(model(x), stock(x))
    assert len(calls) == 2
    assert [row.fused for row in fastgan.explain(model)] == [True, True]


def test_others_trace_the_layers():
    """A fused model under somebody else's torch.fx trace shows its own layers."""
    for make in (forward_of(functions), lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())):
        stock, model = make_pair(make)
        graphs = [fx.symbolic_trace(network).graph.python_code("self").src for network in (stock, fastgan.fuse(model))]
        assert graphs[0] == graphs[1]


def test_parallel_groups_of_a_batch_run_the_layers(monkeypatch):
    """Two halves of a batch with statistics of their own, without kernels."""
    from fastgan.batch_groups import batch_groups

    for function in (functions, residual, by_attribute):
        stock, model = make_pair(forward_of(function))
        fastgan.fuse(model)
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        with batch_groups(2):
            ours = model(x)
        theirs = torch.cat([stock(part) for part in x.chunk(2)])
        assert_close(ours, theirs)
        assert_close(model.state_dict(), stock.state_dict())
