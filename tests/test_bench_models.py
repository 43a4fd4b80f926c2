"""What benchmarks/bench_models.py checks before it times a network."""

import copy

import pytest
import torch
from torch import nn

import fastgan
from benchmarks.bench_models import FULL, Case, distance
from tests.models_zoo import ZOO

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="checks on a CPU; on a GPU the benchmark itself runs")


def test_every_network_has_a_setting():
    assert FULL.keys() == ZOO.keys()


@cpu_only
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_check_passes_what_is_right(precision):
    for name in ("normed_last_unet", "sngan_critic", "conditional_generator"):
        case = Case(name, ZOO[name].width, ZOO[name].size, 4, precision)
        for variant in ("stock", "fused"):
            case.check(*case.build(variant))


@cpu_only
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("upsampling_generator", lambda norm: setattr(norm, "eps", 1e-5)),
        ("vaegan_autoencoder", lambda norm: setattr(norm, "momentum", 0.1)),
        ("normed_last_unet", lambda norm: nn.init.constant_(norm.bias, 0.3)),
    ],
)
def test_check_fails_what_is_not(name, wrong, precision):
    case = Case(name, ZOO[name].width, ZOO[name].size, 4, precision)
    network = fastgan.fuse(copy.deepcopy(case.network))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]

    def call(*inputs):
        wrong(norms[-1])  # after the first state was loaded
        return network(*inputs)

    with pytest.raises(AssertionError, match="wrong: the"):
        case.check(network, call)


def test_distance():
    exact = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([1e-9], dtype=torch.float64)]
    assert distance([torch.tensor([3.0, 4.5]), torch.tensor([0.0])], exact) == pytest.approx(0.1 / 2**0.5)
    assert distance([torch.tensor([3.0, 4.0]), torch.tensor([0.05])], exact) == pytest.approx(1 / 2**0.5, rel=1e-6)
    assert not distance([torch.tensor([3.0, float("nan")]), torch.tensor([0.0])], exact) <= 1.0
