"""Fused layers in a row in eager code (fastgan/ops/chain.py): one autograd.Function, forward and backward."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan.fusing import group_calls
from fastgan.ops import chain
from fastgan.ops.replay import Plan, Replayed

pytestmark = pytest.mark.usefixtures("triton_backend")
TOLERANCE = dict(rtol=1e-3, atol=1e-4)


@pytest.fixture
def chains(monkeypatch):
    """How many layers the chains had that were run, in their order."""
    lengths, run = [], chain.run_chain

    def counted(x, tensors, layers):
        lengths.append(len(layers))
        return run(x, tensors, layers)

    monkeypatch.setattr(group_calls, "run_chain", counted)
    return lengths


@pytest.fixture(params=[False, True], ids=["as it is", "replayed"])
def replays(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(Replayed, "__call__", Replayed.replay)
    return request.param


def scores(model, x):
    return model(x).square().mean()


def scores_of_layers(model, x):
    """By the layers themselves, whose graph holds running statistics, then by the chain, which updates them."""
    features = x
    for layer in model:
        features = layer(features)
    return features.square().mean() + scores(model, x)


def scores_in_both_modes(model, x):
    known = scores(model.eval(), x)
    return known + scores(model.train(), x)


class InAForward(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


@pytest.mark.parametrize("loss", (scores_of_layers, scores_in_both_modes))
def test_running_statistics_that_a_graph_holds_may_move_on(loss, replays, device):
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 2, 3)).to(device)
    model, x = fastgan.fuse(copy.deepcopy(stock)), torch.randn(4, 3, 8, 8, device=device)
    for _ in range(3):
        for network in (stock, model):
            network.zero_grad()
        loss(model, x).backward()
        if loss is scores_in_both_modes:  # stock's backward would take the statistics as they are by then
            scores(stock.eval(), x).backward()
            scores(stock.train(), x).backward()
        else:
            loss(stock, x).backward()
        for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, **TOLERANCE)
    torch.testing.assert_close(model.state_dict(), stock.state_dict(), **TOLERANCE)


def network():
    """All that a chain may hold: either order, with and without bias, BatchNorm, its vectors and an activation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 5, 3, 1, 1, bias=False),
        nn.BatchNorm2d(5),
        nn.Tanh(),
        nn.Conv2d(5, 4, 2),
        nn.ReLU(),
        nn.BatchNorm2d(4, affine=False),
        nn.ConvTranspose2d(4, 3, 4, 2, 1),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.Conv2d(3, 2, 3),
    )


def pair(device, make=network):
    stock = make().to(device)
    return stock, fastgan.fuse(copy.deepcopy(stock))


def draw(device, seed=0):
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_buffers_close(a, b):
    torch.testing.assert_close(dict(a.named_buffers()), dict(b.named_buffers()), **TOLERANCE)


@pytest.mark.parametrize("mode", ("train", "some", "frozen"))
def test_gradients_that_are_asked_for(mode, device, chains, replays, poisoned):
    """All of them, those of a few tensors, and those of layers that learn after some that do not."""
    stock, model = pair(device)
    steps = 4 if replays else 2
    for seed in range(steps):
        x, found = draw(device, seed), []
        for one in (model, stock):
            own = x.clone().requires_grad_(mode == "train")
            learning = [own, *one.parameters()] if mode == "train" else list(one.parameters())[4:6]
            if mode == "frozen":
                for parameter in one.parameters():
                    parameter.requires_grad_(any(parameter is each for each in learning))
            found.append(torch.autograd.grad(one(own).square().sum(), learning))
        torch.testing.assert_close(*found, **TOLERANCE)
    assert_buffers_close(model, stock)
    assert chains == [5] * steps


def test_what_nobody_asks_for_is_not_computed(device, monkeypatch):
    model, asked = pair(device)[1], []

    def asking(name, run):
        return lambda *args: asked.append(name) or run(*args)

    for name in ("weight_grad_of", "_through"):
        monkeypatch.setattr(chain, name, asking(name, getattr(chain, name)))
    model[5].requires_grad_(False)
    (grad,) = torch.autograd.grad(model(draw(device)).sum(), model[2].weight)
    assert grad.shape == model[2].weight.shape
    assert asked == ["_through"] * 3 + ["weight_grad_of"]


