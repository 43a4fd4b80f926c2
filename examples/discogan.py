"""DiscoGAN (Kim et al. 2017, arXiv:1703.05192): two generators carry pictures from one style to another and back,
without any pairs to learn from; with fused layers by one line.

    pip install -e ".[train]" && python examples/discogan.py

learns to turn handwritten digits into pencil drawings and drawings into digits. The grid has A | B(A) | A(B(A)) and
B | A(B) | B(A(B)) in a row.
"""

import sys

import common
import torch
from torch import nn

import fastgan

WIDTH, LAMBDA = 32, 10.0  # channels of the layers next to the images; weight of the reconstruction


class Generator(nn.Module):
    """Pictures of one style to the other: halved three times, and doubled again."""

    def __init__(self, channels):
        super().__init__()
        self.main = nn.Sequential(
            *common.down(channels, WIDTH, norm=False),
            *common.down(WIDTH, 2 * WIDTH),
            *common.down(2 * WIDTH, 4 * WIDTH),
            *common.up(4 * WIDTH, 2 * WIDTH),
            *common.up(2 * WIDTH, WIDTH),
            nn.ConvTranspose2d(WIDTH, channels, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, images):
        return self.main(images)


class Discriminator(nn.Module):
    """Pictures to logits, whether they are of its style, one for each patch."""

    def __init__(self, channels):
        super().__init__()
        self.main = nn.Sequential(
            *common.down(channels, WIDTH, norm=False),
            *common.down(WIDTH, 2 * WIDTH),
            *common.down(2 * WIDTH, 4 * WIDTH),
            nn.Conv2d(4 * WIDTH, 1, 4, 1, 1),
        )

    def forward(self, images):
        return self.main(images)


class DiscoGAN(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.to_a, self.to_b = Generator(channels), Generator(channels)
        self.judge_a, self.judge_b = Discriminator(channels), Discriminator(channels)
        generators = [*self.to_a.parameters(), *self.to_b.parameters()]
        judges = [*self.judge_a.parameters(), *self.judge_b.parameters()]
        self.optimizer_g = torch.optim.Adam(generators, lr=5e-4, betas=(0.5, 0.999), weight_decay=1e-5)
        self.optimizer_d = torch.optim.Adam(judges, lr=2e-4, betas=(0.5, 0.999), weight_decay=1e-5)
        self.reconstruction = nn.MSELoss()

    def inputs(self, images):
        """Pictures of style A, and others drawn in style B: no picture is there in both styles."""
        a, b = images.chunk(2)
        return a, common.pencil(b)

    def forward(self, a, b):
        fake_a, fake_b = self.to_a(b), self.to_b(a)
        return fake_a, fake_b, self.judge_a(fake_a), self.judge_b(fake_b)

    def train_step(self, images):
        a, b = self.inputs(images)
        fake_a, fake_b = self.to_a(b), self.to_b(a)

        self.optimizer_d.zero_grad()
        loss_a = common.real_loss(self.judge_a(a)) + common.fake_loss(self.judge_a(fake_a.detach()))
        loss_b = common.real_loss(self.judge_b(b)) + common.fake_loss(self.judge_b(fake_b.detach()))
        (loss_a + loss_b).backward()
        self.optimizer_d.step()

        self.optimizer_g.zero_grad()
        loss_g = common.real_loss(self.judge_a(fake_a)) + common.real_loss(self.judge_b(fake_b))
        loss_rec = self.reconstruction(self.to_a(fake_b), a) + self.reconstruction(self.to_b(fake_a), b)
        (loss_g + LAMBDA * loss_rec).backward()
        self.optimizer_g.step()
        return {"loss D": loss_a + loss_b, "loss G": loss_g, "reconstruction": loss_rec}

    def draw(self, images):
        a, b = self.inputs(images)
        fake_a, fake_b = self.to_a(b), self.to_b(a)
        return [torch.cat([a, b]), torch.cat([fake_b, fake_a]), torch.cat([self.to_a(fake_b), self.to_b(fake_a)])]


def build(options, channels):
    gan = DiscoGAN(channels)
    if options.fused:
        fastgan.fuse(gan)  # the one line
    return gan


def main(argv=None):
    return common.run(argv, build, description=__doc__, steps=600, batch_size=64)


if __name__ == "__main__":
    sys.exit(main())
