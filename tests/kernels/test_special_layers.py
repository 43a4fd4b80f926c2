"""Layers at the ends of a GAN, which take ways of their own, and how float32 becomes TF32."""

from itertools import cycle

import pytest
import torch
from torch.nn import functional as F

from fastgan.kernels import patches, weight_grad_narrow
from fastgan.kernels.down import PATCH_TILES, down, picks_patches
from fastgan.kernels.launch import MatrixTile
from fastgan.kernels.narrow import TILES, fits_one_program
from fastgan.kernels.single import TILES as SINGLE_TILES
from fastgan.kernels.statistics import merge_statistics
from fastgan.kernels.up import up
from fastgan.kernels.weight_grad import weight_grad
from tests.accuracy import assert_as_accurate_as_stock
from tests.conftest import DTYPES, HAS_GPU

pytestmark = pytest.mark.usefixtures("poisoned")

# A, B, low size, kernel, stride, padding, output_padding: images of 1 to 8 channels, whole and in several patches
IMAGES = (
    (64, 3, (32, 32), 4, 2, 1, 0),
    (20, 1, (8, 8), 4, 2, 1, 0),
    (9, 3, (5, 7), 4, 2, 1, 0),
    (5, 1, (4, 5), 5, 2, 2, 1),
    (16, 3, (6, 6), 3, 1, 1, 0),
    (6, 2, (3, 4), 2, 2, 0, 0),
    (4, 1, (20, 40), 7, 1, 3, 0),
    (3, 1, (6, 6), 1, 2, 0, 1),
    (7, 4, (6, 5), 3, 3, 1, 2),
    (4, 8, (4, 4), 3, 2, 2, 0),
)


def draw(dtype, device, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_image_layers(case, dtype, device):
    a, b, size, kernel, stride, padding, extra = case
    x, weight, bias = draw(dtype, device, (2, a, *size), (a, b, kernel, kernel), (b,))
    x, weight = x.contiguous(memory_format=torch.channels_last), weight / (a * kernel**2) ** 0.5
    assert fits_one_program(weight, (stride, stride))

    def stock(x, weight, bias):
        return torch.tanh(F.conv_transpose2d(x, weight, bias, stride, padding, extra))

    plain, exact = stock(x, weight, bias), stock(x.double(), weight.double(), bias.double())
    where = dict(stride=(stride, stride), padding=(padding, padding), precision="ieee")
    for tile in (None, MatrixTile(64, 16, 16, 4, 2), *(TILES[dtype.itemsize] if HAS_GPU else ())):
        out = up(x, weight, plain.shape[2:], bias=bias, activation="tanh", tile=tile, **where)
        assert_as_accurate_as_stock(str(tile), out, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_weight_gradients_of_image_layers(case, dtype, device):
    a, b, size, kernel, stride, padding, extra = case
    x, weight = draw(dtype, device, (3, a, *size), (a, b, kernel, kernel))
    where = (stride, padding, extra)
    (grad,) = draw(dtype, device, F.conv_transpose2d(x, weight, None, *where).shape)
    x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))

    def stock(x, weight, grad):
        weight = weight.requires_grad_()
        return torch.autograd.grad(F.conv_transpose2d(x, weight, None, *where), weight, grad)[0]

    # In the default layout: for 1×1 kernels and strides in channels_last oneDNN writes past its memory where a CPU has
    # no AVX-512 (torch 2.11 to 2.15).
    in_order = [tensor.contiguous() for tensor in (x, weight, grad)]
    plain, exact = stock(*in_order), stock(*(tensor.double() for tensor in in_order))
    few_columns = b * kernel * kernel >= 10
    assert patches.fits_patches(weight, size[1], grad.shape[3]) == few_columns
    # The second is a tile of patches, which gives way where they do not fit.
    tiles = (None, MatrixTile(16, patches.WHOLE_PATCH, 16, 4, 2), MatrixTile(32, 16, 16, 4, 2))
    own = weight_grad_narrow.TILES[dtype.itemsize] if few_columns and HAS_GPU else ()
    layouts = (torch.channels_last, torch.contiguous_format)
    for tile, layout in zip((*tiles, *own), cycle(layouts), strict=False):
        like = weight.detach().contiguous(memory_format=layout)
        arguments = dict(stride=(stride, stride), padding=(padding, padding), precision="ieee", tile=tile)
        ours = weight_grad(x, grad, like, **arguments)
        assert_as_accurate_as_stock(str(tile), ours, plain, exact)
        assert ours.stride() == like.stride()


