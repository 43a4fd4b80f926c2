"""What a capture needs around it, as far as that can be seen without a GPU."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.torch_version import TorchVersion

from fastgan.training.graph import StepGraph, capturing


class Cycle:
    """Garbage once nobody has it: it refers to itself."""

    def __init__(self):
        self.itself = self


class Generator:
    """As much of a CUDA device's generator as there is to see."""

    state = "captured"

    def clone_state(self):
        return "as before"

    def graphsafe_set_state(self, state):
        self.state = state


@pytest.fixture
def streams(monkeypatch):
    """The current ones: as `capturing` found it, then every other that it chose."""
    made = ["found"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", made.append)
    return made


@pytest.fixture
def generators(monkeypatch, streams):
    """Those of two devices, of which the second is the current one."""
    made = Generator(), Generator()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "default_generators", made)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    return made


@pytest.mark.parametrize("enabled", (True, False))
def test_garbage_goes_before_a_capture_and_not_within(enabled, generators):
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        dead = weakref.ref(Cycle())
        with capturing(None):
            assert dead() is None and not gc.isenabled()
        assert gc.isenabled() == enabled
        with pytest.raises(ZeroDivisionError), capturing(None):
            raise ZeroDivisionError
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if before else gc.disable()


@pytest.mark.parametrize("version, states", (("2.12.1", ["captured", "as before"]), ("2.13.0", ["captured"] * 2)))
def test_a_capture_that_fails_leaves_random_numbers_usable(version, states, generators, monkeypatch):
    """Those of its own device, where torch does not; nothing of what other graphs have to do with."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with capturing(None):
        pass
    assert [generator.state for generator in generators] == ["captured"] * 2
    with pytest.raises(ZeroDivisionError), capturing(None):
        raise ZeroDivisionError
    assert [generator.state for generator in generators] == states


def test_a_capture_that_fails_leaves_its_stream(generators, streams):
    with pytest.raises(ZeroDivisionError), capturing(None):
        streams.append("the capture's")
        raise ZeroDivisionError
    assert streams[-1] == "found"


class Stream:
    """Notes the streams that it waits for."""

    def __init__(self, device=None):
        self.waited_for = []

    def wait_stream(self, stream):
        self.waited_for.append(stream)


@pytest.mark.parametrize("fails", (False, True))
def test_what_comes_after_a_step_waits_for_it(fails, monkeypatch):
    """Of a step that fails, too, the first kernels may still have to run."""
    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    def step(images):
        assert not current.waited_for
        if fails:
            raise ZeroDivisionError

    graph = StepGraph(step, device="cuda")
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        graph(None)
    assert current.waited_for == [graph._warmup_stream] and graph._warmup_stream.waited_for == [current]
