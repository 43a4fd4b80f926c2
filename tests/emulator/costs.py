"""What a kernel's blocks take of an H100's multiprocessors: `python -m tests.emulator.costs --batch 1024`.

One block of each kernel of a 64×64 DCGAN's step, from the middle of its grid, runs in the emulator. Printed is how long
all blocks would keep one unit busy if nothing else held them up, in µs: the schedulers (PTX instructions, which are not
quite the machine's), shared memory (accesses with their bank conflicts, shuffles, operands of wgmma), the matrix units,
and L2 (32-byte sectors). What takes longest is no prediction of the kernel's time, but less than that it cannot take.
--lines shows which source lines take more of shared memory, or more sectors, than their bytes need.
"""

import argparse
import os
import re
from collections import Counter
from functools import partial

import numpy as np

os.environ.pop("TRITON_INTERPRET", None)

import torch

from fastgan.kernels import batch_norm, down, statistics, up, weight_grad
from fastgan.kernels.launch import MatrixTile
from fastgan.kernels.offline import started_by
from tests.emulator.block import Block, parameters_of
from tests.emulator.launch import compiled_program, reachable
from tests.emulator.memory import GlobalMemory, SharedMemory

MULTIPROCESSORS, CYCLES_A_MICROSECOND = 132, 1755
# A multiprocessor's units, by cycle.
SCHEDULERS, SHARED_BYTES, L2_BYTES = 4, 128, 64
MULTIPLICATIONS = {"bf16": 2048, "f16": 2048, "tf32": 1024}


class _CountedBlock(Block):
    """A block that counts, by source line: (used, needed) cycles of shared memory and sectors of global memory."""

    def __init__(self, program, parameters, memory, shared_bytes, position, grid):
        super().__init__(program, parameters, memory, shared_bytes, position, grid)
        self.shared = _CountedShared(shared_bytes, self.warps, self)
        self.memory = _CountedGlobal(memory, self)
        self.instructions = self.shuffles = self.matrix_cycles = 0
        self.used, self.needed = Counter(), Counter()
        self.op = None

    def _guard(self, op):
        self.op = op
        self.instructions += self.warps
        self.shuffles += self.warps if op.name == "shfl" else 0
        product = re.search(r"\.m(\d+)n(\d+)k(\d+)\..*?(bf16|f16|tf32)", op.opcode)
        if product:
            groups = self.warps // 4 if op.name == "wgmma" else self.warps
            m, n, k = map(int, product.groups()[:3])
            self.matrix_cycles += groups * m * n * k / MULTIPLICATIONS[product.group(4)]
        return super()._guard(op)

    def note(self, kind, used, needed):
        key = kind, self.op.source, self.op.opcode
        self.used[key] += used
        self.needed[key] += needed

    def total(self, kind):
        return sum(count for (kind_, *_), count in self.used.items() if kind_ == kind)


