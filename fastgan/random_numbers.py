"""The global random generators of Python, NumPy and PyTorch, on the CPU and on every GPU."""

import pickle
import random
from contextlib import contextmanager

import numpy as np
import torch


def rng_state(device):
    """{"cpu": …} and, if that is the device, {"cuda": …}: the states of PyTorch's generators, for `restore_rng`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state, device):
    """Put PyTorch's generators back to what `rng_state` gave, the GPU's if it was of one."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def random_numbers_kept():
    """A context after which the generators are as before it; gives a function that tells whether one was drawn from."""
    # None of a GPU's during a capture, which has no state to ask for.
    usable = torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing()
    on_gpus = list(torch.cuda.default_generators) if usable else []

    def states():
        of_torch = [torch.get_rng_state(), *(generator.get_state() for generator in on_gpus)]
        return random.getstate(), np.random.get_state(), of_torch

    def in_bytes(python, numpy, of_torch):
        return pickle.dumps((python, numpy, [state.numpy() for state in of_torch]))

    before = states()
    try:
        yield lambda: in_bytes(*states()) != in_bytes(*before)
    finally:
        python, numpy, (of_cpu, *of_gpus) = before
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(of_cpu)
        for generator, state in zip(on_gpus, of_gpus, strict=True):
            generator.set_state(state)
