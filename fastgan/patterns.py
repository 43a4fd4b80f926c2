"""Recognising convolution → BatchNorm → activation in modules that are called one after the other.

`match` cuts a sequence of modules into groups: a group that starts with a convolution holds what the fused operator
computes in one go; anything else is a group of its own. Nothing is decided from names or positions alone: every
property that would change the numbers is looked at, and what does not fit stays stock, with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}


@dataclass
class Group:
    """Consecutive modules that run as one fused operator, or one module that stays stock (`reason` says why)."""

    names: list[str]
    modules: list[nn.Module]
    batch_norm: nn.BatchNorm2d | None = None
    activation: str | None = None
    fused: bool = False
    reason: str = ""
    forwards: tuple[Callable, ...] = ()  # of a fused group: its layers' own, the activation in place

    @property
    def pattern(self):
        return " + ".join(type(module).__name__ for module in self.modules)

    @property
    def then(self):
        """What the operator does after the convolution in the modules' present mode: "statistics" of the batch, a
        known "epilogue" (bias, eval-mode BatchNorm, activation), or nothing, ""."""
        if self.batch_norm is not None and (self.batch_norm.training or self.batch_norm.running_mean is None):
            return "statistics"
        plain = self.modules[0].bias is None and self.batch_norm is None and self.activation is None
        return "" if plain else "epilogue"


def match(names, modules):
    """Cut the chain `modules[0]`, `modules[1]`, … into Groups, longest patterns first."""
    groups, i = [], 0
    while i < len(modules):
        group = _match_at(names, modules, i)
        groups.append(group)
        i += len(group.modules)
    return groups


def _match_at(names, modules, i):
    conv = modules[i]
    alone = Group(names[i : i + 1], [conv])
    if not isinstance(conv, nn.modules.conv._ConvNd):
        return alone
    alone.reason = _why_not_conv(conv)
    if alone.reason:
        return alone

    end, batch_norm, activation, stopped = i + 1, None, None, ""
    if end < len(modules) and isinstance(modules[end], nn.modules.batchnorm._BatchNorm):
        stopped = _why_not_batch_norm(modules[end], conv)
        if not stopped:
            batch_norm, end = modules[end], end + 1
    if not stopped and end < len(modules):
        stopped = _why_not_activation(modules[end])
        if not stopped and type(modules[end]) in _ACTIVATIONS:
            activation, end = modules[end], end + 1
    # Even the convolution alone is fused with its bias; what follows it and could not be joined is named.
    layers = modules[i:end]
    forwards = [layer.forward for layer in layers if layer is not activation]
    return Group(
        names[i:end],
        layers,
        batch_norm=batch_norm,
        activation=_ACTIVATIONS[type(activation)] if activation is not None else None,
        fused=True,
        reason=stopped,
        forwards=(*forwards, _in_place(activation)) if activation is not None else tuple(forwards),
    )


def _in_place(activation):
    """The function of an activation that writes to its input: nothing else needs what comes out of the layer before."""
    if getattr(activation, "inplace", False):
        return activation.forward
    if isinstance(activation, nn.LeakyReLU):
        return lambda x: F.leaky_relu_(x, activation.negative_slope)
    return {nn.ReLU: torch.relu_, nn.Tanh: torch.tanh_, nn.Sigmoid: torch.sigmoid_}[type(activation)]


def hooks_of(module):
    """The dictionaries of hooks that take part in calling the module."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def has_hooks(module):
    """Whether anything but its type's forward takes part in calling the module."""
    return any(hooks_of(module)) or "forward" in module.__dict__  # replaced on the instance


def _why_not_conv(conv):
    if type(conv) not in _CONVOLUTIONS:
        return f"no fused operator for {type(conv).__name__}"  # parametrized ones have a type of their own, too
    if has_hooks(conv):
        return "the convolution has hooks"
    if conv.groups != 1:
        return f"groups={conv.groups}"
    if tuple(conv.dilation) != (1, 1):
        return f"dilation={tuple(conv.dilation)}"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    if isinstance(conv.padding, str):
        return f"padding={conv.padding!r}"
    return ""


def _why_not_batch_norm(bn, conv):
    if type(bn) is not nn.BatchNorm2d:
        return f"{type(bn).__name__} after it"
    if has_hooks(bn):
        return "its BatchNorm has hooks"
    if bn.num_features != conv.out_channels:
        return f"its BatchNorm has {bn.num_features} features for {conv.out_channels} channels"
    tensors = [t for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var) if t is not None]
    if any(t.device != conv.weight.device for t in tensors):
        return "its BatchNorm is on another device"
    if not all(t.is_floating_point() for t in tensors):
        return "its BatchNorm is not floating point"
    return ""


def _why_not_activation(activation):
    """Why the module that follows stays out of the operator; "" where it fits, or is no activation at all."""
    if type(activation) not in _ACTIVATIONS:
        is_activation = type(activation).__module__ == nn.ReLU.__module__
        return f"{type(activation).__name__} after it stays stock" if is_activation else ""
    if has_hooks(activation):
        return "its activation has hooks"
    if getattr(activation, "negative_slope", 0.0) < 0:
        return f"negative_slope={activation.negative_slope}"
    return ""
