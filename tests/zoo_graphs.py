"""Networks of the zoo with forwards of their own: functions as activations, skips, branches and heads."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.zoo_chains import LATENT, halvings

LABELS = 3


class UnetBlock(nn.Module):
    """One level of a U-Net around the next. The block below rectifies in place what this one then concatenates."""

    def __init__(self, outer, inner, inside=None, outermost=False, dropout=False):
        super().__init__()
        self.outermost = outermost
        down = nn.Conv2d(outer, inner, 4, 2, 1, bias=False)
        if outermost:
            layers = [down, inside, nn.ReLU(True), nn.ConvTranspose2d(2 * inner, outer, 4, 2, 1), nn.Tanh()]
        elif inside is None:
            up = nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=False)
            layers = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, nn.BatchNorm2d(outer)]
        else:
            up = nn.ConvTranspose2d(2 * inner, outer, 4, 2, 1, bias=False)
            layers = [nn.LeakyReLU(0.2, True), down, nn.BatchNorm2d(inner), inside, nn.ReLU(True), up]
            layers += [nn.BatchNorm2d(outer)] + [nn.Dropout(0.5)] * dropout
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


def unet(width, size):
    """Down to 1×1 and back, with dropout where the channels no longer grow."""
    depth = halvings(size, smallest=1)
    channels = [3] + [width << min(i, 3) for i in range(depth)]
    block = None
    for i in reversed(range(depth)):
        dropout = channels[i] == channels[i + 1]
        block = UnetBlock(channels[i], channels[i + 1], block, outermost=i == 0, dropout=dropout)
    return block


class FeatureDiscriminator(nn.Module):
    """Every layer an attribute with an activation of its own; three activations are results, too."""

    def __init__(self, width, size):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 4, 2, 1, bias=False)
        self.relu1 = nn.LeakyReLU(0.2, inplace=True)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.relu2 = nn.LeakyReLU(0.2, inplace=True)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu3 = nn.LeakyReLU(0.2, inplace=True)
        self.conv4 = nn.Conv2d(4 * width, 8 * width, 4, 2, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(8 * width)
        self.relu4 = nn.LeakyReLU(0.2, inplace=True)
        self.conv5 = nn.Conv2d(8 * width, 1, size // 16, 1, 0, bias=False)

    def forward(self, x):
        conv1 = self.conv1(x)
        relu1 = self.relu1(conv1)
        conv2 = self.conv2(relu1)
        bn2 = self.bn2(conv2)
        relu2 = self.relu2(bn2)
        conv3 = self.conv3(relu2)
        bn3 = self.bn3(conv3)
        relu3 = self.relu3(bn3)
        conv4 = self.conv4(relu3)
        bn4 = self.bn4(conv4)
        relu4 = self.relu4(bn4)
        conv5 = self.conv5(relu4)
        return torch.sigmoid(conv5), [relu2, relu3, relu4]


class SpectralCritic(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        w = width
        self.conv1 = spectral_norm(nn.Conv2d(3, w, 3, stride=1, padding=(1, 1)))
        self.conv2 = spectral_norm(nn.Conv2d(w, w, 4, stride=2, padding=(1, 1)))
        self.conv3 = spectral_norm(nn.Conv2d(w, 2 * w, 3, stride=1, padding=(1, 1)))
        self.conv4 = spectral_norm(nn.Conv2d(2 * w, 2 * w, 4, stride=2, padding=(1, 1)))
        self.conv5 = spectral_norm(nn.Conv2d(2 * w, 4 * w, 3, stride=1, padding=(1, 1)))
        self.conv6 = spectral_norm(nn.Conv2d(4 * w, 4 * w, 4, stride=2, padding=(1, 1)))
        self.conv7 = spectral_norm(nn.Conv2d(4 * w, 8 * w, 3, stride=1, padding=(1, 1)))
        self.fc = spectral_norm(nn.Linear((size // 8) ** 2 * 8 * w, 1))

    def forward(self, x):
        m = F.leaky_relu(self.conv1(x), 0.1)
        m = F.leaky_relu(self.conv2(m), 0.1)
        m = F.leaky_relu(self.conv3(m), 0.1)
        m = F.leaky_relu(self.conv4(m), 0.1)
        m = F.leaky_relu(self.conv5(m), 0.1)
        m = F.leaky_relu(self.conv6(m), 0.1)
        m = F.leaky_relu(self.conv7(m), 0.1)
        return self.fc(m.view(m.size(0), -1))


class NormedLastUnet(nn.Module):
    """A U-Net whose levels normalise what they activated, with dropout between, written as one long forward."""

    def __init__(self, width, size):
        super().__init__()
        w = width
        self.down1 = nn.Conv2d(3, w, 4, 2, 1)
        self.down2, self.norm2 = nn.Conv2d(w, 2 * w, 4, 2, 1), nn.BatchNorm2d(2 * w, momentum=0.2)
        self.down3, self.norm3 = nn.Conv2d(2 * w, 4 * w, 4, 2, 1), nn.BatchNorm2d(4 * w, momentum=0.2)
        self.up, self.pad = nn.Upsample(scale_factor=2), nn.ZeroPad2d((1, 2, 1, 2))
        self.up1, self.norm4 = nn.Conv2d(4 * w, 2 * w, 4), nn.BatchNorm2d(2 * w, momentum=0.2)
        self.up2, self.norm5 = nn.Conv2d(4 * w, w, 4), nn.BatchNorm2d(w, momentum=0.2)
        self.up3 = nn.Conv2d(2 * w, 3, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        d1 = F.leaky_relu(self.down1(x), 0.2)
        d2 = self.norm2(F.leaky_relu(self.down2(d1), 0.2))
        d3 = self.norm3(F.leaky_relu(self.down3(d2), 0.2))
        u1 = F.relu(self.up1(self.pad(self.up(d3))))
        u1 = torch.cat([self.norm4(self.dropout(u1)), d2], dim=1)
        u2 = self.norm5(F.relu(self.up2(self.pad(self.up(u1)))))
        u2 = torch.cat([u2, d1], dim=1)
        return torch.tanh(self.up3(self.pad(self.up(u2))))


class EncoderBlock(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel_size=5, padding=2, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(after, momentum=0.9)

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, False)


class DecoderBlock(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv = nn.ConvTranspose2d(before, after, 5, padding=2, stride=2, output_padding=1, bias=False)
        self.bn = nn.BatchNorm2d(after, momentum=0.9)

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, True)


def linear_block(before, after):
    norm = nn.BatchNorm1d(after, momentum=0.9)
    return nn.Sequential(nn.Linear(before, after, bias=False), norm, nn.ReLU(True))


class Autoencoder(nn.Module):
    """Encoder and decoder of a variational autoencoder; the noise comes as the second input."""

    def __init__(self, width, size):
        super().__init__()
        w, self.smallest = width, size // 8
        self.encoder = nn.Sequential(EncoderBlock(3, w), EncoderBlock(w, 2 * w), EncoderBlock(2 * w, 4 * w))
        self.encoder_fc = linear_block(4 * w * self.smallest**2, 8 * w)
        self.l_mu, self.l_var = nn.Linear(8 * w, LATENT), nn.Linear(8 * w, LATENT)
        self.decoder_fc = linear_block(LATENT, 4 * w * self.smallest**2)
        last = nn.Sequential(nn.Conv2d(w, 3, kernel_size=5, stride=1, padding=2), nn.Tanh())
        self.decoder = nn.Sequential(
            DecoderBlock(4 * w, 4 * w), DecoderBlock(4 * w, 2 * w), DecoderBlock(2 * w, w), last
        )

    def forward(self, x, noise):
        features = self.encoder(x)
        features = self.encoder_fc(features.view(len(features), -1))
        mu, log_variance = self.l_mu(features), self.l_var(features)
        z = self.decoder_fc(noise * torch.exp(0.5 * log_variance) + mu)
        return self.decoder(z.view(len(z), -1, self.smallest, self.smallest)), mu, log_variance


class LastEncoderBlock(EncoderBlock):
    """The convolution's own result is wanted, too: the reconstruction is judged on it."""

    def forward(self, x):
        before = self.conv(x)
        return F.relu(self.bn(before), True), before