def test_backward_again(device, replays):
    stock, model = pair(device)
    for _ in range(4 if replays else 1):
        found = []
        for one in (model, stock):
            result = one(draw(device)).square().sum()
            first = torch.autograd.grad(result, list(one.parameters()), retain_graph=True)
            second = torch.autograd.grad(result, list(one.parameters()))
            assert all(map(torch.equal, first, second))
            with pytest.raises(RuntimeError, match="second time"):
                result.backward()
            found.append(first)
        torch.testing.assert_close(*found, **TOLERANCE)


def test_two_results_before_their_backwards(device, replays):
    """Real and fake images, each with what its own backward needs."""
    stock, model = pair(device)
    for _ in range(4 if replays else 1):
        found = []
        for one in (model, stock):
            real, fake = one(draw(device, 1)), one(draw(device, 2))
            (real.square().sum() - fake.sum()).backward()
            found.append([parameter.grad for parameter in one.parameters()])
            one.zero_grad()
        torch.testing.assert_close(*found, **TOLERANCE)
    assert_buffers_close(model, stock)


def test_layers_that_backward_never_comes_to_keep_nothing(device, replays):
    """Frozen first layers: what they made goes, and they may change before backward."""
    stock, model = pair(device)
    for seed in range(4 if replays else 1):
        found, kept = [], []
        for one in (model, stock):
            one[:8].requires_grad_(False)
            saved = {}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, saved=saved: saved.update({tensor.data_ptr(): tensor.nbytes}) or tensor, lambda t: t
            ):
                loss = one(draw(device, seed)).square().sum()
            kept.append(sum(saved.values()))
            with torch.no_grad():
                one[2].weight.mul_(1.1)
            found.append(torch.autograd.grad(loss, [p for p in one.parameters() if p.requires_grad]))
        torch.testing.assert_close(*found, **TOLERANCE)
        assert kept[0] < 1.5 * kept[1]
    assert_buffers_close(model, stock)


@pytest.mark.parametrize("how", ("flag", "replaced"))
@pytest.mark.parametrize("kind", (nn.Sequential, InAForward))
def test_what_follows_leaky_relu_is_told_to_write_to_it(kind, how, device, replays):
    """After the layers were called without that."""

    def make():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Sequential(nn.ELU()), nn.Conv2d(4, 2, 3)
        return kind(*layers).to(memory_format=torch.channels_last)

    stock, model = pair(device, make)
    for inplace in [False] * 3 + [True] * 3:
        found = []
        for one in (model, stock):
            if how == "flag":
                one[2][0].inplace = inplace
            else:
                one[2][0] = nn.ELU(inplace=inplace)
            found.append(torch.autograd.grad(one(draw(device)).square().sum(), list(one.parameters())))
        torch.testing.assert_close(*found, **TOLERANCE)


def test_memory_goes_as_backward_comes(device, monkeypatch):
    """What a layer has kept is not kept until the whole chain is done."""
    model, kept, alive = pair(device)[1], [], []
    run = chain.weight_grad_of

    def counted(*args):
        gc.collect()
        alive.append(sum(each() is not None for each in kept))
        return run(*args)

    def unpack(tensor):
        own = tensor.detach().clone(memory_format=torch.preserve_format)
        kept.append(weakref.ref(own))
        return own

    monkeypatch.setattr(chain, "weight_grad_of", counted)
    # A replay, on a GPU, of a backward like this one would not come past there.
    monkeypatch.setattr(chain, "_backward", Replayed(chain._backward._function, consumes=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        result = model(draw(device))
    result.sum().backward()
    assert len(alive) == 5 and all(after <= before - 2 for before, after in itertools.pairwise(alive))


def test_replays_let_go_of_what_they_are_done_with(device, monkeypatch):
    monkeypatch.setattr(Replayed, "__call__", Replayed.replay)
    monkeypatch.setattr(chain, "_backward", Replayed(chain._backward._function, consumes=True))
    model = pair(device)[1]
    for _ in range(3):
        model(draw(device)).sum().backward()
    (plan,) = chain._backward._plans.values()
    assert type(plan) is Plan
    first = min(made for *_, made, _, _ in plan._steps if isinstance(made, int))  # after those that are given
    ended = [place for *_, ends in plan._steps[:-1] for place in ends if place < first]
    # The input, results of four layers, and mean, invstd and what BatchNorm is of in three.
    assert len(ended) == len(set(ended)) >= 1 + 4 + 3 * 3


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing(reentrant, device):
    stock, model = pair(device)
    found = []
    for one in (model, stock):
        x = draw(device).requires_grad_()
        checkpoint(one, x, use_reentrant=reentrant).square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in one.parameters())])
    torch.testing.assert_close(*found, **TOLERANCE)


