"""Weights cast once for each update."""

import pytest
import torch
from torch import nn

from fastgan.weight_copies import WeightCopies, weight_copy


def test_copies_are_there_in_use_only_and_follow_refresh():
    conv = nn.Conv2d(2, 3, 4).to(memory_format=torch.channels_last)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 4))
    copies = WeightCopies([conv, parametrized], torch.bfloat16)
    copies.refresh()
    keys = list(conv.state_dict())
    with copies.in_use():
        copy = weight_copy(conv)
        assert torch.equal(copy, conv.weight.bfloat16()) and copy.stride() == conv.weight.stride()
        assert weight_copy(parametrized) is None
        with torch.no_grad():
            conv.weight.add_(1.0)
        copies.refresh()
        assert weight_copy(conv) is copy and torch.equal(copy, conv.weight.bfloat16())
        assert list(conv.state_dict()) == keys
    assert weight_copy(conv) is None


def test_copies_of_one_layer_in_two_networks():
    conv = nn.Conv2d(2, 3, 4)
    with WeightCopies([conv], torch.bfloat16).in_use(), WeightCopies([conv], torch.bfloat16).in_use():
        assert weight_copy(conv) is not None
    assert weight_copy(conv) is None


def test_no_convolutions_no_copies():
    copies = WeightCopies((), None)
    copies.refresh()
    with copies.in_use():
        pass


def test_copies_of_float64_weights(device, triton_backend):
    """Which autocast leaves as they are, so nobody reads them; there is no kernel for them either."""
    conv = nn.Conv2d(2, 3, 4).double().to(device)
    copies = WeightCopies([conv], torch.float16)
    copies.refresh()
    with copies.in_use():
        assert torch.equal(weight_copy(conv), conv.weight.half())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float16,))
def test_one_launch_casts_all(dtype, device, triton_backend, poisoned):
    """Sizes around a block of the kernel, both layouts, and weights that have moved in the meantime."""
    modules = [nn.Conv2d(1, 1, 1), nn.Conv2d(4, 16, 8), nn.Conv2d(4, 17, 8), nn.Conv2d(3, 5, 3)]
    modules = [module.to(device, memory_format=torch.channels_last) for module in modules]
    modules[1] = modules[1].to(memory_format=torch.contiguous_format)
    copies = WeightCopies(modules, dtype)
    assert copies._cast is not None
    for _ in range(2):
        copies.refresh()
        with copies.in_use():
            for module in modules:
                copy = weight_copy(module)
                assert torch.equal(copy, module.weight.to(dtype)) and copy.stride() == module.weight.stride()
        for module in modules:
            module.weight.data = torch.randn_like(module.weight)
    modules[2].weight.data = modules[2].weight.data.contiguous()  # another layout: no plain copy of memory any more
    copies.refresh()
    with copies.in_use():
        assert all(torch.equal(weight_copy(module), module.weight.to(dtype)) for module in modules)
