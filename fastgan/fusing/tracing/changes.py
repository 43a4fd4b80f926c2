"""What modules that a forward calls may change of what it reads: a trace, in which they are single nodes, runs none."""

import functools
import types

from fastgan.fusing.layer_code import hooks_of
from fastgan.fusing.tracing.bytecode import instructions_of, is_attribute_of
from fastgan.fusing.tracing.code import Untraceable, is_of_torch, of_torch

_CHANGING = frozenset(["append", "extend", "insert", "clear", "pop", "remove", "sort", "reverse"])  # methods of a list
# With these code may set what it does not name.
_SETTING = frozenset("setattr delattr vars globals exec eval __dict__ __setattr__ __delattr__".split())


def check_unchanged_by(called, reads):
    """Raise Untraceable where the call of a module may change a value that the forward reads, as far as code tells.

    Args:
        called: {path: module}.
        reads: {(id of a module or of global names, name): what the forward calls it}.
    """
    for path, module in called.items():
        for function, holder in _functions_of(module):
            if reads and not _SETTING.isdisjoint(_names(function.__code__)):
                raise Untraceable(f"it reads what {path} may set")
            for name, is_global, of_self in _changes(function.__code__):
                for (owner, attribute), full in reads.items():
                    own = owner == (id(function.__globals__) if is_global else holder)
                    if attribute == name and (own or (not is_global and (holder is None or not of_self))):
                        raise Untraceable(f"it reads {full}, which {path} may set")


def _functions_of(module):
    """(function, id of the module that its first argument is, if that is known) of what runs in a call."""
    for part in module.modules():
        if not is_of_torch(type(part)):
            yield from _reached(type(part).forward, type(part), id(part), _types_held(part))
        for hook in [hook for hooks in hooks_of(part) for hook in hooks.values()]:
            hook = getattr(hook, "func", hook)  # of a functools.partial
            if isinstance(hook, types.FunctionType):
                yield from _reached(hook)
            else:  # a method, or an object that can be called
                own = getattr(hook, "__self__", hook)
                yield from _reached(getattr(hook, "__func__", type(hook).__call__), type(own), id(own))


def _types_held(module):
    """The types of what a module has as attributes, as far as they are somebody's own."""
    return {kind for kind in map(type, vars(module).values()) if kind.__module__ != "builtins"}


def _reached(function, cls=object, holder=None, held=()):
    """A function and those that it calls by name: methods and properties of the class, or of classes of objects that an
    instance holds, and functions beside them."""
    reached = {function: holder} if _is_somebodys(function) else {}
    functions = list(reached)
    for function in functions:  # grows
        for name in _names(function.__code__):
            own = getattr(cls, name, None)
            candidates = [(getattr(own, "fget", own), holder), (function.__globals__.get(name), None)]
            candidates += [(getattr(kind, name, None), None) for kind in held]
            for found, of in candidates:
                if _is_somebodys(found) and found not in reached:
                    reached[found] = of
                    functions.append(found)
    return reached.items()


def _is_somebodys(function):
    return isinstance(function, types.FunctionType) and not of_torch(function)


def _codes(code):
    return [code, *(inner for each in code.co_consts if isinstance(each, types.CodeType) for inner in _codes(each))]


def _names(code):
    return {name for each in _codes(code) for name in each.co_names}


@functools.lru_cache(maxsize=1024)
def _changes(code):
    """{(name, whether it is a global one, whether of the first argument)} of what code sets, or changes as a list."""
    found, first = set(), (*code.co_varnames, "")[0]
    for each in _codes(code):
        instructions = instructions_of(each)
        changes_items = any(i.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") for i in instructions)
        for at, (kind, name) in enumerate((i.opname, i.argval) for i in instructions):
            if kind in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                found.add((name, True, False))
            changed = changes_items or (at + 1 < len(instructions) and instructions[at + 1].argval in _CHANGING)
            if kind in ("STORE_ATTR", "DELETE_ATTR") or (kind == "LOAD_ATTR" and changed):
                found.add((name, False, each is code and is_attribute_of(first, instructions, at)))
    return found
