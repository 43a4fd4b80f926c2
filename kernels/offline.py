"""Compiling kernels without starting them: for a GPU that need not be there, and ahead of time in other processes."""

import importlib
from contextlib import contextmanager
from pkgutil import iter_modules
from typing import NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastgan import kernels
from fastgan.kernels import launch as launching


class Launch(NamedTuple):
    """One start of a kernel, as data that can go to another process."""

    module: str
    kernel: str
    arguments: tuple  # a tensor is represented by its dtype
    options: dict  # compile-time constants, num_warps and num_stages

    @property
    def key(self):
        """Launches with equal keys run the same compiled kernel."""
        return self.module, self.kernel, tuple(map(_specialised, self.arguments)), tuple(sorted(self.options.items()))


def _specialised(argument):
    """What Triton looks at when it chooses the compiled kernel for an argument."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return "float" if isinstance(argument, float) else argument


@contextmanager
def started_by(function):
    """Within it all kernels are started by function(kernel, grid, *arguments, device, **options)."""
    # All of them, so that none is first imported, and keeps the function, while it stands in.
    modules = [importlib.import_module(f"{__package__}.{found.name}") for found in iter_modules(kernels.__path__)]
    users = [module for module in modules if module is not launching and callable(getattr(module, "launch", None))]
    before = [module.launch for module in users]
    stood_in, launching.stood_in = launching.stood_in, True
    for module in users:
        module.launch = function
    try:
        yield
    finally:
        launching.stood_in = stood_in
        for module, own in zip(users, before, strict=True):
            module.launch = own


def record(workload):
    """[Launch] of all that `workload()` would start; nothing is started, so its tensors may be on any device."""
    launches = []

    def recorder(kernel, grid, *arguments, device, **options):
        arguments = tuple(value.dtype if isinstance(value, torch.Tensor) else value for value in arguments)
        launches.append(Launch(kernel.__module__, kernel.__name__, arguments, options))

    with started_by(recorder):
        workload()
    return launches


class _Target:
    """As much of a Triton driver as compiling takes. Triton keeps kernels by device: each capability is one here."""

    def __init__(self, capability):
        self._capability = capability

    def get_current_device(self):
        return self._capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def compiling_for(capability):
    """Triton compiles for CUDA GPUs of this capability (90 for sm_90) and needs none; nothing can be started."""
    before = driver._active  # None before the first use; there is no public way to ask without making one
    driver.set_active(_Target(capability))
    try:
        yield
    finally:
        driver.set_active(before)


def compile_launch(launch):
    """The compiled kernel of a Launch, for the target of `compiling_for`: the very one that would be started.

    Triton also writes it to its cache on disk, where a process that starts it finds it.
    """
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    compiler = launching.compiler_options(driver.active.get_current_target().arch)
    return kernel.warmup(*launch.arguments, grid=(1,), **launching.DEFAULTS | compiler | launch.options)
