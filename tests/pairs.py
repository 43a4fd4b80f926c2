"""A stock model and its copy to fuse, and what each of them computes."""

import copy

import torch
from torch import nn

from fastgan.fusing import group_calls
from fastgan.ops import fused_layer


def make_pair(make):
    """A stock model in float64 with lively parameters and statistics, and a copy of it to fuse."""
    torch.manual_seed(0)
    stock = make().double()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor)
    return stock, copy.deepcopy(stock)


def one_step(model, x):
    """(output, gradients, state after it) of one call and one backward."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
    (out * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return out.detach(), dict(gradients, x=x.grad), {k: v.clone() for k, v in model.state_dict().items()}


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


def assert_same(ours, theirs, size=8):
    """Two training steps and one in eval give the same outputs, gradients and statistics."""
    torch.manual_seed(1)
    for training in (True, True, False):
        x = torch.randn(4, 3, size, size, dtype=torch.float64)
        assert_close(one_step(ours.train(training), x), one_step(theirs.train(training), x))
        with torch.no_grad():
            assert_close(ours(x), theirs(x))


def suppose_kernels(monkeypatch):
    """Have fused modules take the operators on a CPU too, which compute by plain torch there."""
    monkeypatch.setattr(fused_layer, "may_have_kernels", lambda x: True)
    monkeypatch.setattr(fused_layer, "has_kernels_for", lambda x: True)


def count_operator_calls(monkeypatch):
    """A list that gets the LayerSpec of each call of a fused operator, which runs in place of layers on a CPU too."""
    calls = []
    operator = fused_layer.linked_conv_bn_act

    def counted(*tensors, layer, **more):
        calls.append(layer)
        result, link = operator(*tensors, layer=layer, **more)
        in_order = result.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        return in_order.permute(0, 3, 1, 2), link  # as kernels give it

    suppose_kernels(monkeypatch)
    monkeypatch.setattr(group_calls, "run_as_chain", lambda x, parts: None)  # layer by layer
    monkeypatch.setattr(fused_layer, "linked_conv_bn_act", counted)
    return calls


def block():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 2, 3))
