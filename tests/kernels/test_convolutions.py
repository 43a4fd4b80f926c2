"""The fused convolutions' kernels, forward and backward, against stock layers in float64."""

import pytest
import torch
from torch.nn import functional as F

import fastgan
from fastgan import functional as fused
from tests.accuracy import assert_as_accurate_as_stock
from tests.conftest import HAS_GPU
from tests.kernels.cases import pairwise_cases
from tests.kernels.comparison import PLAIN, check, draw, ours, results, stock

pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned")


def _dtypes(case):
    return ("float32", "float16", "bfloat16") if HAS_GPU else (case.dtype,)


@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_equals_stock(case, device):
    for dtype in _dtypes(case):
        check(case._replace(dtype=dtype), draw(case._replace(dtype=dtype), 3, device))


@pytest.mark.parametrize("transposed", (True, False))
def test_one_image_in_eval_mode(transposed, device):
    case = PLAIN._replace(transposed=transposed, training=False)
    tensors = draw(case, 1, device)
    check(case, tensors)
    with torch.no_grad():  # one kernel, with BatchNorm in its epilogue
        expected = stock(case, [None if t is None else t.double() for t in tensors], case.activation)
        assert_as_accurate_as_stock("out", ours(case, tensors, case.activation), expected.float(), expected)


@pytest.mark.parametrize("backend", ("triton", "reference"))
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("transposed", (True, False))
def test_batch_norm_of_activated_values(transposed, training, backend, device, monkeypatch):
    """The order convolution, activation, BatchNorm, and that it is another than the usual one."""
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    case = PLAIN._replace(transposed=transposed, training=training, activation_first=True, bias=True)
    tensors = draw(case, 3, device)
    check(case, tensors)
    with torch.no_grad():
        first, last = (ours(case._replace(activation_first=first), tensors, "relu") for first in (True, False))
    assert (first < 0).any() and not (last < 0).any()


