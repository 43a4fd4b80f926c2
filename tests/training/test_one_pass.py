"""The discriminator's update in one pass over [real; fake], and in two: when each, and what either promises."""

import copy
import random
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan.graph_forward import MOST_PLANS
from fastgan.training import TrainStep
from fastgan.training.one_pass import one_pass_obstacle
from tests.training.small_gan import NZ, make_networks, real_batches


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


def _logits(features):
    return nn.Flatten(), nn.Linear(features, 1)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (lambda: [nn.Conv2d(2, 4, 3), nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 1)], "unfused in 2"),
        (lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=None), *_logits(784)], "momentum=None"),
        (lambda: [nn.Conv2d(2, 4, 3), nn.Dropout(), *_logits(784)], "random numbers"),
        (lambda: [nn.Conv2d(2, 4, 3), _BatchMean(), *_logits(784)], "share a batch"),
        (lambda: [nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3)), *_logits(784)], "chance|leaves"),
        (lambda: [nn.Conv2d(2, 1, 16), nn.Flatten(0), nn.Unflatten(0, (1, -1))], "first axis"),
        (lambda: [nn.Conv2d(2, 4, 3), _InPieces(), *_logits(784)], "share a batch"),
        (lambda: [nn.Conv2d(2, 4, 3), _NowAndThen(), *_logits(784)], "random numbers"),
        (lambda: [_Locked(), nn.Conv2d(2, 4, 3), *_logits(784)], "cannot be copied to try it .TypeError"),
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
        step._takes_both(*(torch.cat(real_batches(2, seed=seed)) for seed in (1, 2)))
    assert not step.one_pass and str(warned[0].message).endswith(step.one_pass_reason)
    assert set(before[0]) == set(discriminator.state_dict())
    step(real_batches(1)[0])


def test_two_passes_where_float64_does_not_do():
    torch.manual_seed(0)
    discriminator = nn.Sequential(_OfItsOwn(), nn.Conv2d(2, 4, 3), *_logits(784))
    step = TrainStep(make_networks(dtype=torch.float32)[0], discriminator, latent_dim=NZ)
    before = random.getstate()
    with pytest.warns(UserWarning, match="cannot be tried on 4 images of each kind in float64"):
        step._takes_both(*real_batches(2, dtype=torch.float32))
    assert random.getstate() == before and not step.one_pass
    step(real_batches(1, dtype=torch.float32)[0])


def test_weights_of_five_dimensions():
    class Modulated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(1, 4, 2, 3, 3)), nn.Sequential(*_logits(784))

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
    step._takes_both(real, fake)
    assert step.one_pass and torch.equal(rng, torch.get_rng_state())
    torch.testing.assert_close(before, step.discriminator.state_dict(), rtol=0, atol=0)


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


class _FadingIn(nn.Module):
    """A forward that is another one at each step."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.skip = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(2, 4, 3)
        self.logits, self.alpha = nn.Sequential(*_logits(784)), (0.0,)

    def forward(self, x):
        seen = nn.functional.leaky_relu(self.norm(self.conv(x)), 0.2)
        return self.logits(self.alpha[0] * seen + (1 - self.alpha[0]) * self.skip(x))


class _Mixing(nn.Module):
    """A batch mean that somebody may turn on."""

    share = 0.0

    def __init__(self):
        super().__init__()
        self.layers = _sequential()

    def forward(self, x):
        return self.layers(x - self.share * x.mean(0, keepdim=True))


class _Checkpointing(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.logits = reentrant, nn.Sequential(*_logits(784))
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))

    def forward(self, x):
        x = x if x.requires_grad else x.clone().requires_grad_()
        return self.logits(checkpoint(self.features, x, use_reentrant=self.reentrant))


def _sequential():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), *_logits(784))


def _followed(make, change, steps, batch_of=lambda i: 4):
    """Ours after `steps` steps, each after change(discriminator, i); its losses and gradients are stock's each time."""
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append((make_networks()[0], make().double()))
    ours, stock = (
        TrainStep(*pair, latent_dim=NZ, fused=fused) for pair, fused in zip(networks, (True, False), strict=True)
    )
    for i in range(steps):
        (images,) = real_batches(1, seed=i)
        images = images.repeat(2, 1, 1, 1)[: batch_of(i)]
        found = []
        for step in (ours, stock):
            change(step.discriminator, i)
            torch.manual_seed(i)
            losses = step(images)
            found.append((losses, [p.grad for p in step.discriminator.parameters()], step.discriminator.state_dict()))
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)
    return ours


@pytest.mark.parametrize(
    "change",
    (
        lambda model: model[1].register_forward_hook(lambda *_: None),
        lambda model: model[0].register_forward_pre_hook(lambda *_: None),
        lambda model: model[0].register_full_backward_hook(lambda *_: None),
        lambda model: model[1].register_full_backward_pre_hook(lambda *_: None),
        lambda model: setattr(model[0], "_conv_forward", model[0]._conv_forward),
        fastgan.unfuse,
        lambda model: model.__setitem__(1, type("Own", (nn.BatchNorm2d,), {})(4).double()),
    ),
    ids=("hook", "pre-hook", "backward", "before backward", "code", "unfused", "another class"),
)
def test_it_is_tried_anew_after_changes(change):
    with pytest.warns(UserWarning, match="two passes.*unfused in 1"):
        step = _followed(_sequential, lambda model, i: change(model) if i == 2 else None, steps=4)
    assert not step.one_pass