class _CountedShared(SharedMemory):
    def __init__(self, size, warps, block):
        super().__init__(size, warps)
        self._block = block

    def _note(self, addresses, size):
        at_once = min(32, SHARED_BYTES // size)  # threads that are served in one cycle, without conflicts
        for first in range(0, len(addresses), at_once):
            words = addresses[first : first + at_once, None] // 4 + np.arange(max(1, size // 4))
            banks = np.bincount(np.unique(words) % 32)
            self._block.note("shared", banks.max(), -(-banks.sum() // 32))

    def load(self, addresses, size, warps):
        self._note(addresses, size)
        return super().load(addresses, size, warps)

    def load_for_wgmma(self, addresses, size, warps):
        data = super().load_for_wgmma(addresses, size, warps)
        self._block.note("shared", data.nbytes / SHARED_BYTES / 2, data.nbytes / SHARED_BYTES / 2)  # read twice here
        return data

    def store(self, addresses, data, warps):
        self._note(addresses, data.shape[1])
        super().store(addresses, data, warps)

    def begin_copy(self, addresses, size, warps):
        self._note(addresses, size)
        return super().begin_copy(addresses, size, warps)


class _CountedGlobal:
    def __init__(self, memory, block):
        self._memory, self._block = memory, block

    def _note(self, addresses, size):
        for first in range(0, len(addresses), 32):
            mine = np.unique(addresses[first : first + 32])
            sectors = len(np.unique(mine // 32))
            self._block.note("global", sectors, -(-len(mine) * size // 32))

    def load(self, addresses, size, warps):
        self._note(addresses, size)
        return self._memory.load(addresses, size, warps)

    def store(self, addresses, data, warps):
        self._note(addresses, data.shape[1])
        self._memory.store(addresses, data, warps)

    def barrier(self):
        self._memory.barrier()

    end_block = barrier


def count_block(kernel, grid, *args, device, **options):
    """What takes the place of a launch. Returns (the counted block, how many blocks a multiprocessor gets)."""
    program, passed, shared_bytes = compiled_program(kernel, args, options)
    grid = (*grid, 1, 1)[:3]
    memory = GlobalMemory(reachable(args))
    middle = tuple(size // 2 for size in grid)
    block = _CountedBlock(program, parameters_of(program, passed), memory, shared_bytes, middle, grid)
    with np.errstate(all="ignore"):
        block.run()
    return block, np.prod(grid) / MULTIPROCESSORS


def layers(batch):
    """{title: function that starts the kernels}."""

    def half(*shape):
        return torch.empty(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    def batch_norm_of(y, groups=1):
        statistics_of_groups, parameters = torch.ones(groups, y.shape[1]), torch.ones(y.shape[1])
        return y, statistics_of_groups, statistics_of_groups, parameters, parameters

    where, leaky = dict(stride=(2, 2), padding=(1, 1), precision="tf32"), dict(activation="leaky_relu", slope=0.2)
    whole = dict(stride=(1, 1), padding=(0, 0), precision="tf32")
    found = {}
    for a, b, size, tile in ((128, 64, 16, (128, 64, 64, 4, 3)), (256, 128, 8, (128, 128, 64, 8, 3))):
        low, high, weight = half(batch, a, size, size), half(batch, b, 2 * size, 2 * size), half(a, b, 4, 4)
        upwards = partial(up.up, low, weight, high.shape[2:], tile=MatrixTile(*tile), **where)
        downwards = partial(down.down, high, weight, low.shape[2:], tile=MatrixTile(*tile), **where)
        gradient = partial(weight_grad.weight_grad, low, high, weight, tile=MatrixTile(128, 128, 64, 4, 3), **where)
        found |= {
            f"up {a}×{b}, statistics": partial(upwards, statistics=True),
            f"up {a}×{b}, back to BatchNorm": partial(upwards, normalized=batch_norm_of(high, 2), **leaky),
            f"down {a}×{b}, back to BatchNorm": partial(downwards, normalized=batch_norm_of(low), **leaky),
            f"weight gradient {a}×{b}": gradient,
        }
    low, image, weight = half(batch, 64, 32, 32), half(batch, 3, 64, 64), half(64, 3, 4, 4)
    downwards = partial(down.down, image, weight, (32, 32), **leaky, **where)
    last, to_last, logits = half(batch, 512, 4, 4), half(1, 512, 4, 4), half(batch, 1, 1, 1)
    from_one = partial(up.up, logits, to_last, (4, 4), normalized=batch_norm_of(last), **leaky, **whole)
    y, mean, invstd, gamma, beta = batch_norm_of(low)
    normalize = partial(batch_norm.normalize_activate, y, mean[0], invstd[0], gamma, beta, activation="relu", slope=0.0)
    return found | {
        "up to images, tanh": partial(up.up, low, weight, (64, 64), activation="tanh", **where),
        "down from images": downwards,
        "down from images, back to BatchNorm": partial(downwards, normalized=batch_norm_of(low)),
        "weight gradient of images": partial(weight_grad.weight_grad, low, image, weight, **where),
        "down to one": partial(down.down, last, to_last, (1, 1), **whole),
        "up from one, back to BatchNorm": from_one,
        "normalize": normalize,
        "statistics": partial(statistics.tile_statistics, y),
    }


def report(title, kernel, block, blocks, lines):
    def microseconds(cycles):
        return blocks * cycles / CYCLES_A_MICROSECOND

    shared, sectors = block.total("shared"), block.total("global")
    units = (
        block.instructions / SCHEDULERS,
        shared + block.shuffles,
        block.matrix_cycles,
        sectors * 32 / L2_BYTES,
    )
    print(_row(title, kernel, *(f"{number:.1f}" for number in (blocks, *map(microseconds, units)))))
    waste = Counter({key: used - block.needed[key] for key, used in block.used.items()})
    for (kind, source, opcode), more in waste.most_common() if lines else ():
        if more > 0.02 * (shared if kind == "shared" else sectors):
            used = block.used[kind, source, opcode]
            print(f"    {source}  {opcode}: {used:.0f} {kind}, {used - more:.0f} needed")


def _row(layer, kernel, *numbers):
    return f"{layer:37}{kernel:27}" + "".join(f"{number:>9}" for number in numbers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="images of a step (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="WORD", help="layers with this in their title")
    parser.add_argument("--lines", action="store_true", help="source lines that take more than they need")
    options = parser.parse_args()
    if options.batch < 2 or options.batch % 2:
        parser.error(f"--batch must be an even number of images, as it is cut in two groups; got {options.batch}")
    chosen = {title: start for title, start in layers(options.batch).items() if options.only in title}
    if not chosen:
        parser.error(f"--only must be part of one of {', '.join(layers(2))}; got {options.only!r}")
    print(_row("layer", "kernel", "a SM", "issue", "shared", "matrix", "L2"))
    for title, start in chosen.items():

        def count(kernel, grid, *args, title=title, **settings):
            block, blocks = count_block(kernel, grid, *args, **settings)
            report(title, kernel.__name__.removesuffix("_kernel"), block, blocks, options.lines)

        with started_by(count):
            start()


if __name__ == "__main__":
    main()
