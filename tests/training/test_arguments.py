"""What a TrainStep cannot take is refused with the name of it, before anything is changed."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from fastgan.training import TrainStep
from tests.training.small_gan import BATCH, NZ, make_networks, real_batches

VALUES = [
    (dict(latent_dim=0), "latent_dim must be a positive integer or a shape of such; got 0"),
    (dict(latent_dim=2.5), "latent_dim must be"),
    (dict(latent_dim=()), "latent_dim must be"),
    (dict(latent_dim=True), "latent_dim must be a positive integer or a shape of such; got True"),
    (dict(lr=0.0), "lr must be a positive number; got 0.0"),
    (dict(lr=float("nan")), "lr must be a positive number; got nan"),
    (dict(lr="0.1"), "lr must be a positive number; got '0.1'"),
    (dict(betas=(0.5, 1.0)), "betas must be two numbers in [0, 1); got (0.5, 1.0)"),
    (dict(betas=0.5), "betas must be"),
    (dict(betas=(0.5, float("nan"))), "betas must be"),
    (dict(precision="fp8"), "precision must be one of fp32, bf16, fp16; got 'fp8'"),
    (dict(precision=["fp32"]), "precision must be one of fp32, bf16, fp16; got ['fp32']"),
    (dict(precision="fp16"), "CUDA"),
    (
        dict.fromkeys(("generator", "discriminator"), nn.Conv2d(2, 1, 16)),
        "must be two networks; got one module for both",
    ),
    (dict(generator=nn.ReLU()), "generator must have parameters to learn; got a ReLU without any"),
    (dict(discriminator=nn.Flatten()), "discriminator must have parameters to learn; got a Flatten without any"),
    (dict(discriminator=nn.Conv2d(2, 1, 16, device="meta")), "discriminator is on the meta device: its"),
]
TYPES = [
    (dict(generator=None), "generator must be an nn.Module; got NoneType"),
    (dict(discriminator=nn.Conv2d), "discriminator must be an nn.Module; got type"),
    *((dict([(name, "no")]), f"{name} must be True or False; got 'no'") for name in ("fused", "compile", "cuda_graph")),
    (dict(one_pass="yes"), "one_pass must be True or False; got 'yes'"),
    (dict(source=1), "source must have a method draw() that returns images; got int"),
]


@pytest.mark.parametrize(
    "error, change, message", [(ValueError, *v) for v in VALUES] + [(TypeError, *t) for t in TYPES]
)
def test_bad_arguments(error, change, message):
    networks = dict(zip(("generator", "discriminator"), make_networks(), strict=True))
    with pytest.raises(error, match=re.escape(message)):
        TrainStep(**{**networks, "latent_dim": NZ, **change})
    assert not any("forward" in vars(module) for network in networks.values() for module in network.modules())


@pytest.mark.parametrize(
    "images, error, message",
    [
        (
            torch.zeros(BATCH, 2, 16, 16, dtype=torch.uint8),
            ValueError,
            "must be floating point, in [-1, 1]; got torch.uint8",
        ),
        (torch.zeros(0, 2, 16, 16), ValueError, "must hold at least one image; got shape (0, 2, 16, 16)"),
        (np.zeros((BATCH, 2, 16, 16)), TypeError, "must be a tensor; got ndarray"),
        ([torch.zeros(BATCH, 2, 16, 16), torch.zeros(BATCH)], TypeError, "must be a tensor; got list: a data set that"),
    ],
    ids=["uint8", "empty", "numpy", "with labels"],
)
def test_bad_images(images, error, message):
    step = TrainStep(*make_networks(), latent_dim=NZ, fused=False)
    with pytest.raises(error, match=re.escape("real_images " + message)):
        step(images)

    class Source:
        def draw(self):
            return images

    with pytest.raises(error, match=re.escape("what source.draw() returns " + message)):
        TrainStep(*make_networks(), latent_dim=NZ, source=Source())()


class WithLatents(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, latent):
        return self.generator(latent), latent


def test_a_generator_that_returns_more_than_images():
    generator, discriminator = make_networks()
    with pytest.raises(TypeError, match="what the generator returns must be a tensor; got tuple"):
        TrainStep(WithLatents(generator), discriminator, latent_dim=NZ)(*real_batches(1))


@pytest.mark.parametrize("frozen", ["generator", "discriminator"])
def test_nothing_to_learn(frozen):
    networks = dict(zip(("generator", "discriminator"), make_networks(), strict=True))
    networks[frozen].requires_grad_(False)
    step, before = TrainStep(**networks, latent_dim=NZ), copy.deepcopy(networks["discriminator"].state_dict())
    with pytest.raises(ValueError, match=f"{frozen} must have parameters that learn"):
        step(*real_batches(1))
    torch.testing.assert_close(networks["discriminator"].state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    step = TrainStep(*make_networks(), latent_dim=NZ)
    with mode(), pytest.raises(RuntimeError, match="a training step needs gradients"):
        step(*real_batches(1))
    step(*real_batches(1))  # nothing was spoilt


@pytest.mark.gpu
def test_networks_on_two_devices():
    generator, discriminator = make_networks()
    with pytest.raises(ValueError, match="must be on one device; got cpu and cuda:0"):
        TrainStep(generator, discriminator.cuda(), latent_dim=NZ)
