"""What fused layers compute convolutions by on a CPU: matrix products, against stock convolutions."""

import copy

import pytest
import torch
from torch import nn

import fastgan
from fastgan.cpu import capabilities, choice
from fastgan.cpu import convolution as cpu_convolution
from fastgan.cpu.choice import Products
from fastgan.cpu.convolution import Convolution, convolve
from fastgan.cpu.products import to_high, to_low, weight_grad_of_all_taps
from tests.accuracy import assert_as_accurate_as_stock
from tests.cpu.layers import (
    DTYPES,
    LAYOUTS,
    OF_STOCK,
    OURS,
    assert_that_an_activation_in_place_may_follow,
    is_stock,
    layouts,
    products_in_less_than_float32,
    run,
)

# name → (layer, shape of its input, name of what autograd remembers of the formula)
LAYERS = {
    "from one position": (lambda: nn.ConvTranspose2d(7, 5, (4, 3), stride=2, bias=False), (6, 7, 1, 1), None),
    "to one position": (lambda: nn.Conv2d(9, 3, (4, 3), bias=False), (6, 9, 4, 3), "UnsqueezeBackward0"),
    "weight gradient": (lambda: nn.Conv2d(16, 24, 4, 2, 1, bias=False), (3, 16, 9, 10), OURS),
    "transposed weight gradient": (
        lambda: nn.ConvTranspose2d(24, 16, (5, 4), 2, (2, 1), output_padding=(1, 0), bias=False),
        (3, 24, 5, 4),
        OURS,
    ),
    "of an image": (lambda: nn.Conv2d(1, 6, 4, 2, 1, bias=False), (3, 1, 8, 10), OURS),
    "to an image": (
        lambda: nn.ConvTranspose2d(6, 1, (5, 4), 2, (2, 1), output_padding=(1, 0), bias=False),
        (3, 6, 5, 4),
        OURS,
    ),
    "to an image without padding": (lambda: nn.ConvTranspose2d(6, 1, 2, 2, bias=False), (3, 6, 5, 4), OURS),
    "to an image lower than the kernel": (
        lambda: nn.ConvTranspose2d(6, 1, (9, 3), 1, (4, 1), bias=False),
        (3, 6, 2, 5),
        OURS,
    ),
    "of a coloured image": (lambda: nn.Conv2d(3, 6, (4, 3), (3, 1), 1, bias=False), (3, 3, 9, 10), OURS),
    "to a coloured image": (
        lambda: nn.ConvTranspose2d(6, 3, (6, 5), (4, 2), (1, 2), output_padding=(0, 1), bias=False),
        (3, 6, 5, 4),
        OURS,
    ),
}
BY_CONVOLUTION = [name for name in LAYERS if LAYERS[name][2] == OURS]


def make(name, layout="channels_last"):
    torch.manual_seed(0)
    layer, shape, _ = LAYERS[name]
    return layer().to(memory_format=LAYOUTS[layout]), torch.randn(shape).to(memory_format=LAYOUTS[layout])


