"""Batches in a reproducible order, and scaling them to [-1, 1] and back."""

import itertools
import signal

import numpy as np
import pytest
import torch

from fastgan import data
from fastgan.data import datasets, sources
from tests.data import take


@pytest.fixture(params=["memory", "on demand", "on demand, 2 workers"])
def numbered(request, monkeypatch):
    """Ten images, each filled with its number, and how to read them."""

    class Numbers:
        nc, image_size = 1, 2

        def __len__(self):
            return 10

        def __getitem__(self, index):
            return np.full((1, 2, 2), index, dtype=np.uint8)

    if request.param == "memory":
        return datasets.ImagesInMemory("numbers", datasets._decode_all(Numbers(), 1)), {}
    return datasets.ImagesOnDemand("numbers", Numbers()), {"workers": 2 if "workers" in request.param else 0}


def numbers(dataset, count, **options):
    return take(dataset, count, **options)[:, :, 0, 0, 0].tolist()


def test_batches_have_shape_and_dtype(numbered):
    dataset, options = numbered
    taken = take(dataset, 3, **options)
    assert taken.shape == (3, 4, 1, 2, 2) and taken.dtype == torch.uint8
    assert (taken == taken[..., :1, :1]).all()


def test_an_epoch_shows_no_image_twice_and_drops_the_incomplete_batch(numbered):
    dataset, options = numbered
    assert data.steps_per_epoch(dataset, 4) == 2
    shown = numbers(dataset, 20, **options)
    epochs = [shown[i] + shown[i + 1] for i in range(0, 20, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert set().union(*epochs) == set(range(10))  # what one epoch drops, others show
    assert len({tuple(epoch) for epoch in epochs}) == 10


@pytest.mark.parametrize("first_step", [1, 2, 5])
def test_a_resumed_run_continues_where_it_was(numbered, first_step):
    dataset, options = numbered
    unbroken = numbers(dataset, 8, **options)
    assert numbers(dataset, 8 - first_step, first_step=first_step, **options) == unbroken[first_step:]


def test_seed_decides_the_order(numbered):
    dataset, options = numbered
    assert numbers(dataset, 4, seed=1, **options) == numbers(dataset, 4, seed=1, **options)
    assert numbers(dataset, 4, seed=1, **options) != numbers(dataset, 4, seed=2, **options)


def test_the_global_generator_is_left_alone(numbered):
    dataset, options = numbered
    before = torch.get_rng_state()
    take(dataset, 2, **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_default_device_is_for_others(numbered):
    """Batches are on the CPU, wherever tensors are made by default."""
    dataset, options = numbered
    expected = take(dataset, 4, flip=True, **options)
    with torch.device("meta"):
        taken = take(dataset, 4, flip=True, **options)
    assert torch.equal(taken, expected)


def test_batch_indices_are_the_order_of_batches(numbered):
    dataset, options = numbered
    indices = itertools.islice(data.batch_indices(dataset, 4, seed=3, first_step=1), 5)
    assert [batch.tolist() for batch in indices] == numbers(dataset, 5, seed=3, first_step=1, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_on_demand_equals_in_memory(few_fakes, pictures, monkeypatch, workers):
    options = [("fake", {"seed": 4}), ("folder", {"root": pictures})]
    in_memory = [data.load(name, image_size=8, **more) for name, more in options]
    monkeypatch.setattr(datasets, "MEMORY_BUDGET", 5 * 3 * 8 * 8 - 1)  # a byte less than the smaller set
    on_demand = [data.load(name, image_size=8, **more) for name, more in options]
    for memory, demand in zip(in_memory, on_demand, strict=True):
        assert isinstance(memory, data.ImagesInMemory) and isinstance(demand, data.ImagesOnDemand)
        assert (memory.name, memory.nc, memory.image_size) == (demand.name, demand.nc, demand.image_size)
        assert len(memory) == len(demand)
        assert torch.equal(memory[2], demand[2])
        assert torch.equal(take(memory, 6, first_step=3), take(demand, 6, first_step=3, workers=workers))


def test_workers_go_on_after_an_interrupt():
    """Ctrl-C reaches them too, and the process that trains ends its step with what they read."""

    class Asks:
        nc, image_size = 1, 2

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return np.full((1, 2, 2), signal.getsignal(signal.SIGINT) is signal.SIG_IGN, dtype=np.uint8)

    assert numbers(datasets.ImagesOnDemand("asks", Asks()), 1, workers=1) == [[1] * 4]


def test_earlier_batches_are_not_decoded(few_fakes, no_memory, monkeypatch):
    dataset = data.load("fake", image_size=8)
    decoded = []
    read = sources.FakeSource.__getitem__
    monkeypatch.setattr(sources.FakeSource, "__getitem__", lambda self, i: decoded.append(i) or read(self, i))
    take(dataset, 1, first_step=3)
    assert len(decoded) == 4


def test_a_set_that_just_fits_is_held_in_memory(few_fakes, monkeypatch):
    monkeypatch.setattr(datasets, "MEMORY_BUDGET", 21 * 3 * 8 * 8)
    assert isinstance(data.load("fake", image_size=8), data.ImagesInMemory)


def test_fewer_images_than_one_batch(few_fakes):
    dataset = data.load("fake", image_size=8)
    for call in (lambda: data.steps_per_epoch(dataset, 22), lambda: data.batches(dataset, 22, seed=0)):
        with pytest.raises(ValueError, match="batch_size must be at most the 21 images of the data set; got 22"):
            call()


# Scaling


def test_scale_and_back_is_exact():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    scaled = data.scale(images)
    assert scaled.dtype == torch.float32 and scaled.shape == images.shape
    assert scaled.min() == -1 and scaled.max() == 1
    torch.testing.assert_close(scaled.double(), images.double() / 127.5 - 1, rtol=0, atol=1e-7)
    assert torch.equal(data.to_uint8(scaled), images)


def test_to_uint8_clamps_and_rounds():
    step = 1 / 127.5
    floats = torch.tensor([-5, -1, -1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.6 * step, 1 - 0.4 * step, 1, 5])
    assert data.to_uint8(floats).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_uint8_takes_every_float(dtype):
    assert data.to_uint8(torch.tensor([-1, 0.5, 1], dtype=dtype)).tolist() == [0, 191, 255]


def test_scaling_refuses_the_wrong_dtype():
    with pytest.raises(ValueError, match=r"images must be torch\.uint8; got torch\.float32"):
        data.scale(torch.zeros(1))
    with pytest.raises(ValueError, match=r"images must be floating point; got torch\.uint8"):
        data.to_uint8(torch.zeros(1, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer; got 0"),
        ({"batch_size": "4"}, "batch_size must be a positive integer; got '4'"),
        ({"seed": -1}, "seed must be a non-negative integer; got -1"),
        ({"first_step": -1}, "first_step must be a non-negative integer; got -1"),
        ({"workers": 1.5}, r"workers must be a non-negative integer; got 1\.5"),
    ],
)
def test_batches_names_the_bad_argument_at_once(few_fakes, arguments, message):
    dataset = data.load("fake", image_size=8)
    with pytest.raises(ValueError, match=message):
        data.batches(dataset, **{"batch_size": 4, "seed": 0, **arguments})
