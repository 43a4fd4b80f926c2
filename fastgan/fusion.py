"""fuse and unfuse: the fused operators inside modules that already exist.

`fuse` changes neither modules nor parameters. It gives each container whose children are called one after the other
an instance attribute `forward` that runs them in fused groups; `unfuse` deletes it. Groups are matched again as soon
as a layer is replaced or gets a hook, so such changes take effect, and train() and eval() do at every call.
"""

import functools
import inspect
import weakref
from dataclasses import dataclass

import torch
from torch import fx, nn

from fastgan import functional as fused
from fastgan.batch_groups import current_groups
from fastgan.patterns import has_hooks, hooks_of, match
from fastgan.weight_copies import weight_copy


def fuse(model):
    """Run convolution + BatchNorm + activation as one operator wherever `model` calls them in a row.

    In place. Looks into every nn.Sequential, and into modules whose forward does nothing but pass one tensor through
    its children in a fixed order; anything else stays stock, and `explain` says why. state_dict keys, Parameter and
    buffer objects, types and hooks stay as they are. Calling it twice changes nothing.

    Args:
        model: an nn.Module. A forward that chooses its children by an attribute is followed as it stands now.

    Returns:
        The same model.

    Raises:
        TypeError: not an nn.Module, or a scripted one.
    """
    check_module(model)
    for container in model.modules():
        order = call_order(container)
        if order and not _is_fused(container) and any(g.fused for g in groups_of(container, order)):
            container.forward = functools.partial(_forward_in_groups, container, order)
    return model


def unfuse(model):
    """Undo `fuse`, in place: every module runs its own forward again.

    Raises:
        TypeError: not an nn.Module, or a scripted one.
    """
    check_module(model)
    for container in model.modules():
        if _is_fused(container):
            del container.forward
    return model


