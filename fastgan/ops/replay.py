"""Functions that start kernels, remembered by what they did, so that a call like an earlier one only does that again.

What such a function does (choices, tiles, memory to allocate, kernels to start) depends on what its arguments look like
and not on their numbers, but finding it out takes longer in Python than small kernels run. The second call with
arguments of one kind is recorded: PyTorch's operators as a dispatch mode sees them, kernels as `launch` reports them.
Later ones allocate and start the same, on their own tensors, past Triton's look at each argument.

It is for code on a GPU that is not captured in a CUDA graph.
"""

import functools
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fastgan import backend
from fastgan.kernels import launch as launching
from fastgan.ops import choice

MOST_PLANS = 512  # of one function: shapes that never come again are not to fill the memory
_SEEN, _NEVER = "seen once", "cannot be replayed"
ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}


class Replayed:
    """``function``, whose Python is left out from the third call with arguments of one kind on.

    Args:
        function: of tensors, lists of tensors and constants, by position, the first a tensor. It starts kernels and
            calls PyTorch's operators, decides by metadata alone, and returns a tensor, None, or a tuple of such. What
            it asks for besides its arguments is in `_surroundings`.
        consumes: whether it empties the lists, so that what it is done with need not wait in memory for its end.
    """

    def __init__(self, function, consumes=False):
        self._function, self._consumes = function, consumes
        self._plans = {}

    def __call__(self, *arguments):
        # A capture is made once: it has nothing to gain.
        if not arguments[0].is_cuda or launching.stood_in or torch.cuda.is_current_stream_capturing():
            return self.function(*arguments)
        return self.replay(*arguments)

    def function(self, *arguments):
        """The call as it is, out of autocast's reach: on a GPU it would cast for the convolutions of a backward."""
        with backend.without_autocast(arguments[0].device.type):
            return self._function(*arguments)

    def replay(self, *arguments):
        """The call, recorded or replayed, on any device."""
        key = (*_surroundings(), *_signature(arguments))
        plan = self._plans.get(key)
        if type(plan) is Plan:
            return plan.run(arguments)
        if plan is _SEEN:
            recorder = Recorder(arguments, self._consumes)
            result = recorder.record(self.function)
            self._plans[key] = recorder.plan(result) or _NEVER
            return result
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = _SEEN
        return self.function(*arguments)


def _surroundings():
    """What else decides about it. PyTorch's convolutions give another layout where they are not cuDNN's."""
    precision = backend.matmul_precision(torch.float32)
    return choice.generation(), backend.forces_triton(), precision, torch._C._get_cudnn_enabled()


def _signature(arguments):
    """What decides about a call: equal for two that do the same."""
    found = []
    for value in arguments:
        if isinstance(value, Tensor):
            found += value.dtype, value.shape, value.stride(), value.data_ptr() % 16, value.device
        else:
            found.append(_signature(value) if type(value) is list else value)
    return tuple(found)


def _tensors(values):
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class _Place(int):
    """Where a tensor is among those of a call: its arguments, then what the steps give."""


class _Address(int):
    """The same of a tensor of which a kernel is told the address: of each tensor itself Triton would ask CUDA."""


class _Stream:
    """Where a kernel is told the stream of the call."""


