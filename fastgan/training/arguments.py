"""What a TrainStep is given: one message for what it cannot take, before any work starts."""

import torch
from torch import nn

from fastgan.checks import is_integer, is_number


def check_networks(generator, discriminator):
    """Raise TypeError or ValueError unless they are two modules with parameters, on one device."""
    if generator is discriminator:
        raise ValueError("generator and discriminator must be two networks; got one module for both")
    devices = []
    for name, network in (("generator", generator), ("discriminator", discriminator)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} must be an nn.Module; got {type(network).__name__}")
        parameter = next(network.parameters(), None)
        if parameter is None:
            raise ValueError(f"{name} must have parameters to learn; got a {type(network).__name__} without any")
        devices.append(parameter.device)
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: its parameters have no values")
    if devices[0] != devices[1]:
        raise ValueError(f"generator and discriminator must be on one device; got {devices[0]} and {devices[1]}")


def check_learning(**networks):
    """Raise unless gradients can be had, for some parameters of each of the networks."""
    if not torch.is_grad_enabled():
        raise RuntimeError("a training step needs gradients, which torch.no_grad or torch.inference_mode turned off")
    for name, network in networks.items():
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError(f"{name} must have parameters that learn; all of it has requires_grad=False")


def check_flags(**flags):
    """Raise TypeError for what is neither True nor False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}")


def check_source(source):
    """Raise TypeError unless it is None or has a `draw`."""
    if source is not None and not callable(getattr(source, "draw", None)):
        raise TypeError(f"source must have a method draw() that returns images; got {type(source).__name__}")


def check_images(images, name):
    """Raise TypeError or ValueError unless they are a floating-point tensor; `name` says whose they are."""
    if not isinstance(images, torch.Tensor):
        pairs = isinstance(images, list | tuple) and "generator" not in name
        hint = ": a data set that gives (images, labels)? Pass the images" if pairs else ""
        raise TypeError(f"{name} must be a tensor; got {type(images).__name__}{hint}")
    if not images.is_floating_point():
        raise ValueError(f"{name} must be floating point, in [-1, 1]; got {images.dtype}")
    if images.dim() == 0 or len(images) == 0:
        raise ValueError(f"{name} must hold at least one image; got shape {tuple(images.shape)}")


def checked_betas(betas):
    """As floats: torch takes (0.0, 0.9), but not (0, 0.9)."""
    pair = isinstance(betas, list | tuple) and len(betas) == 2
    if not pair or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1); got {betas!r}")
    return tuple(map(float, betas))


def latent_shape(latent_dim):
    """The shape of one latent."""
    shape = tuple(latent_dim) if isinstance(latent_dim, list | tuple) else (latent_dim,)
    if not shape or not all(is_integer(size) and size > 0 for size in shape):
        raise ValueError(f"latent_dim must be a positive integer or a shape of such; got {latent_dim!r}")
    return shape
