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

from fastgan import functional as fused
from fastgan.graph_patterns import WRITTEN_TO, activation_of, changes_in_place, is_written_to, sole_user
from fastgan.group_calls import gamma_of_ones

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


def fastgan(graph_module, example_inputs, *, mode=None, options=None):
    """The backend: replaces what it can in `graph_module` and hands it to inductor.

    Args:
        mode, options: those of torch.compile, for inductor.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    rewrite(graph_module)
    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    return compile_fx(graph_module, example_inputs, config_patches=patches or None)


@dataclass
class Found:
    """A convolution in a captured graph: the nodes that run as one operator, or why it stays as it is."""

    nodes: list[fx.Node]
    options: dict  # of the operator: see `_fused_call`
    reason: str = ""
    fused: bool = True

    @property
    def path(self):
        """Of the module that the convolution was called in."""
        stack = self.nodes[0].meta.get("nn_module_stack") or {"": ("", None)}
        return re.sub(r"^L\['\w+'\]\.?|\._modules|\['(\w+)'\]", r"\1", list(stack.values())[-1][0]).lstrip(".")

    @property
    def pattern(self):
        return " + ".join(getattr(node.target, "__name__", str(node.target)).rstrip("_") for node in self.nodes)


def rewrite(graph_module):
    """Replace every convolution that has kernels, with what follows it, by a call of the operator; in place.

    Returns:
        [Found] of all convolutions of the graph, in its order.
    """
    graph, found = graph_module.graph, []
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _CONVOLUTIONS:
            found.append(_find(node))
    for match in found:
        if match.fused:
            _replace(graph, match)
    if any(match.fused for match in found):
        graph.lint()
        graph_module.recompile()
    return found


def _find(conv):
    given = _CONVOLUTIONS[conv.target].bind(*conv.args, **conv.kwargs)
    given.apply_defaults()
    arguments = given.arguments
    transposed = "output_padding" in arguments
    match = Found([conv], dict(transposed=transposed, where=_pairs(arguments), batch_norm=None, activation=(None, 0.0)))
    match.reason = _why_not_conv(arguments)
    if match.reason:
        match.fused = False
        return match
    while len(match.nodes) < 3:
        user, match.reason = sole_user(match.nodes[-1])
        if user is None or not _join(match, user):
            break
    if match.options["activation"][0] == "leaky_relu" and match.options["batch_norm"] is None:
        if is_written_to(match.nodes[-1]):
            match.nodes.pop()
            match.options["activation"], match.reason = (None, 0.0), WRITTEN_TO
    return match


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
    if not fused.has_kernels_for(x):
        return f"no kernels for {x.dtype} on {x.device.type!r}"
    return ""


def _pair(value):
    return tuple(value) if isinstance(value, list | tuple) and len(value) == 2 else (value, value)[:2]


def _pairs(arguments):
    names = ("stride", "padding", "output_padding")
    return {name: arguments.get(name, 0) for name in names}


def _join(match, node):
    """Take `node` into the match, if it continues the pattern and may run in the same place; else say why not."""
    activation, options = activation_of(node), match.options
    is_norm = node.op == "call_function" and node.target is F.batch_norm
    if is_norm and options["batch_norm"] is None:
        arguments = _BATCH_NORM.bind(*node.args, **node.kwargs)
        arguments.apply_defaults()
        options = {**options, "batch_norm": arguments.arguments, "activation_first": len(match.nodes) == 2}
        if not isinstance(arguments.arguments["momentum"], int | float):
            match.reason = "the momentum of its BatchNorm is no number"
            return False
    elif activation is not None and options["activation"][0] is None:
        if activation[0] == "leaky_relu" and activation[1] < 0:
            match.reason = f"negative_slope={activation[1]}"
            return False
        options = {**options, "activation": activation}
    else:
        return False
    match.reason = _why_not_together(match.nodes, node, options)
    if match.reason:
        return False
    match.nodes.append(node)
    match.options = options
    return True


def _why_not_together(nodes, last, options):
    """Whether the group can run where its last node stands: what stands between must not care for that."""
    norm = options["batch_norm"] or {}
    statistics = {norm.get("running_mean"), norm.get("running_var")} - {None}
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
    """Whether what a node writes to is a number of batches, say: something that nobody gave to the group."""
    target = node.args[0] if node.args else None
    return isinstance(target, fx.Node) and target.op == "placeholder" and target not in inputs


_SWITCHES = ("torch._C", "torch.amp.autocast_mode", "torch._C._functorch", "torch._functorch.predispatch")


def _replace(graph, match):
    conv, last = match.nodes[0], match.nodes[-1]
    given = _CONVOLUTIONS[conv.target].bind(*conv.args, **conv.kwargs).arguments
    norm = match.options["batch_norm"]
    with graph.inserting_before(last):
        call = graph.call_function(
            _fused_call,
            (given["x"], given["weight"], given.get("bias")),
            dict(
                norm=None if norm is None else {name: value for name, value in norm.items() if name != "x"},
                transposed=match.options["transposed"],
                activation=match.options["activation"],
                activation_first=match.options.get("activation_first", False) and len(match.nodes) == 3,
                **match.options["where"],
            ),
        )
        call.meta = dict(last.meta)
    last.replace_all_uses_with(call)
    for node in reversed(match.nodes):
        graph.erase_node(node)


def _fused_call(x, weight, bias, *, norm, transposed, stride, padding, output_padding, activation, activation_first):
    """A captured group as one operator, on tensors."""
    vectors, options = (None,) * 4, dict(training=False, momentum=0.0, eps=0.0)
    if norm is not None:
        channels = weight.shape[1 if transposed else 0]
        gamma = gamma_of_ones(norm["weight"], norm["bias"], norm["running_mean"], channels, weight)
        vectors = (gamma, norm["bias"], norm["running_mean"], norm["running_var"])
        options = {name: norm[name] for name in ("training", "momentum", "eps")}
    name, slope = activation
    return fused.conv_bn_act(
        x,
        weight,
        bias,
        *vectors,
        transposed=transposed,
        stride=list(_pair(stride)),
        padding=list(_pair(padding)),
        output_padding=list(_pair(output_padding)),
        activation=name,
        negative_slope=slope,
        activation_first=activation_first,
        batch_groups=1,
        **options,
    )
