"""Instructions that multiply matrices: mma, by a warp from registers, and wgmma, by four warps from shared memory.

Which lane holds which element is in "Warp Level Matrix Instructions" and "Asynchronous Warpgroup Level Matrix
Instructions" of NVIDIA's PTX ISA. wgmma multiplies as late as a program allows, when it is waited for: what changes its
operands in the meantime shows.
"""

import re
from typing import NamedTuple

import numpy as np

from tests.emulator.program import PTXError, instruction, vector
from tests.emulator.types import as_floats

_WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}  # by the descriptor's mode of swizzling: the bytes of a row that lie together


def _elements(block, registers, type_):
    """(warps, 32 lanes, registers, elements a register) float32."""
    bits = np.stack([block.read(register, "b32") for register in registers], 1)
    bits = bits if type_ == "tf32" else bits.view(np.uint16)
    return as_floats(bits, type_).reshape(block.warps, 32, len(registers), -1)


def _left(block, registers, type_):
    """(warps, 16, k): the first operand of mma, and of wgmma where that is in registers."""
    elements = _elements(block, registers, type_)
    lane, per_register = np.arange(32)[:, None], elements.shape[3]
    matrix = np.empty((block.warps, 16, 8 * per_register), np.float32)
    for i in range(4):
        column = (lane % 4 + i // 2 * 4) * per_register + np.arange(per_register)
        matrix[:, lane // 4 + i % 2 * 8, column] = elements[:, :, i]
    return matrix


def _right(block, registers, type_):
    """(warps, k, 8): the second operand of mma."""
    elements = _elements(block, registers, type_)
    lane, per_register = np.arange(32)[:, None], elements.shape[3]
    matrix = np.empty((block.warps, 8 * per_register, 8), np.float32)
    for i in range(2):
        row = (lane % 4 + i * 4) * per_register + np.arange(per_register)
        matrix[:, row, lane // 4] = elements[:, :, i]
    return matrix


def _result_positions(registers):
    """(row, column) in a warp's 16 rows of the results that each lane has in its registers: two (32, registers)."""
    lane, i = np.arange(32)[:, None], np.arange(registers)
    return lane // 4 + i // 2 % 2 * 8, lane % 4 * 2 + i % 2 + i // 4 * 8


@instruction(r"mma\.sync\.aligned\.m16n8k(8\.row\.col\.f32\.tf32\.tf32|16\.row\.col\.f32\.(f16\.f16|bf16\.bf16))\.f32")
def multiply(block, op):
    block.whole()
    type_ = op.modifiers[6]
    to, a, b, c = (vector(operand) for operand in op.operands)
    left, right = _left(block, a, type_).astype(np.float64), _right(block, b, type_).astype(np.float64)
    # The sums are in float64, so that warps with the same numbers get the same bits, as they do on a GPU.
    row, column = _result_positions(4)
    product = (left @ right).astype(np.float32)[:, row, column].reshape(-1, 4)
    sums = [product[:, i] + block.read(register, "f32") for i, register in enumerate(c)]
    for register, values in zip(to, sums, strict=True):
        block.write(register, values)


class _Product(NamedTuple):
    """A wgmma that is on its way."""

    accumulators: list  # registers
    left: np.ndarray | None  # (warps, 16, k), if it comes from registers,
    left_registers: list  # these; else none
    descriptors: tuple  # of the operands in shared memory, by warp group: [left,] right
    transposed: tuple  # the same: whether the matrices lie there with their rows and columns exchanged
    accumulates: bool
    columns: int
    depth: int
    type: str


class Products:
    """All that a block has on their way."""

    def __init__(self):
        self._begun, self._groups = [], []
        self.written = set()  # accumulators: registers that no other instruction may read or write,
        self.read = set()  # and others, that none may write

    def begin(self, product):
        self._begun.append(product)
        self._note_registers()

    def commit(self):
        self._groups.append(self._begun)
        self._begun = []

    def wait(self, block, pending):
        """All groups but the last few `pending` are done."""
        done = []
        while len(self._groups) > pending:
            done += self._groups.pop(0)
        self.written, self.read = set(), set()
        for product in done:
            _finish(block, product)
        self._note_registers()

    def _note_registers(self):
        products = [*self._begun, *(product for group in self._groups for product in group)]
        self.written = {register for product in products for register in product.accumulators}
        self.read = {register for product in products for register in product.left_registers}


@instruction(r"wgmma\.fence\.sync\.aligned")
def wgmma_fence(block, op):
    """Nothing: registers are written in order here."""


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def wgmma_commit(block, op):
    block.products.commit()


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def wgmma_wait(block, op):
    block.products.wait(block, int(op.operands[0], 0))


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k(8\.f32\.tf32\.tf32|16\.f32\.(f16\.f16|bf16\.bf16))")
def wgmma(block, op):
    block.whole()
    to, left, right, accumulates, *signs = op.operands
    if signs[:2] != ["1", "1"] or block.threads % 128:
        raise PTXError("the emulator does not know negated operands, nor groups of less than four warps")
    columns, depth = map(int, re.search(r"n(\d+)k(\d+)", op.opcode).groups())
    accumulates = block.read(accumulates, "pred")
    if accumulates.any() and not accumulates.all():
        raise PTXError("threads do not agree on whether to accumulate")
    registers = vector(left) if left.startswith("{") else []
    descriptors = tuple(_descriptors(block, operand) for operand in ([right] if registers else [left, right]))
    transposed = tuple(flag == "1" for flag in signs[2:]) or (False,) * len(descriptors)
    left = _left(block, registers, op.type) if registers else None
    product = _Product(vector(to), left, registers, descriptors, transposed, accumulates.all(), columns, depth, op.type)
    for group in range(block.threads // 128):  # the hardware may read them from now on
        _operands(block, product, group)
    block.products.begin(product)


def _descriptors(block, operand):
    """A matrix descriptor for each warp group."""
    groups = block.read(operand, "u64").reshape(-1, 128)
    if (groups != groups[:, :1]).any():
        raise PTXError("threads of a warp group give different descriptors")
    return groups[:, 0].tolist()


def _matrix(block, group, descriptor, shape, type_, transposed):
    """A (rows, k) matrix that a warp group reads from shared memory.

    It lies there in pieces: eight rows of `width` bytes each, one under the other. `transposed`: their rows are k.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise PTXError("the emulator does not know descriptors with a base offset")
    width, size = _WIDTHS[descriptor >> 62], 4 if type_ == "tf32" else 2
    down, along = np.ogrid[: shape[0], : shape[1]]
    if transposed:
        down, along = along, down
        if width == 16:
            leading, stride = stride, leading
    addresses = start + down // 8 * stride + down % 8 * width + along * size // width * leading + along * size % width
    # A swizzle exchanges the row's 16 bytes by 16, depending on where in 1,024 bytes it lies.
    addresses ^= (addresses >> 7 & width // 16 - 1) << 4
    warps = np.arange(4 * group, 4 * group + 4)
    data = block.shared.load_for_wgmma(addresses.ravel(), size, warps).view(f"u{size}")
    return as_floats(data, type_).reshape(shape)


def _operands(block, product, group):
    """The (64, k) and (columns, k) matrices that a warp group multiplies."""
    type_, depth = product.type, product.depth
    shapes = [(64, depth), (product.columns, depth)][-len(product.descriptors) :]
    matrices = [
        _matrix(block, group, descriptors[group], shape, type_, transposed)
        for descriptors, shape, transposed in zip(product.descriptors, shapes, product.transposed, strict=True)
    ]
    if product.left is not None:
        matrices.insert(0, product.left[4 * group : 4 * group + 4].reshape(64, depth))
    return matrices


def _finish(block, product):
    row, column = _result_positions(len(product.accumulators))
    results = []
    for group in range(block.threads // 128):
        left, right = _operands(block, product, group)
        results.append((left @ right.T).reshape(4, 16, -1)[:, row, column].reshape(128, -1))
    results = np.concatenate(results)
    for i, register in enumerate(product.accumulators):
        before = block.read(register, "f32") if product.accumulates else 0
        block.write(register, results[:, i] + before)
