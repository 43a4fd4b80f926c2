"""Which functions a symbolic trace can stand for: their code is looked at before it runs.

A trace runs a forward once, on stand-ins for tensors, and its calls are then made again and again. So that nothing but
those calls is lost, the code may call only what is known to be a calculation, asks nothing to which a stand-in would
give another answer, and changes nothing that outlives the call.
"""

import builtins
import contextlib
import functools
import operator
import os
import random
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fastgan.fusing.patterns import is_replaced
from fastgan.fusing.tracing.bytecode import facts_of


class Untraceable(Exception):
    """A forward that a symbolic trace does not stand for, and why."""


RANDOM = "it draws random numbers that would be constants"
_BUILTINS = frozenset(
    getattr(builtins, name)
    for name in "len range zip enumerate reversed sorted min max sum abs round int float bool complex str tuple list "
    "dict set frozenset slice map filter all any divmod pow super getattr hasattr iter next".split()
)
_MODES = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode, torch.autocast)
# What is neither in PyTorch's table of overridable functions nor in its native modules, and yet only calculates.
# The modes are here because whoever traces looks at what is called under them.
_KNOWN = frozenset(
    [*_BUILTINS, *_MODES, contextlib.nullcontext, torch.device, torch.Size]
    + [F.sigmoid, F.tanh, F.hardsigmoid, F.hardswish, F.upsample, F.upsample_nearest, F.upsample_bilinear]
    + [torch.broadcast_shapes, functools.reduce, functools.partial]
    + [torch.is_grad_enabled, torch.is_autocast_enabled, torch.jit.is_scripting]
    + [getattr(operator, name) for name in "add sub mul truediv floordiv mod pow neg matmul getitem itemgetter".split()]
    + [nn.Module.children, nn.Module.named_children, nn.Sequential.forward]
    + [nn.ModuleDict.keys, nn.ModuleDict.values, nn.ModuleDict.items]
)
_PURE_MODULES = frozenset(["math", "itertools"])
_NATIVE = (torch._C._VariableFunctions, torch._C._nn)
_FUNCTIONS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.FunctionType)
TORCH = str(Path(torch.__file__).parent) + os.sep  # and not torchvision, say
# Decorators of PyTorch that switch a mode around the call.
_SWITCHES = tuple(str(Path(TORCH, *parts)) for parts in (("utils", "_contextlib.py"), ("amp", "autocast_mode.py")))
# The methods that make, copy, show or describe an object: a forward that only uses it runs none of them.
_NOT_OF_CALLS = frozenset(
    f"__{name}__"
    for name in "init new del repr str dir hash module qualname doc annotations annotate annotate_func "
    "annotations_cache dict weakref slots reduce reduce_ex getstate setstate deepcopy copy getnewargs getnewargs_ex "
    "init_subclass class_getitem static_attributes firstlineno constants parameters orig_bases type_params "
    "jit_unused_properties abstractmethods subclasshook match_args set_name".split()
)

_REFUSED_METHODS = frozenset(["__call__", "__getattr__", "__getattribute__", "__setattr__", "__delattr__"])


def returns_something(module):
    """Whether a module cannot return None: PyTorch's own do not, whatever their hooks are, nor when they are fused."""
    return all(is_of_torch(type(part)) and not is_replaced(vars(part).get("forward")) for part in module.modules())


def of_torch(function):
    return function.__code__.co_filename.startswith(TORCH)


