"""Recognising convolution → BatchNorm → activation in modules that are called one after the other.

`match` cuts a sequence of modules into groups: a group that starts with a convolution holds what the fused operator
computes in one go; anything else is a group of its own. Nothing is decided from names or positions alone: every
property that would change the numbers is looked at, and what does not fit stays stock, with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastgan.fusing.layer_code import hooks_compute_weight, hooks_of, is_called_otherwise, is_customized, type_of
from fastgan.ops.choice import what_follows
from fastgan.ops.geometry import padding_in_numbers

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
_WRITING = {nn.ReLU: torch.relu_, nn.Tanh: torch.tanh_, nn.Sigmoid: torch.sigmoid_}
_SEQUENTIAL_FORWARD, _SEQUENTIAL_ITER = nn.Sequential.forward, nn.Sequential.__iter__  # somebody may patch them
# Our backward of convolution + LeakyReLU reads the activated result, stock's the input: it must not be overwritten.
WRITTEN_TO = "what follows LeakyReLU changes its result in place"
_OTHER_NORMS = (nn.modules.instancenorm.__name__, nn.modules.normalization.__name__)
# The layers of PyTorch that may give their input, or a view of it, as their result.
_PASSING_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


@dataclass
class Group:
    """Consecutive modules that run as one fused operator, or one module that stays stock (`reason` says why)."""

    names: list[str]
    modules: list[nn.Module]
    batch_norm: nn.BatchNorm2d | nn.SyncBatchNorm | None = None
    activation: str | None = None
    activation_first: bool = False  # convolution → activation → BatchNorm: another function than the usual order
    fused: bool = False
    reason: str = ""
    forwards: tuple[Callable, ...] = ()  # of a fused group: see `fastgan.fusing.group_calls.run_layers`

    @property
    def pattern(self):
        return " + ".join(_type_name(module) for module in self.modules)

    @property
    def then(self):
        """What the operator does after the convolution in the modules' present mode: "statistics" of the batch, a
        known "epilogue" (bias, eval-mode BatchNorm, activation), or nothing, ""."""
        norm = self.batch_norm
        statistics = norm is not None and (norm.training or norm.running_mean is None)
        return what_follows(statistics, self.modules[0].bias, norm, self.activation)

    @property
    def ends_in_activation(self):
        """Whether it is a convolution and an activation, and nothing else."""
        return self.fused and self.activation is not None and self.batch_norm is None

    @property
    def asks_who_writes(self):
        """Whether it depends on what changes its result in place: see `WRITTEN_TO`."""
        return self.reason == WRITTEN_TO or (self.activation == "leaky_relu" and self.batch_norm is None)

    @property
    def negative_slope(self):
        """Of the activation as it is now; 0 for those that have none."""
        if self.activation != "leaky_relu":
            return 0.0
        return self.modules[1 if self.activation_first else -1].negative_slope

    @property
    def keeps_memory(self):
        """Whether stock gives the convolution's own result: nothing follows, or an activation in place."""
        in_place = self.activation is None or getattr(self.modules[-1], "inplace", False)
        return self.batch_norm is None and in_place

    @property
    def own_forwards(self):
        """`forwards` that write in place only where the layers are told to."""
        return tuple(map(_forward, self.modules))

    def part(self):
        """What the operator is told of it, as it is now."""
        settings = (self.activation, self.negative_slope, self.activation_first)
        return Part(self.modules[0], self.batch_norm, *settings, self.names[0])


class Part(NamedTuple):
    """A fused group in a call: its layers and settings, and the name of its first layer for what is said of it."""

    conv: nn.Module
    batch_norm: nn.Module | None
    activation: str | None
    negative_slope: float
    activation_first: bool
    name: str


def is_sequential(module):
    """Whether its type runs its children one after the other, in their order."""
    kind = type(module)
    return getattr(kind, "forward", None) is _SEQUENTIAL_FORWARD and kind.__iter__ is _SEQUENTIAL_ITER


