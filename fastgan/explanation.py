"""explain: what every convolution of a model runs as, and why."""

from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastgan import backend
from fastgan.command_line import aligned
from fastgan.compile_backend import find
from fastgan.fusing.graph_forward import GraphForward
from fastgan.fusing.group_calls import is_distributed
from fastgan.fusing.patterns import is_sequential, padding_of
from fastgan.fusion import all_groups, check_module, groups_of, plans_of, running_stock
from fastgan.ops.choice import choose, conv_problem
from fastgan.ops.fused_layer import compute_dtype
from fastgan.random_numbers import random_numbers_kept


@dataclass(frozen=True)
class Row:
    """What `explain` knows of one convolution."""

    path: str  # of the convolution inside the model
    pattern: str  # types of the modules that run together
    shape: str  # of its input and output, where inputs were given
    fused: bool
    implementation: str  # of the forward: "triton", "cudnn", "by shape" (one of these), "reference" or "stock"
    reason: str  # why not fused, why no more of it, or why this implementation

    @property
    def runs_as(self):
        return f"fused, {self.implementation}" if self.fused else "stock"


class Explanation(list):
    """The rows of `explain`: a list of Row that prints as a table; `as_dicts()` gives plain data."""

    def __init__(self, title):
        self.title = title
        self.outside = 0  # of a compiled model: how many convolutions are in no graph of the call

    def as_dicts(self):
        return [asdict(row) for row in self]

    def __str__(self):
        head = ("layer", "pattern", "shape", "runs as", "why")
        lines = [head] + [(row.path, row.pattern, row.shape or "-", row.runs_as, row.reason) for row in self]
        first = f"{self.title}: {sum(row.fused for row in self)} of {len(self)} convolutions fused"
        if self.outside:
            first += f"; {self.outside} more in no graph of this call"
        return "\n".join([first, *aligned(lines)])


def explain(model, *inputs, **named_inputs):
    """Say of every convolution in `model` what it runs as: fused or stock, by which implementation, and why.

    Of a model compiled with ``backend="fastgan"`` it shows the convolutions in the graphs that a call captures.

    On CUDA each shape was, or was not, measured to be faster by our Triton kernel than by cuDNN, so a choice can only
    be named where inputs are given; it is that of the forward in the mode in which the model is.

    Args:
        model: an nn.Module, fused or not; it is not changed.
        inputs, named_inputs: what to call it with, to show shapes too, and how such a call runs; without gradients, and
            on copies of its parameters and buffers. What its forward raises is raised.

    Returns:
        An Explanation, which prints as a table: a list of Row (path, pattern, shape, fused, implementation, reason),
        one for each convolution in the order of `model.named_modules()`.

    Raises:
        TypeError: not an nn.Module, or a scripted one.
        ValueError: the model was compiled with ``backend="fastgan"``, and no inputs are given.
    """
    check_module(model)
    if hasattr(model, "dynamo_ctx"):  # of torch.compile
        explain_original = _explain_compiled if _backend_name(model) == "fastgan" else explain
        return explain_original(model._orig_mod, *inputs, **named_inputs)
    calls, kinds = _calls(model, inputs, named_inputs) if inputs or named_inputs else ({}, {})
    groups = {}
    for _, group, container in all_groups(model, kinds):
        groups.setdefault(id(group.modules[0]), []).append((group, container))
    rows = Explanation(type(model).__name__)
    for conv, paths in _convolutions(model):
        path = paths[0]
        sizes, within = calls.get(path, ((), None))
        own = groups.get(id(conv), [])
        group, container = next((each for each in own if within is None or each[1] in within), (None, None))
        if not own:
            reason = _why_untouched(model, paths, kinds)
        elif group is None:
            reason = f"the layers of its {type(own[-1][1]).__name__} are called one by one"
        elif not group.fused:
            reason = group.reason
        else:
            reasons = group.reason, _whose_statistics(group.batch_norm)
            rows.append(_row(path, group.pattern, sizes, _implementation(group, sizes), *reasons))
            continue
        rows.append(_row(path, type(conv).__name__, sizes, None, reason))
    return rows


def _convolutions(model):
    """[(convolution, all paths that it has in the model)] in the order of `named_modules`, whose path is the first."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.modules.conv._ConvNd):
            found.setdefault(id(module), (module, []))[1].append(path)
    return list(found.values())


def _row(path, pattern, sizes, choice, *reasons):
    """The Row of a convolution between tensors of these sizes.

    Args:
        choice: (implementation, why it), or None if stock runs it.
        reasons: what else there is to say, or "".
    """
    implementation, why = ("stock", "") if choice is None else choice
    shape = " → ".join("×".join(map(str, size)) for size in sizes)
    return Row(path, pattern, shape, choice is not None, implementation, "; ".join(filter(None, (*reasons, why))))


def _whose_statistics(batch_norm):
    if isinstance(batch_norm, nn.SyncBatchNorm) and not is_distributed():
        return "torch.distributed is not up: SyncBatchNorm takes the statistics of this process"
    return ""


def _implementation(group, sizes):
    """(implementation, reason) of a fused group's forward; sizes: those of its input and output, where known."""
    conv = group.modules[0]
    parameter = next(conv.parameters())  # to look at a parametrized weight would compute it
    channels = (conv.in_channels, conv.out_channels) if conv.transposed else (conv.out_channels, conv.in_channels)
    geometry = (conv.transposed, conv.stride, padding_of(conv))
    return _choice(parameter, sizes, (*channels, *conv.kernel_size), geometry, group.then)


