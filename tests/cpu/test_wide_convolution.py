"""Wide layers of small images on a CPU: products for each tap, against stock convolutions."""

import copy

import pytest
import torch
from torch import nn

from fastgan.cpu import choice
from fastgan.cpu import convolution as cpu_convolution
from fastgan.cpu import products as cpu_products
from fastgan.cpu.convolution import convolve
from tests.accuracy import assert_as_accurate_as_stock
from tests.cpu.layers import (
    LAYOUTS,
    OF_STOCK,
    OURS,
    assert_that_an_activation_in_place_may_follow,
    is_stock,
    layouts,
    products_in_less_than_float32,
    run,
)

# Low sides of at most 16 positions; at some taps of the last two nothing meets.
WIDE = {
    "4x4": (lambda: nn.Conv2d(6, 5, 4, 2, 1, bias=False), (3, 6, 8, 8)),
    "transposed 4x4": (lambda: nn.ConvTranspose2d(6, 5, 4, 2, 1, bias=False), (3, 6, 4, 4)),
    "transposed, other sizes": (
        lambda: nn.ConvTranspose2d(6, 5, (5, 4), (3, 2), (2, 1), output_padding=(2, 1), bias=False),
        (3, 6, 2, 7),
    ),
    "every position": (lambda: nn.Conv2d(6, 5, 3, 1, 1, bias=False), (2, 6, 3, 5)),
    "no padding, rows left over": (lambda: nn.Conv2d(6, 5, (3, 2), (3, 2), bias=False), (2, 6, 8, 7)),
    "kernels wider than images": (lambda: nn.Conv2d(6, 5, (11, 7), 1, 3, bias=False), (2, 6, 5, 3)),
    "taps beyond images": (lambda: nn.Conv2d(6, 5, 7, 1, 3, bias=False), (2, 6, 2, 2)),
    "one position": (lambda: nn.ConvTranspose2d(6, 5, 5, 3, 2, bias=False), (2, 6, 1, 1)),
    "one tap": (lambda: nn.Conv2d(6, 5, 1, bias=False), (2, 6, 3, 4)),
    "to one position, with padding": (lambda: nn.Conv2d(6, 5, 4, 2, 1, bias=False), (2, 6, 2, 2)),
}