def passes_through(module):
    """Whether to call it is to call its children one after the other, and nothing else."""
    if not is_sequential(module) or any(hooks_of(module)) or module._compiled_call_impl is not None:
        return False
    own = module.__dict__
    return not (is_replaced(own.get("forward")) or "_call_impl" in own or is_called_otherwise(type(module)))


def is_replaced(forward):
    """Whether a module's own `forward`, if it has one, is anything but ours."""
    return forward is not None and not type(forward).__module__.startswith("fastgan.")


def in_order(sequential):
    """(names, modules, passed) of what a sequential module calls: the children of those passed through in their place.

    passed: all that its call passes through, itself included.
    """
    names, modules, passed = [], [], [sequential]
    for name, child in sequential._modules.items():
        if passes_through(child):
            inner_names, inner, inner_passed = in_order(child)
            names += [f"{name}.{inner_name}" for inner_name in inner_names]
            modules += inner
            passed += inner_passed
        else:
            names.append(name)
            modules.append(child)
    return names, modules, passed


def match(names, modules):
    """Cut the chain `modules[0]`, `modules[1]`, … into Groups, longest patterns first."""
    groups, i = [], 0
    while i < len(modules):
        group = match_first(names[i:], modules[i:])
        groups.append(group)
        i += len(group.modules)
    return groups


def match_first(names, modules):
    """The Group that the chain `modules[0]`, `modules[1]`, … begins with."""
    conv = modules[0]
    alone = Group(names[:1], [conv])
    if not isinstance(conv, nn.modules.conv._ConvNd):
        return alone
    alone.reason = _why_not_conv(conv)
    if alone.reason:
        return alone

    # Even the convolution alone is fused with its bias; what follows it and could not be joined is named.
    group = Group(names[:1], [conv], fused=True)
    for name, module in zip(names[1:], modules[1:], strict=False):
        group.reason = _why_not_joined(group, module)
        if group.reason or not _join(group, name, module):
            break
    if group.activation == "leaky_relu" and group.batch_norm is None and _is_written_to(modules[2:]):
        group.names.pop(), group.modules.pop()
        group.activation, group.reason = None, WRITTEN_TO
    group.forwards = tuple(map(_forward_in_place, group.modules))
    return group


