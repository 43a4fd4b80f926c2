"""Networks of the zoo that consist of residual and attention blocks."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.zoo_chains import LATENT


class ReflectedBlock(nn.Module):
    def __init__(self, channels, norm, bias):
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, bias=bias), norm(channels)]
        other = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, bias=bias), norm(channels)]
        self.conv_block = nn.Sequential(*half, nn.ReLU(True), *other)

    def forward(self, x):
        return x + self.conv_block(x)


def resnet_translator(norm, bias):
    """With six blocks for images of 128×128, and one for small ones."""

    def build(width, size):
        blocks = 6 if size >= 128 else 1
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7, bias=bias), norm(width), nn.ReLU(True)]
        for c in (width, 2 * width):
            layers += [nn.Conv2d(c, 2 * c, 3, stride=2, padding=1, bias=bias), norm(2 * c), nn.ReLU(True)]
        layers += [ReflectedBlock(4 * width, norm, bias) for _ in range(blocks)]
        for c in (4 * width, 2 * width):
            layers.append(nn.ConvTranspose2d(c, c // 2, 3, stride=2, padding=1, output_padding=1, bias=bias))
            layers += [norm(c // 2), nn.ReLU(True)]
        return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())

    return build


class PreluBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=1, padding=1),
            nn.BatchNorm2d(channels, 0.8),
            nn.PReLU(),
            nn.Conv2d(channels, channels, 3, stride=1, padding=1),
            nn.BatchNorm2d(channels, 0.8),
        )

    def forward(self, x):
        return x + self.conv_block(x)


class SuperResolution(nn.Module):
    """Four times as many rows and columns as its input has; sixteen blocks where that is 24×24, one for smaller."""

    def __init__(self, width, size):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, width, 9, stride=1, padding=4), nn.PReLU())
        self.res_blocks = nn.Sequential(*[PreluBlock(width) for _ in range(16 if size >= 24 else 1)])
        self.conv2 = nn.Sequential(nn.Conv2d(width, width, 3, stride=1, padding=1), nn.BatchNorm2d(width, 0.8))
        upsampling = []
        for _ in range(2):
            upsampling += [nn.Conv2d(width, 4 * width, 3, 1, 1), nn.BatchNorm2d(4 * width), nn.PixelShuffle(2)]
            upsampling.append(nn.PReLU())
        self.upsampling = nn.Sequential(*upsampling)
        self.conv3 = nn.Sequential(nn.Conv2d(width, 3, 9, stride=1, padding=4), nn.Tanh())

    def forward(self, x):
        out1 = self.conv1(x)
        out = torch.add(out1, self.conv2(self.res_blocks(out1)))
        return self.conv3(self.upsampling(out))


class PreactivatedBlock(nn.Module):
    """BatchNorm, ReLU and only then the convolution; the activation is a function in an attribute."""

    def __init__(self, before, after, activation=F.relu):
        super().__init__()
        self.activation = activation
        self.c1, self.c2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.b1, self.b2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.c_sc = nn.Conv2d(before, after, 1)

    def residual(self, x):
        h = self.activation(self.b1(x))
        h = self.c1(F.interpolate(h, scale_factor=2))
        return self.c2(self.activation(self.b2(h)))

    def forward(self, x):
        return self.residual(x) + self.c_sc(F.interpolate(x, scale_factor=2))


class ResidualGenerator(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.width = width
        self.l1 = nn.Linear(LATENT, 2 * width * (size // 4) ** 2)
        self.block2, self.block3 = PreactivatedBlock(2 * width, width), PreactivatedBlock(width, width)
        self.b4, self.c4 = nn.BatchNorm2d(width), nn.Conv2d(width, 3, 3, padding=1)
        self.smallest = size // 4

    def forward(self, z):
        h = self.l1(z).view(z.size(0), 2 * self.width, self.smallest, self.smallest)
        h = self.block3(self.block2(h))
        return torch.tanh(self.c4(F.relu(self.b4(h))))


class FirstCriticBlock(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.c1 = spectral_norm(nn.Conv2d(before, after, 3, padding=1))
        self.c2 = spectral_norm(nn.Conv2d(after, after, 3, padding=1))
        self.c_sc = spectral_norm(nn.Conv2d(before, after, 1))

    def forward(self, x):
        h = self.c2(F.relu(self.c1(x)))
        return F.avg_pool2d(h, 2) + self.c_sc(F.avg_pool2d(x, 2))


class CriticBlock(nn.Module):
    def __init__(self, before, after, downsample=False):
        super().__init__()
        self.downsample, self.learnable_sc = downsample, before != after or downsample
        self.c1 = spectral_norm(nn.Conv2d(before, after, 3, padding=1))
        self.c2 = spectral_norm(nn.Conv2d(after, after, 3, padding=1))
        if self.learnable_sc:
            self.c_sc = spectral_norm(nn.Conv2d(before, after, 1))

    def shortcut(self, x):
        if self.learnable_sc:
            x = self.c_sc(x)
            if self.downsample:
                return F.avg_pool2d(x, 2)
        return x

    def residual(self, x):
        h = self.c2(F.relu(self.c1(F.relu(x))))
        return F.avg_pool2d(h, 2) if self.downsample else h

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class ResidualCritic(nn.Module):
    """Ends in the sum over all positions."""

    def __init__(self, width, size):
        super().__init__()
        self.block1 = FirstCriticBlock(3, width)
        self.block2 = CriticBlock(width, 2 * width, downsample=True)
        self.block3 = CriticBlock(2 * width, 2 * width)
        self.l4 = spectral_norm(nn.Linear(2 * width, 1, bias=False))

    def forward(self, x):
        h = F.relu(self.block3(self.block2(self.block1(x))))
        return self.l4(torch.sum(h, dim=(2, 3)))


class SelfAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, max(1, channels // 8), 1)
        self.key_conv = nn.Conv2d(channels, max(1, channels // 8), 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((1,), 0.5))  # zero in the paper, where training starts without attention
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        batch, channels, width, height = x.size()
        query = self.query_conv(x).view(batch, -1, width * height).permute(0, 2, 1)
        key = self.key_conv(x).view(batch, -1, width * height)
        attention = self.softmax(torch.bmm(query, key))
        value = self.value_conv(x).view(batch, -1, width * height)
        out = torch.bmm(value, attention.permute(0, 2, 1)).view(batch, channels, width, height)
        return self.gamma * out + x, attention


class AttentionGenerator(nn.Module):
    def __init__(self, width, size):
        super().__init__()

        def block(before, after, *where):
            conv = spectral_norm(nn.ConvTranspose2d(before, after, size // 4 if where == (1, 0) else 4, *where))
            return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())

        self.l1, self.l2 = block(LATENT, 4 * width, 1, 0), block(4 * width, 2 * width, 2, 1)
        self.attn = SelfAttention(2 * width)
        self.last = nn.Sequential(nn.ConvTranspose2d(2 * width, 3, 4, 2, 1), nn.Tanh())

    def forward(self, z):
        z = z.view(z.size(0), z.size(1), 1, 1)
        out, attention = self.attn(self.l2(self.l1(z)))
        return self.last(out), attention
