"""A DCGAN of images so small that a whole step in float64 takes no time, and batches for it."""

import torch
from torch import nn

from fastgan.models import Discriminator, Generator

NZ, BATCH = 6, 4


def make_networks(seed=0, dtype=torch.float64, image_size=16):
    torch.manual_seed(seed)
    generator = Generator(image_size=image_size, nc=2, nz=NZ, ngf=4).to(dtype)
    return generator, Discriminator(image_size=image_size, nc=2, ndf=4).to(dtype)


def real_batches(count, seed=1, dtype=torch.float64, image_size=16):
    random = torch.Generator().manual_seed(seed)
    return [torch.rand(BATCH, 2, image_size, image_size, generator=random, dtype=dtype) * 2 - 1 for _ in range(count)]


def small_critic():
    """A discriminator of those images, in a few layers of float32."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), *logits_of(784))


def logits_of(features):
    """The last layers of a discriminator with so many features."""
    return nn.Flatten(), nn.Linear(features, 1)
