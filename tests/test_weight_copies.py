"""Weights cast once for each update."""

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


def test_no_convolutions_no_copies():
    copies = WeightCopies((), None)
    copies.refresh()
    with copies.in_use():
        pass
