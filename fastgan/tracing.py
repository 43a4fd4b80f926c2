"""What a module's own forward does with its children, as a torch.fx graph in which every child is one node.

A symbolic trace shows one way through a forward. It stands for all calls only where nothing else decides the way, so
what could decide it is either part of the question (the mode, arguments that are no tensors, attributes that the
forward reads), or makes the forward one that is not followed: `Untraceable` says why.
"""

import dis
import inspect
import operator
import random
import types
from contextlib import contextmanager

import numpy as np
import torch
from torch import fx, nn

TENSOR = object()  # stands for one among the arguments of a trace
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format)
_DEFINITIONS = (types.FunctionType, types.BuiltinFunctionType, type)
# Each tells a symbolic trace something else than a real call, or does something that a trace would do once for all.
_BLIND_SPOTS = {"isinstance", "issubclass", "type", "hasattr", "id", "print", "input", "open", "breakpoint"}
_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


class Untraceable(Exception):
    """A forward that a symbolic trace does not stand for, and why."""


def trace(container, arguments, reads=None):
    """The graph of ``container.forward(**arguments)`` in its present mode; every module that it calls is a leaf.

    Args:
        container: an nn.Module that runs its type's own forward.
        arguments: {name: TENSOR, or the value that is given}; parameters that are missing take their defaults.
        reads: a dict that receives the attributes the forward reads and their values: the graph holds as long as these
            do.

    Raises:
        Untraceable: the graph would not stand for every such call.
    """
    _check_code(container)
    reads = {} if reads is None else reads
    with _left_alone(container), _random_numbers_unused(), _reads_recorded(container, reads):
        on, off = (_trace_once(container, arguments, switch) for switch in (True, False))
    if on.python_code("self").src != off.python_code("self").src:
        raise Untraceable("it asks whether gradients or autocast are on")
    for name, value in reads.items():
        if freeze(value) is None:
            raise Untraceable(f"it reads self.{name}, a {type(value).__name__}, which can change")
    return on


def freeze(value):
    """Something to compare a constant by later, as a tuple; None for what may change without showing."""
    if isinstance(value, _CONSTANTS + _DEFINITIONS):
        return type(value), value
    if isinstance(value, list | tuple):
        parts = tuple(map(freeze, value))
        return None if None in parts else (type(value), parts)
    return None


def _check_code(container):
    """Look for questions to which a trace gets another answer than a call, in the forward and the methods it uses."""
    classes = [base for base in type(container).__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    waiting, seen = {"forward"}, set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for function in (vars(base)[name] for base in classes if name in vars(base)):
            function = inspect.unwrap(getattr(function, "__func__", function))  # of a static or class method, too
            if isinstance(function, types.FunctionType):
                questions, attributes = _names(function.__code__)
                if questions & _BLIND_SPOTS:
                    raise Untraceable(f"it calls {min(questions & _BLIND_SPOTS)}")
                waiting |= attributes - seen


def _names(code):
    """The global names and the attributes that a function uses, and those in it do, as two sets."""
    names, attributes = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_names, inner_attributes = _names(constant)
            names |= inner_names
            attributes |= inner_attributes
    return names, attributes


class _Proxy(fx.Proxy):
    """Records `y += z` as what it is: to fx it is an addition, after which whatever else holds y would not see it."""


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


IN_PLACE = frozenset(map(_in_place, ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")))


class _Tracer(fx.Tracer):
    """Every module is a leaf, and every call is made in the modes in which the forward itself was called."""

    def __init__(self, arguments):
        super().__init__()
        self._arguments, self._modes = arguments, _get_modes()

    def proxy(self, node):
        return _Proxy(node, self)

    def is_leaf_module(self, module, qualified_name):
        return True

    def call_module(self, module, forward, args, kwargs):
        if module not in self.submodule_paths:  # made by the forward itself: what it does counts, not what it is
            return forward(*args, **kwargs)
        return super().call_module(module, forward, args, kwargs)

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
            if not any(value is buffer for buffer in self.root.buffers()):
                raise Untraceable("it makes tensors that would be constants")
        return super().create_arg(value)


def _trace_once(container, arguments, modes_on):
    modes = _get_modes()
    try:
        _set_modes(modes_on, modes_on, modes_on)
        return _Tracer(arguments).trace(container)
    except Untraceable:
        raise
    except Exception as error:  # what fx cannot follow may raise anything
        first_line = (str(error).splitlines() or [""])[0]
        raise Untraceable(f"torch.fx cannot trace it ({type(error).__name__}: {first_line[:80]})") from None
    finally:
        _set_modes(*modes)


def _get_modes():
    """(gradients, autocast on the CPU, on CUDA): each on or off."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _set_modes(gradients, cpu, cuda):
    torch.set_grad_enabled(gradients)
    torch.set_autocast_enabled("cpu", cpu)
    torch.set_autocast_enabled("cuda", cuda)


@contextmanager
def _left_alone(container):
    """Undo what a trace left in the container's attributes, and say so."""
    attributes = vars(container)
    before = dict(attributes)
    contents = {name: value.copy() for name, value in before.items() if type(value) in (list, dict)}
    try:
        yield
    finally:
        names = sorted(attributes.keys() | before.keys())
        changed = [name for name in names if attributes.get(name, TENSOR) is not before.get(name, TENSOR)]
        changed += [name for name, content in contents.items() if not _same_objects(before[name], content)]
        attributes.clear()
        attributes.update(before)
        for name, content in contents.items():
            before[name].clear()
            before[name].update(content) if isinstance(content, dict) else before[name].extend(content)
    if changed:
        raise Untraceable(f"it sets self.{changed[0]}")


def _same_objects(ours, theirs):
    flat = [[*value, *value.values()] if isinstance(value, dict) else value for value in (ours, theirs)]
    return len(flat[0]) == len(flat[1]) and all(a is b for a, b in zip(*flat, strict=True))


@contextmanager
def _random_numbers_unused():
    state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
        used = random.getstate() != state or not torch.equal(torch.get_rng_state(), torch_state)
        if used or not all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True)):
            raise Untraceable("it draws random numbers that would be constants")
    finally:
        random.setstate(state), np.random.set_state(numpy_state), torch.set_rng_state(torch_state)


@contextmanager
def _reads_recorded(container, reads):
    """Within it the container notes in `reads` the attributes that are looked up on it, other than its modules and
    tensors (and its mode, which whoever asks for the trace has to know)."""
    cls, attributes = type(container), vars(container)

    def getattribute(self, name):
        if self is container and name in attributes and name not in _OWN_ATTRIBUTES:
            reads[name] = attributes[name]
        return super(recording, self).__getattribute__(name)

    recording = type(cls.__name__, (cls,), {"__getattribute__": getattribute, "__module__": cls.__module__})
    container.__class__ = recording
    try:
        yield
    finally:
        container.__class__ = cls