def make_wide(name, monkeypatch, layout="channels_last", kind="Intel"):
    """(layer, x), where every weight is large enough for all that a CPU of this kind has products for."""
    monkeypatch.setattr(choice, "cpu_kind", lambda: kind)
    bounds = [bounds and bounds._replace(least_elements=1) for bounds in choice._LARGE_WEIGHTS[kind]]
    monkeypatch.setitem(choice._LARGE_WEIGHTS, kind, choice.LargeWeights(*bounds))
    monkeypatch.setattr(choice, "_WIDE", 1)
    monkeypatch.setattr(cpu_products, "_MANY_CHANNELS", 5)
    torch.manual_seed(0)
    layer, shape = WIDE[name]
    return layer().to(memory_format=LAYOUTS[layout]), torch.randn(shape).to(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps_at_once", [1, 1500])  # one image, all of them or some
@pytest.mark.parametrize("name", WIDE)
def test_wide_layers(name, taps_at_once, layout, x_layout, monkeypatch, poisoned):
    layer, x = make_wide(name, monkeypatch, layout)
    x = x.contiguous(memory_format=LAYOUTS[x_layout])
    monkeypatch.setattr(cpu_products, "_TAPS_AT_ONCE", taps_at_once)
    exact = copy.deepcopy(layer).double()
    dout = torch.randn_like(layer(x))
    ours = run(layer, x, dout, lambda x: convolve(x, layer, layer.forward))
    mixed = (layout, x_layout) == ("contiguous", "channels_last") and "contiguous" not in layouts(x)
    assert ours[0].grad_fn.name() == (OF_STOCK if mixed else OURS)
    stock, reference = run(layer, x, dout, layer), run(exact, x.double(), dout.double(), exact)
    for what, *results in zip(("y", "dx", "dweight"), ours, stock, reference, strict=True):
        assert layouts(results[0]) == layouts(results[1])
        assert_as_accurate_as_stock(f"{name}: {what}", *results)


@pytest.mark.parametrize("name, fits", [("4x4", True), ("transposed 4x4", True), ("transposed, other sizes", False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_layers_are_products(name, fits, layout, monkeypatch):
    layer, x = make_wide(name, monkeypatch, layout)
    monkeypatch.setattr(cpu_convolution, "_convolution", None)
    with torch.no_grad():
        assert is_stock(layer, x) != fits
        if fits:
            torch.testing.assert_close(convolve(x, layer, None), layer(x))


def test_answers_are_kept_for_what_they_depend_on(monkeypatch):
    monkeypatch.setattr(choice, "_answers", {})
    weight, x = torch.empty(512, 256, 4, 4), torch.empty(2, 256, 8, 8)
    weights = weight.to(memory_format=torch.channels_last), weight, weight[:16]
    expected = [cpu_products.weight_grad_tap_by_tap, cpu_products.weight_grad_of_all_taps, None]
    conv_args = (False, (2, 2), (1, 1), (0, 0))
    for _ in range(2):
        found = [choice.products_for(x, each, torch.float32, *conv_args) for each in weights]
        assert [products.weight_grad for products in found] == expected
        assert len(choice._answers) == 3
    monkeypatch.setattr(choice, "_MOST_ANSWERS", 3)
    choice.products_for(x[:1], weight, torch.float32, *conv_args)
    assert len(choice._answers) == 1


def test_wide_layers_of_other_cpus_are_products_for_weight_gradients_only(monkeypatch):
    layer, x = make_wide("4x4", monkeypatch, kind="other")
    assert is_stock(*make_wide("4x4", monkeypatch, "contiguous", kind="other"))
    with torch.no_grad():
        assert is_stock(layer, x)
    for name in ("to_low", "to_high"):
        monkeypatch.setattr(choice, name, None)
    assert_gradients_of_stock(layer, x)


def assert_gradients_of_stock(layer, x):
    """By a `Convolution` of ours."""
    y = convolve(x.requires_grad_(), layer, None)
    gradients = torch.autograd.grad(y.square().sum(), (x, layer.weight))
    stock = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))
    torch.testing.assert_close(gradients, stock, rtol=1e-4, atol=1e-4)
    assert y.grad_fn.name() == OURS


# (kind of CPU, elements of the weight, positions on the low side, stride) → which of its parts are products
LARGE = {
    ("AMD", 2**21, 4 * 16, 2): {"to_low", "weight_grad"},
    ("AMD", 2**21, 9 * 16, 2): {"weight_grad"},
    ("AMD", 2**23, 8 * 16, 2): {"to_high", "to_low", "weight_grad"},
    ("AMD", 2**23, 9 * 16, 2): {"weight_grad"},
    ("AMD", 2**23, 4 * 16, 1): {"weight_grad"},
    ("x86 without AVX-512", 2**21, 32 * 16, 2): {"to_low", "weight_grad"},
    ("x86 without AVX-512", 2**22, 32 * 16, 2): {"to_high", "to_low", "weight_grad"},
    ("x86 without AVX-512", 2**23, 4 * 16, 1): {"weight_grad"},
    ("Intel", 2**21, 32 * 16, 1): {"to_high", "to_low", "weight_grad"},
    ("other", 2**23, 4 * 16, 2): {"weight_grad"},
    ("Intel", 2**20, 4 * 16, 2): set(),
}


@pytest.mark.parametrize("kind, elements, positions, stride", LARGE)
@pytest.mark.parametrize("transposed", [False, True])
def test_which_large_weights_gain(kind, elements, positions, stride, transposed, monkeypatch):
    monkeypatch.setattr(choice, "cpu_kind", lambda: kind)
    taps = 4 if stride == 2 else 3
    low, high = (
        torch.empty(positions // 16, channels, side, side, device="meta").to(memory_format=torch.channels_last)
        for channels, side in ((512, 4), (elements // 512 // taps**2 + 1, 4 * stride))
    )
    weight = torch.empty(512, high.shape[1], taps, taps, device="meta").to(memory_format=torch.channels_last)
    conv_args = transposed, (stride, stride), (1, 1), (0, 0)
    found = choice.products_for(low if transposed else high, weight, torch.float32, *conv_args)
    assert {part for part in found._fields if getattr(found, part)} == LARGE[kind, elements, positions, stride]


@pytest.mark.parametrize("of", ["x", "weight"])
@pytest.mark.parametrize("name", ["4x4", "transposed 4x4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_wide_gradients(name, of, layout, monkeypatch):
    layer, x = make_wide(name, monkeypatch, layout)
    monkeypatch.setattr(cpu_products, "_TAPS_AT_ONCE", 1500)
    learning = {"x": x.requires_grad_(), "weight": layer.weight}

    def penalty(forward):
        y = forward(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), learning[of], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), tuple(learning.values()))

    ours, stock = penalty(lambda x: convolve(x, layer, layer.forward)), penalty(layer)
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["4x4", "transposed 4x4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_activation_in_place_may_follow_a_wide_layer(name, layout, monkeypatch):
    assert_that_an_activation_in_place_may_follow(*make_wide(name, monkeypatch, layout))


def test_wide_layers_that_stay_stock(monkeypatch):
    layer, x = make_wide("4x4", monkeypatch)
    assert not is_stock(layer, x)
    assert is_stock(layer, torch.randn(3, 6, 10, 10))  # 25 positions
    in_no_order = copy.deepcopy(layer)
    in_no_order.weight = nn.Parameter(layer.weight.detach().transpose(2, 3))
    assert is_stock(in_no_order, x)
    assert is_stock(copy.deepcopy(layer).double(), x.double())
    with products_in_less_than_float32():
        assert is_stock(layer, x)
    monkeypatch.setattr(choice, "_WIDE", layer.weight.numel() + 1)
    assert is_stock(layer, x)
