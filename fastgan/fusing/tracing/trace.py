"""What a module's own forward does with its children, as a torch.fx graph in which each is one node.

Of a Sequential, which only calls its own children one after the other, those are.

A symbolic trace shows one way through a forward. It stands for all calls only where nothing else decides the way, so
what could decide it is either watched (`watching.py`), part of the question (the mode, arguments that are no tensors),
or makes the forward one that is not followed: `Untraceable` says why. The same with what would be lost: `code.py` looks
at the code, `reads.py` at what it reads of the modules, and `changes.py` at whether a module that it calls may change
that.
"""

import copy
import dis
import operator
import sys
import threading

import numpy as np
import torch
from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastgan.checks import in_short
from fastgan.fusing.layer_code import is_called_otherwise
from fastgan.fusing.patterns import passes_through
from fastgan.fusing.tracing.changes import check_unchanged_by
from fastgan.fusing.tracing.code import RANDOM, CodeCheck, Untraceable, returns_something
from fastgan.fusing.tracing.reads import Reads
from fastgan.fusing.tracing.watching import freeze
from fastgan.random_numbers import random_numbers_kept

TENSOR = object()  # stands for one among the arguments of a trace
# Of a tensor, and None for some of them: a stand-in never is.
_MAYBE_NONE = frozenset(["grad", "grad_fn", "_grad", "_grad_fn", "_base", "_backward_hooks"])


def trace(container, arguments, watch):
    """The graph of ``container.forward(**arguments)`` in its present mode.

    Args:
        container: an nn.Module that runs its type's own forward.
        arguments: {name: TENSOR, or the value that is given}; parameters that are missing take their defaults.
        watch: a Watch that notes what the graph depends on, besides the arguments and the mode.

    Raises:
        Untraceable: the graph would not stand for every such call.
    """
    if "self" in arguments:  # which the graph's code calls the container
        raise Untraceable("it has an argument named self")
    code = CodeCheck(watch)
    cls = type(container)
    watch.attribute(cls, "forward")
    code.type(cls)
    code.function(cls.forward, cls, called_first=True)
    with _disable_current_modes(), random_numbers_kept() as drawn:  # fake tensors, say: a mode of theirs has no numbers
        (on, read), (off, _) = (_trace_once(container, arguments, code, watch, switch) for switch in (True, False))
        if drawn():
            raise Untraceable(RANDOM)
    source = on.python_code("self").src
    if source != off.python_code("self").src:
        raise Untraceable("it asks whether gradients or autocast are on")
    try:
        compile(source, "<trace>", "exec")
    except SyntaxError:
        raise Untraceable("it uses names that code cannot spell, keywords of Python most likely") from None
    called = {node.target: container.get_submodule(node.target) for node in on.nodes if node.op == "call_module"}
    check_unchanged_by(called, code.globals | read)
    if code.asks_for_none and not all(map(returns_something, called.values())):
        raise Untraceable("it asks whether a result is None")
    return on


class _Proxy(fx.Proxy):
    """Stands for a tensor, and refuses what a tensor would answer in another way.

    Records `y += z` as what it is: to fx it is an addition, after which whatever else holds y would not see it.
    """

    __array_priority__ = torch.Tensor.__array_priority__  # NumPy's numbers leave arithmetic with it to it

    def __array__(self, *_, **__):
        raise Untraceable("it hands a tensor to NumPy")

    def __getattr__(self, name):
        if name.startswith("__array_"):  # NumPy's questions before __array__
            raise AttributeError(name)
        if name.startswith("__"):
            return super().__getattr__(name)
        value = getattr(torch.Tensor, name, None)
        if name in _MAYBE_NONE or value is None:
            raise Untraceable(f"it asks a tensor for {name}")
        if callable(value):
            return _Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})  # now, not when it is used

    def __iter__(self):
        frame = sys._getframe(1)
        code, at = frame.f_code.co_code, frame.f_lasti
        if dis.opname[code[at]] != "UNPACK_SEQUENCE" or dis.opname[code[at - 2]] == "EXTENDED_ARG":
            raise Untraceable("it loops over a tensor or its shape")
        count = code[at + 1]
        parts = self.tracer.create_proxy("call_function", unpack, (self, count), {})
        return iter([parts[i] for i in range(count)])

    # Look-ups in sets and dictionaries: a stand-in never is what is in there.
    def __hash__(self):
        raise Untraceable("it looks for a tensor, or for something of one, in a set or dictionary")

    def __str__(self):
        raise Untraceable("it writes a tensor as text")

    def __repr__(self):
        raise Untraceable("it writes a tensor as text")

    def __format__(self, how):
        raise Untraceable("it writes a tensor as text")


