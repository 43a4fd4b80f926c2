"""Operators of our own making: the same numbers as PyTorch's registered ones, and who gets to see which of the two."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.ops.operators import operator


@operator("fastgan_test::weighted")
def weighted(x: Tensor, shift: Tensor | None, others: Sequence[Tensor], factor: float) -> tuple[Tensor, Tensor]:
    """factor·x·Σ others + shift, and x's mean, which has no gradient."""
    total = sum(others, torch.zeros_like(x))
    return factor * x * total + (0.0 if shift is None else shift), x.mean()


@weighted.register_fake
def _(x, shift, others, factor):
    return torch.empty_like(x), x.new_empty(())


def _save(ctx, inputs, output):
    x, _, others, ctx.factor = inputs
    ctx.save_for_backward(x, *others)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    x, *others = ctx.saved_tensors
    dx = ctx.factor * grad * sum(others, torch.zeros_like(x))
    return dx, grad if ctx.needs_input_grad[1] else None, [ctx.factor * grad * x for _ in others], None


weighted.register_autograd(_backward, setup_context=_save)


@operator("fastgan_test::count", mutates_args=("counter", "spare"))
def count(x: Tensor, counter: Tensor, spare: Tensor | None) -> None:
    counter.numpy()[...] += x.numel()  # behind PyTorch's back, as a kernel writes


@operator("fastgan_test::doubled")
def doubled(x: Tensor) -> Tensor:
    """Has no gradient."""
    return 2 * x


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


def _leaves(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.fixture
def unregistered(monkeypatch):
    """PyTorch's operator may not be called."""
    for ours in (weighted, count, doubled):
        monkeypatch.setattr(ours, "registered", None)


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.name())
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("others", (0, 1, 3))
@pytest.mark.parametrize("with_shift", (True, False))
def test_gradients_are_those_of_the_registered_operator(with_shift, others):
    found = []
    for run in (weighted, weighted.registered):
        x, shift, *rest = _leaves(*[(3, 2)] * (2 + others))
        out, mean = run(x, shift if with_shift else None, rest, 0.5)
        assert not mean.requires_grad
        grads = torch.autograd.grad(out.square().sum(), [x, *rest, *[shift] * with_shift], create_graph=True)
        again = torch.autograd.grad(grads[0].square().sum(), [x, *rest])
        found.append((out, mean, *grads, *again))
    for ours, registered in zip(*found, strict=True):
        assert torch.equal(ours, registered)


def test_gradients_of_few(unregistered):
    """Only of what asks for one, a tensor of a list included."""
    x, other = _leaves((4,), (4,))
    out, _ = weighted(x.detach(), None, [x.detach(), other], 2.0)
    out.sum().backward()
    assert x.grad is None and torch.equal(other.grad, 2.0 * x)
    assert not weighted(x.detach(), None, [other.detach()], 2.0)[0].requires_grad


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients(unregistered, mode):
    x, other = _leaves((4,), (4,))
    with mode():
        out, mean = weighted(x, None, [other], 2.0)
    assert not out.requires_grad and torch.equal(out, 2.0 * x * other) and torch.equal(mean, x.mean())


def test_a_dispatch_mode_sees_the_operator():
    x, other = _leaves((4,), (4,))
    with _Seen() as seen:
        out, _ = weighted(x, None, [other], 2.0)
    out.sum().backward()
    assert "fastgan_test::weighted" in seen.names
    assert torch.equal(x.grad, 2.0 * other)


def test_fake_tensors():
    with FakeTensorMode() as mode:
        out, mean = weighted(torch.empty(3, 5), None, [torch.empty(3, 5)], 1.0)
    assert out.shape == (3, 5) and mean.shape == () and out.fake_mode is mode
    assert doubled(out).fake_mode is mode  # also outside, where the tensor's class says what it is


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_traces_hold_the_operator():
    traced = torch.jit.trace(lambda x: doubled(x), torch.ones(2))
    assert "fastgan_test::doubled" in str(traced.graph)
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda x: doubled(x), backend=backend, fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert seen == [torch.ops.fastgan_test.doubled.default]


def test_graphs_that_hold_what_was_written_to_stay_usable(unregistered):
    """As those of PyTorch's BatchNorm that hold its running statistics."""
    counter, x = torch.zeros(()), torch.ones(3, requires_grad=True)
    loss = (x * counter).sum()
    with torch.no_grad():
        count(x, counter, None)
    assert counter == 3
    loss.backward()


def test_no_gradient_is_an_error():
    out = doubled(torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="register_autograd"):
        out.sum().backward()
