"""The layout that a training step gives weights and images: channels_last, where the networks run in it."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastgan.training import TrainStep
from fastgan.training.weights import keep_compilable
from tests.training.small_gan import NZ, real_batches


class Viewing(nn.Module):
    """Layers with a `view` of their feature maps in between, as in many a program from elsewhere."""

    def __init__(self, before, shape, after):
        super().__init__()
        self.before, self.shape, self.after = before, shape, after

    def forward(self, x):
        x = self.before(x)
        return self.after(x.view(x.shape[0], *self.shape))


def viewing_generator():
    before = nn.Sequential(nn.ConvTranspose2d(NZ, 8, 4), nn.BatchNorm2d(8), nn.ReLU())
    return Viewing(before, (2, 8, 8), nn.Sequential(nn.ConvTranspose2d(2, 2, 4, 2, 1), nn.Tanh()))


def plain_generator():
    return nn.Sequential(nn.ConvTranspose2d(NZ, 4, 8), nn.ReLU(), nn.ConvTranspose2d(4, 2, 4, 2, 1), nn.Tanh())


def viewing_discriminator():
    before = nn.Sequential(nn.Conv2d(2, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
    return Viewing(before, (-1,), nn.Linear(4 * 8 * 8, 1))


def plain_discriminator():
    return nn.Sequential(nn.Conv2d(2, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 8 * 8, 1))


def networks(*makers):
    torch.manual_seed(0)
    return [make().double() for make in makers]


class Counting(nn.Sequential):
    """Puts another buffer in the place of its own at each call."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


def step_of(pair, **options):
    return TrainStep(*pair, latent_dim=(NZ, 1, 1), lr=1e-2, **options)


def trained_by_hand(pair, batches):
    """[(loss_d, loss_g)] of the example's steps, one for each batch."""
    (generator, discriminator), found = pair, []
    loss = nn.functional.binary_cross_entropy_with_logits
    adams = [torch.optim.Adam(network.parameters(), 1e-2, (0.5, 0.999)) for network in pair]
    torch.manual_seed(1)
    for images in batches:
        generator.zero_grad(), discriminator.zero_grad()
        fake = generator(torch.randn(len(images), NZ, 1, 1, dtype=torch.float64))
        logits = discriminator(images), discriminator(fake.detach())
        loss_d = sum(loss(each, torch.full_like(each, target)) for each, target in zip(logits, (1, 0), strict=True))
        loss_d.backward()
        adams[1].step()
        loss_g = loss(discriminator(fake), torch.ones(len(images), 1, dtype=torch.float64))
        loss_g.backward()
        adams[0].step()
        found.append((loss_d.detach(), loss_g.detach()))
    return found


class _ViewsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.view(-1).view(grad.shape)


class _GradientViewed(nn.Module):
    def forward(self, x):
        return _ViewsGradient.apply(x)


@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("scaled", (False, True))
def test_a_view_in_the_generators_backward(scaled, fused):
    """The discriminator has learned by then: the step that comes after the failed one finds it as it was."""
    pair = networks(plain_generator, plain_discriminator)
    pair[0].append(_GradientViewed())
    ours, stock = pair, copy.deepcopy(pair)
    step, (images, *_) = step_of(ours, fused=fused), real_batches(1)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    torch.manual_seed(1)
    losses = step(images)
    ((loss_d, loss_g),) = trained_by_hand(stock, [images])
    torch.testing.assert_close([losses["loss_d"], losses["loss_g"]], [loss_d, loss_g])
    for network, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(network.state_dict(), expected.state_dict())
    assert {float(state["step"]) for state in step.optimizer_d.state.values()} == {1.0}
    assert step.scaler.is_enabled() == scaled and (not scaled or step.scaler.get_scale() == 4.0)


@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("compile", (False, True))
@pytest.mark.parametrize(
    "makers",
    [
        (viewing_generator, plain_discriminator),
        (plain_generator, viewing_discriminator),
        (viewing_generator, viewing_discriminator),
    ],
    ids=("generator", "discriminator", "both"),
)
def test_views_of_feature_maps(makers, compile, fused, recwarn):
    """The example's numbers, as if the first attempt had never been."""
    ours, stock = networks(*makers), networks(*makers)
    step, batches = step_of(ours, fused=fused, compile=compile), real_batches(3)
    torch.manual_seed(1)
    found = [step(images) for images in batches]
    for losses, (expected, _) in zip(found, trained_by_hand(stock, batches), strict=True):
        torch.testing.assert_close(losses["loss_d"], expected, rtol=1e-8, atol=0)
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-8)
    assert step.one_pass == fused and not [w for w in recwarn if "two passes" in str(w.message)]


