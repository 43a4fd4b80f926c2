"""explain: what every convolution of a model runs as, and why."""

import copy
from dataclasses import asdict, dataclass

import torch
from torch import nn

from fastgan import backend
from fastgan.fusion import all_groups, call_order, check_module, groups_of, unfuse
from fastgan.ops.choice import choose, conv_problem


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

    def __init__(self, title, rows=()):
        super().__init__(rows)
        self.title = title

    def as_dicts(self):
        return [asdict(row) for row in self]

    def __str__(self):
        head = ("layer", "pattern", "shape", "runs as", "why")
        lines = [head] + [(row.path, row.pattern, row.shape or "-", row.runs_as, row.reason) for row in self]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        count = sum(row.fused for row in self)
        return "\n".join([f"{self.title}: {count} of {len(self)} convolutions fused", *text])


def explain(model, *inputs):
    """Say of every convolution in `model` what it runs as: fused or stock, by which implementation, and why.

    On CUDA each shape was, or was not, measured to be faster by our Triton kernel than by cuDNN, so a choice can only
    be named where inputs are given; it is that of the forward in the mode in which the model is.

    Args:
        model: an nn.Module, fused or not; it is not changed.
        inputs: what to call it with, to show shapes too; runs on a copy, without gradients.

    Returns:
        An Explanation: a list of Row, one for each convolution in the order of `model.named_modules()`.

    Raises:
        TypeError: not an nn.Module, or a scripted one.
    """
    check_module(model)
    shapes = _shapes(model, inputs) if inputs else {}
    groups = all_groups(model)
    rows = Explanation(type(model).__name__)
    for path, conv in model.named_modules():
        if not isinstance(conv, nn.modules.conv._ConvNd):
            continue
        sizes = shapes.get(path, ())
        shape = " → ".join("×".join(map(str, size)) for size in sizes)
        group = groups.get(path)
        if group is None or not group.fused:
            reason = group.reason if group else _why_untouched(model, path)
            rows.append(Row(path, type(conv).__name__, shape, False, "stock", reason))
            continue
        implementation, reason = _implementation(group, sizes)
        reason = "; ".join(filter(None, (group.reason, reason)))
        rows.append(Row(path, group.pattern, shape, True, implementation, reason))
    return rows


def _implementation(group, sizes):
    """(implementation, reason) of a fused group's forward; sizes: those of its input and output, where known."""
    conv = group.modules[0]
    device, dtype = conv.weight.device, conv.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    implementation, reason = backend.select(device, dtype)
    if implementation == "reference" or device.type != "cuda" or backend.forces_triton():
        return implementation, reason
    if not sizes:
        return "by shape", "Triton or cuDNN, as measured for each shape: explain(model, inputs) says which"
    x, (*_, height, width) = torch.empty(sizes[0], dtype=dtype, device="meta"), sizes[1]
    where = (isinstance(conv, nn.ConvTranspose2d), conv.stride, conv.padding)
    choice = choose(conv_problem(x, conv.weight, *where, (height, width), then=group.then), device)
    return choice.implementation, choice.why


def _why_untouched(model, path):
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if path == "":
        return "a convolution by itself: fuse works on the module that calls it"
    order = call_order(parent)
    if order is None:
        return f"{type(parent).__name__}.forward is not a plain chain of its children"
    for group in groups_of(parent, order):
        if group.names[0] == name and not group.fused:
            return group.reason
    return "fastgan.fuse was not called on it"


def _shapes(model, inputs):
    """{path of a convolution: (input shape, output shape)} of one call, on an unfused copy, which keeps the model."""
    shapes, stock = {}, unfuse(copy.deepcopy(model))

    def hook_for(path):
        def hook(module, args, output):
            shapes[path] = tuple(args[0].shape), tuple(output.shape)

        return hook

    for path, module in stock.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            module.register_forward_hook(hook_for(path))
    devices = [tensor.device for tensor in inputs if isinstance(tensor, torch.Tensor) and tensor.is_cuda]
    with torch.no_grad(), torch.random.fork_rng(devices):
        stock(*inputs)
    return shapes
