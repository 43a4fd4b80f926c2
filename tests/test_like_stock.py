"""What works with stock layers works with fused ones: layers that change later, odd input, hooks, torch's own tools."""

import _thread
import collections
import copy
import inspect
import io
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules

import fastgan
from fastgan.batch_groups import batch_groups, current_batch_groups
from fastgan.first_order import first_order, only_first_order

pytestmark = pytest.mark.usefixtures("each_backend")


class InCode(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.nn.functional.leaky_relu(self.norm(self.conv(x)), 0.2)


def in_a_row():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 2, 3))


def make_pair(make, device):
    torch.manual_seed(0)
    stock = make().to(device)
    return stock, fastgan.fuse(copy.deepcopy(stock))


def assert_same(stock, model, x, **options):
    """The same results and input gradients, which lie in memory alike."""
    found = []
    for network in (stock, model):
        each = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = network(each)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
        found.append((y, torch.autograd.grad(y, each, weights)[0]))
    (theirs, _), (ours, _) = found
    assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
    torch.testing.assert_close(*found[::-1], **(options or dict(rtol=1e-3, atol=1e-4)))


CHANGES = {
    "padding_mode": dict(padding_mode="circular"),
    "dilation": dict(dilation=(2, 2), padding=(2, 2)),
    "padding": dict(padding="same"),
    "no padding": dict(padding="valid"),
    "no pairs": dict(stride=2, padding=1),
    "back": dict(padding_mode="zeros", dilation=(1, 1), padding=(1, 1)),
}


@pytest.mark.parametrize("make", [in_a_row, InCode])
def test_settings_of_a_convolution_that_change(make, device):
    stock, model = make_pair(make, device)
    x = torch.randn(2, 3, 10, 10, device=device)
    assert_same(stock, model, x)
    for settings in CHANGES.values():
        for network in (stock, model):
            for name, value in settings.items():
                setattr(next(network.children()), name, value)
        assert_same(stock, model, x)
    padding_modes = fastgan.explain(fastgan.fuse(nn.Sequential(nn.Conv2d(3, 4, 3, padding_mode="circular"))))
    assert padding_modes[0].reason == "padding_mode='circular'"


def test_settings_that_change_within_first_order(device):
    stock, model = make_pair(in_a_row, device)
    x = torch.randn(2, 3, 6, 6, device=device)
    with first_order():
        assert_same(stock, model, x)
        for network in (stock, model):
            network[3].dilation = (2, 2)
        assert_same(stock, model, x)


@pytest.mark.parametrize("change", [dict(dilation=(2, 2)), dict(padding_mode="circular")], ids=str)
def test_settings_that_change_in_half_precision(change, monkeypatch):
    """On a CPU, by products."""
    monkeypatch.setenv("FASTGAN_BACKEND", "auto")
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(16, 32, 4, 2, 1, bias=False), nn.ReLU()).bfloat16()
    stock = stock.to(memory_format=torch.channels_last)
    model = fastgan.fuse(copy.deepcopy(stock))
    x = torch.randn(4, 16, 12, 12).bfloat16().to(memory_format=torch.channels_last)
    for _ in range(2):
        assert torch.equal(model(x), stock(x))
        for network in (stock, model):
            vars(network[0]).update(change)


def test_products_refuse_what_stock_does():
    """Mixed dtypes, which autocast casts only where none of them is float64."""
    float32, float64, half = torch.float32, torch.float64, torch.bfloat16
    for weight, x, autocast in ((float64, float32, True), (float32, float64, True), (float32, half, False)):
        layer = nn.Conv2d(16, 32, 4, 2, 1, bias=False).to(weight, memory_format=torch.channels_last)
        model = fastgan.fuse(nn.Sequential(layer, nn.LeakyReLU(0.2)))
        x = torch.randn(4, 16, 8, 8).to(x).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", half, enabled=autocast), pytest.raises((RuntimeError, TypeError)):
            model(x)


