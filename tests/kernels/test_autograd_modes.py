"""The operators inside of what PyTorch can put around them: no_grad, checkpointing, loss scaling, torch.func."""

import functools
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastgan import backend
from fastgan import functional as fused
from fastgan.ops import convolution, replay
from tests.accuracy import assert_as_accurate_as_stock
from tests.kernels.comparison import PLAIN, draw, gradient_of_norms, leaves, ours, stock

pytestmark = pytest.mark.usefixtures("triton_backend")

SMALL = PLAIN._replace(in_channels=3, out_channels=4, size=(4, 5), bias=True)
MODES = [SMALL._replace(activation="tanh", training=training) for training in (True, False)]
BY_MODE = pytest.mark.parametrize("case", MODES, ids=("train", "eval"))


@BY_MODE
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients(mode, case, device, poisoned):
    tensors = leaves(draw(case, 3, device))
    expected = leaves(tensors)
    with mode():
        out = ours(case, tensors, "tanh")
        assert not out.requires_grad
    torch.testing.assert_close(out.clone(), stock(case, expected, "tanh").detach())
    torch.testing.assert_close(tensors[5:], expected[5:])


@BY_MODE
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_checkpoint(use_reentrant, case, device):
    """The forward that runs again gives the same; running statistics are then updated twice, as stock's are."""
    tensors = draw(case, 3, device)
    found = []
    for forward in (ours, stock):
        copies = leaves(tensors)
        learning, running = copies[:5], copies[5:]
        out = checkpoint(
            lambda *t, f=forward, r=running: f(case, [*t, *r], "tanh"), *learning, use_reentrant=use_reentrant
        )
        out.backward(torch.cos(torch.arange(out.numel(), device=device)).view_as(out))
        found.append((out, [t.grad for t in learning], running))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_gradient_penalty_through_a_checkpoint(device):
    case = MODES[0]
    *learning, mean, var = leaves(draw(case, 3, device))

    def forward(*learning):
        return ours(case, [*learning, mean, var], "tanh")

    found = []
    for out in (forward(*learning), checkpoint(forward, *learning, use_reentrant=False)):
        _, norms = gradient_of_norms(out, learning[0])
        found.append(torch.autograd.grad(norms.sum(), learning[:2]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


ASKED = {"x": (0,), "weight": (1,), "both": (0, 1), "bias": (2,)}


@pytest.mark.parametrize("create_graph", (False, True))
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("mode", ("train", "eval", "no BatchNorm"))
def test_only_what_is_asked_for_is_computed(mode, asked, create_graph, device, monkeypatch):
    """As stock does: the gradient penalty of a critic has no use for the gradients of its weights."""
    case = SMALL._replace(activation="tanh", training=mode == "train", batch_norm=mode != "no BatchNorm")
    calls = []
    monkeypatch.setattr(replay.Replayed, "__call__", lambda self, *arguments: self.function(*arguments))
    for name in ("run_conv", "run_weight_grad"):
        counted = functools.partial(_counted, calls, name, getattr(convolution, name))
        monkeypatch.setattr(convolution, name, counted)
    *leaf, mean, var = leaves(draw(case, 3, device))
    for learning in (leaf, [None if t is None else 2 * t for t in leaf]):
        out = ours(case, [*learning, mean, var], "tanh")
        calls.clear()
        torch.autograd.grad(out.sum(), [learning[i] for i in ASKED[asked]], create_graph=create_graph)
        assert ("run_weight_grad" in calls) == (asked in ("weight", "both"))
        if not create_graph:  # with it forward runs again
            assert ("run_conv" in calls) == (asked in ("x", "both"))


def _counted(calls, name, function, *args, **options):
    calls.append(name)
    return function(*args, **options)


class _Critic:
    """Two convolutions with BatchNorm and a loss, by our operators or by stock, with float32 parameters."""

    def __init__(self, drawn, fused, dtype=torch.float32):
        self.fused, self.parameters = fused, [t.detach().clone().to(dtype).requires_grad_() for t in drawn]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1)

    def loss(self, x):
        y = self._layer(x, *self.parameters[:4], activation="leaky_relu")
        logits = self._layer(y, *self.parameters[4:], activation=None).flatten(1).mean(1)
        if self.fused:
            return fused.generator_bce(logits)
        return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))

    def _layer(self, x, weight, bias, gamma, beta, activation):
        if self.fused:
            options = dict(training=True, stride=2, padding=1, activation=activation, negative_slope=0.2)
            return fused.conv2d_bn_act(x, weight, bias, gamma, beta, **options)
        y = F.batch_norm(F.conv2d(x, weight, bias, 2, 1), None, None, gamma, beta, training=True)
        return F.leaky_relu(y, 0.2) if activation else y

    def step(self, x, scale):
        """(gradients without their scale, whether the step was made, the next scale) in float16."""
        scaler = torch.amp.GradScaler(x.device.type, init_scale=scale)
        before = [p.detach().clone() for p in self.parameters]
        self.optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.float16):
            loss = self.loss(x)
        scaler.scale(loss).backward()
        scaler.unscale_(self.optimizer)
        scaler.step(self.optimizer)
        scaler.update()
        moved = any(not torch.equal(p, b) for p, b in zip(self.parameters, before, strict=True))
        return [p.grad for p in self.parameters], moved, scaler.get_scale()


