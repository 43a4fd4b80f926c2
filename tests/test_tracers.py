"""Who else traces or looks at a fused model with a forward of its own: torch.export, torch.jit and fake tensors."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

import fastgan
from tests.forwards import Layers
from tests.pairs import assert_close, block, make_pair


@pytest.fixture(autouse=True)
def _old_setting():
    """torch.export looks at the older of cuDNN's settings for float32, which fails where only the newer one was set."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.conv.fp32_precision = before


class Net(Layers):
    def forward(self, x, scale: float = 1.0, *, flip=False):
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2) * scale
        return self.conv2(x.flip(2) if flip else x)


class Plain(Layers):
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)))


def test_it_looks_like_the_forward_of_the_class(monkeypatch):
    stock, model = make_pair(Net)
    fastgan.fuse(model)
    for network in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert inspect.signature(network.forward) == inspect.signature(stock.forward)
        assert network.forward.__name__ == "forward" and network.forward.__code__ is Net.forward.__code__

    def forward(self, x):
        return self.conv2(self.conv1(x))

    monkeypatch.setattr(Net, "forward", forward)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert_close(model(x), stock(x))
    assert str(inspect.signature(model.forward)) == "(x)"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export(strict, training):
    stock, model = make_pair(Net)
    fastgan.fuse(model).train(training), stock.train(training)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    dynamic = {"x": {0: torch.export.Dim("batch")}, "flip": None}
    exported = torch.export.export(model, (x,), dict(flip=True), dynamic_shapes=dynamic, strict=strict)
    y = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    assert_close(exported.module()(y, flip=True), stock(y, flip=True))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_sequential(strict):
    stock, model = make_pair(block)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for network in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert inspect.signature(network.forward) == inspect.signature(stock.forward)
        assert_close(torch.export.export(network.eval(), (x,), strict=strict).module()(x), stock.eval()(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_files_of_exported_models_with_kernels(training, strict, device, triton_backend):
    """Of a forward that never ran: its trace is none of the export's."""
    torch.manual_seed(0)
    stock = Plain().to(device).train(training)
    model = fastgan.fuse(copy.deepcopy(stock))
    x, file = torch.randn(2, 3, 8, 8, device=device), io.BytesIO()
    exported = torch.export.export(model, (x,), strict=strict)
    assert "fastgan.conv" in exported.graph_module.code
    torch.export.save(exported, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), stock(x), rtol=1e-4, atol=1e-5)


def test_draft_export():
    _, model = make_pair(Plain)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    exported = torch.export.draft_export(fastgan.fuse(model).eval(), (x,))
    assert_close(exported.module()(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_by_name():
    stock, model = make_pair(Plain)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    traced = torch.jit.trace(fastgan.fuse(model).eval(), example_kwarg_inputs={"x": x})
    assert_close(traced(x=x * 2), stock.eval()(x * 2))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [Plain, block], ids=["own", "sequential"])
def test_jit_trace_with_kernels(make, device, triton_backend):
    """It is checked by a second trace, without gradients; and one that is made so may be run with them."""
    torch.manual_seed(0)
    stock = make().to(device).eval()
    model = fastgan.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 8, 8, device=device)
    traced = torch.jit.trace(model, (x,))
    assert "fastgan::conv" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x * 2), stock(x * 2), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
    for network in (traced, stock):
        network(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_fake_tensors_at_the_first_call(training, device, triton_backend):
    """The trace of the forward is made without them."""
    torch.manual_seed(0)
    stock = Net().to(device).train(training)
    model = fastgan.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 8, 8, device=device)
    state = torch.get_rng_state()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(x), scale=2.0)
        y.sum().backward()
    assert isinstance(y, FakeTensor) and y.shape == x.shape
    assert torch.equal(torch.get_rng_state(), state)
    model.load_state_dict(stock.state_dict())
    torch.testing.assert_close(model(x, scale=2.0), stock(x, scale=2.0), rtol=1e-4, atol=1e-5)