class Recorder(TorchDispatchMode):
    """Notes the steps of one call, between numbered tensors.

    A step is (function, arguments, keywords, place of the result or list of places, whether it does more than give
    results): an operator of PyTorch, an allocation, or the start of a kernel, which has no results.
    """

    def __init__(self, arguments, consumes):
        super().__init__()
        self._arguments, self._device = arguments, arguments[0].device
        # Tensors are not kept alive, or a recorded call would take more memory than others; so ids and addresses of
        # those that are gone may come again.
        self._count, self._places, self._by_address = 0, WeakTensorKeyDictionary(), {}
        self._steps = []
        self._pattern, self._given = self._pattern_of(arguments), sum(1 for _ in _tensors(arguments))
        self._lists = [i for i, value in enumerate(arguments) if consumes and type(value) is list]
        self._passing = {self._places[tensor] for i in self._lists for tensor in _tensors([arguments[i]])}
        # What is one memory now need not be at the next call.
        self._possible = len(self._by_address) == self._given

    def record(self, function):
        """function(*arguments), observed."""
        before, launching.thread.on_launch = getattr(launching.thread, "on_launch", None), self._start
        try:
            with self:
                return function(*self._arguments)
        finally:
            launching.thread.on_launch = before

    def plan(self, result):
        """The Plan of what was recorded, or None where it cannot be done again."""
        results = result if isinstance(result, tuple) else (result,)
        kernels = any(places == [] and effect for *_, places, effect in self._steps)
        if not (self._possible and kernels and self._knows(results)):
            return None
        results = self._placed(results)
        steps = _needed(self._steps, _places(results), set(range(self._given)) - self._passing)
        return Plan(self._device, self._pattern, self._lists, steps, results, isinstance(result, tuple))

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator is torch.ops.aten.detach.default and self._knows(args):  # without gradients the tensor itself
            result = operator(*args)
            self._places[result] = self._places[args[0]]
            return result
        known = self._knows(args) and self._knows(kwargs.values())
        placed = self._placed(args), {name: self._placed(value) for name, value in kwargs.items()}
        result = operator(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else result
        plain = isinstance(results, list | tuple) and all(each is None or isinstance(each, Tensor) for each in results)
        if not (known and plain):
            self._possible = False
            return result
        function = operator
        if operator in ALLOCATIONS:
            like = dict(dtype=result.dtype, device=result.device)
            function = functools.partial(torch.empty_strided, result.shape, result.stride(), **like)
            placed = [], {}
        places = [None if each is None else self._place(each) for each in results]
        places = places[0] if isinstance(result, Tensor) else places
        self._steps.append((function, *placed, places, operator._schema.is_mutable))
        return result

    def _start(self, kernel, compiled, grid, arguments, options):
        if not self._knows(arguments):
            self._possible = False
            return
        # Of tensors that begin in one place any will do: views need not be made for a kernel.
        arguments = [self._by_address[_address(each)][0] if isinstance(each, Tensor) else each for each in arguments]
        keywords = {}
        if compiled is None:  # interpreted
            function = functools.partial(kernel[grid], **options)
        else:
            # As it takes them, past what chose it by dtypes, alignments and integers: all parameters in their order.
            function = compiled[(*grid, 1, 1)[:3]]
            arguments += [options.get(each.name, each.default) for each in kernel.params[len(arguments) :]]
            if _is_of_triton(compiled):
                arguments = [_Address(each) if type(each) is _Place else each for each in arguments]
                keywords = dict(stream=_Stream())  # or each launch would ask for device and stream
        self._steps.append((function, arguments, keywords, [], True))

    def _pattern_of(self, arguments):
        """Code that takes the tensors out of arguments, which get their places."""
        names = []
        for value in arguments:
            if isinstance(value, Tensor):
                names.append(f"t{self._place(value)}")
            else:
                names.append(self._pattern_of(value) if type(value) is list and value else "_")
        return f"({', '.join(names)},)"

    def _place(self, tensor):
        if tensor in self._places:  # an operator that works in place returns its argument
            return self._places[tensor]
        place = self._places[tensor] = _Place(self._count)
        self._count += 1
        _, at_address = self._by_address.get(_address(tensor), (None, lambda: None))
        if at_address() is None:
            self._by_address[_address(tensor)] = place, weakref.ref(tensor)
        return place

    def _knows(self, values):
        return all(tensor in self._places for tensor in _tensors(values))

    def _placed(self, value):
        if isinstance(value, Tensor):
            return self._places.get(value, value)
        return [self._placed(each) for each in value] if isinstance(value, list | tuple) else value


def _is_of_triton(compiled):
    """Whether it is Triton that starts it, and not something that stands in for it."""
    from triton.compiler import CompiledKernel

    return isinstance(compiled, CompiledKernel)


def _address(tensor):
    return (tensor.data_ptr(), tensor.dtype) if tensor.numel() else id(tensor)


class Plan:
    """The steps of a call, to do again: as straight-line code, because a loop over them takes longer than launches.

    Args:
        device: where the call's kernels run.
        pattern: code that takes the tensors out of the arguments.
        lists: which of the arguments are emptied.
        steps: see `Recorder` and `_needed`.
        results: places, or constants.
    """

    def __init__(self, device, pattern, lists, steps, results, returns_tuple):
        self._device, self._steps, self._names = device, steps, {}
        lines = [f"{pattern} = arguments", *(f"arguments[{i}].clear()" for i in lists)]
        for step in steps:
            lines += self._lines(*step)
        results = [self._expression(value) for value in results]
        lines.append(f"return {', '.join(results)}{',' if returns_tuple else ''}")
        exec(compile("def replay(arguments, stream):\n " + "\n ".join(lines), "<replay>", "exec"), self._names)
        self._replay = self._names["replay"]

    def run(self, arguments):
        """What the recorded function would return."""
        kind, index = self._device.type, self._device.index
        with launching.on(self._device), backend.without_autocast(kind):
            return self._replay(arguments, torch._C._cuda_getCurrentRawStream(index) if kind == "cuda" else None)

    def _lines(self, function, args, kwargs, places, effect, ends):
        call = [self._expression(value) for value in args]
        call += [f"{name}={self._expression(value)}" for name, value in kwargs.items()]
        call = f"{self._name(function)}({', '.join(call)})"
        if type(places) is _Place:
            call = f"t{places} = {call}"
        elif places:
            call = f"{', '.join('_' if place is None else f't{place}' for place in places)}, = {call}"
        return [call, "del " + ", ".join(f"t{place}" for place in ends)] if ends else [call]

    def _expression(self, value):
        kind = type(value)
        if kind is _Place:
            return f"t{value}"
        if kind is _Address:
            return f"t{value}.data_ptr()"
        if kind is _Stream:
            return "stream"
        if kind is list:
            return f"[{', '.join(map(self._expression, value))}]"
        return repr(value) if kind in (int, bool, str, type(None)) else self._name(value)

    def _name(self, value):
        """A name for what the code cannot spell."""
        name = f"c{len(self._names)}"
        self._names[name] = value
        return name


def _needed(steps, wanted, kept):
    """The steps with an effect, or with a result that is wanted or that they use, each with the places that end there.

    Args:
        kept: the places of what somebody else keeps.
    """
    wanted, needed = set(wanted), []
    for function, args, kwargs, places, effect in reversed(steps):
        made = set(_places([places]))
        if effect or not wanted.isdisjoint(made):
            used = made.union(_places([args, list(kwargs.values())]))
            # What no later step asks for goes when this one is done.
            needed.append((function, args, kwargs, places, effect, sorted(used - wanted - kept)))
            wanted |= used
    return needed[::-1]


def _places(values):
    for value in values:
        if type(value) in (_Place, _Address):
            yield value
        elif isinstance(value, list):
            yield from _places(value)