def test_it_is_tried_anew_in_another_mode():
    def make():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout(0.0), nn.BatchNorm2d(4), *_logits(784))

    with pytest.warns(UserWarning, match="two passes.*unfused in 2"):
        _followed(make, lambda model, i: model.train(i > 0), steps=3)


@pytest.mark.parametrize("where", ("instance", "class", "base"))
def test_it_is_tried_anew_with_another_setting(where, monkeypatch):
    class Mixing(_Mixing):
        share = 0.0

    monkeypatch.setattr(_Mixing, "share", 0.0)
    if where == "base":
        del Mixing.share

    def change(model, i):
        {"instance": model, "class": Mixing, "base": _Mixing}[where].share = 0.5 * (i > 1)

    with pytest.warns(UserWarning, match="two passes.*share a batch"):
        _followed(Mixing, change, steps=4)


def test_counters_of_a_class_are_no_settings():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return x

    step = _followed(lambda: nn.Sequential(Counting(), *_sequential()), lambda model, i: None, steps=10)
    assert step.one_pass


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("prepare", (lambda part: torch.compile(part, backend="eager"), torch.jit.script))
def test_parts_that_are_compiled(prepare):
    """By somebody else: they have their attributes elsewhere."""
    generator, _ = make_networks()
    discriminator = nn.Sequential(prepare(nn.Conv2d(2, 2, 1)), *_sequential()).double()
    step = TrainStep(generator, discriminator, latent_dim=NZ)
    for images in real_batches(2):
        losses = step(images)
    assert losses["loss_d"].isfinite()


def test_it_is_tried_anew_where_a_layer_is_stock_from_then_on():
    with pytest.warns(UserWarning, match="two passes.*unfused in norm"):
        _followed(_FadingIn, lambda model, i: vars(model.conv).update(padding_mode="reflect") if i else None, steps=3)


def test_it_is_not_tried_for_ever():
    with pytest.warns(UserWarning, match="two passes: its layers or settings change at every step"):
        _followed(_Mixing, lambda model, i: setattr(model, "number", i), steps=10)


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
        step = TrainStep(Tripled(), _sequential().double(), latent_dim=NZ, one_pass=one_pass)
        torch.manual_seed(1)
        found.append(step(real_batches(1)[0]))
    assert found[0] == found[1]


def test_forwards_that_are_not_followed_any_more():
    with pytest.warns(RuntimeWarning, match="most other new calls run stock"):
        step = _followed(_FadingIn, lambda model, i: setattr(model, "alpha", (i / 100,)), steps=MOST_PLANS + 3)
    assert step.one_pass


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing(reentrant):
    """A BatchNorm that runs again in backward has its running statistics in another order than in two passes."""
    with pytest.warns(UserWarning, match="two passes: it leaves another features.1.running_mean"):
        _followed(lambda: _Checkpointing(reentrant), lambda model, i: None, steps=2)

    def untracked():
        model = _Checkpointing(reentrant)
        model.features[1] = nn.BatchNorm2d(4, track_running_stats=False)
        return model

    assert _followed(untracked, lambda model, i: None, steps=2).one_pass


def test_images_of_another_shape_are_two_passes():
    """As stock takes them, or refuses to."""

    def make():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(3), *_logits(36))

    step = _followed(make, lambda model, i: None, steps=1)
    expected = TrainStep(make_networks()[0], copy.deepcopy(step.discriminator), latent_dim=NZ, fused=False)
    assert step.one_pass
    larger = real_batches(1, image_size=18)[0]
    found = []
    for each in (step, expected):
        each.generator.load_state_dict(step.generator.state_dict())
        torch.manual_seed(0)
        found.append(each._discriminate(larger)[1:])
    torch.testing.assert_close(*found)
    for images in (larger[:, :1], larger[0], larger[:, :, :1, :1]):
        with pytest.raises((RuntimeError, ValueError)):
            step(images)
    assert step.one_pass


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_two_passes_where_parameters_have_hooks(register):
    """They are for the gradients of one pass, those that come later too; copies of a parameter have none."""
    step = TrainStep(make_networks()[0], _sequential().double(), latent_dim=NZ)
    step(real_batches(1)[0])
    assert step.one_pass
    getattr(step.discriminator[0].weight, register)(lambda tensor: None)
    with pytest.warns(UserWarning, match="0.weight has hooks, for the gradient of each pass"):
        step(real_batches(1)[0])
    assert not step.one_pass


def test_two_passes_where_buffers_are_sent(monkeypatch):
    """By every process, whatever a trial in one of them would say."""
    monkeypatch.setattr("fastgan.training.one_pass.DistributedDataParallel", Sending)
    network, images = fastgan.fuse(_sequential().double()), real_batches(2)
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
