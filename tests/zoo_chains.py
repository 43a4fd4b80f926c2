"""Networks of the zoo whose convolutions stand in nn.Sequential, one after the other."""

import torch
from torch import nn

LATENT = 6


def halvings(size, smallest=4):
    """How often `size` is halved until `smallest` is left."""
    return (size // smallest).bit_length() - 1


class ExampleGenerator(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.ngpu = 1
        channels = [width << i for i in reversed(range(halvings(size)))]
        layers = [nn.ConvTranspose2d(LATENT, channels[0], 4, 1, 0, bias=False), nn.BatchNorm2d(channels[0])]
        layers.append(nn.ReLU(True))
        for c in channels[:-1]:
            layers += [nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(c // 2), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z):
        if z.is_cuda and self.ngpu > 1:
            return nn.parallel.data_parallel(self.main, z, range(self.ngpu))
        return self.main(z)


class ExampleDiscriminator(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        layers, c = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)], width
        for _ in range(halvings(size) - 1):
            layers += [nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2, inplace=True)]
            c *= 2
        self.main = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 0, bias=False), nn.Sigmoid())

    def forward(self, x):
        return self.main(x).view(-1, 1).squeeze(1)


class UpsamplingGenerator(nn.Module):
    """With an eps of 0.8, from a momentum that was written one argument too early."""

    def __init__(self, width, size):
        super().__init__()
        self.init_size = size // 4
        self.l1 = nn.Sequential(nn.Linear(LATENT, 2 * width * self.init_size**2))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, stride=1, padding=1),
            nn.BatchNorm2d(2 * width, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, stride=1, padding=1),
            nn.BatchNorm2d(width, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 3, 3, stride=1, padding=1),
            nn.Tanh(),
        )

    def forward(self, z):
        out = self.l1(z)
        out = out.view(out.shape[0], -1, self.init_size, self.init_size)
        return self.conv_blocks(out)


class DropoutDiscriminator(nn.Module):
    def __init__(self, width, size):
        super().__init__()

        def block(before, after, norm=True):
            layers = [nn.Conv2d(before, after, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.Dropout2d(0.25)]
            return layers + [nn.BatchNorm2d(after, 0.8)] * norm

        blocks = block(3, width, norm=False)
        for i in range(3):
            blocks += block(width << i, width << i + 1)
        self.model = nn.Sequential(*blocks)
        self.adv_layer = nn.Sequential(nn.Linear(8 * width * (size // 16) ** 2, 1), nn.Sigmoid())

    def forward(self, x):
        out = self.model(x)
        return self.adv_layer(out.view(out.shape[0], -1))


class TutorialDiscriminator(nn.Module):
    """Convolution, then LeakyReLU, then BatchNorm: the statistics are of what is activated already."""

    def __init__(self, width, size):
        super().__init__()
        act, layers, before = nn.LeakyReLU(0.2), [], 3
        for after in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(before, after, 5, 2, 2), act, nn.BatchNorm2d(after, momentum=0.2)]
            before = after
        self.features = nn.Sequential(*layers)
        self.score = nn.Linear(before * (size // 8) ** 2, 1)

    def forward(self, x):
        return self.score(torch.flatten(self.features(x), 1))


def patch_discriminator(width, size):
    layers = [nn.Conv2d(6, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for c, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
        layers += [nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))


def encoder_decoder(width, size):
    layers = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for c in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2, inplace=True)]
    for c in (8 * width, 4 * width, 2 * width):
        layers += [nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(c // 2), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Sigmoid())


def strided_pairs_discriminator(width, size):
    """Convolutions in pairs, of stride 1 and 2."""
    layers, before = [], 3
    for i, after in enumerate((width, 2 * width, 4 * width, 8 * width)):
        layers += [nn.Conv2d(before, after, 3, 1, 1)] + [nn.BatchNorm2d(after)] * (i > 0)
        layers += [nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(after, after, 3, 2, 1), nn.BatchNorm2d(after)]
        layers.append(nn.LeakyReLU(0.2, inplace=True))
        before = after
    return nn.Sequential(*layers, nn.Conv2d(before, 1, 3, 1, 1))
