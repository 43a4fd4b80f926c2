"""The GAN steps that are compared: stock ones, from the PyTorch example to the best that stock can do, and ours.

Each is an object like ``fastgan.training.TrainStep``: ``step(real_images)`` returns the losses, and ``generator``,
``discriminator``, ``optimizer_g`` and ``optimizer_d`` are what it trains.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import fastgan
from benchmarks import work
from benchmarks.timing import DEVICE, DTYPES, ON_GPU, graphed
from fastgan.models import Discriminator, Generator
from fastgan.training import TrainStep
from fastgan.training.weights import keep_compilable

# What a table of training steps on a GPU holds when it is complete, with GPU_VARIANTS below.
IMAGE_SIZES, BATCHES = (28, 64, 128), (64, 128, 256, 1024)
# Of one variant, by device, how it grows with the batch: on a GPU for 64×64 images up to this one, too.
GROWING, LARGEST_BATCH = {"cuda": "fused-bf16", "cpu": "fused-fp32"}, 2048
NZ, LR, BETAS = 100, 2e-4, (0.5, 0.999)
# Enough for torch.compile, cuDNN's choice of algorithms and the state of Adam to be there.
WARM_UP = 8 if ON_GPU else 3


@dataclass(frozen=True)
class Setting:
    """A size of the DCGAN: 28×28 images are grey and have narrow networks, as ``scripts/train.py`` has them."""

    image_size: int
    batch: int

    @property
    def channels(self):
        return 1 if self.image_size < 64 else 3

    @property
    def width(self):
        return 32 if self.image_size < 64 else 64

    def __str__(self):
        return f"{self.image_size}px-batch{self.batch}"

    def networks(self, device=DEVICE):
        """(generator, discriminator), the same ones at each call."""
        torch.manual_seed(0)
        size = {"image_size": self.image_size, "nc": self.channels}
        generator, discriminator = Generator(nz=NZ, ngf=self.width, **size), Discriminator(ndf=self.width, **size)
        return generator.to(device), discriminator.to(device)

    def images(self):
        """A batch in [−1, 1], float32: smooth, as pictures are, so that the discriminator has something to learn."""
        random = torch.Generator().manual_seed(0)
        coarse = torch.rand(self.batch, self.channels, 8, 8, generator=random) * 2 - 1
        return F.interpolate(coarse.to(DEVICE), size=(self.image_size,) * 2, mode="bilinear")

    def work(self, precision):
        """``work.step_work`` of this size."""
        generator, discriminator = self.networks(device="meta")
        latent = torch.empty(2, NZ, device="meta")
        images = torch.empty(2, self.channels, self.image_size, self.image_size, device="meta")
        return work.step_work(generator, discriminator, latent, images, bytes_per_number=DTYPES[precision].itemsize)


class ExampleStep:
    """The update of the PyTorch DCGAN example as it stands: float32, NCHW, labels, sigmoid and BCELoss, D's gradients
    from two backward passes, weight gradients of D in G's update that nobody uses, Adam with its defaults.

    Kinder to it than the example in one thing: nothing is read back from the GPU for a log line.
    """

    def __init__(self, generator, discriminator):
        self.generator, self.discriminator, self.criterion = generator, discriminator, nn.BCELoss()
        self.optimizer_g = torch.optim.Adam(generator.parameters(), lr=LR, betas=BETAS)
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=LR, betas=BETAS)

    def __call__(self, real_images):
        label = torch.full((len(real_images),), 1.0, device=real_images.device)
        self.discriminator.zero_grad()
        real_output = self.discriminator(real_images).sigmoid()
        loss_real = self.criterion(real_output, label)
        loss_real.backward()

        fake_images = self.generator(torch.randn(len(real_images), NZ, 1, 1, device=real_images.device))
        label.fill_(0.0)
        fake_output = self.discriminator(fake_images.detach()).sigmoid()
        loss_fake = self.criterion(fake_output, label)
        loss_fake.backward()
        self.optimizer_d.step()

        self.generator.zero_grad()
        label.fill_(1.0)
        loss_g = self.criterion(self.discriminator(fake_images).sigmoid(), label)
        loss_g.backward()
        self.optimizer_g.step()
        return _losses(loss_real + loss_fake, loss_g, real_output, fake_output)


class StockStep:
    """The same update, tuned as one tunes stock PyTorch: channels_last, autocast, a loss on logits; with
    ``fused_adam`` Adam's fused form, capturable on a GPU; with ``compile`` both networks through torch.compile, each
    on its own."""

    def __init__(self, generator, discriminator, *, precision, compile=False, fused_adam=False):
        self.generator = generator.to(memory_format=torch.channels_last)
        self.discriminator = discriminator.to(memory_format=torch.channels_last)
        self.dtype = DTYPES[precision]
        self._g, self._d, adam = self.generator, self.discriminator, {"lr": LR, "betas": BETAS}
        if compile:
            keep_compilable(generator)
            self._g, self._d = (torch.compile(m, fullgraph=True, dynamic=False) for m in (self._g, self._d))
        if fused_adam:
            adam.update(fused=True, capturable=ON_GPU)
        self.optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)

    def __call__(self, real_images):
        real_images = real_images.to(memory_format=torch.channels_last)
        ones = torch.ones(len(real_images), device=real_images.device)
        self.optimizer_d.zero_grad(set_to_none=True)
        with self._autocast():
            real_logits = self._d(real_images)
        loss_real = F.binary_cross_entropy_with_logits(real_logits.float(), ones)
        loss_real.backward()

        with self._autocast():
            fake_images = self._g(torch.randn(len(real_images), NZ, 1, 1, device=real_images.device))
            fake_logits = self._d(fake_images.detach())
        loss_fake = F.binary_cross_entropy_with_logits(fake_logits.float(), torch.zeros_like(ones))
        loss_fake.backward()
        self.optimizer_d.step()

        self.optimizer_g.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self._d(fake_images)
        loss_g = F.binary_cross_entropy_with_logits(logits.float(), ones)
        loss_g.backward()
        self.optimizer_g.step()
        return _losses(loss_real + loss_fake, loss_g, real_logits.float().sigmoid(), fake_logits.float().sigmoid())

    def _autocast(self):
        return torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype != torch.float32)


class GraphedStep:
    """A step in one CUDA graph: images are copied to where it reads them, then everything is one launch."""

    def __init__(self, step, images):
        self.generator, self.discriminator = step.generator, step.discriminator
        self.optimizer_g, self.optimizer_d = step.optimizer_g, step.optimizer_d
        self.images = images.clone()
        self._replay = graphed(lambda: step(self.images), warm_up=WARM_UP)

    def __call__(self, real_images):
        self.images.copy_(real_images)
        return self._replay()


def _losses(loss_d, loss_g, real_output, fake_output):
    losses = {"loss_d": loss_d, "loss_g": loss_g, "d_real": real_output.mean(), "d_fake": fake_output.mean()}
    return {name: value.detach() for name, value in losses.items()}


def _stock_step(precision, *, graph=False, **options):
    def build(networks, images):
        step = StockStep(*networks, precision=precision, **options)
        return GraphedStep(step, images) if graph else step

    return build


def _our_step(precision, **options):
    """``fastgan.training.TrainStep`` with these options, in a CUDA graph where there is CUDA."""
    options |= {"latent_dim": NZ, "lr": LR, "betas": BETAS, "precision": precision, "cuda_graph": True}
    return lambda networks, _: TrainStep(*networks, **options)


# name → (networks, images) → step
GPU_VARIANTS = {
    "eager-fp32": lambda networks, _: ExampleStep(*networks),
    "eager-bf16": _stock_step("bf16"),
    "compile-bf16": _stock_step("bf16", compile=True, fused_adam=True),
    "compile-graph-bf16": _stock_step("bf16", compile=True, fused_adam=True, graph=True),
    "stock-step-graph-bf16": _our_step("bf16", fused=False, compile=True),
    "fused-bf16": _our_step("bf16", fused=True, compile=True),
    # As `scripts/train.py --fused` does it: the step in a graph, its networks not compiled.
    "fused-uncompiled-bf16": _our_step("bf16", fused=True, compile=False),
    # `fastgan.fuse` in a loop that is stock otherwise: neither compiled nor captured, every launch from Python.
    "fused-eager-bf16": lambda networks, _: StockStep(*map(fastgan.fuse, networks), precision="bf16"),
    # The discriminator on real and on fake images apart, for its memory.
    "fused-two-passes-bf16": _our_step("bf16", fused=True, compile=True, one_pass=False),
}
CPU_VARIANTS = {
    "eager-fp32": lambda networks, _: ExampleStep(*networks),
    "eager-tuned-fp32": _stock_step("fp32", fused_adam=True),
    "compile-fp32": _stock_step("fp32", compile=True, fused_adam=True),
    "fused-fp32": _our_step("fp32", fused=True, compile=False),
    "eager-bf16": _stock_step("bf16", fused_adam=True),
    "compile-bf16": _stock_step("bf16", compile=True, fused_adam=True),
    "fused-bf16": _our_step("bf16", fused=True, compile=False),
}
VARIANTS = GPU_VARIANTS if ON_GPU else CPU_VARIANTS


def precision_of(variant):
    """ "fp32" or "bf16": the end of a variant's name."""
    return variant.rsplit("-", 1)[1]
