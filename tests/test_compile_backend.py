"""torch.compile(model, backend="fastgan"): the captured graph with the operators in it, against stock."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fastgan
from fastgan import compile_backend
from tests.forwards import FOLLOWED, Layers, data_dependent, forward_of, remembers
from tests.pairs import assert_close, make_pair, one_step, suppose_kernels
from tests.stacks import MODELS


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", "reference")


@pytest.fixture
def rewritten(monkeypatch):
    """A backend like ours without inductor after it, for tensors without kernels too; its list of [CapturedGroup]."""
    suppose_kernels(monkeypatch)

    def backend(graph_module, example_inputs):
        backend.found.append(compile_backend.find(graph_module.graph))
        compile_backend.rewrite(graph_module)
        backend.calls = sum(node.target is compile_backend._fused_call for node in graph_module.graph.nodes)
        return aot_eager(graph_module, example_inputs)

    backend.found = []
    return backend


def assert_equal_steps(compiled, model, stock, sizes=((4, 8), (2, 8)), channels=3):
    """Training steps and one in eval give the same outputs, gradients and statistics."""
    torch.manual_seed(1)
    for training, (batch, size) in ((True, sizes[0]), (True, sizes[1]), (False, sizes[0])):
        x = torch.randn(batch, channels, size, size, dtype=torch.float64)
        out, grads, state = one_step(stock.train(training), x)
        model.train(training)
        ours, our_grads, _ = one_step(compiled, x)
        assert_close(ours, out)
        assert_close({name.removeprefix("_orig_mod."): grad for name, grad in our_grads.items()}, grads)
        assert_close(dict(model.state_dict()), state)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"momentum_none", "old_spectral_norm"}))
def test_layers(name, rewritten):
    stock, model = make_pair(MODELS[name])
    compiled = torch.compile(model, backend=rewritten, fullgraph=True, dynamic=False)
    assert_equal_steps(compiled, model, stock, sizes=((4, 8), (4, 8)))
    convolutions = sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules())
    assert [len(found) for found in rewritten.found] == [convolutions] * len(rewritten.found)
    assert rewritten.calls == convolutions


@pytest.mark.parametrize("function", FOLLOWED, ids=lambda f: f.__name__)
def test_forwards(function, rewritten):
    stock, model = make_pair(forward_of(function))
    assert_equal_steps(torch.compile(model, backend=rewritten, fullgraph=True, dynamic=False), model, stock)
    assert rewritten.calls >= FOLLOWED[function]


def test_graph_breaks(rewritten):
    """Each part between two breaks is rewritten; attributes that a forward sets stay."""
    for function in (data_dependent, remembers):
        torch._dynamo.reset()
        stock, model = make_pair(forward_of(function))
        assert_equal_steps(torch.compile(model, backend=rewritten), model, stock)
        assert rewritten.calls
    assert_close(model.features.detach(), stock.features.detach())


def test_patterns(rewritten):
    cases = {
        "conv_bn_leaky": "conv2d + batch_norm + leaky_relu",
        "transposed_bias_bn_tanh": "conv_transpose2d + batch_norm + tanh",
        "tutorial_order": "conv2d + leaky_relu + batch_norm",
        "output_padding_pair": "conv_transpose2d + sigmoid",
        "spectral_norm": "conv2d + batch_norm + relu",
    }
    for name, pattern in cases.items():
        del rewritten.found[:]
        torch.compile(MODELS[name](), backend=rewritten)(torch.randn(4, 3, 8, 8))
        ((found,),) = rewritten.found
        assert (found.pattern, found.path, found.fused, found.reason) == (pattern, "0", True, ""), name


def between_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        x = self.conv1(x)
    return F.relu(self.bn1(x))


def between_gradients(self, x):
    with torch.no_grad():
        x = self.conv1(x)
    return self.bn1(x).relu()


def between_statistics(self, x):
    y = self.conv1(x)
    z = self.bn1(x.sum(1, keepdim=True).expand(-1, 4, -1, -1))
    return self.bn1(y) + z


def statistics_before_the_activation(self, x):
    y = self.bn1(self.conv1(x))
    z = self.bn1(x.sum(1, keepdim=True).expand(-1, 4, -1, -1))
    return F.relu(y) + z


def input_written_to(self, x):
    x = x * 2
    y = self.conv1(x)
    return self.bn1(y.detach()) + x.relu_().sum()


def written_after_leaky_relu(self, x):
    y = F.leaky_relu(self.conv1(x), 0.2)
    y += 1
    return y


def view_of_statistics(self, x):
    mean = self.bn1.running_mean.view(1, -1, 1, 1)
    y = self.bn1(self.conv1(x))
    z = mean * x.mean()
    return F.relu(y) + z


def with_out(self, x):
    result = x.new_empty(x.shape[0], 4, 8, 8)
    with torch.no_grad():
        torch.tanh(self.conv1(x), out=result)
    return x.mean() * result


def below_0(self, x):
    return F.leaky_relu(self.bn1(self.conv1(x)), -0.5)


def as_argument(self, x):
    return torch.tanh(torch.cat([self.conv1(x), self.up(self.conv1(x))[:, :, ::2, ::2]], 1))


def functional_layers(self, x):
    x = F.conv2d(x, self.conv1.weight * 0.5, stride=2, padding=[1, 1])
    x = F.batch_norm(x, None, None, training=True, eps=0.1)
    return torch.sigmoid_(
        F.conv_transpose2d(x, weight=self.up.weight, bias=self.up.bias, output_padding=0, stride=(2, 1))
    )


def others(self, x):
    x = F.conv2d(x, self.conv1.weight[:, :1], groups=3 if x.shape[1] == 4 else 1) if x.shape[1] == 1 else self.conv1(x)
    x = F.conv2d(x, self.conv2.weight[:, :1].repeat(4, 1, 1, 1), groups=4)
    return F.conv2d(F.conv2d(x, x.new_ones(2, 12, 2, 2), dilation=2), x.new_ones(2, 2, 2, 2), padding="same")


CASES = {
    between_autocast: ("conv2d", "switched"),
    between_gradients: ("conv2d", "switched"),
    between_statistics: ("conv2d", "uses the running statistics in between"),
    statistics_before_the_activation: ("conv2d + batch_norm", "uses the running statistics in between"),
    input_written_to: ("conv2d", ""),
    written_after_leaky_relu: ("conv2d", "changes its result in place"),
    view_of_statistics: ("conv2d + batch_norm", "uses the running statistics in between"),
    with_out: ("conv2d", "tanh after it stays stock"),
    below_0: ("conv2d + batch_norm", "negative_slope=-0.5"),
    as_argument: ("conv2d", "is an argument of"),
    functional_layers: ("conv2d + batch_norm", ""),
}


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_what_stands_in_between(function, rewritten):
    stock, model = make_pair(forward_of(function))
    compiled = torch.compile(model, backend=rewritten, fullgraph=True, dynamic=False)
    if function is input_written_to:  # which leaves stock without gradients
        with torch.no_grad():
            x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
            assert_close(compiled(x), stock(x))
    else:
        assert_equal_steps(compiled, model, stock)
    pattern, reason = CASES[function]
    first = rewritten.found[0][0]
    assert first.pattern == pattern and reason in first.reason, first


def test_a_tensor_written_to_in_between(rewritten):
    def forward(self, x):
        x = x * 2
        y = self.conv1(x)
        x.relu_()
        return self.bn1(y) + x.sum()

    stock, model = make_pair(forward_of(forward))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(torch.compile(model, backend=rewritten, fullgraph=True)(x), stock(x))
    assert rewritten.found[0][0].pattern == "conv2d" and "changes a tensor in between" in rewritten.found[0][0].reason


@torch.library.custom_op("fastgan_tests::double_", mutates_args=("tensor",))
def double_it(tensor: torch.Tensor) -> None:
    tensor.mul_(2)


@pytest.mark.parametrize(
    "write",
    [
        lambda x, same: torch.ops.aten.mul_.Tensor(x, 2),
        lambda x, same: double_it(x),
        lambda x, same: same.mul_(2),
    ],
    ids=("overload", "custom operator", "shared memory"),
)
def test_the_input_is_written_to_between_layers(write, rewritten):
    """A name does not always tell it: what an operator's schema says counts, and another tensor may be the same."""

    def forward(self, x, same):
        y = self.conv1(x)
        write(x, same)
        return F.relu(self.bn1(y))

    stock, model = make_pair(forward_of(forward))
    compiled, found = torch.compile(model, backend=rewritten, fullgraph=True), []
    for network in (stock, compiled):
        torch.manual_seed(1)
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        with torch.no_grad():
            found.append(network(x, x.view(-1)))
    assert_close(*found)
    assert rewritten.found[0][0].pattern == "conv2d"