def is_ours(name, y, layout="channels_last"):
    """Whether y came about by the formula of the layer so named."""
    expected = LAYERS[name][2] or {"contiguous": "ViewBackward0", "channels_last": "PermuteBackward0"}[layout]
    return y.grad_fn.name() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_accurate_as_stock(name, layout, dtype, poisoned):
    layer, x = make(name, layout)
    low, exact = layer.to(DTYPES[dtype]), copy.deepcopy(layer).double()
    x = x.to(DTYPES[dtype])
    dout = torch.randn_like(low(x))
    ours = run(low, x, dout, lambda x: convolve(x, low, low.forward))
    if "weight gradient" in name:
        of_stock = dtype == "float32" or layout == "contiguous"
    else:
        of_stock = dtype == "bfloat16" and "coloured" in name
    assert ours[0].grad_fn.name() == OF_STOCK if of_stock else is_ours(name, ours[0], layout)
    stock = run(low, x, dout, low)
    reference = run(exact, x.double(), dout.double(), exact)
    for what, *results in zip(("y", "dx", "dweight"), ours, stock, reference, strict=True):
        assert results[0].dtype == DTYPES[dtype] and layouts(results[0]) == layouts(results[1])
        assert_as_accurate_as_stock(f"{name}: {what}", *results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_way_of_float32", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_a_bias(name, layout, by_way_of_float32, dtype, poisoned, monkeypatch):
    monkeypatch.setattr(cpu_convolution, "gains_in_float32", lambda dtype, trains: by_way_of_float32)
    layer, x = make(name, layout)
    layer.bias = nn.Parameter(torch.randn(layer.out_channels))
    layer, exact, x = layer.to(DTYPES[dtype]), copy.deepcopy(layer).double(), x.to(DTYPES[dtype])
    dout = torch.randn_like(layer(x))
    ours = run(layer, x, dout, lambda x: convolve(x, layer, layer.forward))
    stock, reference = run(layer, x, dout, layer), run(exact, x.double(), dout.double(), exact)
    for what, *results in zip(("y", "dx", "dweight", "dbias"), ours, stock, reference, strict=True):
        assert results[0].dtype == DTYPES[dtype] and layouts(results[0]) == layouts(results[1])
        assert_as_accurate_as_stock(f"{name}: {what}", *results)


ENDS = {
    "alone": lambda: [nn.Conv2d(64, 7, 4)],
    "activated": lambda: [nn.Conv2d(64, 7, 4), nn.ReLU()],
    "leaky": lambda: [nn.Conv2d(64, 7, 4), nn.LeakyReLU(0.2)],
    "in a row": lambda: [nn.Conv2d(64, 7, 4), nn.ReLU(), nn.Conv2d(7, 5, 1)],
    "pooled": lambda: [nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 7, 1), nn.ReLU()],
}


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ENDS)
def test_strides_of_one_position(name, layout, x_layout):
    """The layers that follow tell their layout from them."""
    torch.manual_seed(0)
    stock = nn.Sequential(*ENDS[name](), nn.Upsample(scale_factor=2)).to(memory_format=LAYOUTS[layout])
    x = torch.randn(5, 64, 4, 4).to(memory_format=LAYOUTS[x_layout])
    y, expected = fastgan.fuse(copy.deepcopy(stock))(x), stock(x)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_activation_in_place_may_follow(name, layout):
    assert_that_an_activation_in_place_may_follow(*make(name, layout))


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_takes_them_for_float32_layers(name):
    layer, x = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        y = convolve(x.requires_grad_(), layer, layer.forward)
        assert torch.is_autocast_enabled("cpu")
        stock = layer(x)
    assert is_ours(name, y) != ("coloured" in name)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, stock, rtol=0.016, atol=0.01)
    if "coloured" not in name:
        half = copy.deepcopy(layer).bfloat16()
        assert torch.equal(y, convolve(x.bfloat16(), half, half.forward)), "added up in less than float32"
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [*LAYERS, "ordinary"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_by_way_of_float32(name, layout, dtype, autocast, poisoned, monkeypatch):
    monkeypatch.setattr(cpu_convolution, "gains_in_float32", lambda dtype, trains: True)
    monkeypatch.setitem(LAYERS, "ordinary", (lambda: nn.Conv2d(6, 5, 3, 2, 1, bias=False), (3, 6, 9, 10), None))
    layer, x = make(name, layout)
    if not autocast:
        layer, x = layer.to(HALVES[dtype]), x.to(HALVES[dtype])
    exact = copy.deepcopy(layer).double()
    dout = torch.randn_like(layer(x)).to(HALVES[dtype])
    with torch.autocast("cpu", HALVES[dtype], enabled=autocast):
        ours = run(layer, x, dout, lambda x: convolve(x, layer, None))  # which has none to leave it to
        stock = run(layer, x, dout, layer)
    reference = run(exact, x.double(), dout.double(), exact)
    assert ours[0].grad_fn.name() == "ToCopyBackward0"
    for what, *results in zip(("y", "dx", "dweight"), ours, stock, reference, strict=True):
        assert results[0].dtype == results[1].dtype and layouts(results[0]) == layouts(results[1])
        assert_as_accurate_as_stock(f"{name}: {what}", *results)


@pytest.mark.parametrize("in_float32", [False, True])
@pytest.mark.parametrize("name", [*LAYERS, "ordinary"])
def test_an_update_between_forward_and_backward_under_autocast(name, in_float32, monkeypatch):
    """Whose copies of weights it does not reach."""
    monkeypatch.setattr(cpu_convolution, "gains_in_float32", lambda dtype, trains: in_float32)
    monkeypatch.setitem(LAYERS, "ordinary", (lambda: nn.Conv2d(6, 5, 3, 2, 1, bias=False), (3, 6, 9, 10), None))
    layer, x = make(name)
    x.requires_grad_()
    gradients = []
    for change in (0.0, 1.0):
        with torch.autocast("cpu", torch.bfloat16):
            y = convolve(x, layer, layer.forward)
        with torch.no_grad():
            layer.weight += change
        gradients.append(torch.autograd.grad(y.float().square().sum(), (x, layer.weight)))
    assert all(map(torch.equal, *gradients))


def test_half_precision_stays_stock_where_that_is_no_gain(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_convolution, "gains_in_float32", lambda *question: asked.append(question) or True)
    layer, x = nn.Conv2d(6, 5, 3, 2, 1, bias=False).bfloat16(), torch.randn(3, 6, 9, 10).bfloat16()

    assert not is_stock(layer, x)
    with torch.no_grad():
        assert not is_stock(layer, x)
    assert not is_stock(layer.requires_grad_(False), x)
    assert not is_stock(layer, x.requires_grad_())
    assert asked == [(torch.bfloat16, trains) for trains in (True, False, False, True)]
    assert is_stock(layer, x.float())  # which stock refuses
    with products_in_less_than_float32():
        assert is_stock(layer, x)
    monkeypatch.setattr(cpu_convolution, "gains_in_float32", lambda dtype, trains: False)
    assert is_stock(layer, x)


# What torch.cpu.get_capabilities says → kind, whether bfloat16 and float16 gain by float32, (training, not) each.
AVX512 = {"architecture": "x86_64", "cpu_name": "Intel Xeon"} | dict.fromkeys(
    ("avx512_f", "avx512_bf16", "avx512_fp16"), True
)
EPYC = {**AVX512, "cpu_name": "AMD EPYC", "avx512_fp16": False}
OLD = "x86 without AVX-512"
CPUS = {
    "AVX2": ({"architecture": "x86_64", "cpu_name": "Intel Core i7"}, OLD, (True, True), (True, True)),
    "AVX-512 of an EPYC": (EPYC, "AMD", (False, False), (True, True)),
    "AVX-512 of a Xeon": (AVX512, "Intel", (True, False), (True, False)),
    "AVX-512 of another": ({**AVX512, "cpu_name": "CPU"}, "other", (False, False), (False, False)),
    "AMX": ({**AVX512, "amx_bf16": True, "amx_fp16": False}, "Intel", (False, False), (True, False)),
    "AMX with float16": ({**AVX512, "amx_bf16": True, "amx_fp16": True}, "Intel", (False, False), (False, False)),
    "ARM": ({"architecture": "aarch64"}, "other", (False, False), (False, False)),
}


@pytest.mark.parametrize("name", CPUS)
def test_which_cpus_gain_in_float32(name, monkeypatch):
    cpu, kind, *expected = CPUS[name]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(capabilities, "cpu_kind", capabilities.cpu_kind.__wrapped__)  # without its cache
    assert capabilities.cpu_kind() == kind and capabilities.lacks_avx512() == (name == "AVX2")
    gains_in_float32 = capabilities.gains_in_float32.__wrapped__
    for dtype, gains in zip(HALVES.values(), expected, strict=True):
        assert tuple(gains_in_float32(dtype, trains) for trains in (True, False)) == gains
    assert not gains_in_float32(torch.float32, True) and not gains_in_float32(torch.float64, True)


def where_and_how(layer):
    """The last arguments of `Convolution`, and the products for everything that has some for sides such as these."""
    output_padding = layer.output_padding if layer.transposed else (0, 0)
    fits = min(layer.in_channels, layer.out_channels) <= 3
    products = Products(to_high if fits else None, to_low, weight_grad_of_all_taps)
    return products, layer.transposed, layer.stride, layer.padding, output_padding


@pytest.mark.parametrize("name", BY_CONVOLUTION)
def test_gradients_by_products(name):
    layer, x = make(name)
    layer, x = layer.double(), x.double().requires_grad_()
    dout = torch.randn_like(layer(x))
    stock = torch.autograd.grad(layer(x), (x, layer.weight), dout)
    ours = torch.autograd.grad(Convolution.apply(x, layer.weight, *where_and_how(layer)), (x, layer.weight), dout)
    for actual, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", BY_CONVOLUTION)
def test_only_what_is_asked_for_is_computed(name):
    layer, x = make(name)
    x.requires_grad_()
    calls = []
    forward, back = ("to_high", "to_low") if layer.transposed else ("to_low", "to_high")
    noted = {part: lambda *args, part=part: calls.append(part) for part in Products._fields if part != forward}
    y = Convolution.apply(x, layer.weight, Products(**noted), *where_and_how(layer)[1:])
    for asked, expected in ((x, back), (layer.weight, "weight_grad")):
        calls.clear()
        torch.autograd.grad(y.sum(), asked, retain_graph=True)
        assert calls == [expected]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("high_channels", [1, 2])
def test_gradients_of_gradients(transposed, high_channels):
    x, weight = (torch.randn(size, dtype=torch.double) for size in ((1, 2, 4, 4), (2, 2, 3, 3)))
    x, weight = (x if transposed else x[:, :high_channels]), weight[:, :high_channels]
    operands = x.clone().requires_grad_(), weight.clone().requires_grad_()
    products = Products(to_high, to_low, weight_grad_of_all_taps)
    where = (transposed, (2, 2), (1, 1), (1, 1) if transposed else (0, 0))
    torch.autograd.gradcheck(lambda *args: Convolution.apply(*args, products, *where), operands)
    torch.autograd.gradgradcheck(lambda *args: Convolution.apply(*args, products, *where), operands)


def test_what_stays_stock(monkeypatch):
    layer, x = make("from one position")
    x, layer = x.bfloat16(), layer.bfloat16()
    assert not is_stock(layer, x)
    assert is_stock(layer, x[:0])  # nothing to multiply
    assert is_stock(layer, x[:, 1:])  # which then refuses it
    assert is_stock(layer, x.float())  # and this
    assert is_stock(layer.double(), x.double())
    biased = nn.ConvTranspose2d(7, 5, 4).bfloat16()
    assert not is_stock(biased, x)
    biased.bias = nn.Parameter(torch.randn(1).bfloat16())
    assert is_stock(biased, x)  # which refuses it
    biased.bias = nn.Parameter(torch.randn(5))
    assert is_stock(biased, x)  # and this
    torch.nn.utils.parametrize.register_parametrization(biased, "bias", nn.Identity())
    assert is_stock(biased, x)
    assert is_stock(nn.ConvTranspose2d(7, 5, 4, padding=1, bias=False).bfloat16(), x)
    computed = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(7, 5, 4, bias=False)).bfloat16()
    assert is_stock(computed, x)
    narrow = nn.Conv2d(3, 24, 4, 2, 1, bias=False).bfloat16().to(memory_format=torch.channels_last)
    images = torch.randn(3, 3, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    assert is_stock(narrow, images)
    layer, x = make("weight gradient")
    x, layer = x.bfloat16(), layer.bfloat16()
    assert not is_stock(layer, x)
    with torch.no_grad():
        assert is_stock(layer, x)  # its forward is stock's anyway
    many = torch.cat([x] * 4)
    assert is_stock(layer, many)  # 240 positions for 24 channels
    monkeypatch.setattr(choice, "_POSITIONS_A_CHANNEL", 10)
    assert not is_stock(layer, many)
    layer, x = make("to an image")
    assert not is_stock(layer, x)
    monkeypatch.setattr(choice, "_LEAST_LOW", x.numel() + 1)
    assert is_stock(layer, x)
    layer, x = make("of an image")
    assert is_stock(layer, x)  # an image's gradient that nobody wants
    x.requires_grad_()
    low_numbers = x.numel() // 4 * layer.out_channels
    monkeypatch.setattr(choice, "_LEAST_LOW", low_numbers)
    assert not is_stock(layer, x)
    monkeypatch.setattr(choice, "_LEAST_LOW", low_numbers + 1)
    assert is_stock(layer, x)
    monkeypatch.setattr(choice, "_LEAST_LOW", 1)
    layer.stride = 2
    assert is_stock(layer, x)
    assert is_stock(nn.ConvTranspose2d(32, 3, 1, bias=False), torch.randn(2, 32, 8, 8))  # one tap


# Images that are not as large as the stride says, and ones with positions where no tap stays.
@pytest.mark.parametrize("settings", [{"padding": 0}, {"padding": 2}, {"padding": 1, "output_padding": 1}])
@pytest.mark.parametrize("kernel_size, stride", [(4, 2), (2, 3)])
def test_other_images_stay_stock(kernel_size, stride, settings):
    x = torch.randn(3, 6, 5, 4)
    layer = nn.ConvTranspose2d(6, 1, kernel_size, stride, bias=False, **settings)
    assert is_stock(layer, x)
    images = layer(x).detach().requires_grad_()
    layer = nn.Conv2d(1, 6, kernel_size, stride, settings["padding"], bias=False)
    assert is_stock(layer, images)


def test_products_in_less_than_float32_are_no_convolutions():
    layer, x = make("to an image")
    with products_in_less_than_float32():
        assert is_stock(layer, x)
        assert not is_stock(layer.bfloat16(), x.bfloat16())


def test_transforms_and_compilation_see_stock_layers():
    torch.manual_seed(0)
    model = fastgan.fuse(nn.Sequential(nn.ConvTranspose2d(4, 3, 4, bias=False), nn.ReLU()).bfloat16())
    x = torch.randn(3, 4, 1, 1).bfloat16()
    expected = model(x)
    torch.testing.assert_close(torch.func.vmap(lambda x: model(x[None])[0])(x), expected)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_batches_of_gradients(name, create_graph):
    """Several gradients in one backward, which then runs under vmap though forward did not."""
    layer, x = make(name)
    y = convolve(x.requires_grad_(), layer, layer.forward)
    douts = torch.randn(3, *y.shape)
    inputs, options = (x, layer.weight), dict(retain_graph=True, create_graph=create_graph)
    each = [torch.autograd.grad(y, inputs, dout, **options) for dout in douts]
    batched = torch.autograd.grad(y, inputs, douts, is_grads_batched=True, **options)
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*each, strict=True))), rtol=1e-4, atol=1e-4)
    assert batched[0].requires_grad == create_graph


@pytest.mark.parametrize("name", BY_CONVOLUTION)
def test_hessians_in_one_backward(name):
    layer, x = make(name)

    def score(scale):
        return convolve(x * scale[0], layer, layer.forward).mul(scale[1]).tanh().pow(2).mean()

    expected = torch.autograd.functional.hessian(score, torch.ones(2))
    torch.testing.assert_close(torch.autograd.functional.hessian(score, torch.ones(2), vectorize=True), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "error::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_traces_are_those_of_stock_layers(name):
    layer, x = make(name)
    fused = fastgan.fuse(nn.Sequential(copy.deepcopy(layer), nn.Tanh()))
    traced, many = torch.jit.trace(fused, x), torch.cat([x, x])
    torch.testing.assert_close(traced(many), layer(many).tanh())
