"""Convolution → BatchNorm → activation in a torch.fx graph, where each result may go anywhere.

Two layers are joined only where nothing else uses what passes between them, and a BatchNorm only where nothing that the
forward does in between has to do with its tensors. This file knows the graphs of `fastgan.fusing.tracing`, in which
modules are nodes; what it knows of activations as functions serves `fastgan.compile_backend` too.
"""

import inspect
import operator
import types
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastgan.fusing.layer_code import is_customized
from fastgan.fusing.patterns import ACTIVATIONS, WRITTEN_TO, Group, match_first, passes_on, writes_to_input
from fastgan.fusing.tracing.trace import IN_PLACE

_FUNCTIONS = {
    "relu": (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"),
    "leaky_relu": (F.leaky_relu, F.leaky_relu_),
    "tanh": (torch.tanh, torch.tanh_, F.tanh, "tanh", "tanh_"),
    "sigmoid": (torch.sigmoid, torch.sigmoid_, F.sigmoid, torch.special.expit, "sigmoid", "sigmoid_"),
}
_ACTIVATION_NAMES = {name.lower() for name in nn.modules.activation.__all__}
_OTHER_NORMS = {"instance_norm", "group_norm", "layer_norm", "local_response_norm", "rms_norm"}
_MODULES = {name: module for module, name in ACTIVATIONS.items()}
_ACTIVATION_OF = {function: name for name, functions in _FUNCTIONS.items() for function in functions}
_STATEMENTS = IN_PLACE | {getattr(operator, function.__name__) for function in IN_PLACE} | {operator.setitem}
# Functions and methods whose result may be a view of what they are given, or that itself.
_VIEWING = set(
    """
    getitem getattr view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze transpose t permute
    movedim moveaxis swapaxes swapdims select narrow chunk split tensor_split unbind expand expand_as unfold diagonal
    as_strided contiguous to type type_as float half bfloat16 double cpu cuda detach alias positive broadcast_to
    sum_to_size hsplit vsplit dsplit atleast_1d atleast_2d atleast_3d real conj resolve_conj resolve_neg adjoint
    unpack dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout
    """.split()
)
# What leaves its arguments as they are and gives a result with memory of its own: functions and methods, layers.
_READING = {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, F.interpolate}
_READING |= {getattr(torch, name) for name in "add sub mul div cat concat stack abs square mean sum".split()}
_READING |= {F.conv2d, F.conv_transpose2d, F.avg_pool2d, F.linear, F.l1_loss, F.mse_loss}
_READING |= set("add sub mul div abs square mean sum".split())
_READING_LAYERS = {nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, nn.Linear}
_READING_LAYERS |= {nn.AvgPool2d, nn.MaxPool2d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d}
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_OPTIONS = {"negative_slope", "inplace"}  # what an activation that is called on a tensor may be given by name
_LEAKY_RELU = inspect.signature(lambda input, negative_slope=0.01, inplace=False: None)


@dataclass
class GraphGroup:
    """A fused group in a graph: its nodes, the convolution's first, and what they compute."""

    nodes: list[fx.Node]
    group: Group

    def in_between(self):
        """The nodes that stand among its own and do something."""
        between = _between(self.nodes[0], self.nodes[-1])
        return [node for node in between if node.op != "get_attr" and node not in self.nodes]

    def passed(self):
        """Paths of the modules that it now runs before: its BatchNorm does so where the convolution stands."""
        between = self.in_between() if self.group.batch_norm is not None else []
        return [node.target for node in between if node.op == "call_module"]


def activation_of(node):
    """(name, negative slope) of a node that calls an activation as a function or method; None for any other."""
    if node.op not in ("call_function", "call_method"):
        return None
    if not node.kwargs.keys() <= _OPTIONS:  # `out`, say
        return None
    name = _ACTIVATION_OF.get(node.target)
    if name != "leaky_relu":
        return name and (name, 0.0)
    slope = _LEAKY_RELU.bind(*node.args, **node.kwargs).arguments.get("negative_slope", 0.01)
    return (name, slope) if isinstance(slope, int | float) else None


def sole_user(node):
    """(the one node that uses `node`, "") if it does so as its first argument only, or (None, why there is none)."""
    users = list(node.users)
    if len(users) != 1:
        return None, f"its result is used {len(users)} times" if users else "its result is not used"
    (user,) = users
    if user.op == "output":
        return None, ""
    uses = []
    fx.map_arg((user.args, user.kwargs), uses.append)
    if user.args[:1] == (node,) and uses.count(node) == 1:
        return user, ""
    return None, f"its result is an argument of {user.name}"


def changes_in_place(node, module=None):
    """Whether a node writes to one of its arguments, as far as its name, its schema and its arguments tell.

    Args:
        module: that which it calls, if it calls one.
    """
    if node.op == "call_module":
        return module is not None and writes_to_input(module)
    if _has_mutable_schema(node.target):
        return True
    name = _name(node)
    in_place_name = name.endswith("_") and not name.endswith("__")
    return in_place_name or node.target in _STATEMENTS or _is_told_to(node) or "out" in node.kwargs


def _has_mutable_schema(target):
    overloads = [target] if isinstance(target, torch._ops.OpOverload) else []
    if isinstance(target, torch._ops.OpOverloadPacket):  # those with `out` are told by that
        overloads = [getattr(target, name) for name in target.overloads() if "out" not in name]
    return any(overload._schema.is_mutable for overload in overloads)


def _name(node):
    """Of the function or method that a node calls, without an overload's."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.partition(".")[0]


def _is_told_to(node):
    """Whether a call has a true `inplace`, by name or by position."""
    if "inplace" in node.kwargs or not isinstance(node.target, types.FunctionType):
        return bool(node.kwargs.get("inplace"))
    parameters = list(inspect.signature(node.target).parameters)
    place = parameters.index("inplace") if "inplace" in parameters else len(node.args)
    return place < len(node.args) and bool(node.args[place])


def may_be_views(tensors, last, new):
    """`tensors`, and the nodes before `last` that come from them and may be views, as the results of `new` are not."""
    views, new = set(tensors), set(new)
    for node in last.graph.nodes:
        if node is last:
            break
        if node not in new and not views.isdisjoint(node.all_input_nodes):
            views.add(node)
    return views


def stays_stock(user):
    """What to say of a function that follows and is an activation or a norm, but not the operators'; else ""."""
    if user is None:
        return ""
    name = _name(user)
    known = user.target in _ACTIVATION_OF or name in _OTHER_NORMS or name.replace("_", "") in _ACTIVATION_NAMES
    return f"{name} after it stays stock" if known else ""


def is_written_to(node, container=None):
    """Whether anything changes a node's result in place, as it is or by what may be a view of it."""
    views = [node]
    for each in views:  # grows
        for user in each.users:
            module = container.get_submodule(user.target) if user.op == "call_module" else None
            if changes_in_place(user, module):
                return True
            if _name(user) in _VIEWING if module is None else passes_on(module):
                views.append(user)
    return False


def restore_layout(call, calls, function, *arguments, container=None):
    """Put function(call, …), a result that lies in memory as stock's, between a fused call and its users.

    Other fused `calls` go on with the result as it is. But where a user may change it in place they have to see that:
    then all users get the same tensor.
    """
    others = [user for user in call.users if user not in calls]
    if not others:
        return
    wanting = others if all(_only_reads(user, container) for user in others) else list(call.users)
    with call.graph.inserting_after(call):
        restored = call.graph.call_function(function, (call, *arguments))
    call.replace_all_uses_with(restored, lambda user: user in wanting)


def _only_reads(node, container):
    """Whether a node is known to leave what it is given as it is, and to hand on nothing of its memory."""
    if node.op == "output":
        return True
    if node.op == "call_module":
        module = container.get_submodule(node.target)
        return type(module) in _READING_LAYERS and not is_customized(module)
    return node.target in _READING and not changes_in_place(node)


def find_groups(graph, container):
    """A GraphGroup for each convolution among the nodes of a graph that was traced, fused or not."""
    return [
        _follow(node, container)
        for node in graph.nodes
        if node.op == "call_module" and isinstance(container.get_submodule(node.target), nn.modules.conv._ConvNd)
    ]


def _follow(node, container):
    """The GraphGroup that begins at a convolution."""
    nodes, modules, why, in_between = [node], [container.get_submodule(node.target)], "", ""
    if len(node.args) != 1 or node.kwargs:
        return GraphGroup(nodes, Group([node.target], modules, reason="it is called with more than its input"))
    while len(nodes) < 4:  # one more than a pattern has: what follows it counts too
        user, why = sole_user(nodes[-1])
        module = None if user is None else _as_module(user, container)
        if module is None:
            why = why or stays_stock(user)
            break
        if isinstance(module, _BATCH_NORM) and not any(isinstance(m, _BATCH_NORM) for m in modules):
            in_between = _why_not_earlier(user, node, container)
        if in_between:
            break
        nodes.append(user)
        modules.append(module)
    group = match_first([n.target if n.op == "call_module" else n.name for n in nodes], modules)
    if group.fused and len(group.modules) == len(modules):
        group.reason = group.reason or in_between or (why if group.activation is None else "")
    if group.fused and group.activation == "leaky_relu" and group.batch_norm is None:
        if is_written_to(nodes[1], container):
            group = match_first(group.names[:1], modules[:1])
            group.reason = WRITTEN_TO
    return GraphGroup(nodes[: len(group.modules)], group)


def _why_not_earlier(norm, conv, container):
    """Why a BatchNorm cannot run where the convolution stands: what stands between has to do with its tensors."""
    if conv.next is norm:
        return ""
    own = _tensors_of(container.get_submodule(norm.target))
    given = [n for n in conv.graph.nodes if n.op == "get_attr" and id(operator.attrgetter(n.target)(container)) in own]
    views = may_be_views(given, norm, [conv])
    for node in _between(conv, norm):
        if not views.isdisjoint(node.all_input_nodes):
            return f"{node.name} uses tensors of {norm.target} in between"
        if node.op == "call_module" and own & _tensors_of(container.get_submodule(node.target)):
            whose = "" if node.target == norm.target else f", and has tensors of {norm.target}"
            return f"{node.target} is called in between{whose}"
    return ""


def _between(first, last):
    """The nodes of a graph that come after one and before another."""
    nodes, node = [], first.next
    while first is not last and node is not last:
        nodes.append(node)
        node = node.next
    return nodes


def _tensors_of(module):
    """The ids of its parameters and buffers, and of those below it."""
    return {id(tensor) for tensors in (module.parameters(), module.buffers()) for tensor in tensors}


def _as_module(node, container):
    """The module that a node calls, or one that computes the same as the function it calls; else None."""
    if node.op == "call_module":
        return container.get_submodule(node.target) if len(node.args) == 1 and not node.kwargs else None
    activation = activation_of(node)
    if activation is None:
        return None
    name, slope = activation
    return nn.LeakyReLU(slope) if name == "leaky_relu" else _MODULES[name]()
