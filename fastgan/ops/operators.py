"""How the operators are made: as PyTorch's own where it looks at them, and without its ceremony where nobody does.

``torch.library.custom_op`` gives operators that torch.compile, fake tensors and dispatch modes understand. In eager
code its autograd and its dispatch take longer than what they call, and small layers wait for nothing else. There the
same functions run as they are, in a ``torch.autograd.Function`` where a gradient is wanted.
"""

import functools

import torch
from torch import Tensor, nn

from fastgan import backend
from fastgan.ops.replay import Replayed

_PLAIN = (Tensor, nn.Parameter)


def operator(name, mutates_args=()):
    """The decorated function as the Operator of this name; its arguments are positional."""
    return lambda function: Operator(name, function, mutates_args)


class Operator:
    """A function of tensors and constants that is also a custom operator of PyTorch: ``registered``.

    Args:
        name: "namespace::name".
        function: annotated as ``torch.library.custom_op`` wants it; its results share no memory with its arguments.
        mutates_args: the names of the arguments that it writes to; it then has no gradient. In eager code autograd is
            not told, as PyTorch's BatchNorm does not tell it: graphs that hold its running statistics stay usable.
    """

    def __init__(self, name, function, mutates_args):
        self.__doc__ = function.__doc__
        self.function = function
        self._name, self._run, self._differentiable = name, Replayed(function), None
        run = functools.wraps(function)(lambda *arguments: self._run(*arguments))
        self.registered = torch.library.custom_op(name, run, mutates_args=mutates_args)

    def register_fake(self, function):
        """As ``torch.library.custom_op`` has it."""
        return self.registered.register_fake(function)

    def register_autograd(self, backward, *, setup_context):
        """As ``torch.library.custom_op`` has it."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        count = self.function.__code__.co_argcount
        self._differentiable = _differentiable(self._name, self._run, count, backward, setup_context)

    def __call__(self, *arguments):
        tensors, listed = _tensors(arguments)
        if is_traced(tensors):
            return self.registered(*arguments)
        if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
            if self._differentiable is None:
                return self.registered(*arguments)  # which says so when it is asked for a gradient
            return self._differentiable.apply(*arguments, *listed)
        return self._run(*arguments)


def as_operator(operator):
    """An Operator as it is: what `as_function` stands beside, for code that runs either way."""
    return operator


def as_function(operator):
    """The function of an Operator, where gradients are somebody else's affair and nobody watches."""
    return operator.function


def is_traced(tensors):
    """Whether torch.compile, a trace, a dispatch mode or a tensor's own class is to see our operators."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or backend.has_dispatch_mode():
        return True
    return any([type(tensor) not in _PLAIN for tensor in tensors])


def _tensors(arguments):
    """All tensors among the arguments, and those of them that are in lists."""
    listed = [item for value in arguments if type(value) is list for item in value if isinstance(item, Tensor)]
    return [value for value in arguments if isinstance(value, Tensor)] + listed, listed


def _differentiable(name, run, count, backward, setup_context):
    """The autograd.Function of an operator: of its `count` arguments and, again, of the tensors that are in lists."""

    def forward(ctx, *arguments):
        arguments = arguments[:count]
        result = run(*arguments)
        # Not as the Function's own setup_context: torch would then bind the arguments to the signature, at each call.
        setup_context(ctx, arguments, result)
        return result

    def gradients(ctx, *grads):
        found = backward(ctx, *grads)
        listed = [grad for grads in found if type(grads) is list for grad in grads]
        return *[None if type(grad) is list else grad for grad in found], *listed

    methods = dict(forward=staticmethod(forward), backward=staticmethod(gradients))
    return type(name.replace("::", "_"), (torch.autograd.Function,), methods)
