"""The same layers computed by cuDNN (on a CPU: by aten) with our passes around it, against stock in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan import functional as fused
from fastgan.kernels import batch_norm, epilogue, launch, statistics
from fastgan.ops import convolution, input_grads
from fastgan.ops.choice import Choice
from fastgan.ops.convolution import conv, conv_statistics, conv_weight_grad
from fastgan.ops.replay import Replayed
from tests.conftest import HAS_GPU
from tests.kernels.cases import pairwise_cases
from tests.kernels.comparison import PLAIN, check, draw

pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned", "cudnn_choice")


@pytest.fixture
def cudnn_choice(monkeypatch, choose_in):
    """Every convolution is cuDNN's; the stock one adds its bias to a rounded result, as stock does on a GPU."""
    choose_in(convolution, lambda problem, device: Choice("cudnn"))

    def with_bias_apart(stock):
        def apart(x, weight, bias=None, *where):
            y = stock(x, weight, None, *where)
            return y if bias is None else y + bias[:, None, None]

        return apart

    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(F, name, with_bias_apart(getattr(F, name)))


@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_equals_stock(case, device):
    for dtype in ("float32", "float16", "bfloat16") if HAS_GPU else (case.dtype,):
        check(case._replace(dtype=dtype), draw(case._replace(dtype=dtype), 4, device, seed=2))


