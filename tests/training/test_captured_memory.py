"""A captured step does not depend on memory that its own graph writes over: replays give the same as plain steps."""

import copy

import pytest
import torch
from torch import nn

from fastgan.training import TrainStep, graph
from fastgan.training.step import _fused_convolutions
from fastgan.weight_copies import WeightCopies
from tests.captures import SimulatedGraph, simulate_graphs
from tests.conftest import HAS_GPU
from tests.forwards import Counting
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


@pytest.mark.parametrize("half, one_pass", ((False, True), (True, False)))
def test_replays_equal_plain_steps(half, one_pass, monkeypatch, triton_backend):
    plain, graphed = (make_step(half, one_pass=one_pass) for _ in range(2))
    expected = train(plain)
    simulate_graphs(monkeypatch)
    monkeypatch.setattr(graph, "WARMUP_STEPS", 1)
    graphed._graph = graph.StepGraph(graphed._step, torch.device("cpu"))
    losses = train(graphed)
    assert graphed._graph.captured and len(graphed._graph._graph._steps) > 50
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    for name in ("generator", "discriminator"):
        ours, theirs = (getattr(step, name).state_dict() for step in (graphed, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", (True, False))
def test_groups_of_parameters_keep_their_learning_rates(fused, monkeypatch, triton_backend):
    plain, graphed = (make_step(half=False, fused=fused) for _ in range(2))
    for step in (plain, graphed):
        (group,) = step.optimizer_d.param_groups
        later = [group["params"].pop() for _ in range(2)]
        step.optimizer_d.add_param_group({"params": later, "lr": 0.001})
    expected = train(plain)
    simulate_graphs(monkeypatch)
    monkeypatch.setattr(graph, "WARMUP_STEPS", 1)
    graphed._graph = graph.StepGraph(graphed._step, torch.device("cpu"))
    torch.testing.assert_close(train(graphed), expected, rtol=1e-6, atol=1e-6)
    assert graphed._graph.captured
    assert [float(group["lr"]) for group in graphed.optimizer_d.param_groups] == pytest.approx([0.01, 0.001])
    ours, theirs = (list(step.discriminator.parameters()) for step in (graphed, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture
def captured_step(monkeypatch, triton_backend):
    """A step of which the second call is captured."""

    def make(**options):
        step = make_step(half=False, **options)
        step._graph = graph.StepGraph(step._step, torch.device("cpu"))
        return step

    simulate_graphs(monkeypatch)
    monkeypatch.setattr(graph, "WARMUP_STEPS", 1)
    return make


def test_what_is_captured_has_the_shape_of_the_calls_before(captured_step):
    step = captured_step()
    real = real_batches(1, dtype=torch.float32)[0]
    captured = []
    for batch in (real, real[:2], real, real, real[:2], real):  # a data set that ends with a smaller batch
        step(batch)
        captured.append(step._graph.captured and len(step._graph._images))
    assert captured == [False, False, False, len(real), len(real), len(real)]


def test_a_capture_that_fails_is_tried_again(captured_step, monkeypatch):
    step = captured_step()
    first, *later = real_batches(4, dtype=torch.float32)
    step(first)

    def out_of_memory():
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(step.optimizer_g, "step", out_of_memory)
        step(later[0])
    for real in later:
        losses = step(real)
    assert step._graph.captured and all(loss.isfinite() for loss in losses.values())


def test_no_replay_writes_to_moments_that_loading_replaced(captured_step):
    step = captured_step()
    train(step)
    state = copy.deepcopy(step.state_dict())
    assert step._graph.captured
    step.optimizer_g.load_state_dict(copy.deepcopy(step.optimizer_g.state_dict()))
    assert not step._graph.captured
    train(step)
    state["optimizer_d"]["param_groups"][0]["params"] = [0]
    with pytest.raises(ValueError, match="parameter group"):
        step.load_state_dict(state)
    assert not step._graph.captured


@pytest.mark.parametrize("shape", ((16,), (2, 4, 4, 4)))
def test_images_of_other_dimensions(shape, monkeypatch, triton_backend):
    """Vectors, and volumes: no convolutions of ours, but a step."""

    def layers(last):
        if len(shape) == 1:
            return [nn.Linear(16, 8), nn.LeakyReLU(), nn.Linear(8, last)]
        return [nn.Conv3d(2, 4, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(4, last, 3, padding=1)]

    torch.manual_seed(0)
    generator = nn.Sequential(*layers(16 if len(shape) == 1 else 2))
    networks = generator, nn.Sequential(*layers(1), nn.Flatten(), nn.LazyLinear(1))
    networks[1](torch.zeros(1, *shape))
    simulate_graphs(monkeypatch)
    losses = []
    for captures in (False, True):
        step = TrainStep(*copy.deepcopy(networks), latent_dim=shape, one_pass=False)
        step._graph = graph.StepGraph(step._step, torch.device("cpu")) if captures else None
        torch.manual_seed(2)
        images = torch.rand(5, 3, *shape, generator=torch.Generator().manual_seed(1))
        losses.append([list(step(batch).values()) for batch in images])
    assert step._graph.captured
    torch.testing.assert_close(*losses)


def test_a_discriminator_that_changes_at_each_step(monkeypatch, triton_backend):
    """One pass would be tried within the capture, which waits for no number: two passes come before."""

    simulate_graphs(monkeypatch)
    generator, discriminator = make_networks(dtype=torch.float32)
    step = TrainStep(generator, nn.Sequential(Counting(), discriminator), latent_dim=NZ)
    step._graph = graph.StepGraph(step._step, torch.device("cpu"))
    with pytest.warns(UserWarning, match="two passes: its layers or settings change at every step"):
        for images in real_batches(5, dtype=torch.float32):
            losses = step(images)
    assert step._graph.captured and losses["loss_d"].isfinite()


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