def unpack(values, count):
    """What `a, b = values` takes from them, `count` of them: to fx it is an index for each, whatever else there is."""
    parts = tuple(values)
    if len(parts) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    if len(parts) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(parts)})")
    return parts


class _Attribute(fx.proxy.Attribute, _Proxy):
    """A method that is not called yet."""


def _in_place(name):
    operation = getattr(operator, name)

    # A function of our own, because fx writes operator.iadd as a statement, which would change numbers too.
    def call(ours, other):
        return operation(ours, other)

    call.__name__ = call.__qualname__ = name
    setattr(
        _Proxy, f"__{name}__", lambda self, other: self.tracer.create_proxy("call_function", call, (self, other), {})
    )
    return call


_STATEMENTS = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift"
IN_PLACE = frozenset(map(_in_place, _STATEMENTS.split()))


class _Tracer(fx.Tracer):
    """Every module is a leaf, but for a Sequential, and every call is made in the modes of the forward's own call."""

    proxy_buffer_attributes = True

    def __init__(self, arguments, watch):
        super().__init__()
        self._arguments, self._watch = arguments, watch
        self._modes, self._thread = _get_modes(), threading.get_ident()

    def proxy(self, node):
        return _Proxy(node, self)

    def is_leaf_module(self, module, qualified_name):
        return True

    def call_module(self, module, forward, args, kwargs):
        # fx sees what other threads call, too, some of it after the trace, when the paths are gone.
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if module not in self.submodule_paths:  # made by the forward itself: what it does counts, not what it is
            return forward(*args, **kwargs)
        children = module._modules.values()
        if len(args) == 1 and not kwargs and passes_through(module):
            if all(isinstance(child, nn.Module) and not is_called_otherwise(type(child)) for child in children):
                return self._call_children(module, *args)
        return super().call_module(module, forward, args, kwargs)

    def _call_children(self, module, x):
        self._watch.called([module])
        self._watch.children(module)
        for child in module._modules.values():
            x = child(x)
        return x

    def getattr(self, name, value, parameter_proxies):
        if threading.get_ident() != self._thread:
            return value
        return super().getattr(name, value, parameter_proxies)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        given = {
            name: self.create_proxy("placeholder", name, (), {}) if value is TENSOR else value
            for name, value in self._arguments.items()
        }
        return lambda: root_fn(self.root, **given), []

    def create_proxy(self, kind, *args, **kwargs):
        if kind.startswith("call") and _get_modes() != self._modes:
            raise Untraceable("it calls layers under no_grad or autocast of its own")
        return super().create_proxy(kind, *args, **kwargs)

    def create_arg(self, value):
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            raise Untraceable("it makes tensors that would be constants")
        if isinstance(value, np.float64):
            value = float(value)
        if isinstance(value, int | float | str) and type(value) not in (bool, int, float, str):
            raise Untraceable(f"it calculates with a {type(value).__name__}")  # which the graph's code cannot spell
        return super().create_arg(value)


def _trace_once(container, arguments, code, watch, modes_on):
    modes = _get_modes()
    given = copy.deepcopy({name: value for name, value in arguments.items() if value is not TENSOR})
    before = freeze(list(given.values()))
    try:
        _set_modes(modes_on, modes_on, modes_on)
        tracer = _Tracer({name: given.get(name, TENSOR) for name in arguments}, watch)
        reads = Reads(container, code, watch, tracer)
        with reads.recorded():
            graph = tracer.trace(container)
        reads.check()
        if freeze(list(given.values())) != before:
            raise Untraceable("it changes an argument")
        if _get_modes() != (modes_on,) * 3:
            raise Untraceable("it switches gradients or autocast")
        return graph, reads.values
    except Untraceable:
        raise
    except Exception as error:  # what fx cannot follow may raise anything
        raise Untraceable(f"torch.fx cannot trace it ({in_short(error, 120)})") from None
    finally:
        _set_modes(*modes)


def _get_modes():
    """(gradients, autocast on the CPU, on CUDA): each on or off."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _set_modes(gradients, cpu, cuda):
    with torch._C.DisableTorchFunction():  # or torch.export, which may be tracing what we are called by, writes it down
        torch.set_grad_enabled(gradients)
    torch.set_autocast_enabled("cpu", cpu)
    torch.set_autocast_enabled("cuda", cuda)
