"""TrainStep against the algorithm written out by hand, and what it promises about the networks it is given."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastgan.training import TrainStep
from fastgan.training import step as training_step
from tests.training.small_gan import BATCH, NZ, make_networks, real_batches


class ExampleStep:
    """The step of the PyTorch DCGAN example: labels, sigmoid and BCELoss, a backward pass for each half of D's loss."""

    def __init__(self, generator, discriminator, lr, betas):
        self.generator, self.discriminator = generator, discriminator
        self.optimizer_g = torch.optim.Adam(generator.parameters(), lr=lr, betas=betas, foreach=False)
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=lr, betas=betas, foreach=False)

    def __call__(self, real):
        criterion = nn.BCELoss()
        self.discriminator.zero_grad()
        output_real = self.discriminator(real).sigmoid()
        loss_real = criterion(output_real, torch.full_like(output_real, 1))
        loss_real.backward()
        fake = self.generator(torch.randn(len(real), NZ, dtype=real.dtype))
        output_fake = self.discriminator(fake.detach()).sigmoid()
        loss_fake = criterion(output_fake, torch.full_like(output_fake, 0))
        loss_fake.backward()
        self.optimizer_d.step()
        self.gradients_d = [parameter.grad.clone() for parameter in self.discriminator.parameters()]

        self.generator.zero_grad()
        output = self.discriminator(fake).sigmoid()
        loss_g = criterion(output, torch.full_like(output, 1))
        loss_g.backward()
        self.optimizer_g.step()
        return {
            "loss_d": loss_real + loss_fake,
            "loss_g": loss_g,
            "d_real": output_real.mean(),
            "d_fake": output_fake.mean(),
        }


@pytest.mark.parametrize("fused", [False, True])
def test_several_steps_equal_the_example_in_float64(fused):
    ours, example = make_networks(), make_networks()
    # A larger lr than DCGAN's, so that errors grow to be seen.
    step = TrainStep(*ours, latent_dim=NZ, lr=5e-3, betas=(0.6, 0.99), fused=fused)
    expected_step = ExampleStep(*example, lr=5e-3, betas=(0.6, 0.99))
    batches = real_batches(6)
    torch.manual_seed(2)
    losses = [step(real) for real in batches]
    torch.manual_seed(2)
    expected = [expected_step(real) for real in batches]

    for got, want in zip(losses, expected, strict=True):
        assert set(got) == set(want)
        for name in want:
            assert got[name].dim() == 0 and not got[name].requires_grad
            torch.testing.assert_close(got[name], want[name].detach(), rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(ours, example, strict=True):
        # Every parameter, running mean and variance, and the count of batches.
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close([p.grad for p in ours[0].parameters()], [p.grad for p in example[0].parameters()])
    torch.testing.assert_close([p.grad for p in ours[1].parameters()], expected_step.gradients_d)


def test_fused_and_stock_losses_agree_over_fifty_float32_steps():
    histories = []
    for fused in (False, True):
        step = TrainStep(*make_networks(dtype=torch.float32, image_size=28), latent_dim=NZ, fused=fused)
        torch.manual_seed(3)
        batches = real_batches(50, dtype=torch.float32, image_size=28)
        histories.append(torch.stack([torch.stack(list(step(real).values())) for real in batches]))
    torch.testing.assert_close(histories[0], histories[1], rtol=0, atol=1e-4)


def test_fused_uses_fuse_and_keeps_the_callers_modules(monkeypatch):
    fused = []
    original = training_step.fuse
    monkeypatch.setattr(training_step, "fuse", lambda model: fused.append(model) or original(model))
    generator, discriminator = make_networks()
    parameters = list(generator.parameters())
    step = TrainStep(generator, discriminator, latent_dim=NZ, fused=True)
    assert fused == [generator, discriminator]
    assert step.generator is generator and step.discriminator is discriminator
    assert all(a is b for a, b in zip(parameters, generator.parameters(), strict=True))
    fused.clear()
    TrainStep(*make_networks(), latent_dim=NZ, fused=False)
    assert fused == []


@pytest.mark.parametrize("fused", [False, True])
def test_the_generator_update_computes_no_weight_gradients_of_the_discriminator(fused):
    generator, discriminator = make_networks()
    frozen = next(discriminator.parameters()).requires_grad_(False)
    step = TrainStep(generator, discriminator, latent_dim=NZ, fused=fused)
    calls = []
    for parameter in discriminator.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: calls.append(1))
    step(real_batches(1)[0])
    learning = sum(parameter.requires_grad for parameter in discriminator.parameters())
    passes = 1 if step.one_pass else 2  # of the discriminator's own update
    assert len(calls) == passes * learning and learning == len(list(discriminator.parameters())) - 1
    assert not frozen.requires_grad and frozen.grad is None


