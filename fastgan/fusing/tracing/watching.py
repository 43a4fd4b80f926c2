"""What a trace depends on, so that each later call can tell whether it still stands, in a few microseconds."""

import functools
import types

import torch

from fastgan.fusing.layer_code import any_is_customized, code_of, has_same_code, hooks_of, own_code

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
        self._noted, self._values, self._frozen, self._can_change = {}, [], [], False
        self._children, self._tensors, self._called = [], {}, []

    def key(self, mapping, name):
        """Watch `mapping[name]`, there or not."""
        self._note(mapping, name, mapping.get)

    def attribute(self, holder, name):
        """Watch `getattr(holder, name)` of a class, a function or a cell."""
        self._note(holder, name, functools.partial(getattr, holder))

    def guard(self, holder, name, value):
        """Have torch.compile watch `getattr(holder, name, None)`, too, as `key` and `attribute` do in eager code.

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

    def inplace(self, modules):
        """Watch which layers in the modules write to their input, and what the modules consist of."""
        for part in (part for module in modules for part in module.modules()):
            if "inplace" in vars(part):
                self.key(vars(part), "inplace")
            if part._modules:
                self.children(part)

    def _note(self, holder, name, get):
        if (id(holder), name) not in self._noted:
            value = get(name, MISSING)
            self._noted[id(holder), name] = holder  # kept, so that its id stays its own
            self._values.append((get, name, value))
            self._frozen.append(_snapshot(value))
            self._can_change |= _can_change(value)

    def start(self):
        """All is noted: take what is compared at every call."""
        self._children = [(m._modules, tuple(m._modules), tuple(m._modules.values())) for m in self.parents.values()]
        self._called = tuple(dict.fromkeys(self._called))
        self._types = tuple(map(type, self._called))  # parametrizations change those
        self._code = code_of(self._types)
        changed = [module for module in self._called if any_is_customized([vars(module)])]
        self._changed = [(module, _changes_of(module)) for module in changed]
        self._plain = [vars(module) for module in self._called if module not in changed]

    def holds(self):
        return self.same_modules() and self.same_values()

    # Loops, because of a container of few layers they take less time than what builds lists.
    def same_modules(self):
        """Whether the modules are those that were there, of the same types and with the same hooks."""
        for modules, names, values in self._children:
            if tuple(modules.values()) != values or tuple(modules) != names:
                return False
        if tuple(map(type, self._called)) != self._types or not has_same_code(self._code):
            return False
        for module, changes in self._changed:
            if _changes_of(module) != changes:
                return False
        return not any_is_customized(self._plain)

    def same_values(self):
        """Whether everything else that was read is as it was."""
        for mapping, name, kind in self._tensors.values():
            if type(mapping.get(name)) is not kind:
                return False
        for get, name, value in self._values:
            if get(name, MISSING) is not value:
                break
        else:
            if not self._can_change:
                return True
        return [_snapshot(get(name, MISSING)) for get, name, _ in self._values] == self._frozen


def _snapshot(value):
    return freeze(value) or id(value)


def _can_change(value):
    """Whether it may become unequal to what it was and stay the same object."""
    return isinstance(value, list | functools.partial) or (isinstance(value, tuple) and any(map(_can_change, value)))


def _changes_of(module):
    """The hooks and the code that a module has for itself."""
    return [list(hooks.items()) for hooks in hooks_of(module)], own_code(vars(module))