def check_module(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must not be a scripted module: fuse it before torch.jit.script")


def _is_fused(container):
    forward = container.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is _forward_in_groups


def all_groups(model):
    """{path of its first module: Group} of every chain inside `model` that `fuse` took over."""
    groups = {}
    for path, container in model.named_modules():
        if _is_fused(container):
            for group in groups_of(container, call_order(container)):
                groups[".".join(filter(None, (path, group.names[0])))] = group
    return groups


def fused_groups(model):
    """{path of the convolution: Group} of everything inside `model` that runs as one operator."""
    return {path: group for path, group in all_groups(model).items() if group.fused}


class _ChildrenAsLeaves(fx.Tracer):
    def is_leaf_module(self, module, qualified_name):
        return True

    def trace(self, root, modes):
        self._modes = modes
        return super().trace(root)

    def call_module(self, module, *args):
        if _get_modes() != self._modes:
            raise ValueError("called under no_grad or autocast of the forward's own, which the graph does not show")
        return super().call_module(module, *args)


def _get_modes():
    """(gradients, autocast on the CPU, on CUDA): each on or off."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _set_modes(gradients, cpu, cuda):
    torch.set_grad_enabled(gradients)
    torch.set_autocast_enabled("cpu", cpu)
    torch.set_autocast_enabled("cuda", cuda)


def call_order(container):
    """The names of the children in the order of their calls, or None where forward is more than such a chain."""
    if "forward" in container.__dict__:
        return container.forward.args[1] if _is_fused(container) else None
    if type(container).forward is nn.Sequential.forward:
        return list(container._modules)
    if not any(isinstance(child, nn.Conv2d | nn.ConvTranspose2d) for child in container.children()):
        return None
    if len(inspect.signature(container.forward).parameters) != 1:
        return None
    attributes, modes, orders, keeps_state = dict(vars(container)), _get_modes(), [], False
    try:
        # Once with every mode on and once with every one off, so that a forward that sets one shows.
        for on in (True, False):
            container.training = on
            _set_modes(on, on, on)
            orders.append(_chain(_ChildrenAsLeaves().trace(container, _get_modes())))
    except Exception:  # what fx cannot trace may raise anything; such a forward is no plain chain
        return None
    finally:
        _set_modes(*modes)
        vars(container)["training"] = attributes["training"]
        keeps_state = not _same_objects(vars(container), attributes)
        vars(container).clear()
        vars(container).update(attributes)
    return orders[0] if orders[0] == orders[1] and not keeps_state else None


def _same_objects(ours, theirs):
    return ours.keys() == theirs.keys() and all(ours[key] is theirs[key] for key in ours)


def _chain(graph):
    """The targets of a graph that is placeholder → call_module → … → output, or None for any other graph."""
    names, previous = [], None
    for node in graph.nodes:
        if node.op == "placeholder" and previous is None:
            pass
        elif node.op == "call_module" and node.args == (previous,) and not node.kwargs:
            names.append(node.target)
        elif node.op != "output" or node.args != (previous,):
            return None
        previous = node
    return names


def groups_of(container, order):
    # Sequential's own dict, so that layers appended or replaced after fuse are seen.
    names = list(container._modules) if type(container).forward is nn.Sequential.forward else order
    return match(names, [container.get_submodule(name) for name in names])


# Matching takes as long as a layer of a small network, so groups are kept until anything they depend on has changed.
# Looking for changes has to be quick, too, and is done by comparing and testing whole tuples.
@dataclass
class _Kept:
    modules: tuple  # the container's children, and their types: parametrizations change those
    types: tuple
    hooks: tuple  # the dictionaries in which the children keep their hooks; all empty
    groups: list


_kept = weakref.WeakKeyDictionary()  # container → _Kept


def _kept_groups(container, order):
    if torch.compiler.is_compiling():
        return groups_of(container, order)
    modules = tuple(container._modules.values())
    kept = _kept.get(container)
    if (
        kept is not None
        and kept.modules == modules
        and kept.types == tuple(map(type, modules))
        and not any(kept.hooks)
        and not any(["forward" in module.__dict__ for module in modules])  # replaced on the instance
    ):
        return kept.groups
    groups = groups_of(container, order)
    if any(map(has_hooks, modules)):
        _kept.pop(container, None)
    else:
        hooks = tuple(hooks for module in modules for hooks in hooks_of(module))
        _kept[container] = _Kept(modules, tuple(map(type, modules)), hooks, groups)
    return groups


def _forward_in_groups(container, order, *args, **kwargs):
    (x,) = (*args, *kwargs.values())
    run = None
    for group in _kept_groups(container, order):
        if group.fused:
            # Chosen once for groups in a row: none moves x to another device, or to a dtype without kernels.
            run = run or (_run_operator if fused.has_kernels_for(x) else _run_layers)
            x = run(group, x)
        else:
            x, run = group.modules[0](x), None
    return x


def _run_layers(group, x):
    """The group without kernels: the forwards of its own layers, so that the numbers are stock's to the last bit."""
    groups = current_groups()
    for forward in group.forwards:
        if groups > 1 and forward == getattr(group.batch_norm, "forward", None) and group.batch_norm.training:
            x = torch.cat([forward(part) for part in x.chunk(groups)])
        else:
            x = forward(x)
    return x


def _run_operator(group, x):
    conv, bn = group.modules[0], group.batch_norm
    vectors, options = _batch_norm_arguments(bn, x) if bn is not None else (_NO_VECTORS, _NO_BATCH_NORM)
    return fused.conv_bn_act(
        x,
        conv.weight,
        conv.bias,
        *vectors,
        transposed=conv.transposed,
        stride=conv.stride,
        padding=conv.padding,
        output_padding=conv.output_padding,
        activation=group.activation,
        negative_slope=_negative_slope(group),
        weight_copy=weight_copy(conv),
        **options,
    )


def _negative_slope(group):
    return group.modules[-1].negative_slope if group.activation == "leaky_relu" else 0.0


_NO_VECTORS = (None,) * 4
_NO_BATCH_NORM = dict(training=False, momentum=0.0, eps=0.0, batch_groups=1)


def _batch_norm_arguments(bn, x):
    """A BatchNorm2d as the operator's (gamma, beta, running_mean, running_var) and options.

    As stock does: count the batch first, update only statistics that are tracked, and take the batch's own where
    there are none to use.
    """
    momentum, batches = bn.momentum, None
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        batches = bn.num_batches_tracked
        if momentum is None:
            batches.add_(current_groups())
            # On a GPU a tensor: reading it would wait. In float64, as stock divides.
            momentum = 1.0 / (batches.double() if batches.is_cuda else float(batches))
            batches = None
    momentum = 0.0 if momentum is None else momentum
    used = bn.track_running_stats or not bn.training
    running_mean, running_var = (bn.running_mean, bn.running_var) if used else (None, None)
    gamma = bn.weight
    if gamma is None and bn.bias is None and running_mean is None:
        # To the operator four missing vectors mean that there is no BatchNorm.
        gamma = torch.ones(bn.num_features, device=x.device, dtype=x.dtype)
    training = bn.training or bn.running_mean is None
    options = dict(
        training=training,
        momentum=momentum,
        eps=bn.eps,
        batch_groups=current_groups() if training else 1,
        num_batches_tracked=batches,
    )
    return (gamma, bn.bias, running_mean, running_var), options
