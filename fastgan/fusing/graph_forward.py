"""The forward of a module with code of its own, run with fused operators where there are groups of layers for them."""

import functools
import inspect
import threading
import types
import warnings
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import guard_scalar

from fastgan import backend
from fastgan.batch_groups import batch_groups, current_batch_groups
from fastgan.fusing.graph_patterns import changes_in_place, find_groups, restore_layout
from fastgan.fusing.group_calls import run_parts, run_stock
from fastgan.fusing.layout import in_stock_layout
from fastgan.fusing.patterns import Part
from fastgan.fusing.tracing.reads import OPTIONS
from fastgan.fusing.tracing.trace import TENSOR, Untraceable, trace
from fastgan.fusing.tracing.watching import Watch, freeze
from fastgan.ops import fused_layer

# A trace takes some 10 ms: of a call with another number each time, say, it would cost more than fusing gains.
MOST_PLANS = 32
_PLANNING = threading.RLock()  # to trace is not for two threads at once
# What decides whether a layer may be part of an operator, and is not its type.
_DECISIVE = frozenset(["groups", "dilation", "padding", "padding_mode", "negative_slope", "num_features"])


class GraphForward:
    """Takes the place of ``container.forward``: the same calls in the same order, groups of them as one operator.

    The container's own forward runs where no kernels would, and for calls that no trace stands for. A trace stands for
    calls in one mode, with the same constants among the arguments, as long as all that it depends on is as it was; it
    is made when the first such call comes, and anew when layers are replaced or get hooks.
    """

    def __init__(self, container):
        self.container = container
        self._prepare()

    def _prepare(self):
        self._forward = type(self.container).forward
        self._parameters = _parameters(self._forward)
        self._names = tuple(p.name for p in self._parameters)
        self._positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in self._parameters)
        self._plans, self._warned = {}, False
        self._count, self._calls, self._refused = 0, 0, 0  # of plans made, and of calls
        # A constant to torch.compile, which cannot trace a trace; what comes of it is an attribute that it can guard.
        self._find = backend.constant_result(lambda key: self._find_plan(key))
        look_like_own(self, self.container)

    def __getstate__(self):
        return {"container": self.container}  # copies and pickles trace anew

    def __setstate__(self, state):
        self.container = state["container"]
        self._prepare()

    def __call__(self, *args, **kwargs):
        container = self.container
        compiling = torch.compiler.is_compiling()
        if not compiling and type(container).forward is not self._forward:
            self._prepare()
        given, fits = self._bind(args, kwargs)
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        if fits and self._wants_graph(given, tensors):
            found = self._find(self._kind(given))
            plan = None if found is None else getattr(self, found, None)  # another thread may have just forgotten it
            if plan is not None:
                run, guarded, parents = plan
                # All is as it was, or the plan would be another; but only here torch.compile sees what it depends on.
                if not compiling or (guarded is not None and _as_it_was(guarded, parents)):
                    return run(container, *tensors)
        forward, parts = functools.partial(type(container).forward, container), current_batch_groups()
        if parts > 1 and any([isinstance(m, nn.modules.batchnorm._BatchNorm) for m in container.modules()]):
            return _in_parts(forward, parts, args, kwargs)
        return forward(*args, **kwargs)

    def _wants_graph(self, given, tensors):
        """Whether there are kernels where any of the arguments is, and nobody else traces it to see the layers."""
        if any([isinstance(value, fx.Proxy) for value in given.values()]):
            return False
        return current_batch_groups() > 1 or any([fused_layer.may_have_kernels(tensor) for tensor in tensors])

    def kind_of(self, args, kwargs):
        """What is known of a call in advance, by which its CallPlan is found; None of one that does not fit."""
        given, fits = self._bind(args, kwargs)
        return self._kind(given) if fits else None

    def plan(self, kind=None):
        """The CallPlan of a kind of calls; if none is given, of those with tensors for all that has no default."""
        if type(self.container).forward is not self._forward:
            self._prepare()
        if not self._names:
            return CallPlan("it takes any number of arguments")
        needed = [p.name for p in self._parameters if p.default is p.empty]
        return self._plan_for(kind or (self.container.training, tuple(needed), ()))

    def _bind(self, args, kwargs):
        """({name: what is given for it}, whether all of it has a name of its own)."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        return given, len(args) <= self._positional and len(given) == len(args) + len(kwargs)

    def _kind(self, given):
        """(mode, names of tensors, constants with their names)."""
        names = tuple([name for name, value in given.items() if isinstance(value, torch.Tensor)])
        constants = tuple([(name, _constant(value)) for name, value in given.items() if name not in names])
        return self.container.training, names, constants

    def _find_plan(self, key):
        """The name of the attribute that runs calls of this kind, or None where the container's own forward has to."""
        plan = self._plan_for(key)
        return plan.attribute if plan.run is not None else None

    def _plan_for(self, key):
        _, names, constants = key
        if constants:
            key = freeze(key)
            if key is None:
                return CallPlan("it is called with something that is neither a tensor nor a constant")
        plans = self._plans.get(key, ())
        for i, plan in enumerate(plans):
            if plan.watch.holds():
                plan.used = self._calls = self._calls + 1
                if i:
                    with _PLANNING:
                        plans.remove(plan)
                        plans.insert(0, plan)
                return plan
        with _PLANNING:
            return self._new_plan(key, names, constants)

    def _new_plan(self, key, names, constants):
        plans = self._plans.get(key, [])
        if plans and plans[0].watch.holds():  # which another thread has made meanwhile
            return plans[0]
        for plan in [plan for plan in plans if not plan.watch.same_modules()]:
            self._forget(plan)
        every = [plan for plans in self._plans.values() for plan in plans]
        if len(every) >= MOST_PLANS:
            self._refused += 1
            if self._refused % MOST_PLANS:  # one in so many may be the first of many calls that are alike
                return self._too_many(names, constants)
            self._forget(min(every, key=lambda plan: plan.used))
        plan = plan_call(self.container, dict.fromkeys(names, TENSOR) | dict(constants))
        self._count += 1
        plan.attribute, plan.used = f"_run_{self._count}", self._calls
        parents = tuple((module, _children(module)) for module in plan.watch.parents.values())
        guarded = tuple(plan.watch.guarded.values()) if plan.watch.can_compile else None
        setattr(self, plan.attribute, (plan.run, guarded, parents))
        self._plans.setdefault(key, []).insert(0, plan)  # last, for other threads that look through them
        return plan

    def _forget(self, plan):
        for key, plans in list(self._plans.items()):
            if plan in plans:
                plans.remove(plan)
                if not plans:
                    del self._plans[key]
        self.__dict__.pop(plan.attribute)

    def _too_many(self, names, constants):
        why = f"it was called in more than {MOST_PLANS} ways: other constants or attributes each time"
        if not self._warned:
            self._warned = True
            given = ", ".join([*names, *(f"{name}={value!r}" for name, value in constants)])
            text = f"{type(self.container).__name__}.forward({given}) and most other new calls run stock: {why}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return CallPlan(why)