def _why_not_joined(group, module):
    """Why a module that could be part of the pattern is not; "" where it is, and where it is another kind of module."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _why_not_batch_norm(module, group.modules[0]) if group.batch_norm is None else ""
    if type(module).__module__ in _OTHER_NORMS:
        return f"{type(module).__name__} after it stays stock"
    return _why_not_activation(module) if group.activation is None else ""


def _join(group, name, module):
    """Add the module to the group, if it is a part of the pattern that is not there yet."""
    if isinstance(module, _BATCH_NORMS) and group.batch_norm is None:
        group.batch_norm, group.activation_first = module, group.activation is not None
    elif type(module) in ACTIVATIONS and group.activation is None:
        group.activation = ACTIVATIONS[type(module)]
    else:
        return False
    group.names.append(name)
    group.modules.append(module)
    return True


def _is_written_to(followers):
    """Whether the first of the modules that is given the result, or a view of it, changes it in place."""
    for module in followers:
        if module is None:  # nn.Sequential fails there
            return False
        if writes_to_input(module):
            return True
        if not passes_on(module):
            return False
    return False


def writes_to_input(module):
    """Whether a module changes its input in place, as far as the flags and the order of its layers tell."""
    if isinstance(module, nn.Sequential):
        return _is_written_to(module.children())
    parts = list(module.modules())
    if not passes_on(module):  # a block, of which the first layer most likely is given the input
        parts = [next(part for part in parts if not any(part._modules.values()))]
    return any([getattr(part, "inplace", False) for part in parts])


def passes_on(module):
    """Whether a module may give its input, or a view of it, as its result.

    Of somebody's own, one without parameters may: noise or an augmentation that is turned off, say.
    """
    if isinstance(module, nn.Sequential):
        return all(map(passes_on, module.children()))
    if type(module).__module__.startswith("torch.nn."):
        return isinstance(module, _PASSING_ON)
    return next(module.parameters(), None) is None


def _forward(layer):
    """What a layer runs: its forward, or the layer itself where that is told apart later: a BatchNorm, which may be
    called for each part of a batch, and one whose hooks compute the weight."""
    return layer if hooks_compute_weight(layer) or isinstance(layer, _BATCH_NORMS) else layer.forward


def _forward_in_place(layer):
    """The same where an activation may write to its input, because nothing else needs it.

    Not LeakyReLU: in place, backward would need its result, and later code may overwrite that.
    """
    return _forward(layer) if getattr(layer, "inplace", False) else _WRITING.get(type(layer), _forward(layer))


def _type_name(module):
    return type_of(module).__name__


def _why_not_conv(conv):
    if type_of(conv) not in _CONVOLUTIONS:
        return f"no fused operator for {type(conv).__name__}"
    if is_customized(conv) and not hooks_compute_weight(conv):
        return "the convolution has hooks or code of its own"
    if not ("weight" in conv._parameters or parametrize.is_parametrized(conv, "weight") or hooks_compute_weight(conv)):
        return "its weight is no parameter"
    return unfit_setting(conv)


def unfit_setting(conv):
    """The setting of a Conv2d or ConvTranspose2d, as text, with which no operator computes it; "" if there is none."""
    if conv.groups != 1:
        return f"groups={conv.groups}"
    if conv.dilation != (1, 1):
        return f"dilation={conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    # Of the layer's own making they are pairs, but anything if somebody sets them.
    if not _is_pair(conv.stride):
        return f"stride={conv.stride!r}"
    if not _is_pair(padding_of(conv)):
        return f"padding={conv.padding!r}"
    return "" if _is_pair(conv.output_padding) else f"output_padding={conv.output_padding!r}"


def padding_of(conv):
    """Its padding as a pair of numbers, if it is one."""
    padding = conv.padding
    return padding_in_numbers(padding, conv.kernel_size, conv.stride) if isinstance(padding, str) else padding


def _is_pair(value):
    return type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int


def unfit_number(batch_norm, negative_slope):
    """As `unfit_setting`, of the BatchNorm (or None) and the activation that follow a convolution."""
    if not (isinstance(negative_slope, int | float) and negative_slope >= 0):
        return f"negative_slope={negative_slope}"
    if batch_norm is None:
        return ""
    momentum = batch_norm.momentum
    if not (momentum is None or isinstance(momentum, int | float)):
        if not isinstance(momentum, torch.Tensor) or momentum.dim() != 0:
            return f"momentum={momentum!r}"
    return "" if isinstance(batch_norm.eps, int | float) else f"eps={batch_norm.eps!r}"


def _why_not_batch_norm(bn, conv):
    if type(bn) not in _BATCH_NORMS:
        return f"{type(bn).__name__} after it"
    if is_customized(bn):
        return "its BatchNorm has hooks or code of its own"
    if bn.num_features != conv.out_channels:
        return f"its BatchNorm has {bn.num_features} features for {conv.out_channels} channels"
    tensors = [t for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var) if t is not None]
    device = next(conv.parameters()).device  # to look at a parametrized weight would compute it
    if any(t.device != device for t in tensors):
        return "its BatchNorm is on another device"
    if not all(t.is_floating_point() for t in tensors):
        return "its BatchNorm is not floating point"
    return unfit_number(bn, 0.0)


def _why_not_activation(activation):
    """Why the module that follows stays out of the operator; "" where it fits, or is no activation at all."""
    if type(activation) not in ACTIVATIONS:
        is_activation = type(activation).__module__ == nn.ReLU.__module__
        return f"{type(activation).__name__} after it stays stock" if is_activation else ""
    if is_customized(activation):
        return "its activation has hooks or code of its own"
    return unfit_number(None, getattr(activation, "negative_slope", 0.0))
