"""Whose code runs when a layer is called: PyTorch's own for its type, or hooks, patches and replaced methods."""

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_CODE = ("forward", "_conv_forward")  # the methods that layers compute by
_WEIGHT_HOOKS = (SpectralNorm, WeightNorm)  # the older norms compute the weight before each call


def hooks_of(module):
    """The dictionaries of hooks that take part in calling the module."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_customized(module):
    """Whether anything but torch's code for a layer of its type takes part in calling the module."""
    return any_is_customized([module.__dict__]) or _is_patched(type_of(module))


def is_called_otherwise(kind):
    """Whether a call of modules of a type is another than PyTorch's, which calls hooks and the forward."""
    base = nn.Module  # as it is now: a symbolic trace replaces methods for all modules
    return (
        kind.__call__ is not base.__call__
        or kind._call_impl is not base._call_impl
        or kind.__getattribute__ is not base.__getattribute__
    )


def _is_patched(layer_type):
    """Whether somebody has put other code in the place of torch's, for all layers of the type."""
    code = [getattr(layer_type, name) for name in _CODE if hasattr(layer_type, name)]
    of_torch = all([f.__module__ == layer_type.__module__ and not hasattr(f, "__wrapped__") for f in code])
    return not of_torch or is_called_otherwise(layer_type)


def any_is_customized(attributes):
    """Whether hooks or replaced methods take part in calling any of several modules, by their `__dict__`s."""
    for own in attributes:  # at every call of a container: a loop over what need not be looked up is the fastest
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
        if has_own_code(own):
            return True
    return False


def has_own_code(own):
    """Whether a method that a layer computes by was replaced on the instance, by its `__dict__`."""
    return "forward" in own or "_conv_forward" in own or "_call_impl" in own


def own_code(own):
    """Those methods, None for each that was not."""
    return own.get("forward"), own.get("_conv_forward"), own.get("_call_impl")


def code_of(types):
    """[(type, name, function)] of the methods that PyTorch's own layers among these types compute by."""
    own = [each for each in dict.fromkeys(types) if each.__module__.startswith("torch.nn.")]
    return [(each, name, getattr(each, name)) for each in own for name in _CODE if hasattr(each, name)]


def has_same_code(code):
    """Whether all of that is still there: somebody may patch a class of layers."""
    for each, name, function in code:
        if getattr(each, name) is not function:
            return False
    return True


def hooks_compute_weight(conv):
    """Whether the convolution's only hooks are those of `torch.nn.utils.spectral_norm` and `weight_norm`."""
    others = has_other_hooks(conv) or has_own_code(conv.__dict__) or _is_patched(type_of(conv))
    return len(conv._forward_pre_hooks) > 0 and not others


def has_other_hooks(module):
    """Whether it has hooks that do not just compute its weight."""
    others = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(others) or not all(isinstance(hook, _WEIGHT_HOOKS) for hook in module._forward_pre_hooks.values())


def has_weight_norm(conv):
    """Whether its weight is one of `weight_norm`, the newer or the older."""
    if parametrize.is_parametrized(conv, "weight"):
        return any(isinstance(each, _WeightNorm) for each in conv.parametrizations.weight)
    return any(isinstance(hook, WeightNorm) for hook in conv._forward_pre_hooks.values())


def type_of(module):
    """The module's type; of a parametrized one the type that it had before."""
    return parametrize.type_before_parametrizations(module)
