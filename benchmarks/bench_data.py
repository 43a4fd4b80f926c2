"""Images per second that each way of keeping a data set can hand to a step: scaled, channels_last, on the device."""

import pytest
import torch

from benchmarks.timing import DEVICE, ON_GPU, PeakMemory, clock, describe, fixed, measure
from fastgan import data

pytestmark = pytest.mark.benchmark(group="data", timer=clock)

BATCHES = (128, 1024) if ON_GPU else (128,)


def host(dataset, batch):
    """Read on the host, sent ahead of the step."""
    images = data.HostImages(dataset, batch, device=DEVICE, seed=0, flip=True)
    return images.before_step, images.close


def resident(dataset, batch):
    """Held on the device as uint8; index, flip and scale in one kernel."""
    images = data.ResidentImages(dataset.images, batch, device=DEVICE, seed=0, flip=True)

    def draw():
        images.before_step()
        return images.draw()

    return draw, images.close


SOURCES = {"host": host, "resident": resident}


@pytest.fixture(scope="module")
def dataset():
    return data.load("fake", image_size=64)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("source", SOURCES)
def test_batches(benchmark, dataset, source, batch):
    describe(benchmark, variant=source, batch=batch, image_size=64, precision="fp32")
    memory = PeakMemory()
    draw, close = SOURCES[source](dataset, batch)
    try:
        numbers = data.batch_indices(dataset, batch, seed=0)
        check(draw(), dataset.images[next(numbers)])
        peak = memory.steady(draw)
        median = measure(benchmark, draw)
    finally:
        close()
    benchmark.extra_info.update(images_per_sec=fixed(batch / median), peak_memory_mb=peak)


def check(batch, images):
    """The batch is these images, scaled, each as it is or mirrored."""
    assert batch.shape == images.shape and batch.is_contiguous(memory_format=torch.channels_last)
    plain = data.scale(images)
    same = [(batch.cpu() - other).abs().amax((1, 2, 3)) < 1e-5 for other in (plain, plain.flip(3))]
    assert torch.logical_or(*same).all(), "wrong: these are not the images of the first batch"
