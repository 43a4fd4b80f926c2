"""Which gradients a backward pass has a use for."""

import torch


def is_wanted(ctx, i):
    """Whether the backward pass that is under way goes on from argument `i` of the autograd.Function of `ctx`.

    ``ctx.needs_input_grad`` says whether a gradient could be asked for. ``torch.autograd.grad`` asks for some only: a
    gradient penalty's for those of images, so that PyTorch's own layers leave their weights' out.

    Args:
        i: the arguments up to this one are all tensors.
    """
    if not ctx.needs_input_grad[i]:
        return False
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[i][0])
    except (AttributeError, RuntimeError):  # it answers for no leaf that is asked for, and to no compiled autograd
        return True
