"""fuse and unfuse: the fused operators inside modules that already exist.

`fuse` changes neither modules nor parameters. It gives each container whose forward calls convolutions an instance
attribute `forward` that runs them in fused groups; `unfuse` deletes it. An nn.Sequential is a chain as it stands, with
the layers of those inside of it (`SequentialForward`); what other forwards do with their children is traced
(`fastgan.fusing.graph_forward`). Groups are matched again as soon as a layer is replaced or gets a hook, so such
changes take effect, and train() and eval() do at every call.
"""

import types
from contextlib import contextmanager

import torch
from torch import fx, nn

from fastgan import backend
from fastgan.batch_groups import current_batch_groups
from fastgan.fusing.graph_forward import CallPlan, GraphForward, is_graph_forward, look_like_own
from fastgan.fusing.group_calls import run_layers, run_parts
from fastgan.fusing.layout import in_stock_layout
from fastgan.fusing.patterns import in_order, is_sequential, match, passes_through
from fastgan.fusing.tracing.watching import Watch
from fastgan.ops import fused_layer


def fuse(model):
    """Run convolution + BatchNorm + activation as one operator wherever `model` passes a tensor through them.

    In place. Looks into every nn.Sequential, and into every forward that torch.fx can follow: layers as modules or
    functions, in any order of definition, with branches, skips and residuals between them. What cannot be followed or
    fused stays stock, and `explain` says why. state_dict keys, Parameter and buffer objects, types and hooks stay as
    they are. Calling it twice changes nothing. Where kernels run, an input that does not fit raises ValueError or
    TypeError with the layer's name, where stock raises RuntimeError.

    Args:
        model: an nn.Module. A forward may choose its way by its mode, by attributes of its module (a Namespace of
            options, say), by global constants and by arguments that are no tensors: what it reads is watched, and a
            change is followed.

    Returns:
        The same model.

    Raises:
        TypeError: not an nn.Module, or a scripted one.
    """
    check_module(model)
    for container in reversed(list(model.modules())):  # the inner ones first, which the outer ones take notice of
        if isinstance(container, torch.jit.ScriptModule) or "forward" in container.__dict__:
            continue
        if any(map(_may_be_fused, groups_of(container))):
            container.forward = (SequentialForward if is_sequential(container) else GraphForward)(container)
    return model


def unfuse(model):
    """Undo `fuse`, in place: every module runs its own forward again.

    Args:
        model: an nn.Module, fused or not.

    Returns:
        The same model.

    Raises:
        TypeError: not an nn.Module, or a scripted one.
    """
    check_module(model)
    for container in model.modules():
        if is_fused(container):
            del container.forward
    return model


@contextmanager
def running_stock(model):
    """Within it every module runs its own forward: gives [(container, the forward that it has when fused)]."""
    fused_containers = [container for container in model.modules() if is_fused(container)]
    fused_forwards = [(container, container.__dict__.pop("forward")) for container in fused_containers]
    try:
        yield fused_forwards
    finally:
        for container, forward in fused_forwards:
            container.forward = forward