def _choice(like, sizes, weight_shape, geometry, then):
    """(implementation, reason) of a convolution of tensors like `like`."""
    device, dtype = like.device, compute_dtype(like)
    implementation, reason = backend.select(device, dtype)
    if implementation == "reference" or device.type != "cuda" or backend.forces_triton():
        return implementation, reason
    if not sizes:
        return "by shape", "Triton or cuDNN, as measured for each shape: explain(model, inputs) says which"
    x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in (sizes[0], weight_shape))
    choice = choose(conv_problem(x, weight, *geometry, sizes[1][2:], then=then), device)
    return choice.implementation, choice.why


def _backend_name(compiled):
    """The name under which torch.compile was given its backend, if it was one."""
    from torch._dynamo.eval_frame import innermost_backend

    return getattr(innermost_backend(compiled.dynamo_ctx.callback), "compiler_name", None)


def _explain_compiled(model, *inputs, **named_inputs):
    """The rows of a model that was compiled with backend="fastgan"."""
    if not inputs and not named_inputs:
        raise ValueError("a compiled model is explained by the graphs of a call: inputs must be given, got none")
    rows = Explanation(f"{type(model).__name__}, compiled")

    def record(graph_module, example_inputs):
        rows.extend(map(_captured_row, find(graph_module.graph)))
        return graph_module.forward

    _call(torch.compile(model, backend=record), inputs, named_inputs)
    convolutions = sum(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    rows.outside = max(0, convolutions - len(rows))
    return rows


def _captured_row(found):
    sizes, choice = [tuple(value.shape) for value in (found.x, found.result)], None
    if found.fused:
        choice = _choice(found.x, sizes, tuple(found.weight.shape), found.where, found.then)
    return _row(found.path, found.pattern, sizes, choice, found.reason)


def _why_untouched(model, paths, kinds):
    """Why a convolution is in no group that fuse took over: what the nearest module says whose forward may call it."""
    if "" in paths:
        return "a convolution by itself: fuse works on the module that calls it"
    whys = [_why_untouched_at(model, path, kinds) for path in paths]
    return next((why for why, is_called in whys if is_called), whys[0][0])


def _why_untouched_at(model, path, kinds):
    """(why, whether that module may call it under this one of its paths)."""
    parts = path.split(".")
    why = "", False
    for end in reversed(range(len(parts))):
        container, name = model.get_submodule(".".join(parts[:end])), ".".join(parts[end:])
        if type(container).forward is nn.Module.forward and "forward" not in container.__dict__:
            continue  # a ModuleList, say: others call what it holds
        called = kinds.get(id(container), ())
        for group in groups_of(container, called):
            if group.names[0] == name:
                return (group.reason if not group.fused else "fastgan.fuse was not called on it"), True
        if not is_sequential(container) and not why[0]:
            reason = next(filter(None, [plan.reason for plan in plans_of(container, called)]), "")
            said = reason or f"it does not call {name}"
            why = f"{type(container).__name__}.forward stays as it is: {said}", bool(reason)
    return why


def _calls(model, inputs, named_inputs):
    """What one call shows, which leaves the model as it is.

    Returns:
        {path of a convolution: ((input shape, output shape), the fused containers within whose forward it ran)},
        {id of a fused container: kinds of its calls, as `GraphForward.kind_of` gives them}.
    """
    calls, kinds, handles, at_work = {}, {}, [], []

    def hook_for(path):
        def hook(module, args, kwargs, output):
            _, within = calls.get(path, (None, at_work))
            x = args[0] if args else kwargs["input"]
            sizes = tuple(x.shape), tuple(output.shape)
            calls[path] = sizes, [container for container in within if container in at_work]

        return hook

    def noting(container, fused_forward):
        def forward(*args, **kwargs):
            if isinstance(fused_forward, GraphForward):
                kinds.setdefault(id(container), []).append(fused_forward.kind_of(args, kwargs))
            at_work.append(container)
            try:
                return type(container).forward(container, *args, **kwargs)
            finally:
                at_work.pop()

        return forward

    try:
        for path, module in model.named_modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                handles.append(module.register_forward_hook(hook_for(path), with_kwargs=True))
        with running_stock(model) as fused_forwards:
            for container, fused_forward in fused_forwards:
                container.forward = noting(container, fused_forward)
            _call(model, inputs, named_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, kinds


def _call(model, inputs, named_inputs):
    """Call the model without gradients, and so that nothing shows of it: in training a forward may change tensors."""
    with torch.no_grad(), random_numbers_kept(), _on_copies(model):
        model(*inputs, **named_inputs)


@contextmanager
def _on_copies(model):
    """Within it the model has copies of its parameters and buffers; scripted modules have theirs put back at the end.

    torch.func.functional_call leaves some of its copies in a module that has several names.
    """
    scripted, others = [], []
    for module in model.modules():
        (scripted if isinstance(module, torch.jit.ScriptModule) else others).append(module)
    owned = [(own, dict(own)) for module in others for own in (module._parameters, module._buffers)]
    copies = {}  # by the id of the original, which may be in several modules
    kept = [(buffer, buffer.clone()) for module in scripted for buffer in module.buffers()]
    try:
        for own, originals in owned:
            for name, tensor in originals.items():
                if tensor is not None and not is_lazy(tensor):
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _copy(tensor)
                    own[name] = copies[id(tensor)]
        yield
    finally:
        for own, originals in owned:
            own.clear()
            own.update(originals)
        for buffer, values in kept:
            buffer.copy_(values)


def _copy(tensor):
    values = tensor.detach().clone()
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
