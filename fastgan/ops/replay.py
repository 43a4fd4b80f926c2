"""Functions that start kernels, remembered by what they did, so that a call like an earlier one only does that again.

What such a function does (choices, tiles, memory to allocate, kernels to start) depends on what its arguments look like
and not on their numbers, but finding it out takes longer in Python than small kernels run. The second call with
arguments of one kind is recorded: PyTorch's operators as a dispatch mode sees them, kernels as `launch` tells of them.
Later ones allocate and start the same, on their own tensors, past Triton's look at each argument.

It is for code on a GPU that is not captured in a CUDA graph.
"""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    """

    def __init__(self, function):
        self.function = function
        self._plans = {}

    def __call__(self, *arguments):
        # A capture is made once: it has nothing to gain.
        if not arguments[0].is_cuda or launching.stood_in or torch.cuda.is_current_stream_capturing():
            return self.function(*arguments)
        return self.replay(*arguments)

    def replay(self, *arguments):
        """The call, recorded or replayed, on any device."""
        key = (*_surroundings(), *_signature(arguments))
        plan = self._plans.get(key)
        if type(plan) is Plan:
            return plan.run(arguments)
        if plan is _SEEN:
            recorder = Recorder(arguments)
            result = recorder.record(self.function)
            self._plans[key] = recorder.plan(result) or _NEVER
            return result
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = _SEEN
        return self.function(*arguments)


def _surroundings():
    return choice.generation(), backend.forces_triton(), backend.matmul_precision(torch.float32)


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


class Recorder(TorchDispatchMode):
    """Notes the steps of one call, between numbered tensors.

    A step is (function, arguments, keywords, places of the results, whether it does more than give results): an
    operator of PyTorch, an allocation, or the start of a kernel, which has no results.
    """

    def __init__(self, arguments):
        super().__init__()
        self._arguments = arguments
        self._tensors, self._aliases = [], []  # alive, so that no other takes their addresses
        self._places, self._by_address = {}, {}
        self._steps = []
        tensors = list(_tensors(arguments))
        for tensor in tensors:
            self._place(tensor)
        # What is one memory now need not be at the next call.
        self._possible = len(self._by_address) == len(tensors)

    def record(self, function):
        """function(*arguments), observed."""
        before, launching.watched.started = getattr(launching.watched, "started", None), self._start
        try:
            with self:
                return function(*self._arguments)
        finally:
            launching.watched.started = before

    def plan(self, result):
        """The Plan of what was recorded, or None where it cannot be done again."""
        results = result if isinstance(result, tuple) else (result,)
        kernels = any(not places and effect for *_, places, effect in self._steps)
        if not (self._possible and kernels and self._knows(results)):
            return None
        return Plan(self._tensors, self._steps, self._placed(results), self._arguments, isinstance(result, tuple))

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator is torch.ops.aten.detach.default and self._knows(args):  # without gradients the tensor itself
            result = operator(*args)
            self._places[id(result)] = self._places[id(args[0])]
            self._aliases.append(result)
            return result
        known = self._knows(args) and self._knows(kwargs.values())
        placed = self._placed(args), {name: self._placed([value])[0] for name, value in kwargs.items()}
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
        # In-place operators return an argument, which keeps its place.
        places = [None if each is None else self._place(each) for each in results]
        self._steps.append((function, *placed, places, operator._schema.is_mutable))
        return result

    def _start(self, kernel, compiled, grid, arguments, options):
        if not self._knows(arguments):
            self._possible = False
            return
        # Of tensors that begin in one place any will do: views need not be made for a kernel.
        arguments = [self._by_address[_address(each)] if isinstance(each, Tensor) else each for each in arguments]
        if compiled is None:  # interpreted
            function = functools.partial(kernel[grid], **options)
        else:
            # As it takes them, past what chose it by dtypes, alignments and integers: all parameters in their order.
            function = compiled[(*grid, 1, 1)[:3]]
            arguments += [options.get(each.name, each.default) for each in kernel.params[len(arguments) :]]
            if _is_of_triton(compiled):
                arguments = [_Address(each) if type(each) is _Place else each for each in arguments]
        self._steps.append((function, arguments, {}, [], True))

    def _place(self, tensor):
        if id(tensor) not in self._places:
            place = self._places[id(tensor)] = _Place(len(self._tensors))
            self._tensors.append(tensor)
            self._by_address.setdefault(_address(tensor), place)
        return self._places[id(tensor)]

    def _knows(self, values):
        return all(id(tensor) in self._places for tensor in _tensors(values))

    def _placed(self, values):
        return [
            self._placed(value) if isinstance(value, list | tuple) else self._places.get(id(value), value)
            for value in values
        ]


def _is_of_triton(compiled):
    """Whether it is Triton that starts it, and not something that stands in for it."""
    from triton.compiler import CompiledKernel

    return isinstance(compiled, CompiledKernel)


def _address(tensor):
    return (tensor.data_ptr(), tensor.dtype) if tensor.numel() else id(tensor)


class Plan:
    """The steps of a call, to do again."""

    def __init__(self, tensors, steps, results, arguments, returns_tuple):
        self._device = tensors[0].device
        self._results, self._returns_tuple = results, returns_tuple
        count = sum(1 for _ in _tensors(arguments))
        self._given = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]
        self._in_lists = len(self._given) < count  # some of them: to look for those takes as long as a launch
        self._empty = [None] * (len(tensors) - count)
        wanted = {value for value in results if type(value) is _Place}
        kept = []
        for function, args, kwargs, places, effect in reversed(steps):
            if effect or not wanted.isdisjoint(places):
                used = set(_places([args, list(kwargs.values())]))
                # What no later step asks for goes when this one is done.
                used.update(_places(places))
                ends = [place for place in used - wanted if place >= count]
                kept.append((function, *_template(args), kwargs, places, ends))
                wanted |= used
        self._steps = kept[::-1]

    def run(self, arguments):
        """What the recorded function would return."""
        given = _tensors(arguments) if self._in_lists else [arguments[i] for i in self._given]
        tensors = [*given, *self._empty]
        with launching.on(self._device):
            for function, constants, sources, kwargs, places, ends in self._steps:
                args = constants.copy()
                for i, place in sources:
                    kind = type(place)
                    if kind is _Address:
                        args[i] = tensors[place].data_ptr()
                    else:
                        args[i] = tensors[place] if kind is _Place else _filled(place, tensors)
                result = function(*args, **_filled(kwargs, tensors)) if kwargs else function(*args)
                if places:
                    if isinstance(result, Tensor):
                        tensors[places[0]] = result
                    else:
                        for place, each in zip(places, result, strict=True):
                            if place is not None:
                                tensors[place] = each
                for place in ends:
                    tensors[place] = None
        results = [tensors[value] if type(value) is _Place else value for value in self._results]
        return tuple(results) if self._returns_tuple else results[0]


def _places(values):
    for value in values:
        if type(value) in (_Place, _Address):
            yield value
        elif isinstance(value, list):
            yield from _places(value)


def _template(args):
    """(the arguments with gaps, [(i, what to fill gap i with)])."""
    sources = [(i, value) for i, value in enumerate(args) if next(_places([value]), None) is not None]
    gaps = {i for i, _ in sources}
    return [None if i in gaps else value for i, value in enumerate(args)], sources


def _filled(value, tensors):
    if type(value) is _Place:
        return tensors[value]
    if isinstance(value, dict):
        return {name: _filled(each, tensors) for name, each in value.items()}
    return [_filled(each, tensors) for each in value] if isinstance(value, list) else value
