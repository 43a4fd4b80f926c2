import pytest
import torch
from torch import nn

from fastgan.models import IMAGE_SIZES, Discriminator, Generator


def example_generator():
    """netG of the PyTorch example DCGAN (64×64, nz 100, ngf 64)."""
    main = nn.Sequential(
        nn.ConvTranspose2d(100, 512, 4, 1, 0, bias=False),
        nn.BatchNorm2d(512),
        nn.ReLU(True),
        nn.ConvTranspose2d(512, 256, 4, 2, 1, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(True),
        nn.ConvTranspose2d(256, 128, 4, 2, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(True),
        nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(True),
        nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )
    return as_main(main)


def example_discriminator():
    """netD of the PyTorch example DCGAN (64×64, ndf 64), which ends in a sigmoid."""
    main = nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(64, 128, 4, 2, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(128, 256, 4, 2, 1, bias=False),
        nn.BatchNorm2d(256),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(256, 512, 4, 2, 1, bias=False),
        nn.BatchNorm2d(512),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(512, 1, 4, 1, 0, bias=False),
        nn.Sigmoid(),
    )
    return as_main(main)


def as_main(layers):
    """The example keeps its layers in an attribute called ``main``."""
    network = nn.Sequential()
    network.add_module("main", layers)
    return network


PAIRS = pytest.mark.parametrize(
    ("ours", "example"), [(Generator, example_generator), (Discriminator, example_discriminator)]
)


@pytest.mark.parametrize(("network", "parameters"), [(Generator, 3_576_704), (Discriminator, 2_765_568)])
def test_parameter_counts_are_the_examples(network, parameters):
    assert sum(parameter.numel() for parameter in network().parameters()) == parameters


@PAIRS
def test_state_dict_has_the_examples_names_and_shapes(ours, example):
    def shapes(network):
        return [(name, tuple(value.shape), value.dtype) for name, value in network.state_dict().items()]

    assert shapes(ours()) == shapes(example())


@PAIRS
def test_checkpoints_load_both_ways(ours, example):
    ours, example = ours(), example()
    for source, target in ((example, ours), (ours, example)):
        for buffer in source.buffers():
            buffer.add_(1)  # so that running statistics are seen to travel too
        target.load_state_dict(source.state_dict())
        loaded = target.state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in source.state_dict().items())


def test_generator_computes_what_the_example_computes():
    ours, example = Generator().eval(), example_generator().eval()
    ours.load_state_dict(example.state_dict())
    latent = torch.randn(2, 100, 1, 1)
    with torch.no_grad():
        assert torch.equal(ours(latent), example(latent))
        assert torch.equal(ours(latent.flatten(1)), example(latent))


def test_discriminator_gives_the_logits_of_the_examples_probabilities():
    ours, example = Discriminator().eval(), example_discriminator().eval()
    ours.load_state_dict(example.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).sigmoid(), example(images).flatten())


def test_image_sizes():
    assert IMAGE_SIZES == (8, 14, 16, 28, 32, 56, 64, 112, 128, 224, 256)


@pytest.mark.parametrize("nc", [1, 3])
@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_every_size(image_size, nc):
    generator = Generator(image_size=image_size, nc=nc, nz=5, ngf=1)
    discriminator = Discriminator(image_size=image_size, nc=nc, ndf=1)
    images = generator(torch.randn(2, 5))
    assert images.shape == (2, nc, image_size, image_size)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2,)


def test_networks_train():
    generator, discriminator = Generator(image_size=8, nz=5, ngf=2), Discriminator(image_size=8, ndf=2)
    discriminator(generator(torch.randn(4, 5))).sum().backward()
    for parameter in [*generator.parameters(), *discriminator.parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all()


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_initial_weights(network):
    torch.manual_seed(0)
    convolutions, norms = [], []
    for module in network().modules():
        if isinstance(module, nn.BatchNorm2d):
            norms.append(module.weight.detach())
            assert not module.bias.any()
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            convolutions.append(module.weight.detach())
            # each layer for itself: one left at PyTorch's default would hide in the sum
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
    convolutions = torch.cat([weight.flatten() for weight in convolutions])
    norms = torch.cat(norms)
    assert convolutions.mean().item() == pytest.approx(0, abs=1e-4)
    assert convolutions.std().item() == pytest.approx(0.02, rel=0.01)
    assert norms.mean().item() == pytest.approx(1, abs=0.004)
    assert norms.std().item() == pytest.approx(0.02, rel=0.15)


def test_equal_seeds_give_equal_networks():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([weight.flatten() for weight in Generator(image_size=8, ngf=2).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("network", [Generator, Discriminator])
@pytest.mark.parametrize("image_size", [0, 4, 7, 65, 512, None, "64"])
def test_bad_image_size_is_named_with_the_sizes_allowed(network, image_size):
    with pytest.raises(ValueError, match=rf"image_size must be one of 8, 14, .*, 256; got {image_size!r}"):
        network(image_size=image_size)


@pytest.mark.parametrize(
    ("network", "argument"), [(Generator, "nc"), (Generator, "nz"), (Generator, "ngf"), (Discriminator, "ndf")]
)
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_bad_counts_are_named(network, argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be a positive integer; got {value}"):
        network(**{argument: value})


@pytest.mark.parametrize("shape", [(2, 99), (2, 100, 2, 1), (100,), (2, 100, 1), (2, 4, 5, 5)])
def test_generator_refuses_other_latents(shape):
    with pytest.raises(ValueError, match=r"latent must be \(N, 100\) or \(N, 100, 1, 1\); got \("):
        Generator(image_size=8, ngf=1)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 8, 16), (3, 8, 8)])
def test_discriminator_refuses_other_images(shape):
    with pytest.raises(ValueError, match=r"images must be \(N, 3, 8, 8\); got \("):
        Discriminator(image_size=8, ndf=1)(torch.zeros(shape))
