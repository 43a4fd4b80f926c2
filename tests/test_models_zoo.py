"""fuse on the layers of well-known public GANs: all that stock computes, through the operators, eager and compiled."""

import copy

import pytest
import torch

import fastgan
from tests.models_zoo import ZOO
from tests.networks import assert_equal, assert_same_steps, one_step
from tests.pairs import count_operator_calls, make_pair

BATCH = 3
every_network = pytest.mark.parametrize("name", ZOO)
# Some in eval, too: tracing takes a second for each.
every_network_compiled = pytest.mark.parametrize(
    ("name", "training"),
    [*((name, True) for name in ZOO), *((name, False) for name in ("dropout_discriminator", "infogan_heads"))],
)


def draw(name, dtype=torch.float64, device="cpu"):
    return ZOO[name].inputs(BATCH, dtype=dtype, device=device)


@every_network
def test_fused_equals_stock(name, monkeypatch):
    stock, model = make_pair(ZOO[name].make)
    calls = count_operator_calls(monkeypatch)
    assert_same_steps(fastgan.fuse(model), stock, lambda: draw(name))
    assert len(calls) == 3 * sum(row.fused for row in fastgan.explain(model))


def test_fused_convolutions_by_network():
    fused = {name: sum(row.fused for row in fastgan.explain(fastgan.fuse(n.make()))) for name, n in ZOO.items()}
    assert fused == {name: network.fused for name, network in ZOO.items()}


@every_network
def test_states_copies_and_unfuse(name):
    """Without kernels each of these does stock's own arithmetic, to the last bit."""
    stock, model = make_pair(ZOO[name].make)
    fastgan.fuse(model)
    other, like_stock = fastgan.fuse(ZOO[name].make().double()), ZOO[name].make().double()
    other.load_state_dict(stock.state_dict(), strict=True)
    like_stock.load_state_dict(model.state_dict(), strict=True)
    duplicate, restored = copy.deepcopy(model), fastgan.unfuse(copy.deepcopy(model))
    assert not any(row.fused for row in fastgan.explain(restored))
    inputs = draw(name)
    expected = one_step(stock, inputs)
    for network in (model, duplicate, other, like_stock, restored):
        assert_equal(one_step(network, inputs), expected)


def assert_same_when_compiled(compiled, model, stock, inputs, tolerance=1e-12):
    """A step of `compiled`, which is `model` compiled, is that of stock."""
    results, gradients, _ = one_step(compiled, inputs)
    # A compiled module has other names for its parameters.
    gradients = {name: gradient for name, gradient in gradients.items() if name.startswith("input ")}
    gradients |= {name: parameter.grad for name, parameter in model.named_parameters()}
    found, wanted = (results, gradients, dict(model.state_dict())), one_step(stock, inputs)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@every_network_compiled
def test_compiled_without_a_graph_break(name, training, monkeypatch):
    stock, model = (network.train(training) for network in make_pair(ZOO[name].make))
    count_operator_calls(monkeypatch)
    compiled = torch.compile(fastgan.fuse(model), backend="eager", fullgraph=True)  # half as long as with "aot_eager"
    assert_same_when_compiled(compiled, model, stock, draw(name))


@every_network_compiled
def test_backend_rewrites_to_what_stock_computes(name, training, monkeypatch):
    """The graph that the backend hands to inductor, which takes some twenty seconds for each: run as it is."""
    stock, model = (network.train(training) for network in make_pair(ZOO[name].make))
    calls = count_operator_calls(monkeypatch)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs, **_: graph.forward)
    compiled = torch.compile(model, backend="fastgan", fullgraph=True)
    assert_same_when_compiled(compiled, model, stock, draw(name), tolerance=1e-9)
    assert len(calls) == ZOO[name].fused


def test_backend_through_inductor():
    stock, model = make_pair(ZOO["mnist_discriminator"].make)
    compiled = torch.compile(model, backend="fastgan", fullgraph=True)
    assert_same_when_compiled(compiled, model, stock, draw("mnist_discriminator"), tolerance=1e-9)


@pytest.mark.parametrize(
    "name", ["conditional_discriminator", "tutorial_discriminator", "infogan_heads", "sngan_critic"]
)
def test_kernels(name, device, triton_backend, monkeypatch):
    """Forward, backward and running statistics through the kernels, in float32."""
    stock, model = (network.float().to(device) for network in make_pair(ZOO[name].make))
    fastgan.fuse(model)
    assert all(row.implementation == "triton" for row in fastgan.explain(model) if row.fused)
    inputs = draw(name, torch.float32, device)
    ours = one_step(model, inputs)
    monkeypatch.setenv("FASTGAN_BACKEND", "reference")
    torch.testing.assert_close(ours, one_step(stock, inputs), rtol=1e-3, atol=1e-5)
