"""CUDA graphs on a CPU, as far as memory goes: what a capture notes, and where its replays read and write.

Nothing runs in a capture. PyTorch's operators and our kernels are noted with the places of their tensors, and memory
comes from a pool in which what was given back is given out again. A replay does what was noted, in those places: who
keeps something there that the graph does not write, or counts on memory that nobody holds, sees it overwritten.
"""

import functools
import weakref
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.fusing import group_calls
from fastgan.kernels import launch as launching
from fastgan.kernels.offline import started_by
from fastgan.ops import chain, fused_layer, operators
from fastgan.ops.replay import ALLOCATIONS
from fastgan.training.graph import StepGraph

POOL_BYTES = 1 << 24
ALIGNMENT = 512


class Place(NamedTuple):
    """Where in a pool a tensor is."""

    offset: int
    shape: torch.Size
    stride: tuple
    dtype: torch.dtype


class Pool:
    """Memory in blocks; each comes back when the last tensor in it is gone."""

    def __init__(self):
        self._bytes = np.full(POOL_BYTES, 0xFF, np.uint8)  # NaN in every floating dtype
        self._free = [(0, POOL_BYTES)]

    def tensor(self, like):
        """A tensor of the dtype, shape and strides of `like`."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        size = -(-max(span, 1) * like.element_size() // ALIGNMENT) * ALIGNMENT
        i, (start, free) = next((i, block) for i, block in enumerate(self._free) if block[1] >= size)
        self._free[i] = start + size, free - size
        memory = self._bytes[start : start + size]
        weakref.finalize(memory, self._give_back, start, size)  # the tensor's storage holds it
        return torch.from_numpy(memory).view(like.dtype).as_strided(like.shape, like.stride())

    def _give_back(self, start, size):
        blocks, self._free = sorted([*self._free, (start, size)]), []
        for start, size in blocks:
            if self._free and sum(self._free[-1]) == start:  # it begins where that ends
                start, size = self._free[-1][0], self._free.pop()[1] + size
            self._free.append((start, size))

    def place(self, tensor):
        """The Place of a tensor, or None if it is elsewhere."""
        offset = tensor.data_ptr() - self._bytes.ctypes.data
        if not 0 <= offset < POOL_BYTES:
            return None
        return Place(offset, tensor.shape, tensor.stride(), tensor.dtype)

    def at(self, place):
        return torch.from_numpy(self._bytes[place.offset :]).view(place.dtype).as_strided(place.shape, place.stride)


class SimulatedGraph(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph; `capturing()` in place of torch.cuda.graph."""

    def __init__(self):
        super().__init__()
        self._pool, self._steps, self._before = Pool(), [], {}

    @contextmanager
    def capturing(self):
        """Within it everything is noted; afterwards tensors from elsewhere, and random numbers, are as before."""
        random = torch.get_rng_state()
        with started_by(self._started), self:
            yield
        for tensor, before in self._before.values():
            tensor.copy_(before)
        torch.set_rng_state(random)

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, places in self._steps:
                result = function(*self._filled(args), **self._filled(kwargs))
                results = result if isinstance(result, tuple | list) else [result]
                for place, each in zip(places, results, strict=False):
                    if place is not None:
                        self._pool.at(place).copy_(each)

    def _started(self, kernel, grid, *args, device, **options):
        start = functools.partial(launching.launch, kernel, grid, device=device, **options)
        self._steps.append((start, self._placed(args), {}, []))

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a capture cannot wait for a number")
        given = [value for value in _flat([args, kwargs]) if isinstance(value, torch.Tensor)]
        noted = self._placed(args), self._placed(kwargs)
        if operator._schema.is_mutable:
            for tensor in given:
                self._keep(tensor)
        known = {_storage(tensor) for tensor in given}
        result = operator(*args, **kwargs)
        results = result if isinstance(result, tuple | list) else [result]
        fresh = [isinstance(each, torch.Tensor) and _storage(each) not in known for each in results]
        results = [self._pool.tensor(each) if new else each for each, new in zip(results, fresh, strict=True)]
        if operator not in ALLOCATIONS and (any(fresh) or operator._schema.is_mutable):
            places = [self._pool.place(each) if new else None for each, new in zip(results, fresh, strict=True)]
            self._steps.append((operator, *noted, places))
        return type(result)(results) if isinstance(result, tuple | list) else results[0]

    def _keep(self, tensor):
        if self._pool.place(tensor) is None and _storage(tensor) not in self._before:
            tensor = tensor.detach()
            self._before[_storage(tensor)] = tensor, tensor.clone()

    def _placed(self, value):
        if isinstance(value, torch.Tensor):
            return self._pool.place(value) or value
        if isinstance(value, dict):
            return {name: self._placed(each) for name, each in value.items()}
        return [self._placed(each) for each in value] if type(value) in (list, tuple) else value

    def _filled(self, value):
        if type(value) is Place:
            return self._pool.at(value)
        if isinstance(value, dict):
            return {name: self._filled(each) for name, each in value.items()}
        return [self._filled(each) for each in value] if type(value) is list else value


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


def _flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    if type(value) not in (list, tuple):
        return [value]
    return [each for item in value for each in _flat(item)]


def simulate_graphs(monkeypatch):
    """Let StepGraph capture and replay on a CPU."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimulatedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: graph.capturing())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", [Mock()])
    for name in ("Stream", "current_stream", "set_stream"):  # all is noted, wherever it runs
        monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
    monkeypatch.setattr(StepGraph, "_aside", lambda graph, images: graph._step(images))
    # A capture sees what operators do, and not the operators.
    for module in (operators, chain, fused_layer, group_calls):
        monkeypatch.setattr(module, "is_traced", lambda tensors: False)