def test_loss_scaling(device):
    """float16 by autocast and GradScaler: right gradients, and a step that is left out where they overflow."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 4, 4), (4,), (4,), (4,), (5, 4, 4, 4), (5,), (5,), (5,))
    drawn = [torch.randn(shape, generator=generator).to(device) / max(len(shape), 2) for shape in shapes]
    x = torch.randn(4, 3, 8, 8, generator=generator).to(device)
    exact = _Critic(drawn, fused=False, dtype=torch.float64)
    exact = torch.autograd.grad(exact.loss(x.double()), exact.parameters)
    ours_, stock_ = (_Critic(drawn, fused=fused_).step(x, 2.0**10) for fused_ in (True, False))
    assert ours_[1:] == stock_[1:] == (True, 2.0**10)
    for grad, plain, reference in zip(ours_[0], stock_[0], exact, strict=True):
        assert grad.dtype == torch.float32
        assert_as_accurate_as_stock("gradient", grad, plain, reference, torch.float16)
    assert _Critic(drawn, fused=True).step(x, 2.0**40)[1:] == (False, 2.0**39)


@BY_MODE
def test_compiled_autograd(case, device):
    """Backward alone is captured: what it calls there is operators."""
    tensors, found = draw(case, 3, device), []
    for compiled in (False, True):
        copies = leaves(tensors)
        out = ours(case, copies, "tanh")
        capture = compiled_autograd._enable(torch.compile(backend="aot_eager")) if compiled else nullcontext()
        with capture:
            out.backward(torch.cos(torch.arange(out.numel(), device=device)).view_as(out))
        found.append([t.grad for t in copies[:5]])
    torch.testing.assert_close(*found)


def _penalty(x, rest, case):
    def score(x):
        return (ours(case, [x, *rest], "tanh") ** 2).sum()

    return torch.func.grad(lambda x: (torch.func.grad(score)(x) ** 2).sum())(x)


@BY_MODE
def test_torch_func(case, device, monkeypatch):
    """Under its transforms plain torch runs, which they can differentiate and map: the same as on the reference."""
    x, *rest = draw(case, 3, device)
    statistics = rest[4:] if not case.training else [None, None]
    rest = [*rest[:4], *statistics]

    def forward(x):
        return ours(case, [x, *rest], "tanh")

    def all_transforms():
        tangent = torch.ones_like(x)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(forward(forward_ad.make_dual(x, tangent)))
        # PyTorch's own batch_norm cannot be mapped on a GPU.
        mapped = [] if device.type == "cuda" else [torch.func.vmap(forward)(torch.stack([x, x + 1]))]
        return [
            _penalty(x, rest, case),
            *torch.func.jvp(forward, (x,), (tangent,)),
            *mapped,
            torch.func.jacrev(lambda x: forward(x).sum((0, 2, 3)))(x),
            *dual,
            *torch.func.grad(lambda a, b: fused.discriminator_bce(a, b), argnums=(0, 1))(x, x + 1),
        ]

    actual = all_transforms()
    assert not backend.transformed()
    monkeypatch.setenv("FASTGAN_BACKEND", "reference")
    for ours_, reference in zip(actual, all_transforms(), strict=True):
        assert torch.equal(ours_, reference) and reference.any()


def test_torch_func_inside_of_torch_compile(device):
    """Reverse mode; what PyTorch makes of forward mode in there depends on its version, for its own layers too."""
    case = MODES[1]
    x, *rest = draw(case, 3, device)

    def run(x):
        return torch.func.grad(lambda x: ours(case, [x, *rest], "tanh").sum())(x)

    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x), run(x))
    compiled = torch.compile(lambda x: ours(case, [x, *rest], "tanh"), backend="aot_eager")
    torch.testing.assert_close(compiled(x), stock(case, [x, *rest], "tanh"))  # and the kernels again outside of it


def test_vmap_over_running_statistics_is_refused(device):
    """By PyTorch, for the in-place update of what is not mapped; on a GPU it cannot map its batch_norm at all."""
    x, *rest = draw(MODES[0], 3, device)
    message = "inside of vmap" if device.type == "cuda" else "running_mean or running_var"
    with pytest.raises(RuntimeError, match=message):
        torch.func.vmap(lambda x: ours(MODES[0], [x, *rest], "tanh"))(torch.stack([x, x]))
