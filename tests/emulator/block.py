"""A block of threads that runs a program: its registers, which threads take part, and where it goes on."""

import numpy as np

from tests.emulator import arithmetic, matrices, transfers  # noqa: F401  the instructions
from tests.emulator.matrices import Products
from tests.emulator.memory import GlobalMemory, SharedMemory
from tests.emulator.program import PTXError, executes
from tests.emulator.types import TYPES, immediate, reinterpret, unsigned

_JUMPS = ("bra", "bra.uni", "ret")


class Block:
    """One block of a grid.

    Attributes:
        threads, warps: how many.
        warp: (threads,) the number of each thread's warp.
        parameters: {name: the bits of its value}.
        memory, shared, products: global and shared memory, and what wgmma has on its way.
        copies, copy_groups: cp.async on their way, those not committed yet and the others.
    """

    def __init__(self, program, parameters, memory, shared_bytes, position, grid):
        self.threads, self.warps = program.threads, program.threads // 32
        self.warp = np.arange(self.threads) // 32
        self.parameters, self.memory = parameters, memory
        self.shared, self.products = SharedMemory(shared_bytes, self.warps), Products()
        self.copies, self.copy_groups = [], []
        self._program, self._position = program, position
        self._mask = None  # (threads,) which take part in this instruction, if not all
        self._registers = {"%tid.x": np.arange(self.threads, dtype=np.uint32)}
        for axis, *values in zip("xyz", position, grid, strict=True):
            for name, value in zip(("ctaid", "nctaid"), values, strict=True):
                self._registers[f"%{name}.{axis}"] = np.full(self.threads, value, np.uint32)

    def run(self):
        self._execute()
        try:
            self.memory.end_block()
        except PTXError as error:
            raise PTXError(f"{error}\n  at the end of {self._program.name}, block {self._position}") from error

    def _execute(self):
        at, instructions = 0, self._program.instructions
        while at < len(instructions):
            op = instructions[at]
            at += 1
            try:
                self._mask = self._guard(op)
                if op.opcode in _JUMPS:
                    if self._jumps():
                        if op.opcode == "ret":
                            return
                        at = self._program.labels[op.operands[0]]
                elif self._mask is None or self._mask.any():
                    executes(op.opcode)(self, op)
            except Exception as error:  # operands that the emulator did not expect, too
                what = error if isinstance(error, PTXError) else repr(error)
                raise PTXError(f"{what}\n  in {op}\n  of {self._program.name}, block {self._position}") from error

    def _guard(self, op):
        if op.guard is None:
            return None
        mask = self.read(op.guard, "pred")
        mask = ~mask if op.negated else mask
        return None if mask.all() else mask

    def _jumps(self):
        if self._mask is not None and self._mask.any():
            raise PTXError("threads of one block branch differently")
        return self._mask is None

    def active(self):
        """The numbers of the threads that take part in this instruction."""
        return np.arange(self.threads) if self._mask is None else np.nonzero(self._mask)[0]

    def whole(self):
        """Insists on all of them."""
        if self._mask is not None:
            raise PTXError("an instruction for all threads, of which some do not take part")

    def read(self, operand, type_):
        """(threads,) values of a register or of a constant, as the type."""
        if not operand.startswith("%"):
            # Addresses in shared memory begin with that symbol at 0.
            value = TYPES[type_].type(0) if operand == "global_smem" else immediate(operand, TYPES[type_])
            return np.full(self.threads, value)
        if operand in self.products.written:
            raise PTXError(f"{operand} is read before wgmma, which writes it, was waited for")
        if operand not in self._registers:
            self._registers[operand] = self._undefined(operand)
        return reinterpret(self._registers[operand], TYPES[type_])

    def write(self, operand, values):
        """The threads that take part give a register their values."""
        if operand == "_":
            return
        if operand in self.products.written or operand in self.products.read:
            raise PTXError(f"{operand} is written before wgmma, which uses it, was waited for")
        values = reinterpret(values, self._dtype(operand))
        if self._mask is not None:
            before = self._registers.get(operand)
            values = np.where(self._mask, values, self._undefined(operand) if before is None else before)
        self._registers[operand] = values

    def addresses(self, operand):
        """(threads,) int64 of an operand such as [%rd1+16]; of a register of 32 bits the sum has 32 bits, too."""
        base, _, offset = operand.strip("[] ").partition("+")
        base = base.strip()
        if base.startswith("%") and self._dtype(base).itemsize == 8:
            return self.read(base, "s64") + int(offset or 0)
        return self.read(base, "u32").astype(np.int64) + int(offset or 0) & 0xFFFFFFFF

    def _dtype(self, register):
        return self._program.registers[register.rstrip("0123456789")]

    def _undefined(self, register):
        """What nobody has written: compilers leave, say, halves of registers so that nobody needs."""
        dtype = self._dtype(register)
        if dtype == np.bool_:
            return np.zeros(self.threads, dtype)
        return np.frombuffer(b"\xa5" * dtype.itemsize * self.threads, unsigned(dtype))


def run(program, grid, arguments, tensors, shared_bytes=0):
    """Run a kernel, block after block.

    Args:
        program: a Program.
        grid: blocks along each axis.
        arguments: tensors, integers and floats, in the order of the kernel's parameters; more parameters are zeros.
        tensors: all that it may read and write.
    """
    parameters = parameters_of(program, arguments)
    memory, grid = GlobalMemory(tensors), (*grid, 1, 1)[:3]
    with np.errstate(all="ignore"):
        for z, y, x in np.ndindex(grid[::-1]):
            Block(program, parameters, memory, shared_bytes, (x, y, z), grid).run()


def parameters_of(program, arguments):
    """{name: bits} of a program's parameters; those that are more than the arguments are zeros."""
    arguments = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    return {
        name: _bits(value, TYPES[type_]) for (type_, name), value in zip(program.parameters, arguments, strict=True)
    }


def _bits(value, dtype):
    if hasattr(value, "data_ptr"):
        value = value.data_ptr()
    if dtype.kind == "f":
        return dtype.type(value)
    return np.array(int(value) & (1 << 8 * dtype.itemsize) - 1, unsigned(dtype))[()]
