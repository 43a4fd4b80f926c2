"""VAE-GAN (Larsen et al. 2016, arXiv:1512.09300): an autoencoder whose pictures are compared by what a discriminator
sees in them, not pixel by pixel; with fused layers by one line.

    pip install -e ".[train]" && python examples/vae_gan.py

learns to rebuild handwritten digits and to make new ones. The grid has picture | its reconstruction | a new one.
"""

import sys
from itertools import pairwise

import common
import torch
from torch import nn
from torch.nn import functional as F

import fastgan

NZ, WIDTH = 16, 32  # length of a latent vector; channels of the layers next to the image
BETA, GAMMA = 0.15, 10.0  # weight of the prior for the encoder, and of the reconstruction for the decoder


class Encoder(nn.Module):
    """Images to mean and log variance of their latents, (N, NZ, 1, 1) each."""

    def __init__(self, image_size, channels):
        super().__init__()
        widths = [channels, *common.widths(image_size, WIDTH)]
        layers = [layer for pair in pairwise(widths) for layer in common.down(*pair)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 2 * NZ, 4, 1, 0))

    def forward(self, images):
        return self.main(images).chunk(2, dim=1)


class Decoder(nn.Module):
    """Latents to images."""

    def __init__(self, image_size, channels):
        super().__init__()
        widths = common.widths(image_size, WIDTH)[::-1]
        layers = [layer for pair in pairwise(widths) for layer in common.up(*pair)]
        last = [nn.ConvTranspose2d(WIDTH, channels, 4, 2, 1), nn.Tanh()]
        self.main = nn.Sequential(*common.up(NZ, widths[0], stride=1, padding=0), *layers, *last)

    def forward(self, latent):
        return self.main(latent)


class Discriminator(nn.Module):
    """Images to logits, and to the features that reconstructions are compared by."""

    def __init__(self, image_size, channels):
        super().__init__()
        widths = [channels, *common.widths(image_size, WIDTH)]
        self.features = nn.Sequential(*[layer for pair in pairwise(widths) for layer in common.down(*pair)])
        self.judge = nn.Sequential(nn.Conv2d(widths[-1], 1, 4, 1, 0), nn.Flatten(0))

    def forward(self, images):
        features = self.features(images)
        return self.judge(features), features


class VAEGAN(nn.Module):
    def __init__(self, image_size, channels):
        super().__init__()
        self.encoder, self.decoder = Encoder(image_size, channels), Decoder(image_size, channels)
        self.discriminator = Discriminator(image_size, channels)
        self.optimizers = {
            network: torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999))
            for network, lr in ((self.encoder, 5e-4), (self.decoder, 5e-4), (self.discriminator, 2e-4))
        }

    def inputs(self, images):
        return (images,)

    def forward(self, images):
        mean, log_var = self.encoder(images)
        rebuilt = self.decoder(mean)
        return mean, log_var, rebuilt, self.discriminator(rebuilt)[0]

    def train_step(self, images):
        mean, log_var = self.encoder(images)
        latent = mean + torch.randn_like(mean) * (log_var / 2).exp()
        rebuilt, new = self.decoder(latent), self.decoder(torch.randn_like(mean))

        logits = [self.discriminator(x)[0] for x in (images, rebuilt.detach(), new.detach())]
        loss_d = common.real_loss(logits[0]) + (common.fake_loss(logits[1]) + common.fake_loss(logits[2])) / 2
        self.update(loss_d, self.discriminator)

        with torch.no_grad():
            _, wanted = self.discriminator(images)
        (logits_rebuilt, features), (logits_new, _) = self.discriminator(rebuilt), self.discriminator(new)
        loss_features = F.mse_loss(features, wanted)
        loss_prior = (mean**2 + log_var.exp() - 1 - log_var).mean() / 2
        loss_g = (common.real_loss(logits_rebuilt) + common.real_loss(logits_new)) / 2
        # The encoder learns nothing from deceiving the discriminator.
        self.update(loss_features + BETA * loss_prior, self.encoder, retain_graph=True)
        self.update(GAMMA * loss_features + loss_g, self.decoder)
        return {"loss D": loss_d, "loss G": loss_g, "features": loss_features, "prior": loss_prior}

    def update(self, loss, network, retain_graph=False):
        self.optimizers[network].zero_grad()
        loss.backward(inputs=list(network.parameters()), retain_graph=retain_graph)
        self.optimizers[network].step()

    def draw(self, images):
        mean, _ = self.encoder(images)
        latent = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)).to(images.device)
        return [images, self.decoder(mean), self.decoder(latent)]


def build(options, channels):
    gan = VAEGAN(options.image_size, channels)
    if options.fused:
        fastgan.fuse(gan)  # the one line
    return gan


def main(argv=None):
    return common.run(argv, build, description=__doc__, steps=1600, batch_size=32)


if __name__ == "__main__":
    sys.exit(main())