# A, B, high size, kernel, stride, padding: of images, with rows of low that fill tiles; the last is below one tile
FROM_IMAGES = (
    (36, 3, (12, 64), 4, 2, 1),
    (20, 1, (16, 16), 4, 2, 1),
    (5, 3, (9, 8), 3, 1, 1),
    (7, 2, (13, 16), 5, 2, 2),
    (3, 4, (11, 11), 4, 1, 0),
    (16, 8, (4, 4), 2, 2, 0),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FROM_IMAGES, ids=str)
def test_layers_that_see_an_image(case, dtype, device):
    """Patches picked from rows, against stock, and in every epilogue against patches loaded number by number."""
    a, b, size, kernel, stride, padding = case
    x, weight, bias = draw(dtype, device, (4, b, *size), (a, b, kernel, kernel), (a,))
    x, weight = x.contiguous(memory_format=torch.channels_last), weight / (b * kernel**2) ** 0.5

    def stock(x, weight, bias):
        return F.leaky_relu(F.conv2d(x, weight, bias, stride, padding), 0.2)

    plain, exact = stock(x, weight, bias), stock(x.double(), weight.double(), bias.double())
    out_size, leaky = plain.shape[2:], dict(activation="leaky_relu", slope=0.2)
    where = dict(stride=(stride, stride), padding=(padding, padding), precision="ieee")
    assert picks_patches(weight, out_size[1], size[1])
    picked = (None, MatrixTile(64, 16, 1, 4, 1), *(PATCH_TILES[dtype.itemsize] if HAS_GPU else ()))
    for tile in picked:
        out = down(x, weight, out_size, bias=bias, tile=tile, **leaky, **where)
        assert_as_accurate_as_stock(str(tile), out, plain, exact)

    activated, mean, invstd, gamma, beta = draw(dtype, device, plain.shape, (2, a), (2, a), (a,), (a,))
    activated = activated.contiguous(memory_format=torch.channels_last)
    normalized = (activated, mean.float(), invstd.float().abs(), gamma.float(), beta.float())

    def epilogues(tile):
        y, tiles = down(x, weight, out_size, bias=bias, statistics=True, groups=2, tile=tile, **where)
        dz, parts = down(x, weight, out_size, normalized=normalized, tile=tile, **leaky, **where)
        grad = down(x, weight, out_size, activated=activated, tile=tile, **leaky, **where)
        return y, *merge_statistics(tiles, 1e-5), dz, parts.sum(2), grad

    expected = epilogues(MatrixTile(64, 64, 16, 4, 2))
    for tile in picked[:2]:
        for ours, theirs in zip(epilogues(tile), expected, strict=True):
            tolerance = 2e-3 if theirs.dtype != torch.float32 or dtype != torch.float32 else 1e-4
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_rows_of_more_numbers_than_a_block_holds_are_no_patches():
    for channels, width, fits in ((3, 256, True), (4, 256, True), (8, 192, True), (8, 256, False)):
        weight = torch.empty(64, channels, 4, 4, device="meta")
        assert patches.fits_patches(weight, width // 2, width) == fits


def test_a_tile_of_patches_means_nothing_where_rows_do_not_fill_it(device):
    x, weight = draw(torch.float32, device, (2, 3, 14, 14), (8, 3, 4, 4))
    x = x.contiguous(memory_format=torch.channels_last)
    where = dict(stride=(2, 2), padding=(1, 1))
    assert not picks_patches(weight, 7, 14)
    out = down(x, weight, (7, 7), precision="ieee", tile=PATCH_TILES[4][0], **where)
    plain, exact = F.conv2d(x, weight, **where), F.conv2d(x.double(), weight.double(), **where)
    assert_as_accurate_as_stock("out", out, plain, exact)


def test_weight_gradient_leaves_out_what_no_position_of_low_sees(device):
    """Blocks of rows reach past low's end; what stands in high there, infinity too, does not count."""
    x, weight = draw(torch.float32, device, (2, 4, 3, 3), (4, 3, 4, 4))
    grad = torch.full((2, 3, 9, 9), float("inf"), device=device)
    grad[:, :, :7, :7] = 1.0  # padding 1, stride 2: three positions see rows −1 to 6
    x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    ours = weight_grad(x, grad, weight, stride=(2, 2), padding=(1, 1), precision="ieee")
    assert torch.isfinite(ours).all()


# B, high size, kernel, stride, padding: whole images, patches of them, more channels than a block and fewer
LOGITS = (
    (512, (4, 4), 4, 1, 0),
    (33, (7, 7), 7, 1, 0),
    (64, (6, 5), 4, 1, 1),
    (5, (9, 8), 3, 2, 1),
    (1, (4, 4), 4, 2, 3),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOGITS, ids=str)
def test_layers_of_one_output_channel(case, dtype, device):
    b, size, kernel, stride, padding = case
    x, weight, bias, mean, gamma, beta = draw(dtype, device, (3, b, *size), (1, b, kernel, kernel), *[(1,)] * 4)
    x, weight = x.contiguous(memory_format=torch.channels_last), weight / (b * kernel**2) ** 0.5
    var = gamma.abs() + 0.5

    def stock(x, weight, bias, mean, var, gamma, beta):
        y = F.batch_norm(F.conv2d(x, weight, bias, stride, padding), mean, var, gamma, beta)
        return F.leaky_relu(y, 0.2)

    known = (x, weight, bias, mean, var, gamma, beta)
    plain, exact = stock(*known), stock(*(tensor.double() for tensor in known))
    where = dict(stride=(stride, stride), padding=(padding, padding), precision="tf32")  # which it does not stoop to
    epilogue = dict(bias=bias, batch_norm=(mean, var, gamma, beta), eps=1e-5, activation="leaky_relu", slope=0.2)
    # One of its own tiles, and one of the matrix kernel that has no meaning for it.
    for tile in (None, MatrixTile(2, 1, 32, 4, 2), MatrixTile(16, 16, 128, 4, 4), *(SINGLE_TILES if HAS_GPU else ())):
        out = down(x, weight, plain.shape[2:], tile=tile, **epilogue, **where)
        assert_as_accurate_as_stock(str(tile), out, plain, exact)
        assert out.is_contiguous(memory_format=torch.channels_last)
    bare = down(x, weight, plain.shape[2:], **where)
    exact = F.conv2d(x.double(), weight.double(), None, stride, padding)
    assert_as_accurate_as_stock("bare", bare, F.conv2d(x, weight, None, stride, padding), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups, activation", ((1, None), (2, None), (2, "tanh")))
@pytest.mark.parametrize("a, b, kernel", ((10, 5, (4, 4)), (1, 20, (4, 4)), (18, 3, (3, 5))), ids=str)
def test_one_position(a, b, kernel, groups, activation, dtype, device):
    """(N, A, 1, 1) ↔ (N, B, *kernel): a generator's first layer and a discriminator's last, in all three directions."""
    latent, image, weight, bias = draw(dtype, device, (6, a, 1, 1), (6, b, *kernel), (a, b, *kernel), (b,))
    weight = weight / b**0.5
    where = dict(stride=(1, 1), padding=(0, 0), precision="ieee")
    out, tiles = up(latent, weight, kernel, bias=bias, activation=activation, statistics=True, groups=groups, **where)
    stock = F.conv_transpose2d(latent, weight, bias)
    exact = F.conv_transpose2d(latent.double(), weight.double(), bias.double())
    stock, exact = (stock.tanh(), exact.tanh()) if activation else (stock, exact)
    assert_as_accurate_as_stock("up", out, stock, exact)
    mean, _, variance = merge_statistics(tiles, 1e-5)
    for group, part in enumerate(out.double().chunk(groups)):
        torch.testing.assert_close(mean[group].double(), part.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(variance[group].double(), part.var((0, 2, 3)), rtol=1e-5, atol=1e-5)

    image = image.contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(image.double(), weight.double())
    assert_as_accurate_as_stock("down", down(image, weight, (1, 1), **where), F.conv2d(image, weight), exact)

    grad = weight_grad(latent, image, weight, **where)
    exact = torch.einsum("na,nbhw->abhw", latent[..., 0, 0].double(), image.double())
    stock = torch.einsum("na,nbhw->abhw", latent[..., 0, 0], image)
    assert_as_accurate_as_stock("weight_grad", grad, stock, exact)
    assert grad.stride() == weight.stride()


def test_tf32_is_rounded_to_nearest(device):
    """Products with one are the operands as the matrix units take them."""
    x, one = draw(torch.float32, device, (16, 16, 1, 1))[0], torch.eye(16, device=device).view(16, 16, 1, 1)
    x[0, :4, 0, 0] = torch.tensor([1 + 2**-11, -1 - 3 * 2**-12, 3.4e38, 2.0**-100])
    bits = x.view(torch.int32)
    nearest = ((bits + 0x1000) & -0x2000).view(torch.float32)
    out = up(x, one, (1, 1), stride=(1, 1), padding=(0, 0), precision="tf32")
    torch.testing.assert_close(out, nearest, rtol=0, atol=0)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    out = up(x, one, (1, 1), stride=(1, 1), padding=(0, 0), precision="tf32")
    assert out[0].isnan().all() and out[1].isnan().any()  # 0 · inf is NaN too
    assert torch.equal(out[2:], nearest[2:])
