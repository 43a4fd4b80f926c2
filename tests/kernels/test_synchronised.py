"""BatchNorm over the batches of two processes against plain torch with the whole batch in one."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from fastgan.ops import fused_layer
from fastgan.ops.layer_spec import LayerSpec
from tests.interpreter import use_interpreter

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


class Case(NamedTuple):
    transposed: bool = False
    activation: str | None = None
    activation_first: bool = False
    batches: tuple = (3, 5)  # images of each process
    groups: int = 1
    size: tuple = (5, 6)
    backend: str = "triton"
    dtype: torch.dtype = torch.float32

    def convolution(self):
        return dict(stride=2, padding=1) if self.size != (4, 4) else dict(stride=1, padding=0)

    def constants(self, process_group):
        where = [(value, value) for value in (*self.convolution().values(), 0)]
        more = dict(
            batch_statistics=True, momentum=0.3, eps=1e-3, batch_groups=self.groups, process_group=process_group
        )
        return LayerSpec(self.transposed, *where, self.activation, 0.2, True, self.activation_first, **more)


LAYERS = {
    "conv": Case(activation="leaky_relu"),
    "transposed": Case(transposed=True, activation="tanh"),
    "activation first": Case(activation="sigmoid", activation_first=True),
    "groups": Case(activation="relu", groups=2, batches=(4, 2)),
    "one value": Case(activation="tanh", batches=(1, 2), size=(4, 4)),
    "reference": Case(activation="tanh", backend="reference", dtype=torch.float64),
    "reference, groups": Case(
        activation="sigmoid", activation_first=True, groups=2, batches=(2, 4), backend="reference"
    ),
}


def draw(layer):
    """(batch of each process, [weight, bias, gamma, beta], [running_mean, running_var], gradient of each process)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(layer.dtype)

    xs = [normal(n, 3, *layer.size) + rank for rank, n in enumerate(layer.batches)]  # of different statistics
    parameters = [normal(*((3, 4) if layer.transposed else (4, 3)), 4, 4) / 5, normal(4), normal(4), normal(4)]
    running = [normal(4), normal(4).abs() + 0.5]
    shape = _convolve(layer, xs[0], *parameters[:2]).shape[1:]
    return xs, parameters, running, [normal(n, *shape) for n in layer.batches]


def _convolve(layer, x, weight, bias):
    return (F.conv_transpose2d if layer.transposed else F.conv2d)(x, weight, bias, **layer.convolution())


def _in_one_process(layer):
    """What both processes together should find: outputs, input gradients, summed parameter gradients, statistics."""
    xs, parameters, running, grads = draw(layer)
    xs, parameters = ([t.double().requires_grad_() for t in tensors] for tensors in (xs, parameters))
    running = [t.double() for t in running]
    weight, bias, gamma, beta = parameters
    parts = [x.chunk(layer.groups) for x in xs]
    outputs = [[] for _ in xs]
    for group in zip(*parts, strict=True):
        y = _convolve(layer, torch.cat(group), weight, bias)
        y = y if not layer.activation_first else getattr(torch, layer.activation)(y)
        z = F.batch_norm(y, *running, gamma, beta, True, 0.3, 1e-3)
        if not layer.activation_first:
            z = F.leaky_relu(z, 0.2) if layer.activation == "leaky_relu" else getattr(torch, layer.activation)(z)
        for found, part in zip(outputs, z.split([len(x) for x in group]), strict=True):
            found.append(part)
    outputs = [torch.cat(found) for found in outputs]
    sum((out * grad).sum() for out, grad in zip(outputs, grads, strict=True)).backward()
    return dict(out=outputs, x=[x.grad for x in xs], parameters=[p.grad for p in parameters], running=running)


def _in_this_process(layer, rank, device):
    xs, parameters, running, grads = draw(layer)
    x, *parameters = (t.to(device).requires_grad_() for t in (xs[rank], *parameters))
    running, batches = [t.to(device) for t in running], torch.tensor(0, device=device)
    constants = layer.constants(dist.group.WORLD)
    if layer == LAYERS["conv"]:
        compiled = torch.compile(fused_layer.conv_bn_act, backend="aot_eager")
        compiled = compiled(x, *parameters, *(t.clone() for t in running), layer=constants).detach()
    out, _ = fused_layer.linked_conv_bn_act(x, *parameters, *running, layer=constants, num_batches_tracked=batches)
    assert layer != LAYERS["conv"] or torch.equal(out, compiled)
    assert batches == layer.groups
    with pytest.raises(RuntimeError, match="no backward with create_graph=True"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    out.backward(grads[rank].to(device))
    return dict(out=out.detach(), x=x.grad, parameters=[p.grad for p in parameters], running=running)


def _process(rank, folder, device):
    torch.set_num_threads(1)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    if device.type == "cpu":
        use_interpreter()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        found = {}
        for name, layer in LAYERS.items():
            patch.setenv("FASTGAN_BACKEND", layer.backend)
            found[name] = _in_this_process(layer, rank, device)
        torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes found for each layer."""
    folder = tmp_path_factory.mktemp("processes")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.multiprocessing.spawn(_process, (folder, device), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(2)]


@pytest.mark.parametrize("name", LAYERS)
def test_two_processes_equal_one(name, found):
    exact = _in_one_process(LAYERS[name])
    ranks = [rank[name] for rank in found]

    def check(actual, expected, what):
        assert actual.dtype == LAYERS[name].dtype
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda m: f"{what}: {m}")

    for i, rank in enumerate(ranks):
        check(rank["out"], exact["out"][i], f"output of process {i}")
        check(rank["x"], exact["x"][i], f"input gradient of process {i}")
        for actual, expected in zip(rank["running"], exact["running"], strict=True):
            check(actual, expected.detach(), "running statistics")
        assert all(torch.equal(a, b) for a, b in zip(rank["running"], ranks[0]["running"], strict=True))
    for actual, other, expected in zip(*(rank["parameters"] for rank in ranks), exact["parameters"], strict=True):
        check(actual + other, expected, "gradient of a parameter")
        assert not expected.abs().max() > 1e-9 or not torch.equal(actual, other)  # each process's own part


def test_an_empty_batch_is_refused():
    layer = LAYERS["conv"]
    x, parameters = draw(layer)[0][0], draw(layer)[1]
    with pytest.raises(ValueError, match="x must not be empty"):
        fused_layer.conv_bn_act(x[:0], *parameters, None, None, layer=layer.constants(object()))
