"""What takes the place of `fastgan.kernels.launch.launch`: kernels compiled for a GPU, and their PTX emulated."""

import functools
import os
from collections import Counter

import torch

from fastgan.kernels import launch as launching
from fastgan.kernels.offline import Launch, compile_launch, compiling_for
from tests.emulator.block import run
from tests.emulator.program import Program

CAPABILITY = int(os.environ.get("FASTGAN_EMULATED_CAPABILITY", "90"))  # sm_90
launches = Counter()  # by the kernels' names

_program = functools.cache(Program)


def compiled_program(kernel, args, options):
    """(Program, the arguments that are its parameters, bytes of shared memory) of a launch."""
    with compiling_for(CAPABILITY):
        compiled = compile_launch(Launch(kernel.__module__, kernel.__name__, args, options))
    # Triton makes constants of None and of 1: those are no parameters.
    types = compiled.src.signature
    names = [parameter.name for parameter in kernel.params]
    passed = [value for name, value in zip(names, args, strict=False) if types[name] != "constexpr"]
    return _program(compiled.asm["ptx"]), passed, compiled.metadata.shared


def reachable(args):
    """The tensors that a kernel may touch: those it is given, and those whose addresses it gets from a table."""
    given = [value for value in args if isinstance(value, torch.Tensor)]
    return given + [tensor for table in given for tensor in getattr(table, "leads_to", ())]


def launch(kernel, grid, *args, device, **options):
    """Run `kernel` on tensors on the CPU, as compiled for these very arguments."""
    program, passed, shared_bytes = compiled_program(kernel, args, options)
    run(program, grid, passed, reachable(args), shared_bytes)
    launches[kernel.__name__] += 1
    launching.report(kernel, _Compiled(kernel, len(args), device, options), grid, args, options)


class _Compiled:
    """As much of Triton's compiled kernel as starts it: compiled[grid](*all parameters in their order)."""

    def __init__(self, kernel, count, device, options):
        self._kernel, self._count, self._options = kernel, count, dict(options, device=device)

    def __getitem__(self, grid):
        return lambda *parameters: launch(self._kernel, grid, *parameters[: self._count], **self._options)