class CodeCheck:
    """Raises Untraceable for functions that a trace does not stand for, and has `watch` note what the others use."""

    def __init__(self, watch):
        self._watch, self._seen = watch, set()
        self.globals = {}  # (id of global names, name) → name, of those that functions use
        self.asks_self = False  # whether it may ask that an attribute is True, say: a stand-in, of a property, never is
        self.asks_for_none = False  # whether it may ask that of what a layer returned: a stand-in never is None

    def function(self, function, cls=None, called_first=False):
        """Check a function; as a method it belongs to an instance of `cls`. The first gets arguments that are known."""
        if (function, cls) in self._seen:
            return
        self._seen.add((function, cls))
        if function.__code__.co_filename in _SWITCHES and hasattr(function, "__wrapped__"):
            self._watch.attribute(function, "__wrapped__")
            return self.function(function.__wrapped__, cls, called_first)
        if of_torch(function) and function not in _KNOWN:
            raise Untraceable(f"it calls {function.__qualname__}")
        facts = facts_of(function.__code__)
        self._watch.attribute(function, "__code__")
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if defaults:
            self._watch.attribute(function, "__defaults__")
            self._watch.attribute(function, "__kwdefaults__")
        for default in defaults:
            self.value(default, f"a default of {function.__name__}")
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for name, cell in cells.items():
            if name != "__class__":
                self._watch.attribute(cell, "cell_contents")
                self.value(_contents(cell), name)
                self._guard(None, name, _contents(cell))
        for chain in facts.chains:
            self._chain(function, chain, cls)
        if facts.problem:
            raise Untraceable(facts.problem)
        self.asks_self |= facts.asks_self
        self.asks_for_none |= facts.asks_for_none or (facts.asks_for_none_given and not called_first)
        for name in facts.named_by_super:
            self._method_above(cells.get("__class__"), cls, name)
        return None

    def value(self, value, name):
        """Check what a name stands for: a constant that cannot change, or something to call."""
        if isinstance(value, types.FunctionType) and not of_torch(value):
            try:
                self.function(value)
            except Untraceable as error:
                raise Untraceable(f"it calls {name}, and {error}") from None
        elif isinstance(value, (*_FUNCTIONS, type)):
            if not _calculates(value):
                raise Untraceable(f"it calls {name}")
        elif isinstance(value, types.MethodType) and value.__self__ is random._inst:
            raise Untraceable(RANDOM)
        elif isinstance(value, types.MethodType):
            raise Untraceable(f"it calls {name}")
        elif type(value) is functools.partial:
            for part in (value.func, *value.args, *value.keywords.values()):
                self.value(part, name)
        elif not (is_constant(value) or _is_of_numpy(value)):
            raise Untraceable(f"it uses {name}, a {type(value).__name__}, which can change")

    def _chain(self, function, chain, cls):
        """Check what a name with attributes, like torch.nn.ReLU, stands for, and have it watched."""
        name, *attributes = chain
        names = function.__globals__
        value = names.get(name, vars(builtins).get(name, names))
        if value is names:
            raise Untraceable(f"it uses {name}, which is not there")
        self._watch.key(names, name)
        self.globals[id(names), name] = name
        self._guard(_module_of(names), name, value)
        if isinstance(value, type) and attributes == ["super"]:  # super(Name, self)
            if cls is None or value not in cls.__mro__:
                raise Untraceable("it calls super of another class")
            return
        for i, attribute in enumerate(attributes):
            if isinstance(value, types.ModuleType) or (isinstance(value, type) and not is_of_torch(value)):
                name = f"{name}.{attribute}"
                value = self._attribute(value, attribute, name)
            elif isinstance(value, type):  # a class of PyTorch: its methods are functions
                name, value = f"{name}.{attribute}", getattr(value, attribute, None)
                if value is None or (isinstance(value, types.MethodType) and i + 1 == len(attributes)):
                    raise Untraceable(f"it calls {name}")
            elif is_constant(value):
                return  # a method of a constant
            else:
                raise Untraceable(f"it uses {name}.{attribute}")
        if isinstance(value, types.ModuleType):
            raise Untraceable(f"it uses the module {name}")
        if _draws(value):
            raise Untraceable(RANDOM)
        self.value(value, name)

    def _attribute(self, holder, attribute, name):
        """What a module, or a class that is none of PyTorch's, has under that name; it is watched."""
        missing = object()
        if isinstance(holder, type):
            self._watch.attribute(holder, attribute)
        elif not is_of_torch(holder):
            self._watch.key(vars(holder), attribute)
        value = getattr(holder, attribute, missing)
        if value is missing:
            raise Untraceable(f"it uses {name}, which is not there")
        if not is_of_torch(holder):
            self._guard(holder, attribute, value)
        elif isinstance(holder, types.ModuleType) and _is_setting(value):
            raise Untraceable(f"it asks for {name}")
        return value

    def _method_above(self, cell, cls, name):
        """Check the method that `super().name` is, in a function of the class in the cell."""
        mro = [] if cls is None else list(cls.__mro__)
        if cell is None or _contents(cell) not in mro:
            raise Untraceable(f"it calls super().{name}")
        above = mro[mro.index(_contents(cell)) + 1 :]
        owner = next((base for base in above if name in vars(base)), None)
        if owner is None or not isinstance(vars(owner)[name], types.FunctionType):
            raise Untraceable(f"it calls super().{name}")
        for base in above[: above.index(owner) + 1]:
            self._watch.key(vars(base), name)
        self.function(vars(owner)[name], cls)

    def _guard(self, holder, name, value):
        """Have compiled code see what could be another one day: constants and functions of the user's."""
        if is_constant(value) or (isinstance(value, types.FunctionType) and not of_torch(value)):
            self._watch.guard(holder, name, value)

    def type(self, cls):
        """Check what happens to an instance of a module class without being called by name."""
        for base in cls.__mro__:
            if base is object or is_of_torch(base):
                continue
            for name, value in vars(base).items():
                if name.startswith("__") and name.endswith("__") and name not in _NOT_OF_CALLS:
                    if name in _REFUSED_METHODS or not isinstance(value, types.FunctionType):
                        raise Untraceable(f"{cls.__name__} has a {name} of its own")
                    self.function(value, cls)