@pytest.mark.parametrize("transposed", (True, False))
def test_several_tiles_in_every_direction(transposed, device, monkeypatch):
    """Tiles far smaller than the tensors: partial tiles, merges in stages, weight gradients in parts."""
    from fastgan.kernels import batch_norm, down, launch, statistics, up, weight_grad

    for module in (up, down, weight_grad):
        monkeypatch.setattr(module, "matrix_tile", lambda *_, **__: launch.MatrixTile(16, 16, 16, 4, 2))
    monkeypatch.setattr(statistics, "merge_tile", lambda *_: (4, 8))
    monkeypatch.setattr(batch_norm, "reduction_tile", lambda *_: (8, 8))
    monkeypatch.setattr(batch_norm, "rows_tile", lambda *_: (32, 8))
    monkeypatch.setattr(batch_norm, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(weight_grad, "FEWEST_STEPS", 2)
    case = PLAIN._replace(transposed=transposed, in_channels=19)
    check(case, draw(case, 3, device))


@pytest.mark.parametrize("share, parts", ((1, 2), (2, 4), (99, 8)))
def test_a_weight_gradient_in_as_many_parts_as_its_tile_says(share, parts, device, monkeypatch):
    from fastgan.kernels import launch, weight_grad

    found, sum_rows = [], weight_grad.sum_rows
    monkeypatch.setattr(weight_grad, "sum_rows", lambda rows, out: found.append(rows.shape[1]) or sum_rows(rows, out))
    monkeypatch.setattr(weight_grad, "WANTED_OUTPUTS", 2 * 16 * 64)  # of two programs, for all columns at once
    low, high = torch.randn(8, 8, 8, 8, device=device), torch.randn(8, 4, 16, 16, device=device)
    low, high = (tensor.to(memory_format=torch.channels_last) for tensor in (low, high))
    weight, where = torch.empty(8, 4, 4, 4, device=device), dict(stride=(2, 2), padding=(1, 1))
    tile = launch.MatrixTile(16, 64, 16, 4, 2, share)
    actual = weight_grad.weight_grad(low, high, weight, precision="ieee", tile=tile, **where)
    assert found == [parts]  # eight of four steps at the most
    expected = torch.nn.grad.conv2d_weight(high, weight.shape, low, **where)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_stride_that_differs_by_axis(device):
    x, weight = torch.randn(2, 3, 5, 4, device=device), torch.randn(3, 5, 3, 4, device=device)
    expected = F.conv_transpose2d(x, weight, None, (3, 1), (1, 2), (2, 0))
    actual = fused.conv_transpose2d_bn_act(x, weight, stride=(3, 1), padding=(1, 2), output_padding=(2, 0))
    torch.testing.assert_close(actual, expected)
    back = fused.conv2d_bn_act(expected, weight, stride=(3, 1), padding=(1, 2))
    torch.testing.assert_close(back, F.conv2d(expected, weight, None, (3, 1), (1, 2)), rtol=1e-4, atol=1e-4)


def test_statistics_of_values_far_from_zero(device):
    """|mean| is 1,000 standard deviations: E[x²] − E[x]² would leave nothing of the variance in float32."""
    case = PLAIN._replace(bias=True, activation=None)
    tensors = draw(case, 4, device)
    tensors[2] = tensors[2] + 1000.0
    check(case, tensors)


def test_nothing_is_computed_for_what_needs_no_gradient(device):
    x, weight, *rest = draw(PLAIN, 2, device)
    weight.requires_grad_()
    ours(PLAIN, [x, weight, *rest], "relu").sum().backward()
    assert x.grad is None and weight.grad is not None


@pytest.mark.parametrize("activation", ("relu", "leaky_relu", "tanh", "sigmoid", None))
def test_nan_stays_visible(activation, device):
    case = PLAIN._replace(activation=activation)
    tensors = draw(case, 2, device)
    tensors[0][0, 0, 0, 0] = float("nan")
    assert ours(case, tensors, activation).isnan().any()


@pytest.mark.parametrize("activation", ("relu", "leaky_relu"))
def test_the_gradient_of_nan_is_that_of_stock(activation, device):
    x, weight = torch.tensor([1.0, float("nan"), -1.0], device=device), torch.ones(1, 1, 1, 1, device=device)
    mine, theirs = (x.view(3, 1, 1, 1).clone().requires_grad_() for _ in range(2))
    fused.conv2d_bn_act(mine, weight, activation=activation, negative_slope=0.2).sum().backward()
    y = F.conv2d(theirs, weight)
    (F.relu(y) if activation == "relu" else F.leaky_relu(y, 0.2)).sum().backward()
    assert torch.equal(mine.grad, theirs.grad)


def test_cumulative_average_and_batch_count(device):
    """momentum=None through a fused module, over several batches."""
    torch.manual_seed(0)
    stock_model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5, momentum=None)).to(device)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5, momentum=None)).to(device)
    model.load_state_dict(stock_model.state_dict())
    fastgan.fuse(model)
    for _ in range(3):
        x = torch.randn(2, 3, 6, 6, device=device)
        torch.testing.assert_close(model(x), stock_model(x))
    for name, buffer in stock_model.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer)


def test_same_bits_every_time(device):
    tensors = draw(PLAIN, 3, device)
    with torch.no_grad():
        grad = torch.randn_like(stock(PLAIN, tensors, "relu"))
    first, second = (results(ours, PLAIN, tensors, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_dcgan_layer_sizes(dtype, device):
    """The example DCGAN's own layers, whose tiles are the large ones."""
    name = str(dtype).removeprefix("torch.")
    for channels_in, channels_out, size in ((512, 256, 4), (256, 128, 8), (128, 64, 16), (64, 3, 32)):
        case = PLAIN._replace(in_channels=channels_in, out_channels=channels_out, size=(size, size), dtype=name)
        for transposed in (True, False):
            case = case._replace(transposed=transposed)
            check(case, draw(case, 32, device))


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", (True, False))
def test_tf32_where_torch_allows_it(transposed, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")
    case = PLAIN._replace(in_channels=128, out_channels=64, size=(16, 16), transposed=transposed)
    check(case, draw(case, 32, device))


@pytest.mark.gpu
def test_more_elements_than_int32_counts(device):
    x = torch.randn(2**31 // (64 * 64 * 64) + 1, 64, 64, 64, device=device, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(8, 64, 4, 4, device=device, dtype=torch.bfloat16) * 0.03
    actual = fused.conv2d_bn_act(x, weight, stride=2, padding=1, activation="relu")
    expected = F.relu(F.conv2d(x[-1:], weight, stride=2, padding=1))
    torch.testing.assert_close(actual[-1:], expected, rtol=2e-2, atol=2e-2)
