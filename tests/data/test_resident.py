"""Batches from the GPU's memory and from the host's: the same ones, in the same order."""

import itertools
import threading
import time

import pytest
import torch

from fastgan import data
from fastgan.data.host import _ReadAhead
from fastgan.training.graph import capturing


@pytest.fixture
def dataset():
    """Eleven images of noise."""
    images = torch.randint(0, 256, (11, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return data.ImagesInMemory("noise", images)


def drawn(resident, count):
    taken = []
    for _ in range(count):
        assert resident.before_step() is None
        taken.append(resident.draw())
    return torch.stack(taken)


def from_host(dataset, count, batch_size=4, **options):
    return torch.stack(list(itertools.islice(data.batches(dataset, batch_size, **{"seed": 0, **options}), count)))


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("first_step", [0, 1, 5])
def test_batches_are_those_of_the_host(dataset, device, monkeypatch, backend, flip, first_step):
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    options = {"seed": 3, "flip": flip}
    resident = data.ResidentImages(dataset.images, 4, device=device, **options)
    assert resident.steps_per_epoch == 2
    resident.seek(first_step)
    actual = drawn(resident, 7).cpu()
    expected = data.scale(from_host(dataset, 7, first_step=first_step, **options))
    assert torch.equal(actual, expected)
    assert resident.seconds_waited() == 0.0


def test_batches_have_the_order_of_batch_indices(dataset, device):
    resident = data.ResidentImages(dataset.images, 4, device=device, seed=5)
    for indices in itertools.islice(data.batch_indices(dataset, 4, seed=5), 6):
        assert torch.equal(drawn(resident, 1)[0].cpu(), data.scale(dataset.images[indices]))


def test_seeking_undoes_draws(dataset, device):
    resident = data.ResidentImages(dataset.images, 4, device=device, seed=0, flip=True)
    whole = drawn(resident, 7)
    for step in (0, 3, 6, 1):
        for _ in range(3):
            resident.draw()  # as a warm-up would
        resident.seek(step)
        assert torch.equal(drawn(resident, 7 - step), whole[step:])


def test_dtype_and_memory(dataset, device):
    resident = data.ResidentImages(dataset.images, 2, device=device, seed=0, dtype=torch.float64)
    half = data.ResidentImages(dataset.images, 2, device=device, seed=0, dtype=torch.float16)
    batch = drawn(resident, 1)[0]
    assert batch.dtype == torch.float64
    low = drawn(half, 1)[0]
    assert torch.equal(low, batch.half()) and resident.draw().is_contiguous(memory_format=torch.channels_last)


def test_large_sets_are_laid_out_in_parts(monkeypatch, dataset, device):
    monkeypatch.setattr("fastgan.data.resident._CHUNK", 200)  # two images
    resident = data.ResidentImages(dataset.images, 4, device=device, seed=0)
    assert torch.equal(resident.images.cpu(), dataset.images.permute(0, 2, 3, 1))


def test_no_global_random_numbers_are_drawn(dataset, device):
    before = torch.get_rng_state()
    drawn(data.ResidentImages(dataset.images, 4, device=device, seed=0, flip=True), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(4, 3, 2, 2)}, r"images must be a torch.uint8 tensor .*float32 \(4, 3, 2, 2\)"),
        ({"images": torch.zeros(4, 2, 2, dtype=torch.uint8)}, r"images must be .*\(4, 2, 2\)"),
        ({"images": [1, 2]}, r"images must be .*\[1, 2\]"),
        ({"batch_size": 12}, "batch_size must be at most the 11 images"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"dtype": torch.int32}, "dtype must be a floating torch.dtype; got torch.int32"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_arguments_are_named(dataset, arguments, message):
    images = arguments.pop("images", dataset.images)
    with pytest.raises(ValueError, match=message):
        data.ResidentImages(images, **{"batch_size": 4, "device": "cpu", "seed": 0, **arguments})


# Mirroring


def test_half_of_the_images_are_mirrored_and_others_in_every_epoch():
    dataset = data.ImagesInMemory("noise", torch.randint(0, 256, (300, 1, 3, 4), dtype=torch.uint8))
    plain, flipped = (from_host(dataset, 6, batch_size=100, flip=flip) for flip in (False, True))
    mirrored = (flipped != plain).flatten(2).any(2)  # (steps, batch)
    assert torch.equal(flipped, torch.where(mirrored[:, :, None, None, None], plain.flip(-1), plain))
    assert 250 < mirrored.sum() < 350
    numbers = torch.stack(list(itertools.islice(data.batch_indices(dataset, 100, seed=0), 6)))
    epochs = slice(0, 3), slice(3, 6)
    by_image = [dict(zip(numbers[e].ravel().tolist(), mirrored[e].ravel().tolist(), strict=True)) for e in epochs]
    assert 100 < sum(by_image[0][i] != by_image[1][i] for i in range(300)) < 200
    assert not torch.equal(from_host(dataset, 1, flip=True, seed=1), from_host(dataset, 1, flip=True, seed=2))


class OnDemand:
    """The images of a data set, read one by one; the image `bad` cannot be read."""

    def __init__(self, dataset, bad=None):
        self.images_, self.bad = dataset.images, bad
        self.nc, self.image_size = 3, dataset.images.shape[-1]

    def __len__(self):
        return len(self.images_)

    def __getitem__(self, index):
        if index == self.bad:
            raise ValueError("cannot read the picture")
        return self.images_[index]


@pytest.fixture
def square():
    return data.ImagesInMemory("noise", torch.randint(0, 256, (11, 3, 4, 4), dtype=torch.uint8))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_on_demand_are_mirrored_alike(square, workers):
    stream = data.batches(OnDemand(square), 4, seed=0, flip=True, first_step=1, workers=workers)
    actual = torch.stack(list(itertools.islice(stream, 5)))
    stream.close()
    assert torch.equal(actual, from_host(square, 5, flip=True, first_step=1))


# From the host's memory


@pytest.mark.parametrize("on_demand", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_images(square, device, on_demand, dtype):
    images = data.HostImages(
        OnDemand(square) if on_demand else square, 4, device=device, dtype=dtype, seed=1, flip=True, first_step=3
    )
    # Kept, so that a batch that is overwritten before it has been used shows.
    actual = [images.before_step() for _ in range(9)]
    images.close()
    expected = data.scale(from_host(square, 9, seed=1, flip=True, first_step=3)).to(dtype)
    assert torch.equal(torch.stack(actual).cpu(), expected)
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in actual)


def test_the_wait_is_measured(square, device):
    class Slow(OnDemand):
        def __getitem__(self, index):
            time.sleep(0.01)
            return super().__getitem__(index)

    images = data.HostImages(Slow(square), 4, device=device, seed=1)
    for _ in range(4):
        images.before_step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    # On a GPU the thread has read a batch or two before the first was asked for.
    assert 0.07 < images.seconds_waited() < 2
    assert images.seconds_waited() == 0.0
    images.close()


def test_an_unreadable_picture_is_raised_at_its_step(square, device):
    order = [batch.tolist() for batch in itertools.islice(data.batch_indices(square, 4, seed=0), 2)]
    images = data.HostImages(OnDemand(square, bad=order[1][0]), 4, device=device, seed=0)
    assert images.before_step().shape == (4, 3, 4, 4)
    time.sleep(0.05)
    for _ in range(2 if device.type == "cuda" else 1):
        with pytest.raises(ValueError, match=r"^cannot read the picture$"):
            images.before_step()
    images.close()


def counted(numbers, ended):
    try:
        yield from (torch.full((2,), number, dtype=torch.uint8) for number in numbers)
        raise RuntimeError("the end")
    finally:
        ended.append(True)


def test_reading_ahead_fills_the_buffers_and_no_more():
    ended, numbers = [], iter(range(100))
    ahead = _ReadAhead(counted(numbers, ended), [torch.empty(2, dtype=torch.uint8) for _ in range(3)])
    lent = [ahead.take() for _ in range(3)]
    assert [buffer.tolist() for buffer in lent] == [[0, 0], [1, 1], [2, 2]]
    assert ahead.take(wait=False) is None
    ahead.give_back(lent[0])
    fourth = ahead.take()
    assert fourth is lent[0] and fourth.tolist() == [3, 3] and lent[1].tolist() == [1, 1]
    ahead.close()
    assert ended and next(numbers) <= 5  # one more may have been read, for which there was no buffer


def test_reading_ahead_raises_in_its_turn_and_ends():
    ended = []
    ahead = _ReadAhead(counted(range(2), ended), [torch.empty(2, dtype=torch.uint8) for _ in range(3)])
    assert ahead.take().tolist() == [0, 0]
    ahead._thread.join(10)
    assert ended
    assert ahead.take(wait=False).tolist() == [1, 1]
    assert ahead.take(wait=False) is None
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the end"):
            ahead.take()
    ahead.close()
    assert "fastgan-data" not in {thread.name for thread in threading.enumerate()}


# Only on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_captured_draw_goes_on_through_the_epochs(dataset, monkeypatch, backend, dtype):
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    options = {"seed": 7, "flip": True}
    resident = data.ResidentImages(dataset.images, 4, device="cuda", dtype=dtype, **options)
    resident.draw()  # compiles
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        batch = resident.draw()
    resident.seek(1)
    for expected in data.scale(from_host(dataset, 9, first_step=1, **options)).to(dtype):
        resident.before_step()
        graph.replay()
        assert torch.equal(batch.cpu(), expected)


@pytest.mark.gpu
def test_reading_ahead_goes_on_during_a_capture(square):
    images = data.HostImages(OnDemand(square), 4, device="cuda", seed=0)
    images.before_step()
    static = torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        for _ in range(50):
            static += 1
            time.sleep(0.002)
    graph.replay()
    actual = torch.stack([images.before_step() for _ in range(20)])
    assert torch.equal(actual.cpu(), data.scale(from_host(square, 21)[1:])) and (static == 50).all()
    images.close()


@pytest.mark.gpu
def test_scale_has_the_same_bits_on_the_gpu():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.scale(values.cuda()).cpu(), data.scale(values))


@pytest.mark.gpu
def test_no_host_sync(dataset):
    resident = data.ResidentImages(dataset.images, 4, device="cuda", seed=0, flip=True)
    drawn(resident, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn(resident, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
