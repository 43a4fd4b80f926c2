"""What explain says: of layers and calls, and of our kernels or cuDNN on a GPU that is only pretended."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgan
from fastgan import backend, explanation
from fastgan.ops import choice
from fastgan.ops.tables import Measurement, write_table
from fastgan.random_numbers import random_numbers_kept
from tests.pairs import block, make_pair

GPU = "NVIDIA T800"
INPUT = (8, 16, 4, 4)


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A fused model whose parameters claim to be on a GPU, with a table for the first of its layers."""
    monkeypatch.delenv("FASTGAN_BACKEND", raising=False)
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backend, "capability", lambda index: 0)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    choice.forget()
    on = dict(device="cuda", dtype=torch.bfloat16)
    with FakeTensorMode():
        up, down = nn.ConvTranspose2d(16, 8, 4, 2, 1, **on), nn.Conv2d(8, 4, 3, bias=False, **on)
        model = nn.Sequential(up, nn.BatchNorm2d(8, **on), nn.ReLU(), down)
    x, weight = torch.empty(INPUT, dtype=torch.bfloat16, device="meta"), model[0].weight
    problem = choice.conv_problem(x, weight, True, (2, 2), (1, 1), (8, 8), then="statistics")
    tile = {"block_m": 64, "block_n": 16, "block_k": 16, "num_warps": 4, "num_stages": 3}
    measured = Measurement("triton", tile, 5.0, 9.0, 8)
    write_table(choice.user_table_path(GPU), GPU, {}, {problem: measured})
    sizes = {"0": (INPUT, (8, 8, 8, 8)), "3": ((8, 8, 8, 8), (8, 4, 6, 6))}
    calls = {path: (pair, [model]) for path, pair in sizes.items()}
    monkeypatch.setattr(explanation, "_calls", lambda model, inputs, named_inputs: (calls, {}))
    yield fastgan.fuse(model)
    choice.forget()


def test_with_inputs(model):
    first, second = fastgan.explain(model, torch.empty(INPUT))
    assert (first.implementation, first.runs_as) == ("triton", "fused, triton")
    assert first.reason == "ours 5.0 µs, cuDNN 9.0 µs at batch 8"
    assert second.implementation == "cudnn"
    assert second.reason == f"not in the table of {GPU}, and nothing near it is: cuDNN is the safe choice"


def test_without_inputs(model):
    for row in fastgan.explain(model):
        assert row.runs_as == "fused, by shape" and "inputs" in row.reason


def test_rows(monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", "reference")
    model = nn.Module()
    model.main = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2))
    model.forward = lambda x: model.main(x)
    rows = fastgan.explain(model)
    assert [row.reason for row in rows] == ["fastgan.fuse was not called on it", "groups=2"]
    rows = fastgan.explain(fastgan.fuse(model))
    assert rows.as_dicts()[0] == dict(
        path="main.0",
        pattern="Conv2d + BatchNorm2d + ReLU",
        shape="",
        fused=True,
        implementation="reference",
        reason="FASTGAN_BACKEND=reference",
    )
    assert rows[1].reason == "groups=2" and rows[1].runs_as == "stock" and rows[0].runs_as == "fused, reference"
    lines = str(rows).splitlines()
    assert lines[0] == "Module: 1 of 2 convolutions fused"
    assert lines[1].split() == ["layer", "pattern", "shape", "runs", "as", "why"]
    assert len(lines) == 4 and "main.0" in lines[2] and "groups=2" in lines[3]
    assert str(fastgan.explain(nn.Sequential())).startswith("Sequential: 0 of 0 convolutions fused")
    with_elu = fastgan.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ELU()))
    assert "ELU after it stays stock" in fastgan.explain(with_elu)[0].reason
    assert "by itself" in fastgan.explain(fastgan.fuse(nn.Conv2d(3, 4, 3)))[0].reason


