"""Which gradients a backward pass has a use for, which it cannot have, and which may be differentiated again."""

import torch

from fastgan.backend import is_batched


def is_wanted(ctx, i):
    """Whether the backward pass that is under way goes on from argument `i` of the autograd.Function of `ctx`.

    ``ctx.needs_input_grad`` says whether a gradient could be asked for. ``torch.autograd.grad`` asks for some only: a
    gradient penalty's for those of images, so that PyTorch's own layers leave their weights' out.

    Args:
        i: the arguments up to this one are all tensors.
    """
    return ctx.needs_input_grad[i] and _goes_on(ctx.next_functions[i][0])


def are_wanted(ctx, are_tensors):
    """`is_wanted` of the first arguments, which are tensors where `are_tensors` says so."""
    following = iter(ctx.next_functions)  # of tensors only
    needed = zip(ctx.needs_input_grad, [next(following)[0] if each else None for each in are_tensors], strict=False)
    return [needs and _goes_on(node) for needs, node in needed]


def refuse_second_order(who):
    """Raise in a backward with create_graph=True, of what `who` has no second gradients for.

    torch's once_differentiable lets this pass where the incoming gradient is a constant, and gives wrong numbers.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{who} have no backward with create_graph=True")


def differentiable(grad, *inputs):
    """The gradient as one that may be differentiated again, where that is asked for: as PyTorch's own, also one that
    depends on none of the tensors with a gradient.

    Args:
        grad: a tensor, or None.
        inputs: of what it is a gradient of; None where there is none. One at least has a gradient.
    """
    if grad is None or not torch.is_grad_enabled() or grad.requires_grad or is_batched(grad):
        return grad  # of many gradients at once it cannot be told, and PyTorch's own functions have made them
    learning = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return _Constant.apply(grad, learning[0]) if learning else grad


class _Constant(torch.autograd.Function):
    """A gradient that does not depend on the tensor."""

    @staticmethod
    def forward(ctx, grad, tensor):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        return None, None


def _goes_on(node):
    try:
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # it answers for no leaf that is asked for, and to no compiled autograd
        return True
