"""WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028): a critic whose gradients are held at length one, by a loss that
is differentiated twice; with fused layers by one line. The generator is the DCGAN's.

    pip install -e ".[train]" && python examples/wgan_gp.py

learns handwritten digits.
"""

import sys
from itertools import pairwise

import common
import torch
from dcgan import NZ, WIDTH, Generator
from torch import nn

import fastgan

LAMBDA, CRITIC_STEPS = 10.0, 5  # weight of the gradient penalty; critic updates for each of the generator's


class Critic(nn.Module):
    """Images to scores (N,). No BatchNorm: the penalty is on the gradient of each image by itself."""

    def __init__(self, image_size, channels):
        super().__init__()
        widths, layers = [channels, *common.widths(image_size, WIDTH)], []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 0))

    def forward(self, images):
        return self.main(images).flatten()


class WGANGP(nn.Module):
    def __init__(self, image_size, channels):
        super().__init__()
        self.generator, self.critic = Generator(image_size, channels), Critic(image_size, channels)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=5e-4, betas=(0.5, 0.9))
        self.optimizer_c = torch.optim.Adam(self.critic.parameters(), lr=5e-4, betas=(0.5, 0.9))
        self.steps = 0

    def inputs(self, images):
        return (torch.randn(len(images), NZ, 1, 1, device=images.device),)

    def forward(self, latent):
        fake = self.generator(latent)
        return fake, self.critic(fake)

    def gradient_penalty(self, real, fake):
        share = torch.rand(len(real), 1, 1, 1, device=real.device)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()

    def train_step(self, real):
        with torch.no_grad():
            fake = self.generator(*self.inputs(real))
        self.optimizer_c.zero_grad()
        distance = self.critic(real).mean() - self.critic(fake).mean()
        penalty = self.gradient_penalty(real, fake)
        (LAMBDA * penalty - distance).backward()
        self.optimizer_c.step()

        self.steps += 1
        if self.steps % CRITIC_STEPS == 0:
            self.optimizer_g.zero_grad()
            loss_g = -self.critic(self.generator(*self.inputs(real))).mean()
            loss_g.backward()
            self.optimizer_g.step()
        return {"distance": distance, "penalty": penalty}

    def draw(self, images):
        random = torch.Generator().manual_seed(1)
        return [self.generator(torch.randn(64, NZ, 1, 1, generator=random).to(images.device))]


def build(options, channels):
    gan = WGANGP(options.image_size, channels)
    if options.fused:
        fastgan.fuse(gan)  # the one line
    return gan


def main(argv=None):
    return common.run(argv, build, description=__doc__, steps=3000, batch_size=32)


if __name__ == "__main__":
    sys.exit(main())
