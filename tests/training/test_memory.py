"""The memory of a step, told without a GPU: PyTorch's fake tensors hold nothing, but know their sizes and their end.

Of what the kernels allocate within an operator and free at its end, the parts of a weight gradient are counted; the
parts of statistics, a few MiB at the most, are not.
"""

import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.stock import NZ, Setting, StockStep
from fastgan import fuse
from fastgan.kernels.weight_grad import WANTED_OUTPUTS
from fastgan.training import TrainStep
from fastgan.training.adam import KernelAdam


@pytest.fixture(autouse=True)
def kernels_operators(monkeypatch):
    """The operators that run on a GPU; of fake tensors they make more fake ones."""
    monkeypatch.setenv("FASTGAN_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


class Memory(TorchDispatchMode):
    """Bytes of all tensors that operators make within it, for as long as they live."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.fastgan.conv_weight_grad.default:
            self.peak = max(self.peak, self.now + 2 * 4 * WANTED_OUTPUTS)  # in parts, of float32 whatever comes of them
        results = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage):
        name = storage._cdata
        if name not in self.sizes:
            self.sizes[name] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, name)

    def _forget(self, name):
        self.now -= self.sizes.pop(name)


def networks_of(setting, fused):
    networks = setting.networks(device="cpu")
    if fused:  # here, because fuse follows a forward with real tensors
        for network in networks:
            fuse(network)
    return networks


def make_fake(network):
    """Each parameter and buffer anew, where fake tensors are made, in the layout that steps put them in."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                layout = torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, memory_format=layout))
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def step_peak(monkeypatch, batch, *, fused, **options):
    """Bytes that a steady step in bf16 holds at its highest, with the parameters and a batch in float32."""
    setting = Setting(64, batch)
    networks = networks_of(setting, fused)
    monkeypatch.setattr(nn.Module, "to", lambda module, *args, **kwargs: module)  # make_fake has done it
    monkeypatch.setattr("fastgan.fuse", lambda module: module)
    monkeypatch.setattr(KernelAdam, "_is_for_kernel", lambda *_: False)  # in place: it takes no memory, but addresses
    memory = Memory()
    with FakeTensorMode(), memory:
        for network in networks:
            make_fake(network)
        images = torch.empty(batch, setting.channels, 64, 64)
        if fused:
            step = TrainStep(*networks, latent_dim=NZ, precision="bf16", **options)
            step._can_take_one_pass = lambda real, fake: True  # the trial computes with real numbers
            weights = [parameter for network in networks for parameter in network.parameters()]
            copies = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]  # a GPU's WeightCopies
            assert len(copies) == 24
        else:
            step = StockStep(*networks, precision="bf16")
        for _ in range(2):  # the first one makes the optimizers' state
            memory.peak = memory.now
            step(images)
    return memory.peak


@pytest.mark.parametrize("batch", (128, 1024))
def test_two_passes_need_no_more_memory_than_stock(monkeypatch, batch):
    assert step_peak(monkeypatch, batch, fused=True, one_pass=False) <= step_peak(monkeypatch, batch, fused=False)


def test_one_pass_adds_the_discriminators_other_half_and_no_more(monkeypatch):
    one, two = (step_peak(monkeypatch, 1024, fused=True, one_pass=one_pass) for one_pass in (True, False))
    stock = step_peak(monkeypatch, 1024, fused=False)
    # Of a real image what the discriminator keeps, in bf16: itself, the first layer's result, and of the three layers
    # with BatchNorm both sides; then the gradients on both sides of the BatchNorm that backward is at.
    kept = 3 * 64**2 + 64 * 32**2 + 2 * (128 * 16**2 + 256 * 8**2 + 512 * 4**2) + (512 * 4**2 + 256 * 8**2)
    assert one - two <= 1024 * 2 * kept * 1.01
    assert one <= 1.35 * stock


def test_memory_grows_with_the_batch(monkeypatch):
    peaks = [step_peak(monkeypatch, batch, fused=True, one_pass=True) for batch in (64, 128, 256)]
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.01)
