"""DCGAN (Radford et al. 2015, arXiv:1511.06434), as PyTorch's tutorial has it; with fused layers by one line.

    pip install -e ".[train]" && python examples/dcgan.py

learns handwritten digits on a CPU, too.
"""

import sys
from itertools import pairwise

import common
import torch
from torch import nn

import fastgan

NZ, WIDTH = 100, 32  # length of a latent vector; channels of the layers next to the image


def weights_init(m):
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif classname.find("BatchNorm") != -1:
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


class Generator(nn.Module):
    """Latents (N, NZ, 1, 1) to images (N, channels, image_size, image_size)."""

    def __init__(self, image_size, channels):
        super().__init__()
        widths = common.widths(image_size, WIDTH)[::-1]
        layers = [nn.ConvTranspose2d(NZ, widths[0], 4, 1, 0, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(True)]
        for a, b in pairwise(widths):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(WIDTH, channels, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, latent):
        return self.main(latent)


class Discriminator(nn.Module):
    """Images to logits (N,)."""

    def __init__(self, image_size, channels):
        super().__init__()
        widths = common.widths(image_size, WIDTH)
        layers = [nn.Conv2d(channels, WIDTH, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 0, bias=False))

    def forward(self, images):
        return self.main(images).flatten()


class DCGAN(nn.Module):
    def __init__(self, image_size, channels):
        super().__init__()
        self.generator = Generator(image_size, channels)
        self.discriminator = Discriminator(image_size, channels)
        self.apply(weights_init)
        self.criterion = nn.BCEWithLogitsLoss()
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))

    def inputs(self, images):
        return (torch.randn(len(images), NZ, 1, 1, device=images.device),)

    def forward(self, latent):
        fake = self.generator(latent)
        return fake, self.discriminator(fake)

    def train_step(self, real):
        # The discriminator learns on real images, then on fake ones.
        self.optimizer_d.zero_grad()
        logits = self.discriminator(real)
        ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
        loss_real = self.criterion(logits, ones)
        loss_real.backward()
        fake = self.generator(*self.inputs(real))
        loss_fake = self.criterion(self.discriminator(fake.detach()), zeros)
        loss_fake.backward()
        self.optimizer_d.step()

        # The generator learns to have its images called real.
        self.optimizer_g.zero_grad()
        loss_g = self.criterion(self.discriminator(fake), ones)
        loss_g.backward()
        self.optimizer_g.step()
        return {"loss D": loss_real + loss_fake, "loss G": loss_g}

    def draw(self, images):
        random = torch.Generator().manual_seed(1)
        return [self.generator(torch.randn(64, NZ, 1, 1, generator=random).to(images.device))]


def build(options, channels):
    gan = DCGAN(options.image_size, channels)
    if options.fused:
        # The one line. Where you compile your networks, torch.compile(network, backend="fastgan") does the same.
        fastgan.fuse(gan)
    return gan


def main(argv=None):
    return common.run(argv, build, description=__doc__, steps=2500, batch_size=32)


if __name__ == "__main__":
    sys.exit(main())
