"""Fused networks in eager code: calls that are replayed (fastgan/ops/replay.py) compute what their functions do.

On a GPU they are replayed as they are; where Triton interprets, `replay` is asked to.
"""

import copy

import pytest
import torch
from torch import nn

import fastgan
from fastgan.ops import replay
from tests.processes import run_compiling

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture
def replayed(monkeypatch, device):
    """The plans that were run, in their order."""
    run, plans = replay.Plan.run, []

    def counted(plan, arguments):
        plans.append(plan)
        return run(plan, arguments)

    monkeypatch.setattr(replay.Plan, "run", counted)
    if device.type != "cuda":
        monkeypatch.setattr(replay.Replayed, "__call__", replay.Replayed.replay)
    return plans


def network():
    return nn.Sequential(
        nn.ConvTranspose2d(5, 4, 3, 2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.Tanh(),
        nn.BatchNorm2d(3, track_running_stats=False),  # the tutorials' order
        nn.Conv2d(3, 3, 2),
        nn.LeakyReLU(0.2),
    )


def step(model, x, dtype):
    """[result, the gradients, the buffers] of one forward and backward."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        out = model(x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize(
    ("training", "dtype", "memory_format"),
    [
        (True, torch.float32, torch.contiguous_format),
        (True, torch.float16, torch.channels_last),
        (False, torch.float32, torch.channels_last),
    ],
    ids=("train", "train, autocast", "eval"),
)
def test_steps_are_the_same(training, dtype, memory_format, device, replayed, poisoned, monkeypatch):
    torch.manual_seed(0)
    model = network().to(device, memory_format=memory_format).train(training)
    ours, other = fastgan.fuse(copy.deepcopy(model)), fastgan.fuse(copy.deepcopy(model))
    for _ in range(4):
        x = torch.randn(2, 5, 2, 2, device=device).contiguous(memory_format=memory_format)
        found = step(ours, x, dtype)
        with monkeypatch.context() as plain:
            plain.setattr(replay.Replayed, "__call__", lambda self, *arguments: self.function(*arguments))
            expected = step(other, x, dtype)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
    # Two steps, forward and backward: of a chain, or of three layers with a BatchNorm each whose statistics are known.
    assert len(replayed) == 2 * 2 if training else len(replayed) >= 2 * 2 * 3


def test_compiled_steps_are_the_same(device, replayed):
    """What torch.compile calls is the registered operators, which replay too."""
    torch.manual_seed(0)
    model = network().to(device)
    compiled = torch.compile(fastgan.fuse(copy.deepcopy(model)), backend="aot_eager", fullgraph=True)
    for _ in range(4):
        x = torch.randn(2, 5, 2, 2, device=device)
        torch.testing.assert_close(
            step(compiled, x, torch.float32), step(model, x, torch.float32), rtol=1e-3, atol=1e-4
        )
    assert len(replayed) >= 2 * 2 * 3


def test_losses_and_gradients_of_gradients(device, replayed):
    """A critic with gradient penalty: what has a graph of its own, and what is replayed in between."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 1, 4)).to(device)
    ours = fastgan.fuse(copy.deepcopy(stock))

    def penalty(critic, x, loss):
        critic.zero_grad()
        x = x.clone().requires_grad_()
        logits = critic(x)
        (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        (loss(logits) + (grad.flatten(1).norm(2, 1) - 1).square().mean()).backward()
        return [parameter.grad for parameter in critic.parameters()]

    for _ in range(4):
        x = torch.randn(3, 3, 8, 8, device=device)
        found = penalty(ours, x, fastgan.functional.generator_bce)
        expected = penalty(stock, x, lambda logits: nn.functional.softplus(-logits).mean())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert len(replayed) >= 6


def test_layers_that_share_a_weight(device):
    """A gradient's gradient counts each use of a weight once, also where one use makes the other's input."""
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    stock = nn.Sequential(convolution, norm, nn.Tanh(), convolution, norm, nn.Tanh()).to(device)
    ours, x = fastgan.fuse(copy.deepcopy(stock)), torch.randn(3, 3, 4, 4, device=device)
    found = []
    for model in (ours, stock):
        learning = [x.clone().requires_grad_(), *model.parameters()]
        grads = torch.autograd.grad(model(learning[0]).square().sum(), learning, create_graph=True)
        again = torch.autograd.grad(sum(grad.square().sum() for grad in grads), learning)
        found.append([*grads, *(grad / again[1].abs().max() for grad in again)])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_compiled_kernels_are_given_the_same():
    """Replays start a compiled kernel directly: with the arguments and the grid that Triton's own launch gives it."""
    done = run_compiling("-m", "tests.kernels.direct_launches")
    assert done.returncode == 0 and int(done.stdout) > 20, done.stdout[-2000:] + done.stderr[-3000:]
