"""What kernels compiled for a GPU are given by a call, and by its replay: a program, because Triton must not interpret.

Nothing is started: what Triton would hand to CUDA is noted instead. Prints how many launches were compared.
"""

import torch
from torch import nn
from triton.compiler import CompiledKernel

import fastgan
from fastgan import backend
from fastgan.kernels.offline import compiling_for
from fastgan.ops.replay import Plan, Replayed

LEAST_ADDRESS = 2**32  # more than any number that these launches are given
given = []


def note(grid_x, grid_y, grid_z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
    """In place of Triton's launcher: notes kernel, grid and arguments; of a tensor what is compiled in."""
    given.append((function, (grid_x, grid_y, grid_z), [_known(argument) for argument in arguments]))


def _known(argument):
    """(dtype, alignment) of a tensor, the latter of an address, and anything else as it is."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return (None, argument % 16) if isinstance(argument, int) and argument >= LEAST_ADDRESS else argument


def told_by_address(launches):
    """The same launches as a replay makes them."""
    return [
        (*start, [(None, known[1]) if isinstance(known, tuple) else known for known in arguments])
        for *start, arguments in launches
    ]


def step(network, x):
    """The launches of one forward and backward."""
    given.clear()
    network(x).square().sum().backward()
    return list(given)


def main():
    backend.interpreted = lambda: True  # or CPU tensors are refused
    CompiledKernel.run = property(lambda kernel: note)
    CompiledKernel._init_handles = lambda kernel: setattr(kernel, "function", kernel.hash)
    Replayed.__call__ = Replayed.replay
    replays, run = [], Plan.run
    Plan.run = lambda plan, arguments: replays.append(plan) or run(plan, arguments)
    torch.manual_seed(0)
    network = fastgan.fuse(
        nn.Sequential(
            nn.ConvTranspose2d(16, 32, 4, 1, 0, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.Tanh(),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 3, 3, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(3, 1, 3),
        )
    ).to(memory_format=torch.channels_last)
    x = [torch.randn(8, 16, 1, 1, requires_grad=True) for _ in range(3)]
    with compiling_for(90):
        first, recorded = step(network, x[0]), step(network, x[1])
        assert not replays
        replayed = step(network, x[2])
    assert len(replays) == 2 and len(first) > 20, (len(replays), len(first))
    assert first == recorded and told_by_address(recorded) == replayed
    print(len(replayed))


if __name__ == "__main__":
    main()