def check_module(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must not be a scripted module: fused layers and torch.jit cannot be had together")


def is_fused(container):
    """Whether `fuse` took over the container's forward."""
    return isinstance(container.__dict__.get("forward"), SequentialForward | GraphForward)


def _may_be_fused(group):
    """Whether the group is fused, or may be as soon as its convolution knows its channels."""
    return group.fused or isinstance(group.modules[0], nn.modules.lazy.LazyModuleMixin)


def groups_of(container, kinds=()):
    """The Groups in a container's own forward as it stands now, whether fuse was called on it or not.

    Args:
        kinds: of calls, as `GraphForward.kind_of` gives them; others are those with tensors for all without a default.
    """
    if is_sequential(container):
        names, modules, _ = in_order(container)
        return match(names, modules)
    return [group for plan in plans_of(container, kinds) for group in plan.groups]


def plans_of(container, kinds=()):
    """The CallPlans of a container with a forward of its own for these kinds of calls: see `groups_of`."""
    if is_graph_forward(container):
        return [container.forward.plan(kind) for kind in kinds or (None,)]
    if "forward" in container.__dict__:
        return [CallPlan("its forward was replaced")]
    if not any(isinstance(module, nn.modules.conv._ConvNd) for module in container.modules()):
        return [CallPlan("it has no convolutions")]
    if not isinstance(type(container).forward, types.FunctionType):
        return [CallPlan(f"its forward is a {type(type(container).forward).__name__}")]
    return [GraphForward(container).plan()]


def all_groups(model, kinds):
    """[(path of its first module, Group, container)] of every group in a container inside `model` that is fused.

    What is called in several ways stands for the one in which the least is fused. What is called from several modules
    comes several times, first in the outermost, whose call may go past the forward of the others.

    Args:
        kinds: {id of a container: kinds of its calls}, as far as they are known: see `groups_of`.
    """
    groups = []
    for path, container in model.named_modules():
        if is_fused(container):
            own = {}
            for group in groups_of(container, kinds.get(id(container), ())):
                first = id(group.modules[0])
                own[first] = min(own.get(first, group), group, key=lambda g: len(g.modules))
            for group in own.values():
                groups.append((".".join(filter(None, (path, group.names[0]))), group, container))
    return groups


def fused_groups(model):
    """{path of the convolution: Group} of everything inside `model` that runs as one operator."""
    found = {}  # by the convolution, which may have several paths
    for path, group, _ in all_groups(model, {}):
        found.setdefault(id(group.modules[0]), (path, group))
    return {path: group for path, group in found.values() if group.fused}


class SequentialForward:
    """Takes the place of an nn.Sequential's forward: its layers in their order, groups of them as one operator."""

    def __init__(self, container):
        self.container, self._matched = container, None
        look_like_own(self, container)

    def __getstate__(self):
        return {"container": self.container}  # copies and pickles match anew

    def __setstate__(self, state):
        self.__init__(**state)

    def __call__(self, input):  # named as nn.Sequential's own argument
        container = self.container
        if not is_sequential(container):  # any more
            return type(container).forward(container, input)
        # A trace shows the layers, hooks on all modules want them called, and within torch.func's transforms nothing
        # may be done in place; but only our groups take a batch in parts.
        if isinstance(input, fx.Proxy) or (
            (any(backend.HOOKS_OF_ALL) or backend.transformed()) and current_batch_groups() == 1
        ):
            return type(container).forward(container, input)
        x, groups, i = input, self._groups(), 0
        while i < len(groups):
            if not groups[i].fused:
                x, i = groups[i].modules[0](x), i + 1
                continue
            end = i + 1
            while end < len(groups) and groups[end].fused:
                end += 1
            # Asked once for groups in a row: none moves x to another device, or to a dtype without kernels.
            if fused_layer.has_kernels_for(x):
                x = _run_operators(groups[i:end], x)
            else:
                seen = backend.has_dispatch_mode()
                for group in groups[i:end]:
                    forwards = group.own_forwards if seen else group.forwards
                    x = run_layers(x, group.modules[0], forwards, group.batch_norm, group.keeps_memory)
            i = end
        return x

    def _groups(self):
        """Those of the container as it stands. Matching takes as long as a layer of a small network: they are kept."""
        container = self.container
        if torch.compiler.is_compiling():
            return groups_of(container)
        if self._matched is None or not self._matched.holds():
            self._matched = _MatchedGroups(container)
        return self._matched.groups


class _MatchedGroups:
    """The Groups of the modules that a container calls in a row, with what they depend on."""

    def __init__(self, container):
        names, modules, passed = in_order(container)
        self.groups, self._inner, self._watch = match(names, modules), passed[1:], Watch()
        called = [module for module in modules if module is not None]  # a child may have been set to None
        self._watch.called([module for module in called if not is_fused(module)])  # those have their own
        for module in passed:
            self._watch.children(module)
        if any(group.asks_who_writes for group in self.groups):
            self._watch.inplace(called)
        self._watch.start()

    def holds(self):
        return self._watch.holds() and all(map(passes_through, self._inner))


def _run_operators(groups, x):
    """Fused groups in a row, with the result where stock would put it."""
    y = run_parts(x, [group.part() for group in groups])
    kept = [group.keeps_memory for group in groups]
    return in_stock_layout(y, x, [group.modules[0] for group in groups], kept)
