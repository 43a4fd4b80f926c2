"""fuse, unfuse and explain against the same modules run by torch, on the reference path."""

import copy
import gc
import io
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

import fastgan
from fastgan.models import Discriminator, Generator
from fastgan.ops import fused_layer
from tests.accuracy import assert_as_accurate_as_stock
from tests.pairs import assert_close, assert_same, block, count_operator_calls, make_pair, one_step, suppose_kernels
from tests.stacks import MODELS, STAYS_STOCK, InOrder, Nested, SharedActivation


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", "reference")


@pytest.mark.parametrize("name", MODELS)
def test_fused_equals_stock(name, monkeypatch):
    stock, model = make_pair(MODELS[name])
    calls = count_operator_calls(monkeypatch)
    assert fastgan.fuse(model) is model
    assert_same(model, stock)
    convolutions = sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules())
    assert len(calls) == 6 * convolutions
    assert all(row.fused for row in fastgan.explain(model))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_without_kernels_equals_stock_to_the_last_bit(name, backend, monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    stock, model = make_pair(MODELS[name])  # in float64, for which there are no products
    fastgan.fuse(model)
    for training in (True, False):
        x = torch.randn(4, 3, 8, 8).double()
        ours, theirs = one_step(model.train(training), x), one_step(stock.train(training), x)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_kernels_are_chosen_again_after_a_stock_layer(monkeypatch):
    model = fastgan.fuse(nn.Sequential(*block(), nn.Flatten(0, 1), nn.Unflatten(0, (1, -1)), nn.Conv2d(4, 2, 3)))
    asked = []
    monkeypatch.setattr(fused_layer, "has_kernels_for", lambda x: asked.append(x.shape[1]) or False)
    model(torch.randn(2, 3, 8, 8))
    assert asked == [3, 4]


@pytest.mark.parametrize("name", STAYS_STOCK)
def test_left_alone(name, monkeypatch):
    make, reason = STAYS_STOCK[name]
    stock, model = make_pair(make)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert_same(model, stock)
    assert calls == []
    (row,) = fastgan.explain(model)
    assert not row.fused and row.implementation == "stock"
    assert re.search(reason, row.reason)


def test_patterns_of_mixed_neighbours():
    expected = {
        "elu": ["Conv2d + BatchNorm2d", "Conv2d"],
        "tutorial_order": ["Conv2d + LeakyReLU + BatchNorm2d"],
        "instance_norm": ["Conv2d", "Conv2d + ReLU"],
        "batch_norm_1d": ["Conv2d"],
        "negative_slope_below_0": ["Conv2d + BatchNorm2d"],
        "leading_relu": ["Conv2d + Tanh"],
        "shared_activation": ["Conv2d + BatchNorm2d + LeakyReLU", "Conv2d + LeakyReLU"],
        "Functional": ["Conv2d + ReLU + BatchNorm2d"],
        "Residual": ["Conv2d + ReLU"],
        "spectral_norm": ["Conv2d + BatchNorm2d + ReLU"],
        "sync_batch_norm": ["Conv2d + SyncBatchNorm + ReLU"],
        "tutorial_order_tanh": ["ConvTranspose2d + Tanh + BatchNorm2d"],
        "InOrder": ["Conv2d + BatchNorm2d", "ConvTranspose2d + BatchNorm2d", "Conv2d"],
    }
    for name, patterns in expected.items():
        assert [row.pattern for row in fastgan.explain(fastgan.fuse(MODELS[name]()))] == patterns, name
    # named_modules() order, which is that of definition
    rows = fastgan.explain(fastgan.fuse(SharedActivation()))
    assert {row.path: row.pattern for row in rows} == {
        "conv1": "ConvTranspose2d + LeakyReLU + BatchNorm2d",
        "conv2": "Conv2d + Tanh",
    }


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_dcgan(network):
    width = dict(nz=3, ngf=2) if network is Generator else dict(ndf=2)
    stock, model = make_pair(lambda: network(image_size=16, **width))
    fastgan.fuse(model)
    torch.manual_seed(1)
    for training in (True, True, False):
        x = torch.randn(4, 3, *((1, 1) if network is Generator else (16, 16)), dtype=torch.float64)
        assert_close(one_step(model.train(training), x), one_step(stock.train(training), x))
        for layer, theirs in zip(model.main, stock.main, strict=True):
            assert type(layer) is type(theirs)


def test_layers_called_one_by_one_stay_stock(monkeypatch):
    stock, model = make_pair(lambda: Discriminator(image_size=16, ndf=2))
    fastgan.fuse(model)
    calls = count_operator_calls(monkeypatch)
    x = y = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for ours, theirs in zip(model.main, stock.main, strict=True):
        x, y = ours(x), theirs(y)
        assert torch.equal(x, y)
    assert calls == []
    assert torch.equal(model.main[:2](y.new_ones(2, 3, 16, 16)), stock.main[:2](y.new_ones(2, 3, 16, 16)))


def test_identities_stay():
    model = block()
    keys = list(model.state_dict())
    before = [*model.modules(), *model.parameters(), *model.buffers()]
    types = [type(module) for module in model.modules()]
    for _ in range(2):  # the second call changes nothing
        fastgan.fuse(model)
        forward = model.forward
        after = [*model.modules(), *model.parameters(), *model.buffers()]
        assert len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
        assert list(model.state_dict()) == keys
        assert [type(module) for module in model.modules()] == types
    fastgan.fuse(model)
    assert model.forward is forward
    other = block()
    other.load_state_dict(model.state_dict(), strict=True)


def test_unfuse_restores():
    for make in (block, InOrder, Nested):
        stock, model = make_pair(make)
        attributes = [set(vars(module)) for module in model.modules()]
        assert fastgan.unfuse(fastgan.fuse(model)) is model
        assert [set(vars(module)) for module in model.modules()] == attributes
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        ours, theirs = one_step(model, x), one_step(stock, x)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert not any(row.fused for row in fastgan.explain(model))
    assert fastgan.unfuse(fastgan.unfuse(model)) is model


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@pytest.mark.parametrize("make", [block, InOrder])
def test_copies_are_fused_and_independent(duplicate, make):
    stock, model = make_pair(make)
    other = duplicate(fastgan.fuse(model))
    assert all(row.fused for row in fastgan.explain(other))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert_same(other, stock)
    for key, value in model.state_dict().items():  # the original has not moved
        assert torch.equal(value, before[key])
    fastgan.unfuse(other)
    assert all(row.fused for row in fastgan.explain(model))


@pytest.mark.xfail(strict=True, reason="a replica keeps the forward that is bound to the module it was made from")
def test_data_parallel_replica_runs_its_own_layers():
    _, model = make_pair(block)
    fastgan.fuse(model)
    replica = model._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(child) for name, child in model._modules.items()}
    nn.init.zeros_(replica._modules["3"].weight)
    nn.init.ones_(replica._modules["3"].bias)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(replica(x), torch.ones(2, 2, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run(index, when):
    stock, model = make_pair(block)
    seen = {}
    if when == "after":
        fastgan.fuse(model)
    for network in (stock, model):
        network[index].register_forward_hook(lambda m, args, out, key=network: seen.setdefault(key, 3 * out))
        network[index].register_forward_hook(lambda m, args, out: 2 * out)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert_close(one_step(model, x), one_step(stock, x))
    assert_close(seen[model].detach(), seen[stock].detach())
    rows = fastgan.explain(model)
    assert "hooks" in rows[0].reason
    assert rows[0].pattern == ["Conv2d", "Conv2d", "Conv2d + BatchNorm2d"][index]
    assert rows[1].fused


def test_hook_kinds():
    for register in ("register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"):
        stock, model = make_pair(block)
        fastgan.fuse(model)
        seen = []
        for network in (stock, model):
            network[2].inplace = False  # torch forbids the views of backward hooks there
            getattr(network[1], register)(lambda *args, seen=seen: seen.append(len(args)))
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        assert_close(one_step(model, x), one_step(stock, x))
        assert len(seen) == 2 and len(set(seen)) == 1


def test_hook_removed_again(monkeypatch):
    stock, model = make_pair(block)
    fastgan.fuse(model)
    handle = model[1].register_forward_hook(lambda m, args, out: out * 0)
    assert fastgan.explain(model)[0].pattern == "Conv2d"
    handle.remove()
    assert fastgan.explain(model)[0].pattern == "Conv2d + BatchNorm2d + ReLU"
    assert_same(model, stock)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_replaced_forward_of_a_layer_runs(index):
    stock, model = make_pair(block)
    fastgan.fuse(model)
    for network in (stock, model):
        layer = network[index]
        layer.forward = lambda x, layer=layer: 2 * type(layer).forward(layer, x)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert_close(one_step(model, x), one_step(stock, x))


def test_layers_replaced_after_fuse():
    stock, model = make_pair(block)
    fastgan.fuse(model)
    for network in (stock, model):
        torch.manual_seed(3)
        network[0] = nn.Conv2d(3, 4, 5).double()
        network[2] = nn.Sigmoid()
        network.append(nn.Tanh())
    assert_same(model, stock)
    assert [row.pattern for row in fastgan.explain(model)] == ["Conv2d + BatchNorm2d + Sigmoid", "Conv2d + Tanh"]


class Block(nn.Module):
    """Somebody's own, with a parameter, and a child that is left out."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_module("skip", None)

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("last", [Block(), None])
def test_children_that_are_none(last):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2))
    layers.register_module("2", last)
    model, x = fastgan.fuse(copy.deepcopy(layers)), torch.randn(2, 3, 8, 8)
    assert fastgan.explain(model)[0].fused
    if last is None:
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            model(x)
    else:
        torch.testing.assert_close(model(x), layers(x))


def test_a_layer_that_became_none():
    stock, model = make_pair(block)
    fastgan.fuse(model)
    errors = []
    for network in (stock, model):
        network[1] = None
        with pytest.raises(TypeError) as raised:
            network(torch.randn(2, 3, 8, 8, dtype=torch.float64))
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    for network in (stock, model):
        network[1] = nn.BatchNorm2d(network[0].out_channels).double()
    assert_same(model, stock)


def test_keyword_input():
    stock, model = make_pair(InOrder)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(fastgan.fuse(model)(x=x), stock(x=x))


def test_float32_and_autocast():
    stock, model = make_pair(block)
    stock.float(), fastgan.fuse(model).float()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), stock(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(x), stock(x)
    assert ours.dtype is theirs.dtype is torch.bfloat16
    assert_as_accurate_as_stock("autocast", ours, theirs, stock.double()(x.double()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("runs", ["layers", "operators"])
def test_compiled_generator(training, runs, monkeypatch):
    if runs == "operators":
        suppose_kernels(monkeypatch)
    stock, model = make_pair(lambda: Generator(image_size=8, nz=3, ngf=2, nc=1))
    fastgan.fuse(model).train(training)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn(4, 3, dtype=torch.float64)
        theirs = one_step(stock.train(training), x)
        assert_close(one_step(eager, x), theirs)
        assert_close(one_step(compiled, x)[0], theirs[0])
    assert_close({k: p.grad for k, p in model.named_parameters()}, {k: p.grad for k, p in stock.named_parameters()})
    assert_close(dict(model.state_dict()), dict(stock.state_dict()))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_with_another_momentum(dynamic, monkeypatch):
    """From the second one on, Dynamo takes it for a number that it does not know."""
    suppose_kernels(monkeypatch)
    stock, model = make_pair(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()))
    compiled = torch.compile(fastgan.fuse(model), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    for momentum in (0.1, 0.2, 0.3):
        stock[1].momentum = model[1].momentum = momentum
        assert_close(compiled(x), stock(x))
    assert_close(dict(model.state_dict()), dict(stock.state_dict()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.parametrize("function", [fastgan.fuse, fastgan.unfuse, fastgan.explain])
def test_type_errors(function):
    for wrong in (None, "model", nn.Conv2d, torch.zeros(3)):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module; got"):
            function(wrong)
    with pytest.raises(TypeError, match="model must not be a scripted module"):
        function(torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 4, 4)))


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed(list(self._modules.values()))


class Twice(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_sequential_that_is_none():
    """Stock asks the class at each call, and the container for what to go through."""
    layers = [nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()]
    stock, model = make_pair(lambda: Backwards(*layers))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert_close(fastgan.fuse(model)(x), stock(x))
    stock, model = make_pair(lambda: nn.Sequential(*layers))
    fastgan.fuse(model)(x)
    stock.__class__ = model.__class__ = Twice
    assert_close(model(x), stock(x))


class NoNoise(nn.Module):
    def forward(self, x):
        return x


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


BETWEEN = [nn.Identity(), nn.Dropout(0.5).eval(), nn.Flatten(2), NoNoise(), nn.Sequential(NoNoise(), nn.Flatten(2))]


@pytest.mark.parametrize("between", BETWEEN, ids=str)
def test_leaky_relu_whose_result_is_changed_as_a_view(between):
    """Our backward reads the result; what comes of it as a new tensor may be changed."""
    layers = [nn.Conv2d(3, 3, 3), nn.LeakyReLU(0.2), between]
    (row,) = fastgan.explain(fastgan.fuse(nn.Sequential(*layers, nn.ReLU(inplace=True))))
    assert row.pattern == "Conv2d" and "changes its result in place" in row.reason
    (row,) = fastgan.explain(fastgan.fuse(nn.Sequential(*layers, nn.Sequential(nn.ReLU(inplace=True), nn.Tanh()))))
    assert row.pattern == "Conv2d"
    (row,) = fastgan.explain(fastgan.fuse(nn.Sequential(*layers, Residual(nn.ReLU(inplace=True), nn.PReLU()))))
    assert row.pattern == "Conv2d"
    (row,) = fastgan.explain(fastgan.fuse(nn.Sequential(*layers, Residual(nn.PReLU(), nn.ReLU(inplace=True)))))
    assert row.pattern == "Conv2d + LeakyReLU"
    (row,) = fastgan.explain(fastgan.fuse(nn.Sequential(*layers, nn.Softplus(), nn.ReLU(inplace=True))))
    assert row.pattern == "Conv2d + LeakyReLU"


def test_a_model_that_its_layers_reach_is_freed():
    """Through a hook, here: features that are kept."""
    alive = []
    for _ in range(2):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 1, 3))
        model[2][0].register_forward_hook(lambda *_, model=model: None)
        fastgan.fuse(model)(torch.randn(2, 3, 8, 8))
        alive.append(weakref.ref(model))
        del model
    gc.collect()
    assert [each() for each in alive] == [None, None]


def test_a_patched_sequential(monkeypatch):
    stock, model = make_pair(block)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    fastgan.fuse(model)(x)
    forward = nn.Sequential.forward
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, input: 2 * forward(self, input))
    for network in (model, fastgan.fuse(copy.deepcopy(stock))):
        assert_close(network(x), stock(x))
