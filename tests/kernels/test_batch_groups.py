"""A batch of several groups in one call against a call for each group."""

import copy

import pytest
import torch
from torch import nn

import fastgan
from fastgan import functional as fused
from fastgan.batch_groups import batch_groups
from tests.kernels.comparison import PLAIN, draw

OPTIONS = dict(training=True, momentum=0.3, eps=1e-3, stride=2, padding=1, activation="leaky_relu", negative_slope=0.2)


def run(operator, batches, tensors, **options):
    """(outputs, gradients, running statistics) after one backward pass through the outputs of all batches."""
    weight, bias, gamma, beta, *running = (None if t is None else t.detach().clone() for t in tensors)
    inputs = [batch.detach().clone().requires_grad_() for batch in batches]
    learning = [t.requires_grad_() for t in (weight, bias, gamma, beta) if t is not None]
    outputs = [operator(x, weight, bias, gamma, beta, *running, **OPTIONS, **options) for x in inputs]
    out = torch.cat(outputs)
    out.backward(torch.sin(torch.arange(out.numel(), device=out.device, dtype=out.dtype)).view_as(out))
    grads = [torch.cat([x.grad for x in inputs]), *(t.grad for t in learning)]
    return out.detach(), grads, running


@pytest.mark.parametrize("backend", ("triton", "reference"))
@pytest.mark.parametrize("transposed", (True, False))
@pytest.mark.parametrize("groups, activation_first", ((2, False), (3, False), (2, True)))
def test_groups_equal_calls_one_after_the_other(
    backend, transposed, groups, activation_first, device, monkeypatch, poisoned
):
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    case = PLAIN._replace(transposed=transposed, bias=True)
    x, *tensors = draw(case, 2 * groups, device)
    x = x + torch.arange(len(x), device=device).view(-1, 1, 1, 1)  # groups of very different statistics
    operator = fused.conv_transpose2d_bn_act if transposed else fused.conv2d_bn_act
    together = run(operator, [x], tensors, batch_groups=groups, activation_first=activation_first)
    apart = run(operator, x.split(2), tensors, activation_first=activation_first)
    torch.testing.assert_close(together, apart, rtol=2e-5, atol=2e-5)


def test_tiles_end_with_their_group(device, monkeypatch, triton_backend, poisoned):
    """Groups that are no multiple of any tile, and statistics that are merged in stages."""
    from fastgan.kernels import batch_norm, down, launch, statistics

    monkeypatch.setattr(down, "matrix_tile", lambda *_, **__: launch.MatrixTile(16, 16, 16, 4, 2))
    monkeypatch.setattr(statistics, "merge_tile", lambda *_: (2, 8))
    monkeypatch.setattr(batch_norm, "reduction_tile", lambda *_: (8, 8))
    monkeypatch.setattr(batch_norm, "rows_tile", lambda *_: (32, 8))
    monkeypatch.setattr(batch_norm, "MOST_PROGRAMS", 2)
    x, *tensors = draw(PLAIN._replace(transposed=False), 6, device)
    together = run(fused.conv2d_bn_act, [x], tensors, batch_groups=2)
    torch.testing.assert_close(together, run(fused.conv2d_bn_act, x.split(3), tensors), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ("auto", "triton"))
@pytest.mark.parametrize("training", (True, False))
def test_batch_norms_without_running_statistics_take_groups_in_eval_too(backend, training, device, monkeypatch):
    """They take the batch's own there."""
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU())
    model = fastgan.fuse(layers.to(device).train(training))
    x = torch.randn(4, 2, 5, 5, device=device) + torch.arange(4, device=device).view(-1, 1, 1, 1)
    with batch_groups(2):
        together = model(x)
    torch.testing.assert_close(together, torch.cat([model(part) for part in x.split(2)]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ("auto", "triton"))
def test_averages_over_all_batches_count_each_part(backend, device, monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", backend)
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=None), nn.ReLU()).to(device)
    model = fastgan.fuse(copy.deepcopy(stock))
    x = torch.randn(4, 2, 5, 5, device=device) + torch.arange(4, device=device).view(-1, 1, 1, 1)
    with batch_groups(2):
        together = model(x)
    torch.testing.assert_close(together, torch.cat([stock(part) for part in x.split(2)]), rtol=2e-5, atol=2e-5)
    for ours, expected in zip(model.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("groups", (0, -1, 3, 2.0))
def test_groups_must_divide_the_batch(groups, device):
    x, *tensors = draw(PLAIN._replace(transposed=False), 4, device)
    with pytest.raises(ValueError, match="batch_groups must divide the batch of 4"):
        fused.conv2d_bn_act(x, *tensors, batch_groups=groups)
