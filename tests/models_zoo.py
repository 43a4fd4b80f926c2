"""ZOO: networks with the layers of well-known public GANs, written afresh and narrow, as `fuse` meets them in the wild.

Kept from each: kernels, strides, paddings, biases, eps and momentum of BatchNorm, kinds and spellings of activations
(modules, in place, one shared instance, functions, a function in an attribute), the order of layers, skips and heads.
Not kept: how many times a block is repeated. Where a public network draws noise inside, it is an input here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tests import zoo_blocks, zoo_chains, zoo_graphs
from tests.zoo_chains import LATENT
from tests.zoo_graphs import LABELS


@dataclass(frozen=True)
class Network:
    """One network of the zoo.

    `build(width, size)` makes it for square images of `size`; `width` scales all of its channels. `shapes(size)` are
    those of its inputs without the batch. `fused` of its convolutions run as our operator after `fuse`.
    """

    source: str  # where its structure is known from
    fused: int
    build: Callable[[int, int], nn.Module]
    shapes: Callable[[int], list[tuple[int, ...]]]
    size: int = 16
    width: int = 2

    def make(self):
        return self.build(self.width, self.size)

    def inputs(self, batch, size=None, dtype=torch.float32, device="cpu"):
        """Random inputs, as a list of (batch, …) tensors."""
        return [torch.randn(batch, *shape, dtype=dtype, device=device) for shape in self.shapes(size or self.size)]


def of_latents(size):
    return [(LATENT, 1, 1)]


def of_flat_latents(size):
    return [(LATENT,)]


def of_images(size):
    return [(3, size, size)]


def of_pairs(size):
    return [(6, size, size)]


def of_images_and_noise(size):
    return [(3, size, size), (LATENT,)]


def of_latents_and_labels(size):
    return [(LATENT, 1, 1), (LABELS, 1, 1)]


def of_images_and_labels(size):
    return [(3, size, size), (LABELS, size, size)]


_DCGAN, _PYTORCH_GAN = "Radford et al. 2015; pytorch/examples dcgan", "eriklindernoren/PyTorch-GAN"
_CYCLEGAN = "Zhu et al. 2017; junyanz/pytorch-CycleGAN-and-pix2pix"
_MNIST = "znxlwm/pytorch-MNIST-CelebA-GAN-DCGAN"
_SNGAN = "Miyato et al. 2018; pfnet-research/sngan_projection"
_VAEGAN = "Larsen et al. 2016; lucabergamini/VAEGAN-PYTORCH"
ZOO = {
    "dcgan_generator": Network(_DCGAN, 3, zoo_chains.ExampleGenerator, of_latents),
    "dcgan_discriminator": Network(_DCGAN, 3, zoo_chains.ExampleDiscriminator, of_images),
    "upsampling_generator": Network(f"{_PYTORCH_GAN} dcgan", 3, zoo_chains.UpsamplingGenerator, of_flat_latents),
    "dropout_discriminator": Network(f"{_PYTORCH_GAN} dcgan", 4, zoo_chains.DropoutDiscriminator, of_images),
    "tutorial_discriminator": Network("Keras tutorials", 3, zoo_chains.TutorialDiscriminator, of_images),
    "pix2pix_unet": Network(f"Isola et al. 2017; {_CYCLEGAN}", 12, zoo_graphs.unet, of_images, size=64),
    "pix2pix_patches": Network(f"Isola et al. 2017; {_CYCLEGAN}", 5, zoo_chains.patch_discriminator, of_pairs, size=32),
    "normed_last_unet": Network("eriklindernoren/Keras-GAN pix2pix", 6, zoo_graphs.NormedLastUnet, of_images),
    "cyclegan_batch": Network(_CYCLEGAN, 8, zoo_blocks.resnet_translator(nn.BatchNorm2d, bias=False), of_images),
    "cyclegan_instance": Network(_CYCLEGAN, 8, zoo_blocks.resnet_translator(nn.InstanceNorm2d, bias=True), of_images),
    "discogan_generator": Network(
        "Kim et al. 2017; SKTBrain/DiscoGAN", 8, zoo_chains.encoder_decoder, of_images, size=32
    ),
    "discogan_discriminator": Network(
        "Kim et al. 2017; SKTBrain/DiscoGAN", 5, zoo_graphs.FeatureDiscriminator, of_images, size=32
    ),
    "sngan_critic": Network(_SNGAN, 7, zoo_graphs.SpectralCritic, of_images),
    "sngan_resnet_generator": Network(_SNGAN, 7, zoo_blocks.ResidualGenerator, of_flat_latents),
    "sngan_resnet_critic": Network(_SNGAN, 8, zoo_blocks.ResidualCritic, of_images),
    "srgan_generator": Network(f"Ledig et al. 2017; {_PYTORCH_GAN}", 7, zoo_blocks.SuperResolution, of_images, size=6),
    "srgan_discriminator": Network(
        f"Ledig et al. 2017; {_PYTORCH_GAN}", 9, zoo_chains.strided_pairs_discriminator, of_images, size=32
    ),
    "vaegan_autoencoder": Network(_VAEGAN, 7, zoo_graphs.Autoencoder, of_images_and_noise),
    "vaegan_discriminator": Network(_VAEGAN, 4, zoo_graphs.JudgeOfReconstructions, of_images),
    "mnist_generator": Network(_MNIST, 4, zoo_graphs.FunctionalGenerator, of_latents),
    "mnist_discriminator": Network(_MNIST, 4, zoo_graphs.FunctionalDiscriminator, of_images),
    "conditional_generator": Network(
        f"Mirza & Osindero 2014; {_MNIST}", 5, zoo_graphs.ConditionalGenerator, of_latents_and_labels
    ),
    "conditional_discriminator": Network(
        f"Mirza & Osindero 2014; {_MNIST}", 5, zoo_graphs.ConditionalDiscriminator, of_images_and_labels
    ),
    "infogan_heads": Network("Chen et al. 2016; Natsu6767/InfoGAN-PyTorch", 8, zoo_graphs.SharedTrunk, of_images),
    "sagan_generator": Network(
        "Zhang et al. 2018; heykeetae/Self-Attention-GAN", 6, zoo_blocks.AttentionGenerator, of_latents
    ),
}
