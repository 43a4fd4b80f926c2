"""``torch.compile(model, backend="fastgan")``: inductor, with the fused operators in the captured graph.

The graph that torch.compile captures holds functions, not modules, whatever the code looked like. Each convolution in
it that could run on our kernels becomes one call together with the BatchNorm and activation after it; the rest, and the
whole graph where there are no kernels, is inductor's as it is.
"""

import inspect
import re
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional as F

from fastgan.fusing.graph_patterns import (
    activation_of,
    changes_in_place,
    is_written_to,
    may_be_views,
    restore_layout,
    sole_user,
    stays_stock,
)
from fastgan.fusing.patterns import WRITTEN_TO
from fastgan.memory_format import default_layout, suggests_channels_last
from fastgan.ops import fused_layer
from fastgan.ops.choice import what_follows
from fastgan.ops.geometry import padding_in_numbers
from fastgan.ops.layer_spec import LayerSpec

_CONVOLUTIONS = {  # how each is called
    torch.conv2d: inspect.signature(lambda x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None),
    torch.conv_transpose2d: inspect.signature(
        lambda x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1: None
    ),
}
_CONVOLUTIONS |= {F.conv2d: _CONVOLUTIONS[torch.conv2d], F.conv_transpose2d: _CONVOLUTIONS[torch.conv_transpose2d]}
_BATCH_NORM = inspect.signature(
    lambda x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5: None
)
# Modules of the functions by which a graph switches gradients, autocast or transforms on and off.
_SWITCHES = ("torch._C", "torch.amp.autocast_mode", "torch._C._functorch", "torch._functorch.predispatch")


def fastgan(graph_module, example_inputs, *, mode=None, options=None):
    """The backend: replaces what it can in `graph_module` and hands it to inductor.

    Where there are no kernels it replaces nothing.

    Args:
        graph_module: the torch.fx.GraphModule of functions that torch.compile captured; it is changed.
        example_inputs: list of tensors (and sizes, where shapes are dynamic), as torch.compile gives it.
        mode, options: those of torch.compile, for inductor.

    Returns:
        What to call in its place, as inductor compiled it.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    rewrite(graph_module)
    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    return compile_fx(graph_module, example_inputs, config_patches=patches or None)


@dataclass
class CapturedGroup:
    """A convolution in a captured graph: the nodes that run as one operator, or why it stays as it is."""

    nodes: list[fx.Node]
    convolution: dict  # its arguments by name, as the other two
    batch_norm: dict | None = None
    activation: tuple = (None, 0.0)  # its name and negative slope
    activation_first: bool = False
    reason: str = ""
    fused: bool = True

    @property
    def transposed(self):
        return "output_padding" in self.convolution

    @property
    def x(self):
        return self.convolution["x"].meta["example_value"]

    @property
    def weight(self):
        return self.convolution["weight"].meta["example_value"]

    @property
    def result(self):
        """Of the convolution."""
        return self.nodes[0].meta["example_value"]

    @property
    def where(self):
        """(transposed, stride, padding)."""
        return self.transposed, _pair(self.convolution["stride"]), _pair(self.convolution["padding"])

    @property
    def then(self):
        """What the operator does after the convolution: see `fastgan.fusing.patterns.Group.then`."""
        statistics = self.batch_norm is not None and self.batch_norm["training"]
        return what_follows(statistics, self.convolution["bias"], self.batch_norm, self.activation[0])

    @property
    def path(self):
        """Of the module that the convolution was called in."""
        stack = self.nodes[0].meta.get("nn_module_stack")
        names = list(stack.values())[-1][0] if stack else ""
        # Like L['self'].main.0 or L['self']._modules['main']._modules['0'], by version.
        return re.sub(r"^L\['\w+'\]\.?", "", re.sub(r"\._modules\['([^']*)'\]", r".\1", names)).lstrip(".")

    @property
    def pattern(self):
        return " + ".join(getattr(node.target, "__name__", str(node.target)).rstrip("_") for node in self.nodes)


def find(graph):
    """[CapturedGroup] of all convolutions of a captured graph, in its order."""
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.target in _CONVOLUTIONS]
    return [_find(node) for node in nodes]


def rewrite(graph_module):
    """Replace every convolution that has kernels, with what follows it, by a call of the operator; in place."""
    graph = graph_module.graph
    calls = [_replace(graph, match) for match in find(graph) if match.fused]
    for call in calls:
        if not suggests_channels_last(call.meta["example_value"]):  # which is stock's result
            restore_layout(call, calls, default_layout)
    if calls:
        graph.lint()
        graph_module.recompile()


def _find(conv):
    match = CapturedGroup([conv], _convolution_arguments(conv))
    match.reason = _why_not_conv(match.convolution)
    if match.reason:
        match.fused = False
        return match
    while len(match.nodes) < 3:
        user, why = sole_user(match.nodes[-1])
        if user is None or not _join(match, user):
            if match.activation[0] is None:
                match.reason = match.reason or why or stays_stock(user)
            break
    if match.activation[0] == "leaky_relu" and match.batch_norm is None and is_written_to(match.nodes[-1]):
        match.nodes.pop()
        match.activation, match.reason = (None, 0.0), WRITTEN_TO
    return match


def _arguments(signature, node):
    bound = signature.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _convolution_arguments(node):
    """The same of a convolution's call, with a padding in words in numbers, where there are such."""
    arguments = _arguments(_CONVOLUTIONS[node.target], node)
    if isinstance(arguments["padding"], str):
        kernel = arguments["weight"].meta["example_value"].shape[2:]
        arguments["padding"] = padding_in_numbers(arguments["padding"], kernel, _pair(arguments["stride"]))
    return arguments


