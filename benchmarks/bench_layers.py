"""Every layer of the 64×64 DCGAN, forward and forward + backward, stock against fused, with the device's ceilings.

Stock is channels_last, and on a GPU torch.compile with cudnn.benchmark. There both run in CUDA graphs over inputs
larger than the L2 cache, in bfloat16 (BatchNorm's own parameters in float32, as under autocast). A layer is timed only
after its result, its gradients and its running statistics passed the rule of tests/accuracy.py against float64.
"""

import copy
import functools

import pytest
import torch
from torch import nn

import fastgan
from benchmarks import work
from benchmarks.timing import (
    DEVICE,
    DTYPES,
    ON_GPU,
    PeakMemory,
    clock,
    copies_beyond_cache,
    cudnn_benchmark,
    describe,
    fixed,
    forget,
    in_fast_loop,
    measure,
    measure_in_turn,
)
from fastgan.models import Discriminator, Generator
from fastgan.training.weights import keep_compilable
from tests.accuracy import error

PRECISION, BATCHES = ("bf16", (128, 1024)) if ON_GPU else ("fp32", (4,))
DTYPE = DTYPES[PRECISION]
SECONDS = 0.2


@pytest.mark.benchmark(group="ceilings", timer=clock)
@pytest.mark.parametrize("precision", ["bf16"] if ON_GPU else ["fp32", "bf16"])
def test_matmul(benchmark, precision):
    """The rate of a large square product: what arithmetic can reach here."""
    n = 8192 if ON_GPU else 1024
    describe(benchmark, variant="ceiling", batch=None, precision=precision)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPES[precision]) for _ in range(2))
    median = measure(benchmark, lambda: a @ b)
    benchmark.extra_info["tflops"] = fixed(2 * n**3 / median / 1e12)


