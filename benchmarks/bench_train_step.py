"""Images per second of one whole G + D update, stock layers against fused ones: `pytest benchmarks/`.

Both train from the same seed, and a variant is timed only after its losses have been compared with the stock ones.
"""

import platform
import statistics
import time
from importlib import metadata

import pytest
import torch

from fastgan.backend import HAS_TRITON
from fastgan.models import Discriminator, Generator
from fastgan.training import TrainStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# (image size, channels, width, batch): the default digits run, and the example DCGAN.
SETTINGS = ((28, 1, 32, 32), (64, 3, 64, 16)) if DEVICE.type == "cpu" else ((28, 1, 32, 128), (64, 3, 64, 128))


def make(fused, image_size, nc, width):
    torch.manual_seed(0)
    networks = (
        Generator(image_size=image_size, nc=nc, ngf=width),
        Discriminator(image_size=image_size, nc=nc, ndf=width),
    )
    return TrainStep(*(network.to(DEVICE) for network in networks), latent_dim=100, fused=fused)


def check(setting, images):
    """Fused and stock losses agree over three steps from one seed."""
    losses = []
    for fused in (False, True):
        step = make(fused, *setting[:3])
        losses.append([{name: value.item() for name, value in step(images).items()} for _ in range(3)])
    for stock, ours in zip(*losses, strict=True):
        assert ours == pytest.approx(stock, rel=1e-3 if DEVICE.type == "cpu" else 1e-2)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s[0]}px-batch{s[3]}")
def test_fused_against_stock(benchmark, setting):
    """Times a fused step; between every two of them a stock step runs and is timed too, so that both see the same
    machine, whatever else it does."""
    image_size, nc, width, batch = setting
    images = torch.rand(batch, nc, image_size, image_size, device=DEVICE) * 2 - 1
    check(setting, images)
    stock, fused = (make(fused, image_size, nc, width) for fused in (False, True))
    stock_seconds = []

    def update(step):
        step(images)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def stock_update():
        start = time.perf_counter()
        update(stock)
        stock_seconds.append(time.perf_counter() - start)

    warmup = 3
    rounds = 150 if image_size == 28 else 24
    benchmark.pedantic(update, args=(fused,), setup=stock_update, warmup_rounds=warmup, rounds=rounds)
    fused_seconds, stock_seconds = benchmark.stats.stats.median, statistics.median(stock_seconds[-rounds:])
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    benchmark.extra_info.update(
        variant="fused-fp32",
        batch=batch,
        image_size=image_size,
        dtype="float32",
        images_per_sec=round(batch / fused_seconds, 1),
        stock_images_per_sec=round(batch / stock_seconds, 1),
        ratio=round(stock_seconds / fused_seconds, 3),
        device=f"{name} ({platform.machine()})",
        torch=torch.__version__,
        triton=metadata.version("triton") if HAS_TRITON else None,
        peak_memory_mb=round(torch.cuda.max_memory_allocated() / 2**20, 1) if DEVICE.type == "cuda" else None,
    )