def _why_not_conv(arguments):
    x = arguments["x"].meta.get("example_value")
    if not isinstance(x, torch.Tensor) or x.dim() != 4:
        return "its input is not one of 4 dimensions"
    if arguments["groups"] != 1:
        return f"groups={arguments['groups']}"
    if any(d != 1 for d in _pair(arguments["dilation"])):
        return f"dilation={arguments['dilation']}"
    if isinstance(arguments["padding"], str):
        return f"padding={arguments['padding']!r}"
    if not fused_layer.has_kernels_for(x):
        return f"no kernels for {x.dtype} on {x.device.type!r}"
    return ""


def _pair(value):
    """An int, or one or two of them in a sequence, as a pair."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values if len(values) == 2 else values * 2


def _join(match, node):
    """Take `node` into the match, if it continues the pattern and may run in the same place; else say why not."""
    activation = activation_of(node)
    if node.op == "call_function" and node.target is F.batch_norm and match.batch_norm is None:
        batch_norm = _arguments(_BATCH_NORM, node)
        match.reason = _why_not_together(match.nodes, node, batch_norm)
        for name in ("momentum", "eps"):
            if not isinstance(batch_norm[name], int | float):
                match.reason = f"the {name} of its BatchNorm is no number"
        if not match.reason:
            match.batch_norm, match.activation_first = batch_norm, match.activation[0] is not None
    elif activation is not None and match.activation[0] is None:
        match.reason = _why_not_together(match.nodes, node, match.batch_norm or {})
        if activation[1] < 0:
            match.reason = f"negative_slope={activation[1]}"
        if not match.reason:
            match.activation = activation
    else:
        return False
    if not match.reason:
        match.nodes.append(node)
    return not match.reason


def _why_not_together(nodes, last, batch_norm):
    """What stands in between and would notice that the group runs where its last node does; "" if nothing does."""
    statistics = {batch_norm.get("running_mean"), batch_norm.get("running_var")} - {None}
    layers = [node for node in last.graph.nodes if node.target is F.batch_norm or node.target in _CONVOLUTIONS]
    statistics = may_be_views(statistics, last, layers) if statistics else statistics
    inputs = {argument for node in (*nodes, last) for argument in node.all_input_nodes}
    node = nodes[0].next
    while node is not last:
        if node not in nodes:
            if node.op == "call_function" and getattr(node.target, "__module__", "") in _SWITCHES:
                return "gradients or autocast are switched after it"
            if statistics & set(node.all_input_nodes):
                return f"{node.name} uses the running statistics in between"
            if changes_in_place(node) and not _counts(node, inputs):
                return f"{node.name} changes a tensor in between"
        node = node.next
    return ""


def _counts(node, inputs):
    """Whether a node only counts batches: all that it writes to is a number, and none of the group's inputs."""
    (target,) = node.all_input_nodes if len(node.all_input_nodes) == 1 else (None,)
    if target is None or target.op != "placeholder" or target in inputs:
        return False
    value = target.meta.get("example_value")  # of several numbers it might share its memory with an input
    return isinstance(value, torch.Tensor) and value.dim() == 0 and not value.dtype.is_floating_point


def _replace(graph, match):
    """Returns the call that takes the place of the group."""
    last = match.nodes[-1]
    # As they are now: an operator may have taken the place of the layer before.
    conv = _convolution_arguments(match.nodes[0])
    sizes = [_pair(conv.get(name, 0)) for name in ("stride", "padding", "output_padding")]
    layer = LayerSpec(match.transposed, *sizes, *match.activation, match.batch_norm is not None, match.activation_first)
    vectors = (None,) * 4
    if match.batch_norm is not None:
        norm = _arguments(_BATCH_NORM, next(node for node in match.nodes if node.target is F.batch_norm))
        vectors = [norm[name] for name in ("weight", "bias", "running_mean", "running_var")]
        layer = layer._replace(batch_statistics=norm["training"], momentum=norm["momentum"], eps=norm["eps"])
    with graph.inserting_before(last):
        call = graph.call_function(_fused_call, (conv["x"], conv["weight"], conv["bias"], *vectors, layer))
        call.meta = dict(last.meta)
    last.replace_all_uses_with(call)
    for node in reversed(match.nodes):
        graph.erase_node(node)
    return call


def _fused_call(x, weight, bias, gamma, beta, running_mean, running_var, layer):
    """A captured group as one operator, on tensors."""
    return fused_layer.conv_bn_act(x, weight, bias, gamma, beta, running_mean, running_var, layer=layer)