def _in_parts(forward, parts, args, kwargs):
    """forward(*args, **kwargs) of each of the batch's equal parts: layers that run by themselves know of none."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if len({tensor.shape[:1] for tensor in tensors}) != 1 or not tensors[0].dim() or len(tensors[0]) % parts:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise RuntimeError(f"cannot cut the batch into {parts} equal parts: the forward got tensors of {shapes}")
    results = []
    for i in range(parts):
        own = [value.chunk(parts)[i] if isinstance(value, torch.Tensor) else value for value in args]
        named = {n: v.chunk(parts)[i] if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()}
        with batch_groups(1):
            results.append(forward(*own, **named))
    if not isinstance(results[0], torch.Tensor):
        raise RuntimeError(
            f"no batch to put together of {parts} parts: the forward returned {type(results[0]).__name__}"
        )
    return torch.cat(results)


def _constant(value):
    """The value; a number that torch.compile keeps variable becomes one that it compiles for."""
    compiling = torch.compiler.is_compiling() and isinstance(value, int | float)
    return guard_scalar(value) if compiling else value


def look_like_own(forward, container):
    """Give it what torch.export, torch.jit.trace and others ask a forward for, as it is of the container's own."""
    own = types.MethodType(type(container).forward, container)
    forward.__signature__, forward.__name__ = inspect.signature(own), "forward"
    if hasattr(own, "__code__"):
        forward.__code__ = own.__code__


def is_graph_forward(container):
    return isinstance(container.__dict__.get("forward"), GraphForward)


def _as_it_was(guarded, parents):
    """Whether what was read is the same, and the modules have the same children, as far as torch.compile can tell."""
    for holder, name, value in guarded:
        now = getattr(holder, name, None)
        if isinstance(value, functools.partial):  # to torch.compile no two of them are the same object
            if not isinstance(now, functools.partial) or _parts(now) != _parts(value):
                return False
        elif now is not value if callable(value) or type(value) in OPTIONS else _constant(now) != value:
            return False
    return all([_children(module) == children for module, children in parents])


def _parts(partial):
    return partial.func, partial.args, partial.keywords


def _children(module):
    return tuple([(name, child is None) for name, child in module._modules.items()])


