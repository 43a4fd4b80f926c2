"""pix2pix (Isola et al. 2017, arXiv:1611.07004): a U-Net draws the picture that belongs to another one, and a PatchGAN
judges pairs of both; with fused layers by one line.

    pip install -e ".[train]" && python examples/pix2pix.py

learns to fill in pencil outlines of handwritten digits. The grid has input | output | target in a row.
"""

import sys
from itertools import pairwise

import common
import torch
from torch import nn

import fastgan

WIDTH, LAMBDA = 32, 100.0  # channels of the outermost layers; weight of the L1 loss


class UNet(nn.Module):
    """Halves the image until it is 2×2, and doubles it again next to what each level has seen on the way down."""

    def __init__(self, image_size, channels):
        super().__init__()
        widths = common.widths(image_size, WIDTH)
        self.first = nn.Sequential(*common.down(channels, WIDTH, norm=False))
        self.downs = nn.ModuleList(nn.Sequential(*common.down(a, b)) for a, b in pairwise([*widths, widths[-1]]))
        self.ups = nn.ModuleList([nn.Sequential(*common.up(widths[-1], widths[-1]), nn.Dropout(0.5))])
        self.ups.extend(nn.Sequential(*common.up(2 * a, b)) for a, b in pairwise(widths[::-1]))
        self.last = nn.Sequential(nn.ConvTranspose2d(2 * WIDTH, channels, 4, 2, 1), nn.Tanh())

    def forward(self, x):
        x, skips = self.first(x), []
        for down in self.downs:
            skips.append(x)
            x = down(x)
        for up in self.ups:
            x = torch.cat([up(x), skips.pop()], dim=1)
        return self.last(x)


class PatchGAN(nn.Module):
    """Pairs of pictures to a logit for each patch of them."""

    def __init__(self, channels):
        super().__init__()
        self.main = nn.Sequential(
            *common.down(2 * channels, WIDTH, norm=False),
            *common.down(WIDTH, 2 * WIDTH),
            *common.down(2 * WIDTH, 4 * WIDTH, stride=1),
            nn.Conv2d(4 * WIDTH, 1, 4, 1, 1),
        )

    def forward(self, drawing, picture):
        return self.main(torch.cat([drawing, picture], dim=1))


class Pix2Pix(nn.Module):
    def __init__(self, image_size, channels):
        super().__init__()
        self.generator, self.discriminator = UNet(image_size, channels), PatchGAN(channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
        self.l1 = nn.L1Loss()
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=5e-4, betas=(0.5, 0.999))
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))

    def inputs(self, pictures):
        return (common.pencil(pictures),)

    def forward(self, drawing):
        fake = self.generator(drawing)
        return fake, self.discriminator(drawing, fake)

    def train_step(self, pictures):
        drawing = common.pencil(pictures)
        fake = self.generator(drawing)

        self.optimizer_d.zero_grad()
        loss_real = common.real_loss(self.discriminator(drawing, pictures))
        loss_fake = common.fake_loss(self.discriminator(drawing, fake.detach()))
        loss_d = (loss_real + loss_fake) / 2
        loss_d.backward()
        self.optimizer_d.step()

        self.optimizer_g.zero_grad()
        loss_adversarial = common.real_loss(self.discriminator(drawing, fake))
        loss_l1 = self.l1(fake, pictures)
        (loss_adversarial + LAMBDA * loss_l1).backward()
        self.optimizer_g.step()
        return {"loss D": loss_d, "loss G": loss_adversarial, "L1": loss_l1}

    def draw(self, pictures):
        drawing = common.pencil(pictures)
        return [drawing, self.generator(drawing), pictures]


def build(options, channels):
    gan = Pix2Pix(options.image_size, channels)
    if options.fused:
        fastgan.fuse(gan)  # the one line
    return gan


def main(argv=None):
    return common.run(argv, build, description=__doc__, steps=400, batch_size=32)


if __name__ == "__main__":
    sys.exit(main())