@pytest.mark.parametrize("write", [lambda y: y[:, :1].mul_(2), lambda y: torch.ops.aten.mul_.Tensor(y, 2)])
def test_the_result_is_written_to(write, rewritten):
    """Our backward of convolution + LeakyReLU reads the result, stock's does not."""

    def forward(self, x):
        y = F.leaky_relu(self.conv1(x), 0.2)
        write(y)
        return y

    stock, model = make_pair(forward_of(forward))
    assert_equal_steps(torch.compile(model, backend=rewritten, fullgraph=True, dynamic=False), model, stock)


def test_sizes_as_sequences_and_words(rewritten):
    def forward(self, x):
        w = self.conv1.weight
        x = F.conv2d(F.conv2d(x, w, padding="same"), self.conv2.weight, padding="valid")
        y = F.conv2d(x, w, stride=(2,), padding=[1], dilation=(1,))
        return F.conv_transpose2d(y, w, stride=(2,), padding=(1,), output_padding=(1,))

    stock, model = make_pair(forward_of(forward))
    compiled, x = torch.compile(model, backend=rewritten, fullgraph=True), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert_close(compiled(x), stock(x))
    assert rewritten.calls == 4


def test_what_has_no_operator(rewritten):
    stock, model = make_pair(forward_of(others))
    assert_equal_steps(torch.compile(model, backend=rewritten, fullgraph=True, dynamic=False), model, stock)
    reasons = [found.reason for found in rewritten.found[0] if not found.fused]
    assert reasons == ["groups=4", "dilation=2", "padding='same'"]
    conv3d = nn.Conv3d(1, 2, 3)
    assert_close(torch.compile(conv3d, backend=rewritten)(torch.ones(1, 1, 4, 4, 4)), conv3d(torch.ones(1, 1, 4, 4, 4)))
    conv2d = nn.Conv2d(3, 2, 3)
    x = torch.ones(3, 4, 4)
    assert_close(torch.compile(conv2d, backend=rewritten)(x), conv2d(x))
    assert "4 dimensions" in rewritten.found[-1][0].reason