@dataclass(eq=False)
class CallPlan:
    """How one kind of call runs: `run(container, *tensors)`, or None and `reason`, why only stock will do."""

    reason: str = ""
    groups: list = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    run: object = None
    attribute: str | None = None
    used: int = 0  # the number of the last call that it was for


def plan_call(container, arguments):
    """The CallPlan for calls with `arguments` (see `trace`) in the container's present mode."""
    plan = CallPlan()
    try:
        graph = trace(container, arguments, plan.watch)
    except Untraceable as error:
        plan.reason = str(error)
        plan.watch.start()
        return plan
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    modules = [container.get_submodule(path) for path in called]
    plan.watch.called(modules)
    for module in modules:
        for name in _DECISIVE & vars(module).keys():
            plan.watch.key(vars(module), name)
    for path in called:
        plan.watch.path(container, path)
    runs = find_groups(graph, container)
    for run in runs:
        for path in run.passed():  # none of these may get a BatchNorm of the run's
            for module in container.get_submodule(path).modules():
                plan.watch.children(module)
    if any(run.group.asks_who_writes for run in runs):
        plan.watch.inplace(modules)
    plan.watch.start()
    plan.groups = [run.group for run in runs]
    if any(group.fused for group in plan.groups):
        plan.run = _compile(graph, [run for run in runs if run.group.fused], container)
    return plan


def _compile(graph, runs, container):
    """The function of the container's graph in which each of the runs is one call."""
    # A call → the node that the calls one after the other begin with, the convolutions in them, whether those keep
    # their memory.
    calls = {}
    for row in _in_rows(runs):
        x = row[0].nodes[0].args[0]
        with graph.inserting_before(row[0].nodes[0]):
            parts, keep = tuple(_part(graph, run) for run in row), tuple(_keeps_memory(graph, run) for run in row)
            call = graph.call_function(run_row, (x, *parts))
        row[-1].nodes[-1].replace_all_uses_with(call)
        for node in reversed([node for run in row for node in run.nodes]):
            graph.erase_node(node)
        entry, convolutions, kept = calls.get(x, (x, (), ()))
        calls[call] = entry, (*convolutions, *(conv for conv, *_ in parts)), (*kept, *keep)
    for call, in_row in calls.items():
        restore_layout(call, calls, in_stock_layout, *in_row, container=container)
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {type(container).__name__}>", "exec"), scope)
    return scope["forward"]


def _in_rows(runs):
    """The runs, those together of which each begins where the one before ends, and nobody else uses what passes.

    They run where the first one begins: so nothing stands within those before the last, which might have to do with it.
    """
    rows = []
    for run in runs:
        before = rows[-1][-1] if rows else None
        follows = before is not None and before.nodes[-1].next is run.nodes[0]
        if follows and list(before.nodes[-1].users) == [run.nodes[0]] and not before.in_between():
            rows[-1].append(run)
        else:
            rows.append([run])
    return rows


def _part(graph, run):
    """The Part of a run, of nodes: its modules, and numbers that may change, are read at each call."""
    group = run.group
    paths = [node.target if node.op == "call_module" else None for node in run.nodes]
    batch_norm = next((p for p, m in zip(paths, group.modules, strict=True) if m is group.batch_norm), None)
    norm = graph.get_attr(batch_norm) if batch_norm else None
    settings = (group.activation, _negative_slope(graph, group, paths), group.activation_first)
    return (graph.get_attr(paths[0]), norm, *settings, paths[0])


def _negative_slope(graph, group, paths):
    if group.activation != "leaky_relu":
        return 0.0
    path = paths[1 if group.activation_first else -1]
    return group.negative_slope if path is None else graph.get_attr(f"{path}.negative_slope")


def _keeps_memory(graph, run):
    """`Group.keeps_memory` of a run, as far as it is known now; a layer's own flag is read at each call."""
    node = run.nodes[-1]
    if not run.group.ends_in_activation:
        return len(run.nodes) == 1
    if node.op == "call_module":
        return graph.get_attr(f"{node.target}.inplace") if hasattr(run.group.modules[-1], "inplace") else False
    return changes_in_place(node)


def run_row(x, *parts):
    """Groups in a row, each as the fields of a Part: by operators where those have kernels, else by their layers."""
    parts = [Part(*part) for part in parts]
    if fused_layer.has_kernels_for(x):
        return run_parts(x, parts)
    for part in parts:
        x = run_stock(x, part)
    return x


def _parameters(forward):
    """The parameters of a forward after self; () with *args, **kwargs or positional-only ones, so that no call fits."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    variable = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters)
    return () if variable else tuple(parameters)