def test_a_state_from_before_the_first_step():
    """Adam's averages have the layout that the weights end up in."""
    makers = (viewing_generator, viewing_discriminator)
    first, batches = step_of(networks(*makers)), real_batches(4)
    torch.manual_seed(1)
    for images in batches[:2]:
        first(images)
    state = copy.deepcopy(first.state_dict())
    second, found = step_of(networks(*makers)), []
    second.load_state_dict(state)
    for step in (first, second):
        torch.manual_seed(2)
        found.append([step(images) for images in batches[2:]])
    torch.testing.assert_close(*found, rtol=0, atol=0)


class _Sharded(torch.optim.SGD):
    """Its state has to be gathered from other processes first, as a ZeroRedundancyOptimizer's has."""

    def state_dict(self):
        raise RuntimeError("Optimizer state has not been consolidated on this rank")


@pytest.mark.parametrize("viewing", ("generator", "discriminator"))
def test_optimizers_of_somebody_else(viewing):
    makers = (
        (viewing_generator, plain_discriminator) if viewing == "generator" else (plain_generator, viewing_discriminator)
    )
    found = []
    for fused in (True, False):
        step = step_of(networks(*makers), fused=fused)
        for name in ("generator", "discriminator"):
            optimizer = _Sharded(getattr(step, name).parameters(), lr=0.1, momentum=0.9)
            setattr(step, f"optimizer_{name[0]}", optimizer)
        torch.manual_seed(1)
        found.append(([step(images) for images in real_batches(3)], step.discriminator.state_dict()))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


def test_one_pass_is_tried_in_the_layout_that_it_ends_up_in():
    """The first attempt fails before it is known whether real and fake images can be told apart."""
    before = nn.Sequential(nn.Conv2d(2, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
    after = nn.Sequential(nn.Linear(4 * 8 * 8, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    pairs = [networks(plain_generator, lambda: copy.deepcopy(Viewing(before, (-1,), after))) for _ in range(2)]
    found = []
    for pair, one_pass in zip(pairs, (None, False), strict=True):
        step = step_of(pair, one_pass=one_pass)
        torch.manual_seed(1)
        with nullcontext() if one_pass is False else pytest.warns(UserWarning, match="two passes: .* BatchNorm"):
            found.append([step(images) for images in real_batches(2)])
        assert step.one_pass is False
    assert found[0] == found[1]


def test_no_batch_of_a_source_is_lost():
    batches = iter(real_batches(3))
    source = SimpleNamespace(draw=lambda: next(batches))
    step = step_of(networks(viewing_generator, viewing_discriminator), source=source)
    other = step_of(networks(viewing_generator, viewing_discriminator))
    for images in real_batches(3):
        torch.manual_seed(1)
        losses = step()
        torch.manual_seed(1)
        assert losses == other(images)


def test_other_errors_are_what_they_are():
    step = step_of(networks(plain_generator, plain_discriminator))
    with pytest.raises(RuntimeError, match="channels"):
        step(real_batches(1)[0][:, :1])


@pytest.mark.parametrize(
    ("layers", "changed"),
    [
        ([nn.Linear(4, 4), nn.ConvTranspose2d(4, 6, 4), nn.ConvTranspose2d(6, 6, 4)], [1]),
        ([nn.Conv2d(4, 6, 4), nn.ConvTranspose2d(6, 4, 4)], []),  # its decoder is over no latents
        ([nn.Linear(4, 4)], []),
    ],
)
def test_only_a_first_layer_over_latents_is_kept_from_channels_last(layers, changed):
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    keep_compilable(network)
    weights = [(i, layer.weight) for i, layer in enumerate(network) if layer.weight.dim() == 4]
    assert [i for i, weight in weights if weight.is_contiguous()] == changed


def test_weights_that_are_shared_out_keep_theirs(tmp_path):
    """DistributedDataParallel has laid out their gradients, and would add up others than these."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/processes", rank=0, world_size=1)
    try:
        pair = [DistributedDataParallel(network) for network in networks(plain_generator, plain_discriminator)]
        before = [parameter.stride() for network in pair for parameter in network.parameters()]
        step = step_of(pair)
        step(real_batches(1)[0])
        assert before == [parameter.stride() for network in pair for parameter in network.parameters()]
    finally:
        torch.distributed.destroy_process_group()


def test_buffers_that_a_forward_replaces_are_put_back():
    generator, discriminator = networks(viewing_generator, lambda: Counting(viewing_discriminator()))
    step = step_of((generator, discriminator), one_pass=False)
    step(torch.rand(4, 2, 16, 16, dtype=torch.float64))
    assert discriminator.calls == 3  # real and fake images, and those of the generator's step