@pytest.mark.parametrize("transposed", (True, False))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("activation", (None, "sigmoid"))
@pytest.mark.parametrize("groups", (1, 2))
def test_statistics_of_several_tiles_and_blocks(transposed, bias, groups, activation, device, monkeypatch):
    """Tiles and blocks end inside the matrix, none holds rows of two groups, and they merge to the batch's numbers."""
    monkeypatch.setattr(statistics, "statistics_tile", lambda *_: (4, 8, 2))
    monkeypatch.setattr(statistics, "merge_tile", lambda *_: (4, 8))
    case = PLAIN._replace(transposed=transposed, bias=bias)
    x, weight, b, *_ = draw(case, 4, device)
    b = None if b is None else b + (0.5 if activation else 100.0)
    where = (case.transposed, [2, 2], [1, 1], [0, 0])
    y, mean, invstd, var = conv_statistics(x, weight, None, b, 1e-3, *where, activation, 0.0, groups, [], None, 0.0)
    stock = (F.conv_transpose2d if transposed else F.conv2d)(x, weight, b, 2, 1)
    stock = stock.sigmoid() if activation else stock
    torch.testing.assert_close(y, stock)
    parts = stock.double().view(groups, -1, *stock.shape[1:])
    exact_var, exact_mean = torch.var_mean(parts, (1, 3, 4), correction=0)
    count = parts[0].numel() // parts.shape[2]
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(invstd.double(), (exact_var + 1e-3).rsqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(var.double(), exact_var * count / (count - 1), rtol=1e-5, atol=0)


@pytest.fixture
def convolutions_are_cast(device):
    """On a CPU autocast leaves alone what a GPU's casts: the convolution that gives backward an input's gradient."""
    if device.type == "cuda":
        yield
        return
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def cast(x, weight, *rest):
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            dtype = torch.get_autocast_dtype("cpu")
            return torch.ops.aten.convolution(x.to(dtype), weight.to(dtype), *rest)

    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution", cast, "AutocastCPU")
    yield
    library._destroy()


@pytest.mark.parametrize("replays", (False, True))
def test_backward_within_autocast(replays, device, convolutions_are_cast, monkeypatch, choose_in):
    """Autocast is for forward: it casts nothing of a backward, nor of what a later one replays."""
    choose_in(input_grads, lambda problem, device: Choice("cudnn"))
    if replays:
        monkeypatch.setattr(Replayed, "__call__", Replayed.replay)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.Tanh()]
    model = fastgan.fuse(nn.Sequential(*layers)).to(device)
    x = torch.randn(4, 3, 16, 16, device=device, requires_grad=True)
    expected = torch.autograd.grad(fastgan.unfuse(copy.deepcopy(model))(x).square().sum(), x)
    for enabled in (True, True, True, False):
        loss = model(x).square().sum()
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            torch.testing.assert_close(torch.autograd.grad(loss, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", (1, 2, 3))
@pytest.mark.parametrize("columns", (1, 3, 64, 1000))
@pytest.mark.parametrize("rows", (1, 17, 5000, 10**6))
def test_statistics_tiles(rows, columns, groups):
    """Enough programs where there is enough work, and few enough tiles that merging them is nothing."""
    block_r, block_c, blocks = launch.statistics_tile(rows, columns, groups)
    tiles = -(-rows // (block_r * blocks))
    programs = groups * tiles * -(-columns // block_c)
    assert block_r * block_c <= 8192
    assert programs >= launch.FEWEST_READERS or block_r <= 16
    assert tiles <= 128**2  # two merges


def test_images_in_eval_mode(device, monkeypatch):
    """One pass after cuDNN's with bias, BatchNorm and activation in it, over several programs."""
    monkeypatch.setattr(epilogue, "rows_tile", lambda *_: (8, 8))
    monkeypatch.setattr(batch_norm, "rows_tile", lambda *_: (8, 8))
    for transposed in (True, False):
        case = PLAIN._replace(transposed=transposed, training=False, bias=True)
        tensors = draw(case, 2, device)
        check(case, tensors)
        operator, stock = (
            (fused.conv_transpose2d_bn_act, F.conv_transpose2d) if transposed else (fused.conv2d_bn_act, F.conv2d)
        )
        x, weight, bias, gamma, beta, mean, var = tensors
        with torch.no_grad():
            actual = operator(*tensors, stride=2, padding=1, eps=1e-3, activation="sigmoid")
            expected = F.batch_norm(stock(x, weight, bias, 2, 1), mean, var, gamma, beta, False, 0.0, 1e-3).sigmoid()
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", ((1, 6, 4, 4), (6, 1, 1, 1), (5, 6, 3, 3)))
@pytest.mark.parametrize("memory", (torch.contiguous_format, torch.channels_last))
def test_results_have_the_strides_that_were_promised(shape, memory, device):
    """torch.compile relies on the strides of the fake functions; cuDNN has its own ideas, above all at sizes of one."""
    weight = torch.randn(shape, device=device).to(memory_format=memory)
    for height in (shape[2], 7):
        x = torch.randn(2, shape[1], height, height, device=device)
        plain, alone = (None, None, None, None, None, None, 0.0), (None, 0.0, [], None, 0.0, False)
        y = conv(x, weight, *plain, False, [1, 1], [0, 0], [0, 0], *alone)
        back = conv(y, weight, *plain, True, [1, 1], [0, 0], [0, 0], *alone)
        for result in (y, back):
            assert result.stride() == torch.empty(result.shape, memory_format=torch.channels_last).stride()
        grad = conv_weight_grad(y, x, weight, [1, 1], [0, 0])
        assert grad.stride() == torch.empty_like(weight).stride()
        expected = torch.nn.grad.conv2d_weight(x, weight.shape, y)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_dcgan_layer_sizes(dtype, device):
    for channels_in, channels_out, size in ((512, 256, 4), (256, 128, 8), (128, 64, 16), (64, 3, 32)):
        case = PLAIN._replace(in_channels=channels_in, out_channels=channels_out, size=(size, size), dtype=dtype)
        for transposed in (True, False):
            case = case._replace(transposed=transposed)
            check(case, draw(case, 32, device))


@pytest.mark.gpu
def test_more_elements_than_int32_counts(device):
    """The passes' own addressing: statistics and epilogue of a result that passes 2^31 elements."""
    y = torch.zeros(2**31 // (128 * 64 * 64) + 1, 128, 64, 64, device=device, dtype=torch.bfloat16)
    y = y.contiguous(memory_format=torch.channels_last)
    y[-1] = 1.0
    tiles = statistics.tile_statistics(y)
    assert tiles.mean[0, -1].eq(1).all() and tiles.mean[0, 0].eq(0).all()
    epilogue.conv_epilogue_(y, bias=None, batch_norm=(None,) * 4, eps=0.0, activation="sigmoid", slope=0.0)
    torch.testing.assert_close(y[-1], torch.full_like(y[-1], 1.0).sigmoid())
