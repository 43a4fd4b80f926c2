"""The discriminator's update in one pass over [real; fake], and in two: when each, and what either promises."""

import copy
import random
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastgan
from fastgan.training import TrainStep
from fastgan.training.one_pass import one_pass_obstacle
from tests.training.small_gan import NZ, logits_of, make_networks, real_batches, small_critic


def test_one_pass_equals_two_stock_passes_over_twenty_float64_steps():
    """Losses, every parameter, every running statistic and the count of batches."""
    ours, stock = make_networks(), make_networks()
    step = TrainStep(*ours, latent_dim=NZ, lr=2e-3, fused=True, one_pass=True)
    expected_step = TrainStep(*stock, latent_dim=NZ, lr=2e-3, fused=False)
    batches = real_batches(20)
    torch.manual_seed(2)
    losses = [step(real) for real in batches]
    torch.manual_seed(2)
    expected = [expected_step(real) for real in batches]
    assert step.one_pass and not expected_step.one_pass
    torch.testing.assert_close(losses, expected, rtol=1e-7, atol=1e-9)
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            [p.grad for p in mine.parameters()], [p.grad for p in theirs.parameters()], rtol=1e-6, atol=1e-8
        )


class _BatchMean(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class _InPieces(nn.Module):
    """A batch mean of every four images."""

    def forward(self, x):
        return torch.cat([piece - piece.mean(0, keepdim=True) for piece in x.split(4)])


class _OfItsOwn(nn.Module):
    """In float32 whatever comes, and with a Python random number."""

    def forward(self, x):
        random.random()
        return x.float()


class _NowAndThen(nn.Module):
    """Chance that hardly ever strikes, by a generator that is not torch's."""

    def forward(self, x):
        return x * 2 if random.random() < 1e-9 else x


class _Locked(nn.Identity):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (lambda: [nn.Conv2d(2, 4, 3), nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 1)], "unfused in 2"),
        (lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=None), *logits_of(784)], "momentum=None"),
        (lambda: [nn.Conv2d(2, 4, 3), nn.Dropout(), *logits_of(784)], "random numbers"),
        (lambda: [nn.Conv2d(2, 4, 3), _BatchMean(), *logits_of(784)], "share a batch"),
        (lambda: [nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3)), *logits_of(784)], "chance|leaves"),
        (lambda: [nn.Conv2d(2, 1, 16), nn.Flatten(0), nn.Unflatten(0, (1, -1))], "first axis"),
        (lambda: [nn.Conv2d(2, 4, 3), _InPieces(), *logits_of(784)], "share a batch"),
        (lambda: [nn.Conv2d(2, 4, 3), _NowAndThen(), *logits_of(784)], "random numbers"),
        (lambda: [_Locked(), nn.Conv2d(2, 4, 3), *logits_of(784)], "cannot be copied to try it .TypeError"),
    ],
    ids=(
        "batch-norm-1d",
        "cumulative",
        "dropout",
        "batch-mean",
        "spectral-norm",
        "shape",
        "pieces",
        "now-and-then",
        "lock",
    ),
)
def test_two_passes_where_one_would_not_be_exact(layers, reason):
    torch.manual_seed(0)
    discriminator = nn.Sequential(*layers()).double()
    generator, _ = make_networks()
    step = TrainStep(generator, discriminator, latent_dim=NZ, one_pass=True)
    before = copy.deepcopy(discriminator.state_dict()), torch.get_rng_state()
    with pytest.warns(UserWarning, match=f"two passes.*({reason})") as warned:
        step._can_take_one_pass(*(torch.cat(real_batches(2, seed=seed)) for seed in (1, 2)))
    assert not step.one_pass and str(warned[0].message).endswith(step.one_pass_reason)
    assert set(before[0]) == set(discriminator.state_dict())
    step(real_batches(1)[0])


def test_two_passes_where_float64_does_not_do():
    torch.manual_seed(0)
    discriminator = nn.Sequential(_OfItsOwn(), nn.Conv2d(2, 4, 3), *logits_of(784))
    step = TrainStep(make_networks(dtype=torch.float32)[0], discriminator, latent_dim=NZ)
    before = random.getstate()
    with pytest.warns(UserWarning, match="cannot be tried on 4 images of each kind in float64"):
        step._can_take_one_pass(*real_batches(2, dtype=torch.float32))
    assert random.getstate() == before and not step.one_pass
    step(real_batches(1, dtype=torch.float32)[0])


def test_weights_of_five_dimensions():
    class Modulated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(1, 4, 2, 3, 3)), nn.Sequential(*logits_of(784))

        def forward(self, x):
            return self.head(nn.functional.conv2d(x, self.weight[0]))

    step = TrainStep(make_networks()[0], Modulated().double(), latent_dim=NZ)
    assert step(real_batches(1)[0])["loss_d"].isfinite() and step.one_pass


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_two_passes_where_one_cannot_be_tried():
    torch.manual_seed(0)
    discriminator = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(2, 1, 16)), nn.Flatten()).double()
    step = TrainStep(make_networks()[0], discriminator, latent_dim=NZ, one_pass=True)
    with pytest.warns(UserWarning, match="cannot be copied"):
        step(real_batches(1)[0])
    assert not step.one_pass


