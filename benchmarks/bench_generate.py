"""Images per second of a trained generator: 64×64 pictures in eval mode, without gradients, stock against fused.

In bfloat16 the whole network is bfloat16, as one serves it. A variant is timed only after its pictures passed the rule
of tests/accuracy.py against float64.
"""

import copy
import functools

import pytest
import torch

import fastgan
from benchmarks.stock import NZ, Setting, precision_of
from benchmarks.timing import (
    DEVICE,
    DTYPES,
    ON_GPU,
    PeakMemory,
    clock,
    describe,
    fixed,
    forget,
    graphed,
    measure_in_turn,
)
from tests.accuracy import assert_as_accurate_as_stock

pytestmark = pytest.mark.benchmark(group="generate", timer=clock)

BATCHES = (128, 1024) if ON_GPU else (16,)
GPU_VARIANTS = ["eager-fp32", "eager-bf16", "compile-graph-bf16", "fused-graph-bf16"]
VARIANTS = GPU_VARIANTS if ON_GPU else ["eager-fp32", "compile-fp32", "fused-fp32"]


def trained_generator(batch):
    """A generator whose running statistics are those of real batches, in float64; and latents for it."""
    torch.manual_seed(0)
    setting = Setting(64, batch)
    generator, _ = setting.networks()
    for _ in range(4):
        generator(torch.randn(batch, NZ, device=DEVICE))
    return generator.eval().double(), torch.randn(batch, NZ, 1, 1, device=DEVICE, dtype=torch.float64)


def build(variant, generator):
    """The generator as `variant` runs it, in the precision that its name says."""
    generator = copy.deepcopy(generator).to(DEVICE, DTYPES[precision_of(variant)])
    if variant == "eager-fp32":
        return generator  # NCHW, as the PyTorch example has it
    generator = generator.to(memory_format=torch.channels_last)
    if variant.startswith("fused"):
        return fastgan.fuse(generator)
    return torch.compile(generator, dynamic=False, fullgraph=True) if variant.startswith("compile") else generator


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_generate(benchmark, variant, batch):
    precision = precision_of(variant)
    describe(benchmark, variant=variant, batch=batch, image_size=64, precision=precision)
    forget()
    exact, latent = trained_generator(batch)
    expected = exact(latent).cpu()
    latent = latent.to(DTYPES[precision])
    plain = build(f"eager-{precision}", exact)(latent).cpu()
    exact = exact.cpu()  # what the GPU holds from here on is the variant's
    memory = PeakMemory()
    with memory.watching_captures():
        generator = build(variant, exact)
        run = graphed(lambda: generator(latent)) if "graph" in variant else lambda: generator(latent)
        pictures = run()
    assert_as_accurate_as_stock("wrong: pictures", pictures.cpu(), plain, expected)
    beside = not (ON_GPU or variant.startswith("eager"))
    eager = functools.partial(build(f"eager-{precision}", exact), latent) if beside else None
    del exact, expected, plain, pictures
    peak = memory.steady(run)
    median, _ = measure_in_turn(benchmark, run, eager)
    benchmark.extra_info.update(images_per_sec=fixed(batch / median), peak_memory_mb=peak)
