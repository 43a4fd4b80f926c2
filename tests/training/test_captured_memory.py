"""A captured step does not depend on memory that its own graph writes over: replays give the same as plain steps."""

import pytest
import torch

from fastgan.training import TrainStep, graph
from fastgan.training.step import _fused_convolutions
from fastgan.weight_copies import WeightCopies
from tests.captures import SimulatedGraph, simulate_graphs
from tests.conftest import HAS_GPU
from tests.training.small_gan import NZ, make_networks, real_batches

pytestmark = pytest.mark.skipif(HAS_GPU, reason="test_cuda_graph.py has real graphs")
STEPS = 3


def make_step(half, **options):
    step = TrainStep(*make_networks(dtype=torch.float32), latent_dim=NZ, lr=0.01, **options)
    if half:  # as with "fp16" on a GPU, but for the scaler
        step.autocast_dtype = torch.float16
        step._copies_g, step._copies_d = (
            WeightCopies(_fused_convolutions(network), torch.float16)
            for network in (step.generator, step.discriminator)
        )
    return step


def train(step):
    torch.manual_seed(2)
    return torch.stack([torch.stack(list(step(real).values())) for real in real_batches(STEPS, dtype=torch.float32)])


@pytest.mark.parametrize("half, one_pass, branches", ((False, True, True), (True, False, False)))
def test_replays_equal_plain_steps(half, one_pass, branches, monkeypatch, triton_backend):
    plain, graphed = (make_step(half, one_pass=one_pass) for _ in range(2))
    expected = train(plain)
    simulate_graphs(monkeypatch)
    monkeypatch.setattr(graph, "WARMUP_STEPS", 1)
    monkeypatch.setattr(graph.branches, "ENABLED", branches)
    graphed._graph = graph.StepGraph(graphed._step, torch.device("cpu"))
    losses = train(graphed)
    assert graphed._graph.captured and len(graphed._graph._graph._steps) > 50
    assert len({stream for stream, *_ in graphed._graph._graph._steps}) == (2 if branches else 1)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    for name in ("generator", "discriminator"):
        ours, theirs = (getattr(step, name).state_dict() for step in (graphed, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_memory_is_given_out_again_and_written_over():
    """What the simulation is for: a constant that a capture allocated, but filled only once, is lost."""
    captured, x = SimulatedGraph(), torch.ones(1000)
    with captured.capturing():
        total = (x * 2).sum()  # gives its memory back
        constant = torch.empty(1000)
        total = total + (constant * x).sum()
    constant.fill_(1.0)
    captured.replay()
    assert total.item() == 2000.0 + 2000.0  # not 1000
    x.fill_(3.0)
    captured.replay()
    assert total.item() == 6000.0 + 18000.0