@pytest.mark.benchmark(group="ceilings", timer=clock)
def test_copy(benchmark):
    """Bytes read and written a second by copying memory far larger than any cache."""
    describe(benchmark, variant="ceiling", batch=None, precision=PRECISION)
    source = torch.empty(1 << (30 if ON_GPU else 28), device=DEVICE, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    median = measure(benchmark, lambda: target.copy_(source))
    benchmark.extra_info["tb_per_sec"] = fixed(2 * source.numel() / median / 1e12)


def dcgan_layers():
    """name → (Sequential of one convolution and what follows it, shape of its input without the batch)."""
    layers = {}
    for letter, network, shape in (("G", Generator(), (100, 1, 1)), ("D", Discriminator(), (3, 64, 64))):
        groups = []
        for module in network.main:
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                groups.append([])
            groups[-1].append(module)
        for i, group in enumerate(groups, start=1):
            layer = nn.Sequential(*group)
            out = copy.deepcopy(layer)(torch.zeros(2, *shape)).shape[1:]
            layers[f"{letter}{i} {shape[0]}→{out[0]}, {shape[1]}→{out[1]}"] = (layer, tuple(shape))
            shape = tuple(out)
    return layers


LAYERS = dcgan_layers()


class Case:
    """One layer at one batch size: the three forms of it, and inputs for them."""

    def __init__(self, name, batch):
        self.name, self.batch = name, batch
        torch.manual_seed(0)
        layer, shape = LAYERS[name]
        layer = copy.deepcopy(layer).to(DEVICE, memory_format=torch.channels_last)
        layer[0].to(DTYPE)
        self.exact = copy.deepcopy(layer).double()
        self.layers = {"stock": copy.deepcopy(layer), "fused": fastgan.fuse(copy.deepcopy(layer))}
        # The latents are no one's result: nobody asks for their gradient.
        self.wants_input_gradient = not name.startswith("G1")
        if ON_GPU:
            if name.startswith("G1"):
                keep_compilable(self.layers["stock"])
            self.layers["stock"] = torch.compile(self.layers["stock"], dynamic=False, fullgraph=True)
        (self.work,) = work.layers(copy.deepcopy(layer).to("meta"), torch.empty(2, *shape, device="meta"))
        size = batch * (self.work.inputs + self.work.outputs) * DTYPE.itemsize
        with torch.no_grad():
            result_shape = copy.deepcopy(layer)(self._random(2, *shape)).shape[1:]
        # A gradient comes in the layout that the layer after it reads and writes.
        self.inputs = [
            (self._random(batch, *shape).requires_grad_(self.wants_input_gradient), self._random(batch, *result_shape))
            for _ in range(copies_beyond_cache(size))
        ]

    def _random(self, *shape):
        return torch.randn(*shape, device=DEVICE, dtype=DTYPE).to(memory_format=torch.channels_last)

    @functools.cached_property
    def expected(self):
        x, gradient = self.inputs[0]
        x = x.detach().double().requires_grad_(self.wants_input_gradient)
        with cudnn_benchmark(False):  # float64 runs just once
            return results(self.exact, x, gradient.double())

    @functools.cached_property
    def stock_results(self):
        return results(self.layers["stock"], *self.inputs[0])

    def check(self, variant):
        """AssertionError unless `variant`, run afresh, is as right as stock in the same precision."""
        got = self.stock_results if variant == "stock" else results(self.layers[variant], *self.inputs[0])
        for name, exact in self.expected.items():
            stock = self.stock_results[name]
            allowed = 2 * error(stock, exact) + 4 * torch.finfo(DTYPE).eps
            off = error(got[name], exact)
            # Stock is held to a bound of its own: its error against float64 must be that of its precision.
            allowed = min(allowed, 0.2) if variant == "stock" else allowed
            assert off <= allowed, f"wrong: {name} is off by {off:.2e}, allowed {allowed:.2e}"


def forward_backward(layer, x, gradient):
    """The layer's result and all gradients, in training mode."""
    wanted = [*layer.parameters()] + ([x] if x.requires_grad else [])
    y = layer(x)
    return y, torch.autograd.grad(y, wanted, gradient)


DIRECTIONS = {"forward": lambda layer, x, gradient: layer(x), "forward+backward": forward_backward}


def results(layer, x, gradient):
    """Everything a training pass gives, by name; the layer's running statistics start afresh."""
    norms = [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
    y, gradients = forward_backward(layer, x, gradient)
    named = {"result": y.detach()}
    named |= {f"gradient {i}": g for i, g in enumerate(gradients)}
    for norm in norms:
        named |= {"running mean": norm.running_mean.clone(), "running variance": norm.running_var.clone()}
    return named


@pytest.fixture(
    scope="module", params=[(n, b) for b in BATCHES for n in LAYERS], ids=lambda p: f"{p[0].split()[0]}-batch{p[1]}"
)
def case(request):
    forget()
    return Case(*request.param)


@pytest.mark.benchmark(group="layers", timer=clock)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", ["stock", "fused"])
def test_layer(benchmark, case, variant, direction):
    describe(benchmark, variant=variant, batch=case.batch, precision=PRECISION, layer=case.name, direction=direction)
    benchmark.extra_info.update(work_of(case.work, direction, case.wants_input_gradient, case.batch))
    case.check(variant)

    def looped(layer):
        return in_fast_loop(lambda *arguments: DIRECTIONS[direction](layer, *arguments), case.inputs)

    memory = PeakMemory()
    with memory.watching_captures():
        loop, calls = looped(case.layers[variant])
    peak = memory.steady(loop)
    eager = None if ON_GPU or variant == "stock" else looped(case.layers["stock"])[0]
    median, of_eager = (t and t / calls for t in measure_in_turn(benchmark, loop, eager, seconds=SECONDS))
    benchmark.extra_info.update(
        calls=calls,
        microseconds=fixed(median * 1e6),
        eager_microseconds=of_eager and fixed(of_eager * 1e6),
        images_per_sec=fixed(case.batch / median),
        peak_memory_mb=peak,
    )


def work_of(layer, direction, wants_input_gradient, batch):
    """The least arithmetic and traffic of a call: images and the weights, in the precision of the benchmark."""
    parts = [layer.forward]
    if direction != "forward":
        parts += [layer.weight_gradient] + ([layer.input_gradient] if wants_input_gradient else [])
    flops, numbers = (sum(part[i] for part in parts) for i in (0, 1))
    weights = len(parts) * layer.conv.weight.numel()
    return {"flops": flops * batch, "bytes": (numbers * batch + weights) * DTYPE.itemsize}
