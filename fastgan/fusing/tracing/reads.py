"""What a forward reads of its module and of the modules below it, while it is traced."""

import argparse
import copy
import functools
import sys
import threading
import types
from contextlib import contextmanager
from pathlib import Path

from torch import fx, nn

from fastgan.fusing.tracing.code import TORCH, Untraceable, of_torch
from fastgan.fusing.tracing.watching import MISSING, freeze

_CONTAINER_FILE = sys.modules[nn.Sequential.__module__].__file__
_HERE = Path(__file__).parent
OPTIONS = (argparse.Namespace, types.SimpleNamespace)  # objects that hold attributes and do nothing
# Look-ups that are made in these files are the tracer's own, and none of the forward's.
_OURS = frozenset(map(str, [*_HERE.glob("*.py"), _HERE.with_name("layer_code.py"), _HERE.with_name("patterns.py")]))


class Reads:
    """Has `watch` note what a traced forward looks up on modules, and refuses what cannot be watched.

    Parameters and buffers are nodes of the graph: what is in them is no concern of the trace.
    """

    def __init__(self, root, code, watch, tracer):
        self._root, self._code, self._watch, self._tracer = root, code, watch, tracer
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._thread = threading.get_ident()
        self._copies = {}  # (id of module, name) → (name, copy that the forward got, what was in it)
        self._computed_stand_in = ""  # the name of a property that gave one
        self._given = set()  # ids of the modules that the forward can have got hold of
        self._stand_ins = {}  # id of an object of options → what the forward gets for it
        self.values = {}  # (id of module, name) → name, of what is no module and no tensor

    @contextmanager
    def recorded(self):
        """Within it every look-up on a module comes here first.

        nn.Module is where all of them can be met without a class of our own, which the classes of some models would
        take notice of.
        """
        before = vars(nn.Module).get("__getattribute__")

        def getattribute(module, name):
            if id(module) in self._paths and threading.get_ident() == self._thread:
                file = sys._getframe(1).f_code.co_filename
                if file not in _OURS and not file.startswith(TORCH):
                    return self._read(module, name)
                if name == "_modules" and file == _CONTAINER_FILE:  # iterated, indexed, measured
                    self._look_in(module)
            return object.__getattribute__(module, name)

        self._watch.children(self._root)
        nn.Module.__getattribute__ = getattribute
        try:
            yield
        finally:
            if before is None:
                del nn.Module.__getattribute__
            else:
                nn.Module.__getattribute__ = before

    def check(self):
        """Raise Untraceable for what shows only when the forward has run."""
        for name, given, content in self._copies.values():
            if freeze(given) != content:
                raise Untraceable(f"it sets {name}")
        if self._code.asks_self and self._computed_stand_in:
            raise Untraceable(f"it asks whether two are the same object, and reads {self._computed_stand_in}")

    def _named(self, module, name):
        return ".".join(["self", *filter(None, [self._paths[id(module)]]), name])

    def _read(self, module, name):
        """What the forward gets for module.name, noted: a computed attribute, its own, or its class's."""
        if name == "__getattr__":
            return functools.partial(self._look_up, module)
        attributes, cls = object.__getattribute__(module, "__dict__"), type(module)
        of_class = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), MISSING)
        self._watch.children(module)
        if hasattr(type(of_class), "__set__"):
            return self._computed(module, name, of_class)
        self._watch.key(attributes, name)
        if name in attributes:
            return self._constant(module, name, attributes[name])
        if of_class is not MISSING:
            self._watch.attribute(cls, name)
            return self._of_class(module, name, of_class)
        return self._registered(module, name, attributes)

    def _computed(self, module, name, descriptor):
        getter = getattr(descriptor, "fget", None)
        if not isinstance(descriptor, property) or not isinstance(getter, types.FunctionType) or of_torch(getter):
            raise Untraceable(f"it reads {self._named(module, name)}, which is computed")
        self._watch.attribute(type(module), name)
        self._code.function(getter, type(module))
        value = object.__getattribute__(module, name)
        if isinstance(value, fx.Proxy):
            self._computed_stand_in = self._named(module, name)
        return value

    def _constant(self, module, name, value):
        """A value that the forward reads as it is: watched, and of lists a copy, which shows what is done to it."""
        full = self.values[id(module), name] = self._named(module, name)
        if type(value) in OPTIONS:
            self._watch.guard(module, name, value)
            return self._options(full, value)
        frozen = freeze(value)
        if frozen is None:
            raise Untraceable(f"it reads {full}, a {type(value).__name__}, which can change")
        self._watch.guard(module, name, value)
        if isinstance(value, list | tuple):
            self._check_parts(value, full)
            return self._copies.setdefault((id(module), name), (full, copy.deepcopy(value), frozen))[1]
        self._code.value(value, full)
        if isinstance(value, types.FunctionType) and vars(value).keys() - {"__wrapped__"}:
            raise Untraceable(f"it reads {full}, a function with attributes")  # which it may read, unnoticed
        return value

    def _options(self, name, options):
        """What the forward gets for an object that holds options: what it reads of that is watched, too."""
        if id(options) not in self._stand_ins:
            self._paths[id(options)] = name.removeprefix("self.")
            kind, methods = type(options), dict.fromkeys(("__eq__", "__ne__", "__repr__"), _refuse_options)
            methods["__getattribute__"] = lambda _, name: self._option(options, name)
            self._stand_ins[id(options)] = type(kind.__name__, (kind,), methods)()
        return self._stand_ins[id(options)]

    def _option(self, options, name):
        attributes = vars(options)
        self._watch.key(attributes, name)
        if name in attributes:
            return self._constant(options, name, attributes[name])
        if hasattr(type(options), name):
            raise Untraceable(f"it uses {self._named(options, name)}")
        self._watch.guard(options, name, None)
        raise AttributeError(f"{type(options).__name__!r} object has no attribute {name!r}")

    def _check_parts(self, values, name):
        for value in values:
            if isinstance(value, list | tuple):
                self._check_parts(value, name)
            else:
                self._code.value(value, name)

    def _of_class(self, module, name, value):
        full = self._named(module, name)
        if isinstance(value, staticmethod):
            self._code.value(value.__func__, full)
        elif isinstance(value, types.FunctionType):
            self._code.function(value, type(module))
            self._watch.guard(type(module), name, value)
            if value in (nn.Module.children, nn.Module.named_children):
                self._look_in(module)
        elif hasattr(type(value), "__get__"):
            raise Untraceable(f"it reads {full}, a {type(value).__name__}")
        else:
            return self._constant(module, name, value)
        return object.__getattribute__(module, name)

    def _registered(self, module, name, attributes):
        for kind in ("_parameters", "_buffers"):
            values = attributes[kind]
            self._watch.tensor(values, name)
            if values.get(name) is not None:
                path = ".".join(filter(None, [self._paths[id(module)], name]))
                return self._tracer.create_proxy("get_attr", path, (), {})
        child = attributes["_modules"].get(name)
        if child is None:
            self._watch.guard(module, name, None)
            self.values[id(module), name] = self._named(module, name)
        if child is not None:
            self._give(child)
        elif _replaces_getattr(type(module)):
            raise Untraceable(f"it reads {self._named(module, name)}, which is computed")
        return object.__getattribute__(module, name)  # which fails: nn.Module.__getattr__ is asked then

    def _look_up(self, module, name):
        """What the forward gets for module.__getattr__(name)."""
        self._watch.children(module)
        try:
            return self._registered(module, name, object.__getattribute__(module, "__dict__"))
        except AttributeError:
            return nn.Module.__getattr__(module, name)

    def _look_in(self, module):
        """The forward gets hold of the children of a module."""
        self._watch.children(module)
        for child in object.__getattribute__(module, "__dict__")["_modules"].values():
            if child is not None:
                self._give(child)

    def _give(self, module):
        if id(module) not in self._given:
            self._given.add(id(module))
            self._code.type(type(module))
            if isinstance(module, nn.ParameterList | nn.ParameterDict):
                raise Untraceable(f"it uses {self._named(module, '')[:-1]}, a {type(module).__name__}")


def _refuse_options(options, *_):
    raise Untraceable(f"it compares or prints a {type(options).__name__}")


def _replaces_getattr(cls):
    return any("__getattr__" in vars(base) for base in cls.__mro__ if base is not nn.Module)
