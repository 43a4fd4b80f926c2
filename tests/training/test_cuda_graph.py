"""The captured step against the same step as it is, on a GPU."""

import copy
import gc

import pytest
import torch
from torch import nn

from fastgan.models import Discriminator, Generator
from fastgan.training import TrainStep
from fastgan.training.graph import WARMUP_STEPS

pytestmark = pytest.mark.gpu
BATCH = 16
STEPS = WARMUP_STEPS + 6


@pytest.fixture(autouse=True)
def sums_in_one_order():
    """Of cuDNN's weight gradients, too: losses that are others for that would look like a wrong capture."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.fixture(params=("auto", "triton"))
def backend(request, monkeypatch):
    """Networks as small as these are in no table: "auto" takes cuDNN for all of their convolutions."""
    monkeypatch.setenv("FASTGAN_BACKEND", request.param)


def make_step(image_size=28, nc=1, width=16, **options):
    torch.manual_seed(0)
    generator = Generator(image_size=image_size, nc=nc, ngf=width).cuda()
    discriminator = Discriminator(image_size=image_size, nc=nc, ndf=width).cuda()
    return TrainStep(generator, discriminator, latent_dim=100, **options)


def batches(count=STEPS, seed=1, shape=(BATCH, 1, 28, 28)):
    random = torch.Generator("cuda").manual_seed(seed)
    return [torch.rand(shape, device="cuda", generator=random) * 2 - 1 for _ in range(count)]


def train(step, images, seed=2):
    """(steps, 4) losses."""
    torch.manual_seed(seed)
    return torch.stack([torch.stack(list(step(real).values())) for real in images])


@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
def test_losses_are_the_same_with_and_without_the_graph(precision, backend):
    plain, graphed = (make_step(precision=precision, cuda_graph=graph) for graph in (False, True))
    expected, losses = train(plain, batches()), train(graphed, batches())
    assert graphed._graph.captured and losses.isfinite().all()
    # In float16 it is torch's Adam, which knows of the gradients' scale.
    assert (graphed.optimizer_d._updates is not None) == (precision != "fp16")
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(graphed.state_dict()["generator"], plain.state_dict()["generator"])
    torch.testing.assert_close(graphed.state_dict()["discriminator"], plain.state_dict()["discriminator"])


@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
def test_losses_of_stock_layers_are_the_same_with_and_without_the_graph(precision):
    plain, graphed = (make_step(fused=False, precision=precision, cuda_graph=graph) for graph in (False, True))
    expected, losses = train(plain, batches()), train(graphed, batches())
    assert graphed._graph.captured and losses.isfinite().all()
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=2e-2)


def test_the_dcgan_that_is_in_the_tables():
    """As it is trained: of each convolution what was the faster, ours or cuDNN."""
    shape, rows = (128, 3, 64, 64), []
    for graph in (False, True):
        step = make_step(image_size=64, nc=3, width=64, precision="bf16", cuda_graph=graph)
        rows.append(train(step, batches(WARMUP_STEPS + 3, shape=shape)))
    assert step._graph.captured
    torch.testing.assert_close(*rows, rtol=1e-6, atol=1e-6)


def test_a_graph_that_is_garbage_does_not_disturb_a_capture():
    dead = make_step(cuda_graph=True)
    train(dead, batches())
    dead.itself = dead  # it goes when Python looks for such cycles, and not before
    step = make_step(cuda_graph=True)
    train(step, batches(WARMUP_STEPS))
    thresholds = gc.get_threshold()
    del dead
    gc.set_threshold(1)
    try:
        assert train(step, batches(2)).isfinite().all() and step._graph.captured
    finally:
        gc.set_threshold(*thresholds)


def test_compiled_and_captured_without_graph_breaks():
    step = make_step(precision="bf16", compile=True, cuda_graph=True)
    losses = train(step, batches())
    expected = train(make_step(precision="bf16"), batches())
    assert losses.isfinite().all()
    # bf16 rounds elsewhere in compiled code.
    torch.testing.assert_close(losses[:3], expected[:3], rtol=5e-2, atol=5e-2)


def test_one_pass_equals_two():
    one, two = (make_step(one_pass=flag) for flag in (True, False))
    losses = [train(step, batches(3)) for step in (one, two)]
    assert one.one_pass and not two.one_pass
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_learning_rate_takes_effect_without_recapture():
    step = make_step(cuda_graph=True)
    train(step, batches())
    graph, weight = step._graph._graph, step.generator.main[0].weight
    for set_lr in (lambda: setattr(step, "lr", 0.0625), lambda: step.optimizer_g.param_groups[0].update(lr=0.0625)):
        step.lr = 1e-9
        train(step, batches(1))
        before = weight.detach().clone()
        set_lr()
        train(step, batches(1))
        assert (weight - before).abs().max() > 1e-2
        assert step.lr == 0.0625 and step._graph._graph is graph


def test_state_goes_on_exactly():
    first = make_step(cuda_graph=True)
    train(first, batches(STEPS))
    state, rng = copy.deepcopy(first.state_dict()), torch.cuda.get_rng_state()
    assert isinstance(state["optimizer_g"]["param_groups"][0]["lr"], float)
    second = make_step(cuda_graph=True)
    train(second, batches(STEPS, seed=5))  # captured with another state, which loading must not leave behind
    histories = []
    for step in (first, second):
        step.load_state_dict(copy.deepcopy(state))
        torch.cuda.set_rng_state(rng)
        histories.append(torch.stack([torch.stack(list(step(real).values())) for real in batches(STEPS, seed=3)]))
    torch.testing.assert_close(*histories, rtol=1e-6, atol=1e-6)


def test_batches_of_another_shape_run_uncaptured():
    step = make_step(cuda_graph=True)
    train(step, batches())
    losses = step(batches(1)[0][: BATCH // 2])
    assert all(value.isfinite() for value in losses.values())
    assert train(step, batches(2)).isfinite().all()


def test_a_source_is_drawn_from_inside_the_graph():
    class Counter:
        def __init__(self):
            self.images = batches(1)[0]

        def draw(self):
            self.images.mul_(0.5)
            return self.images.clone()

    source = Counter()
    step = make_step(cuda_graph=True, source=source)
    for _ in range(STEPS):
        losses = step()
    assert step._graph.captured and losses["loss_d"].isfinite()
    torch.testing.assert_close(source.images, batches(1)[0] * 0.5**STEPS)


class _Waits(nn.Module):
    def forward(self, x):
        return x * (2.0 if x.sum().item() > 0 else 1.0)


def test_a_step_that_waits_for_the_gpu_is_refused_with_the_way_out():
    torch.manual_seed(0)
    discriminator = nn.Sequential(_Waits(), *Discriminator(image_size=28, nc=1, ndf=16).main)
    step = TrainStep(
        Generator(image_size=28, nc=1, ngf=16).cuda(), discriminator.cuda(), latent_dim=100, cuda_graph=True
    )
    with pytest.raises(RuntimeError, match="cuda_graph=False"):
        train(step, batches())
    train(make_step(), batches(1))  # random numbers are drawn as before