def test_networks_of_strangers():
    """A latent that is not flat, logits in another shape, networks without BatchNorm, one image."""
    generator = nn.Sequential(nn.ConvTranspose2d(5, 1, 8), nn.Tanh())
    discriminator = nn.Sequential(nn.Conv2d(1, 1, 8))  # logits (N, 1, 1, 1)
    before = copy.deepcopy(generator.state_dict())
    losses = TrainStep(generator, discriminator, latent_dim=(5, 1, 1), fused=False)(torch.zeros(1, 1, 8, 8))
    assert all(value.isfinite() for value in losses.values())
    assert not torch.equal(before["0.weight"], generator.state_dict()["0.weight"])


class _Moved(nn.Module):
    """Between the layers before and after it, all that passes is moved by a parameter of many positions."""

    def __init__(self, layers, by, *after):
        super().__init__()
        self.layers, self.by, self.after = layers, by, nn.Sequential(*after)

    def forward(self, x):
        return self.after(self.layers(x) + self.by)


def _trained_beside_the_example(make, fused, steps=3):
    """(gradients of both networks) of our steps and of the example's, for the networks that `make` gives."""
    ours, example = make(), make()
    step = TrainStep(*ours, latent_dim=NZ, lr=5e-3, betas=(0.6, 0.99), fused=fused)
    expected_step = ExampleStep(*example, lr=5e-3, betas=(0.6, 0.99))
    for each in (step, expected_step):
        torch.manual_seed(2)
        for real in real_batches(steps):
            each(real)
    grads = [parameter.grad for parameter in ours[0].parameters()]
    return (grads, *map(nn.Module.state_dict, ours)), (
        [parameter.grad for parameter in example[0].parameters()],
        *map(nn.Module.state_dict, example),
    )


