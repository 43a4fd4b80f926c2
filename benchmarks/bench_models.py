"""Networks with the layers of public GANs, forward + backward in training mode: stock, fused, and by the backend.

They are those of tests/models_zoo.py, at the widths and sizes that they are trained with, under autocast to bfloat16,
channels_last and compiled, in CUDA graphs: ``stock``, ``fused`` after `fastgan.fuse`, and ``fused-backend`` by
``torch.compile(backend="fastgan")``. Those that stock cannot run in channels_last, because they flatten by ``view``,
are in NCHW. Dropout is off, so that all of them compute the same numbers. A variant is timed only after its results,
gradients and running statistics were at most twice as far from float64 as those of stock.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fastgan
from benchmarks.timing import (
    DEVICE,
    DTYPES,
    ON_GPU,
    PeakMemory,
    clock,
    cudnn_benchmark,
    describe,
    fixed,
    forget,
    in_fast_loop,
    measure,
)
from fastgan.training.weights import keep_compilable, wants_default_layout
from tests.models_zoo import ZOO

PRECISION = "bf16"
VARIANTS = ("stock", "fused", "fused-backend")
FULL = {  # name → (width, image size, batch)
    "dcgan_generator": (64, 64, 128),
    "dcgan_discriminator": (64, 64, 128),
    "upsampling_generator": (64, 32, 64),
    "dropout_discriminator": (16, 32, 64),
    "tutorial_discriminator": (64, 64, 128),
    "pix2pix_unet": (64, 256, 4),
    "pix2pix_patches": (64, 256, 4),
    "normed_last_unet": (64, 256, 4),
    "cyclegan_batch": (64, 128, 4),
    "cyclegan_instance": (64, 128, 4),
    "discogan_generator": (64, 64, 128),
    "discogan_discriminator": (64, 64, 128),
    "sngan_critic": (64, 32, 64),
    "sngan_resnet_generator": (256, 32, 64),
    "sngan_resnet_critic": (128, 32, 64),
    "srgan_generator": (64, 24, 16),
    "srgan_discriminator": (64, 96, 16),
    "vaegan_autoencoder": (64, 64, 64),
    "vaegan_discriminator": (32, 64, 64),
    "mnist_generator": (128, 32, 128),
    "mnist_discriminator": (128, 32, 128),
    "conditional_generator": (128, 32, 128),
    "conditional_discriminator": (64, 32, 128),
    "infogan_heads": (64, 28, 128),
    "sagan_generator": (64, 32, 64),
}
SHORT = (
    "tutorial_discriminator",
    "pix2pix_unet",
    "cyclegan_batch",
    "sngan_critic",
    "srgan_generator",
    "mnist_generator",
)


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full", default=False)
    settings = FULL if full else {name: FULL[name] for name in SHORT}
    metafunc.parametrize("case", settings.items(), ids=settings, indirect=True, scope="module")
    metafunc.parametrize("variant", VARIANTS)


def _collected(network, results, gradients):
    """Lists of the results and gradients of a step, and of the statistics after it."""
    buffers = [buffer.clone() for buffer in network.buffers() if buffer.is_floating_point()]
    return {"results": [result.detach() for result in results], "gradients": gradients, "statistics": buffers}


class Case:
    """One network of the zoo, with inputs and the gradients of its results."""

    def __init__(self, name, width, size, batch, precision=PRECISION):
        self.name, self.size, self.batch, self.dtype = name, size, batch, DTYPES[precision]
        torch.manual_seed(0)
        network = ZOO[name].build(width, size).to(DEVICE)
        for module in network.modules():
            module.train(not isinstance(module, nn.modules.dropout._DropoutNd))
        inputs = ZOO[name].inputs(batch, size, device=DEVICE)
        self.takes_latents = inputs[0].shape[2:] == (1, 1)
        for memory_format in (torch.channels_last, torch.contiguous_format):
            self.network = network.to(memory_format=memory_format)
            self.inputs = [_in(memory_format, x).requires_grad_(x.shape[2:].numel() > 1) for x in inputs]  # not latents
            self.memory_format = memory_format
            try:
                with torch.no_grad(), self._autocast():
                    results = tree_leaves(copy.deepcopy(network)(*self.inputs))
                break
            except RuntimeError as error:
                if not wants_default_layout(error):  # a network that flattens by `view` is for NCHW
                    raise
        self.state = copy.deepcopy(network.state_dict())
        self.gradients = [_in(self.memory_format, torch.randn_like(result)) for result in results]

    def build(self, variant):
        """The network as `variant` runs it: a module with the parameters, and the function that calls it."""
        network = copy.deepcopy(self.network)
        if variant == "fused":
            fastgan.fuse(network)
        elif variant == "stock" and ON_GPU and self.takes_latents:
            keep_compilable(network)
        if not ON_GPU:
            return network, network
        backend = "fastgan" if variant == "fused-backend" else "inductor"
        if backend not in torch._dynamo.list_backends(exclude_tags=()):
            pytest.skip(f'torch.compile has no backend "{backend}" here')
        return network, torch.compile(network, backend=backend, dynamic=False, fullgraph=True)

    def step(self, network, call):
        """(results, gradients) of one forward and backward."""
        wanted = [*network.parameters(), *(x for x in self.inputs if x.requires_grad)]
        with self._autocast():
            results = tree_leaves(call(*self.inputs))
        return results, torch.autograd.grad(results, wanted, self.gradients)

    def everything(self, network, call):
        """Lists of the results, the gradients and the statistics of a step from the first state."""
        network.load_state_dict(self.state)
        return _collected(network, *self.step(network, call))

    @functools.cached_property
    def exact(self):
        """`everything` of stock, in float64."""
        network = copy.deepcopy(self.network).double()
        inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in self.inputs]
        wanted = [*network.parameters(), *(x for x in inputs if x.requires_grad)]
        with cudnn_benchmark(False):  # it runs just once
            results = tree_leaves(network(*inputs))
            gradients = torch.autograd.grad(results, wanted, [g.double() for g in self.gradients])
        return _collected(network, results, gradients)

    @functools.cached_property
    def stock_distances(self):
        found = self.everything(*[copy.deepcopy(self.network)] * 2)
        return {kind: distance(found[kind], exact) for kind, exact in self.exact.items()}

    def check(self, network, call):
        """AssertionError unless a step is at most twice as far from float64 as eager stock in the same precision."""
        found = self.everything(network, call)
        for kind, exact in self.exact.items():
            allowed = min(2 * self.stock_distances[kind] + 4 * torch.finfo(self.dtype).eps, 0.5)
            off = distance(found[kind], exact)
            assert off <= allowed, f"wrong: the {kind} are off by {off:.2e}, allowed {allowed:.2e}"

    def _autocast(self):
        return torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype != torch.float32)


def _in(memory_format, x):
    return x.detach().to(memory_format=memory_format) if x.dim() == 4 else x.detach()


def distance(found, exact):
    """Root mean square, over tensors, of the norm of the difference in units of the exact tensor's norm.

    A tensor of almost zero beside the largest, as the gradient of a bias before BatchNorm is, counts in units of 1 % of
    that one's norm.
    """
    if not exact:
        return 0.0
    norms = torch.stack([tensor.norm() for tensor in exact])
    differences = torch.stack([(f.double() - e).norm() for f, e in zip(found, exact, strict=True)])
    return (differences / norms.clamp(min=1e-2 * norms.max())).square().mean().sqrt().item()


@pytest.fixture(scope="module")
def case(request):
    forget()
    name, setting = request.param
    return Case(name, *setting)


@pytest.mark.skipif(not ON_GPU, reason="measured on a GPU only: its variants are compiled and captured")
@pytest.mark.benchmark(group="models", timer=clock)
def test_model(benchmark, case, variant):
    about = dict(variant=variant, batch=case.batch, image_size=case.size, network=case.name)
    about["memory_format"] = str(case.memory_format).removeprefix("torch.")
    describe(benchmark, precision=PRECISION, **about)
    forget()
    network, call = case.build(variant)
    case.check(network, call)
    memory = PeakMemory()
    with memory.watching_captures():
        loop, calls = in_fast_loop(lambda: case.step(network, call), [()])
    peak = memory.steady(loop)
    median = measure(benchmark, loop, seconds=0.2) / calls
    benchmark.extra_info.update(
        microseconds=fixed(median * 1e6), images_per_sec=fixed(case.batch / median), peak_memory_mb=peak
    )
