"""Tiles whose rows are one position of many images: right in every shape, and the taps outside of it are left out."""

import pytest
import torch
from torch.nn import functional as F

from fastgan.kernels import down, launch, up
from fastgan.kernels.launch import MatrixTile
from fastgan.kernels.offline import record
from fastgan.kernels.statistics import merge_statistics
from tests.accuracy import assert_as_accurate_as_stock
from tests.conftest import DTYPES, HAS_GPU

pytestmark = pytest.mark.usefixtures("poisoned")

TILE = MatrixTile(16, 32, 16, 4, 2, by_position=True)
# (kernel, stride, padding, size of low): a DCGAN's, others, positions that no tap sees, images of one position.
SHAPES = (
    (4, 2, 1, (2, 3)),
    (3, 1, 1, (3, 2)),
    (5, 3, 1, (2, 2)),
    (2, 2, 0, (1, 3)),
    (1, 1, 1, (3, 3)),
    (4, 1, 0, (1, 1)),
)
CASES = [(shape, dtype, dtype == torch.float32) for shape in SHAPES for dtype in DTYPES]
if not HAS_GPU:  # each shape once, in one dtype and the other by turns
    CASES = [case for i, case in enumerate(CASES) if i % 4 in (0, 3)]
LEAKY = dict(activation="leaky_relu", slope=0.2)


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random).to(device, dtype).to(memory_format=torch.channels_last)


def ends(shape, dtype, device, images=48, low_channels=32, high_channels=32):
    """(low, high, weight) of a convolution."""
    kernel, stride, padding, size = shape
    high_size = [(n - 1) * stride - 2 * padding + kernel for n in size]
    how = dict(dtype=dtype, device=device)
    low = normal(images, low_channels, *size, **how)
    high = normal(images, high_channels, *high_size, **how)
    weight = normal(low_channels, high_channels, kernel, kernel, seed=1, **how) / (low_channels**0.5 * kernel)
    return low, high, weight


def is_by_position(run):
    (first, *_) = record(run)
    return first.options["BY_POSITION"]


@pytest.mark.parametrize("shape, dtype, int64", CASES, ids=str)
@pytest.mark.parametrize("module", (up, down), ids=lambda module: module.__name__.split(".")[-1])
def test_equals_stock(module, shape, dtype, int64, device, monkeypatch):
    """With statistics of two groups; of three blocks of images two are read together."""
    low, high, weight = ends(shape, dtype, device, images=2 * 48)
    _, stride, padding, _ = shape
    x, y = (low, high) if module is up else (high, low)
    run, convolve = (up.up, F.conv_transpose2d) if module is up else (down.down, F.conv2d)
    monkeypatch.setattr(module, "blocks_together", lambda *_: 2)
    monkeypatch.setattr(launch, "INT32_ELEMENTS", 0 if int64 else 2**31)
    where = dict(stride=(stride, stride), padding=(padding, padding), precision="ieee", tile=TILE)

    def means(result):
        return result.view(2, -1, *result.shape[1:]).mean((1, 3, 4))

    def ours():
        return run(x, weight, y.shape[2:], statistics=True, groups=2, **where)

    assert is_by_position(ours)
    out, tiles = ours()
    stock, exact = (
        convolve(*tensors, None, stride, padding) for tensors in ((x, weight), (x.double(), weight.double()))
    )
    assert_as_accurate_as_stock("out", out, stock, exact)
    assert_as_accurate_as_stock("mean", merge_statistics(tiles, 1e-5)[0], means(out.float()), means(out.double()))


@pytest.mark.parametrize(
    "after, block_n",  # 64: rows second in the accumulator
    [("epilogue", 16), ("activated", 64), ("sums", 16), ("sums", 64), ("sums of what is read again", 64)],
)
@pytest.mark.parametrize("module", (up, down), ids=lambda module: module.__name__.split(".")[-1])
def test_every_epilogue_is_that_of_positions_in_a_row(module, after, block_n, device):
    channels = dict(low_channels=block_n, high_channels=block_n)
    low, high, weight = ends(SHAPES[0], torch.float16, device, images=128, **channels)
    x, y = (low, high) if module is up else (high, low)
    again = after == "sums of what is read again"
    tile = MatrixTile(64, block_n, 16, 1 if again else 4, 2)  # of one warp each thread has 128 outputs
    assert tile.has_room() != again
    vectors = torch.rand(4, block_n, device=device) + 0.5
    options = {
        "epilogue": dict(bias=vectors[0], batch_norm=tuple(vectors), eps=1e-5, activation="tanh"),
        "activated": dict(activated=F.leaky_relu(y, 0.2), **LEAKY),
    }.get(after, dict(normalized=(y, vectors[:2], vectors[2:], vectors[0], vectors[1]), **LEAKY))

    def ours(tile):
        run = up.up if module is up else down.down
        where = dict(stride=(2, 2), padding=(1, 1), precision="ieee")
        return run(x, weight, y.shape[2:], tile=tile, **where, **options)

    by_position = tile._replace(by_position=True)
    assert is_by_position(lambda: ours(by_position)) and not is_by_position(lambda: ours(tile))
    found, expected = ours(by_position), ours(tile)
    if "normalized" in options:
        (found, sums), (expected, expected_sums) = found, expected
        assert sums.shape == expected_sums.shape
        torch.testing.assert_close(sums.sum(2), expected_sums.sum(2), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_taps_outside_of_the_image_are_left_out(device):
    """They are not multiplied: what is infinite there changes nothing."""
    low, high, weight = ends((4, 2, 1, (1, 1)), torch.float32, device)
    weight[:, :, [0, 3]] = weight[:, :, :, [0, 3]] = float("inf")
    where = dict(stride=(2, 2), padding=(1, 1), precision="ieee", tile=TILE)
    inner = weight[:, :, 1:3, 1:3]
    out = down.down(high, weight, (1, 1), **where)
    torch.testing.assert_close(out, F.conv2d(high, inner), rtol=1e-4, atol=1e-4)
    out = up.up(low, weight, (2, 2), statistics=True, **where)[0]
    torch.testing.assert_close(out, F.conv_transpose2d(low, inner), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "images, channels, high_size, why",
    [
        (40, 16, (4, 4), "half a tile of images"),
        (48, 16, (5, 4), "phases of two sizes"),
        (48, 12, (4, 4), "half a step"),
    ],
)
def test_what_does_not_fit_is_in_a_row(images, channels, high_size, why, device):
    how = dict(stride=(2, 2), padding=(1, 1), precision="ieee", tile=TILE, statistics=True)
    low, weight = normal(images, 16, 2, 2, device=device), normal(16, channels, 4, 4, device=device)
    high = normal(images, channels, *high_size, device=device)

    def upwards():
        return up.up(low, weight, high_size, **how)[0]

    def downwards():
        return down.down(high, weight, (2, 2), **how)[0]

    assert not (is_by_position(upwards) and is_by_position(downwards)), why
    expected = F.conv_transpose2d(low, weight, None, 2, 1, (high_size[0] - 4, 0))
    torch.testing.assert_close(upwards(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(downwards(), F.conv2d(high, weight, None, 2, 1), rtol=1e-4, atol=1e-4)


def test_blocks_read_together_fit_in_the_cache():
    assert launch.blocks_together(128, 1024, launch.WINDOW // 128) == 1
    assert launch.blocks_together(128, 1024, launch.WINDOW // 512) == 4
    assert launch.blocks_together(128, 256, 1) == 2  # there are no more
    assert launch.blocks_together(128, 256, launch.WINDOW) == 1