def is_constant(value):
    """Whether it is the same for good, as far as its contents go."""
    if isinstance(value, tuple):
        return type(value) in (tuple, torch.Size) and all(map(is_constant, value))
    kinds = (type(None), bool, int, float, complex, str, bytes, slice, range, type(...), type(NotImplemented))
    return type(value) in (*kinds, np.float64, torch.dtype, torch.device, torch.memory_format, torch.layout)


def _is_of_numpy(value):
    """Whether it is one of NumPy's functions of numbers: np.sqrt(2), say."""
    return isinstance(value, np.ufunc) and getattr(np, value.__name__, None) is value


def _is_setting(value):
    return is_constant(value) and not isinstance(value, torch.dtype | torch.memory_format | torch.layout | float)


def _contents(cell):
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        raise Untraceable("it uses a variable that is not there") from None


def _draws(value):
    owner = getattr(value, "__self__", None)
    return owner is random._inst or type(owner).__module__.startswith("numpy.random")


def is_of_torch(cls_or_module):
    name = cls_or_module.__module__ if isinstance(cls_or_module, type) else cls_or_module.__name__
    return name.split(".")[0] == "torch"


def _module_of(names):
    """The module that these global names are those of; None where code was executed elsewhere."""
    module = sys.modules.get(names.get("__name__"))
    return module if module is not None and vars(module) is names else None


@functools.cache
def _overridable():
    return frozenset(torch.overrides.get_testing_overrides())


def _calculates(value):
    """Whether a function or class does nothing but calculate, on stand-ins for tensors as on tensors."""
    try:
        if value in _KNOWN or value in _overridable():
            return True
    except TypeError:  # cannot be hashed
        return False
    if isinstance(value, type):
        is_layer = issubclass(value, nn.Module) and value.__module__.startswith("torch.nn.modules.")
        return is_layer or (issubclass(value, BaseException)) or value.__module__ in _PURE_MODULES
    if isinstance(value, types.FunctionType):
        return False
    name, module = value.__name__, getattr(value, "__module__", None)
    return module in _PURE_MODULES or any(getattr(native, name, None) is value for native in _NATIVE)