@pytest.mark.parametrize("fused", (False, True))
def test_networks_that_share_a_parameter(fused):
    """Its gradient in the generator's update is of all ways that lead to it, and not of the discriminator's update."""

    def make():
        generator, discriminator = make_networks()
        shared = nn.Parameter(torch.linspace(-0.3, 0.4, 2 * 16 * 16, dtype=torch.float64).view(2, 16, 16))
        return _Moved(generator, shared), _Moved(nn.Identity(), shared, discriminator)

    torch.testing.assert_close(*_trained_beside_the_example(make, fused), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("fused", (False, True))
def test_checkpointing_in_the_discriminator(fused, reentrant):
    """What backward runs again finds its parameters as frozen as forward did."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((2, 1, 1), 0.5, dtype=torch.float64))

        def forward(self, x):
            return checkpoint(lambda x: torch.tanh(x * self.scale), x, use_reentrant=reentrant)

    def make():
        generator, discriminator = make_networks()
        return generator, nn.Sequential(nn.Conv2d(2, 2, 1).double(), Scaled(), discriminator)

    torch.testing.assert_close(*_trained_beside_the_example(make, fused), rtol=1e-7, atol=1e-9)


def test_complex_parameters():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 16, 16), 0.5 + 0.2j, dtype=torch.complex128))

        def forward(self, x):
            return torch.fft.ifft2(torch.fft.fft2(x) * self.weight).real

    def make():
        generator, discriminator = make_networks()
        return nn.Sequential(generator, Fourier()), nn.Sequential(Fourier(), discriminator)

    torch.testing.assert_close(*_trained_beside_the_example(make, fused=True), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_logits_of_one_image_without_dimensions(fused):
    class Squeezed(nn.Sequential):
        def forward(self, x):
            return super().forward(x).squeeze()

    found = []
    for discriminator_type in (nn.Sequential, Squeezed):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.ConvTranspose2d(NZ, 3, 4), nn.Tanh())
        discriminator = discriminator_type(nn.Conv2d(3, 4, 4), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4, 1))
        step = TrainStep(generator, discriminator, latent_dim=(NZ, 1, 1), fused=fused, one_pass=False)
        torch.manual_seed(1)
        found.append([step(torch.rand(images, 3, 4, 4)) for images in (2, 1, 1)])
    torch.testing.assert_close(*found)


def test_bf16_keeps_parameters_and_losses_in_float32():
    generator, discriminator = make_networks(dtype=torch.float32)
    step = TrainStep(generator, discriminator, latent_dim=NZ, precision="bf16", fused=False)
    seen = []
    discriminator.register_forward_hook(lambda module, inputs, logits: seen.append(logits.dtype))
    losses = step(real_batches(1, dtype=torch.float32)[0])
    assert seen == [torch.bfloat16] * 3
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in generator.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("one_pass", [True, False])
def test_images_of_another_floating_dtype_train_as_those_of_the_networks(one_pass, precision, dtype):
    images, found = real_batches(1, dtype=torch.bfloat16)[0], []
    for real in (images.float(), images.double(), images):
        torch.manual_seed(2)
        options = dict(latent_dim=NZ, precision=precision, one_pass=one_pass)
        found.append(TrainStep(*make_networks(dtype=dtype), **options)(real))
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=0, atol=0)


def test_fp16_scales_the_losses_and_not_the_updates(monkeypatch):
    # The CPU computes in float16 too, only too slowly to be offered.
    monkeypatch.setattr("fastgan.training.step.check_precision", lambda precision, device: None)
    averages = {}
    for precision in ("fp32", "fp16"):
        step = TrainStep(*make_networks(dtype=torch.float32), latent_dim=NZ, precision=precision, fused=False)
        if precision == "fp16":
            step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # the first scale may overflow: a lost step
        weight, seen = step.discriminator.main[0].weight, []
        weight.register_hook(lambda gradient, seen=seen: seen.append(gradient.clone()))
        torch.manual_seed(6)
        step(real_batches(1, dtype=torch.float32)[0])
        # exp_avg is half of the first gradient.
        scale = sum(seen).norm() / step.optimizer_d.state[weight]["exp_avg"].norm() / 2
        assert scale.item() == pytest.approx({"fp32": 1.0, "fp16": 1024.0}[precision], rel=1e-3)
        averages[precision] = [
            state["exp_avg"].flatten()
            for optimizer in (step.optimizer_d, step.optimizer_g)
            for state in optimizer.state.values()
        ]
    for half, full in zip(averages["fp16"], averages["fp32"], strict=True):
        assert (half - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_networks_give_the_same_losses(fused, monkeypatch):
    compile = torch.compile
    # Whole graphs, forward and backward, without the minute that inductor takes for C++.
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile(model, backend="aot_eager", **how))
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        step = TrainStep(*make_networks(dtype=torch.float32), latent_dim=NZ, fused=fused, compile=compiled)
        torch.manual_seed(4)
        results.append([list(step(real).values()) for real in real_batches(3, dtype=torch.float32)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_state_dict_goes_on_exactly(fused):
    batches = real_batches(4, dtype=torch.float32)

    def make(seed):
        return TrainStep(*make_networks(seed, torch.float32), latent_dim=NZ, fused=fused)

    torch.manual_seed(5)
    first = make(0)
    for real in batches[:2]:
        first(real)
    state, rng = copy.deepcopy(first.state_dict()), torch.get_rng_state()
    expected = [first(real) for real in batches[2:]]

    second = make(9)
    second.load_state_dict(state)
    torch.set_rng_state(rng)
    assert [second(real) for real in batches[2:]] == expected
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_state_in_another_memory_layout_goes_on_exactly():
    """Fused Adam takes the moments as they lie in memory, on a CPU without a look at the parameter's strides."""
    (first, second), batches = (TrainStep(*make_networks(), latent_dim=NZ) for _ in range(2)), real_batches(2)
    first(batches[0])
    state = copy.deepcopy(first.state_dict())
    for optimizer in ("optimizer_g", "optimizer_d"):
        for moments in state[optimizer]["state"].values():
            moments.update({name: value.contiguous() for name, value in moments.items()})
    second.load_state_dict(state)
    losses = []
    for step in (first, second):
        torch.manual_seed(5)
        losses.append([step(batches[1]) for _ in range(2)])
    assert losses[0] == losses[1]


def test_state_of_another_device_takes_this_devices_adam():
    step = TrainStep(*make_networks(), latent_dim=NZ, fused=False)
    step(real_batches(1)[0])
    state = copy.deepcopy(step.state_dict())
    for group in state["optimizer_g"]["param_groups"]:
        group["capturable"], group["fused"], group["foreach"] = True, False, True
    step.load_state_dict(state)
    assert not step.optimizer_g.param_groups[0]["capturable"]
    step(real_batches(1)[0])


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_of_somebodys_adam(fused):
    """Given to an optimizer itself: its averages lie in the default layout, and it says how its own device computes."""
    networks = make_networks()
    adam = torch.optim.Adam(networks[1].parameters(), 2e-4, (0.5, 0.999), fused=True)
    for seed in range(2):
        adam.zero_grad()
        torch.manual_seed(seed)
        networks[1](torch.randn(BATCH, 2, 16, 16, dtype=torch.float64)).sum().backward()
        adam.step()
    state, gradients = copy.deepcopy(adam.state_dict()), [param.grad for param in networks[1].parameters()]
    state["param_groups"][0]["fused"] = False
    step = TrainStep(*make_networks(), latent_dim=NZ, fused=fused)
    step.discriminator.load_state_dict(networks[1].state_dict())
    step.optimizer_d.load_state_dict(state)
    for param, grad in zip(step.discriminator.parameters(), gradients, strict=True):
        param.grad = torch.empty_like(param).copy_(grad)
    for optimizer in (adam, step.optimizer_d):
        optimizer.step()
    assert step.optimizer_d.param_groups[0]["fused"] is True
    torch.testing.assert_close(step.discriminator.state_dict(), networks[1].state_dict(), rtol=1e-12, atol=1e-14)


def test_going_back_twice():
    """What was given to go on from stays as it is, and so do optimizers and networks where a state does not fit."""
    step, batches = TrainStep(*make_networks(), latent_dim=NZ), real_batches(3)
    step(batches[0])
    state, losses = copy.deepcopy(step.state_dict()), []
    for _ in range(2):
        step.load_state_dict(state)
        torch.manual_seed(5)
        losses.append([step(images) for images in batches[1:]])
    assert losses[0] == losses[1]
    before = copy.deepcopy(step.state_dict())
    other = copy.deepcopy(state)
    other["optimizer_d"]["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="group"):
        step.load_state_dict(other)
    torch.testing.assert_close(step.state_dict(), before, rtol=0, atol=0)


def test_weights_that_are_replaced_by_others_of_another_layout():
    found = []
    for layout in (torch.channels_last, torch.contiguous_format):
        step, batches = TrainStep(*make_networks(), latent_dim=NZ), real_batches(2)
        torch.manual_seed(5)
        step(batches[0])
        for param in step.discriminator.parameters():
            if param.dim() == 4:
                param.data = param.data.mul(1.5).contiguous(memory_format=layout)
        found.append([step(batches[1]), step.discriminator.state_dict()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("fused", [False, True])
def test_autocast_of_somebody_else(fused, precision):
    """It would cast within backward, and keep what it has cast; `precision` says what to compute in."""
    weights = []
    for around in (nullcontext(), torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        generator, discriminator = make_networks(dtype=torch.float32)
        discriminator = nn.Sequential(discriminator, nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1))  # that is never fused
        step = TrainStep(generator, discriminator, latent_dim=NZ, lr=0.01, fused=fused, precision=precision)
        torch.manual_seed(5)
        with around:
            for images in real_batches(4, dtype=torch.float32):
                step(images)
        weights.append([step.generator.state_dict(), step.discriminator.state_dict()])
    for others in weights[1:]:
        torch.testing.assert_close(others, weights[0], rtol=0, atol=0)


def test_betas_may_be_whole_numbers():
    step = TrainStep(*make_networks(), latent_dim=NZ, betas=(0, 0.9))
    step(real_batches(1)[0])
    assert step.optimizer_d.param_groups[0]["betas"] == (0.0, 0.9)


def test_state_of_other_networks_is_refused():
    step = TrainStep(*make_networks(), latent_dim=NZ, fused=False)
    with pytest.raises(ValueError, match="no state of a TrainStep"):
        step.load_state_dict({})
    other = TrainStep(*make_networks(image_size=8), latent_dim=NZ, fused=False).state_dict()
    with pytest.raises(ValueError, match="do not fit the Generator"):
        step.load_state_dict(other)
    # Nor is half of it taken.
    before = copy.deepcopy(step.generator.state_dict())
    mixed = TrainStep(*make_networks(seed=1), latent_dim=NZ, fused=False).state_dict() | {
        "discriminator": other["discriminator"]
    }
    with pytest.raises(ValueError, match="do not fit the Discriminator"):
        step.load_state_dict(mixed)
    torch.testing.assert_close(step.generator.state_dict(), before, rtol=0, atol=0)


class _OneBatch:
    def __init__(self, images):
        self.images = images

    def draw(self):
        return self.images


def test_a_source_gives_the_images_that_are_not_given():
    (real,) = real_batches(1)
    losses = []
    for arguments, source in (((real,), None), ((), _OneBatch(real))):
        step = TrainStep(*make_networks(), latent_dim=NZ, source=source)
        torch.manual_seed(3)
        losses.append(step(*arguments))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    with pytest.raises(ValueError, match="no source"):
        TrainStep(*make_networks(), latent_dim=NZ)()


def test_learning_rates_can_change():
    step = TrainStep(*make_networks(), latent_dim=NZ, lr=1e-3)
    step(real_batches(1)[0])
    step.lr = 0.0625
    assert step.lr == 0.0625 and step.optimizer_d.param_groups[0]["lr"] == 0.0625
    weight = next(step.generator.parameters())
    before = weight.detach().clone()
    step(real_batches(1)[0])
    assert (weight - before).abs().max() > 0.03
    with pytest.raises(ValueError, match="lr must be"):
        step.lr = -1.0


def test_a_cuda_graph_is_no_matter_without_cuda():
    losses = []
    for cuda_graph in (False, True):
        step = TrainStep(*make_networks(), latent_dim=NZ, cuda_graph=cuda_graph)
        torch.manual_seed(3)
        losses.append([step(real) for real in real_batches(5)])
        step.forget_graph()
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_an_optimizer_outlives_its_step():
    optimizer = TrainStep(*make_networks(), latent_dim=NZ).optimizer_g
    gc.collect()
    optimizer.load_state_dict(optimizer.state_dict())