def test_dynamic_shapes_recompile_as_with_others(rewritten):
    stock, model = make_pair(forward_of(next(iter(FOLLOWED))))
    graphs = {rewritten: 0, aot_eager: 0}
    for backend in graphs:
        torch._dynamo.reset()

        def counted(graph_module, example_inputs, backend=backend):
            graphs[backend] += 1
            return backend(graph_module, example_inputs)

        compiled = torch.compile(copy.deepcopy(model), backend=counted)
        for batch, size in ((4, 8), (3, 8), (5, 10), (6, 12)):
            x = torch.randn(batch, 3, size, size, dtype=torch.float64)
            assert_close(compiled(x), copy.deepcopy(stock)(x))
    assert graphs[rewritten] == graphs[aot_eager] < 4


def test_registered_and_equal_on_this_device():
    """The whole way through inductor; without kernels the graph is its own."""
    assert "fastgan" in torch._dynamo.list_backends()
    stock, model = make_pair(MODELS["two_blocks"])
    compiled = torch.compile(model, backend="fastgan", fullgraph=True)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    ours, theirs = one_step(compiled, x), one_step(stock, x)
    assert_close(ours[0], theirs[0])
    assert_close(list(ours[1].values()), list(theirs[1].values()))


@pytest.mark.parametrize("training", [True, False])
def test_kernels_with_inductor(training, device, monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", "triton")
    torch.manual_seed(0)
    stock = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(2, 4, 3, 2, 1)),
        nn.LeakyReLU(0.2),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 1, 3),
        nn.Tanh(),
    )
    model = copy.deepcopy(stock).to(device).train(training)
    compiled = torch.compile(model, backend="fastgan", fullgraph=True)
    x = torch.randn(2, 2, 6, 6)
    ours, theirs = one_step(compiled, x.to(device)), one_step(stock.train(training), x)
    torch.testing.assert_close(ours[0].cpu(), theirs[0], rtol=1e-3, atol=1e-5)
    for ours_grad, grad in zip(ours[1].values(), theirs[1].values(), strict=True):
        torch.testing.assert_close(ours_grad.cpu(), grad, rtol=1e-3, atol=1e-4)
    for buffer, theirs_buffer in zip(model.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(buffer.cpu(), theirs_buffer)
    rows = fastgan.explain(compiled, x.to(device))
    assert [row.implementation for row in rows] == ["triton"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("by_fuse", (True, False))
def test_graphs_of_inductor(by_fuse, monkeypatch):
    """mode="reduce-overhead": inductor captures networks with our operators, and replays compute the same."""
    monkeypatch.setenv("FASTGAN_BACKEND", "triton")
    counters.clear()
    torch.manual_seed(0)
    layers = nn.Conv2d(8, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 4)
    model = nn.Sequential(*layers).cuda()
    plain = fastgan.fuse(copy.deepcopy(model))
    run = fastgan.fuse(model) if by_fuse else model
    compiled = torch.compile(run, backend="inductor" if by_fuse else "fastgan", mode="reduce-overhead")
    for _ in range(6):  # the first ones are warm-up and capture
        x = torch.randn(4, 8, 16, 16, device="cuda")
        ours, expected = one_step(compiled, x), one_step(plain, x)
        torch.testing.assert_close(ours[0], expected[0])
        torch.testing.assert_close(list(ours[1].values()), list(expected[1].values()))
        torch.testing.assert_close(list(model.buffers()), list(plain.buffers()))
    assert not counters["inductor"]["cudagraph_skips"]


def test_options_reach_inductor(monkeypatch):
    import torch._inductor.compile_fx as inductor

    seen = []
    monkeypatch.setattr(inductor, "compile_fx", lambda g, e, config_patches: seen.append(config_patches) or g.forward)
    x = torch.randn(1, 3, 8, 8)
    for arguments in ({}, dict(options={"max_autotune": True}), dict(mode="reduce-overhead")):
        torch._dynamo.reset()
        torch.compile(nn.Conv2d(3, 4, 3), backend="fastgan", **arguments)(x)
    assert seen[0] is None and seen[1] == {"max_autotune": True} and seen[2] == {"triton.cudagraphs": True}


class Eager(nn.Module):
    """Its convolution is never compiled."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    @torch.compiler.disable
    def forward(self, x):
        return self.conv(x)


def test_explain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))
    before = copy.deepcopy(model.state_dict())
    compiled = torch.compile(model, backend="fastgan")
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="inputs must be given"):
        fastgan.explain(compiled)
    rows = fastgan.explain(compiled, x)
    assert [(row.path, row.fused, row.shape) for row in rows] == [
        ("0", False, "2×3×8×8 → 2×4×6×6"),
        ("3.0", False, "2×4×6×6 → 2×4×4×4"),
    ]
    assert rows[0].reason == "no kernels for torch.float32 on 'cpu'" and rows[1].reason == "groups=2"
    assert str(rows).startswith("Sequential, compiled: 0 of 2")
    torch.testing.assert_close(model.state_dict(), before)
    model.append(nn.Conv2d(4, 4, 1))
    model.append(Eager())
    rows = fastgan.explain(torch.compile(model, backend="fastgan"), x)
    # How many more than that one depends on where torch.compile breaks its graph.
    first = f"0 of {len(rows)} convolutions fused; {4 - len(rows)} more in no graph of this call"
    assert len(rows) < 4 and str(rows).splitlines()[0] == f"Sequential, compiled: {first}"
    del model[-2:]
    # What another backend runs is what fuse did to the model.
    rows = fastgan.explain(torch.compile(fastgan.fuse(model), backend="aot_eager"), x)
    assert rows.as_dicts() == fastgan.explain(model, x).as_dicts() and rows[0].fused


def test_shared_layers(rewritten):
    class Shared(Layers):
        def forward(self, x):
            return self.bn1(self.conv1(self.bn2(self.conv2(self.bn1(self.conv1(x))))))

    stock, model = make_pair(Shared)
    assert_equal_steps(torch.compile(model, backend=rewritten, dynamic=False), model, stock)
