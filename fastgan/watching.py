"""What a trace depends on, so that each later call can tell whether it still stands, in a few microseconds."""

import functools
import types
from operator import is_

import torch

from fastgan.patterns import code_of, has_same_code, hooks_of

MISSING = object()  # an attribute or a name that is not there
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format)
_DEFINITIONS = (types.FunctionType, types.BuiltinFunctionType, type)


def freeze(value):
    """Something to compare a constant by later, as a tuple; None for what may change without showing."""
    if isinstance(value, float):
        return type(value), value.hex()  # 0.0 is not -0.0, and nan is nan
    if isinstance(value, _CONSTANTS + _DEFINITIONS):
        return type(value), value
    if isinstance(value, list | tuple):
        parts = tuple(map(freeze, value))
        return None if None in parts else (type(value), parts)
    if type(value) is functools.partial:
        parts = freeze((value.func, value.args, tuple(value.keywords.items())))
        return None if parts is None else (type(value), parts)
    return None


class Watch:
    """Notes what was read, each with the value that it had; the rest of it says whether that is still so.

    Values are the same if they are the same object, or equal constants. Of modules that are iterated or looked up in,
    all children are watched. Of tensors nothing but whether there is one: what is in it is read by each call anew.
    """

    def __init__(self):
        self.guarded = {}  # (id of holder, name) → (holder, name, value): what torch.compile has to see, too
        self.can_compile = True  # whether it can see everything
        self.parents = {}  # id → module, of those whose children are watched
        self._noted, self._expected, self._frozen = {}, [], []
        self._pairs, self._can_change = [], False
        self._children, self._tensors, self._called = [], {}, []

    def key(self, mapping, name):
        """Watch `mapping[name]`, there or not."""
        self._note(mapping, name, mapping.get)

    def attribute(self, holder, name):
        """Watch `getattr(holder, name)` of a class, a function or a cell."""
        self._note(holder, name, functools.partial(getattr, holder))

    def guard(self, holder, name, value):
        """What `key` and `attribute` watch already is watched in compiled code, too: `getattr(holder, name, None)`.

        A holder of None: torch.compile cannot see it.
        """
        self.can_compile &= holder is not None
        self.guarded[id(holder), name] = holder, name, value

    def children(self, module):
        self.parents[id(module)] = module

    def path(self, module, path):
        """Watch the children of all modules on the way to one."""
        for name in path.split("."):
            self.children(module)
            module = module.get_submodule(name)

    def tensor(self, mapping, name):
        """Watch that there is a tensor of this kind."""
        self._tensors[id(mapping), name] = mapping, name, type(mapping.get(name))

    def called(self, modules):
        """Watch the types, their code and the hooks of modules that are called; what they hold is theirs."""
        self._called += modules

    def _note(self, holder, name, get):
        if (id(holder), name) not in self._noted:
            value = get(name, MISSING)
            self._noted[id(holder), name] = holder  # kept, so that its id stays its own
            self._pairs.append((get, name))
            self._expected.append(value)
            self._frozen.append(_snapshot(value))
            self._can_change |= _can_change(value)

    def start(self):
        """All is noted: take what is compared at every call."""
        self._children = [(m._modules, list(m._modules), list(m._modules.values())) for m in self.parents.values()]
        self._called = list(dict.fromkeys(self._called))
        self._types = list(map(type, self._called))
        self._code = code_of(self._types)
        self._forwards = [m.__dict__.get("forward") for m in self._called]
        self._hooks = list(map(_hooks, self._called))
        self._hooked = [module for module, hooks in zip(self._called, self._hooks, strict=True) if any(hooks)]

    def same_modules(self):
        """Whether the modules are those that were there, of the same types and with the same hooks."""
        for modules, names, values in self._children:
            if [*modules] != names or [*modules.values()] != values:
                return False
        if [*map(type, self._called)] != self._types or not has_same_code(self._code):
            return False
        called = self._called
        if [m.__dict__.get("forward") for m in called] != self._forwards:
            return False
        hooked = [
            m for m in called if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        ]
        return hooked == self._hooked and (not hooked or list(map(_hooks, called)) == self._hooks)

    def same_values(self):
        """Whether everything else that was read is as it was."""
        now = [get(name, MISSING) for get, name in self._pairs]
        if self._can_change or not all(map(is_, now, self._expected)):
            if list(map(_snapshot, now)) != self._frozen:
                return False
        return all([type(mapping.get(name)) is kind for mapping, name, kind in self._tensors.values()])


def _snapshot(value):
    return freeze(value) or id(value)


def _can_change(value):
    """Whether it may become unequal to what it was and stay the same object."""
    return isinstance(value, list | functools.partial) or (isinstance(value, tuple) and any(map(_can_change, value)))


def _hooks(module):
    return [list(hooks.items()) for hooks in hooks_of(module)]
