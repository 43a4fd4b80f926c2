"""The DCGAN of Radford et al. 2015 (arXiv:1511.06434), built as the PyTorch example builds it.

Both networks are plain ``torch.nn``. Parameter names and shapes are those of the example, so its ``netG``/``netD``
checkpoints load. An image side is ``base · 2^k``: the first transposed convolution (and the last convolution)
has a kernel of the base side, 4 or 7, and every other layer doubles (halves) the side.
"""

from itertools import pairwise

from torch import nn

from fastgan.checks import check_choice, check_integer

# image side → (base, k) with side = base · 2^k
_FACTORS = {base << k: (base, k) for base, largest_k in ((4, 6), (7, 5)) for k in range(1, largest_k + 1)}
IMAGE_SIZES = tuple(sorted(_FACTORS))


def _base_and_doublings(image_size):
    check_choice("image_size", image_size, IMAGE_SIZES)
    return _FACTORS[image_size]


def initialize_weights(module):
    """DCGAN initialisation, for ``model.apply``: convolutions N(0, 0.02), BatchNorm weights N(1, 0.02), biases 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """Latent vectors to images.

    Args:
        image_size: side of the square images, one of ``IMAGE_SIZES``.
        nc: image channels.
        nz: length of the latent vector.
        ngf: channels of the last hidden layer; each layer before it has twice as many.

    Shapes: latent (N, nz, 1, 1) or (N, nz) → images (N, nc, image_size, image_size) in [−1, 1].

    Raises:
        ValueError: a size that no DCGAN has, a count below one, or latents of another shape.
    """

    def __init__(self, *, image_size=64, nc=3, nz=100, ngf=64):
        super().__init__()
        base, doublings = _base_and_doublings(image_size)
        for name, value in dict(nc=nc, nz=nz, ngf=ngf).items():
            check_integer(name, value, 1)
        self.image_size, self.nc, self.nz, self.ngf = image_size, nc, nz, ngf

        widths = [ngf << i for i in reversed(range(doublings))]
        layers = [nn.ConvTranspose2d(nz, widths[0], base, 1, 0, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(True)]
        for width_in, width_out in pairwise(widths):
            layers += [
                nn.ConvTranspose2d(width_in, width_out, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width_out),
                nn.ReLU(True),
            ]
        layers += [nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)
        self.apply(initialize_weights)

    def forward(self, latent):
        if latent.shape[1:] not in ((self.nz,), (self.nz, 1, 1)):
            raise ValueError(f"latent must be (N, {self.nz}) or (N, {self.nz}, 1, 1); got {tuple(latent.shape)}")
        return self.main(latent.reshape(-1, self.nz, 1, 1))


class Discriminator(nn.Module):
    """Images to logits: how real each image looks. No sigmoid: the losses take logits.

    Args:
        image_size: side of the square images, one of ``IMAGE_SIZES``.
        nc: image channels.
        ndf: channels of the first layer; each layer after it has twice as many.

    Shapes: images (N, nc, image_size, image_size) in [−1, 1] → logits (N,).

    Raises:
        ValueError: a size that no DCGAN has, a count below one, or images of another shape.
    """

    def __init__(self, *, image_size=64, nc=3, ndf=64):
        super().__init__()
        base, halvings = _base_and_doublings(image_size)
        for name, value in dict(nc=nc, ndf=ndf).items():
            check_integer(name, value, 1)
        self.image_size, self.nc, self.ndf = image_size, nc, ndf

        widths = [ndf << i for i in range(halvings)]
        layers = [nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for width_in, width_out in pairwise(widths):
            layers += [
                nn.Conv2d(width_in, width_out, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width_out),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers += [nn.Conv2d(widths[-1], 1, base, 1, 0, bias=False)]
        self.main = nn.Sequential(*layers)
        self.apply(initialize_weights)

    def forward(self, images):
        expected = (self.nc, self.image_size, self.image_size)
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(f"images must be (N, {', '.join(map(str, expected))}); got {tuple(images.shape)}")
        return self.main(images).flatten()
