"""The kernel that draws batches on the GPU against plain torch, to the last bit."""

import numpy as np
import pytest
import torch

from fastgan.data.resident import _draw_reference
from tests.conftest import DTYPES

data = pytest.importorskip("fastgan.kernels.data")
pytestmark = pytest.mark.usefixtures("poisoned")


def tensors(shape, batch_size, device, *, flip, order_dtype=torch.int32):
    """Images (count, H, W, C), an order, what to mirror, and counters for the kernel and for the reference."""
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    order = torch.randperm(len(images), device=device).to(order_dtype)
    mirrored = torch.randint(0, 2, order.shape, dtype=torch.uint8, device=device) if flip else None
    drawn = torch.zeros(data.programs(batch_size, images), dtype=torch.int32, device=device)
    return images, order, mirrored, drawn, torch.zeros_like(drawn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flip", (False, True))
@pytest.mark.parametrize(
    "shape, batch_size",
    (
        ((7, 28, 28, 1), 3),  # an incomplete batch at the end
        ((8, 5, 7, 3), 4),
        ((5, 1, 1, 1), 2),
        ((4, 32, 32, 3), 2),  # two blocks an image, the second one half empty
        ((3, 9, 16, 4), 1),
        ((2, 3, 2, 2), 2),  # the whole set is one batch
    ),
)
def test_equals_torch_bit_for_bit(shape, batch_size, flip, dtype, device):
    images, order, mirrored, drawn, expected_drawn = tensors(shape, batch_size, device, flip=flip)
    for _ in range(len(images) // batch_size + 1):  # one more than the epoch has: it begins again
        actual = data.next_batch(images, order, mirrored, drawn, batch_size, dtype)
        expected = _draw_reference(images, order, mirrored, expected_drawn, batch_size, dtype)
        assert actual.shape == (batch_size, shape[3], shape[1], shape[2]) and actual.dtype == dtype
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(actual, expected)
        assert torch.equal(drawn, expected_drawn)


def test_every_value_is_scaled_as_the_host_does(device):
    images = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16, 1)
    order, drawn = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    actual = data.next_batch(images, order, None, drawn, 1, torch.float32)
    expected = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(actual.cpu().numpy().ravel(), expected)
    assert actual.min() == -1 and actual.max() == 1


def test_starts_where_the_counters_say(device):
    images, order, mirrored, drawn, _ = tensors((10, 4, 3, 3), 3, device, flip=True, order_dtype=torch.int64)
    batches = [data.next_batch(images, order, mirrored, drawn, 3, torch.float32) for _ in range(3)]
    drawn.fill_(2)
    assert torch.equal(data.next_batch(images, order, mirrored, drawn, 3, torch.float32), batches[2])
    assert (drawn == 3).all()


def test_more_than_two_gigabytes(device):
    # Most of it is never touched, and so takes no memory on a CPU.
    count, side = 2**31 // (64 * 64 * 3) + 2, 64
    images = torch.empty((count, side, side, 3), dtype=torch.uint8, device=device)
    last = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, device=device)
    images[-2:] = last
    order = torch.tensor([count - 1, count - 2], dtype=torch.int32, device=device)
    drawn = torch.zeros(data.programs(2, images), dtype=torch.int32, device=device)
    actual = data.next_batch(images, order, None, drawn, 2, torch.float32)
    order = torch.tensor([1, 0], dtype=torch.int32, device=device)
    assert torch.equal(actual, _draw_reference(last, order, None, torch.zeros_like(drawn), 2, torch.float32))
