"""That a training run on a CPU keeps its memory, where the C library can be told so and nobody said otherwise."""

import ctypes
import os
import subprocess
import sys

import pytest

from fastgan.training import allocation

_FAULTS = """
import resource, torch
from fastgan.training.allocation import keep_freed_memory
keep_freed_memory()
tensors = [torch.ones(2**20) for _ in range(20)]
del tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensors = [torch.ones(2**20) for _ in range(20)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's")
def test_freed_memory_is_used_again():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run([sys.executable, "-c", _FAULTS], env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 5_000  # of the 20,480 pages; without it, every one


@pytest.mark.parametrize("refused", [(), (2**30,)])
def test_what_the_c_library_is_told(monkeypatch, refused):
    told = {}

    class Library:
        @staticmethod
        def mallopt(option, value):
            if value in refused:
                return 0
            told[option] = value
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    allocation.keep_freed_memory()
    assert told == {-1: 2**31 - 1, -3: 2**25 if refused else 2**30}

    told.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")  # somebody's own choice
    allocation.keep_freed_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(sys, "platform", "darwin")
    allocation.keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # musl has no mallopt
    allocation.keep_freed_memory()
    assert not told
