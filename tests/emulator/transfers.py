"""Instructions that move data: loads and stores, copies into shared memory, and between the lanes of a warp."""

import numpy as np

from tests.emulator.program import instruction, vector
from tests.emulator.types import TYPES

_ELEMENTS = r"(\.v[24])?\.b(8|16|32|64)"


@instruction(r"ld\.param\.[bus](8|16|32|64)|ld\.param\.f32")
def load_parameter(block, op):
    to, name = op.operands
    block.write(to, np.full(block.threads, block.parameters[name.strip("[]")].view(TYPES[op.type])))


@instruction(rf"ld\.(global|shared){_ELEMENTS}")
def load(block, op):
    targets, dtype = vector(op.operands[0]), TYPES[op.type]
    active, size = block.active(), len(targets) * dtype.itemsize
    addresses = block.addresses(op.operands[1])[active]
    memory = block.memory if op.modifiers[0] == "global" else block.shared
    data = memory.load(addresses, size, block.warp[active])
    for i, target in enumerate(targets):
        values = np.zeros(block.threads, dtype)
        values[active] = data.view(dtype)[:, i]
        block.write(target, values)


@instruction(rf"st\.(global|shared|shared::cta){_ELEMENTS}")
def store(block, op):
    active = block.active()
    addresses = block.addresses(op.operands[0])[active]
    values = np.stack([block.read(source, op.type)[active] for source in vector(op.operands[1])], 1)
    memory = block.memory if op.modifiers[0] == "global" else block.shared
    memory.store(addresses, values.view(np.uint8), block.warp[active])


@instruction(r"(atom|red)\.global\.gpu\.relaxed\.add\.u32")
def atomic_add(block, op):
    address, value = op.operands[-2:]
    addresses, values, before = block.addresses(address), block.read(value, "u32"), np.zeros(block.threads, np.uint32)
    for thread in block.active():  # one after the other
        here = addresses[thread : thread + 1]
        before[thread] = block.memory.load(here, 4).view(np.uint32)[0, 0]
        after = before[thread : thread + 1] + values[thread]
        block.memory.store(here, after.view(np.uint8)[None])
    if op.name == "atom":  # `red` does not tell what was there
        block.write(op.operands[0], before)


@instruction(r"cp\.async\.c[ag]\.shared\.global")
def copy(block, op):
    """16 bytes a thread, say; fewer are read where the last operand says so, and zeros take the others' place."""
    active, size = block.active(), int(op.operands[2], 0)
    to, source = (block.addresses(operand)[active] for operand in op.operands[:2])
    read = block.read(op.operands[3], "u32")[active] if len(op.operands) > 3 else np.full(len(active), size)
    data = np.zeros((len(active), size), np.uint8)
    for fewer in np.unique(read[read > 0]):
        some = read == fewer
        data[some, :fewer] = block.memory.load(source[some], int(fewer), block.warp[active][some])
    block.copies.append((block.shared.begin_copy(to, size, block.warp[active]), data))


@instruction(r"cp\.async\.commit_group")
def commit_copies(block, op):
    block.copy_groups.append(block.copies)
    block.copies = []


@instruction(r"cp\.async\.wait_group")
def wait_for_copies(block, op):
    while len(block.copy_groups) > int(op.operands[0], 0):
        for copied, data in block.copy_groups.pop(0):
            block.shared.end_copy(copied, data)


@instruction(r"bar\.sync")
def barrier(block, op):
    block.whole()
    block.shared.barrier()
    block.memory.barrier()


@instruction(r"bar\.warp\.sync")
def warp_barrier(block, op):
    """Nothing: the lanes of a warp are at the same instruction anyway."""


@instruction(r"fence\.proxy\.async\.shared::cta")
def fence(block, op):
    block.whole()
    block.shared.fence()


@instruction(r"griddepcontrol\.(wait|launch_dependents)")
def grid_dependency(block, op):
    """Nothing: a kernel begins here when the one before it has ended."""


@instruction(r"shfl\.sync\.(bfly|idx)\.b32")
def shuffle(block, op):
    """Each lane takes the value of another lane of its warp."""
    block.whole()
    to, value, by, *_ = op.operands
    lane, by = np.arange(block.threads) % 32, block.read(by, "u32")
    source = lane ^ by if "bfly" in op.modifiers else by
    block.write(to, block.read(value, "b32")[block.warp * 32 + source % 32])


def _positions():
    """(row, column) of the two elements of an 8×8 matrix that each lane of a warp holds."""
    lane = np.arange(32)[:, None]
    return lane // 4, lane % 4 * 2 + np.arange(2)


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
def load_matrices(block, op):
    """Of up to four 8×8 matrices a warp, lane 8·j + i gives the address of row i of the j-th."""
    block.whole()
    addresses, warps = block.addresses(op.operands[1]).reshape(-1, 4, 8), np.repeat(np.arange(block.warps), 8)
    for j, target in enumerate(vector(op.operands[0])):
        rows = block.shared.load(addresses[:, j].ravel(), 16, warps).view(np.uint16).reshape(-1, 8, 8)
        if "trans" in op.modifiers:
            rows = rows.transpose(0, 2, 1)
        row, column = _positions()
        block.write(target, np.ascontiguousarray(rows[:, row, column]).view(np.uint32).ravel())


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
def store_matrices(block, op):
    block.whole()
    addresses, warps = block.addresses(op.operands[0]).reshape(-1, 4, 8), np.repeat(np.arange(block.warps), 8)
    for j, source in enumerate(vector(op.operands[1])):
        pairs = np.ascontiguousarray(block.read(source, "b32")).view(np.uint16).reshape(-1, 32, 2)
        rows = np.empty((block.warps, 8, 8), np.uint16)
        row, column = _positions()
        rows[:, row, column] = pairs
        if "trans" in op.modifiers:
            rows = rows.transpose(0, 2, 1)
        data = np.ascontiguousarray(rows).reshape(-1, 8).view(np.uint8)
        block.shared.store(addresses[:, j].ravel(), data, warps)