class JudgeOfReconstructions(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        w = width
        self.first = nn.Sequential(nn.Conv2d(3, w, kernel_size=5, stride=1, padding=2), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(EncoderBlock(w, 4 * w), EncoderBlock(4 * w, 8 * w))
        self.last = LastEncoderBlock(8 * w, 8 * w)
        self.fc = nn.Sequential(*linear_block(8 * w * (size // 8) ** 2, 16 * w), nn.Linear(16 * w, 1))

    def forward(self, x):
        x, features = self.last(self.blocks(self.first(x)))
        return torch.sigmoid(self.fc(x.view(len(x), -1))), features.view(len(features), -1)


class FunctionalGenerator(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        d = width
        self.deconv1, self.deconv1_bn = nn.ConvTranspose2d(LATENT, d * 4, 4, 1, 0), nn.BatchNorm2d(d * 4)
        self.deconv2, self.deconv2_bn = nn.ConvTranspose2d(d * 4, d * 2, 4, 2, 1), nn.BatchNorm2d(d * 2)
        self.deconv3, self.deconv3_bn = nn.ConvTranspose2d(d * 2, d, 4, 2, 1), nn.BatchNorm2d(d)
        self.deconv4 = nn.ConvTranspose2d(d, 3, 4, 2, 1)

    def forward(self, z):
        x = F.relu(self.deconv1_bn(self.deconv1(z)))
        x = F.relu(self.deconv2_bn(self.deconv2(x)))
        x = F.relu(self.deconv3_bn(self.deconv3(x)))
        return torch.tanh(self.deconv4(x))


class FunctionalDiscriminator(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        d = width
        self.conv1 = nn.Conv2d(3, d, 4, 2, 1)
        self.conv2, self.conv2_bn = nn.Conv2d(d, d * 2, 4, 2, 1), nn.BatchNorm2d(d * 2)
        self.conv3, self.conv3_bn = nn.Conv2d(d * 2, d * 4, 4, 2, 1), nn.BatchNorm2d(d * 4)
        self.conv4 = nn.Conv2d(d * 4, 1, size // 8, 1, 0)

    def forward(self, x):
        x = F.leaky_relu(self.conv1(x), 0.2)
        x = F.leaky_relu(self.conv2_bn(self.conv2(x)), 0.2)
        x = F.leaky_relu(self.conv3_bn(self.conv3(x)), 0.2)
        return self.conv4(x).sigmoid()


class ConditionalGenerator(nn.Module):
    """Latents and labels each through a layer of their own, then side by side."""

    def __init__(self, width, size):
        super().__init__()
        d = width
        self.deconv1_1, self.deconv1_1_bn = nn.ConvTranspose2d(LATENT, d * 2, 4, 1, 0), nn.BatchNorm2d(d * 2)
        self.deconv1_2, self.deconv1_2_bn = nn.ConvTranspose2d(LABELS, d * 2, 4, 1, 0), nn.BatchNorm2d(d * 2)
        self.deconv2, self.deconv2_bn = nn.ConvTranspose2d(d * 4, d * 2, 4, 2, 1), nn.BatchNorm2d(d * 2)
        self.deconv3, self.deconv3_bn = nn.ConvTranspose2d(d * 2, d, 4, 2, 1), nn.BatchNorm2d(d)
        self.deconv4 = nn.ConvTranspose2d(d, 3, 4, 2, 1)

    def forward(self, z, label):
        x = F.relu(self.deconv1_1_bn(self.deconv1_1(z)))
        y = F.relu(self.deconv1_2_bn(self.deconv1_2(label)))
        x = torch.cat([x, y], 1)
        x = F.relu(self.deconv2_bn(self.deconv2(x)))
        x = F.relu(self.deconv3_bn(self.deconv3(x)))
        return torch.tanh(self.deconv4(x))


class ConditionalDiscriminator(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        d = width
        self.conv1_1, self.conv1_2 = nn.Conv2d(3, d, 4, 2, 1), nn.Conv2d(LABELS, d, 4, 2, 1)
        self.conv2, self.conv2_bn = nn.Conv2d(d * 2, d * 4, 4, 2, 1), nn.BatchNorm2d(d * 4)
        self.conv3, self.conv3_bn = nn.Conv2d(d * 4, d * 8, 4, 2, 1), nn.BatchNorm2d(d * 8)
        self.conv4 = nn.Conv2d(d * 8, 1, size // 8, 1, 0)

    def forward(self, x, label):
        x = F.leaky_relu(self.conv1_1(x), 0.2)
        y = F.leaky_relu(self.conv1_2(label), 0.2)
        x = torch.cat([x, y], 1)
        x = F.leaky_relu(self.conv2_bn(self.conv2(x)), 0.2)
        x = F.leaky_relu(self.conv3_bn(self.conv3(x)), 0.2)
        return torch.sigmoid(self.conv4(x))


class SharedTrunk(nn.Module):
    """One trunk, and two heads: real or fake, and which code the image was made from."""

    def __init__(self, width, size):
        super().__init__()
        w = width
        self.conv1 = nn.Conv2d(3, w, 4, 2, 1)
        self.conv2, self.bn2 = nn.Conv2d(w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w)
        self.conv3, self.bn3 = nn.Conv2d(2 * w, 16 * w, size // 4, bias=False), nn.BatchNorm2d(16 * w)
        self.score = nn.Sequential(nn.Conv2d(16 * w, 1, 1), nn.Sigmoid())
        self.q_conv, self.q_bn = nn.Conv2d(16 * w, 2 * w, 1, bias=False), nn.BatchNorm2d(2 * w)
        self.conv_disc, self.conv_mu, self.conv_var = (nn.Conv2d(2 * w, n, 1) for n in (LABELS, 2, 2))

    def forward(self, x):
        x = F.leaky_relu(self.conv1(x), 0.1, inplace=True)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.1, inplace=True)
        x = F.leaky_relu(self.bn3(self.conv3(x)), 0.1, inplace=True)
        q = F.leaky_relu(self.q_bn(self.q_conv(x)), 0.1, inplace=True)
        var = torch.exp(self.conv_var(q).squeeze())
        return self.score(x).flatten(), self.conv_disc(q).squeeze(), self.conv_mu(q).squeeze(), var
