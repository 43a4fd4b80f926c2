"""Both GAN losses, forward and backward, stock against fused, called one by one from Python and in a CUDA graph.

What a training step takes from each: the discriminator's loss with its two monitoring means, the generator's loss, and
the gradients of the logits. A variant is timed only after its results passed the rule of tests/accuracy.py.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import DEVICE, ON_GPU, PeakMemory, clock, describe, fixed, forget, graphed, measure_in_turn
from fastgan import functional
from tests.accuracy import assert_as_accurate_as_stock

pytestmark = pytest.mark.benchmark(group="losses", timer=clock)

BATCHES = (128, 1024) if ON_GPU else (32, 1024)
CALLS = 20 if ON_GPU else 1  # in a graph


def stock_discriminator_loss(real, fake):
    real, fake = real.float(), fake.float()
    loss = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    loss = loss + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    return loss, real.detach().sigmoid().mean(), fake.detach().sigmoid().mean()


def stock_generator_loss(fake):
    fake = fake.float()
    return (F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake)),)


def fused_discriminator_loss(real, fake):
    return functional.discriminator_bce(real, fake, return_means=True)


def fused_generator_loss(fake):
    return (functional.generator_bce(fake),)


# loss → (number of sets of logits, {variant: function})
LOSSES = {
    "discriminator": (2, {"stock": stock_discriminator_loss, "fused": fused_discriminator_loss}),
    "generator": (1, {"stock": stock_generator_loss, "fused": fused_generator_loss}),
}
VARIANTS = ["eager", "compile", "fused"] if ON_GPU else ["eager", "fused"]


def forward_backward(loss, logits):
    """The values of the loss and the gradients of its logits."""
    values = loss(*logits)
    return *values, *torch.autograd.grad(values[0], logits)


def build(name, variant):
    functions = LOSSES[name][1]
    if variant == "compile":
        return torch.compile(functions["stock"], dynamic=False, fullgraph=True)
    return functions["fused" if variant == "fused" else "stock"]


def check(loss, name, logits):
    """As accurate as stock, against stock in float64."""
    ours = forward_backward(loss, logits)
    stock = forward_backward(LOSSES[name][1]["stock"], logits)
    exact = [x.detach().double().requires_grad_() for x in logits]
    targets = (1.0, 0.0) if len(exact) == 2 else (1.0,)
    terms = [F.binary_cross_entropy_with_logits(x, torch.full_like(x, t)) for x, t in zip(exact, targets, strict=True)]
    means = [x.detach().sigmoid().mean() for x in exact] if len(exact) == 2 else []
    expected = [sum(terms).detach(), *means, *torch.autograd.grad(sum(terms), exact)]
    for i, (got, other, reference) in enumerate(zip(ours, stock, expected, strict=True)):
        # Gradients are as small as 1 / batch; scaled, they are held to the same tolerance as the losses.
        scale = 1 if reference.dim() == 0 else reference.numel()
        assert_as_accurate_as_stock(f"wrong: value {i}", got * scale, other * scale, reference * scale)


@pytest.mark.parametrize("launched", ["from Python", "in a graph"] if ON_GPU else ["from Python"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss(benchmark, name, batch, variant, launched):
    describe(benchmark, variant=variant, batch=batch, precision="fp32", loss=name, launched=launched)
    forget()
    torch.manual_seed(0)
    count = LOSSES[name][0]
    logits = [(torch.randn(batch, device=DEVICE) * 3).requires_grad_() for _ in range(count)]
    loss = build(name, variant)
    check(loss, name, logits)

    def call(loss=loss):
        return forward_backward(loss, logits)

    def calls():
        for _ in range(CALLS):
            call()

    in_graph = launched == "in a graph"
    memory = PeakMemory()
    with memory.watching_captures():
        run = graphed(calls) if in_graph else call
        run()
    peak = memory.steady(run)
    eager = None if variant == "eager" else functools.partial(call, build(name, "eager"))
    median, of_eager = measure_in_turn(benchmark, run, eager, seconds=0.2)
    median /= CALLS if in_graph else 1
    benchmark.extra_info.update(
        eager_microseconds=of_eager and fixed(of_eager * 1e6),
        microseconds=fixed(median * 1e6),
        images_per_sec=fixed(batch / median),
        peak_memory_mb=peak,
    )
