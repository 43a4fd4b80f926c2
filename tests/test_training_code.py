"""Fused models inside of the code that people train with: what surrounds a model must not notice."""

import copy
import functools
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastgan
from tests.forwards import forward_of, functions, residual
from tests.interpreter import use_interpreter
from tests.networks import assert_equal
from tests.pairs import assert_close, block, make_pair, one_step


class Critic(nn.Module):
    """Every kind of group: BatchNorm between, after and none, functions and modules, with a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 4, 2, 1), nn.LeakyReLU(0.2))
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 3, 3)), nn.Tanh(), nn.BatchNorm2d(3))
        self.head = nn.Conv2d(3, 1, 2)

    def forward(self, x):
        x = self.first(x)
        x = x + torch.sigmoid(self.bn(self.conv(x)))
        return self.head(self.second(x)).flatten(1)


@pytest.fixture
def critics(device):
    """(stock, fused) in float32, the same, and a batch for them."""
    torch.manual_seed(0)
    stock = Critic().to(device)
    return stock, fastgan.fuse(copy.deepcopy(stock)), torch.randn(3, 2, 8, 8, device=device)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(params=["triton", "auto"])
def implementation(request, monkeypatch):
    """Through the kernels (in the interpreter without a GPU), and as a user without settings runs it."""
    monkeypatch.setenv("FASTGAN_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("penalty", ["WGAN-GP", "R1"])
def test_gradient_penalties(penalty, critics, implementation):
    stock, model, x = critics
    for network in (stock, model):
        images = x.clone().requires_grad_()
        scores = network(images)
        (grad,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        size = grad.flatten(1).norm(2, 1)
        (((size - 1) ** 2 if penalty == "WGAN-GP" else size**2).mean() + scores.mean()).backward()
    for (name, ours), theirs in zip(gradients(model).items(), gradients(stock).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, critics, implementation):
    stock, model, x = critics
    for network in (stock, model):
        checkpoint(network, x.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    close(gradients(model), gradients(stock))
    close(dict(model.state_dict()), dict(stock.state_dict()))  # updated twice, by both


def _keep_convolutions(_, operator, *args, **kwargs):
    """The policy that keeps what they give, by whatever operator, and computes the rest again."""
    ours = operator.namespace == "fastgan" and "running" not in operator.name()
    kept = ours or operator in (torch.ops.aten.convolution.default, torch.ops.aten.mm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpointing(critics, implementation):
    stock, model, x = critics
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_convolutions)
    for network in (stock, model):
        images = x.clone().requires_grad_()
        checkpoint(network, images, use_reentrant=False, context_fn=contexts).sum().backward()
    close(gradients(model), gradients(stock))
    weight = stock.conv.weight.detach().requires_grad_()
    layer = functools.partial(fastgan.functional.conv2d_bn_act, weight=weight, activation="sigmoid")
    image = torch.randn(1, 4, 8, 8, device=x.device)
    checkpoint(layer, image, use_reentrant=False, context_fn=contexts).sum().backward()
    ours, weight.grad = weight.grad, None
    F.conv2d(image, weight).sigmoid().sum().backward()
    close(ours, weight.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(mode, training, critics, implementation):
    stock, model, x = critics
    with mode():
        close(model.train(training)(x), stock.train(training)(x))
    close(dict(model.state_dict()), dict(stock.state_dict()))


def test_mixed_precision_with_loss_scaling(critics, implementation, device):
    """float16: what the interpreter computes, too."""
    stock, model, x = critics
    for network in (stock, model):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16):
                out = network(x)
            assert out.dtype == torch.float16
            scaler.scale(out.float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), dict(stock.state_dict()), rtol=2e-2, atol=2e-2)


def test_bf16_autocast_on_this_device(critics, device):
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bfloat16")
    stock, model, x = critics
    with torch.autocast(device.type, torch.bfloat16):
        ours, theirs = model(x), stock(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export_of_a_generator(dynamic, implementation, device):
    """In eval mode, saved and loaded, with any number of images."""
    # torch.export refuses two opinions on TF32; the fixture that set this one restores it.
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision
    torch.manual_seed(0)
    model = fastgan.fuse(fastgan.models.Generator(image_size=8, nz=5, ngf=2)).to(device).eval()
    latent = torch.randn(3, 5, device=device)
    shapes = ({0: torch.export.Dim("images")},) if dynamic else None
    with torch.no_grad():
        exported = torch.export.export(model, (latent,), dynamic_shapes=shapes)
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        program = torch.export.load(file).module()
        close(program(latent), fastgan.unfuse(model)(latent))
        if dynamic:
            more = torch.randn(7, 5, device=device)
            close(program(more), model(more))


@pytest.mark.parametrize("make", [block, forward_of(functions), forward_of(residual)])
def test_torch_func(make):
    """On the reference path as with stock; statistics of a batch cannot be mapped over by either."""
    stock, model = make_pair(make)
    fastgan.fuse(model), stock.eval(), model.eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def loss(network, parameters, x):
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    ours, theirs = (torch.func.grad(loss, argnums=1)(network, parameters, x) for network in (model, stock))
    assert_close(ours, theirs)
    images = x[:, None]
    ours, theirs = (torch.func.vmap(network)(images) for network in (model, stock))
    assert_close(ours, theirs)


def test_optimizers_made_before_and_weights_by_class_name():
    stock, model = make_pair(block)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    fastgan.fuse(model)

    def weights_init(module):
        name = module.__class__.__name__
        if name.find("Conv") != -1:
            nn.init.normal_(module.weight.data, 0.0, 0.02)
        elif name.find("BatchNorm") != -1:
            nn.init.normal_(module.weight.data, 1.0, 0.02)
            nn.init.constant_(module.bias.data, 0)

    for network in (stock, model):
        torch.manual_seed(7)
        network.apply(weights_init)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    theirs = torch.optim.Adam(stock.parameters(), lr=0.1)
    for _ in range(3):
        for network, step in ((stock, theirs), (model, optimizer)):
            one_step(network, x)
            step.step()
    assert_close(dict(model.state_dict()), dict(stock.state_dict()))


def test_conversions_after_fuse():
    """to(dtype), channels_last, freezing, averages of weights, a checkpoint both ways."""
    stock, model = (network.float() for network in make_pair(forward_of(functions)))
    fastgan.fuse(model).to(memory_format=torch.channels_last).to(torch.float64)
    stock.to(memory_format=torch.channels_last).to(torch.float64)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for network in (stock, model):
        network.conv1.requires_grad_(False)
    ours, theirs = one_step(model, x), one_step(stock, x)
    assert_close([g for g in ours[1].values() if g is not None], [g for g in theirs[1].values() if g is not None])
    assert ours[1]["conv1.weight"] is None

    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert_close(average.eval()(x), stock.eval()(x))
    for source, target in ((model, stock), (stock, model)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        assert not any(target.load_state_dict(torch.load(file, weights_only=True), strict=True))


def test_meta_and_other_dimensions():
    with torch.device("meta"):
        model = fastgan.fuse(block())
        assert model(torch.empty(2, 3, 8, 8)).shape == (2, 2, 4, 4)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Unflatten(2, (2, 2, 2)), nn.Conv3d(3, 2, 2)
    )
    rows = fastgan.explain(fastgan.fuse(model))
    assert [row.reason for row in rows] == ["no fused operator for Conv1d", "no fused operator for Conv3d"]
    model(torch.randn(2, 2, 10))


def test_quantised_layers():
    quantized = pytest.importorskip("torch.ao.nn.quantized")
    if "none" == torch.backends.quantized.engine or not torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantised layers in this PyTorch")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(quantized.Quantize(0.1, 0, torch.quint8), quantized.Conv2d(3, 4, 3), nn.ReLU())
        fastgan.fuse(model)
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(model(x).dequantize(), fastgan.unfuse(copy.deepcopy(model))(x).dequantize())
    assert not any(row.fused for row in fastgan.explain(model))


def test_bad_input_names_the_layer(implementation, device):
    model = nn.Module()
    model.main = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model.forward = model.main.forward
    fastgan.fuse(model.to(device))
    wrong = {
        torch.randn(2, 5, 8, 8): "channels",
        torch.randn(1, 3, 3, 3): "more than 1 value per channel",
        torch.randn(2, 3, 2, 2): "small|Kernel size",
        torch.randn(2, 3, 8, 8, dtype=torch.float64): "dtype|same",
    }
    for x, message in wrong.items():
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
            model.main(x.to(device))
        if implementation == "triton" and x.dtype is torch.float32:
            assert str(caught.value).startswith("layer '0': ")
    on_meta = torch.empty(2, 3, 8, 8, device="meta")
    with pytest.raises((RuntimeError, ValueError)):
        model.main(on_meta)


def test_sync_batch_norm_of_one_process(implementation, device):
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(block())
    model = fastgan.fuse(copy.deepcopy(stock).to(device))
    x = torch.randn(2, 3, 8, 8)
    ours, theirs = one_step(model, x.to(device)), one_step(stock, x)
    close([t.cpu() for t in ours[1].values()], list(theirs[1].values()))
    row = fastgan.explain(model)[0]
    assert row.fused and row.pattern == "Conv2d + SyncBatchNorm + ReLU" and "torch.distributed is not up" in row.reason


def distributed_networks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))


def _process(rank, folder):
    """One of two: DistributedDataParallel around stock and fused networks, with BatchNorm and with SyncBatchNorm."""
    torch.set_num_threads(1)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    use_interpreter()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(1)
    batches = torch.randn(2, 4, 3, 8, 8)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, backend in (
            ("stock", "reference"),
            ("fused", "reference"),
            ("kernels", "triton"),
            ("sync", "triton"),
        ):
            patch.setenv("FASTGAN_BACKEND", backend)
            model = distributed_networks()
            if name == "sync":
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            if name != "stock":
                fastgan.fuse(model)
            # Which takes SyncBatchNorm on GPUs only; what it does with gradients is done here then.
            parallel = model if name == "sync" else nn.parallel.DistributedDataParallel(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                parallel(batches[rank]).square().mean().backward()
                if name == "sync":
                    for parameter in model.parameters():
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= 2
                optimizer.step()
            found[name] = dict(model.state_dict())
            if name == "sync":
                assert "not up" not in fastgan.explain(model)[0].reason
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or torch.cuda.is_available(), reason="two processes on a CPU")
def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(_process, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in found:
        assert_equal(rank["fused"], rank["stock"])
        close(rank["kernels"], rank["stock"])
    # Synchronised: two processes learn what one does from both batches.
    torch.manual_seed(1)
    batches = torch.randn(2, 4, 3, 8, 8)
    model = distributed_networks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(batches.flatten(0, 1)).square().mean().backward()
        optimizer.step()
    for rank in found:
        close(rank["sync"], dict(model.state_dict()))