def test_inference(device, chains, replays):
    """BatchNorm with known statistics is part of the convolution, and nothing is kept for a backward."""
    stock, model = pair(device, lambda: nn.Sequential(*[layer for i, layer in enumerate(network()) if i not in (6, 7)]))
    for _ in range(4):
        with torch.no_grad():
            torch.testing.assert_close(model.train()(draw(device)), stock.train()(draw(device)), **TOLERANCE)
    model.eval(), stock.eval()
    del chains[:]
    for _ in range(4):
        with torch.inference_mode():
            torch.testing.assert_close(model(draw(device)), stock(draw(device)), **TOLERANCE)
    assert chains == [5] * 4
    assert_buffers_close(model, stock)


def test_the_result_may_be_changed_in_place(device, replays):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    stock, model = pair(device, make)
    for _ in range(3):
        found = []
        for one in (model, stock):
            one(draw(device)).mul_(2).relu_().square().sum().backward()
            found.append([parameter.grad for parameter in one.parameters()])
            one.zero_grad()
        torch.testing.assert_close(*found, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "training"),
    [
        (lambda model: parametrizations.weight_norm(model[2]), True),
        (lambda model: nn.utils.spectral_norm(model[2]), True),
        (lambda model: setattr(model[3], "momentum", None), True),
        (lambda model: setattr(model[3], "momentum", torch.tensor(0.3)), True),
        (lambda model: setattr(model[3], "num_batches_tracked", None), True),
        (lambda model: model.double(), True),
        (lambda model: model[9].register_parameter("bias", None), True),
        (lambda model: None, False),
    ],
    ids=("parametrized", "hook", "average", "tensor", "uncounted", "float64", "one vector", "eval"),
)
def test_what_else_there_is(change, training, device, chains, recwarn):
    """What is no chain, or has a layer of a kind of its own, is as stock has it, too."""
    stock, model = network().to(device).train(training), network().to(device).train(training)
    change(stock), change(model)
    model.load_state_dict(stock.state_dict())
    fastgan.fuse(model)
    dtype = model[0].weight.dtype
    for seed in range(2):
        found = []
        for one in (model, stock):
            x = draw(device, seed).to(dtype).requires_grad_()
            one(x).square().mean().backward()
            found.append([x.grad, *(parameter.grad for parameter in one.parameters())])
            one.zero_grad()
        torch.testing.assert_close(*found, **TOLERANCE)
    assert_buffers_close(model, stock)
    is_chain = training and (model[9].bias is None or model[3].num_batches_tracked is None)
    assert chains == ([5] * 2 if is_chain else [])


def test_bad_input_names_the_layer(device, replays):
    model = fastgan.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))).to(device)
    for _ in range(3):
        with pytest.raises(ValueError, match="layer '2': x must have 5 channels"):
            model(draw(device))


def test_running_statistics_have_no_gradient(device, replays):
    model = fastgan.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).to(device)
    model[1].running_mean.requires_grad_()
    for _ in range(3):
        with pytest.raises(ValueError, match="layer '0': running_mean must not require a gradient"):
            model(draw(device))


def test_dtypes_must_fit_outside_of_autocast(device, replays):
    """Whatever was replayed within it."""
    model, x = fastgan.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).to(device), draw(device).half()
    for _ in range(3):
        with torch.autocast(device.type, torch.float16):
            assert model(x).dtype == torch.float16
    with pytest.raises(TypeError, match="one dtype"):
        model(x)
