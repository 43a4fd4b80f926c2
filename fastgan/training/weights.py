"""Loading weights, with errors of one line, keeping them from learning, and the layouts that they are kept in."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastgan.memory_format import default_layout


def load_weights(module, state):
    """``module.load_state_dict(state)``, where a state that does not fit is a ValueError that names one misfit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        # torch lists every misfit on a line of its own, below a heading.
        misfits = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(f"weights do not fit the {type(module).__name__}: {misfits[0].strip()}") from error


def to_channels_last(module):
    """``module.to(memory_format=torch.channels_last)``, which refuses modules with tensors of five dimensions.

    Weights that are shared out among processes stay as they are: where their gradients go is settled.
    """
    if _are_shared_out(module):
        return
    if all(tensor.dim() < 5 for tensor in (*module.parameters(), *module.buffers())):
        module.to(memory_format=torch.channels_last)
    else:
        module._apply(lambda tensor: tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor)


def _are_shared_out(module):
    distributed = any(isinstance(part, DistributedDataParallel) for part in module.modules())
    return distributed or any(hasattr(parameter, "device_mesh") for parameter in module.parameters())  # DTensor's


def wants_default_layout(error):
    """Whether a network failed because of channels_last: a `view` of a feature map, say, wants it contiguous."""
    said = ("view size is not compatible", "Cannot view a tensor with shape")  # the second when it is compiled
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def to_contiguous(module):
    """The default layout for all weights, in place; for those that are shared out as for `to_channels_last`."""
    for parameter in () if _are_shared_out(module) else module.parameters():
        if parameter.dim() == 4:
            parameter.data = default_layout(parameter.data)


def keep_compilable(network):
    """Take the weight of a stock first layer over 1×1 latents back from channels_last to NCHW, so that it compiles.

    On a 1×1 grid both layouts look alike, and PyTorch's compiled backward (2.11 at least) expects the weight's gradient
    in the layout of the weight while cuDNN's gives it in that of the latents (pytorch#171622, #197517). A first
    convolution that is transposed is taken for such a layer; of another network nothing changes.
    """
    convolutions = (module for module in network.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d))
    first = next(convolutions, None)
    if isinstance(first, nn.ConvTranspose2d):
        first.weight.data = first.weight.data.contiguous()


def parameters_in_both(optimizer, other):
    """The parameters that two optimizers update."""
    first, second = ([p for group in each.param_groups for p in group["params"]] for each in (optimizer, other))
    ids = set(map(id, second))
    return [parameter for parameter in first if id(parameter) in ids]


@contextmanager
def frozen(module, but=()):
    """Within it no parameter of ``module`` but those in ``but`` asks for a gradient: its input's is all it gives."""
    kept = set(map(id, but))
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad and id(parameter) not in kept]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