@pytest.mark.parametrize("precision, one_pass", [("fp32", False), ("fp32", None), ("bf16", None)])
def test_passes_on_a_cpu(precision, one_pass):
    """One with fused layers, two if asked for."""
    step = TrainStep(*make_networks(dtype=torch.float32), latent_dim=NZ, precision=precision, one_pass=one_pass)
    stock = TrainStep(*make_networks(dtype=torch.float32), latent_dim=NZ, precision=precision, fused=False)
    for images in real_batches(2, dtype=torch.float32):
        losses = []
        for each in (step, stock):
            torch.manual_seed(3)
            losses.append(torch.stack(list(each(images).values())))
        tolerance = {"fp32": 1e-4, "bf16": 0.03}[precision]
        torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    assert step.one_pass == (one_pass is None) and not stock.one_pass and "fused=False" in stock.one_pass_reason


def test_one_pass_is_tried_on_copies():
    step = TrainStep(*make_networks(), latent_dim=NZ, one_pass=True)
    before, rng = copy.deepcopy(step.discriminator.state_dict()), torch.get_rng_state()
    real, fake = real_batches(2)
    step._can_take_one_pass(real, fake)
    assert step.one_pass and torch.equal(rng, torch.get_rng_state())
    torch.testing.assert_close(before, step.discriminator.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("one_pass", (True, False))
def test_a_discriminator_that_changes_its_images(one_pass):
    """The generator learns by images that were changed before, when the discriminator learned by them."""

    def make():
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(NZ, 512), nn.Unflatten(1, (2, 16, 16))).double()
        return generator, nn.Sequential(nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(2, 4, 3), *logits_of(784)).double()

    found = []
    for fused in (True, False):
        networks = make()
        step = TrainStep(*networks, latent_dim=NZ, fused=fused, one_pass=one_pass and fused)
        with pytest.warns(UserWarning, match="in place") if step.one_pass else nullcontext():
            found.append([step(real) for real in real_batches(3)])
        found.append([network.state_dict() for network in networks])
    torch.testing.assert_close(found[:2], found[2:])


def test_one_pass_of_numbers_that_are_none():
    """A run that has diverged says so by its losses; a buffer may be empty."""
    generator, discriminator = make_networks()
    discriminator.register_buffer("nothing", torch.empty(0))
    step, (real,) = TrainStep(generator, discriminator, latent_dim=NZ, one_pass=True), real_batches(1)
    real[0, 0, 0, 0] = float("nan")
    losses = step(real)
    assert step.one_pass and losses["d_real"].isnan() and losses["d_fake"].isfinite()


class _Saved:
    """A tensor that autograd keeps for backward."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_two_passes_never_hold_both_at_once():
    """Where memory counts: the discriminator's activations of real images are gone before there are fake images."""
    generator, discriminator = make_networks()
    step, kept, alive = TrainStep(generator, discriminator, latent_dim=NZ, one_pass=False), weakref.WeakSet(), []

    def keep(tensor):
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    discriminator.register_forward_hook(lambda *_: alive.append(len(kept)))
    generator.register_forward_pre_hook(lambda *_: alive.append(len(kept)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        step(real_batches(1)[0])
    after_real, before_fake, *_ = alive
    assert after_real > 5 and before_fake == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("prepare", (lambda part: torch.compile(part, backend="eager"), torch.jit.script))
def test_parts_that_are_compiled(prepare):
    """By somebody else: they have their attributes elsewhere."""
    generator, _ = make_networks()
    discriminator = nn.Sequential(prepare(nn.Conv2d(2, 2, 1)), *small_critic()).double()
    step = TrainStep(generator, discriminator, latent_dim=NZ)
    for images in real_batches(2):
        losses = step(images)
    assert losses["loss_d"].isfinite()


def test_a_generator_of_more_images():
    """Than it got latents: halves of the batch would not be real and fake."""

    class Tripled(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = make_networks()[0]

        def forward(self, z):
            return (
                self.one(z).repeat(3, 1, 1, 1) * torch.arange(1.0, 4.0).repeat_interleave(len(z))[:, None, None, None]
            )

    found = []
    for one_pass in (True, False):
        torch.manual_seed(0)
        step = TrainStep(Tripled(), small_critic().double(), latent_dim=NZ, one_pass=one_pass)
        torch.manual_seed(1)
        found.append(step(real_batches(1)[0]))
    assert found[0] == found[1]


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_two_passes_where_parameters_have_hooks(register):
    """They are for the gradients of one pass, those that come later too; copies of a parameter have none."""
    step = TrainStep(make_networks()[0], small_critic().double(), latent_dim=NZ)
    step(real_batches(1)[0])
    assert step.one_pass
    getattr(step.discriminator[0].weight, register)(lambda tensor: None)
    with pytest.warns(UserWarning, match="0.weight has hooks, for the gradient of each pass"):
        step(real_batches(1)[0])
    assert not step.one_pass


def test_two_passes_where_buffers_are_sent(monkeypatch):
    """By every process, whatever a trial in one of them would say."""
    monkeypatch.setattr("fastgan.training.one_pass.DistributedDataParallel", Sending)
    network, images = fastgan.fuse(small_critic().double()), real_batches(2)
    assert one_pass_obstacle(network, *images) is None
    assert one_pass_obstacle(Sending(network), *images) == "DistributedDataParallel sends its buffers at each pass"


class Sending(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)

    def will_sync_module_buffers(self):
        return True
