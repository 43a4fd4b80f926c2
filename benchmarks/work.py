"""How much work a DCGAN step is at the least: arithmetic and memory traffic, counted from the networks themselves.

Only convolutions count. Their backward kernels read the gradient of the layer's result and, where an activation or a
BatchNorm stands between, the convolution's own result too, to rebuild the gradient that they need. Arithmetic is that
of dense products: those with the zeros of a padding are in it (an eighth of a step of 64×64 images). Weights are left
out, except that Adam reads four and writes three float32 numbers for each, once a step.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

ADAM_BYTES = 7 * 4  # reads weight, gradient and both moments; writes weight and both moments


@dataclass(frozen=True)
class Layer:
    """One convolution with what follows it, per image: ``flops`` of any one of its three products, and the numbers
    in its input, in its result, and whether its result goes through BatchNorm or an activation."""

    conv: nn.Module
    flops: int
    inputs: int
    outputs: int
    activated: bool

    @property
    def forward(self):
        """(flops, numbers moved) of the forward pass."""
        return self.flops, self.inputs + self.outputs

    @property
    def input_gradient(self):
        """(flops, numbers moved); the weight gradient has the same."""
        return self.flops, self.inputs + (2 if self.activated else 1) * self.outputs

    weight_gradient = input_gradient


def layers(network, *inputs):
    """The Layers of a network whose convolutions are called one after the other, run once on the meta device."""
    found, seen = [], []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            seen.append(module.register_forward_hook(lambda m, x, y: found.append(_layer(m, x[0], y))))
        elif not list(module.children()):
            seen.append(module.register_forward_hook(lambda *_: _mark_activated(found)))
    with torch.no_grad():
        network(*inputs)
    for hook in seen:
        hook.remove()
    return found


def _layer(conv, x, y):
    grid = x if isinstance(conv, nn.ConvTranspose2d) else y
    flops = 2 * conv.weight.numel() * grid.shape[2:].numel()
    return Layer(conv, flops, x.shape[1:].numel(), y.shape[1:].numel(), activated=False)


def _mark_activated(found):
    if found:
        found[-1] = replace(found[-1], activated=True)


def step_work(generator, discriminator, latent, images, *, bytes_per_number):
    """The least work of one G + D update: D on real and fake images, and D without weight gradients in G's update.

    Args:
        generator, discriminator: the networks (copies on the meta device will do).
        latent, images: their inputs, of any batch size.
        bytes_per_number: 2 for bfloat16 activations, 4 for float32.

    Returns:
        {"flops_per_image", "bytes_per_image", "bytes_per_step"}; the last is Adam's.
    """
    g, d = layers(generator, latent), layers(discriminator, images)
    parts = []
    for layer in d:
        parts += [layer.forward] * 3 + [layer.weight_gradient] * 2 + [layer.input_gradient] * 3
    for layer in g:
        parts += [layer.forward, layer.weight_gradient, layer.input_gradient]
    # No one asks for the gradient of the images in D's update, nor for that of the latents.
    spared = [d[0].input_gradient] * 2 + [g[0].input_gradient]
    flops, numbers = (sum(p[i] for p in parts) - sum(p[i] for p in spared) for i in (0, 1))
    parameters = sum(p.numel() for network in (generator, discriminator) for p in network.parameters())
    return {
        "flops_per_image": flops,
        "bytes_per_image": numbers * bytes_per_number,
        "bytes_per_step": parameters * ADAM_BYTES,
    }