class Rolling(nn.Module):
    """It draws numbers of Python's, of NumPy's and of PyTorch's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*block(), nn.Dropout(0.5))

    def forward(self, x):
        return self.layers(x * random.choice([1, -1]) * np.random.rand())


def test_changes_nothing(monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", "auto")
    stock, model = make_pair(Rolling)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with random_numbers_kept() as drawn:
        rows = fastgan.explain(model, x)
        assert not drawn()
    assert [row.shape for row in rows] == ["2×3×8×8 → 2×4×6×6", "2×4×6×6 → 2×2×4×4"]
    assert "2×3×8×8 → 2×4×6×6" in str(rows)
    assert rows[0].reason == "the tensors are on 'cpu'"
    for ours, theirs in zip(model.state_dict().values(), stock.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
    assert fastgan.explain(model)[0].fused  # still fused


def test_layers_called_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(input=x)

    for network in (ByKeyword(), fastgan.fuse(ByKeyword())):
        (row,) = fastgan.explain(network, torch.ones(2, 3, 5, 5))
        assert row.shape == "2×3×5×5 → 2×4×3×3"


def test_layers_called_one_by_one():
    """A fused Sequential whose layers somebody calls without it, in a forward that cannot be followed."""

    class Features(nn.Module):
        def __init__(self, deep):
            super().__init__()
            self.main = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
            self.head = nn.Sequential(nn.Conv2d(4, 2, 3), nn.Sigmoid())
            self.deep = deep

        def forward(self, x):
            if x.sum() > 0:  # which no trace knows
                x = x + 1
            features = []
            for layer in self.main if self.deep else [self.main]:
                x = layer(x)
                features.append(x)
            return self.head(x), features

    for deep in (True, False):
        model = fastgan.fuse(Features(deep))
        assert [row.fused for row in fastgan.explain(model)] == [True] * 3
        first, second, head = fastgan.explain(model, torch.randn(2, 3, 8, 8))
        assert head.fused and head.shape == "2×4×4×4 → 2×2×2×2"
        assert first.fused is second.fused is not deep
        if deep:
            assert first.reason == second.reason == "the layers of its Sequential are called one by one"
            assert second.shape == "2×4×6×6 → 2×4×4×4"


def test_convolutions_of_several_names():
    """They go by what they are: the block of a generator with spectral norm, as people write it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.model = nn.Sequential(self.conv, nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x):
            return self.model(x) + x

    (row,) = fastgan.explain(fastgan.fuse(Block()))
    assert (row.path, row.pattern, row.fused) == ("conv", "Conv2d + BatchNorm2d + ReLU", True)


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.from_rgb = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)])

    def forward(self, x, step=0):
        return torch.relu(self.from_rgb[step](x))


def test_the_call_that_is_given():
    """And not one with default values."""
    model, x = fastgan.fuse(Growing()), torch.randn(2, 3, 4, 4)
    unused = "Growing.forward stays as it is: it does not call from_rgb"
    for step, arguments in ((0, ()), (0, (x,)), (1, (x, 1))):
        rows = fastgan.explain(model, *arguments)
        assert [row.fused for row in rows] == [step == 0, step == 1]
        assert rows[1 - step].reason.startswith(unused) and not rows[1 - step].shape


@pytest.mark.parametrize("script", (torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(2, 4, 8, 8))))
def test_scripted_children_are_as_before(script):
    child = script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model = fastgan.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), child))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fastgan.explain(model, torch.randn(2, 3, 10, 10))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return self.layer(*args)


def test_the_module_that_calls_it_says_why():
    """Not another one that holds it, too, and does not."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.wrapped = Wrapper(self.conv)

        def forward(self, x, *, gain=1.0):
            return gain * self.wrapped(x)

    (row,) = fastgan.explain(fastgan.fuse(Block()), torch.randn(2, 3, 8, 8), gain=2.0)
    assert row.path == "conv" and "Wrapper.forward stays as it is: it takes any number of arguments" in row.reason


def test_leaves_the_model_as_it_is():
    """Its tensors, and what is in them: here of a module with two names, whose forward changes a parameter."""

    class Counting(nn.Conv2d):
        def forward(self, x):
            self.bias.data += 1
            return super().forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = Counting(3, 4, 3)
            self.main = nn.Sequential(self.conv, nn.BatchNorm2d(4))

        def forward(self, x):
            return self.main(x)

    model = Net()
    tensors = list(model.state_dict(keep_vars=True).values())
    values = [tensor.clone() for tensor in tensors]
    fastgan.explain(fastgan.fuse(model), torch.randn(2, 3, 4, 4))
    now = list(model.state_dict(keep_vars=True).values())
    assert [*map(id, now)] == [*map(id, tensors)]
    assert all(map(torch.equal, now, values))


def test_norms_that_stay_stock():
    for norm in (nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LocalResponseNorm(2)):
        (row,) = fastgan.explain(fastgan.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())))
        assert row.fused and row.reason.startswith(f"{type(norm).__name__} after it stays stock")


def test_the_mode_decides_what_follows(model):
    """In eval mode BatchNorm is part of the epilogue: another kernel, and not measured here."""
    first, _ = fastgan.explain(model.eval(), torch.empty(INPUT))
    assert first.implementation == "cudnn" and "not in the table" in first.reason


def test_autocast_decides_the_dtype(model, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: True)
    for dtype, said in ((torch.float16, "in bfloat16, the nearest measured"), (torch.float32, "not in the table")):
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device_type, dtype=dtype: dtype)
        first, _ = fastgan.explain(model, torch.empty(INPUT))
        assert said in first.reason


def test_forced(model, monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", "triton")
    for row in fastgan.explain(model):
        assert (row.implementation, row.reason) == ("triton", "FASTGAN_BACKEND=triton")


@pytest.mark.gpu
def test_on_a_gpu():
    model = fastgan.fuse(fastgan.models.Generator(image_size=16, ngf=8)).cuda()
    for row in fastgan.explain(model, torch.randn(4, 100, device="cuda")):
        assert row.implementation in ("triton", "cudnn") and row.reason
