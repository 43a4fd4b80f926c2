"""fuse on random networks: whatever they consist of, a step shows what stock shows, with the operators and without."""

import copy
import itertools
import re

import pytest
import torch
from hypothesis import HealthCheck, given, note, reject, settings

import fastgan
from fastgan.first_order import first_order
from tests.conftest import HAS_GPU
from tests.networks import assert_equal, one_step
from tests.pairs import count_operator_calls, make_pair
from tests.random_networks import build, sources


def on_networks(test, count):
    """`test` as a test of that many sources, the same in every run, so that a failure in CI is a failure here."""
    health = list(HealthCheck)
    how = settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=health)
    return how(given(sources())(test))


def steps(network, inputs):
    """What two steps in training and one in eval show."""
    return [one_step(network.train(i < 2), [x], seed=i) for i, x in enumerate(inputs)]


def kernels_of_first_order(source):
    """Where a layer takes over a part of the backward of the one before, gradients are those that they were."""
    note(source)
    device = "cuda" if HAS_GPU else "cpu"
    model = fastgan.fuse(build(source)[0]).to(device)
    size = build(source)[1]
    x = torch.randn(2, 3, size, size).to(device)
    try:
        one_step(copy.deepcopy(model), [x])
    except RuntimeError:
        reject()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FASTGAN_BACKEND", "triton")
        expected = one_step(copy.deepcopy(model), [x])
        with first_order():
            found = one_step(model, [x])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


test_kernels_of_first_order = on_networks(kernels_of_first_order, 4)
test_kernels_of_first_order_in_more = pytest.mark.slow(on_networks(kernels_of_first_order, 12))


def fused_equals_stock(source):
    note(source)
    stock, model = make_pair(lambda: build(source)[0])
    size = build(source)[1]
    inputs = [torch.randn(2, 3, size, size, dtype=torch.float64) for _ in range(3)]
    attributes = [set(vars(module)) for module in stock.modules()]
    try:
        expected = steps(stock, inputs)
    except RuntimeError as error:
        if not re.search("in-?place", str(error)):
            raise
        reject()  # stock itself cannot: what backward needs, or the input itself, is changed in place

    fastgan.fuse(model)
    forwards = [vars(module).get("forward") for module in model.modules()]
    fastgan.fuse(model)
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    restored, without_kernels = fastgan.unfuse(copy.deepcopy(model)), copy.deepcopy(model)
    assert [set(vars(module)) for module in restored.modules()] == attributes
    assert_equal(steps(restored, inputs), expected)
    assert_equal(steps(without_kernels, inputs), expected)
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = count_operator_calls(monkeypatch)
        found = steps(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert bool(calls) == any(row.fused for row in fastgan.explain(model))


test_fused_equals_stock = on_networks(fused_equals_stock, 100)
test_fused_equals_stock_in_more = pytest.mark.slow(on_networks(fused_equals_stock, 500))


def results_lie_as_stocks(source):
    """In memory, whatever the layouts of the images and the weights are: what comes after may view or convolve them."""
    note(source)
    stock, model = make_pair(lambda: build(source)[0])
    size = build(source)[1]
    fastgan.fuse(model)
    for weights, images in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        x = torch.randn(2, 3, size, size, dtype=torch.float64).to(memory_format=images)
        networks = [copy.deepcopy(network).to(memory_format=weights) for network in (stock, model)]
        try:
            expected = strides(networks[0], x)
        except RuntimeError as error:
            if not re.search("in-?place|view", str(error)):
                raise
            continue  # stock itself cannot
        assert strides(networks[1], x) == expected, (weights, images)
        with pytest.MonkeyPatch.context() as monkeypatch:
            count_operator_calls(monkeypatch)
            assert strides(networks[1], x) == expected, (weights, images, "operators")


def strides(network, x):
    found = network(x)
    return [tensor.stride() for tensor in (found if isinstance(found, tuple) else (found,))]


test_results_lie_as_stocks = on_networks(results_lie_as_stocks, 25)
test_results_lie_as_stocks_in_more = pytest.mark.slow(on_networks(results_lie_as_stocks, 400))
