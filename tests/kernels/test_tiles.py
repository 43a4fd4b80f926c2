"""Every tile that a tuner may choose gives the right numbers in every matrix kernel."""

import pytest
import torch
from torch.nn import functional as F

from fastgan.kernels.down import down
from fastgan.kernels.launch import TILES, MatrixTile
from fastgan.kernels.statistics import merge_statistics
from fastgan.kernels.up import up
from fastgan.kernels.weight_grad import weight_grad
from tests.accuracy import assert_as_accurate_as_stock
from tests.conftest import DTYPES, HAS_GPU

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = [(dtype, tile) for dtype in DTYPES for tile in TILES[dtype.itemsize]]
if not HAS_GPU:  # warps and stages mean nothing else to the interpreter
    CASES = list({(dtype, tile[:3], tile.has_room()): (dtype, tile) for dtype, tile in CASES}.values())
# (A, B, low size): whole blocks only, and blocks that end before the tile does. The interpreter takes small ones.
SIZES = ((512, 256, 8), (256, 64, 16), (72, 200, 9)) if HAS_GPU else ((128, 64, 2), (40, 24, 3))


def check(name, actual, compute, tensors, **options):
    stock, exact = compute(*tensors), compute(*(tensor.double() for tensor in tensors))
    assert_as_accurate_as_stock(name, actual, stock, exact, **options)


def _name(value):
    return "x".join(map(str, value[:5])) if isinstance(value, MatrixTile) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype, tile", CASES, ids=_name)
def test_every_tile(dtype, tile, device):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        tensor = (torch.randn(*shape, generator=generator) * scale).to(device, dtype)
        return tensor.to(memory_format=torch.channels_last)

    batch = 24 if HAS_GPU else 2
    where = dict(stride=(2, 2), padding=(1, 1))
    ours = dict(where, precision="ieee", tile=tile)
    for a, b, size in SIZES:
        low, high = normal(batch, a, size, size), normal(batch, b, 2 * size, 2 * size)
        weight = normal(a, b, 4, 4, scale=(16 * max(a, b)) ** -0.5)

        def mean(result):
            return result.mean((0, 2, 3))

        actual, tiles = up(low, weight, (2 * size, 2 * size), statistics=True, **ours)
        check("up", actual, lambda x, w: F.conv_transpose2d(x, w, **where), (low, weight))
        check("mean of up", merge_statistics(tiles, 1e-5)[0].view(-1), mean, (actual.float(),))

        actual, tiles = down(high, weight, (size, size), statistics=True, **ours)
        check("down", actual, lambda y, w: F.conv2d(y, w, **where), (high, weight))
        check("mean of down", merge_statistics(tiles, 1e-5)[0].view(-1), mean, (actual.float(),))

        # And the other epilogue with sums, that of a gradient on its way back to BatchNorm.
        for kernel, x, y, stock in (
            (up, low, high, lambda x, w, where=where: F.conv_transpose2d(x, w, **where)),
            (down, high, low, lambda x, w, where=where: F.conv2d(x, w, **where)),
        ):

            def dz(x, w, y, stock=stock):
                return stock(x, w) * torch.where(y > 0, 1.0, 0.5).to(x.dtype)

            def sums(x, w, y, dz=dz):
                dz = dz(x, w, y)
                return torch.stack([dz.sum((0, 2, 3)), (dz * y).sum((0, 2, 3))])

            zeros = torch.zeros(1, y.shape[1], device=device)
            act = dict(activation="leaky_relu", slope=0.5)
            actual, parts = kernel(x, weight, y.shape[2:], normalized=(y, zeros, zeros + 1, None, None), **act, **ours)
            check(f"dz of {kernel.__name__}", actual, dz, (x, weight, y))
            more = {}
            if dtype != torch.float32:
                # Stock's are of products in float32 proper, which a GPU's matrix units add less exactly. A tile without
                # room sums what it has stored, and so rounded.
                more = dict(units=32 if HAS_GPU else 16, computed_in=None if tile.has_room() else dtype)
            operands = (x.float(), weight.float(), y.float())
            check(f"sums of {kernel.__name__}", parts.sum((0, 2)), sums, operands, **more)

        def stock_weight_grad(x, y, w, where=where):
            return torch.nn.grad.conv2d_weight(y, w.shape, x, **where)

        check("weight_grad", weight_grad(low, high, weight, **ours), stock_weight_grad, (low, high, weight))
