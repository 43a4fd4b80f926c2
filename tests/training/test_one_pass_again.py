"""One pass of the discriminator is tried anew where something has changed, and its results are stock's each time."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan.fusing.graph_forward import MOST_PLANS
from fastgan.training import TrainStep
from tests.training.small_gan import NZ, logits_of, make_networks, real_batches, small_critic


class _FadingIn(nn.Module):
    """A forward that is another one at each step."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.skip = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(2, 4, 3)
        self.logits, self.alpha = nn.Sequential(*logits_of(784)), (0.0,)

    def forward(self, x):
        seen = nn.functional.leaky_relu(self.norm(self.conv(x)), 0.2)
        return self.logits(self.alpha[0] * seen + (1 - self.alpha[0]) * self.skip(x))


class _Mixing(nn.Module):
    """A batch mean that somebody may turn on."""

    share = 0.0

    def __init__(self):
        super().__init__()
        self.layers = small_critic()

    def forward(self, x):
        return self.layers(x - self.share * x.mean(0, keepdim=True))


class _Checkpointing(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.logits = reentrant, nn.Sequential(*logits_of(784))
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))

    def forward(self, x):
        x = x if x.requires_grad else x.clone().requires_grad_()
        return self.logits(checkpoint(self.features, x, use_reentrant=self.reentrant))


def followed(make, change, steps, batch_of=lambda i: 4):
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
    with pytest.warns(UserWarning, match="two passes.*(unfused in 1|has hooks)"):
        step = followed(small_critic, lambda model, i: change(model) if i == 2 else None, steps=4)
    assert not step.one_pass


@pytest.mark.parametrize("first", (0, 1))
def test_hooks_are_called_for_each_pass(first):
    """And for nothing else: no trial, and no batch of both kinds of images."""
    calls = {True: [], False: []}

    def change(model, i):
        if i == first:
            seen = calls["forward" in vars(model)]  # whether it is fused
            model[0].register_forward_hook(lambda module, args, y: seen.append((len(y), y.dtype)))

    with pytest.warns(UserWarning, match="two passes: 0 has hooks, which are for each pass"):
        followed(small_critic, change, steps=3)
    assert calls[True] == calls[False] == [(4, torch.float64)] * 3 * (3 - first)


def test_hooks_on_all_modules_are_called_for_each_pass():
    calls, registered = [], []

    def change(model, i):
        if not calls and i == 1:
            hook = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
            registered.append(hook)
        if i == 2:
            registered[0].remove()

    step = followed(small_critic, change, steps=4)
    # Of ours and of stock at one step: real images, fake ones, and those that the generator learns by.
    assert calls.count(nn.Conv2d) == 2 * 3 and step.one_pass


def test_it_is_tried_anew_in_another_mode():
    def make():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout(0.0), nn.BatchNorm2d(4), *logits_of(784))

    with pytest.warns(UserWarning, match="two passes.*unfused in 2"):
        followed(make, lambda model, i: model.train(i > 0), steps=3)


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
        followed(Mixing, change, steps=4)


@pytest.mark.parametrize("number", (float, int, np.float64, np.float32, np.int64, np.bool_))
def test_it_is_tried_anew_with_another_number(number):
    class Mixing(nn.Module):
        share = None

        def forward(self, x):
            return x - x.mean(0, keepdim=True) if self.share else x

    def change(model, i):
        model[0].share = number(i > 1)

    with pytest.warns(UserWarning, match="two passes.*share a batch"):
        followed(lambda: nn.Sequential(Mixing(), *small_critic()), change, steps=4)


def test_counters_of_a_class_are_no_settings():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return x

    step = followed(lambda: nn.Sequential(Counting(), *small_critic()), lambda model, i: None, steps=10)
    assert step.one_pass


def test_it_is_tried_anew_where_a_layer_is_stock_from_then_on():
    with pytest.warns(UserWarning, match="two passes.*unfused in norm"):
        followed(_FadingIn, lambda model, i: vars(model.conv).update(padding_mode="reflect") if i else None, steps=3)


def test_it_is_not_tried_for_ever():
    with pytest.warns(UserWarning, match="two passes: its layers or settings change at every step"):
        followed(_Mixing, lambda model, i: setattr(model, "number", i), steps=10)


def test_forwards_that_are_not_followed_any_more():
    with pytest.warns(RuntimeWarning, match="most other new calls run stock"):
        step = followed(_FadingIn, lambda model, i: setattr(model, "alpha", (i / 100,)), steps=MOST_PLANS + 3)
    assert step.one_pass


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing(reentrant):
    """A BatchNorm that runs again in backward has its running statistics in another order than in two passes."""
    with pytest.warns(UserWarning, match="two passes: it leaves another features.1.running_mean"):
        followed(lambda: _Checkpointing(reentrant), lambda model, i: None, steps=2)

    def untracked():
        model = _Checkpointing(reentrant)
        model.features[1] = nn.BatchNorm2d(4, track_running_stats=False)
        return model

    assert followed(untracked, lambda model, i: None, steps=2).one_pass


def test_images_of_another_shape_are_two_passes():
    """As stock takes them, or refuses to."""

    def make():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(3), *logits_of(36))

    step = followed(make, lambda model, i: None, steps=1)
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