@pytest.mark.parametrize(
    "odd",
    [
        dict(momentum=np.float32(0.1)),
        dict(eps=np.float32(1e-4)),
        dict(eps=torch.tensor(1e-4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_odd_numbers_of_batch_norm(odd, when, device):
    torch.manual_seed(0)
    stock = in_a_row().to(device)
    model = copy.deepcopy(stock)
    for network in (stock, model):
        if when == "after":
            fastgan.fuse(model)
            model.eval()(torch.randn(2, 3, 6, 6, device=device))
        vars(network[1]).update(odd)
    fastgan.fuse(model).train()
    assert_same(stock, model, torch.randn(2, 3, 6, 6, device=device))
    torch.testing.assert_close(dict(model.state_dict()), dict(stock.state_dict()))


def test_negative_slope_that_changes(device):
    stock, model = make_pair(in_a_row, device)
    x = torch.randn(2, 3, 6, 6, device=device)
    for slope in (0.2, -0.5, np.float32(0.3), 0.1):
        stock[2].negative_slope = model[2].negative_slope = slope
        assert_same(stock, model, x)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.ConvTranspose2d(3, 4, 3)])
def test_input_without_a_batch(make, device):
    stock, model = make_pair(lambda: nn.Sequential(make(), nn.ReLU()), device)
    assert_same(stock, model, torch.randn(3, 6, 6, device=device), rtol=0, atol=0)


# A result of one channel, or of one position, and a stock layer after it.
AMBIGUOUS = {
    "one channel": lambda: nn.Sequential(nn.Conv2d(3, 1, 3), nn.Tanh(), nn.Conv2d(1, 4, 3, dilation=2)),
    "one position": lambda: nn.Sequential(nn.Conv2d(3, 4, 9), nn.ReLU(), nn.Upsample(scale_factor=4)),
}


@pytest.mark.parametrize("how", ["fuse", "backend"])
@pytest.mark.parametrize("name", AMBIGUOUS)
def test_layout_where_sizes_are_one(name, how, device):
    stock, model = make_pair(AMBIGUOUS[name], device)
    if how == "backend":
        from fastgan.compile_backend import rewrite

        def backend_without_inductor(graph_module, example_inputs):
            rewrite(graph_module)
            return graph_module.forward

        torch._dynamo.reset()
        model = torch.compile(fastgan.unfuse(model), backend=backend_without_inductor)
    assert_same(stock, model, torch.randn(2, 3, 9, 9, device=device))


def test_autocast_leaves_float64_alone(device):
    layers = (
        lambda: nn.Conv2d(3, 16, 3, bias=False),
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
    )
    for make in layers:
        stock, model = make_pair(lambda make=make: nn.Sequential(make(), nn.ReLU()).double(), device)
        with torch.autocast(device.type, torch.float16):
            assert_same(stock, model, torch.randn(2, 3, 6, 6, device=device, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("make", [in_a_row, InCode])
def test_weights_that_are_no_parameters(make, device):
    torch.manual_seed(0)
    stock = make().to(device)
    conv = next(stock.children())
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    del conv.weight, conv.bias
    conv.weight, conv.bias = weight, bias
    model = fastgan.fuse(copy.deepcopy(stock))
    assert_same(stock, model, torch.randn(2, 3, 6, 6, device=device))
    assert fastgan.explain(model)[0].reason == "its weight is no parameter"


@pytest.mark.parametrize("make", [in_a_row, InCode])
@pytest.mark.parametrize(
    "register",
    [
        modules.register_module_forward_hook,
        modules.register_module_forward_pre_hook,
        modules.register_module_full_backward_hook,
        modules.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_on_all_modules(register, make, device):
    stock, model = make_pair(make, device)
    x = torch.randn(2, 3, 6, 6, device=device)
    assert_same(stock, model, x)
    seen = {stock: [], model: []}
    for network, names in seen.items():
        handle = register(lambda module, *_, names=names: names.append(type(module).__name__))
        try:
            network(x).sum().backward()
        finally:
            handle.remove()
    assert seen[model] == seen[stock] and "Conv2d" in seen[stock]


def test_dictionary_of_hooks_that_is_replaced(device):
    model = fastgan.fuse(in_a_row()).to(device)
    x = torch.randn(2, 3, 6, 6, device=device)
    model(x)
    model[0]._forward_hooks = collections.OrderedDict()
    model(x)
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen == [1]


@pytest.mark.parametrize(
    "x", [None, (torch.zeros(2, 3, 6, 6),), np.zeros((2, 3, 6, 6)), 1.0], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("make", [in_a_row, InCode])
def test_what_is_no_tensor(make, x, device):
    messages = []
    for network in make_pair(make, device):
        with pytest.raises(TypeError) as error:
            network(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_what_a_first_layer_makes_a_tensor(device):
    class First(nn.Module):
        def forward(self, pair):
            return pair[0]

    stock, model = make_pair(lambda: nn.Sequential(First(), *in_a_row()), device)
    x = torch.randn(2, 3, 6, 6, device=device)
    torch.testing.assert_close(model((x, None)), stock((x, None)), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_children(device):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())), file)
    file.seek(0)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.load(file), torch.jit.script(nn.ReLU()), nn.Conv2d(4, 4, 1))
    stock = stock.to(device)
    x = torch.randn(2, 3, 6, 6, device=device)
    stock(x)
    model = fastgan.fuse(copy.deepcopy(stock))
    assert_same(stock, model, x)
    assert [row.fused for row in fastgan.explain(model)] == [True, True]


def test_linearize(device):
    for make in (in_a_row, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Sigmoid())):
        stock, model = (network.eval() for network in make_pair(make, device))
        x = torch.randn(2, 3, 6, 6, device=device)
        found = [torch.func.linearize(network, x)[1](torch.ones_like(x)) for network in (stock, model)]
        torch.testing.assert_close(*found)
    weight = torch.randn(4, 3, 3, 3, device=device)
    for activation in ("relu", "tanh", "sigmoid"):

        def formula(x, activation=activation):
            return fastgan.functional.conv2d_bn_act(x, weight, activation=activation)

        tangent = torch.func.linearize(formula, x)[1](torch.ones_like(x))
        torch.testing.assert_close(tangent, torch.func.jvp(formula, (x,), (torch.ones_like(x),))[1])


def test_arguments_of_a_chain():
    stock, model = make_pair(in_a_row, "cpu")
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)
    for call in (lambda m: m(), lambda m: m(x=torch.zeros(1, 3, 4, 4))):
        for network in (stock, model):
            with pytest.raises(TypeError):
                call(network)


def test_meta_tensors_under_autocast():
    x, weight = (torch.empty(shape, device="meta") for shape in ((2, 3, 9, 9), (4, 3, 3, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        y = fastgan.functional.conv2d_bn_act(x, weight, activation="relu")
    assert y.shape == (2, 4, 7, 7) and y.is_meta


def test_scopes_are_of_a_thread(device):
    stock, model = make_pair(in_a_row, device)
    x = torch.randn(4, 3, 6, 6, device=device)
    found = []

    def elsewhere():
        found.extend([current_batch_groups(), only_first_order(), model(x)])

    with batch_groups(2), first_order():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert (current_batch_groups(), only_first_order()) == (2, True)
    assert found[:2] == [1, False]
    torch.testing.assert_close(found[2], stock(x), rtol=1e-3, atol=1e-4)


def test_scopes_that_overlap_leave_nothing():
    entered, left = threading.Event(), threading.Event()

    def first():
        with batch_groups(2), first_order():
            entered.wait()

    def second():
        with batch_groups(3), first_order():
            entered.set()
            left.wait()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    threads[0].join()
    left.set()
    threads[1].join()
    assert (current_batch_groups(), only_first_order()) == (1, False)


def test_compiled_code_knows_of_a_scope():
    compiled = torch.compile(lambda x: x * current_batch_groups() + only_first_order(), backend="eager", fullgraph=True)
    x = torch.ones(2)
    for groups in (1, 2, 3, 2):
        with batch_groups(groups), first_order():
            assert compiled(x).tolist() == [groups + 1] * 2
        assert compiled(x).tolist() == [1, 1]


def _start_as_autograd(function):
    """In a thread that Python's threading knows nothing of, as those of autograd are for a GPU."""
    _thread.start_new_thread(function, ())


def _start_as_somebody(function):
    threading.Thread(target=function).start()


@pytest.mark.parametrize(("start", "expected"), [(_start_as_autograd, True), (_start_as_somebody, False)])
def test_what_backward_runs_again_is_of_first_order(start, expected):
    """Autograd's thread for a GPU is in no scope, and runs a part of what is; a thread of somebody's does not."""
    seen, done = [], threading.Event()

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            threading.current_thread()  # which makes one of Python's out of what is none
            seen.append(only_first_order())
            return grad

    x = torch.ones(2, requires_grad=True)

    def learn():
        Asks.apply(x).sum().backward()
        done.set()

    with first_order():
        start(learn)
        assert done.wait(60)
    Asks.apply(x).sum().backward()
    assert seen == [expected, False]
